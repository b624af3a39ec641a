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
// of the last place at 1e-20, none where the difference is exact. What is left are a few units: 4 on a CPU, 6 on a GPU,
// whose expf, log1pf and expm1f are not this library's own.) Where a factor is 0 its term is 0, also beside an
// infinity (`times`); a loss that is NaN stays NaN, whatever its factor, as its gradient does.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "args.h"

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
template <class T>
CECE_HD T nonpositive(T d) {  // the lesser of d and 0, 0 where d is NaN
  return select(greater(T(0), d), d, T(0));
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
template <class T>
struct ExpOfScaled {  // e^{scale x}
  T scale;
  CECE_HD T operator()(T x) const { return exp_nonpositive(x * scale); }
};
// log(1 + z) for z >= -1, and a faster one for -1/2 <= z <= 1
CECE_HD float log1p_(float z) { return CECE_GPU(::log1pf(z), z, 1); }
CECE_HD double log1p_(double z) { return ::log1p(z); }
CECE_HD double log1p_unit(double z) { return ::log1p(z); }
CECE_HD float fmadd(float a, float b, float c) { return a * b + c; }
CECE_HD double fmadd(double a, double b, double c) { return a * b + c; }
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
template <class T>
CECE_HD T ratio_unit(T a, T d) {  // a / d for such d
  return a * reciprocal_unit(d);
}
// log(1 + z) for -1/2 <= z <= 1, at most 2 ULP beside those of s: 2 atanh(s) = 2 s (1 + s^2 Q(s^2)), s = z / (2 + z),
// |s| <= 1/3; Q is a minimax polynomial (relative error 1.6e-8). A small z keeps all its bits. F: float, or lanes of
// it.
template <class F>
CECE_HD F log1p_of_ratio(F s) {
  const F u = s * s, twice = s + s;
  F q = fmadd(F(1.34257495e-1f), u, F(1.41183093e-1f));
  q = fmadd(q, u, F(2.00037807e-1f));
  q = fmadd(q, u, F(3.33333194e-1f));
  return fmadd(twice * u, q, twice);
}
CECE_HD float log1p_unit(float z) { return log1p_of_ratio(ratio_unit(z, z + 2.f)); }
// The same where 1 / (z + 2) is at hand
CECE_HD float log1p_unit(float z, float one_over) { return log1p_of_ratio(z * one_over); }
CECE_HD double log1p_unit(double z, double) { return ::log1p(z); }
// log(z), for z in [0, 1]
CECE_HD float log_(float z) { return CECE_GPU(::logf(z), z, 1); }
CECE_HD double log_(double z) { return ::log(z); }
// The same where 1 - z is known to all its bits
template <class T>
CECE_HD T log_(T z, T rest) {
  return select(greater(T(0.5), rest), log1p_(-rest), log_(z));
}

// a * b, but 0 wherever a is 0: an impossible outcome costs nothing, however impossible.
template <class T>
CECE_HD T times(T a, T b) {
  return select(equal(a, T(0)), T(0), a * b);
}
template <class T>
CECE_HD T minus_times(T c, T a, T b) {  // c - times(a, b)
  return c - times(a, b);
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

  template <class E = Exp>
  CECE_HD void merge(const LogSumExp& o, E exp = E()) {
    const T d = o.max - max, z = exp(-abs_(d));
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
  template <class E = Exp>
  CECE_HD LogSumExp<T> log_sum_exp(E exp = E()) const {
    return {max, sum * exp(second - max)};
  }
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
// For many classes of a row, p_j mass = e^{x_j - max} (e^{-log_sum} mass): the second factor is the row's, and NaN
// where it is none. So a difference that is NaN is that of the infinite logit. The exponent is rounded only once.
template <class T>
CECE_HD T share_of_row(T log_sum, T mass) {
  return exp_nonpositive(-log_sum) * mass;
}
template <class T>
CECE_HD T exp_in_row(T x, T max) {
  return exp_nonpositive(nonpositive(x - max));
}
// The same for the label: p_y - 1 = expm1(-nll) keeps its bits where p_y rounds to 1.
template <class T>
CECE_HD T label_slope(T x, T max, T log_sum, T kept) {  // a NaN shows also where the mass is 0
  return kept * expm1_nonpositive(-negative_log_probability(x, max, log_sum));
}
template <class T>
CECE_HD T label_slope(T x, T max, T log_sum, T kept, T spread_mass, T q) {  // with smoothing
  return label_slope(x, max, log_sum, kept) + (probability(x, max, log_sum) * spread_mass - q);
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

// A part of a row's classes: what it adds to the row's sums. `argmax` is the first of its largest, kNowhere where all
// are -inf or NaN; `merge` is with a part of classes behind this one's, or, with classes in turn, beside them.
template <class T>
struct RowPart {
  Moments<T> sums;
  TargetGaps<T> target;
  int64_t argmax = kNowhere;
  static constexpr int64_t kNowhere = INT64_MAX;

  CECE_HD void merge(const RowPart& o) {
    const T max = greatest(o.sums.max, sums.max);
    TargetGaps<T> part = o.target;
    part.rebase(o.sums.max, max);
    target.rebase(sums.max, max);
    target = {target.gaps + part.gaps, target.mass + part.mass};
    if (o.sums.max > sums.max || (o.sums.max == sums.max && o.argmax < argmax)) argmax = o.argmax;
    sums.merge(o.sums);
  }
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

// --------------------------------------------------------------------------------- divergences of two rows

// Of p = softmax(x / T) and q = softmax(y / T), with d_j = log q_j - log p_j and m = (p + q) / 2:
//   Kullback-Leibler   KL(q || p) = sum_j q_j d_j                    = sum_j q_j h(d_j),  h(d) = e^-d - 1 + d >= 0
//   Jensen-Shannon     JS = (KL(q || m) + KL(p || m)) / 2            = sum_j m_j (log 2 - H(sigmoid(d_j)))
// The sums as they are read cancel: KL is d^2 / 2 for a small d, of terms of size d. What is added to each term on the
// right, p_j - q_j, adds up to 0, and leaves none below 0. d_j = (y_j - x_j - R) / T, where R / T is the difference
// of the rows' log-sums; y_j - x_j and R each have two parts, so that an offset between the rows costs no bits.
//
// R is known to the accuracy of sums of exponentials only. With d off by c, sum_j p_j - sum_j q_j comes out as
// B = e^-c - 1 and not 0, and from it c is known, to all digits: KL comes out greater by B - log(1 + B), JS by c^2 / 8
// and at most |c| of itself. Likewise Q, the sum of all q_j as computed, takes the place of 1.
template <class T>
struct Pair {                            // of two rows; [0] is x's, [1] is y's
  T max[2], log_sum[2];                  // max x and log(sum_j e^{(x_j - max x) / T})
  T offset, offset_rest;                 // R
  T level[2];                            // what a slope is relative to: KL in [1]; KL(p || m) and KL(q || m)
  T cold;                                // 1 / T
  decltype(equal(T(), T())) certain[2];  // whether the maximum is +inf: of such a row's logits, settled() is meant

  CECE_HD Pair swapped() const {
    return {{max[1], max[0]},        {log_sum[1], log_sum[0]}, -offset, -offset_rest, {level[1], level[0]}, cold,
            {certain[1], certain[0]}};
  }
  // -log of a mass
  CECE_HD T surprise(T x, int row) const { return (max[row] - x) * cold + log_sum[row]; }
  // d; 0 for a class that both rows rule out
  CECE_HD T log_ratio(T x, T y) const {
    const T s = y - x, z = s - y, rest = (y - (s - z)) - (x + z);  // what s rounds off (Knuth's TwoSum)
    const T d = ((s - offset) + (select(equal(rest, rest), rest, T(0)) - offset_rest)) * cold;
    return select(equal(d, d), d, T(0));
  }
};

// A row with one infinite logit is a certainty: its logits count as 0 there and -inf elsewhere.
template <class T>
CECE_HD T settled(T x) {
  const T infinity(std::numeric_limits<typename LaneOf<T>::type>::infinity());
  return select(equal(x, infinity), T(0), -infinity);
}

// p and q of a class, by the greater of them.
template <class T>
struct ClassPair {
  T d, distance, most, drop;  // log q - log p, |d|, max(p, q), e^-|d| - 1

  CECE_HD ClassPair(T d, T surprise_p, T surprise_q)
      : d(d),
        distance(abs_(d)),
        most(exp_nonpositive(-lesser(surprise_p, surprise_q))),
        drop(expm1_nonpositive(-distance)) {}
  CECE_HD ClassPair(const Pair<T>& pair, T x, T y)
      : ClassPair(pair.log_ratio(x, y), pair.surprise(x, 0), pair.surprise(y, 1)) {}
  CECE_HD auto p_is_greater() const { return greater(T(0), d); }
  CECE_HD T q() const { return most * select(p_is_greater(), T(1) + drop, T(1)); }
  CECE_HD T p_minus_q() const { return most * select(p_is_greater(), -drop, drop); }
};

// sum_k c(k) u^k over a table's terms
template <class Table, int k = 0, class T>
CECE_HD T power_series(T u) {
  using Lane = typename LaneOf<T>::type;
  constexpr Lane c = Lane(Table::coefficient(k));
  if constexpr (k + 1 < Table::template kTerms<Lane>) {
    return fmadd(power_series<Table, k + 1>(u), u, T(c));
  } else {
    return T(c);
  }
}

// A kind of divergence: what each class adds to the sums (value, p - q, q, and what else it needs), what they come to,
// and the derivatives in x and y for an incoming gradient of 1.
enum { kValue, kDrift, kMass, kLevel };

struct KullbackLeibler {
  static constexpr int kSums = 3;
  struct Series {  // h(d) / d^2 for |d| <= 1: 1 / 2! - d / 3! + d^2 / 4! ...; what is left out is 6e-9 of it, or 1e-17
    template <class Lane>
    static constexpr int kTerms = sizeof(Lane) == 4 ? 10 : 17;
    static constexpr double coefficient(int k) {
      double c = 0.5;
      for (int i = 3; i <= k + 2; i++) c /= -i;
      return c;
    }
  };
  template <class T>
  CECE_HD static void terms(const ClassPair<T>& s, T (&out)[kSums]) {
    const T q = s.q(), left = T(1) + s.drop;
    const T near = q * (s.d * s.d) * power_series<Series>(s.d);
    const T far = s.most * select(s.p_is_greater(), -s.drop - times(left, s.distance), s.drop + s.distance);
    const T value = select(greater(T(1), s.distance), near, far);
    // an impossible class that the target has some mass on, however little
    out[kValue] = select(greater(s.d, -lowest<T>()), s.d, value);
    out[kDrift] = s.p_minus_q();
    out[kMass] = q;
  }
  // drift = B, c = -log(1 + B)
  CECE_HD static double finish(const double (&sums)[kSums], double drift, double c, double (&level)[2]) {
    const double kl = sums[kValue] / sums[kMass] - (drift + c);
    level[0] = 0;
    return level[1] = kl < 0 ? 0 : kl;
  }
  template <class T>
  CECE_HD static T slope_x(const Pair<T>& pair, T x, T y) {
    return ClassPair<T>(pair, x, y).p_minus_q() * pair.cold;
  }
  template <class T>
  CECE_HD static T slope_y(const Pair<T>& pair, T x, T y) {
    return times(exp_nonpositive(-pair.surprise(y, 1)), pair.log_ratio(x, y) - pair.level[1]) * pair.cold;
  }
};

struct JensenShannon {
  static constexpr int kSums = 4;
  struct Series {  // (log 2 - H((1 + v) / 2)) / v^2 in v^2, v = tanh(d / 2), for |d| <= 3/2: 1/2 + v^2 / 12 + v^4 / 30
                   // ...
    template <class Lane>
    static constexpr int kTerms = sizeof(Lane) == 4 ? 15 : 38;
    static constexpr double coefficient(int k) { return 1.0 / ((2 * k + 2) * (2 * k + 1)); }
  };
  // log(max(p, q) / m) = -log(1 + (e^-|d| - 1) / 2)
  template <class T>
  CECE_HD static T log_of_greater(const ClassPair<T>& s) {
    return -log1p_unit(s.drop * T(0.5));
  }
  template <class T>
  CECE_HD static void terms(const ClassPair<T>& s, T (&out)[kSums]) {
    const T both = T(2) + s.drop, left = T(1) + s.drop, part = reciprocal_unit(both), v = s.drop * part;
    const T log_more = log_of_greater(s), less = times(left, s.distance);
    const T near = s.drop * v * power_series<Series>(v * v), far = both * log_more - less;
    out[kValue] = T(0.5) * s.most * select(greater(T(1.5), s.distance), near, far);
    out[kDrift] = s.p_minus_q();
    out[kMass] = s.q();
    out[kLevel] = s.most * select(s.p_is_greater(), left * log_more - less, log_more);  // q log(q / m)
  }
  CECE_HD static double finish(const double (&sums)[kSums], double, double c, double (&level)[2]) {
    double js = sums[kValue] / sums[kMass] - c * c / 8;
    js = js < 0 ? 0 : js;
    level[1] = sums[kLevel] / sums[kMass] - c / 2;
    level[0] = 2 * js - level[1];
    return js;
  }
  template <class T>
  CECE_HD static T slope_x(const Pair<T>& pair, T x, T y) {  // p (log(p / m) - KL(p || m)) / 2
    const ClassPair<T> s(pair, x, y);
    const T log_more = log_of_greater(s), log_p = select(greater(s.d, T(0)), log_more - s.distance, log_more);
    return times(exp_nonpositive(-pair.surprise(x, 0)), log_p - pair.level[0]) * (T(0.5) * pair.cold);
  }
  template <class T>
  CECE_HD static T slope_y(const Pair<T>& pair, T x, T y) {
    return slope_x(pair.swapped(), y, x);
  }
};

// What a row's second pass starts from; in double, so that R has as many digits as its parts.
template <class T>
CECE_HD Pair<T> begun_pair(double max_x, double log_sum_x, double max_y, double log_sum_y, double cold) {
  const double infinity = std::numeric_limits<double>::infinity();
  const bool certain_x = max_x == infinity, certain_y = max_y == infinity;
  const double top_x = certain_x ? 0 : max_x, top_y = certain_y ? 0 : max_y;
  const double offset = (top_y - top_x) + (log_sum_y - log_sum_x) / cold;
  const T high = T(offset);
  return {{T(top_x), T(top_y)},  {T(log_sum_x), T(log_sum_y)}, high, T(offset - double(high)), {T(0), T(0)}, T(cold),
          {certain_x, certain_y}};
}
// Whether both rows are distributions: neither has a NaN or two infinities, nor nothing but -inf.
template <class T>
CECE_HD bool proper(const Pair<T>& pair) {
  return pair.log_sum[0] > T(-1) && pair.log_sum[1] > T(-1);
}
// The divergence of a row, and what was off in its Pair put right. c = -log(1 + drift)
template <class Kind, class T>
CECE_HD double finish_pair(const double (&sums)[Kind::kSums], double drift, double c, double cold, Pair<T>& pair) {
  const double offset = double(pair.offset) + double(pair.offset_rest) + c / cold;
  double level[2];
  const double value = Kind::finish(sums, drift, c, level);
  pair.offset = T(offset), pair.offset_rest = T(offset - double(pair.offset));
  pair.level[0] = T(level[0]), pair.level[1] = T(level[1]);
  return proper(pair) ? value : std::numeric_limits<double>::quiet_NaN();
}
template <class Kind, class T>
CECE_HD double finish_pair(const double (&sums)[Kind::kSums], double cold, Pair<T>& pair) {
  const double drift = sums[kDrift] / sums[kMass];
  return finish_pair<Kind>(sums, drift, -log1p_(drift), cold, pair);
}
// A Pair as it is saved: args.h's kPairNumbers, `stride` apart, the last of which is Jensen-Shannon's only. What is no
// distribution is NaN where it is read again, but saved as it is: beside other parts, a part may be empty.
template <class T>
CECE_HD void save_pair(const Pair<T>& pair, T* out, int64_t stride) {
  const T infinity = std::numeric_limits<T>::infinity();
  for (int i = 0; i < 2; i++) {
    out[i * stride] = pair.certain[i] ? infinity : pair.max[i];
    out[(2 + i) * stride] = pair.log_sum[i];
    out[(4 + i) * stride] = i ? pair.offset_rest : pair.offset;
    out[(7 - i) * stride] = pair.level[i];
  }
}
// saved(k): number k of the Pair, or of as many as there are lanes.
template <class T, class F>
CECE_HD Pair<T> pair_as_saved(F&& saved, T cold) {
  Pair<T> pair;
  for (int i = 0; i < 2; i++) {
    const T max = saved(i);
    pair.certain[i] = equal(max, T(std::numeric_limits<typename LaneOf<T>::type>::infinity()));
    pair.max[i] = select(pair.certain[i], T(0), max);
    pair.log_sum[i] = saved(2 + i);
    (i ? pair.offset_rest : pair.offset) = saved(4 + i);
    pair.level[i] = saved(7 - i);
  }
  pair.cold = cold;
  return pair;
}
template <class T, class F>
CECE_HD Pair<T> saved_pair(F&& saved, T cold) {
  const T nan(std::numeric_limits<typename LaneOf<T>::type>::quiet_NaN());
  Pair<T> pair = pair_as_saved(saved, cold);
  const auto x = greater(pair.log_sum[0], T(-1)), y = greater(pair.log_sum[1], T(-1));
  for (T& log_sum : pair.log_sum) log_sum = select(x, select(y, log_sum, nan), nan);
  return pair;
}
template <class T>
CECE_HD Pair<T> saved_pair(const T* saved, int64_t stride, T cold) {
  return saved_pair([&](int k) { return saved[k * stride]; }, cold);
}

// A row in parts, as processes have it that share its classes: by the chain rule, with P_r and Q_r the masses of part
// r,
//   KL(q || p) = KL(Q || P) + sum_r Q_r KL(q_r || p_r)
// A part is one more class. Its log Q_r - log P_r is how far its offset is from the row's, exact as these are.
// parts: args.h's kPartNumbers of every part, saved Pairs without their last; the row's Pair goes to `row`.
template <class T>
CECE_HD double merge_parts(const T* parts, int64_t count, int64_t stride, double cold, Pair<T>& row) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const auto number = [&](int64_t part, int k) { return double(parts[(part * kPartNumbers + k) * stride]); };
  LogSumExp<double> all[2];
  for (int64_t r = 0; r < count; r++) {
    for (int i = 0; i < 2; i++) {
      LogSumExp<double> part;
      part.max = number(r, i), part.rest = ::expm1(number(r, 2 + i));
      all[i].merge(part, ExpOfScaled<double>{cold});
    }
  }
  row = begun_pair<T>(all[0].max, all[0].log_sum(), all[1].max, all[1].log_sum(), cold);
  double sums[KullbackLeibler::kSums] = {};
  for (int64_t r = 0; r < count; r++) {
    double surprise[2];  // -log P_r, -log Q_r
    for (int i = 0; i < 2; i++) {
      surprise[i] = gap(number(r, i), all[i].max) * cold + (all[i].log_sum() - number(r, 2 + i));
    }
    const bool both = surprise[0] < infinity && surprise[1] < infinity;
    const double apart = (number(r, 4) - double(row.offset)) + (number(r, 5) - double(row.offset_rest));
    const double d = both ? apart * cold : surprise[0] == surprise[1] ? 0 : surprise[0] - surprise[1];
    const ClassPair<double> whole(d, surprise[0], surprise[1]);
    double terms[KullbackLeibler::kSums];
    KullbackLeibler::terms(whole, terms);
    for (int k = 0; k < KullbackLeibler::kSums; k++) sums[k] += terms[k];
    const double within = number(r, 6);
    if (both) sums[kValue] += within == infinity ? within : times(whole.q(), within);
  }
  return finish_pair<KullbackLeibler>(sums, cold, row);
}

// --------------------------------------------------------------------------------- binary cross-entropy

// An element's loss times its weight: 0 where the weight is, also of an infinite loss, but not of a NaN.
template <class T>
CECE_HD T weighted(T weight, T loss) {
  return select(equal(loss, loss), times(weight, loss), loss);
}

// The sum of many losses, of which a loss may have a faster one than that of their values.
template <class T>
struct SumOf {
  static constexpr int kMost = 64;  // added up before the sum goes on in double
  T sum = T(0);

  CECE_HD void add(T loss) { sum = sum + loss; }
  CECE_HD void add(const SumOf& o) { sum = sum + o.sum; }
  CECE_HD T value() const { return sum; }
};

struct OfLogits {
  static constexpr bool kProbabilities = false;
  template <class A>
  static constexpr A kCertain = -std::numeric_limits<A>::infinity();  // its loss is 0, with the truth 0
  template <class T>
  using Sum = SumOf<T>;
};

// Each loss is an object with `loss` and `slope`, the loss's derivative in x, of an input x, a truth y and a pos_weight
// p. All other derivatives, of every order, come from these two (autograd/number.h), so neither may hide one: a value
// that is not selected is made finite before it is divided by.

// A pos_weight that is 1 everywhere: it costs no product, and the truth's masses 1 - y and y make 1.
struct One {
  template <class T>
  friend CECE_HD T operator*(One, T x) {
    return x;
  }
};
template <class T>
CECE_HD T total_mass(T negative, T positive, T) {
  return negative + positive;
}
template <class T>
CECE_HD One total_mass(T, T, One) {
  return One();
}

// On logits: (1 - y) softplus(x) + p y softplus(-x), with softplus(x) = max(x, 0) + log1p(e^{-|x|}) and p the
// pos_weight. Of max(x, 0) and max(-x, 0) one is 0 and the other |x|. The textbook's
// max(x, 0) - x y + log1p(e^{-|x|}) cancels: 100 % off in float32 near y = 1.
struct BinaryCrossEntropyWithLogits : OfLogits {
  CECE_HD explicit BinaryCrossEntropyWithLogits(const double*) {}

  template <class T, class P, class E = Exp>
  CECE_HD static T loss(T x, T y, P pos_weight, E exp = E()) {
    const T negative = T(1) - y, positive = pos_weight * y;
    const T wrong = select(greater(T(0), x), positive, negative);  // the mass on the other side of x
    const T down = -abs_(x);
    return total_mass(negative, positive, pos_weight) * log1p_unit(exp(down)) - times(wrong, down);
  }
  // The sum of many losses whose pos_weight is 1, with one logarithm for all of them: log1p(z_1) + log1p(z_2) + ... is
  // log1p(R) with R + 1 = (z_1 + 1) (z_2 + 1) ..., and R' = R + (R + 1) z has no negative term, so that a tiny R keeps
  // its bits. R is less than 2^n for n losses.
  template <class T>
  struct Sum {
    static constexpr int kMost = 64;
    T rest = T(0), distance = T(0);

    template <class E = Exp>
    CECE_HD void add(T x, T y, E exp = E()) {
      const T down = -abs_(x);
      rest = rest + (rest + T(1)) * exp(down);
      distance = minus_times(distance, select(greater(T(0), x), y, T(1) - y), down);
    }
    CECE_HD void add(const Sum& o) {
      rest = rest + (rest + T(1)) * o.rest;
      distance = distance + o.distance;
    }
    template <class Mask>
    CECE_HD void only_where(Mask mask, const Sum& otherwise) {
      rest = select(mask, rest, otherwise.rest), distance = select(mask, distance, otherwise.distance);
    }
    CECE_HD T value() const { return distance + log1p_(rest); }
  };
  // (1 - y) sigmoid(x) - p y sigmoid(-x), both sigmoids from one exponential and one division: of the masses on the
  // other side of x and on its own, wrong - right z, turned around where x < 0
  template <class T, class P, class E = Exp>
  CECE_HD static T slope(T x, T y, P pos_weight, E exp = E()) {
    const T negative = T(1) - y, positive = pos_weight * y, z = exp(-abs_(x));
    const auto below = greater(T(0), x);
    const T wrong = select(below, positive, negative), right = select(below, negative, positive);
    const T rise = wrong - right * z;
    return ratio_unit(select(below, -rise, rise), T(1) + z);
  }
};

// On probabilities: -y log x - (1 - y) log(1 - x), each logarithm no lower than -100 and the slope's
// denominator no lower than 1e-12, as torch defines them (aten/src/ATen/native/Loss.cpp).
struct BinaryCrossEntropy {
  static constexpr bool kProbabilities = true;
  template <class A>
  static constexpr A kCertain = 0;
  template <class T>
  using Sum = SumOf<T>;

  CECE_HD explicit BinaryCrossEntropy(const double*) {}

  template <class T, class P, class E = Exp>
  CECE_HD static T loss(T x, T y, P, E = E()) {
    return y * minus_log(x) + (T(1) - y) * minus_log_of_rest(x);
  }
  // (1 - y) / (1 - x) - y / x, whose derivative does not cancel, where (x - y) / (x (1 - x)) would have one that does
  template <class T, class P, class E = Exp>
  CECE_HD static T slope(T x, T y, P, E = E()) {
    const auto clamped = greater(T(1e-12), (T(1) - x) * x);
    const T inside = select(clamped, T(0.5), x);
    return select(clamped, (x - y) * T(1e12), (T(1) - y) / (T(1) - inside) - y / inside);
  }
  template <class T>
  CECE_HD static T minus_log(T x) {
    const auto cut = greater(T(3.7200759760208361e-44), x);  // e^-100
    return select(cut, T(100), -log_(select(cut, T(1), x)));
  }
  // log(1 - x): the rounding of 1 - x, which is known exactly, is put back to first order. It is 0 from x = 1/2 on, and
  // below 1 + x is enough for 1 / (1 - x).
  template <class T>
  CECE_HD static T minus_log_of_rest(T x) {
    const T q = T(1) - x, lost = (T(1) - q) - x;
    const auto cut = equal(q, T(0));
    return select(cut, T(100), -(log_(select(cut, T(1), q)) + (lost + lost * x)));
  }
  // The loss where y is 0 or 1 (yes) in all lanes: one logarithm
  template <class T, class Mask>
  CECE_HD static T loss_of_outcome(T x, Mask yes) {
    const T rest = T(1) - x, lost = select(yes, T(0), (T(1) - rest) - x);
    return lesser(-(log_(select(yes, x, rest)) + (lost + lost * x)), T(100));
  }
  // The sum of losses of outcomes, whose probability is p, by the logarithm of their product. What is left of 1 is kept
  // beside it, to all its bits: 1 - p q = (1 - p) + p (1 - q).
  template <class T>
  struct Outcomes {
    static constexpr int kMost = 8;  // each of kLeast, and their product is no subnormal number
    static constexpr typename LaneOf<T>::type kLeast = 0x1p-15f;
    T product = T(1), rest = T(0);

    CECE_HD void add(T p, T other) { rest = rest + product * other, product = product * p; }
    CECE_HD T loss() const { return -log_(product, rest); }
  };
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
struct SigmoidFocal : OfLogits {
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
struct Asymmetric : OfLogits {
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
