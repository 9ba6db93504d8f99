#!/bin/sh
# Trains signal graphs of several wirings, and a plain decoder with the operations of the first. First:
#   pathlm prepare data-sotu --out data/sotu-512 --vocab-size 512
# Settings by environment: SEEDS, WIRINGS (names below), CORPUS, STEPS, WIDTH.
set -e
here=$(dirname "$0")
corpus=${CORPUS:-data/sotu-512} steps=${STEPS:-80} width=${WIDTH:-16}
for wiring in ${WIRINGS:-pooled decay-normalised}; do
  case $wiring in
    pooled) options="" ;;
    chain) options="--set model.context=chain" ;;
    *-normalised-kept) options="--set model.context=${wiring%-normalised-kept} --set model.normalise=true --set model.keep_initial=true" ;;
    *-normalised) options="--set model.context=${wiring%-normalised} --set model.normalise=true" ;;
    *) options="--set model.context=$wiring" ;;
  esac
  for seed in ${SEEDS:-0 1}; do
    test -e "runs/brillm-heldout/$wiring-$seed" || pathlm train "$here/graph.toml" --set name="$wiring-$seed" --set seed="$seed" \
      --set data.corpus="$corpus" --set steps="$steps" --set model.signal_size="$width" $options
    last="runs/brillm-heldout/$wiring-$seed"
  done
done
for seed in ${SEEDS:-0 1}; do
  test -e "runs/brillm-heldout/plain-$seed" || pathlm train "$here/plain.toml" --set name="plain-$seed" --set seed="$seed" \
    --set data.corpus="$corpus" --set steps="$(python "$here/measure.py" match "$last" "$here/plain.toml")"
done
python "$here/measure.py" table runs/brillm-heldout "$corpus"
