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

// Element i of memory of any dtype, for operands that are seldom of the kernel's own type; of any float dtype.
template <class A>
__device__ __forceinline__ A load_float(const Operand& t, int64_t i) {
  switch (t.dtype) {
    case Dtype::f64: return A(static_cast<const double*>(t.data)[i]);
    case Dtype::f16: return widen<A>(static_cast<const __half*>(t.data)[i]);
    case Dtype::bf16: return widen<A>(static_cast<const __nv_bfloat16*>(t.data)[i]);
    default: return A(static_cast<const float*>(t.data)[i]);
  }
}
template <class A>
__device__ __forceinline__ A load_as(const Operand& t, int64_t i) {
  switch (t.dtype) {
    case Dtype::u8: return A(static_cast<const uint8_t*>(t.data)[i]);
    case Dtype::i8: return A(static_cast<const int8_t*>(t.data)[i]);
    case Dtype::i16: return A(static_cast<const int16_t*>(t.data)[i]);
    case Dtype::i32: return A(static_cast<const int32_t*>(t.data)[i]);
    case Dtype::i64: return A(static_cast<const int64_t*>(t.data)[i]);
    default: return load_float<A>(t, i);
  }
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
      case Dtype::f32: static_cast<float*>(t.data)[i] = float(value); return;
      case Dtype::f16: static_cast<__half*>(t.data)[i] = __float2half_rn(float(value)); return;
      case Dtype::bf16: static_cast<__nv_bfloat16*>(t.data)[i] = __float2bfloat16_rn(float(value)); return;
      default: break;
    }
  }
  static_cast<S*>(t.data)[i] = narrow<S>(value);
}

// Where element `row` of the merged dimensions is.
__device__ __forceinline__ int64_t offset_of(const Shape& s, const Operand& t, int64_t row) {
  int64_t offset = 0;
  for (int d = s.dims - 1; d > 0; d--) {
    const int64_t rest = row / s.size[d];
    offset += (row - rest * s.size[d]) * t.stride[d];
    row = rest;
  }
  return s.dims ? offset + row * t.stride[0] : 0;
}

// ---- 16 bytes at a time

template <class S>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(S);
  S v[kSize];
};
template <class S>
__device__ __forceinline__ Pack<S> load_pack(const S* p) {
  return *reinterpret_cast<const Pack<S>*>(p);
}
// Past the L1 and first to leave the L2: nothing in this kernel reads it again.
template <class S>
__device__ __forceinline__ void store_pack(S* p, const Pack<S>& pack) {
  __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&pack));
}
template <class A, class S>
__device__ __forceinline__ void widen_pack(const Pack<S>& pack, A* out) {
#pragma unroll
  for (int i = 0; i < Pack<S>::kSize; i++) out[i] = widen<A>(pack.v[i]);
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
};

// Whether a run can be read in packs of S that start where those of `p` start.
template <class S>
__device__ __forceinline__ bool packs_with(const void* p, const Operand& t, int64_t offset) {
  const S* q = static_cast<const S*>(t.data) + offset;
  return t.dtype == kDtype<S> && t.class_stride == 1 &&
         (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(q)) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(q) % sizeof(S) == 0;
}

}  // namespace cece::cuda
