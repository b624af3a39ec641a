// Derivatives of the formulas in numerics.h, of any order, without a formula for them: a lane that is a tensor with a
// tangent. A formula that is called with Numbers returns its value, and beside it the derivative along the tangents
// that its arguments carry. Both are made of torch's differentiable operators, from which every higher order follows.
//
// A formula selects among values of which the others may be infinite or NaN. Their derivatives must not reach the
// result by way of 0 * inf, so what is divided or taken the logarithm of is made finite by the formula before (a select
// on the way in), and `times`, which has an infinity to hide, does so here.
#pragma once
#include <ATen/ATen.h>

#include "../numerics.h"

namespace cece {

// A tensor, or a number where none is needed: 0 and 1, which most tangents are, cost nothing.
struct Value {
  at::Tensor tensor;
  double number = 0;

  Value(double number) : number(number) {}
  Value(at::Tensor tensor) : tensor(std::move(tensor)) {}
  bool is(double x) const { return !tensor.defined() && number == x; }
};
struct Condition {
  at::Tensor tensor;
  at::ScalarType type = at::kDouble;  // of what was compared
  bool always = false;

  Condition(bool always) : always(always) {}
  Condition(at::Tensor tensor) : tensor(std::move(tensor)) {}
};

template <class Result, class F>
Result apply(const Value& a, const Value& b, F&& f) {
  const at::Scalar x(a.number), y(b.number);
  return a.tensor.defined()   ? b.tensor.defined() ? Result(f(a.tensor, b.tensor)) : Result(f(a.tensor, y))
         : b.tensor.defined() ? Result(f(x, b.tensor))
                              : Result(f(a.number, b.number));
}
inline Value operator-(const Value& a) { return a.tensor.defined() ? Value(-a.tensor) : Value(-a.number); }
inline Value operator+(const Value& a, const Value& b) {
  if (a.is(0)) return b;
  if (b.is(0)) return a;
  return apply<Value>(a, b, [](const auto& a, const auto& b) { return a + b; });
}
inline Value operator-(const Value& a, const Value& b) {
  if (a.is(0)) return -b;
  if (b.is(0)) return a;
  return apply<Value>(a, b, [](const auto& a, const auto& b) { return a - b; });
}
inline Value operator*(const Value& a, const Value& b) {
  if (a.is(0) || b.is(0)) return 0;
  if (a.is(1)) return b;
  if (b.is(1)) return a;
  return apply<Value>(a, b, [](const auto& a, const auto& b) { return a * b; });
}
inline Value operator/(const Value& a, const Value& b) {
  if (a.is(0) || b.is(1)) return a;
  return apply<Value>(a, b, [](const auto& a, const auto& b) { return a / b; });
}
inline Value select(const Condition& mask, const Value& a, const Value& b) {
  if (!mask.tensor.defined()) return mask.always ? a : b;
  if (!a.tensor.defined() && b.is(a.number)) return a;
  if (a.tensor.defined()) {
    return b.tensor.defined() ? at::where(mask.tensor, a.tensor, b.tensor) : at::where(mask.tensor, a.tensor, b.number);
  }
  if (b.tensor.defined()) return at::where(mask.tensor, a.number, b.tensor);
  const auto options = mask.tensor.options().dtype(mask.type);  // of two numbers torch would make its default type
  return at::where(mask.tensor, at::full({}, a.number, options), at::full({}, b.number, options));
}

struct Number {
  Value value, tangent;

  Number(double value) : value(value), tangent(0) {}
  Number(Value value, Value tangent) : value(std::move(value)), tangent(std::move(tangent)) {}
};
template <>
struct LaneOf<Number> {
  using type = double;
};

// ---- the primitives of numerics.h. Each line is a rule of differentiation.

template <class F>
Condition compared(const Value& a, const Value& b, F&& f) {
  Condition result = apply<Condition>(a, b, f);
  if (a.tensor.defined() || b.tensor.defined()) result.type = (a.tensor.defined() ? a : b).tensor.scalar_type();
  return result;
}
inline Condition greater(const Number& a, const Number& b) {
  return compared(a.value, b.value, [](const auto& a, const auto& b) { return a > b; });
}
inline Condition equal(const Number& a, const Number& b) {
  return compared(a.value, b.value, [](const auto& a, const auto& b) { return a == b; });
}
inline Number select(const Condition& mask, const Number& a, const Number& b) {
  return {select(mask, a.value, b.value), select(mask, a.tangent, b.tangent)};
}
inline Number operator-(const Number& a) { return {-a.value, -a.tangent}; }
inline Number operator+(const Number& a, const Number& b) { return {a.value + b.value, a.tangent + b.tangent}; }
inline Number operator-(const Number& a, const Number& b) { return {a.value - b.value, a.tangent - b.tangent}; }
inline Number operator*(const Number& a, const Number& b) {
  return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}
inline Number operator/(const Number& a, const Number& b) {
  const Value quotient = a.value / b.value;
  return {quotient, (a.tangent - quotient * b.tangent) / b.value};
}
// |x|, whose slope at 0 is that of x >= 0, the side that the formulas take there.
inline Number abs_(const Number& x) { return select(greater(Number(0), x), -x, x); }
inline Number exp_nonpositive(const Number& x) {
  const Value power = x.value.tensor.exp();
  return {power, power * x.tangent};
}
inline Number log1p_unit(const Number& z) { return {z.value.tensor.log1p(), z.tangent / (z.value + 1)}; }
inline Number log1p_unit(const Number& z, const Number&) { return log1p_unit(z); }
inline Number log_(const Number& z) { return {z.value.tensor.log(), z.tangent / z.value}; }
inline Number reciprocal_unit(const Number& d) {
  const Value one_over = Value(1) / d.value;
  return {one_over, -(one_over * one_over * d.tangent)};
}
// 0 where a is, whatever b. An infinite or undefined b is taken out before it is multiplied, a finite one is not: a b
// still grows by b where a is 0.
inline Value times(const Value& a, const Value& b) {
  if (!a.tensor.defined() || !b.tensor.defined()) return a * b;
  return a.tensor * at::where((a.tensor == 0).logical_and(b.tensor.isfinite().logical_not()), 0, b.tensor);
}
inline Number times(const Number& a, const Number& b) {
  return {times(a.value, b.value), times(a.tangent, b.value) + times(a.value, b.tangent)};
}

}  // namespace cece
