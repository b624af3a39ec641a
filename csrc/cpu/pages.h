// Memory for large gradients. A fresh page costs more than the gradient written to it (131 MB: 61 ms in 4 KiB
// pages, 20 ms in 2 MiB pages, 5 ms to write again), so pages are huge, and the last few freed blocks are kept:
// a training step frees the gradient of its logits and soon asks for one of the same size.
// A kept block is MADV_FREE: under memory pressure the kernel takes its pages back without asking. drop() gives all
// back.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace cece::cpu {

class Pages {
 public:
  static constexpr size_t kHuge = size_t(2) << 20;  // the size of a huge page on x86-64
  static constexpr size_t kLeast = 2 * kHuge;       // smaller gradients come from torch's allocator
  static constexpr size_t kKept = 2;                // blocks

  static Pages& global() {
    static Pages& pages = *new Pages;  // never destroyed: tensors may outlive static destructors
    return pages;
  }

  // At least `bytes` of memory on a huge page's boundary, or null where there is none.
  void* take(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return nullptr;
    const size_t whole = rounded(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    void* start = nullptr;
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      if (block->bytes != whole) continue;
      start = block->start;
      kept_.erase(block);
      break;
    }
    if (!start) start = map(whole);
    if (!start) {
      drop_all_but(0);
      start = map(whole);
    }
    if (start) taken_[start] = bytes;
    return start;
  }

  // Returns how many bytes were taken.
  size_t give_back(void* start) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = taken_.extract(start).mapped();
    madvise(start, rounded(bytes), MADV_FREE);
    kept_.push_back({start, rounded(bytes)});
    drop_all_but(kKept);
    return bytes;
  }

  void drop() {
    std::lock_guard<std::mutex> lock(mutex_);
    drop_all_but(0);
  }

 private:
  struct Block {
    void* start;
    size_t bytes;
  };
  static void* map(size_t bytes) {
    void* mapped = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* first = static_cast<char*>(mapped);
    char* start = first + (kHuge - reinterpret_cast<size_t>(first) % kHuge) % kHuge;
    if (start > first) munmap(first, start - first);
    munmap(start + bytes, first + kHuge - start);
#ifdef MADV_HUGEPAGE  // advice: nothing depends on it, and macOS has none
    madvise(start, bytes, MADV_HUGEPAGE);
#endif
    return start;
  }
  void drop_all_but(size_t n) {  // the oldest first
    for (; kept_.size() > n; kept_.erase(kept_.begin())) munmap(kept_.front().start, kept_.front().bytes);
  }
  static size_t rounded(size_t bytes) { return (bytes + kHuge - 1) / kHuge * kHuge; }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the oldest first
  std::unordered_map<void*, size_t> taken_;
};

}  // namespace cece::cpu
