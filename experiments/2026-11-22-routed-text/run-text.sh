#!/bin/sh
# For each seed the recipe brian-text, and plain decoders of 6, 5 and 4 blocks on its rows, with its learning rate.
# First: pathlm prepare data-sotu --out data/sotu-512 --vocab-size 512
set -e
for seed in ${SEEDS:-0 1 2}; do
  pathlm train brian-text --set out=runs/routed-text --set seed=$seed --set name=routed-$seed
  for blocks in 6 5 4; do
    pathlm train brian-joint --set out=runs/routed-text --set seed=$seed --set name=plain$blocks-$seed \
      --set steps=2300 --set batch_tokens=1024 --set micro_rows=4 --set eval_every=575 --set preset=plain-tiny --set curriculum=default \
      --set model.left_rows=kept --set model.router_hidden=0 --set model.pre_blocks=$((blocks - 1)) --set model.post_blocks=1
  done
done
# Then: python measure.py runs/routed-text data/sotu-512 80000 --blocks 6 5 4 --budget 0.61 --budgets 0.5 0.61 0.7 0.85 1 --results results-text.json
