// The CPU backend's tensor side: pick the ISA, allocate, cut the work into tasks.
#include <ATen/EmptyTensor.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include "../check.h"
#include "../module.h"
#include "kernels.h"
#include "memory.h"
#include "pages.h"

namespace cece {
namespace cpu {
namespace {

// Most capable first. at::get_cpu_capability() honours ATEN_CPU_CAPABILITY, so cece always agrees with torch.
const Kernels* const kIsas[] = {
#ifdef CECE_X86
    &kAvx512, &kAvx2,
#endif
    &kDefault};

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const std::string capability = at::get_cpu_capability();
    for (const Kernels* k : kIsas) {
      if (capability == k->isa) return k;
    }
    return &kDefault;
  }();
  return *chosen;
}

// task(begin, end) on torch's threads, at least `grain` tasks each. The C shim and not at::parallel_for, which is
// a template that would need an OpenMP of our own.
template <class F>
void parallel(int64_t tasks, int64_t grain, F&& task) {
  if (tasks <= grain) {
    if (tasks > 0) task(int64_t(0), tasks);
    return;
  }
  const auto call = [](int64_t begin, int64_t end, void* f) { (*static_cast<F*>(f))(begin, end); };
  TORCH_CHECK(torch_parallel_for(0, tasks, grain, call, const_cast<void*>(static_cast<const void*>(&task))) == 0,
              "cece: parallel loop failed");
}
// This thread's; allocating it anew for each call would cost a small loss its speed.
Scratch& scratch() {
  static thread_local const std::unique_ptr<Scratch> memory = std::make_unique_for_overwrite<Scratch>();
  return *memory;
}
constexpr int64_t kWorthAThread = 1 << 14;  // elements
int64_t grain(int64_t elements_per_task) {
  return std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, elements_per_task));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for gradients: large ones from pages.h. Where the system has none left, what is kept there is let go first.
// resize_ and untyped_storage().resize_() of a gradient come here again.
struct GradientAllocator final : c10::Allocator {
  static void free(void* start) {
    const size_t bytes = Pages::global().give_back(start);
    c10::reportMemoryUsageToProfiler(start, -int64_t(bytes), 0, 0, c10::Device(c10::kCPU));
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* const start = bytes < Pages::kLeast ? nullptr : Pages::global().take(bytes);
    if (!start) return c10::GetCPUAllocator()->allocate(bytes);
    c10::reportMemoryUsageToProfiler(start, int64_t(bytes), 0, bytes, c10::Device(c10::kCPU));
    return {start, start, &free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

GradientAllocator& gradient_allocator() {
  static GradientAllocator& allocator = *new GradientAllocator;  // never destroyed: tensors may outlive it
  return allocator;
}
Tensor empty_gradient(const Tensor& like) {
  if (size_t(like.numel()) * like.element_size() < Pages::kLeast) return at::empty_like(like);
  const Tensor plain = at::empty_like(like, like.options().device(c10::kMeta));  // its strides
  return at::detail::empty_strided_generic(plain.sizes(), plain.strides(), &gradient_allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type());
}

template <class F>
void visit_acc(at::ScalarType acc, F&& f) {  // f(kernels of cross-entropy, of token statistics, of the binary losses)
  const Kernels& k = kernels();
  acc == at::kDouble ? f(k.cross_entropy_f64, k.token_statistics_f64, k.binary_cross_entropy_f64)
                     : f(k.cross_entropy_f32, k.token_statistics_f32, k.binary_cross_entropy_f32);
}

// ---- cross-entropy

int64_t pixel_tasks(const CrossEntropyArgs& a) {
  const int64_t inner = a.rows.dims ? a.rows.size[a.rows.dims - 1] : 1;
  return inner ? a.rows.count / inner * ceil_div(inner, kPixels) : 0;
}

// Every row's statistics and loss.
template <class Args>
void forward_rows(const RowKernels<Args>& k, const Args& a) {
  if (side_by_side(a)) {
    return parallel(pixel_tasks(a), grain(std::min(a.rows.count, kPixels) * a.classes),
                    [&](int64_t b, int64_t e) { k.forward_pixels(a, scratch(), b, e); });
  }
  const int64_t parts = segments(a), cost = std::min(a.classes, kSegment);
  std::vector<RowState> states(parts > 1 ? a.rows.count * parts : 0);
  RowState* const s = parts > 1 ? states.data() : nullptr;
  parallel(a.rows.count * parts, grain(cost), [&](int64_t b, int64_t e) { k.forward_rows(a, scratch(), s, b, e); });
  if (s) k.finish_rows(a, s, 0, a.rows.count);
}
template <class Args>
void backward_rows(const RowKernels<Args>& k, const Args& a) {
  if (side_by_side(a)) {
    return parallel(pixel_tasks(a), grain(std::min(a.rows.count, kPixels) * a.classes),
                    [&](int64_t b, int64_t e) { k.backward_pixels(a, scratch(), b, e); });
  }
  parallel(a.rows.count * segments(a), grain(std::min(a.classes, kSegment)),
           [&](int64_t b, int64_t e) { k.backward_rows(a, scratch(), b, e); });
}

void raise_bad_label(const CrossEntropyCall& call, int64_t row) {
  const Tensor labels = call.target.reshape({-1});
  const int64_t label = labels[row].item<int64_t>();
  const auto sizes = C10_AS_INTARRAYREF_SLOW(call.shapes.rows);
  TORCH_CHECK_INDEX(false, "cece.cross_entropy: Target ", label, " is out of bounds: target",
                    position(sizes, logical_order(sizes.size()), row), " must be in [0, ", call.args.all_classes,
                    ") or equal ignore_index (", call.args.ignore_index, "), got ", label);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         const MaybeTensor& weight, int64_t reduction,
                                                         int64_t ignore_index, double label_smoothing, bool) {
  CrossEntropyCall call = check_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing);
  CrossEntropyArgs& a = call.args;
  CrossEntropyOutputs out = allocate_outputs(call);
  int64_t bad_row = a.rows.count;
  a.bad_row = &bad_row;
  visit_acc(call.shapes.acc, [&](const auto& k, const auto&, const auto&) {
    forward_rows(k, a);
    if (bad_row < a.rows.count) raise_bad_label(call, bad_row);
    if (a.reduction != Reduction::none) {
      const int64_t chunks = ceil_div(a.rows.count, kChunk);
      std::vector<double> sums(2 * chunks);
      parallel(chunks, 1, [&](int64_t b, int64_t e) { k.reduce(a, sums.data(), b, e); });
      k.total(a, sums.data(), chunks);
    } else {
      out.total_weight.fill_(1);
    }
  });
  return {out.loss, out.stats, out.total_weight};
}

void write_gradient(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                    const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                    double label_smoothing, const Shard& shard, const Tensor& grad_logits) {
  CrossEntropyCall call =
      check_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, &grad_logits, shard);
  const auto held = check_saved(call, grad, stats, total_weight);
  const CrossEntropyArgs& a = call.args;
  visit_acc(call.shapes.acc, [&](const auto& k, const auto&, const auto&) { backward_rows(k, a); });
  deliver(call.grad_logits, grad_logits);
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                              const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                              double label_smoothing, CECE_SHARD_PARAMETERS) {
  Tensor grad_logits = empty_gradient(logits);
  write_gradient(grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing,
                 CECE_SHARD, grad_logits);
  return grad_logits;
}

void cross_entropy_backward_(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                             const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                             double label_smoothing, CECE_SHARD_PARAMETERS) {
  write_gradient(grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing,
                 CECE_SHARD, logits);
}

// ---- all statistics of a row

TokenOutputs token_statistics_forward(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight,
                                      int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                                      bool skip_masked_rows, int64_t wanted) {
  TokenStatisticsCall call = check_token_statistics(
      logits, target, weight, {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows});
  TokenStatisticsArgs& a = call.args;
  const TokenOutputs out = allocate_token_outputs(call.rows.shapes, logits, wanted);
  point_at(a, out);
  int64_t bad_row = a.rows.count;
  a.bad_row = &bad_row;
  visit_acc(call.rows.shapes.acc, [&](const auto&, const auto& k, const auto&) { forward_rows(k, a); });
  if (bad_row < a.rows.count) raise_bad_label(call.rows, bad_row);
  return out;
}

void write_token_gradient(const TokenGrads& grads, const Tensor& logits, const MaybeTensor& target,
                          const MaybeTensor& weight, const Tensor& stats, const TokenOptions& o,
                          const Tensor& grad_logits) {
  TokenStatisticsCall call = check_token_statistics(logits, target, weight, o, &grad_logits);
  point_at(call, target, grads, stats);
  visit_acc(call.rows.shapes.acc, [&](const auto&, const auto& k, const auto&) { backward_rows(k, call.args); });
  deliver(call.rows.grad_logits, grad_logits);
}

Tensor token_statistics_backward(const MaybeTensor& g_loss, const MaybeTensor& g_entropy,
                                 const MaybeTensor& g_logsumexp, const MaybeTensor& g_collision, const Tensor& logits,
                                 const MaybeTensor& target, const MaybeTensor& weight, const Tensor& stats,
                                 int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                                 bool skip_masked_rows, CECE_SHARD_PARAMETERS) {
  Tensor grad_logits = empty_gradient(logits);
  write_token_gradient({g_loss, g_entropy, g_logsumexp, g_collision}, logits, target, weight, stats,
                       {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD},
                       grad_logits);
  return grad_logits;
}

void token_statistics_backward_(const MaybeTensor& g_loss, const MaybeTensor& g_entropy, const MaybeTensor& g_logsumexp,
                                const MaybeTensor& g_collision, const Tensor& logits, const MaybeTensor& target,
                                const MaybeTensor& weight, const Tensor& stats, int64_t ignore_index,
                                double label_smoothing, double logit_scale, double softcap, bool skip_masked_rows,
                                CECE_SHARD_PARAMETERS) {
  write_token_gradient({g_loss, g_entropy, g_logsumexp, g_collision}, logits, target, weight, stats,
                       {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD}, logits);
}

// ---- a row in parts

Tensor row_parts(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight, int64_t ignore_index,
                 double label_smoothing, double logit_scale, double softcap, int64_t first_class, int64_t all_classes,
                 bool full) {
  TokenStatisticsCall call = check_token_statistics(
      logits, target, weight,
      {ignore_index, label_smoothing, logit_scale, softcap, false, {first_class, all_classes, {}}});
  const Tensor parts = point_at_parts(call, target, weight, full);
  int64_t bad_row = call.args.rows.count;
  call.args.bad_row = &bad_row;
  visit_acc(call.rows.shapes.acc, [&](const auto& plain, const auto& all, const auto&) {
    full ? forward_rows(all, call.args) : forward_rows<CrossEntropyArgs>(plain, call.args);
  });
  if (bad_row < call.args.rows.count) raise_bad_label(call.rows, bad_row);
  return parts;
}

TokenOutputs finish_parts(const Tensor& parts, const MaybeTensor& target, int64_t ignore_index, double label_smoothing,
                          bool skip_masked_rows, int64_t all_classes, int64_t wanted) {
  FinishPartsCall call =
      check_finish_parts(parts, target, ignore_index, label_smoothing, skip_masked_rows, all_classes, wanted);
  int64_t bad_row = call.args.rows.count;  // its labels were looked at as its parts were made: it is NaN
  call.args.bad_row = &bad_row;
  visit_acc(parts.scalar_type(), [&](const auto&, const auto& k, const auto&) {
    parallel(call.args.rows.count, grain(call.args.ranks * call.args.part_numbers),
             [&](int64_t b, int64_t e) { k.finish_parts(call.args, b, e); });
  });
  return call.out;
}

// ---- binary cross-entropy and the other elementwise losses

void raise_no_probability(const BinaryCrossEntropyCall& call, const Tensor& input, const Tensor& target, int64_t bad) {
  const auto at = [&](const Tensor& t) { return t.permute(call.dims).reshape({-1})[bad]; };
  const auto number = [](const Tensor& one) {
    return one.scalar_type() == at::kDouble ? digits(one.item<double>()) : digits(one.item<float>());
  };
  const double x = at(input).item<double>();
  const bool is_input = !(x >= 0 && x <= 1);
  const char* name = is_input ? "input" : "target";
  TORCH_CHECK(false, "cece.binary_cross_entropy: all elements of ", name, " should be between 0 and 1, got ", name,
              position(input.sizes(), call.dims, bad), " = ", number(at(is_input ? input : target)),
              is_input ? "; for logits use binary_cross_entropy_with_logits, this loss applies no sigmoid" : "");
}
void raise_no_class(const Tensor& labels, const ListedTruth& listed, int64_t bad) {
  const int64_t label = labels.reshape({-1})[bad].item<int64_t>();
  TORCH_CHECK_INDEX(false, "cece.multilabel_cross_entropy: Label ", label, " is out of bounds: labels",
                    position(labels.sizes(), logical_order(labels.dim()), bad), " must be in [0, ", listed.classes,
                    ") or equal ignore_index (", listed.padding, "), got ", label);
}

void check_offsets(const ListedTruth& listed, int64_t rows) {
  const int64_t* const at = listed.offsets;
  if (!at) return;
  bool good = at[0] == 0 && at[rows] == listed.count;
  for (int64_t row = 0; row < rows; row++) good = good && at[row] <= at[row + 1];
  TORCH_CHECK_VALUE(good, "cece.multilabel_cross_entropy: offsets must go up from 0 to the number of labels, ",
                    listed.count, ", got ", at::IntArrayRef(at, rows + 1));
}

Tensor binary_cross_entropy_forward(CECE_BINARY_PARAMETERS) {
  BinaryCrossEntropyCall call = check_binary_cross_entropy({CECE_BINARY_ARGUMENTS});
  BinaryCrossEntropyArgs& a = call.args;
  if (padding) check_offsets(a.listed, input.size(0));
  const bool none = a.reduction == Reduction::none;
  const Tensor loss = allocate_loss(input, call.acc, reduction);
  const int64_t chunks = ceil_div(a.shape.count, kChunk);
  std::vector<double> partial(none ? 0 : 2 * chunks);
  if (none) {
    a.loss = loss.mutable_data_ptr();
  } else {
    a.partial = partial.data();
  }
  constexpr int64_t kFine = std::numeric_limits<int64_t>::max();
  int64_t bad = kFine;
  a.bad = &bad;
  visit_acc(call.acc, [&](const auto&, const auto&, const auto& k) {
    parallel(chunks, 1, [&](int64_t b, int64_t e) { k.forward(a, scratch(), b, e); });
  });
  if (bad < kFine) padding ? raise_no_class(target, a.listed, bad) : raise_no_probability(call, input, target, bad);
  if (!none) {
    double total = 0, count = 0;
    for (int64_t i = 0; i < chunks; i++) total += partial[2 * i], count += partial[2 * i + 1];
    if (a.reduction == Reduction::counted) {
      loss[0].fill_(total);
      loss[1].fill_(count);
    } else {
      loss.fill_(a.reduction == Reduction::mean ? total / double(a.shape.count) : total);
    }
  }
  return loss;
}

Tensor binary_cross_entropy_backward(const Tensor& grad, CECE_BINARY_PARAMETERS) {
  Tensor grad_input = empty_gradient(input);
  const BinaryCrossEntropyCall call = check_binary_cross_entropy({CECE_BINARY_ARGUMENTS}, &grad, &grad_input);
  const BinaryCrossEntropyArgs& a = call.args;
  if (padding) check_offsets(a.listed, input.size(0));
  visit_acc(call.acc, [&](const auto&, const auto&, const auto& k) {
    parallel(ceil_div(a.shape.count, kChunk), 1, [&](int64_t b, int64_t e) { k.backward(a, scratch(), b, e); });
  });
  deliver(call.held[5], grad_input);
  return grad_input;
}

// ---- divergences of two rows

// A row is one task, however long: its two passes then meet it in the same cache. A row alone is one thread's work.
std::tuple<Tensor, Tensor> divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                              double temperature, bool symmetric) {
  DivergenceCall call = check_divergence(x, y, mask, temperature, symmetric);
  DivergenceArgs& a = call.args;
  const DivergenceOutputs out = allocate_outputs(call.shapes, x);
  a.loss = out.loss.mutable_data_ptr(), a.stats = out.stats.mutable_data_ptr();
  const auto run = [&](const auto& k) {
    parallel(a.rows.count, grain(a.classes), [&](int64_t b, int64_t e) { k.forward(a, scratch(), b, e); });
  };
  call.shapes.acc == at::kDouble ? run(kernels().divergence_f64) : run(kernels().divergence_f32);
  return {out.loss, out.stats};
}

std::tuple<Tensor, Tensor> divergence_merge(const Tensor& parts, double temperature) {
  DivergenceMerge call = check_divergence_merge(parts, temperature);
  const auto run = [&](const auto& k) {
    parallel(call.args.rows.count, 256, [&](int64_t b, int64_t e) { k.merge(call.args, b, e); });
  };
  call.parts.scalar_type() == at::kDouble ? run(kernels().divergence_f64) : run(kernels().divergence_f32);
  return {call.out.loss, call.out.stats};
}

Tensor divergence_backward(const Tensor& grad, const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                           const Tensor& stats, double temperature, bool symmetric, bool of_other, int64_t,
                           const std::string&) {
  const Tensor out = empty_gradient(of_other ? y : x);
  DivergenceCall call = check_divergence(x, y, mask, temperature, symmetric, &grad, &stats, &out);
  DivergenceArgs& a = call.args;
  a.of_y = of_other;
  const auto run = [&](const auto& k) {
    parallel(a.rows.count, grain(a.classes), [&](int64_t b, int64_t e) { k.backward(a, scratch(), b, e); });
  };
  call.shapes.acc == at::kDouble ? run(kernels().divergence_f64) : run(kernels().divergence_f32);
  deliver(call.grad, out);
  return out;
}

}  // namespace

Tensor empty_gradient(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_generic(sizes, &gradient_allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU), type,
                                   std::nullopt);
}

}  // namespace cpu

void empty_cache() { cpu::Pages::global().drop(); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::kIsas) names.push_back(k->isa);
  return names;
}
std::string cpu_isa() { return cpu::kernels().isa; }

}  // namespace cece

TORCH_LIBRARY_IMPL(cece, CPU, m) {
  using namespace cece::cpu;
  m.impl("cross_entropy_forward", cross_entropy_forward);
  m.impl("cross_entropy_backward", cross_entropy_backward);
  m.impl("cross_entropy_backward_", cross_entropy_backward_);
  m.impl("token_statistics_forward", token_statistics_forward);
  m.impl("token_statistics_backward", token_statistics_backward);
  m.impl("row_parts", row_parts);
  m.impl("finish_parts", finish_parts);
  m.impl("token_statistics_backward_", token_statistics_backward_);
  m.impl("binary_cross_entropy_forward", binary_cross_entropy_forward);
  m.impl("binary_cross_entropy_backward", binary_cross_entropy_backward);
  m.impl("divergence_forward", divergence_forward);
  m.impl("divergence_merge", divergence_merge);
  m.impl("divergence_backward", divergence_backward);
}
