// Divergences of two rows on a CPU, one row of each at a time.
//
// Forward reads both rows twice, the second time from cache (two rows of 32000 floats are 256 KB): once for their
// log-sums, once for the sums that a divergence is made of. Backward reads both once and writes a gradient.
#pragma once
#include "block.h"
#include "cross_entropy.inl"
#include "kernels.h"

namespace cece::cpu {
namespace {

template <class A>
struct Divergence {
  using V = Vec<A>;
  using Args = DivergenceArgs;
  static constexpr int64_t kLanes = V::size();

  struct Buffers {
    alignas(64) A x[kBlock], y[kBlock], out[kBlock];
  };

  template <class F>
  static void visit_kind(const Args& a, F&& f) {
    a.symmetric ? f(JensenShannon{}) : f(KullbackLeibler{});
  }

  static const A* block(const Operand& t, int64_t at, int64_t n, bool certain, A* buffer) {
    const A* x = load(t, at, t.class_stride, n, buffer);
    if (!certain) return x;
    for (int64_t i = 0; i < n; i++) buffer[i] = settled(x[i]);
    return buffer;
  }

  // ---- forward

  // f(load) for vectors of a block; load(x) is the vector there, filled up with logits that change nothing.
  template <class F>
  static inline __attribute__((always_inline)) void each(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) f([&](const A* x) { return V::loadu(x + i); });
    if (i == n) return;
    f([&](const A* x) {
      A few[kLanes];
      std::fill_n(few, kLanes, -std::numeric_limits<A>::infinity());
      for (int64_t k = i; k < n; k++) few[k - i] = x[k];
      return V::loadu(few);
    });
  }

  // sum_i e^{(x_i - max) / T}: all maximal elements but one are counted, so that a small rest keeps its bits.
  static LogSumExp<double> sum_block(const A* x, int64_t n, A cold) {
    const A max = CrossEntropy<A, CrossEntropyArgs>::block_max(x, n);
    const V top(max), scale(cold), zero(A(0)), one(A(1));
    V sum = zero, equals = zero;
    each(n, [&](auto load) __attribute__((always_inline)) {
      const V x_i = load(x);
      const auto is_top = equal(x_i, top);
      sum = sum + select(is_top, zero, exp_nonpositive((x_i - top) * scale));
      equals = equals + select(is_top, one, zero);
    });
    const double others = double(sum_lanes(equals)) - 1;
    const bool two_infinities = max > std::numeric_limits<A>::max() && others > 0;
    return {max, two_infinities ? std::numeric_limits<double>::quiet_NaN() : sum_lanes(sum) + others};
  }
  static LogSumExp<double> log_sum_exp(const Args& a, const Operand& t, int64_t at, A* buffer) {
    LogSumExp<double> all;
    all.max = lowest<A>();
    for (int64_t c = 0; c < a.classes; c += kBlock) {
      const int64_t n = std::min(kBlock, a.classes - c);
      const A* x = block(t, at + c * t.class_stride, n, false, buffer);
      const LogSumExp<double> these = sum_block(x, n, A(a.cold));
      c == 0 ? void(all = these) : all.merge(these, ExpOfScaled<double>{a.cold});
    }
    return all;
  }

  static Pair<V> broadcast(const Pair<A>& p) {
    return {{V(p.max[0]), V(p.max[1])},
            {V(p.log_sum[0]), V(p.log_sum[1])},
            V(p.offset),
            V(p.offset_rest),
            {V(p.level[0]), V(p.level[1])},
            V(p.cold),
            {p.certain[0], p.certain[1]}};
  }

  template <class Kind>
  static void add_block(const Pair<A>& pair, const A* x, const A* y, int64_t n, double (&sums)[Kind::kSums]) {
    constexpr int kSums = Kind::kSums;
    const Pair<V> p = broadcast(pair);
    V sum[kSums];
    std::fill_n(sum, kSums, V(A(0)));
    each(n, [&](auto load) __attribute__((always_inline)) {
      V terms[kSums];
      Kind::terms(ClassPair<V>(p, load(x), load(y)), terms);
      for (int k = 0; k < kSums; k++) sum[k] = sum[k] + terms[k];
    });
    for (int k = 0; k < kSums; k++) sums[k] += sum_lanes(sum[k]);
  }

  template <class Kind>
  static void forward_row(const Args& a, Buffers& buffer, int64_t row) {
    const int64_t at_x = offset_of(a.rows, a.x, row), at_y = offset_of(a.rows, a.y, row);
    const LogSumExp<double> x = log_sum_exp(a, a.x, at_x, buffer.x), y = log_sum_exp(a, a.y, at_y, buffer.y);
    Pair<A> pair = begun_pair<A>(x.max, x.log_sum(), y.max, y.log_sum(), a.cold);
    double sums[Kind::kSums] = {};
    for (int64_t c = 0; c < a.classes; c += kBlock) {
      const int64_t n = std::min(kBlock, a.classes - c);
      add_block<Kind>(pair, block(a.x, at_x + c * a.x.class_stride, n, pair.certain[0], buffer.x),
                      block(a.y, at_y + c * a.y.class_stride, n, pair.certain[1], buffer.y), n, sums);
    }
    static_cast<A*>(a.loss)[row] = A(finish_pair<Kind>(sums, a.cold, pair));
    save_pair(pair, static_cast<A*>(a.stats) + row, a.rows.count);
  }

  static void forward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kind(a, [&](auto kind) {
      for (int64_t row = begin; row < end; row++) {
        if (!a.mask || a.mask[row]) {
          forward_row<decltype(kind)>(a, as<Buffers>(scratch), row);
        } else {
          static_cast<A*>(a.loss)[row] = 0;
          save_pair(Pair<A>{}, static_cast<A*>(a.stats) + row, a.rows.count);
        }
      }
    });
  }

  static void merge(const Args& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      Pair<A> pair;
      static_cast<A*>(a.loss)[row] =
          A(merge_parts(static_cast<const A*>(a.parts) + row, a.count_parts, a.rows.count, a.cold, pair));
      save_pair(pair, static_cast<A*>(a.stats) + row, a.rows.count);
    }
  }

  // ---- backward

  template <class Kind>
  static void backward_row(const Args& a, Buffers& buffer, int64_t row) {
    const bool used = !a.mask || a.mask[row];
    const int64_t at_x = offset_of(a.rows, a.x, row), at_y = offset_of(a.rows, a.y, row);
    const Pair<A> pair = saved_pair(static_cast<const A*>(a.stats) + row, a.rows.count, A(a.cold));
    const Pair<V> p = broadcast(pair);
    const V g(static_cast<const A*>(a.grad_loss)[row]);
    const bool large = worth_streaming(nullptr, a.grad, a.rows.count * a.classes);
    for (int64_t c = 0; c < a.classes; c += kBlock) {
      const int64_t n = std::min(kBlock, a.classes - c), stride = a.grad.class_stride;
      const int64_t at = offset_of(a.rows, a.grad, row) + c * stride;
      A* const out = room(a.grad, at, stride, buffer.out);
      const auto write = [&](auto slope) {
        const A* const x = block(a.x, at_x + c * a.x.class_stride, n, pair.certain[0], buffer.x);
        const A* const y = block(a.y, at_y + c * a.y.class_stride, n, pair.certain[1], buffer.y);
        const bool stream = large && out != buffer.out;
        each_vector<A>(n, [&](int64_t i, int64_t count) {
          const V s = g * slope(load_vector(x + i, count), load_vector(y + i, count));
          stream ? stream_vector(out + i, s, count) : store_vector(out + i, s, count);
        });
      };
      if (!used) {
        std::fill_n(out, n, A(0));
      } else if (a.of_y) {
        write([&](V x, V y) { return Kind::slope_y(p, x, y); });
      } else {
        write([&](V x, V y) { return Kind::slope_x(p, x, y); });
      }
      store(a.grad, at, stride, n, out);
    }
    if (large) end_streaming();
  }

  static void backward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kind(a, [&](auto kind) {
      for (int64_t row = begin; row < end; row++) backward_row<decltype(kind)>(a, as<Buffers>(scratch), row);
    });
  }

  static constexpr DivergenceKernels<A> kernels = {forward, backward, merge};
};

}  // namespace
}  // namespace cece::cpu
