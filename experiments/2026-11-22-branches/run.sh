#!/bin/sh
# Several ways at once, from a routed model whose tokens leave: switched on as it is, and trained with two.
# First, as for ../2026-11-22-canonical-memory/run.sh, the models runs/routed-joint/routed-$s.
set -e
knobs="--set knobs.exit_share=1.0 --set knobs.budget=0.625 --set knobs.budget_spread=0.0 --set knobs.probe_share=0.05 --set knobs.exit=0.03"
train="pathlm train brian-joint --set out=runs/branches --set steps=300 --set optim.lr=1e-3"
for seed in ${SEEDS:-0 1 2}; do
  on="--set seed=$seed --set init=runs/routed-joint/routed-$seed"
  $train $on --set name=greedy-$seed --set curriculum=stage-4 $knobs
  $train $on --set name=two-$seed --set curriculum=stage-6 --set model.route_beams=2 $knobs
  for run in runs/routed-joint/routed-$seed runs/branches/greedy-$seed runs/branches/two-$seed; do
    for branches in 1 2 4; do
      pathlm eval "$run" --split test --max-tokens 30000 --order 0 --branches $branches
    done
  done
done
