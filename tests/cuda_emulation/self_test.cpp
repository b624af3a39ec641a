// Does the emulator catch what it is there to catch? A sum of a row by a block, right (bug 0) or wrong in one of the
// ways kernels go wrong. Exit status: 0 right result, 1 wrong result, 2 the emulator's error, anything else a
// sanitizer.
#include "../../csrc/cuda/runtime.cuh"

using cece::cuda::launch;

constexpr int kThreads = 64, kValues = 100;

__global__ void sum(int bug, const float* x, float* out) {
  CECE_SHARED(float, of_warp, kThreads / 32);
  CECE_SHARED(float, unset, 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float s = 0;
  const int end = bug == 1 ? kValues + 1 : kValues;  // 1: reads past the row
  for (int i = threadIdx.x; i < end; i += kThreads) s += x[blockIdx.x * kValues + i];
  for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(0xffffffffu, s, d);
  if (lane == 0) of_warp[bug == 2 ? warp + 1 : warp] = s;  // 2: writes past a shared array
  if (bug == 3) {                                          // 3: half of the block waits elsewhere
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (bug != 4) {  // 4: does not wait
    __syncthreads();
  }
  if (bug == 5 && warp == 1) {  // 5: a shuffle with lanes that have left
    if (lane > 3) return;
    s = __shfl_xor_sync(0xffffffffu, s, 1);
  }
  if (bug == 7 && lane == 0) s += __shfl_xor_sync(0xffffffffu, s, 1);  // 7: a shuffle that the others do not join
  if (threadIdx.x != 0) return;
  s = of_warp[0] + of_warp[1];
  if (bug == 6) s += unset[0];  // 6: shared memory that nobody wrote
  out[blockIdx.x] = s;
}

// The same sum by a cluster of blocks along y, each of which adds up a part.
__global__ void sum_of_cluster(int bug, const float* x, float* out) {
  CECE_SHARED(float, of_block, 1);
  const int part = kValues / int(gridDim.y);
  float s = 0;
  for (int i = 0; i < part; i++) s += x[blockIdx.x * kValues + blockIdx.y * part + i];
  if (threadIdx.x == 0) of_block[0] = s;
  if (bug != 8) cluster_sync();  // 8: does not wait for the others' parts
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    const int blocks = int(gridDim.y) + (bug == 10);  // 10: reads a block that is not there
    for (int i = 1; i < blocks; i++) s += of_block_of_cluster(of_block, i)[0];
    out[blockIdx.x] = s;
  }
  if (bug != 9) cluster_sync();  // 9: blocks leave before they are read
}

int main(int argc, char** argv) {
  const int bug = argc > 1 ? std::atoi(argv[1]) : 0, order = argc > 2 ? std::atoi(argv[2]) : 1;
  emulator::config().order = order == 0    ? emulator::Order::forward
                             : order == -1 ? emulator::Order::reverse
                                           : emulator::Order::random;
  emulator::config().seed = uint64_t(order);
  constexpr int kBlocks = 4;
  std::vector<float> x(kBlocks * kValues, 1.f), out(kBlocks, -1.f);
  x.shrink_to_fit();
  try {
    const float* const values = x.data();
    launch(sum, dim3(kBlocks), kThreads, nullptr, 1, bug, values, out.data());
    if (bug == 0 || bug >= 8) {
      emulator::config().card_major = 9, emulator::config().compiled_for = 90;
      launch(sum_of_cluster, dim3(kBlocks, 4), kThreads, nullptr, 4, bug, values, out.data());
    }
  } catch (const emulator::Error& e) {
    std::puts(e.what());
    return 2;
  }
  for (const float s : out) {
    if (!(s == kValues)) return std::printf("got %g, want %d\n", double(s), kValues), 1;
  }
  return 0;
}
