// How a call is spread over the GPU: the launch table and the rules around it. No CUDA here: plain numbers.
//
// What a forward or backward must move is all that counts (an H200 does about 17 float operations for every byte it
// moves), so the table serves one aim: enough bytes in flight. Little's law, 4.8 TB/s x 0.7 us = 3.4 MB, asks for
// 26 KB on each of 132 multiprocessors; kPacks x 16 bytes a thread at 768 resident threads make 48 KB.
//
// Expected bytes for N rows of C classes, S bytes an element, A bytes an Acc (4, or 8 for float64):
//   forward   N (C S + 8 + 4 A)     logits once; label; max, log_sum, mass and loss written. Soft targets: + N C S_t
//   backward  N (2 C S + 8 + 4 A)   logits once, gradient once; label; statistics and incoming gradient read
//   reduce    N A (+ N 8 for a weighted mean)
//   binary    forward n (S_x + S_y), backward n (2 S_x + S_y); + n A where reduction is none
// One read and one read + write of the logits in all: three passes.
//
// Registers (nvcc 13.0; the worst of the kernels for a label, with smoothing, with probabilities; no spills anywhere):
//   see the table in tests/test_cuda_build.py, which holds every kernel to it.
#pragma once
#include <cstdint>

#include "../args.h"

namespace cece::cuda {

constexpr int kMaxThreads = 256;  // a block's
constexpr int kMinBlocks = 3;     // of them on a multiprocessor: 768 threads, which may have 80 registers each
constexpr int kFinishThreads = 128;
constexpr int kPacks = 4;  // 16-byte loads a thread has in flight

// ---- a row at a time

struct RowLaunch {
  int64_t max_bytes;  // of a row's logits
  int lanes;          // threads a row: a power of two; more than 32 are a block
  int threads;        // a block
};
constexpr RowLaunch kRowLaunches[] = {
    {16, 1, 128},       // one pack: nothing to merge
    {64, 4, 128},       // a pack a lane: neighbouring lanes read neighbouring packs, 64 bytes of a row together
    {256, 4, 128},      // kPacks each from here on: log2(lanes) merges of about 20 instructions a row, and each
    {512, 8, 128},      //   merge costs as much as 2 elements, so few lanes with much to read
    {1024, 16, 128},    // float32 C = 256: 4 packs a lane, 4 merges
    {8192, 32, 128},    // a warp a row, no barrier
    {32768, 128, 128},  // a block a row: 4 packs or more a thread
    {INT64_MAX, kMaxThreads, kMaxThreads},
};
inline RowLaunch row_launch(int64_t bytes) {
  const RowLaunch* row = kRowLaunches;
  while (bytes > row->max_bytes) row++;
  return *row;
}

// Blocks that share a wide row: as many as make so many blocks for each multiprocessor, every one of at least two
// rounds of loads. Forward asks for those that run at once, since parts of a row must be merged: up to kMaxCluster of
// them are a cluster where the GPU has clusters (one launch instead of two); 8 is what every such GPU can place.
// Backward merges nothing and asks for 8 times what runs at once, so that the last blocks, which leave much of the GPU
// idle, are few: 600 rows of 128k classes are 1.1 waves of blocks and take as long as 2; cut in 7, 7.9 and 8.
constexpr int kForwardBlocks = kMinBlocks, kBackwardBlocks = 8 * 4;
constexpr int64_t kPartBytes = 2 * kMaxThreads * kPacks * 16;
constexpr int kMaxCluster = 8, kMaxParts = 1024;

// Whether merge_cluster is in the code: what a driver makes of an older card's PTX has none, however new the card.
inline bool has_clusters(int card_major, int compiled_for) { return card_major >= 9 && compiled_for >= 90; }

inline int row_parts(int64_t rows, int64_t bytes, int64_t blocks) {
  if (rows == 0 || row_launch(bytes).lanes < kMaxThreads) return 1;
  const int64_t wanted = blocks / rows, useful = bytes / kPartBytes;
  const int64_t parts = wanted < useful ? wanted : useful;
  return int(parts < 1 ? 1 : parts > kMaxParts ? kMaxParts : parts);
}
// ---- pixels across threads: classes far apart, rows side by side

constexpr int kPixelThreads = 256;
constexpr int kUnroll = 8;    // classes a thread has in flight
constexpr int kGroup = 1024;  // classes summed in one go: keeps a float sum of very many classes accurate

inline bool pixels_across_threads(const CrossEntropyArgs& a) {
  const int64_t pixel_stride = a.rows.dims ? a.logits.stride[a.rows.dims - 1] : 0;
  return a.classes > 1 && a.logits.class_stride != 1 && pixel_stride == 1;
}
// Threads that share a pixel: more when pixels are few. 32 pixels stay together, for 64 to 128 bytes of a class.
inline int pixel_slices(int64_t pixels, int64_t classes, int multiprocessors) {
  int slices = 1;
  while (slices < kPixelThreads / 32 && slices * kUnroll < classes &&
         pixels * slices < int64_t(multiprocessors) * 1024) {
    slices *= 2;
  }
  return slices;
}

// ---- sums and elementwise losses. The grid depends on the size alone, so results are the same on every GPU.

constexpr int kSumThreads = 256, kMaxSumBlocks = 1024;
constexpr int64_t kSumPerThread = 8;
inline int sum_blocks(int64_t n) {
  const int64_t blocks = (n + kSumThreads * kSumPerThread - 1) / (kSumThreads * kSumPerThread);
  return int(blocks < 1 ? 1 : blocks > kMaxSumBlocks ? kMaxSumBlocks : blocks);
}
constexpr int kElementThreads = 256, kMaxElementBlocks = 4096;  // several waves on any GPU
inline int element_blocks(int64_t n, int per_thread) {
  const int64_t per_block = int64_t(kElementThreads) * per_thread, blocks = (n + per_block - 1) / per_block;
  return int(blocks < 1 ? 1 : blocks > kMaxElementBlocks ? kMaxElementBlocks : blocks);
}

}  // namespace cece::cuda
