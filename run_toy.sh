#!/usr/bin/env bash
# The whole pipeline on the embedded toy world, on a CPU, from nothing. A second call skips what is finished, an interrupted one goes on.
#   bash run_toy.sh                  data in data/toy, results in runs/toy
#   LOOK=1 bash run_toy.sh           24 pictures and one epoch a stage: does everything run?
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

OUT=${OUT:-runs/toy}
DATA=${DATA:-data/toy}
SEED=${SEED:-0}

# The toy recipe, a line a stage; bench/ablation.py reads it from here. Threshold .4 of the maps was fixed before anything was measured.
PICTURES="--train 384 --val 128"
SHARED="--split train --workers 0 --amp off"
CLS="--generator cnn_toy --no-train-backbone --crop 96 --min-scale 1 --no-randaugment --erase 0 --batch-size 32 --epochs 8 --lr 1e-3 --warmup 1"
MATCH="--crop 96 --min-scale 1 --no-randaugment --erase 0 --batch-size 32 --epochs 4 --lr 2e-3 --lambda-b 0.75"
PROMPT="--crop 96 --min-scale 1 --batch-size 64 --epochs 30 --lr 0.025 --lambda-t 0.02 --views 2"
REFINE="--crop 96 --min-scale 1 --no-randaugment --erase 0 --batch-size 32 --epochs 4 --lr 2e-3 --lambda-b 0.75 --lambda-refine 0.2"
THRESHOLD="--threshold 0.4"

if [ -n "${LOOK:-}" ]; then
    PICTURES="--train 24 --val 8"
    CLS="$CLS --epochs 1" MATCH="$MATCH --epochs 1" PROMPT="$PROMPT --epochs 1" REFINE="$REFINE --epochs 1"
fi

stage() { echo "== $*"; "$PYTHON" "$@"; }
shared="--data $DATA --out $OUT --seed $SEED $SHARED"
clip="--clip $DATA/clip.pt"

stage make_toy.py --out "$DATA" $PICTURES
stage prepare_data.py check "$DATA"
stage train_cls.py $shared $CLS --start "$DATA/backbone.pt"
stage train_match.py $shared $clip $MATCH
stage train_prompt.py $shared $clip $PROMPT
stage train_refine.py $shared $clip $REFINE
for source in cls match refine; do
    stage make_cam.py $shared --source $source --cam cam_$source
    stage eval.py $shared --what cam --cam cam_$source $THRESHOLD
done
echo "== look at $OUT/sheets/*.png (maps), $OUT/eval_*.json (scores with their protocol), $OUT/*.jsonl (losses)"
