#!/usr/bin/env bash
# The papers' recipes on COCO 2014, from the images to the score of a network on val. A second call
# skips what is finished, an interrupted one goes on.
#   COCO=/data/coco bash run_coco.sh                                  COCO as downloaded is prepared in DATA
#   COCO=/data/coco METHOD=vpl GPUS=4 bash run_coco.sh --workers 16   flags that all scripts share
#   COCO=/data/coco LOOK=1 bash run_coco.sh --limit 64                64 images, a few steps a stage, to try
# METHOD  semples (default), vpl, clip_es
# HOST    what SemPLeS improves (Table 4): weaktr, clims, or fma: weaktr's maps, masks by SAM's segments
# NET     deeplab (default), segmenter (WeakTr's), mask2former (default for fma); VPL has its own
#         deeplab_coco: starts from deeplab-pytorch's weights of COCO's masks, in DEEPLAB (another experiment)
# OUT     results: runs/coco; coco_vpl, coco_clip_es, coco_clims, coco_fma; ..._look, ..._seed1. Another NET
#         wants another OUT, or the masks of the first: docs/running.md
# DATA    data/coco     SEED, GPUS (more than one: torchrun)
# NODES, NODE, HEAD  several machines: docs/running.md
# INIT    published WeakTr, SemPLeS or CLIMS generator to start from instead of training one
# CLIP32, CLIP16  what stands for OpenAI's ViT-B/32 and ViT-B/16: a file, a folder, a name on the hub
# SAM, SWIN       names or folders of a SAM and of Mask2Former's Swin, as transformers has them
# START=none      no ImageNet weights: what is otherwise downloaded

[ "${1:-}" != --help ] || exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
if [ -z "${COCO:-}" ]; then
    echo "run_coco.sh: no COCO given: download train2014.zip, val2014.zip and annotations_trainval2014.zip" \
        "(cocodataset.org), unpack them in one folder, COCO=that/folder bash run_coco.sh" \
        "(bash run_toy.sh needs no download)" >&2
    exit 1
fi
METHOD=${METHOD:-semples} HOST=${HOST:-weaktr} net=deeplab
[ "$HOST" != fma ] || net=mask2former
NET=${NET:-$net}

refuse() { echo "run_coco.sh: $1" >&2; exit 1; }
case "$METHOD" in semples | vpl | clip_es) ;; *) refuse "METHOD=$METHOD: semples, vpl or clip_es" ;; esac
case "$HOST" in weaktr | clims | fma) ;; *) refuse "HOST=$HOST: weaktr, clims or fma" ;; esac
case "$NET" in
    deeplab | deeplab_coco | segmenter | mask2former) ;;
    *) refuse "NET=$NET: deeplab, deeplab_coco, segmenter or mask2former" ;;
esac
[ "$METHOD" != vpl ] || [ "$NET" = deeplab ] || refuse "NET=$NET: VPL has its own network"
[ "$METHOD" = semples ] || [ "$HOST" = weaktr ] || refuse "HOST=$HOST goes with METHOD=semples"
[ "$NET" != deeplab_coco ] || [ -n "${DEEPLAB:-}" ] || refuse "NET=deeplab_coco: no DEEPLAB given"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

name=coco_$METHOD
[ "$HOST" = weaktr ] || name=coco_$HOST
name=${name%_semples}${LOOK:+_look}
[ "${SEED:-0}" = 0 ] || name=${name}_seed$SEED
OUT=${OUT:-runs/$name}
DATA=${DATA:-data/coco}
START=${START:-imagenet} CLIP32=${CLIP32:-ViT-B/32} CLIP16=${CLIP16:-ViT-B/16}
once=${LOOK:+--epochs 1} steps=${LOOK:+--steps 20} small=${LOOK:+--crop 64}
few=${LOOK:+--iterations 2 --batch-size 2 --crop 64} points=${LOOK:+--points 2 --crop-layers 0}
if [ -d "$COCO/JPEGImages" ]; then
    DATA=$COCO
else
    stage prepare_data.py coco --coco "$COCO" --out "$DATA"
fi
# As the authors: fp16 on a GPU, and but for CLIMS what CLIP sees normalised by ImageNet's statistics.
shared=(--data "$DATA" --out "$OUT" --seed "${SEED:-0}" --amp "$(precision "$@")") more=("$@") spread=1
init=(${INIT:+--init "$INIT"}) crf="--crf --iterations 10"

if [ "$METHOD$HOST" = semplesclims ]; then
    # hardware, time, score: not yet measured (the paper has no such row).
    # INIT: IRN's res50_cam.pth; a finished CLIMS is trained on. CLIMS alone: make_cam.py --source match.
    clims="--lambda-match 2 --lambda-b 7 --lambda-cbs 1.25 --tau-cbs 0.285 --lambda-reg 0.2"
    stage -m hosts.train_cam "${shared[@]}" --split train --backbone "$START" ${init[@]+"${init[@]}"} \
        --epochs 5 --lr 0.1 $once $small
    stage -m hosts.train_clims "${shared[@]}" --split train --clip "$CLIP32" $clims --epochs 8 --lr 5e-4 \
        $once $small
    stage train_prompt.py "${shared[@]}" --split train --clip "$CLIP32" --batch-size 128 --epochs 60 --lr \
        2.5e-3 --weight-decay 0.03 --lambda-t 0.01 --repel one_minus --prompt-length 30 --prompt-init \
        uniform --views 0 --crop 512 --min-scale 0.5 $once $small
    stage -m hosts.train_clims "${shared[@]}" --split train --stage refine --clip "$CLIP32" $clims --epochs \
        8 --lr 5e-4 --lambda-refine 0.4 $once $small
    stage make_cam.py "${shared[@]}" --split train --source refine --scales 1.0 0.5 1.5 2.0 --flip
    stage eval.py "${shared[@]}" --split train --what cam --threshold 0.15
    stage make_pseudo.py "${shared[@]}" --split train --threshold 0.15 $crf --preset irn
elif [ "$METHOD" = semples ]; then
    # hardware, time, score: not yet measured (paper: V100s; it scores neither maps nor masks here).
    # Classifier: WeakTr's rate, 2e-4 x batch / 512.
    augment="--crop 224 --min-scale 0.08 --randaugment --erase 0.25 --drop-path 0.1 --weight-decay 0.03"
    match="--lambda-b 0.75 --mask-eps 0.1 --mask-fill imagenet"
    stage train_cls.py "${shared[@]}" --split train --generator deit_small --backbone "$START" \
        ${init[@]+"${init[@]}"} --pool avg --reduction 4 --batch-size 64 --epochs 60 --lr 2.5e-5 --warmup 5 \
        --warmup-lr 1e-6 --min-lr 1e-5 $augment $once
    stage train_match.py "${shared[@]}" --split train --clip "$CLIP32" --pool avg --batch-size 32 --epochs \
        60 --lr 3.2e-7 $match $augment $once
    stage train_prompt.py "${shared[@]}" --split train --clip "$CLIP32" --pool avg --batch-size 128 \
        --epochs 60 --lr 2.5e-3 --weight-decay 0.03 --lambda-t 0.01 --lambda-i 1 --repel one_minus \
        --prompt-length 30 --prompt-init uniform --views 0 --mask-eps 1e-4 --mask-fill imagenet --crop 224 \
        --min-scale 0.08 $once
    stage train_refine.py "${shared[@]}" --split train --clip "$CLIP32" --pool avg --batch-size 24 --epochs \
        60 --lr 2.4e-7 --lambda-refine 0.2 $match $augment $once
    stage make_cam.py "${shared[@]}" --split train --source refine --pool avg --scales 1.0 0.8 1.2 --flip
    stage eval.py "${shared[@]}" --split train --what cam --threshold 0.42
    if [ "$HOST" = fma ]; then
        stage -m hosts.make_segments "${shared[@]}" --split train --source sam --sam \
            "${SAM:-facebook/sam-vit-huge}" --points 32 --crop-layers 1 --pred-iou 0.86 --stability 0.92 \
            --nms 0.7 --min-area 100 --whole-bonus 0.1 --whole-first --covered 0.3 --amp off $points
        stage make_pseudo.py "${shared[@]}" --split train --segments "$OUT/segments" --vote sams --power 1
    else
        stage make_pseudo.py "${shared[@]}" --split train --threshold 0.42 $crf --preset irn
    fi
else
    # hardware, time, score: not yet measured (paper: eight 4090s; it scores neither maps nor masks here).
    # Steps and temperatures are those of VOC.
    by=text localise="--prompt ensemble --tau-t 0.01 --affinity --box 0.7"
    if [ "$METHOD" = vpl ]; then
        by=vision
        stage vpl.py "${shared[@]}" --split train --clip "$CLIP16" $localise --tau-i 0.03 --phi 0.4 \
            --features value --pool pixel --target soft --harden 0.6 --no-label-mask --background-pixels \
            --learn-background --max-pixels 4000000 --steps 3000 --lr 10 $steps
    fi
    stage make_cam.py "${shared[@]}" --split train --clip "$CLIP16" $localise --source $by --scales 1.0 \
        --no-flip
    stage eval.py "${shared[@]}" --split train --what cam --background power --alpha 1
    stage make_pseudo.py "${shared[@]}" --split train --background power --alpha 1 $crf --preset deeplab \
        --ignore-below 0.95
fi
stage eval.py "${shared[@]}" --split train --what pseudo

if [ "$METHOD" = vpl ]; then
    # score: not yet measured (paper: 49.2 on val). Rate and crop are not the paper's, which gives none;
    # steps: VOC's.
    stage train_seg.py "${shared[@]}" --split train --model clip_decoder --clip "$CLIP16" --init none \
        --batch-size 6 --iterations 30000 --optimizer adamw --lr 2e-3 --weight-decay 1e-4 --crop 320 \
        --min-scale 0.5 --max-scale 1.5 --width 256 --logits raw --lambda-rsc 1 $few
elif [ "$NET" = segmenter ]; then
    # score: not yet measured (the paper has no such row). WeakTr's code: 256 epochs of 16 at 1e-3.
    stage train_seg.py "${shared[@]}" --split train --model segmenter_deit_small --init "$START" \
        --batch-size 16 --iterations 1313000 --optimizer sgd --lr 1e-3 --weight-decay 0 --crop 480 \
        --min-scale 0.5 --max-scale 2 --clamp-start 1.2 $few
elif [ "$NET" = deeplab_coco ]; then
    # score: not yet measured (the papers have no such row)
    stage train_seg.py "${shared[@]}" --split train --model deeplabv2_resnet101_caffe --init "$DEEPLAB" \
        --batch-size 10 --iterations 100000 --optimizer sgd --lr 2.5e-4 --weight-decay 5e-4 --crop 321 \
        --min-scale 0.5 --max-scale 1.5 $few
elif [ "$NET" = mask2former ]; then
    # score: not yet measured (SemPLeS Table 3: 56.1 on val with FMA-WSSS as host)
    stage -m hosts.train_mask2former "${shared[@]}" --split train --model mask2former_swin_large --init \
        "${SWIN:-$START}" --batch-size 4 --iterations 100000 --lr 1e-4 --weight-decay 0.05 --crop 512 \
        --min-scale 0.5 --max-scale 2 $few
else
    # score: not yet measured (SemPLeS: 56.1 on val, with Mask2Former and SAM; CLIP-ES: 45.4)
    stage train_seg.py "${shared[@]}" --split train --model deeplabv2_resnet101 --init "$START" \
        --batch-size 10 --iterations 100000 --optimizer sgd --lr 2.5e-4 --weight-decay 5e-4 --crop 321 \
        --min-scale 0.5 --max-scale 1.5 $few
fi
# Every network is tested as its own authors test it.
case "$NET" in
    mask2former) test="--scales 1.0 --no-flip --no-crf" ;;
    segmenter) test="--scales 0.7 1.05 1.4 1.75 2.1 2.45 --flip --crf --preset segmenter" ;;
    *) test="--scales 0.5 0.75 1.0 1.25 1.5 1.75 --flip --crf --preset deeplab" ;;
esac
stage eval.py "${shared[@]}" --split val --what seg $test --save
spread=
stage report.py "${shared[@]}" --split train
echo "== look at $OUT/report.html (the whole run), $OUT/sheets/*.png (maps), $OUT/pseudo, $OUT/pred (masks),"
echo "   $OUT/eval_*.json (scores with their protocol), $OUT/*.jsonl (losses)"
