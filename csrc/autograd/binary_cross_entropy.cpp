// Derivatives of the elementwise losses.
#include <torch/library.h>

#include "node.h"

namespace cece {
namespace {

Tensor call_bce_forward(const Tensor& x, const Tensor& y, const MaybeTensor& w, const MaybeTensor& p, bool with_logits,
                        int64_t reduction) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::binary_cross_entropy_forward", "")
          .typed<Tensor(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, bool, int64_t)>();
  return op.call(x, y, w, p, with_logits, reduction);
}
Tensor call_bce_backward(const Tensor& g, const Tensor& x, const Tensor& y, const MaybeTensor& w, const MaybeTensor& p,
                         bool with_logits, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::binary_cross_entropy_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                           const MaybeTensor&, bool, int64_t)>();
  return op.call(g, x, y, w, p, with_logits, reduction);
}

// loss = w l(x, y, p) and its slope in x, phi(x, y, p), with their derivatives.
struct BinaryFormulas {
  Tensor x, y, w, p;
  bool with_logits;
  int64_t reduction;
  MaybeTensor raw_w, raw_p;  // as the operators take them
  Tensor target;

  BinaryFormulas(const Tensor& x_, const Tensor& y_, const Tensor& w_, const Tensor& p_, bool with_logits,
                 int64_t reduction)
      : with_logits(with_logits), reduction(reduction), raw_w(maybe(w_)), raw_p(maybe(p_)), target(y_) {
    const auto acc = acc_type({&x_, &y_, w_.defined() ? &w_ : nullptr});
    x = x_.to(acc), y = y_.to(acc);
    if (w_.defined()) w = w_.to(acc);
    if (p_.defined()) p = p_.to(acc);
  }

  Tensor weighted(const Tensor& a) const { return w.defined() ? a * w : a; }
  Tensor positive(const Tensor& a) const { return p.defined() ? a * p : a; }
  Tensor scale(const Tensor& g) const { return reduction == kMean ? g / c10::SymFloat(x.sym_numel()) : g; }
  Tensor reduce(const Tensor& a) const { return reduction == kNone ? a : a.sum(); }

  Tensor up() const { return -at::log_sigmoid(-x); }   // softplus(x)
  Tensor down() const { return -at::log_sigmoid(x); }  // softplus(-x)
  // -log x and -log(1 - x), at most 100; the derivative of what is cut off is 0, where that of a clamped log is 0 / 0.
  Tensor minus_log_x() const {
    const Tensor fine = x > kLeast;
    return at::where(fine, -at::where(fine, x, 1).log(), 100);
  }
  Tensor minus_log_rest() const {
    const Tensor fine = x < 1;
    return at::where(fine, -(-at::where(fine, x, 0)).log1p(), 100);
  }
  Tensor variance() const { return ((1 - x) * x).clamp_min(1e-12); }

  Tensor loss() const {
    return with_logits ? times(1 - y, up()) + times(positive(y), down())
                       : y * minus_log_x() + (1 - y) * minus_log_rest();
  }
  Tensor loss_y() const { return with_logits ? positive(down()) - up() : minus_log_x() - minus_log_rest(); }
  Tensor loss_p() const { return times(y, down()); }

  Tensor phi() const {
    return with_logits ? (1 - y) * x.sigmoid() - positive(y * (-x).sigmoid()) : (x - y) / variance();
  }
  Tensor phi_x() const {
    if (with_logits) return ((1 - y) + positive(y)) * x.sigmoid() * (-x).sigmoid();
    const Tensor v = variance();
    return at::where((1 - x) * x < 1e-12, 1 / v, (y * (1 - x) * (1 - x) + (1 - y) * x * x) / (v * v));
  }
  Tensor phi_y() const { return with_logits ? -x.sigmoid() - positive((-x).sigmoid()) : -1 / variance(); }
  Tensor phi_p() const { return -y * (-x).sigmoid(); }

  // In the type that sums are formed in: it is multiplied and added up before it is rounded.
  Tensor along_gradient(const Tensor& v) const {
    const Tensor ones = reduction == kNone ? at::ones_like(x) : at::ones({}, x.options());
    return reduce(call_bce_backward(ones, x, target, raw_w, raw_p, with_logits, reduction) * v);
  }

 private:
  static constexpr double kLeast = 3.7200759760208361e-44;  // e^-100
};

struct BinaryOptions {
  bool with_logits;
  int64_t reduction;

  auto all() { return std::tie(with_logits, reduction); }
};

struct BinaryCrossEntropyBackward {
  using Options = BinaryOptions;
  static constexpr const char* kName = "BinaryCrossEntropyBackward";
  static constexpr size_t kEdges = 4, kSaved = 4;  // input, target, weight, pos_weight

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& g) {
    const Tensor &x = saved[0], &y = saved[1], &w = saved[2], &p = saved[3];
    variable_list out(kEdges);
    if (needs[0]) out[0] = call_bce_backward(g, x, y, maybe(w), maybe(p), o.with_logits, o.reduction);
    if (needs[1] || needs[2] || needs[3]) {
      const BinaryFormulas f(x, y, w, p, o.with_logits, o.reduction);
      const Tensor s = f.scale(g);
      if (needs[1]) out[1] = like(s * f.weighted(f.loss_y()), y);
      if (needs[2]) out[2] = like(s * f.loss(), w);
      if (needs[3]) out[3] = like(s * f.weighted(f.loss_p()), p);
    }
    return out;
  }
};

Tensor binary_cross_entropy_forward(const Tensor& x, const Tensor& y, const MaybeTensor& w, const MaybeTensor& p,
                                    bool with_logits, int64_t reduction) {
  if (!all_plain(x, y, get(w), get(p))) check_binary_cross_entropy_shapes(x, y, w, p, with_logits, reduction);
  Tensor loss;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    loss = call_bce_forward(x, y, w, p, with_logits, reduction);
  }
  record<BinaryCrossEntropyBackward>({loss}, {with_logits, reduction}, {x, y, get(w), get(p)});
  if (has_tangent(x, y, get(w), get(p))) {
    const BinaryFormulas f(primal(x), primal(y), primal(get(w)), primal(get(p)), with_logits, reduction);
    const Tensor dx = tangent(x), dy = tangent(y), dw = tangent(get(w)), dp = tangent(get(p));
    Tensor d;
    if (dx.defined()) d = f.along_gradient(dx);
    if (dy.defined()) d = plus(d, f.scale(f.reduce(f.weighted(times(dy, f.loss_y())))));
    if (dw.defined()) d = plus(d, f.scale(f.reduce(times(dw, f.loss()))));
    if (dp.defined()) d = plus(d, f.scale(f.reduce(f.weighted(times(dp, f.loss_p())))));
    set_tangent(loss, d);
  }
  return loss;
}

struct BinaryCrossEntropyBackwardBackward {
  using Options = BinaryOptions;
  static constexpr const char* kName = "BinaryCrossEntropyBackwardBackward";
  static constexpr size_t kEdges = 5, kSaved = 5;  // grad, input, target, weight, pos_weight

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& v) {
    const Tensor &g = saved[0], &x = saved[1], &y = saved[2], &w = saved[3], &p = saved[4];
    const BinaryFormulas f(x, y, w, p, o.with_logits, o.reduction);
    const Tensor s = f.scale(g) * v;
    variable_list out(kEdges);
    if (needs[0]) out[0] = f.along_gradient(v).to(g.scalar_type());
    if (needs[1]) out[1] = like(f.weighted(s * f.phi_x()), x);
    if (needs[2]) out[2] = like(f.weighted(s * f.phi_y()), y);
    if (needs[3]) out[3] = like(s * f.phi(), w);
    if (needs[4]) out[4] = like(f.weighted(s * f.phi_p()), p);
    return out;
  }
};

Tensor binary_cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& y, const MaybeTensor& w,
                                     const MaybeTensor& p, bool with_logits, int64_t reduction) {
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_bce_backward(g, x, y, w, p, with_logits, reduction);
  }
  record<BinaryCrossEntropyBackwardBackward>({grad}, {with_logits, reduction}, {g, x, y, get(w), get(p)});
  if (has_tangent(g, x, y, get(w), get(p))) {
    const Tensor px = primal(x), py = primal(y), pw = primal(get(w)), pp = primal(get(p));
    const Tensor dg = tangent(g), dx = tangent(x), dy = tangent(y), dw = tangent(get(w)), dp = tangent(get(p));
    const BinaryFormulas f(px, py, pw, pp, with_logits, reduction);
    const Tensor s = f.scale(primal(g));
    Tensor d;
    if (dg.defined()) d = call_bce_backward(dg, px, py, maybe(pw), maybe(pp), with_logits, reduction);
    if (dx.defined()) d = plus(d, f.weighted(s * f.phi_x() * dx));
    if (dy.defined()) d = plus(d, f.weighted(s * f.phi_y() * dy));
    if (dw.defined()) d = plus(d, s * f.phi() * dw);
    if (dp.defined()) d = plus(d, f.weighted(s * f.phi_p() * dp));
    set_tangent(grad, d);
  }
  return grad;
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, Autograd, m) {
  m.impl("binary_cross_entropy_forward", cece::binary_cross_entropy_forward);
  m.impl("binary_cross_entropy_backward", cece::binary_cross_entropy_backward);
}
