#!/bin/sh
# One model is trained through stages 0 to 2; then hand-over and exit are run from it with one thing changed at a time.
set -e
here=$(dirname "$0")
pathlm train $here/base.toml --set name=base --set seed=0 --set stages.baseline=0.35 --set stages.wrapped=0.1 --set stages.pseudo-routes=0.55 \
  --set stages.hand-over=0 --set stages.exit=0 --set knobs.pseudo-routes.difficulty_rate=0.0 --set knobs.pseudo-routes.imitation=1.0
row() {
  name=$1; shift
  pathlm train $here/base.toml --set name=$name --set init=runs/route-losses/base --set curriculum=route --set steps=400 --set eval_every=200 \
    --set optim.lr=1e-3 --set stages.wrapped=0 --set stages.pseudo-routes=0 --set stages.hand-over=0.5 --set stages.exit=0.5 "$@"
}
for seed in 1 2; do
  row full-$seed --set seed=$seed
  row no-gate-$seed --set seed=$seed --set knobs.hand-over.gate=0.0 --set knobs.exit.gate=0.0
  row imitation-$seed --set seed=$seed --set knobs.hand-over.imitation=0.05 # results.json: it fell from 0.1 to 0.005 in all rows but no-imitation
done
row no-z-1 --set seed=1 --set knobs.hand-over.z=0.0 --set knobs.exit.z=0.0
row no-load-bias-1 --set seed=1 --set knobs.hand-over.load_bias_rate=0.0
row no-exploration-1 --set seed=1 --set knobs.hand-over.noise=0.0 --set knobs.hand-over.random_share=0.0
row other-block-1 --set seed=1 --set knobs.hand-over.other_share=0.1
