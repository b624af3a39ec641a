// Losses of logits that are never held: logits = input weight^T + bias, a chunk of rows at a time.
//
// Sizes: input (N, in), linear_weight (C, d..., in), linear_bias (C, d...), logits (N, C, d...); class indices and row
// factors (N, d...), probabilities (N, C, d...). The row operators (ops.cpp) say what becomes of a chunk's logits.
#pragma once
#include <ATen/ATen.h>

#include "check.h"

namespace cece {

// What may be asked of a row, as token_statistics_forward's `wanted`.
constexpr int64_t kLoss = 1, kEntropy = 2, kLogSumExp = 4, kCollision = 8;

struct RowOptions {
  int64_t ignore_index = -100;
  double label_smoothing = 0, logit_scale = 1, softcap = 0;
  bool skip_masked_rows = false;

  bool plain() const { return logit_scale == 1 && softcap == 0 && !skip_masked_rows; }  // cross_entropy knows no others
};

// One value a row each; what is not asked for is undefined or empty.
struct RowOutputs {
  Tensor loss, entropy, logsumexp, collision, argmax, stats;
};
struct RowGradients {
  MaybeTensor loss, entropy, logsumexp, collision;
};

RowOutputs row_forward(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight, const RowOptions& o,
                       int64_t wanted);
Tensor row_backward(const RowGradients& g, const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight,
                    const Tensor& stats, const RowOptions& o, int64_t wanted);

inline c10::SymDimVector linear_logits_sizes(const Tensor& input, const Tensor& linear_weight) {
  c10::SymDimVector sizes{input.sym_size(0)};
  for (int64_t d = 0; d + 1 < linear_weight.dim(); d++) sizes.push_back(linear_weight.sym_size(d));
  return sizes;
}

inline Tensor used_labels(const Tensor& labels, int64_t ignore_index) {
  return labels.to(at::kLong) != ignore_index;  // as uint8, 156 would be -100
}
// (N): some label of (N, d...) is not ignore_index
inline Tensor used_rows(const Tensor& labels, int64_t ignore_index) {
  const Tensor used = used_labels(labels, ignore_index);
  return used.dim() > 1 ? used.flatten(1).any(1) : used;
}
// Whether target is class indices (N, d...) of logits (N, C, d...).
inline bool is_labels(const MaybeTensor& target, int64_t logits_dim) {
  return present(target) && target->dim() < logits_dim;
}

// One row's share of linear_cross_entropy before its factor: loss + z_loss lse^2.
struct RowLoss {
  double z_loss;
  Tensor loss, lse;

  static int64_t wanted(double z_loss) { return z_loss == 0 ? kLoss : kLoss | kLogSumExp; }

  RowLoss(const RowOutputs& rows, const Tensor& target, const RowOptions& o, double z_loss)
      : z_loss(z_loss), loss(rows.loss) {
    if (z_loss == 0) return;
    lse = rows.logsumexp;  // of the rows that count
    if (is_labels(target, loss.dim() + 1)) lse = lse.masked_fill(used_labels(target, o.ignore_index).logical_not(), 0);
    if (o.skip_masked_rows) lse = lse.masked_fill(lse == -std::numeric_limits<double>::infinity(), 0);
    loss = loss + z_loss * lse.square();
  }
  RowGradients gradients(const Tensor& factor) const {  // of its parts, for an incoming gradient `factor`
    return {factor, {}, lse.defined() ? MaybeTensor(factor * (2 * z_loss) * lse) : std::nullopt, {}};
  }
  // Times the row's factor, but 0 where that is 0 and the loss no NaN: a row without weight costs nothing, however much
  // it would.
  Tensor times(const MaybeTensor& factor) const {
    if (!present(factor)) return loss;
    const Tensor f = factor->to(loss.scalar_type());
    return at::where((f == 0).logical_and(loss == loss), 0, f * loss);
  }
};
// A sum of so many rows in double: 1e7 of them stay within a float32's last bit.
inline Tensor sum_of_rows(const Tensor& loss) { return loss.sum(at::kDouble).to(loss.scalar_type()); }

// The operators of this file's kind, for one another.
using LinearSum = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, row losses, gradients
using LinearRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using LinearGradients = std::tuple<Tensor, Tensor, Tensor>;

struct LinearOptions {
  RowOptions row;
  int64_t chunk_size;  // rows, 0: by linear.cpp's rule
  bool compact;        // leave rows without a label out, at the price of their count on the host
};
LinearRows rows_of(const RowOutputs& out, const Tensor& input);
LinearRows call_linear_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                            const MaybeTensor& target, const MaybeTensor& weight, const LinearOptions& o,
                            int64_t wanted);
// linear_cross_entropy by way of linear_token_statistics, whose every derivative is known: for 'none', and where a
// gradient formed in the forward would not do.
LinearSum linear_cross_entropy_by_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                                       const Tensor& target, const MaybeTensor& weight, const MaybeTensor& row_weight,
                                       const LinearOptions& o, double z_loss, bool reduce);

}  // namespace cece
