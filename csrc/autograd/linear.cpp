// Derivatives of the linear losses. The sum of the losses brings its gradient along, formed in the forward while a
// chunk's logits are at hand: three matrix products in all. Rows' own statistics have a backward that forms the logits
// again, in chunks. What must be differentiable itself (create_graph), forward mode, torch.func's transforms and the
// gradients of targets and class weights go by plain operators that hold the logits, and so know every order.
#include "../linear.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "node.h"

namespace cece {
namespace {

struct LinearCall {
  int64_t ignore_index;
  double label_smoothing, logit_scale, softcap;
  bool skip_masked_rows;
  int64_t chunk_size;
  bool compact;
  double z_loss;
  int64_t wanted;  // of a row
  int64_t reduction;
  bool hooks;  // saved through hooks, whose owner may keep the very tensors
  Shard shard = {};

  auto all() {
    return std::tuple_cat(std::tie(ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, chunk_size,
                                   compact, z_loss, wanted, reduction, hooks),
                          shard.options());
  }
  TokenOptions row() const { return {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, shard}; }
  LinearOptions linear() const { return {row(), chunk_size, compact}; }
};

LinearOutputs call_sum(const Tensor& x, const Tensor& lw, const MaybeTensor& lb, const Tensor& t, const MaybeTensor& w,
                       const MaybeTensor& rw, const LinearCall& o, int64_t gradients) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::linear_cross_entropy", "")
          .typed<LinearOutputs(const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const MaybeTensor&,
                               const MaybeTensor&, int64_t, double, double, double, bool, int64_t, bool, double,
                               int64_t, int64_t, int64_t, std::optional<int64_t>, int64_t, const std::string&)>();
  return op.call(x, lw, lb, t, w, rw, o.ignore_index, o.label_smoothing, o.logit_scale, o.softcap, o.skip_masked_rows,
                 o.chunk_size, o.compact, o.z_loss, o.reduction, gradients, o.shard.first, o.shard.all,
                 o.shard.ranks.count, o.shard.ranks.group);
}
LinearGradients call_rows_backward(const TokenGrads& g, const Tensor& x, const Tensor& lw, const MaybeTensor& lb,
                                   const MaybeTensor& t, const MaybeTensor& w, const Tensor& stats, const LinearCall& o,
                                   int64_t gradients) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::linear_token_statistics_backward", "")
          .typed<LinearGradients(const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                                 const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                                 const MaybeTensor&, const Tensor&, int64_t, double, double, double, bool, int64_t,
                                 bool, int64_t, int64_t, int64_t, std::optional<int64_t>, int64_t,
                                 const std::string&)>();
  return op.call(g[0], g[1], g[2], g[3], x, lw, lb, t, w, stats, o.ignore_index, o.label_smoothing, o.logit_scale,
                 o.softcap, o.skip_masked_rows, o.chunk_size, o.compact, o.wanted, gradients, o.shard.first,
                 o.shard.all, o.shard.ranks.count, o.shard.ranks.group);
}

// ---- in plain operators, at least float32 all along

class Plain {
 public:
  Plain(const Tensor& input, const Tensor& linear_weight, const MaybeTensor& linear_bias, const MaybeTensor& target,
        int64_t ignore_index, const Ranks& ranks)
      : wide_(acc_type({&input})),
        ranks_(ranks),
        x_(copy_to_shards(input, ranks).to(wide_)),
        matrix_(linear_weight.flatten(0, -2).to(wide_)),
        sizes_(linear_logits_sizes(input, linear_weight)) {
    if (is_labels(target, linear_weight.dim())) {
      ignored_ = used_rows(*target, ignore_index).logical_not().unsqueeze(1);
      x_ = x_.masked_fill(ignored_, 0);
    }
    logits_ = at::linear(x_, matrix_, present(linear_bias) ? linear_bias->flatten().to(wide_) : Tensor());
    logits_ = logits_.reshape_symint(sizes_);
  }
  const Tensor& logits() const { return logits_; }

  // From the logits' gradient, in the dtypes of what they belong to; undefined where `needs` has it so.
  variable_list gradients(const Tensor& grad_logits, const Needs& needs, const Tensor& input,
                          const Tensor& linear_weight, const Tensor& linear_bias) const {
    const Tensor g = grad_logits.flatten(1);
    variable_list out(3);
    if (needs[0]) {
      Tensor grad = g.matmul(matrix_);
      if (ignored_.defined()) grad = grad.masked_fill(ignored_, 0);
      out[0] = sum_of_shards(grad, ranks_).to(input.scalar_type());
    }
    if (needs[1]) out[1] = g.t().matmul(x_).reshape_symint(linear_weight.sym_sizes()).to(linear_weight.scalar_type());
    if (needs[2]) out[2] = g.sum(0).reshape_symint(linear_bias.sym_sizes()).to(linear_bias.scalar_type());
    return out;
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  at::ScalarType wide_;
  Ranks ranks_;
  Tensor x_, matrix_;
  c10::SymDimVector sizes_;
  Tensor ignored_, logits_;
};

// ---- when they serve

bool transformed(const Tensor& t) {
  return t.defined() && (t.key_set().has(c10::DispatchKey::FuncTorchBatched) ||
                         t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper));
}
template <class... Ts>
bool needs_plain(const Ts&... tensors) {
  return (transformed(tensors) || ...) || has_tangent(tensors...);
}
bool differentiable(const Tensor& t) { return at::GradMode::is_enabled() && t.defined() && t.requires_grad(); }

// ---- the sum, with its gradient

struct LinearCrossEntropyBackward {
  using Options = LinearCall;
  static constexpr const char* kName = "LinearCrossEntropyBackward";
  // input, linear_weight, linear_bias, token_weight; target, weight, losses, total, the first three's gradients of the
  // sum
  static constexpr size_t kEdges = 4, kSaved = 11;

  static variable_list derive(const LinearCall& o, const Needs& needs, const Tensors& saved, const Tensor& g) {
    if (at::GradMode::is_enabled()) return differentiably(o, needs, saved, g);
    variable_list out(kEdges);
    const Tensor s = g / saved[7];
    // What was saved is not used again: unless a graph is kept, or someone else may hold it.
    const bool overwrite = !o.hooks && plain(g) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
                           !torch::autograd::get_current_graph_task_keep_graph();
    for (size_t i = 0; i < 3; i++) {
      const Tensor& sum = saved[8 + i];
      if (!needs[i]) continue;
      const Tensor scaled = overwrite && plain(sum) ? sum.mul_(s) : sum * s;
      out[i] = scaled.to(saved[i].scalar_type());
    }
    if (needs[3]) out[3] = (saved[6] * s).to(saved[3].scalar_type());
    return out;
  }
  static variable_list differentiably(const LinearCall& o, const Needs& needs, const Tensors& saved, const Tensor& g) {
    const Tensor &x = saved[0], &lw = saved[1], &lb = saved[2], &rw = saved[3], &t = saved[4], &w = saved[5];
    const Plain p(x, lw, maybe(lb), t, o.ignore_index, o.shard.ranks);
    const TokenOutputs rows = row_forward(p.logits(), t, maybe(w), o.row(), o.wanted);
    const RowLoss row(rows, t, o.row(), o.z_loss);
    const Tensor s = g / saved[7];
    const Tensor slope =
        row_backward(row.gradients(row.factor(maybe(rw)) * s), p.logits(), t, maybe(w), std::get<5>(rows), o.row());
    variable_list out = p.gradients(slope, needs, x, lw, lb);
    out.push_back(needs[3] ? (row.loss * s).to(rw.scalar_type()) : Tensor());
    return out;
  }
};

LinearOutputs linear_cross_entropy(const Tensor& x, const Tensor& lw, const MaybeTensor& lb, const Tensor& t,
                                   const MaybeTensor& w, const MaybeTensor& rw, int64_t ignore_index,
                                   double label_smoothing, double logit_scale, double softcap, bool skip_masked_rows,
                                   int64_t chunk_size, bool compact, double z_loss, int64_t reduction,
                                   int64_t gradients, CECE_SHARD_PARAMETERS) {
  const bool hooks = at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value();
  const LinearCall o{ignore_index, label_smoothing,         logit_scale, softcap, skip_masked_rows, chunk_size, compact,
                     z_loss,       RowLoss::wanted(z_loss), reduction,   hooks,   CECE_SHARD};
  if (reduction == kNone || needs_plain(x, lw, get(lb), t, get(w), get(rw)) || differentiable(t) ||
      differentiable(get(w))) {
    return linear_cross_entropy_by_rows(x, lw, lb, t, w, rw, o.linear(), z_loss, Reduction(reduction));
  }
  LinearOutputs out;
  {
    // Tracing comes here again with the tensors below, which ask for nothing.
    gradients |= differentiable(x) | differentiable(lw) << 1 | differentiable(get(lb)) << 2;
    at::AutoDispatchBelowADInplaceOrView below;
    out = call_sum(x, lw, lb, t, w, rw, o, gradients);
  }
  const auto& [loss, losses, total, x_sum, lw_sum, lb_sum] = out;
  record<LinearCrossEntropyBackward>({loss}, o,
                                     {x, lw, get(lb), get(rw), t, get(w), losses, total, x_sum, lw_sum, lb_sum});
  if (!loss.requires_grad()) return out;
  const Tensor none = at::empty({0}, losses.options());  // the node's own, which it may overwrite
  return {loss, losses, total, none, none, none};
}

// ---- rows' statistics, whose backward forms the logits again

struct LinearTokenStatisticsBackward {
  using Options = LinearCall;
  static constexpr const char* kName = "LinearTokenStatisticsBackward";
  static constexpr size_t kEdges = 3, kSaved = 6;  // input, linear_weight, linear_bias; target, weight, stats

  static variable_list derive(const LinearCall& o, const Needs& needs, const Tensors& saved, const variable_list& g) {
    const TokenGrads grads{maybe(g[0]), maybe(g[1]), maybe(g[2]), maybe(g[3])};
    auto [x, lw, lb] = call_rows_backward(grads, saved[0], saved[1], maybe(saved[2]), maybe(saved[3]), maybe(saved[4]),
                                          saved[5], o, needs[0] | needs[1] << 1 | needs[2] << 2);
    return {needs[0] ? x : Tensor(), needs[1] ? lw : Tensor(), needs[2] ? lb : Tensor()};
  }
};

TokenOutputs linear_token_statistics_forward(const Tensor& x, const Tensor& lw, const MaybeTensor& lb,
                                             const MaybeTensor& t, const MaybeTensor& w, int64_t ignore_index,
                                             double label_smoothing, double logit_scale, double softcap,
                                             bool skip_masked_rows, int64_t chunk_size, bool compact, int64_t wanted,
                                             CECE_SHARD_PARAMETERS) {
  const LinearCall o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows,
                     chunk_size,   compact,         0,           wanted,  0,
                     false,        CECE_SHARD};
  if (needs_plain(x, lw, get(lb), get(t), get(w)) || differentiable(get(t)) || differentiable(get(w))) {
    return row_forward(Plain(x, lw, lb, t, ignore_index, o.shard.ranks).logits(), t, w, o.row(), wanted);
  }
  TokenOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = call_linear_rows(x, lw, lb, t, w, o.linear(), wanted);
  }
  const auto& [loss, entropy, logsumexp, collision, argmax, stats] = out;
  const auto asked = [&](const Tensor& t, int64_t bit) { return wanted & bit ? t : Tensor(); };
  record<LinearTokenStatisticsBackward>(
      {asked(loss, kLoss), asked(entropy, kEntropy), asked(logsumexp, kLogSumExp), asked(collision, kCollision)}, o,
      {x, lw, get(lb), get(t), get(w), stats});
  return out;
}

LinearGradients linear_token_statistics_backward(const MaybeTensor& grad_loss, const MaybeTensor& grad_entropy,
                                                 const MaybeTensor& grad_logsumexp, const MaybeTensor& grad_collision,
                                                 const Tensor& x, const Tensor& lw, const MaybeTensor& lb,
                                                 const MaybeTensor& t, const MaybeTensor& w, const Tensor& stats,
                                                 int64_t ignore_index, double label_smoothing, double logit_scale,
                                                 double softcap, bool skip_masked_rows, int64_t chunk_size,
                                                 bool compact, int64_t wanted, int64_t gradients,
                                                 CECE_SHARD_PARAMETERS) {
  const LinearCall o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows,
                     chunk_size,   compact,         0,           wanted,  0,
                     false,        CECE_SHARD};
  const TokenGrads g{grad_loss, grad_entropy, grad_logsumexp, grad_collision};
  const std::array<Tensor, 9> all{
      get(grad_loss), get(grad_entropy), get(grad_logsumexp), get(grad_collision), x, lw, get(lb), get(t), get(w)};
  if (std::any_of(all.begin(), all.end(), [](const Tensor& a) { return needs_plain(a) || differentiable(a); })) {
    const Plain p(x, lw, lb, t, ignore_index, o.shard.ranks);
    const Tensor slope = row_backward(g, p.logits(), t, w, stats, o.row());
    const Needs needs{bool(gradients & 1), bool(gradients & 2), bool(gradients & 4)};
    variable_list out = p.gradients(slope, needs, x, lw, get(lb));
    for (Tensor& a : out) {
      if (!a.defined()) a = at::empty({0}, x.options());
    }
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_rows_backward(g, x, lw, lb, t, w, stats, o, gradients);
}

// Under vmap, in a level whose batch no operator below sees: all in plain operators.
void register_all(torch::Library& m) {
  m.impl("linear_cross_entropy", linear_cross_entropy);
  m.impl("linear_token_statistics_forward", linear_token_statistics_forward);
  m.impl("linear_token_statistics_backward", linear_token_statistics_backward);
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, Autograd, m) { cece::register_all(m); }
TORCH_LIBRARY_IMPL(cece, FuncTorchBatched, m) { cece::register_all(m); }
