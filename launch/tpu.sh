#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice, or on several slices joined by the data-centre network.
#
#   launch/tpu.sh create NAME --type v5p-128 [--slices 2] [--spot] [--zone Z] [--project P]
#   launch/tpu.sh prepare NAME [--slices 2] [--zone Z] [--project P] --config configs/8b.py --out gs://bucket/data ...
#   launch/tpu.sh start  NAME [--slices 2] [--zone Z] [--project P] --config configs/8b.py --workdir gs://bucket/8b ...
#   launch/tpu.sh logs   NAME     follow the training, or the preparing of data, on all workers
#   launch/tpu.sh status NAME     state of the machines, and whether it still runs on each worker
#   launch/tpu.sh stop   NAME     save on all workers, then stop; start again with the same --workdir or --out to go on
#   launch/tpu.sh delete NAME     give the machines back
#
# --type T     accelerator type, such as v5litepod-256, v5p-128 (64 chips) or v6e-64
# --slices N   slices of that type (default 1); the mesh's data axis crosses slices, fsdp x tensor stay inside one
# --spot       machines that may be taken away (the run saves first and can be started again)
# --zone, --project  default to gcloud's own settings
# --dry-run    print the commands, run nothing
# Everything from the first other argument on goes to python -m refusion_jax.train on every worker, or to python -m
# refusion_jax.prepare. Both copy the last commit to the workers and install it there. --workdir and --out are in a bucket that the
# workers' service account can write (gs://..), or on a file system that all workers share (Filestore, say).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

action="${1:-}" name="${2:-}"
case $action in
  create | prepare | start | logs | status | stop | delete) ;;
  -h | --help | '') usage ;;
  *) die "unknown action $action; use create, prepare, start, logs, status, stop or delete" ;;
esac
[ -n "$name" ] && [ "${name#-}" = "$name" ] || die "$action needs the name of the TPU: launch/tpu.sh $action NAME ..."
shift 2

type='' slices=1 spot=() where=()
while [ $# -gt 0 ]; do
  case $1 in
    --type) type="$(value "$@")"; shift 2 ;;
    --slices) slices="$(value "$@")"; shift 2 ;;
    --spot) spot=(--spot); shift ;;
    --zone | --project) place="$(value "$@")"; where+=("$1=$place"); shift 2 ;;
    --dry-run) DRY_RUN=yes; shift ;;
    *) break ;;
  esac
done

queued() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }
all=(--node=all --worker=all --batch-size=all)
everywhere() { queued ssh "$name" "${all[@]}" "--command=$1"; }

# Installs the last commit on every worker and starts a command there, after the lines $1.
launch() {
  local before="$1" archive="${TMPDIR:-/tmp}/refusion_jax.tar.gz"
  shift
  run git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD
  queued scp "$archive" "$name:" "${all[@]}"
  # The TPU images come with Python 3.10.
  everywhere "set -e; mkdir -p refusion_jax; cd refusion_jax; tar -xzf ../refusion_jax.tar.gz
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv python install --quiet 3.12
  export REFUSION_PYTHON=\$(~/.local/bin/uv python find 3.12)
fi
REFUSION_EXTRAS=tpu,hf,gcs source launch/env.sh
$before
nohup $(quoted "$@") >> job.log 2>&1 < /dev/null &
echo \$! > job.pid"
}

case $action in
  create)
    case $type in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v4-*) version=tpu-ubuntu2204-base ;;
      *) die "--type is '$type'; use v4-N, v5litepod-N, v5p-N or v6e-N (tpu7x: launch/gke.sh)" ;;
    esac
    nodes=("--node-id=$name")
    [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
    queued create "$name" "${nodes[@]}" "--accelerator-type=$type" "--runtime-version=$version" "${spot[@]}"
    ;;
  prepare)
    check_prepare_arguments "$@"
    # The machines' own description says which worker each is; JAX, which would read it, is not asked here.
    launch "attribute() { curl -sf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/\$1; }
export TPU_WORKER_ID=\$(attribute agent-worker-number) TPU_WORKER_HOSTNAMES=\$(attribute worker-network-endpoints)
export MEGASCALE_NUM_SLICES=$slices MEGASCALE_SLICE_ID=\$(attribute tpu-env | sed -n \"s/^MEGASCALE_SLICE_ID: *'\([0-9]*\)'.*/\1/p\" | grep . || echo 0)" \
      env JAX_PLATFORMS=cpu python -m refusion_jax.prepare "$@"
    ;;
  start)
    check_train_arguments "$@"
    train=(python -m refusion_jax.train "$@")
    [ "$slices" = 1 ] || train=(python -m refusion_jax.train "--config.mesh.data=$slices" "$@") # the caller may say more
    launch : "${train[@]}"
    ;;
  logs) everywhere 'tail -n 20 -F refusion_jax/job.log' ;;
  status)
    queued describe "$name" '--format=value(state.state)'
    everywhere 'hostname; kill -0 $(cat refusion_jax/job.pid) && echo running || echo not running'
    ;;
  stop) everywhere 'pid=$(cat refusion_jax/job.pid); kill -TERM $pid; while kill -0 $pid 2>/dev/null; do sleep 1; done' ;;
  delete) queued delete "$name" --force ;;
esac
