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
// 1 / d for 1 <= d <= 3, at most 1 ULP: a division has a branch for subnormals and overflows, which are none here.
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
  // To merge many at once: what this one adds to `rest` at the greatest of their maxima. One of those that have it
  // leads, and alone leaves its term out.
  template <class Mask>
  CECE_HD T share(T greatest_max, Mask leads) const {
    return select(leads, rest, (rest + T(1)) * exp_nonpositive(max - greatest_max));
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

// --------------------------------------------------------------------------------- statistics of a row

// What else a row says: with u_j = max - x_j >= 0 and p_j = e^{-u_j} / (1 + rest)
//   heat       E   = sum_j p_j u_j
//   entropy    H   = - sum_j p_j log p_j = log_sum + E
//   logsumexp      = max + log_sum
//   collision      = sum_j p_j^2 = 1 - spread          (two draws agree; e^{-Renyi's entropy of order 2})
// `square` is the sum of e^{-2 u_j} without one maximal term, as `rest` is of e^{-u_j}; nothing cancels in either.
template <class T>
struct Moments : LogSumExp<T> {
  T heat = T(0);     // sum_j e^{-u_j} u_j
  T square = T(-1);  // the empty sum, as rest
  using LogSumExp<T>::max, LogSumExp<T>::rest;

  CECE_HD void merge(const Moments& o) {
    const T d = o.max - max, far = abs_(d), z = exp_nonpositive(-far);
    const auto bigger = greater(d, T(0));
    const T low_rest = select(bigger, rest, o.rest) + T(1), low_heat = select(bigger, heat, o.heat);
    const T low_square = select(bigger, square, o.square) + T(1);
    heat = select(bigger, o.heat, heat) + times(z, low_heat + far * low_rest);
    square = select(bigger, o.square, square) + z * z * low_square;
    rest = select(bigger, o.rest, rest) + z * low_rest;
    max = select(bigger, o.max, max);
  }
  CECE_HD void push(T x) {
    Moments o;
    o.max = x, o.rest = o.square = T(0);
    merge(o);
  }
  CECE_HD T mean_heat() const { return heat / (T(1) + rest); }
  CECE_HD T collision() const { return (T(1) + square) / ((T(1) + rest) * (T(1) + rest)); }
  CECE_HD T spread() const { return (rest * (T(2) + rest) - square) / ((T(1) + rest) * (T(1) + rest)); }
};

// Their derivatives: each is p_j times one of these, for incoming gradients of 1
//   logsumexp 1       entropy u_j - E       collision 2 (p_j - sum_k p_k^2)
// p_j - sum p^2 from two small numbers where p_j is nearly all there is.
template <class T>
CECE_HD T above_collision(T p, T minus_log_p, T spread) {
  return select(greater(p, T(0.5)), spread + expm1_nonpositive(-minus_log_p), p - (T(1) - spread));
}

// A row's logits may be changed on the way in, z = scale x or z = cap tanh(scale x / cap), which no logit leaves
// ("soft capping", Gemma Team 2024, section 2). Here w = |scale x / cap|, and 1 - tanh^2 is not formed as a difference.
template <class T>
CECE_HD T tanh_nonnegative(T w) {
  const T t = expm1_nonpositive(-(w + w));
  return -t / (T(2) + t);
}
template <class T>
CECE_HD T tanh_slope(T w) {
  const T e = exp_nonpositive(-(w + w)), d = T(1) + e;
  return T(4) * e / (d * d);
}

// --------------------------------------------------------------------------------- binary cross-entropy

// An element's loss times its weight: 0 where the weight is, also of an infinite loss, but not of a NaN.
template <class T>
CECE_HD T weighted(T weight, T loss) {
  return select(equal(loss, loss), times(weight, loss), loss);
}

// On logits: (1 - y) softplus(x) + p y softplus(-x), with softplus(x) = max(x, 0) + log1p(e^{-|x|}) and p the
// pos_weight. Of max(x, 0) and max(-x, 0) one is 0 and the other |x|. The textbook's
// max(x, 0) - x y + log1p(e^{-|x|}) cancels: 100 % off in float32 near y = 1.
struct BinaryCrossEntropyWithLogits {
  static constexpr bool kProbabilities = false;

  template <class T, class E = Exp>
  CECE_HD static T loss(T x, T y, T pos_weight, E exp = E()) {
    const T negative = T(1) - y, positive = pos_weight * y;
    const T wrong = select(greater(x, T(0)), negative, positive);  // the mass on the other side of x
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

  template <class T>
  CECE_HD static T capped(T minus_log) {
    return select(greater(minus_log, T(100)), T(100), minus_log);
  }
  template <class T, class E = Exp>
  CECE_HD static T loss(T x, T y, T, E = E()) {
    return y * capped(-log_(x)) + (T(1) - y) * capped(-log1p_minus(x));
  }
  template <class T, class E = Exp>
  CECE_HD static T slope(T x, T y, T, E = E()) {
    const T variance = (T(1) - x) * x, least = T(1e-12);
    return (x - y) / select(greater(least, variance), least, variance);
  }
  // log(1 - x): the rounding of 1 - x, which is known exactly, is put back to first order.
  template <class T>
  CECE_HD static T log1p_minus(T x) {
    const T q = T(1) - x, lost = (T(1) - q) - x;
    return select(equal(q, T(0)), log_(q), log_(q) + lost / q);
  }
};

}  // namespace cece
