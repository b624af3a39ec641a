// The operators of rows of logits as C++ calls them, through the dispatcher: traced, differentiated and batched as any
// other's call is.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones.h>

#include "check.h"

namespace cece {

struct RowOptions {  // of cross-entropy
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool inplace = false;
  Shard shard = {};

  auto all() { return std::tuple_cat(std::tie(reduction, ignore_index, label_smoothing, inplace), shard.options()); }
};

template <class Signature>
auto row_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// ---- cross-entropy: loss, stats, total_weight

using CrossEntropyTuple = std::tuple<Tensor, Tensor, Tensor>;
inline CrossEntropyTuple call_forward(const Tensor& x, const Tensor& t, const MaybeTensor& w, const RowOptions& o) {
  static const auto op =
      row_operator<CrossEntropyTuple(const Tensor&, const Tensor&, const MaybeTensor&, int64_t, int64_t, double, bool)>(
          "cece::cross_entropy_forward");
  return op.call(x, t, w, o.reduction, o.ignore_index, o.label_smoothing, o.inplace);
}
template <class Result>  // void: over the logits
Result cross_entropy_backward_as(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                                 const Tensor& stats, const Tensor& total, const RowOptions& o) {
  static const auto op =
      row_operator<Result(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                          int64_t, int64_t, double, int64_t, std::optional<int64_t>, int64_t, const std::string&)>(
          std::is_void_v<Result> ? "cece::cross_entropy_backward_" : "cece::cross_entropy_backward");
  const Shard& s = o.shard;
  return op.call(g, x, t, w, stats, total, o.reduction, o.ignore_index, o.label_smoothing, s.first, s.all,
                 s.ranks.count, s.ranks.group);
}
inline Tensor call_backward(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w,
                            const Tensor& stats, const Tensor& total, const RowOptions& o) {
  return cross_entropy_backward_as<Tensor>(g, x, t, w, stats, total, o);
}
inline void call_backward_(const Tensor& g, const Tensor& x, const Tensor& t, const MaybeTensor& w, const Tensor& stats,
                           const Tensor& total, const RowOptions& o) {
  cross_entropy_backward_as<void>(g, x, t, w, stats, total, o);
}

// ---- all statistics

inline TokenOutputs call_forward(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w, const TokenOptions& o,
                                 int64_t wanted) {
  static const auto op =
      row_operator<TokenOutputs(const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, double, double, double,
                                bool, int64_t)>("cece::token_statistics_forward");
  return op.call(x, t, w, o.ignore_index, o.label_smoothing, o.logit_scale, o.softcap, o.skip_masked_rows, wanted);
}
template <class Result>
Result token_backward_as(const TokenGrads& g, const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                         const Tensor& stats, const TokenOptions& o) {
  static const auto op =
      row_operator<Result(const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&,
                          const MaybeTensor&, const MaybeTensor&, const Tensor&, int64_t, double, double, double, bool,
                          int64_t, std::optional<int64_t>, int64_t, const std::string&)>(
          std::is_void_v<Result> ? "cece::token_statistics_backward_" : "cece::token_statistics_backward");
  const Shard& s = o.shard;
  return op.call(g[0], g[1], g[2], g[3], x, t, w, stats, o.ignore_index, o.label_smoothing, o.logit_scale, o.softcap,
                 o.skip_masked_rows, s.first, s.all, s.ranks.count, s.ranks.group);
}
inline Tensor call_backward(const TokenGrads& g, const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                            const Tensor& stats, const TokenOptions& o) {
  return token_backward_as<Tensor>(g, x, t, w, stats, o);
}
inline void call_backward_(const TokenGrads& g, const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                           const Tensor& stats, const TokenOptions& o) {
  token_backward_as<void>(g, x, t, w, stats, o);
}

// ---- a row in parts

inline Tensor call_row_parts(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w, const TokenOptions& o,
                             bool full) {
  static const auto op = row_operator<Tensor(const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, double,
                                             double, double, int64_t, int64_t, bool)>("cece::row_parts");
  return op.call(x, t, w, o.ignore_index, o.label_smoothing, o.logit_scale, o.softcap, o.shard.first, *o.shard.all,
                 full);
}
inline TokenOutputs call_finish_parts(const Tensor& parts, const MaybeTensor& labels, const TokenOptions& o,
                                      int64_t wanted) {
  static const auto op =
      row_operator<TokenOutputs(const Tensor&, const MaybeTensor&, int64_t, double, bool, int64_t, int64_t)>(
          "cece::finish_parts");
  return op.call(parts, labels, o.ignore_index, o.label_smoothing, o.skip_masked_rows, *o.shard.all, wanted);
}

// Which operator serves, and what it returns: cross-entropy's where it does, else all statistics'; of a shard, by way
// of its parts. The statistics that are saved of a row say which one it was.
inline bool by_cross_entropy(const MaybeTensor& target, const TokenOptions& o, int64_t wanted) {
  return wanted == kLoss && present(target) && o.logit_scale == 1 && o.softcap == 0 && !o.skip_masked_rows;
}
inline bool of_cross_entropy(const Tensor& stats) { return stats.sym_size(0) < 5; }
inline RowOptions without_reduction(const TokenOptions& o) {
  return {int64_t(Reduction::none), o.ignore_index, o.label_smoothing, false, o.shard};
}

inline TokenOutputs row_forward(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w, const TokenOptions& o,
                                int64_t wanted) {
  if (o.shard.all) {
    static const auto op =
        row_operator<TokenOutputs(const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, double, double,
                                  double, bool, int64_t, int64_t, int64_t, int64_t, const std::string&)>(
            "cece::sharded_statistics_forward");
    const Shard& s = o.shard;
    return op.call(x, t, w, o.ignore_index, o.label_smoothing, o.logit_scale, o.softcap, o.skip_masked_rows, wanted,
                   s.first, *s.all, s.ranks.count, s.ranks.group);
  }
  if (!by_cross_entropy(t, o, wanted)) return call_forward(x, t, w, o, wanted);
  const auto [loss, stats, total] = call_forward(x, *t, w, without_reduction(o));
  const Tensor none = at::empty({0}, x.options());
  return {loss, none, none, none, none, stats};
}
inline Tensor row_backward(const TokenGrads& g, const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                           const Tensor& stats, const TokenOptions& o) {
  if (!of_cross_entropy(stats)) return call_backward(g, x, t, w, stats, o);
  return call_backward(*g[0], x, *t, w, stats, at::ones({}, stats.options()), without_reduction(o));
}
inline void row_backward_(const TokenGrads& g, const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                          const Tensor& stats, const TokenOptions& o) {
  if (!of_cross_entropy(stats)) return call_backward_(g, x, t, w, stats, o);
  call_backward_(*g[0], x, *t, w, stats, at::ones({}, stats.options()), without_reduction(o));
}

}  // namespace cece
