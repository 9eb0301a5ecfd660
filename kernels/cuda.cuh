// kernels/cuda.cuh -- what every kernel file stands on: types, launch(), memory, vector loads, warp reductions.
//
// The same sources are compiled two ways.
//   nvcc                     kernels run on the GPU
//   g++ or clang++ -DCPU_BUILD   kernels run on the CPU through dev/cuda_on_cpu.h; no CUDA header is needed
// To keep that simple the project writes launch(kernel, grid, block, shared_bytes, args...) instead of <<<>>>, and
// DYNAMIC_SHARED(T, name) instead of `extern __shared__`. Nothing else is unusual.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "../data/errors.h"
#ifdef CPU_BUILD
#include "../dev/cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#ifdef CPU_BUILD
constexpr bool kOnCpu = true;
#else
constexpr bool kOnCpu = false;
#endif

constexpr float kLog2E = 1.44269504f;       // exp(x) = exp2(x * kLog2E)

template <class A, class B> __host__ __device__ constexpr auto ceil_div(A a, B b) { return (a + b - 1) / b; }
template <class A, class B> __host__ __device__ constexpr auto round_up(A a, B b) { return (a + b - 1) / b * b; }

// The bits of a float, on host and device alike.
__host__ __device__ inline uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
__host__ __device__ inline float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

// ------------------------------------------------------------------ number types
// bf16: the upper half of a float. floatX: what activations and working weights are stored in: bf16, or float with
// `make FP32=1`, which tests use to compare a whole model tightly.
#ifdef CPU_BUILD
struct bf16 { uint16_t bits; };
inline float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
inline bf16 to_bf16(float f) {                       // round to nearest even; NaN -> 0x7fff as the GPU does
  unsigned u = __float_as_uint(f);
  unsigned rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return {(uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded)};
}
#else
using bf16 = __nv_bfloat16;
__host__ __device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__host__ __device__ inline bf16 to_bf16(float f) { return __float2bfloat16_rn(f); }
#endif
__host__ __device__ inline float to_float(float x) { return x; }

#ifdef FP32
using floatX = float;
#else
using floatX = bf16;
#endif

template <class T> __host__ __device__ inline T from_float(float f);
template <> __host__ __device__ inline float from_float<float>(float f) { return f; }
template <> __host__ __device__ inline bf16 from_float<bf16>(float f) { return to_bf16(f); }

// ------------------------------------------------------------------ errors, launch
#ifdef CPU_BUILD
#include "profile.cuh"      // defines: ProfileSpan, which times what happens in its scope if a profile is asked for
#define DYNAMIC_SHARED(T, name) T* name = (T*)cuda_on_cpu::dynamic_shared()
template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  const ProfileSpan span((const void*)kernel);
  auto call = [=] { kernel(static_cast<P>(args)...); };
  cuda_on_cpu::launch(grid, block, shared_bytes, call);
}
inline void device_sync() {}
#else
#define DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
inline void cuda_check_at(cudaError_t e, const char* what, const char* file, int line) {
  if (e != cudaSuccess) die("%s at %s:%d: %s", what, file, line, cudaGetErrorString(e));
}
#define CUDA_CHECK(call) cuda_check_at((call), #call, __FILE__, __LINE__)
inline cudaStream_t main_stream = nullptr;                       // all work of the program is ordered on one stream
#include "profile.cuh"      // defines: ProfileSpan, which times what happens in its scope if a profile is asked for
// Runs kernel<<<grid, block, shared_bytes>>>(args...) and stops the program if it cannot be launched.
template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  if (shared_bytes > 48 * 1024)                                  // more than 48 KB must be asked for
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
  const ProfileSpan span((const void*)kernel);
  kernel<<<grid, block, shared_bytes, main_stream>>>(static_cast<P>(args)...);
  CUDA_CHECK(cudaGetLastError());
}
inline void device_sync() { CUDA_CHECK(cudaDeviceSynchronize()); }
#endif

// ------------------------------------------------------------------ device memory (on the CPU: the heap)
// Fresh memory is filled with 0xff, which reads as NaN: what a kernel forgot to write shows.
template <class T> T* device_alloc(size_t n) {
  void* p = nullptr;
  size_t bytes = round_up((n ? n : 1) * sizeof(T), (size_t)256);
#ifdef CPU_BUILD
  p = aligned_alloc(256, bytes);
  if (!p) die("out of memory: %.1f MB wanted; lower --batch or --seq", bytes / 1e6);
  memset(p, 0xff, bytes);
#else
  if (cudaMalloc(&p, bytes) != cudaSuccess) die("out of GPU memory: %.1f MB wanted; lower --batch or --seq", bytes / 1e6);
  CUDA_CHECK(cudaMemset(p, 0xff, bytes));
#endif
  return (T*)p;
}
template <class T> void device_free(T* p) {
#ifdef CPU_BUILD
  free(p);
#else
  CUDA_CHECK(cudaFree(p));
#endif
}
template <class T> void to_device(T* device, const T* host, size_t n) {
  const ProfileSpan span("copy to the device", 1.0 * n * sizeof(T));
#ifdef CPU_BUILD
  if (n) memcpy(device, host, n * sizeof(T));
#else
  CUDA_CHECK(cudaMemcpyAsync(device, host, n * sizeof(T), cudaMemcpyHostToDevice, main_stream));
#endif
}
template <class T> void to_host(T* host, const T* device, size_t n) {
  const ProfileSpan span("copy to the host", 1.0 * n * sizeof(T));
#ifdef CPU_BUILD
  if (n) memcpy(host, device, n * sizeof(T));
#else
  CUDA_CHECK(cudaMemcpyAsync(host, device, n * sizeof(T), cudaMemcpyDeviceToHost, main_stream));
  CUDA_CHECK(cudaStreamSynchronize(main_stream));
#endif
}
template <class T> void device_copy(T* to, const T* from, size_t n) {
  const ProfileSpan span("copy", 2.0 * n * sizeof(T));
#ifdef CPU_BUILD
  if (n) memcpy(to, from, n * sizeof(T));
#else
  CUDA_CHECK(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToDevice, main_stream));
#endif
}
template <class T> void device_zero(T* p, size_t n) {
  const ProfileSpan span("zero", 1.0 * n * sizeof(T));
#ifdef CPU_BUILD
  if (n) memset((void*)p, 0, n * sizeof(T));
#else
  CUDA_CHECK(cudaMemsetAsync(p, 0, n * sizeof(T), main_stream));
#endif
}

// Multiprocessors of the GPU, or cores of the CPU: how many blocks a grid needs to fill the machine.
inline int multiprocessors() {
#ifdef CPU_BUILD
  return cuda_on_cpu::pool().size();
#else
  static int n = [] { int v = 0; CUDA_CHECK(cudaDeviceGetAttribute(&v, cudaDevAttrMultiProcessorCount, 0)); return v; }();
  return n;
#endif
}
// Blocks for a grid-stride reduction: enough to fill the machine, fixed for a machine so that sums are reproducible.
inline int reduction_blocks() { return kOnCpu ? 8 : 4 * multiprocessors(); }

// ------------------------------------------------------------------ vector loads: N elements at once, 16 bytes a thread when they fit
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec { T v[N]; };
template <int N, class T> __device__ inline Vec<T, N> load_vec(const T* p) {
  if constexpr (sizeof(T) * N % 16 == 0 && !kOnCpu) {
    Vec<T, N> r;
#pragma unroll
    for (size_t i = 0; i < sizeof(T) * N / 16; i++) reinterpret_cast<uint4*>(&r)[i] = reinterpret_cast<const uint4*>(p)[i];
    return r;
  } else {
    return *reinterpret_cast<const Vec<T, N>*>(p);
  }
}
template <int N, class T> __device__ inline void store_vec(T* p, const Vec<T, N>& x) {
  if constexpr (sizeof(T) * N % 16 == 0 && !kOnCpu) {
#pragma unroll
    for (size_t i = 0; i < sizeof(T) * N / 16; i++) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&x)[i];
  } else {
    *reinterpret_cast<Vec<T, N>*>(p) = x;
  }
}

// ------------------------------------------------------------------ reductions over aligned groups of kLanes lanes
// Row kernels take one warp a row on a GPU; on the CPU one thread a row, where a shuffle would cost more than the row.
constexpr int kRowLanes = kOnCpu ? 1 : 32;
template <int kLanes> __device__ inline float lanes_sum(float v) {
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
template <int kLanes> __device__ inline float lanes_max(float v) {      // NaN is dropped, as fmaxf does
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
template <int kLanes> __device__ inline uint32_t lanes_most(uint32_t v) {
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) v = max(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
