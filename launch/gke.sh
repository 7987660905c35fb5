#!/usr/bin/env bash
# Trains and serves on Google Kubernetes Engine, on TPU slices or GPU nodes. Needs kubectl; preparing and training: the JobSet API.
#
#   launch/gke.sh prepare NAME --image I --workers 8 [--cpus 8] --config configs/8b.py --out gs://bucket/data   tokenise the data
#   launch/gke.sh start NAME --image I --accelerator tpu-v5p-slice --topology 4x4x4 [--slices 2] --config ... --workdir gs://bucket/8b ...
#   launch/gke.sh start NAME --image I --claim C --accelerator nvidia-h100-80gb --nodes 2 --config ... --workdir /shared/8b ...
#   launch/gke.sh logs NAME    follow all workers
#   launch/gke.sh stop NAME    save, then stop; start again with the same --workdir or --out to go on
#   launch/gke.sh serve NAME --image I --claim C --accelerator nvidia-h100-80gb --gpus-per-node 1 [--replicas 2 --max-replicas 8] --checkpoint /shared/8b ...
#   launch/gke.sh unserve NAME running requests are answered first
#
# --image I        container image with this repository (launch/Dockerfile)
# --claim C        volume claim that all workers can write, mounted at /shared (Filestore, say); for buckets alone it is not needed, but
#                  the pods' service account must be allowed to use them
# --workers N      prepare: pods that share the work (default 1), each with
# --cpus N         prepare: so many cores (default 8)
# --accelerator A  node selector: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x, or a GPU such as nvidia-h100-80gb
# --topology T     TPU: topology of a slice, in chips, such as 4x4 or 4x4x4
# --slices N       TPU: slices (default 1); the mesh's data axis crosses slices, fsdp x tensor stay inside one
# --nodes N        GPU: nodes (default 1), one process each
# --gpus-per-node G  (default 8)
# --replicas N     serve: servers, one on a node (default 1), up to
# --max-replicas N serve: so many while requests wait (default: --replicas; more needs an adapter for Prometheus' metrics in the cluster)
# --keys S         serve: secret whose entry "keys" has an API key on each line; default: no key, for a gateway that asks for one
# --dry-run        print the manifest and the commands, run nothing
# Everything from the first other argument on goes to python -m refusion_jax.train on every worker, or to prepare or serve.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

action="${1:-}" name="${2:-}"
case $action in
  prepare | start | logs | stop | serve | unserve) ;;
  -h | --help | '') usage ;;
  *) die "unknown action $action; use prepare, start, logs, stop, serve or unserve" ;;
esac
[ -n "$name" ] && [ "${name#-}" = "$name" ] || die "$action needs the name of the job: launch/gke.sh $action NAME ..."
shift 2

image='' claim='' accelerator='' topology='' slices=1 nodes=1 gpus=8 replicas=1 most='' keys='' workers=1 cpus=8
while [ $# -gt 0 ]; do
  case $1 in
    --image) image="$(value "$@")"; shift 2 ;;
    --claim) claim="$(value "$@")"; shift 2 ;;
    --accelerator) accelerator="$(value "$@")"; shift 2 ;;
    --topology) topology="$(value "$@")"; shift 2 ;;
    --slices) slices="$(value "$@")"; shift 2 ;;
    --nodes) nodes="$(value "$@")"; shift 2 ;;
    --gpus-per-node) gpus="$(value "$@")"; shift 2 ;;
    --workers) workers="$(value "$@")"; shift 2 ;;
    --cpus) cpus="$(value "$@")"; shift 2 ;;
    --replicas) replicas="$(value "$@")"; shift 2 ;;
    --max-replicas) most="$(value "$@")"; shift 2 ;;
    --keys) keys="$(value "$@")"; shift 2 ;;
    --dry-run) DRY_RUN=yes; shift ;;
    *) break ;;
  esac
done

case $action in
  logs) run kubectl logs --follow --prefix --max-log-requests=1000 "--selector=jobset.sigs.k8s.io/jobset-name=$name"; exit ;;
  stop) run kubectl delete jobset "$name"; exit ;;
  unserve) run kubectl delete "deployment/$name" "service/$name" "poddisruptionbudget/$name" "horizontalpodautoscaler/$name"; exit ;;
esac

[ -n "$image" ] || die "$action needs --image"
[ "$action" = prepare ] || [ -n "$accelerator" ] || die "$action needs --accelerator"
if [ "$action" = serve ]; then
  [ -n "$claim" ] || die "serve needs --claim"
  source "$(dirname "${BASH_SOURCE[0]}")/gke_serve.sh"
  exit
fi
case $action in
  prepare) check_prepare_arguments "$@"; place="$(flag --out "$@")" ;;
  start) check_train_arguments "$@"; place="$(flag --workdir "$@")" ;;
esac
mount='' volume=''
if [ -n "$claim" ]; then
  mount="
              - {name: shared, mountPath: /shared}"
  volume="
            - {name: shared, persistentVolumeClaim: {claimName: $claim}}"
else
  [ "${place#gs://}" != "$place" ] || die "$place needs --claim, a volume that all workers share; or use a bucket, gs://.."
fi

words=(python -m refusion_jax.train "$@")
restart=Never retries=0 # one that dies takes the others with it; all start again from the last checkpoint
if [ "$action" = prepare ]; then
  words=(python -m refusion_jax.prepare "--processes=$cpus" "$@")
  replicas=1 hosts="$workers" resource="cpu: $cpus" selector='{}' annotations='{}'
  environment="[{name: JOB_COMPLETIONS, value: \"$workers\"}]" # which one it is, Kubernetes says
  restart=OnFailure retries=100 # each for itself: finished shards are kept
elif [ "${accelerator#tpu}" != "$accelerator" ]; then
  [[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || die "--topology is '$topology'; give the slice's shape in chips, such as 4x4x4"
  chips=$((${topology//x/*}))
  per_host=$((chips < 4 ? chips : 4))
  replicas="$slices" hosts=$((chips / per_host)) resource="google.com/tpu: $per_host"
  selector="cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology"
  annotations='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}' # a slice is a node pool
  environment='[]' # GKE tells TPU workers about each other
  [ "$slices" = 1 ] || words=(python -m refusion_jax.train "--config.mesh.data=$slices" "$@") # the caller may say more
else
  [ -z "$topology" ] || die "--topology is for TPUs; $accelerator takes --nodes and --gpus-per-node"
  replicas=1 hosts="$nodes" resource="nvidia.com/gpu: $gpus"
  selector="cloud.google.com/gke-accelerator: $accelerator"
  annotations='{}'
  environment="
              - {name: JAX_COORDINATOR_ADDRESS, value: \"$name-workers-0-0.$name:8476\"}
              - {name: JAX_NUM_PROCESSES, value: \"$nodes\"}
              - name: JAX_PROCESS_ID
                valueFrom: {fieldRef: {fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}"
fi
# JSON strings are YAML strings, whatever is in them.
command="$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "${words[@]}")"

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations: $annotations
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
  - name: workers
    replicas: $replicas
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: $retries
        template:
          spec:
            restartPolicy: $restart
            securityContext: {runAsUser: 0}  # the volume may be root's alone
            terminationGracePeriodSeconds: 300  # time to save
            nodeSelector:
              $selector
            containers:
            - name: $action
              image: $image
              workingDir: /refusion_jax
              command: $command
              env: $environment
              resources:
                limits:
                  $resource
              volumeMounts:
              - {name: memory, mountPath: /dev/shm}$mount
            volumes:
            - {name: memory, emptyDir: {medium: Memory}}$volume"

if [ "$DRY_RUN" = yes ]; then
  echo "$manifest"
else
  kubectl apply -f - <<< "$manifest"
fi
