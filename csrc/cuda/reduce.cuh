// States of several threads merged into one, always in the same order: in a warp by shuffles, in a block through
// shared memory. A State has merge(const State&), and State() is the empty one.
#pragma once
#include "runtime.cuh"
#include "tune.h"

namespace cece::cuda {

// Shared memory may not have constructors, a State does.
template <class State>
struct alignas(alignof(State)) Slot {
  unsigned char bytes[sizeof(State)];
  __device__ __forceinline__ void put(const State& s) { *reinterpret_cast<State*>(bytes) = s; }
  __device__ __forceinline__ State get() const { return *reinterpret_cast<const State*>(bytes); }
};

template <class State>
__device__ __forceinline__ State shuffle_xor(const State& s, int distance) {
  static_assert(sizeof(State) % 4 == 0, "shuffles move words of 4 bytes");
  constexpr int kWords = sizeof(State) / 4;
  union Words {
    __device__ Words() {}
    State state;
    uint32_t word[kWords];
  } w;
  w.state = s;
#pragma unroll
  for (int i = 0; i < kWords; i++) w.word[i] = __shfl_xor_sync(0xffffffffu, w.word[i], distance);
  return w.state;
}

template <class State>
__device__ __forceinline__ State merge_lanes(State s, int lanes) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if (distance < lanes) s.merge(shuffle_xor(s, distance));
  }
  return s;
}

// Whether this thread is the first of its `lanes` neighbours of which `is` holds.
__device__ __forceinline__ bool first_of_lanes(bool is, int lanes) {
  const int lane = threadIdx.x % 32;
  const uint32_t before = __ballot_sync(0xffffffffu, is) & ((1u << lane) - 1);
  return is && before >> (lane & -lanes) == 0;
}

// N numbers that are added up, and one of which the greatest goes on.
template <class A, int N>
struct Shares {
  A v[N];
  __device__ __forceinline__ void merge(const Shares& o) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += o.v[i];
  }
};
template <class A>
struct Greatest {
  A v;
  __device__ __forceinline__ void merge(const Greatest& o) { v = greatest(o.v, v); }
};

// The states of `lanes` neighbouring threads merged, lanes a power of two; its first thread has the result. More than
// 32 lanes are the whole block. To be called by all threads of the block, once in a kernel.
template <class State>
__device__ __forceinline__ State merge_group(State s, int lanes) {
  s = merge_lanes(s, lanes < 32 ? lanes : 32);
  if (lanes <= 32) return s;
  CECE_SHARED(Slot<State>, of_warp, kMaxThreads / 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) of_warp[warp].put(s);
  __syncthreads();
  return merge_lanes(lane < lanes / 32 ? of_warp[lane].get() : State(), lanes / 32);
}

// The same over the blocks of a cluster along y, whose first thread each has its block's state: the first of all has
// the result. It is read through distributed shared memory, without the second kernel that other GPUs need.
template <class State>
__device__ __forceinline__ State merge_cluster(State s) {
  if (!clusters_compiled()) return s;
  CECE_SHARED(Slot<State>, of_block, 1);
  if (threadIdx.x == 0) of_block[0].put(s);
  cluster_sync();
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    for (int i = 1; i < int(gridDim.y); i++) s.merge(of_block_of_cluster(of_block, i)->get());
  }
  cluster_sync();  // no block leaves while its shared memory is read
  return s;
}

struct Sums {  // two sums of many numbers
  double a = 0, b = 0;
  __device__ __forceinline__ void merge(const Sums& o) { a += o.a, b += o.b; }
};

}  // namespace cece::cuda
