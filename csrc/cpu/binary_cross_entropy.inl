// Elementwise losses on a CPU: every struct of numerics.h that visit_loss knows.
//
// The tensors are walked in the logical order of their elements, a block of kBlock at a time. An operand that is
// not a contiguous run there (broadcast, strided, of another dtype) is brought into a buffer in L1 first; a truth of
// listed classes is written out there, block by block, and nowhere else.
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
    alignas(64) A x[kBlock], y[kBlock], w[kBlock], p[kBlock], m[kBlock], g[kBlock], out[kBlock];
  };
  struct Inputs {  // a block; w, p and m null where absent
    const A *x, *y, *w, *p, *m;
  };
  static Inputs read(const Args& a, int64_t begin, int64_t n, Buffers& b) {
    const auto get = [&](const Operand& t, A* buffer) {
      return t.data ? gather(a.shape, t, begin, n, buffer) : nullptr;
    };
    const A* y = a.listed.labels.data ? write_out(a, begin, n, b.y) : get(a.target, b.y);
    return {get(a.input, b.x), y, get(a.weight, b.w), get(a.pos_weight, b.p), get(a.mask, b.m)};
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

  // Reports the first of n elements that is no probability, or whose target is none.
  static void check(const Args& a, const Inputs& in, int64_t begin, int64_t n) {
    const auto fine = [](A v) { return v >= A(0) && v <= A(1); };
    // As integers the bits of a probability lie between those of 0 and 1: neither they nor 1 minus them have a sign.
    const auto out = [](V v) { return v | at::vec::cast<A>(at::vec::cast<Int>(V(A(1))) - at::vec::cast<Int>(v)); };
    V signs = V(A(0));
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) signs = signs | out(V::loadu(in.x + i)) | out(V::loadu(in.y + i));
    A lane[kLanes];
    signs.store(lane);
    bool good = std::none_of(lane, lane + kLanes, [](A x) { return std::signbit(x); });
    for (; i < n; i++) good = good && fine(in.x[i]) && fine(in.y[i]);
    for (i = 0; !good && i < n; i++) {
      if (!(fine(in.x[i]) && fine(in.y[i]))) return report(a.bad, begin + i);
    }
  }

  // What a call needs beside inputs and truths; what it does not is compiled out.
  enum Options { kNone, kMasked /* or the truth is smoothed */, kWeighted /* too */ };

  template <Options kOptions, class Loss>
  static V loss_of(const Args& a, const Loss& l, const Inputs& in, int64_t i, int64_t count) {
    const V x = load_vector(in.x + i, count), y = truth<kOptions>(a, in, i, count);
    if constexpr (Loss::kProbabilities) {
      if (set_lanes(equal(y * y, y)) == kEveryLane<A>) return l.loss_of_outcome(x, greater(y, V(A(0))));
    }
    if constexpr (kOptions == kWeighted) {
      return l.loss(x, y, in.p ? load_vector(in.p + i, count) : V(A(1)));
    } else {
      return l.loss(x, y, One());
    }
  }
  template <Options kOptions>
  static V truth(const Args& a, const Inputs& in, int64_t i, int64_t count) {
    const V y = load_vector(in.y + i, count);
    return kOptions ? smoothed(y, V(A(a.keep)), V(A(a.spread))) : y;
  }

  template <Options kOptions, class Loss>
  static void forward_chunk(const Args& a, const Loss& l, Buffers& b, int64_t task) {
    constexpr int64_t kSum = 16 * kLanes * 4;  // elements added up in Acc before the sum goes on in double
    double total[kLanes] = {};
    V used(A(0));  // of masked elements how many count: a chunk's are few enough for a float
    const int64_t begin_of_task = task * kChunk, end = std::min(begin_of_task + kChunk, a.shape.count);
    for (int64_t begin = begin_of_task, n; begin < end; begin += n) {
      n = block_length(a.shape, begin, end);
      const Inputs in = read(a, begin, n, b);
      if constexpr (Loss::kProbabilities) check(a, in, begin, n);
      const auto masked = [&] { return kOptions && in.m; };
      const auto kept = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const auto kept = greater(load_vector(in.m + i, count), V(A(0)));
        used = used + select(kept, V(A(1)), V(A(0)));
        return kept;
      };
      const auto value = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        V loss = loss_of<kOptions>(a, l, in, i, count);
        if (kOptions == kWeighted && in.w) loss = weighted(load_vector(in.w + i, count), loss);
        return masked() ? select(kept(i, count), loss, V(A(0))) : loss;
      };
      if (a.loss) {
        A* const out = static_cast<A*>(a.loss) + begin;
        each_vector<A>(n, [&](int64_t i, int64_t count) { store_vector(out + i, value(i, count), count); });
        continue;
      }
      const auto add = [&](auto& sum, int64_t i, int64_t count) __attribute__((always_inline)) {
        if constexpr (std::is_same_v<decltype(sum), SumOf<V>&>) {
          const V loss = value(i, count);
          sum.add(count == kLanes ? loss : first_lanes(loss, count));
        } else {  // an element that does not count is one whose loss is 0
          V x = load_vector(in.x + i, count), y = truth<kOptions>(a, in, i, count);
          if (masked()) {
            const auto counts = kept(i, count);
            x = select(counts, x, V(Loss::template kCertain<A>)), y = select(counts, y, V(A(0)));
          }
          if (count < kLanes) x = first_lanes(x, count, Loss::template kCertain<A>), y = first_lanes(y, count);
          sum.add(x, y);
        }
      };
      for (int64_t from = 0; from < n; from += kSum) {
        std::conditional_t<kOptions == kWeighted, SumOf<V>, typename Loss::template Sum<V>> sum[4];
        each_vector_in_turn<A, 4>(std::min(kSum, n - from), [&](int64_t offset, int64_t count, int turn) {
          add(sum[turn], from + offset, count);
        });
        sum[0].add(sum[1]), sum[2].add(sum[3]), sum[0].add(sum[2]);
        A lane[kLanes];
        sum[0].value().store(lane);
        for (int64_t k = 0; k < kLanes; k++) total[k] += double(lane[k]);
      }
    }
    if (!a.partial) return;
    static_cast<double*>(a.partial)[2 * task] = std::accumulate(total, total + kLanes, 0.0);
    const bool masked = a.mask.data;
    static_cast<double*>(a.partial)[2 * task + 1] = double(masked ? sum_lanes(used) : A(end - begin_of_task));
  }

  template <Options kOptions, class Loss>
  static void backward_chunk(const Args& a, const Loss& l, Buffers& b, int64_t task) {
    const A scale = a.reduction == Reduction::mean ? A(1) / A(a.shape.count) : A(1);
    const int64_t out_stride = inner_stride(a.shape, a.grad_input);
    const bool stream = worth_streaming(a.input.data, a.grad_input, a.shape.count);
    const int64_t end = std::min((task + 1) * kChunk, a.shape.count);
    for (int64_t begin = task * kChunk, n; begin < end; begin += n) {
      n = block_length(a.shape, begin, end);
      const Inputs in = read(a, begin, n, b);
      const A* g = a.reduction == Reduction::none ? gather(a.shape, a.grad_loss, begin, n, b.g) : nullptr;
      const V common(g ? A(1) : *static_cast<const A*>(a.grad_loss.data) * scale);
      const bool direct = one_run(a.shape, begin, n);
      A* out = direct ? room(a.grad_input, offset_of(a.shape, a.grad_input, begin), out_stride, b.out) : b.out;
      const bool past_caches = stream && out != b.out;
      each_vector_behind<A>(past_caches ? before_whole_vector(out, n) : 0, n, [&](int64_t i, int64_t count) {
        const V x = load_vector(in.x + i, count), y = truth<kOptions>(a, in, i, count);
        V slope;
        if constexpr (kOptions == kWeighted) {
          slope = l.slope(x, y, in.p ? load_vector(in.p + i, count) : V(A(1)));
          if (in.w) slope = slope * load_vector(in.w + i, count);
        } else {
          slope = l.slope(x, y, One());
        }
        slope = slope * (g ? load_vector(g + i, count) : common);
        if (kOptions && in.m) slope = select(greater(load_vector(in.m + i, count), V(A(0))), slope, V(A(0)));
        past_caches ? stream_vector(out + i, slope, count) : store_vector(out + i, slope, count);
      });
      each_run(a.shape, a.grad_input, begin, n, [&](int64_t offset, int64_t first, int64_t count) {
        A* place = room(a.grad_input, offset, out_stride, out + first);
        if (place != out + first) std::copy_n(out + first, count, place);
        store(a.grad_input, offset, out_stride, count, out + first);
      });
    }
  }

  // f(loss, options): the losses that torch has have kernels for fewer options.
  template <class F>
  static void visit_kernel(const Args& a, F&& f) {
    visit_loss<A>(a.kind, a.own, [&](const auto& loss) {
      if constexpr (std::is_empty_v<std::decay_t<decltype(loss)>>) {
        const bool masked = a.mask.data || a.keep != 1 || a.spread != 0;
        if (!a.weight.data && !a.pos_weight.data) {
          return masked ? f(loss, Constant<kMasked>()) : f(loss, Constant<kNone>());
        }
      }
      f(loss, Constant<kWeighted>());
    });
  }
  template <Options k>
  using Constant = std::integral_constant<Options, k>;
  static void forward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kernel(a, [&](const auto& loss, auto options) {
      for (int64_t t = begin; t < end; t++) forward_chunk<decltype(options)::value>(a, loss, as<Buffers>(scratch), t);
    });
  }
  static void backward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kernel(a, [&](const auto& loss, auto options) {
      for (int64_t t = begin; t < end; t++) backward_chunk<decltype(options)::value>(a, loss, as<Buffers>(scratch), t);
    });
    end_streaming();
  }

  static constexpr BinaryCrossEntropyKernels<A> kernels = {forward, backward};
};

}  // namespace
}  // namespace cece::cpu
