// The derivatives that cross-entropy and the statistics of a row share, in plain differentiable torch operators.
#pragma once
#include "../row_operators.h"
#include "node.h"

namespace cece {

// The formulas of one call, in plain torch operators. Shapes: logits (N, C, d...), rows (N, 1, d...). What is
// absent is undefined. Of a shard: what is of the rows' shape is common to all ranks, what is of the logits' is its
// own.
struct RowFormulas {
  Tensor x, t, w, stats, total;
  RowOptions o;
  int64_t dim;  // of the classes
  bool soft;
  at::ScalarType acc;

  RowFormulas(const Tensor& x, const Tensor& t, const Tensor& w, const Tensor& stats, const Tensor& total,
              const RowOptions& o)
      : x(x),
        t(t),
        w(w),
        stats(stats),
        total(total),
        o(o),
        dim(x.dim() == 1 ? 0 : 1),
        soft(t.defined() && t.dim() == x.dim()),
        acc(acc_type({&x, soft ? &t : nullptr})) {}

  double keep() const { return 1 - o.label_smoothing; }
  Tensor by_class(const Tensor& v) const {  // (C) against (N, C, d...)
    std::vector<int64_t> sizes(x.dim(), 1);
    sizes[dim] = -1;
    return v.to(acc).view(sizes);
  }
  Tensor weighted(const Tensor& a) const { return w.defined() ? a * by_class(w) : a; }
  Tensor smoothed() const {
    const c10::SymInt classes = o.shard.all ? c10::SymInt(*o.shard.all) : x.sym_size(dim);
    return t.to(acc) * keep() + c10::SymFloat(o.label_smoothing) / c10::SymFloat(classes);
  }
  // Sums over a row's classes: to go on with among its classes, and as a result.
  Tensor sum(const Tensor& a) const { return sum_for_shards(a.sum(dim, true), o.shard.ranks); }
  Tensor sum_of(const Tensor& a) const { return sum_of_shards(a.sum(dim), o.shard.ranks); }
  Tensor of_rows(int64_t i) const { return stats.select(0, i).unsqueeze(dim); }  // 0 max, 1 log_sum, 2 mass
  Tensor mass() const { return soft ? sum(weighted(smoothed())) : of_rows(2); }  // sum_j q_j of each row
  // a, of the logits' shape or the rows', but 0 in ignored rows, whatever is in them. Of inputs, not of results: what
  // came of a NaN would be NaN again in the next derivative.
  Tensor used(const Tensor& a) const {
    if (soft || !t.defined()) return a;
    return a.masked_fill((t.to(at::kLong) == o.ignore_index).unsqueeze(dim), 0);  // as uint8, 156 would be -100
  }

  // In a row whose maximum is +inf that is one certain class: finite numbers far apart say so too, without inf - inf.
  Tensor certain() const { return (of_rows(0) == kInfinity).logical_and(of_rows(1) == of_rows(1)); }
  Tensor finite(const Tensor& a) const {
    return at::minimum(a, at::full_like(of_rows(0), kInfinity).masked_fill(certain(), largest_of(acc)));
  }
  Tensor finite() const { return finite(used(x).to(acc)); }
  Tensor softmax() const { return o.shard.all ? (-surprise()).exp() : at::softmax(finite(), dim); }
  Tensor minus_log_softmax() const {
    const Tensor n = o.shard.all ? surprise() : -at::log_softmax(finite(), dim);
    return n.masked_fill(certain().logical_and(x != kInfinity), kInfinity);
  }
  // -log p of a shard's classes, from the whole row's sums. Those were saved as numbers: what they change by when the
  // logits do is the change of the sum of all p, which is 1.
  Tensor surprise() const {
    const Tensor n = (finite(of_rows(0)) - finite()) + of_rows(1);
    if (!at::GradMode::is_enabled() && !has_tangent(x)) return n;
    const Tensor log_sum = sum((-n).exp()).log();
    return n + (log_sum - log_sum.detach());
  }

  Tensor scale(const Tensor& grad) const {  // d(reduced loss) / d(row's loss), times the incoming gradient
    if (o.reduction == kNone) return row(grad);
    return o.reduction == kMean ? grad / total : grad;
  }
  Tensor row(const Tensor& grad) const { return used(copy_to_shards(grad, o.shard.ranks).unsqueeze(dim)); }
  Tensor reduce(const Tensor& a) const { return o.reduction == kNone ? sum_of(a) : a.sum(); }
  Tensor mean(const Tensor& a) const { return o.reduction == kMean ? a / total : a; }
  // Gradients of loss = -sum_j w_j t'_j log p_j, t' = smoothed(t)
  Tensor target_slope() const { return weighted(keep() * minus_log_softmax()); }
  Tensor weight_slope() const { return times(smoothed(), minus_log_softmax()); }
  void check_weight_slope() const {
    TORCH_CHECK_NOT_IMPLEMENTED(soft,
                                "cece.cross_entropy: the derivative for 'weight' is not implemented for class "
                                "indices (nor in torch), only for probability targets");
  }

  // Of the gradient G_j = s (p_j m - q_j), with s the scale and m the mass: its change along a change of its inputs.
  Tensor along_x(const Tensor& s, const Tensor& dx) const {  // s m p (v - sum_k p_k v_k), symmetric: also its vjp
    const Tensor p = softmax(), v = used(dx);
    return s * mass() * p * (v - sum(p * v));
  }
  Tensor along_q(const Tensor& s, const Tensor& dq) const { return s * (softmax() * sum(dq) - dq); }
  Tensor onto_q(const Tensor& s, const Tensor& v) const { return s * (sum(softmax() * v) - v); }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static double largest_of(at::ScalarType type) {
    return type == at::kDouble ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  }
};

}  // namespace cece
