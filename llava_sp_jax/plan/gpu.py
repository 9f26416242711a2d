"""Describes GPUs to XLA, as text of its `GpuTargetConfig`, so that it compiles without one.

Numbers of the H100 SXM5 80 GB: NVIDIA's H100 white paper and the CUDA programming guide's table of
compute capabilities. The H200 is the same chip with another memory (NVIDIA's H200 data sheet). They
decide which kernels XLA chooses and how much memory a program may use.
"""

_HOPPER = """
gpu_device_info {
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 }
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
dnn_version_info { major: 9 minor: 10 }
device_description_str: "%(name)s"
"""
H100 = _HOPPER % {
  "memory": 81559 << 20,
  "bandwidth": 3350 * 10**9,
  "name": "NVIDIA H100 80GB HBM3",
}
H200 = _HOPPER % {"memory": 143771 << 20, "bandwidth": 4800 * 10**9, "name": "NVIDIA H200"}
