// SIMD lanes for numerics.h: at::vec primitives, so that one source serves every ISA torch knows.
// The includer defines CPU_CAPABILITY; everything here is internal to that ISA's object file.
#pragma once
#include <ATen/cpu/vec/vec.h>

namespace cece {

template <class A>
using Vec = at::vec::Vectorized<A>;

inline namespace CPU_CAPABILITY {

#define CECE_VEC template <class A> inline __attribute__((always_inline))
CECE_VEC Vec<A> select(Vec<A> mask, Vec<A> a, Vec<A> b) { return Vec<A>::blendv(b, a, mask); }
CECE_VEC Vec<A> greater(Vec<A> a, Vec<A> b) { return a > b; }
CECE_VEC Vec<A> equal(Vec<A> a, Vec<A> b) { return a == b; }
CECE_VEC Vec<A> abs_(Vec<A> x) { return x.abs(); }
CECE_VEC Vec<A> log_(Vec<A> x) { return x.log(); }
CECE_VEC Vec<A> log1p_(Vec<A> z) { return z.log1p(); }
CECE_VEC Vec<A> expm1_(Vec<A> x) { return x.expm1(); }

inline Vec<double> exp_nonpositive(Vec<double> x) { return x.exp(); }
inline Vec<double> log1p_unit(Vec<double> z) { return z.log1p(); }

// e^x for x <= 0: at most 2 ULP over [-104, 0] including subnormal results, 0 below, NaN for NaN; exactly 1 at 0.
// x = n ln2 + r with |r| <= ln2 / 2; e^r by a minimax polynomial of degree 6 (relative error 8e-9).
// 1.7x the speed of Sleef's exp_u10 and the accuracy of it: no branch, no table, no positive overflow to guard.
inline __attribute__((always_inline)) Vec<float> exp_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  // clamp_min keeps a NaN. Below -104 even the smallest subnormal is too large.
  x = at::vec::clamp_min(x, V(-104.f));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits: n + 127 + 64, an exponent.
  const V magic(12582912.f + 127.f + 64.f);
  const V t = at::vec::fmadd(x, V(1.44269504f), magic), n = t - magic;
  V r = at::vec::fmadd(n, V(-0.693359375f), x);  // ln2 in two parts; n times the first is exact
  r = at::vec::fmadd(n, V(2.12194440e-4f), r);
  V p = at::vec::fmadd(V(1.39261840e-3f), r, V(8.36317893e-3f));
  p = at::vec::fmadd(p, r, V(4.16665561e-2f));
  p = at::vec::fmadd(p, r, V(1.66665763e-1f));
  p = at::vec::fmadd(p, r, V(0.5f));
  p = at::vec::fmadd(p * r, r, r) + V(1.f);
  // 2^(n + 64), then 2^-64: the one rounding of a subnormal result happens last
  const auto scale = at::vec::cast<float>(at::vec::cast<int32_t>(t) << Vec<int32_t>(23));
  return p * scale * V(0x1p-64f);
}

// log(1 + z) for 0 <= z <= 1, at most 2 ULP: 2 atanh(s) = 2 s (1 + s^2 Q(s^2)) with s = z / (2 + z) <= 1/3;
// Q is a minimax polynomial (relative error 1.6e-8). A small z keeps all its bits.
inline __attribute__((always_inline)) Vec<float> log1p_unit(Vec<float> z) {
  using V = Vec<float>;
  const V s = z / (z + V(2.f)), u = s * s;
  V q = at::vec::fmadd(V(1.34257495e-1f), u, V(1.41183093e-1f));
  q = at::vec::fmadd(q, u, V(2.00037807e-1f));
  q = at::vec::fmadd(q, u, V(3.33333194e-1f));
  const V twice = s + s;
  return at::vec::fmadd(twice * u, q, twice);
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
}  // namespace cece
