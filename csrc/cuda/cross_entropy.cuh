// Softmax cross-entropy on a GPU: forward and backward, rows over lanes or pixels over threads.
//
// Forward reads the logits once. Every thread keeps a running state of what it has seen; the states of a row's threads
// are merged, in a warp, a block, a cluster, or through memory (a row shared by many blocks). Backward reads the logits
// once more and writes the gradient, rebuilding each probability from the row's saved max and log_sum. tune.h says
// which threads do what.
#pragma once
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace cece::cuda {

enum class Target { hard, smooth, soft };  // a label; a label with smoothing; probabilities

// Blocks of kMaxThreads that shall fit a multiprocessor: what leaves a thread the registers it needs (80, 128, 255).
template <class S, Target K>
constexpr int kResident = kDtype<S> == Dtype::f64 ? 1
                          : K == Target::soft     ? 2
                                                  : kMinBlocks;

template <class A>
struct RowArgs : CrossEntropyArgs {
  A keep, spread;  // 1 - s and s / C: a division of doubles would cost a kernel more than a row

  RowArgs(const CrossEntropyArgs& a)
      : CrossEntropyArgs(a), keep(A(1 - a.label_smoothing)), spread(A(a.label_smoothing / double(a.classes))) {}
};

// ---- the target of a row

constexpr int64_t kIgnored = -1, kImpossible = -2;

// The class index of a row, or kIgnored, or kImpossible.
template <Target K>
__device__ __forceinline__ int64_t label(const CrossEntropyArgs& a, int64_t row) {
  if (K == Target::soft) return kIgnored;
  int64_t y;
  switch (a.label_dtype) {
    case Dtype::u8:
      y = static_cast<const uint8_t*>(a.labels)[row];
      break;
    case Dtype::i8:
      y = static_cast<const int8_t*>(a.labels)[row];
      break;
    case Dtype::i16:
      y = static_cast<const int16_t*>(a.labels)[row];
      break;
    case Dtype::i32:
      y = static_cast<const int32_t*>(a.labels)[row];
      break;
    default:
      y = static_cast<const int64_t*>(a.labels)[row];
  }
  return y == a.ignore_index ? kIgnored : y >= 0 && y < a.classes ? y : kImpossible;
}
// Whether a row has a loss: any with probabilities, else one with a possible label.
template <Target K>
__device__ __forceinline__ bool used(int64_t y) {
  return K == Target::soft || y >= 0;
}

template <class A>
__device__ __forceinline__ A class_weight(const CrossEntropyArgs& a, int64_t c) {
  return a.weight ? static_cast<const A*>(a.weight)[c] : A(1);
}
// The mass of class c beside the label's own; t is its probability, unused with a label.
template <Target K, class A>
__device__ __forceinline__ A mass_of(const RowArgs<A>& a, A t, int64_t c) {
  if (K == Target::hard) return A(0);
  const A q = K == Target::soft ? smoothed(t, a.keep, a.spread) : a.spread;
  return a.weight ? q * static_cast<const A*>(a.weight)[c] : q;
}

// ---- forward: what a thread has seen of a row

// A row, or a part of one, as it is merged.
template <Target K, class A>
struct RowState {
  LogSumExp<A> lse;
  TargetGaps<A> target;

  __device__ __forceinline__ void merge(const RowState& o) {
    const A max = greatest(o.lse.max, lse.max);
    TargetGaps<A> part = o.target;
    part.rebase(o.lse.max, max);
    target.rebase(lse.max, max);
    target = {target.gaps + part.gaps, target.mass + part.mass};
    lse.merge(o.lse);
  }
};
template <class A>
struct RowState<Target::hard, A> {
  LogSumExp<A> lse;
  static constexpr TargetGaps<A> target{};
  __device__ __forceinline__ void merge(const RowState& o) { lse.merge(o.lse); }
};

// A row as one thread reads it. Up to a thousand terms of masses and gaps: a plain sum of equal ones would drift.
template <class S, Target K>
struct Reader {
  using A = AccOf<S>;
  Tournament<A> logits;
  LongSum<A> gaps, mass;

  template <int N>
  __device__ __forceinline__ void push(const A (&x)[N], const A (&q)[N]) {  // masses q, unused with a hard label
    const A before = logits.max;
    logits.push(x, ExpOf<S>());
    if (K == Target::hard) return;
    gaps.add(times(mass.value(), gap(before, logits.max)));
    TargetGaps<A> these;
#pragma unroll
    for (int i = 0; i < N; i++) these.push(q[i], x[i], logits.max);
    gaps.add(these.gaps);
    mass.add(these.mass);
  }
  __device__ __forceinline__ RowState<K, A> state() const {
    if constexpr (K == Target::hard) {
      return {logits.log_sum_exp()};
    } else {
      return {logits.log_sum_exp(), {gaps.value(), mass.value()}};
    }
  }
};

template <class A>
__device__ __forceinline__ A minus_infinity() {  // the logit that changes nothing
  return -std::numeric_limits<A>::infinity();
}

// Classes begin ... end - 1 of a row as the `lane`-th of `lanes` threads reads them.
template <class S, Target K>
__device__ __forceinline__ RowState<K, AccOf<S>> read_classes(const RowArgs<AccOf<S>>& a, int64_t row, int64_t begin,
                                                              int64_t end, int lane, int lanes) {
  using A = AccOf<S>;
  constexpr int N = Pack<S>::kSize, U = K == Target::hard ? kPacks : kPacks / 2;
  constexpr int kAtOnce = K == Target::hard ? 16 : 8, kTogether = N * U < kAtOnce ? U : kAtOnce / N;  // packs a push
  Reader<S, K> reader;
  const int64_t at_x = offset_of(a.rows, a.logits, row) + begin * a.logits.class_stride;
  const int64_t at_t =
      K == Target::soft ? offset_of(a.rows, a.probabilities, row) + begin * a.probabilities.class_stride : 0;
  const S* const x = static_cast<const S*>(a.logits.data) + at_x;
  const S* const t = static_cast<const S*>(a.probabilities.data) + at_t;
  const Cut<S> cut(packs_with<S>(x, a.logits, at_x) && (K != Target::soft || packs_with<S>(x, a.probabilities, at_t)),
                   x, end - begin);

  const uint4* const packs = reinterpret_cast<const uint4*>(x + cut.head);
  const uint4* const packs_t = reinterpret_cast<const uint4*>(t + cut.head);
  for (int64_t p = lane; p < cut.packs; p += U * lanes) {
    Pack<S> raw[U], raw_t[U];
#pragma unroll
    for (int u = 0; u < U; u++) {  // all loads before the first use
      const int64_t i = p + u * lanes;
      raw[u] = i < cut.packs ? load_pack<S>(packs + i) : nothing<S>();
      if (K == Target::soft && i < cut.packs) raw_t[u] = load_pack<S>(packs_t + i);
    }
#pragma unroll
    for (int u = 0; u < U; u += kTogether) {
      A logit[kTogether][N], mass[kTogether][N];
#pragma unroll
      for (int v = 0; v < kTogether; v++) {
        const int64_t i = p + (u + v) * lanes;
        widen_run(raw[u + v], logit[v]);
        if (K == Target::soft) widen_run(raw_t[u + v], mass[v]);
#pragma unroll
        for (int k = 0; K != Target::hard && k < N; k++) {
          mass[v][k] = i < cut.packs ? mass_of<K>(a, mass[v][k], begin + cut.head + i * N + k) : A(0);
        }
      }
      reader.push(reinterpret_cast<const A(&)[kTogether * N]>(logit),
                  reinterpret_cast<const A(&)[kTogether * N]>(mass));
    }
  }
  for (int64_t s = lane; s < cut.single; s += lanes) {
    const int64_t i = cut.at(s);
    const A logit[1] = {load_one<S>(a.logits, at_x + i * a.logits.class_stride)};
    const A p = K == Target::soft ? load_float<A>(a.probabilities, at_t + i * a.probabilities.class_stride) : A(0);
    const A mass[1] = {mass_of<K>(a, p, begin + i)};
    reader.push(logit, mass);
  }
  return reader.state();
}

template <class A>
__device__ __forceinline__ void write_row(const CrossEntropyArgs& a, int64_t row, A max, A log_sum, A mass, A loss) {
  A* const stats = static_cast<A*>(a.stats) + row;
  stats[0] = max;
  stats[a.rows.count] = log_sum;
  stats[2 * a.rows.count] = mass;
  static_cast<A*>(a.loss)[row] = loss;
}

// Statistics and loss of a row; 0 without a label, NaN with an impossible one.
template <class S, Target K>
__device__ __forceinline__ void finish(const RowArgs<AccOf<S>>& a, int64_t row, int64_t y,
                                       const RowState<K, AccOf<S>>& s) {
  using A = AccOf<S>;
  if (!used<K>(y)) {
    const A v = y == kImpossible ? std::numeric_limits<A>::quiet_NaN() : A(0);
    return write_row(a, row, v, v, v, v);
  }
  A kept = A(0), x_y = A(0);
  if (K != Target::soft) {
    kept = a.keep * class_weight<A>(a, y);
    x_y = load_one<S>(a.logits, offset_of(a.rows, a.logits, row) + y * a.logits.class_stride);
  }
  const A log_sum = s.lse.log_sum();
  const TargetGaps<A> target = s.target;
  write_row(a, row, s.lse.max, log_sum, kept + target.mass, row_loss(kept, x_y, target, s.lse.max, log_sum));
}

// How rows are spread over threads, all powers of two but `part`: `lanes` = 1 << shift threads a row; blockIdx.y takes
// `part` of its classes.
struct Spread {
  int lanes, shift;
  int64_t part;

  __device__ int lane() const { return threadIdx.x & (lanes - 1); }
  __device__ int64_t row() const { return int64_t(blockIdx.x) * (blockDim.x >> shift) + (threadIdx.x >> shift); }
  __device__ int64_t begin() const { return blockIdx.y * part; }
  __device__ int64_t end(int64_t classes) const { return begin() + part < classes ? begin() + part : classes; }
  // Rows of many threads are not read where they have no loss. Short ones are, rather than wait for the label.
  __device__ bool reads(bool has_loss) const { return lanes <= 32 || has_loss; }
};

// states: where to leave a part for finish_rows; null when a row is one part, or when its parts are a cluster.
template <class S, Target K>
__global__ void __launch_bounds__(kMaxThreads, kResident<S, K>)
    forward_rows(const __grid_constant__ RowArgs<AccOf<S>> a, Spread spread, RowState<K, AccOf<S>>* states) {
  const int lane = spread.lane();
  const int64_t row = spread.row(), begin = spread.begin(), end = spread.end(a.classes);
  const bool exists = row < a.rows.count;
  const int64_t y = exists ? label<K>(a, row) : kIgnored;
  RowState<K, AccOf<S>> s;
  if (exists && spread.reads(used<K>(y))) s = read_classes<S, K>(a, row, begin, end, lane, spread.lanes);
  s = merge_group(s, spread.lanes);
  if (!states && gridDim.y > 1) s = merge_cluster(s);
  if (!exists || lane != 0 || (!states && blockIdx.y > 0)) return;
  if (states) {
    states[row * gridDim.y + blockIdx.y] = s;
  } else {
    finish<S, K>(a, row, y, s);
  }
}

// A warp a row merges its parts, in the same order always.
template <class S, Target K>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_rows(const __grid_constant__ RowArgs<AccOf<S>> a, const RowState<K, AccOf<S>>* states, int parts) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= a.rows.count) return;  // a whole warp
  RowState<K, AccOf<S>> s;
  for (int i = lane; i < parts; i += 32) s.merge(states[row * parts + i]);
  s = merge_lanes(s, 32);
  if (lane == 0) finish<S, K>(a, row, label<K>(a, row), s);
}

// ---- backward

template <class A>
struct RowGrad {
  A max, log_sum, mass, g;  // g: the incoming gradient of this row's loss
};
template <class A>
__device__ __forceinline__ RowGrad<A> row_grad(const CrossEntropyArgs& a, int64_t row) {
  const A* const stats = static_cast<const A*>(a.stats) + row;
  A g = static_cast<const A*>(a.grad_loss)[row * a.grad_stride];
  if (a.reduction == Reduction::mean) g /= *static_cast<const A*>(a.total_weight);
  return {stats[0], stats[a.rows.count], stats[2 * a.rows.count], g};
}

// The gradient at class c of a row with label y: x its logit, t its probability (unused with a label).
template <class S, Target K, class A>
__device__ __forceinline__ A slope(const RowArgs<A>& a, const RowGrad<A>& r, A x, A t, int64_t c) {
  return r.g * row_slope(x, r.max, r.log_sum, r.mass, mass_of<K>(a, t, c), ExpOf<S>());
}
template <class A>
__device__ __forceinline__ A slope_at_label(const RowArgs<A>& a, const RowGrad<A>& r, A x, int64_t y) {
  const A w = class_weight<A>(a, y), kept = a.keep * w;
  return r.g * label_slope(x, r.max, r.log_sum, kept, r.mass - kept, a.spread * w);
}
// The gradient of a row without a loss.
template <class A>
__device__ __forceinline__ A unused_slope(int64_t y) {
  return y == kImpossible ? std::numeric_limits<A>::quiet_NaN() : A(0);
}

// As forward_rows. Every element is read and written by the same thread, so the gradient may overwrite the logits.
template <class S, Target K>
__global__ void __launch_bounds__(kMaxThreads, kResident<S, K>)
    backward_rows(const __grid_constant__ RowArgs<AccOf<S>> a, Spread spread) {
  using A = AccOf<S>;
  constexpr int N = Pack<S>::kSize, U = kPacks / 2;  // read and written: as many bytes in flight
  const int lane = spread.lane(), lanes = spread.lanes;
  const int64_t row = spread.row(), begin = spread.begin(), end = spread.end(a.classes);
  if (row >= a.rows.count) return;
  const int64_t y = label<K>(a, row);
  const bool has_loss = used<K>(y);
  const RowGrad<A> r = row_grad<A>(a, row);
  const int64_t at_x = offset_of(a.rows, a.logits, row) + begin * a.logits.class_stride;
  const int64_t at_out = offset_of(a.rows, a.grad_logits, row) + begin * a.grad_logits.class_stride;
  const int64_t at_t =
      K == Target::soft ? offset_of(a.rows, a.probabilities, row) + begin * a.probabilities.class_stride : 0;
  const S* const x = static_cast<const S*>(a.logits.data) + at_x;
  const S* const t = static_cast<const S*>(a.probabilities.data) + at_t;
  S* const out = static_cast<S*>(a.grad_logits.data) + at_out;
  const Cut<S> cut(packs_with<S>(x, a.logits, at_x) && packs_with<S>(x, a.grad_logits, at_out) &&
                       (K != Target::soft || packs_with<S>(x, a.probabilities, at_t)),
                   x, end - begin);

  const uint4* const packs = reinterpret_cast<const uint4*>(x + cut.head);
  const uint4* const packs_t = reinterpret_cast<const uint4*>(t + cut.head);
  uint4* const packs_out = reinterpret_cast<uint4*>(out + cut.head);
  bool label_here = false;  // whether this thread has met the label, and its logit
  A x_y = A(0);
  for (int64_t p = lane; p < cut.packs; p += U * lanes) {
    Pack<S> raw[U], raw_t[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int64_t i = p + u * lanes;
      if (i < cut.packs && spread.reads(has_loss)) {
        raw[u] = load_pack<S>(packs + i);
        if (K == Target::soft) raw_t[u] = load_pack<S>(packs_t + i);
      }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int64_t i = p + u * lanes, c = begin + cut.head + i * N;
      if (i >= cut.packs) break;
      Pack<S> grad;
      A logit[N], p_k[N];
      widen_run(raw[u], logit);
      if (K == Target::soft) widen_run(raw_t[u], p_k);
      if (has_loss) {
#pragma unroll
        for (int k = 0; k < N; k++) grad.v[k] = narrow<S>(slope<S, K>(a, r, logit[k], p_k[k], c + k));
      } else {
#pragma unroll
        for (int k = 0; k < N; k++) grad.v[k] = narrow<S>(unused_slope<A>(y));
      }
      if (K != Target::soft && y >= c && y < c + N) {
        label_here = true;
#pragma unroll
        for (int k = 0; k < N; k++) x_y = y == c + k ? logit[k] : x_y;
      }
      store_pack(packs_out + i, grad);
    }
  }
  for (int64_t s = lane; s < cut.single; s += lanes) {
    const int64_t i = cut.at(s), c = begin + i;
    A v = unused_slope<A>(y);
    if (has_loss) {
      const A x_i = load_one<S>(a.logits, at_x + i * a.logits.class_stride);
      const A p = K == Target::soft ? load_float<A>(a.probabilities, at_t + i * a.probabilities.class_stride) : A(0);
      v = slope<S, K>(a, r, x_i, p, c);
      if (K != Target::soft && c == y) label_here = true, x_y = x_i;
    }
    store_one<S>(a.grad_logits, at_out + i * a.grad_logits.class_stride, v);
  }
  if (label_here) {  // over what the loops wrote there: one expm1 a row instead of one an element
    store_one<S>(a.grad_logits, at_out + (y - begin) * a.grad_logits.class_stride, slope_at_label(a, r, x_y, y));
  }
}

// ---- rows side by side: a pixel a thread, or `slices` threads that take its classes in turn

template <class S, Target K>
__global__ void __launch_bounds__(kPixelThreads, kResident<S, K> == 1 ? 1 : 2)
    forward_pixels(const __grid_constant__ RowArgs<AccOf<S>> a, int slices) {
  using A = AccOf<S>;
  using State = RowState<K, A>;
  const int pixels = blockDim.x / slices, slice = threadIdx.x / pixels;
  const int64_t row = int64_t(blockIdx.x) * pixels + threadIdx.x % pixels;
  const bool exists = row < a.rows.count;
  const int64_t y = exists ? label<K>(a, row) : kIgnored, step = int64_t(slices) * kUnroll;
  State all;
  if (exists && used<K>(y)) {
    const int64_t at_x = offset_of(a.rows, a.logits, row);
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    for (int64_t group = 0; group < a.classes; group += step * (kGroup / kUnroll)) {
      const int64_t end = group + step * (kGroup / kUnroll) < a.classes ? group + step * (kGroup / kUnroll) : a.classes;
      Reader<S, K> reader;
      for (int64_t first = group + slice; first < end; first += step) {
        A x[kUnroll], q[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          const int64_t c = first + u * slices;
          const bool inside = c < end;
          x[u] = inside ? load_one<S>(a.logits, at_x + c * a.logits.class_stride) : minus_infinity<A>();
          if (K != Target::hard) {
            const A t = K == Target::soft && inside
                            ? load_float<A>(a.probabilities, at_t + c * a.probabilities.class_stride)
                            : A(0);
            q[u] = inside ? mass_of<K>(a, t, c) : A(0);
          }
        }
        reader.push(x, q);
      }
      all.merge(reader.state());
    }
  }
  if (slices > 1) {
    CECE_SHARED(Slot<State>, of_thread, kPixelThreads);
    of_thread[threadIdx.x].put(all);
    __syncthreads();
    for (int i = 1; slice == 0 && i < slices; i++) all.merge(of_thread[threadIdx.x + i * pixels].get());
  }
  if (exists && slice == 0) finish<S, K>(a, row, y, all);
}

template <class S, Target K>
__global__ void __launch_bounds__(kPixelThreads, kResident<S, K> == 1 ? 1 : 2)
    backward_pixels(const __grid_constant__ RowArgs<AccOf<S>> a, int slices) {
  using A = AccOf<S>;
  const int pixels = blockDim.x / slices, slice = threadIdx.x / pixels;
  const int64_t row = int64_t(blockIdx.x) * pixels + threadIdx.x % pixels;
  if (row >= a.rows.count) return;
  const int64_t y = label<K>(a, row);
  const RowGrad<A> r = row_grad<A>(a, row);
  const int64_t at_x = offset_of(a.rows, a.logits, row), at_out = offset_of(a.rows, a.grad_logits, row);
  const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
  bool label_here = false;
  A x_y = A(0);
  for (int64_t first = slice; first < a.classes; first += int64_t(slices) * kUnroll) {
    A x[kUnroll], t[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int64_t c = first + u * slices;
      const bool wanted = c < a.classes && used<K>(y);
      x[u] = wanted ? load_one<S>(a.logits, at_x + c * a.logits.class_stride) : A(0);
      t[u] =
          K == Target::soft && wanted ? load_float<A>(a.probabilities, at_t + c * a.probabilities.class_stride) : A(0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int64_t c = first + u * slices;
      if (c >= a.classes) break;
      const A v = used<K>(y) ? slope<S, K>(a, r, x[u], t[u], c) : unused_slope<A>(y);
      if (K != Target::soft && c == y) label_here = true, x_y = x[u];
      store_one<S>(a.grad_logits, at_out + c * a.grad_logits.class_stride, v);
    }
  }
  if (label_here) {
    store_one<S>(a.grad_logits, at_out + y * a.grad_logits.class_stride, slope_at_label(a, r, x_y, y));
  }
}

// ---- the mean or sum of the rows' losses: in double, in an order that only the number of rows decides

template <class A>
__device__ __forceinline__ void write_reduced(const CrossEntropyArgs& a, const Sums& s) {
  const bool weighted = a.reduction == Reduction::mean && !a.probabilities.data;
  const double weight = weighted ? s.b : double(a.rows.count);
  *static_cast<A*>(a.total_weight) = A(weight);
  *static_cast<A*>(a.reduced) = A(a.reduction == Reduction::mean ? s.a / weight : s.a);
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads)
    reduce_rows(const __grid_constant__ CrossEntropyArgs a, Sums* partial) {  // partial: null when one block does all
  const bool weighted = a.reduction == Reduction::mean && !a.probabilities.data;
  const A* const losses = static_cast<const A*>(a.loss);
  Sums s;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < a.rows.count;
       row += int64_t(gridDim.x) * blockDim.x) {
    s.a += losses[row];
    if (weighted) {
      const int64_t y = label<Target::hard>(a, row);
      if (y >= 0) s.b += class_weight<A>(a, y);
    }
  }
  s = merge_group(s, blockDim.x);
  if (threadIdx.x != 0) return;
  if (partial) {
    partial[blockIdx.x] = s;
  } else {
    write_reduced<A>(a, s);
  }
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads)
    reduce_partial(const __grid_constant__ CrossEntropyArgs a, const Sums* partial, int count) {
  Sums s;
  for (int i = threadIdx.x; i < count; i += blockDim.x) s.merge(partial[i]);
  s = merge_group(s, blockDim.x);
  if (threadIdx.x == 0) write_reduced<A>(a, s);
}

// ---- launching

template <class S>
struct CrossEntropy {
  using A = AccOf<S>;
  using Args = CrossEntropyArgs;

  template <class F>
  static void visit_target(const Args& a, F&& f) {  // f(integral_constant<Target, K>)
    if (a.probabilities.data) return f(std::integral_constant<Target, Target::soft>{});
    if (a.label_smoothing > 0) return f(std::integral_constant<Target, Target::smooth>{});
    return f(std::integral_constant<Target, Target::hard>{});
  }

  struct Plan {
    bool pixels;
    int slices, parts;
    bool clusters;  // of a row's parts
    RowLaunch row;
    Spread spread;
    int64_t blocks;
    int sums;
  };
  static Plan plan(const Args& a, const Device& d) {
    Plan p{};
    const int64_t bytes = a.classes * int64_t(sizeof(S));
    p.pixels = pixels_across_threads(a);
    p.slices = pixel_slices(a.rows.count, a.classes, d.multiprocessors);
    p.row = row_launch(bytes);
    p.parts = p.pixels ? 1 : row_parts(a.rows.count, bytes, d.multiprocessors);
    p.clusters = d.clusters && p.parts > 1 && p.parts <= kMaxCluster;
    p.spread = {p.row.lanes, 0, (a.classes + p.parts - 1) / p.parts};
    while (1 << p.spread.shift < p.row.lanes) p.spread.shift++;
    const int rows_a_block = p.pixels ? kPixelThreads / p.slices : p.row.threads / p.row.lanes;
    p.blocks = (a.rows.count + rows_a_block - 1) / rows_a_block;
    p.sums = a.reduction == Reduction::none ? 0 : sum_blocks(a.rows.count);
    return p;
  }

  static int64_t state_bytes(const Args& a, const Plan& p) {
    return p.parts > 1 && !p.clusters ? a.rows.count * p.parts * int64_t(sizeof(RowState<Target::soft, A>)) : 0;
  }
  static int64_t forward_scratch(const Args& a, const Device& d) {
    const Plan p = plan(a, d);
    return state_bytes(a, p) + (p.sums > 1 ? p.sums * int64_t(sizeof(Sums)) : 0);
  }

  template <Target K>
  static void launch_rows(const Args& a, const Device& d, const Plan& p, void* scratch) {
    const auto stream = static_cast<cudaStream_t>(d.stream);
    auto* const states = static_cast<RowState<K, A>*>(scratch);
    const dim3 grid(unsigned(p.blocks), unsigned(p.parts));
    if (p.parts == 1 || p.clusters) {
      return launch(forward_rows<S, K>, grid, p.row.threads, stream, p.parts, a, p.spread, nullptr);
    }
    launch(forward_rows<S, K>, grid, p.row.threads, stream, 1, a, p.spread, states);
    const dim3 finish_grid(unsigned((a.rows.count + kFinishThreads / 32 - 1) / (kFinishThreads / 32)));
    launch(finish_rows<S, K>, finish_grid, kFinishThreads, stream, 1, a, states, p.parts);
  }

  static void forward(const Args& a, const Device& d, void* scratch) {
    const auto stream = static_cast<cudaStream_t>(d.stream);
    const Plan p = plan(a, d);
    if (a.rows.count > 0) {
      visit_target(a, [&](auto kind) {
        constexpr Target K = decltype(kind)::value;
        if (!p.pixels) return launch_rows<K>(a, d, p, scratch);
        launch(forward_pixels<S, K>, dim3(unsigned(p.blocks)), kPixelThreads, stream, 1, a, p.slices);
      });
    }
    if (p.sums == 0) return;
    auto* const partial = reinterpret_cast<Sums*>(static_cast<char*>(scratch) + state_bytes(a, p));
    launch(reduce_rows<A>, dim3(p.sums), kSumThreads, stream, 1, a, p.sums > 1 ? partial : nullptr);
    if (p.sums > 1) launch(reduce_partial<A>, dim3(1), kSumThreads, stream, 1, a, partial, p.sums);
  }

  static void backward(const Args& a, const Device& d) {
    const auto stream = static_cast<cudaStream_t>(d.stream);
    const Plan p = plan(a, d);
    if (a.rows.count == 0 || a.classes == 0) return;
    visit_target(a, [&](auto kind) {
      constexpr Target K = decltype(kind)::value;
      if (p.pixels) {
        return launch(backward_pixels<S, K>, dim3(unsigned(p.blocks)), kPixelThreads, stream, 1, a, p.slices);
      }
      const dim3 grid(unsigned(p.blocks), unsigned(p.parts));
      launch(backward_rows<S, K>, grid, p.row.threads, stream, 1, a, p.spread);
    });
  }

  static int compiled_for() { return cuda::compiled_for(forward_rows<S, Target::hard>); }

  static constexpr CrossEntropyKernels kernels = {compiled_for, forward_scratch, forward, backward};
};

}  // namespace cece::cuda
