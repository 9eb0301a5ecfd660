// kernels/philox.cuh -- counter-based random numbers: Philox4x32-10.
//
// What    128 random bits = f(128-bit counter, 64-bit key): ten rounds of two 32x32 multiplications. No state, so a kernel
//         draws the numbers of element i without having drawn those before it, on any machine, in any order.
// Source  Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; its known-answer vectors are in dev/test_formats.h.
// Keys    The two operands of one GEMM, the row and the column copy of one tensor, two steps: none may share a stream, or
//         rounding errors correlate and no longer average out. A RandomKey names (seed, step, stream); `stream` is built from
//         layer, GEMM and operand (linear.cuh). The seed is the Philox key; step and stream are half of the counter; the index
//         of a block of 16 elements is the other half (of MS-EDEN's scales: eden_draw()).
// Cost    20 wide multiplications for 16 bytes: one call serves a whole block of 16 elements with 8 bits each.
#pragma once
#include "simd.cuh"

struct RandomKey {
  uint64_t seed;
  uint32_t step;        // optimizer step, micro-batches counted
  uint32_t stream;      // which tensor, which copy
};

// Both halves of a 64-bit product. On a GPU by name: from (uint64_t)a * b nvcc 13.0 makes an addition of zero to the upper half as well, and from a
// product of each half it makes, here and there, two multiplications.
struct Product { uint32_t low, high; };
__host__ __device__ __forceinline__ Product multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  Product p;
  asm("{ .reg .b64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }" : "=r"(p.low), "=r"(p.high) : "r"(a), "r"(b));
  return p;
#else
  const uint64_t p = (uint64_t)a * b;
  return {(uint32_t)p, (uint32_t)(p >> 32)};
#endif
}

// The key of each round. A kernel that is given them, and not the seed, has them ready: two additions a round less.
struct RoundKeys { uint32_t x[10], y[10]; };
__host__ __device__ inline RoundKeys round_keys(uint64_t seed) {
  RoundKeys keys;
#pragma unroll
  for (uint32_t round = 0; round < 10; round++) {
    keys.x[round] = (uint32_t)seed + round * 0x9E3779B9u;               // golden ratio
    keys.y[round] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;       // sqrt(3) - 1
  }
  return keys;
}
__host__ __device__ __forceinline__ uint4 philox4x32(uint4 counter, const RoundKeys& key) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const Product a = multiply_wide(0xD2511F53u, counter.x), b = multiply_wide(0xCD9E8D57u, counter.z);
    counter = make_uint4(b.high ^ counter.y ^ key.x[round], b.low, a.high ^ counter.w ^ key.y[round], a.low);
  }
  return counter;
}
__host__ __device__ inline uint4 philox4x32(uint4 counter, uint2 key) { return philox4x32(counter, round_keys((uint64_t)key.y << 32 | key.x)); }

// The 16 random bytes of block `index` of the stream: byte j%4 of word j/4 belongs to element j. rounds: those of the key's seed, if they are at hand.
__host__ __device__ __forceinline__ uint4 random_block(RandomKey key, const RoundKeys& rounds, uint64_t index) {
  return philox4x32(make_uint4((uint32_t)index, (uint32_t)(index >> 32), key.step, key.stream), rounds);
}
__host__ __device__ inline uint4 random_block(RandomKey key, uint64_t index) { return random_block(key, round_keys(key.seed), index); }
#ifdef CPU_BUILD
// r[i] = random_block(key, first + i) of eight blocks at once: one at a time, each round waits for the multiplications of the last.
inline void random_blocks8(uint4 (&r)[8], RandomKey key, uint64_t first) {
  word8 x, y, z = all8(key.step), w = all8(key.stream), high_x, low_x, high_z, low_z;
  for (int i = 0; i < 8; i++) { x[i] = (uint32_t)(first + i); y[i] = (uint32_t)((first + i) >> 32); }
  uint32_t a = (uint32_t)key.seed, b = (uint32_t)(key.seed >> 32);
  for (int round = 0; round < 10; round++, a += 0x9E3779B9u, b += 0xBB67AE85u) {
    multiply_wide8(high_x, low_x, x, 0xD2511F53u);
    multiply_wide8(high_z, low_z, z, 0xCD9E8D57u);
    x = high_z ^ y ^ a;
    y = low_z;
    z = high_x ^ w ^ b;
    w = low_x;
  }
  for (int i = 0; i < 8; i++) r[i] = make_uint4(x[i], y[i], z[i], w[i]);
}
#endif
