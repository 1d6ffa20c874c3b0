# Sourced by every run_*.sh: leaves in $PYTHON a python that has what requirements.txt lists, and says which.
# The python of this shell (your conda, your venv) if it can already import all of it; else ./.venv, made once. And `stage`, which runs a script.

cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
set -euo pipefail

imports='import torch, torchvision, numpy, PIL, tqdm, pytest; from clip.model import build_model'
stamp=.venv/complete

find_python() {
    for PYTHON in python3 python; do
        command -v "$PYTHON" >/dev/null && "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))' && return
    done
    echo "setup.sh: no Python 3.9 or newer on the PATH" >&2
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

# stage FILE script.py flags ...: a script whose last act is to write FILE. What ended well stands in $OUT/commands.txt, a line a FILE. Lines at the
# beginning of a run that stand there already are passed over without starting python; from the first other one on, every script looks for itself.
launch=("$PYTHON") passing=1
stage() {
    local file=$1 commands=$OUT/commands.txt line
    shift
    line=$(printf '%s\t' "$file"; printf '%q ' "$@")
    if [ "$passing" ] && [ -e "$file" ] && ! [ "$file" -nt "$commands" ] && grep -qxF -- "$line" "$commands" 2>/dev/null; then
        echo "== $file is finished"
        return
    fi
    passing=
    echo "== $*"
    "${launch[@]}" "$@"
    if [ -e "$file" ]; then
        mkdir -p "$OUT"
        { awk -F'\t' -v file="$file" '$1 != file' "$commands" 2>/dev/null || true; echo "$line"; } >"$commands.new"
        mv "$commands.new" "$commands"
    fi
}
