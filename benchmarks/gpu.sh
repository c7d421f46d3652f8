#!/usr/bin/env bash
# The tests and every number that need a GPU, as tables: bash benchmarks/gpu.sh [FOLDER] from a checkout, in under 8 minutes.
# FOLDER gets one JSON file per benchmark (default: a new one under the system's temporary folder).
# BENCH="--quick --device cpu" tries the script itself where there is no GPU. PYTHON: the interpreter to use.
# PATIENCE=n: n times the time limits, for a busy machine.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-$(mktemp -d)}
mkdir -p "$out"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
failed=0
if [ -z "${BENCH:-}" ]; then
    echo "== tests that need a GPU"
    timeout $((90 * ${PATIENCE:-1})) "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_project_cuda.py \
        >"$out/tests.log" 2>&1 || failed=1
    tail -3 "$out/tests.log"
fi
# name, seconds it may take; the step, which compiles three networks, gets what the others leave of 470
for case in "mask 100" "projection 60" "cut 40" "finders 60" "checkpoint 60" "step 470"; do
    read -r name limit <<<"$case"
    [ "$name" = step ] && limit=$((470 - SECONDS / ${PATIENCE:-1}))
    echo "== $name"
    # shellcheck disable=SC2086  # BENCH is a list of words
    timeout "$((limit * ${PATIENCE:-1}))" "$PYTHON" -m ghostmask bench "$name" ${BENCH:---device cuda} --json "$out/$name.json" \
        2>"$out/$name.log" || { failed=1; echo "FAILED ($?):"; tail -5 "$out/$name.log"; }
done
echo "rows as JSON and logs: $out"
exit $failed
