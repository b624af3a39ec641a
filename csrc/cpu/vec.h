// SIMD lanes for numerics.h: at::vec primitives, so that one source serves every ISA torch knows.
// The includer defines CPU_CAPABILITY; everything here is internal to that ISA's object file.
#pragma once
#include <ATen/cpu/vec/vec.h>

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
#endif
CECE_VEC Vec<A> abs_(Vec<A> x) { return x.abs(); }
CECE_VEC Vec<A> log1p_(Vec<A> z) { return z.log1p(); }

inline Vec<double> exp_nonpositive(Vec<double> x) { return x.exp(); }
inline Vec<double> expm1_nonpositive(Vec<double> x) { return x.expm1(); }
inline Vec<double> log_(Vec<double> x) { return x.log(); }
CECE_VEC Vec<A> reciprocal_unit(Vec<A> d) { return Vec<A>(A(1)) / d; }
inline Vec<double> log1p_unit(Vec<double> z) { return z.log1p(); }
inline Vec<float> log1p_unit(Vec<float> z);  // below
inline Vec<float> log1p_unit(Vec<float> z, Vec<float> one_over);
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
// NaN for NaN, exactly 1 at 0. Twice as fast as Sleef's exp_u10: no branch, no table, no positive overflow to guard.
inline __attribute__((always_inline)) Vec<float> exp_nonpositive(Vec<float> x) {
  Vec<float> shifted;
  const Vec<float> scale = exp_scale<64>(x, shifted);
  return shifted * scale;
}

// e^x - 1 for x <= 0, at most 2.5 ULP: 2^n tail + (2^n - 1), the second term exact.
inline __attribute__((always_inline)) Vec<float> expm1_nonpositive(Vec<float> x) {
  Vec<float> tail;
  const Vec<float> scale = exp_scale<0>(at::vec::clamp_min(x, Vec<float>(-80.f)), tail);
  return at::vec::fmadd(scale, tail, scale - Vec<float>(1.f));
}

// log(z) for 0 <= z <= 1: at most 2 ULP, also of a subnormal; a finite number below -104 for 0, NaN for NaN.
// z = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1): as above, |s| <= 0.172.
inline __attribute__((always_inline)) Vec<float> log_(Vec<float> z) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  using at::vec::fmadd;
  const V subnormal = z < V(0x1p-126f);
  const V scaled = select(subnormal, fmadd(z, V(0x1p64f), V(0.f)), z);                 // -0 becomes 0
  const I bits = at::vec::cast<int32_t>(scaled), k = (bits - I(0x3f3504f3)) >> I(23);  // sqrt(1/2)
  const V m = at::vec::cast<float>(bits - (k << I(23)));
  const V exponent = at::vec::convert_to_fp_of_same_size<float>(k) + select(subnormal, V(-64.f), V(0.f));
  const V s = (m - V(1.f)) / (m + V(1.f)), u = s * s, twice = s + s;
  const V q = fmadd(fmadd(V(0.147900224f), u, V(0.199943885f)), u, V(0.333333433f));
  const V log_m = fmadd(twice * u, q, twice);
  const V log_z = fmadd(exponent, V(0.693147181f), log_m);
  return select(z == z, log_z, z);
}

}  // namespace CPU_CAPABILITY
}  // namespace cece

// After the primitives, which its formulas then find.
#include "../numerics.h"

namespace cece {
template <class A>
struct LaneOf<Vec<A>> {
  using type = A;
};
inline namespace CPU_CAPABILITY {
inline __attribute__((always_inline)) Vec<float> log1p_unit(Vec<float> z) {
  return log1p_of_ratio(z / (z + Vec<float>(2.f)));  // at::vec::fmadd: found by its argument
}
inline __attribute__((always_inline)) Vec<float> log1p_unit(Vec<float> z, Vec<float> one_over) {
  return log1p_of_ratio(z * one_over);
}
}  // namespace CPU_CAPABILITY
}  // namespace cece
