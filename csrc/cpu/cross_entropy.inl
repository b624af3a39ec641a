// Softmax cross-entropy on a CPU: forward and backward, one row at a time or many side by side.
//
// Forward reads the logits once. A block of kBlock classes comes into L1 (as Acc, or as bfloat16 where it lies in a
// row); its maximum is found there, then its exponentials summed. Backward reads the logits once more and writes the
// gradient, rebuilding each probability from the row's saved max and log_sum.
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
  struct Nothing {};

  // ---- the target of a row

  template <class F>
  static void visit_target(const Args& a, F&& f) {
    using std::integral_constant;
    if (a.probabilities.data) return f(integral_constant<Target, Target::soft>{});
    if (a.label_smoothing > 0) return f(integral_constant<Target, Target::smooth>{});
    return f(integral_constant<Target, Target::hard>{});
  }

  static constexpr int64_t kIgnored = -1, kImpossible = -2, kElsewhere = -3;  // elsewhere: in another shard

  // The class indices of rows first ... first + n - 1, each a class here or one of the above. True if all are classes.
  template <class Y>
  static bool read_labels(const Args& a, int64_t first, int64_t n, Y* __restrict y) {
    if (!a.labels) {
      std::fill_n(y, n, Y(kIgnored));
      return true;
    }
    const int64_t classes = a.classes, all_classes = a.all_classes, ignore_index = a.ignore_index;
    int64_t labelled = 0;
    const auto read = [&](const auto* labels, auto of_shard) {
      for (int64_t i = 0; i < n; i++) {
        const int64_t label = labels[first + i], here = of_shard ? label - a.first_class : label;
        const bool possible = uint64_t(label) < uint64_t(all_classes), ignored = label == ignore_index;
        const bool inside = !of_shard || uint64_t(here) < uint64_t(classes);
        y[i] = Y(ignored ? kIgnored : !possible ? kImpossible : inside ? here : kElsewhere);
        labelled += possible & !ignored & inside;
      }
    };
    visit(a.label_dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      if constexpr (std::is_integral_v<S>) {
        const S* const labels = static_cast<const S*>(a.labels);
        classes == all_classes ? read(labels, std::false_type()) : read(labels, std::true_type());
      }
    });
    return labelled == n;
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
      const V e = exp_rough(x - m);
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
    each_pack<Pack<A, A>, 2>(n, [&](int64_t i, int64_t count, int turn) {
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
      // Where the maximum rises, one of the maximal elements is the `1 +` of log1p: its term stays out of the sum. (One
      // place where terms are summed: with two the compiler makes either 4 % slower.)
      const bool rises = max > sums.max;
      const int64_t own = rises ? index_of(x, n, max) : n;
      const Terms terms = sum_terms(x, n, rises ? max : A(sums.max), own, ahead, element_size);
      if (rises) {
        decltype(sums) block;
        block.max = max, block.rest = terms.sum;
        if constexpr (kFull) block.heat = terms.heat, block.square = terms.square, argmax = c + own;
        target.rebase(sums.max, max);
        c == begin ? void(sums = block) : sums.merge(block);
      } else {
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
    const auto careful = [&](int64_t i, int64_t last) {  // not whole, or with `own`
      if (i == last) return;
      const P p = with_element(slopes(load_filled(x, i, last, A(0)), i), own - i, own_slope);
      i + P::kSize == last ? put(p, i) : store_few(p, out + i, last - i);
    };
    // Careful, whole, careful, ... A row's first elements follow the last ones of the row before, with which they share
    // a line: it comes into a cache once, and in time.
    const int64_t head = stream ? before_whole_vector(out, n) : 0, end = n - (n - head) % P::kSize;
    const int64_t own_pack = own < head ? end : std::min(own - (own - head) % P::kSize, end);
    const int64_t cut[] = {0, head, own_pack, std::min(own_pack + P::kSize, end), end, n, n};
    if (stream) __builtin_prefetch(out + end, 1);
    for (int k = 0; k < 6; k += 2) careful(cut[k], cut[k + 1]), whole(cut[k + 1], cut[k + 2]);
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

  // Where the next tile's logits are. They are asked for while this one is worked on, kLanes elements at a time, in the
  // order of memory: a class's run is short, and too far from the next class's for a prefetcher; and rows side by side
  // are read a third faster, too.
  struct Ahead {
    const char* data;
    int64_t class_bytes, row_bytes;

    Ahead(const Args& a, const Block& b, int64_t first) {
      const int64_t stride = a.logits.class_stride, bytes = size_of(a.logits.dtype);
      data = static_cast<const char*>(a.logits.data) + (b.at_x + first * stride + kWide * b.x_stride) * bytes;
      class_bytes = (b.x_stride == 1 ? stride : kLanes) * bytes;
      row_bytes = b.x_stride * bytes;
    }
    void ask(int64_t c, int64_t i) const { __builtin_prefetch(data + c * class_bytes + i * row_bytes); }
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
        max = greatest(x_c, max);  // ignores NaN, which the sum will find
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
      // What meets the first logit is none, lowest<A>() or less, or a NaN: its e^d needs no exponential.
      const auto exp_of_none = [](V d) { return select(greater(V(A(0)), d), V(A(0)), d + V(A(1))); };
      V so_far = before;
      for (int64_t group = 0; group < n; group += Sums::kGroup) {
        V group_rest = zero, group_heat = zero, group_square = zero, group_gaps = zero, group_mass = zero;
        const auto add = [&](int64_t c, auto exp) {
          ahead.ask(c, i);
          const V x_c = V::loadu(x + c * kWide), loser = lesser(x_c, so_far), e = exp(loser - max);
          so_far = greatest(x_c, so_far);
          group_rest = group_rest + e;
          if constexpr (kFull) {
            group_heat = group_heat + times(e, max - loser), group_square = group_square + e * e;
          }
          if constexpr (K != Target::hard) {
            const V q = masses.at(c, i);
            group_gaps = group_gaps + times(q, gap(x_c, max)), group_mass = group_mass + q;
          }
        };
        int64_t c = group;
        const bool begins = first + c == 0;
        if (begins) add(c++, exp_of_none);
        for (const int64_t end = std::min(group + Sums::kGroup, n); c < end; c++) add(c, Exp());
        // The first group rounds off nothing. (3 % of a pass over few classes.)
        const auto add_to = [begins](LongSum<V>& sum, V of_group) {
          begins ? void(sum.sum = of_group) : sum.add(of_group);
        };
        add_to(rest, group_rest);
        if constexpr (kFull) add_to(heat, group_heat), add_to(square, group_square);
        if constexpr (K != Target::hard) add_to(gaps, group_gaps), add_to(mass, group_mass);
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
    // What met the first logit was none: it joined the sum as 0, or as 1 where no logit is greater. (A loss of no
    // classes at all is 0.)
    const A none = A(a.classes > 0 || kFull || a.parts);
    const auto virtual_term = [none](auto max) {
      using T = decltype(max);
      return select(equal(max, T(lowest<A>())), T(none), T(A(0)));
    };
    if (kFull || a.parts) {
      for (int64_t i = 0; i < b.n; i++) {
        if (skip(a, b.first + i, l.y[i])) continue;
        const A one = virtual_term(s.max[i]);
        RowState row;
        row.sums.max = s.max[i], row.sums.rest = s.rest.one(i) - one;
        if (dense) row.target = {s.gaps.one(i), s.mass.one(i)};
        if constexpr (kFull) {
          row.sums.heat = s.full.heat.one(i), row.sums.square = s.full.square.one(i) - one;
          if (s.max[i] > lowest<A>()) row.argmax = int64_t(s.full.argmax[i]);
        }
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
        const V share = share_of_row(r.log_sum, r.g * r.mass);
        for (int64_t c = 0; c < n; c++) {
          ahead.ask(c, i);
          const V x_c = V::loadu(x.data + c * x.pitch + i);
          V slope = exp_in_row(x_c, r.max) * share;
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
    const Ahead ahead(a, b, 0);
    for (int64_t i = 0; i < b.lanes; i += kLanes) {
      const Rows r(a, b, in, i);
      const V share = share_of_row(r.log_sum, r.g * r.mass), q = r.g * V(spread(a));
      r.template label_slopes<K>(a, l, i);
      const int64_t begin = i * classes;
      each_vector<A>(std::min(kLanes, b.n - i) * classes, [&](int64_t j, int64_t count) {
        ahead.ask(j / kLanes, i);
        const auto of_row = [&](V v) { return permuted(v, buffer.row + j); };
        const V x_j = load_vector(x + begin + j, count);
        V slope = exp_in_row(x_j, of_row(r.max)) * of_row(share);
        if constexpr (K == Target::smooth) slope = slope - of_row(q);
        store_vector(out + begin + j, slope, count);
      });
    }
    each_label(b, l, 0, classes, [&](int64_t i, int64_t c) { out[i * classes + c] = l.x[i]; });
    for (int64_t i = 0; i < b.n && !l.all; i++) {
      if (counts(a, l.y[i])) continue;
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

  // value(first) + ... + value(last - 1), kSums sums side by side: an addition would wait for the one before it. With
  // 32 of them it becomes vectors in a loop (0.17 ns a row); a loop over 8 is unrolled first, and stays scalar (0.54).
  template <class F>
  static double sum_of(int64_t first, int64_t last, F&& value) {
    constexpr int64_t kSums = 32;
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
