# shellcheck shell=bash disable=SC2154,SC2034 # variables of pod.sh
# Sourced by the two launchers for Cloud TPU, after pod.sh: the loop that trains until the run is
# complete. It replaces a preempted pod, and exits if training fails on a healthy one.

poll_seconds=${POLL_SECONDS:-60} failures=0
again_or_fail() { (( ++failures < 5 )) || fail "$1, $failures times"; sleep "$poll_seconds"; }

state() {  # prints one word of the service, ABSENT, or UNKNOWN if the service does not answer
  local text
  if text=$(describe 2>&1); then echo "${text##*$'\n'}"
  elif [[ $text == *NOT_FOUND* ]]; then echo ABSENT
  else echo "$text" >&2; echo UNKNOWN; fi
}

make_ready() {  # creates the pod, waits for it, and replaces it, until it is ready
  while true; do
    if "$dry_run"; then describe; create; return; fi
    case "$(state)" in
      READY | ACTIVE) return ;;
      ABSENT) create ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete ;;
      FAILED) fail "$name: FAILED; read why with gcloud, and delete it" ;;
      UNKNOWN) again_or_fail "gcloud cannot describe $name" ;;
      *) sleep "$poll_seconds" ;;
    esac
  done
}

train_until_complete() {
  local archive="${TMPDIR:-/tmp}/llava-sp-jax-$name.tgz" vm=(gcloud compute tpus tpu-vm) code flags
  local recipe="${config%%:*}" added=()
  git ls-files --error-unmatch "$recipe" &> /dev/null ||  # one that plan --search wrote
    added=("--prefix=llava-sp-jax/$(dirname "$recipe")/" "--add-file=$recipe")
  flags=$(words --setup "$setup" -- --config "$config" --workdir "$workdir" "${train_flags[@]}")
  run git archive --format=tar.gz "${added[@]}" --prefix=llava-sp-jax/ -o "$archive" HEAD
  while true; do
    make_ready
    code=0
    { run "${vm[@]}" scp "$archive" "$name:llava-sp-jax.tgz" "--zone=$zone" --worker=all &&
      run "${vm[@]}" ssh "$name" "--zone=$zone" --worker=all \
        "--command=tar xzf llava-sp-jax.tgz && bash llava-sp-jax/scripts/on_worker.sh$flags"
    } || code=$?
    [ "$code" -ne 0 ] || return 0
    case "$code:$(state)" in  # 75: llava-sp train was told to stop and has saved
      75:* | *:PREEMPTED | *:TERMINATED | *:SUSPEND* | *:ABSENT) failures=0 ;;
      255:* | *:UNKNOWN) again_or_fail "no connection to $name" ;;
      *) echo "training failed with code $code; train.log on the workers says why" >&2
         return "$code" ;;
    esac
    echo "$name stopped before the end of the run: going on"
  done
}
