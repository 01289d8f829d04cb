#!/usr/bin/env bash
# The first minutes on a GPU, in an environment that exists (PYTHON=python3): environment, tests,
# compute-sanitizer, the filter against all distances, benchmarks. Each stage writes its log and a
# line of stages.csv when it ends, and none keeps the next from running: interrupt it when you like,
# and send back the folder that it names. 8 minutes at most: a stage that meets its limit is
# interrupted, and reports what it has by then.
#   tools/first_gpu.sh [--dry-run] [OUT]      --dry-run: the same stages on a CPU, with little to do
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
DRY=0
if [ "${1:-}" = --dry-run ]; then DRY=1; shift; fi
OUT=${1:-out/first_gpu/$(date +%Y%m%d-%H%M%S)}
export PYTHONPATH=$PWD/pyext:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT" || exit 1
echo "stage,status,seconds" > "$OUT/stages.csv"
failed=0

stage() {  # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin status
  shift 2
  begin=$(date +%s)
  echo "== $name: $*"
  timeout --signal=INT --kill-after=3 "$limit" "$@" > "$OUT/$name.log" 2>&1
  status=$?
  echo "$name,$status,$(($(date +%s) - begin))" >> "$OUT/stages.csv"
  tail -n 3 "$OUT/$name.log"
  [ $status = 0 ] || { failed=1; echo "   $name ended with status $status; see $OUT/$name.log"; }
}

skip() {  # skip NAME WHY
  echo "== $1: skipped, $2"
  echo "$1,skipped: $2,0" >> "$OUT/stages.csv"
}

trap 'echo "interrupted; what has ended is in $OUT"; exit 130' INT TERM
git rev-parse HEAD > "$OUT/commit" 2> /dev/null

if [ $DRY = 1 ]; then
  stage environment 60 "$PYTHON" -c "from tools import gpu_environment as e; e.main()"
  stage tests 120 env TILEWISE_TEST_DEVICE=meta "$PYTHON" -m pytest -q --collect-only \
    tests/backends/test_devices_gpu.py
  skip compile "a dry run"
  skip sanitizer "a dry run"
  stage filter 120 "$PYTHON" -m tools.filter_against_brute --device cpu --rows 200
  stage bench 60 "$PYTHON" -m benchmarks.run --help
else
  stage environment 20 "$PYTHON" -m tools.gpu_environment
  stage build 100 "$PYTHON" setup.py --quiet build_ext --inplace
  stage compile 70 "$PYTHON" -m tools.precompile
  export TILEWISE_TEST_DEVICE=cuda
  stage tests 80 "$PYTHON" -m pytest -q tests/backends/test_devices_gpu.py
  stage filter 20 "$PYTHON" -m tools.filter_against_brute
  stage ops 60 "$PYTHON" -m pytest -q --maxfail=20 -m "not slow" tests/backends tests/ops
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      stage sanitizer-$tool 20 env TILEWISE_TEST_ROWS=300 compute-sanitizer --tool $tool \
        --error-exitcode 1 "$PYTHON" -m pytest -q tests/backends/test_devices_gpu.py -k side_stream
    done
  else
    skip sanitizer "compute-sanitizer is not installed"
  fi
  stage bench 60 "$PYTHON" -m benchmarks.run --op all --device cuda --quick --no-verify \
    --out "$OUT/bench"
fi
cat "$OUT/stages.csv"
echo "send back $OUT"
exit $failed
