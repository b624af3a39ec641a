// The operators without data: what they return, and all that is wrong with shapes and dtypes. For meta tensors, and so
// for FakeTensor, torch.compile and torch.export, whose sizes may be symbols; check.h does the work for all backends.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "check.h"

namespace cece {
namespace {

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         const MaybeTensor& weight, int64_t reduction,
                                                         int64_t ignore_index, double label_smoothing, bool) {
  const CrossEntropyShapes shapes =
      check_cross_entropy_shapes(logits, target, weight, reduction, ignore_index, label_smoothing);
  const CrossEntropyOutputs out = allocate_outputs(shapes, logits, reduction);
  return {out.loss, out.stats, out.total_weight};
}

void check_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                    const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                    double label_smoothing) {
  const CrossEntropyShapes shapes =
      check_cross_entropy_shapes(logits, target, weight, reduction, ignore_index, label_smoothing);
  check_saved_shapes(shapes, logits, grad, stats, total_weight, reduction);
}
Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                              const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                              double label_smoothing) {
  check_backward(grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing);
  return at::empty_like(logits);
}

Tensor binary_cross_entropy_forward(CECE_BINARY_PARAMETERS) {
  return allocate_loss(input, check_binary_cross_entropy_shapes({CECE_BINARY_ARGUMENTS}), reduction);
}

Tensor binary_cross_entropy_backward(const Tensor& grad, CECE_BINARY_PARAMETERS) {
  check_binary_cross_entropy_shapes({CECE_BINARY_ARGUMENTS}, &grad);
  return at::empty_like(input);
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, Meta, m) {
  using namespace cece;
  m.impl("cross_entropy_forward", cross_entropy_forward);
  m.impl("cross_entropy_backward", cross_entropy_backward);
  m.impl("cross_entropy_backward_", check_backward);
  m.impl("binary_cross_entropy_forward", binary_cross_entropy_forward);
  m.impl("binary_cross_entropy_backward", binary_cross_entropy_backward);
}
