#!/bin/sh
# Trains signal graphs and a plain decoder. First:
#   pathlm prepare data-sotu --out data/sotu-512 --vocab-size 512
#   pathlm prepare songci --tokenizer bpe --out data/songci-512 --vocab-size 512
# `run.sh english` and `run.sh chinese` train what is missing in runs/brillm-heldout/…, a row after the other.
set -e
here=$(dirname "$0")
row() {  # NAME SEEDS options …: one row of the table
  name=$1 seeds=$2
  shift 2
  for seed in $seeds; do
    test -e "$out/$name-$seed/checkpoints/best" || pathlm train "$here/graph.toml" --set out="$out" --set name="$name-$seed" \
      --set seed="$seed" --set data.corpus="$corpus" "$@"
  done
}
counts="--set model.initial_energies=counts --set model.initializer_range=0.1"
forgets="--set model.context=decay --set model.normalise=true"
long="--set data.length=128 --set micro_rows=16"
case $1 in
english)
  out=runs/brillm-heldout/english corpus=${CORPUS:-data/sotu-512}
  row published "0 1"
  row forgetting "0 1" $counts $forgets
  row chain "0 1" --set model.context=chain
  row published-counts "0 1" $counts
  row forgetting-even "0 1" $forgets
  row forgetting-not-normalised "0 1" $counts --set model.context=decay
  row gated "0 1" $counts --set model.context=gated --set model.normalise=true
  row node-decay "0 1" $counts --set model.context=node-decay --set model.normalise=true
  row timescales "0 1" $counts --set model.context=timescales --set model.normalise=true
  row decay+chain "0 1" $counts --set model.context=decay+chain --set model.normalise=true
  row decay+decay "0 1" $counts --set model.context=decay+decay --set model.normalise=true
  row forgetting-length-256 "0 1" $counts $forgets --set data.length=256 --set micro_rows=8
  row published-sampled "0 1" --set model.rivals=400
  row published-frozen "0 1" --set model.train_shared=false
  row published-positions "0 1" --set model.positions=multiplied
  row published-eps "0 1" --set optim.eps=1e-8
  row forgetting-8 "0 1" $counts $forgets --set model.signal_size=8
  row published-32 0 --set model.signal_size=32
  row published-length-256 "0 1" --set data.length=256 --set micro_rows=8
  quarter="--set steps=285 --set eval_every=285"
  row quarter-16 "0 1" $quarter
  row quarter-32 "0 1" $quarter --set model.signal_size=32
  row quarter-64 "0 1" $quarter --set model.signal_size=64
  row best-dropout "0 1" $counts $forgets $long --set steps=4568 --set model.signal_dropout=0.1
  row best-32 0 $counts $forgets $long --set steps=6850 --set model.signal_size=32 --set model.trained_positions=32 --set model.beyond=continue
  row best-32-dropout 0 $counts $forgets $long --set steps=6850 --set model.signal_size=32 --set model.signal_dropout=0.1
  ;;
chinese)
  out=runs/brillm-heldout/chinese corpus=${CORPUS:-data/songci-512}
  row published "0 1"
  row forgetting "0 1" $counts $forgets
  row chain "0 1" --set model.context=chain
  row best-dropout "0 1" $counts $forgets $long --set steps=2768 --set model.signal_dropout=0.1
  ;;
*) echo "run.sh english | chinese"; exit 2 ;;
esac
for seed in 0 1; do
  test -e "$out/plain-$seed/checkpoints/best" || pathlm train "$here/plain.toml" --set out="$out" --set name="plain-$seed" --set seed="$seed" \
    --set data.corpus="$corpus" --set steps="$(python "$here/measure.py" match "$out/published-0" "$here/plain.toml")"
done
if test "$1" = english && ! test -e "$out/quarter-plain-0/checkpoints/best"; then  # as many parameters as a graph of width 16
  pathlm train "$here/plain.toml" --set out="$out" --set name=quarter-plain-0 --set seed=0 --set data.corpus="$corpus" --set steps=285 --set eval_every=285 \
    --set micro_rows=4 --set model.hidden_size=304 --set model.intermediate_size=816 --set model.num_attention_heads=8 \
    --set model.num_key_value_heads=8 --set model.pre_blocks=7 --set optim.lr=1e-3
fi
python "$here/measure.py" table "$out" "$corpus"
