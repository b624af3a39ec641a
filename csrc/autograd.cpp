// Derivatives: which node the graph gets, and every formula that is not a kernel's.
//
// Each loss has two differentiable operators, forward and backward. Reverse mode of the forward is the backward
// kernel; what follows from it in closed form, in plain differentiable torch operators, is written here: the
// derivatives of the backward (second order, and through these operators every higher one), forward mode, and the
// seldom asked gradients of targets and weights. The nodes are in C++ because a Python one costs more than the whole
// of torch's own loss at (128, 10): 70 to 117 us against 47. Every torch.func transform, torch.compile and
// torch.export see ordinary operators.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace cece {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr int64_t kNone = 0, kMean = 1;

Tensor get(const MaybeTensor& t) { return t.has_value() ? *t : Tensor(); }
MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

// A node of the graph: the saved inputs (the first of which have an edge each), the options of the call, and the
// function from those and an incoming gradient to the edges' gradients. torch's own nodes are made like this; its
// C++ autograd::Function refuses torch.func.
template <class Options>
struct LossNode : torch::autograd::Node {
  using Derive = variable_list (*)(const LossNode& node, const Tensors& saved, const Tensor& grad);

  LossNode(const char* name, Derive derive, const Options& options, const Tensors& tensors, size_t edges)
      : options(options), name_(name), derive_(derive) {
    for (const Tensor& t : tensors) saved_.emplace_back(t, /*is_output=*/false);
    for (size_t i = 0; i < edges; i++) {
      add_next_edge(tensors[i].defined() ? torch::autograd::impl::gradient_edge(tensors[i]) : torch::autograd::Edge());
    }
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list none(num_outputs());
    if (!grads[0].defined()) return none;
    Tensors tensors;
    for (const SavedVariable& s : saved_) tensors.push_back(s.unpack());
    return derive_(*this, tensors, grads[0]);
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& s : saved_) s.reset_data();
  }
  std::string name() const override { return name_; }
  bool needs(size_t edge) const { return task_should_compute_output(edge); }

  const Options options;

 private:
  const char* name_;
  Derive derive_;
  std::vector<SavedVariable> saved_;
};

// A node as this torch owns one: by c10::intrusive_ptr, before 2.13 by std::shared_ptr.
template <class Node, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  } else {
    return std::shared_ptr<Node>(new Node(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  }
}

template <class Options>
void record(const Tensor& result, const char* name, typename LossNode<Options>::Derive derive, const Options& options,
            const Tensors& tensors, size_t edges) {
  bool wanted = false;
  for (size_t i = 0; i < edges; i++) wanted = wanted || (tensors[i].defined() && tensors[i].requires_grad());
  if (!wanted || !at::GradMode::is_enabled()) return;
  torch::autograd::set_history(result, make_node<LossNode<Options>>(name, derive, options, tensors, edges));
}

// Forward mode: a tensor may carry a tangent.
Tensor tangent(const Tensor& t) { return t.defined() ? t._fw_grad(/*level=*/0) : Tensor(); }
Tensor primal(const Tensor& t) { return tangent(t).defined() ? t._fw_primal(0) : t; }
template <class... Ts>
bool has_tangent(const Ts&... tensors) {
  return (tangent(tensors).defined() || ...);
}
void set_tangent(const Tensor& result, const Tensor& t) {
  if (t.defined()) result._set_fw_grad(t.to(result.scalar_type()), /*level=*/0, /*is_inplace_op=*/false);
}
Tensor plus(const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; }
Tensor like(const Tensor& grad, const Tensor& t) { return grad.sum_to_size(t.sizes()).to(t.scalar_type()); }

// =============================================================================================== cross-entropy

at::ScalarType acc_of(const Tensor& logits, const Tensor& target) {
  return logits.scalar_type() == at::kDouble || target.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool inplace = false;
};
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor>;

ForwardOutputs call_forward(const Tensor& x, const Tensor& t, const MaybeTensor& w, const Options& o) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::cross_entropy_forward", "")
          .typed<ForwardOutputs(const Tensor&, const Tensor&, const MaybeTensor&, int64_t, int64_t, double, bool)>();
  return op.call(x, t, w, o.reduction, o.ignore_index, o.label_smoothing, o.inplace);
}
Tensor call_backward(const Tensor& grad, const Tensor& x, const Tensor& t, const MaybeTensor& w, const Tensor& stats,
                     const Tensor& total, const Options& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::cross_entropy_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                           const Tensor&, const Tensor&, int64_t, int64_t, double)>();
  return op.call(grad, x, t, w, stats, total, o.reduction, o.ignore_index, o.label_smoothing);
}
// The gradient in the logits' own memory. Autograd learns of it through the version counter: whoever else saved
// the logits, a second backward included, gets torch's error instead of wrong numbers.
Tensor overwrite_backward(const Tensor& grad, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                          const Tensor& stats, const Tensor& total, const Options& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::cross_entropy_backward_", "")
                             .typed<void(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&,
                                         const Tensor&, int64_t, int64_t, double)>();
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(grad, x, t, w, stats, total, o.reduction, o.ignore_index, o.label_smoothing);
  torch::autograd::impl::bump_version(x);
  return x.detach();
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
      : x(x),
        t(t),
        w(w),
        stats(stats),
        total(total),
        o(o),
        dim(x.dim() == 1 ? 0 : 1),
        soft(t.dim() == x.dim()),
        acc(acc_of(x, soft ? t : x)) {}

  double keep() const { return 1 - o.label_smoothing; }
  Tensor by_class(const Tensor& v) const {  // (C) against (N, C, d...)
    std::vector<int64_t> sizes(x.dim(), 1);
    sizes[dim] = -1;
    return v.to(acc).view(sizes);
  }
  Tensor weighted(const Tensor& a) const { return w.defined() ? a * by_class(w) : a; }
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
  Tensor mean(const Tensor& a) const { return o.reduction == kMean ? a / total : a; }
  Tensor unit_gradient() const {  // dloss/dx for an incoming gradient of 1
    const Tensor ones = o.reduction == kNone ? at::ones_like(stats.select(0, 0)) : at::ones_like(total);
    return call_backward(ones, x, t, maybe(w), stats, total, o);
  }

  // Gradients of loss = -sum_j w_j t'_j log p_j, t' = smoothed(t)
  Tensor target_slope() const { return weighted(-keep() * at::log_softmax(x, dim, acc)); }
  Tensor weight_slope() const { return -smoothed() * at::log_softmax(x, dim, acc); }
  void check_weight_slope() const {
    TORCH_CHECK_NOT_IMPLEMENTED(soft,
                                "cece.cross_entropy: the derivative for 'weight' is not implemented for class "
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

void check_inplace(const Tensor& x) {
  if (!x.requires_grad()) return;
  TORCH_CHECK(
      !x.is_leaf(),
      "cece.cross_entropy: inplace_backward=True overwrites input with its gradient, so input must not be a leaf "
      "that requires grad (got one): its values would be lost. Pass the output of a layer, or leave it False.");
  for (int64_t d = 0; d < x.dim(); d++) {
    TORCH_CHECK(x.size(d) < 2 || x.stride(d) != 0,
                "cece.cross_entropy: inplace_backward=True needs an input whose elements have memory of their own, got "
                "an expanded one with strides ",
                x.strides());
  }
}

variable_list derive_forward(const LossNode<Options>& node, const Tensors& saved, const Tensor& g) {
  const Tensor &x = saved[0], &t = saved[1], &w = saved[2], &stats = saved[3], &total = saved[4];
  variable_list out(3);
  if (node.needs(1) || node.needs(2)) {  // before the logits may be overwritten
    const CrossEntropyFormulas f(x, t, w, stats, total, node.options);
    if (node.needs(1)) out[1] = like(f.scale(g) * f.target_slope(), t);
    if (node.needs(2)) {
      f.check_weight_slope();
      out[2] = like((f.scale(g) * f.weight_slope()).movedim(f.dim, -1), w);
    }
  }
  if (node.needs(0)) {
    const bool overwrite = node.options.inplace && !at::GradMode::is_enabled();
    out[0] = (overwrite ? overwrite_backward : call_backward)(g, x, t, maybe(w), stats, total, node.options);
  }
  return out;
}

ForwardOutputs cross_entropy_forward(const Tensor& x, const Tensor& t, const MaybeTensor& w, int64_t reduction,
                                     int64_t ignore_index, double label_smoothing, bool inplace) {
  const Options o{reduction, ignore_index, label_smoothing, inplace};
  if (inplace) check_inplace(x);
  ForwardOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = call_forward(x, t, w, o);
  }
  const auto& [loss, stats, total] = out;
  record(loss, "CrossEntropyBackward", derive_forward, o, {x, t, get(w), stats, total}, 3);
  if (has_tangent(x, t, get(w))) {
    const CrossEntropyFormulas f(primal(x), primal(t), primal(get(w)), stats, total, o);
    const Tensor dx = tangent(x), dt = tangent(t), dw = tangent(get(w));
    Tensor d;
    if (dx.defined()) d = f.reduce(f.unit_gradient() * dx);
    if (dt.defined()) d = plus(d, f.mean(f.reduce(f.target_slope() * dt)));
    if (dw.defined()) {
      f.check_weight_slope();
      d = plus(d, f.mean(f.reduce(f.weight_slope() * f.by_class(dw))));
    }
    set_tangent(loss, d);
  }
  return out;
}

variable_list derive_backward(const LossNode<Options>& node, const Tensors& saved, const Tensor& v) {
  const Tensor &g = saved[0], &x = saved[1], &t = saved[2], &w = saved[3];
  const CrossEntropyFormulas f(x, t, w, saved[4], saved[5], node.options);
  const Tensor s = f.scale(g);
  variable_list out(4);
  if (node.needs(0)) out[0] = f.reduce(v * f.unit_gradient()).to(g.scalar_type());
  if (node.needs(1)) out[1] = f.along_x(s, v).to(x.scalar_type());
  if (node.needs(2)) out[2] = like(f.keep() * f.weighted(f.onto_q(s, v)), t);
  if (node.needs(3)) {
    f.check_weight_slope();
    out[3] = like((f.smoothed() * f.onto_q(s, v)).movedim(f.dim, -1), w);
  }
  return out;
}

Tensor cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                              const Tensor& stats, const Tensor& total, int64_t reduction, int64_t ignore_index,
                              double label_smoothing) {
  const Options o{reduction, ignore_index, label_smoothing};
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_backward(g, x, t, w, stats, total, o);
  }
  record(grad, "CrossEntropyBackwardBackward", derive_backward, o, {g, x, t, get(w), stats, total}, 4);
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

  Tensor up() const { return -at::log_sigmoid(-x); }   // softplus(x)
  Tensor down() const { return -at::log_sigmoid(x); }  // softplus(-x)
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

struct BinaryOptions {
  bool with_logits;
  int64_t reduction;
};

variable_list derive_binary_forward(const LossNode<BinaryOptions>& node, const Tensors& saved, const Tensor& g) {
  const Tensor &x = saved[0], &y = saved[1], &w = saved[2], &p = saved[3];
  const auto [with_logits, reduction] = node.options;
  variable_list out(4);
  if (node.needs(0)) out[0] = call_bce_backward(g, x, y, maybe(w), maybe(p), with_logits, reduction);
  if (node.needs(1) || node.needs(2) || node.needs(3)) {
    const BinaryFormulas f(x, y, w, p, with_logits, reduction);
    const Tensor s = f.scale(g);
    if (node.needs(1)) out[1] = like(s * f.weighted(f.loss_y()), y);
    if (node.needs(2)) out[2] = like(s * f.loss(), w);
    if (node.needs(3)) out[3] = like(s * f.weighted(f.loss_p()), p);
  }
  return out;
}

Tensor binary_cross_entropy_forward(const Tensor& x, const Tensor& y, const MaybeTensor& w, const MaybeTensor& p,
                                    bool with_logits, int64_t reduction) {
  Tensor loss;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    loss = call_bce_forward(x, y, w, p, with_logits, reduction);
  }
  record<BinaryOptions>(loss, "BinaryCrossEntropyBackward", derive_binary_forward, {with_logits, reduction},
                        {x, y, get(w), get(p)}, 4);
  if (has_tangent(x, y, get(w), get(p))) {
    const BinaryFormulas f(primal(x), primal(y), primal(get(w)), primal(get(p)), with_logits, reduction);
    const Tensor dx = tangent(x), dy = tangent(y), dw = tangent(get(w)), dp = tangent(get(p));
    Tensor d;
    if (dx.defined()) d = f.reduce(f.unit_gradient() * dx);
    if (dy.defined()) d = plus(d, f.scale(f.reduce(f.weighted(f.loss_y() * dy))));
    if (dw.defined()) d = plus(d, f.scale(f.reduce(f.loss() * dw)));
    if (dp.defined()) d = plus(d, f.scale(f.reduce(f.weighted(f.loss_p() * dp))));
    set_tangent(loss, d);
  }
  return loss;
}

variable_list derive_binary_backward(const LossNode<BinaryOptions>& node, const Tensors& saved, const Tensor& v) {
  const Tensor &g = saved[0], &x = saved[1], &y = saved[2], &w = saved[3], &p = saved[4];
  const BinaryFormulas f(x, y, w, p, node.options.with_logits, node.options.reduction);
  const Tensor s = f.scale(g) * v;
  variable_list out(5);
  if (node.needs(0)) out[0] = f.reduce(v * f.unit_gradient()).to(g.scalar_type());
  if (node.needs(1)) out[1] = like(f.weighted(s * f.phi_x()), x);
  if (node.needs(2)) out[2] = like(f.weighted(s * f.phi_y()), y);
  if (node.needs(3)) out[3] = like(s * f.phi(), w);
  if (node.needs(4)) out[4] = like(f.weighted(s * f.phi_p()), p);
  return out;
}

Tensor binary_cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& y, const MaybeTensor& w,
                                     const MaybeTensor& p, bool with_logits, int64_t reduction) {
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_bce_backward(g, x, y, w, p, with_logits, reduction);
  }
  record<BinaryOptions>(grad, "BinaryCrossEntropyBackwardBackward", derive_binary_backward, {with_logits, reduction},
                        {g, x, y, get(w), get(p)}, 5);
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
  m.impl("cross_entropy_forward", cece::cross_entropy_forward);
  m.impl("cross_entropy_backward", cece::cross_entropy_backward);
  m.impl("binary_cross_entropy_forward", cece::binary_cross_entropy_forward);
  m.impl("binary_cross_entropy_backward", cece::binary_cross_entropy_backward);
}
