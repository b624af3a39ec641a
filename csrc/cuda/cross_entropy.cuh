// Softmax cross-entropy on a GPU: forward and backward, rows over lanes or pixels over threads.
//
// Forward reads the logits once. Every thread keeps a running state of what it has seen; the states of a row's threads
// are merged, in a warp, a block, a cluster, or through memory (a row shared by many blocks). Backward reads the logits
// once more and writes the gradient, rebuilding each probability from the row's saved max and log_sum. tune.h says
// which threads do what.
#pragma once
#include "../parts.h"
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace cece::cuda {

// A label; a label with smoothing; probabilities of the logits' type; a label with smoothing and class weights;
// probabilities of another type. And with all statistics: any of the labels or none; any probabilities.
enum class Target { hard, smooth, soft, weighted, mixed, full, full_mixed };
template <Target K>
constexpr bool kSoft = K == Target::soft || K == Target::mixed || K == Target::full_mixed;
template <Target K>
constexpr bool kFull = K == Target::full || K == Target::full_mixed;

// Blocks of kMaxThreads that shall fit a multiprocessor: what leaves a thread the registers it needs (64, 80, 128,
// 255).
template <class S, Target K>
constexpr int kResident = kDtype<S> == Dtype::f64                        ? 1
                          : kSoft<K> || kFull<K>                         ? 2
                          : K == Target::hard && kDtype<S> != Dtype::f16 ? 4
                                                                         : kMinBlocks;

template <class S, Target K>  // of rows in packs that straddle those of the logits, which are held twice
constexpr int kShiftedResident = kDtype<S> == Dtype::f64 || K == Target::weighted || kFull<K> ? 2 : kMinBlocks;

template <class S, Target K, int P>  // fewer than with rows, for the eight addresses, and for two pixels
constexpr int kPixelResident = P == 2 && K == Target::smooth  ? 2
                               : kResident<S, K> < kMinBlocks ? kResident<S, K>
                                                              : kMinBlocks;

template <class A>
struct RowArgs : CrossEntropyArgs {
  // 1 - s, s / C and of s what the classes here have: a division of doubles would cost a kernel more than a row
  A keep, spread, smoothing;

  RowArgs(const CrossEntropyArgs& a)
      : CrossEntropyArgs(a),
        keep(A(1 - a.label_smoothing)),
        spread(A(a.label_smoothing / double(a.all_classes))),
        smoothing(A(a.label_smoothing * (double(a.classes) / double(a.all_classes)))) {}
};

template <class A>
struct FullArgs : RowArgs<A> {
  A scale, cap, shrink;  // z = scale x, or cap tanh(shrink x)
  bool capped, skip_masked_rows;
  void *entropy, *logsumexp, *collision;
  int64_t* argmax;
  const void *grad_entropy, *grad_logsumexp, *grad_collision;

  FullArgs(const TokenStatisticsArgs& a)
      : RowArgs<A>(a),
        scale(A(a.logit_scale)),
        cap(A(a.softcap)),
        shrink(A(a.softcap > 0 ? a.logit_scale / a.softcap : 1)),
        capped(a.softcap > 0),
        skip_masked_rows(a.skip_masked_rows),
        entropy(a.entropy),
        logsumexp(a.logsumexp),
        collision(a.collision),
        argmax(a.argmax),
        grad_entropy(a.grad_entropy),
        grad_logsumexp(a.grad_logsumexp),
        grad_collision(a.grad_collision) {}
};
template <class S, Target K>
using ArgsOf = std::conditional_t<kFull<K>, FullArgs<AccOf<S>>, RowArgs<AccOf<S>>>;

// A logit as it is used, and what that changes by.
template <class A>
__device__ __forceinline__ A transformed(const RowArgs<A>&, A x) {
  return x;
}
template <class A>
__device__ __forceinline__ A transformed(const FullArgs<A>& a, A x) {
  if (!a.capped) return a.scale * x;
  const A z = a.cap * tanh_nonnegative(abs_(a.shrink * x));
  return x < A(0) ? -z : z;
}
template <class A>
__device__ __forceinline__ A transform_slope(const RowArgs<A>&, A) {
  return A(1);
}
template <class A>
__device__ __forceinline__ A transform_slope(const FullArgs<A>& a, A x) {
  return a.capped ? a.scale * tanh_slope(abs_(a.shrink * x)) : a.scale;
}

// ---- the target of a row

constexpr int64_t kIgnored = -1, kImpossible = -2, kUnlabelled = -3, kElsewhere = -4;  // in another shard

// A row's label as it is loaded, in registers of 32 bits: nothing is computed of it, so nothing waits for it.
struct RawLabel {
  int32_t low = 0, high = 0;
};
template <Target K>
__device__ __forceinline__ RawLabel load_label(const CrossEntropyArgs& a, int64_t row) {
  RawLabel l;
  if (kSoft<K> || (kFull<K> && !a.labels)) return l;
  switch (a.label_dtype) {
    case Dtype::u8:
      l.low = static_cast<const uint8_t*>(a.labels)[row];
      break;
    case Dtype::i8:
      l.low = static_cast<const int8_t*>(a.labels)[row];
      break;
    case Dtype::i16:
      l.low = static_cast<const int16_t*>(a.labels)[row];
      break;
    case Dtype::i32:
      l.low = static_cast<const int32_t*>(a.labels)[row];
      break;
    default: {
      const uint2 both = static_cast<const uint2*>(a.labels)[row];
      l.low = int32_t(both.x), l.high = int32_t(both.y);
    }
  }
  return l;
}
// The class index of a row here, or one of the above.
template <Target K>
__device__ __forceinline__ int64_t judge(const CrossEntropyArgs& a, RawLabel l) {
  if (kSoft<K>) return kIgnored;
  if (kFull<K> && !a.labels) return kUnlabelled;
  const int64_t y = a.label_dtype == Dtype::i64 ? int64_t(l.high) * (int64_t(1) << 32) + uint32_t(l.low) : l.low;
  if (y == a.ignore_index) return kIgnored;
  if (y < 0 || y >= a.all_classes) return kImpossible;
  const int64_t here = y - a.first_class;
  return here >= 0 && here < a.classes ? here : kElsewhere;
}
template <Target K>
__device__ __forceinline__ int64_t label(const CrossEntropyArgs& a, int64_t row) {
  return judge<K>(a, load_label<K>(a, row));
}
// Whether a row has a loss: any with probabilities, else one with a possible label. (Statistics need no label.)
template <Target K>
__device__ __forceinline__ bool used(int64_t y) {
  return kSoft<K> || y >= 0 || y <= kUnlabelled;
}

template <class A>
__device__ __forceinline__ A class_weight(const CrossEntropyArgs& a, int64_t c) {
  return a.weight ? static_cast<const A*>(a.weight)[c] : A(1);
}
// The mass of class c beside the label's own; t is its probability, unused with a label.
template <Target K, class A>
__device__ __forceinline__ A mass_of(const RowArgs<A>& a, A t, int64_t c) {
  if (K == Target::hard) return A(0);
  const A q = kSoft<K> ? smoothed(t, a.keep, a.spread) : a.spread;
  return K != Target::smooth && a.weight ? q * static_cast<const A*>(a.weight)[c] : q;
}

// ---- forward: what a thread has seen of a row

// A row, or a part of one, as it is merged.
template <Target K, class A>
struct RowState {
  LogSumExp<A> sums;
  TargetGaps<A> target;

  __device__ __forceinline__ void merge(const RowState& o) {
    const A max = greatest(o.sums.max, sums.max);
    TargetGaps<A> part = o.target;
    part.rebase(o.sums.max, max);
    target.rebase(sums.max, max);
    target = {target.gaps + part.gaps, target.mass + part.mass};
    sums.merge(o.sums);
  }
  // As LogSumExp::share: summed over many states they make one, with that maximum.
  __device__ __forceinline__ Shares<A, 3> shares(A max, bool leads) const {
    TargetGaps<A> part = target;
    part.rebase(sums.max, max);
    return {{sums.share(max, leads), part.gaps, part.mass}};
  }
  static __device__ __forceinline__ RowState of(A max, const Shares<A, 3>& s) {
    return {{max, s.v[0]}, {s.v[1], s.v[2]}};
  }
};
template <class A>
struct RowState<Target::hard, A> {
  LogSumExp<A> sums;
  static constexpr TargetGaps<A> target{};
  __device__ __forceinline__ void merge(const RowState& o) { sums.merge(o.sums); }
  __device__ __forceinline__ Shares<A, 1> shares(A max, bool leads) const { return {{sums.share(max, leads)}}; }
  static __device__ __forceinline__ RowState of(A max, const Shares<A, 1>& s) { return {{max, s.v[0]}}; }
};

template <Target K, class A>
using StateOf = std::conditional_t<kFull<K>, RowPart<A>, RowState<K, A>>;

// Rows are merged in lanes by their maximum first: then each is moved to it once, and what follows are plain sums. Of
// the 22 instructions that a merge of two takes, 5 are left a step.
template <Target K, class A>
__device__ __forceinline__ RowState<K, A> merge_lanes(const RowState<K, A>& s, int lanes) {
  const A max = merge_lanes(Greatest<A>{s.sums.max}, lanes).v;
  return RowState<K, A>::of(max, merge_lanes(s.shares(max, first_of_lanes(s.sums.max == max, lanes)), lanes));
}

// A row as one thread reads it, V groups of N classes at a time: logits x, -inf in a group that is not `inside`, masses
// q; the first of group v is class c + v step. Up to a thousand terms of masses and gaps: a plain sum of equal ones
// would drift.
template <class S, Target K>
struct Reader {
  using A = AccOf<S>;
  Tournament<A> logits;
  LongSum<A> gaps, mass;

  template <int V, int N>
  __device__ __forceinline__ void push(const RowArgs<A>&, const A (&x)[V][N], const A (&q)[V][N], const bool (&)[V],
                                       int64_t, int64_t) {
    const A before = logits.max;
    logits.push(reinterpret_cast<const A(&)[V * N]>(x[0][0]), ExpOf<S>());
    gaps.add(times(mass.value(), gap(before, logits.max)));
    TargetGaps<A> these;
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
      for (int k = 0; k < N; k++) these.push(q[v][k], x[v][k], logits.max);
    }
    gaps.add(these.gaps);
    mass.add(these.mass);
  }
  __device__ __forceinline__ RowState<K, A> state(const RowArgs<A>&) const {
    return {logits.log_sum_exp(), {gaps.value(), mass.value()}};
  }
};
template <class S>
struct Reader<S, Target::hard> {
  using A = AccOf<S>;
  Tournament<A> logits;

  template <int V, int N>
  __device__ __forceinline__ void push(const RowArgs<A>&, const A (&x)[V][N], const A (&)[V][N], const bool (&)[V],
                                       int64_t, int64_t) {
    logits.push(reinterpret_cast<const A(&)[V * N]>(x[0][0]), ExpOf<S>());
  }
  __device__ __forceinline__ RowState<Target::hard, A> state(const RowArgs<A>&) const { return {logits.log_sum_exp()}; }
};
// All masses are equal: gaps are summed without them, two instructions each, where that sum is finite.
template <class S>
struct Reader<S, Target::smooth> {
  using A = AccOf<S>;
  Tournament<A> logits;
  LongSum<A> gaps;
  A count = A(0);

  template <int V, int N>
  __device__ __forceinline__ void push(const RowArgs<A>& a, const A (&x)[V][N], const A (&)[V][N],
                                       const bool (&inside)[V], int64_t, int64_t) {
    const A before = logits.max;
    logits.push(reinterpret_cast<const A(&)[V * N]>(x[0][0]), ExpOf<S>());
    A these = a.spread * sum(x, inside, [&](A x) { return logits.max - x; });
    if (!(these < std::numeric_limits<A>::infinity())) {  // an infinity, too large a sum, or a maximum's own inf - inf
      these = sum(x, inside, [&](A x) { return times(a.spread, gap(x, logits.max)); });
    }
    if (before != logits.max) gaps.add(times(count * a.spread, logits.max - before));  // seldom, once begun
    gaps.add(these);
#pragma unroll
    for (int v = 0; v < V; v++) count += inside[v] ? A(N) : A(0);
  }
  __device__ __forceinline__ RowState<Target::smooth, A> state(const RowArgs<A>& a) const {
    return {logits.log_sum_exp(), {gaps.value(), count * a.spread}};
  }

 private:
  template <int V, int N, class F>
  static __device__ __forceinline__ A sum(const A (&x)[V][N], const bool (&inside)[V], F gap_of) {
    A all = A(0);
#pragma unroll
    for (int v = 0; v < V; v++) {
      A group = A(0);
#pragma unroll
      for (int k = 0; k < N; k++) group += gap_of(x[v][k]);
      all += inside[v] ? group : A(0);
    }
    return all;
  }
};

// All statistics. The maximal term stays out of the sums where it is met, and is known by its class.
template <class S>
struct FullReader {
  using A = AccOf<S>;
  RowPart<A> s;
  LongSum<A> gaps, mass;

  template <int V, int N>
  __device__ __forceinline__ void push(const RowArgs<A>&, const A (&x)[V][N], const A (&q)[V][N], const bool (&)[V],
                                       int64_t c, int64_t step) {
    const A before = s.sums.max;
    A max = before;
#pragma unroll
    for (int i = 0; i < V * N; i++) max = greatest(x[i / N][i % N], max);
    bool own = max > before;  // whether the maximal term is yet to come
    if (own) {
      Moments<A> higher;
      higher.max = max, higher.rest = higher.square = A(0);
      higher.merge(s.sums);
      s.sums = higher, s.argmax = s.kNowhere;
    }
    gaps.add(times(mass.value(), gap(before, max)));
    TargetGaps<A> these;
    A rest = A(0), heat = A(0), square = A(0);
#pragma unroll
    for (int i = 0; i < V * N; i++) {
      const A x_i = x[i / N][i % N], u = max - x_i;
      A e = exp_nonpositive(-u);
      if (x_i == max) {  // the first of them: a row's unaligned head comes after its packs
        const int64_t at = c + i / N * step + i % N;
        s.argmax = at < s.argmax ? at : s.argmax;
        if (own) e = A(0), own = false;
      }
      rest += e, heat += times(e, u), square += e * e;
      these.push(q[i / N][i % N], x_i, max);
    }
    s.sums.rest += rest, s.sums.heat += heat, s.sums.square += square;
    gaps.add(these.gaps);
    mass.add(these.mass);
  }
  __device__ __forceinline__ RowPart<A> state(const RowArgs<A>&) const {
    RowPart<A> all = s;
    all.target = {gaps.value(), mass.value()};
    return all;
  }
};
template <class S, Target K>
using ReaderOf = std::conditional_t<kFull<K>, FullReader<S>, Reader<S, K>>;

template <class A>
__device__ __forceinline__ A minus_infinity() {  // the logit that changes nothing
  return -std::numeric_limits<A>::infinity();
}

// The probabilities of U runs of classes beside their logits, of whatever type they are.
template <class S, Target K, int U, int N>
__device__ __forceinline__ void load_probabilities(const RowArgs<AccOf<S>>& a, const int64_t (&at)[U],
                                                   const bool (&wanted)[U], AccOf<S> (&out)[U][N]) {
  if constexpr (K == Target::soft && kDtype<S> != Dtype::f64) {
    load_aligned_runs<S>(a.probabilities.data, at, wanted, out);
  } else if constexpr (kSoft<K>) {
    visit_float<AccOf<S>>(a.probabilities.dtype,
                          [&](auto type) { load_aligned_runs<decltype(type)>(a.probabilities.data, at, wanted, out); });
  }
}
// Whether runs of N of them can be loaded from element `at` on.
template <class S, int N>
__device__ __forceinline__ bool probabilities_in_runs(const CrossEntropyArgs& a, int64_t at) {
  const int size = a.probabilities.dtype == Dtype::f64 ? 8 : a.probabilities.dtype == Dtype::f32 ? 4 : 2;
  return a.probabilities.class_stride == 1 &&
         aligned(static_cast<const char*>(a.probabilities.data) + at * size, size * N < 16 ? size * N : 16);
}

// Classes begin ... end - 1 of a row as the `lane`-th of `lanes` threads reads them. started(row at begin) is called
// once, behind the first loads: what it waits for has been under way with them. It says whether to go on.
template <class S, Target K, class F>
__device__ __forceinline__ StateOf<K, AccOf<S>> read_classes(const ArgsOf<S, K>& a, int64_t row, int64_t begin,
                                                             int64_t end, int lane, int lanes, F&& started) {
  using A = AccOf<S>;
  constexpr bool kPlain = K == Target::hard || K == Target::smooth;  // nothing to load beside the logits
  constexpr int N = Pack<S>::kSize, U = kPlain ? kPacks : kPacks / 2;
  constexpr int kAtOnce = K == Target::hard ? 16 : 8, kTogether = N * U < kAtOnce ? U : kAtOnce / N;  // packs a push
  ReaderOf<S, K> reader;
  const int64_t at_x = offset_of(a.rows, a.logits, row) + begin * a.logits.class_stride;
  const int64_t at_t = kSoft<K> ? offset_of(a.rows, a.probabilities, row) + begin * a.probabilities.class_stride : 0;
  const S* const x = static_cast<const S*>(a.logits.data) + at_x;
  Cut<S> cut(packs_with<S>(x, a.logits, at_x), x, end - begin);
  if (kSoft<K> && !probabilities_in_runs<S, N>(a, at_t + cut.head)) cut = Cut<S>(false, x, end - begin);

  const uint4* const packs = reinterpret_cast<const uint4*>(x + cut.head);
  for (int64_t p = lane; p < cut.packs; p += U * lanes) {
    Pack<S> raw[U];
    int64_t at[U];
    bool inside[U];
#pragma unroll
    for (int u = 0; u < U; u++) {  // all loads before the first use
      const int64_t i = p + u * lanes;
      inside[u] = i < cut.packs, at[u] = at_t + cut.head + i * N;
      raw[u] = inside[u] ? load_pack<S>(packs + i) : nothing<S>();
    }
    A mass[U][N];
    load_probabilities<S, K>(a, at, inside, mass);
    if (p == lane && !started(at_x)) return StateOf<K, A>();
#pragma unroll
    for (int u = 0; u < U; u += kTogether) {
      A logit[kTogether][N], q[kTogether][N];
      bool in[kTogether];
#pragma unroll
      for (int v = 0; v < kTogether; v++) {
        in[v] = inside[u + v];
        widen_run(raw[u + v], logit[v]);
#pragma unroll
        for (int k = 0; kFull<K> && k < N; k++) {
          logit[v][k] = in[v] ? transformed(a, logit[v][k]) : minus_infinity<A>();
        }
#pragma unroll
        for (int k = 0; !kPlain && k < N; k++) {
          const int64_t c = begin + cut.head + (p + (u + v) * lanes) * N + k;
          q[v][k] = in[v] ? mass_of<K>(a, mass[u + v][k], c) : A(0);
        }
      }
      reader.push(a, logit, q, in, begin + cut.head + (p + u * lanes) * N, int64_t(lanes) * N);
    }
  }
  if (lane >= cut.packs && !started(at_x)) return StateOf<K, A>();
  for (int64_t s = lane; s < cut.single; s += lanes) {
    const int64_t i = cut.at(s);
    const A logit[1][1] = {{transformed(a, load_one<S>(a.logits, at_x + i * a.logits.class_stride))}};
    const A p = kSoft<K> ? load_float<A>(a.probabilities, at_t + i * a.probabilities.class_stride) : A(0);
    const A mass[1][1] = {{mass_of<K>(a, p, begin + i)}};
    reader.push(a, logit, mass, {true}, begin + i, 0);
  }
  return reader.state(a);
}

template <class A>
__device__ __forceinline__ void write_row(const CrossEntropyArgs& a, int64_t row, A max, A log_sum, A mass, A loss) {
  A* const stats = static_cast<A*>(a.stats) + row;
  stats[0] = max;
  stats[a.rows.count] = log_sum;
  stats[2 * a.rows.count] = mass;
  if (a.loss) static_cast<A*>(a.loss)[row] = loss;
}
template <class A, class Args>
__device__ __forceinline__ void write_more(const Args& a, int64_t row, A heat, A spread, A entropy, A logsumexp,
                                           A collision, int64_t argmax) {
  A* const stats = static_cast<A*>(a.stats) + row;
  stats[3 * a.rows.count] = heat;
  stats[4 * a.rows.count] = spread;
  if (a.entropy) static_cast<A*>(a.entropy)[row] = entropy;
  if (a.logsumexp) static_cast<A*>(a.logsumexp)[row] = logsumexp;
  if (a.collision) static_cast<A*>(a.collision)[row] = collision;
  if (a.argmax) a.argmax[row] = argmax;
}

// A row's label and the logit there, which is asked for long before it is needed.
template <class A>
struct Labelled {
  int64_t y = kIgnored;
  A x_y = A(0);
};
template <class S, Target K>  // from: where class `begin` of the row is
__device__ __forceinline__ Labelled<AccOf<S>> labelled(const ArgsOf<S, K>& a, RawLabel raw, int64_t from,
                                                       int64_t begin) {
  Labelled<AccOf<S>> l{judge<K>(a, raw)};
  if (l.y >= 0) l.x_y = transformed(a, load_one<S>(a.logits, from + (l.y - begin) * a.logits.class_stride));
  return l;
}

// The first NaN of a row, or the first of its largest, where the search passed over something.
struct Found {
  int64_t at;
  bool nan;
};
template <class S, class A>
__device__ __forceinline__ Found first_maximal(const FullArgs<A>& a, int64_t row) {
  const int64_t from = offset_of(a.rows, a.logits, row);
  int64_t best = 0;
  A most = load_one<S>(a.logits, from);
  for (int64_t c = 1; c < a.classes && most == most; c++) {
    const A x = load_one<S>(a.logits, from + c * a.logits.class_stride);
    if (!(x <= most)) best = c, most = x;
  }
  return {best, most != most};
}

// What a shard leaves of a row.
template <class S, Target K>
__device__ __forceinline__ void leave_part(const ArgsOf<S, K>& a, int64_t row, const Labelled<AccOf<S>>& l,
                                           const StateOf<K, AccOf<S>>& s) {
  using A = AccOf<S>;
  if (!used<K>(l.y)) return write_no_part<A>(a, row);
  RowPart<A> part;
  part.target = s.target;
  if constexpr (kFull<K>) {
    part.sums = s.sums, part.argmax = s.argmax;
    if (s.sums.rest != A(-1) && !(s.sums.rest == s.sums.rest && s.argmax != s.kNowhere)) {
      const Found found = first_maximal<S>(a, row);
      part.argmax = found.nan ? nan_at(a.first_class + found.at) : a.first_class + found.at;
    } else if (s.argmax != s.kNowhere) {
      part.argmax += a.first_class;
    }
  } else {
    static_cast<LogSumExp<A>&>(part.sums) = s.sums;
  }
  if (K == Target::smooth) part.target.mass = a.smoothing;
  A label_weight = std::numeric_limits<A>::quiet_NaN();
  if (l.y >= 0) {
    label_weight = class_weight<A>(a, l.y);
    part.target.push(a.keep * label_weight, l.x_y, part.sums.max);
  }
  write_part<A>(a, row, part, label_weight);
}

// Statistics and loss of a row; 0 without a label, NaN with an impossible one.
template <class S, Target K, bool kMayBePart = true>
__device__ __forceinline__ void finish(const ArgsOf<S, K>& a, int64_t row, const Labelled<AccOf<S>>& l,
                                       const StateOf<K, AccOf<S>>& s) {
  using A = AccOf<S>;
  if (kMayBePart && a.parts) return leave_part<S, K>(a, row, l, s);
  const A log_sum = s.sums.log_sum(), infinity = std::numeric_limits<A>::infinity();
  bool has_loss = used<K>(l.y);
  if constexpr (kFull<K>) {
    has_loss = has_loss && !(a.skip_masked_rows && log_sum == -infinity);
  } else {
    if (row == 0 && a.reduction == Reduction::none) *static_cast<A*>(a.total_weight) = A(1);
  }
  if (!has_loss) {
    const A v = l.y == kImpossible ? std::numeric_limits<A>::quiet_NaN() : A(0);
    const bool masked = kFull<K> && used<K>(l.y);  // known by its log_sum
    write_row(a, row, v, masked ? -infinity : v, v, v);
    if constexpr (kFull<K>) write_more(a, row, v, v, v, v, v, 0);
    return;
  }
  const A kept = l.y < 0 ? A(0) : K == Target::smooth ? a.keep : a.keep * class_weight<A>(a, l.y);
  TargetGaps<A> target = s.target;
  if (K == Target::smooth) target.mass = a.smoothing;
  write_row(a, row, s.sums.max, log_sum, kept + target.mass, row_loss(kept, l.x_y, target, s.sums.max, log_sum));
  if constexpr (kFull<K>) {
    const bool found = log_sum == log_sum && s.argmax != s.kNowhere;
    write_more(a, row, s.sums.mean_heat(), s.sums.spread(), log_sum + s.sums.mean_heat(), s.sums.max + log_sum,
               s.sums.collision(),
               found      ? s.argmax
               : a.argmax ? first_maximal<S>(a, row).at
                          : 0);
  }
}

// How rows are spread over threads, all powers of two but `part`: `lanes` = 1 << shift threads a row; blockIdx.y takes
// `part` of its classes.
struct Spread {
  int lanes, shift;
  int64_t part;

  __device__ int lane() const { return threadIdx.x & (lanes - 1); }
  __device__ int64_t row(unsigned block) const {
    return int64_t(block) * (blockDim.x >> shift) + (threadIdx.x >> shift);
  }
  __device__ int64_t begin() const { return blockIdx.y * part; }
  __device__ int64_t end(int64_t classes) const { return begin() + part < classes ? begin() + part : classes; }
  // Rows of many threads are not read on where they have no loss. Short ones are, rather than wait for the label.
  __device__ bool reads(bool has_loss) const { return lanes <= 32 || has_loss; }
};

// states: where to leave a part for finish_rows; null when a row is one part, or when its parts are a cluster.
template <class S, Target K>
__global__ void __launch_bounds__(kMaxThreads, K == Target::full ? 2 : kResident<S, K>)  // of double too: 127 registers
    forward_rows(const __grid_constant__ ArgsOf<S, K> a, Spread spread, StateOf<K, AccOf<S>>* states) {
  const int lane = spread.lane();
  const int64_t row = spread.row(blockIdx.x), begin = spread.begin(), end = spread.end(a.classes);
  const bool exists = row < a.rows.count;
  RawLabel raw;
  if (exists) raw = load_label<K>(a, row);
  Labelled<AccOf<S>> l;
  StateOf<K, AccOf<S>> s;
  if (exists) {
    s = read_classes<S, K>(a, row, begin, end, lane, spread.lanes, [&](int64_t at) {
      use_from_here(raw.low), use_from_here(raw.high);
      l = labelled<S, K>(a, raw, at, begin);
      return spread.reads(used<K>(l.y));
    });
  }
  s = merge_group(s, spread.lanes);
  if (!states && gridDim.y > 1) s = merge_cluster(s);
  if (!exists || lane != 0 || (!states && blockIdx.y > 0)) return;
  if (states) {
    states[row * gridDim.y + blockIdx.y] = s;
  } else {
    finish<S, K>(a, row, l, s);
  }
}

// A warp a row merges its parts, in the same order always.
template <class S, Target K>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_rows(const __grid_constant__ ArgsOf<S, K> a, const StateOf<K, AccOf<S>>* states, int parts) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= a.rows.count) return;  // a whole warp
  StateOf<K, AccOf<S>> s;
  for (int i = lane; i < parts; i += 32) s.merge(states[row * parts + i]);
  s = merge_lanes(s, 32);
  if (lane != 0) return;
  finish<S, K>(a, row, labelled<S, K>(a, load_label<K>(a, row), offset_of(a.rows, a.logits, row), 0), s);
}

// The rows of all shards from their parts, a thread a row. Of fewer numbers than all there are no more statistics than
// the loss.
template <class A>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_parts(const __grid_constant__ FinishPartsArgs a) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= a.rows.count) return;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const int64_t y = label<Target::full>(a, row);
  const WholeRow whole = whole_row<A>(a, row, a.labels);
  const Moments<double>& s = whole.sums;
  const double log_sum = s.log_sum();
  const bool exists = used<Target::full>(y), full = a.part_numbers == kFullPart;
  A* const label_weight = label_weight_of<A>(a, row);
  if (!exists || (a.skip_masked_rows && log_sum == -infinity)) {
    const bool agreed = exists || (y == kIgnored && nobody_has<A>(a, row));
    const A v = agreed ? A(0) : std::numeric_limits<A>::quiet_NaN();
    write_row(a, row, v, exists ? A(-infinity) : v, v, v);  // a masked one is known by its log_sum
    if (full) write_more(a, row, v, v, v, v, v, 0);
    if (label_weight) *label_weight = v;
    return;
  }
  const double loss = row_loss(0., 0., whole.target, s.max, log_sum);
  write_row(a, row, A(s.max), A(log_sum), A(whole.target.mass), A(loss));
  if (label_weight) *label_weight = A(whole.label_weight);
  if (!full) return;
  write_more(a, row, A(s.mean_heat()), A(s.spread()), A(log_sum + s.mean_heat()), A(s.max + log_sum), A(s.collision()),
             whole.argmax == whole.kNowhere ? 0 : whole.argmax);
}

// ---- backward

template <class A>
struct RowGrad {
  A max, log_sum, mass, g;  // g: the incoming gradient of this row's loss, yet to be divided by `total`
  A total;

  __device__ __forceinline__ void divide() { g = divided(g, total); }
};
template <Target K, class A>
__device__ __forceinline__ RowGrad<A> load_row_grad(const CrossEntropyArgs& a, int64_t row) {
  const A* const stats = static_cast<const A*>(a.stats) + row;
  return {stats[0], stats[a.rows.count], stats[2 * a.rows.count],
          kFull<K> && !a.grad_loss ? A(0) : static_cast<const A*>(a.grad_loss)[row * a.grad_stride],
          a.reduction == Reduction::mean ? *static_cast<const A*>(a.total_weight) : A(1)};
}

// p_j (constant + heat u_j + square (p_j - sum p^2)): the gradient of all statistics but the loss.
struct NoMore {
  template <class A>
  __device__ NoMore(const RowArgs<A>&, int64_t) {}
};
template <class A>
struct More {
  A constant, heat, square, spread;

  __device__ __forceinline__ More(const FullArgs<A>& a, int64_t row) {
    const A* const stats = static_cast<const A*>(a.stats) + row;
    const auto get = [&](const void* grad) { return grad ? static_cast<const A*>(grad)[row] : A(0); };
    heat = get(a.grad_entropy), square = A(2) * get(a.grad_collision), spread = stats[4 * a.rows.count];
    constant = get(a.grad_logsumexp) - heat * stats[3 * a.rows.count];
  }
  __device__ __forceinline__ A slope(const FullArgs<A>& a, const RowGrad<A>& r, A z) const {
    const A u = gap(z, r.max), minus_log_p = u + r.log_sum, p = exp_nonpositive(-minus_log_p);
    A s = constant;
    if (a.grad_entropy) s += heat * u;
    if (a.grad_collision) s += square * above_collision(p, minus_log_p, spread);
    return times(p, s);
  }
};
template <class S, Target K>
using MoreOf = std::conditional_t<kFull<K>, More<AccOf<S>>, NoMore>;

// The gradient at class c of a row with label y: x its logit, t its probability (unused with a label).
template <class S, Target K, class A>
__device__ __forceinline__ A slope(const ArgsOf<S, K>& a, const RowGrad<A>& r, const MoreOf<S, K>& more, A x, A t,
                                   int64_t c) {
  if constexpr (kFull<K>) {
    const A z = transformed(a, x), q = mass_of<K>(a, t, c);
    return transform_slope(a, x) * (r.g * row_slope(z, r.max, r.log_sum, r.mass, q) + more.slope(a, r, z));
  } else {
    return r.g * row_slope(x, r.max, r.log_sum, r.mass, mass_of<K>(a, t, c), ExpOf<S>());
  }
}
template <class S, Target K, class A>
__device__ __forceinline__ A slope_at_label(const ArgsOf<S, K>& a, const RowGrad<A>& r, const MoreOf<S, K>& more, A x,
                                            int64_t y) {
  const A w = class_weight<A>(a, y), kept = a.keep * w, z = transformed(a, x);
  const A loss = r.g * label_slope(z, r.max, r.log_sum, kept, r.mass - kept, a.spread * w);
  if constexpr (kFull<K>) return transform_slope(a, x) * (loss + more.slope(a, r, z));
  return loss;
}
// Whether a row's -inf count as no row at all, which its statistics say.
template <class A>
__device__ __forceinline__ bool masked(const RowArgs<A>&, const RowGrad<A>&) {
  return false;
}
template <class A>
__device__ __forceinline__ bool masked(const FullArgs<A>& a, const RowGrad<A>& r) {
  return a.skip_masked_rows && r.log_sum == -std::numeric_limits<A>::infinity();
}
// The gradient of a row without a loss.
template <class A>
__device__ __forceinline__ A unused_slope(int64_t y) {
  return y == kImpossible ? std::numeric_limits<A>::quiet_NaN() : A(0);
}

// Backward goes through the rows from the last to the first: what forward read last is still in the L2, 50 MB of it.
__device__ __forceinline__ unsigned from_the_last() { return gridDim.x - 1 - blockIdx.x; }

// As forward_rows. Every element is read and written by the same thread, so the gradient may overwrite the logits.
// kShifted: for rows of logits and gradient that lie otherwise to 16 bytes, as those of a padded vocabulary and a dense
// gradient do. Packs are then the gradient's, each loaded as the two of the logits that it lies in: the second is in
// the L1, because the next thread loads it too.
template <class S, Target K, bool kShifted>
__global__ void __launch_bounds__(kMaxThreads, kShifted ? kShiftedResident<S, K> : kResident<S, K>)
    backward_rows(const __grid_constant__ ArgsOf<S, K> a, Spread spread) {
  using A = AccOf<S>;
  constexpr int N = Pack<S>::kSize, U = kPacks / 2;  // read and written: as many bytes in flight
  const int lane = spread.lane(), lanes = spread.lanes;
  const int64_t row = spread.row(from_the_last()), begin = spread.begin(), end = spread.end(a.classes);
  if (row >= a.rows.count) return;
  const int64_t at_x = offset_of(a.rows, a.logits, row) + begin * a.logits.class_stride;
  const int64_t at_out = offset_of(a.rows, a.grad_logits, row) + begin * a.grad_logits.class_stride;
  const int64_t at_t = kSoft<K> ? offset_of(a.rows, a.probabilities, row) + begin * a.probabilities.class_stride : 0;
  const S* const x = static_cast<const S*>(a.logits.data) + at_x;
  S* const out = static_cast<S*>(a.grad_logits.data) + at_out;
  Cut<S> cut(packs_with<S>(x, a.logits, at_x) && a.grad_logits.class_stride == 1 && a.grad_logits.dtype == kDtype<S>,
             kShifted ? out : x, end - begin);
  if (kSoft<K> && !probabilities_in_runs<S, N>(a, at_t + cut.head)) cut = Cut<S>(false, x, end - begin);
  const int into = kShifted ? cut.straddle(x) : 0;

  const uint4* const packs = reinterpret_cast<const uint4*>(x + cut.head - into);
  RawLabel raw_y = load_label<K>(a, row);
  RowGrad<A> r = load_row_grad<K, A>(a, row);
  const MoreOf<S, K> more(a, row);
  int64_t y = kIgnored;
  bool has_loss = true;  // until the label is looked at, behind the first loads
  const auto started = [&] {
    use_from_here(raw_y.low), use_from_here(raw_y.high), use_from_here(r.total);
    y = judge<K>(a, raw_y), has_loss = used<K>(y) && !masked(a, r), r.divide();
  };
  bool label_here = false;  // whether this thread has met the label, and its logit
  A x_y = A(0);
  for (int64_t p = lane; p < cut.packs; p += U * lanes) {
    Pack<S> raw[U], behind[U];
    int64_t at[U];
    bool reads[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int64_t i = p + u * lanes;
      reads[u] = i < cut.packs && spread.reads(has_loss), at[u] = at_t + cut.head + i * N;
      if (reads[u]) raw[u] = load_pack<S>(packs + i);
      if (reads[u] && kShifted) behind[u] = load_pack<S>(packs + i + 1);
    }
    A p_k[U][N];
    load_probabilities<S, K>(a, at, reads, p_k);
    if (p == lane) started();
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int64_t i = p + u * lanes, c = begin + cut.head + i * N;
      if (i >= cut.packs) break;
      Pack<S> grad;
      A logit[N];
      widen_run(kShifted ? straddling(raw[u], behind[u], into) : raw[u], logit);
      if (has_loss) {
#pragma unroll
        for (int k = 0; k < N; k++) grad.v[k] = narrow<S>(slope<S, K>(a, r, more, logit[k], p_k[u][k], c + k));
      } else {
#pragma unroll
        for (int k = 0; k < N; k++) grad.v[k] = narrow<S>(unused_slope<A>(y));
      }
      if (!kSoft<K> && y >= c && y < c + N) {
        label_here = true;
#pragma unroll
        for (int k = 0; k < N; k++) x_y = y == c + k ? logit[k] : x_y;
      }
      if constexpr (kSoft<K> || kFull<K>) {  // which have no kernel for what is shifted
        store_run(out + cut.head + i * N, grad);
      } else {
        store_pack(reinterpret_cast<uint4*>(out + cut.head) + i, grad);
      }
    }
  }
  if (lane >= cut.packs) started();
  for (int64_t s = lane; s < cut.single; s += lanes) {
    const int64_t i = cut.at(s), c = begin + i;
    A v = unused_slope<A>(y);
    if (has_loss) {
      const A x_i = load_one<S>(a.logits, at_x + i * a.logits.class_stride);
      const A p = kSoft<K> ? load_float<A>(a.probabilities, at_t + i * a.probabilities.class_stride) : A(0);
      v = slope<S, K>(a, r, more, x_i, p, c);
      if (!kSoft<K> && c == y) label_here = true, x_y = x_i;
    }
    store_one<S>(a.grad_logits, at_out + i * a.grad_logits.class_stride, v);
  }
  if (label_here &&
      (!kFull<K> || has_loss)) {  // over what the loops wrote there: one expm1 a row instead of one an element
    store_one<S>(a.grad_logits, at_out + (y - begin) * a.grad_logits.class_stride,
                 slope_at_label<S, K>(a, r, more, x_y, y));
  }
}

// ---- rows side by side: P pixels a thread, or `slices` threads that take their classes in turn. P is 2 for logits of
// 16 bits with labels, where sizes and strides are even: a thread's loads are then of 4 bytes as with float32.

// Logits and probabilities of kUnroll classes of P pixels, all loads before the first use: behind the last class one
// before it is loaded again, since a load with a condition would be waited for.
template <class S, Target K, int P>
__device__ __forceinline__ void load_pixels(const RowArgs<AccOf<S>>& a, int64_t at_x, int64_t at_t, int64_t first,
                                            int slices, int64_t end, AccOf<S> (&x)[kUnroll][P],
                                            AccOf<S> (&t)[kUnroll][P], bool (&inside)[kUnroll]) {
  int64_t at[kUnroll];
  bool always[kUnroll];
  const auto place = [&](int64_t from, int64_t stride) {  // a tree: no address waits for all before it
    at[0] = from + first * stride;
#pragma unroll
    for (int u = 1; u < kUnroll; u++) at[u] = at[u & (u - 1)] + (inside[u] ? (u & -u) * (slices * stride) : 0);
  };
  const int left = end - first < kUnroll * slices ? int(end - first) : kUnroll * slices;
#pragma unroll
  for (int u = 0; u < kUnroll; u++) inside[u] = u * slices < left, always[u] = true;
  place(at_x, a.logits.class_stride);
  if constexpr (kDtype<S> != Dtype::f64) {
    load_aligned_runs<S>(a.logits.data, at, always, x);
  } else {  // double sums of any logits
    visit_float(a.logits.dtype, [&](auto type) { load_aligned_runs<decltype(type)>(a.logits.data, at, always, x); });
  }
  place(at_t, a.probabilities.class_stride);
  load_probabilities<S, K>(a, at, always, t);
}

template <class S, Target K, int P>
__global__ void __launch_bounds__(kPixelThreads, kPixelResident<S, K, P>)
    forward_pixels(const __grid_constant__ ArgsOf<S, K> a, int slices) {
  using A = AccOf<S>;
  using State = StateOf<K, A>;
  const int threads = blockDim.x / slices, slice = threadIdx.x / threads;
  const int64_t row = (int64_t(blockIdx.x) * threads + threadIdx.x % threads) * P;
  const bool exists = row < a.rows.count;
  const int64_t step = int64_t(slices) * kUnroll;
  const int64_t at_x = exists ? offset_of(a.rows, a.logits, row) : 0;
  const int64_t at_t = exists && kSoft<K> ? offset_of(a.rows, a.probabilities, row) : 0;
  Labelled<A> l[P];
  State all[P];
  bool reads = false;
#pragma unroll
  for (int p = 0; p < P; p++) {
    if (exists) l[p] = labelled<S, K>(a, load_label<K>(a, row + p), at_x + p, 0);
    reads |= exists && used<K>(l[p].y);
  }
  if (reads) {
    for (int64_t group = 0; group < a.classes; group += step * (kGroup / kUnroll)) {
      const int64_t end = group + step * (kGroup / kUnroll) < a.classes ? group + step * (kGroup / kUnroll) : a.classes;
      ReaderOf<S, K> reader[P];
      for (int64_t first = group + slice; first < end; first += step) {
        A x[kUnroll][P], t[kUnroll][P];
        bool inside[kUnroll];
        load_pixels<S, K>(a, at_x, at_t, first, slices, end, x, t, inside);
#pragma unroll
        for (int p = 0; p < P; p++) {
          A logit[kUnroll][1], q[kUnroll][1];
#pragma unroll
          for (int u = 0; u < kUnroll; u++) {
            logit[u][0] = inside[u] ? transformed(a, x[u][p]) : minus_infinity<A>();
            q[u][0] = inside[u] ? mass_of<K>(a, t[u][p], first + u * slices) : A(0);
          }
          reader[p].push(a, logit, q, inside, first, slices);
        }
      }
#pragma unroll
      for (int p = 0; p < P; p++) all[p].merge(reader[p].state(a));
    }
  }
  if (slices > 1) {
    CECE_SHARED(Slot<State>, of_thread, P * kPixelThreads);
#pragma unroll
    for (int p = 0; p < P; p++) of_thread[threadIdx.x * P + p].put(all[p]);
    __syncthreads();
    for (int i = 1; slice == 0 && i < slices; i++) {
#pragma unroll
      for (int p = 0; p < P; p++) all[p].merge(of_thread[(threadIdx.x + i * threads) * P + p].get());
    }
  }
  if (!exists || slice != 0) return;
#pragma unroll
  for (int p = 0; p < P; p++) finish<S, K, P == 1>(a, row + p, l[p], all[p]);
}

template <class S, Target K, int P>
__global__ void __launch_bounds__(kPixelThreads, kPixelResident<S, K, P>)
    backward_pixels(const __grid_constant__ ArgsOf<S, K> a, int slices) {
  using A = AccOf<S>;
  const int threads = blockDim.x / slices, slice = threadIdx.x / threads;
  const int64_t row = (int64_t(from_the_last()) * threads + threadIdx.x % threads) * P;
  if (row >= a.rows.count) return;
  const int64_t at_x = offset_of(a.rows, a.logits, row), at_out = offset_of(a.rows, a.grad_logits, row);
  const int64_t at_t = kSoft<K> ? offset_of(a.rows, a.probabilities, row) : 0;
  int64_t y[P];
  RowGrad<A> r[P];
  A x_y[P];
  bool reads = false, has_loss[P], label_here[P];
#pragma unroll
  for (int p = 0; p < P; p++) {
    y[p] = label<K>(a, row + p), r[p] = load_row_grad<K, A>(a, row + p), r[p].divide();
    has_loss[p] = used<K>(y[p]) && !masked(a, r[p]), label_here[p] = false, x_y[p] = A(0);
    reads |= has_loss[p];
  }
  static_assert(P == 1 || !kFull<K>);
  const MoreOf<S, K> more(a, row);
  for (int64_t first = slice; first < a.classes; first += int64_t(slices) * kUnroll) {
    A x[kUnroll][P], t[kUnroll][P];
    bool inside[kUnroll];
    if (reads) load_pixels<S, K>(a, at_x, at_t, first, slices, a.classes, x, t, inside);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int64_t c = first + u * slices, at = at_out + c * a.grad_logits.class_stride;
      if (c >= a.classes) break;
      Run<S, P> grad;
#pragma unroll
      for (int p = 0; p < P; p++) {
        const A v = has_loss[p] ? slope<S, K>(a, r[p], more, x[u][p], t[u][p], c) : unused_slope<A>(y[p]);
        if (!kSoft<K> && c == y[p]) label_here[p] = has_loss[p], x_y[p] = x[u][p];
        if constexpr (P == 1) {
          store_one<S>(a.grad_logits, at, v);
        } else {
          grad.v[p] = narrow<S>(v);
        }
      }
      if constexpr (P > 1) store_aligned_run(static_cast<S*>(a.grad_logits.data) + at, grad);
    }
  }
#pragma unroll
  for (int p = 0; p < P; p++) {
    if (!label_here[p]) continue;
    const int64_t at = at_out + p + y[p] * a.grad_logits.class_stride;
    store_one<S>(a.grad_logits, at, slope_at_label<S, K>(a, r[p], more, x_y[p], y[p]));
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
__global__ void __launch_bounds__(kSumThreads, kMinBlocks)  // left to itself sm_100's compiler spills 8 bytes of double
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

template <class S, class Args>
struct CrossEntropy {
  using A = AccOf<S>;
  static constexpr bool kAll = std::is_same_v<Args, TokenStatisticsArgs>;

  template <class F>
  static void visit_target(const Args& a, F&& f) {  // f(integral_constant<Target, K>)
    if constexpr (kAll) {
      a.probabilities.data ? f(std::integral_constant<Target, Target::full_mixed>{})
                           : f(std::integral_constant<Target, Target::full>{});
      return;
    } else if constexpr (kDtype<S> != Dtype::f64) {  // whose sums take any type of logits too
      if (a.probabilities.data && a.probabilities.dtype != kDtype<S>) {
        return f(std::integral_constant<Target, Target::mixed>{});
      }
    }
    if constexpr (!kAll) {
      if (a.probabilities.data) return f(std::integral_constant<Target, Target::soft>{});
      if (a.label_smoothing > 0 && a.weight) return f(std::integral_constant<Target, Target::weighted>{});
      if (a.label_smoothing > 0) return f(std::integral_constant<Target, Target::smooth>{});
      return f(std::integral_constant<Target, Target::hard>{});
    }
  }

  struct Plan {
    bool pixels;
    int together;  // pixels a thread
    int slices, parts;
    bool clusters;  // of a row's parts
    RowLaunch row;
    Spread spread;
    int64_t blocks;
    int sums;
  };
  template <Target K>
  static constexpr bool kPairs = sizeof(S) == 2 && (K == Target::hard || K == Target::smooth);
  // Whether neighbouring pixels can be loaded and stored together everywhere. Not parts: finishing two of these, the
  // compiler would have 4 loads under way for 8.
  static bool in_pairs(const Args& a) {
    if (a.parts) return false;
    bool even = false;
    visit_target(a, [&](auto kind) { even = kPairs<decltype(kind)::value>; });
    const int last = a.rows.dims - 1;
    even &= a.rows.size[last] % 2 == 0;
    for (const Operand* t : {&a.logits, &a.grad_logits}) {
      if (!t->data) continue;
      even &= t->stride[last] == 1 && t->class_stride % 2 == 0 && reinterpret_cast<uintptr_t>(t->data) % 4 == 0;
      for (int d = 0; d < last; d++) even &= t->stride[d] % 2 == 0;
    }
    return even;
  }
  static Plan plan(const Args& a, const Device& d, int64_t blocks = kForwardBlocks) {
    Plan p{};
    const int64_t bytes = a.classes * int64_t(sizeof(S));
    p.pixels = pixels_across_threads(a);
    p.together = p.pixels && in_pairs(a) ? 2 : 1;
    p.slices = pixel_slices(a.rows.count / p.together, a.classes, d.multiprocessors);
    p.row = row_launch(bytes);
    p.parts = p.pixels ? 1 : row_parts(a.rows.count, bytes, blocks * d.multiprocessors);
    p.clusters = d.clusters && p.parts > 1 && p.parts <= kMaxCluster;
    p.spread = {p.row.lanes, 0, (a.classes + p.parts - 1) / p.parts};
    while (1 << p.spread.shift < p.row.lanes) p.spread.shift++;
    const int rows_a_block = p.pixels ? kPixelThreads / p.slices * p.together : p.row.threads / p.row.lanes;
    p.blocks = (a.rows.count + rows_a_block - 1) / rows_a_block;
    p.sums = a.reduction == Reduction::none ? 0 : sum_blocks(a.rows.count);
    return p;
  }

  using State = StateOf<kAll ? Target::full : Target::soft, A>;  // no other is larger
  static int64_t state_bytes(const Args& a, const Plan& p) {
    return p.parts > 1 && !p.clusters ? a.rows.count * p.parts * int64_t(sizeof(State)) : 0;
  }
  static int64_t forward_scratch(const Args& a, const Device& d) {
    const Plan p = plan(a, d);
    return state_bytes(a, p) + (p.sums > 1 ? p.sums * int64_t(sizeof(Sums)) : 0);
  }

  // Whether logits and gradient could both be taken in packs, but not in the same ones.
  static bool shifted(const Args& a) {
    const auto packed = [](const Operand& t) { return t.dtype == kDtype<S> && t.class_stride == 1; };
    if (!packed(a.logits) || !packed(a.grad_logits)) return false;
    const auto first = [](const Operand& t) { return reinterpret_cast<uintptr_t>(t.data); };
    bool same = (first(a.logits) - first(a.grad_logits)) % 16 == 0;
    for (int d = 0; d < a.rows.dims; d++) {
      same &= (a.logits.stride[d] - a.grad_logits.stride[d]) * int64_t(sizeof(S)) % 16 == 0;
    }
    return !same;
  }

  template <Target K>
  static void launch_rows(const Args& a, const Device& d, const Plan& p, void* scratch) {
    const auto stream = static_cast<cudaStream_t>(d.stream);
    auto* const states = static_cast<StateOf<K, A>*>(scratch);
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
        const auto kernel = p.together == 2 ? forward_pixels < S, K, kPairs<K> ? 2 : 1 > : forward_pixels<S, K, 1>;
        launch(kernel, dim3(unsigned(p.blocks)), kPixelThreads, stream, 1, a, p.slices);
      });
    }
    if (p.sums == 0) return;
    auto* const partial = reinterpret_cast<Sums*>(static_cast<char*>(scratch) + state_bytes(a, p));
    launch(reduce_rows<A>, dim3(p.sums), kSumThreads, stream, 1, a, p.sums > 1 ? partial : nullptr);
    if (p.sums > 1) launch(reduce_partial<A>, dim3(1), kSumThreads, stream, 1, a, partial, p.sums);
  }

  static void backward(const Args& a, const Device& d) {
    const auto stream = static_cast<cudaStream_t>(d.stream);
    const Plan p = plan(a, d, kBackwardBlocks);
    if (a.rows.count == 0 || a.classes == 0) return;
    visit_target(a, [&](auto kind) {
      constexpr Target K = decltype(kind)::value;
      if (p.pixels) {
        const auto kernel = p.together == 2 ? backward_pixels < S, K, kPairs<K> ? 2 : 1 > : backward_pixels<S, K, 1>;
        return launch(kernel, dim3(unsigned(p.blocks)), kPixelThreads, stream, 1, a, p.slices);
      }
      const dim3 grid(unsigned(p.blocks), unsigned(p.parts));
      if constexpr (!kSoft<K> && !kFull<K>) {
        if (shifted(a)) return launch(backward_rows<S, K, true>, grid, p.row.threads, stream, 1, a, p.spread);
      }
      launch(backward_rows<S, K, false>, grid, p.row.threads, stream, 1, a, p.spread);
    });
  }

  static void whole(const FinishPartsArgs& a, const Device& d) {
    if (a.rows.count == 0) return;
    const dim3 grid(unsigned((a.rows.count + kFinishThreads - 1) / kFinishThreads));
    launch(finish_parts<A>, grid, kFinishThreads, static_cast<cudaStream_t>(d.stream), 1, a);
  }

  static int compiled_for() { return cuda::compiled_for(forward_rows < S, kAll ? Target::full : Target::hard >); }

  static constexpr RowKernels<Args> kernels = {compiled_for, forward_scratch, forward, backward};
};

}  // namespace cece::cuda
