// CUDA on a CPU, for tests: enough of it to run csrc/cuda's kernels, and to catch what goes wrong in them.
//
// Every CUDA thread is a fiber with a stack of its own; the blocks of a grid run one after another. Within a block the
// fibers run in a random order that a seed decides, each until it waits at a barrier or a warp operation, so a missing
// __syncthreads shows as reading too early. Shared memory starts as 0xFF (NaN), has red zones between its arrays, and
// is new for every block and poisoned when the block leaves. The blocks of a cluster run together, and read each
// other's shared memory. With -fsanitize=address an overrun of it is found; with -fsanitize=thread every CUDA thread is
// a thread to the sanitizer, barriers are its only order, and a race between two threads of a block is found.
//
// Not seen: races between blocks, which run one after another. Not emulated: cp.async and TMA, inline PTX,
// weak memory order (fences do nothing), and the last bits of the GPU's own exp and log, so tests have tolerances.
// __shared__ and __activemask are left undefined on purpose.
//
// x86-64 or, anywhere, -DCECE_EMULATOR_UCONTEXT (six times slower: two system calls a switch).
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(CECE_EMULATOR_UCONTEXT)
#define CECE_EMULATOR_UCONTEXT
#endif
#ifdef CECE_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

// ---- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half h) {
  _Float16 f;
  std::memcpy(&f, &h, 2);
  return float(f);
}
inline __half __float2half_rn(float x) {
  const _Float16 f = _Float16(x);
  __half h;
  std::memcpy(&h, &f, 2);
  return h;
}
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = uint32_t(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the GPU's NaN
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

namespace emulator {

// ---- settings and errors

enum class Order { forward, reverse, random };
struct Config {
  Order order = Order::random;
  uint64_t seed = 1;
  int card_major = 8;        // the compute capability that the card says it has, without clusters
  int compiled_for = 80;     // and the one that its code was compiled for
  int64_t clusters = 0;      // that have run
  size_t stack = 128 << 10;  // bytes a fiber
  size_t shared = 48 << 10;  // bytes a block, what every GPU grants without asking
};
inline Config& config() {
  static Config c;
  return c;
}
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- what the sanitizers must know of a switch between stacks

// The emulator's own bookkeeping is shared by all fibers on purpose: the race detector shall not look at it.
struct NotChecked {
#ifdef __SANITIZE_THREAD__
  NotChecked() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~NotChecked() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
  NotChecked() {}
#endif
};
inline void happens_before(char* at) {  // what this thread did, for those that happen after `at`
#ifdef __SANITIZE_THREAD__
  __tsan_release(at);
#else
  (void)at;
#endif
}
inline void happens_after(char* at) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(at);
#else
  (void)at;
#endif
}

// A place to switch to and from: a stack, and the sanitizers' names for it.
struct Context {
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;
#ifdef CECE_EMULATOR_UCONTEXT
  ucontext_t saved;
#else
  void* saved = nullptr;  // its stack pointer
#endif
};

#ifndef CECE_EMULATOR_UCONTEXT
// Saves the six registers that a call must preserve on the old stack, and takes them from the new one.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void switch_stack(
    void** /*from*/, void* /*to*/) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void switch_to(Context& from, Context& to, bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch is no synchronisation
#endif
  (void)for_good;
#ifdef CECE_EMULATOR_UCONTEXT
  swapcontext(&from.saved, &to.saved);
#else
  switch_stack(&from.saved, to.saved);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// ---- threads and blocks

enum class State { ready, at_barrier, at_cluster_barrier, in_warp, done };

struct Block;
struct Thread {
  Context context;
  Block* block = nullptr;
  uint3 index{};
  unsigned lane = 0, warp = 0;
  State state = State::done;
  const char* file = "";
  int line = 0;  // where it waits
};

// Lanes that meet for a warp operation: each leaves 4 bytes, all wait, then each takes what it came for.
struct Meeting {
  bool open = false;
  uint32_t mask = 0, arrived = 0, left = 0, value[32] = {};
  int line = 0;
};
struct SharedArray {
  const void* key;
  char* data;
  size_t size;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned> order;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  std::vector<SharedArray> arrays;
  Context host;
  uint3 index{};
  dim3 size, grid;
  unsigned alive = 0, waiting = 0;
  std::vector<Block*> cluster;       // itself and those it runs together with, by rank
  unsigned waiting_for_cluster = 0;  // of its threads
  const char* file = "";
  int line = 0;  // of the barrier where threads wait
  char *memory = nullptr, *stacks = nullptr;
  size_t used = 0, stack_bytes = 0;
  alignas(8) char barrier = 0;          // addresses for happens_before: TSan knows eight bytes as one
  alignas(8) char cluster_barrier = 0;  // the first block's is all blocks'
  alignas(8) char end = 0;
  std::string error;
  void (*run)(void*) = nullptr;
  void* kernel = nullptr;

  void release() {
    if (stacks) munmap(stacks, stack_bytes);
    if (memory) munmap(memory, config().shared);
    stacks = memory = nullptr;
  }
  ~Block() { release(); }
};

inline thread_local Thread* current = nullptr;
#ifdef __SANITIZE_THREAD__
__attribute__((noinline, no_sanitize("thread")))
#endif
inline Thread& self() {
  return *current;
}

inline void wait(State state, const char* file, int line) {
  Thread& t = self();
  t.state = state, t.file = file, t.line = line;
  switch_to(t.context, t.block->host, false);
}
[[noreturn]] inline void fail(const std::string& message) {
  {
    NotChecked scope;
    Thread& t = self();
    char where[96];
    std::snprintf(where, sizeof where, "block (%u, %u) thread %u: ", t.block->index.x, t.block->index.y, t.index.x);
    if (t.block->error.empty()) t.block->error = where + message;
    t.state = State::done;
  }
  switch_to(self().context, self().block->host, true);
  std::abort();
}
// A GPU stops at a wide access that is not aligned to its width; a CPU would not notice.
inline void expect_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
}
inline std::string place(const char* file, int line) { return std::string(file) + ":" + std::to_string(line); }

inline void open_barrier(Block& b) {
  for (Thread& t : b.threads) {
    if (t.state == State::at_barrier) t.state = State::ready;
  }
  b.waiting = 0;
}
inline void barrier(const char* file, int line) {
  NotChecked scope;
  Thread& t = self();
  Block& b = *t.block;
  if (b.waiting && (b.line != line || b.file != file)) {
    fail("divergent __syncthreads: " + place(file, line) + " while others wait at " + place(b.file, b.line));
  }
  b.file = file, b.line = line;
  happens_before(&b.barrier);
  if (++b.waiting == b.alive) {
    open_barrier(b);
    t.state = State::ready;
  } else {
    wait(State::at_barrier, file, line);
  }
  happens_after(&b.barrier);
}

// A barrier of all threads of a cluster that have not left.
inline void try_cluster_barrier(Block& b) {
  unsigned alive = 0, waiting = 0;
  for (const Block* other : b.cluster) alive += other->alive, waiting += other->waiting_for_cluster;
  if (waiting < alive) return;
  for (Block* other : b.cluster) {
    for (Thread& t : other->threads) {
      if (t.state == State::at_cluster_barrier) t.state = State::ready;
    }
    other->waiting_for_cluster = 0;
  }
}
inline void cluster_barrier(const char* file, int line) {
  NotChecked scope;
  Thread& t = self();
  Block& b = *t.block;
  happens_before(&b.cluster[0]->cluster_barrier);
  t.state = State::at_cluster_barrier;
  b.waiting_for_cluster++;
  try_cluster_barrier(b);
  if (t.state != State::ready) wait(State::at_cluster_barrier, file, line);
  happens_after(&b.cluster[0]->cluster_barrier);
}
// The same place in the shared memory of the block of this rank.
inline void* of_block(void* p, unsigned rank, const char* file, int line) {
  NotChecked scope;
  Block& b = *self().block;
  if (rank >= b.cluster.size()) fail("no block " + std::to_string(rank) + " in the cluster: " + place(file, line));
  Block& other = *b.cluster[rank];
  if (other.alive == 0) fail("block " + std::to_string(rank) + " has left the cluster: " + place(file, line));
  for (const SharedArray& mine : b.arrays) {
    const ptrdiff_t offset = static_cast<char*>(p) - mine.data;
    if (offset < 0 || offset >= ptrdiff_t(mine.size)) continue;
    for (const SharedArray& its : other.arrays) {
      if (its.key == mine.key) return its.data + offset;
    }
  }
  fail("block " + std::to_string(rank) + " has written nothing there: " + place(file, line));
}

// One lane's part in a warp operation; returns the value that lane `from` brought.
inline uint32_t meet(uint32_t mask, uint32_t value, unsigned from, const char* file, int line) {
  NotChecked scope;
  Thread& t = self();
  Block& b = *t.block;
  std::vector<Meeting>& all = b.meetings[t.warp];
  const uint32_t me = 1u << t.lane;
  const unsigned first = t.warp * 32, lanes = std::min<unsigned>(32, unsigned(b.threads.size()) - first);
  if (!(mask & me)) fail("warp operation at " + place(file, line) + ": the calling lane is not in its mask");
  if (lanes < 32 && mask >> lanes)
    fail("warp operation at " + place(file, line) + ": lanes beyond the block in its mask");
  size_t i = 0;
  while (i < all.size() && !(all[i].open && all[i].mask == mask && !(all[i].arrived & me))) i++;
  if (i == all.size()) {
    for (i = 0; i < all.size() && all[i].open;) i++;
    if (i == all.size()) all.emplace_back();
    all[i] = Meeting();
    all[i].open = true, all[i].mask = mask, all[i].line = line;
  }
  if (all[i].line != line) {
    fail("warp operations differ: lane " + std::to_string(t.lane) + " at " + place(file, line) + ", others at line " +
         std::to_string(all[i].line));
  }
  all[i].arrived |= me;
  all[i].value[t.lane] = value;
  happens_before(reinterpret_cast<char*>(&all));
  if (all[i].arrived == mask) {
    for (unsigned l = 0; l < lanes; l++) {
      if (l != t.lane && mask >> l & 1) b.threads[first + l].state = State::ready;
    }
  } else {
    for (unsigned l = 0; l < lanes; l++) {
      if (mask >> l & 1 && b.threads[first + l].state == State::done) {
        fail("warp operation at " + place(file, line) + ": lane " + std::to_string(l) + " of its mask has exited");
      }
    }
    wait(State::in_warp, file, line);
  }
  happens_after(reinterpret_cast<char*>(&all));
  Meeting& m = b.meetings[t.warp][i];
  const uint32_t result = mask >> from & 1 ? m.value[from] : 0xFFFFFFFFu;
  m.left |= me;
  if (m.left == mask) m.open = false;
  return result;
}

inline char* shared_array(const void* key, size_t size, size_t align) {
  NotChecked scope;
  Block& b = *self().block;
  for (const SharedArray& a : b.arrays) {
    if (a.key == key) return a.data;
  }
  align = std::max<size_t>(align, 16);
  const size_t at = (b.used + 32 + align - 1) / align * align;  // 32 bytes of red zone
  if (at + size > config().shared) fail("more than " + std::to_string(config().shared) + " bytes of shared memory");
  b.used = at + size;
  b.arrays.push_back({key, b.memory + at, size});
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(b.memory + at, size);
#endif
  return b.memory + at;
}

// A fiber's first function: the kernel, then never again.
inline void enter() {
#ifdef __SANITIZE_ADDRESS__
  Context& host = self().block->host;
  __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.size);
#endif
  Block& b = *self().block;
  b.run(b.kernel);
  happens_before(&b.end);
  {
    NotChecked scope;
    Thread& t = self();
    t.state = State::done;
    for (const Meeting& m : b.meetings[t.warp]) {
      if (m.open && m.arrived != m.mask && (m.mask & ~m.arrived) >> t.lane & 1) {
        b.error = "a lane exited while its warp waits for it at line " + std::to_string(m.line);
      }
    }
    if (--b.alive && b.waiting == b.alive) open_barrier(b);  // those that have left count no more, as since Volta
    if (!b.alive) {
      for (const SharedArray& a : b.arrays) std::memset(a.data, 0xFF, a.size);
    }
    try_cluster_barrier(b);
  }
  switch_to(self().context, self().block->host, true);
  std::abort();
}

inline void* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for the emulator");
  return p;
}

inline void prepare(Block& b, unsigned n, [[maybe_unused]] std::mt19937_64& random) {
  const Config& c = config();
#ifdef __SANITIZE_THREAD__
  b.release();  // the same address in two blocks would look like a race between them
#endif
  if (b.stack_bytes < n * c.stack) {
    b.release();
    b.stack_bytes = n * c.stack;
  }
  if (!b.stacks) b.stacks = static_cast<char*>(map(b.stack_bytes));
  if (!b.memory) b.memory = static_cast<char*>(map(c.shared));
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(b.memory, c.shared);
  ASAN_UNPOISON_MEMORY_REGION(b.stacks, b.stack_bytes);
#endif
  std::memset(b.memory, 0xFF, c.shared);
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(b.memory, c.shared);
#endif
  b.threads.assign(n, Thread());
  b.meetings.assign((n + 31) / 32, {});
  b.arrays.clear();
  b.used = 0, b.alive = n, b.waiting = 0, b.waiting_for_cluster = 0;
  b.error.clear();
  b.order.resize(n);
  for (unsigned i = 0; i < n; i++) {
    b.order[i] = c.order == Order::reverse ? n - 1 - i : i;
    Thread& t = b.threads[i];
    t.block = &b, t.index = {i, 0, 0}, t.lane = i % 32, t.warp = i / 32, t.state = State::ready;
    char* const stack = b.stacks + i * c.stack;
    t.context.stack = stack, t.context.size = c.stack;
#ifdef CECE_EMULATOR_UCONTEXT
    getcontext(&t.context.saved);
    t.context.saved.uc_stack.ss_sp = stack, t.context.saved.uc_stack.ss_size = c.stack;
    t.context.saved.uc_link = nullptr;
    makecontext(&t.context.saved, enter, 0);
#else
    void** top = reinterpret_cast<void**>(stack + c.stack);
    *--top = nullptr;  // where `enter` would return to; it also aligns its stack
    *--top = reinterpret_cast<void*>(&enter);
    for (int k = 0; k < 6; k++) *--top = nullptr;
    t.context.saved = top;
#endif
  }
#ifdef __SANITIZE_THREAD__
  // In any order: TSan gives a new thread the number of a finished one, and a race with one's own number is none.
  std::vector<void*> names(n);
  for (void*& name : names) name = __tsan_create_fiber(0);
  std::shuffle(names.begin(), names.end(), random);
  for (unsigned i = 0; i < n; i++) b.threads[i].context.tsan = names[i];
  b.host.tsan = __tsan_get_current_fiber();
#endif
}

// The blocks of a cluster, or one block, from start to end.
inline void run_cluster(std::vector<Block*> blocks, uint64_t seed) {
  NotChecked scope;
  std::mt19937_64 random(seed);
  const auto failed = [&] {
    return std::any_of(blocks.begin(), blocks.end(), [](const Block* b) { return !b->error.empty(); });
  };
  size_t threads = 0, done = 0;
  for (Block* b : blocks) {
    prepare(*b, b->size.x, random);
    b->cluster = blocks;
    threads += b->threads.size();
  }
  if (config().order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  while (done < threads && !failed()) {
    bool progress = false;
    done = 0;
    if (config().order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random);
    for (Block* b : blocks) {
      if (config().order == Order::random) std::shuffle(b->order.begin(), b->order.end(), random);
      for (const unsigned i : b->order) {
        Thread& t = b->threads[i];
        if (t.state == State::ready) {
          progress = true;
          current = &t;
          switch_to(b->host, t.context, false);
          if (!b->error.empty()) break;
        }
        done += t.state == State::done;
      }
    }
    if (!progress && done < threads && !failed()) {
      for (Block* b : blocks) {
        for (const Thread& t : b->threads) {
          if (t.state != State::done && b->error.empty()) {
            b->error = "deadlock: thread " + std::to_string(t.index.x) + " waits at " + place(t.file, t.line);
          }
        }
      }
    }
  }
  current = nullptr;
  std::string error;
  for (Block* b : blocks) {
#ifdef __SANITIZE_THREAD__
    for (Thread& t : b->threads) __tsan_destroy_fiber(t.context.tsan);
#endif
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(b->memory, config().shared);
#endif
    if (error.empty()) error = b->error;
  }
  if (!error.empty()) throw Error("cece's CUDA emulator: " + error);
}

// As cece::cuda::launch.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, cudaStream_t, int cluster, A&&... args) {
  const auto refuse = [](const std::string& what) { throw Error("cece's CUDA emulator: " + what); };
  if (threads < 1 || threads > 1024) refuse("a block of " + std::to_string(threads));
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535) refuse("a grid no GPU can have");
  if (cluster < 1 || cluster > 8 || grid.y % unsigned(cluster)) refuse("a cluster of " + std::to_string(cluster));
  if (cluster > 1 && config().card_major < 9) refuse("this card has no clusters");
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(static_cast<P>(args)...)};
  NotChecked scope;
  static thread_local std::vector<Block>& pool = *new std::vector<Block>(8);  // never freed: at exit that would look
  std::vector<Block*> blocks;                                                 // like a race
  for (int i = 0; i < cluster; i++) {
    Block& b = pool[i];
    b.run = [](void* p) {
      Call& c = *static_cast<Call*>(p);
      std::apply(c.kernel, c.args);
    };
    b.kernel = &call;
    b.size = dim3(unsigned(threads)), b.grid = grid;
    blocks.push_back(&b);
  }
  if (cluster > 1) config().clusters += grid.x * (grid.y / cluster);
  for (unsigned y = 0; y < grid.y / cluster; y++) {
    for (unsigned x = 0; x < grid.x; x++) {
      const bool back = config().order == Order::reverse;
      const unsigned first = (back ? grid.y / cluster - 1 - y : y) * cluster;
      for (int i = 0; i < cluster; i++) blocks[i]->index = {back ? grid.x - 1 - x : x, first + i, 0};
      run_cluster(blocks, config().seed * 1000003 + y * uint64_t(grid.x) + x);
    }
  }
  for (Block* b : blocks) happens_after(&b->end);
}

template <class T>
T shuffle_xor(uint32_t mask, T value, int distance, const char* file, int line) {
  static_assert(sizeof(T) == 4, "warp operations move 4 bytes");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = meet(mask, word, self().lane ^ unsigned(distance), file, line);
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint32_t ballot(uint32_t mask, bool is, const char* file, int line) {
  uint32_t all = uint32_t(is) << self().lane;
  for (int distance = 1; distance < 32; distance *= 2) all |= shuffle_xor(mask, all, distance, file, line);
  return all;
}

}  // namespace emulator

// ---- the device's functions

// A function's result moved by up to `units` of its last place (CUDA's manual, "Mathematical Functions", and PTX's for
// ex2.approx and rcp.approx), which way and how far decided by its argument; what is exact stays exact.
namespace emulator {
inline float perturbed([[maybe_unused]] float x, float y, [[maybe_unused]] int units) {
#ifdef CECE_PERTURBED
  if (y == 0 || y == 1 || !std::isnormal(y)) return y;
  uint32_t bits, hash;
  std::memcpy(&hash, &x, 4), std::memcpy(&bits, &y, 4);
  hash = (hash ^ hash >> 15) * 0x2c1b3c6du;
  bits += uint32_t(int(hash >> 16) % (2 * units + 1) - units);
  std::memcpy(&y, &bits, 4);
#endif
  return y;
}
}  // namespace emulator

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::self().block->index)
#define blockDim (::emulator::self().block->size)
#define gridDim (::emulator::self().block->grid)
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t bits) {
  return uint32_t(((uint64_t(high) << 32) | low) >> (bits % 32));
}
#define __syncthreads() ::emulator::barrier(__FILE__, __LINE__)
#define __ballot_sync(mask, is) ::emulator::ballot(mask, is, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, distance) ::emulator::shuffle_xor(mask, value, distance, __FILE__, __LINE__)
namespace cece::cuda {
inline bool clusters_compiled() { return emulator::config().compiled_for >= 90; }
template <class T>
T* of_block_at(T* p, int rank, const char* file, int line) {
  return static_cast<T*>(::emulator::of_block(p, unsigned(rank), file, line));
}
#define cluster_sync() (::emulator::cluster_barrier(__FILE__, __LINE__))
#define of_block_of_cluster(p, rank) (::cece::cuda::of_block_at(p, rank, __FILE__, __LINE__))
}  // namespace cece::cuda
template <class T>
inline void __stcs(T* p, T value) {
  emulator::expect_aligned(p, sizeof(T));
  *p = value;
}
