// dev/test_runtime.h -- the ground the kernels stand on: launch, shared memory, shuffles, reductions; and on the CPU, that a kernel
// which would hang a GPU is reported instead.
#pragma once
#include "../kernels/cuda.cuh"
#include "testing.h"

__global__ void reverse_kernel(float* x, int n) {                // dynamic shared memory and a barrier
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i] = x[(size_t)blockIdx.x * n + i];
  __syncthreads();
  x[(size_t)blockIdx.x * n + i] = s[n - 1 - i];
}
__global__ void forgotten_barrier_kernel(float* x, int n) {      // the same without the barrier
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i] = x[(size_t)blockIdx.x * n + i];
  x[(size_t)blockIdx.x * n + i] = s[n - 1 - i];
}
__global__ void divergent_barrier_kernel(float* x) {
  if (threadIdx.x < 5) {
    __syncthreads();
    x[0] = 1;
  } else {
    __syncthreads();
  }
}
__global__ void early_return_kernel(float* x) {
  if (threadIdx.x >= 60) return;
  __syncthreads();
  x[threadIdx.x] = 1;
}
__global__ void missing_lane_kernel(float* x) {
  if (threadIdx.x == 3) return;
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}
__global__ void lanes_kernel(float* out, const float* x) {
  const float v = x[blockIdx.x * 64 + threadIdx.x];
  out[(blockIdx.x * 64 + threadIdx.x) * 4 + 0] = lanes_sum<32>(v);
  out[(blockIdx.x * 64 + threadIdx.x) * 4 + 1] = lanes_max<32>(v);
  out[(blockIdx.x * 64 + threadIdx.x) * 4 + 2] = __shfl_down_sync(0xffffffffu, v, 5);
  out[(blockIdx.x * 64 + threadIdx.x) * 4 + 3] = __shfl_sync(0xffffffffu, v, (int)(threadIdx.x * 7) % 32);
}
__global__ void index_kernel(int* seen, dim3 grid, dim3 block) {
  const int b = blockIdx.x + grid.x * (blockIdx.y + grid.y * blockIdx.z), t = threadIdx.x + block.x * (threadIdx.y + block.y * threadIdx.z);
  atomicAdd(&seen[b * (int)(block.x * block.y * block.z) + t], 1);
}

inline void test_runtime() {
  if (!section("launch, barriers, shuffles")) return;
  const int n = 64, blocks = 9;
  std::vector<float> x(n * blocks), y(x.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = (float)i;
  float* d = device_alloc<float>(x.size());
  to_device(d, x.data(), x.size());
  launch(reverse_kernel, blocks, n, n * sizeof(float), d, n);
  to_host(y.data(), d, y.size());
  bool reversed = true;
  for (int b = 0; b < blocks; b++) for (int i = 0; i < n; i++) reversed &= y[b * n + i] == x[b * n + n - 1 - i];
  check("dynamic shared memory and a barrier reverse each block", reversed);

  float* lanes = device_alloc<float>(x.size() * 4);
  to_device(d, x.data(), x.size());
  launch(lanes_kernel, blocks, n, 0, lanes, d);
  std::vector<float> l(x.size() * 4);
  to_host(l.data(), lanes, l.size());
  bool right = true;
  for (size_t i = 0; i < x.size(); i++) {
    const size_t warp = i / 32 * 32, lane = i % 32;
    float sum = 0;
    for (int k = 0; k < 32; k++) sum += x[warp + k];
    right &= l[4 * i] == sum && l[4 * i + 1] == x[warp + 31] && l[4 * i + 2] == x[lane + 5 < 32 ? i + 5 : i] && l[4 * i + 3] == x[warp + i % n * 7 % 32];
  }
  check("sums, maxima and shuffles of a warp", right);

  const dim3 grid(3, 2, 4), block(5, 3, 2);
  int* seen = device_alloc<int>(24 * 30);
  device_zero(seen, 24 * 30);
  launch(index_kernel, grid, block, 0, seen, grid, block);
  std::vector<int> s(24 * 30);
  to_host(s.data(), seen, s.size());
  bool once = true;
  for (int v : s) once &= v == 1;
  check("every thread of a three-dimensional grid runs exactly once", once);
  device_free(seen);
  device_free(lanes);

#ifdef CPU_BUILD
  auto reported = [&](const char* what, const char* message, auto kernel) {
    const ChildResult r = in_child([&] { kernel(); });
    check(std::string(what) + " is reported with its block, not hung on", r.signal == SIGABRT && r.output.find("block (0,0,0)") != std::string::npos && r.output.find(message) != std::string::npos, "%s", r.output.c_str());
  };
  reported("a divergent barrier", "divergent barrier", [&] { launch(divergent_barrier_kernel, 1, 64, 0, d); });
  reported("a barrier that some threads never reach", "divergent barrier", [&] { launch(early_return_kernel, 1, 64, 0, d); });
  reported("a lane missing from a shuffle", "only 31 of the 32 lanes", [&] { launch(missing_lane_kernel, 1, 32, 0, d); });
  to_device(d, x.data(), x.size());
  launch(forgotten_barrier_kernel, blocks, n, n * sizeof(float), d, n);
  to_host(y.data(), d, y.size());
  int wrong = 0;
  for (int b = 0; b < blocks; b++) for (int i = 0; i < n; i++) wrong += y[b * n + i] != x[b * n + n - 1 - i];
  check("a forgotten barrier gives wrong numbers", wrong > 0, "%d of %d wrong", wrong, n * blocks);
#endif
  device_free(d);
}
