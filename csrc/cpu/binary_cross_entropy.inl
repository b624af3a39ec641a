// Elementwise losses on a CPU: binary cross-entropy on logits or on probabilities.
//
// The tensors are walked in the logical order of their elements, a block of kBlock at a time. An operand that is
// not a contiguous run there (broadcast, strided, of another dtype) is brought into a buffer in L1 first.
#pragma once
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
  using Args = BinaryCrossEntropyArgs;
  static constexpr int64_t kLanes = V::size();

  struct Buffers {
    alignas(64) A x[kBlock], y[kBlock], w[kBlock], p[kBlock], g[kBlock], out[kBlock];
  };
  struct Inputs {  // a block; w, p and g null where absent
    const A *x, *y, *w, *p;
  };
  static Inputs read(const Args& a, int64_t begin, int64_t n, Buffers& b) {
    const auto get = [&](const Operand& t, A* buffer) {
      return t.data ? gather(a.shape, t, begin, n, buffer) : nullptr;
    };
    return {get(a.input, b.x), get(a.target, b.y), get(a.weight, b.w), get(a.pos_weight, b.p)};
  }
  static V optional(const A* t, int64_t i, int64_t count) { return t ? load_vector(t + i, count) : V(A(1)); }

  // Reports the first of n elements that is no probability, or whose target is none.
  static void check(const Args& a, const Inputs& in, int64_t begin, int64_t n) {
    const auto fine = [](auto v) { return (v >= decltype(v)(A(0))) & (v <= decltype(v)(A(1))); };
    V all = V(A(0)) == V(A(0));
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) all = all & fine(V::loadu(in.x + i)) & fine(V::loadu(in.y + i));
    bool good = all.zero_mask() == 0;
    for (; i < n; i++) good = good && fine(in.x[i]) && fine(in.y[i]);
    for (i = 0; !good && i < n; i++) {
      if (!(fine(in.x[i]) && fine(in.y[i]))) return report(a.bad, begin + i);
    }
  }

  template <class Loss>
  static void forward_chunk(const Args& a, Buffers& b, int64_t task) {
    constexpr int64_t kSum = 8 * kLanes * 4;  // elements added up in Acc before the sum goes on in double
    double total = 0;
    const int64_t end = std::min((task + 1) * kChunk, a.shape.count);
    for (int64_t begin = task * kChunk, n; begin < end; begin += n) {
      n = block_length(a.shape, begin, end);
      const Inputs in = read(a, begin, n, b);
      if constexpr (Loss::kProbabilities) check(a, in, begin, n);
      A* out = a.loss ? static_cast<A*>(a.loss) + begin : nullptr;
      for (int64_t from = 0; from < n; from += kSum) {
        V sum[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
        each_vector_in_turn<A, 4>(std::min(kSum, n - from), [&](int64_t offset, int64_t count, int turn) {
          const int64_t i = from + offset;
          V loss = Loss::loss(load_vector(in.x + i, count), load_vector(in.y + i, count), optional(in.p, i, count));
          if (in.w) loss = weighted(load_vector(in.w + i, count), loss);
          if (out) {
            store_vector(out + i, loss, count);
          } else {
            sum[turn] = sum[turn] + (count == kLanes ? loss : first_lanes(loss, count));
          }
        });
        total += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
      }
    }
    if (a.partial) static_cast<double*>(a.partial)[task] = total;
  }

  template <class Loss>
  static void backward_chunk(const Args& a, Buffers& b, int64_t task) {
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
      each_vector<A>(n, [&](int64_t i, int64_t count) {
        V slope = Loss::slope(load_vector(in.x + i, count), load_vector(in.y + i, count), optional(in.p, i, count));
        if (in.w) slope = slope * load_vector(in.w + i, count);
        slope = slope * (g ? load_vector(g + i, count) : common);
        stream&& out != b.out ? stream_vector(out + i, slope, count) : store_vector(out + i, slope, count);
      });
      each_run(a.shape, a.grad_input, begin, n, [&](int64_t offset, int64_t first, int64_t count) {
        A* place = room(a.grad_input, offset, out_stride, out + first);
        if (place != out + first) std::copy_n(out + first, count, place);
        store(a.grad_input, offset, out_stride, count, out + first);
      });
    }
  }

  template <class F>
  static void visit_loss(const Args& a, F&& f) {
    a.with_logits ? f(BinaryCrossEntropyWithLogits{}) : f(BinaryCrossEntropy{});
  }
  static void forward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_loss(a, [&](auto loss) {
      for (int64_t task = begin; task < end; task++) forward_chunk<decltype(loss)>(a, as<Buffers>(scratch), task);
    });
  }
  static void backward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_loss(a, [&](auto loss) {
      for (int64_t task = begin; task < end; task++) backward_chunk<decltype(loss)>(a, as<Buffers>(scratch), task);
    });
    end_streaming();
  }

  static constexpr BinaryCrossEntropyKernels<A> kernels = {forward, backward};
};

}  // namespace
}  // namespace cece::cpu
