// Divergences of two rows on a CPU, one row of each at a time or many side by side.
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
  struct Terms {
    V top, scale, sum = V(A(0)), tops = V(A(0));

    void add(V x) {
      const auto is_top = equal(x, top);
      sum = sum + select(is_top, V(A(0)), exp_nonpositive((x - top) * scale));
      tops = tops + select(is_top, V(A(1)), V(A(0)));
    }
  };
  static LogSumExp<double> sum_of(A max, double sum, double tops) {
    const bool two_infinities = max > std::numeric_limits<A>::max() && tops > 1;
    return {max, two_infinities ? std::numeric_limits<double>::quiet_NaN() : sum + (tops - 1)};
  }
  static LogSumExp<double> sum_block(const A* x, int64_t n, A cold) {
    const A max = CrossEntropy<A, CrossEntropyArgs>::block_max(x, n);
    Terms terms{V(max), V(cold)};
    each(n, [&](auto load) __attribute__((always_inline)) { terms.add(load(x)); });
    return sum_of(max, sum_lanes(terms.sum), sum_lanes(terms.tops));
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
            {}};
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

  static void save(const Args& a, int64_t row, A loss, const Pair<A>& pair) {
    static_cast<A*>(a.loss)[row] = loss;
    save_pair(pair, static_cast<A*>(a.stats) + row, a.rows.count);
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
    const A loss(finish_pair<Kind>(sums, a.cold, pair));
    save(a, row, loss, pair);
  }

  static void merge(const Args& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      Pair<A> pair;
      const auto* const parts = static_cast<const A*>(a.parts) + row;
      const A loss(merge_parts(parts, a.count_parts, a.rows.count, a.cold, pair));
      save(a, row, loss, pair);
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

  // ---- rows side by side, one a lane: of few classes, or of classes that are apart where the rows are not

  static bool side_by_side(const Args& a) {
    const int last = a.rows.dims - 1;
    if (last < 0 || a.rows.size[last] < kLanes / 2) return false;
    const auto pixels = [&](const Operand& t) { return t.class_stride != 1 && t.stride[last] == 1; };
    return a.classes <= kTileClasses || pixels(a.x) || pixels(a.y);
  }

  struct TileBuffers {
    alignas(64) A x[kTile], y[kTile], staging[kTile];
    alignas(64) double max[2][kWide], log_sum[2][kWide], sums[JensenShannon::kSums][kWide], drift[kWide], c[kWide];
  };
  struct Rows {  // first ... first + n - 1
    int64_t first, n;
  };
  // f(Rows) for tiles of the rows begin ... end - 1, each of rows that are one stride apart.
  template <class F>
  static void each_tile(const Args& a, int64_t begin, int64_t end, F&& f) {
    const int64_t inner = a.rows.size[a.rows.dims - 1];
    for (Rows r{begin, 0}; r.first < end; r.first += r.n) {
      r.n = std::min({kWide, end - r.first, inner - r.first % inner});
      f(r);
    }
  }
  // f(i, count) for its vectors of rows
  template <class F>
  static inline __attribute__((always_inline)) void each_lanes(const Rows& r, F&& f) {
    for (int64_t i = 0; i < r.n; i += kLanes) f(i, std::min(kLanes, r.n - i));
  }
  static void read(const Args& a, TileBuffers& buffer, const Rows& r, int64_t c, int64_t n) {
    const auto read = [&](const Operand& t, A* tile) {
      const int64_t at = offset_of(a.rows, t, r.first) + c * t.class_stride;
      read_tile(t, at, t.stride[a.rows.dims - 1], r.n, n, tile, buffer.staging);
    };
    read(a.x, buffer.x);
    read(a.y, buffer.y);
  }
  // f(number) with the numbers that are saved of rows i ... i + count - 1
  static auto saved(const Args& a, const Rows& r, int64_t i, int64_t count) {
    const A* const stats = static_cast<const A*>(a.stats) + r.first + i;
    return [=, rows = a.rows.count](int number) { return load_vector(stats + number * rows, count); };
  }
  static void settle(const Pair<V>& p, TileBuffers& buffer, int64_t i, int64_t n) {
    for (const int k : {0, 1}) {
      if (!set_lanes(p.certain[k])) continue;
      A* const tile = (k ? buffer.y : buffer.x) + i;
      for (int64_t c = 0; c < n; c++) {
        const V x = V::loadu(tile + c * kWide);
        select(p.certain[k], settled(x), x).store(tile + c * kWide);
      }
    }
  }

  // Adds n classes to the log-sums, which are still sums.
  static void add_to_log_sums(const Args& a, const Rows& r, const A* tile, int64_t n, bool first, double* max,
                              double* sum) {
    each_lanes(r, [&](int64_t i, int64_t count) {
      Terms terms{V(lowest<A>()), V(A(a.cold))};
      for (int64_t c = 0; c < n; c++) terms.top = greatest(V::loadu(tile + c * kWide + i), terms.top);
      for (int64_t c = 0; c < n; c++) terms.add(V::loadu(tile + c * kWide + i));
      A top[kLanes], part[kLanes], tops[kLanes];
      terms.top.store(top), terms.sum.store(part), terms.tops.store(tops);
      for (int64_t k = 0; k < count; k++) {
        LogSumExp<double> these = sum_of(top[k], part[k], tops[k]);
        if (!first) {
          LogSumExp<double> all{max[i + k], sum[i + k]};
          all.merge(these, ExpOfScaled<double>{a.cold});
          these = all;
        }
        max[i + k] = these.max, sum[i + k] = these.rest;
      }
    });
  }
  template <class Kind>
  static void add_to_sums(const Args& a, const Rows& r, TileBuffers& buffer, int64_t n, bool first) {
    each_lanes(r, [&](int64_t i, int64_t count) {
      const Pair<V> p = pair_as_saved(saved(a, r, i, count), V(A(a.cold)));
      settle(p, buffer, i, n);
      V sum[Kind::kSums];
      std::fill_n(sum, Kind::kSums, V(A(0)));
      for (int64_t c = 0; c < n; c++) {
        V terms[Kind::kSums];
        Kind::terms(ClassPair<V>(p, V::loadu(buffer.x + c * kWide + i), V::loadu(buffer.y + c * kWide + i)), terms);
        for (int k = 0; k < Kind::kSums; k++) sum[k] = sum[k] + terms[k];
      }
      for (int k = 0; k < Kind::kSums; k++) {
        A part[kLanes];
        sum[k].store(part);
        double* const all = buffer.sums[k] + i;
        for (int64_t j = 0; j < kLanes; j++) all[j] = part[j] + (first ? 0 : all[j]);
      }
    });
  }
  static void log1p_of(const double* x, int64_t n, double* out) {
    for (int64_t i = 0; i < n; i += Vec<double>::size()) Vec<double>::loadu(x + i).log1p().store(out + i);
  }

  template <class Kind>
  static void forward_tile(const Args& a, TileBuffers& buffer, const Rows& r) {
    int64_t c = 0;
    do {  // once, too, where there is no class
      const int64_t n = std::min(kTileClasses, a.classes - c);
      read(a, buffer, r, c, n);
      add_to_log_sums(a, r, buffer.x, n, c == 0, buffer.max[0], buffer.log_sum[0]);
      add_to_log_sums(a, r, buffer.y, n, c == 0, buffer.max[1], buffer.log_sum[1]);
    } while ((c += kTileClasses) < a.classes);
    for (double* log_sum : buffer.log_sum) log1p_of(log_sum, r.n, log_sum);
    for (int64_t i = 0; i < r.n; i++) {
      const auto& [max, log_sum] = std::tie(buffer.max, buffer.log_sum);
      save(a, r.first + i, 0, begun_pair<A>(max[0][i], log_sum[0][i], max[1][i], log_sum[1][i], a.cold));
    }
    c = 0;
    do {
      const int64_t n = std::min(kTileClasses, a.classes - c);
      if (a.classes > kTileClasses) read(a, buffer, r, c, n);
      add_to_sums<Kind>(a, r, buffer, n, c == 0);
    } while ((c += kTileClasses) < a.classes);
    for (int64_t i = 0; i < r.n; i++) buffer.drift[i] = buffer.sums[kDrift][i] / buffer.sums[kMass][i];
    log1p_of(buffer.drift, r.n, buffer.c);
    for (int64_t i = 0; i < r.n; i++) {
      const int64_t row = r.first + i;
      const A* const stats = static_cast<const A*>(a.stats) + row;
      if (a.mask && !a.mask[row]) {
        save(a, row, 0, {});
        continue;
      }
      Pair<A> pair = pair_as_saved([&](int k) { return stats[k * a.rows.count]; }, A(a.cold));
      double sums[Kind::kSums];
      for (int k = 0; k < Kind::kSums; k++) sums[k] = buffer.sums[k][i];
      const A loss(finish_pair<Kind>(sums, buffer.drift[i], -buffer.c[i], a.cold, pair));
      save(a, row, loss, pair);
    }
  }

  template <class Slope>
  static void backward_tile(const Args& a, TileBuffers& buffer, const Rows& r, Slope&& slope) {
    alignas(64) A used[kWide];
    for (int64_t i = 0; i < r.n; i++) used[i] = A(!a.mask || a.mask[r.first + i]);
    const bool large = worth_streaming(nullptr, a.grad, a.rows.count * a.classes);
    for (int64_t first = 0; first < a.classes; first += kTileClasses) {
      const int64_t n = std::min(kTileClasses, a.classes - first);
      read(a, buffer, r, first, n);
      each_lanes(r, [&](int64_t i, int64_t count) {
        const Pair<V> p = saved_pair(saved(a, r, i, count), V(A(a.cold)));
        const V g = load_vector(static_cast<const A*>(a.grad_loss) + r.first + i, count);
        const auto dead = equal(V::loadu(used + i), V(A(0)));
        settle(p, buffer, i, n);
        for (int64_t c = i; c < i + n * kWide; c += kWide) {
          const V s = g * slope(p, V::loadu(buffer.x + c), V::loadu(buffer.y + c));
          select(dead, V(A(0)), s).store(buffer.x + c);
        }
      });
      const int64_t at = offset_of(a.rows, a.grad, r.first) + first * a.grad.class_stride;
      write_tile(a.grad, at, a.grad.stride[a.rows.dims - 1], r.n, n, buffer.x, buffer.staging, large);
    }
    if (large) end_streaming();
  }

  // ---- the kernels

  static void forward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kind(a, [&](auto kind) {
      using Kind = decltype(kind);
      if (side_by_side(a)) {
        return each_tile(a, begin, end, [&](const Rows& r) { forward_tile<Kind>(a, as<TileBuffers>(scratch), r); });
      }
      for (int64_t row = begin; row < end; row++) {
        !a.mask || a.mask[row] ? forward_row<Kind>(a, as<Buffers>(scratch), row) : save(a, row, 0, {});
      }
    });
  }
  static void backward(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_kind(a, [&](auto kind) {
      using Kind = decltype(kind);
      if (!side_by_side(a)) {
        for (int64_t row = begin; row < end; row++) backward_row<Kind>(a, as<Buffers>(scratch), row);
        return;
      }
      auto& buffer = as<TileBuffers>(scratch);
      each_tile(a, begin, end, [&](const Rows& r) {
        a.of_y ? backward_tile(a, buffer, r, [](const Pair<V>& p, V x, V y) { return Kind::slope_y(p, x, y); })
               : backward_tile(a, buffer, r, [](const Pair<V>& p, V x, V y) { return Kind::slope_x(p, x, y); });
      });
    });
  }

  static constexpr DivergenceKernels<A> kernels = {forward, backward, merge};
};

}  // namespace
}  // namespace cece::cpu
