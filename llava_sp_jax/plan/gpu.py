"""Describes GPUs to XLA, as text of its `GpuTargetConfig`, so that it compiles without one.

Numbers of the H100 SXM5 80 GB: NVIDIA's H100 white paper and the CUDA programming guide's table of
compute capabilities. The H200 is the same chip with another memory (NVIDIA's H200 data sheet). They
decide which kernels XLA chooses and how much memory a program may use.
"""

from __future__ import annotations

COMPUTE_CAPABILITY = (9, 0)
CUDNN = (9, 10)  # its versions that jax asks for are one number, 91000

_HOPPER = """
gpu_device_info {
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  cuda_compute_capability { major: %(capability)d }
  device_memory_size: %(memory)d
  memory_bandwidth: %(bandwidth)d
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: %(dnn)d minor: %(dnn_minor)d }
device_description_str: "%(name)s"
"""
_SHARED = {"capability": COMPUTE_CAPABILITY[0], "dnn": CUDNN[0], "dnn_minor": CUDNN[1]}
H100 = _HOPPER % {
  **_SHARED,
  "memory": 81559 << 20,
  "bandwidth": 3350 * 10**9,
  "name": "NVIDIA H100 80GB HBM3",
}
H200 = _HOPPER % {
  **_SHARED,
  "memory": 143771 << 20,
  "bandwidth": 4800 * 10**9,
  "name": "NVIDIA H200",
}


def describe_to_jax() -> None:
  """Answers what jax asks a GPU and its cuDNN before it traces attention, for this whole process.

  The program is compiled for a GPU that is absent, and jax asks the one of this machine.
  """
  from jax._src.cudnn import fused_attention_stablehlo

  answers = {
    "check_cudnn_version": lambda: CUDNN[0] * 10000 + CUDNN[1] * 100,
    "check_compute_capability": lambda least: _pair(least) <= COMPUTE_CAPABILITY,
    "is_cuda_compute_capability_equal": lambda other: _pair(other) == COMPUTE_CAPABILITY,
  }
  for name, answer in answers.items():
    setattr(fused_attention_stablehlo, name, answer)


def _pair(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split("."))
