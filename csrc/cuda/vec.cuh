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
    case Dtype::f64:
      return A(static_cast<const double*>(t.data)[i]);
    case Dtype::f16:
      return widen<A>(static_cast<const __half*>(t.data)[i]);
    case Dtype::bf16:
      return widen<A>(static_cast<const __nv_bfloat16*>(t.data)[i]);
    default:
      return A(static_cast<const float*>(t.data)[i]);
  }
}
template <class A>
__device__ __forceinline__ A load_as(const Operand& t, int64_t i) {
  switch (t.dtype) {
    case Dtype::u8:
      return A(static_cast<const uint8_t*>(t.data)[i]);
    case Dtype::i8:
      return A(static_cast<const int8_t*>(t.data)[i]);
    case Dtype::i16:
      return A(static_cast<const int16_t*>(t.data)[i]);
    case Dtype::i32:
      return A(static_cast<const int32_t*>(t.data)[i]);
    case Dtype::i64:
      return A(static_cast<const int64_t*>(t.data)[i]);
    default:
      return load_float<A>(t, i);
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

// Elements beside each other as they lie in memory: four words, which are moved and filled as such.
template <class S>
struct Pack {
  static constexpr int kSize = 16 / sizeof(S);
  union {
    uint4 words;
    S v[kSize];
  };
  __device__ __forceinline__ Pack() {}
};
template <class S>
__device__ __forceinline__ Pack<S> load_pack(const uint4* p) {
  Pack<S> pack;
  pack.words = *p;
  return pack;
}
// Past the L1 and first to leave the L2: nothing in this kernel reads it again.
template <class S>
__device__ __forceinline__ void store_pack(uint4* p, const Pack<S>& pack) {
  __stcs(p, pack.words);
}
template <class A, class S>
__device__ __forceinline__ void widen_pack(const Pack<S>& pack, A (&out)[Pack<S>::kSize]) {
  if constexpr (kDtype<S> == Dtype::bf16 && sizeof(A) == 4) {  // the upper half of a float: one instruction each
    const uint32_t word[] = {pack.words.x, pack.words.y, pack.words.z, pack.words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = as_float(word[i] << 16);
      out[2 * i + 1] = as_float(word[i] & 0xFFFF0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Pack<S>::kSize; i++) out[i] = widen<A>(pack.v[i]);
  }
}

// A pack of -inf: logits that change nothing.
template <class S>
__device__ __forceinline__ Pack<S> nothing() {
  Pack<S> pack;
  switch (kDtype<S>) {  // by bits: one word is one instruction
    case Dtype::f64:
      pack.words = {0, 0xFFF00000u, 0, 0xFFF00000u};
      break;
    case Dtype::f32:
      pack.words = {0xFF800000u, 0xFF800000u, 0xFF800000u, 0xFF800000u};
      break;
    case Dtype::f16:
      pack.words = {0xFC00FC00u, 0xFC00FC00u, 0xFC00FC00u, 0xFC00FC00u};
      break;
    default:
      pack.words = {0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u, 0xFF80FF80u};
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
