# shellcheck shell=bash disable=SC2154,SC2034 # variables of launch_gke.sh, and by their names
# Sourced by launch_gke.sh, one of the launchers: fills in container/jobset.yaml,
# prints it, and applies it.

# Prints words as the items of a YAML list: strings of JSON.
strings() {
  local word list=()
  for word; do
    word=${word//\\/\\\\}; word=${word//\"/\\\"}; word=${word//$'\n'/\\n}; word=${word//$'\t'/\\t}
    list+=("\"$word\"")
  done
  (IFS=,; echo "${list[*]}")
}

chips=$((${topology//x/*}))
((chips % chips_per_host == 0)) || fail "--chips-per-host: $chips_per_host does not divide $chips chips"
hosts=$((chips / chips_per_host))
arguments=$(strings train --config "$config" --workdir "$workdir" "${train_flags[@]}")
manifest=$(< scripts/container/jobset.yaml)
[ -n "$spot" ] || manifest=${manifest/$'\n              @spot@'/}
for option in name image accelerator topology claim mount slices restarts grace spot hosts \
  chips_per_host arguments; do  # quoted, so that & stays what it is; arguments last, as they are
  manifest=${manifest//"@$option@"/"${!option}"}
done
printf '$ kubectl apply -f - <<EOF\n%s\nEOF\n' "$manifest"
if "$dry_run"; then exit 0; fi
command -v kubectl > /dev/null || fail "kubectl: not found"
kubectl apply -f - <<< "$manifest"
echo "follow it: kubectl logs -f --prefix -l jobset.sigs.k8s.io/jobset-name=$name"
echo "stop it (it saves): kubectl delete jobset $name"
