#!/usr/bin/env bash
# The tests, from nothing: makes the environment if there is none. What follows goes to pytest:
#   bash run_tests.sh -k crf
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ "$("$PYTHON" -c "import sys; print(sys.prefix)")" = "$PWD/.venv" ] &&
        ! cmp -s tests/requirements.txt .venv/complete-tests; then
    "$PYTHON" -m pip install --quiet -r tests/requirements.txt
    cp tests/requirements.txt .venv/complete-tests
fi
parallel=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    parallel=(-n 2 --dist worksteal)                 # one thread a process: two of them take half the time
fi
exec "$PYTHON" -m pytest tests -q --durations=10 ${parallel[@]+"${parallel[@]}"} "$@"
