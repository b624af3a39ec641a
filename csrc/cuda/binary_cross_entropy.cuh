// Elementwise losses on a GPU: every struct of numerics.h that visit_loss knows, forward and backward.
//
// Elements are taken in the order of the input's memory. Where the gradient lies in that order too, 16 bytes of input
// at a time: the target beside it may have any dtype, and weights may be repeated along dimensions. Any other layout
// goes element by element. Kernels of their own, with no instruction but what they need, serve what training does: a
// target of the input's type, float32 or bool, no weights, no mask, one incoming gradient. Bytes: forward reads input
// and target, backward reads them again and writes the gradient, five passes in all.
#pragma once
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace cece::cuda {

// How an operand lies beside the elements: not there; in their order; at (i / inner) % size for element i, that is
// along one dimension of them; or in any other way.
struct Layout {
  enum Kind { absent, flat, along, strided } kind;
  int64_t inner, size;
};
struct Layouts {
  bool packed;  // element by element otherwise
  Layout weight, pos_weight, mask, grad_loss;
};

inline Layout layout_of(const Shape& s, const Operand& t) {
  if (!t.data) return {Layout::absent, 1, 1};
  bool flat = true;
  int along = 0;
  Layout one{Layout::along, 1, 1};
  int64_t expected = 1;
  for (int d = s.dims - 1; d >= 0; d--) {
    flat = flat && t.stride[d] == expected;
    if (t.stride[d] != 0) along += t.stride[d] == 1 ? 1 : 2, one.inner = expected, one.size = s.size[d];
    expected *= s.size[d];
  }
  return flat ? Layout{Layout::flat, 1, 1} : along < 2 ? one : Layout{Layout::strided, 1, 1};
}

// One element's loss and slope; w and p are 1 where absent.
template <class S, class Loss, class A>
__device__ __forceinline__ A loss_of(const Loss& l, A x, A y, A w, A p) {
  const A loss = weighted(w, l.loss(x, y, p, ExpOf<S>()));
  const bool possible = !Loss::kProbabilities || (x >= A(0) && x <= A(1) && y >= A(0) && y <= A(1));
  return possible ? loss : std::numeric_limits<A>::quiet_NaN();
}
template <class S, class Loss, class A>
__device__ __forceinline__ A slope_of(const Loss& l, A x, A y, A w, A p, A g) {
  return l.slope(x, y, p, ExpOf<S>()) * w * g;
}

// The truth of elements i ... i + N - 1: 1 at the classes that their rows list, NaN in a row that lists what is no
// class.
template <class A, int N>
__device__ __forceinline__ void load_listed(const ListedTruth& t, int64_t i, A (&y)[N]) {
  visit_integer(t.labels.dtype, [&](auto type) {
    const auto* const labels = static_cast<const decltype(type)*>(t.labels.data);
    int64_t row = quotient(i, t.classes), first = i - row * t.classes;  // of the first element of this row, its class
    int done = 0;
    while (done < N) {
      const int left = t.classes - first < N - done ? int(t.classes - first) : N - done;
      int64_t from = t.offsets ? t.offsets[row] : row * t.each, to = t.offsets ? t.offsets[row + 1] : from + t.each;
      from = from < 0 ? 0 : from, to = to > t.count ? t.count : to;
      bool bad = false;
#pragma unroll
      for (int k = 0; k < N; k++) y[k] = k >= done ? A(0) : y[k];
      for (int64_t at = from; at < to; at++) {
        const int64_t label = static_cast<int64_t>(labels[at]), place = label - first;
        if (label == t.padding) continue;
        bad = bad || label < 0 || label >= t.classes;
#pragma unroll
        for (int k = 0; k < N; k++) y[k] = k >= done && k < done + left && k - done == place ? A(1) : y[k];
      }
#pragma unroll
      for (int k = 0; k < N; k++) {
        if (bad && k >= done && k < done + left) y[k] = std::numeric_limits<A>::quiet_NaN();
      }
      done += left, row++, first = 0;
    }
  });
}

// Factors beside elements i ... i + N - 1. one(t, i): one of them; run(f): f(T()) with their type.
template <class A, int N, class One, class Run>
__device__ __forceinline__ void load_factors(const Operand& t, const Layout& layout, int64_t i, A (&out)[1][N],
                                             One&& one, Run&& run) {
  const bool wanted[1] = {true};
  int64_t at[1] = {i}, within = 0;
  if (layout.kind == Layout::along) {
    const int64_t n = quotient(i, layout.inner);
    within = i - n * layout.inner, at[0] = n - quotient(n, layout.size) * layout.size;
  }
  if (layout.kind == Layout::absent || (layout.kind == Layout::along && within + N <= layout.inner)) {
    const A same = layout.kind == Layout::absent ? A(1) : one(t, at[0]);
#pragma unroll
    for (int k = 0; k < N; k++) out[0][k] = same;
  } else if (layout.kind == Layout::flat || (layout.inner == 1 && at[0] + N <= layout.size)) {
    run([&](auto type) { load_runs<decltype(type)>(t.data, at, wanted, out); });
  } else {
#pragma unroll
    for (int k = 0; k < N; k++) {
      out[0][k] = one(t, at[0]);
      if (++within == layout.inner) within = 0, at[0] = at[0] + 1 == layout.size ? 0 : at[0] + 1;
    }
  }
}

// What runs of N elements are made of, U runs at a time; the factors of one run.
template <class A, int N, int U>
struct Elements {
  A x[U][N], y[U][N];
};
template <class A, int N>
struct Factors {
  A w[1][N], p[1][N], g[1][N];
  A m[1][N];  // 0 where masked
};
template <class S>
constexpr int kRuns = kDtype<S> == Dtype::f64 ? 1 : 2;  // packs of input a thread has in flight

template <class A>
__device__ __forceinline__ A truth_of(const BinaryCrossEntropyArgs& a, A y) {
  return smoothed(y, A(a.keep), A(a.spread));
}
// T: the target's type, or void where it may be any, and be smoothed.
template <class S, class T, int U>
__device__ __forceinline__ void load_packed(const BinaryCrossEntropyArgs& a, const int64_t (&at)[U],
                                            const bool (&wanted)[U], Elements<AccOf<S>, Pack<S>::kSize, U>& e) {
  Pack<S> raw[U];
#pragma unroll
  for (int u = 0; u < U; u++) {
    if (wanted[u]) raw[u] = load_run<S, Pack<S>::kSize>(static_cast<const S*>(a.input.data) + at[u]);
  }
  if constexpr (std::is_void_v<T>) {
    if (a.listed.labels.data) {
      static_assert(U == 1);
      load_listed(a.listed, at[0], e.y[0]);
    } else {
      visit_dtype(a.target.dtype, [&](auto type) { load_runs<decltype(type)>(a.target.data, at, wanted, e.y); });
    }
#pragma unroll
    for (int k = 0; k < Pack<S>::kSize; k++) e.y[0][k] = truth_of(a, e.y[0][k]);
  } else {
    load_aligned_runs<T>(a.target.data, at, wanted, e.y);
  }
#pragma unroll
  for (int u = 0; u < U; u++) widen_run(raw[u], e.x[u]);
}
template <class A, int N>
__device__ __forceinline__ Factors<A, N> packed_factors(const BinaryCrossEntropyArgs& a, const Layouts& layouts,
                                                        int64_t i) {
  Factors<A, N> f;
  const auto floats = [&](const Operand& t, const Layout& layout, A(&out)[1][N]) {
    load_factors(
        t, layout, i, out, [](const Operand& t, int64_t at) { return load_float<A>(t, at); },
        [&](auto&& load) { visit_float(t.dtype, load); });
  };
  floats(a.weight, layouts.weight, f.w);
  floats(a.pos_weight, layouts.pos_weight, f.p);
  floats(a.grad_loss, layouts.grad_loss, f.g);
  load_factors(
      a.mask, layouts.mask, i, f.m,
      [](const Operand& t, int64_t at) { return A(static_cast<const uint8_t*>(t.data)[at]); },
      [](auto&& load) { load(uint8_t()); });
  return f;
}
template <class A, int N>
__device__ __forceinline__ Factors<A, N> no_factors() {
  Factors<A, N> f;
#pragma unroll
  for (int k = 0; k < N; k++) f.w[0][k] = f.p[0][k] = f.g[0][k] = f.m[0][k] = A(1);
  return f;
}
template <class S>
__device__ __forceinline__ void load_single(const BinaryCrossEntropyArgs& a, const Layouts& layouts, int64_t i,
                                            Elements<AccOf<S>, 1, 1>& e, Factors<AccOf<S>, 1>& f) {
  using A = AccOf<S>;
  const auto factor = [&](const Operand& t, const Layout& layout) {
    return layout.kind == Layout::absent ? A(1) : load_float<A>(t, offset_of(a.shape, t, i));
  };
  e.x[0][0] = load_one<S>(a.input, offset_of(a.shape, a.input, i));
  if (a.listed.labels.data) {
    load_listed(a.listed, i, e.y[0]);
  } else {
    e.y[0][0] = load_as<A>(a.target, offset_of(a.shape, a.target, i));
  }
  e.y[0][0] = truth_of(a, e.y[0][0]);
  f.w[0][0] = factor(a.weight, layouts.weight);
  f.p[0][0] = factor(a.pos_weight, layouts.pos_weight);
  f.g[0][0] = factor(a.grad_loss, layouts.grad_loss);
  f.m[0][0] = a.mask.data ? load_as<A>(a.mask, offset_of(a.shape, a.mask, i)) : A(1);
}

// Every element of this thread, in packs where they are and one by one: f(elements, factors, index in memory order,
// integral_constant N), N elements at a time.
template <class S, class T, class F>
__device__ __forceinline__ void for_elements(const BinaryCrossEntropyArgs& a, const Layouts& layouts, F&& f) {
  using A = AccOf<S>;
  constexpr bool kAny = std::is_void_v<T>;
  constexpr int N = Pack<S>::kSize, U = kAny ? 1 : kRuns<S>;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const Cut<S> cut(layouts.packed, static_cast<const S*>(a.input.data), a.shape.count);
  for (int64_t p = thread; p < cut.packs; p += U * threads) {
    int64_t at[U];
    bool wanted[U];
#pragma unroll
    for (int u = 0; u < U; u++) at[u] = cut.head + (p + u * threads) * N, wanted[u] = p + u * threads < cut.packs;
    Elements<A, N, U> e;
    load_packed<S, T>(a, at, wanted, e);
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (!wanted[u]) break;
      f(e.x[u], e.y[u], kAny ? packed_factors<A, N>(a, layouts, at[u]) : no_factors<A, N>(), at[u]);
    }
  }
  for (int64_t s = thread; s < cut.single; s += threads) {
    const int64_t i = cut.at(s);
    Elements<A, 1, 1> e;
    Factors<A, 1> one;
    load_single<S>(a, layouts, i, e, one);
    f(e.x[0], e.y[0], one, i);
  }
}

// On a multiprocessor: 128, 80 or 64 registers a thread. A loss with parameters needs more, and so does (kMore) a
// forward of targets of any type.
template <class S, class Loss, bool kMore = false>
constexpr int kElementBlocks =
    kDtype<S> == Dtype::f64 || !std::is_empty_v<Loss> ? 2 : (kDtype<S> == Dtype::f16 ? 3 : 4) - kMore;

// The sum of a thread's losses goes on in double; a block leaves one partial sum.
template <class S, class Loss, class T>
__global__ void __launch_bounds__(kElementThreads, kElementBlocks<S, Loss, std::is_void_v<T>>)
    binary_forward(const __grid_constant__ BinaryCrossEntropyArgs a, const __grid_constant__ Layouts layouts,
                   Sums* partial) {
  using A = AccOf<S>;
  A* const losses = static_cast<A*>(a.loss);
  const Loss l(a.own);
  Sums sum;
  for_elements<S, T>(a, layouts, [&](const auto& x, const auto& y, const auto& f, int64_t i) {
    constexpr int N = sizeof(x) / sizeof(A);
    Run<A, N> loss;
    A together = A(0);
#pragma unroll
    for (int k = 0; k < N; k++) {
      loss.v[k] = loss_of<S>(l, x[k], y[k], f.w[0][k], f.p[0][k]);
      if (std::is_void_v<T>) loss.v[k] = select(f.m[0][k] != A(0), loss.v[k], A(0));
      together += loss.v[k];
    }
    sum.a += together;
    if constexpr (std::is_void_v<T>) {
      A used = A(0);
#pragma unroll
      for (int k = 0; k < N; k++) used += f.m[0][k];
      sum.b += used;
    }
    if (!losses) return;
    if constexpr (N > 1) {
      store_run(losses + i, loss);
    } else {
      losses[i] = loss.v[0];
    }
  });
  if (!partial) return;
  sum = merge_group(sum, blockDim.x);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class A>
__global__ void __launch_bounds__(kElementThreads)
    reduce_elements(const __grid_constant__ BinaryCrossEntropyArgs a, const Sums* partial, int count) {
  Sums s;
  for (int i = threadIdx.x; i < count; i += blockDim.x) s.merge(partial[i]);
  s = merge_group(s, blockDim.x);
  if (threadIdx.x != 0) return;
  A* const reduced = static_cast<A*>(a.reduced);
  reduced[0] = A(a.reduction == Reduction::mean ? s.a / double(a.shape.count) : s.a);
  if (a.reduction == Reduction::counted) reduced[1] = A(a.mask.data ? s.b : double(a.shape.count));
}

template <class S, class Loss, class T>
__global__ void __launch_bounds__(kElementThreads, kElementBlocks<S, Loss, std::is_void_v<T>>)
    binary_backward(const __grid_constant__ BinaryCrossEntropyArgs a, const __grid_constant__ Layouts layouts) {
  using A = AccOf<S>;
  A common = A(1);  // what every element's gradient is multiplied by
  if (a.reduction != Reduction::none) common = *static_cast<const A*>(a.grad_loss.data);
  if (a.reduction == Reduction::mean) common *= A(1) / A(a.shape.count);
  const Loss l(a.own);
  for_elements<S, T>(a, layouts, [&](const auto& x, const auto& y, const auto& f, int64_t i) {
    constexpr int N = sizeof(x) / sizeof(A);
    const auto slope = [&](int k) {
      const A slope = slope_of<S>(l, x[k], y[k], f.w[0][k], f.p[0][k], f.g[0][k] * common);
      return std::is_void_v<T> ? select(f.m[0][k] != A(0), slope, A(0)) : slope;
    };
    if constexpr (N > 1) {
      Pack<S> grad;
#pragma unroll
      for (int k = 0; k < N; k++) grad.v[k] = narrow<S>(slope(k));
      store_pack(reinterpret_cast<uint4*>(static_cast<S*>(a.grad_input.data) + i), grad);
    } else {
      store_one<S>(a.grad_input, offset_of(a.shape, a.grad_input, i), slope(0));
    }
  });
}

// ---- launching

template <class S>
struct BinaryCrossEntropyOf {
  using A = AccOf<S>;
  using Args = BinaryCrossEntropyArgs;

  template <class T>
  struct Type {
    using type = T;
  };
  template <class F>
  static void visit_kernel(const Args& a, const Layouts& l, F&& f) {  // f(loss, Type of target)
    const auto address = [](const Operand& t) { return reinterpret_cast<uintptr_t>(t.data); };
    const auto fits = [&](auto type, Dtype dtype) {  // loads begin where those of the input do
      using T = typename decltype(type)::type;
      constexpr int N = Pack<S>::kSize;
      const int64_t head = (16 - address(a.input) % 16) % 16 / sizeof(S);
      return a.target.dtype == dtype && (address(a.target) + head * sizeof(T)) % Run<T, N>::kAligned == 0;
    };
    const auto with = [&](auto loss) {
      if constexpr (std::is_empty_v<decltype(loss)>) {  // one of those that torch has
        const bool plain = l.packed && l.weight.kind == Layout::absent && l.pos_weight.kind == Layout::absent &&
                           l.grad_loss.kind == Layout::absent && l.mask.kind == Layout::absent && a.keep == 1 &&
                           a.spread == 0 && a.target.data;
        if (plain && fits(Type<S>(), kDtype<S>)) return f(loss, Type<S>());
        if (plain && fits(Type<uint8_t>(), Dtype::u8)) return f(loss, Type<uint8_t>());
        if constexpr (sizeof(S) == 2) {
          if (plain && fits(Type<float>(), Dtype::f32)) return f(loss, Type<float>());
        }
      }
      f(loss, Type<void>());
    };
    visit_loss<A>(a.kind, a.own, with);
  }

  static Layouts layouts(const Args& a) {
    const auto of = [&](const Operand& t) { return layout_of(a.shape, t); };
    const auto flat = [&](const Operand& t) { return !t.data || of(t).kind == Layout::flat; };
    // a reduced loss has one incoming gradient, which is not walked along
    const Layout none{Layout::absent, 1, 1};
    Layouts l{true, of(a.weight), of(a.pos_weight), of(a.mask),
              a.reduction == Reduction::none ? of(a.grad_loss) : none};
    const auto address = [](const Operand& t) { return reinterpret_cast<uintptr_t>(t.data); };
    l.packed = a.input.dtype == kDtype<S> && flat(a.input) && flat(a.target) && flat(a.grad_input) &&
               address(a.input) % sizeof(S) == 0;
    for (const Layout& factor : {l.weight, l.pos_weight, l.mask, l.grad_loss})
      l.packed &= factor.kind != Layout::strided;
    if (a.grad_input.data) {
      l.packed &= a.grad_input.dtype == kDtype<S> && (address(a.input) - address(a.grad_input)) % 16 == 0;
    }
    return l;
  }

  static int64_t forward_scratch(const Args& a) {
    return a.reduction == Reduction::none ? 0 : blocks(a) * int64_t(sizeof(Sums));
  }
  static int blocks(const Args& a) { return element_blocks(a.shape.count, Pack<S>::kSize * kRuns<S>); }

  static void forward(const Args& a, const Device& d, void* scratch) {
    const Layouts l = layouts(a);
    const auto stream = static_cast<cudaStream_t>(d.stream);
    auto* const partial = a.reduction == Reduction::none ? nullptr : static_cast<Sums*>(scratch);
    visit_kernel(a, l, [&](auto loss, auto type) {
      const auto kernel = binary_forward<S, decltype(loss), typename decltype(type)::type>;
      launch(kernel, dim3(blocks(a)), kElementThreads, stream, 1, a, l, partial);
    });
    if (partial) launch(reduce_elements<A>, dim3(1), kElementThreads, stream, 1, a, partial, blocks(a));
  }

  static void backward(const Args& a, const Device& d) {
    if (a.shape.count == 0) return;
    const Layouts l = layouts(a);
    const auto stream = static_cast<cudaStream_t>(d.stream);
    visit_kernel(a, l, [&](auto loss, auto type) {
      const auto kernel = binary_backward<S, decltype(loss), typename decltype(type)::type>;
      launch(kernel, dim3(blocks(a)), kElementThreads, stream, 1, a, l);
    });
  }

  static constexpr BinaryCrossEntropyKernels kernels = {forward_scratch, forward, backward};
};

}  // namespace cece::cuda
