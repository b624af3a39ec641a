// One row of the ISA table, made by the isa_*.cpp that includes this under its own compiler flags.
#include <algorithm>

#include "binary_cross_entropy.inl"
#include "cross_entropy.inl"
#include "divergence.inl"

#define CECE_KERNELS(NAME, ISA)                                \
  namespace cece::cpu {                                        \
  const Kernels NAME = {ISA,                                   \
                        CrossEntropy<float>::kernels,          \
                        CrossEntropy<double>::kernels,         \
                        BinaryCrossEntropyOf<float>::kernels,  \
                        BinaryCrossEntropyOf<double>::kernels, \
                        Divergence<float>::kernels,            \
                        Divergence<double>::kernels};          \
  }
