#!/usr/bin/env bash
# Everything a GPU machine has to say about this tree, in three calls, each under 9 minutes and without a network:
#   bash benchmarks/gpu_check.sh smoke|tests|benchmarks [--rehearse] [python]
# smoke        builds cece for this GPU, holds every kind of launch against float64, times a dozen rows, asks ncu
# tests        the GPU tests and `python -m cece verify`
# benchmarks   the whole table, then compute-sanitizer's tools while there is time
# Each builds first, which is quick where nothing has changed. To $OUT (default benchmarks/results) go one log a call,
# every row as it is measured, and a table: 6 files in all. Goes on after a failed step and exits with the number of
# them. --rehearse runs the same lines on a machine without a GPU, with the emulator of the tests in its place.
# Wheels in build/wheels (benchmarks/fetch_peers.sh) are unpacked and compared with.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CALL=${1:-}
shift
rehearse=()
if [[ ${1:-} == --rehearse ]]; then rehearse=(--rehearse) && shift; fi
PYTHON=${1:-${PYTHON:-python3}}
case $CALL in smoke | tests | benchmarks) ;; *) sed -n '2,5p' "$0" >&2 && exit 64 ;; esac
((${#rehearse[@]})) && CECE_CUDA=0 || CECE_CUDA=1
export OUT=${OUT:-benchmarks/results} TORCH_CUDA_ARCH_LIST=9.0 CECE_CUDA PYTHONPATH=$PWD:$PWD/build/peers
PYTHONPATH+=:$PWD/build/peers/nvidia_cutlass_dsl/python_packages # what its .pth names, which is not read there
mkdir -p "$OUT" build/peers
LOG=$OUT/gpu-check-$CALL.log
: >"$LOG"
UNTIL=${UNTIL:-520} # seconds of this call
failed=0

step() { # name, command...: within the time that is left, its output to the log
  local name=$1 start=$SECONDS status=0
  shift
  if ((UNTIL - SECONDS < 5)); then
    echo "skipped $name: the time is up" | tee -a "$LOG"
    return
  fi
  echo "== $name: $*" | cut -c1-300 >>"$LOG"
  timeout $((UNTIL - SECONDS)) "$@" >"$LOG.step" 2>&1 || status=$?
  cat "$LOG.step" >>"$LOG"
  if ((status == 0)); then
    echo "ok      $name ($((SECONDS - start)) s)" | tee -a "$LOG"
  else
    failed=$((failed + 1))
    echo "FAILED  $name, status $status ($((SECONDS - start)) s)" | tee -a "$LOG"
    tail -n 15 "$LOG.step" | sed 's/^/        /'
  fi
  rm -f "$LOG.step"
  return $status
}
tool() { command -v "$1" || ls "/usr/local/cuda/bin/$1" 2>/dev/null; }

if ((${#rehearse[@]} == 0)); then
  step gpu "$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no GPU here'; print(torch.cuda.get_device_properties(0))" || exit 1
fi
step build "$PYTHON" setup.py -q build_clib build_ext --inplace || exit 1
for wheel in build/wheels/*.whl; do
  [[ -f $wheel ]] && step "unpack ${wheel##*/}" "$PYTHON" -m zipfile -e "$wheel" build/peers
done

gpu=("$PYTHON" -m benchmarks.gpu --out "$OUT" "${rehearse[@]}")

case $CALL in
  smoke)
    step small "${gpu[@]}" small
    step rows "${gpu[@]}" smoke --budget $((UNTIL - SECONDS - 60))
    if ncu=$(tool ncu); then
      step ncu "$ncu" --clock-control none --kernel-name-base function --kernel-name "regex:(forward|backward)_rows|binary_" \
        --launch-count 6 --section SpeedOfLight --section Occupancy "$PYTHON" -m benchmarks.gpu smoke --bytes 2e8 --out "$OUT/ncu"
      rm -rf "$OUT/ncu"
    else
      echo "skipped ncu: not on this machine" | tee -a "$LOG"
    fi
    ;;
  tests)
    chosen=(-m cuda tests)
    ((${#rehearse[@]})) && chosen=(-k "emulated and logits" tests/test_binary_cross_entropy.py)
    "$PYTHON" -c "import expecttest" 2>/dev/null || chosen+=(--ignore tests/test_torch_suites.py)
    step verify "$PYTHON" -m cece verify
    step tests "$PYTHON" -m pytest -q -ra -p no:cacheprovider "${chosen[@]}"
    ;;
  benchmarks)
    step rows "${gpu[@]}" full --budget $((UNTIL - SECONDS - 150))
    if sanitizer=$(tool compute-sanitizer); then
      # every allocation its own, so that an access past a tensor is one past an allocation
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      for check in memcheck synccheck racecheck; do
        step "sanitizer-$check" "$sanitizer" --tool "$check" --error-exitcode 9 --kernel-regex kns=cece \
          "$PYTHON" -m benchmarks.gpu small
      done
      # of all kernels: it must see torch's write what ours read
      step sanitizer-initcheck "$sanitizer" --tool initcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu small
    else
      echo "skipped compute-sanitizer: not on this machine" | tee -a "$LOG"
      ((${#rehearse[@]})) && step small "${gpu[@]}" small
    fi
    ;;
esac
echo "$failed failed" | tee -a "$LOG"
exit "$failed"
