// Tensors -> args: every check of an argument, once, for both backends. A message says which argument, what it
// must be and what it got; where torch has words for the same mistake they are in it.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>

#include <array>
#include <optional>

#include "args.h"

namespace cece {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline bool present(const MaybeTensor& t) { return t.has_value() && t->defined(); }

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

// Never null, not even where there are no elements: null means absent.
inline void* data_of(const Tensor& t) {
  static char nothing;
  return t.numel() ? const_cast<void*>(t.const_data_ptr()) : &nothing;
}

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

inline std::string position(at::IntArrayRef sizes, int64_t linear) {  // "[1, 2]" of an element
  std::string s;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; d--) {
    s = std::to_string(linear % sizes[d]) + (s.empty() ? "" : ", ") + s;
    linear /= sizes[d];
  }
  return "[" + s + "]";
}

// t as contiguous `type`, itself where it already is: the dispatcher would take a microsecond to find that out.
inline Tensor contiguous_as(const Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type && t.is_contiguous() ? t : t.to(type).contiguous();
}

// ---- cross-entropy

struct CrossEntropyCall {
  CrossEntropyArgs args{};
  Tensor logits, target, weight;  // as the args point at them
  at::ScalarType acc;
  std::vector<int64_t> row_sizes;
};

inline CrossEntropyCall check_cross_entropy(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                            int64_t reduction, int64_t ignore_index, double label_smoothing,
                                            const Tensor* grad_logits = nullptr) {
  constexpr const char* op = "cross_entropy";
  check_float(op, "input", logits);
  TORCH_CHECK(logits.dim() >= 1, "cece.cross_entropy: input must have shape (C), (N, C) or (N, C, d1, ...), got ",
              logits.sizes());
  check_device(op, "target", target, logits);
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
              "cece.cross_entropy: label_smoothing must be between 0.0 and 1.0, got ", label_smoothing);
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 2,
                    "cece.cross_entropy: reduction must be 'none', 'mean' or 'sum', got number ", reduction);
  const int64_t class_dim = logits.dim() == 1 ? 0 : 1, classes = logits.size(class_dim);
  std::vector<int64_t> row_dims, row_sizes;
  for (int64_t d = 0; d < logits.dim(); d++) {
    if (d == class_dim) continue;
    row_dims.push_back(d);
    row_sizes.push_back(logits.size(d));
  }

  const bool soft = target.sizes() == logits.sizes();
  if (soft) {
    TORCH_CHECK(at::isFloatingType(target.scalar_type()) && dtype_of(target),
                "cece.cross_entropy: Expected floating point type for target with class probabilities (a target "
                "of input's shape), got ",
                target.scalar_type());
    TORCH_CHECK(ignore_index < 0, "cece.cross_entropy: ignore_index is not supported for floating point target, got ",
                ignore_index);
  } else {
    const bool shape_fits = target.sizes() == at::IntArrayRef(row_sizes);
    const auto type = target.scalar_type();
    if (shape_fits || !at::isFloatingType(type)) {
      TORCH_CHECK(type == at::kLong || type == at::kInt || type == at::kByte,
                  "cece.cross_entropy: expected target dtype to be Long or Byte (or Int) for class indices, got ",
                  type);
    }
    TORCH_CHECK_VALUE(logits.dim() == 1 ? target.dim() == 0 : target.dim() > 0 && target.size(0) == logits.size(0),
                      "cece.cross_entropy: Expected input batch_size (",
                      logits.dim() == 1 ? "none" : std::to_string(logits.size(0)), ") to match target batch_size (",
                      target.dim() ? std::to_string(target.size(0)) : "none", "): input is ", logits.sizes(),
                      ", so class indices must have shape ", at::IntArrayRef(row_sizes), " and probabilities shape ",
                      logits.sizes(), "; got ", target.sizes());
    TORCH_CHECK(shape_fits, "cece.cross_entropy: Expected target size ", at::IntArrayRef(row_sizes),
                " for class indices or ", logits.sizes(), " for probabilities, got ", target.sizes());
  }

  CrossEntropyCall call;
  call.acc = acc_type({&logits, soft ? &target : nullptr});
  call.row_sizes = std::move(row_sizes);
  CrossEntropyArgs& a = call.args;
  a.classes = classes;
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.reduction = Reduction(reduction);
  if (present(weight)) {
    check_device(op, "weight", *weight, logits);
    check_float(op, "weight", *weight);
    TORCH_CHECK(weight->dim() == 1 && weight->size(0) == classes,
                "cece.cross_entropy: weight tensor should be defined either for all ", classes,
                " classes or no classes, but got weight tensor of shape ", weight->sizes());
    call.weight = contiguous_as(*weight, call.acc);
    a.weight = call.weight.const_data_ptr();
  }
  call.logits = logits;
  call.target = soft ? target : contiguous_as(target, target.scalar_type());
  const auto merge = [&] {
    c10::SmallVector<Strided, 3> all{{&call.logits, &a.logits}};
    if (soft) all.push_back({&call.target, &a.probabilities});
    if (grad_logits) all.push_back({grad_logits, &a.grad_logits});
    return merge_dims(call.logits.sizes(), row_dims, all, a.rows);
  };
  if (!merge()) {  // only a tensor of ten and more dimensions that no two of can be merged
    TORCH_CHECK(!grad_logits || grad_logits->is_contiguous(), "cece.cross_entropy: input has too many dimensions");
    call.logits = logits.contiguous();
    call.target = call.target.contiguous();
    merge();
  }
  const auto fill = [&](Operand& o, const Tensor& t) {
    o.data = data_of(t);
    o.dtype = *dtype_of(t);
    o.class_stride = t.stride(class_dim);
  };
  fill(a.logits, call.logits);
  if (grad_logits) fill(a.grad_logits, *grad_logits);
  if (soft) {
    fill(a.probabilities, call.target);
  } else {
    a.labels = call.target.const_data_ptr();
    a.label_dtype = *dtype_of(call.target);
  }
  return call;
}

// empty_like, but contiguous where `like` may have more dimensions than a kernel takes: merge_dims can then merge all.
inline Tensor gradient_like(const Tensor& like) {
  return like.dim() > kMaxDims ? at::empty(like.sizes(), like.options()) : at::empty_like(like);
}

struct CrossEntropyOutputs {
  Tensor loss, stats, total_weight, row_losses;
};
inline CrossEntropyOutputs allocate_outputs(CrossEntropyCall& call) {
  const auto options = call.logits.options().dtype(call.acc);
  CrossEntropyArgs& a = call.args;
  std::vector<int64_t> stats_sizes{3};
  stats_sizes.insert(stats_sizes.end(), call.row_sizes.begin(), call.row_sizes.end());
  CrossEntropyOutputs out;
  out.stats = at::empty(stats_sizes, options);
  const bool reduced = a.reduction != Reduction::none;
  out.total_weight = reduced ? at::empty({}, options) : at::ones({}, options);  // 1: nothing is divided
  out.row_losses = at::empty(call.row_sizes, options);
  out.loss = reduced ? at::empty({}, options) : out.row_losses;
  a.stats = out.stats.mutable_data_ptr();
  a.loss = out.row_losses.mutable_data_ptr();
  a.total_weight = out.total_weight.mutable_data_ptr();
  a.reduced = out.loss.mutable_data_ptr();
  return out;
}

// What a backward is given beside the forward's inputs; returns the tensors that must stay alive.
inline std::array<Tensor, 3> check_saved(CrossEntropyCall& call, const Tensor& grad, const Tensor& stats,
                                         const Tensor& total_weight) {
  CrossEntropyArgs& a = call.args;
  const bool none = a.reduction == Reduction::none;
  TORCH_CHECK(none ? grad.sizes() == at::IntArrayRef(call.row_sizes) : grad.dim() == 0,
              "cece.cross_entropy_backward: grad must have the shape of the loss, got ", grad.sizes());
  TORCH_CHECK(stats.numel() == 3 * a.rows.count && total_weight.numel() == 1,
              "cece.cross_entropy_backward: stats and total_weight must be the forward's, got shapes ", stats.sizes(),
              " and ", total_weight.sizes());
  for (const Tensor* t : {&grad, &stats, &total_weight})
    check_device("cross_entropy_backward", "grad", *t, call.logits);
  std::array<Tensor, 3> held;
  int i = 0;
  for (const Tensor* t : {&grad, &stats, &total_weight}) held[i++] = contiguous_as(*t, call.acc);
  a.grad_loss = held[0].const_data_ptr();
  a.grad_stride = none ? 1 : 0;
  a.stats = data_of(held[1]);
  a.total_weight = data_of(held[2]);
  return held;
}

// ---- binary cross-entropy

struct BinaryCrossEntropyCall {
  BinaryCrossEntropyArgs args{};
  std::array<Tensor, 6> held;  // input, target, weight, pos_weight, grad_loss, grad_input
  at::ScalarType acc;
};

inline BinaryCrossEntropyCall check_binary_cross_entropy(const Tensor& input, const Tensor& target,
                                                         const MaybeTensor& weight, const MaybeTensor& pos_weight,
                                                         bool with_logits, int64_t reduction,
                                                         const Tensor* grad_loss = nullptr,
                                                         const Tensor* grad_input = nullptr) {
  const char* op = with_logits ? "binary_cross_entropy_with_logits" : "binary_cross_entropy";
  check_float(op, "input", input);
  check_device(op, "target", target, input);
  TORCH_CHECK(dtype_of(target), "cece.", op, ": target must be a float, integer or bool tensor, got ",
              target.scalar_type());
  TORCH_CHECK_VALUE(target.sizes() == input.sizes(), "cece.", op, ": Target size (", target.sizes(),
                    ") must be the same as input size (", input.sizes(), ")");
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 2, "cece.", op,
                    ": reduction must be 'none', 'mean' or 'sum', got number ", reduction);

  BinaryCrossEntropyCall call;
  call.held[0] = input;
  call.held[1] = target;
  const auto broadcast = [&](const char* name, const MaybeTensor& t) {
    if (!present(t)) return Tensor();
    check_device(op, name, *t, input);
    check_float(op, name, *t);
    bool fits = t->dim() <= input.dim();
    for (int64_t d = 1; fits && d <= t->dim(); d++) {
      fits = t->size(-d) == input.size(-d) || t->size(-d) == 1;
    }
    TORCH_CHECK(fits, "cece.", op, ": ", name, " must be broadcastable to input's shape ", input.sizes(), ", got ",
                t->sizes());
    return t->expand(input.sizes());
  };
  call.held[2] = broadcast("weight", weight);
  call.held[3] = broadcast("pos_weight", pos_weight);
  call.acc = acc_type({&input, &target, present(weight) ? &*weight : nullptr});

  BinaryCrossEntropyArgs& a = call.args;
  a.with_logits = with_logits;
  a.reduction = Reduction(reduction);
  const bool none = a.reduction == Reduction::none;
  if (grad_loss) {
    TORCH_CHECK(none ? grad_loss->sizes() == input.sizes() : grad_loss->dim() == 0, "cece.", op,
                "_backward: grad must have the shape of the loss, got ", grad_loss->sizes());
    check_device(op, "grad", *grad_loss, input);
    call.held[4] = grad_loss->scalar_type() == call.acc ? *grad_loss : grad_loss->to(call.acc);
    if (!none) a.grad_loss.data = data_of(call.held[4]);
  }
  if (grad_input) call.held[5] = *grad_input;

  Operand* operands[] = {&a.input, &a.target, &a.weight, &a.pos_weight, &a.grad_loss, &a.grad_input};
  std::vector<int64_t> dims(input.dim());
  for (int64_t d = 0; d < input.dim(); d++) dims[d] = d;
  const auto merge = [&] {
    c10::SmallVector<Strided, 6> all;
    for (int i = 0; i < 6; i++) {
      if (call.held[i].defined() && (i != 4 || none)) all.push_back({&call.held[i], operands[i]});
    }
    return merge_dims(input.sizes(), dims, all, a.shape);
  };
  if (!merge()) {
    TORCH_CHECK(!grad_input || grad_input->is_contiguous(), "cece.", op, ": input has too many dimensions");
    for (Tensor& t : call.held) {
      if (t.defined() && t.dim() == input.dim()) t = t.contiguous();
    }
    merge();
  }
  for (int i = 0; i < 6; i++) {
    if (!call.held[i].defined() || (i == 4 && !none)) continue;
    operands[i]->data = data_of(call.held[i]);
    operands[i]->dtype = *dtype_of(call.held[i]);
  }
  return call;
}

}  // namespace cece
