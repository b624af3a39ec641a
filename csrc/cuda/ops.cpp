// The CUDA backend's tensor side: guard the device, allocate, launch on the current stream. Nothing here waits for the
// GPU. No c10/cuda header: torch's device guard and streams are reached through their virtual interfaces, so this
// compiles in 13 s instead of 69 and links against a CPU-only torch too.
//
// With CECE_EMULATE the same text makes torch.ops.cece_emulated on CPU tensors (tests/cuda_emulation).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <atomic>

#ifdef CECE_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif
#include "../check.h"
#include "kernels.h"
#include "tune.h"

namespace cece::cuda {
namespace {

#ifdef CECE_EMULATE
// As many multiprocessors as an H100 has, so that the emulator takes the paths that it would.
Device current_device(const Tensor&) {
  return {132, has_clusters(emulator::config().card_major, kF32.cross_entropy.compiled_for()), nullptr};
}
void check_launch() {}
#else
// Of the current device, asked once: its driver may have compiled the kernels from an older architecture's PTX.
int compiled_for(int index) {
  static std::array<std::atomic<int>, 128> known{};
  std::atomic<int>& mine = known[index % known.size()];
  if (mine == 0) mine = kF32.cross_entropy.compiled_for();
  return mine;
}
Device current_device(const Tensor& t) {
  const int index = t.device().index();
  int multiprocessors = 0, major = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  const c10::impl::VirtualGuardImpl guard(t.device().type());
  return {multiprocessors, has_clusters(major, compiled_for(index)), guard.getStream(t.device()).native_handle()};
}
void check_launch() {
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, "cece: CUDA could not launch a kernel: ", cudaGetErrorString(error));
}
#endif

const Kernels& kernels(at::ScalarType acc, const Tensor& input) {
  if (acc == at::kDouble) return kF64;
  return input.scalar_type() == at::kHalf ? kF16 : input.scalar_type() == at::kBFloat16 ? kBF16 : kF32;
}

// Device memory for one call. The allocator keeps it for this stream's later work, so it may be freed at once.
Tensor scratch(int64_t bytes, const Tensor& input) { return at::empty({bytes}, input.options().dtype(at::kByte)); }

// ---- cross-entropy

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         const MaybeTensor& weight, int64_t reduction,
                                                         int64_t ignore_index, double label_smoothing, bool) {
  const c10::DeviceGuard guard(logits.device());
  CrossEntropyCall call = check_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing);
  CrossEntropyOutputs out = allocate_outputs(call);
  const auto& k = kernels(call.shapes.acc, call.logits).cross_entropy;
  const Device device = current_device(logits);
  const Tensor memory = scratch(k.forward_scratch(call.args, device), logits);
  k.forward(call.args, device, memory.mutable_data_ptr());
  if (call.args.rows.count == 0 && call.args.reduction == Reduction::none) out.total_weight.fill_(1);  // no kernel ran
  check_launch();
  return {out.loss, out.stats, out.total_weight};
}

void write_gradient(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                    const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                    double label_smoothing, const Shard& shard, const Tensor& grad_logits) {
  const c10::DeviceGuard guard(logits.device());
  CrossEntropyCall call =
      check_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, &grad_logits, shard);
  const auto held = check_saved(call, grad, stats, total_weight);
  kernels(call.shapes.acc, call.logits).cross_entropy.backward(call.args, current_device(logits));
  check_launch();
  deliver(call.grad_logits, grad_logits);
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                              const Tensor& stats, const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                              double label_smoothing, CECE_SHARD_PARAMETERS) {
  Tensor grad_logits = at::empty_like(logits);
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
  const c10::DeviceGuard guard(logits.device());
  TokenStatisticsCall call = check_token_statistics(
      logits, target, weight, {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows});
  const TokenOutputs out = allocate_token_outputs(call.rows.shapes, logits, wanted);
  point_at(call.args, out);
  const auto& k = kernels(call.rows.shapes.acc, call.rows.logits).token_statistics;
  const Device device = current_device(logits);
  const Tensor memory = scratch(k.forward_scratch(call.args, device), logits);
  k.forward(call.args, device, memory.mutable_data_ptr());
  check_launch();
  return out;
}

void write_token_gradient(const TokenGrads& grads, const Tensor& logits, const MaybeTensor& target,
                          const MaybeTensor& weight, const Tensor& stats, const TokenOptions& o,
                          const Tensor& grad_logits) {
  const c10::DeviceGuard guard(logits.device());
  TokenStatisticsCall call = check_token_statistics(logits, target, weight, o, &grad_logits);
  point_at(call, target, grads, stats);
  kernels(call.rows.shapes.acc, call.rows.logits).token_statistics.backward(call.args, current_device(logits));
  check_launch();
  deliver(call.rows.grad_logits, grad_logits);
}

Tensor token_statistics_backward(const MaybeTensor& g_loss, const MaybeTensor& g_entropy,
                                 const MaybeTensor& g_logsumexp, const MaybeTensor& g_collision, const Tensor& logits,
                                 const MaybeTensor& target, const MaybeTensor& weight, const Tensor& stats,
                                 int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                                 bool skip_masked_rows, CECE_SHARD_PARAMETERS) {
  Tensor grad_logits = at::empty_like(logits);
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
  const c10::DeviceGuard guard(logits.device());
  TokenStatisticsCall call = check_token_statistics(
      logits, target, weight,
      {ignore_index, label_smoothing, logit_scale, softcap, false, {first_class, all_classes, {}}});
  const Tensor parts = point_at_parts(call, target, weight, full);
  const Kernels& k = kernels(call.rows.shapes.acc, call.rows.logits);
  const auto forward = [&](const auto& k, const auto& args) {
    const Device device = current_device(logits);
    const Tensor memory = scratch(k.forward_scratch(args, device), logits);
    k.forward(args, device, memory.mutable_data_ptr());
  };
  full ? forward(k.token_statistics, call.args)
       : forward(k.cross_entropy, static_cast<const CrossEntropyArgs&>(call.args));
  check_launch();
  return parts;
}

TokenOutputs finish_parts(const Tensor& parts, const MaybeTensor& target, int64_t ignore_index, double label_smoothing,
                          bool skip_masked_rows, int64_t all_classes, int64_t wanted) {
  const c10::DeviceGuard guard(parts.device());
  FinishPartsCall call =
      check_finish_parts(parts, target, ignore_index, label_smoothing, skip_masked_rows, all_classes, wanted);
  kernels(parts.scalar_type(), parts).finish_parts(call.args, current_device(parts));
  check_launch();
  return call.out;
}

// ---- binary cross-entropy and the other elementwise losses

Tensor binary_cross_entropy_forward(CECE_BINARY_PARAMETERS) {
  const c10::DeviceGuard guard(input.device());
  BinaryCrossEntropyCall call = check_binary_cross_entropy({CECE_BINARY_ARGUMENTS});
  BinaryCrossEntropyArgs& a = call.args;
  const Tensor loss = allocate_loss(input, call.acc, reduction);
  (a.reduction == Reduction::none ? a.loss : a.reduced) = loss.mutable_data_ptr();
  const BinaryCrossEntropyKernels& k = kernels(call.acc, input).binary_cross_entropy;
  const Tensor memory = scratch(k.forward_scratch(a), input);
  k.forward(a, current_device(input), memory.mutable_data_ptr());
  check_launch();
  return loss;
}

Tensor binary_cross_entropy_backward(const Tensor& grad, CECE_BINARY_PARAMETERS) {
  const c10::DeviceGuard guard(input.device());
  Tensor grad_input = at::empty_like(input);
  const BinaryCrossEntropyCall call = check_binary_cross_entropy({CECE_BINARY_ARGUMENTS}, &grad, &grad_input);
  kernels(call.acc, input).binary_cross_entropy.backward(call.args, current_device(input));
  check_launch();
  deliver(call.held[5], grad_input);
  return grad_input;
}

// ---- divergences of two rows. The kernels of x's type take a y of any other: a double one asks for those of double.

std::tuple<Tensor, Tensor> divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                              double temperature, bool symmetric) {
  const c10::DeviceGuard guard(x.device());
  DivergenceCall call = check_divergence(x, y, mask, temperature, symmetric);
  const DivergenceOutputs out = allocate_outputs(call.shapes, x);
  call.args.loss = out.loss.mutable_data_ptr(), call.args.stats = out.stats.mutable_data_ptr();
  kernels(call.shapes.acc, x).divergence.forward(call.args, current_device(x));
  check_launch();
  return {out.loss, out.stats};
}

std::tuple<Tensor, Tensor> divergence_merge(const Tensor& parts, double temperature) {
  const c10::DeviceGuard guard(parts.device());
  DivergenceMerge call = check_divergence_merge(parts, temperature);
  kernels(call.parts.scalar_type(), call.parts).divergence.merge(call.args, current_device(parts));
  check_launch();
  return {call.out.loss, call.out.stats};
}

Tensor divergence_backward(const Tensor& grad, const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                           const Tensor& stats, double temperature, bool symmetric, bool of_other, int64_t,
                           const std::string&) {
  const c10::DeviceGuard guard(x.device());
  const Tensor out = at::empty_like(of_other ? y : x);
  DivergenceCall call = check_divergence(x, y, mask, temperature, symmetric, &grad, &stats, &out);
  call.args.of_y = of_other;
  kernels(call.shapes.acc, x).divergence.backward(call.args, current_device(x));
  check_launch();
  deliver(call.grad, out);
  return out;
}

void register_all(torch::Library& m) {
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

}  // namespace
}  // namespace cece::cuda

#ifdef CECE_EMULATE
TORCH_LIBRARY_IMPL(cece_emulated, CPU, m) { cece::cuda::register_all(m); }
#else
TORCH_LIBRARY_IMPL(cece, CUDA, m) { cece::cuda::register_all(m); }
#endif
