// dev/cuda_on_cpu.h -- runs the project's CUDA kernels on a CPU, for tests, debugging, and for readers without a GPU.
//
// A grid's blocks are shared out among the cores. Inside a block every CUDA thread is a fiber (its own small stack on one OS
// thread), and a fiber gives way only where CUDA threads must wait for each other: at __syncthreads() and at warp collectives
// (shuffles, votes, mma). A kernel that has neither runs as a plain loop over its threads, which the compiler inlines. So runs
// are deterministic, gdb and the sanitizers work on the kernels themselves, and a wait that can never end (a divergent
// __syncthreads, a lane missing from a shuffle's mask) is reported with its block and counts instead of hanging.
//
//   CUDA_ON_CPU_REVERSE=1   runs threads and blocks in the opposite order: a missing barrier then shows as wrong numbers
//   CUDA_ON_CPU_THREADS=n   number of cores to use (default: all)
//
// What it does not model: memory-model races between warps, clusters, TMA, tcgen05 and wgmma.
// Cost: a barrier or a shuffle is a switch of fibers for every thread, tens of nanoseconds; a thread of a kernel without them, a few.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <pthread.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_ASAN 1
#endif

// ------------------------------------------------------------------ the vocabulary of a .cu file
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local   // one block at a time runs on an OS thread, so "per block" is "per OS thread"

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline thread_local uint3 threadIdx, blockIdx;   // plain variables: `print threadIdx` works in gdb
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

// ------------------------------------------------------------------ fibers
struct Fiber {
  static constexpr size_t kStack = 256 << 10;   // committed only where touched; the lowest page is a guard page
  jmp_buf registers;
  char* stack = nullptr;
  unsigned tid = 0;
  uint3 thread = {};                            // tid as threadIdx
  bool started = false, idle = true;
  const unsigned* wait_for = nullptr;           // parked until *wait_for != wait_value
  unsigned wait_value = 0;
  ~Fiber() { if (stack) munmap(stack, kStack); }
};

struct Rendezvous {                             // lanes of a warp that must meet: one per (warp, mask)
  unsigned arrived = 0, generation = 0;
  alignas(16) unsigned char slot[2][32 * 64];   // by turns: a quick lane may hand in its next value before a slow one has read its last
};

struct Block {                                  // the block that this OS thread runs now
  unsigned threads = 0, next = 0, live = 0, arrived = 0, generation = 0;
  bool reverse = false;
  const char* barrier_file = nullptr;           // where the first thread of the present barrier waits
  int barrier_line = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Rendezvous full_warp[32];                               // mask 0xffffffff, by warp
  std::map<std::pair<unsigned, unsigned>, Rendezvous> part_warp;   // any other mask, by (warp, mask)
  std::vector<unsigned char> shared;
  void (*run_threads)(Block&, const void* call) = nullptr;
  const void* call = nullptr;
  Fiber* current = nullptr;
  jmp_buf scheduler;
#ifdef CUDA_ON_CPU_ASAN
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
#endif
};
inline thread_local Block block;

#ifdef CUDA_ON_CPU_ASAN                          // tell ASan which stack we are on
#define ASAN_LEAVE(fake, bottom, size) __sanitizer_start_switch_fiber(fake, bottom, size)
#define ASAN_ENTER(fake, bottom, size) __sanitizer_finish_switch_fiber(fake, bottom, size)
#else
#define ASAN_LEAVE(fake, bottom, size)
#define ASAN_ENTER(fake, bottom, size)
#endif

inline void yield() {                           // fiber -> scheduler
  [[maybe_unused]] void* fake = nullptr;
  ASAN_LEAVE(&fake, block.asan_bottom, block.asan_size);
  if (!_setjmp(block.current->registers)) _longjmp(block.scheduler, 1);
  ASAN_ENTER(fake, nullptr, nullptr);
}

inline void wait(const unsigned* generation) {
  block.current->wait_value = *generation;
  block.current->wait_for = generation;
  yield();
}

[[noreturn]] inline void report(const char* what) {
  fprintf(stderr, "cuda_on_cpu: block (%u,%u,%u) of %u threads, thread (%u,%u,%u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
          block.threads, threadIdx.x, threadIdx.y, threadIdx.z, what);
  fflush(stderr);
  abort();
}

[[noreturn]] inline void report_deadlock() {
  fprintf(stderr, "cuda_on_cpu: block (%u,%u,%u) can make no progress: %u of %u threads wait at __syncthreads()",
          blockIdx.x, blockIdx.y, blockIdx.z, block.arrived, block.live);
  if (block.arrived) fprintf(stderr, " (%s:%d)", block.barrier_file, block.barrier_line);
  fprintf(stderr, "\n");
  auto say = [](unsigned warp, unsigned mask, const Rendezvous& r) {
    if (r.arrived) fprintf(stderr, "  warp %u: only %u of the %d lanes of mask %08x have reached a warp collective\n",
                           warp, r.arrived, __builtin_popcount(mask), mask);
  };
  for (unsigned w = 0; w < 32; w++) say(w, ~0u, block.full_warp[w]);
  for (auto& [key, r] : block.part_warp) say(key.first, key.second, r);
  fflush(stderr);
  abort();
}

// Fiber body: run CUDA threads until none is left, then idle. run_threads is the loop with the kernel inlined.
inline void fiber_main() {
  ASAN_ENTER(nullptr, &block.asan_bottom, &block.asan_size);
  for (;;) {
    block.run_threads(block, block.call);
    block.current->idle = true;
    yield();
  }
}

inline void take_next_thread(Block& b) {
  Fiber* f = b.current;
  f->tid = b.reverse ? b.threads - 1 - b.next : b.next;
  b.next++;
  if (blockDim.y == 1 && blockDim.z == 1) f->thread = {f->tid, 0, 0};
  else f->thread = {f->tid % blockDim.x, f->tid / blockDim.x % blockDim.y, f->tid / (blockDim.x * blockDim.y)};
  threadIdx = f->thread;
}
inline void finish_thread(Block& b) {
  b.live--;
  if (b.arrived) report("divergent barrier: this thread has left the kernel while others wait at __syncthreads()");
}
template <class Call> void run_threads(Block& b, const void* call) {
  while (b.next < b.threads) {
    take_next_thread(b);
    (*(const Call*)call)();
    finish_thread(b);
  }
}

inline void resume(Fiber* f) {                  // scheduler -> fiber
  block.current = f;
  threadIdx = f->thread;
  [[maybe_unused]] void* fake = nullptr;
  if (!f->started) {
    f->started = true;
    f->stack = (char*)mmap(nullptr, Fiber::kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == MAP_FAILED) report("no memory for another fiber's stack");
    mprotect(f->stack, 4096, PROT_NONE);
    static thread_local ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = f->stack;
    context.uc_stack.ss_size = Fiber::kStack;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    ASAN_LEAVE(&fake, f->stack, Fiber::kStack);
    if (!_setjmp(block.scheduler)) setcontext(&context);
  } else {
    ASAN_LEAVE(&fake, f->stack, Fiber::kStack);
    if (!_setjmp(block.scheduler)) _longjmp(f->registers, 1);
  }
  ASAN_ENTER(fake, nullptr, nullptr);
}

inline void run_block() {
  block.next = block.arrived = 0;
  block.live = block.threads;
  block.part_warp.clear();
  std::fill(block.shared.begin(), block.shared.end(), 0xff);   // NaN: dynamic shared memory starts as garbage
  do {
    bool progress = false;
    for (size_t i = 0;; i++) {
      if (i == block.fibers.size()) {
        if (block.next == block.threads) break;
        block.fibers.push_back(std::make_unique<Fiber>());
      }
      Fiber* f = block.fibers[i].get();
      if (f->idle && block.next == block.threads) continue;
      if (f->wait_for && *f->wait_for == f->wait_value) continue;
      f->idle = false;
      f->wait_for = nullptr;
      resume(f);
      progress = true;
    }
    if (!progress) report_deadlock();
  } while (block.live);
}

// ------------------------------------------------------------------ the grid: blocks shared out among the cores
// parallel_for(n, f) runs f(0) .. f(n-1) on all cores, in any order; the GEMM uses it too.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { worker(); });
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });   // a forked child has no workers: it does the work alone
  }
  ~Pool() {
    if (in_forked_child) { for (auto& w : workers_) w.detach(); return; }
    { std::lock_guard<std::mutex> lock(mutex_); stop_ = true; }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }
  int size() const { return in_forked_child ? 1 : (int)workers_.size() + 1; }
  // A training step is about a thousand of these, most of them shorter than it takes to wake a thread: so a worker looks for the next
  // one for a while before it goes to sleep (make run on two cores: 137 s without, 92 s with).
  void run(size_t n, void (*f)(const void*, size_t), const void* data) {
    if (n == 0) return;
    if (n == 1 || size() == 1) { for (size_t i = 0; i < n; i++) f(data, i); return; }
    f_ = f; data_ = data; n_ = n; next_ = 0;
    busy_ = (int)workers_.size();
    job_++;
    if (sleepers_ > 0) { std::lock_guard<std::mutex> lock(mutex_); wake_.notify_all(); }
    take();
    for (int spins = 0; busy_ > 0; spins++) if (spins < kSpins) pause(); else std::this_thread::yield();
  }
  static inline bool in_forked_child = false;

 private:
  void take() { for (size_t i; (i = next_.fetch_add(1)) < n_;) f_(data_, i); }
  static constexpr int kSpins = 4000;              // longer than the gap between two kernels of a step
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  void worker() {
    for (unsigned seen = 0;;) {
      for (int spins = 0; spins < kSpins && job_ == seen && !stop_; spins++) pause();
      if (job_ == seen && !stop_) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_++;                               // before looking once more: run() counts the sleepers after it has changed job_
        wake_.wait(lock, [&] { return stop_ || job_ != seen; });
        sleepers_--;
      }
      if (stop_) return;
      seen = job_;
      take();
      busy_--;
    }
  }
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<size_t> next_{0};
  std::atomic<unsigned> job_{0};
  std::atomic<int> busy_{0}, sleepers_{0};
  std::atomic<bool> stop_{false};
  void (*f_)(const void*, size_t) = nullptr;
  const void* data_ = nullptr;
  size_t n_ = 0;
};
inline Pool& pool() {
  static Pool p([] {
    const char* s = getenv("CUDA_ON_CPU_THREADS");
    int n = s ? atoi(s) : (int)std::thread::hardware_concurrency();
    return std::clamp(n, 1, 256);
  }());
  return p;
}
template <class F> void parallel_for(size_t n, const F& f) {
  pool().run(n, [](const void* data, size_t i) { (*(const F*)data)(i); }, &f);
}

inline bool reverse_order() { static const bool r = getenv("CUDA_ON_CPU_REVERSE") != nullptr; return r; }
inline thread_local bool inside_launch = false;

template <class Call> void launch(dim3 grid, dim3 threads, size_t shared_bytes, const Call& call) {
  if (inside_launch) { fprintf(stderr, "cuda_on_cpu: a kernel may not launch a kernel\n"); abort(); }
  const unsigned n = threads.x * threads.y * threads.z;
  if (n == 0 || n > 1024) { fprintf(stderr, "cuda_on_cpu: bad block size %u (1 to 1024)\n", n); abort(); }
  const size_t blocks = (size_t)grid.x * grid.y * grid.z;
  if (blocks == 0) { fprintf(stderr, "cuda_on_cpu: empty grid\n"); abort(); }
  parallel_for(blocks, [&](size_t i) {
    if (reverse_order()) i = blocks - 1 - i;
    inside_launch = true;
    gridDim = grid; blockDim = threads;
    blockIdx = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / ((size_t)grid.x * grid.y))};
    block.threads = n;
    block.reverse = reverse_order();
    block.shared.resize(shared_bytes);
    block.run_threads = run_threads<Call>;
    block.call = &call;
    run_block();
    inside_launch = false;
  });
}
inline void* dynamic_shared() { return block.shared.data(); }

// ------------------------------------------------------------------ warp collectives
// Every lane of `mask` hands in a value; the last one to arrive runs f(values of all 32 lanes); each lane gets its own back.
inline unsigned lane() { return block.current->tid % 32; }
template <class T, class F> T collective(unsigned mask, T value, F f) {
  static_assert(sizeof(T) <= 64, "a lane's part of a collective is at most 64 bytes");
  const unsigned warp = block.current->tid / 32;
  if (!(mask >> lane() & 1)) report("a lane calls a warp collective with a mask that does not name it");
  Rendezvous& r = mask == ~0u ? block.full_warp[warp] : block.part_warp[{warp, mask}];
  T* slots = reinterpret_cast<T*>(r.slot[r.generation & 1]);
  new (&slots[lane()]) T(value);
  if (++r.arrived == (unsigned)__builtin_popcount(mask)) { r.arrived = 0; f(slots); r.generation++; }
  else wait(&r.generation);
  return slots[lane()];
}
template <class T, class Source> T shuffle(unsigned mask, T value, Source source) {
  return collective(mask, value, [&](T* v) {
    T old[32];
    for (int l = 0; l < 32; l++) if (mask >> l & 1) old[l] = v[l];
    for (int l = 0; l < 32; l++) if (mask >> l & 1) { int s = source(l); if (s >= 0 && s < 32 && mask >> s & 1) v[l] = old[s]; }
  });
}
}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  auto& b = cuda_on_cpu::block;
  if (b.threads == 1) return;
  if (b.live != b.threads) cuda_on_cpu::report("divergent barrier: some threads of the block have already left the kernel");
  if (b.arrived == 0) { b.barrier_file = file; b.barrier_line = line; }
  else if (b.barrier_line != line || strcmp(b.barrier_file, file) != 0) {
    char text[512];
    snprintf(text, sizeof text, "divergent barrier: this thread waits at %s:%d, %u others at %s:%d", file, line, b.arrived, b.barrier_file, b.barrier_line);
    cuda_on_cpu::report(text);
  }
  b.arrived++;
  if (b.arrived < b.live) cuda_on_cpu::wait(&b.generation);
  else { b.arrived = 0; b.generation++; }
}
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::collective(mask, 0, [](int*) {}); }
template <class T> T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  return cuda_on_cpu::shuffle(m, v, [=](int l) { return (l ^ x) / w <= l / w ? l ^ x : l; });
}
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  return cuda_on_cpu::shuffle(m, v, [=](int l) { return l % w + (int)d < w ? l + (int)d : l; });
}
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  return cuda_on_cpu::shuffle(m, v, [=](int l) { return l % w >= (int)d ? l - (int)d : l; });
}
template <class T> T __shfl_sync(unsigned m, T v, int source, int w = 32) {
  return cuda_on_cpu::collective(m, std::pair<T, int>(v, source), [=](auto* p) {
    T old[32];
    for (int l = 0; l < 32; l++) if (m >> l & 1) old[l] = p[l].first;
    for (int l = 0; l < 32; l++) if (m >> l & 1) p[l].first = old[l / w * w + p[l].second % w];
  }).first;
}
inline unsigned __ballot_sync(unsigned m, int predicate) {
  return cuda_on_cpu::collective(m, (unsigned)(predicate != 0), [=](unsigned* v) {
    unsigned b = 0;
    for (int l = 0; l < 32; l++) if (m >> l & 1) b |= v[l] << l;
    for (int l = 0; l < 32; l++) if (m >> l & 1) v[l] = b;
  });
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }

// ------------------------------------------------------------------ the rest of the device vocabulary the kernels use
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
template <class T> T atomicAdd(T* p, T v) {
  if constexpr (std::is_integral_v<T>) return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  else {
    static_assert(sizeof(T) == 4);
    unsigned* q = (unsigned*)p;
    unsigned old = __atomic_load_n(q, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(q, &old, __float_as_uint(__uint_as_float(old) + v), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return __uint_as_float(old);
  }
}
template <class T> T atomicMax(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return old;
}
template <class T> T __ldg(const T* p) { return *p; }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
// The library's own are calls, for the sake of NaN, and a loop with a call is not made SIMD. One NaN is dropped, of equals y is taken, as there.
extern "C" {
extern inline __attribute__((gnu_inline, always_inline)) float fminf(float x, float y) noexcept { return x < y || y != y ? x : y; }
extern inline __attribute__((gnu_inline, always_inline)) float fmaxf(float x, float y) noexcept { return x > y || y != y ? x : y; }
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// The CPU build is compiled with -ffp-contract=off, so plain operators round after every operation.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
using std::max;
using std::min;
