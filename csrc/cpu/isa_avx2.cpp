#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#include "isa.inl"
CECE_KERNELS(kAvx2, "AVX2")
