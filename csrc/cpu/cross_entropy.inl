// Softmax cross-entropy on a CPU: forward and backward, one row at a time or many side by side.
//
// Forward reads the logits once. A block of kBlock classes comes into L1 (as Acc, whatever its dtype); its maximum
// is found there, then its exponentials summed. Backward reads the logits once more and writes the gradient,
// rebuilding each probability from the row's saved max and log_sum.
//
// One text for two operators: cross-entropy, and all statistics of a row (kFull), which transforms the logits on the
// way in, forms three more sums and has three more terms in its gradient. Cross-entropy compiles to none of that.
#pragma once
#include "block.h"
#include "kernels.h"

namespace cece::cpu {
namespace {

enum class Target { hard, smooth, soft };  // a label; a label with smoothing; probabilities

template <class A, class Args>
struct CrossEntropy {
  using V = Vec<A>;
  static constexpr int64_t kLanes = V::size();
  static constexpr bool kFull = std::is_same_v<Args, TokenStatisticsArgs>;
  struct Nothing {};

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
  template <class Y>
  static bool read_labels(const Args& a, int64_t first, int64_t n, Y* __restrict y) {
    if (!a.labels) {
      std::fill_n(y, n, Y(kIgnored));
      return true;
    }
    const int64_t classes = a.classes, ignore_index = a.ignore_index;
    int64_t labelled = 0;
    const auto read = [&](const auto* labels) {
      for (int64_t i = 0; i < n; i++) {
        const int64_t label = labels[first + i];
        const bool possible = (label >= 0) & (label < classes), ignored = label == ignore_index;
        y[i] = Y(ignored ? kIgnored : possible ? label : kImpossible);
        labelled += possible & !ignored;
      }
    };
    visit(a.label_dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      if constexpr (std::is_integral_v<S>) read(static_cast<const S*>(a.labels));
    });
    return labelled == n;
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

  // ---- what the logits are changed to

  static bool transforms(const Args& a) {
    if constexpr (kFull) return a.logit_scale != 1 || a.softcap > 0;
    return false;
  }
  // n logits as they are used, in `z`; and in `slope`, if there is one, what that changes by.
  static void transform(const Args& a, const A* x, int64_t n, A* z, A* slope) {
    if constexpr (kFull) {
      const V scale{A(a.logit_scale)}, cap{A(a.softcap)}, shrink{A(a.softcap > 0 ? 1 / a.softcap : 1)};
      each_vector<A>(n, [&](int64_t i, int64_t count) {
        const V s = load_vector(x + i, count) * scale, w = abs_(s * shrink);
        const V capped = cap * tanh_nonnegative(w);
        store_vector(z + i, a.softcap > 0 ? select(s < V(A(0)), -capped, capped) : s, count);
        if (slope) store_vector(slope + i, a.softcap > 0 ? scale * tanh_slope(w) : scale, count);
      });
    }
  }
  static const A* transformed(const Args& a, const A* x, int64_t n, A* buffer, A* slope = nullptr) {
    if (!transforms(a)) return x;
    transform(a, x, n, buffer, slope);
    return buffer;
  }
  static A transformed_one(const Args& a, A x) {
    if (transforms(a)) transform(a, &x, 1, &x, nullptr);
    return x;
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

  struct Terms {  // of e^{x_i - max}
    A sum, heat, square;
  };
  // Their sums without element `own` (n: with all). The block is in L1 and this is arithmetic only, so it is the time
  // to ask for what comes `ahead` in memory, the next block or row: reading then costs next to nothing.
  static Terms sum_terms(const A* x, int64_t n, A max, int64_t own, const char* ahead, int64_t element_size) {
    const V m(max), zero(A(0));
    V sum[4] = {zero, zero, zero, zero}, heat[4] = {zero, zero, zero, zero}, square[4] = {zero, zero, zero, zero};
    const auto add_vector = [&](V x_i, int k) {
      const V e = exp_nonpositive(x_i - m);
      sum[k] = sum[k] + e;
      if constexpr (kFull) heat[k] = heat[k] + times(e, m - x_i), square[k] = square[k] + e * e;
    };
    const auto add = [&](int64_t i, int64_t end) {  // whole vectors
      for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
        for (int k = 0; k < 4; k++) {
          __builtin_prefetch(ahead + (i + k * kLanes) * element_size);
          add_vector(V::loadu(x + i + k * kLanes), k);
        }
      }
      for (; i < end; i += kLanes) add_vector(V::loadu(x + i), 0);
    };
    const auto add_few = [&](int64_t i, int64_t end) {  // less than a vector, or one with the element to leave out
      A few[kLanes];
      std::fill_n(few, kLanes, -std::numeric_limits<A>::infinity());
      for (int64_t j = i; j < end; j++) few[j - i] = j == own ? few[j - i] : x[j];
      add_vector(V::loadu(few), 1);
    };
    const int64_t whole = n / kLanes * kLanes, own_vector = std::min(own / kLanes * kLanes, whole);
    add(0, own_vector);
    if (own_vector < whole) add_few(own_vector, own_vector + kLanes);
    add(std::min(own_vector + kLanes, whole), whole);
    if (whole < n) add_few(whole, n);
    const auto total = [](const V(&v)[4]) { return sum_lanes((v[0] + v[1]) + (v[2] + v[3])); };
    if constexpr (kFull) return {total(sum), total(heat), total(square)};
    return {total(sum)};
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
    alignas(64) A x[kBlock], t[kBlock], out[kBlock], slope[kBlock];
  };

  template <Target K>
  static RowState read_classes(const Args& a, RowBuffers& buffer, int64_t row, int64_t begin, int64_t end) {
    const int64_t at_x = offset_of(a.rows, a.logits, row), stride = a.logits.class_stride;
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    std::conditional_t<kFull, Moments<double>, LogSumExp<double>> sums;
    sums.max = lowest<A>();
    TargetGaps<double> target;
    int64_t argmax = begin;
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c);
      const A* x = transformed(a, load(a.logits, at_x + c * stride, stride, n, buffer.x), n, buffer.x);
      const A max = block_max(x, n);
      const int64_t element_size = stride * size_of(a.logits.dtype);
      const char* ahead = static_cast<const char*>(a.logits.data) + (at_x + (c + n) * stride) * size_of(a.logits.dtype);
      if (max > sums.max) {  // one of the maximal elements is the `1 +` of log1p: its term stays out of the sum
        const int64_t own = index_of(x, n, max);
        const Terms terms = sum_terms(x, n, max, own, ahead, element_size);
        decltype(sums) block;
        block.max = max, block.rest = terms.sum;
        if constexpr (kFull) block.heat = terms.heat, block.square = terms.square, argmax = c + own;
        target.rebase(sums.max, max);
        c == begin ? void(sums = block) : sums.merge(block);
      } else {
        const Terms terms = sum_terms(x, n, A(sums.max), n, ahead, element_size);
        sums.rest += terms.sum;
        if constexpr (kFull) sums.heat += terms.heat, sums.square += terms.square;
      }
      if constexpr (K != Target::hard) {
        add_gaps(target, x, n, A(sums.max), masses<K>(a, at_t, c, n, buffer.t));
      }
    }
    RowState s{sums.max, sums.rest, target.gaps, target.mass};
    if constexpr (kFull) s.heat = sums.heat, s.square = sums.square, s.argmax = argmax;
    return s;
  }

  // A row's results; `nothing` in all of them where it has none.
  static void write_row(const Args& a, int64_t row, double max, double log_sum, double mass, double loss) {
    A* stats = static_cast<A*>(a.stats) + row;
    stats[0] = A(max);
    stats[a.rows.count] = A(log_sum);
    stats[2 * a.rows.count] = A(mass);
    if (!kFull || a.loss) static_cast<A*>(a.loss)[row] = A(loss);
  }
  static void write_nothing(const Args& a, int64_t row, double nothing) {
    write_row(a, row, nothing, nothing, nothing, nothing);
    if constexpr (kFull) write_more(a, row, nothing, nothing, nothing, nothing, nothing, 0);
  }
  static void write_more(const Args& a, int64_t row, double heat, double spread, double entropy, double logsumexp,
                         double collision, int64_t argmax) {
    A* stats = static_cast<A*>(a.stats) + row;
    stats[3 * a.rows.count] = A(heat);
    stats[4 * a.rows.count] = A(spread);
    const auto put = [&](void* out, double value) {
      if (out) static_cast<A*>(out)[row] = A(value);
    };
    put(a.entropy, entropy), put(a.logsumexp, logsumexp), put(a.collision, collision);
    if (a.argmax) a.argmax[row] = argmax;
  }

  static A load_logit(const Args& a, int64_t row, int64_t c) {
    return transformed_one(a, load_one<A>(a.logits, offset_of(a.rows, a.logits, row) + c * a.logits.class_stride));
  }
  // The first NaN, or the first of the largest.
  static int64_t first_maximal(const Args& a, int64_t row) {
    int64_t best = 0;
    A most = load_logit(a, row, 0);
    for (int64_t c = 1; c < a.classes && most == most; c++) {
      const A x = load_logit(a, row, c);
      if (!(x <= most)) best = c, most = x;
    }
    return best;
  }

  static void finish(const Args& a, int64_t row, int64_t y, const RowState& s) {
    const double log_sum = LogSumExp<double>{s.max, s.rest}.log_sum();
    double kept = 0, x_y = 0;
    if (y >= 0) {
      kept = (1 - a.label_smoothing) * class_weight(a, y);
      x_y = load_logit(a, row, y);
    }
    write_row(a, row, s.max, log_sum, kept + s.mass,
              row_loss(kept, x_y, TargetGaps<double>{s.gaps, s.mass}, s.max, log_sum));
    if constexpr (kFull) {
      Moments<double> m;
      m.max = s.max, m.rest = s.rest, m.heat = s.heat, m.square = s.square;
      const double infinity = std::numeric_limits<double>::infinity();
      if (log_sum == -infinity) {  // nothing but -inf
        if (a.skip_masked_rows) return write_masked(a, row);
        const double nan = std::numeric_limits<double>::quiet_NaN();
        return write_more(a, row, nan, nan, nan, -infinity, nan, 0);
      }
      const bool plain = log_sum == log_sum && s.max > lowest<A>();  // else the search passed over something
      write_more(a, row, m.mean_heat(), m.spread(), log_sum + m.mean_heat(), s.max + log_sum, m.collision(),
                 plain       ? s.argmax
                 : !a.argmax ? 0
                             : first_maximal(a, row));
    }
  }
  // No loss, and a gradient of 0: known by its log_sum.
  static void write_masked(const Args& a, int64_t row) {
    write_nothing(a, row, 0);
    static_cast<A*>(a.stats)[a.rows.count + row] = -std::numeric_limits<A>::infinity();
  }
  static bool masked(const Args& a, int64_t row) {
    if constexpr (kFull) {
      const A log_sum = static_cast<const A*>(a.stats)[a.rows.count + row];
      return a.skip_masked_rows && log_sum == -std::numeric_limits<A>::infinity();
    }
    return false;
  }

  // A row without a label has no loss; one with an impossible label is reported, and NaN.
  static bool skip(const Args& a, int64_t row, int64_t y) {
    if (!a.labels || y >= 0) return false;
    if (y == kImpossible) report(a.bad_row, row);
    write_nothing(a, row, y == kImpossible ? std::numeric_limits<double>::quiet_NaN() : 0);
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
      std::conditional_t<kFull, Moments<double>, LogSumExp<double>> sums, part_sums;
      TargetGaps<double> target;
      int64_t argmax = 0;
      for (const RowState* s = states + row * parts; s < states + (row + 1) * parts; s++) {
        TargetGaps<double> part{s->gaps, s->mass};
        const double max = std::max(sums.max, s->max);
        target.rebase(sums.max, max);
        part.rebase(s->max, max);
        target = {target.gaps + part.gaps, target.mass + part.mass};
        part_sums.max = s->max, part_sums.rest = s->rest;
        if constexpr (kFull) {
          part_sums.heat = s->heat, part_sums.square = s->square;
          if (s->max > sums.max) argmax = s->argmax;
        }
        sums.merge(part_sums);
      }
      RowState whole{sums.max, sums.rest, target.gaps, target.mass};
      if constexpr (kFull) whole.heat = sums.heat, whole.square = sums.square, whole.argmax = argmax;
      finish(a, row, y, whole);
    }
  }

  // ---- one row at a time: backward

  template <class T>
  struct More {  // p_j (constant + heat u_j + square (p_j - sum p^2)), the gradient of all statistics but the loss
    T constant, heat, square, spread;

    T slope(const Args& a, T x, T max, T log_sum) const {
      T s = constant;
      if constexpr (kFull) {
        const T u = gap(x, max), minus_log_p = u + log_sum, p = exp_nonpositive(-minus_log_p);
        if (a.grad_entropy) s = s + heat * u;
        if (a.grad_collision) s = s + square * above_collision(p, minus_log_p, spread);
        return times(p, s);
      }
      return s;
    }
  };
  static More<A> more_of(const Args& a, int64_t row) {
    if constexpr (kFull) {
      const A* stats = static_cast<const A*>(a.stats) + row;
      const auto get = [&](const void* grad) { return grad ? static_cast<const A*>(grad)[row] : A(0); };
      const A heat = get(a.grad_entropy);
      return {get(a.grad_logsumexp) - heat * stats[3 * a.rows.count], heat, 2 * get(a.grad_collision),
              stats[4 * a.rows.count]};
    }
    return {};
  }
  struct RowGrad {
    A max, log_sum, mass, g;  // g: the incoming gradient of this row's loss
    More<A> more;
  };
  static A incoming(const Args& a, int64_t row) {
    if (kFull && !a.grad_loss) return A(0);
    const A g = static_cast<const A*>(a.grad_loss)[row * a.grad_stride];
    return a.reduction == Reduction::mean ? g / *static_cast<const A*>(a.total_weight) : g;
  }
  static RowGrad row_grad(const Args& a, int64_t row) {
    const A* stats = static_cast<const A*>(a.stats) + row;
    return {stats[0], stats[a.rows.count], stats[2 * a.rows.count], incoming(a, row), more_of(a, row)};
  }

  // The label's slope, from its logit as it was before anything was written (the gradient may overwrite it).
  static A slope_at_label(const Args& a, const RowGrad& r, int64_t y, A x_y) {
    const A w = class_weight(a, y), kept = keep(a) * w;
    const A slope = r.g * label_slope(x_y, r.max, r.log_sum, kept, r.mass - kept, spread(a) * w);
    return kFull ? slope + r.more.slope(a, x_y, r.max, r.log_sum) : slope;
  }

  // The slopes of a block of n classes; that of element `own` (n: none of them) is given.
  template <Target K>
  static void write_block(const Args& a, A* out, const A* x, int64_t n, const RowGrad& r, const Masses<K>& q,
                          int64_t own, A own_slope, bool stream) {
    if (!(std::abs(r.max) <= std::numeric_limits<A>::max())) {  // an infinite maximum: element by element
      for (int64_t i = 0; i < n; i++) {
        A slope = r.g * row_slope(x[i], r.max, r.log_sum, r.mass, K == Target::hard ? A(0) : q.at(i));
        if constexpr (kFull) slope = slope + r.more.slope(a, x[i], r.max, r.log_sum);
        out[i] = i == own ? own_slope : slope;
      }
      return;
    }
    const V max(r.max), log_sum(r.log_sum), scale(r.g * r.mass), g(r.g);
    const More<V> more{V(r.more.constant), V(r.more.heat), V(r.more.square), V(r.more.spread)};
    const auto slopes = [&](int64_t i, int64_t count) {
      const V x_i = load_vector(x + i, count);
      V slope = exp_nonpositive((x_i - max) - log_sum) * scale;
      if constexpr (kFull) slope = slope + more.slope(a, x_i, max, log_sum);
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
      if ((a.labels && y < 0) || masked(a, row)) {
        std::fill_n(slopes, n, y == kImpossible ? std::numeric_limits<A>::quiet_NaN() : A(0));
      } else {
        const A* x = transformed(a, load(a.logits, at_x + c * stride, stride, n, buffer.x), n, buffer.x, buffer.slope);
        const int64_t own = y >= c && y < c + n ? y - c : n;
        write_block(a, slopes, x, n, r, masses<K>(a, at_t, c, n, buffer.t), own,
                    own < n ? slope_at_label(a, r, y, x[own]) : A(0), stream && slopes != buffer.out && !transforms(a));
        if (transforms(a)) {
          each_vector<A>(n, [&](int64_t i, int64_t count) {
            store_vector(slopes + i, load_vector(slopes + i, count) * load_vector(buffer.slope + i, count), count);
          });
        }
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
  //
  // kWide rows come into L1 as a tile, class by class whatever their layout: their maximum is found there, then the
  // sums are formed in registers. A gradient is formed in the tile and goes back as a whole, so it may be in place.

  struct Block {  // rows first ... first + n - 1, in `lanes` lanes, and where their class 0 is
    int64_t first, n, lanes, at_x, at_t, at_out, x_stride, t_stride, out_stride;
  };
  // f(Block) for the tiles of the tasks begin ... end - 1.
  template <class F>
  static void each_block(const Args& a, int64_t begin, int64_t end, F&& f) {
    const int last = a.rows.dims - 1;
    const int64_t inner = last < 0 ? 1 : a.rows.size[last], blocks = (inner + kPixels - 1) / kPixels;
    const auto along = [&](const Operand& t) { return last < 0 ? 0 : t.stride[last]; };
    Block b;
    b.x_stride = along(a.logits), b.t_stride = along(a.probabilities), b.out_stride = along(a.grad_logits);
    for (int64_t task = begin; task < end; task++) {
      const int64_t done = task % blocks * kPixels;
      b.first = task / blocks * inner + done;
      b.at_x = offset_of(a.rows, a.logits, b.first);
      b.at_t = offset_of(a.rows, a.probabilities, b.first);
      b.at_out = offset_of(a.rows, a.grad_logits, b.first);
      for (int64_t left = std::min(kPixels, inner - done); left > 0; left -= kWide) {
        b.n = std::min(kWide, left), b.lanes = (b.n + kLanes - 1) / kLanes * kLanes;
        f(b);
        b.first += kWide;
        b.at_x += kWide * b.x_stride, b.at_t += kWide * b.t_stride, b.at_out += kWide * b.out_stride;
      }
    }
  }

  struct Labels {  // their classes; the label's logit (any without one) and weight (0 without one)
    int32_t y[kWide];
    alignas(64) A x[kWide], weight[kWide];
    bool all;
  };
  static void read_labels(const Args& a, const Block& b, Labels& l) {
    l.all = read_labels(a, b.first, b.n, l.y);
    for (int64_t i = 0; i < b.n; i++) l.weight[i] = A(l.y[i] >= 0);
    for (int64_t i = 0; i < b.n && a.weight; i++) l.weight[i] *= class_weight(a, std::max(l.y[i], 0));
  }
  // f(row, class) for the labels among n classes of a tile, counted from `first`.
  template <class F>
  static void each_label(const Block& b, const Labels& l, int64_t first, int64_t n, F&& f) {
    for (int64_t i = 0; i < b.n; i++) {
      const int64_t c = l.y[i] - first;
      if (uint64_t(c) < uint64_t(n)) f(i, c);
    }
  }

  // Sums over the classes of a tile's rows. A float sum of thousands of terms would drift, so kGroup classes are added
  // up plainly and each group's sums to LongSums. Terms are relative to the maximum so far, which rises from a tile of
  // kTileClasses classes to the next one only.
  struct Sums {
    static constexpr int64_t kGroup = 16;
    struct Long {
      alignas(64) A sum[kWide], lost[kWide];
      LongSum<V> at(int64_t i) const { return {V::loadu(sum + i), V::loadu(lost + i)}; }
      void put(int64_t i, const LongSum<V>& s) { s.sum.store(sum + i), s.lost.store(lost + i); }
      A one(int64_t i) const { return LongSum<A>{sum[i], lost[i]}.value(); }
    };
    alignas(64) A max[kWide];
    Long rest, gaps, mass;
    struct Full {
      alignas(64) A argmax[kWide];
      Long heat, square;
    };
    [[no_unique_address]] std::conditional_t<kFull, Full, Nothing> full;
  };

  struct PixelBuffers {
    Labels labels;
    Sums sums;
    alignas(64) A x[kTile], t[kTile], staging[kTile];
    alignas(64) Lanes<A> row[kLanes * kTileClasses];
    struct Full {
      alignas(64) A slope[kTile];
    };
    [[no_unique_address]] std::conditional_t<kFull, Full, Nothing> full;
    A* slope() {
      if constexpr (kFull) return full.slope;
      return nullptr;
    }
  };

  // Where the next tile's logits are. They are asked for while this one is worked on: a class's run is short, and too
  // far from the next class's for a prefetcher.
  struct Ahead {
    const char* data;
    int64_t class_bytes, bytes;

    Ahead(const Args& a, const Block& b, int64_t first) : bytes(size_of(a.logits.dtype)) {
      const int64_t stride = a.logits.class_stride;
      data = static_cast<const char*>(a.logits.data) + (b.at_x + first * stride + kWide * b.x_stride) * bytes;
      class_bytes = (b.x_stride == 1 ? stride : kWide) * bytes;
    }
    const char* at(int64_t c, int64_t i) const { return data + c * class_bytes + i * bytes; }
  };

  // The masses of row group i of a tile whose first class is c.
  template <Target K>
  struct TileMasses {
    const A *t, *w;
    V keep, spread;

    TileMasses(const Args& a, const A* t, int64_t c)
        : t(t),
          w(a.weight ? static_cast<const A*>(a.weight) + c : nullptr),
          keep(CrossEntropy::keep(a)),
          spread(CrossEntropy::spread(a)) {}
    V at(int64_t c, int64_t i) const {
      V q = spread;
      if constexpr (K == Target::soft) q = smoothed(V::loadu(t + c * kWide + i), keep, spread);
      return w ? q * V(w[c]) : q;
    }
  };

  // Classes c ... c + n - 1 of the logits, and of a target of probabilities; the labels' logits among them.
  template <Target K>
  static void read_tiles(const Args& a, const Block& b, PixelBuffers& buffer, int64_t c, int64_t n, Tile<A> x) {
    if (x.data == buffer.x) {
      read_tile(a.logits, b.at_x + c * a.logits.class_stride, b.x_stride, b.n, n, x.data, buffer.staging);
    }
    if (transforms(a)) transform(a, buffer.x, n * kWide, buffer.x, buffer.slope());
    if constexpr (K == Target::soft) {
      const int64_t at = b.at_t + c * a.probabilities.class_stride;
      read_tile(a.probabilities, at, b.t_stride, b.n, n, buffer.t, buffer.staging);
    }
    Labels& l = buffer.labels;
    each_label(b, l, c, n, [&](int64_t i, int64_t k) { l.x[i] = x.data[k * x.pitch + i]; });
  }

  // Adds n classes, from class `first` on. Every logit meets the maximum so far, the lesser one of the two joins the
  // sum: so one maximal term stays out of it.
  template <Target K>
  static void add_classes(const Args& a, const Block& b, PixelBuffers& buffer, int64_t first, int64_t n) {
    Sums& s = buffer.sums;
    const V zero(A(0));
    const TileMasses<K> masses(a, buffer.t, first);
    const Ahead ahead(a, b, first);
    for (int64_t i = 0; i < b.lanes; i += kLanes) {
      const A* x = buffer.x + i;
      const V before = first > 0 ? V::loadu(s.max + i) : V(lowest<A>());
      V max = before, argmax = zero;
      if constexpr (kFull) argmax = first > 0 ? V::loadu(s.full.argmax + i) : zero;
      for (int64_t c = 0; c < n; c++) {
        const V x_c = V::loadu(x + c * kWide);
        if constexpr (kFull) argmax = select(greater(x_c, max), V(A(first + c)), argmax);
        max = at::vec::clamp_min(x_c, max);  // ignores NaN, which the sum will find
      }
      max.store(s.max + i);
      if constexpr (kFull) argmax.store(s.full.argmax + i);
      LongSum<V> rest, gaps, mass, heat, square;
      if (first > 0) {
        rest = s.rest.at(i);
        if constexpr (kFull) heat = s.full.heat.at(i), square = s.full.square.at(i);
        if constexpr (K != Target::hard) gaps = s.gaps.at(i), mass = s.mass.at(i);
        const V rise = gap(before, max), z = exp_nonpositive(-rise);
        if constexpr (kFull) {
          heat.scale(z), heat.add(times(z, times(rest.value(), rise)));
          square.scale(z * z);
        }
        rest.scale(z);
        if constexpr (K != Target::hard) gaps.add(times(mass.value(), rise));
      }
      V so_far = before;
      for (int64_t group = 0; group < n; group += Sums::kGroup) {
        V group_rest = zero, group_heat = zero, group_square = zero, group_gaps = zero, group_mass = zero;
        for (int64_t c = group, end = std::min(group + Sums::kGroup, n); c < end; c++) {
          __builtin_prefetch(ahead.at(c, i));
          const V x_c = V::loadu(x + c * kWide), loser = lesser(x_c, so_far), e = exp_nonpositive(loser - max);
          so_far = at::vec::clamp_min(x_c, so_far);
          group_rest = group_rest + e;
          if constexpr (kFull) {
            group_heat = group_heat + times(e, max - loser), group_square = group_square + e * e;
          }
          if constexpr (K != Target::hard) {
            const V q = masses.at(c, i);
            group_gaps = group_gaps + times(q, gap(x_c, max)), group_mass = group_mass + q;
          }
        }
        rest.add(group_rest);
        if constexpr (kFull) heat.add(group_heat), square.add(group_square);
        if constexpr (K != Target::hard) gaps.add(group_gaps), mass.add(group_mass);
      }
      s.rest.put(i, rest);
      if constexpr (kFull) s.full.heat.put(i, heat), s.full.square.put(i, square);
      if constexpr (K != Target::hard) s.gaps.put(i, gaps), s.mass.put(i, mass);
    }
  }

  template <Target K>
  static void forward_block(const Args& a, PixelBuffers& buffer, const Block& b) {
    Sums& s = buffer.sums;
    Labels& l = buffer.labels;
    read_labels(a, b, l);
    int64_t c = 0;
    do {  // once, too, where there is no class: that begins the sums
      const int64_t n = std::min(kTileClasses, a.classes - c);
      read_tiles<K>(a, b, buffer, c, n, {buffer.x, kWide});
      add_classes<K>(a, b, buffer, c, n);
    } while ((c += kTileClasses) < a.classes);
    constexpr bool dense = K != Target::hard;
    // What met the first logit was none: it joined the sum as 0, or as 1 where no logit is greater.
    const auto virtual_term = [&a](auto max) {
      using T = decltype(max);
      return select(equal(max, T(lowest<A>())), T(A(a.classes > 0)), T(A(0)));  // no classes: no loss
    };
    if constexpr (kFull) {
      for (int64_t i = 0; i < b.n; i++) {
        if (skip(a, b.first + i, l.y[i])) continue;
        const A one = virtual_term(s.max[i]);
        RowState row{s.max[i], s.rest.one(i) - one, dense ? s.gaps.one(i) : A(0), dense ? s.mass.one(i) : A(0)};
        row.heat = s.full.heat.one(i), row.square = s.full.square.one(i) - one;
        row.argmax = int64_t(s.full.argmax[i]);
        finish(a, b.first + i, l.y[i], row);
      }
      return;
    }
    A* out = static_cast<A*>(a.stats) + b.first;
    A* loss = static_cast<A*>(a.loss) + b.first;
    const V keep_v(keep(a));
    each_vector<A>(b.n, [&](int64_t i, int64_t count) {
      const V max = V::loadu(s.max + i);
      TargetGaps<V> target;
      if constexpr (dense) target = {s.gaps.at(i).value(), s.mass.at(i).value()};
      const V kept = V::loadu(l.weight + i) * keep_v;
      const V log_sum = LogSumExp<V>{max, s.rest.at(i).value() - virtual_term(max)}.log_sum();
      store_vector(out + i, max, count);
      store_vector(out + a.rows.count + i, log_sum, count);
      store_vector(out + 2 * a.rows.count + i, kept + target.mass, count);
      store_vector(loss + i, row_loss(kept, V::loadu(l.x + i), target, max, log_sum), count);
    });
    for (int64_t i = 0; i < b.n && !l.all; i++) skip(a, b.first + i, l.y[i]);
  }

  // A tile's incoming gradients, and which of its rows have one that is not 0.
  struct Incoming {
    alignas(64) A g[kWide], alive[kWide];
    struct Rest {
      alignas(64) A constant[kWide], heat[kWide], square[kWide], spread[kWide];
    };
    [[no_unique_address]] std::conditional_t<kFull, Rest, Nothing> rest;
  };
  static void read_incoming(const Args& a, const Block& b, const Labels& l, Incoming& in) {
    std::fill_n(in.g, b.lanes, incoming(a, b.first));
    for (int64_t i = 0; i < b.n && a.grad_stride; i++) in.g[i] = incoming(a, b.first + i);
    for (int64_t i = 0; i < b.n; i++) in.alive[i] = A(l.y[i] != kIgnored);
    if (!a.labels) std::fill_n(in.alive, kWide, A(1));
    if constexpr (kFull) {
      for (int64_t i = 0; i < b.n; i++) {
        if (masked(a, b.first + i)) in.alive[i] = 0;
        const More<A> m = more_of(a, b.first + i);
        in.rest.constant[i] = m.constant, in.rest.heat[i] = m.heat;
        in.rest.square[i] = m.square, in.rest.spread[i] = m.spread;
      }
    }
  }

  struct Rows {  // as many as there are lanes
    V max, log_sum, mass, g;
    More<V> more;
    decltype(equal(V(), V())) dead;

    Rows(const Args& a, const Block& b, const Incoming& in, int64_t i) {
      const A* const stats = static_cast<const A*>(a.stats) + b.first + i;
      const int64_t count = std::min(kLanes, b.n - i);
      max = load_vector(stats, count), log_sum = load_vector(stats + a.rows.count, count);
      mass = load_vector(stats + 2 * a.rows.count, count), g = V::loadu(in.g + i);
      dead = equal(V::loadu(in.alive + i), V(A(0)));
      if constexpr (kFull) {
        more = {V::loadu(in.rest.constant + i), V::loadu(in.rest.heat + i), V::loadu(in.rest.square + i),
                V::loadu(in.rest.spread + i)};
      }
    }
    // The labels' slopes in the place of their logits.
    template <Target K>
    void label_slopes(const Args& a, Labels& l, int64_t i) const {
      const V w = V::loadu(l.weight + i), kept = w * V(keep(a)), x = V::loadu(l.x + i);
      V slope;
      if constexpr (K == Target::hard) {
        slope = label_slope(x, max, log_sum, kept);
      } else {
        slope = label_slope(x, max, log_sum, kept, mass - kept, w * V(spread(a)));
      }
      slope = slope * g;
      if constexpr (kFull) slope = slope + more.slope(a, x, max, log_sum);
      select(dead, V(A(0)), slope).store(l.x + i);
    }
  };

  template <Target K>
  static void backward_block(const Args& a, PixelBuffers& buffer, const Block& b, bool stream) {
    const Operand& out = a.grad_logits;
    Labels& l = buffer.labels;
    Incoming in;
    read_labels(a, b, l);
    read_incoming(a, b, l, in);
    for (int64_t first = 0; first < a.classes; first += kTileClasses) {
      const int64_t n = std::min(kTileClasses, a.classes - first), at_out = b.at_out + first * out.class_stride;
      const Tile<A> own{buffer.x, kWide};
      const Tile<A> x =
          transforms(a) ? own : tile_in_place(a.logits, b.at_x + first * a.logits.class_stride, b.x_stride, b.n, own);
      const Tile<A> slopes = stream ? own : tile_in_place(out, at_out, b.out_stride, b.n, own);
      read_tiles<K>(a, b, buffer, first, n, x);
      const TileMasses<K> masses(a, buffer.t, first);
      const Ahead ahead(a, b, first);
      for (int64_t i = 0; i < b.lanes; i += kLanes) {
        const Rows r(a, b, in, i);
        const V scale = r.g * r.mass, minus_log_sum = -r.log_sum;
        for (int64_t c = 0; c < n; c++) {
          __builtin_prefetch(ahead.at(c, i));
          const V x_c = V::loadu(x.data + c * x.pitch + i);
          V slope = exp_nonpositive(minus_log_sum - gap_in_row(x_c, r.max)) * scale;
          if constexpr (K != Target::hard) slope = slope - r.g * masses.at(c, i);
          if constexpr (kFull) {
            slope = slope + r.more.slope(a, x_c, r.max, r.log_sum);
            if (transforms(a)) slope = slope * V::loadu(buffer.full.slope + c * kWide + i);
          }
          select(r.dead, V(A(0)), slope).store(slopes.data + c * slopes.pitch + i);
        }
        if (a.labels) r.template label_slopes<K>(a, l, i);
      }
      each_label(b, l, first, n, [&](int64_t i, int64_t c) {
        A slope = l.x[i];
        if constexpr (kFull) slope *= transforms(a) ? buffer.full.slope[c * kWide + i] : A(1);
        slopes.data[c * slopes.pitch + i] = slope;
      });
      if (slopes.data == own.data) {
        write_tile(out, at_out, b.out_stride, b.n, n, slopes.data, buffer.staging, stream);
      }
    }
  }

  // Backward needs nothing from a row's other classes, so rows of adjacent classes are one run of elements after all:
  // kLanes rows are as many vectors as there are classes, and each element finds its row's numbers by a permutation.
  static bool runs(const Args& a) {
    return !kFull && a.classes <= kTileClasses && !a.probabilities.data && a.logits.class_stride == 1 &&
           a.grad_logits.class_stride == 1 && (a.label_smoothing == 0 || !a.weight);
  }
  static void find_rows(const Args& a, Lanes<A>* row) {
    for (int64_t i = 0; i < kLanes; i++) std::fill_n(row + i * a.classes, a.classes, Lanes<A>(i));
  }
  template <Target K>
  static void backward_runs(const Args& a, PixelBuffers& buffer, const Block& b, bool stream) {
    Labels& l = buffer.labels;
    Incoming in;
    const int64_t classes = a.classes;
    read_labels(a, b, l);
    read_incoming(a, b, l, in);
    const A* const x = rows_in_run(a.logits, b.at_x, b.x_stride, b.n, classes, buffer.staging);
    const bool direct = a.grad_logits.dtype == dtype_of<A> && b.out_stride == classes && !stream;
    A* const out = direct ? static_cast<A*>(a.grad_logits.data) + b.at_out : buffer.staging;
    each_label(b, l, 0, classes, [&](int64_t i, int64_t c) { l.x[i] = x[i * classes + c]; });
    for (int64_t i = 0; i < b.lanes; i += kLanes) {
      const Rows r(a, b, in, i);
      const V scale = r.g * r.mass, minus_log_sum = -r.log_sum, q = r.g * V(spread(a));
      r.template label_slopes<K>(a, l, i);
      const int64_t begin = i * classes;
      each_vector<A>(std::min(kLanes, b.n - i) * classes, [&](int64_t j, int64_t count) {
        const auto of_row = [&](V v) { return permuted(v, buffer.row + j); };
        const V x_j = load_vector(x + begin + j, count);
        V slope = exp_nonpositive(of_row(minus_log_sum) - gap_in_row(x_j, of_row(r.max))) * of_row(scale);
        if constexpr (K == Target::smooth) slope = slope - of_row(q);
        store_vector(out + begin + j, slope, count);
      });
    }
    each_label(b, l, 0, classes, [&](int64_t i, int64_t c) { out[i * classes + c] = l.x[i]; });
    for (int64_t i = 0; i < b.n && !l.all; i++) {
      if (l.y[i] >= 0) continue;
      std::fill_n(out + i * classes, classes, l.y[i] == kIgnored ? A(0) : std::numeric_limits<A>::quiet_NaN());
    }
    if (!direct) write_run(a.grad_logits, b.at_out, b.out_stride, b.n, classes, out, stream);
  }

  static void forward_pixels(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    visit_target(a, [&](auto kind) {
      each_block(a, begin, end, [&](const Block& b) { forward_block<kind.value>(a, as<PixelBuffers>(scratch), b); });
    });
  }
  static void backward_pixels(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    const bool stream = worth_streaming(a.logits.data, a.grad_logits, a.rows.count * a.classes);
    auto& buffer = as<PixelBuffers>(scratch);
    const bool in_runs = runs(a);
    if (in_runs) find_rows(a, buffer.row);
    visit_target(a, [&](auto kind) {
      const auto block = in_runs ? backward_runs<kind.value> : backward_block<kind.value>;
      each_block(a, begin, end, [&](const Block& b) { block(a, buffer, b, stream); });
    });
    end_streaming();
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

  static constexpr RowKernels<Args> kernels = {forward_rows,    finish_rows, backward_rows, forward_pixels,
                                               backward_pixels, reduce,      total};
};

}  // namespace
}  // namespace cece::cpu
