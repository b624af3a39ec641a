// Elements in memory as lanes of Acc: dtypes, 16-byte packs, and a row cut into a head, packs and a tail.
#pragma once
#include "../args.h"
#include "runtime.cuh"

namespace cece::cuda {

// Storage types S and the Acc type each is computed in.
template <class S>
struct Storage {
  using Acc = float;
};
template <>
struct Storage<double> {
  using Acc = double;
};
template <class S>
using AccOf = typename Storage<S>::Acc;

template <class S>
constexpr Dtype kDtype = Dtype::f32;
template <>
constexpr Dtype kDtype<double> = Dtype::f64;
template <>
constexpr Dtype kDtype<__half> = Dtype::f16;
template <>
constexpr Dtype kDtype<__nv_bfloat16> = Dtype::bf16;

template <class A, class S>
__device__ __forceinline__ A widen(S x) {
  return A(x);
}
template <>
__device__ __forceinline__ float widen<float, uint8_t>(
    uint8_t x) {                                 // two instructions of full rate for one of a quarter
  return as_float(0x4B000000u | x) - 8388608.f;  // 2^23 + x, exact
}
template <>
__device__ __forceinline__ float widen<float, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float widen<float, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ double widen<double, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ double widen<double, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class S>
__device__ __forceinline__ S narrow(AccOf<S> x) {
  return S(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// f(T()) with T the C++ type of a dtype: of a float one no wider than Widest, or of any.
template <class Widest = double, class F>
__device__ __forceinline__ void visit_float(Dtype d, F&& f) {
  switch (d) {
    case Dtype::f64:
      return f(Widest());
    case Dtype::f16:
      return f(__half());
    case Dtype::bf16:
      return f(__nv_bfloat16());
    default:
      return f(float());
  }
}
template <class F>
__device__ __forceinline__ void visit_integer(Dtype d, F&& f) {
  switch (d) {
    case Dtype::u8:
      return f(uint8_t());
    case Dtype::i8:
      return f(int8_t());
    case Dtype::i16:
      return f(int16_t());
    case Dtype::i32:
      return f(int32_t());
    default:
      return f(int64_t());
  }
}
template <class F>
__device__ __forceinline__ void visit_dtype(Dtype d, F&& f) {
  d >= Dtype::u8 ? visit_integer(d, f) : visit_float(d, f);
}

// Element i of memory of any float dtype, or of any dtype, for operands that are seldom of the kernel's own type.
template <class A>
__device__ __forceinline__ A load_float(const Operand& t, int64_t i) {
  A x;
  visit_float(t.dtype, [&](auto type) { x = widen<A>(static_cast<const decltype(type)*>(t.data)[i]); });
  return x;
}
template <class A>
__device__ __forceinline__ A load_as(const Operand& t, int64_t i) {
  A x;
  visit_dtype(t.dtype, [&](auto type) { x = widen<A>(static_cast<const decltype(type)*>(t.data)[i]); });
  return x;
}
// Element i of logits or a gradient: of the kernel's own type S, but any float type where S is double, because a
// double target promotes the sums of float logits to double.
template <class S>
__device__ __forceinline__ AccOf<S> load_one(const Operand& t, int64_t i) {
  if constexpr (kDtype<S> != Dtype::f64) {
    return widen<AccOf<S>>(static_cast<const S*>(t.data)[i]);
  } else {
    return load_float<double>(t, i);
  }
}
template <class S>
__device__ __forceinline__ void store_one(const Operand& t, int64_t i, AccOf<S> value) {
  if (kDtype<S> == Dtype::f64) {
    switch (t.dtype) {
      case Dtype::f32:
        static_cast<float*>(t.data)[i] = float(value);
        return;
      case Dtype::f16:
        static_cast<__half*>(t.data)[i] = __float2half_rn(float(value));
        return;
      case Dtype::bf16:
        static_cast<__nv_bfloat16*>(t.data)[i] = __float2bfloat16_rn(float(value));
        return;
      default:
        break;
    }
  }
  static_cast<S*>(t.data)[i] = narrow<S>(value);
}

// n / d. Of 64 bits a GPU has no division: a call of a hundred instructions, where almost always 32 bits are enough.
__device__ __forceinline__ int64_t quotient(int64_t n, int64_t d) {
  return (uint64_t(n | d) >> 32) == 0 ? int64_t(uint32_t(n) / uint32_t(d)) : n / d;
}
// Where element `row` of the merged dimensions is.
__device__ __forceinline__ int64_t offset_of(const Shape& s, const Operand& t, int64_t row) {
  int64_t offset = 0;
  for (int d = s.dims - 1; d > 0; d--) {
    const int64_t rest = quotient(row, s.size[d]);
    offset += (row - rest * s.size[d]) * t.stride[d];
    row = rest;
  }
  return s.dims ? offset + row * t.stride[0] : 0;
}

// e^x for x <= 0 in two instructions instead of expf's eight, for logits of 16 bits: of them a multiprocessor must take
// 10 a clock to keep up with memory, which leaves 12 instructions each. float32, at half that rate, affords expf.
// Relative error 2^-22 + |x| (2^-24 + 2^-26), of the instruction, the product and the constant; 0 below 2^-126.
//   In a Tournament |x| is, under the sum's own weights, at most log C on average: below 4 ULP of the sum.
//   In a gradient |x| < 88: 8e-6, and rounding to 16 bits is 5e-4 or more.
struct BriefExp {
  __device__ __forceinline__ float operator()(float x) const { return exp2_flushed(x * 1.44269504f); }
};
template <class S>
using ExpOf = std::conditional_t<sizeof(S) == 2, BriefExp, Exp>;

// ---- 16 bytes at a time

// N elements beside each other as they lie in memory, moved and filled in the widest words that N elements fill.
template <class T, int N>
struct Run {
  static constexpr int kSize = N, kBytes = N * sizeof(T), kAligned = kBytes < 16 ? kBytes : 16;
  using Word =
      std::conditional_t<kBytes >= 16, uint4,
                         std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  union {
    Word words[kBytes / kAligned];
    T v[N];
    uint32_t bits[kBytes < 4 ? 1 : kBytes / 4];
  };
  __device__ __forceinline__ Run() {}
};
template <class S>  // the 16 bytes of a thread's load
using Pack = Run<S, 16 / sizeof(S)>;

__device__ __forceinline__ bool aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % unsigned(bytes) == 0;
}
template <class T, int N>  // p: aligned to kAligned
__device__ __forceinline__ Run<T, N> load_run(const void* p) {
  using R = Run<T, N>;
  R run;
  expect_aligned(p, R::kAligned);
#pragma unroll
  for (int i = 0; i < R::kBytes / R::kAligned; i++) run.words[i] = static_cast<const typename R::Word*>(p)[i];
  return run;
}
template <class S>
__device__ __forceinline__ Pack<S> load_pack(const uint4* p) {
  return load_run<S, Pack<S>::kSize>(p);
}
// Past the L1 and first to leave the L2: nothing in this kernel reads it again.
template <class S>
__device__ __forceinline__ void store_pack(uint4* p, const Pack<S>& pack) {
  expect_aligned(p, 16);
  __stcs(p, pack.words[0]);
}
template <class T, int N>  // p: aligned to kAligned
__device__ __forceinline__ void store_aligned_run(T* p, const Run<T, N>& run) {
  using R = Run<T, N>;
  expect_aligned(p, R::kAligned);
#pragma unroll
  for (int i = 0; i < R::kBytes / R::kAligned; i++) __stcs(reinterpret_cast<typename R::Word*>(p) + i, run.words[i]);
}
template <class T, int N>
__device__ __forceinline__ void store_run(T* p, const Run<T, N>& run) {
  if (aligned(p, Run<T, N>::kAligned)) return store_aligned_run(p, run);
#pragma unroll
  for (int k = 0; k < N; k++) p[k] = run.v[k];
}
template <class A, class T, int N>
__device__ __forceinline__ void widen_run(const Run<T, N>& run, A (&out)[N]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && sizeof(A) == 4 &&
                N % 2 == 0) {  // the upper half of a float: one instruction
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      out[2 * i] = as_float(run.bits[i] << 16);
      out[2 * i + 1] = as_float(run.bits[i] & 0xFFFF0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = widen<A>(run.v[i]);
  }
}

// U runs of elements of type T, run u from data + at[u] on where it is wanted, whole runs apart from each other: all
// loads are under way before the first result is used.
template <class T, class A, int U, int N>
__device__ __forceinline__ void load_aligned_runs(const void* data, const int64_t (&at)[U], const bool (&wanted)[U],
                                                  A (&out)[U][N]) {
  Run<T, N> raw[U];
#pragma unroll
  for (int u = 0; u < U; u++) {
    if (wanted[u]) raw[u] = load_run<T, N>(static_cast<const T*>(data) + at[u]);
  }
#pragma unroll
  for (int u = 0; u < U; u++) widen_run(raw[u], out[u]);
}
template <class T, class A, int U, int N>
__device__ __forceinline__ void load_runs(const void* data, const int64_t (&at)[U], const bool (&wanted)[U],
                                          A (&out)[U][N]) {
  const T* const first = static_cast<const T*>(data);
  if (aligned(first + at[0], Run<T, N>::kAligned)) return load_aligned_runs<T>(data, at, wanted, out);
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int k = 0; k < N; k++) out[u][k] = wanted[u] ? widen<A>(first[at[u] + k]) : A(0);
  }
}

// A pack of -inf: logits that change nothing.
template <class S>
__device__ __forceinline__ Pack<S> nothing() {
  Pack<S> pack;
  switch (kDtype<S>) {  // by bits: one word is one instruction
    case Dtype::f64:
      pack.words[0] = {0, 0xFFF00000u, 0, 0xFFF00000u};
      break;
    case Dtype::f32:
      pack.words[0] = {0xFF800000u, 0xFF800000u, 0xFF800000u, 0xFF800000u};
      break;
    case Dtype::f16:
      pack.words[0] = {0xFC00FC00u, 0xFC00FC00u, 0xFC00FC00u, 0xFC00FC00u};
      break;
    default:
      pack.words[0] = {0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u};
  }
  return pack;
}

// A run of n elements: `head` up to the first 16-byte boundary, then packs, then a tail. Head and tail are the
// `single` elements, addressed by at(0) ... at(single - 1).
template <class S>
struct Cut {
  int64_t head, packs, single;

  __device__ Cut(bool packed, const S* p, int64_t n) {
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
    head = !packed ? n : misaligned ? Pack<S>::kSize - misaligned : 0;
    if (head > n) head = n;
    packs = (n - head) / Pack<S>::kSize;
    single = n - packs * Pack<S>::kSize;
  }
  __device__ int64_t at(int64_t i) const { return i < head ? i : i + packs * Pack<S>::kSize; }

  // For a run q of the same length and another alignment: keeps the packs that lie in two aligned ones within q, and
  // returns how many elements into the first.
  __device__ int straddle(const S* q) {
    constexpr int N = Pack<S>::kSize;
    const int64_t n = packs * N + single;
    const int into = int(reinterpret_cast<uintptr_t>(q + head) % 16 / sizeof(S));
    if (into > head) head += N;
    packs = (n - head + into) / N - 1;
    if (head > n || packs < 0) head = n, packs = 0;
    single = n - packs * N;
    return into;
  }
};

// The pack that starts `into` elements into `low` and ends in `high`, the pack behind it: the words by 2, by 1, and by
// the half of one.
template <class S>
__device__ __forceinline__ Pack<S> straddling(const Pack<S>& low, const Pack<S>& high, int into) {
  const int bytes = into * int(sizeof(S));
  uint32_t w[8];
#pragma unroll
  for (int k = 0; k < 4; k++) w[k] = low.bits[k], w[k + 4] = high.bits[k];
#pragma unroll
  for (int k = 0; k < 6; k++) w[k] = bytes & 8 ? w[k + 2] : w[k];
#pragma unroll
  for (int k = 0; sizeof(S) < 8 && k < 5; k++) w[k] = bytes & 4 ? w[k + 1] : w[k];
  Pack<S> pack;
#pragma unroll
  for (int k = 0; k < 4; k++) pack.bits[k] = sizeof(S) < 4 ? __funnelshift_r(w[k], w[k + 1], bytes % 4 * 8) : w[k];
  return pack;
}

// Whether a run can be read in packs of S that start where those of `p` start.
template <class S>
__device__ __forceinline__ bool packs_with(const void* p, const Operand& t, int64_t offset) {
  const S* q = static_cast<const S*>(t.data) + offset;
  return t.dtype == kDtype<S> && t.class_stride == 1 &&
         (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(q)) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(q) % sizeof(S) == 0;
}

}  // namespace cece::cuda
