#!/bin/sh
# Trains everything in base.toml's folder: for each seed a plain decoder of 6 and of 4 blocks, and the routed model of 6 blocks.
# First: pathlm prepare data-sotu --out data/sotu-512 --vocab-size 512
set -e
here=$(dirname "$0")
for seed in ${SEEDS:-0 1 2}; do
  train="pathlm train $here/base.toml --set seed=$seed"
  $train --set name=plain6-$seed --set preset=plain-tiny --set model.pre_blocks=5 --set model.post_blocks=1
  $train --set name=plain4-$seed --set preset=plain-tiny --set model.pre_blocks=3 --set model.post_blocks=1
  $train --set name=routed-$seed --set stages.baseline=0.5 --set stages.wrapped=0.03 --set stages.pseudo-routes=0 \
    --set stages.hand-over=0.07 --set stages.exit=0.4 --set knobs.exit.budget=0.5625 --set knobs.exit.budget_spread=0.1875 \
    --set knobs.hand-over.noise=0.1 --set knobs.hand-over.random_share=0.0
done
# Then: python measure.py runs/routed-text data/sotu-512 30000
