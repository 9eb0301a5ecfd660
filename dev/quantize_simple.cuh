// dev/quantize_simple.cuh -- the first chapter of kernels/quantize.cuh: NVFP4 in blocks of 1x16, one thread a block, two kernels.
//
// Read this before the fast kernels: it has their arithmetic and nothing else. A thread gathers the 16 values of its block wherever they lie (along a
// row, or down a column for the transposed copy), rotates them if asked, finds their scale, rounds, and stores. Twice over x: the scale of the tensor
// comes first. `make bench` times it beside the fast kernels, and a test holds their bits against each other.
// What is slow in it: the threads of a warp read 2 bytes each in the column copy; amax reads everything once more, and rotates it once more; codes are
// integers on their way to being floats again; every block finds the scale of the tensor anew.
#pragma once
#include "../kernels/quantize.cuh"

template <bool kTranspose> __device__ inline void simple_block(float (&v)[16], const bf16* x, int row, int block, int rows, int cols, const QuantizeHow& how) {
  for (int j = 0; j < 16; j++) {
    const int c = block * 16 + j;
    v[j] = c < cols ? to_float(kTranspose ? x[(size_t)c * rows + row] : x[(size_t)row * cols + c]) : 0.0f;
  }
  if (how.recipe.rht == 0) return;
  rht16(v, (uint32_t)how.sign_bits[0]);
  for (int j = 0; j < 16; j++) v[j] = to_float(to_bf16(v[j]));
}
template <bool kTranspose> __global__ void simple_amax_kernel(unsigned* amax, const bf16* x, int rows, int cols, QuantizeHow how) {
  const int blocks = ceil_div(cols, 16), i = blockIdx.x * blockDim.x + threadIdx.x, row = kTranspose ? i % rows : i / blocks;
  if (i >= rows * blocks) return;
  float v[16];
  simple_block<kTranspose>(v, x, row, kTranspose ? i / rows : i % blocks, rows, cols, how);
  unsigned most = 0;
  for (int j = 0; j < 16; j++) most = max(most, float_bits(v[j]) & 0x7fffffffu);
  atomicMax(amax, most);
}
template <bool kTranspose> __global__ void simple_quantize_kernel(floatX* values, const bf16* x, int rows, int cols, int ld, QuantizeHow how, const float* amax) {
  const int blocks = ceil_div(cols, 16), i = blockIdx.x * blockDim.x + threadIdx.x;
  const int row = kTranspose ? i % rows : i / blocks, block = kTranspose ? i / rows : i % blocks;
  if (i >= rows * blocks) return;
  float v[16];
  simple_block<kTranspose>(v, x, row, block, rows, cols, how);
  float block_amax = 0;
  for (int j = 0; j < 16; j++) block_amax = fmaxf(block_amax, fabsf(v[j]));
  const TensorScale t = tensor_scale(*amax);
  const float scale = e4m3_decode(e4m3_encode(fminf(block_amax * (t.encode * (1.0f / 6)), FLT_MAX))), encode = fminf(1 / (scale * t.decode), FLT_MAX);
  const uint4 random = random_block(how.key, (uint64_t)row * blocks + block);
  const uint32_t words[4] = {random.x, random.y, random.z, random.w};
  for (int j = 0; j < 16; j++) {
    const float on_grid = __fmul_rn(v[j], encode), u = byte_uniform(words[j / 4] >> (8 * (j % 4)) & 0xff);
    const int code = how.recipe.rounding == Rounding::stochastic ? e2m1_encode_sr(on_grid, u) : e2m1_encode(on_grid);
    values[(size_t)row * ld + block * 16 + j] = from_float<floatX>(e2m1_decode(code) * scale);
  }
}
// out.values and out.amax of quantize() for nvfp4, blocks 1x16, one scale a tensor, rht 0 or 16. Finite x. Columns from cols rounded up to 16 on are
// not written.
inline void quantize_simple(const Operand4& out, const bf16* x, const QuantizeHow& how) {
  const unsigned grid = ceil_div((unsigned)out.rows * ceil_div(out.cols, 16), 128u);
  device_zero(out.amax, 1);
  auto go = [&](auto amax_kernel, auto kernel) {
    launch(amax_kernel, grid, 128, 0, (unsigned*)out.amax, x, out.rows, out.cols, how);
    launch(kernel, grid, 128, 0, out.values, x, out.rows, out.cols, out.ld, how, (const float*)out.amax);
  };
  if (how.transpose) go(simple_amax_kernel<true>, simple_quantize_kernel<true>);
  else go(simple_amax_kernel<false>, simple_quantize_kernel<false>);
}
