// Losses of logits that are never held: logits = input weight^T + bias, a chunk of rows at a time.
//
// Sizes: input (N, in), linear_weight (C, d..., in), linear_bias (C, d...), logits (N, C, d...); class indices and row
// factors (N, d...), probabilities (N, C, d...). The row operators (ops.cpp) say what becomes of a chunk's logits.
#pragma once
#include <ATen/ATen.h>

#include "row_operators.h"

namespace cece {

// A call's options beside its tensors.
struct LinearOptions {
  TokenOptions row;
  int64_t chunk_size;  // rows, 0: by linear.cpp's rule
  bool compact;        // leave rows without a label out, at the price of their count on the host
};

inline c10::SymDimVector linear_logits_sizes(const Tensor& input, const Tensor& linear_weight) {
  c10::SymDimVector sizes{input.sym_size(0)};
  for (int64_t d = 0; d + 1 < linear_weight.dim(); d++) sizes.push_back(linear_weight.sym_size(d));
  return sizes;
}
// Whether target is class indices (N, d...) of logits (N, C, d...).
inline bool is_labels(const MaybeTensor& target, int64_t logits_dim) {
  return present(target) && target->dim() < logits_dim;
}
inline Tensor used_labels(const Tensor& labels, int64_t ignore_index) {
  return labels.to(at::kLong) != ignore_index;  // as uint8, 156 would be -100
}
// (N): some label of (N, d...) is not ignore_index
inline Tensor used_rows(const Tensor& labels, int64_t ignore_index) {
  const Tensor used = used_labels(labels, ignore_index);
  return used.dim() > 1 ? used.flatten(1).any(1) : used;
}

// A row's share of linear_cross_entropy: (loss + z_loss lse^2) token_weight, and what a mean divides by. Rows that do
// not count have statistics of 0.
struct RowLoss {
  double z_loss;
  Tensor loss, lse, used;  // used: undefined where all rows are
  Tensor label_weight;     // of a shard's rows: the label may be another's

  static int64_t wanted(double z_loss) { return z_loss == 0 ? kLoss : kLoss | kLogSumExp; }

  RowLoss(const TokenOutputs& rows, const Tensor& target, const TokenOptions& o, double z_loss)
      : z_loss(z_loss), loss(std::get<0>(rows)) {
    if (is_labels(target, loss.dim() + 1)) used = used_labels(target, o.ignore_index);
    if (o.skip_masked_rows) {
      const Tensor alive = std::get<5>(rows).select(0, 1) > -std::numeric_limits<double>::infinity();
      used = used.defined() ? used.logical_and(alive) : alive;
    }
    if (o.shard.all) label_weight = std::get<5>(rows)[-1];
    if (z_loss == 0) return;
    lse = std::get<2>(rows);
    loss = loss + z_loss * lse.square();
  }
  // token_weight as a factor of the losses: nothing for rows that have none, whatever is in it.
  Tensor factor(const MaybeTensor& token_weight) const {
    if (!present(token_weight)) return at::ones_like(loss);
    const Tensor f = token_weight->to(loss.scalar_type());
    return used.defined() ? f.masked_fill(used.logical_not(), 0) : f;
  }
  // What has no weight costs nothing, were it impossible.
  Tensor weighted(const MaybeTensor& token_weight) const {
    if (!present(token_weight)) return loss;
    const Tensor f = factor(token_weight);
    return f * loss.masked_fill((f == 0).logical_and(loss.isinf()), 0);
  }
  TokenGrads gradients(const Tensor& factor) const {
    return {factor, {}, lse.defined() ? MaybeTensor(factor * lse * (2 * z_loss)) : std::nullopt, {}};
  }
  Tensor shares(const Tensor& target, const MaybeTensor& weight) const {
    const bool weighted = present(weight) && is_labels(target, loss.dim() + 1);
    Tensor share = !weighted ? at::ones_like(loss) : label_weight;
    if (weighted && !share.defined()) {
      // A label out of range, whose loss is NaN on CUDA, must not stop the process here.
      const Tensor label = target.to(at::kLong).clamp(0, weight->size(0) - 1);
      share = weight->to(loss.scalar_type()).index({label});
    }
    return used.defined() ? share.masked_fill(used.logical_not(), 0) : share;
  }
};
// In double: the sum of 1e7 rows stays within a float32's last bits.
inline Tensor sum_of_rows(const Tensor& loss) { return loss.sum(at::kDouble).to(loss.scalar_type()); }

// loss; row losses before their factors, what the loss is the sum over, gradients of the sum
using LinearOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using LinearGradients = std::tuple<Tensor, Tensor, Tensor>;

TokenOutputs call_linear_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                              const MaybeTensor& target, const MaybeTensor& weight, const LinearOptions& o,
                              int64_t wanted);
// linear_cross_entropy by way of linear_token_statistics, whose every derivative is known: for 'none', and where a
// gradient formed in the forward would not do.
LinearOutputs linear_cross_entropy_by_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                                           const Tensor& target, const MaybeTensor& weight,
                                           const MaybeTensor& token_weight, const LinearOptions& o, double z_loss,
                                           Reduction reduction);

}  // namespace cece
