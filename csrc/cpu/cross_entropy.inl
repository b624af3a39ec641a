// Softmax cross-entropy on a CPU: forward and backward, one row at a time or many side by side.
//
// Forward reads the logits once. A block of kBlock classes comes into L1 (as Acc, whatever its dtype); its maximum
// is found there, then its exponentials summed. Backward reads the logits once more and writes the gradient,
// rebuilding each probability from the row's saved max and log_sum.
#pragma once
#include "block.h"
#include "kernels.h"

namespace cece::cpu {
namespace {

enum class Target { hard, smooth, soft };  // a label; a label with smoothing; probabilities

template <class A>
struct CrossEntropy {
  using V = Vec<A>;
  using Args = CrossEntropyArgs;
  static constexpr int64_t kLanes = V::size();

  // ---- the target of a row

  template <class F>
  static void visit_target(const Args& a, F&& f) {
    using std::integral_constant;
    if (a.probabilities.data) return f(integral_constant<Target, Target::soft>{});
    if (a.label_smoothing > 0) return f(integral_constant<Target, Target::smooth>{});
    return f(integral_constant<Target, Target::hard>{});
  }

  static constexpr int64_t kIgnored = -1, kImpossible = -2;

  // The class index of a row, or kIgnored, or kImpossible.
  static int64_t label(const Args& a, int64_t row) {
    if (a.probabilities.data) return kIgnored;
    int64_t y = 0;
    switch (a.label_dtype) {
      case Dtype::u8: y = static_cast<const uint8_t*>(a.labels)[row]; break;
      case Dtype::i32: y = static_cast<const int32_t*>(a.labels)[row]; break;
      default: y = static_cast<const int64_t*>(a.labels)[row];
    }
    return y == a.ignore_index ? kIgnored : y >= 0 && y < a.classes ? y : kImpossible;
  }
  static A class_weight(const Args& a, int64_t c) {
    return a.weight ? static_cast<const A*>(a.weight)[c] : A(1);
  }
  static A keep(const Args& a) { return A(1 - a.label_smoothing); }
  static A spread(const Args& a) { return A(a.label_smoothing / double(a.classes)); }

  // Masses q_j of a block of classes beside the label's own: t and w point at the block, or are unused.
  template <Target K>
  struct Masses {
    const A* t;
    const A* w;  // null: all 1
    A keep, spread;

    V at(int64_t i, int64_t count) const {
      V q(spread);
      if constexpr (K == Target::soft) q = smoothed(load_vector(t + i, count), V(keep), q);
      return w ? q * load_vector(w + i, count) : q;
    }
    A at(int64_t i) const {
      const A q = K == Target::soft ? smoothed(t[i], keep, spread) : spread;
      return w ? q * w[i] : q;
    }
  };
  template <Target K>
  static Masses<K> masses(const Args& a, int64_t row_offset, int64_t c, int64_t n, A* buffer) {
    const A* t = nullptr;
    if constexpr (K == Target::soft) {
      const int64_t stride = a.probabilities.class_stride;
      t = load(a.probabilities, row_offset + c * stride, stride, n, buffer);
    }
    return {t, a.weight ? static_cast<const A*>(a.weight) + c : nullptr, keep(a), spread(a)};
  }

  // ---- one row at a time: forward

  static A block_max(const A* x, int64_t n) {  // ignores NaN, which the sum will find
    V m[4] = {V(lowest<A>()), V(lowest<A>()), V(lowest<A>()), V(lowest<A>())};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      for (int k = 0; k < 4; k++) m[k] = at::vec::clamp_min(V::loadu(x + i + k * kLanes), m[k]);
    }
    A tail = lowest<A>();
    for (; i + kLanes <= n; i += kLanes) m[0] = at::vec::clamp_min(V::loadu(x + i), m[0]);
    for (; i < n; i++) tail = x[i] > tail ? x[i] : tail;
    const auto greatest = [](A p, A q) { return p > q ? p : q; };
    for (int k = 0; k < 4; k++) tail = greatest(tail, reduce_lanes(m[k], greatest));
    return tail;
  }

  static int64_t index_of(const A* x, int64_t n, A value) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      if ((V::loadu(x + i) == V(value)).zero_mask() != (1 << kLanes) - 1) break;
    }
    while (i < n && !(x[i] == value)) i++;
    return i;
  }

  static A sum_exp(const A* x, int64_t n, A max) {
    const V m(max);
    V sum[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      for (int k = 0; k < 4; k++) sum[k] = sum[k] + exp_nonpositive(V::loadu(x + i + k * kLanes) - m);
    }
    for (; i + kLanes <= n; i += kLanes) sum[0] = sum[0] + exp_nonpositive(V::loadu(x + i) - m);
    if (i < n) {
      const V last = V::set(V(-std::numeric_limits<A>::infinity()), V::loadu(x + i, n - i), n - i);
      sum[1] = sum[1] + exp_nonpositive(last - m);
    }
    return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  template <Target K>
  static void add_gaps(TargetGaps<double>& s, const A* x, int64_t n, A max, const Masses<K>& q) {
    TargetGaps<V> sum[2];
    int turn = 0;
    each_vector<A>(n, [&](int64_t i, int64_t count) {
      V mass = q.at(i, count);
      if (count < kLanes) mass = V::set(V(A(0)), mass, count);
      sum[turn ^= 1].push(mass, load_vector(x + i, count), V(max));
    });
    s.gaps += sum_lanes(sum[0].gaps + sum[1].gaps);
    s.mass += sum_lanes(sum[0].mass + sum[1].mass);
  }

  template <Target K>
  static RowState read_classes(const Args& a, int64_t row, int64_t begin, int64_t end) {
    const int64_t at_x = offset_of(a.rows, a.logits, row), stride = a.logits.class_stride;
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    alignas(64) A x_buffer[kBlock], t_buffer[kBlock];
    LogSumExp<double> lse;
    lse.max = lowest<A>();
    TargetGaps<double> target;
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c);
      const A* x = load(a.logits, at_x + c * stride, stride, n, x_buffer);
      const A max = block_max(x, n);
      if (max > lse.max) {  // one of the maximal elements is the `1 +` of log1p: its term stays out of the sum
        const int64_t own = index_of(x, n, max);
        target.rebase(lse.max, max);
        lse.merge({double(max), double(sum_exp(x, own, max)) + sum_exp(x + own + 1, n - own - 1, max)});
      } else {
        lse.rest += sum_exp(x, n, A(lse.max));
      }
      if constexpr (K != Target::hard) {
        add_gaps(target, x, n, A(lse.max), masses<K>(a, at_t, c, n, t_buffer));
      }
    }
    return {lse.max, lse.rest, target.gaps, target.mass};
  }

  static void write_stats(const Args& a, int64_t row, double max, double log_sum, double mass, double loss) {
    A* stats = static_cast<A*>(a.stats) + row;
    stats[0] = A(max);
    stats[a.rows.count] = A(log_sum);
    stats[2 * a.rows.count] = A(mass);
    static_cast<A*>(a.loss)[row] = A(loss);
  }

  static void finish(const Args& a, int64_t row, int64_t y, const RowState& s) {
    const double log_sum = LogSumExp<double>{s.max, s.rest}.log_sum();
    double kept = 0, x_y = 0;
    if (y >= 0) {
      kept = (1 - a.label_smoothing) * class_weight(a, y);
      x_y = load_one<A>(a.logits, offset_of(a.rows, a.logits, row) + y * a.logits.class_stride);
    }
    write_stats(a, row, s.max, log_sum, kept + s.mass,
                row_loss(kept, x_y, TargetGaps<double>{s.gaps, s.mass}, s.max, log_sum));
  }

  // A row without a label has no loss; one with an impossible label is reported, and NaN.
  static bool skip(const Args& a, int64_t row, int64_t y) {
    if (a.probabilities.data || y >= 0) return false;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (y == kImpossible) report(a.bad_row, row);
    y == kImpossible ? write_stats(a, row, nan, nan, nan, nan) : write_stats(a, row, 0, 0, 0, 0);
    return true;
  }

  static void forward_rows(const Args& a, RowState* states, int64_t begin, int64_t end) {
    const int64_t segments = (a.classes + kSegment - 1) / kSegment;
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t row = task / segments, c = task % segments * kSegment, y = label(a, row);
        if (skip(a, row, y)) continue;
        const RowState s = read_classes<kind.value>(a, row, c, std::min(c + kSegment, a.classes));
        states ? void(states[task] = s) : finish(a, row, y, s);
      }
    });
  }

  static void finish_rows(const Args& a, const RowState* states, int64_t begin, int64_t end) {
    const int64_t segments = (a.classes + kSegment - 1) / kSegment;
    for (int64_t row = begin; row < end; row++) {
      const int64_t y = label(a, row);
      if (skip(a, row, y)) continue;
      LogSumExp<double> lse;
      TargetGaps<double> target;
      for (const RowState* s = states + row * segments; s < states + (row + 1) * segments; s++) {
        TargetGaps<double> part{s->gaps, s->mass};
        const double max = std::max(lse.max, s->max);
        target.rebase(lse.max, max);
        part.rebase(s->max, max);
        target = {target.gaps + part.gaps, target.mass + part.mass};
        lse.merge({s->max, s->rest});
      }
      finish(a, row, y, {lse.max, lse.rest, target.gaps, target.mass});
    }
  }

  // ---- one row at a time: backward

  struct RowGrad {
    A max, log_sum, mass, g;  // g: the incoming gradient of this row's loss
  };
  static RowGrad row_grad(const Args& a, int64_t row) {
    const A* stats = static_cast<const A*>(a.stats) + row;
    A g = static_cast<const A*>(a.grad_loss)[row * a.grad_stride];
    if (a.reduction == Reduction::mean) g /= *static_cast<const A*>(a.total_weight);
    return {stats[0], stats[a.rows.count], stats[2 * a.rows.count], g};
  }

  template <Target K>
  static void write_block(A* out, const A* x, int64_t n, const RowGrad& r, const Masses<K>& q) {
    if (!(std::abs(r.max) <= std::numeric_limits<A>::max())) {  // an infinite maximum: element by element
      for (int64_t i = 0; i < n; i++) {
        out[i] = r.g * row_slope(x[i], r.max, r.log_sum, r.mass, K == Target::hard ? A(0) : q.at(i));
      }
      return;
    }
    const V max(r.max), log_sum(r.log_sum), scale(r.g * r.mass), g(r.g);
    each_vector<A>(n, [&](int64_t i, int64_t count) {
      V slope = exp_nonpositive((load_vector(x + i, count) - max) - log_sum) * scale;
      if constexpr (K != Target::hard) slope = slope - g * q.at(i, count);
      store_vector(out + i, slope, count);
    });
  }

  // The label's slope, from its logit as it was before anything was written (the gradient may overwrite it).
  static A slope_at_label(const Args& a, const RowGrad& r, int64_t y, A x_y) {
    const A w = class_weight(a, y), kept = keep(a) * w;
    return r.g * label_slope(x_y, r.max, r.log_sum, kept, r.mass - kept, spread(a) * w);
  }

  template <Target K>
  static void write_classes(const Args& a, int64_t row, int64_t y, int64_t begin, int64_t end) {
    const Operand& out = a.grad_logits;
    const int64_t at_x = offset_of(a.rows, a.logits, row), stride = a.logits.class_stride;
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    const int64_t at_out = offset_of(a.rows, out, row);
    alignas(64) A x_buffer[kBlock], t_buffer[kBlock], out_buffer[kBlock];
    const RowGrad r = row_grad(a, row);
    const bool label_here = y >= begin && y < end;
    const A x_y = label_here ? load_one<A>(a.logits, at_x + y * stride) : A(0);
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c), at = at_out + c * out.class_stride;
      A* slopes = room(out, at, out.class_stride, out_buffer);
      if (K != Target::soft && y < 0) {
        std::fill_n(slopes, n, y == kIgnored ? A(0) : std::numeric_limits<A>::quiet_NaN());
      } else {
        const A* x = load(a.logits, at_x + c * stride, stride, n, x_buffer);
        write_block(slopes, x, n, r, masses<K>(a, at_t, c, n, t_buffer));
      }
      store(out, at, out.class_stride, n, slopes);
    }
    if (label_here) store_one(out, at_out + y * out.class_stride, slope_at_label(a, r, y, x_y));
  }

  static void backward_rows(const Args& a, int64_t begin, int64_t end) {
    const int64_t segments = (a.classes + kSegment - 1) / kSegment;
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t row = task / segments, c = task % segments * kSegment;
        write_classes<kind.value>(a, row, label(a, row), c, std::min(c + kSegment, a.classes));
      }
    });
  }

  // ---- rows side by side, one a lane

  struct Block {  // rows first ... first + n - 1, and where their class 0 is
    int64_t first, n, at_x, at_t, at_out, x_stride, t_stride, out_stride;
    int64_t y[kPixels];
  };
  static void locate(const Args& a, int64_t task, Block& b) {
    const int last = a.rows.dims - 1;
    const int64_t inner = last < 0 ? 1 : a.rows.size[last], blocks = (inner + kPixels - 1) / kPixels;
    const auto along = [&](const Operand& t) { return last < 0 ? 0 : t.stride[last]; };
    b.first = task / blocks * inner + task % blocks * kPixels;
    b.n = std::min(kPixels, inner - task % blocks * kPixels);
    b.at_x = offset_of(a.rows, a.logits, b.first);
    b.at_t = offset_of(a.rows, a.probabilities, b.first);
    b.at_out = offset_of(a.rows, a.grad_logits, b.first);
    b.x_stride = along(a.logits), b.t_stride = along(a.probabilities), b.out_stride = along(a.grad_logits);
    for (int64_t i = 0; i < b.n; i++) b.y[i] = label(a, b.first + i);
  }
  // The label's mass, logit and weight, side by side; 0 without a label.
  static void gather_labels(const Args& a, const Block& b, A* x_y, A* w_y) {
    visit(a.logits.dtype, [&](auto type) {
      const auto* x = static_cast<const typename decltype(type)::type*>(a.logits.data) + b.at_x;
      for (int64_t i = 0; i < b.n; i++) {
        const bool labelled = b.y[i] >= 0;
        x_y[i] = labelled ? static_cast<A>(x[b.y[i] * a.logits.class_stride + i * b.x_stride]) : A(0);
        w_y[i] = labelled ? class_weight(a, b.y[i]) : A(0);
      }
    });
  }

  template <Target K>
  static void forward_block(const Args& a, int64_t task) {
    constexpr int64_t kGroup = 256;  // classes summed in one go: keeps a float sum of many classes accurate
    Block b;
    locate(a, task, b);
    alignas(64) A buffer[kPixels], t_buffer[kPixels], x_y[kPixels], w_y[kPixels];
    alignas(64) A max[kPixels], rest[kPixels], gaps[kPixels], mass[kPixels], max_all[kPixels], rest_all[kPixels];
    const auto reset = [](A* max, A* rest) {
      std::fill_n(max, kPixels, lowest<A>());
      std::fill_n(rest, kPixels, A(-1));
    };
    const auto merge_group = [&](bool last) {
      for (int64_t i = 0; i < b.n; i += kLanes) {
        LogSumExp<V> s{V::loadu(max_all + i), V::loadu(rest_all + i)};
        s.merge({V::loadu(max + i), V::loadu(rest + i)});
        s.max.store(max_all + i), s.rest.store(rest_all + i);
      }
      if (!last) std::fill_n(rest, kPixels, A(-1));  // the maximum goes on: gaps are relative to it
    };
    reset(max, rest), reset(max_all, rest_all);
    std::fill_n(gaps, kPixels, A(0)), std::fill_n(mass, kPixels, A(0));
    gather_labels(a, b, x_y, w_y);

    for (int64_t c = 0; c < a.classes; c++) {
      const A* x = load(a.logits, b.at_x + c * a.logits.class_stride, b.x_stride, b.n, buffer);
      const A* t = nullptr;
      if constexpr (K == Target::soft) {
        t = load(a.probabilities, b.at_t + c * a.probabilities.class_stride, b.t_stride, b.n, t_buffer);
      }
      const V w(class_weight(a, c));
      each_vector<A>(b.n, [&](int64_t i, int64_t count) {
        const V x_i = load_vector(x + i, count);
        LogSumExp<V> s{V::loadu(max + i), V::loadu(rest + i)};
        const V old_max = s.max;
        s.push(x_i);
        s.max.store(max + i), s.rest.store(rest + i);
        if constexpr (K != Target::hard) {
          V q(spread(a));
          if constexpr (K == Target::soft) q = smoothed(load_vector(t + i, count), V(keep(a)), q);
          TargetGaps<V> target{V::loadu(gaps + i), V::loadu(mass + i)};
          target.rebase(old_max, s.max);
          target.push(q * w, x_i, s.max);
          target.gaps.store(gaps + i), target.mass.store(mass + i);
        }
      });
      if (c % kGroup == kGroup - 1 && c + 1 < a.classes) merge_group(false);
    }
    merge_group(true);

    A* out = static_cast<A*>(a.stats) + b.first;
    A* loss = static_cast<A*>(a.loss) + b.first;
    each_vector<A>(b.n, [&](int64_t i, int64_t count) {
      const LogSumExp<V> s{V::loadu(max_all + i), V::loadu(rest_all + i)};
      const TargetGaps<V> target{V::loadu(gaps + i), V::loadu(mass + i)};
      const V kept = V::loadu(w_y + i) * V(keep(a)), log_sum = s.log_sum();
      store_vector(out + i, s.max, count);
      store_vector(out + a.rows.count + i, log_sum, count);
      store_vector(out + 2 * a.rows.count + i, kept + target.mass, count);
      store_vector(loss + i, row_loss(kept, V::loadu(x_y + i), target, s.max, log_sum), count);
    });
    if constexpr (K != Target::soft) {
      for (int64_t i = 0; i < b.n; i++) skip(a, b.first + i, b.y[i]);
    }
  }

  template <Target K>
  static void backward_block(const Args& a, int64_t task) {
    const Operand& out = a.grad_logits;
    Block b;
    locate(a, task, b);
    alignas(64) A buffer[kPixels], t_buffer[kPixels], out_buffer[kPixels], x_y[kPixels], w_y[kPixels];
    alignas(64) A max[kPixels], log_sum[kPixels], mass[kPixels], g[kPixels], used[kPixels];
    gather_labels(a, b, x_y, w_y);
    for (int64_t i = 0; i < kPixels; i++) {
      const RowGrad r = i < b.n ? row_grad(a, b.first + i) : RowGrad{0, 0, 0, 0};
      max[i] = r.max, log_sum[i] = r.log_sum, mass[i] = r.mass, g[i] = r.g;
      used[i] = K == Target::soft || (i < b.n && b.y[i] != kIgnored);
      if (i >= b.n) x_y[i] = w_y[i] = 0;
    }
    for (int64_t i = 0; i < kPixels; i += kLanes) {  // the label's slope, before its logit is overwritten
      if constexpr (K != Target::soft) {
        const V w = V::loadu(w_y + i), kept = w * V(keep(a));
        const V slope = label_slope(V::loadu(x_y + i), V::loadu(max + i), V::loadu(log_sum + i), kept,
                                    V::loadu(mass + i) - kept, w * V(spread(a)));
        (slope * V::loadu(g + i)).store(x_y + i);
      }
    }
    for (int64_t c = 0; c < a.classes; c++) {
      const int64_t at = b.at_out + c * out.class_stride;
      const A* x = load(a.logits, b.at_x + c * a.logits.class_stride, b.x_stride, b.n, buffer);
      const A* t = nullptr;
      if constexpr (K == Target::soft) {
        t = load(a.probabilities, b.at_t + c * a.probabilities.class_stride, b.t_stride, b.n, t_buffer);
      }
      A* slopes = room(out, at, b.out_stride, out_buffer);
      const V w(class_weight(a, c));
      each_vector<A>(b.n, [&](int64_t i, int64_t count) {
        V q(A(0));
        if constexpr (K == Target::smooth) q = V(spread(a)) * w;
        if constexpr (K == Target::soft) q = smoothed(load_vector(t + i, count), V(keep(a)), V(spread(a))) * w;
        const V slope = row_slope(load_vector(x + i, count), V::loadu(max + i), V::loadu(log_sum + i),
                                  V::loadu(mass + i), q);
        store_vector(slopes + i, times(V::loadu(used + i), V::loadu(g + i) * slope), count);
      });
      store(out, at, b.out_stride, b.n, slopes);
    }
    visit(out.dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      S* grad = static_cast<S*>(out.data) + b.at_out;
      for (int64_t i = 0; i < b.n; i++) {
        if (b.y[i] >= 0) grad[b.y[i] * out.class_stride + i * b.out_stride] = static_cast<S>(x_y[i]);
      }
    });
  }

  static void forward_pixels(const Args& a, int64_t begin, int64_t end) {
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) forward_block<kind.value>(a, task);
    });
  }
  static void backward_pixels(const Args& a, int64_t begin, int64_t end) {
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) backward_block<kind.value>(a, task);
    });
  }

  // ---- the mean or sum of the rows' losses, in double and in a fixed order

  static void reduce(const Args& a) {
    constexpr int64_t kLane = 8;  // independent sums: additions of one would wait for each other
    double loss[kLane] = {}, weight[kLane] = {};
    const bool weighted = a.reduction == Reduction::mean && !a.probabilities.data;
    const A* losses = static_cast<const A*>(a.loss);
    for (int64_t row = 0; row < a.rows.count; row++) loss[row % kLane] += losses[row];
    for (int64_t row = 0; weighted && row < a.rows.count; row++) {
      const int64_t y = label(a, row);
      if (y >= 0) weight[row % kLane] += class_weight(a, y);
    }
    double total_loss = 0, total_weight = weighted ? 0 : double(a.rows.count);
    for (int64_t k = 0; k < kLane; k++) total_loss += loss[k], total_weight += weight[k];
    *static_cast<A*>(a.total_weight) = A(total_weight);
    *static_cast<A*>(a.reduced) = A(a.reduction == Reduction::mean ? total_loss / total_weight : total_loss);
  }

  static constexpr CrossEntropyKernels<A> kernels = {forward_rows,   finish_rows,     backward_rows,
                                                     forward_pixels, backward_pixels, reduce};
};

}  // namespace
}  // namespace cece::cpu
