// kernels/linear.cuh -- forward and backward of a linear layer Y = X W^T under a recipe.
//
// X [T,K], W [N,K], Y [T,N], all row-major floatX; dW [N,K] FP32, accumulated. The three GEMMs and their six operands are those of
// recipe.cuh. Each operand is either the tensor itself, or is quantized on the way into scratch memory that the next layer reuses:
// row copies for fprop's X and W and dgrad's dY, column (transposed) copies for dgrad's W^T, wgrad's dY^T and X^T.
// Biases, activations and residuals are other kernels' work.
#pragma once
#include "gemm.cuh"
#include "quantize.cuh"
#include "recipe.cuh"

// Which random numbers a layer draws: every (layer, operand) has its own stream of every step.
struct LinearKey {
  uint64_t seed = 0;
  uint32_t step = 0;                        // counts micro-batches
  uint32_t layer = 0;                       // unique for every linear layer of the model
};
enum OperandIndex { kFpropX, kFpropW, kDgradDy, kDgradW, kWgradDy, kWgradX };

// Scratch for the two quantized operands of the GEMM in flight.
struct LinearScratch {
  floatX* values[2] = {};                   // each linear_scratch_elements(...) elements
  uint32_t* tiles = nullptr;                // 16x16 blocks: one word a tile of the largest weight
  float* scalars = nullptr;                 // amax of operand 1, amax of operand 2, alpha
};
// Elements that one quantized operand of a layer with these shapes may take.
inline size_t linear_scratch_elements(int T, int K, int N) {
  const size_t a = (size_t)T * operand_ld(K), b = (size_t)T * operand_ld(N), c = (size_t)K * operand_ld(T), d = (size_t)N * operand_ld(T);
  const size_t e = (size_t)N * operand_ld(K), f = (size_t)K * operand_ld(N);
  return max(max(max(a, b), max(c, d)), max(e, f));
}
inline size_t linear_tile_words(int T, int K, int N) {
  const size_t t = ceil_div(T, 16), k = ceil_div(K, 16), n = ceil_div(N, 16);
  return max(max(t * k, t * n), n * k);
}

// An operand ready for the GEMM.
struct ReadyOperand { const floatX* data; int ld; bool transposed; const float* amax; };

// x is [rows, cols] in memory; with `transpose` the operand is x^T. slot: 0 for operand 1 of the GEMM, 1 for operand 2.
inline ReadyOperand prepare_operand(const OperandRecipe& how, OperandIndex which, const floatX* x, int rows, int cols, bool transpose, int slot, LinearKey key, const LinearScratch& s) {
  if (how.format == Format::bf16) return {x, cols, transpose, nullptr};
  Operand4 out;
  out.rows = transpose ? cols : rows;
  out.cols = transpose ? rows : cols;
  out.ld = operand_ld(out.cols);
  out.values = s.values[slot];
  out.amax = s.scalars + slot;
  QuantizeHow q;
  q.transpose = transpose;
  q.tile16 = how.blocks == Blocks::b16x16;
  q.stochastic = how.rounding == Rounding::stochastic;
  q.hadamard = how.rht;
  q.signs = kFixedSigns;
  q.key = {key.seed, key.step, key.layer * 8 + (uint32_t)which};
  quantize_nvfp4(out, x, q, s.tiles);
  return {out.values, out.ld, false, out.amax};
}
inline void run_gemm(Gemm g, const ReadyOperand& a, const ReadyOperand& b, const LinearScratch& s) {
  g.A = a.data; g.lda = a.ld; g.a_transposed = a.transposed;
  g.B = b.data; g.ldb = b.ld; g.b_transposed = b.transposed;
  if (a.amax && b.amax) g.K = a.ld;          // the padding too: zeros, except in a last group of 16 that was rotated and is full
  if (a.amax || b.amax) {
    gemm_alpha(s.scalars + 2, a.amax, b.amax);
    g.alpha = s.scalars + 2;
  }
  gemm(g);
}

// Y = X W^T
inline void linear_forward(floatX* Y, const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key, const LinearScratch& s) {
  const ReadyOperand x = prepare_operand(r.fprop.x, kFpropX, X, T, K, false, 0, key, s);
  const ReadyOperand w = prepare_operand(r.fprop.w, kFpropW, W, N, K, false, 1, key, s);
  Gemm g;
  g.M = T; g.N = N; g.K = K; g.D = Y; g.ldd = N;
  run_gemm(g, x, w, s);
}

// dX = dY W
inline void linear_dgrad(floatX* dX, const floatX* dY, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key, const LinearScratch& s) {
  const ReadyOperand dy = prepare_operand(r.dgrad.dy, kDgradDy, dY, T, N, false, 0, key, s);
  const ReadyOperand w = prepare_operand(r.dgrad.w, kDgradW, W, N, K, true, 1, key, s);
  Gemm g;
  g.M = T; g.N = K; g.K = N; g.D = dX; g.ldd = K;
  run_gemm(g, dy, w, s);
}

// dW += dY^T X, in FP32
inline void linear_wgrad(float* dW, const floatX* dY, const floatX* X, int T, int K, int N, const Recipe& r, LinearKey key, const LinearScratch& s) {
  const ReadyOperand dy = prepare_operand(r.wgrad.dy, kWgradDy, dY, T, N, true, 0, key, s);
  const ReadyOperand x = prepare_operand(r.wgrad.x, kWgradX, X, T, K, true, 1, key, s);
  Gemm g;
  g.M = N; g.N = K; g.K = T; g.D = dW; g.ldd = K; g.d_fp32 = true; g.accumulate = true;
  run_gemm(g, dy, x, s);
}

// Both gradients; dX may be null (the first layer of a model that ends there).
inline void linear_backward(floatX* dX, float* dW, const floatX* dY, const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key, const LinearScratch& s) {
  if (dX) linear_dgrad(dX, dY, W, T, K, N, r, key, s);
  linear_wgrad(dW, dY, X, T, K, N, r, key, s);
}
