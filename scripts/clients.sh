#!/usr/bin/env bash
# Fetches programs of others that slow tests run unchanged, on a CPU: vLLM's benchmark and processors,
# lmms-eval and LangChain. Use: bash scripts/clients.sh DIR, then with LLAVA_SP_CLIENTS=DIR
#   pytest -m slow tests/serve/test_{vllm_bench,lmms_eval,langchain}.py tests/convert/test_vllm.py
#
# Each gets a folder of its own beside the environment of the tests, which has torch and transformers:
# as a whole they want gigabytes of CUDA, and other versions than ours. Versions are those that were
# tried; without their dependencies, because these lists are what the tests import.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
dir=${1:?bash scripts/clients.sh DIR}
python=${PYTHON:-$here/.venv/bin/python}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

fetch() { # fetch FOLDER PACKAGE...
  local folder=$1
  shift
  [[ -e $dir/$folder/.done ]] && return
  "$python" -m pip install --quiet --no-deps --upgrade --target "$dir/$folder" "$@"
}

fetch langchain_openai langchain-openai==1.7.4 langchain-core==1.8.4 langchain-protocol \
  langsmith jsonpatch jsonpointer orjson requests requests-toolbelt tenacity tiktoken uuid-utils \
  zstandard
fetch lmms_eval lmms-eval==0.7.2 datasets==4.8.5 evaluate==0.4.6 pandas==2.3.3 dill multiprocess \
  'filelock<3.25' loguru python-dotenv tenacity sacrebleu portalocker tabulate colorama lxml nltk \
  pytz python-dateutil six tzdata
fetch vllm apache-tvm-ffi blake3 cachetools cbor2 dill einops fastapi llguidance mistral_common \
  opencv-python-headless opentelemetry-api opentelemetry-sdk oss-harmony pandas==2.3.3 \
  partial-json-parser py-cpuinfo pybase64 pycountry pydantic-extra-types python-dateutil \
  python-multipart pytz pyzmq regex requests sentencepiece six tiktoken uvloop watchfiles \
  xgrammar==0.2.8
if [[ ! -e $dir/vllm/vllm ]]; then
  # The source of vLLM: its wheels are built for accelerators. pip wants the name and version of
  # the source before it saves it, and so runs its setup.py, which needs two packages.
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "$python" -m pip install --quiet --no-deps --target "$work/build" \
    setuptools-rust setuptools-scm semantic-version vcs-versioning
  (cd "$work" && PYTHONPATH="$work/build" VLLM_TARGET_DEVICE=tpu VLLM_VERSION_OVERRIDE=0.32.0 \
    "$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation vllm-tpu==0.32.0)
  tar -xzf "$work"/vllm_tpu-*.tar.gz -C "$work"
  mv "$work"/vllm_tpu-*/vllm "$work"/vllm_tpu-*/vllm_tpu.egg-info "$dir/vllm/"
fi
touch "$dir"/{langchain_openai,lmms_eval,vllm}/.done
echo "LLAVA_SP_CLIENTS=$dir"
