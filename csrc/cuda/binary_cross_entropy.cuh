// Elementwise losses on a GPU: binary cross-entropy on logits or on probabilities, forward and backward.
//
// Elements are taken in their logical order. Where input and gradient lie in that order, 16 bytes of input at a time:
// the target beside it then may have any dtype, and weights may be broadcast. Any other layout goes element by element.
// Bytes: forward reads input and target, backward reads them again and writes the gradient, five passes in all.
#pragma once
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace cece::cuda {

// How an operand lies beside the elements: not there, in their order, repeated along all but the last dimension, or
// in any other way.
enum class Layout { absent, flat, last, strided };

struct Layouts {
  bool packed;  // element by element otherwise
  Layout weight, pos_weight, grad_loss;
};

inline Layout layout_of(const Shape& s, const Operand& t) {
  if (!t.data) return Layout::absent;
  bool flat = true, last = true;
  int64_t expected = 1;
  for (int d = s.dims - 1; d >= 0; d--) {
    flat = flat && t.stride[d] == expected;
    last = last && (d == s.dims - 1 || t.stride[d] == 0);
    expected *= s.size[d];
  }
  return flat ? Layout::flat : last ? Layout::last : Layout::strided;
}

// One element's loss and slope; w and p are 1 where absent.
template <class Loss, class A>
__device__ __forceinline__ A loss_of(A x, A y, A w, A p) {
  const A loss = weighted(w, Loss::loss(x, y, p));
  const bool possible = !Loss::kProbabilities || (x >= A(0) && x <= A(1) && y >= A(0) && y <= A(1));
  return possible ? loss : std::numeric_limits<A>::quiet_NaN();
}
template <class Loss, class A>
__device__ __forceinline__ A slope_of(A x, A y, A w, A p, A g) {
  return Loss::slope(x, y, p) * w * g;
}

template <class A, class S, int N>
__device__ __forceinline__ void widen_run(const void* data, int64_t i, A (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; k++) out[k] = widen<A>(static_cast<const S*>(data)[i + k]);
}
// Targets i ... i + N - 1: a pack where they are of type S and aligned, else one by one.
template <class S, int N>
__device__ __forceinline__ void load_targets(const Operand& t, int64_t i, AccOf<S> (&out)[N]) {
  using A = AccOf<S>;
  if (t.dtype == kDtype<S> && reinterpret_cast<uintptr_t>(static_cast<const S*>(t.data) + i) % 16 == 0) {
    return widen_pack(load_pack<S>(reinterpret_cast<const uint4*>(static_cast<const S*>(t.data) + i)), out);
  }
  switch (t.dtype) {
    case Dtype::f64:
      return widen_run<A, double>(t.data, i, out);
    case Dtype::f32:
      return widen_run<A, float>(t.data, i, out);
    case Dtype::f16:
      return widen_run<A, __half>(t.data, i, out);
    case Dtype::bf16:
      return widen_run<A, __nv_bfloat16>(t.data, i, out);
    case Dtype::u8:
      return widen_run<A, uint8_t>(t.data, i, out);
    case Dtype::i8:
      return widen_run<A, int8_t>(t.data, i, out);
    case Dtype::i16:
      return widen_run<A, int16_t>(t.data, i, out);
    case Dtype::i32:
      return widen_run<A, int32_t>(t.data, i, out);
    case Dtype::i64:
      return widen_run<A, int64_t>(t.data, i, out);
  }
}
// Factors beside elements i ... i + N - 1, in[0] being position `column` of the last dimension.
template <class A, int N>
__device__ __forceinline__ void load_factors(const BinaryCrossEntropyArgs& a, const Operand& t, Layout layout,
                                             int64_t i, int64_t column, A (&out)[N]) {
  const int last = a.shape.dims - 1;
  const int64_t inner = last < 0 ? 1 : a.shape.size[last], stride = last < 0 ? 0 : t.stride[last];
#pragma unroll
  for (int k = 0; k < N; k++) {
    if (layout == Layout::absent) {
      out[k] = A(1);
    } else if (layout == Layout::flat) {
      out[k] = load_float<A>(t, i + k);
    } else {
      out[k] = load_float<A>(t, column * stride);
      if (++column == inner) column = 0;
    }
  }
}

// What elements first ... first + N - 1 are made of.
template <class S, int N>
struct Elements {
  using A = AccOf<S>;
  A x[N], y[N], w[N], p[N], g[N];
};
template <class S>
__device__ __forceinline__ auto load_packed(const BinaryCrossEntropyArgs& a, const Layouts& layouts, int64_t i) {
  Elements<S, Pack<S>::kSize> e;
  widen_pack(load_pack<S>(reinterpret_cast<const uint4*>(static_cast<const S*>(a.input.data) + i)), e.x);
  load_targets<S>(a.target, i, e.y);
  const bool repeats =
      layouts.weight == Layout::last || layouts.pos_weight == Layout::last || layouts.grad_loss == Layout::last;
  const int64_t column = repeats && a.shape.dims ? i % a.shape.size[a.shape.dims - 1] : 0;
  load_factors(a, a.weight, layouts.weight, i, column, e.w);
  load_factors(a, a.pos_weight, layouts.pos_weight, i, column, e.p);
  load_factors(a, a.grad_loss, layouts.grad_loss, i, column, e.g);
  return e;
}
template <class S>
__device__ __forceinline__ auto load_single(const BinaryCrossEntropyArgs& a, const Layouts& layouts, int64_t i) {
  using A = AccOf<S>;
  const auto factor = [&](const Operand& t, Layout layout) {
    return layout == Layout::absent ? A(1) : load_float<A>(t, offset_of(a.shape, t, i));
  };
  Elements<S, 1> e;
  e.x[0] = load_one<S>(a.input, offset_of(a.shape, a.input, i));
  e.y[0] = load_as<A>(a.target, offset_of(a.shape, a.target, i));
  e.w[0] = factor(a.weight, layouts.weight);
  e.p[0] = factor(a.pos_weight, layouts.pos_weight);
  e.g[0] = factor(a.grad_loss, layouts.grad_loss);
  return e;
}

// The sum of a thread's losses goes on in double; a block leaves one partial sum.
template <class S, class Loss>
__global__ void __launch_bounds__(kElementThreads, kDtype<S> == Dtype::f64 ? 2 : 4)
    binary_forward(const __grid_constant__ BinaryCrossEntropyArgs a, const __grid_constant__ Layouts layouts,
                   Sums* partial) {
  using A = AccOf<S>;
  constexpr int N = Pack<S>::kSize;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const Cut<S> cut(layouts.packed, static_cast<const S*>(a.input.data), a.shape.count);
  A* const losses = static_cast<A*>(a.loss.data);
  Sums sum;
  for (int64_t p = thread; p < cut.packs; p += threads) {
    const int64_t i = cut.head + p * N;
    const auto e = load_packed<S>(a, layouts, i);
    A of_pack = A(0);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A loss = loss_of<Loss>(e.x[k], e.y[k], e.w[k], e.p[k]);
      of_pack += loss;
      if (losses) losses[i + k] = loss;
    }
    sum.a += of_pack;
  }
  for (int64_t s = thread; s < cut.single; s += threads) {
    const int64_t i = cut.at(s);
    const auto e = load_single<S>(a, layouts, i);
    const A loss = loss_of<Loss>(e.x[0], e.y[0], e.w[0], e.p[0]);
    sum.a += loss;
    if (losses) losses[i] = loss;
  }
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
  *static_cast<A*>(a.reduced) = A(a.reduction == Reduction::mean ? s.a / double(a.shape.count) : s.a);
}

template <class S, class Loss>
__global__ void __launch_bounds__(kElementThreads, kDtype<S> == Dtype::f64 ? 2 : 4)
    binary_backward(const __grid_constant__ BinaryCrossEntropyArgs a, const __grid_constant__ Layouts layouts) {
  using A = AccOf<S>;
  constexpr int N = Pack<S>::kSize;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const Cut<S> cut(layouts.packed, static_cast<const S*>(a.input.data), a.shape.count);
  A common = A(1);  // what every element's gradient is multiplied by
  if (a.reduction != Reduction::none) common = *static_cast<const A*>(a.grad_loss.data);
  if (a.reduction == Reduction::mean) common *= A(1) / A(a.shape.count);
  for (int64_t p = thread; p < cut.packs; p += threads) {
    const int64_t i = cut.head + p * N;
    const auto e = load_packed<S>(a, layouts, i);
    S* const out = static_cast<S*>(a.grad_input.data) + i;
    Pack<S> grad;
#pragma unroll
    for (int k = 0; k < N; k++) {
      grad.v[k] = narrow<S>(slope_of<Loss>(e.x[k], e.y[k], e.w[k], e.p[k], e.g[k] * common));
    }
    store_pack(reinterpret_cast<uint4*>(out), grad);
  }
  for (int64_t s = thread; s < cut.single; s += threads) {
    const int64_t i = cut.at(s);
    const auto e = load_single<S>(a, layouts, i);
    store_one<S>(a.grad_input, offset_of(a.shape, a.grad_input, i),
                 slope_of<Loss>(e.x[0], e.y[0], e.w[0], e.p[0], e.g[0] * common));
  }
}

// ---- launching

template <class S>
struct BinaryCrossEntropyOf {
  using A = AccOf<S>;
  using Args = BinaryCrossEntropyArgs;

  template <class F>
  static void visit_loss(const Args& a, F&& f) {
    a.with_logits ? f(BinaryCrossEntropyWithLogits{}) : f(BinaryCrossEntropy{});
  }

  static Layouts layouts(const Args& a) {
    const auto of = [&](const Operand& t) { return layout_of(a.shape, t); };
    const auto fits = [&](const Operand& t) { return of(t) != Layout::strided; };
    // a reduced loss has one incoming gradient, which is not walked along
    Layouts l{true, of(a.weight), of(a.pos_weight), a.reduction == Reduction::none ? of(a.grad_loss) : Layout::absent};
    l.packed = a.input.dtype == kDtype<S> && of(a.input) == Layout::flat && of(a.target) == Layout::flat &&
               fits(a.weight) && fits(a.pos_weight) && l.grad_loss != Layout::strided &&
               reinterpret_cast<uintptr_t>(a.input.data) % sizeof(S) == 0;
    if (a.grad_input.data) {
      l.packed = l.packed && of(a.grad_input) == Layout::flat && a.grad_input.dtype == kDtype<S> &&
                 (reinterpret_cast<uintptr_t>(a.input.data) - reinterpret_cast<uintptr_t>(a.grad_input.data)) % 16 == 0;
    }
    return l;
  }

  static int64_t forward_scratch(const Args& a) {
    return a.reduction == Reduction::none ? 0 : blocks(a) * int64_t(sizeof(Sums));
  }
  static int blocks(const Args& a) { return element_blocks(a.shape.count, Pack<S>::kSize); }

  static void forward(const Args& a, const Device& d, void* scratch) {
    const auto stream = static_cast<cudaStream_t>(d.stream);
    auto* const partial = a.reduction == Reduction::none ? nullptr : static_cast<Sums*>(scratch);
    visit_loss(a, [&](auto loss) {
      launch(binary_forward<S, decltype(loss)>, dim3(blocks(a)), kElementThreads, stream, 1, a, layouts(a), partial);
    });
    if (partial) launch(reduce_elements<A>, dim3(1), kElementThreads, stream, 1, a, partial, blocks(a));
  }

  static void backward(const Args& a, const Device& d) {
    if (a.shape.count == 0) return;
    const auto stream = static_cast<cudaStream_t>(d.stream);
    visit_loss(a, [&](auto loss) {
      launch(binary_backward<S, decltype(loss)>, dim3(blocks(a)), kElementThreads, stream, 1, a, layouts(a));
    });
  }

  static constexpr BinaryCrossEntropyKernels kernels = {forward_scratch, forward, backward};
};

}  // namespace cece::cuda
