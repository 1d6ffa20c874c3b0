# Sourced by every run_*.sh: leaves in $PYTHON a python that has what requirements.txt lists, and says which.
# The python of this shell (your conda, your venv) if it can already import it all; else ./.venv, made once.

set -euo pipefail
trap 'exit 143' TERM                              # a time limit ends bash after its stage, which saves first
home=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Paths are those of the caller's folder; CLIP32 and the like may also be the name of a model.
for name in VOC SBD COCO DATA OUT INIT START CLIP32 CLIP16 SAM SWIN DEEPLAB; do
    value=${!name:-}
    case $value in "" | /*) continue ;; esac
    case $name in INIT | START | CLIP* | SAM | SWIN | DEEPLAB) [ -e "$value" ] || continue ;; esac
    printf -v "$name" %s "$PWD/$value"
done
cd "$home"
case ${NODES:-1}:${NODE:-}:${HEAD:-} in
    1::* | 1:0:*) ;;
    1:*) echo "setup.sh: NODE=$NODE needs NODES, the number of machines" >&2
        exit 1 ;;
    *:[0-9]*:*:[0-9]*) ;;
    *) echo "setup.sh: NODES=$NODES needs NODE, this machine's number from 0, and HEAD=host:port" >&2
        exit 1 ;;
esac

imports='import torch, torchvision, numpy, PIL, tqdm, pytest
from clip.model import build_model
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)'

find_python() {
    for PYTHON in python3 python; do
        command -v "$PYTHON" >/dev/null || continue
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' && return
    done
    echo "setup.sh: no Python 3.10 or newer on the PATH" >&2
    exit 1
}

has_venv() {
    .venv/bin/python -c '' 2>/dev/null && cmp -s requirements.txt .venv/complete
}

make_venv() {
    echo "setup.sh: making .venv from requirements.txt, once (torch is large: minutes)" >&2
    if [ -e .venv ] && ! .venv/bin/python -c '' 2>/dev/null; then        # its python was removed
        mv .venv ".venv.broken.$$"
    fi
    rm -f .venv/complete .venv/complete-tests
    if ! "$PYTHON" -m venv .venv; then
        echo "setup.sh: no .venv could be made; if python has no venv module: apt install python3-venv" >&2
        exit 1
    fi
    if ! .venv/bin/python -m pip install --quiet -r requirements.txt; then
        echo "setup.sh: trying again without pydensecrf2 (no C++ compiler?)" >&2
        grep -v pydensecrf2 requirements.txt | .venv/bin/python -m pip install --quiet -r /dev/stdin
    fi
    .venv/bin/python -W ignore -c "$imports"
    cp requirements.txt .venv/complete        # last: a .venv without it was interrupted or is out of date
}

find_python
if "$PYTHON" -W ignore -c "$imports" 2>/dev/null; then
    echo "setup.sh: using $(command -v "$PYTHON"), which has what is needed" >&2
else
    if [ "${NODE:-0}" = 0 ]; then
        has_venv || make_venv
    fi
    for ((waited = 0; waited < 3600; waited += 2)); do        # the first machine makes it
        ! has_venv || break
        sleep 2
    done
    if ! has_venv; then
        echo "setup.sh: machine 0 has made no .venv here in an hour: make it first, bash run_tests.sh" >&2
        exit 1
    fi
    PYTHON=$PWD/.venv/bin/python
    echo "setup.sh: using .venv" >&2
fi
# Else glibc gives large buffers back to the kernel after every step: 3:44 minutes of run_toy.sh, not 3:28.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
export PYTHON PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"

# precision flags ...: fp16 where torch sees a GPU, unless the flags hold --device cpu; else auto.
precision() {
    case " $* " in *" --device"[\ =]"cpu "*) echo auto && return ;; esac
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && echo fp16 || echo auto
}

# launch script.py flags ...: in one process, or after `spread=1` in GPUS processes on each of NODES machines
# (docs/running.md), which meet at HEAD, for each stage at the next port.
spread= stages=0

launch() {
    local run=(-m torch.distributed.run --nproc_per_node "${GPUS:-1}")
    if [ "$spread" ] && [ "${NODES:-1}" != 1 ]; then
        run+=(--nnodes "$NODES" --node_rank "$NODE" --rdzv_backend c10d --rdzv_id "$stages"
            --rdzv_endpoint "${HEAD%:*}:$((${HEAD##*:} + stages))"
            --rdzv_conf "is_host=$((NODE == 0)),join_timeout=3600,read_timeout=3600")
    elif [ "$spread" ] && [ "${GPUS:-1}" != 1 ]; then
        run+=(--standalone)
    elif [ "${NODE:-0}" = 0 ]; then
        run=()
    else
        return 0                                  # the first machine's work
    fi
    "$PYTHON" ${run[@]+"${run[@]}"} "$@"
}

# stage script.py flags ...: launches it with $more at the end. $OUT/commands.txt holds the lines that ended
# well; while nothing in $DATA, in $OUT and among the files that a run begins with has changed since, they are
# passed over, up to the first other line.
more=() passing=ask
case " $* " in *" --no-resume "*) passing= ;; esac
[ "${NODES:-1}" = 1 ] || passing=                 # the machines stay in step: every stage looks for itself

stage() {
    local line commands=$OUT/commands.txt
    local begins=("${INIT:-}" "${START:-}" "${CLIP32:-}" "${CLIP16:-}" "${SAM:-}" "${SWIN:-}" "${DEEPLAB:-}")
    line=$(printf '%q ' "$@" ${more[@]+"${more[@]}"})
    if [ "$passing" = ask ]; then
        if [ ! -e "$DATA" ] ||
                [ -n "$(find -H "$DATA" "$OUT" "${begins[@]}" -cnewer "$commands" 2>/dev/null | head -n 1)" ]
        then
            rm -f "$commands"
        fi
        [ -e "$commands" ] || passing=
    fi
    if [ "$passing" ] && grep -qxF -- "$line" "$commands"; then
        passing=1
        echo "== finished: $line"
        return
    fi
    passing=
    echo "== $line"
    stages=$((stages + 1))
    launch "$@" ${more[@]+"${more[@]}"}
    if [ "${NODE:-0}" = 0 ]; then
        mkdir -p "$OUT"
        echo "$line" >>"$commands"
    fi
}
