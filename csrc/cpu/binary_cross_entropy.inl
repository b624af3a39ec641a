// Elementwise losses on a CPU: every struct of numerics.h that visit_loss knows.
//
// The tensors are walked in the logical order of their elements, a block of kBlock at a time. An operand that is
// not a contiguous run there (broadcast, strided, of a dtype no kernel reads) is brought into a buffer in L1 first; a
// truth of listed classes is written out there, block by block, and nowhere else.
#pragma once
#include <numeric>

#include "block.h"
#include "kernels.h"

namespace cece::cpu {
namespace {

// f(offset, first, count) for the runs along the last dimension that make up elements begin ... begin + n - 1.
template <class F>
inline void each_run(const Shape& s, const Operand& t, int64_t begin, int64_t n, F&& f) {
  const int last = s.dims - 1;
  const int64_t inner = last < 0 ? 1 : s.size[last];
  for (int64_t i = 0; i < n;) {
    const int64_t count = std::min(n - i, inner - (begin + i) % inner);
    f(offset_of(s, t, begin + i), i, count);
    i += count;
  }
}

inline int64_t inner_stride(const Shape& s, const Operand& t) { return s.dims ? t.stride[s.dims - 1] : 0; }

// True where the n elements from begin on are one run.
inline bool one_run(const Shape& s, int64_t begin, int64_t n) {
  return s.dims < 2 || begin % s.size[s.dims - 1] + n <= s.size[s.dims - 1];
}

// How many elements to take at once from `begin` on: not across the end of a row, where rows are long. Operands that
// could not be merged with the others are then still runs.
inline int64_t block_length(const Shape& s, int64_t begin, int64_t end) {
  const int64_t inner = s.dims ? s.size[s.dims - 1] : 1;
  const int64_t n = std::min(kBlock, end - begin);
  return inner < 256 ? n : std::min(n, inner - begin % inner);
}

template <class A>
inline const A* gather(const Shape& s, const Operand& t, int64_t begin, int64_t n, A* buffer) {
  const int64_t stride = inner_stride(s, t);
  if (one_run(s, begin, n)) return load(t, offset_of(s, t, begin), stride, n, buffer);
  each_run(s, t, begin, n, [&](int64_t offset, int64_t first, int64_t count) {
    const A* run = load(t, offset, stride, count, buffer + first);
    if (run != buffer + first) std::copy_n(run, count, buffer + first);
  });
  return buffer;
}

template <class A>
struct BinaryCrossEntropyOf {
  using V = Vec<A>;
  using Int = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;
  using Args = BinaryCrossEntropyArgs;
  static constexpr int64_t kLanes = V::size();

  struct Buffers {
    alignas(64) A x[kBlock], y[kBlock], w[kBlock], p[kBlock], g[kBlock], out[kBlock];
    uint8_t m[kBlock];
  };
  template <class X, class Y>
  struct Inputs {  // a block; w, p and m null where absent
    const X* x;
    const Y* y;
    const A *w, *p;
    const uint8_t* m;
  };
  template <class X, class Y>
  static Inputs<X, Y> read(const Args& a, int64_t begin, int64_t n, Buffers& b) {
    const auto get = [&]<class S>(Type<S>, const Operand& t, A* buffer) -> const S* {
      if constexpr (std::is_same_v<S, A>) return t.data ? gather(a.shape, t, begin, n, buffer) : nullptr;
      return static_cast<const S*>(t.data) + offset_of(a.shape, t, begin);
    };
    const Type<A> acc;
    const Y* y;
    if constexpr (std::is_same_v<Y, A>) {
      y = a.listed.labels.data ? write_out(a, begin, n, b.y) : get(acc, a.target, b.y);
    } else {
      y = get(Type<Y>(), a.target, b.y);
    }
    return {get(Type<X>(), a.input, b.x), y, get(acc, a.weight, b.w), get(acc, a.pos_weight, b.p),
            bytes(a, begin, n, b)};
  }
  static const uint8_t* bytes(const Args& a, int64_t begin, int64_t n, Buffers& b) {  // of the mask
    const auto* data = static_cast<const uint8_t*>(a.mask.data);
    const int64_t stride = inner_stride(a.shape, a.mask);
    if (!data) return nullptr;
    if (stride == 1 && one_run(a.shape, begin, n)) return data + offset_of(a.shape, a.mask, begin);
    each_run(a.shape, a.mask, begin, n, [&](int64_t offset, int64_t first, int64_t count) {
      gather_strided(data + offset, stride, count, b.m + first);
    });
    return b.m;
  }
  // Whether a block of an operand is a run of S, wherever it begins.
  template <class S>
  static bool is_run(const Args& a, const Operand& t) {
    const Shape& s = a.shape;
    return t.data && t.dtype == dtype_of<S> && inner_stride(s, t) == 1 && (s.dims < 2 || s.size[s.dims - 1] >= 256);
  }
  // The truth of n elements from `begin` on: 1 at the classes that their rows list. A class listed twice is as if once.
  static const A* write_out(const Args& a, int64_t begin, int64_t n, A* y) {
    const ListedTruth& t = a.listed;
    std::fill_n(y, n, A(0));
    visit(t.labels.dtype, [&](auto type) {
      const auto* labels = static_cast<const typename decltype(type)::type*>(t.labels.data);
      for (int64_t row = begin / t.classes; row <= (begin + n - 1) / t.classes; row++) {
        const int64_t from = t.offsets ? t.offsets[row] : row * t.each;
        const int64_t to = t.offsets ? t.offsets[row + 1] : from + t.each;
        for (int64_t k = from; k < to; k++) {
          const int64_t label = static_cast<int64_t>(labels[k]);
          if (label == t.padding) continue;
          if (label < 0 || label >= t.classes) {
            if (a.bad) report(a.bad, k);
            continue;
          }
          const int64_t i = row * t.classes + label - begin;
          if (i >= 0 && i < n) y[i] = A(1);
        }
      }
    });
    return y;
  }

  // Of no probability the sign bit is set. As integers the bits of one lie between those of 0 and 1: neither they nor 1
  // minus them have a sign.
  static V outside(V v) { return v | at::vec::cast<A>(at::vec::cast<Int>(V(A(1))) - at::vec::cast<Int>(v)); }
  // Reports the first of n elements that is no probability, or whose target is none.
  static void report_first(const Args& a, int64_t begin, int64_t n, Buffers& b) {
    const auto fine = [](A v) { return v >= A(0) && v <= A(1); };
    const auto in = read<A, A>(a, begin, n, b);
    for (int64_t i = 0; i < n; i++) {
      if (!(fine(in.x[i]) && fine(in.y[i]))) return report(a.bad, begin + i);
    }
  }

  // What a call needs beside inputs and truths; what it does not is compiled out.
  enum Options { kNone, kMasked /* or the truth is smoothed */, kWeighted /* too */ };

  // f(x, y, k) for the vectors of a pack of inputs and truths. What is missing of the last is certain.
  template <class Loss, class X, class Y, class F>
  static inline __attribute__((always_inline)) void each_element(const Inputs<X, Y>& in, int64_t i, int64_t count,
                                                                 F&& f) {
    using P = Pack<A, X>;
    const auto filled = [&](const auto* from, A filling) {
      return count == P::kSize ? Pack<A, std::remove_cvref_t<decltype(*from)>>::load(from + i)
                               : load_filled(from, i, i + count, filling);
    };
    const P x = filled(in.x, Loss::template kCertain<A>);
    P y;
    if constexpr (std::is_same_v<X, Y>) {
      y = filled(in.y, A(0));
    } else {
      y = load_bytes<A, X>(in.y + i, count);
    }
    for (int k = 0; k < P::kVectors; k++) f(x.v[k], y.v[k], k);
  }
  template <Options kOptions>
  static V truth(const Args& a, V y) {
    return kOptions != kNone ? smoothed(y, V(A(a.keep)), V(A(a.spread))) : y;
  }

  template <Options kOptions, class Loss>
  static V loss_of(const Loss& l, V x, V y, V pos_weight) {
    if constexpr (Loss::kProbabilities) {
      if (set_lanes(equal(y * y, y)) == kEveryLane<A>) return l.loss_of_outcome(x, greater(y, V(A(0))));
    }
    if constexpr (kOptions == kWeighted) {
      return l.loss(x, y, pos_weight);
    } else {
      return l.loss(x, y, One());
    }
  }

  // Of some vectors of outcomes the losses' sum, by one logarithm; false if something is no outcome, or one that is
  // nearly impossible: then a sign is set, a truth beside 1 is not 0, or the product is NaN.
  template <class Loss>
  static constexpr int64_t kOutcomes = Loss::template Outcomes<V>::kMost * kLanes;
  template <class Loss, class X, class Y>
  static inline __attribute__((always_inline)) bool loss_of_outcomes(const Inputs<X, Y>& in, int64_t i, V& sum) {
    typename Loss::template Outcomes<V> all;
    V signs(A(0)), odd(A(0));
#pragma GCC unroll 8
    for (int64_t k = 0; k < kOutcomes<Loss>; k += Pack<A, X>::kSize) {
      each_element<Loss>(in, i + k, Pack<A, X>::kSize, [&](V x, V y, int) __attribute__((always_inline)) {
        const auto yes = equal(y, V(A(1)));
        const V other = V(A(1)) - x, p = select(yes, x, other), rest = select(yes, other, x);
        signs = signs | rest | (p - V(A(all.kLeast)));
        odd = odd | select(yes, V(A(0)), y);
        all.add(p, rest);
      });
    }
    sum = all.loss();
    const V negative = at::vec::cast<A>(at::vec::cast<Int>(signs) >> Vec<Int>(Int(8 * sizeof(A) - 1)));
    return !set_lanes(odd | negative) && set_lanes(greater(all.product, V(A(0)))) == kEveryLane<A>;
  }

  template <Options kOptions, class X, class Y, class Loss>
  static void forward_chunk(const Args& a, const Loss& l, Buffers& b, int64_t task) {
    using P = Pack<A, X>;
    using Sum = std::conditional_t<kOptions == kWeighted, SumOf<V>, typename Loss::template Sum<V>>;
    constexpr int64_t kSum = Sum::kMost * kLanes;  // elements added up in Acc before the sum goes on in double
    double total[kLanes] = {};
    int64_t used = 0;  // of masked elements how many count
    const int64_t begin_of_task = task * kChunk, end = std::min(begin_of_task + kChunk, a.shape.count);
    for (int64_t begin = begin_of_task, n; begin < end; begin += n) {
      n = block_length(a.shape, begin, end);
      const auto in = read<X, Y>(a, begin, n, b);
      V signs(A(0));
      const auto check = [&](V x, V y) __attribute__((always_inline)) {
        if constexpr (Loss::kProbabilities) signs = signs | outside(x) | outside(y);
      };
      const auto counts = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const auto counts = not_zero(Type<A>(), in.m + i, count);
        used += std::popcount(unsigned(set_lanes(counts)));
        return counts;
      };
      const auto value = [&](V x, V y, int64_t i, int64_t count) __attribute__((always_inline)) {
        V loss = loss_of<kOptions>(l, x, truth<kOptions>(a, y), in.p ? load_vector(in.p + i, count) : V(A(1)));
        if (kOptions == kWeighted && in.w) loss = weighted(load_vector(in.w + i, count), loss);
        return kOptions != kNone && in.m ? select(counts(i, count), loss, V(A(0))) : loss;
      };
      const auto add = [&](auto& sum, V x, V y, int64_t i, int64_t count) __attribute__((always_inline)) {
        check(x, y);
        if constexpr (std::is_same_v<Sum, SumOf<V>>) {
          const V loss = value(x, y, i, count);
          sum.add(kOptions != kNone && count < kLanes ? first_lanes(loss, count) : loss);
        } else {
          y = truth<kOptions>(a, y);
          if (kOptions != kNone && count < kLanes) y = first_lanes(y, count);
          const Sum without = sum;
          sum.add(x, y);
          if (kOptions != kNone && in.m) sum.only_where(counts(i, count), without);
        }
      };
      if (a.loss) {
        if constexpr (P::kVectors == 1) {
          A* const out = static_cast<A*>(a.loss) + begin;
          each_vector<A>(n, [&](int64_t i, int64_t count) {
            each_element<Loss>(in, i, count, [&](V x, V y, int) __attribute__((always_inline)) {
              check(x, y);
              store_vector(out + i, value(x, y, i, count), count);
            });
          });
        }
      } else {
        const auto add_to_total = [&](V sum) {
          A lane[kLanes];
          sum.store(lane);
          for (int64_t k = 0; k < kLanes; k++) total[k] += double(lane[k]);
        };
        for (int64_t from = 0; from < n;) {
          if constexpr (Loss::kProbabilities && kOptions == kNone) {
            V sum;
            if (from + kOutcomes<Loss> <= n && loss_of_outcomes<Loss>(in, from, sum)) {
              add_to_total(sum), from += kOutcomes<Loss>;
              continue;
            }
          }
          Sum sum[4];
          each_pack<P, 4>(std::min(kSum, n - from),
                          [&](int64_t offset, int64_t count, int turn) __attribute__((always_inline)) {
                            const int64_t i = from + offset;
                            each_element<Loss>(in, i, count, [&](V x, V y, int k) __attribute__((always_inline)) {
                              add(sum[turn + k], x, y, i, count);
                            });
                          });
          sum[0].add(sum[1]), sum[2].add(sum[3]), sum[0].add(sum[2]);
          add_to_total(sum[0].value()), from += kSum;
        }
      }
      if constexpr (Loss::kProbabilities) {
        A lane[kLanes];
        signs.store(lane);
        if (std::any_of(lane, lane + kLanes, [](A x) { return std::signbit(x); })) report_first(a, begin, n, b);
      }
    }
    if (!a.partial) return;
    static_cast<double*>(a.partial)[2 * task] = std::accumulate(total, total + kLanes, 0.0);
    static_cast<double*>(a.partial)[2 * task + 1] = double(a.mask.data ? used : end - begin_of_task);
  }

  template <Options kOptions, class X, class Y, class Loss>
  static void backward_chunk(const Args& a, const Loss& l, Buffers& b, int64_t task) {
    using P = Pack<A, X>;
    const A scale = a.reduction == Reduction::mean ? A(1) / A(a.shape.count) : A(1);
    const int64_t out_stride = inner_stride(a.shape, a.grad_input);
    const bool stream = worth_streaming(a.input.data, a.grad_input, a.shape.count);
    const int64_t end = std::min((task + 1) * kChunk, a.shape.count);
    for (int64_t begin = task * kChunk, n; begin < end; begin += n) {
      n = block_length(a.shape, begin, end);
      const auto in = read<X, Y>(a, begin, n, b);
      const A* g = a.reduction == Reduction::none ? gather(a.shape, a.grad_loss, begin, n, b.g) : nullptr;
      const A of_all = g ? A(1) : *static_cast<const A*>(a.grad_loss.data) * scale;
      const V common(of_all == of_all ? of_all : std::numeric_limits<A>::quiet_NaN());  // as narrow_pairs wants it
      const auto slope_of = [&](V x, V y, int64_t i, int64_t count) __attribute__((always_inline)) {
        V slope;
        y = truth<kOptions>(a, y);
        if constexpr (kOptions == kWeighted) {
          slope = l.slope(x, y, in.p ? load_vector(in.p + i, count) : V(A(1)));
          if (in.w) slope = slope * load_vector(in.w + i, count);
        } else {
          slope = l.slope(x, y, One());
        }
        slope = slope * (g ? load_vector(g + i, count) : common);
        return kOptions != kNone && in.m ? select(not_zero(Type<A>(), in.m + i, count), slope, V(A(0))) : slope;
      };
      const auto slopes = [&](X* out, bool stream) {
        const auto pack = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
          P p;
          each_element<Loss>(
              in, i, count, [&](V x, V y, int k) __attribute__((always_inline)) { p.v[k] = slope_of(x, y, i, count); });
          if (count < P::kSize) return store_few(p, out + i, count);
          stream ? p.stream(out + i) : p.store(out + i);
        };
        const int64_t head = stream ? before_whole_vector(out, n) : 0;
        if (head) pack(0, head);
        each_pack<P, P::kVectors>(
            n - head, [&](int64_t i, int64_t count, int) __attribute__((always_inline)) { pack(head + i, count); });
      };
      if constexpr (!std::is_same_v<X, A>) {
        slopes(static_cast<X*>(a.grad_input.data) + offset_of(a.shape, a.grad_input, begin), stream);
      } else {
        const bool direct = one_run(a.shape, begin, n);
        A* out = direct ? room(a.grad_input, offset_of(a.shape, a.grad_input, begin), out_stride, b.out) : b.out;
        slopes(out, stream && out != b.out);
        each_run(a.shape, a.grad_input, begin, n, [&](int64_t offset, int64_t first, int64_t count) {
          A* place = room(a.grad_input, offset, out_stride, out + first);
          if (place != out + first) std::copy_n(out + first, count, place);
          store(a.grad_input, offset, out_stride, count, out + first);
        });
      }
    }
  }

  template <Options kOptions, class X, class Y>
  struct Kernel {
    template <class Loss>
    static void forward(const Args& a, const Loss& l, Scratch& scratch, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) forward_chunk<kOptions, X, Y>(a, l, as<Buffers>(scratch), t);
    }
    template <class Loss>
    static void backward(const Args& a, const Loss& l, Scratch& scratch, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) backward_chunk<kOptions, X, Y>(a, l, as<Buffers>(scratch), t);
      end_streaming();
    }
  };
  // f(loss, kernel): the losses that torch has have kernels for fewer options and, of float, for the storage types of
  // most calls. All others go through buffers.
  template <class F>
  static void visit_kernel(const Args& a, F&& f) {
    visit_loss<A>(a.kind, a.own, [&](const auto& loss) {
      if constexpr (std::is_empty_v<std::decay_t<decltype(loss)>>) {
        const bool masked = a.mask.data || a.keep != 1 || a.spread != 0;
        if (!a.weight.data && !a.pos_weight.data) {
          if constexpr (std::is_same_v<A, float>) {
            const bool bytes = is_run<uint8_t>(a, a.target);
            if (bytes && masked) return f(loss, Kernel<kMasked, A, uint8_t>());
            if (!masked && a.reduction != Reduction::none && is_run<BFloat16>(a, a.input) &&
                (!a.grad_input.data || is_run<BFloat16>(a, a.grad_input))) {
              if (bytes) return f(loss, Kernel<kNone, BFloat16, uint8_t>());
              if (is_run<BFloat16>(a, a.target)) return f(loss, Kernel<kNone, BFloat16, BFloat16>());
            }
            if (bytes) return f(loss, Kernel<kNone, A, uint8_t>());
          }
          return masked ? f(loss, Kernel<kMasked, A, A>()) : f(loss, Kernel<kNone, A, A>());
        }
      }
      f(loss, Kernel<kWeighted, A, A>());
    });
  }
  static void forward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kernel(a, [&](const auto& loss, auto kernel) { kernel.forward(a, loss, scratch, begin, end); });
  }
  static void backward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kernel(a, [&](const auto& loss, auto kernel) { kernel.backward(a, loss, scratch, begin, end); });
  }

  static constexpr BinaryCrossEntropyKernels<A> kernels = {forward, backward};
};

}  // namespace
}  // namespace cece::cpu
