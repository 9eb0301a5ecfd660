// kernels/hadamard.cuh -- the random Hadamard transform (RHT) of a group of 16 values held by one thread.
//
// What    x' = (x * s) H16 / 4, H16 the Sylvester matrix H[i][j] = (-1)^popcount(i & j), s random signs on the INPUT
//         coordinates. (On the output side signs would do nothing: rounding to nearest is symmetric.)
// Why     It spreads an outlier over its group of 16, so that one large value no longer takes the block's whole range. Both
//         operands of a GEMM are rotated along the contraction axis with the same signs: (X R)(W R)^T = X W^T.
// How     Four butterfly stages of distance 1, 2, 4, 8: 64 additions instead of 256, in FP32. The order fixes the rounding:
//         dev/reference.h repeats it.
// Source  NVIDIA, arXiv 2509.25149 (NVFP4): size 16, one fixed sign vector, wgrad operands only.
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
