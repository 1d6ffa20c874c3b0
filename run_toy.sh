#!/usr/bin/env bash
# The whole pipeline on the embedded toy world, on a CPU, from nothing. A second call skips what is finished.
#   bash run_toy.sh          data in data/toy, results in runs/toy; flags that all scripts share may follow
#   SEED=1 bash run_toy.sh   another seed, in runs/toy_seed1
#   LOOK=1 bash run_toy.sh   24 images, one epoch a stage, in data/toy_look and runs/toy_look: a check
[ "${1:-}" != --help ] || exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

SEED=${SEED:-0} name=toy${LOOK:+_look}
DATA=${DATA:-data/$name}
[ "$SEED" = 0 ] || name=${name}_seed$SEED
OUT=${OUT:-runs/$name}

# The toy recipe, a line a stage, read from here by ablations/. The threshold .4 was fixed before any
# measurement.
IMAGES="--train 384 --val 128"
SHARED="--split train --workers 0 --amp off"
CLS="--generator cnn_toy --no-train-backbone --crop 96 --min-scale 1 --no-randaugment --erase 0 --batch-size 32 --epochs 8 --lr 1e-3 --warmup 1"
MATCH="--crop 96 --min-scale 1 --no-randaugment --erase 0 --batch-size 32 --epochs 4 --lr 2e-3"
PROMPT="--crop 96 --min-scale 1 --batch-size 64 --epochs 30 --lr 0.025 --views 2"
REFINE="--crop 96 --min-scale 1 --no-randaugment --erase 0 --batch-size 32 --epochs 4 --lr 2e-3 --lambda-refine 0.2"
THRESHOLD="--threshold 0.4"
MASKS="--preset deeplab"
SEGMENTS="--source felzenszwalb --min-area 10"
VOTE="--power 1"
SEG="--model deeplab_toy --train-batchnorm --crop 97 --min-scale 0.75 --max-scale 1.25 --batch-size 8
    --iterations 240 --lr 1e-4"
PREDICT="--scales 1 --batch-size 32 --no-crf"
ENLARGED="--scales 1.25 1.5 1.75 --batch-size 32 --no-crf"
LOCALISE="--no-affinity --prompt single"
PROTOTYPES="--tau-i 0.175 --steps 300"
DECODER="--model clip_decoder --lambda-rsc 0.1 --optimizer adamw --lr 2e-3 --width 64 --crop 96
    --min-scale 1.5 --max-scale 1.5 --batch-size 8 --iterations 500"

if [ -n "${LOOK:-}" ]; then
    IMAGES="--train 24 --val 8"
    CLS="$CLS --epochs 1" MATCH="$MATCH --epochs 1" PROMPT="$PROMPT --epochs 1" REFINE="$REFINE --epochs 1"
    SEG="$SEG --iterations 4" DECODER="$DECODER --iterations 4"
fi

stage make_toy.py --out "$DATA" $IMAGES
stage prepare_data.py check "$DATA"

shared=(--data "$DATA" --out "$OUT" --seed "$SEED" $SHARED) clip=(--clip "$DATA/clip.pt") more=("$@")
stage train_cls.py "${shared[@]}" $CLS --backbone "$DATA/backbone.pt"
stage train_match.py "${shared[@]}" "${clip[@]}" $MATCH
stage train_prompt.py "${shared[@]}" "${clip[@]}" $PROMPT
stage train_refine.py "${shared[@]}" "${clip[@]}" $REFINE
for source in cls match refine; do
    stage make_cam.py "${shared[@]}" --source $source --cam cam_$source
    stage eval.py "${shared[@]}" --what cam --cam cam_$source $THRESHOLD
done

stage make_pseudo.py "${shared[@]}" --cam cam_refine $THRESHOLD $MASKS
stage eval.py "${shared[@]}" --what pseudo

# Masks from segments instead of the CRF, as FMA-WSSS makes them of SAM's; superpixels stand in for SAM.
if "$PYTHON" -c 'import skimage' 2>/dev/null; then
    stage -m hosts.make_segments "${shared[@]}" $SEGMENTS
    stage make_pseudo.py "${shared[@]}" --cam cam_refine --segments "$OUT/segments" $VOTE --pseudo \
        pseudo_segments
    stage eval.py "${shared[@]}" --what pseudo --pseudo pseudo_segments
else
    echo "== no scikit-image here (pip install scikit-image): the masks from segments are left out"
fi

stage train_seg.py "${shared[@]}" $SEG --init "$DATA/backbone.pt"
stage eval.py "${shared[@]}" --split val --what seg $PREDICT --save

# VPL, in a folder of its own: its network is another seg.pt. Text maps at both temperatures: a softer softmax
# alone changes maps.
shared=(--data "$DATA" --out "$OUT/vpl" --seed "$SEED" $SHARED)
stage vpl.py "${shared[@]}" "${clip[@]}" $LOCALISE $PROTOTYPES
stage make_cam.py "${shared[@]}" "${clip[@]}" $LOCALISE --source text --cam cam_text
stage make_cam.py "${shared[@]}" "${clip[@]}" $LOCALISE --source text --cam cam_text_soft --tau-t 0.175
stage make_cam.py "${shared[@]}" "${clip[@]}" $LOCALISE --source vision --cam cam_vision
for source in text text_soft vision; do
    stage eval.py "${shared[@]}" --what cam --cam cam_$source $THRESHOLD
done
stage make_pseudo.py "${shared[@]}" --cam cam_vision --background power $MASKS
stage eval.py "${shared[@]}" --what pseudo
stage train_seg.py "${shared[@]}" "${clip[@]}" $DECODER
stage eval.py "${shared[@]}" --split val --what seg $ENLARGED --save

stage report.py --data "$DATA" --out "$OUT" --split train --workers 0 --amp off
echo "== look at $OUT/report.html (the whole run), $OUT/sheets/*.png and $OUT/vpl/sheets/*.png (maps),"
echo "   $OUT/pseudo, $OUT/pred (masks), $OUT/eval_*.json (scores with their protocol), $OUT/*.jsonl (losses)"
