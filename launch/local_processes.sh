#!/usr/bin/env bash
# Several processes on one machine, which train one student together.
#   launch/local_processes.sh 2 configs/gpt2.py:base runs/gpt2-base [flags]
# With NVIDIA GPUs each process gets its even share of them, of those in
# CUDA_VISIBLE_DEVICES if it is set. DEVICES=4 gives each of them 4 simulated devices on
# the CPU instead. [i] stands before each line that process i prints.
#
# Run it again to go on after a stop. SIGTERM or SIGINT reaches all processes: they save
# and end with 143; a second one ends them at once. One that fails takes the others
# down, by SIGKILL after GRACE seconds. The exit status is the first that was not 0.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

[[ $# -ge 3 && $1 =~ ^[1-9][0-9]*$ ]] ||
  fail "usage: launch/local_processes.sh PROCESSES CONFIG WORKDIR [flags]"
processes=$1 config=$2 workdir=$3
shift 3
grace=${GRACE:-60}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Below the ports that the system gives to those who ask for any.
port=${PORT:-}
while [[ -z $port ]]; do
  port=$((20000 + RANDOM % 12000))
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then port=; fi
done

gpus=()
if [[ -n ${DEVICES:-} ]]; then
  export JAX_PLATFORMS=cpu
  XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
  export XLA_FLAGS
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
elif [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] && command -v nvidia-smi >/dev/null; then
  while read -r gpu; do gpus+=("$gpu"); done < <(
    nvidia-smi --query-gpu=index --format=csv,noheader
  )
fi
share=$((${#gpus[@]} / processes))
((share * processes == ${#gpus[@]})) ||
  fail "$processes processes cannot share ${#gpus[@]} GPUs evenly; change either number"

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

prefixed() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

start() {
  local i=$1 mine
  shift
  if ((share)); then
    mine=("${gpus[@]:i * share:share}")
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]}")
    export CUDA_VISIBLE_DEVICES
  fi
  exec "${PYTHON:-python}" -m okd_jax.main --config="$config" --workdir="$workdir" \
    --coordinator="127.0.0.1:$port" --processes="$processes" --process="$i" "$@"
}

# Heard from here on, and told to the processes once all of them are there.
asked=
trap 'asked=yes' TERM INT

# Each job leads its own process group, so that a signal to this script's group reaches
# the processes once, through us: to them a second one means "at once".
set -m
pids=() readers=()
for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/$i.out" "$pipes/$i.err"
  prefixed "$i" <"$pipes/$i.out" &
  readers+=($!)
  prefixed "$i" <"$pipes/$i.err" >&2 &
  readers+=($!)
  start "$i" "$@" </dev/null >"$pipes/$i.out" 2>"$pipes/$i.err" &
  pids+=($!)
done

# From here on bash would only tell, in its own way, who was killed by which signal.
exec 3>&2 2>/dev/null

alive=("${pids[@]}") status=0 told="" deadline=""

tell() {
  local pid
  told=$SECONDS
  for pid in "${alive[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

while ((${#alive[@]})); do
  sleep 0.2 || true
  if [[ -n $asked ]]; then
    asked=
    # `timeout` and others signal a process, then its group: within a second it is one.
    if [[ -z $told ]] || ((SECONDS - told > 1)); then tell TERM; fi
  fi
  left=()
  for pid in "${alive[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    ended=0
    wait "$pid" || ended=$?
    if ((ended && !status)); then
      status=$ended deadline=$((SECONDS + grace))
    fi
  done
  ((${#left[@]})) || break
  alive=("${left[@]}")
  if [[ -n $deadline ]]; then
    [[ -n $told ]] || tell TERM
    if ((SECONDS >= deadline)); then
      echo "error: ${#alive[@]} of $processes processes did not end within $grace s" >&3
      tell KILL
      deadline=$((SECONDS + grace))
    fi
  fi
done
wait "${readers[@]}" || true
exit "$status"
