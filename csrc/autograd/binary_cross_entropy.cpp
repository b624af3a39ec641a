// Derivatives of the elementwise losses. None is written here: those of first order in the input are the backward
// kernel, all others are `loss` and `slope` of numerics.h, called with tensors that carry a tangent (number.h). An
// element's loss depends on that element alone, so a derivative along a tangent of ones is the gradient, and the
// gradient of a slope along v is the slope's derivative along v.
#include <torch/library.h>

#include "node.h"
#include "number.h"

namespace cece {
namespace {

// What a call has beside tensors. The operators' own forms of it are made again for each call.
struct BinaryOptions {
  int64_t kind, reduction;
  bool listed;
  int64_t padding;
  int64_t count;  // of parameters
  std::array<double, 6> parameters;

  BinaryOptions() = default;
  BinaryOptions(int64_t kind, int64_t reduction, at::ArrayRef<double> given, std::optional<int64_t> padding)
      : kind(kind),
        reduction(reduction),
        listed(padding.has_value()),
        padding(padding.value_or(0)),
        count(int64_t(given.size())),
        parameters{1, 0, 0, 0, 0, 0} {
    std::copy(given.begin(), given.end(), parameters.begin());
  }
  auto all() {
    return std::tuple_cat(std::tie(kind, reduction, listed, padding, count),
                          std::apply([](auto&... p) { return std::tie(p...); }, parameters));
  }
};

// The tensors of a call. The first four may carry gradients.
struct BinaryTensors {
  Tensor input, target, weight, pos_weight, mask, offsets;
};

template <class... Grad>
Tensor call_bce(const char* name, const Grad&... grad, const BinaryTensors& t, const BinaryOptions& o) {
  using Signature =
      Tensor(const Grad&..., const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, int64_t,
             const MaybeTensor&, at::ArrayRef<double>, const MaybeTensor&, std::optional<int64_t>);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op.call(grad..., t.input, t.target, maybe(t.weight), maybe(t.pos_weight), o.kind, o.reduction, maybe(t.mask),
                 at::ArrayRef<double>(o.parameters.data(), o.count), maybe(t.offsets),
                 o.listed ? std::optional(o.padding) : std::nullopt);
}
Tensor call_bce_forward(const BinaryTensors& t, const BinaryOptions& o) {
  return call_bce<>("cece::binary_cross_entropy_forward", t, o);
}
Tensor call_bce_backward(const Tensor& grad, const BinaryTensors& t, const BinaryOptions& o) {
  return call_bce<Tensor>("cece::binary_cross_entropy_backward", grad, t, o);
}

// The truth that labels list, as (N, C) of 0 and 1.
Tensor written_out(const BinaryTensors& t, int64_t padding, at::ScalarType acc) {
  const auto rows = t.input.sym_size(0), classes = t.input.sym_size(1);
  const Tensor labels = t.target.to(at::kLong);
  const Tensor place = at::where(labels == padding, c10::Scalar(-1), labels) + 1;  // 0: none, and cut off
  Tensor y = at::zeros_symint({rows * (classes + 1)}, t.input.options().dtype(acc));
  Tensor row;
  if (t.offsets.defined()) {
    const Tensor index = at::ones_like(labels).cumsum(0) - 1;
    row = at::searchsorted(t.offsets.to(at::kLong), index, /*out_int32=*/false, /*right=*/true) - 1;
  } else {
    row = at::ones_symint({rows, 1}, labels.options()).cumsum(0) - 1;
  }
  const Tensor at = (row * (classes + 1) + place).reshape({-1});
  return y.scatter(0, at, 1).reshape_symint({rows, classes + 1}).narrow_symint(1, 1, classes);
}

// A call's loss and slope as functions of tensors, in the type that sums are formed in.
class BinaryFormulas {
 public:
  BinaryFormulas(const BinaryTensors& t, const BinaryOptions& o) : given_(t), o_(o) {
    const auto acc = acc_type({&t.input, o.listed ? nullptr : &t.target, t.weight.defined() ? &t.weight : nullptr});
    x_ = unmasked(t.input.to(acc), 0.5);
    y_ = unmasked(o.listed ? written_out(t, o.padding, acc) : t.target.to(acc), 0);
    if (t.weight.defined()) w_ = unmasked(t.weight.to(acc), 1);
    if (t.pos_weight.defined()) p_ = unmasked(t.pos_weight.to(acc), 1);
  }

  struct Tangents {
    Value x = 0, y = 0, w = 0, p = 0;
  };
  Value loss_along(const Tangents& d) const {
    return along(d, [](const auto& l, const Number& x, const Number& y, const Number& w, const Number& p) {
      return weighted(w, l.loss(x, y, p));
    });
  }
  Value slope_along(const Tangents& d) const {
    return along(d, [](const auto& l, const Number& x, const Number& y, const Number& w, const Number& p) {
      return l.slope(x, y, p) * w;
    });
  }

  // What elements' derivatives are multiplied by, of what arrives for the loss.
  Tensor factor(const Tensor& g) const {
    const Tensor one = o_.reduction == kCounted ? g.select(0, 0) : g;
    return o_.reduction == kMean ? one / c10::SymFloat(x_.sym_numel()) : one;
  }
  // A derivative as it goes out: exactly 0 of what is masked.
  Tensor scaled(const Tensor& factor, const Value& derivative) const {
    return unmasked(derivative.tensor.defined() ? factor * derivative.tensor : at::zeros_like(x_), 0);
  }
  // Elements' changes of the loss, to that of what is returned.
  Tensor reduced(const Tensor& a) const {
    if (o_.reduction == kNone) return a;
    const Tensor sum = a.sum();
    return o_.reduction == kCounted ? at::stack({sum, at::zeros_like(sum)}) : sum;
  }
  Tensor incoming_ones() const {
    if (o_.reduction == kNone) return at::ones_like(x_);
    return o_.reduction == kCounted ? at::ones({2}, x_.options()) : at::ones({}, x_.options());
  }
  // In the type that sums are formed in: it is multiplied and added up before it is rounded.
  Tensor along_gradient(const Tensor& v) const {
    BinaryTensors wide = given_;
    wide.input = x_;
    return reduced(unmasked(call_bce_backward(incoming_ones(), wide, o_) * v, 0));
  }

 private:
  static constexpr int64_t kCounted = int64_t(Reduction::counted);

  Tensor unmasked(const Tensor& t, double otherwise) const {
    return given_.mask.defined() ? at::where(given_.mask, t, otherwise) : t;
  }
  static Number number(const Tensor& t, const Value& tangent) { return {t.defined() ? Value(t) : Value(1), tangent}; }
  template <class F>
  Value along(const Tangents& d, F&& f) const {
    Value tangent = 0;
    visit_loss<double>(o_.kind, o_.parameters.data() + 2, [&](const auto& l) {
      const Number y = smoothed(Number(y_, d.y), Number(o_.parameters[0]), Number(o_.parameters[1]));
      tangent = f(l, Number(x_, d.x), y, number(w_, d.w), number(p_, d.p)).tangent;
    });
    return tangent;
  }

  const BinaryTensors given_;
  const BinaryOptions o_;
  Tensor x_, y_, w_, p_;
};

constexpr size_t kCarry = 4;  // input, target, weight and pos_weight may carry gradients and tangents

std::array<BinaryFormulas::Tangents, kCarry> unit_tangents() {  // 1 in one of them
  std::array<BinaryFormulas::Tangents, kCarry> units;
  units[0].x = units[1].y = units[2].w = units[3].p = 1;
  return units;
}

BinaryTensors from(const Tensors& saved, size_t first) {
  return {saved[first], saved[first + 1], saved[first + 2], saved[first + 3], saved[first + 4], saved[first + 5]};
}

struct BinaryCrossEntropyBackward {
  using Options = BinaryOptions;
  static constexpr const char* kName = "BinaryCrossEntropyBackward";
  static constexpr size_t kEdges = kCarry, kSaved = 6;

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& g) {
    const BinaryTensors t = from(saved, 0);
    variable_list out(kEdges);
    if (needs[0]) out[0] = call_bce_backward(g, t, o);
    if (needs[1] || needs[2] || needs[3]) {
      const BinaryFormulas f(t, o);
      for (size_t i = 1; i < kEdges; i++) {
        if (needs[i]) out[i] = like(f.scaled(f.factor(g), f.loss_along(unit_tangents()[i])), saved[i]);
      }
    }
    return out;
  }
};

struct BinaryCrossEntropyBackwardBackward {
  using Options = BinaryOptions;
  static constexpr const char* kName = "BinaryCrossEntropyBackwardBackward";
  static constexpr size_t kEdges = 1 + kCarry, kSaved = 7;  // grad before the forward's

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& v) {
    const Tensor& g = saved[0];
    const BinaryFormulas f(from(saved, 1), o);
    variable_list out(kEdges);
    if (needs[0]) out[0] = f.along_gradient(v).to(g.scalar_type());
    const Tensor factor = f.factor(g) * v;
    for (size_t i = 0; i < kCarry; i++) {
      if (needs[1 + i]) out[1 + i] = like(f.scaled(factor, f.slope_along(unit_tangents()[i])), saved[1 + i]);
    }
    return out;
  }
};

// Forward mode
bool any_tangent(const BinaryTensors& t) { return has_tangent(t.input, t.target, t.weight, t.pos_weight); }
BinaryTensors primals(const BinaryTensors& t) {
  return {primal(t.input), primal(t.target), primal(t.weight), primal(t.pos_weight), t.mask, t.offsets};
}
Value tangent_or_0(const Tensor& t) { return tangent(t).defined() ? Value(tangent(t)) : Value(0); }

Tensor binary_cross_entropy_forward(CECE_BINARY_PARAMETERS) {
  const BinaryTensors t{input, target, get(weight), get(pos_weight), get(mask), get(offsets)};
  const bool plain = all_plain(t.input, t.target, t.weight, t.pos_weight, t.mask, t.offsets);
  if (!plain) check_binary_cross_entropy_shapes({CECE_BINARY_ARGUMENTS});
  const BinaryOptions o(kind, reduction, parameters, padding);
  Tensor loss;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    loss = call_bce_forward(t, o);
  }
  record<BinaryCrossEntropyBackward>({loss}, o, {t.input, t.target, t.weight, t.pos_weight, t.mask, t.offsets});
  if (any_tangent(t)) {
    const BinaryFormulas f(primals(t), o);
    const Tensor dx = tangent(t.input);
    Tensor d;
    if (dx.defined()) d = f.along_gradient(dx);
    if (has_tangent(t.target, t.weight, t.pos_weight)) {
      const Value rest = f.loss_along({0, tangent_or_0(t.target), tangent_or_0(t.weight), tangent_or_0(t.pos_weight)});
      d = plus(d, f.reduced(f.scaled(f.factor(f.incoming_ones()), rest)));
    }
    set_tangent(loss, d);
  }
  return loss;
}

Tensor binary_cross_entropy_backward(const Tensor& g, CECE_BINARY_PARAMETERS) {
  const BinaryTensors t{input, target, get(weight), get(pos_weight), get(mask), get(offsets)};
  const BinaryOptions o(kind, reduction, parameters, padding);
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_bce_backward(g, t, o);
  }
  record<BinaryCrossEntropyBackwardBackward>({grad}, o,
                                             {g, t.input, t.target, t.weight, t.pos_weight, t.mask, t.offsets});
  if (has_tangent(g) || any_tangent(t)) {
    Tensor d;
    if (has_tangent(g)) d = call_bce_backward(tangent(g), primals(t), o);
    if (any_tangent(t)) {
      const BinaryFormulas f(primals(t), o);
      const Value along = f.slope_along(
          {tangent_or_0(t.input), tangent_or_0(t.target), tangent_or_0(t.weight), tangent_or_0(t.pos_weight)});
      d = plus(d, f.scaled(f.factor(primal(g)), along));
    }
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
