#!/bin/sh
# Trains models that remember in different ways, and asks each of them for needles; results stand in runs/cache-budget/*/long-context.json.
set -e
here=$(dirname "$0")
row() {  # NAME options …: one row of the table, for each seed
  name=$1
  shift
  for seed in ${SEEDS:-0 1 2}; do
    run=runs/cache-budget/$name-$seed
    test -e "$run/checkpoints/step-00001500" || pathlm train "$here/needle.toml" --set name="$name-$seed" --set seed="$seed" "$@"
    test -e "$run/long-context.json" || pathlm eval "$run" --suite long-context --task needle:keys=1,digits=2 --lengths 64,128,256,512 \
      --split test --samples 300 --batch 50
  done
}
near="--set model.attention_window=16"
row everything
row rows-56 $near --set model.local_window=56
row rows-104 $near --set model.local_window=104
row rows-and-codes $near --set model.local_window=8 --set model.memory=local+canonical
row codes $near --set model.memory=canonical
