// Blocks of a tensor as lanes of Acc in L1: the one place where dtypes, strides and broadcasting are dealt with.
// A kernel asks for a run of elements and gets a pointer: into the tensor itself where that already is a run of
// Acc, else into its own buffer.
#pragma once
#include <bit>

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

// f(i, count) for vectors of a run: count is the vector's size but for a last, shorter one.
template <class A, class F>
inline __attribute__((always_inline)) void each_vector(int64_t n, F&& f) {
  constexpr int64_t V = Vec<A>::size();
  int64_t i = 0;
  for (; i + V <= n; i += V) f(i, V);
  if (i < n) f(i, n - i);
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
#ifdef CPU_CAPABILITY_AVX512  // at::vec's is not inlined everywhere
  if constexpr (std::is_same_v<A, float>) return _mm512_maskz_loadu_ps((1 << count) - 1, x);
#elif defined(CPU_CAPABILITY_AVX2)  // as at::vec has it, it goes through memory
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

template <class S>
constexpr bool is_reduced = std::is_same_v<S, Half> || std::is_same_v<S, BFloat16>;
inline auto widen(Vec<Half> x) { return at::vec::convert_half_float(x); }
inline auto widen(Vec<BFloat16> x) { return at::vec::convert_bfloat16_float(x); }
inline auto narrow(Type<Half>, Vec<float> a, Vec<float> b) { return at::vec::convert_float_half(a, b); }
#ifdef CPU_CAPABILITY_AVX512  // about half the operations of at::vec's
inline Vec<BFloat16> narrow(Type<BFloat16>, Vec<float> a, Vec<float> b) {
  constexpr auto places = [] {
    std::array<int16_t, 32> of{};
    for (int i = 0; i < 32; i++) of[i] = int16_t(2 * (i % 16) + i / 16);
    return of;
  }();
  return Vec<BFloat16>(_mm512_permutexvar_epi16(_mm512_loadu_si512(places.data()), narrow_pairs(a, b)));
}
#else
inline auto narrow(Type<BFloat16>, Vec<float> a, Vec<float> b) { return at::vec::convert_float_bfloat16(a, b); }
#endif

template <class A, class S>
inline void convert(const S* x, int64_t n, A* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<A, S>) {
    for (; i + Vec<A>::size() <= n; i += Vec<A>::size()) Vec<A>::loadu(x + i).store(out + i);
  }
  if constexpr (is_reduced<S> && std::is_same_v<A, float>) {
    for (; i + Vec<S>::size() <= n; i += Vec<S>::size()) {
      const auto [low, high] = widen(Vec<S>::loadu(x + i));
      low.store(out + i);
      high.store(out + i + Vec<float>::size());
    }
  }
#ifdef CPU_CAPABILITY_AVX2  // it has no instruction for these, but for those that 32 bits hold
  if constexpr (std::is_same_v<S, int64_t> && std::is_same_v<A, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m256 a = _mm256_loadu_ps(reinterpret_cast<const float*>(x + i));
      const __m256 b = _mm256_loadu_ps(reinterpret_cast<const float*>(x + i + 4));
      const auto in_order = [](__m256 v) { return _mm256_permute4x64_epi64(_mm256_castps_si256(v), 0xd8); };
      const __m256i low = in_order(_mm256_shuffle_ps(a, b, 0x88)), high = in_order(_mm256_shuffle_ps(a, b, 0xdd));
      if (_mm256_movemask_epi8(_mm256_cmpeq_epi32(high, _mm256_srai_epi32(low, 31))) != -1) break;
      _mm256_storeu_ps(out + i, _mm256_cvtepi32_ps(low));
    }
  }
#endif
  for (; i < n; i++) out[i] = static_cast<A>(x[i]);
}

// A gradient too large to be still in a cache when it is read: its lines are written whole, without being read first.
// That is a third of the memory traffic of a backward pass.
inline bool worth_streaming(const void* from, const Operand& to, int64_t elements) {
  constexpr int64_t kBytes = 8 << 20;
  return from != to.data && elements * size_of(to.dtype) >= kBytes;
}
// Stores a vector past the caches where its place is aligned; end_streaming() before another thread reads it.
template <class S>
inline __attribute__((always_inline)) void stream_vector(S* out, Vec<S> x, int64_t count) {
  constexpr int64_t kBytes = Vec<S>::size() * sizeof(S);
  if (count == Vec<S>::size() && reinterpret_cast<uintptr_t>(out) % kBytes == 0) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(out), std::bit_cast<__m512i>(x));
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(out), std::bit_cast<__m256i>(x));
#endif
  }
  store_vector(out, x, count);
}
// How many of n elements come before the first one whose place is a whole vector's. Rows of 1000 floats begin in the
// middle of one every other time; with these by themselves all others are streamed (8192 rows on a thread, backward:
// 2.8 ms, 1.75 so).
template <class S>
inline int64_t before_whole_vector(const S* out, int64_t n) {
  constexpr uintptr_t kBytes = Vec<S>::size() * sizeof(S);
  return std::min<int64_t>(n, -reinterpret_cast<uintptr_t>(out) % kBytes / sizeof(S));
}
inline void end_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

template <class A, class S>
inline void convert_back(const A* x, int64_t n, S* out, bool stream = false) {
  int64_t i = 0;
  const auto put = [&](Vec<S> v) { stream ? stream_vector(out + i, v, v.size()) : v.store(out + i); };
  if constexpr (std::is_same_v<A, S>) {
    for (; i + Vec<A>::size() <= n; i += Vec<A>::size()) put(Vec<A>::loadu(x + i));
  }
  if constexpr (is_reduced<S> && std::is_same_v<A, float>) {
    for (; i + Vec<S>::size() <= n; i += Vec<S>::size()) {
      put(narrow(Type<S>{}, Vec<float>::loadu(x + i), Vec<float>::loadu(x + i + Vec<float>::size())));
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
constexpr Dtype dtype_of = std::is_same_v<S, float>     ? Dtype::f32
                           : std::is_same_v<S, double>  ? Dtype::f64
                           : std::is_same_v<S, Half>    ? Dtype::f16
                           : std::is_same_v<S, uint8_t> ? Dtype::u8
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

// ---- tiles: kWide rows side by side, class after class

constexpr int64_t kWide = 64, kTileClasses = 96, kTile = kWide * kTileClasses;  // of floats 24 KiB: it stays in L1

// Elements 0 ... 3 of as many rows as there are lanes, `stride` apart: column[c] has element c of each row.
template <class A>
inline void load_columns(const A* x, int64_t stride, Vec<A> (&column)[4]) {
  A lane[4][Vec<A>::size()];
  for (int64_t row = 0; row < Vec<A>::size(); row++) {
    for (int c = 0; c < 4; c++) lane[c][row] = x[row * stride + c];
  }
  for (int c = 0; c < 4; c++) column[c] = Vec<A>::loadu(lane[c]);
}
template <class A>
inline void store_columns(A* out, int64_t stride, const Vec<A> (&column)[4]) {
  A lane[4][Vec<A>::size()];
  for (int c = 0; c < 4; c++) column[c].store(lane[c]);
  for (int64_t row = 0; row < Vec<A>::size(); row++) {
    for (int c = 0; c < 4; c++) out[row * stride + c] = lane[c][row];
  }
}
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// Rows i, i + 4, ... are the quarters of vector i, and each quarter of the four vectors is a 4 x 4 matrix to transpose.
#if defined(CPU_CAPABILITY_AVX512)
#define CECE_512(name) _mm512_##name
inline __m512 load_quarters(const float* x, int64_t step) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(x));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(x + step), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(x + 2 * step), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(x + 3 * step), 3);
}
inline void store_quarters(float* out, int64_t step, __m512 v) {
  _mm_storeu_ps(out, _mm512_castps512_ps128(v));
  _mm_storeu_ps(out + step, _mm512_extractf32x4_ps(v, 1));
  _mm_storeu_ps(out + 2 * step, _mm512_extractf32x4_ps(v, 2));
  _mm_storeu_ps(out + 3 * step, _mm512_extractf32x4_ps(v, 3));
}
#else
#define CECE_512(name) _mm256_##name
inline __m256 load_quarters(const float* x, int64_t step) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), _mm_loadu_ps(x + step), 1);
}
inline void store_quarters(float* out, int64_t step, __m256 v) {
  _mm_storeu_ps(out, _mm256_castps256_ps128(v));
  _mm_storeu_ps(out + step, _mm256_extractf128_ps(v, 1));
}
#endif
template <class Bits>
inline __attribute__((always_inline)) void transpose_quarters(Bits (&v)[4]) {
  const auto low = CECE_512(castps_pd)(CECE_512(unpacklo_ps)(v[0], v[1]));
  const auto high = CECE_512(castps_pd)(CECE_512(unpackhi_ps)(v[0], v[1]));
  const auto low2 = CECE_512(castps_pd)(CECE_512(unpacklo_ps)(v[2], v[3]));
  const auto high2 = CECE_512(castps_pd)(CECE_512(unpackhi_ps)(v[2], v[3]));
  v[0] = CECE_512(castpd_ps)(CECE_512(unpacklo_pd)(low, low2)),
  v[1] = CECE_512(castpd_ps)(CECE_512(unpackhi_pd)(low, low2));
  v[2] = CECE_512(castpd_ps)(CECE_512(unpacklo_pd)(high, high2)),
  v[3] = CECE_512(castpd_ps)(CECE_512(unpackhi_pd)(high, high2));
}
#undef CECE_512
inline __attribute__((always_inline)) void load_columns(const float* x, int64_t stride, Vec<float> (&column)[4]) {
  decltype(load_quarters(x, stride)) v[4];
  for (int i = 0; i < 4; i++) v[i] = load_quarters(x + i * stride, 4 * stride);
  transpose_quarters(v);
  for (int i = 0; i < 4; i++) column[i] = v[i];
}
inline __attribute__((always_inline)) void store_columns(float* out, int64_t stride, const Vec<float> (&column)[4]) {
  decltype(load_quarters(out, stride)) v[4] = {column[0], column[1], column[2], column[3]};
  transpose_quarters(v);
  for (int i = 0; i < 4; i++) store_quarters(out + i * stride, 4 * stride, v[i]);
}
#endif

// f(i, c): rows of adjacent classes are transposed in registers, from row i and class c on. Of the last four classes
// some may come twice.
template <class A, class F>
inline void each_columns(int64_t rows, int64_t classes, F&& f) {
  for (int64_t i = 0; i < rows; i += Vec<A>::size()) {
    for (int64_t c = 0; c < classes; c += 4) f(i, std::min(c, classes - 4));
  }
}
inline bool transposable(const Operand& t, int64_t classes) { return t.class_stride == 1 && classes >= 4; }

// f(row, elements): rows of adjacent classes as runs, one if they are adjacent too
template <class F>
inline void each_run(int64_t along, int64_t rows, int64_t classes, F&& f) {
  if (along == classes) return f(0, rows * classes);
  for (int64_t i = 0; i < rows; i++) f(i, classes);
}
// Rows offset, offset + along, ... of a tensor's adjacent classes as one run; buffer holds it. write_run: and back.
template <class A>
inline const A* rows_in_run(const Operand& t, int64_t offset, int64_t along, int64_t rows, int64_t classes,
                            A* __restrict buffer, bool copy = false) {
  if (t.dtype == dtype_of<A> && along == classes && !copy) return static_cast<const A*>(t.data) + offset;
  visit(t.dtype, [&](auto type) {
    const auto* x = static_cast<const typename decltype(type)::type*>(t.data) + offset;
    each_run(along, rows, classes, [&](int64_t i, int64_t n) { convert(x + i * along, n, buffer + i * classes); });
  });
  return buffer;
}
template <class A>
inline void write_run(const Operand& t, int64_t offset, int64_t along, int64_t rows, int64_t classes,
                      const A* __restrict x, bool stream) {
  visit(t.dtype, [&](auto type) {
    auto* out = static_cast<typename decltype(type)::type*>(t.data) + offset;
    each_run(along, rows, classes,
             [&](int64_t i, int64_t n) { convert_back(x + i * classes, n, out + i * along, stream); });
  });
}

template <class A>
struct Tile {  // element (class c, row i) is data[c * pitch + i]
  A* data;
  int64_t pitch;
};
// A tensor's own memory where that already is a tile of whole vectors, else `other`.
template <class A>
inline Tile<A> tile_in_place(const Operand& t, int64_t offset, int64_t along, int64_t rows, Tile<A> other) {
  const bool is = t.dtype == dtype_of<A> && along == 1 && rows % Vec<A>::size() == 0;
  return is ? Tile<A>{static_cast<A*>(t.data) + offset, t.class_stride} : other;
}

// Rows offset, offset + along, ... of a tensor, `classes` of each, as a tile. What is no whole vector of Acc is staged,
// so that nothing beside the rows is touched.
template <class A>
inline void read_tile(const Operand& t, int64_t offset, int64_t along, int64_t rows, int64_t classes,
                      A* __restrict tile, A* __restrict staging) {
  if (transposable(t, classes)) {
    const bool direct = t.dtype == dtype_of<A> && rows % Vec<A>::size() == 0;
    const A* const x =
        direct ? static_cast<const A*>(t.data) + offset : rows_in_run(t, offset, along, rows, classes, staging, true);
    const int64_t stride = direct ? along : classes;
    return each_columns<A>(rows, classes, [&](int64_t i, int64_t c) {
      Vec<A> column[4];
      load_columns(x + i * stride + c, stride, column);
      for (int k = 0; k < 4; k++) column[k].store(tile + (c + k) * kWide + i);
    });
  }
  visit(t.dtype, [&](auto type) {
    const auto* x = static_cast<const typename decltype(type)::type*>(t.data) + offset;
    for (int64_t c = 0; c < classes; c++) {
      const auto* run = x + c * t.class_stride;
      along == 1 ? convert(run, rows, tile + c * kWide) : gather_strided(run, along, rows, tile + c * kWide);
    }
  });
}

template <class A>
inline void write_tile(const Operand& t, int64_t offset, int64_t along, int64_t rows, int64_t classes,
                       const A* __restrict tile, A* __restrict staging, bool stream) {
  if (transposable(t, classes)) {
    each_columns<A>(rows, classes, [&](int64_t i, int64_t c) {
      Vec<A> column[4];
      for (int k = 0; k < 4; k++) column[k] = Vec<A>::loadu(tile + (c + k) * kWide + i);
      store_columns(staging + i * classes + c, classes, column);
    });
    return write_run(t, offset, along, rows, classes, staging, stream);
  }
  visit(t.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    S* out = static_cast<S*>(t.data) + offset;
    for (int64_t c = 0; c < classes; c++) {
      S* run = out + c * t.class_stride;
      const A* x = tile + c * kWide;
      if (along == 1) {
        convert_back(x, rows, run, stream);
      } else {
        for (int64_t i = 0; i < rows; i++) run[i * along] = static_cast<S>(x[i]);
      }
    }
  });
}

template <class A>
using Lanes = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;  // indices of a vector's lanes
// Lane lane[i] of x in lane i
template <class A>
inline Vec<A> permuted(Vec<A> x, const Lanes<A>* lane) {
  A from[Vec<A>::size()], to[Vec<A>::size()];
  x.store(from);
  for (int64_t i = 0; i < Vec<A>::size(); i++) to[i] = from[lane[i]];
  return Vec<A>::loadu(to);
}
#if defined(CPU_CAPABILITY_AVX512)
inline Vec<float> permuted(Vec<float> x, const int32_t* lane) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(lane), x);
}
inline Vec<double> permuted(Vec<double> x, const int64_t* lane) {
  return _mm512_permutexvar_pd(_mm512_loadu_si512(lane), x);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vec<float> permuted(Vec<float> x, const int32_t* lane) {
  return _mm256_permutevar8x32_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane)));
}
#endif

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
    stream_vector(reinterpret_cast<int32_t*>(out), narrow_pairs(v[0], v[1]), Vec<int32_t>::size());
  }
};
// f(i, count, k) for packs of a run, as each_vector: k = 0, kVectors, ... below kSums in turn, constants to the
// compiler, so that an array of as many vectors of sums that it indexes stays in registers.
template <class P, int kSums, class F>
inline __attribute__((always_inline)) void each_pack(int64_t n, F&& f) {
  constexpr int kWays = kSums / P::kVectors;
  int64_t i = 0;
  for (; i + kWays * P::kSize <= n; i += kWays * P::kSize) {
    for (int k = 0; k < kWays; k++) f(i + k * P::kSize, P::kSize, k * P::kVectors);
  }
  for (; i < n; i += P::kSize) f(i, std::min(n - i, P::kSize), 0);
}
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
#if defined(CPU_CAPABILITY_AVX512)
inline Vec<int32_t> widen_bytes(const uint8_t* x) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Vec<int32_t> widen_words(const uint8_t* x) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vec<int32_t> widen_bytes(const uint8_t* x) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
}
inline Vec<int32_t> widen_words(const uint8_t* x) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
#endif
// Bytes in the order of a pack of S, zeros where there are less than it holds
template <class A, class S>
inline __attribute__((always_inline)) Pack<A, S> load_bytes(const uint8_t* x, int64_t count) {
  using P = Pack<A, S>;
  uint8_t few[P::kSize] = {};
  if (count < P::kSize) std::copy_n(x, count, few), x = few;
  P p;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    using I = Vec<int32_t>;
    const auto number = [](I i) { return at::vec::convert_to_fp_of_same_size<float>(i); };
    if constexpr (P::kVectors == 1) {
      p.v[0] = number(widen_bytes(x));
    } else {
      const I two = widen_words(x);
      p.v[0] = number(two & I(0xff)), p.v[1] = number(two >> I(8));
    }
    return p;
  }
#endif
  for (int64_t k = 0; k < P::kVectors; k++) {
    A lane[Vec<A>::size()];
    for (int64_t i = 0; i < Vec<A>::size(); i++) lane[i] = A(x[i * P::kVectors + k]);
    p.v[k] = Vec<A>::loadu(lane);
  }
  return p;
}
// Which of as many bytes as a vector has lanes are not 0
template <class A>
inline auto not_zero(Type<A>, const uint8_t* x, int64_t count) {
  return greater(load_bytes<A, A>(x, count).v[0], Vec<A>(A(0)));
}
#ifdef CPU_CAPABILITY_AVX512
inline __mmask16 not_zero(Type<float>, const uint8_t* x, int64_t count) {
  const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1 << count) - 1), x);
  return _mm_test_epi8_mask(bytes, bytes);
}
#endif
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
