// kernels/simd.cuh -- eight floats at a time, for the CPU build: where a compiler leaves a loop of a hot kernel scalar, it is written with these.
//
// The vector types of g++ and clang++, on any machine; AVX2 makes each an instruction or two. Element by element the results are those of the
// scalar code, bit for bit.
#pragma once
#include "cuda.cuh"

#ifdef CPU_BUILD
#ifdef __AVX2__
#include <immintrin.h>
#endif
typedef float float8 __attribute__((vector_size(32)));
typedef uint32_t word8 __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)       // element k of the result: a[k], or b[k - 8]
#else
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, (word8){__VA_ARGS__})
#endif

__forceinline__ float8 load8(const float* x) { float8 v; memcpy(&v, x, sizeof v); return v; }
typedef uint16_t half8 __attribute__((vector_size(16)));
__forceinline__ float8 load8(const bf16* x) {
  half8 v;
  memcpy(&v, x, sizeof v);
  return (float8)(__builtin_convertvector(v, word8) << 16);
}
__forceinline__ void store8(float* x, float8 v) { memcpy(x, &v, sizeof v); }
__forceinline__ void store8(bf16* x, float8 v) {                               // rounded as by to_bf16()
  const word8 u = (word8)v, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = word8{} + 0x7fff;
  const half8 h = __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, half8);
  memcpy(x, &h, sizeof h);
}
__forceinline__ word8 all8(uint32_t x) { return word8{} + x; }
// The two halves of the products of 32-bit words.
__forceinline__ void multiply_wide8(word8& high, word8& low, word8 a, uint32_t b) {
#ifdef __AVX2__
  const __m256i times = _mm256_set1_epi32((int)b);
  const __m256i even = _mm256_mul_epu32((__m256i)a, times), odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), times);
  low = (word8)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (word8)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < 8; i++) { const uint64_t p = (uint64_t)a[i] * b; high[i] = (uint32_t)(p >> 32); low[i] = (uint32_t)p; }
#endif
}
// r[i][j] <- r[j][i]
__forceinline__ void transpose8(float8 (&r)[8]) {
  float8 p[8], q[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    p[i] = SHUFFLE8(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    p[i + 1] = SHUFFLE8(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; n++) {
    const int i = n / 2 * 4, h = n % 2;
    q[i + 2 * h] = SHUFFLE8(p[i + h], p[i + 2 + h], 0, 1, 8, 9, 4, 5, 12, 13);
    q[i + 2 * h + 1] = SHUFFLE8(p[i + h], p[i + 2 + h], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = SHUFFLE8(q[i], q[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = SHUFFLE8(q[i], q[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#endif
