// Cross-entropy, page by page: every formula of the library, written once.
//
// T is a float or double on one lane of a GPU or CPU, or a SIMD vector of them (cpu/vec.h). A formula uses
// only the primitives of the first section, which each kind of lane overloads. No torch, no CUDA header.
//
//   entropy        H(t)    = - sum_j t_j log t_j
//   cross-entropy  H(t, p) = - sum_j t_j log p_j  =  H(t) + KL(t || p)
//   multi-class    p = softmax(x), one label y:        loss = log(sum_j e^{x_j}) - x_y
//   binary         p = sigmoid(x), one target y:       loss = -y log p - (1 - y) log(1 - p)
//   multi-label    the binary loss, once for every class
//
// All losses are arranged as sums of non-negative terms, so that nothing cancels: of a loss of 1e-20 all bits are right
// that the logits' differences have. (A difference d is rounded once, which moves e^d by |d| 2^-24 of itself: 23 units
// of the last place at 1e-20, none where the difference is exact.) Where a factor is 0 its term is 0, also beside an
// infinity (`times`); a loss that is NaN stays NaN, whatever its factor, as its gradient does.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define CECE_HD __host__ __device__ __forceinline__
#else
#define CECE_HD inline __attribute__((always_inline))
#endif

#if defined(CECE_EMULATE)  // the emulator moves results as far as a GPU's may be off
#define CECE_GPU(call, x, units) ::emulator::perturbed(x, call, units)
#else
#define CECE_GPU(call, x, units) call
#endif

namespace cece {

// ------------------------------------------------------------------------------------------- primitives
// Scalar overloads; cpu/vec.h has those of SIMD vectors. A comparison of vectors is a vector of masks.

template <class T>
struct LaneOf {  // the scalar type of one lane
  using type = T;
};
template <class T>
CECE_HD T lowest() {
  return T(std::numeric_limits<typename LaneOf<T>::type>::lowest());
}
template <class T>
CECE_HD T select(bool mask, T a, T b) {
  return mask ? a : b;
}
CECE_HD bool greater(float a, float b) { return a > b; }
CECE_HD bool greater(double a, double b) { return a > b; }
CECE_HD bool equal(float a, float b) { return a == b; }
CECE_HD bool equal(double a, double b) { return a == b; }
// The lesser of x and m, NaN where x is; the greater of x and m, m where x is NaN. m is never NaN.
template <class T>
CECE_HD T lesser(T x, T m) {
  return select(greater(x, m), m, x);
}
template <class T>
CECE_HD T greatest(T x, T m) {
  return select(greater(x, m), x, m);
}
#if defined(__CUDA_ARCH__)  // one instruction each
#if __CUDA_ARCH__ >= 800
CECE_HD float lesser(float x, float m) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(m));
  return y;
}
#endif
CECE_HD float greatest(float x, float m) { return ::fmaxf(x, m); }
#endif
CECE_HD float abs_(float x) { return ::fabsf(x); }
CECE_HD double abs_(double x) { return ::fabs(x); }

// e^x for x <= 0. float: at most 2 ULP, with gradual underflow; 0 at -inf.
CECE_HD float exp_nonpositive(float x) { return CECE_GPU(::expf(x), x, 2); }
CECE_HD double exp_nonpositive(double x) { return ::exp(x); }
CECE_HD float expm1_nonpositive(float x) { return CECE_GPU(::expm1f(x), x, 1); }
CECE_HD double expm1_nonpositive(double x) { return ::expm1(x); }
struct Exp {  // the same as an object, for formulas that can do with a rougher one
  template <class T>
  CECE_HD T operator()(T x) const {
    return exp_nonpositive(x);
  }
};
// log(1 + z) for z >= -1, and a faster one for 0 <= z <= 1
CECE_HD float log1p_(float z) { return CECE_GPU(::log1pf(z), z, 1); }
CECE_HD double log1p_(double z) { return ::log1p(z); }
CECE_HD double log1p_unit(double z) { return ::log1p(z); }
CECE_HD float fmadd(float a, float b, float c) { return a * b + c; }
// 1 / d for 1 <= d <= 6, at most 1 ULP: a division has a branch for subnormals and overflows, which are none here.
CECE_HD double reciprocal_unit(double d) { return 1 / d; }
#if defined(__CUDA_ARCH__)
CECE_HD float reciprocal_unit(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
}
#else
CECE_HD float reciprocal_unit(float d) { return CECE_GPU(1 / d, d, 1); }
#endif
// log(1 + z) for 0 <= z <= 1, at most 2 ULP beside those of s: 2 atanh(s) = 2 s (1 + s^2 Q(s^2)), s = z / (2 + z) <=
// 1/3; Q is a minimax polynomial (relative error 1.6e-8). A small z keeps all its bits. F: float, or lanes of it.
template <class F>
CECE_HD F log1p_of_ratio(F s) {
  const F u = s * s, twice = s + s;
  F q = fmadd(F(1.34257495e-1f), u, F(1.41183093e-1f));
  q = fmadd(q, u, F(2.00037807e-1f));
  q = fmadd(q, u, F(3.33333194e-1f));
  return fmadd(twice * u, q, twice);
}
CECE_HD float log1p_unit(float z) { return log1p_of_ratio(z * reciprocal_unit(z + 2.f)); }
// The same where 1 / (z + 2) is at hand
CECE_HD float log1p_unit(float z, float one_over) { return log1p_of_ratio(z * one_over); }
CECE_HD double log1p_unit(double z, double) { return ::log1p(z); }
// log(z), for z in [0, 1]
CECE_HD float log_(float z) { return CECE_GPU(::logf(z), z, 1); }
CECE_HD double log_(double z) { return ::log(z); }

// a * b, but 0 wherever a is 0: an impossible outcome costs nothing, however impossible.
template <class T>
CECE_HD T times(T a, T b) {
  return select(equal(a, T(0)), T(0), a * b);
}
// A sum of many terms that keeps what each addition rounds off (Knuth's TwoSum): exact to the last bits for any number.
template <class T>
struct LongSum {
  T sum = T(0);
  T lost = T(0);

  CECE_HD void add(T x) {
    const T s = sum + x, was = s - x;
    lost = lost + ((sum - was) + (x - (s - was)));
    sum = s;
  }
  CECE_HD void scale(T z) { sum = sum * z, lost = lost * z; }
  CECE_HD T value() const { return select(equal(lost, lost), sum + lost, sum); }  // lost is NaN where sum is infinite
};

// -------------------------------------------------------------------------------- softmax cross-entropy

// log(sum_j e^{x_j}), as it is read. `rest` is the sum of e^{x_j - max} without one of the terms that equal 1
// (a maximal element's), so log(sum) = max + log1p(rest) keeps all of a small rest: with p_y -> 1 the loss is
// log1p(rest) and not log(1 + 1e-20) = 0. The empty state has the lowest finite maximum, so that it merges
// with a row of -inf without a NaN, and rest = -1, so that `rest + 1` is the empty sum.
template <class T>
struct LogSumExp {
  T max = lowest<T>();
  T rest = T(-1);

  CECE_HD void merge(const LogSumExp& o) {
    const T d = o.max - max, z = exp_nonpositive(-abs_(d));
    const auto bigger = greater(d, T(0));
    rest = select(bigger, o.rest + (rest + T(1)) * z, rest + (o.rest + T(1)) * z);
    max = select(bigger, o.max, max);
  }
  CECE_HD void push(T x) {  // merge({x, 0}) without its zeros
    const T d = x - max, z = exp_nonpositive(-abs_(d));
    const auto bigger = greater(d, T(0));
    rest = select(bigger, (rest + T(1)) * z, rest + z);
    max = select(bigger, x, max);
  }
  CECE_HD T log_sum() const { return log1p_(rest); }
};

// The same sum over many logits without a branch, for lanes that share an instruction (a GPU's). Every new logit meets
// the maximum so far: the greater of the two goes on, the other one joins the sum. The sum is kept relative to the
// second largest logit, so that its exponentials need be accurate near 1 only, however small all of them are beside
// the maximum: with E's exponent off by a relative e, the sum is off by e times the mean of second - x. The empty
// state is a virtual logit at the lowest finite number with the weight -1, which the first real one to pass cancels.
template <class T>
struct Tournament {
  T max = lowest<T>(), second = lowest<T>(), sum = T(-1);

  template <int N, class E = Exp>
  CECE_HD void push(const T (&x)[N], E exp = E()) {
    T loser[N];
    const T before = second;
    for (int i = 0; i < N; i++) {
      loser[i] = lesser(x[i], max);  // a NaN loses, and shows in the sum
      max = greatest(x[i], max);
      second = greatest(loser[i], second);
    }
    T added = exp(loser[0] - second);
    for (int i = 1; i < N; i++) added = added + exp(loser[i] - second);
    sum = sum * exp(before - second) + added;
  }
  CECE_HD LogSumExp<T> log_sum_exp() const { return {max, sum * exp_nonpositive(second - max)}; }
};

// max - x >= 0, and 0 where both are +inf: a single infinite logit is a certainty.
template <class T>
CECE_HD T gap(T x, T max) {
  return select(equal(x, max), T(0), max - x);
}
// -log p_j. The order matters: (max + log_sum) - x loses bits when logits are offset by 1e4.
template <class T>
CECE_HD T negative_log_probability(T x, T max, T log_sum) {
  return gap(x, max) + log_sum;
}
template <class T, class E = Exp>
CECE_HD T probability(T x, T max, T log_sum, E exp = E()) {
  return exp(-negative_log_probability(x, max, log_sum));
}

// The target of one row as masses q_j on the classes:
//   class index y    q_j = w_j ((1 - s) [j = y] + s / C)      s = label_smoothing, w = class weights
//   probabilities t  q_j = w_j ((1 - s) t_j     + s / C)
// Then loss = sum_j q_j (-log p_j) and dloss/dx_j = p_j sum_k q_k - q_j.
// (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7, for s.)
template <class T>
CECE_HD T smoothed(T t, T keep, T spread) {  // keep = 1 - s, spread = s / C
  return t * keep + spread;
}

// sum_j q_j (max - x_j) and sum_j q_j of a target with many non-zero masses, kept relative to a running max.
template <class T>
struct TargetGaps {
  T gaps = T(0);
  T mass = T(0);

  CECE_HD void push(T q, T x, T max) {  // max: already the maximum of all pushed and of x
    gaps = gaps + times(q, gap(x, max));
    mass = mass + q;
  }
  CECE_HD void rebase(T old_max, T max) { gaps = gaps + times(mass, gap(old_max, max)); }
};

// The loss of a row from its parts: `kept` is the label's own mass (0 for probability targets). A row that is no
// distribution (a NaN, two infinities, nothing but -inf) has a log_sum of NaN or -inf; its gradient is NaN and so is
// its loss, also where all masses are 0.
template <class T>
CECE_HD T row_loss(T kept, T label_logit, TargetGaps<T> rest, T max, T log_sum) {
  const T loss =
      times(kept, negative_log_probability(label_logit, max, log_sum)) + rest.gaps + times(rest.mass, log_sum);
  return select(greater(log_sum, T(-1)), loss, T(std::numeric_limits<typename LaneOf<T>::type>::quiet_NaN()));
}

// dloss/dx_j = p_j mass - q_j, for a class that is not the label or any class of a probability target.
template <class T, class E = Exp>
CECE_HD T row_slope(T x, T max, T log_sum, T mass, T q, E exp = E()) {
  return probability(x, max, log_sum, exp) * mass - q;
}
// The same for the label: p_y - 1 = expm1(-nll) keeps its bits where p_y rounds to 1.
template <class T>
CECE_HD T label_slope(T x, T max, T log_sum, T kept, T spread_mass, T q) {
  const T nll = negative_log_probability(x, max, log_sum);
  return times(kept, expm1_nonpositive(-nll)) + (exp_nonpositive(-nll) * spread_mass - q);
}

// --------------------------------------------------------------------------------- binary cross-entropy

// An element's loss times its weight: 0 where the weight is, also of an infinite loss, but not of a NaN.
template <class T>
CECE_HD T weighted(T weight, T loss) {
  return select(equal(loss, loss), times(weight, loss), loss);
}

// Each loss is an object with `loss` and `slope`, the loss's derivative in x, of an input x, a truth y and a pos_weight
// p. All other derivatives, of every order, come from these two (autograd/number.h), so neither may hide one: a value
// that is not selected is made finite before it is divided by.

// On logits: (1 - y) softplus(x) + p y softplus(-x), with softplus(x) = max(x, 0) + log1p(e^{-|x|}) and p the
// pos_weight. Of max(x, 0) and max(-x, 0) one is 0 and the other |x|. The textbook's
// max(x, 0) - x y + log1p(e^{-|x|}) cancels: 100 % off in float32 near y = 1.
struct BinaryCrossEntropyWithLogits {
  static constexpr bool kProbabilities = false;

  CECE_HD explicit BinaryCrossEntropyWithLogits(const double*) {}

  template <class T, class E = Exp>
  CECE_HD static T loss(T x, T y, T pos_weight, E exp = E()) {
    const T negative = T(1) - y, positive = pos_weight * y;
    const T wrong = select(greater(T(0), x), positive, negative);  // the mass on the other side of x
    return times(wrong, abs_(x)) + (negative + positive) * log1p_unit(exp(-abs_(x)));
  }
  // (1 - y) sigmoid(x) - p y sigmoid(-x), both sigmoids from one exponential
  template <class T, class E = Exp>
  CECE_HD static T slope(T x, T y, T pos_weight, E exp = E()) {
    const T z = exp(-abs_(x)), big = reciprocal_unit(T(1) + z), small = z * big;
    const auto below = greater(T(0), x);
    return (T(1) - y) * select(below, small, big) - pos_weight * y * select(below, big, small);
  }
};

// On probabilities: -y log x - (1 - y) log(1 - x), each logarithm no lower than -100 and the slope's
// denominator no lower than 1e-12, as torch defines them (aten/src/ATen/native/Loss.cpp).
struct BinaryCrossEntropy {
  static constexpr bool kProbabilities = true;

  CECE_HD explicit BinaryCrossEntropy(const double*) {}

  template <class T, class E = Exp>
  CECE_HD static T loss(T x, T y, T, E = E()) {
    return y * minus_log(x) + (T(1) - y) * minus_log_of_rest(x);
  }
  // (1 - y) / (1 - x) - y / x, whose derivative does not cancel, where (x - y) / (x (1 - x)) would have one that does
  template <class T, class E = Exp>
  CECE_HD static T slope(T x, T y, T, E = E()) {
    const auto clamped = greater(T(1e-12), (T(1) - x) * x);
    const T inside = select(clamped, T(0.5), x);
    return select(clamped, (x - y) * T(1e12), (T(1) - y) / (T(1) - inside) - y / inside);
  }
  template <class T>
  CECE_HD static T minus_log(T x) {
    const auto cut = greater(T(3.7200759760208361e-44), x);  // e^-100
    return select(cut, T(100), -log_(select(cut, T(1), x)));
  }
  // log(1 - x): the rounding of 1 - x, which is known exactly, is put back to first order.
  template <class T>
  CECE_HD static T minus_log_of_rest(T x) {
    const T q = T(1) - x, lost = (T(1) - q) - x;
    const auto cut = equal(q, T(0));
    const T rest = select(cut, T(1), q);
    return select(cut, T(100), -(log_(rest) + lost / rest));
  }
};

// sigmoid(x), sigmoid(-x) = 1 - sigmoid(x), and minus the logarithm of each, from one exponential z and one division:
// 1 / (1 + z) and the 1 / (2 + z) of the logarithm are what is left of 1 / ((1 + z) (2 + z)).
template <class T>
struct Sigmoid {
  decltype(greater(T(0), T(0))) below;  // x < 0
  T p, rest;                            // p + rest = 1
  T size, least;  // |x|, log(1 + e^{-|x|}): of -log p and -log rest the less is `least`, the greater size + least

  CECE_HD T cost() const { return select(below, size + least, least); }          // -log p = softplus(-x)
  CECE_HD T cost_of_rest() const { return select(below, least, size + least); }  // -log rest = softplus(x)
  // no (-log rest) + yes (-log p), as above
  CECE_HD T cross_entropy(T no, T yes) const { return times(select(below, yes, no), size) + (no + yes) * least; }
};
template <class T, class E>
CECE_HD Sigmoid<T> sigmoid(T x, E exp) {
  const auto below = greater(T(0), x);
  const T size = abs_(x), z = exp(-size), one = T(1) + z, two = T(2) + z, both = reciprocal_unit(one * two);
  const T big = two * both, small = z * big;
  return {below, select(below, small, big), select(below, big, small), size, log1p_unit(z, one * both)};
}

// q^e for q in [0, 1] and e >= 0. Whole factors are multiplied, so that q^2 has the bits that q has; what is left is
// e^(r log q), off by |r log q| units of the last place.
template <class A>
struct Power {
  int whole;
  A rest, all;

  CECE_HD explicit Power(double e) : whole(e <= 8 ? int(e) : 0), rest(A(e - whole)), all(A(e)) {}
  template <class T>
  CECE_HD T operator()(T q) const {
    return power(q, whole);
  }
  // The derivative of q^e cost, where those of q and of the cost are dq and d_cost. Below e = 1 what q^(e - 1) has too
  // much is taken out of dq.
  template <class T>
  CECE_HD T slope(T q, T dq, T cost, T d_cost) const {
    if (all == A(0)) return d_cost;
    if (whole > 0) return power(q, whole - 1) * (T(all) * times(dq, cost) + q * d_cost);
    return power(q, 0) * (T(all) * times(dq / select(equal(q, T(0)), T(1), q), cost) + d_cost);
  }

 private:
  template <class T>
  CECE_HD T power(T q, int factors) const {
    T result = T(1);
    if (rest != A(0)) {
      const auto none = equal(q, T(0));
      result = select(none, T(0), exp_nonpositive(T(rest) * log_(select(none, T(1), q))));
    }
    for (int i = 0; i < factors; i++) result = result * q;
    return result;
  }
};

// On logits: a q^gamma (l + poly q'), with the binary cross-entropy l, the probability q = (1 - y) sigmoid(x) +
// y sigmoid(-x) that the model gives to what is not so, q' the same with the pos_weight in its second term, as in l,
// and a the weight `negative` at y = 0, `positive` at y = 1. gamma = 0 leaves the cross-entropy with its poly term.
// (Lin et al. 2017, "Focal Loss for Dense Object Detection"; Leng et al. 2022, "PolyLoss", section 4, for poly.)
template <class A>
struct SigmoidFocal {
  static constexpr bool kProbabilities = false;
  A positive, negative, poly;
  Power<A> power;

  CECE_HD explicit SigmoidFocal(const double* own)
      : positive(A(own[0])), negative(A(own[1])), poly(A(own[3])), power(own[2]) {}

  template <class T, class E = Exp>
  CECE_HD T loss(T x, T y, T pos_weight, E exp = E()) const {
    const Parts<T> l(*this, x, y, pos_weight, exp);
    return times(l.factor, power(l.q) * l.cost);
  }
  template <class T, class E = Exp>
  CECE_HD T slope(T x, T y, T pos_weight, E exp = E()) const {
    const Parts<T> l(*this, x, y, pos_weight, exp);
    const T dp = l.s.p * l.s.rest;  // the derivative of sigmoid(x)
    T d_cost = l.no * l.s.p - l.yes * l.s.rest;
    if (poly != A(0)) d_cost = d_cost + T(poly) * ((l.no - l.yes) * dp);
    return l.factor * power.slope(l.q, (l.no - y) * dp, l.cost, d_cost);
  }

 private:
  template <class T>
  struct Parts {
    Sigmoid<T> s;
    T no, yes, factor, q, cost;

    template <class E>
    CECE_HD Parts(const SigmoidFocal& of, T x, T y, T pos_weight, E exp)
        : s(sigmoid(x, exp)),
          no(T(1) - y),
          yes(pos_weight * y),
          factor(T(of.positive) * y + T(of.negative) * no),
          q(no * s.p + y * s.rest),
          cost(s.cross_entropy(no, yes)) {
      if (of.poly != A(0)) cost = cost + T(of.poly) * (no * s.p + yes * s.rest);
    }
  };
};

// On logits, the two outcomes each with a focus of its own, and negatives that are certain enough left alone:
//   y = 1:  -(1 - p)^gamma_pos log p         y = 0:  -m^gamma_neg log(1 - m), m = max(p - clip, 0)
// and in between both, by y and 1 - y. (Ridnik et al. 2021, "Asymmetric Loss for Multi-Label Classification", eq. 7.)
template <class A>
struct Asymmetric {
  static constexpr bool kProbabilities = false;
  A clip;
  Power<A> of_pos, of_neg;

  CECE_HD explicit Asymmetric(const double* own) : clip(A(own[2])), of_pos(own[0]), of_neg(own[1]) {}

  template <class T, class E = Exp>
  CECE_HD T loss(T x, T y, T pos_weight, E exp = E()) const {
    const Sigmoid<T> s = sigmoid(x, exp);
    const Negative<T> n(s, clip);
    return times(pos_weight * y, of_pos(s.rest) * s.cost()) + times(T(1) - y, of_neg(n.m) * n.cost);
  }
  template <class T, class E = Exp>
  CECE_HD T slope(T x, T y, T pos_weight, E exp = E()) const {
    const Sigmoid<T> s = sigmoid(x, exp);
    const Negative<T> n(s, clip);
    const T down = of_pos.slope(s.rest, -(s.p * s.rest), s.cost(), -s.rest);
    return pos_weight * y * down + (T(1) - y) * of_neg.slope(n.m, n.dm, n.cost, n.d_cost);
  }

 private:
  template <class T>
  struct Negative {
    T m, dm;         // max(p - clip, 0) and its derivative
    T cost, d_cost;  // -log(1 - m) and its derivative

    CECE_HD Negative(const Sigmoid<T>& s, A clip) : m(s.p), dm(s.p * s.rest), cost(s.cost_of_rest()), d_cost(s.p) {
      if (clip == A(0)) return;
      const auto outside = greater(T(clip), s.p);
      m = select(outside, T(0), s.p - T(clip));
      dm = select(outside, T(0), dm);
      const T q = select(outside, T(1), s.rest + T(clip)), one_over = T(1) / q;  // q = 1 - m
      // what q lost in rounding counts where m is small
      cost = -(log_(q) + select(greater(q, T(0.5)), (T(1) - q) - m, T(0)) * one_over);
      d_cost = dm * one_over;
    }
  };
};

// The table of elementwise losses: f(loss), by the operators' `kind` and its own parameters.
template <class A, class F>
inline void visit_loss(int64_t kind, const double* own, F&& f) {
  switch (kind) {
    case 0:
      return f(BinaryCrossEntropy(own));
    case 1:
      return f(BinaryCrossEntropyWithLogits(own));
    case 2:
      return f(SigmoidFocal<A>(own));
    default:
      return f(Asymmetric<A>(own));
  }
}

}  // namespace cece
