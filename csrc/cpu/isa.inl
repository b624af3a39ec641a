// One row of the ISA table, made by the isa_*.cpp that includes this under its own compiler flags.
#include <algorithm>

#include "binary_cross_entropy.inl"
#include "cross_entropy.inl"

#define CECE_KERNELS(NAME, ISA)                                             \
  namespace cece::cpu {                                                     \
  const Kernels NAME = {ISA,                                                \
                        CrossEntropy<float, CrossEntropyArgs>::kernels,     \
                        CrossEntropy<double, CrossEntropyArgs>::kernels,    \
                        CrossEntropy<float, TokenStatisticsArgs>::kernels,  \
                        CrossEntropy<double, TokenStatisticsArgs>::kernels, \
                        BinaryCrossEntropyOf<float>::kernels,               \
                        BinaryCrossEntropyOf<double>::kernels};             \
  }
