// The row of the kernel table for f64. One file a storage type: they compile side by side.
#include "binary_cross_entropy.cuh"
#include "cross_entropy.cuh"
#include "divergence.cuh"

namespace cece::cuda {
const Kernels kF64 = {CrossEntropy<double, CrossEntropyArgs>::kernels,
                      CrossEntropy<double, TokenStatisticsArgs>::kernels, BinaryCrossEntropyOf<double>::kernels,
                      Divergence<double>::kernels, CrossEntropy<double, TokenStatisticsArgs>::whole};
}
