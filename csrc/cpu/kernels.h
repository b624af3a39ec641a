// The CPU kernels as a table: one row for each instruction set (isa_*.cpp), picked once at run time (ops.cpp).
#pragma once
#include "../args.h"

namespace cece {
template <class T>
struct RowPart;  // numerics.h, which wants its lanes first
}

namespace cece::cpu {

// Forward of cross-entropy before a row is finished; a long row is split and its parts merged in order.
using RowState = RowPart<double>;

// Work is cut the same way whatever the number of threads, so that results are bit-identical for any.
constexpr int64_t kSegment = 1 << 16;  // classes of one row that one task handles
constexpr int64_t kChunk = 1 << 14;    // elements of an elementwise loss, or rows to be summed, that one task handles

// What one thread works in beside its stack, which may be as small as 128 KiB. Kernels lay it out as they need it.
struct alignas(64) Scratch {
  char bytes[288 << 10];
};

inline int64_t segments(const CrossEntropyArgs& a) { return (a.classes + kSegment - 1) / kSegment; }

// Rows side by side when a row's classes are few or far apart, else one row at a time.
inline bool side_by_side(const CrossEntropyArgs& a) {
  const int64_t pixel_stride = a.rows.dims ? a.logits.stride[a.rows.dims - 1] : 0;
  if (a.classes >= 1 << 24) return false;  // a lane holds its class as a float
  return a.classes <= 48 || (a.logits.class_stride != 1 && pixel_stride == 1);
}

constexpr int64_t kPixels = 256;  // rows that one task handles side by side

template <class Args>
struct RowKernels {
  // tasks: (row, segment) pairs, row-major; states: one a task, null when a row is one segment
  void (*forward_rows)(const Args&, Scratch&, RowState* states, int64_t begin, int64_t end);
  void (*finish_rows)(const Args&, const RowState* states, int64_t begin, int64_t end);
  void (*backward_rows)(const Args&, Scratch&, int64_t begin, int64_t end);
  // tasks: blocks of kPixels rows along the last dimension
  void (*forward_pixels)(const Args&, Scratch&, int64_t begin, int64_t end);
  void (*backward_pixels)(const Args&, Scratch&, int64_t begin, int64_t end);
  // tasks: chunks of kChunk rows; sums: their (loss, weight) pairs. total: all of them
  void (*reduce)(const Args&, double* sums, int64_t begin, int64_t end);
  void (*total)(const Args&, const double* sums, int64_t chunks);
  // tasks: rows, each from the parts of all its shards
  void (*finish_parts)(const FinishPartsArgs&, int64_t begin, int64_t end);
};

template <class A>
struct BinaryCrossEntropyKernels {  // tasks: chunks of kChunk elements
  void (*forward)(const BinaryCrossEntropyArgs&, Scratch&, int64_t begin, int64_t end);
  void (*backward)(const BinaryCrossEntropyArgs&, Scratch&, int64_t begin, int64_t end);
};

template <class A>
struct DivergenceKernels {  // tasks: rows
  void (*forward)(const DivergenceArgs&, Scratch&, int64_t begin, int64_t end);
  void (*backward)(const DivergenceArgs&, Scratch&, int64_t begin, int64_t end);
  void (*merge)(const DivergenceArgs&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* isa;  // as at::get_cpu_capability() names it
  RowKernels<CrossEntropyArgs> cross_entropy_f32, cross_entropy_f64;
  RowKernels<TokenStatisticsArgs> token_statistics_f32, token_statistics_f64;
  BinaryCrossEntropyKernels<float> binary_cross_entropy_f32;
  BinaryCrossEntropyKernels<double> binary_cross_entropy_f64;
  DivergenceKernels<float> divergence_f32;
  DivergenceKernels<double> divergence_f64;
};
extern const Kernels kDefault, kAvx2, kAvx512;

}  // namespace cece::cpu
