#!/usr/bin/env bash
# Everything a GPU machine has to say about this tree, in one command and without a network:
#   bash benchmarks/gpu_check.sh [python]
# builds cece for this GPU, runs the GPU tests, `python -m cece verify`, compute-sanitizer's four tools on a small run,
# and the benchmarks. Logs, JSON and a table go to $OUT (default benchmarks/results). Goes on after a failed step, and
# exits with the number of them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${1:-${PYTHON:-python3}}
export OUT=${OUT:-benchmarks/results} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
mkdir -p "$OUT"
failed=0

step() {  # name, command...
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$OUT/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    failed=$((failed + 1))
    echo "FAILED  $name ($((SECONDS - start)) s): $OUT/$name.log"
    tail -n 15 "$OUT/$name.log" | sed 's/^/        /'
  fi
}

step gpu "$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no GPU here'; print(torch.cuda.get_device_properties(0))"
((failed == 0)) || exit 1
step build env CECE_CUDA=1 "$PYTHON" setup.py -q build_clib build_ext --inplace
((failed == 0)) || exit 1
step tests "$PYTHON" -m pytest -q -m cuda tests
step verify "$PYTHON" -m cece verify

SMALL="
import torch, cece
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((70, 3), (70, 100), (9, 1001), (3, 5000), (2, 70000), (2, 30, 50)):
        x = torch.randn(shape, device='cuda').to(dtype)[:, 1:].requires_grad_()
        y = torch.randint(shape[1] - 1, (shape[0], *shape[2:]), device='cuda')
        cece.cross_entropy(x, y, label_smoothing=0.1).backward()
        cece.cross_entropy(x, torch.rand(x.shape, device='cuda')).backward()
        cece.binary_cross_entropy_with_logits(x, torch.rand(x.shape, device='cuda') > 0.5).backward()
torch.cuda.synchronize()
"
if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  for tool in memcheck racecheck initcheck synccheck; do
    # every allocation its own, so that an access past a tensor is one past an allocation
    step "sanitizer-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --kernel-regex kns=cece "$PYTHON" -c "$SMALL"
  done
else
  echo "skipped compute-sanitizer: not on this machine"
fi

step benchmarks "$PYTHON" -m benchmarks.gpu --out "$OUT"
cat "$OUT"/gpu-*.txt 2>/dev/null
exit "$failed"
