#!/usr/bin/env bash
# Trains on this machine's CPU as if it had several devices: for trying out meshes and runs of several processes.
#
#   launch/local_cpu.sh [--devices 8] [--processes 1] [--dry-run] --config configs/tiny.py --workdir runs/eight ...
#
# --devices D    devices altogether, shared evenly by the processes
# --processes P  processes, which find each other on a free port of this machine
# --dry-run      print the commands, run nothing
# Everything from the first other argument on goes to python -m refusion_jax.train.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

devices=8 processes=1
while [ $# -gt 0 ]; do
  case $1 in
    --devices) devices="$(value "$@")"; shift 2 ;;
    --processes) processes="$(value "$@")"; shift 2 ;;
    --dry-run) DRY_RUN=yes; shift ;;
    -h | --help) usage ;;
    *) break ;;
  esac
done
check_train_arguments "$@"
[ $((devices % processes)) = 0 ] || die "--devices $devices cannot be shared evenly by --processes $processes"

cd "$ROOT"
[ "$DRY_RUN" = yes ] || source launch/env.sh
settings=(JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$((devices / processes)))
if [ "$processes" = 1 ]; then
  run env "${settings[@]}" python -m refusion_jax.train "$@"
  exit
fi

port=12355
[ "$DRY_RUN" = yes ] || port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
settings+=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes")
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM # each saves; the script waits for them
for ((process = 0; process < processes; process++)); do
  command=(env "${settings[@]}" "JAX_PROCESS_ID=$process" python -m refusion_jax.train "$@")
  if [ "$DRY_RUN" = yes ]; then
    quoted "${command[@]}"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
# The first that fails decides the result. The others would wait for it in vain: five seconds later they are killed.
status=0 end=
while [ "${#pids[@]}" -gt 0 ]; do
  for process in "${!pids[@]}"; do
    kill -0 "${pids[$process]}" 2>/dev/null && continue
    result=0
    wait "${pids[$process]}" || result=$?
    unset "pids[$process]"
    if [ "$result" != 0 ] && [ "$status" = 0 ]; then
      echo "process $process of $processes ended with status $result; the others are ended too" >&2
      status=$result end=$((SECONDS + 5))
    fi
  done
  if [ "$status" != 0 ] && [ "${#pids[@]}" -gt 0 ] && [ "$SECONDS" -ge "$end" ]; then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  sleep 0.1
done
exit "$status"
