// SIMD lanes for numerics.h: at::vec primitives, so that one source serves every ISA torch knows.
// The includer defines CPU_CAPABILITY; everything here is internal to that ISA's object file.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <bit>
#include <limits>

namespace cece {

template <class A>
using Vec = at::vec::Vectorized<A>;

inline namespace CPU_CAPABILITY {

#define CECE_VEC     \
  template <class A> \
  inline __attribute__((always_inline))
CECE_VEC Vec<A> select(Vec<A> mask, Vec<A> a, Vec<A> b) { return Vec<A>::blendv(b, a, mask); }
CECE_VEC Vec<A> greater(Vec<A> a, Vec<A> b) { return a > b; }
CECE_VEC Vec<A> equal(Vec<A> a, Vec<A> b) { return a == b; }
CECE_VEC Vec<A> lesser(Vec<A> x, Vec<A> m) { return at::vec::clamp_max(x, m); }  // one instruction, NaN where x is
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
CECE_VEC Vec<A> greatest(Vec<A> x, Vec<A> m) { return at::vec::clamp_min(m, x); }  // one instruction, m where x is NaN
CECE_VEC Vec<A> nonpositive(Vec<A> d) { return at::vec::clamp_max(Vec<A>(A(0)), d); }
#endif
#ifdef CPU_CAPABILITY_AVX512
// A mask in its register. As at::vec has it, a comparison makes a vector of it, and a select a mask again of that: four
// instructions for two, in each of the selects that a binary loss has.
inline __mmask16 greater(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline __mmask16 equal(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Vec<float> select(__mmask16 mask, Vec<float> a, Vec<float> b) { return _mm512_mask_blend_ps(mask, b, a); }
inline __mmask8 greater(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
inline __mmask8 equal(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
inline Vec<double> select(__mmask8 mask, Vec<double> a, Vec<double> b) { return _mm512_mask_blend_pd(mask, b, a); }
// One instruction and the comparison: a compiler does not see it in a product and a select.
inline Vec<float> times(Vec<float> a, Vec<float> b) {
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ), a, b);
}
inline Vec<float> minus_times(Vec<float> c, Vec<float> a, Vec<float> b) {
  return _mm512_mask3_fnmadd_ps(a, b, c, _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ));
}
#endif
// A bit for each lane of a comparison, and all of them
template <class A>
constexpr int kEveryLane = (1 << Vec<A>::size()) - 1;
CECE_VEC int set_lanes(Vec<A> mask) { return ~mask.zero_mask() & kEveryLane<A>; }
#ifdef CPU_CAPABILITY_AVX512
inline int set_lanes(__mmask16 mask) { return mask; }
#endif
CECE_VEC Vec<A> abs_(Vec<A> x) { return x.abs(); }

inline Vec<double> log1p_(Vec<double> z) { return z.log1p(); }
inline Vec<double> exp_nonpositive(Vec<double> x) { return x.exp(); }
inline Vec<double> exp_rough(Vec<double> x) { return x.exp(); }
inline Vec<double> expm1_nonpositive(Vec<double> x) { return x.expm1(); }
inline Vec<double> log_(Vec<double> x) { return x.log(); }
CECE_VEC Vec<A> reciprocal_unit(Vec<A> d) { return Vec<A>(A(1)) / d; }
CECE_VEC Vec<A> ratio_unit(Vec<A> a, Vec<A> d) { return a / d; }
inline Vec<double> log1p_unit(Vec<double> z) { return z.log1p(); }
inline Vec<double> log1p_unit(Vec<double> z, Vec<double>) { return z.log1p(); }

// e^x for x <= 0 as scale * (1 + tail): x log2(e) = n + r with |r| <= 1/2, scale = 2^n, 1 + tail = 2^r by a minimax
// polynomial of degree 6 (relative error 4e-9). kShift moves 2^64 from the one to the other: scale = 2^(n + kShift).
template <int kShift>
inline __attribute__((always_inline)) Vec<float> exp_scale(Vec<float> x, Vec<float>& tail) {
  using V = Vec<float>;
  using at::vec::fmadd;
  // clamp_min keeps a NaN. Below -104 even the smallest subnormal is too large.
  x = at::vec::clamp_min(x, V(-104.f));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits: an exponent with its bias.
  const V log2e(1.44269504f), magic(12582912.f + 127.f + kShift);
  const V t = fmadd(x, log2e, magic), n = t - magic;
#ifdef CPU_CAPABILITY_DEFAULT  // fmadd may round twice: take n ln2 off x in two parts, the first product exact
  const V r = ((x - n * V(0.693359375f)) + n * V(2.12194440e-4f)) * log2e;
#else
  const V r = fmadd(x, V(1.92596303e-8f), fmadd(x, log2e, -n));  // log2(e) in two parts
#endif
  constexpr float k = kShift ? 0x1p-64f : 1.f;
  V p = fmadd(V(1.54531735e-4f * k), r, V(1.3390875e-3f * k));
  p = fmadd(p, r, V(9.61808208e-3f * k));
  p = fmadd(p, r, V(5.55035695e-2f * k));
  p = fmadd(p, r, V(2.40226507e-1f * k));
  p = fmadd(p, r, V(6.93147182e-1f * k));
  tail = kShift ? fmadd(p, r, V(k)) : p * r;
  return at::vec::cast<float>(at::vec::cast<int32_t>(t) << Vec<int32_t>(23));
}

// At most 2 ULP over [-104, 0] including subnormal results (whose one rounding is that of the last product), 0 below,
// NaN for NaN, exactly 1 at 0. No branch, no positive overflow to guard.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// x = n ln2 + r with n a multiple of 1 / kSteps and |r| <= h = ln2 / (2 kSteps). The powers 2^(j / kSteps) are the
// lanes of one register, each lane takes its own by the low bits of n, and 1 + r + c2 r^2 + c3 r^3 is enough for e^r:
// with c2 and c3 as below it is off by 0.17 h^4 / 24 (2.5e-8 for 8 steps, 1.6e-9 for 16).
constexpr int kSteps = Vec<float>::size();
constexpr double kHalfStep = 0.69314718055994531 / (2 * kSteps), kSquare = kHalfStep * kHalfStep;
constexpr double kPolynomial[] = {1, 0.5 + 0.8284 * kSquare / 24, 1. / 6 + kSquare / 120};
constexpr float kPowers[] = {1.f,         1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                             1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                             1.68179286f, 1.75625217f, 1.83400810f, 1.91520655f};
#ifdef CPU_CAPABILITY_AVX512
constexpr double kUnit = 1;
struct PowerOf2 {  // 2^n (1 + p r); t: a number with the bits of n at its low end
  Vec<float> steps = _mm512_loadu_ps(kPowers);
  Vec<float> operator()(Vec<float> p, Vec<float> r, Vec<float> t, Vec<float> n) const {
    const Vec<float> step = _mm512_permutexvar_ps(_mm512_castps_si512(t), steps);
    return _mm512_scalef_ps(at::vec::fmadd(p * r, step, step), n);  // goes down to the subnormal numbers by itself
  }
};
#else
constexpr double kUnit = 0x1p-64;  // 2^64 has moved from p to the power, whose bits are t's and its step's added up
constexpr auto kStepBits = [] {
  std::array<int32_t, kSteps> bits{};
  for (int j = 0; j < kSteps; j++) bits[j] = std::bit_cast<int32_t>(kPowers[2 * j]) + (64 << 23) - (j << 20);
  return bits;
}();
struct PowerOf2 {  // 2^n (1 + p r); t: a number with the bits of n at its low end
  __m256i steps = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kStepBits.data()));
  Vec<float> operator()(Vec<float> p, Vec<float> r, Vec<float> t, Vec<float>) const {
    const __m256i bits = _mm256_castps_si256(t), step = _mm256_permutevar8x32_epi32(steps, bits);
    const Vec<float> power = _mm256_castsi256_ps(_mm256_add_epi32(step, _mm256_slli_epi32(bits, 20)));
    return at::vec::fmadd(p, r, Vec<float>(float(kUnit))) * power;
  }
};
#endif
template <bool kRough = false>
inline __attribute__((always_inline)) Vec<float> exp_nonpositive(Vec<float> x, const PowerOf2& power = {}) {
  using V = Vec<float>;
  using at::vec::fmadd;
  const auto c = [](int k) { return V(float(kUnit * kPolynomial[k])); };
  x = at::vec::clamp_min(x, V(-104.f));  // as below
  const V magic(12582912.f / kSteps), t = fmadd(x, V(1.44269504f), magic), n = t - magic;
  V r = fmadd(n, V(-0.693147182f), x);
  if (!kRough) r = fmadd(n, V(1.90465421e-9f), r);  // ln2 in two parts
  return power(fmadd(fmadd(c(2), r, c(1)), r, c(0)), r, t, n);
}
#else
template <bool kRough = false>
inline __attribute__((always_inline)) Vec<float> exp_nonpositive(Vec<float> x) {
  Vec<float> shifted;
  const Vec<float> scale = exp_scale<64>(x, shifted);
  return shifted * scale;
}
#endif

// For what is summed, or rounded to bfloat16: off by another 2.7e-9 |x|, 2 ULP at most at e^-46 = 1e-20 and 4 where the
// results become subnormal. The difference of logits that x is may have been rounded by 20 times as much.
inline __attribute__((always_inline)) Vec<float> exp_rough(Vec<float> x) { return exp_nonpositive<true>(x); }

// factor e^x for x <= 0 and a finite factor; rough for what is rounded to bfloat16
template <class A, bool kRough = false>
struct ExpTimes {
  Vec<A> factor;
  explicit ExpTimes(A f) : factor(f) {}
  inline __attribute__((always_inline)) Vec<A> operator()(Vec<A> x) const { return exp_nonpositive(x) * factor; }
};
#ifdef CPU_CAPABILITY_AVX512
template <bool kRough>
struct ExpTimes<float, kRough> {  // the factor is in the steps: a multiplication of nine less
  PowerOf2 power;
  explicit ExpTimes(float f) : power{PowerOf2().steps * Vec<float>(f)} {}
  inline __attribute__((always_inline)) Vec<float> operator()(Vec<float> x) const {
    return exp_nonpositive<kRough>(x, power);
  }
};
#endif

// e^x - 1 for x <= 0, at most 2.5 ULP: 2^n tail + (2^n - 1), the second term exact.
inline __attribute__((always_inline)) Vec<float> expm1_nonpositive(Vec<float> x) {
  Vec<float> tail;
  const Vec<float> scale = exp_scale<0>(at::vec::clamp_min(x, Vec<float>(-80.f)), tail);
  return at::vec::fmadd(scale, tail, scale - Vec<float>(1.f));
}

inline Vec<float> log1p_unit(Vec<float> z);  // below
inline Vec<float> log1p_unit(Vec<float> z, Vec<float> one_over);
#ifdef CPU_CAPABILITY_AVX512
// log(1 + z) for -1/2 <= z <= 1, at most 1.7 ULP and without a division: with c near 1 / (1 + z), r = (1 + z) c - 1 is
// rounded only once, for c - 1 is exact, and log(1 + z) = -log c + log(1 + r). The table's c are floats near
// 1 / (1 + i / 8) whose logarithms are floats too, but for 2e-4 of their last place. Around 0 c is 1 and r is z, which
// keeps all its bits. log(1 + r) = r + r^2 Q(r), |r| <= 0.1; Q is minimax in units of the result's last place (0.8).
// In the tables i = 0 ... 8 come first, -4 ... -1 last.
constexpr float kReciprocal[16] = {1.f,          0.888807893f, 0.800120592f, 0.727389693f, 0.666317582f, 0.615399599f,
                                   0.571472168f, 0.533567488f, 0.507909f,    0.f,          0.f,          0.f,
                                   1.88175631f,  1.59947348f,  1.33357203f,  1.14280593f};
constexpr float kMinusLog[16] = {0.f,           0.11787416f,   0.222992823f,  0.318292916f, 0.405988872f, 0.485483468f,
                                 0.559539497f,  0.628169715f,  0.677452981f,  0.f,          0.f,          0.f,
                                 -0.632205546f, -0.469674498f, -0.287861079f, -0.133486584f};
inline __attribute__((always_inline)) Vec<float> log1p_unit(Vec<float> z) {
  using V = Vec<float>;
  using at::vec::fmadd;
  const __m512i at = _mm512_castps_si512(z + V(12582912.f / 8));  // i in the lowest bits
  const V c = _mm512_permutexvar_ps(at, _mm512_loadu_ps(kReciprocal)), r = fmadd(z, c, c - V(1.f));
  V q = fmadd(V(0.200064525f), r, V(-0.25160113f));
  q = fmadd(q, r, V(0.333336264f));
  q = fmadd(q, r, V(-0.499997139f));
  return V(_mm512_permutexvar_ps(at, _mm512_loadu_ps(kMinusLog))) + fmadd(r * r, q, r);
}
// z = 2^k m with m in [3/4, 3/2). z * 4/3 rounds to a power of two just where m starts anew.
inline __attribute__((always_inline)) Vec<float> split(Vec<float> z, Vec<float>& m) {
  m = _mm512_getmant_ps(z, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  return _mm512_getexp_ps(z * Vec<float>(1.33333337f));
}
#else
// z = 2^k m with m in [sqrt(1/2), sqrt(2))
inline __attribute__((always_inline)) Vec<float> split(Vec<float> z, Vec<float>& m) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  const V subnormal = z < V(0x1p-126f);
  const V scaled = select(subnormal, at::vec::fmadd(z, V(0x1p64f), V(0.f)), z);        // -0 becomes 0
  const I bits = at::vec::cast<int32_t>(scaled), k = (bits - I(0x3f3504f3)) >> I(23);  // sqrt(1/2)
  m = select(equal(z, z), at::vec::cast<float>(bits - (k << I(23))), z);
  return at::vec::convert_to_fp_of_same_size<float>(k) + select(subnormal, V(-64.f), V(0.f));
}
#endif
// log(z) for 0 <= z <= 1: at most 2 ULP, also of a subnormal; below -104 for 0, NaN for NaN.
inline __attribute__((always_inline)) Vec<float> log_(Vec<float> z) {
  using V = Vec<float>;
  V m;
  const V k = split(z, m);
  return at::vec::fmadd(k, V(0.693147181f), log1p_unit(m - V(1.f)));
}
// The same where 1 - z is known to all its bits
inline __attribute__((always_inline)) Vec<float> log_(Vec<float> z, Vec<float> rest) {
  using V = Vec<float>;
  V m;
  const V k = split(z, m);
  const auto near = greater(V(0.5f), rest);
  return at::vec::fmadd(select(near, V(0.f), k), V(0.693147181f), log1p_unit(select(near, -rest, m - V(1.f))));
}

// log(1 + z) for 0 <= z <= 2^64, at most 2.2 ULP; -inf for -1, NaN for NaN. With 1 + z in 2^k [3/4, 3/2), or AVX-512's
// neighbour, 2^-k (1 + z) - 1 is rounded once, and is z itself for k = 0.
inline __attribute__((always_inline)) Vec<float> log1p_(Vec<float> z) {
  using V = Vec<float>;
  using at::vec::fmadd;
#ifdef CPU_CAPABILITY_AVX512
  const V k = _mm512_getexp_ps((z + V(1.f)) * V(1.33333337f)), scale = _mm512_scalef_ps(V(1.f), -k);
#else
  using I = Vec<int32_t>;
  const I e = (at::vec::cast<int32_t>(z + V(1.f)) - I(0x3f3504f3)) >> I(23);  // sqrt(1/2)
  const V k = at::vec::convert_to_fp_of_same_size<float>(e), scale = at::vec::cast<float>((I(127) - e) << I(23));
#endif
  const V log = fmadd(k, V(0.693147181f), log1p_unit(fmadd(z, scale, scale - V(1.f))));
  return select(equal(z, V(-1.f)), V(-std::numeric_limits<float>::infinity()), log);
}

// Pairs of bfloat16 in 32 bits each: the first ones and the second ones (on a little-endian machine), as float.
struct Pairs {
  Vec<float> first, second;
};
constexpr int32_t kHighHalf = int32_t(0xffff0000);
inline __attribute__((always_inline)) Pairs widen_pairs(Vec<int32_t> pairs) {
  using I = Vec<int32_t>;
  return {at::vec::cast<float>(pairs << I(16)), at::vec::cast<float>(pairs & I(kHighHalf))};
}
// Rounded to the nearest, to even where there are two. A NaN must come from a bfloat16 or be an operation's own, with
// its low half 0, so that no carry goes through it; on AVX-512 also one that an operation passed on, of any bits.
inline __attribute__((always_inline)) Vec<int32_t> narrow_pairs(Vec<float> first, Vec<float> second) {
  using I = Vec<int32_t>;
  const I a = at::vec::cast<int32_t>(first), b = at::vec::cast<int32_t>(second);
#ifdef CPU_CAPABILITY_AVX512  // high halves and low halves, each 32 numbers side by side
  const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(int16_t(0x8000));
  const __m512i high = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
  const __m512i low = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
  const __m512i low_if_odd_more = _mm512_adds_epu16(low, _mm512_and_si512(high, one));
  const __mmask32 more = _mm512_cmpgt_epu16_mask(low_if_odd_more, half);
  const __mmask32 up = _mm512_mask_cmpneq_epi16_mask(more, _mm512_or_si512(high, half), _mm512_set1_epi16(-1));
  return _mm512_mask_add_epi16(high, up, high, one);
#else
  const auto high_half = [](I x) { return (x >> I(16)) & I(0xffff); };
  const auto rounded = [&](I x) { return x + I(0x7fff) + (high_half(x) & I(1)); };
  return high_half(rounded(a)) | (rounded(b) & I(kHighHalf));
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace cece

// After the primitives, which its formulas then find.
#include "../numerics.h"
#include "../parts.h"

namespace cece {
template <class A>
struct LaneOf<Vec<A>> {
  using type = A;
};
inline namespace CPU_CAPABILITY {
#ifndef CPU_CAPABILITY_AVX512
inline __attribute__((always_inline)) Vec<float> log1p_unit(Vec<float> z) {
  return log1p_of_ratio(z / (z + Vec<float>(2.f)));  // at::vec::fmadd: found by its argument
}
#endif
inline __attribute__((always_inline)) Vec<float> log1p_unit(Vec<float> z, Vec<float> one_over) {
#ifdef CPU_CAPABILITY_AVX512
  return log1p_unit(z);
#else
  return log1p_of_ratio(z * one_over);
#endif
}
}  // namespace CPU_CAPABILITY
}  // namespace cece
