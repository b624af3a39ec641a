// Tensors -> args: every check of an argument, once, for every backend. A message says which argument, what it
// must be and what it got; where torch has words for the same mistake they are in it.
//
// What can be said of shapes and dtypes alone (check_*_shapes) is said in symbolic sizes, so that tracing (meta.cpp)
// refuses what a call with data would, in the same words.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/SymIntArrayRef.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <tuple>

#include "args.h"
#include "parts.h"
#include "ranks.h"

namespace cece {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline bool present(const MaybeTensor& t) { return t.has_value() && t->defined(); }
inline MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

inline std::optional<Dtype> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kHalf:
      return Dtype::f16;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kBool:
    case at::kByte:
      return Dtype::u8;
    case at::kChar:
      return Dtype::i8;
    case at::kShort:
      return Dtype::i16;
    case at::kInt:
      return Dtype::i32;
    case at::kLong:
      return Dtype::i64;
    default:
      return std::nullopt;
  }
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(at::isFloatingType(t.scalar_type()) && dtype_of(t), "cece.", op, ": ", name,
              " must be float64, float32, float16 or bfloat16, got ", t.scalar_type());
}
inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK(t.device() == input.device(), "cece.", op, ": ", name, " must be on input's device ", input.device(),
              ", got ", t.device());
}

// A number in as many digits as tell it from its neighbours: 1.0000001 is not 1.
template <class A>
inline std::string digits(A x) {
  char text[32];
  for (int n = 6; n <= std::numeric_limits<A>::max_digits10; n++) {
    std::snprintf(text, sizeof text, "%.*g", n, double(x));
    if (A(std::strtod(text, nullptr)) == x) break;
  }
  return text;
}

// Whether sizes agree. Where they are not known yet, tracing takes it that they do, and checks when they are.
inline bool same(const c10::SymInt& a, const c10::SymInt& b) { return a.sym_eq(b).expect_true(__FILE__, __LINE__); }
inline bool same(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  bool all = a.size() == b.size();
  for (size_t i = 0; all && i < a.size(); i++) all = same(a[i], b[i]);
  return all;
}

// The type sums are formed in and losses returned in: at least float32.
inline at::ScalarType acc_type(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (t && t->scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

// ---- shapes and strides

struct Strided {  // a tensor to be walked together with others
  const Tensor* tensor;
  Operand* operand;
};

// Never null, not even where there are no elements: null means absent. What is written to is asked for first: memory
// that is shared until then (copy on write) becomes the tensor's own, elsewhere.
inline char nothing;
inline void* data_of(const Tensor& t) { return t.numel() ? const_cast<void*>(t.const_data_ptr()) : &nothing; }
inline void* room_of(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : &nothing; }

// Dimensions `dims` of the tensors, which agree in size, merged where all their strides allow it.
// False where more than kMaxDims remain.
inline bool merge_dims(at::IntArrayRef sizes, at::IntArrayRef dims, at::ArrayRef<Strided> all, Shape& shape) {
  shape = {0, {}, 1};
  for (const int64_t d : dims) {
    shape.count *= sizes[d];
    if (sizes[d] == 1) continue;
    int last = shape.dims - 1;
    bool merge = last >= 0;
    for (const Strided& s : all) {
      merge = merge && s.operand->stride[last] == s.tensor->stride(d) * sizes[d];
    }
    if (!merge) {
      if (shape.dims == kMaxDims) return false;
      last = shape.dims++;
      shape.size[last] = 1;
    }
    shape.size[last] *= sizes[d];
    for (const Strided& s : all) s.operand->stride[last] = s.tensor->stride(d);
  }
  return true;
}

inline std::vector<int64_t> logical_order(int64_t n) {
  std::vector<int64_t> dims(n);
  std::iota(dims.begin(), dims.end(), 0);
  return dims;
}
// The dimensions of a tensor from the outermost in its memory, which at::empty_like keeps: a tensor of its making is
// contiguous in this order.
inline std::vector<int64_t> memory_order(const Tensor& t) {
  const Tensor dense = t.is_non_overlapping_and_dense() ? t : at::empty_like(t, t.options().device(at::kMeta));
  std::vector<int64_t> dims = logical_order(t.dim());
  if (dense.is_contiguous()) return dims;
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return dense.stride(a) > dense.stride(b); });
  return dims;
}

// "[1, 2]" of an element, by its number in the order of `dims`
inline std::string position(at::IntArrayRef sizes, at::IntArrayRef dims, int64_t linear) {
  std::vector<int64_t> at(sizes.size());
  for (int64_t i = int64_t(dims.size()) - 1; i >= 0; i--) {
    at[dims[i]] = linear % sizes[dims[i]];
    linear /= sizes[dims[i]];
  }
  return c10::str(at::IntArrayRef(at));
}

// t as contiguous `type`, itself where it already is: the dispatcher would take a microsecond to find that out.
inline Tensor contiguous_as(const Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type && t.is_contiguous() ? t : t.to(type).contiguous();
}

// ---- cross-entropy

struct CrossEntropyShapes {
  int64_t class_dim;
  bool soft = false;  // target is probabilities
  at::ScalarType acc;
  c10::SymDimVector rows;  // the sizes of a sample's loss
};

// Which of a row's classes logits are: those from `first` on, of `all`; absent: logits are all of them.
struct Shard {
  int64_t first = 0;
  std::optional<int64_t> all;
  Ranks ranks;  // that have the others

  auto options() { return std::tie(first, all, ranks.count, ranks.group); }
};
// The same as an operator's last arguments.
#define CECE_SHARD_PARAMETERS \
  int64_t first_class, std::optional<int64_t> all_classes, int64_t ranks, const std::string &group
#define CECE_SHARD                             \
  Shard {                                      \
    first_class, all_classes, { ranks, group } \
  }

// Class indices of the rows' shape, or probabilities of the logits'.
inline void check_target_shape(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                               CrossEntropyShapes& s) {
  const auto x_sizes = logits.sym_sizes(), t_sizes = target.sym_sizes();
  const auto type = target.scalar_type();
  s.soft = same(t_sizes, x_sizes);
  if (s.soft) {
    TORCH_CHECK(at::isFloatingType(type) && dtype_of(target),
                "cece.cross_entropy: Expected floating point type for target with class probabilities (a target "
                "of input's shape), got ",
                type);
    TORCH_CHECK(ignore_index < 0, "cece.cross_entropy: ignore_index is not supported for floating point target, got ",
                ignore_index);
  } else {
    const bool shape_fits = same(t_sizes, s.rows);
    if (shape_fits || !at::isFloatingType(type)) {
      TORCH_CHECK(at::isIntegralType(type, /*includeBool=*/false) && dtype_of(target),
                  "cece.cross_entropy: expected target dtype to be Long or Byte (or Int) or another integer for "
                  "class indices, got ",
                  type);
    }
    TORCH_CHECK_VALUE(logits.dim() == 1 ? target.dim() == 0 : target.dim() > 0 && same(t_sizes[0], x_sizes[0]),
                      "cece.cross_entropy: Expected input batch_size (",
                      logits.dim() == 1 ? "none" : c10::str(x_sizes[0]), ") to match target batch_size (",
                      target.dim() ? c10::str(t_sizes[0]) : "none", "): input is ", x_sizes,
                      ", so class indices must have shape ", c10::SymIntArrayRef(s.rows), " and probabilities shape ",
                      x_sizes, "; got ", t_sizes);
    TORCH_CHECK(shape_fits, "cece.cross_entropy: Expected target size ", c10::SymIntArrayRef(s.rows),
                " for class indices or ", x_sizes, " for probabilities, got ", t_sizes);
  }
}

// An undefined target is one that the caller may leave out.
inline CrossEntropyShapes check_cross_entropy_shapes(const Tensor& logits, const Tensor& target,
                                                     const MaybeTensor& weight, int64_t reduction, int64_t ignore_index,
                                                     double label_smoothing, const Shard& shard = {}) {
  constexpr const char* op = "cross_entropy";
  check_float(op, "input", logits);
  TORCH_CHECK(logits.dim() >= 1, "cece.cross_entropy: input must have shape (C), (N, C) or (N, C, d1, ...), got ",
              logits.sym_sizes());
  if (target.defined()) check_device(op, "target", target, logits);
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
              "cece.cross_entropy: label_smoothing must be between 0.0 and 1.0, got ", digits(label_smoothing));
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 2,
                    "cece.cross_entropy: reduction must be 'none', 'mean' or 'sum', got number ", reduction);
  const auto x_sizes = logits.sym_sizes();
  CrossEntropyShapes s;
  s.class_dim = logits.dim() == 1 ? 0 : 1;
  for (int64_t d = 0; d < logits.dim(); d++) {
    if (d != s.class_dim) s.rows.push_back(x_sizes[d]);
  }
  if (shard.all) {
    const c10::SymInt all = *shard.all, first = shard.first, here = x_sizes[s.class_dim];
    TORCH_CHECK_VALUE(all >= 1 && first >= 0 && TORCH_GUARD_OR_TRUE((here + first).sym_le(all)),
                      "cece.cross_entropy: a shard's classes must be some of all, got ", here, " from ", first,
                      " on, of ", all);
    TORCH_CHECK_VALUE(Reduction(reduction) == Reduction::none,
                      "cece.cross_entropy: the rows of a shard must not be reduced, got reduction ", reduction);
  }
  if (target.defined()) check_target_shape(logits, target, ignore_index, s);
  if (present(weight)) {
    check_device(op, "weight", *weight, logits);
    check_float(op, "weight", *weight);
    TORCH_CHECK(weight->dim() == 1 && same(weight->sym_size(0), x_sizes[s.class_dim]),
                "cece.cross_entropy: weight tensor should be defined either for all ", x_sizes[s.class_dim],
                " classes or no classes, but got weight tensor of shape ", weight->sym_sizes());
  }
  s.acc = acc_type({&logits, s.soft ? &target : nullptr});
  return s;
}

struct CrossEntropyOutputs {
  Tensor loss, stats, total_weight, row_losses;
};
inline CrossEntropyOutputs allocate_outputs(const CrossEntropyShapes& s, const Tensor& logits, int64_t reduction) {
  const auto options = logits.options().dtype(s.acc);
  c10::SymDimVector stats_sizes{3};
  stats_sizes.append(s.rows.begin(), s.rows.end());
  const bool reduced = Reduction(reduction) != Reduction::none;
  CrossEntropyOutputs out;
  out.stats = at::empty_symint(stats_sizes, options);
  out.total_weight = at::empty({}, options);  // 1 with reduction none, which the kernels write too
  out.row_losses = at::empty_symint(s.rows, options);
  out.loss = reduced ? at::empty({}, options) : out.row_losses;
  return out;
}

struct CrossEntropyCall {
  CrossEntropyArgs args{};
  Tensor logits, target, weight, grad_logits;  // as the args point at them
  CrossEntropyShapes shapes;
};

inline CrossEntropyCall check_cross_entropy(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                            int64_t reduction, int64_t ignore_index, double label_smoothing,
                                            const Tensor* grad_logits = nullptr, const Shard& shard = {}) {
  CrossEntropyCall call;
  call.shapes = check_cross_entropy_shapes(logits, target, weight, reduction, ignore_index, label_smoothing, shard);
  const int64_t class_dim = call.shapes.class_dim;
  const bool soft = call.shapes.soft;
  CrossEntropyArgs& a = call.args;
  a.classes = logits.size(class_dim);
  a.first_class = shard.first, a.all_classes = shard.all.value_or(a.classes);
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.reduction = Reduction(reduction);
  if (present(weight)) {
    call.weight = contiguous_as(*weight, call.shapes.acc);
    a.weight = call.weight.const_data_ptr();
  }
  std::vector<int64_t> row_dims;
  for (int64_t d = 0; d < logits.dim(); d++) {
    if (d != class_dim) row_dims.push_back(d);
  }
  call.logits = logits;
  if (grad_logits) call.grad_logits = *grad_logits;
  if (target.defined()) call.target = soft ? target : contiguous_as(target, target.scalar_type());
  const auto merge = [&] {
    c10::SmallVector<Strided, 3> all{{&call.logits, &a.logits}};
    if (soft) all.push_back({&call.target, &a.probabilities});
    if (grad_logits) all.push_back({&call.grad_logits, &a.grad_logits});
    return merge_dims(call.logits.sizes(), row_dims, all, a.rows);
  };
  if (!merge()) {  // only a tensor of more than kMaxDims dimensions that no two of can be merged
    call.logits = logits.contiguous();
    if (target.defined()) call.target = call.target.contiguous();
    if (grad_logits) call.grad_logits = at::empty(logits.sizes(), logits.options());  // deliver() brings it home
    merge();
  }
  const auto fill = [&](Operand& o, void* data, const Tensor& t) {
    o.data = data;
    o.dtype = *dtype_of(t);
    o.class_stride = t.stride(class_dim);
  };
  if (grad_logits) fill(a.grad_logits, room_of(call.grad_logits), call.grad_logits);
  fill(a.logits, data_of(call.logits), call.logits);
  if (soft) {
    fill(a.probabilities, data_of(call.target), call.target);
  } else if (target.defined()) {
    a.labels = data_of(call.target);
    a.label_dtype = *dtype_of(call.target);
  }
  return call;
}

// What a kernel wrote, where it had to be written elsewhere than it belongs.
inline void deliver(const Tensor& written, const Tensor& gradient) {
  if (!written.is_same(gradient)) gradient.copy_(written);
}

inline CrossEntropyOutputs allocate_outputs(CrossEntropyCall& call) {
  CrossEntropyArgs& a = call.args;
  const CrossEntropyOutputs out = allocate_outputs(call.shapes, call.logits, int64_t(a.reduction));
  a.stats = out.stats.mutable_data_ptr();
  a.loss = out.row_losses.mutable_data_ptr();
  a.total_weight = out.total_weight.mutable_data_ptr();
  a.reduced = out.loss.mutable_data_ptr();
  return out;
}

// What a backward is given beside the forward's inputs.
inline void check_saved_shapes(const CrossEntropyShapes& s, const Tensor& logits, const Tensor& grad,
                               const Tensor& stats, const Tensor& total_weight, int64_t reduction) {
  const bool none = Reduction(reduction) == Reduction::none;
  TORCH_CHECK(none ? same(grad.sym_sizes(), s.rows) : grad.dim() == 0,
              "cece.cross_entropy_backward: grad must have the shape of the loss, got ", grad.sym_sizes());
  TORCH_CHECK(stats.dim() > 0 && same(stats.sym_sizes().slice(1), s.rows) && total_weight.dim() == 0,
              "cece.cross_entropy_backward: stats and total_weight must be the forward's, got shapes ",
              stats.sym_sizes(), " and ", total_weight.sym_sizes());
  for (const Tensor* t : {&grad, &stats, &total_weight}) check_device("cross_entropy_backward", "grad", *t, logits);
}
// Returns the tensors that must stay alive.
inline std::array<Tensor, 3> check_saved(CrossEntropyCall& call, const Tensor& grad, const Tensor& stats,
                                         const Tensor& total_weight) {
  CrossEntropyArgs& a = call.args;
  check_saved_shapes(call.shapes, call.logits, grad, stats, total_weight, int64_t(a.reduction));
  std::array<Tensor, 3> held;
  int i = 0;
  for (const Tensor* t : {&grad, &stats, &total_weight}) held[i++] = contiguous_as(*t, call.shapes.acc);
  a.grad_loss = held[0].const_data_ptr();
  a.grad_stride = a.reduction == Reduction::none ? 1 : 0;
  a.stats = data_of(held[1]);
  a.total_weight = data_of(held[2]);
  return held;
}

// ---- all statistics of a row

struct TokenOptions {
  int64_t ignore_index;
  double label_smoothing, logit_scale, softcap;
  bool skip_masked_rows;
  Shard shard = {};

  auto all() {
    return std::tuple_cat(std::tie(ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows),
                          shard.options());
  }
};
enum Wanted : int64_t { kLoss = 1, kEntropy = 2, kLogSumExp = 4, kCollision = 8, kArgmax = 16 };

inline CrossEntropyShapes check_token_statistics_shapes(const Tensor& logits, const MaybeTensor& target,
                                                        const MaybeTensor& weight, const TokenOptions& o) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  TORCH_CHECK_VALUE(o.logit_scale > 0 && o.logit_scale <= kLargest,
                    "cece.cross_entropy: logit_scale must be a positive, finite number, got ", digits(o.logit_scale));
  TORCH_CHECK_VALUE(o.softcap >= 0 && o.softcap <= kLargest,
                    "cece.cross_entropy: softcap must be a positive, finite number, got ", digits(o.softcap));
  TORCH_CHECK(present(target) || (!present(weight) && o.label_smoothing == 0),
              "cece.cross_entropy: weight and label_smoothing need a target");
  CrossEntropyShapes s =
      check_cross_entropy_shapes(logits, present(target) ? *target : Tensor(), weight, int64_t(Reduction::none),
                                 o.ignore_index, o.label_smoothing, o.shard);
  const auto classes = logits.sym_size(s.class_dim);
  TORCH_CHECK(o.shard.all || !TORCH_GUARD_OR_FALSE(classes.sym_eq(0)),
              "cece.cross_entropy: input must have at least one class, got ", logits.sym_sizes());
  return s;
}

using TokenOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // ..., argmax, stats
inline TokenOutputs allocate_token_outputs(const CrossEntropyShapes& s, const Tensor& logits, int64_t wanted) {
  const auto options = logits.options().dtype(s.acc);
  c10::SymDimVector stats_sizes{5};
  stats_sizes.append(s.rows.begin(), s.rows.end());
  const auto rows = [&](int64_t which, const at::TensorOptions& o) {
    return wanted & which ? at::empty_symint(s.rows, o) : at::empty({0}, o);
  };
  return {rows(kLoss, options),
          rows(kEntropy, options),
          rows(kLogSumExp, options),
          rows(kCollision, options),
          rows(kArgmax, options.dtype(at::kLong)),
          at::empty_symint(stats_sizes, options)};
}

using TokenGrads = std::array<MaybeTensor, 4>;  // of loss, entropy, logsumexp, collision
inline void check_token_grads(const CrossEntropyShapes& s, const Tensor& logits, const MaybeTensor& target,
                              const TokenGrads& grads, const Tensor& stats, const TokenOptions& o) {
  for (const MaybeTensor& g : grads) {
    if (!present(g)) continue;
    check_device("token_statistics_backward", "grad", *g, logits);
    TORCH_CHECK(same(g->sym_sizes(), s.rows), "cece.token_statistics_backward: grads must have the rows' shape, got ",
                g->sym_sizes());
  }
  TORCH_CHECK(!present(grads[0]) || present(target), "cece.token_statistics_backward: grad_loss needs a target");
  TORCH_CHECK(
      stats.dim() > 0 && same(stats.sym_size(0), o.shard.all ? 6 : 5) && same(stats.sym_sizes().slice(1), s.rows),
      "cece.token_statistics_backward: stats must be the forward's, got shape ", stats.sym_sizes());
  check_device("token_statistics_backward", "stats", stats, logits);
}

struct TokenStatisticsCall {
  TokenStatisticsArgs args;
  CrossEntropyCall rows;  // what the args point at
  std::array<Tensor, 5> held;
  TokenOptions options;
};
inline TokenStatisticsCall check_token_statistics(const Tensor& logits, const MaybeTensor& target,
                                                  const MaybeTensor& weight, const TokenOptions& o,
                                                  const Tensor* grad_logits = nullptr) {
  check_token_statistics_shapes(logits, target, weight, o);
  TokenStatisticsCall call{
      {},
      check_cross_entropy(logits, present(target) ? *target : Tensor(), weight, int64_t(Reduction::none),
                          o.ignore_index, o.label_smoothing, grad_logits, o.shard),
      {},
      o};
  TokenStatisticsArgs& a = call.args;
  static_cast<CrossEntropyArgs&>(a) = call.rows.args;
  a.logit_scale = o.logit_scale, a.softcap = o.softcap, a.skip_masked_rows = o.skip_masked_rows;
  return call;
}
inline void point_at(TokenStatisticsArgs& a, const TokenOutputs& out) {
  const auto place = [&](const Tensor& t) { return t.dim() == 1 && t.numel() == 0 ? nullptr : room_of(t); };
  const auto& [loss, entropy, logsumexp, collision, argmax, stats] = out;
  a.loss = place(loss), a.entropy = place(entropy), a.logsumexp = place(logsumexp), a.collision = place(collision);
  a.argmax = static_cast<int64_t*>(place(argmax)), a.stats = room_of(stats);
}
inline void point_at(TokenStatisticsCall& call, const MaybeTensor& target, const TokenGrads& grads,
                     const Tensor& stats) {
  check_token_grads(call.rows.shapes, call.rows.logits, target, grads, stats, call.options);
  TokenStatisticsArgs& a = call.args;
  const void** const places[] = {&a.grad_loss, &a.grad_entropy, &a.grad_logsumexp, &a.grad_collision};
  for (size_t i = 0; i < grads.size(); i++) {
    if (!present(grads[i])) continue;
    call.held[i] = contiguous_as(*grads[i], call.rows.shapes.acc);
    *places[i] = data_of(call.held[i]);
  }
  call.held[4] = contiguous_as(stats, call.rows.shapes.acc);
  a.stats = data_of(call.held[4]);
  a.grad_stride = 1;
}

// ---- a row in parts (parts.h)

// What a part has of a row, by what is asked for.
inline int part_numbers(bool full, const MaybeTensor& target, const MaybeTensor& weight, int64_t logits_dim) {
  const bool weighs_labels = present(weight) && present(target) && target->dim() < logits_dim;
  return full ? kFullPart : weighs_labels ? kWeightedPart : kPlainPart;
}
inline Tensor allocate_parts(const CrossEntropyShapes& s, const Tensor& logits, int numbers) {
  c10::SymDimVector sizes{numbers};
  sizes.append(s.rows.begin(), s.rows.end());
  return at::empty_symint(sizes, logits.options().dtype(s.acc));
}

inline Tensor point_at_parts(TokenStatisticsCall& call, const MaybeTensor& target, const MaybeTensor& weight,
                             bool full) {
  call.args.part_numbers = part_numbers(full, target, weight, call.rows.logits.dim());
  const Tensor parts = allocate_parts(call.rows.shapes, call.rows.logits, call.args.part_numbers);
  call.args.parts = room_of(parts);
  return parts;
}

// Of parts (ranks, numbers, rows...) and labels, which may be absent.
inline CrossEntropyShapes check_finish_parts_shapes(const Tensor& parts, const MaybeTensor& labels, int64_t wanted) {
  constexpr const char* op = "finish_parts";
  CrossEntropyShapes s;
  s.acc = parts.scalar_type();
  TORCH_CHECK(parts.dim() >= 2 && (s.acc == at::kFloat || s.acc == at::kDouble),
              "cece.finish_parts: parts must be float32 or float64 of shape (ranks, numbers, rows...), got ", s.acc,
              " of shape ", parts.sym_sizes());
  const auto numbers = parts.sym_size(1);
  TORCH_CHECK(numbers == kFullPart || (wanted == kLoss && (numbers == kPlainPart || numbers == kWeightedPart)),
              "cece.finish_parts: parts must have 8 numbers, or 4 or 5 for no more than the loss, got ", numbers);
  for (int64_t d = 2; d < parts.dim(); d++) s.rows.push_back(parts.sym_size(d));
  if (present(labels)) {
    check_device(op, "target", *labels, parts);
    TORCH_CHECK(at::isIntegralType(labels->scalar_type(), /*includeBool=*/false) && dtype_of(*labels) &&
                    same(labels->sym_sizes(), s.rows),
                "cece.finish_parts: target must be class indices of shape ", c10::SymIntArrayRef(s.rows), ", got ",
                labels->scalar_type(), " of shape ", labels->sym_sizes());
  }
  return s;
}
inline TokenOutputs allocate_whole_rows(const CrossEntropyShapes& s, const Tensor& parts, int64_t wanted) {
  TokenOutputs out = allocate_token_outputs(s, parts, wanted);
  c10::SymDimVector sizes{parts.sym_size(1) == kFullPart ? c10::SymInt(6) : parts.sym_size(1) - 1};
  sizes.append(s.rows.begin(), s.rows.end());
  std::get<5>(out) = at::empty_symint(sizes, parts.options());
  return out;
}
struct FinishPartsCall {
  FinishPartsArgs args;
  TokenOutputs out;
  Tensor parts, labels;  // as the args point at them
};
inline FinishPartsCall check_finish_parts(const Tensor& parts, const MaybeTensor& labels, int64_t ignore_index,
                                          double label_smoothing, bool skip_masked_rows, int64_t all_classes,
                                          int64_t wanted) {
  const CrossEntropyShapes shapes = check_finish_parts_shapes(parts, labels, wanted);
  FinishPartsCall call{{}, allocate_whole_rows(shapes, parts, wanted), parts.contiguous(), {}};
  FinishPartsArgs& a = call.args;
  a.rows = {1, {1}, 1};
  for (const auto& n : shapes.rows) a.rows.count *= n.expect_int();
  a.rows.size[0] = a.rows.count;
  a.classes = a.all_classes = all_classes;
  a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.skip_masked_rows = skip_masked_rows;
  a.parts = data_of(call.parts), a.part_numbers = int(parts.size(1)), a.ranks = parts.size(0);
  if (present(labels)) {
    call.labels = contiguous_as(*labels, labels->scalar_type());
    a.labels = data_of(call.labels), a.label_dtype = *dtype_of(*labels);
  }
  point_at(a, call.out);
  return call;
}

// ---- divergences of two rows

struct DivergenceShapes {
  const char* op;
  int64_t class_dim;
  at::ScalarType acc;
  c10::SymDimVector rows;
};

// grad_loss: null for a forward.
inline DivergenceShapes check_divergence_shapes(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                                double temperature, bool symmetric, const Tensor* grad_loss = nullptr) {
  const char* const op = symmetric ? "js_divergence" : "kl_divergence";
  const char* const other = symmetric ? "other_logits" : "target_logits";
  check_float(op, "logits", x);
  check_float(op, other, y);
  check_device(op, other, y, x);
  TORCH_CHECK(x.dim() >= 1, "cece.", op, ": logits must have shape (C), (N, C) or (N, C, d1, ...), got ",
              x.sym_sizes());
  TORCH_CHECK_VALUE(same(y.sym_sizes(), x.sym_sizes()), "cece.", op, ": ", other, " must have logits' shape ",
                    x.sym_sizes(), ", got ", y.sym_sizes());
  TORCH_CHECK_VALUE(temperature > 0 && temperature < std::numeric_limits<double>::infinity(), "cece.", op,
                    ": temperature must be a finite number above 0, got ", digits(temperature));
  DivergenceShapes s{op, x.dim() == 1 ? 0 : 1, acc_type({&x, &y}), {}};
  for (int64_t d = 0; d < x.dim(); d++) {
    if (d != s.class_dim) s.rows.push_back(x.sym_size(d));
  }
  if (present(mask)) {
    check_device(op, "mask", *mask, x);
    TORCH_CHECK(mask->scalar_type() == at::kBool, "cece.", op, ": mask must be bool, got ", mask->scalar_type());
    TORCH_CHECK_VALUE(same(mask->sym_sizes(), s.rows), "cece.", op, ": mask must have the rows' shape ",
                      c10::SymIntArrayRef(s.rows), ", got ", mask->sym_sizes());
  }
  if (grad_loss) {
    TORCH_CHECK(same(grad_loss->sym_sizes(), s.rows), "cece.", op, ": grad must have the rows' shape ",
                c10::SymIntArrayRef(s.rows), ", got ", grad_loss->sym_sizes());
    check_device(op, "grad", *grad_loss, x);
  }
  return s;
}
struct DivergenceOutputs {
  Tensor loss, stats;
};
inline DivergenceOutputs allocate_divergence(c10::SymIntArrayRef rows, const at::TensorOptions& options) {
  c10::SymDimVector stats_sizes{kPairNumbers};
  stats_sizes.append(rows.begin(), rows.end());
  return {at::empty_symint(rows, options), at::empty_symint(stats_sizes, options)};
}
inline DivergenceOutputs allocate_outputs(const DivergenceShapes& s, const Tensor& x) {
  return allocate_divergence(s.rows, x.options().dtype(s.acc));
}
// Of rows in parts: (ranks, kPartNumbers, rows...)
inline DivergenceOutputs check_parts(const Tensor& parts) {
  const auto sizes = parts.sym_sizes();
  TORCH_CHECK(parts.dim() >= 2 && same(sizes[1], kPartNumbers) &&
                  (parts.scalar_type() == at::kFloat || parts.scalar_type() == at::kDouble),
              "cece.divergence_merge: parts must have shape (ranks, ", kPartNumbers,
              ", rows...) and be float32 or float64, got ", sizes, " of ", parts.scalar_type());
  return allocate_divergence(sizes.slice(2), parts.options());
}
struct DivergenceMerge {
  DivergenceArgs args{};
  Tensor parts;  // as the args point at it
  DivergenceOutputs out;
};
inline DivergenceMerge check_divergence_merge(const Tensor& parts, double temperature) {
  DivergenceMerge call{{}, parts.contiguous(), check_parts(parts)};
  DivergenceArgs& a = call.args;
  a.rows.count = call.out.loss.numel();
  a.cold = 1 / temperature;
  a.parts = data_of(call.parts), a.count_parts = parts.size(0);
  a.loss = room_of(call.out.loss), a.stats = room_of(call.out.stats);
  return call;
}

struct DivergenceCall {
  DivergenceArgs args{};
  Tensor x, y, mask, grad_loss, stats, grad;  // as the args point at them
  DivergenceShapes shapes;
};

// grad_loss, stats, grad: null for a forward.
inline DivergenceCall check_divergence(const Tensor& x, const Tensor& y, const MaybeTensor& mask, double temperature,
                                       bool symmetric, const Tensor* grad_loss = nullptr, const Tensor* stats = nullptr,
                                       const Tensor* grad = nullptr) {
  DivergenceCall call;
  call.shapes = check_divergence_shapes(x, y, mask, temperature, symmetric, grad_loss);
  const int64_t class_dim = call.shapes.class_dim;
  DivergenceArgs& a = call.args;
  a.classes = x.size(class_dim);
  a.symmetric = symmetric;
  a.cold = 1 / temperature;
  call.x = x, call.y = y;
  if (grad) call.grad = *grad;
  if (present(mask)) {
    call.mask = contiguous_as(*mask, at::kBool);
    a.mask = static_cast<const uint8_t*>(data_of(call.mask));
  }
  if (grad_loss) {
    call.grad_loss = contiguous_as(*grad_loss, call.shapes.acc), call.stats = contiguous_as(*stats, call.shapes.acc);
    a.grad_loss = data_of(call.grad_loss), a.stats = data_of(call.stats);
  }
  std::vector<int64_t> row_dims;
  for (int64_t d = 0; d < x.dim(); d++) {
    if (d != class_dim) row_dims.push_back(d);
  }
  c10::SmallVector<Strided, 3> all{{&call.x, &a.x}, {&call.y, &a.y}};
  if (grad) all.push_back({&call.grad, &a.grad});
  if (!merge_dims(x.sizes(), row_dims, all, a.rows)) {
    for (const Strided& s : all) const_cast<Tensor&>(*s.tensor) = s.tensor->contiguous();  // deliver() brings it home
    merge_dims(x.sizes(), row_dims, all, a.rows);
  }
  for (const Strided& s : all) {
    s.operand->data = s.tensor == &call.grad ? room_of(*s.tensor) : data_of(*s.tensor);
    s.operand->dtype = *dtype_of(*s.tensor);
    s.operand->class_stride = s.tensor->stride(class_dim);
  }
  return call;
}

// ---- binary cross-entropy and the other elementwise losses

// A call's arguments beside the gradient, as the operators take them.
struct BinaryCrossEntropyInputs {
  const Tensor &input, &target;
  const MaybeTensor &weight, &pos_weight;
  int64_t kind, reduction;
  const MaybeTensor& mask;
  at::ArrayRef<double> parameters;
  const MaybeTensor& offsets;
  std::optional<int64_t> padding;
};

inline const char* name_of(const BinaryCrossEntropyInputs& in) {
  constexpr const char* names[] = {"binary_cross_entropy", "binary_cross_entropy_with_logits", "sigmoid_focal_loss",
                                   "asymmetric_loss"};
  TORCH_CHECK_VALUE(in.kind >= 0 && in.kind < 4, "cece: kind must be one of 0, 1, 2 and 3, got ", in.kind);
  return in.padding ? "multilabel_cross_entropy" : names[in.kind];
}

// The labels of rows, (N, K) or, with offsets, all in one.
inline void check_listed(const char* op, const BinaryCrossEntropyInputs& in) {
  const auto sizes = in.input.sym_sizes();
  TORCH_CHECK(in.input.dim() == 2, "cece.", op, ": input must have shape (N, C), got ", sizes);
  TORCH_CHECK(at::isIntegralType(in.target.scalar_type(), /*includeBool=*/false) && dtype_of(in.target), "cece.", op,
              ": labels must be class indices of an integer dtype, got ", in.target.scalar_type());
  if (!present(in.offsets)) {
    TORCH_CHECK_VALUE(in.target.dim() == 2 && same(in.target.sym_size(0), sizes[0]), "cece.", op,
                      ": labels must have shape (N, K), N = ", sizes[0], ", or come with offsets, got ",
                      in.target.sym_sizes());
    return;
  }
  const Tensor& offsets = *in.offsets;
  check_device(op, "offsets", offsets, in.input);
  TORCH_CHECK(offsets.scalar_type() == at::kLong || offsets.scalar_type() == at::kInt, "cece.", op,
              ": offsets must be int64 or int32, got ", offsets.scalar_type());
  TORCH_CHECK_VALUE(in.target.dim() == 1, "cece.", op, ": labels must have shape (K) beside offsets, got ",
                    in.target.sym_sizes());
  TORCH_CHECK_VALUE(offsets.dim() == 1 && same(offsets.sym_size(0), sizes[0] + 1), "cece.", op,
                    ": offsets must have shape (N + 1), N = ", sizes[0], ", got ", offsets.sym_sizes());
}

// Returns the type sums are formed in. grad_loss: null for a forward.
inline at::ScalarType check_binary_cross_entropy_shapes(const BinaryCrossEntropyInputs& in,
                                                        const Tensor* grad_loss = nullptr) {
  const char* op = name_of(in);
  const Tensor &input = in.input, &target = in.target;
  const auto sizes = input.sym_sizes();
  check_float(op, "input", input);
  check_device(op, in.padding ? "labels" : "target", target, input);
  if (in.padding) {
    check_listed(op, in);
  } else {
    TORCH_CHECK(dtype_of(target), "cece.", op, ": target must be a float, integer or bool tensor, got ",
                target.scalar_type());
    TORCH_CHECK_VALUE(same(target.sym_sizes(), sizes), "cece.", op, ": Target size (", target.sym_sizes(),
                      ") must be the same as input size (", sizes, ")");
  }
  TORCH_CHECK_VALUE(in.reduction >= 0 && in.reduction <= 3, "cece.", op,
                    ": reduction must be 'none', 'mean' or 'sum', got number ", in.reduction);
  TORCH_CHECK_VALUE(in.parameters.empty() || in.parameters.size() == 2 || in.parameters.size() == 6, "cece.", op,
                    ": parameters must be none, 2 or 6 numbers, got ", in.parameters.size());
  const auto check_broadcast = [&](const char* name, const MaybeTensor& t) {
    if (!present(t)) return;
    check_device(op, name, *t, input);
    bool fits = t->dim() <= input.dim();
    for (int64_t d = 1; fits && d <= t->dim(); d++) {
      const auto size = t->sym_size(-d);
      fits = TORCH_GUARD_OR_FALSE(size.sym_eq(1)) || same(size, sizes[input.dim() - d]);
    }
    TORCH_CHECK(fits, "cece.", op, ": ", name, " must be broadcastable to input's shape ", sizes, ", got ",
                t->sym_sizes());
  };
  if (present(in.weight)) check_float(op, "weight", *in.weight);
  check_broadcast("weight", in.weight);
  if (present(in.pos_weight)) check_float(op, "pos_weight", *in.pos_weight);
  check_broadcast("pos_weight", in.pos_weight);
  TORCH_CHECK(!present(in.mask) || in.mask->scalar_type() == at::kBool, "cece.", op,
              ": mask must be a bool tensor, got ", in.mask->scalar_type());
  check_broadcast("mask", in.mask);
  if (grad_loss) {
    const auto reduction = Reduction(in.reduction);
    const bool fits = reduction == Reduction::none      ? same(grad_loss->sym_sizes(), sizes)
                      : reduction == Reduction::counted ? grad_loss->dim() == 1 && same(grad_loss->sym_size(0), 2)
                                                        : grad_loss->dim() == 0;
    TORCH_CHECK(fits, "cece.", op, "_backward: grad must have the shape of the loss, got ", grad_loss->sym_sizes());
    check_device(op, "grad", *grad_loss, input);
  }
  return acc_type({&input, in.padding ? nullptr : &target, present(in.weight) ? &*in.weight : nullptr});
}
inline Tensor allocate_loss(const Tensor& input, at::ScalarType acc, int64_t reduction) {
  const auto options = input.options().dtype(acc);
  switch (Reduction(reduction)) {
    case Reduction::none:
      return at::empty_like(input, options);
    case Reduction::counted:
      return at::empty({2}, options);
    default:
      return at::empty({}, options);
  }
}

struct BinaryCrossEntropyCall {
  BinaryCrossEntropyArgs args{};
  // input, weight, pos_weight, mask, grad_loss, grad_input, target: walked together; labels and offsets are not
  std::array<Tensor, 7> held;
  Tensor labels, offsets;
  at::ScalarType acc;
  std::vector<int64_t> dims;  // of input, from the outermost in its memory: elements are taken in that order
};

inline BinaryCrossEntropyCall check_binary_cross_entropy(const BinaryCrossEntropyInputs& in,
                                                         const Tensor* grad_loss = nullptr,
                                                         const Tensor* grad_input = nullptr) {
  BinaryCrossEntropyCall call;
  call.acc = check_binary_cross_entropy_shapes(in, grad_loss);
  constexpr int kGradLoss = 4, kGradInput = 5;
  const Tensor& input = in.input;
  call.held[0] = input;
  if (present(in.weight)) call.held[1] = in.weight->expand(input.sizes());
  if (present(in.pos_weight)) call.held[2] = in.pos_weight->expand(input.sizes());
  if (present(in.mask)) call.held[3] = in.mask->expand(input.sizes());

  BinaryCrossEntropyArgs& a = call.args;
  a.kind = in.kind;
  a.keep = in.parameters.empty() ? 1 : in.parameters[0];
  a.spread = in.parameters.empty() ? 0 : in.parameters[1];
  for (size_t i = 2; i < in.parameters.size(); i++) a.own[i - 2] = in.parameters[i];
  a.reduction = Reduction(in.reduction);
  const bool none = a.reduction == Reduction::none;
  if (grad_loss) {
    call.held[kGradLoss] = grad_loss->scalar_type() == call.acc ? *grad_loss : grad_loss->to(call.acc);
    if (!none) a.grad_loss.data = data_of(call.held[kGradLoss]);  // of (2), the first is the sum's
  }
  if (grad_input) call.held[kGradInput] = *grad_input;
  if (in.padding) {
    call.labels = in.target.contiguous();
    a.listed.labels = {data_of(call.labels), *dtype_of(call.labels), 0, {}};
    a.listed.count = call.labels.numel();
    a.listed.classes = input.size(1);
    a.listed.padding = *in.padding;
    if (present(in.offsets)) {
      call.offsets = contiguous_as(*in.offsets, at::kLong);
      a.listed.offsets = call.offsets.const_data_ptr<int64_t>();
    } else {
      a.listed.each = call.labels.size(1);
    }
  } else {
    call.held[6] = in.target;
  }

  Operand* operands[] = {&a.input, &a.weight, &a.pos_weight, &a.mask, &a.grad_loss, &a.grad_input, &a.target};
  constexpr int kAll = sizeof(operands) / sizeof(operands[0]);
  const auto walked = [&](int i) { return call.held[i].defined() && (i != kGradLoss || none); };
  call.dims = in.padding ? logical_order(input.dim()) : memory_order(input);  // a listed truth goes by rows
  const auto merge = [&] {
    c10::SmallVector<Strided, kAll> all;
    for (int i = 0; i < kAll; i++) {
      if (walked(i)) all.push_back({&call.held[i], operands[i]});
    }
    return merge_dims(input.sizes(), call.dims, all, a.shape);
  };
  if (!merge()) {
    for (int i = 0; i < kAll; i++) {  // the gradient too: deliver()
      if (walked(i)) call.held[i] = at::empty_like(input, call.held[i].options()).copy_(call.held[i]);
    }
    merge();
  }
  for (int i = 0; i < kAll; i++) {
    if (!walked(i)) continue;
    operands[i]->data = i == kGradInput ? room_of(call.held[i]) : data_of(call.held[i]);
    operands[i]->dtype = *dtype_of(call.held[i]);
  }
  return call;
}

// The operators' arguments as written in ops.cpp, and as the structs above.
#define CECE_BINARY_PARAMETERS                                                                                       \
  const Tensor &input, const Tensor &target, const MaybeTensor &weight, const MaybeTensor &pos_weight, int64_t kind, \
      int64_t reduction, const MaybeTensor &mask, at::ArrayRef<double> parameters, const MaybeTensor &offsets,       \
      std::optional<int64_t> padding
#define CECE_BINARY_ARGUMENTS input, target, weight, pos_weight, kind, reduction, mask, parameters, offsets, padding

}  // namespace cece
