# shellcheck shell=bash disable=SC2034 # variables are used by the launchers and pod_train.sh
# Sourced by the launchers for Cloud TPU: holds the options that two of them share. Each of these defines
# the commands `describe`, `create` and `delete` of its service.

name='' zone='' type='' version='' config='' workdir='' setup='' create_flags=() train_flags=()
dry_run=false

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }
fail() { echo "$(basename "$0"): $*; see --help" >&2; exit 2; }
# Prints words quoted for a shell, each after a blank.
words() {
  local word
  for word; do
    if [[ $word =~ ^[[:alnum:]_./:=@%+,-]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
  done
}
# Prints a command as you can type it, and runs it unless --dry-run was given.
run() { echo "\$$(words "$@")"; "$dry_run" || "$@"; }

read_options() {
  local option missing=()
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=true; shift; continue ;;
      --) shift; train_flags=("$@"); break ;;
      --name | --zone | --type | --version | --config | --workdir | --setup | --create-flag) ;;
      *) fail "unknown option $1" ;;
    esac
    [ $# -gt 1 ] || fail "$1 needs a value"
    if [ "$1" = --create-flag ]; then create_flags+=("$2"); else printf -v "${1#--}" %s "$2"; fi
    shift 2
  done
  for option in name zone type version config workdir; do
    [ -n "${!option}" ] || missing+=("--$option")
  done
  [ ${#missing[@]} -eq 0 ] || fail "missing ${missing[*]}"
  [ -f "${config%%:*}" ] || fail "--config: no file ${config%%:*} in $PWD"
  [[ $config != /* && $config != *../* ]] || fail "--config: $config is not in $PWD, which is what workers get"
  [[ $workdir == /* || $workdir == gs://* ]] \
    || fail "--workdir: $workdir is neither a full path (of a disk that all workers share) nor gs://..."
  "$dry_run" || command -v gcloud > /dev/null || fail "gcloud: not found (the Google Cloud CLI)"
}
