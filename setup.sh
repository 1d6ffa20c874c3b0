# Sourced by every run_*.sh: leaves in $PYTHON a python that has what requirements.txt lists, and says which.
# The python of this shell (your conda, your venv) if it can already import all of it; else ./.venv, made once. And `stage`, which runs a script.

set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for name in VOC SBD COCO DATA OUT INIT START CLIP32 CLIP16 SAM SWIN; do             # paths are those of the caller's folder
    case $name:${!name:-} in
        *: | *:/*) ;;
        INIT:* | START:* | CLIP* | SAM:* | SWIN:*) [ ! -e "${!name}" ] || [ "$PWD" = "$home" ] || printf -v "$name" %s "$PWD/${!name}" ;;
        *) [ "$PWD" = "$home" ] || printf -v "$name" %s "$PWD/${!name}" ;;
    esac
done
cd "$home"

imports='import torch, torchvision, numpy, PIL, tqdm, pytest; from clip.model import build_model; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)'
stamp=.venv/complete

find_python() {
    for PYTHON in python3 python; do
        command -v "$PYTHON" >/dev/null && "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' && return
    done
    echo "setup.sh: no Python 3.10 or newer on the PATH" >&2
    exit 1
}

make_venv() {
    echo "setup.sh: making .venv from requirements.txt, once (torch is large: minutes)" >&2
    rm -f "$stamp"
    "$PYTHON" -m venv .venv || { echo "setup.sh: python has no venv module: on Debian 'apt install python3-venv'" >&2; exit 1; }
    if ! .venv/bin/python -m pip install --quiet -r requirements.txt; then
        echo "setup.sh: trying again without pydensecrf2 (no C++ compiler?)" >&2
        grep -v pydensecrf2 requirements.txt | .venv/bin/python -m pip install --quiet -r /dev/stdin
    fi
    .venv/bin/python -W ignore -c "$imports"
    cp requirements.txt "$stamp"      # last: a .venv without it was interrupted, one with another text is out of date
}

find_python
if "$PYTHON" -W ignore -c "$imports" 2>/dev/null; then
    echo "setup.sh: using $(command -v "$PYTHON"), which has what is needed" >&2
else
    cmp -s requirements.txt "$stamp" || make_venv
    PYTHON=$PWD/.venv/bin/python
    echo "setup.sh: using .venv" >&2
fi
# glibc hands large buffers back to the kernel after every step and faults them in anew: twice the time for small networks on a CPU.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
export PYTHON PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"

# stage script.py flags ...: runs it, with $more at the end, where it wins. $OUT/commands.txt holds each line that ended well, and last a checksum of
# what $DATA, $OUT and the given files were then (names, sizes, times). A run that finds them so passes over its lines without starting python,
# until one that does not stand there; from then on every script looks for itself what is finished.
launch=("$PYTHON") more=() passing=ask
case " $* " in *" --no-resume "*) passing= ;; esac

state() {
    local files
    files=$(find "$DATA" "$OUT" "${INIT:-}" "${START:-}" "${CLIP32:-}" "${CLIP16:-}" "${SAM:-}" "${SWIN:-}" -type f ! -name 'commands.txt*' -printf '%p %s %T@\n' 2>/dev/null || true)
    [ -n "$files" ] || files=$RANDOM                                       # a find without -printf: never the same
    LC_ALL=C sort <<<"$files" | cksum
}

stage() {
    local line commands=$OUT/commands.txt
    line=$(printf '%q ' "$@" ${more[@]+"${more[@]}"})
    [ "$passing" != ask ] || [ "$(tail -n 1 "$commands" 2>/dev/null)" = "# $(state)" ] || passing=
    if [ "$passing" ] && grep -qxF -- "$line" "$commands"; then
        passing=1
        echo "== finished: $1"
        return
    fi
    passing=
    echo "== $line"
    "${launch[@]}" "$@" ${more[@]+"${more[@]}"}
    mkdir -p "$OUT"
    { grep -vxF -- "$line" "$commands" 2>/dev/null | grep -v '^# ' || true; echo "$line"; echo "# $(state)"; } >"$commands.new"
    mv "$commands.new" "$commands"
}
