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

  // The class indices of rows first ... first + n - 1, each a class, kIgnored or kImpossible. True if all are classes.
  static bool read_labels(const Args& a, int64_t first, int64_t n, int64_t* y) {
    if (a.probabilities.data) {
      std::fill_n(y, n, kIgnored);
      return true;
    }
    int64_t classes = 0;
    const auto read = [&](auto* labels) {
      for (int64_t i = 0; i < n; i++) {
        const int64_t label = labels[first + i];
        const bool possible = label >= 0 && label < a.classes, ignored = label == a.ignore_index;
        y[i] = ignored ? kIgnored : possible ? label : kImpossible;
        classes += possible & !ignored;
      }
    };
    visit(a.label_dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      if constexpr (std::is_integral_v<S>) read(static_cast<const S*>(a.labels));
    });
    return classes == n;
  }
  static int64_t label(const Args& a, int64_t row) {
    int64_t y;
    read_labels(a, row, 1, &y);
    return y;
  }
  static A class_weight(const Args& a, int64_t c) { return a.weight ? static_cast<const A*>(a.weight)[c] : A(1); }
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
    for (; i + kLanes <= n; i += kLanes) m[0] = at::vec::clamp_min(V::loadu(x + i), m[0]);
    const auto greater_of = [](auto p, auto q) { return p > q ? p : q; };
    const V all = at::vec::clamp_min(at::vec::clamp_min(m[0], m[1]), at::vec::clamp_min(m[2], m[3]));
    A result = reduce_lanes(all, greater_of);
    for (; i < n; i++) result = greater_of(x[i], result);
    return result;
  }

  static int64_t index_of(const A* x, int64_t n, A value) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      if ((V::loadu(x + i) == V(value)).zero_mask() != (1 << kLanes) - 1) break;
    }
    while (i < n && !(x[i] == value)) i++;
    return i;
  }

  // sum_i e^{x_i - max}, without element `own` (n: with all). The block is in L1 and this is arithmetic only, so it is
  // the time to ask for what comes `ahead` in memory, the next block or row: reading then costs next to nothing.
  static A sum_exp(const A* x, int64_t n, A max, int64_t own, const char* ahead, int64_t element_size) {
    const V m(max);
    V sum[4] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
    const auto add = [&](int64_t i, int64_t end) {  // whole vectors
      for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
        for (int k = 0; k < 4; k++) {
          __builtin_prefetch(ahead + (i + k * kLanes) * element_size);
          sum[k] = sum[k] + exp_nonpositive(V::loadu(x + i + k * kLanes) - m);
        }
      }
      for (; i < end; i += kLanes) sum[0] = sum[0] + exp_nonpositive(V::loadu(x + i) - m);
    };
    const auto add_few = [&](int64_t i, int64_t end) {  // less than a vector, or one with the element to leave out
      A few[kLanes];
      std::fill_n(few, kLanes, -std::numeric_limits<A>::infinity());
      for (int64_t j = i; j < end; j++) few[j - i] = j == own ? few[j - i] : x[j];
      sum[1] = sum[1] + exp_nonpositive(V::loadu(few) - m);
    };
    const int64_t whole = n / kLanes * kLanes, own_vector = std::min(own / kLanes * kLanes, whole);
    add(0, own_vector);
    if (own_vector < whole) add_few(own_vector, own_vector + kLanes);
    add(std::min(own_vector + kLanes, whole), whole);
    if (whole < n) add_few(whole, n);
    return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // Adds a block's masses and gaps. While the maximum is finite a gap is a difference, and where every class has the
  // same mass it is left out until the end; the gaps are then added up in small units, since two of float's largest
  // would be infinite.
  template <Target K>
  static void add_gaps(TargetGaps<double>& s, const A* x, int64_t n, A max, const Masses<K>& q) {
    if (!(max <= std::numeric_limits<A>::max())) {
      for (int64_t i = 0; i < n; i++) s.push(q.at(i), x[i], max);
      return;
    }
    const bool even = K == Target::smooth && !q.w;
    constexpr A kUnit = A(1) / (4 * kBlock);
    const V m(even ? max * kUnit : max), minus_unit(even ? -kUnit : A(-1)), zero(A(0));
    V gaps[2] = {zero, zero}, mass[2] = {zero, zero};
    each_vector_in_turn<A, 2>(n, [&](int64_t i, int64_t count, int turn) {
      V gap = at::vec::fmadd(load_vector(x + i, count), minus_unit, m);
      V q_i = even ? V(A(1)) : q.at(i, count);
      if (!even) gap = times(q_i, gap);
      if (count < kLanes) gap = first_lanes(gap, count), q_i = first_lanes(q_i, count);
      gaps[turn] = gaps[turn] + gap;
      mass[turn] = mass[turn] + q_i;
    });
    const double each = even ? q.spread : A(1);
    s.gaps += each / (even ? kUnit : A(1)) * sum_lanes(gaps[0] + gaps[1]);
    s.mass += each * sum_lanes(mass[0] + mass[1]);
  }

  struct RowBuffers {
    alignas(64) A x[kBlock], t[kBlock], out[kBlock];
  };

  template <Target K>
  static RowState read_classes(const Args& a, RowBuffers& buffer, int64_t row, int64_t begin, int64_t end) {
    const int64_t at_x = offset_of(a.rows, a.logits, row), stride = a.logits.class_stride;
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    LogSumExp<double> lse;
    lse.max = lowest<A>();
    TargetGaps<double> target;
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c);
      const A* x = load(a.logits, at_x + c * stride, stride, n, buffer.x);
      const A max = block_max(x, n);
      const int64_t element_size = stride * size_of(a.logits.dtype);
      const char* ahead = static_cast<const char*>(a.logits.data) + (at_x + (c + n) * stride) * size_of(a.logits.dtype);
      if (max > lse.max) {  // one of the maximal elements is the `1 +` of log1p: its term stays out of the sum
        const LogSumExp<double> block{max, sum_exp(x, n, max, index_of(x, n, max), ahead, element_size)};
        target.rebase(lse.max, max);
        c == begin ? void(lse = block) : lse.merge(block);
      } else {
        lse.rest += sum_exp(x, n, A(lse.max), n, ahead, element_size);
      }
      if constexpr (K != Target::hard) {
        add_gaps(target, x, n, A(lse.max), masses<K>(a, at_t, c, n, buffer.t));
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

  static void forward_rows(const Args& a, Scratch& scratch, RowState* states, int64_t begin, int64_t end) {
    const int64_t parts = segments(a);
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t row = task / parts, c = task % parts * kSegment, y = label(a, row);
        if (skip(a, row, y)) continue;
        const int64_t last = std::min(c + kSegment, a.classes);
        const RowState s = read_classes<kind.value>(a, as<RowBuffers>(scratch), row, c, last);
        states ? void(states[task] = s) : finish(a, row, y, s);
      }
    });
  }

  static void finish_rows(const Args& a, const RowState* states, int64_t begin, int64_t end) {
    const int64_t parts = segments(a);
    for (int64_t row = begin; row < end; row++) {
      const int64_t y = label(a, row);
      if (skip(a, row, y)) continue;
      LogSumExp<double> lse;
      TargetGaps<double> target;
      for (const RowState* s = states + row * parts; s < states + (row + 1) * parts; s++) {
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
  static A incoming(const Args& a, int64_t row) {
    const A g = static_cast<const A*>(a.grad_loss)[row * a.grad_stride];
    return a.reduction == Reduction::mean ? g / *static_cast<const A*>(a.total_weight) : g;
  }
  static RowGrad row_grad(const Args& a, int64_t row) {
    const A* stats = static_cast<const A*>(a.stats) + row;
    return {stats[0], stats[a.rows.count], stats[2 * a.rows.count], incoming(a, row)};
  }

  // The label's slope, from its logit as it was before anything was written (the gradient may overwrite it).
  static A slope_at_label(const Args& a, const RowGrad& r, int64_t y, A x_y) {
    const A w = class_weight(a, y), kept = keep(a) * w;
    return r.g * label_slope(x_y, r.max, r.log_sum, kept, r.mass - kept, spread(a) * w);
  }

  // The slopes of a block of n classes; that of element `own` (n: none of them) is given.
  template <Target K>
  static void write_block(A* out, const A* x, int64_t n, const RowGrad& r, const Masses<K>& q, int64_t own, A own_slope,
                          bool stream) {
    if (!(std::abs(r.max) <= std::numeric_limits<A>::max())) {  // an infinite maximum: element by element
      for (int64_t i = 0; i < n; i++) {
        const A slope = r.g * row_slope(x[i], r.max, r.log_sum, r.mass, K == Target::hard ? A(0) : q.at(i));
        out[i] = i == own ? own_slope : slope;
      }
      return;
    }
    const V max(r.max), log_sum(r.log_sum), scale(r.g * r.mass), g(r.g);
    const auto slopes = [&](int64_t i, int64_t count) {
      const V slope = exp_nonpositive((load_vector(x + i, count) - max) - log_sum) * scale;
      return K == Target::hard ? slope : slope - g * q.at(i, count);
    };
    const auto put = [&](int64_t i, V slope, int64_t count) {
      stream ? stream_vector(out + i, slope, count) : store_vector(out + i, slope, count);
    };
    const int64_t own_vector = own / kLanes * kLanes, own_count = std::min(kLanes, n - own_vector);
    each_vector<A>(own_vector, [&](int64_t i, int64_t count) { put(i, slopes(i, count), count); });
    if (own_count > 0) {
      V slope = slopes(own_vector, own_count);
      if (own < n) slope = with_lane(slope, own - own_vector, own_slope);
      put(own_vector, slope, own_count);
    }
    const int64_t rest = own_vector + kLanes;
    if (rest < n)
      each_vector<A>(n - rest, [&](int64_t i, int64_t count) { put(rest + i, slopes(rest + i, count), count); });
  }

  template <Target K>
  static void write_classes(const Args& a, RowBuffers& buffer, int64_t row, int64_t y, int64_t begin, int64_t end) {
    const Operand& out = a.grad_logits;
    const int64_t at_x = offset_of(a.rows, a.logits, row), stride = a.logits.class_stride;
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    const int64_t at_out = offset_of(a.rows, out, row);
    const RowGrad r = row_grad(a, row);
    const bool stream = worth_streaming(a.logits.data, out, a.rows.count * a.classes);
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c), at = at_out + c * out.class_stride;
      A* slopes = room(out, at, out.class_stride, buffer.out);
      if (K != Target::soft && y < 0) {
        std::fill_n(slopes, n, y == kIgnored ? A(0) : std::numeric_limits<A>::quiet_NaN());
      } else {
        const A* x = load(a.logits, at_x + c * stride, stride, n, buffer.x);
        const int64_t own = y >= c && y < c + n ? y - c : n;
        write_block(slopes, x, n, r, masses<K>(a, at_t, c, n, buffer.t), own,
                    own < n ? slope_at_label(a, r, y, x[own]) : A(0), stream && slopes != buffer.out);
      }
      store(out, at, out.class_stride, n, slopes);
    }
  }

  static void backward_rows(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    const int64_t parts = segments(a);
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t row = task / parts, c = task % parts * kSegment;
        const int64_t last = std::min(c + kSegment, a.classes);
        write_classes<kind.value>(a, as<RowBuffers>(scratch), row, label(a, row), c, last);
      }
    });
    end_streaming();
  }

  // ---- rows side by side, one a lane

  struct Block {  // rows first ... first + n - 1, in `lanes` lanes, and where their class 0 is
    int64_t first, n, lanes, at_x, at_t, at_out, x_stride, t_stride, out_stride;
    int64_t y[kMaxPixels];
    bool all_labelled;
  };
  static void locate(const Args& a, int64_t task, Block& b) {
    const int last = a.rows.dims - 1;
    const int64_t pixels = pixels_per_task(a);
    const int64_t inner = last < 0 ? 1 : a.rows.size[last], blocks = (inner + pixels - 1) / pixels;
    const auto along = [&](const Operand& t) { return last < 0 ? 0 : t.stride[last]; };
    b.first = task / blocks * inner + task % blocks * pixels;
    b.n = std::min(pixels, inner - task % blocks * pixels);
    b.lanes = (b.n + kLanes - 1) / kLanes * kLanes;
    b.at_x = offset_of(a.rows, a.logits, b.first);
    b.at_t = offset_of(a.rows, a.probabilities, b.first);
    b.at_out = offset_of(a.rows, a.grad_logits, b.first);
    b.x_stride = along(a.logits), b.t_stride = along(a.probabilities), b.out_stride = along(a.grad_logits);
    b.all_labelled = read_labels(a, b.first, b.n, b.y);
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

  // The run of the next class, asked for while this one is worked on: it is far away, and the prefetcher starts anew.
  static const char* next_run(const Args& a, const Block& b, int64_t c) {
    const int64_t next = std::min(c + 1, a.classes - 1);
    return static_cast<const char*>(a.logits.data) + (b.at_x + next * a.logits.class_stride) * size_of(a.logits.dtype);
  }

  // Sums over the classes of a block of rows, one row a lane. A float sum of thousands of terms would drift, so kGroup
  // classes are added up plainly and each group's sums to LongSums, relative to the maximum so far.
  struct Sums {
    static constexpr int64_t kGroup = 16;
    struct Long {
      alignas(64) A sum[kMaxPixels], lost[kMaxPixels];
      LongSum<V> at(int64_t i) const { return {V::loadu(sum + i), V::loadu(lost + i)}; }
      void put(int64_t i, const LongSum<V>& s) { s.sum.store(sum + i), s.lost.store(lost + i); }
    };
    alignas(64) A max[kMaxPixels], rest[kMaxPixels], gaps[kMaxPixels], mass[kMaxPixels];  // of this group
    alignas(64) A group_max[kMaxPixels];                                                  // as this group began
    Long all_rest, all_gaps, all_mass;

    void reset(int64_t lanes, bool dense) {
      const auto clear = [&](Long& s) { std::fill_n(s.sum, lanes, A(0)), std::fill_n(s.lost, lanes, A(0)); };
      std::fill_n(max, lanes, lowest<A>()), std::fill_n(group_max, lanes, lowest<A>());
      std::fill_n(rest, lanes, A(-1));
      clear(all_rest);
      if (dense) std::fill_n(gaps, lanes, A(0)), std::fill_n(mass, lanes, A(0)), clear(all_gaps), clear(all_mass);
    }
    void end_group(int64_t lanes, bool dense) {
      const V zero(A(0));
      for (int64_t i = 0; i < lanes; i += kLanes) {
        const V rise = gap(V::loadu(group_max + i), V::loadu(max + i));
        LongSum<V> s = all_rest.at(i);
        s.scale(exp_nonpositive(-rise));
        s.add(V::loadu(rest + i));
        all_rest.put(i, s);
        zero.store(rest + i);  // the maximal element's own term has been left out for good
        V::loadu(max + i).store(group_max + i);
        if (!dense) continue;
        LongSum<V> g = all_gaps.at(i), m = all_mass.at(i);
        g.add(times(m.value(), rise));
        g.add(V::loadu(gaps + i));
        m.add(V::loadu(mass + i));
        all_gaps.put(i, g), all_mass.put(i, m);
        zero.store(gaps + i), zero.store(mass + i);
      }
    }
  };

  struct PixelBuffers {
    Block block;
    Sums sums;
    alignas(64) A x[kMaxPixels], t[kMaxPixels], out[kMaxPixels], x_y[kMaxPixels], w_y[kMaxPixels];
    alignas(64) A g[kMaxPixels], y[kMaxPixels];
  };

  template <Target K>
  static void forward_block(const Args& a, PixelBuffers& buffer, int64_t task) {
    constexpr bool dense = K != Target::hard;
    Block& b = buffer.block;
    Sums& sums = buffer.sums;
    A *const x_y = buffer.x_y, *const w_y = buffer.w_y;
    locate(a, task, b);
    sums.reset(b.lanes, dense);

    const V keep_v(keep(a)), spread_v(spread(a));
    const int64_t step = b.x_stride * size_of(a.logits.dtype);
    for (int64_t c = 0; c < a.classes; c++) {
      const A* x = load(a.logits, b.at_x + c * a.logits.class_stride, b.x_stride, b.n, buffer.x);
      const A* t = nullptr;
      if constexpr (K == Target::soft) {
        t = load(a.probabilities, b.at_t + c * a.probabilities.class_stride, b.t_stride, b.n, buffer.t);
      }
      const V w(class_weight(a, c));
      const char* next = next_run(a, b, c);
      each_vector<A>(b.n, [&](int64_t i, int64_t count) {
        __builtin_prefetch(next + i * step);
        const V x_i = load_vector(x + i, count);
        LogSumExp<V> s{V::loadu(sums.max + i), V::loadu(sums.rest + i)};
        const V old_max = s.max;
        s.push(x_i);
        s.max.store(sums.max + i), s.rest.store(sums.rest + i);
        if constexpr (dense) {
          V q = spread_v;
          if constexpr (K == Target::soft) q = smoothed(load_vector(t + i, count), keep_v, spread_v);
          TargetGaps<V> target{V::loadu(sums.gaps + i), V::loadu(sums.mass + i)};
          target.rebase(old_max, s.max);
          target.push(q * w, x_i, s.max);
          target.gaps.store(sums.gaps + i), target.mass.store(sums.mass + i);
        }
      });
      if (c % Sums::kGroup == Sums::kGroup - 1) sums.end_group(b.lanes, dense);
    }
    if (a.classes % Sums::kGroup) sums.end_group(b.lanes, dense);
    gather_labels(a, b, x_y, w_y);  // now, while the block is in cache

    A* out = static_cast<A*>(a.stats) + b.first;
    A* loss = static_cast<A*>(a.loss) + b.first;
    each_vector<A>(b.n, [&](int64_t i, int64_t count) {
      const LogSumExp<V> s{V::loadu(sums.max + i), sums.all_rest.at(i).value()};
      TargetGaps<V> target;
      if constexpr (dense) target = {sums.all_gaps.at(i).value(), sums.all_mass.at(i).value()};
      const V kept = V::loadu(w_y + i) * keep_v, log_sum = s.log_sum();
      store_vector(out + i, s.max, count);
      store_vector(out + a.rows.count + i, log_sum, count);
      store_vector(out + 2 * a.rows.count + i, kept + target.mass, count);
      store_vector(loss + i, row_loss(kept, V::loadu(x_y + i), target, s.max, log_sum), count);
    });
    for (int64_t i = 0; i < b.n && !b.all_labelled; i++) skip(a, b.first + i, b.y[i]);
  }

  template <Target K>
  static void backward_block(const Args& a, PixelBuffers& buffer, int64_t task) {
    const Operand& out = a.grad_logits;
    Block& b = buffer.block;
    A *const g = buffer.g, *const y = buffer.y;
    locate(a, task, b);
    const A* const max = static_cast<const A*>(a.stats) + b.first;
    const A *const log_sum = max + a.rows.count, *const mass = log_sum + a.rows.count;
    std::fill_n(g, b.lanes, incoming(a, b.first));
    for (int64_t i = 0; i < b.n && a.grad_stride; i++) g[i] = incoming(a, b.first + i);
    for (int64_t i = 0; i < b.lanes; i++) y[i] = i < b.n ? A(b.y[i]) : A(kIgnored);
    const V keep_v(keep(a)), spread_v(spread(a));
    const int64_t step = b.x_stride * size_of(a.logits.dtype);
    for (int64_t c = 0; c < a.classes; c++) {
      const int64_t at = b.at_out + c * out.class_stride;
      const A* x = load(a.logits, b.at_x + c * a.logits.class_stride, b.x_stride, b.n, buffer.x);
      const A* t = nullptr;
      if constexpr (K == Target::soft) {
        t = load(a.probabilities, b.at_t + c * a.probabilities.class_stride, b.t_stride, b.n, buffer.t);
      }
      A* slopes = room(out, at, b.out_stride, buffer.out);
      const V w(class_weight(a, c)), this_class = V(A(c));
      const char* next = next_run(a, b, c);
      each_vector<A>(b.n, [&](int64_t i, int64_t count) {
        __builtin_prefetch(next + i * step);
        const V x_i = load_vector(x + i, count), y_i = V::loadu(y + i);
        const V max_i = load_vector(max + i, count), log_sum_i = load_vector(log_sum + i, count);
        const V mass_i = load_vector(mass + i, count);
        V q(A(0));
        if constexpr (K == Target::smooth) q = spread_v * w;
        if constexpr (K == Target::soft) q = smoothed(load_vector(t + i, count), keep_v, spread_v) * w;
        V slope = row_slope(x_i, max_i, log_sum_i, mass_i, q);
        if constexpr (K != Target::soft) {
          const V labelled = y_i == this_class;
          if (labelled.zero_mask() != (1 << kLanes) - 1) {
            const V kept = keep_v * w;
            slope = select(labelled, label_slope(x_i, max_i, log_sum_i, kept, mass_i - kept, q), slope);
          }
        }
        slope = slope * V::loadu(g + i);
        if constexpr (K != Target::soft) slope = select(y_i == V(A(kIgnored)), V(A(0)), slope);
        store_vector(slopes + i, slope, count);
      });
      store(out, at, b.out_stride, b.n, slopes);
    }
  }

  // Backward needs nothing from a row's other classes, so where the classes are contiguous it goes along them after
  // all: whole vectors, the last one reaching back over the one before. The labels' slopes are found side by side
  // first.
  static bool short_rows(const Args& a) {
    const auto plain = [](const Operand& t) { return t.dtype == dtype_of<A> && t.class_stride == 1; };
    return a.classes >= kLanes && !a.probabilities.data && plain(a.logits) && plain(a.grad_logits);
  }
  template <Target K>
  static void backward_short_rows(const Args& a, PixelBuffers& buffer, int64_t task) {
    Block& b = buffer.block;
    A *const x_y = buffer.x_y, *const w_y = buffer.w_y;
    locate(a, task, b);
    gather_labels(a, b, x_y, w_y);
    const A* const max = static_cast<const A*>(a.stats) + b.first;
    const A *const log_sum = max + a.rows.count, *const mass = log_sum + a.rows.count;
    each_vector<A>(b.n, [&](int64_t i, int64_t count) {  // label_slope, before g, in the place of x_y
      const V w = V::loadu(w_y + i), kept = w * V(keep(a)), q = K == Target::smooth ? w * V(spread(a)) : V(A(0));
      label_slope(V::loadu(x_y + i), load_vector(max + i, count), load_vector(log_sum + i, count), kept,
                  load_vector(mass + i, count) - kept, q)
          .store(x_y + i);
    });
    const A common = incoming(a, b.first);
    const int64_t last = a.classes - kLanes;
    for (int64_t i = 0; i < b.n; i++) {
      const A* x = static_cast<const A*>(a.logits.data) + b.at_x + i * b.x_stride;
      A* out = static_cast<A*>(a.grad_logits.data) + b.at_out + i * b.out_stride;
      if (b.y[i] < 0) {
        std::fill_n(out, a.classes, b.y[i] == kIgnored ? A(0) : std::numeric_limits<A>::quiet_NaN());
        continue;
      }
      const A g = a.grad_stride ? incoming(a, b.first + i) : common;
      const V max_i(max[i]), log_sum_i(log_sum[i]), mass_i(mass[i]), g_v(g);
      const auto slopes = [&](int64_t c, V x_c) {
        V q(A(0));
        if constexpr (K == Target::smooth) {
          q = V(spread(a));
          if (a.weight) q = q * V::loadu(static_cast<const A*>(a.weight) + c);
        }
        return g_v * row_slope(x_c, max_i, log_sum_i, mass_i, q);
      };
      const V end = slopes(last, V::loadu(x + last));  // read before it may be overwritten
      for (int64_t c = 0; c < last; c += kLanes) slopes(c, V::loadu(x + c)).store(out + c);
      end.store(out + last);
      out[b.y[i]] = g * x_y[i];
    }
  }

  static void forward_pixels(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) forward_block<kind.value>(a, as<PixelBuffers>(scratch), task);
    });
  }
  static void backward_pixels(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_target(a, [&](auto kind) {
      const auto block = short_rows(a) ? backward_short_rows<kind.value> : backward_block<kind.value>;
      for (int64_t task = begin; task < end; task++) block(a, as<PixelBuffers>(scratch), task);
    });
  }

  // ---- the mean or sum of the rows' losses, in double and in a fixed order

  static bool weighs_labels(const Args& a) { return a.reduction == Reduction::mean && !a.probabilities.data; }

  static void reduce(const Args& a, double* sums, int64_t begin, int64_t end) {
    constexpr int64_t kSums = 8;  // side by side: an addition would wait for the one before it
    const A *losses = static_cast<const A*>(a.loss), *mass = static_cast<const A*>(a.stats) + 2 * a.rows.count;
    const bool weighs = weighs_labels(a);
    for (int64_t task = begin; task < end; task++) {
      double loss[kSums] = {}, weight[kSums] = {};
      const int64_t last = std::min((task + 1) * kChunk, a.rows.count);
      for (int64_t row = task * kChunk; row < last; row++) loss[row % kSums] += losses[row];
      for (int64_t row = task * kChunk; weighs && row < last; row++) {
        if (a.label_smoothing == 0) {  // the row's mass is its label's weight
          weight[row % kSums] += mass[row];
        } else if (const int64_t y = label(a, row); y >= 0) {
          weight[row % kSums] += class_weight(a, y);
        }
      }
      sums[2 * task] = sums[2 * task + 1] = 0;
      for (int64_t k = 0; k < kSums; k++) sums[2 * task] += loss[k], sums[2 * task + 1] += weight[k];
    }
  }

  static void total(const Args& a, const double* sums, int64_t chunks) {
    double loss = 0, weight = 0;
    for (int64_t i = 0; i < chunks; i++) loss += sums[2 * i], weight += sums[2 * i + 1];
    if (!weighs_labels(a)) weight = double(a.rows.count);
    *static_cast<A*>(a.total_weight) = A(weight);
    *static_cast<A*>(a.reduced) = A(a.reduction == Reduction::mean ? loss / weight : loss);
  }

  static constexpr CrossEntropyKernels<A> kernels = {forward_rows,    finish_rows, backward_rows, forward_pixels,
                                                     backward_pixels, reduce,      total};
};

}  // namespace
}  // namespace cece::cpu
