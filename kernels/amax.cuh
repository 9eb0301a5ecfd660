// kernels/amax.cuh -- max|x| of what a kernel stores, taken while it has it in registers.
//
// An operand under one scale for the whole tensor needs max|x| before its first code, and a search for it reads x once (quantize.cuh, pass 1: about
// 1 % of a step in quartet2). The kernels that write the inputs of linear layers find it on the way: norms, attention and SwiGLU take `float* amax`,
// a device scalar that holds 0, or null. It is the maximum of what was stored, rounded to floatX, and has the bits that the search finds: a NaN is
// above all and stays. (GELU's output is written by the GEMM.)
// Cost    BF16 on a GPU: one operation for two elements, and a few for a warp.
#pragma once
#include "ptx.cuh"      // defines: max_abs_bf16x2, pair_amax_bits

// What one thread has stored, as vectors of N. Pairs of BF16 are compared as they lie in a word.
template <class T, int N> struct StoredMax {
  static constexpr bool kPairs = sizeof(T) == 2 && N % 2 == 0;
  uint32_t most = 0;
  __device__ __forceinline__ void add(const Vec<T, N>& x) {
    if constexpr (kPairs) {
      uint32_t word[N / 2];
      memcpy(word, &x, sizeof x);
#pragma unroll
      for (int i = 0; i < N / 2; i++) most = max_abs_bf16x2(most, word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) most = max(most, float_bits(to_float(x.v[i])) & 0x7fffffffu);
    }
  }
  __device__ __forceinline__ uint32_t bits() const { return kPairs ? pair_amax_bits(most) : most; }
};

// amax = max(amax, bits), for one thread of as many as share a maximum. Few of them raise it, and only these write.
__device__ inline void raise_amax(float* amax, uint32_t bits) {
  bits = arithmetic_nan(bits);                               // as a search has it
  if (bits > *(const volatile uint32_t*)amax) atomicMax((unsigned*)amax, bits);
}
