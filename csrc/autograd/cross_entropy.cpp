// Derivatives of softmax cross-entropy, and when its gradient may take the logits' memory.
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/library.h>

#include "rows.h"

namespace cece {
namespace {

// The gradient in the logits' own memory. Autograd learns of it through the version counter: whoever else saved
// the logits, a second backward included, gets torch's error instead of wrong numbers.
Tensor overwrite_backward(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w, const Tensor& stats,
                          const Tensor& total, const RowOptions& o) {
  at::AutoDispatchBelowADInplaceOrView below;
  call_backward_(g, x, t, w, stats, total, o);
  torch::autograd::impl::bump_version(x);
  return x.detach();
}

struct CrossEntropyFormulas : RowFormulas {
  using RowFormulas::RowFormulas;

  // dloss/dx for an incoming gradient of 1. Not in x's dtype: it is multiplied and added up before it is rounded.
  Tensor unit_gradient() const {
    const Tensor ones = o.reduction == kNone ? at::ones_like(stats.select(0, 0)) : at::ones_like(total);
    return call_backward(ones, x.to(acc), t, maybe(w), stats, total, o);
  }
  Tensor along_gradient(const Tensor& v) const { return reduce(unit_gradient() * used(v)); }
};

// ---- inplace_backward: when the gradient may take the logits' memory. One who asks for what would destroy something
// is told so; where it cannot be known what else would see the change, the gradient has memory of its own.

// Whether no two elements share memory, as far as strides can tell: each dimension steps over all smaller ones.
bool separate(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < x.dim(); d++) {
    if (x.size(d) > 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return false;
    extent += stride * (size - 1);
  }
  return true;
}
// Whether x is another form of a leaf that requires grad: a view of one, or, for operators that make no view of what is
// one (_unsafe_view, _reshape_alias), the end of a chain of functions of one tensor each that begins at a leaf whose
// memory x has.
bool is_of_leaf(const Tensor& x) {
  if (x.is_view() && x._base().is_leaf() && x._base().requires_grad()) return true;
  const torch::autograd::Node* node = x.grad_fn().get();
  while (node && node->num_outputs() == 1) {
    node = node->next_edge(0).function.get();
    const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(node);
    if (leaf) return leaf->variable.has_storage() && leaf->variable.is_alias_of(x);
  }
  return false;
}
void check_inplace(const Tensor& x) {
  if (!x.requires_grad() || !plain(x)) return;
  const bool of_leaf = is_of_leaf(x);
  TORCH_CHECK(
      !x.is_leaf() && !of_leaf,
      "cece.cross_entropy: inplace_backward=True overwrites input with its gradient, so input must not be a leaf "
      "that requires grad, nor a view of one (got ",
      of_leaf ? "a view of one" : "one", "): its values would be lost. Pass the output of a layer, or leave it False.");
  TORCH_CHECK(
      separate(x),
      "cece.cross_entropy: inplace_backward=True needs an input whose elements have memory of their own, got an "
      "expanded or overlapping one with sizes ",
      x.sizes(), " and strides ", x.strides());
}
bool may_overwrite(const Tensor& grad, const Tensors& saved) {
  const Tensor& x = saved[0];
  bool may = !at::GradMode::is_enabled() && !c10::impl::TorchDispatchModeTLS::any_modes_set() && plain(grad);
  for (const Tensor& t : saved) may = may && plain(t);
  if (!may || !separate(x)) return false;
  for (const Tensor& t : {grad, saved[1], saved[2], saved[3], saved[4]}) {
    if (t.defined() && t.is_alias_of(x)) return false;
  }
  return true;
}

struct CrossEntropyBackward {
  using Options = RowOptions;
  static constexpr const char* kName = "CrossEntropyBackward";
  static constexpr size_t kEdges = 3, kSaved = 5;  // logits, target, weight; stats, total_weight

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& g) {
    const Tensor &x = saved[0], &t = saved[1], &w = saved[2], &stats = saved[3], &total = saved[4];
    variable_list out(kEdges);
    if (needs[1] || needs[2]) {  // before the logits may be overwritten
      const CrossEntropyFormulas f(x, t, w, stats, total, o);
      if (needs[1]) out[1] = like(f.scale(g) * f.target_slope(), t);
      if (needs[2]) {
        f.check_weight_slope();
        out[2] = like((f.scale(g) * f.weight_slope()).movedim(f.dim, -1), w);
      }
    }
    if (needs[0]) {
      const bool overwrite = o.inplace && may_overwrite(g, saved);
      out[0] = overwrite ? overwrite_backward(g, x, t, maybe(w), stats, total, o)
                         : call_backward(g, x, t, maybe(w), stats, total, o);
    }
    return out;
  }
};

CrossEntropyTuple cross_entropy_forward(const Tensor& x, const Tensor& t, const MaybeTensor& w, int64_t reduction,
                                        int64_t ignore_index, double label_smoothing, bool inplace) {
  // A wrapper may answer for a device that its own mechanism does not hold us to.
  if (!all_plain(x, t, get(w))) check_cross_entropy_shapes(x, t, w, reduction, ignore_index, label_smoothing);
  if (inplace) check_inplace(x);
  // A tensor that is saved through hooks (activation checkpointing, save_on_cpu) comes back without autograd's check
  // that it is still what was saved: nobody else who saved the logits would notice that they were overwritten.
  inplace = inplace && !at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value();
  const RowOptions o{reduction, ignore_index, label_smoothing, inplace};
  CrossEntropyTuple out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = call_forward(x, t, w, o);
  }
  const auto& [loss, stats, total] = out;
  record<CrossEntropyBackward>({loss}, o, {x, t, get(w), stats, total});
  if (has_tangent(x, t, get(w))) {
    const CrossEntropyFormulas f(primal(x), primal(t), primal(get(w)), stats, total, o);
    const Tensor dx = tangent(x), dt = tangent(t), dw = tangent(get(w));
    Tensor d;
    if (dx.defined()) d = f.along_gradient(dx);
    if (dt.defined()) d = plus(d, f.mean(f.reduce(times(dt, f.target_slope()))));
    if (dw.defined()) {
      f.check_weight_slope();
      d = plus(d, f.mean(f.reduce(times(f.by_class(dw), f.weight_slope()))));
    }
    set_tangent(loss, d);
  }
  return out;
}

struct CrossEntropyBackwardBackward {
  using Options = RowOptions;
  static constexpr const char* kName = "CrossEntropyBackwardBackward";
  static constexpr size_t kEdges = 4, kSaved = 6;  // grad, logits, target, weight; stats, total_weight

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& v) {
    const Tensor &g = saved[0], &x = saved[1], &t = saved[2], &w = saved[3];
    const CrossEntropyFormulas f(x, t, w, saved[4], saved[5], o);
    const Tensor s = f.scale(g);
    variable_list out(kEdges);
    if (needs[0]) out[0] = f.along_gradient(v).to(g.scalar_type());
    if (needs[1]) out[1] = f.along_x(s, v).to(x.scalar_type());
    if (needs[2]) out[2] = like(f.keep() * f.weighted(f.onto_q(s, v)), t);
    if (needs[3]) {
      f.check_weight_slope();
      out[3] = like((f.smoothed() * f.onto_q(s, v)).movedim(f.dim, -1), w);
    }
    return out;
  }
};

Tensor cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                              const Tensor& stats, const Tensor& total, int64_t reduction, int64_t ignore_index,
                              double label_smoothing, CECE_SHARD_PARAMETERS) {
  const RowOptions o{reduction, ignore_index, label_smoothing, false, CECE_SHARD};
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_backward(g, x, t, w, stats, total, o);
  }
  record<CrossEntropyBackwardBackward>({grad}, o, {g, x, t, get(w), stats, total});
  if (has_tangent(g, x, t, get(w))) {
    const Tensor px = primal(x), pt = primal(t), pw = primal(get(w));
    const Tensor dg = tangent(g), dx = tangent(x), dt = tangent(t), dw = tangent(get(w));
    const CrossEntropyFormulas f(px, pt, pw, stats, total, o);
    const Tensor s = f.scale(primal(g));
    Tensor d;
    if (dg.defined()) d = call_backward(dg, px, pt, maybe(pw), stats, total, o);
    if (dx.defined()) d = plus(d, f.along_x(s, dx));
    if (dt.defined()) d = plus(d, f.along_q(s, f.keep() * f.weighted(dt)));
    if (dw.defined()) {
      f.check_weight_slope();
      d = plus(d, f.along_q(s, f.smoothed() * f.by_class(dw)));
    }
    set_tangent(grad, d);
  }
  return grad;
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, Autograd, m) {
  m.impl("cross_entropy_forward", cece::cross_entropy_forward);
  m.impl("cross_entropy_backward", cece::cross_entropy_backward);
}
