// The row of the kernel table for f32. One file a storage type: they compile side by side.
#include "binary_cross_entropy.cuh"
#include "cross_entropy.cuh"
#include "divergence.cuh"

namespace cece::cuda {
const Kernels kF32 = {CrossEntropy<float, CrossEntropyArgs>::kernels, CrossEntropy<float, TokenStatisticsArgs>::kernels,
                      BinaryCrossEntropyOf<float>::kernels, Divergence<float>::kernels,
                      CrossEntropy<float, TokenStatisticsArgs>::whole};
}
