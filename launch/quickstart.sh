#!/usr/bin/env bash
# From a fresh clone to a trained model, on a CPU with 2 cores in 6 to 8 minutes: makes the environment, trains
# configs/tiny.py with a live progress line, plots the loss curves, solves held-out tasks and draws one decoding.
# Everything is left in runs/quickstart. Arguments go to the training: launch/quickstart.sh --config.seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir="${REFUSION_WORKDIR:-runs/quickstart}" # another folder for another try

REFUSION_EXTRAS=demo,eval source launch/env.sh
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

echo "== training configs/tiny.py (interrupt it if you like: the next run goes on from there)"
python -m refusion_jax.train --config configs/tiny.py --workdir "$workdir" "$@"
echo "== loss curves"
python tools/plot.py "$workdir" --out "$workdir/loss.png"
echo "== held-out tasks: plan-and-infill against autoregressive decoding of the same model"
for method in plan_and_infill autoregressive; do
  python -m refusion_jax.evaluate --checkpoint "$workdir" --tasks held_out --limit 100 --method $method --out "$workdir/evaluation/$method"
done
echo "== one answer, in the order it was written"
python -m refusion_jax.generate --checkpoint "$workdir" --prompt "refusion" --slot-size 4 --slot-threshold 0.999 --show-order
echo "== a picture and an animation of another; a high slot threshold, for more rounds to look at"
python tools/visualize_decode.py --checkpoint "$workdir" --out "$workdir/decode.png" --slot-size 4 --slot-threshold 0.999

echo
echo "left in $workdir:"
ls "$workdir"
