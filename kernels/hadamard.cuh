// kernels/hadamard.cuh -- the random Hadamard transform (RHT) of a group of n = 16, 32, 64 or 128 values.
//
// What    x' = (x * s) Hn / sqrt(n), Hn the Sylvester matrix H[i][j] = (-1)^popcount(i & j), s random signs on the INPUT
//         coordinates. (On the output side signs would do nothing: rounding to nearest is symmetric.)
// Why     It spreads an outlier over its group, so that one large value no longer takes the block's whole range. Both
//         operands of a GEMM are rotated along the contraction axis with the same signs: (X R)(W R)^T = X W^T.
// How     log2(n) butterfly stages of distance 1, 2, 4, ... n/2: n log2(n) additions instead of n^2, in FP32, then times 1/sqrt(n)
//         in FP32. The order fixes the rounding: dev/reference.h repeats it. 16 values fit into one thread; larger groups are
//         shared out among n/4 lanes of a warp, or stay with one thread on the CPU.
// Source  NVIDIA, arXiv 2509.25149 (NVFP4): size 16, one fixed sign vector, wgrad operands only. Quartet, arXiv 2505.14669: 32.
//         Quartet II, arXiv 2601.22813: 128, fresh signs.
#pragma once
#include "cuda.cuh"

// v[i] is negated where bit i of `signs` is set, then rotated.
__host__ __device__ __forceinline__ void rht16(float (&v)[16], uint32_t signs) {
#pragma unroll
  for (int i = 0; i < 16; i++) v[i] = bits_float(float_bits(v[i]) ^ (signs >> i & 1) << 31);
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      if (i & distance) continue;
      const float a = v[i], b = v[i + distance];
      v[i] = a + b;
      v[i + distance] = a - b;
    }
  }
#pragma unroll
  for (int i = 0; i < 16; i++) v[i] *= 0.25f;
}

// The signs of up to 128 inputs; bit i % 64 of word i / 64 set: input i is negated.
struct SignBits {
  uint64_t word[2] = {0, 0};
  __host__ __device__ unsigned negated(int i) const { return (unsigned)(word[i / 64] >> (i % 64)) & 1; }
};
__host__ __device__ __forceinline__ float negate_if(float v, unsigned negate) { return bits_float(float_bits(v) ^ negate << 31); }

// The Hadamard transform of kN values, of which this lane holds number lane + kLanes * j in v[j]. Without signs. With kLanes = 1 a thread
// has them all; else the lanes of a group are neighbours in a warp, and all 32 lanes of the warp take part.
template <int kN, int kLanes> __device__ __forceinline__ void hadamard(float (&v)[kN / kLanes], int lane) {
  constexpr int kPer = kN / kLanes;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {             // partners in two lanes
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const float other = __shfl_xor_sync(0xffffffffu, v[j], distance);
      v[j] = lane & distance ? other - v[j] : v[j] + other;
    }
  }
#pragma unroll
  for (int distance = 1; distance < kPer; distance *= 2) {               // partners in one thread
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      if (j & distance) continue;
      const float a = v[j], b = v[j + distance];
      v[j] = a + b;
      v[j + distance] = a - b;
    }
  }
  constexpr float kScale = kN == 16 ? 0.25f : kN == 32 ? 0.17677669529663687f : kN == 64 ? 0.125f : 0.08838834764831845f;    // 1 / sqrt(n)
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128, "sizes of the RHT");
#pragma unroll
  for (int j = 0; j < kPer; j++) v[j] *= kScale;
}
