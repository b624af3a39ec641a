// The row of the kernel table for f16. One file a storage type: they compile side by side.
#include "binary_cross_entropy.cuh"
#include "cross_entropy.cuh"

namespace cece::cuda {
const Kernels kF16 = {CrossEntropy<__half, CrossEntropyArgs>::kernels,
                      CrossEntropy<__half, TokenStatisticsArgs>::kernels, BinaryCrossEntropyOf<__half>::kernels};
}
