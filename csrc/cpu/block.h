// Blocks of a tensor as lanes of Acc in L1: the one place where dtypes, strides and broadcasting are dealt with.
// A kernel asks for a run of elements and gets a pointer: into the tensor itself where that already is a run of
// Acc, else into its own buffer.
#pragma once
#include "../args.h"
#include "kernels.h"
#include "vec.h"

namespace cece::cpu {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kBlock = 1024;  // elements of a buffer: a few of them stay in a 32 KiB L1

template <class T>
inline T& as(Scratch& scratch) {
  static_assert(sizeof(T) <= sizeof(Scratch) && alignof(T) <= alignof(Scratch) && std::is_trivial_v<T>);
  return reinterpret_cast<T&>(scratch);
}

template <class S>
struct Type {
  using type = S;
};

// The dtype table: f(Type<S>{}) with the C++ type S.
template <class F>
inline void visit(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(Type<double>{});
    case Dtype::f32:
      return f(Type<float>{});
    case Dtype::f16:
      return f(Type<Half>{});
    case Dtype::bf16:
      return f(Type<BFloat16>{});
    case Dtype::u8:
      return f(Type<uint8_t>{});
    case Dtype::i8:
      return f(Type<int8_t>{});
    case Dtype::i16:
      return f(Type<int16_t>{});
    case Dtype::i32:
      return f(Type<int32_t>{});
    case Dtype::i64:
      return f(Type<int64_t>{});
  }
}

inline int64_t size_of(Dtype dtype) {
  constexpr int64_t size[] = {8, 4, 2, 2, 1, 1, 2, 4, 8};
  return size[int(dtype)];
}

template <class S>
constexpr bool is_reduced = std::is_same_v<S, Half> || std::is_same_v<S, BFloat16>;
inline auto widen(Vec<Half> x) { return at::vec::convert_half_float(x); }
inline auto widen(Vec<BFloat16> x) { return at::vec::convert_bfloat16_float(x); }
inline auto narrow(Type<Half>, Vec<float> a, Vec<float> b) { return at::vec::convert_float_half(a, b); }
inline auto narrow(Type<BFloat16>, Vec<float> a, Vec<float> b) { return at::vec::convert_float_bfloat16(a, b); }

template <class A, class S>
inline void convert(const S* x, int64_t n, A* out) {
  int64_t i = 0;
  if constexpr (is_reduced<S> && std::is_same_v<A, float>) {
    for (; i + Vec<S>::size() <= n; i += Vec<S>::size()) {
      const auto [low, high] = widen(Vec<S>::loadu(x + i));
      low.store(out + i);
      high.store(out + i + Vec<float>::size());
    }
  }
  for (; i < n; i++) out[i] = static_cast<A>(x[i]);
}

template <class A, class S>
inline void convert_back(const A* x, int64_t n, S* out) {
  int64_t i = 0;
  if constexpr (is_reduced<S> && std::is_same_v<A, float>) {
    for (; i + Vec<S>::size() <= n; i += Vec<S>::size()) {
      narrow(Type<S>{}, Vec<float>::loadu(x + i), Vec<float>::loadu(x + i + Vec<float>::size())).store(out + i);
    }
  }
  for (; i < n; i++) out[i] = static_cast<S>(x[i]);
}

// Not inlined: among much else the compiler makes a slower loop of it (16 bits: 20 % of a short row's time).
template <class A, class S>
__attribute__((noinline)) void gather_strided(const S* x, int64_t stride, int64_t n, A* __restrict out) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<A>(x[i * stride]);
}

template <class S>
constexpr Dtype dtype_of = std::is_same_v<S, float>    ? Dtype::f32
                           : std::is_same_v<S, double> ? Dtype::f64
                           : std::is_same_v<S, Half>   ? Dtype::f16
                                                       : Dtype::bf16;

// Elements offset, offset + stride, ... of a tensor, n of them; buffer holds n.
template <class A>
inline const A* load(const Operand& t, int64_t offset, int64_t stride, int64_t n, A* __restrict buffer) {
  if (t.dtype == dtype_of<A> && stride == 1) return static_cast<const A*>(t.data) + offset;
  visit(t.dtype, [&](auto type) {
    const auto* x = static_cast<const typename decltype(type)::type*>(t.data) + offset;
    if (stride == 1) {
      convert(x, n, buffer);
    } else if (stride == 0) {
      std::fill_n(buffer, n, static_cast<A>(*x));
    } else {
      gather_strided(x, stride, n, buffer);
    }
  });
  return buffer;
}

// Where to compute elements that `store` then puts there.
template <class A>
inline A* room(const Operand& t, int64_t offset, int64_t stride, A* buffer) {
  return t.dtype == dtype_of<A> && stride == 1 ? static_cast<A*>(t.data) + offset : buffer;
}
template <class A>
inline void store(const Operand& t, int64_t offset, int64_t stride, int64_t n, const A* __restrict x) {
  if (t.dtype == dtype_of<A> && stride == 1) return;
  visit(t.dtype, [&](auto type) {
    auto* out = static_cast<typename decltype(type)::type*>(t.data) + offset;
    if (stride == 1) {
      convert_back(x, n, out);
    } else {
      for (int64_t i = 0; i < n; i++) out[i * stride] = static_cast<typename decltype(type)::type>(x[i]);
    }
  });
}

template <class A>
inline A load_one(const Operand& t, int64_t offset) {
  A value{};
  visit(t.dtype,
        [&](auto type) { value = static_cast<A>(static_cast<const typename decltype(type)::type*>(t.data)[offset]); });
  return value;
}
template <class A>
inline void store_one(const Operand& t, int64_t offset, A value) {
  visit(t.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    static_cast<S*>(t.data)[offset] = static_cast<S>(value);
  });
}

inline int64_t offset_of(const Shape& s, const Operand& t, int64_t row) {
  int64_t offset = 0;
  for (int d = s.dims - 1; d > 0; d--) {
    offset += row % s.size[d] * t.stride[d];
    row /= s.size[d];
  }
  return s.dims ? offset + row * t.stride[0] : 0;
}

// f(i, count) for vectors of a run: count is the vector's size but for a last, shorter one.
template <class A, class F>
inline __attribute__((always_inline)) void each_vector(int64_t n, F&& f) {
  constexpr int64_t V = Vec<A>::size();
  int64_t i = 0;
  for (; i + V <= n; i += V) f(i, V);
  if (i < n) f(i, n - i);
}
// The same, with f(i, count, k): k = 0 ... kWays - 1 in turn, constants to the compiler, so that an array of sums that
// it indexes stays in registers.
template <class A, int kWays, class F>
inline __attribute__((always_inline)) void each_vector_in_turn(int64_t n, F&& f) {
  constexpr int64_t V = Vec<A>::size();
  int64_t i = 0;
  for (; i + kWays * V <= n; i += kWays * V) {
    for (int k = 0; k < kWays; k++) f(i + k * V, V, k);
  }
  for (; i + V <= n; i += V) f(i, V, 0);
  if (i < n) f(i, n - i, 0);
}
// 0, 1, 2, ...: a lane's own number
template <class A>
inline Vec<A> lane_numbers() {
  return Vec<A>::template arange<A>(0, 1);
}
// x with `value` in all lanes but the first `count`, and in one lane
template <class A>
inline Vec<A> first_lanes(Vec<A> x, int64_t count, A value = 0) {
  return select(greater(Vec<A>(A(count)), lane_numbers<A>()), x, Vec<A>(value));
}
template <class A>
inline Vec<A> with_lane(Vec<A> x, int64_t lane, A value) {
  return select(equal(lane_numbers<A>(), Vec<A>(A(lane))), Vec<A>(value), x);
}
template <class A>
inline __attribute__((always_inline)) Vec<A> load_vector(const A* x, int64_t count) {
  if (count == Vec<A>::size()) return Vec<A>::loadu(x);
#ifdef CPU_CAPABILITY_AVX2  // as at::vec has it, it goes through memory
  if constexpr (std::is_same_v<A, float>) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes));
  }
#endif
  return Vec<A>::loadu(x, count);
}
template <class A>
inline __attribute__((always_inline)) void store_vector(A* out, Vec<A> x, int64_t count) {
  count == Vec<A>::size() ? x.store(out) : x.store(out, count);
}

// A gradient too large to be still in a cache when it is read: its lines are written whole, without being read first.
// That is a third of the memory traffic of a backward pass.
inline bool worth_streaming(const void* from, const Operand& to, int64_t elements) {
  constexpr int64_t kBytes = 8 << 20;
  return from != to.data && elements * size_of(to.dtype) >= kBytes;
}
// Stores a vector past the caches where its place is aligned; end_streaming() before another thread reads it.
template <class A>
inline __attribute__((always_inline)) void stream_vector(A* out, Vec<A> x, int64_t count) {
  constexpr int64_t kBytes = Vec<A>::size() * sizeof(A);
  if (count == Vec<A>::size() && reinterpret_cast<uintptr_t>(out) % kBytes == 0) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(out), at::vec::cast<int32_t>(at::vec::cast<float>(x)));
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(out), at::vec::cast<int32_t>(at::vec::cast<float>(x)));
#endif
  }
  store_vector(out, x, count);
}
inline void end_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// What a loop along a row takes at a time of elements S: a vector, or a register of bfloat16, which is two, elements at
// even places and at odd ones. One instruction makes either, where their order would take four, and a sum has none.
template <class A, class S>
struct Pack {
  static constexpr int64_t kVectors = 1, kSize = Vec<A>::size();
  Vec<A> v[kVectors];

  static Pack load(const S* x) { return {{Vec<A>::loadu(x)}}; }
  void store(S* out) const { v[0].store(out); }
  void stream(S* out) const { stream_vector(out, v[0], kSize); }
};
template <>
struct Pack<float, BFloat16> {
  static constexpr int64_t kVectors = 2, kSize = 2 * Vec<float>::size();
  Vec<float> v[kVectors];

  static Pack load(const BFloat16* x) {
    const auto [even, odd] = widen_pairs(Vec<int32_t>::loadu(x));
    return {{even, odd}};
  }
  void store(BFloat16* out) const { narrow_pairs(v[0], v[1]).store(out); }
  void stream(BFloat16* out) const {
    const Vec<float> bits = at::vec::cast<float>(narrow_pairs(v[0], v[1]));
    stream_vector(reinterpret_cast<float*>(out), bits, Vec<float>::size());
  }
};
// Elements i ... of n, filled up
template <class A, class S>
inline Pack<A, S> load_filled(const S* x, int64_t i, int64_t n, A filling) {
  using P = Pack<A, S>;
  if (i + P::kSize <= n) return P::load(x + i);
  if constexpr (P::kVectors == 1) {
    const int64_t count = std::max<int64_t>(n - i, 0);
    return {{first_lanes(load_vector(x + i, count), count, filling)}};
  } else {
    S few[P::kSize];
    std::fill_n(few, P::kSize, S(filling));
#ifdef CPU_CAPABILITY_AVX512  // in one piece, or the load waits for the stores
    const __mmask32 mask = (uint64_t(1) << std::max<int64_t>(n - i, 0)) - 1;
    _mm512_storeu_si512(few, _mm512_mask_loadu_epi16(_mm512_loadu_si512(few), mask, x + i));
#else
    for (int64_t j = i; j < n; j++) few[j - i] = x[j];
#endif
    return P::load(few);
  }
}
// Its first elements, `count` of them
template <class A, class S>
inline void store_few(const Pack<A, S>& p, S* out, int64_t count) {
  if constexpr (Pack<A, S>::kVectors == 1) {
    store_vector(out, p.v[0], count);
  } else {
    S few[Pack<A, S>::kSize];
    p.store(few);
    std::copy_n(few, count, out);
  }
}
// With element j replaced, if it is there
template <class A, class S>
inline Pack<A, S> with_element(Pack<A, S> p, int64_t j, A value) {
  constexpr int64_t kVectors = Pack<A, S>::kVectors;
  for (int64_t k = 0; k < kVectors; k++) {
    const int64_t lane = j % kVectors == k ? j / kVectors : -1;
    p.v[k] = with_lane(p.v[k], lane, value);
  }
  return p;
}

// Lane i of the result is lane i ^ kFar, kFar a power of two.
template <int kFar, class A>
inline Vec<A> swap_lanes(Vec<A> x) {
  A lane[Vec<A>::size()], other[Vec<A>::size()];
  x.store(lane);
  for (int i = 0; i < Vec<A>::size(); i++) other[i] = lane[i ^ kFar];
  return Vec<A>::loadu(other);
}
#if defined(CPU_CAPABILITY_AVX512)
template <int kFar>
inline Vec<float> swap_lanes(Vec<float> x) {
  if constexpr (kFar >= 4) return _mm512_shuffle_f32x4(x, x, kFar == 8 ? 0x4e : 0xb1);
  return _mm512_permute_ps(x, kFar == 2 ? 0x4e : 0xb1);
}
#elif defined(CPU_CAPABILITY_AVX2)
template <int kFar>
inline Vec<float> swap_lanes(Vec<float> x) {
  if constexpr (kFar == 4) return _mm256_permute2f128_ps(x, x, 1);
  return _mm256_permute_ps(x, kFar == 2 ? 0x4e : 0xb1);
}
#endif
template <class A>
inline A first_lane(Vec<A> x) {
  A lane[Vec<A>::size()];
  return x.store(lane), lane[0];
}
// combine() over the lanes, as a tree
template <int kFar, class A, class F>
inline __attribute__((always_inline)) A reduce_lanes_from(Vec<A> x, F&& combine) {
  if constexpr (kFar == 0) {
    return first_lane(x);
  } else {
    return reduce_lanes_from<kFar / 2>(combine(x, swap_lanes<kFar>(x)), combine);
  }
}
template <class A, class F>
inline A reduce_lanes(Vec<A> x, F&& combine) {
  return reduce_lanes_from<Vec<A>::size() / 2>(x, combine);
}
template <class A>
inline A sum_lanes(Vec<A> x) {
  return reduce_lanes(x, [](Vec<A> a, Vec<A> b) { return a + b; });
}

// The lowest index that any thread reports.
inline void report(int64_t* first, int64_t index) {
  int64_t seen = __atomic_load_n(first, __ATOMIC_RELAXED);
  while (index < seen && !__atomic_compare_exchange_n(first, &seen, index, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace
}  // namespace cece::cpu
