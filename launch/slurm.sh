#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster.
#
#   launch/slurm.sh submit [options] --config configs/8b.py --workdir /shared/runs/8b ...
#   launch/slurm.sh prepare [--workers N] [--time T] --config configs/8b.py --out /shared/data   tokenise the data on N machines
#   launch/slurm.sh stop JOB     every process saves, then the job ends; submit again with the same --workdir to go on
#   launch/slurm.sh logs JOB     follow the output
#
# --nodes N          nodes (default 1)
# --gpus-per-node G  GPUs of each (default 8)
# --workers N        machines that prepare data, without GPUs (default 1); those that were killed are submitted again
# --process-per P    node: one process drives all GPUs of its node (default); gpu: one process for each GPU
# --time T           limit (default 24:00:00); five minutes before it the run saves and stops
# --name NAME        name of the job (default refusion)
# --sbatch OPTION    one more option of sbatch, such as --sbatch --partition=a100; may be repeated
# --dry-run          print the batch script and the commands, submit nothing
# Everything from the first other argument on goes to python -m refusion_jax.train, or to python -m refusion_jax.prepare. The
# repository must be on a file system that all nodes share; --workdir and --out too, or in a bucket (gs://..).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

action="${1:-}"
[ $# = 0 ] || shift
nodes=1 gpus=8 per=node limit=24:00:00 name=refusion workers=1 job='' extra=()
case $action in
  submit | prepare) ;;
  stop | logs) job="${1:-}"; [ -n "$job" ] || die "$action needs the number of the job"; shift ;;
  -h | --help | '') usage ;;
  *) die "unknown action $action; use submit, prepare, stop or logs" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) nodes="$(value "$@")"; shift 2 ;;
    --gpus-per-node) gpus="$(value "$@")"; shift 2 ;;
    --workers) workers="$(value "$@")"; shift 2 ;;
    --process-per) per="$(value "$@")"; shift 2 ;;
    --time) limit="$(value "$@")"; shift 2 ;;
    --name) name="$(value "$@")"; shift 2 ;;
    --sbatch) extra+=("$(value "$@")"); shift 2 ;;
    --dry-run) DRY_RUN=yes; shift ;;
    *) break ;;
  esac
done

case $action in
  stop) run scancel --signal=TERM "$job"; exit ;;
  logs) run tail -n +1 -F "$ROOT/runs/slurm-$job.log"; exit ;;
esac

if [ "$action" = prepare ]; then
  check_prepare_arguments "$@"
  batch="#!/bin/bash
#SBATCH --job-name=$name-data
#SBATCH --array=0-$((workers - 1))
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --time=$limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$ROOT/runs/slurm-%A-%a.log
$(for option in "${extra[@]}"; do echo "#SBATCH $option"; done)
set -euo pipefail
cd $(quoted "$ROOT")
REFUSION_EXTRAS=hf,gcs source launch/env.sh
$(quoted python -m refusion_jax.prepare "$@")"
  if [ "$DRY_RUN" = yes ]; then
    echo "$batch"
  else
    mkdir -p "$ROOT/runs"
    sbatch <<< "$batch"
  fi
  exit
fi

check_train_arguments "$@"
case $per in
  node) tasks=1 ;;
  gpu) tasks="$gpus" ;;
  *) die "--process-per is $per; use node or gpu" ;;
esac

batch="#!/bin/bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --gpus-per-node=$gpus
#SBATCH --time=$limit
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$ROOT/runs/slurm-%j.log
$(for option in "${extra[@]}"; do echo "#SBATCH $option"; done)
set -euo pipefail
cd $(quoted "$ROOT")
REFUSION_EXTRAS=cuda,hf,gcs source launch/env.sh
srun --kill-on-bad-exit=1 $(quoted python -m refusion_jax.train "$@")"

if [ "$DRY_RUN" = yes ]; then
  echo "$batch"
else
  mkdir -p "$ROOT/runs"
  sbatch <<< "$batch"
fi
