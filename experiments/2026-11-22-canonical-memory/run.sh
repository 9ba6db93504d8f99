#!/bin/sh
# Codes in the place of rows: three seeds from a routed model whose tokens leave, and one from nothing with a fixed route.
# First: pathlm prepare data-sotu --out data/sotu-512 --vocab-size 512, and for each seed s
#   pathlm train brian-joint --set name=routed-$s --set seed=$s --set out=runs/routed-joint
set -e
knobs="--set knobs.exit_share=1.0 --set knobs.budget=0.625 --set knobs.budget_spread=0.0 --set knobs.probe_share=0.05 --set knobs.exit=0.03"
train="pathlm train brian-joint --set out=runs/canonical-memory"
for seed in ${SEEDS:-0 1 2}; do
  on="--set seed=$seed --set init=runs/routed-joint/routed-$seed --set steps=600 --set optim.lr=1e-3"
  $train $on --set name=rows-$seed --set curriculum=stage-4 $knobs
  $train $on --set name=mixed-$seed --set curriculum=stage-5 $knobs --set model.memory=local+canonical --set model.local_window=16
  $train $on --set name=codes-$seed --set curriculum=stage-5 $knobs --set model.memory=local+canonical  # rows fade until only codes are left
done
# From nothing, routed: the recipe as it is, with another memory; its rows alone are runs/routed-joint.
for seed in ${SEEDS:-0 1 2}; do
  $train --set seed=$seed --set name=joint-mixed-$seed --set model.memory=local+canonical --set model.local_window=16
  $train --set seed=$seed --set name=joint-fade-$seed --set model.memory=local+canonical
done
$train --set seed=0 --set name=joint-codes-0 --set model.memory=canonical --set model.left_rows=kept
# From nothing, 1,000 steps of the fixed route, so that the price of memory is not that of routing.
fixed="--set seed=0 --set steps=1000 --set curriculum=fixed --set model.left_rows=kept"
$train $fixed --set name=fixed-rows-0
$train $fixed --set name=fixed-codes-0 --set model.memory=canonical
$train $fixed --set name=fixed-mixed-0 --set model.memory=local+canonical --set model.local_window=16
$train $fixed --set name=fixed-codes2-0 --set model.memory=canonical --set model.pre_blocks=2 --set model.pool_blocks=3 \
  --set model.max_route_steps=3
still="--set knobs.router_share=0.0 --set knobs.exit_share=0.0 --set knobs.gate=0.0 --set knobs.probe_share=0.0 --set knobs.exit=0.0"
$train $fixed --set name=fixed-fade-0 --set curriculum=stage-5 --set model.memory=local+canonical $still --set knobs.z=0.0 \
  --set knobs.budget_spread=0.0 --set knobs.difficulty_rate=0.01
for run in runs/canonical-memory/*; do
  pathlm eval "$run" --split test --max-tokens 30000 --order 0
done
