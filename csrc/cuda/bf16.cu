// The row of the kernel table for bf16. One file a storage type: they compile side by side.
#include "binary_cross_entropy.cuh"
#include "cross_entropy.cuh"

namespace cece::cuda {
const Kernels kBF16 = {CrossEntropy<__nv_bfloat16, CrossEntropyArgs>::kernels,
                       CrossEntropy<__nv_bfloat16, TokenStatisticsArgs>::kernels,
                       BinaryCrossEntropyOf<__nv_bfloat16>::kernels};
}
