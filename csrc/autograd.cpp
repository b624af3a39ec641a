// Derivatives: which node the graph gets, and every formula that is not a kernel's.
//
// Each loss has two differentiable operators, forward and backward. Reverse mode of the forward is the backward
// kernel; what follows from it in closed form, in plain differentiable torch operators, is written here: the
// derivatives of the backward (second order, and through these operators every higher one), forward mode, and the
// seldom asked gradients of targets and weights. The nodes are in C++ because a Python one costs more than the whole
// of torch's own loss at (128, 10): 70 to 117 us against 47. Every torch.func transform, torch.compile and
// torch.export see ordinary operators.
#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include "check.h"

namespace cece {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Tensors = std::vector<Tensor>;

constexpr int64_t kNone = 0, kMean = 1;

Tensor get(const MaybeTensor& t) { return t.has_value() ? *t : Tensor(); }
MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

// A tensor of numbers in memory: no wrapper, batch, view with a changed sign or the like between them and the kernel.
bool plain(const Tensor& t) {
  if (!t.defined()) return true;
  const auto keys = t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  const auto key = keys.highestPriorityTypeId();
  return key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA;
}
template <class... Ts>
bool all_plain(const Ts&... tensors) {
  return (plain(tensors) && ...);
}

// A node of the graph, by its rule: `derive` is a function from the call's options, the saved tensors (the first kEdges
// of which have an edge each) and an incoming gradient to the edges' gradients; `needs` says which of them are asked
// for. torch's own nodes are made like this; its C++ autograd::Function refuses torch.func.
using Needs = std::vector<bool>;

template <class Rule>
struct LossNode : torch::autograd::Node {
  using Options = typename Rule::Options;

  LossNode(const Options& options, const std::array<Tensor, Rule::kSaved>& tensors) : options_(options) {
    for (const Tensor& t : tensors) saved_.emplace_back(t, /*is_output=*/false);
    for (size_t i = 0; i < Rule::kEdges; i++) {
      add_next_edge(tensors[i].defined() ? torch::autograd::impl::gradient_edge(tensors[i]) : torch::autograd::Edge());
    }
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return derive(options_, needs(), unpack(), grads);
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& s : saved_) s.reset_data();
  }
  std::string name() const override { return Rule::kName; }

  // Compiled autograd: what the node depends on, and `derive` as a function of plain values, which is traced through.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    Options options = options_;
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options.all());
    args.collect(saved_, /*is_output=*/false);
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    namespace compiled = torch::dynamo::autograd;
    for (SavedVariable& s : saved_) swap.before(s);
    compiled::PackedArgs packed;
    Options options = options_;
    std::apply([&](const auto&... option) { (packed.pack(option), ...); }, options.all());
    for (const bool need : needs()) packed.pack(need);
    for (const Tensor& t : unpack()) packed.pack(t);
    std::vector<at::TypePtr> types;
    for (const at::IValue& v : packed.vec()) types.push_back(v.isTensor() ? at::TensorType::get() : v.type());
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string function = compiler->bind_function(swap.get_py_compiler(), Rule::kName, derive_packed, types,
                                                         /*is_custom_function=*/true);
    const auto outputs = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        compiled::get_input_metadata(next_edges()));
    variable_list results =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(), outputs);
    for (SavedVariable& s : saved_) swap.after(s);
    return results;
  }

 private:
  Needs needs() const {
    Needs needs(Rule::kEdges);
    for (size_t i = 0; i < needs.size(); i++) needs[i] = task_should_compute_output(i);
    return needs;
  }
  Tensors unpack() const {
    Tensors tensors;
    for (const SavedVariable& s : saved_) tensors.push_back(s.unpack());
    return tensors;
  }
  static variable_list derive(const Options& options, const Needs& needs, const Tensors& saved,
                              const variable_list& grads) {
    return grads[0].defined() ? Rule::derive(options, needs, saved, grads[0]) : variable_list(needs.size());
  }
  static variable_list derive_packed(const variable_list& grads, const std::vector<at::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    Options options;
    std::apply([&](auto&... option) { ((option = packed.unpack<std::decay_t<decltype(option)>>()), ...); },
               options.all());
    Needs needs(Rule::kEdges);
    for (size_t i = 0; i < needs.size(); i++) needs[i] = packed.unpack<bool>();
    Tensors saved;
    while (saved.size() < Rule::kSaved) saved.push_back(packed.unpack<Tensor>());
    return derive(options, needs, saved, grads);
  }

  const Options options_;
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

template <class Rule>
void record(const Tensor& result, const typename Rule::Options& options,
            const std::array<Tensor, Rule::kSaved>& tensors) {
  bool wanted = false;
  for (size_t i = 0; i < Rule::kEdges; i++) wanted = wanted || (tensors[i].defined() && tensors[i].requires_grad());
  if (!wanted || !at::GradMode::is_enabled()) return;
  torch::autograd::set_history(result, make_node<LossNode<Rule>>(options, tensors));
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
Tensor like(const Tensor& grad, const Tensor& t) { return grad.sum_to_size_symint(t.sym_sizes()).to(t.scalar_type()); }
// a * b, but 0 wherever a is 0: what has no weight costs nothing, however much it would.
Tensor times(const Tensor& a, const Tensor& b) { return at::where(a == 0, 0, a * b); }

// =============================================================================================== cross-entropy

struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool inplace = false;

  auto all() { return std::tie(reduction, ignore_index, label_smoothing, inplace); }
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
        acc(acc_type({&x, soft ? &t : nullptr})) {}

  double keep() const { return 1 - o.label_smoothing; }
  Tensor by_class(const Tensor& v) const {  // (C) against (N, C, d...)
    std::vector<int64_t> sizes(x.dim(), 1);
    sizes[dim] = -1;
    return v.to(acc).view(sizes);
  }
  Tensor weighted(const Tensor& a) const { return w.defined() ? a * by_class(w) : a; }
  Tensor smoothed() const {
    return t.to(acc) * keep() + c10::SymFloat(o.label_smoothing) / c10::SymFloat(x.sym_size(dim));
  }
  Tensor of_rows(int64_t i) const { return stats.select(0, i).unsqueeze(dim); }            // 0 max, 1 log_sum, 2 mass
  Tensor mass() const { return soft ? weighted(smoothed()).sum(dim, true) : of_rows(2); }  // sum_j q_j of each row
  // a, of the logits' shape or the rows', but 0 in ignored rows, whatever is in them. Of inputs, not of results: what
  // came of a NaN would be NaN again in the next derivative.
  Tensor used(const Tensor& a) const {
    if (soft) return a;
    return a.masked_fill((t.to(at::kLong) == o.ignore_index).unsqueeze(dim), 0);  // as uint8, 156 would be -100
  }

  // In a row whose maximum is +inf that is one certain class: finite numbers far apart say so too, without inf - inf.
  Tensor certain() const { return (of_rows(0) == kInfinity).logical_and(of_rows(1) == of_rows(1)); }
  Tensor finite() const {
    return at::minimum(used(x).to(acc), at::full_like(of_rows(0), kInfinity).masked_fill(certain(), largest_of(acc)));
  }
  Tensor softmax() const { return at::softmax(finite(), dim); }
  Tensor minus_log_softmax() const {
    return (-at::log_softmax(finite(), dim)).masked_fill(certain().logical_and(x != kInfinity), kInfinity);
  }

  Tensor scale(const Tensor& grad) const {  // d(reduced loss) / d(row's loss), times the incoming gradient
    if (o.reduction == kNone) return used(grad.unsqueeze(dim));
    return o.reduction == kMean ? grad / total : grad;
  }
  Tensor reduce(const Tensor& a) const { return o.reduction == kNone ? a.sum(dim) : a.sum(); }
  Tensor mean(const Tensor& a) const { return o.reduction == kMean ? a / total : a; }
  // dloss/dx for an incoming gradient of 1. Not in x's dtype: it is multiplied and added up before it is rounded.
  Tensor unit_gradient() const {
    const Tensor ones = o.reduction == kNone ? at::ones_like(stats.select(0, 0)) : at::ones_like(total);
    return call_backward(ones, x.to(acc), t, maybe(w), stats, total, o);
  }
  Tensor along_gradient(const Tensor& v) const { return reduce(unit_gradient() * used(v)); }

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
    return s * mass() * p * (v - (p * v).sum(dim, true));
  }
  Tensor along_q(const Tensor& s, const Tensor& dq) const { return s * (softmax() * dq.sum(dim, true) - dq); }
  Tensor onto_q(const Tensor& s, const Tensor& v) const { return s * ((softmax() * v).sum(dim, true) - v); }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static double largest_of(at::ScalarType type) {
    return type == at::kDouble ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  }
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
  using Options = cece::Options;
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
      out[0] = (overwrite ? overwrite_backward : call_backward)(g, x, t, maybe(w), stats, total, o);
    }
    return out;
  }
};

ForwardOutputs cross_entropy_forward(const Tensor& x, const Tensor& t, const MaybeTensor& w, int64_t reduction,
                                     int64_t ignore_index, double label_smoothing, bool inplace) {
  // A wrapper may answer for a device that its own mechanism does not hold us to.
  if (!all_plain(x, t, get(w))) check_cross_entropy_shapes(x, t, w, reduction, ignore_index, label_smoothing);
  if (inplace) check_inplace(x);
  // A tensor that is saved through hooks (activation checkpointing, save_on_cpu) comes back without autograd's check
  // that it is still what was saved: nobody else who saved the logits would notice that they were overwritten.
  inplace = inplace && !at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value();
  const Options o{reduction, ignore_index, label_smoothing, inplace};
  ForwardOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = call_forward(x, t, w, o);
  }
  const auto& [loss, stats, total] = out;
  record<CrossEntropyBackward>(loss, o, {x, t, get(w), stats, total});
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
  using Options = cece::Options;
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
                              double label_smoothing) {
  const Options o{reduction, ignore_index, label_smoothing};
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_backward(g, x, t, w, stats, total, o);
  }
  record<CrossEntropyBackwardBackward>(grad, o, {g, x, t, get(w), stats, total});
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
  record<BinaryCrossEntropyBackward>(loss, {with_logits, reduction}, {x, y, get(w), get(p)});
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
  record<BinaryCrossEntropyBackwardBackward>(grad, {with_logits, reduction}, {g, x, y, get(w), get(p)});
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
