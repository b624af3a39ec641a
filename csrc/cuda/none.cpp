// A build without CUDA kernels: a CUDA tensor gets one sentence, not the dispatcher's pages. setup.py says why.
#include <torch/library.h>

namespace {

void refuse(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "cece was built without CUDA kernels (" CECE_CUDA_LEFT_OUT
             "): reinstall it where nvcc and a CUDA build of torch are: pip install --no-build-isolation "
             "--no-cache-dir --force-reinstall --no-deps <cece's folder>");
}

}  // namespace

TORCH_LIBRARY_IMPL(cece, CUDA, m) {
  for (const char* name : {"cross_entropy_forward", "cross_entropy_backward", "cross_entropy_backward_",
                           "token_statistics_forward", "token_statistics_backward", "token_statistics_backward_",
                           "row_parts", "finish_parts", "binary_cross_entropy_forward", "binary_cross_entropy_backward",
                           "divergence_forward", "divergence_merge", "divergence_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}
