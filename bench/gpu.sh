#!/usr/bin/env bash
# Every figure of this repo on a GPU, in one command and within 9 minutes; called again, it goes on.
#   bash bench/gpu.sh                   writes the table of docs/benchmarks.md
#   bash bench/gpu.sh --device cpu      tiny networks, to see that all of it runs
#   bash bench/gpu.sh --pack            where there is a connection: wheels/ of what the other may lack
# That machine needs python, torch, torchvision and scipy; clip comes from wheels/, the CRF runs in torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
lacking="ftfy wcwidth tqdm pytest exceptiongroup tomli pluggy iniconfig pygments packaging setuptools<81"

if [ "${1:-}" = --pack ]; then
    "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir wheels openai-clip $lacking
    for version in 3.10 3.11 3.12 3.13; do                    # compiled: a wheel for each python
        "$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --python-version $version \
            --dest wheels regex
    done
    exec ls wheels
fi

device=cuda write=--write
case " $* " in *" --device cpu "*) device=cpu write= ;; esac
if ! "$PYTHON" -W ignore -c 'import clip, tqdm, pytest' 2>/dev/null; then
    if [ ! -d wheels ]; then
        echo "gpu.sh: this python lacks clip, tqdm or pytest: bash bench/gpu.sh --pack where there is a" \
            "connection, and bring wheels/ here" >&2
        exit 1
    fi
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links wheels --target wheels/unpacked \
        --upgrade openai-clip regex $lacking
    export PYTHONPATH=$PWD/wheels/unpacked${PYTHONPATH:+:$PYTHONPATH}
fi
export PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"
exec "$PYTHON" -W ignore -m bench.gpu --device $device $write "$@"
