// Derivatives: which node the graph gets, and every formula that is not a kernel's.
//
// Each loss has two differentiable operators, forward and backward. Reverse mode of the forward is the backward
// kernel; what follows from it in closed form, in plain differentiable torch operators, is written here: the
// derivatives of the backward (second order, and through these operators every higher one), forward mode, and the
// seldom asked gradients of targets and weights. The nodes are in C++ because a Python one costs more than the whole
// of torch's own loss at (128, 10): 70 to 117 us against 47. Every torch.func transform, torch.compile and
// torch.export see ordinary operators.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace cece {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kNone = 0, kMean = 1;

Tensor get(const MaybeTensor& t) { return t.has_value() ? *t : Tensor(); }
MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

bool needs_graph(std::initializer_list<Tensor> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& t : tensors) {
    if (t.defined() && t.requires_grad()) return true;
  }
  return false;
}
// Forward mode: a tensor may carry a tangent.
Tensor tangent(const Tensor& t) { return t.defined() ? t._fw_grad(/*level=*/0) : Tensor(); }
Tensor primal(const Tensor& t) { return tangent(t).defined() ? t._fw_primal(0) : t; }
bool has_tangent(std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) {
    if (tangent(t).defined()) return true;
  }
  return false;
}
Tensor plus(const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; }
// The tangent as torch wants it beside a tensor: of its dtype.
Tensor dual(const Tensor& value, const Tensor& t) {
  return t.defined() ? at::_make_dual(value, t.to(value.scalar_type()), 0) : value;
}
Tensor like(const Tensor& grad, const Tensor& t) { return grad.sum_to_size(t.sizes()).to(t.scalar_type()); }

// =============================================================================================== cross-entropy

at::ScalarType acc_of(const Tensor& logits, const Tensor& target) {
  return logits.scalar_type() == at::kDouble || target.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing;
};

Tensor call_backward(const Tensor& grad, const Tensor& x, const Tensor& t, const MaybeTensor& w, const Tensor& stats,
                     const Tensor& total, const Options& o) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::cross_entropy_backward", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                        int64_t, int64_t, double)>();
  return op.call(grad, x, t, w, stats, total, o.reduction, o.ignore_index, o.label_smoothing);
}
ForwardOutputs call_forward(const Tensor& x, const Tensor& t, const MaybeTensor& w, const Options& o, bool inplace) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::cross_entropy_forward", "")
          .typed<ForwardOutputs(const Tensor&, const Tensor&, const MaybeTensor&, int64_t, int64_t, double, bool)>();
  return op.call(x, t, w, o.reduction, o.ignore_index, o.label_smoothing, inplace);
}

// The formulas of one call, in plain torch operators. Shapes: logits (N, C, d...), rows (N, 1, d...).
struct CrossEntropyFormulas {
  Tensor x, t, w, stats, total;
  Options o;
  int64_t dim;  // of the classes
  bool soft;
  at::ScalarType acc;

  CrossEntropyFormulas(const Tensor& x, const Tensor& t, const Tensor& w, const Tensor& stats, const Tensor& total,
                       const Options& o)
      : x(x), t(t), w(w), stats(stats), total(total), o(o), dim(x.dim() == 1 ? 0 : 1),
        soft(t.dim() == x.dim()), acc(acc_of(x, soft ? t : x)) {}

  double keep() const { return 1 - o.label_smoothing; }
  Tensor weights() const {  // (C) against (N, C, d...)
    std::vector<int64_t> sizes(x.dim(), 1);
    sizes[dim] = -1;
    return w.to(acc).view(sizes);
  }
  Tensor weighted(const Tensor& a) const { return w.defined() ? a * weights() : a; }
  Tensor smoothed() const { return t.to(acc) * keep() + o.label_smoothing / double(x.size(dim)); }
  Tensor mass() const {  // sum_j q_j of each row; 0 where ignored
    return soft ? weighted(smoothed()).sum(dim, true) : stats.select(0, 2).unsqueeze(dim);
  }
  Tensor softmax() const { return at::softmax(x, dim, acc); }
  Tensor scale(const Tensor& grad) const {  // d(reduced loss) / d(row's loss), times the incoming gradient
    if (o.reduction == kNone) return grad.unsqueeze(dim);
    return o.reduction == kMean ? grad / total : grad;
  }
  Tensor reduce(const Tensor& a) const { return o.reduction == kNone ? a.sum(dim) : a.sum(); }
  Tensor unit_gradient() const {  // dloss/dx for an incoming gradient of 1
    const Tensor ones = o.reduction == kNone ? at::ones_like(stats.select(0, 0)) : at::ones_like(total);
    return call_backward(ones, x, t, maybe(w), stats, total, o);
  }

  // Gradients of loss = -sum_j w_j t'_j log p_j, t' = smoothed(t)
  Tensor target_slope() const { return weighted(-keep() * at::log_softmax(x, dim, acc)); }
  Tensor weight_slope() const { return -smoothed() * at::log_softmax(x, dim, acc); }
  void check_weight_slope() const {
    TORCH_CHECK_NOT_IMPLEMENTED(soft, "cece.cross_entropy: the derivative for 'weight' is not implemented for class "
                                      "indices (nor in torch), only for probability targets");
  }

  // Of the gradient G_j = s (p_j m - q_j), with s the scale and m the mass: its change along a change of its inputs.
  Tensor along_x(const Tensor& s, const Tensor& v) const {  // s m p (v - sum_k p_k v_k), symmetric: also its vjp
    const Tensor m = mass(), p = softmax().masked_fill(m == 0, 0);
    return s * m * p * (v - (p * v).sum(dim, true));
  }
  Tensor along_q(const Tensor& s, const Tensor& dq) const { return s * (softmax() * dq.sum(dim, true) - dq); }
  Tensor onto_q(const Tensor& s, const Tensor& v) const { return s * ((softmax() * v).sum(dim, true) - v); }
};

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                               int64_t reduction, int64_t ignore_index, double label_smoothing, bool inplace) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, stats, total] = call_forward(x, t, w, {reduction, ignore_index, label_smoothing}, inplace);
    ctx->save_for_backward({x, t, get(w), stats, total});
    ctx->mark_non_differentiable({stats, total});
    ctx->set_materialize_grads(false);
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["inplace"] = inplace;
    return {loss, stats, total};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &t = saved[1], &w = saved[2], &stats = saved[3], &total = saved[4], &g = grads[0];
    const Options o{ctx->saved_data["reduction"].toInt(), ctx->saved_data["ignore_index"].toInt(),
                    ctx->saved_data["label_smoothing"].toDouble()};
    variable_list out(7);
    if (!g.defined()) return out;
    const bool seldom = ctx->needs_input_grad(1) || (w.defined() && ctx->needs_input_grad(2));
    if (seldom) {  // before the logits may be overwritten
      const CrossEntropyFormulas f(x, t, w, stats, total, o);
      if (ctx->needs_input_grad(1)) out[1] = like(f.scale(g) * f.target_slope(), t);
      if (w.defined() && ctx->needs_input_grad(2)) {
        f.check_weight_slope();
        out[2] = like((f.scale(g) * f.weight_slope()).movedim(f.dim, -1), w);
      }
    }
    if (ctx->needs_input_grad(0)) {
      out[0] = ctx->saved_data["inplace"].toBool() && !at::GradMode::is_enabled()
                   ? overwrite(g, x, t, maybe(w), stats, total, o)
                   : call_backward(g, x, t, maybe(w), stats, total, o);
    }
    return out;
  }

  // The gradient in the logits' own memory. Autograd learns of it through the version counter: whoever else saved
  // the logits, a second backward included, gets torch's error instead of wrong numbers.
  static Tensor overwrite(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w, const Tensor& stats,
                          const Tensor& total, const Options& o) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("cece::cross_entropy_backward_", "")
            .typed<void(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                        int64_t, int64_t, double)>();
    at::AutoDispatchBelowADInplaceOrView below;
    op.call(g, x, t, w, stats, total, o.reduction, o.ignore_index, o.label_smoothing);
    torch::autograd::impl::bump_version(x);
    return x.detach();
  }
};

void check_inplace(const Tensor& x) {
  TORCH_CHECK(!(x.requires_grad() && x.is_leaf()),
              "cece.cross_entropy: inplace_backward=True overwrites input with its gradient, so input must not be a leaf "
              "that requires grad (got one): its values would be lost. Pass the output of a layer, or leave it False.");
  for (int64_t d = 0; d < x.dim(); d++) {
    TORCH_CHECK(x.size(d) < 2 || x.stride(d) != 0, "cece.cross_entropy: inplace_backward=True needs an input whose elements "
                "have memory of their own, got an expanded one with strides ", x.strides());
  }
}

ForwardOutputs cross_entropy_forward(const Tensor& x, const Tensor& t, const MaybeTensor& w, int64_t reduction,
                                     int64_t ignore_index, double label_smoothing, bool inplace) {
  const Options o{reduction, ignore_index, label_smoothing};
  if (has_tangent({x, t, get(w)})) {
    const Tensor px = primal(x), pt = primal(t), pw = primal(get(w));
    const Tensor dx = tangent(x), dt = tangent(t), dw = tangent(get(w));
    auto [loss, stats, total] = call_forward(px, pt, maybe(pw), o, false);
    const CrossEntropyFormulas f(px, pt, pw, stats, total, o);
    Tensor d;
    if (dx.defined()) d = f.reduce(f.unit_gradient() * dx);
    const double share = 1. / (reduction == kMean ? double(stats.numel() / 3) : 1.);
    if (dt.defined()) d = plus(d, f.reduce(f.target_slope() * dt) * share);
    if (dw.defined()) {
      f.check_weight_slope();
      std::vector<int64_t> sizes(x.dim(), 1);
      sizes[f.dim] = -1;
      d = plus(d, f.reduce(f.weight_slope() * dw.view(sizes)) * share);
    }
    return {dual(loss, d), stats, total};
  }
  if (!needs_graph({x, t, get(w)})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(x, t, w, o, inplace);
  }
  if (inplace) check_inplace(x);
  const auto out = CrossEntropy::apply(x, t, w, reduction, ignore_index, label_smoothing, inplace);
  return {out[0], out[1], out[2]};
}

struct CrossEntropyBackward : torch::autograd::Function<CrossEntropyBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                        const Tensor& stats, const Tensor& total, int64_t reduction, int64_t ignore_index,
                        double label_smoothing) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({g, x, t, get(w), stats, total});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    return call_backward(g, x, t, w, stats, total, {reduction, ignore_index, label_smoothing});
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], &t = saved[2], &w = saved[3], &v = grads[0];
    const CrossEntropyFormulas f(x, t, w, saved[4], saved[5],
                                 {ctx->saved_data["reduction"].toInt(), ctx->saved_data["ignore_index"].toInt(),
                                  ctx->saved_data["label_smoothing"].toDouble()});
    const Tensor s = f.scale(g);
    variable_list out(9);
    if (ctx->needs_input_grad(0)) out[0] = f.reduce(v * f.unit_gradient()).to(g.scalar_type());
    if (ctx->needs_input_grad(1)) out[1] = f.along_x(s, v).to(x.scalar_type());
    if (ctx->needs_input_grad(2)) out[2] = like(f.keep() * f.weighted(f.onto_q(s, v)), t);
    if (w.defined() && ctx->needs_input_grad(3)) {
      f.check_weight_slope();
      out[3] = like((f.smoothed() * f.onto_q(s, v)).movedim(f.dim, -1), w);
    }
    return out;
  }
};

Tensor cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                              const Tensor& stats, const Tensor& total, int64_t reduction, int64_t ignore_index,
                              double label_smoothing) {
  const Options o{reduction, ignore_index, label_smoothing};
  if (has_tangent({g, x, t, get(w)})) {
    const Tensor pg = primal(g), px = primal(x), pt = primal(t), pw = primal(get(w));
    const Tensor dg = tangent(g), dx = tangent(x), dt = tangent(t), dw = tangent(get(w));
    const Tensor grad = call_backward(pg, px, pt, maybe(pw), stats, total, o);
    const CrossEntropyFormulas f(px, pt, pw, stats, total, o);
    const Tensor s = f.scale(pg);
    Tensor d;
    if (dg.defined()) d = call_backward(dg, px, pt, maybe(pw), stats, total, o);
    if (dx.defined()) d = plus(d, f.along_x(s, dx));
    if (dt.defined()) d = plus(d, f.along_q(s, f.keep() * f.weighted(dt)));
    if (dw.defined()) {
      f.check_weight_slope();
      std::vector<int64_t> sizes(x.dim(), 1);
      sizes[f.dim] = -1;
      d = plus(d, f.along_q(s, f.smoothed() * dw.view(sizes)));
    }
    return dual(grad, d);
  }
  if (!needs_graph({g, x, t, get(w)})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(g, x, t, w, stats, total, o);
  }
  return CrossEntropyBackward::apply(g, x, t, w, stats, total, reduction, ignore_index, label_smoothing);
}

// ======================================================================================== binary cross-entropy

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
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::binary_cross_entropy_backward", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, bool,
                        int64_t)>();
  return op.call(g, x, y, w, p, with_logits, reduction);
}

// loss = w l(x, y, p) and its slope in x, phi(x, y, p), with their derivatives.
struct BinaryFormulas {
  Tensor x, y, w, p;
  bool with_logits;
  int64_t reduction;
  MaybeTensor raw_w, raw_p;  // as the operators take them

  BinaryFormulas(const Tensor& x_, const Tensor& y_, const Tensor& w_, const Tensor& p_, bool with_logits,
                 int64_t reduction)
      : with_logits(with_logits), reduction(reduction), raw_w(maybe(w_)), raw_p(maybe(p_)), input(x_), target(y_) {
    const bool wide = x_.scalar_type() == at::kDouble || y_.scalar_type() == at::kDouble ||
                      (w_.defined() && w_.scalar_type() == at::kDouble);
    const auto acc = wide ? at::kDouble : at::kFloat;
    x = x_.to(acc), y = y_.to(acc);
    if (w_.defined()) w = w_.to(acc);
    if (p_.defined()) p = p_.to(acc);
  }
  Tensor input, target;

  Tensor weighted(const Tensor& a) const { return w.defined() ? a * w : a; }
  Tensor positive(const Tensor& a) const { return p.defined() ? a * p : a; }
  Tensor scale(const Tensor& g) const { return reduction == kMean ? g / x.numel() : g; }
  Tensor reduce(const Tensor& a) const { return reduction == kNone ? a : a.sum(); }

  Tensor up() const { return -at::log_sigmoid(-x); }    // softplus(x)
  Tensor down() const { return -at::log_sigmoid(x); }   // softplus(-x)
  static Tensor capped(const Tensor& log) { return -log.clamp_min(-100); }
  Tensor variance() const { return ((1 - x) * x).clamp_min(1e-12); }

  Tensor loss() const {
    return with_logits ? (1 - y) * up() + positive(y * down()) : y * capped(x.log()) + (1 - y) * capped((-x).log1p());
  }
  Tensor loss_y() const { return with_logits ? positive(down()) - up() : capped(x.log()) - capped((-x).log1p()); }
  Tensor loss_p() const { return y * down(); }

  Tensor phi() const {
    return with_logits ? (1 - y) * x.sigmoid() - positive(y * (-x).sigmoid()) : (x - y) / variance();
  }
  Tensor phi_x() const {
    if (with_logits) return ((1 - y) + positive(y)) * x.sigmoid() * (-x).sigmoid();
    const Tensor v = variance();
    return at::where((1 - x) * x < 1e-12, 1 / v, (x * x - 2 * x * y + y) / (v * v));
  }
  Tensor phi_y() const { return with_logits ? -x.sigmoid() - positive((-x).sigmoid()) : -1 / variance(); }
  Tensor phi_p() const { return -y * (-x).sigmoid(); }

  Tensor unit_gradient() const {
    const Tensor ones = reduction == kNone ? at::ones_like(x) : at::ones({}, x.options());
    return call_bce_backward(ones, input, target, raw_w, raw_p, with_logits, reduction);
  }
};

struct BinaryCrossEntropy : torch::autograd::Function<BinaryCrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const MaybeTensor& w,
                        const MaybeTensor& p, bool with_logits, int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, y, get(w), get(p)});
    ctx->saved_data["with_logits"] = with_logits;
    ctx->saved_data["reduction"] = reduction;
    return call_bce_forward(x, y, w, p, with_logits, reduction);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &w = saved[2], &p = saved[3], &g = grads[0];
    const bool with_logits = ctx->saved_data["with_logits"].toBool();
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const bool need_w = w.defined() && ctx->needs_input_grad(2);
    const bool need_p = p.defined() && ctx->needs_input_grad(w.defined() ? 3 : 2);
    variable_list out(6);
    if (ctx->needs_input_grad(0)) out[0] = call_bce_backward(g, x, y, maybe(w), maybe(p), with_logits, reduction);
    if (ctx->needs_input_grad(1) || need_w || need_p) {
      const BinaryFormulas f(x, y, w, p, with_logits, reduction);
      const Tensor s = f.scale(g);
      if (ctx->needs_input_grad(1)) out[1] = like(s * f.weighted(f.loss_y()), y);
      if (need_w) out[2] = like(s * f.loss(), w);
      if (need_p) out[3] = like(s * f.weighted(f.loss_p()), p);
    }
    return out;
  }
};

Tensor binary_cross_entropy_forward(const Tensor& x, const Tensor& y, const MaybeTensor& w, const MaybeTensor& p,
                                    bool with_logits, int64_t reduction) {
  if (has_tangent({x, y, get(w), get(p)})) {
    const Tensor px = primal(x), py = primal(y), pw = primal(get(w)), pp = primal(get(p));
    const Tensor dx = tangent(x), dy = tangent(y), dw = tangent(get(w)), dp = tangent(get(p));
    const Tensor loss = call_bce_forward(px, py, maybe(pw), maybe(pp), with_logits, reduction);
    const BinaryFormulas f(px, py, pw, pp, with_logits, reduction);
    Tensor d;
    if (dx.defined()) d = f.reduce(f.unit_gradient() * dx);
    if (dy.defined()) d = plus(d, f.scale(f.reduce(f.weighted(f.loss_y() * dy))));
    if (dw.defined()) d = plus(d, f.scale(f.reduce(f.loss() * dw)));
    if (dp.defined()) d = plus(d, f.scale(f.reduce(f.weighted(f.loss_p() * dp))));
    return dual(loss, d);
  }
  if (!needs_graph({x, y, get(w), get(p)})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_bce_forward(x, y, w, p, with_logits, reduction);
  }
  return BinaryCrossEntropy::apply(x, y, w, p, with_logits, reduction);
}

struct BinaryCrossEntropyBackward : torch::autograd::Function<BinaryCrossEntropyBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const Tensor& y, const MaybeTensor& w,
                        const MaybeTensor& p, bool with_logits, int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({g, x, y, get(w), get(p)});
    ctx->saved_data["with_logits"] = with_logits;
    ctx->saved_data["reduction"] = reduction;
    return call_bce_backward(g, x, y, w, p, with_logits, reduction);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], &y = saved[2], &w = saved[3], &p = saved[4], &v = grads[0];
    const BinaryFormulas f(x, y, w, p, ctx->saved_data["with_logits"].toBool(), ctx->saved_data["reduction"].toInt());
    const Tensor s = f.scale(g) * v;
    variable_list out(7);
    if (ctx->needs_input_grad(0)) out[0] = f.reduce(v * f.unit_gradient()).to(g.scalar_type());
    if (ctx->needs_input_grad(1)) out[1] = like(f.weighted(s * f.phi_x()), x);
    if (ctx->needs_input_grad(2)) out[2] = like(f.weighted(s * f.phi_y()), y);
    if (w.defined() && ctx->needs_input_grad(3)) out[3] = like(s * f.phi(), w);
    if (p.defined() && ctx->needs_input_grad(w.defined() ? 4 : 3)) out[4] = like(f.weighted(s * f.phi_p()), p);
    return out;
  }
};

Tensor binary_cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& y, const MaybeTensor& w,
                                     const MaybeTensor& p, bool with_logits, int64_t reduction) {
  if (has_tangent({g, x, y, get(w), get(p)})) {
    const Tensor pg = primal(g), px = primal(x), py = primal(y), pw = primal(get(w)), pp = primal(get(p));
    const Tensor dg = tangent(g), dx = tangent(x), dy = tangent(y), dw = tangent(get(w)), dp = tangent(get(p));
    const Tensor grad = call_bce_backward(pg, px, py, maybe(pw), maybe(pp), with_logits, reduction);
    const BinaryFormulas f(px, py, pw, pp, with_logits, reduction);
    const Tensor s = f.scale(pg);
    Tensor d;
    if (dg.defined()) d = call_bce_backward(dg, px, py, maybe(pw), maybe(pp), with_logits, reduction);
    if (dx.defined()) d = plus(d, f.weighted(s * f.phi_x() * dx));
    if (dy.defined()) d = plus(d, f.weighted(s * f.phi_y() * dy));
    if (dw.defined()) d = plus(d, s * f.phi() * dw);
    if (dp.defined()) d = plus(d, f.weighted(s * f.phi_p() * dp));
    return dual(grad, d);
  }
  if (!needs_graph({g, x, y, get(w), get(p)})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_bce_backward(g, x, y, w, p, with_logits, reduction);
  }
  return BinaryCrossEntropyBackward::apply(g, x, y, w, p, with_logits, reduction);
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, Autograd, m) {
  m.impl("cross_entropy_forward", cece::cross_entropy_forward);
  m.impl("cross_entropy_backward", cece::cross_entropy_backward);
  m.impl("binary_cross_entropy_forward", cece::binary_cross_entropy_forward);
  m.impl("binary_cross_entropy_backward", cece::binary_cross_entropy_backward);
}
