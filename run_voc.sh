#!/usr/bin/env bash
# The papers' recipes on PASCAL VOC 2012, from the images to the score of a network on val. A second call
# skips what is finished, an interrupted one goes on.
#   bash run_voc.sh                                                   without VOC: says so, runs run_toy.sh
#   VOC=/data/VOC2012 SBD=/data/benchmark_RELEASE bash run_voc.sh     SBD: makes SegmentationClassAug, once
#   VOC=/data/VOC2012 METHOD=vpl GPUS=4 bash run_voc.sh --workers 16  flags that all scripts share
#   VOC=/data/VOC2012 LOOK=1 bash run_voc.sh --limit 64               64 images, a few steps a stage, to try
# METHOD  semples (default), vpl, clip_es
# HOST    what SemPLeS improves (Table 4): weaktr, clims, or fma: weaktr's maps, masks by SAM's segments
# NET     deeplab (default), segmenter (WeakTr's), mask2former (default for fma), or deeplab_coco: starts from
#         deeplab-pytorch's weights of COCO's masks, in DEEPLAB (another experiment). VPL has its own
# OUT     results: runs/voc; voc_vpl, voc_clip_es, voc_clims, voc_fma; ..._look, ..._seed1. Another NET wants
#         another OUT, or the masks of the first: docs/running.md
# SEED, GPUS (more than one: torchrun)
# NODES, NODE, HEAD  several machines: docs/running.md
# INIT    published WeakTr, SemPLeS or CLIMS generator to start from instead of training one
# CLIP32, CLIP16  what stands for OpenAI's ViT-B/32 and ViT-B/16: a file, a folder, a name on the hub
# SAM, SWIN       names or folders of a SAM and of Mask2Former's Swin, as transformers has them
# START=none      no ImageNet weights: what is otherwise downloaded

[ "${1:-}" != --help ] || exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
if [ -z "${VOC:-}" ]; then
    echo "run_voc.sh: no VOC given, so this runs on the toy world. For VOC 2012: download" \
        "VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012) and SBD's benchmark.tgz," \
        "unpack both, VOC=VOCdevkit/VOC2012 SBD=benchmark_RELEASE bash run_voc.sh"
    exec bash "$(dirname "${BASH_SOURCE[0]}")/run_toy.sh" "$@"
fi
METHOD=${METHOD:-semples} HOST=${HOST:-weaktr} net=deeplab
[ "$HOST" != fma ] || net=mask2former
NET=${NET:-$net}

refuse() { echo "run_voc.sh: $1" >&2; exit 1; }
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

name=voc_$METHOD
[ "$HOST" = weaktr ] || name=voc_$HOST
name=${name%_semples}${LOOK:+_look}
[ "${SEED:-0}" = 0 ] || name=${name}_seed$SEED
OUT=${OUT:-runs/$name}
DATA=$VOC
START=${START:-imagenet} CLIP32=${CLIP32:-ViT-B/32} CLIP16=${CLIP16:-ViT-B/16}
once=${LOOK:+--epochs 1} steps=${LOOK:+--steps 20} small=${LOOK:+--crop 64}
few=${LOOK:+--iterations 2 --batch-size 2 --crop 64} points=${LOOK:+--points 2 --crop-layers 0}
[ -z "${SBD:-}" ] || stage prepare_data.py voc --voc "$VOC" --sbd "$SBD"
# As the authors: fp16 on a GPU, and but for CLIMS what CLIP sees normalised by ImageNet's statistics.
shared=(--data "$DATA" --out "$OUT" --seed "${SEED:-0}" --amp "$(precision "$@")") more=("$@") spread=1
init=(${INIT:+--init "$INIT"}) crf="--crf --iterations 10" scored=pseudo

if [ "$METHOD$HOST" = semplesclims ]; then
    # hardware, time, score: not yet measured (paper: 71.0 of DeepLab on val, 70.4 without SemPLeS).
    # INIT: IRN's res50_cam.pth; a finished CLIMS is trained on. CLIMS alone: make_cam.py --source match.
    clims="--lambda-match 10 --lambda-b 2.4 --lambda-cbs 1 --tau-cbs 0.26 --lambda-reg 0.2"
    stage -m hosts.train_cam "${shared[@]}" --split train_aug --backbone "$START" ${init[@]+"${init[@]}"} \
        --epochs 5 --lr 0.1 $once $small
    stage -m hosts.train_clims "${shared[@]}" --split train_aug --clip "$CLIP32" $clims --epochs 15 --lr \
        2.5e-4 $once $small
    stage train_prompt.py "${shared[@]}" --split train_aug --clip "$CLIP32" --batch-size 128 --epochs 60 \
        --lr 0.025 --weight-decay 0.03 --lambda-t 0.02 --repel one_minus --prompt-length 30 --prompt-init \
        uniform --views 0 --crop 512 --min-scale 0.5 $once $small
    stage -m hosts.train_clims "${shared[@]}" --split train_aug --stage refine --clip "$CLIP32" $clims \
        --epochs 15 --lr 2.5e-4 --lambda-refine 0.5 $once $small
    stage make_cam.py "${shared[@]}" --split train_aug --source refine --scales 1.0 0.5 1.5 2.0 --flip
    stage eval.py "${shared[@]}" --split train --what cam --threshold 0.15
    stage make_pseudo.py "${shared[@]}" --split train_aug --threshold 0.15 $crf --preset irn
elif [ "$METHOD" = semples ]; then
    # hardware, time, score: not yet measured (paper: V100s; maps on train 68.7). Its 78.4 of masks, 73.9 of
    # DeepLab are among the SAM-based rows: HOST=fma NET=deeplab. With CRF and Segmenter, 74.2: NET=segmenter.
    augment="--crop 224 --min-scale 0.08 --randaugment --erase 0.25 --drop-path 0.1 --weight-decay 0.03"
    match="--lambda-b 2.4 --mask-eps 0.1 --mask-fill imagenet"
    stage train_cls.py "${shared[@]}" --split train_aug --generator deit_small --backbone "$START" \
        ${init[@]+"${init[@]}"} --pool max --reduction 8 --batch-size 64 --epochs 60 --lr 7.5e-5 --warmup 5 \
        --warmup-lr 1e-6 --min-lr 1e-5 $augment $once
    stage train_match.py "${shared[@]}" --split train_aug --clip "$CLIP32" --pool max --batch-size 64 \
        --epochs 60 --lr 6.4e-5 $match $augment $once
    stage train_prompt.py "${shared[@]}" --split train_aug --clip "$CLIP32" --pool max --batch-size 128 \
        --epochs 60 --lr 0.025 --weight-decay 0.03 --lambda-t 0.02 --lambda-i 1 --repel one_minus \
        --prompt-length 30 --prompt-init uniform --views 0 --mask-eps 1e-4 --mask-fill imagenet --crop 224 \
        --min-scale 0.08 $once
    stage train_refine.py "${shared[@]}" --split train_aug --clip "$CLIP32" --pool max --batch-size 64 \
        --epochs 60 --lr 6.4e-5 --lambda-refine 0.05 $match $augment $once
    stage make_cam.py "${shared[@]}" --split train_aug --source refine --pool max --scales 1.0 1.2 --flip
    stage eval.py "${shared[@]}" --split train --what cam --threshold 0.43
    if [ "$HOST" = fma ]; then
        stage -m hosts.make_segments "${shared[@]}" --split train_aug --source sam --sam \
            "${SAM:-facebook/sam-vit-huge}" --points 32 --crop-layers 1 --pred-iou 0.86 --stability 0.92 \
            --nms 0.7 --min-area 100 --whole-bonus 0.1 --whole-first --covered 0.3 --amp off $points
        stage make_pseudo.py "${shared[@]}" --split train_aug --segments "$OUT/segments" --vote sams \
            --power 0.7
    else
        stage make_pseudo.py "${shared[@]}" --split train_aug --threshold 0.43 $crf --preset weaktr
    fi
else
    # hardware, time, score: not yet measured (paper: eight 4090s; mIoU on train 70.8 of CLIP-ES's maps and
    # 75.0 of its masks, 76.3 and 78.4 of VPL's)
    by=text scored=pseudo_whole localise="--prompt ensemble --tau-t 0.01 --affinity --box 0.4"
    if [ "$METHOD" = vpl ]; then
        by=vision
        stage vpl.py "${shared[@]}" --split train_aug --clip "$CLIP16" $localise --tau-i 0.03 --phi 0.4 \
            --features value --pool pixel --target soft --harden 0.6 --no-label-mask --background-pixels \
            --learn-background --max-pixels 4000000 --steps 3000 --lr 10 $steps
    fi
    stage make_cam.py "${shared[@]}" --split train_aug --clip "$CLIP16" $localise --source $by --scales 1.0 \
        --no-flip
    stage eval.py "${shared[@]}" --split train --what cam --background power --alpha 1
    # Masks are scored whole, as CLIP-ES does; the network does not learn where the CRF is not sure.
    stage make_pseudo.py "${shared[@]}" --split train --background power --alpha 1 $crf --preset deeplab \
        --pseudo pseudo_whole
    stage make_pseudo.py "${shared[@]}" --split train_aug --background power --alpha 1 $crf --preset \
        deeplab --ignore-below 0.95
fi
stage eval.py "${shared[@]}" --split train --what pseudo --pseudo "$scored"

if [ "$METHOD" = vpl ]; then
    # score: not yet measured (paper: 78.5 on val). Rate and crop are not the paper's, which gives none.
    stage train_seg.py "${shared[@]}" --split train_aug --model clip_decoder --clip "$CLIP16" --init none \
        --batch-size 6 --iterations 30000 --optimizer adamw --lr 2e-3 --weight-decay 1e-4 --crop 320 \
        --min-scale 0.5 --max-scale 1.5 --width 256 --logits raw --lambda-rsc 1 $few
elif [ "$NET" = segmenter ]; then
    # score: not yet measured (SemPLeS Table 4: 74.2 on val with WeakTr as host). Steps: WeakTr's 100 epochs.
    stage train_seg.py "${shared[@]}" --split train_aug --model segmenter_deit_small --init "$START" \
        --batch-size 4 --iterations 264500 --optimizer sgd --lr 1e-4 --weight-decay 0 --crop 480 \
        --min-scale 0.5 --max-scale 2 --clamp-start 1.2 $few
elif [ "$NET" = deeplab_coco ]; then
    # score: not yet measured (CLIMS 70.4, CLIP-ES 73.8 on val; ImageNet 69.3, 71.1)
    stage train_seg.py "${shared[@]}" --split train_aug --model deeplabv2_resnet101_caffe --init "$DEEPLAB" \
        --batch-size 10 --iterations 20000 --optimizer sgd --lr 2.5e-4 --weight-decay 5e-4 --crop 321 \
        --min-scale 0.5 --max-scale 1.5 $few
elif [ "$NET" = mask2former ]; then
    # score: not yet measured (SemPLeS Tables 2, 4: 83.4 on val with FMA-WSSS as host)
    stage -m hosts.train_mask2former "${shared[@]}" --split train_aug --model mask2former_swin_large --init \
        "${SWIN:-$START}" --batch-size 4 --iterations 80000 --lr 1e-4 --weight-decay 0.05 --crop 512 \
        --min-scale 0.5 --max-scale 2 $few
else
    # score: not yet measured (ImageNet's start: 71.1 of CLIP-ES on val; SemPLeS: 73.9, on SAM's masks)
    stage train_seg.py "${shared[@]}" --split train_aug --model deeplabv2_resnet101 --init "$START" \
        --batch-size 10 --iterations 20000 --optimizer sgd --lr 2.5e-4 --weight-decay 5e-4 --crop 321 \
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
