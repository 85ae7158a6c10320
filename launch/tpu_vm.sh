#!/usr/bin/env bash
# A Cloud TPU slice, from nothing to a finished run; needs gcloud, signed in.
#   launch/tpu_vm.sh create      asks for the slice and waits until it is there
#   launch/tpu_vm.sh install     copies this checkout to all workers and installs it
#   launch/tpu_vm.sh run CONFIG gs://BUCKET/RUN [--config.key=value …]
#                                starts the run on all workers, and leaves it to them
#   launch/tpu_vm.sh logs        follows what a worker prints, from its last lines on
#   launch/tpu_vm.sh stop        SIGTERM: the run saves and ends with 143
#   launch/tpu_vm.sh resume CONFIG gs://BUCKET/RUN [the same flags]
#                                makes a preempted slice anew, and runs again
#   launch/tpu_vm.sh delete      gives the slice back
# --dry-run before any of these, or DRY_RUN=1, prints the commands and runs none.
set -euo pipefail

NAME=${NAME:-okd}                       # of the slice
ZONE=${ZONE:-us-west4-a}                # gcloud compute tpus locations list
PROJECT=${PROJECT:-}                    # empty: gcloud's own
TYPE=${TYPE:-v5litepod-16}              # gcloud compute tpus accelerator-types list
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # the runtime that fits TYPE
SPOT=${SPOT:-1}                         # 0: on demand, not preempted, and dearer
EXTRAS=${EXTRAS:-tpu,gcs}               # of pyproject.toml
RUN_ENV=${RUN_ENV:-}                    # as "HF_HUB_OFFLINE=1 JAX_LOG_COMPILES=1"
WORKER=${WORKER:-0}                     # whose lines `logs` follows; or all
POLL=${POLL:-30}                        # seconds between two looks at the queue
DRY_RUN=${DRY_RUN:-0}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Arguments as one line that a shell reads as the same arguments.
quoted() {
  local word line='' escaped="'\\''"
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
      word="'${word//\'/$escaped}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

do_or_show() {
  if [[ $DRY_RUN == 1 ]]; then quoted "$@"; else "$@"; fi
}

tpus() {
  local what=("$@" "--zone=$ZONE")
  if [[ -n $PROJECT ]]; then what+=("--project=$PROJECT"); fi
  do_or_show gcloud compute tpus "${what[@]}"
}

on_workers() {
  tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

# ACTIVE or READY if the slice can be used, nothing if there is none.
look() {
  if [[ $SPOT == 1 ]]; then
    tpus queued-resources describe "$NAME" --format='value(state.state)'
  else
    tpus tpu-vm describe "$NAME" --format='value(state)'
  fi
}

create() {
  if [[ $SPOT != 1 ]]; then
    tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$VERSION"
    return
  fi
  tpus queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$VERSION" --spot
  await
}

await() {
  local state=''
  if [[ $DRY_RUN == 1 ]]; then
    look
    return
  fi
  until [[ $state == ACTIVE ]]; do
    state=$(look)
    echo "$NAME: $state" >&2
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "the queue ended with $state: launch/tpu_vm.sh delete, then create"
        ;;
      *) sleep "$POLL" ;;
    esac
  done
}

delete() {
  if [[ $SPOT == 1 ]]; then
    # --force takes the node away too, and a request that was suspended.
    tpus queued-resources delete "$NAME" --force --quiet
  else
    tpus tpu-vm delete "$NAME" --quiet
  fi
}

install() {
  local root archive
  root=$(cd "$(dirname "$0")/.." && pwd)
  archive=${TMPDIR:-/tmp}/okd-jax.tgz
  do_or_show tar -czf "$archive" -C "$root" --exclude=.git --exclude=.venv \
    --exclude=__pycache__ --exclude=./runs .
  tpus tpu-vm scp "$archive" "$NAME:okd-jax.tgz" --worker=all
  # The images' own Python may be 3.10. Newer images guard pip; older pips know no such
  # flag but ignore the variable.
  on_workers all "set -e
rm -rf okd-jax && mkdir okd-jax && tar -xzf okd-jax.tgz -C okd-jax
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
uv=\"python3 -m uv\"
\$uv venv --quiet --allow-existing --python 3.12 okd-venv
\$uv pip install --quiet --python okd-venv/bin/python -e 'okd-jax[$EXTRAS]'"
}

run() {
  [[ $# -ge 2 ]] || fail "usage: launch/tpu_vm.sh run CONFIG gs://BUCKET/RUN [flags]"
  case $2 in
    gs://* | /*) ;; # a path is for a disk that all workers mount
    *) fail "the workdir $2 would lie on each worker's disk; name gs://BUCKET/RUN" ;;
  esac
  # ssh may end and the run goes on; the lock keeps a second one off.
  on_workers all "set -e
flock --nonblock okd.lock true || { echo 'a run is going on here'; exit 1; }
nohup setsid sh -c '$(kept)' run \\
  ${RUN_ENV:+$RUN_ENV }PYTHON=\"\$HOME/okd-venv/bin/python\" \\
  okd-jax/launch/local.sh $(quoted "$@") >>okd.log 2>&1 </dev/null &"
}

# What a worker keeps of a run: a lock as long as it lasts, its process id, its status.
kept() {
  cat <<'END'
exec 9>okd.lock
flock --nonblock 9 || exit 1
env "$@" &
echo $! >okd.pid
wait $!
echo "exit status $?"
END
}

resume() {
  [[ $# -ge 2 ]] || fail "usage: launch/tpu_vm.sh resume CONFIG gs://BUCKET/RUN [flags]"
  local state=''
  if [[ $DRY_RUN == 1 ]]; then
    look
    state=SUSPENDED
  else
    state=$(look || true)
  fi
  case $state in
    ACTIVE | READY) ;;
    ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING) # still in the queue
      if [[ $SPOT == 1 ]]; then await; fi
      install
      ;;
    *)
      if [[ -n $state ]]; then delete; fi
      create
      install
      ;;
  esac
  run "$@"
}

logs() { on_workers "$WORKER" "tail -n 50 -F okd.log"; }

stop() {
  on_workers all \
    "flock --nonblock okd.lock echo 'no run here' || kill -TERM \$(cat okd.pid)"
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
case ${1:-} in
  create | install | run | logs | stop | resume | delete) "$@" ;;
  *) fail "usage: launch/tpu_vm.sh create|install|run|logs|stop|resume|delete" ;;
esac
