// kernels/estimator.cuh -- the gradient through a quantizer, where a recipe does not simply pretend that it is not there.
//
// A quantizer is a staircase: its slope is 0 almost everywhere. Straight-through estimation (ste) takes 1 instead and needs no code. Two recipes
// multiply the gradient by something, element by element; both work on the FP32 result of dgrad or wgrad before it goes to dX or dW.
//
// Rotated    A forward pass that rotates its operands (X H)(W H)^T, H orthogonal, computes with (W H) quantized. If the backward takes that
// gradient   very operand (double quantization), its GEMM gives the gradient with respect to X H: dX = (dXh) H^T, and with signs s on the
//            input side, x' = (x s) H, dX = (dXh H) s. Likewise dW. Sylvester's H is symmetric: the same butterflies.
// quest_mask dX = (dXh * M_x) H, dW = (dWh * M_w) H; M = 1 where the forward did not clip.          Quartet, arXiv 2505.14669
// dge        dW = (dY^T X) * f'(W / scale), f the staircase smoothed: in the interval [lo, hi] of the grid around x
//                f'(x) = min(3, (1/k) |u|^(1/k - 1)),   u = 2 (x - lo) / (hi - lo) - 1                  Wang et al., arXiv 2501.17116
//            k = 5: .2 at the grid points, 3 in the middle of an interval, where the staircase jumps.
// Shapes     g [rows, width] FP32, width = cols rounded up to whole groups of the rotation; out [rows, cols].
// Cost       reads g (4 bytes) and a bit of mask, writes 2 (dX) or reads and writes 4 (dW) bytes an element: bound by memory.
#pragma once
#include "quantize.cuh"

// ------------------------------------------------------------------ mask and un-rotation
template <class T> __device__ inline void put(T* out, float v, bool accumulate) { *out = from_float<T>(accumulate ? __fadd_rn(to_float(*out), v) : v); }
// A block takes 32 rows of one group of kN columns; kLanes threads share a row's group, as in gather_kernel.
template <int kN, int kLanes, bool kRotate, class Out>
__global__ void unrotate_kernel(Out* out, const float* g, const uint32_t* mask, int rows, int cols, int width, int mask_words, SignBits signs,
                                bool accumulate) {
  constexpr int kPer = kN / kLanes;
  const int first_col = blockIdx.x * kN, lane = threadIdx.x % kLanes;
  for (int r = threadIdx.x / kLanes; r < 32; r += blockDim.x / kLanes) {     // whole warps leave together
    const int row = blockIdx.y * 32 + r;
    float v[kPer];
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const int c = first_col + lane + kLanes * j;
      v[j] = row < rows && c < width ? g[(size_t)row * width + c] : 0.0f;
      if (mask && row < rows && c < width && !(mask[(size_t)row * mask_words + c / 32] >> (c % 32) & 1)) v[j] = 0;
    }
    if constexpr (kRotate) hadamard<kN, kLanes>(v, lane);
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const int i = lane + kLanes * j, c = first_col + i;
      if (kRotate) v[j] = negate_if(v[j], signs.negated(i));
      if (row < rows && c < cols) put(out + (size_t)row * cols + c, v[j], accumulate);
    }
  }
}
// out [rows, cols] = (g * mask) H s, or added to what is there. mask: null, or [rows, mask_words]; rht 0: no rotation.
template <class Out>
void unrotate(Out* out, const float* g, const uint32_t* mask, int mask_words, int rows, int cols, int rht, SignBits signs, bool accumulate) {
  auto go = [&](auto n, auto rotate) {
    constexpr int kN = n.value, kLanes = kOnCpu ? 1 : kN / 4;
    const dim3 grid(ceil_div(cols, kN), ceil_div(rows, 32));
    launch(unrotate_kernel<kN, kLanes, rotate.value, Out>, grid, kOnCpu ? 32 : 256, 0, out, g, mask, rows, cols, rotated_cols(cols, rht), mask_words, signs,
           accumulate);
  };
  switch (rht) {
    case 0: return go(std::integral_constant<int, 32>{}, std::false_type{});
    case 16: return go(std::integral_constant<int, 16>{}, std::true_type{});
    case 32: return go(std::integral_constant<int, 32>{}, std::true_type{});
    case 64: return go(std::integral_constant<int, 64>{}, std::true_type{});
    case 128: return go(std::integral_constant<int, 128>{}, std::true_type{});
  }
}

// ------------------------------------------------------------------ DGE
// f'(x) on the E2M1 grid.
__host__ __device__ inline float dge_slope(float x, float k) {
  const float a = fminf(fabsf(x), kE2M1Max), step = a < 2 ? 0.5f : a < 4 ? 1.0f : 2.0f, lo = a < 2 ? floorf(2 * a) / 2 : a < 4 ? floorf(a) : 4.0f;
  const float u = fabsf(2 * (a - lo) / step - 1);
  return u == 0 ? 3.0f : fminf(3.0f, powf(u, 1 / k - 1) / k);
}
__global__ void dge_kernel(float* dW, const float* g, const floatX* W, Operand4 w, OperandRecipe how, float k, int rows, int cols) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i / cols, col = i % cols;
  if (row >= (unsigned)rows) return;
  const ElementScale s = element_scale(w, how, row, col);
  dW[i] = __fadd_rn(dW[i], __fmul_rn(g[i], dge_slope(to_float(W[i]) / (s.block * s.outer), k)));
}
// dW [rows, cols] += g * f'(W / scale), the scales from the forward's packed operand w.
inline void dge(float* dW, const float* g, const floatX* W, const Operand4& w, const OperandRecipe& how, float k, int rows, int cols) {
  launch(dge_kernel, ceil_div((unsigned)rows * cols, 256u), 256, 0, dW, g, W, w, how, k, rows, cols);
}
