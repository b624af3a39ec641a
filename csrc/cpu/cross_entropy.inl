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
  static constexpr int64_t kLanes = V::size(), kGroup = 4 * kLanes;
  static constexpr bool kFull = std::is_same_v<Args, TokenStatisticsArgs>;

  // ---- the target of a row

  template <class F>
  static void visit_target(const Args& a, F&& f) {
    using std::integral_constant;
    if (a.probabilities.data) return f(integral_constant<Target, Target::soft>{});
    if (a.label_smoothing > 0) return f(integral_constant<Target, Target::smooth>{});
    return f(integral_constant<Target, Target::hard>{});
  }

  static constexpr int64_t kIgnored = -1, kImpossible = -2, kUnlabelled = -3, kElsewhere = -4;  // in another shard

  // The class indices of rows first ... first + n - 1, each a class here or one of the above. True if all are classes.
  static bool read_labels(const Args& a, int64_t first, int64_t n, int64_t* y) {
    if (!a.labels) {
      std::fill_n(y, n, kIgnored);
      return true;
    }
    int64_t classes = 0;
    const auto read = [&](auto* labels) {
      for (int64_t i = 0; i < n; i++) {
        const int64_t label = labels[first + i];
        const bool possible = label >= 0 && label < a.all_classes, ignored = label == a.ignore_index;
        y[i] = ignored ? kIgnored : possible ? label : kImpossible;
        classes += possible & !ignored;
      }
    };
    visit(a.label_dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      if constexpr (std::is_integral_v<S>) read(static_cast<const S*>(a.labels));
    });
    for (int64_t i = 0; a.classes != a.all_classes && i < n; i++) {  // of a shard: beside the loop that is fast
      if (y[i] < 0) continue;
      const int64_t here = y[i] - a.first_class;
      y[i] = here >= 0 && here < a.classes ? here : kElsewhere;
      classes -= y[i] == kElsewhere;
    }
    return classes == n;
  }
  static int64_t label(const Args& a, int64_t row) {
    int64_t y;
    read_labels(a, row, 1, &y);
    return y;
  }
  static bool counts(const Args& a, int64_t y) { return !a.labels || y >= 0 || y == kElsewhere; }
  static A class_weight(const Args& a, int64_t c) { return a.weight ? static_cast<const A*>(a.weight)[c] : A(1); }
  static A keep(const Args& a) { return A(1 - a.label_smoothing); }
  static A spread(const Args& a) { return A(a.label_smoothing / double(a.all_classes)); }

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

  static V greater_of(V p, V q) { return at::vec::clamp_min(p, q); }

  template <class S>
  static A block_max(const S* x, int64_t n) {  // ignores NaN, which the sum will find
    using P = Pack<A, S>;
    V m[4] = {V(lowest<A>()), V(lowest<A>()), V(lowest<A>()), V(lowest<A>())};
    const auto add = [&](const P& p, int first) {
      for (int k = 0; k < P::kVectors; k++) m[first + k] = greater_of(p.v[k], m[first + k]);
    };
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup) {
      for (int k = 0; k < 4; k += P::kVectors) add(P::load(x + i + k * kLanes), k);
    }
    for (; i < n; i += P::kSize) add(load_filled(x, i, n, lowest<A>()), 0);
    return reduce_lanes(greater_of(greater_of(m[0], m[1]), greater_of(m[2], m[3])), greater_of);
  }

  // An element that equals `value`, of S = A the first; n if a NaN hides it.
  template <class S>
  static int64_t index_of(const S* x, int64_t n, A value) {
    using P = Pack<A, S>;
    const V v(value);
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup) {
      V most(lowest<A>());
      for (int k = 0; k < 4; k += P::kVectors) {
        const P p = P::load(x + i + k * kLanes);
        for (const V& p_k : p.v) most = greater_of(p_k, most);
      }
      if (set_lanes(equal(most, v))) break;
    }
    int64_t index = n;
    for (const int64_t end = std::min(i + kGroup, n); i < end; i += P::kSize) {
      const P p = load_filled(x, i, n, lowest<A>());
      for (int64_t k = 0; k < P::kVectors; k++) {
        const int lanes = set_lanes(equal(p.v[k], v));
        const int64_t at = lanes ? i + k + P::kVectors * __builtin_ctz(lanes) : n;  // without a branch
        index = std::min(index, at);
      }
    }
    return index;
  }

  struct Terms {  // of e^{x_i - max}
    A sum, heat, square;
  };
  // Their sums without element `own` (n: with all). The block is in L1 and this is arithmetic only, so it is the time
  // to ask for what comes `ahead` in memory, the next block or row: reading then costs next to nothing.
  template <class S>
  static Terms sum_terms(const S* x, int64_t n, A max, int64_t own, const char* ahead, int64_t element_size) {
    const V m(max), zero(A(0));
    struct Sums {
      V sum, heat, square;
      void add(const Sums& o) {
        sum = sum + o.sum;
        if constexpr (kFull) heat = heat + o.heat, square = square + o.square;
      }
    };
    const auto term = [&](V x) -> Sums {
      const V e = exp_nonpositive(x - m);
      if constexpr (kFull) return {e, times(e, m - x), e * e};
      return {e};
    };
    // A group of vectors that is not whole, or has the element to leave out, is read from a copy that is.
    using P = Pack<A, S>;
    alignas(64) S copies[2][kGroup];
    const int64_t own_group = own / kGroup * kGroup, last_group = n / kGroup * kGroup;
    const auto patch = [&](S* copy, int64_t group) {
      constexpr A kNone = -std::numeric_limits<A>::infinity();
      for (int64_t i = group; i < group + kGroup; i += P::kSize) {
        with_element(load_filled(x, i, n, kNone), own - i, kNone).store(copy + i - group);
      }
    };
    if (own_group < n) patch(copies[0], own_group);
    if (last_group < n) patch(copies[1], last_group);
    // Sums of sums: of two vectors, of kRun groups of those, and of these. Added up one by one, 64 equal terms would be
    // 6 ULP off. More than two sums at a time would not stay in AVX2's registers.
    constexpr int64_t kRun = 8 * kGroup;
    Sums all{zero, zero, zero};
    for (int64_t run = 0; run < n; run += kRun) {
      Sums sums[2] = {{zero, zero, zero}, {zero, zero, zero}};
      for (int64_t i = run, end = std::min(run + kRun, n); i < end; i += kGroup) {
        const S* from = i == last_group ? copies[1] : x + i;
        from = i == own_group ? copies[0] : from;
        V x_k[4];
        for (int k = 0; k < 4; k += P::kVectors) {
          if (k * kLanes * sizeof(S) % 64 == 0) __builtin_prefetch(ahead + (i + k * kLanes) * element_size);
          const P p = P::load(from + k * kLanes);
          for (int j = 0; j < P::kVectors; j++) x_k[k + j] = p.v[j];
        }
        for (int k = 0; k < 2; k++) {
          Sums two = term(x_k[2 * k]);
          two.add(term(x_k[2 * k + 1]));
          sums[k].add(two);
        }
      }
      sums[0].add(sums[1]);
      all.add(sums[0]);
    }
    if constexpr (kFull) return {sum_lanes(all.sum), sum_lanes(all.heat), sum_lanes(all.square)};
    return {sum_lanes(all.sum)};
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

  template <class Sums>
  static RowState state(const Sums& sums, const TargetGaps<double>& target, int64_t argmax) {
    RowState s{{}, target, argmax};
    if constexpr (kFull) {
      s.sums = sums;
    } else {
      static_cast<LogSumExp<double>&>(s.sums) = sums;
    }
    return s;
  }

  template <class S>
  static const S* block(const Args& a, int64_t at, int64_t n, A* buffer, A* slope = nullptr) {
    if constexpr (std::is_same_v<S, A>) {
      return transformed(a, load(a.logits, at, a.logits.class_stride, n, buffer), n, buffer, slope);
    } else {
      return static_cast<const S*>(a.logits.data) + at;
    }
  }
  // f(Type<S>{}) with the type that a row's loops read and write: the tensor's own where that is bfloat16 in a row and
  // its elements' order does not matter, else A, into a buffer if need be.
  template <Target K, class F>
  static void visit_type(const Args& a, const Operand& also, F&& f) {
    if constexpr (K == Target::hard && !kFull && std::is_same_v<A, float>) {
      const auto plain = [](const Operand& t) { return t.dtype == Dtype::bf16 && t.class_stride == 1; };
      if (plain(a.logits) && plain(also)) return f(Type<BFloat16>{});
    }
    f(Type<A>{});
  }

  template <Target K, class S>
  static RowState read_classes(const Args& a, RowBuffers& buffer, int64_t row, int64_t begin, int64_t end) {
    const int64_t at_x = offset_of(a.rows, a.logits, row), stride = a.logits.class_stride;
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    std::conditional_t<kFull, Moments<double>, LogSumExp<double>> sums;
    sums.max = lowest<A>();
    TargetGaps<double> target;
    int64_t argmax = RowState::kNowhere;
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c);
      const S* x = block<S>(a, at_x + c * stride, n, buffer.x);
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
    return state(sums, target, argmax);
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
    if (a.part_numbers && a.part_numbers < kFullPart) return;  // whole rows of parts with no more than the loss
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
  struct Found {
    int64_t at;
    bool nan;
  };
  // The first NaN, or the first of the largest.
  static Found first_maximal(const Args& a, int64_t row) {
    int64_t best = 0;
    A most = load_logit(a, row, 0);
    for (int64_t c = 1; c < a.classes && most == most; c++) {
      const A x = load_logit(a, row, c);
      if (!(x <= most)) best = c, most = x;
    }
    return {best, most != most};
  }

  static void finish(const Args& a, int64_t row, int64_t y, RowState& s) {
    double kept = 0, x_y = 0;
    if (y >= 0) {
      kept = (1 - a.label_smoothing) * class_weight(a, y);
      x_y = load_logit(a, row, y);
    }
    // The search passed over something; there is nothing in a row of -inf.
    const bool searches = kFull && s.sums.rest != -1 && !(s.sums.rest == s.sums.rest && s.argmax != s.kNowhere);
    if (a.parts) return leave_part(a, row, y, s, kept, x_y, searches);
    if constexpr (kFull) {
      if (searches && a.argmax) s.argmax = first_maximal(a, row).at;
    }
    write_results(a, row, kept, x_y, s);
  }
  static void leave_part(const Args& a, int64_t row, int64_t y, RowState& s, double kept, double x_y, bool searches) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    s.target.push(kept, x_y, s.sums.max);
    if (searches) {
      const Found found = first_maximal(a, row);
      s.argmax = a.first_class + found.at;
      if (found.nan) s.argmax = nan_at(s.argmax);
    } else if (s.argmax != s.kNowhere) {
      s.argmax += a.first_class;
    }
    write_part<A>(a, row, s, y >= 0 ? double(class_weight(a, y)) : nan);
  }
  static void write_results(const Args& a, int64_t row, double kept, double x_y, const RowState& s) {
    const double log_sum = s.sums.log_sum();
    write_row(a, row, s.sums.max, log_sum, kept + s.target.mass, row_loss(kept, x_y, s.target, s.sums.max, log_sum));
    if constexpr (kFull) {
      const double infinity = std::numeric_limits<double>::infinity();
      if (log_sum == -infinity) {  // nothing but -inf
        if (a.skip_masked_rows) return write_masked(a, row);
        const double nan = std::numeric_limits<double>::quiet_NaN();
        return write_more(a, row, nan, nan, nan, -infinity, nan, 0);
      }
      write_more(a, row, s.sums.mean_heat(), s.sums.spread(), log_sum + s.sums.mean_heat(), s.sums.max + log_sum,
                 s.sums.collision(), s.argmax == s.kNowhere ? 0 : s.argmax);
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
    if (counts(a, y)) return false;
    if (y == kImpossible) report(a.bad_row, row);
    if (a.parts) return write_no_part<A>(a, row), true;
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
        visit_type<kind.value>(a, a.logits, [&](auto type) {
          using S = typename decltype(type)::type;
          RowState s = read_classes<kind.value, S>(a, as<RowBuffers>(scratch), row, c, last);
          states ? void(states[task] = s) : finish(a, row, y, s);
        });
      }
    });
  }

  static void finish_rows(const Args& a, const RowState* states, int64_t begin, int64_t end) {
    const int64_t parts = segments(a);
    for (int64_t row = begin; row < end; row++) {
      const int64_t y = label(a, row);
      if (skip(a, row, y)) continue;
      RowState whole = states[row * parts];
      for (int64_t i = 1; i < parts; i++) whole.merge(states[row * parts + i]);
      finish(a, row, y, whole);
    }
  }

  // The rows of all shards. Of fewer numbers than all there are no more statistics than the loss.
  static void finish_parts(const FinishPartsArgs& a, int64_t begin, int64_t end) {
    if constexpr (kFull) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      for (int64_t row = begin; row < end; row++) {
        const int64_t y = label(a, row);
        WholeRow whole = whole_row<A>(a, row, a.labels);
        A* const label_weight = label_weight_of<A>(a, row);
        if (y == kImpossible) report(a.bad_row, row);
        if (!counts(a, y)) {
          const double nothing = y == kIgnored && nobody_has<A>(a, row) ? 0 : nan;
          write_nothing(a, row, nothing);
          if (label_weight) *label_weight = A(nothing);
          continue;
        }
        write_results(a, row, 0, 0, whole);
        if (label_weight) *label_weight = A(whole.label_weight);
      }
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
    const A w = class_weight(a, y), kept = keep(a) * w;  // in lanes, all the same: libm's functions take 25 ns a row
    const V x(x_y), max(r.max), log_sum(r.log_sum);
    V slope = V(r.g) * label_slope(x, max, log_sum, V(kept), V(r.mass - kept), V(spread(a) * w));
    if constexpr (kFull) {
      const More<V> more{V(r.more.constant), V(r.more.heat), V(r.more.square), V(r.more.spread)};
      slope = slope + more.slope(a, x, max, log_sum);
    }
    return first_lane(slope);
  }

  // The slopes of a block of n classes; that of element `own` (n: none of them) is given.
  template <Target K, class S>
  static void write_block(const Args& a, S* out, const S* x, int64_t n, const RowGrad& r, const Masses<K>& q,
                          int64_t own, A own_slope, bool stream) {
    const A scale = r.g * r.mass, largest = std::numeric_limits<A>::max();
    if (!(std::abs(r.max) <= largest && std::abs(scale) <= largest)) {  // something infinite: element by element
      for (int64_t i = 0; i < n; i++) {
        const A x_i(x[i]);
        A slope = r.g * row_slope(x_i, r.max, r.log_sum, r.mass, K == Target::hard ? A(0) : q.at(i));
        if constexpr (kFull) slope = slope + r.more.slope(a, x_i, r.max, r.log_sum);
        out[i] = S(i == own ? own_slope : slope);
      }
      return;
    }
    using P = Pack<A, S>;
    const V max(r.max), log_sum(r.log_sum), g(r.g);
    const ExpTimes<A, is_reduced<S>> scaled_exp(scale);
    const More<V> more{V(r.more.constant), V(r.more.heat), V(r.more.square), V(r.more.spread)};
    const auto slopes = [&](P p, int64_t i) {
      for (V& x_i : p.v) {
        V slope = scaled_exp((x_i - max) - log_sum);
        if constexpr (kFull) slope = slope + more.slope(a, x_i, max, log_sum);
        x_i = K == Target::hard ? slope : slope - g * q.at(i, std::min(n - i, kLanes));
      }
      return p;
    };
    const auto put = [&](const P& p, int64_t i) { stream ? p.stream(out + i) : p.store(out + i); };
    const auto whole = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += P::kSize) put(slopes(P::load(x + i), i), i);
    };
    const auto careful = [&](int64_t i) {  // not whole, or with `own`
      const P p = slopes(load_filled(x, i, n, A(0)), i);
      const P all = own < n ? with_element(p, own - i, own_slope) : p;
      i + P::kSize <= n ? put(all, i) : store_few(all, out + i, n - i);
    };
    const int64_t end = n / P::kSize * P::kSize, own_pack = std::min(own / P::kSize * P::kSize, end);
    whole(0, own_pack);
    if (own_pack < end) careful(own_pack);
    whole(own_pack + P::kSize, end);
    if (end < n) careful(end);
  }

  template <Target K, class S>
  static void write_classes(const Args& a, RowBuffers& buffer, int64_t row, int64_t y, int64_t begin, int64_t end) {
    const Operand& out = a.grad_logits;
    const int64_t at_x = offset_of(a.rows, a.logits, row), stride = a.logits.class_stride;
    const int64_t at_t = K == Target::soft ? offset_of(a.rows, a.probabilities, row) : 0;
    const int64_t at_out = offset_of(a.rows, out, row);
    const RowGrad r = row_grad(a, row);
    const bool stream = worth_streaming(a.logits.data, out, a.rows.count * a.classes);
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c), at = at_out + c * out.class_stride;
      S* const slopes = room(out, at, out.class_stride, reinterpret_cast<S*>(buffer.out));
      const bool direct = slopes != reinterpret_cast<S*>(buffer.out);
      if (!counts(a, y) || masked(a, row)) {
        std::fill_n(slopes, n, S(y == kImpossible ? std::numeric_limits<A>::quiet_NaN() : A(0)));
      } else {
        const S* x = block<S>(a, at_x + c * stride, n, buffer.x, buffer.slope);
        const int64_t own = y >= c && y < c + n ? y - c : n;
        write_block(a, slopes, x, n, r, masses<K>(a, at_t, c, n, buffer.t), own,
                    own < n ? slope_at_label(a, r, y, A(x[own])) : A(0), stream && direct && !transforms(a));
        if constexpr (kFull) {
          for (int64_t i = 0; i < n && transforms(a); i += kLanes) {
            const int64_t count = std::min(n - i, kLanes);
            store_vector(slopes + i, load_vector(slopes + i, count) * load_vector(buffer.slope + i, count), count);
          }
        }
      }
      if (!direct) store(out, at, out.class_stride, n, buffer.out);
    }
  }

  static void backward_rows(const Args& a, Scratch& scratch, int64_t begin, int64_t end) {
    const int64_t parts = segments(a);
    visit_target(a, [&](auto kind) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t row = task / parts, c = task % parts * kSegment;
        const int64_t last = std::min(c + kSegment, a.classes);
        visit_type<kind.value>(a, a.grad_logits, [&](auto type) {
          using S = typename decltype(type)::type;
          write_classes<kind.value, S>(a, as<RowBuffers>(scratch), row, label(a, row), c, last);
        });
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
    struct Full {
      A heat[kMaxPixels], square[kMaxPixels], argmax[kMaxPixels];
      Long all_heat, all_square;
    };
    struct Nothing {};
    [[no_unique_address]] std::conditional_t<kFull, Full, Nothing> full;

    void reset(int64_t lanes, bool dense) {
      const auto clear = [&](Long& s) { std::fill_n(s.sum, lanes, A(0)), std::fill_n(s.lost, lanes, A(0)); };
      std::fill_n(max, lanes, lowest<A>()), std::fill_n(group_max, lanes, lowest<A>());
      std::fill_n(rest, lanes, A(-1));
      clear(all_rest);
      if (dense) std::fill_n(gaps, lanes, A(0)), std::fill_n(mass, lanes, A(0)), clear(all_gaps), clear(all_mass);
      if constexpr (kFull) {
        std::fill_n(full.heat, lanes, A(0)), std::fill_n(full.square, lanes, A(-1)),
            std::fill_n(full.argmax, lanes, A(0));
        clear(full.all_heat), clear(full.all_square);
      }
    }
    void end_group(int64_t lanes, bool dense) {
      const V zero(A(0));
      for (int64_t i = 0; i < lanes; i += kLanes) {
        const V rise = gap(V::loadu(group_max + i), V::loadu(max + i));
        LongSum<V> s = all_rest.at(i);
        const V z = exp_nonpositive(-rise);
        if constexpr (kFull) {
          LongSum<V> h = full.all_heat.at(i), q = full.all_square.at(i);
          h.scale(z), h.add(times(z, times(s.value(), rise))), h.add(V::loadu(full.heat + i));
          q.scale(z * z), q.add(V::loadu(full.square + i));
          full.all_heat.put(i, h), full.all_square.put(i, q);
          zero.store(full.heat + i), zero.store(full.square + i);
        }
        s.scale(z);
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
    struct Full {
      A slope[kMaxPixels], constant[kMaxPixels], heat[kMaxPixels], square[kMaxPixels], spread[kMaxPixels];
    };
    [[no_unique_address]] std::conditional_t<kFull, Full, typename Sums::Nothing> full;
    A* slope() {
      if constexpr (kFull) return full.slope;
      return nullptr;
    }
  };

  static double one_of(const typename Sums::Long& s, int64_t i) { return LongSum<A>{s.sum[i], s.lost[i]}.value(); }

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
      x = transformed(a, x, b.n, buffer.x);
      const A* t = nullptr;
      if constexpr (K == Target::soft) {
        t = load(a.probabilities, b.at_t + c * a.probabilities.class_stride, b.t_stride, b.n, buffer.t);
      }
      const V w(class_weight(a, c));
      const char* next = next_run(a, b, c);
      each_vector<A>(b.n, [&](int64_t i, int64_t count) {
        __builtin_prefetch(next + i * step);
        const V x_i = load_vector(x + i, count);
        std::conditional_t<kFull, Moments<V>, LogSumExp<V>> s;
        s.max = V::loadu(sums.max + i), s.rest = V::loadu(sums.rest + i);
        const V old_max = s.max;
        if constexpr (kFull) {
          s.heat = V::loadu(sums.full.heat + i), s.square = V::loadu(sums.full.square + i);
          select(x_i > old_max, V(A(c)), V::loadu(sums.full.argmax + i)).store(sums.full.argmax + i);
        }
        s.push(x_i);
        if constexpr (kFull) s.heat.store(sums.full.heat + i), s.square.store(sums.full.square + i);
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
    if (a.classes % Sums::kGroup || a.classes == 0) sums.end_group(b.lanes, dense);
    if (kFull || a.parts) {
      for (int64_t i = 0; i < b.n; i++) {
        if (skip(a, b.first + i, b.y[i])) continue;
        RowState s;
        s.sums.max = sums.max[i], s.sums.rest = one_of(sums.all_rest, i);
        if (dense) s.target = {one_of(sums.all_gaps, i), one_of(sums.all_mass, i)};
        if constexpr (kFull) {
          s.sums.heat = one_of(sums.full.all_heat, i), s.sums.square = one_of(sums.full.all_square, i);
          if (sums.max[i] > lowest<A>()) s.argmax = int64_t(sums.full.argmax[i]);
        }
        finish(a, b.first + i, b.y[i], s);
      }
      return;
    }
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
    if constexpr (kFull) {
      for (int64_t i = 0; i < b.n; i++) {
        const More<A> m = more_of(a, b.first + i);
        y[i] = masked(a, b.first + i) ? A(kIgnored) : a.labels ? y[i] : A(kUnlabelled);
        buffer.full.constant[i] = m.constant, buffer.full.heat[i] = m.heat;
        buffer.full.square[i] = m.square, buffer.full.spread[i] = m.spread;
      }
    }
    const V keep_v(keep(a)), spread_v(spread(a));
    const int64_t step = b.x_stride * size_of(a.logits.dtype);
    for (int64_t c = 0; c < a.classes; c++) {
      const int64_t at = b.at_out + c * out.class_stride;
      const A* x = load(a.logits, b.at_x + c * a.logits.class_stride, b.x_stride, b.n, buffer.x);
      x = transformed(a, x, b.n, buffer.x, buffer.slope());
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
        if constexpr (kFull) {
          const auto& f = buffer.full;
          const More<V> more{V::loadu(f.constant + i), V::loadu(f.heat + i), V::loadu(f.square + i),
                             V::loadu(f.spread + i)};
          slope = slope + more.slope(a, x_i, max_i, log_sum_i);
          if (transforms(a)) slope = slope * V::loadu(f.slope + i);
        }
        if constexpr (K != Target::soft || kFull) slope = select(y_i == V(A(kIgnored)), V(A(0)), slope);
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
    return !kFull && a.classes >= kLanes && !a.probabilities.data && plain(a.logits) && plain(a.grad_logits);
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
      if (!counts(a, b.y[i])) {
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
      if (b.y[i] >= 0) out[b.y[i]] = g * x_y[i];
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

  // value(first) + ... + value(last - 1), kSums sums side by side: an addition would wait for the one before it.
  template <class F>
  static double sum_of(int64_t first, int64_t last, F&& value) {
    constexpr int64_t kSums = 8;
    double sum[kSums] = {}, all = 0;
    int64_t i = first;
    for (; i + kSums <= last; i += kSums) {
      for (int64_t k = 0; k < kSums; k++) sum[k] += value(i + k);
    }
    for (int64_t k = 0; i + k < last; k++) sum[k] += value(i + k);
    for (int64_t k = 0; k < kSums; k++) all += sum[k];
    return all;
  }
  static void reduce(const Args& a, double* sums, int64_t begin, int64_t end) {
    const A *losses = static_cast<const A*>(a.loss), *mass = static_cast<const A*>(a.stats) + 2 * a.rows.count;
    for (int64_t task = begin; task < end; task++) {
      const int64_t first = task * kChunk, last = std::min(first + kChunk, a.rows.count);
      sums[2 * task] = sum_of(first, last, [&](int64_t row) { return losses[row]; });
      sums[2 * task + 1] = 0;
      if (!weighs_labels(a)) continue;
      sums[2 * task + 1] = a.label_smoothing == 0  // the row's mass is its label's weight
                               ? sum_of(first, last, [&](int64_t row) { return mass[row]; })
                               : sum_of(first, last, [&](int64_t row) {
                                   const int64_t y = label(a, row);
                                   return y >= 0 ? class_weight(a, y) : A(0);
                                 });
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
                                               backward_pixels, reduce,      total,         finish_parts};
};

}  // namespace
}  // namespace cece::cpu
