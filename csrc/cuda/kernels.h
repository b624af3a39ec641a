// The CUDA kernels as a table: one row for each storage type of the logits (*.cu), picked by ops.cpp. No CUDA header
// but for the stream's type, which is a pointer.
#pragma once
#include "../args.h"

namespace cece::cuda {

struct Device {
  int multiprocessors;
  bool clusters;  // tune.h: has_clusters
  void* stream;   // a cudaStream_t
};

// Each function only launches. `scratch` is device memory of at least the size its _scratch function asks for.
template <class Args>
struct RowKernels {
  int (*compiled_for)();  // the architecture that the current device's code comes from, 90 for sm_90
  int64_t (*forward_scratch)(const Args&, const Device&);  // bytes
  void (*forward)(const Args&, const Device&, void* scratch);
  void (*backward)(const Args&, const Device&);
};
struct BinaryCrossEntropyKernels {
  int64_t (*forward_scratch)(const BinaryCrossEntropyArgs&);  // bytes
  void (*forward)(const BinaryCrossEntropyArgs&, const Device&, void* scratch);
  void (*backward)(const BinaryCrossEntropyArgs&, const Device&);
};
struct DivergenceKernels {
  void (*forward)(const DivergenceArgs&, const Device&);
  void (*backward)(const DivergenceArgs&, const Device&);
  void (*merge)(const DivergenceArgs&, const Device&);  // null where sums are not formed in the storage type
};
struct Kernels {
  RowKernels<CrossEntropyArgs> cross_entropy;
  RowKernels<TokenStatisticsArgs> token_statistics;
  BinaryCrossEntropyKernels binary_cross_entropy;
  DivergenceKernels divergence;
  void (*finish_parts)(const FinishPartsArgs&, const Device&);
};

// kF64 takes input of any type: what it sums in is double, as when the target is.
extern const Kernels kF64, kF32, kF16, kBF16;

}  // namespace cece::cuda
