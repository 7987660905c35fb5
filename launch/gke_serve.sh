# The serve action of gke.sh, which sources it: a Deployment with its Service, probes, disruption budget and autoscaling.
[[ " $* " =~ \ --checkpoint[\ =] ]] || die "say what to serve: --checkpoint DIR (a folder on the volume, /shared/...)"
for argument in "$@"; do
  case $argument in
    --host* | --port* | --api-key-file* | --no-key) die "${argument%%=*} is this script's to say; --keys SECRET asks clients for a key" ;;
  esac
done
most="${most:-$replicas}"
[ "$replicas" -ge 1 ] 2> /dev/null && [ "$most" -ge "$replicas" ] 2> /dev/null || die "--replicas is '$replicas' and --max-replicas '$most'; give numbers, the second not below the first"

if [ "${accelerator#tpu}" != "$accelerator" ]; then
  [[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || die "--topology is '$topology'; give the slice's shape in chips, such as 2x2"
  chips=$((${topology//x/*}))
  [ "$chips" -le 8 ] || die "--topology $topology has $chips chips; a server runs on one host, of at most 8"
  resource="google.com/tpu: $chips"
  selector="cloud.google.com/gke-tpu-accelerator: $accelerator
        cloud.google.com/gke-tpu-topology: $topology"
else
  [ -z "$topology" ] || die "--topology is for TPUs; $accelerator takes --gpus-per-node"
  resource="nvidia.com/gpu: $gpus"
  selector="cloud.google.com/gke-accelerator: $accelerator"
fi
key_mount='' key_volume='' key=(--no-key)
if [ -n "$keys" ]; then
  key=(--api-key-file /keys/keys)
  key_mount="
        - {name: keys, mountPath: /keys, readOnly: true}"
  key_volume="
      - name: keys
        secret: {secretName: $keys}"
fi
command="$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' python -m refusion_jax.serve --host 0.0.0.0 --port 8000 "${key[@]}" "$@")"

manifest="apiVersion: apps/v1
kind: Deployment
metadata:
  name: $name
spec:
  replicas: $replicas
  selector: {matchLabels: {app: $name}}
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  template:
    metadata:
      labels: {app: $name}
      annotations: {prometheus.io/scrape: \"true\", prometheus.io/port: \"8000\", prometheus.io/path: /metrics}
    spec:
      terminationGracePeriodSeconds: 330  # running requests are answered first: --grace and a little
      securityContext: {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000}
      nodeSelector:
        $selector
      containers:
      - name: serve
        image: $image
        workingDir: /refusion_jax
        command: $command
        env:
        - {name: JAX_COMPILATION_CACHE_DIR, value: /programs}
        ports:
        - {name: http, containerPort: 8000}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
        startupProbe:  # loading and compiling take minutes
          httpGet: {path: /health, port: http}
          periodSeconds: 5
          failureThreshold: 360
        readinessProbe:
          httpGet: {path: /health, port: http}
          periodSeconds: 5
        livenessProbe:  # not /health, which is 503 while requests are drained
          httpGet: {path: /ping, port: http}
          periodSeconds: 20
          failureThreshold: 3
        lifecycle:
          preStop: {exec: {command: [sleep, \"5\"]}}  # until no more requests are sent here
        resources:
          limits:
            $resource
        volumeMounts:
        - {name: shared, mountPath: /shared, readOnly: true}
        - {name: programs, mountPath: /programs}
        - {name: memory, mountPath: /dev/shm}$key_mount
      volumes:
      - name: shared
        persistentVolumeClaim: {claimName: $claim}
      - name: programs
        emptyDir: {}
      - name: memory
        emptyDir: {medium: Memory}$key_volume
---
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  selector: {app: $name}
  ports:
  - {name: http, port: 80, targetPort: http}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: $name
spec:
  maxUnavailable: 1
  selector: {matchLabels: {app: $name}}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: $name
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: $name}
  minReplicas: $replicas
  maxReplicas: $most
  metrics:
  - type: Pods
    pods:
      metric: {name: \"vllm:num_requests_waiting\"}
      target: {type: AverageValue, averageValue: \"8\"}"

if [ "$DRY_RUN" = yes ]; then
  echo "$manifest"
else
  kubectl apply -f - <<< "$manifest"
fi
