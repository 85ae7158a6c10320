#!/usr/bin/env bash
# One machine, whatever it has: a CPU, one GPU or several (rows are split over all).
#   launch/local.sh configs/gpt2.py:base runs/gpt2-base [--config.key=value …]
# Run it again to go on after a stop; SIGTERM saves first.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $# -lt 2 ]]; then
  echo "error: usage: launch/local.sh CONFIG WORKDIR [flags]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
# Huge pages spare glibc's page faults on CPU; they change nothing elsewhere.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "${PYTHON:-python}" -m okd_jax.main --config="$config" --workdir="$workdir" "$@"
