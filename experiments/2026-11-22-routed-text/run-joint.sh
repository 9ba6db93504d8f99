#!/bin/sh
# For each seed a plain decoder of 6, 5 and 4 blocks and the routed model of 6, all by the recipe brian-joint's data, tokens and learning rate.
# First: pathlm prepare data-sotu --out data/sotu-512 --vocab-size 512
set -e
for seed in ${SEEDS:-0 1 2}; do
  train="pathlm train brian-joint --set out=runs/routed-joint --set seed=$seed"
  $train --set name=routed-$seed
  for blocks in 6 5 4; do
    $train --set name=plain$blocks-$seed --set preset=plain-tiny --set curriculum=default --set model.left_rows=kept \
      --set model.router_hidden=0 --set model.pre_blocks=$((blocks - 1)) --set model.post_blocks=1
  done
done
# Then: python measure.py runs/routed-joint data/sotu-512 30000 --blocks 6 5 4 --budgets 0.625 0.7 0.8 0.9 1 --results results-joint.json
