// Divergences of two rows on a GPU: a group of lanes a row, as tune.h's kRowLaunches has it for one.
//
// Forward reads both rows twice, the second time from the L2 where they fit: once for their log-sums, once for the sums
// that a divergence is made of. Backward reads both once and writes a gradient. Arithmetic is near the limit here
// (three exponentials an element forward), so there are no parts of a row and no clusters.
#pragma once
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace cece::cuda {

constexpr int kMergeThreads = 128;  // a row each

// What the threads of a row have seen of it: both log-sums.
template <class A>
struct PairSeen {
  LogSumExp<A> of[2];
  A cold = A(0);  // an empty one takes the other's

  __device__ __forceinline__ void merge(const PairSeen& o) {
    cold = greatest(cold, o.cold);
#pragma unroll
    for (int i = 0; i < 2; i++) of[i].merge(o.of[i], ExpOfScaled<A>{cold});
  }
};
template <int N>
struct PairSums {
  double of[N] = {};
  __device__ __forceinline__ void merge(const PairSums& o) {
    for (int k = 0; k < N; k++) of[k] += o.of[k];
  }
};

// Where the elements of a row of x, of y and of a gradient start, cut into packs if all three can be.
template <class S>
struct PairCut {
  int64_t at_x, at_y, at_grad;
  Cut<S> cut;

  __device__ PairCut(const DivergenceArgs& a, int64_t row, bool writes)
      : at_x(offset_of(a.rows, a.x, row)),
        at_y(offset_of(a.rows, a.y, row)),
        at_grad(writes ? offset_of(a.rows, a.grad, row) : 0),
        cut(packs_with<S>(data(a), a.x, at_x) && packs_with<S>(data(a), a.y, at_y) &&
                (!writes || packs_with<S>(data(a), a.grad, at_grad)),
            data(a), a.classes) {}
  __device__ const S* data(const DivergenceArgs& a) const { return static_cast<const S*>(a.x.data) + at_x; }

  // f(x, y, i, run) for this thread's runs of N classes from class i on; run: an integral constant, N.
  template <class F>
  __device__ __forceinline__ void each(const DivergenceArgs& a, int lane, int lanes, F&& f) const {
    using A = AccOf<S>;
    constexpr int N = Pack<S>::kSize;
    for (int64_t i = lane; i < cut.packs; i += lanes) {
      const int64_t c = cut.head + i * N;
      const Pack<S> raw[2] = {load_run<S, N>(static_cast<const S*>(a.x.data) + at_x + c),
                              load_run<S, N>(static_cast<const S*>(a.y.data) + at_y + c)};
      A x[N], y[N];
      widen_run(raw[0], x), widen_run(raw[1], y);
      f(x, y, c, std::integral_constant<int, N>());
    }
    for (int64_t i = lane; i < cut.single; i += lanes) {
      const int64_t c = cut.at(i);
      const A x[1] = {load_one<S>(a.x, at_x + c * a.x.class_stride)};
      const A y[1] = {load_float<A>(a.y, at_y + c * a.y.class_stride)};
      f(x, y, c, std::integral_constant<int, 1>());
    }
  }
};

// Element i of a gradient of any float type: y's need not be the kernel's own.
template <class A>
__device__ __forceinline__ void store_float(const Operand& t, int64_t i, A value) {
  visit_float<A>(t.dtype, [&](auto type) {
    using T = decltype(type);
    static_cast<T*>(t.data)[i] = narrow<T>(AccOf<T>(value));
  });
}

template <class A>
__device__ __forceinline__ ClassPair<A> class_pair(const Pair<A>& pair, A x, A y) {
  return ClassPair<A>(pair, pair.certain[0] ? settled(x) : x, pair.certain[1] ? settled(y) : y);
}

template <class S, class Kind>
__global__ void __launch_bounds__(kMaxThreads)
    forward_pairs(const __grid_constant__ DivergenceArgs a, AccOf<S> cold, int lanes) {
  using A = AccOf<S>;
  constexpr int kSums = Kind::kSums;
  const int lane = threadIdx.x & (lanes - 1), group = threadIdx.x / lanes;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + group;
  const bool exists = row < a.rows.count, used = exists && (!a.mask || a.mask[row]);
  const PairCut<S> pairs(a, exists ? row : 0, false);

  PairSeen<A> seen;
  if (used) {
    Tournament<A> of_x, of_y;
    const ExpOfScaled<A> exp{cold};
    pairs.each(a, lane, lanes,
               [&](const auto& x, const auto& y, int64_t, auto) { of_x.push(x, exp), of_y.push(y, exp); });
    seen.of[0] = of_x.log_sum_exp(exp), seen.of[1] = of_y.log_sum_exp(exp), seen.cold = cold;
  }
  seen = merge_group(seen, lanes);
  CECE_SHARED(Slot<Pair<A>>, of_group, kMaxThreads);
  if (lane == 0) {
    of_group[group].put(
        begun_pair<A>(seen.of[0].max, seen.of[0].log_sum(), seen.of[1].max, seen.of[1].log_sum(), a.cold));
  }
  __syncthreads();
  Pair<A> pair = of_group[group].get();

  PairSums<kSums> all;
  if (used) {
    LongSum<A> sums[kSums];
    pairs.each(a, lane, lanes, [&](const auto& x, const auto& y, int64_t, auto run) {
#pragma unroll
      for (int i = 0; i < run; i++) {
        A terms[kSums];
        Kind::terms(class_pair(pair, x[i], y[i]), terms);
#pragma unroll
        for (int k = 0; k < kSums; k++) sums[k].add(terms[k]);
      }
    });
    for (int k = 0; k < kSums; k++) all.of[k] = double(sums[k].value());
  }
  all = merge_group(all, lanes);
  if (!exists || lane != 0) return;
  A loss = A(0);
  if (used) {
    loss = A(finish_pair<Kind>(all.of, a.cold, pair));
  } else {
    pair = Pair<A>{};
  }
  static_cast<A*>(a.loss)[row] = loss;
  save_pair(pair, static_cast<A*>(a.stats) + row, a.rows.count);
}

template <class A>
__global__ void __launch_bounds__(kMergeThreads) merge_pairs(const __grid_constant__ DivergenceArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (row >= a.rows.count) return;
  Pair<A> pair;
  static_cast<A*>(a.loss)[row] =
      A(merge_parts(static_cast<const A*>(a.parts) + row, a.count_parts, a.rows.count, a.cold, pair));
  save_pair(pair, static_cast<A*>(a.stats) + row, a.rows.count);
}

template <class S, class Kind, bool kOfY>
__global__ void __launch_bounds__(kMaxThreads)
    backward_pairs(const __grid_constant__ DivergenceArgs a, AccOf<S> cold, int lanes) {
  using A = AccOf<S>;
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  if (row >= a.rows.count) return;
  const bool used = !a.mask || a.mask[row];
  const PairCut<S> pairs(a, row, true);
  const Pair<A> pair = saved_pair(static_cast<const A*>(a.stats) + row, a.rows.count, cold);
  const A g = static_cast<const A*>(a.grad_loss)[row];
  const auto slope = [&](A x, A y) {
    if (pair.certain[0]) x = settled(x);
    if (pair.certain[1]) y = settled(y);
    return used ? g * (kOfY ? Kind::slope_y(pair, x, y) : Kind::slope_x(pair, x, y)) : A(0);
  };
  pairs.each(a, lane, lanes, [&](const auto& x, const auto& y, int64_t c, auto run) {
    if constexpr (run > 1) {
      Pack<S> grad;
#pragma unroll
      for (int i = 0; i < run; i++) grad.v[i] = narrow<S>(slope(x[i], y[i]));
      store_run(static_cast<S*>(a.grad.data) + pairs.at_grad + c, grad);
    } else {
      store_float(a.grad, pairs.at_grad + c * a.grad.class_stride, slope(x[0], y[0]));
    }
  });
}

template <class S>
struct Divergence {
  using A = AccOf<S>;
  using Args = DivergenceArgs;

  template <class Kernel>
  static void launch_rows(Kernel kernel, const Args& a, const Device& d) {
    if (a.rows.count == 0) return;
    const RowLaunch row = row_launch(a.classes * int64_t(sizeof(S)));
    const int rows_a_block = row.threads / row.lanes;
    launch(kernel, dim3(unsigned((a.rows.count + rows_a_block - 1) / rows_a_block)), row.threads,
           static_cast<cudaStream_t>(d.stream), 1, a, A(a.cold), row.lanes);
  }
  static void forward(const Args& a, const Device& d) {
    launch_rows(a.symmetric ? forward_pairs<S, JensenShannon> : forward_pairs<S, KullbackLeibler>, a, d);
  }
  template <class Kind>
  static void backward_of(const Args& a, const Device& d) {
    launch_rows(a.of_y ? backward_pairs<S, Kind, true> : backward_pairs<S, Kind, false>, a, d);
  }
  static void backward(const Args& a, const Device& d) {
    a.symmetric ? backward_of<JensenShannon>(a, d) : backward_of<KullbackLeibler>(a, d);
  }
  static void merge(const Args& a, const Device& d) {
    if (a.rows.count == 0) return;
    launch(merge_pairs<A>, dim3(unsigned((a.rows.count + kMergeThreads - 1) / kMergeThreads)), kMergeThreads,
           static_cast<cudaStream_t>(d.stream), 1, a);
  }
  static constexpr DivergenceKernels kernels = {forward, backward, std::is_same_v<S, A> ? merge : nullptr};
};

}  // namespace cece::cuda
