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
                    double label_smoothing, CECE_SHARD_PARAMETERS) {
  const CrossEntropyShapes shapes =
      check_cross_entropy_shapes(logits, target, weight, reduction, ignore_index, label_smoothing, CECE_SHARD);
  check_saved_shapes(shapes, logits, grad, stats, total_weight, reduction);
}
Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                              const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                              double label_smoothing, CECE_SHARD_PARAMETERS) {
  check_backward(grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing,
                 first_class, all_classes, ranks, group);
  return at::empty_like(logits);
}

TokenOutputs token_statistics_forward(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight,
                                      int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                                      bool skip_masked_rows, int64_t wanted) {
  const TokenOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows};
  return allocate_token_outputs(check_token_statistics_shapes(logits, target, weight, o), logits, wanted);
}

void check_token_backward(const MaybeTensor& g_loss, const MaybeTensor& g_entropy, const MaybeTensor& g_logsumexp,
                          const MaybeTensor& g_collision, const Tensor& logits, const MaybeTensor& target,
                          const MaybeTensor& weight, const Tensor& stats, int64_t ignore_index, double label_smoothing,
                          double logit_scale, double softcap, bool skip_masked_rows, CECE_SHARD_PARAMETERS) {
  const TokenOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD};
  check_token_grads(check_token_statistics_shapes(logits, target, weight, o), logits, target,
                    {g_loss, g_entropy, g_logsumexp, g_collision}, stats, o);
}
Tensor token_statistics_backward(const MaybeTensor& g_loss, const MaybeTensor& g_entropy,
                                 const MaybeTensor& g_logsumexp, const MaybeTensor& g_collision, const Tensor& logits,
                                 const MaybeTensor& target, const MaybeTensor& weight, const Tensor& stats,
                                 int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                                 bool skip_masked_rows, CECE_SHARD_PARAMETERS) {
  check_token_backward(g_loss, g_entropy, g_logsumexp, g_collision, logits, target, weight, stats, ignore_index,
                       label_smoothing, logit_scale, softcap, skip_masked_rows, first_class, all_classes, ranks, group);
  return at::empty_like(logits);
}

Tensor row_parts(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight, int64_t ignore_index,
                 double label_smoothing, double logit_scale, double softcap, int64_t first_class, int64_t all_classes,
                 bool full) {
  const TokenOptions o{ignore_index, label_smoothing, logit_scale, softcap, false, {first_class, all_classes, {}}};
  return allocate_parts(check_token_statistics_shapes(logits, target, weight, o), logits,
                        part_numbers(full, target, weight, logits.dim()));
}
TokenOutputs finish_parts(const Tensor& parts, const MaybeTensor& target, int64_t, double, bool, int64_t,
                          int64_t wanted) {
  return allocate_whole_rows(check_finish_parts_shapes(parts, target, wanted), parts, wanted);
}

Tensor binary_cross_entropy_forward(CECE_BINARY_PARAMETERS) {
  return allocate_loss(input, check_binary_cross_entropy_shapes({CECE_BINARY_ARGUMENTS}), reduction);
}

Tensor binary_cross_entropy_backward(const Tensor& grad, CECE_BINARY_PARAMETERS) {
  check_binary_cross_entropy_shapes({CECE_BINARY_ARGUMENTS}, &grad);
  return at::empty_like(input);
}

std::tuple<Tensor, Tensor> divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                              double temperature, bool symmetric) {
  const DivergenceOutputs out = allocate_outputs(check_divergence_shapes(x, y, mask, temperature, symmetric), x);
  return {out.loss, out.stats};
}

std::tuple<Tensor, Tensor> divergence_merge(const Tensor& parts, double) {
  const DivergenceOutputs out = check_parts(parts);
  return {out.loss, out.stats};
}
std::tuple<Tensor, Tensor> sharded_divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                                      double temperature, int64_t, const std::string&) {
  return divergence_forward(x, y, mask, temperature, false);
}

Tensor divergence_backward(const Tensor& grad, const Tensor& x, const Tensor& y, const MaybeTensor& mask, const Tensor&,
                           double temperature, bool symmetric, bool of_other, int64_t, const std::string&) {
  check_divergence_shapes(x, y, mask, temperature, symmetric, &grad);
  return at::empty_like(of_other ? y : x);
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, Meta, m) {
  using namespace cece;
  m.impl("cross_entropy_forward", cross_entropy_forward);
  m.impl("cross_entropy_backward", cross_entropy_backward);
  m.impl("cross_entropy_backward_", check_backward);
  m.impl("token_statistics_forward", token_statistics_forward);
  m.impl("token_statistics_backward", token_statistics_backward);
  m.impl("row_parts", row_parts);
  m.impl("finish_parts", finish_parts);
  m.impl("token_statistics_backward_", check_token_backward);
  m.impl("binary_cross_entropy_forward", binary_cross_entropy_forward);
  m.impl("binary_cross_entropy_backward", binary_cross_entropy_backward);
  m.impl("divergence_forward", divergence_forward);
  m.impl("divergence_merge", divergence_merge);
  m.impl("sharded_divergence_forward", sharded_divergence_forward);
  m.impl("divergence_backward", divergence_backward);
}
