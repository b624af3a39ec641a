// The one file that knows who compiles the kernels: nvcc, or a C++ compiler with the emulator of the tests
// (tests/cuda_emulation/emulator.h, -DCECE_EMULATE). Every other .cuh is the same text for both.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef CECE_EMULATE
#include "emulator.h"
// A block's array in shared memory. The emulator leaves plain __shared__ undefined, so forgetting this cannot compile.
#define CECE_SHARED(T, name, n)     \
  static const char name##_key = 0; \
  T(&name)[n] = *reinterpret_cast<T(*)[n]>(::emulator::shared_array(&name##_key, sizeof(T) * (n), alignof(T)))
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CECE_SHARED(T, name, n) __shared__ T name[n]
#endif

#include "../numerics.h"

namespace cece::cuda {

#ifdef CECE_EMULATE
using ::emulator::expect_aligned;
using ::emulator::launch;
template <class Kernel>
int compiled_for(Kernel*) {
  return ::emulator::config().compiled_for;
}
#else
__device__ __forceinline__ void expect_aligned(const void*, size_t) {}  // the hardware stops there by itself
// The architecture of the PTX that a kernel's code on the current device comes from; 0 where there is none.
template <class Kernel>
int compiled_for(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.ptxVersion : 0;
}
// The blocks along y that a launch made a cluster: whether this code has any, a barrier of all their threads, and the
// place in the shared memory of block `rank` that `p` is in this block's. The emulator's are macros of the same names.
__device__ __forceinline__ constexpr bool clusters_compiled() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <class T>
__device__ __forceinline__ T* of_block_of_cluster(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#else
__device__ __forceinline__ void cluster_sync() {}
template <class T>
__device__ __forceinline__ T* of_block_of_cluster(T* p, int) {
  return p;
}
#endif
// cluster: how many blocks along y form a cluster (sm_90 and later), else 1.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, cudaStream_t stream, int cluster, A&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {1, unsigned(cluster), 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);  // an error shows in cudaGetLastError
}
#endif

__device__ __forceinline__ float as_float(uint32_t bits) {
#ifdef CECE_EMULATE
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#else
  return __uint_as_float(bits);
#endif
}

// x as if it came to be here: what is computed of it is not moved up to where it was loaded, and does not wait there.
template <class T>
__device__ __forceinline__ void use_from_here(T& x) {
#ifndef CECE_EMULATE
  if constexpr (std::is_same_v<T, int32_t>) asm volatile("" : "+r"(x));
  if constexpr (std::is_same_v<T, float>) asm volatile("" : "+f"(x));
  if constexpr (std::is_same_v<T, double>) asm volatile("" : "+d"(x));
#endif
}

// a / b, at most 2 ULP from it, without the branch that an exact division takes around subnormals.
__device__ __forceinline__ double divided(double a, double b) { return a / b; }
__device__ __forceinline__ float divided(float a, float b) {
#ifdef CECE_EMULATE
  return ::emulator::perturbed(a, a / b, 2);
#else
  float q;
  asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(a), "f"(b));
  return q;
#endif
}

// 2^x for x <= 0 in one instruction, results below 2^-126 as 0. Relative error at most 2^-22.
__device__ __forceinline__ float exp2_flushed(float x) {
#ifdef CECE_EMULATE
  const float y = ::emulator::perturbed(x, ::exp2f(x), 2);
  return y < 0x1p-126f ? 0.f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace cece::cuda
