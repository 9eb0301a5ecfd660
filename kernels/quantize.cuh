// kernels/quantize.cuh -- one GEMM operand, from BF16 (or FP32) to NVFP4.
//
// What    x[16] -> 16 E2M1 codes + one E4M3 scale byte, under one FP32 scale for the whole tensor. In FP32, in exactly this order:
//
//             S_enc = min(448*6 / amax, FLT_MAX);  1 if amax is 0 or inf         amax = max|x| of the tensor
//             byte  = e4m3( min(block_amax * (S_enc * (1/6)), FLT_MAX) )
//             enc   = min( 1 / (float(byte) * (1/S_enc)), FLT_MAX )
//             code  = e2m1( x * enc )                                            to nearest, or stochastically
//             value = code * float(byte) * amax / (6*448)                        the last factor goes to the GEMM's alpha
//
//         Two levels of scale: E4M3 alone spans too little. About half of all blocks land slightly above 6 (up to 6.375, since
//         the byte may have been rounded down) and saturate.
// Shapes  An operand is [rows, cols] with blocks along cols, the contraction axis of its GEMM. The same kernel makes the row copy
//         (of x itself) and the column copy (of x transposed): one thread gathers the 16 values of a block wherever they lie.
//         On the way it may rotate them (RHT, then rounded to BF16, so that one tensor in memory could have been the input).
// Output  packed: codes [rows, ld/2], two a byte, even element in the low nibble; scales in the 128x4 layout (formats.cuh)
//         values: floatX [rows, ld], code * byte, which BF16 holds exactly: a BF16 GEMM on them computes what an FP4 tensor
//                 core computes. Either or both may be asked for.
//         ld = operand_ld(cols) is a multiple of 32. Padding columns hold zeros, padding scales too.
// Blocks  1x16, or 16x16 (weights): one amax for a 16x16 tile, its byte repeated for its 16 rows, so that W and W^T hold the same
//         codes and scales.
// NaN     A NaN anywhere makes amax NaN (an unsigned comparison of bits, not fmaxf, which drops it), hence alpha NaN, hence the
//         loss: E2M1 itself has no NaN and would hide it as 6.
// Source  NVIDIA, arXiv 2509.25149, appendix C. Random bits: philox.cuh.
// Cost    amax: reads x once. Codes: reads x once, writes 2 bytes a value (values) or 0.56 (packed). About 20 operations a value
//         with RN, 30 with SR, 4 more with RHT: bound by memory on a GPU.
#pragma once
#include "formats.cuh"
#include "hadamard.cuh"
#include "philox.cuh"

struct Operand4 {
  int rows = 0, cols = 0, ld = 0;   // [rows, cols], cols = contraction axis, ld = operand_ld(cols)
  uint8_t* codes = nullptr;         // [rows, ld/2]
  uint8_t* scales = nullptr;        // scale_bytes(rows, cols) bytes, 128x4 tiled
  floatX* values = nullptr;         // [rows, ld]
  float* amax = nullptr;            // device scalar: max|x| after rotation
};
inline int operand_ld(int cols) { return round_up(cols, 32); }

struct QuantizeHow {
  bool transpose = false;           // quantize x^T
  bool tile16 = false;              // 16x16 blocks instead of 1x16
  bool stochastic = false;          // stochastic rounding instead of nearest-even
  int hadamard = 0;                 // 0, or 16
  uint32_t signs = 0;               // of the rotation: bit i set negates input i
  RandomKey key = {};               // of the stochastic rounding
};

// ------------------------------------------------------------------ the pieces
struct TensorScale { float encode, decode; };      // S_enc and 1 / S_enc
__host__ __device__ inline TensorScale tensor_scale(float amax) {
  float s = fminf(kE4M3Max * kE2M1Max / amax, FLT_MAX);
  if (amax == 0 || amax == INFINITY) s = 1;
  return {s, 1.0f / s};
}
// The factor that a GEMM's alpha takes for this operand.
__host__ __device__ inline float tensor_scale_decode(float amax) { return amax / (kE4M3Max * kE2M1Max); }

// The 16 values of block (row, block) of the operand, zeros beyond the edge, rotated if asked.
template <bool kTranspose, bool kHadamard, class T>
__device__ __forceinline__ void load_block(float (&v)[16], const T* x, int row, int block, int rows, int cols, uint32_t signs) {
  const int first = block * 16;
  if (kTranspose) {                                // x is [cols, rows]
    const T* p = x + (size_t)first * rows + row;
#pragma unroll
    for (int j = 0; j < 16; j++) v[j] = first + j < cols ? to_float(p[(size_t)j * rows]) : 0.0f;
  } else {
    const T* p = x + (size_t)row * cols + first;
    if (first + 16 <= cols && cols % 8 == 0) {     // rows start on 16-byte boundaries
      const Vec<T, 16> a = load_vec<16>(p);
#pragma unroll
      for (int j = 0; j < 16; j++) v[j] = to_float(a.v[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 16; j++) v[j] = first + j < cols ? to_float(p[j]) : 0.0f;
    }
  }
  if (kHadamard) {
    rht16(v, signs);
#pragma unroll
    for (int j = 0; j < 16; j++) v[j] = to_float(to_bf16(v[j]));
  }
}
// max|v| as the bits of a nonnegative float: ordered like the floats themselves, with NaN above all.
__device__ __forceinline__ unsigned block_amax_bits(const float (&v)[16]) {
  unsigned m = 0;
#pragma unroll
  for (int j = 0; j < 16; j++) m = max(m, float_bits(v[j]) & 0x7fffffffu);
  return m;
}

// ------------------------------------------------------------------ pass 1: amax of the tensor (and of its 16x16 tiles)
template <bool kTranspose, bool kHadamard, bool kTile16, int kLanes, class T>
__global__ void amax_kernel(unsigned* amax, unsigned* tile_amax, const T* x, int rows, int cols, uint32_t signs) {
  const unsigned blocks = ceil_div(cols, 16), n = (unsigned)rows * blocks;
  unsigned most = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const int row = kTranspose ? i % rows : i / blocks, block = kTranspose ? i / rows : i % blocks;   // neighbours in memory
    float v[16];
    load_block<kTranspose, kHadamard>(v, x, row, block, rows, cols, signs);
    const unsigned m = block_amax_bits(v);
    if (kTile16) atomicMax(&tile_amax[row / 16 * blocks + block], m);
    most = max(most, m);
  }
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, o));
  if (threadIdx.x % kLanes == 0) atomicMax(amax, most);
}

// ------------------------------------------------------------------ pass 2: codes and scales
template <bool kTranspose, bool kHadamard, bool kTile16, bool kStochastic, class T>
__global__ void quantize_kernel(Operand4 out, const unsigned* tile_amax, const T* x, unsigned rows_covered, unsigned blocks_covered, uint32_t signs, RandomKey key) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows_covered * blocks_covered) return;
  const int row = kTranspose ? i % rows_covered : i / blocks_covered, block = kTranspose ? i / rows_covered : i % blocks_covered;
  const int blocks = ceil_div(out.cols, 16);
  if (row >= out.rows || block >= blocks) {        // padding
    if (out.scales) out.scales[scale_offset(row, block, blocks)] = 0;
    if (row < out.rows && block * 16 < out.ld) {
      if (out.codes) *reinterpret_cast<uint2*>(out.codes + ((size_t)row * out.ld + block * 16) / 2) = make_uint2(0, 0);
      if (out.values) for (int j = 0; j < 16; j++) out.values[(size_t)row * out.ld + block * 16 + j] = from_float<floatX>(0);
    }
    return;
  }
  float v[16];
  load_block<kTranspose, kHadamard>(v, x, row, block, out.rows, out.cols, signs);
  const float block_amax = bits_float(kTile16 ? tile_amax[row / 16 * blocks + block] : block_amax_bits(v));
  const TensorScale s = tensor_scale(*out.amax);
  const uint8_t byte = e4m3_encode(fminf(block_amax * (s.encode * (1.0f / 6.0f)), FLT_MAX));
  const float scale = e4m3_decode(byte), enc = fminf(1.0f / (scale * s.decode), FLT_MAX);

  int index[16];
  if (kStochastic) {
    const uint4 r = random_block(key, (uint64_t)row * blocks + block);
    uint8_t random[16];
    memcpy(random, &r, 16);
    float u[16];                                   // midpoints of 256 intervals: unbiased, and never 0 or 1
#pragma unroll
    for (int j = 0; j < 16; j++) u[j] = (float)(2 * random[j] + 1) * (1.0f / 512);
#pragma unroll
    for (int j = 0; j < 16; j++) index[j] = e2m1_index_sr(fabsf(__fmul_rn(v[j], enc)), u[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 16; j++) index[j] = e2m1_index_rn(fabsf(__fmul_rn(v[j], enc)));
  }

  if (out.codes) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 16; j++) words[j / 8] |= (uint32_t)(index[j] | e2m1_sign(__fmul_rn(v[j], enc))) << (4 * (j % 8));
    *reinterpret_cast<uint2*>(out.codes + ((size_t)row * out.ld + block * 16) / 2) = make_uint2(words[0], words[1]);
    out.scales[scale_offset(row, block, blocks)] = byte;
  }
  if (out.values) {
    Vec<floatX, 16> q;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float magnitude = e2m1_magnitude(index[j]) * scale;
      q.v[j] = from_float<floatX>(bits_float(float_bits(magnitude) | (float_bits(v[j]) & 0x80000000u)));
    }
    store_vec(out.values + (size_t)row * out.ld + block * 16, q);
  }
}

// ------------------------------------------------------------------ the host side
template <bool kTranspose, bool kHadamard, bool kTile16, bool kStochastic, class T>
void quantize_launch(Operand4 out, const T* x, const QuantizeHow& how, uint32_t* tile_scratch) {
  const unsigned blocks = ceil_div(out.cols, 16);
  device_zero(out.amax, 1);
  if (kTile16) device_zero(tile_scratch, (size_t)ceil_div(out.rows, 16) * blocks);
  constexpr int kThreads = kOnCpu ? 32 : 256;
  const unsigned grid = min((unsigned)reduction_blocks(), ceil_div((unsigned)out.rows * blocks, (unsigned)kThreads));
  launch(amax_kernel<kTranspose, kHadamard, kTile16, kRowLanes, T>, grid, kThreads, 0, (unsigned*)out.amax, tile_scratch, x, out.rows, out.cols, how.signs);
  // The scale buffer has padding rows and blocks to clear; the emulation has neither, only columns up to ld.
  const unsigned rows_covered = out.scales ? round_up(out.rows, 128) : out.rows, blocks_covered = out.scales ? round_up(blocks, 4u) : out.ld / 16;
  launch(quantize_kernel<kTranspose, kHadamard, kTile16, kStochastic, T>, ceil_div(rows_covered * blocks_covered, 256u), 256, 0, out, tile_scratch, x,
         rows_covered, blocks_covered, how.signs, how.key);
}

// Quantizes x, row-major bf16 or float, into the operand `out`, whose shape is that of x (or of x^T with how.transpose) and whose
// pointers say what is written. tile_scratch: ceil(rows/16) * ceil(cols/16) words, needed for 16x16 blocks only.
// The source's rows and the operand's must start on 16-byte boundaries where cols is a multiple of 8 (any device_alloc does).
template <class T> void quantize_nvfp4(Operand4 out, const T* x, const QuantizeHow& how, uint32_t* tile_scratch = nullptr) {
  if ((size_t)round_up(out.rows, 128) * round_up(out.cols, 64) / 16 >= 1u << 31) die("operand [%d, %d] is too large to quantize in one piece; lower --batch", out.rows, out.cols);
  if (out.ld != operand_ld(out.cols) || (how.hadamard != 0 && how.hadamard != 16) || (how.tile16 && !tile_scratch) || (!out.codes != !out.scales))
    die("quantize_nvfp4: operand [%d, %d] ld %d: bad leading dimension, Hadamard size %d, or missing buffers", out.rows, out.cols, out.ld, how.hadamard);
  auto go = [&](auto transpose, auto hadamard, auto tile16, auto stochastic) {
    quantize_launch<transpose.value, hadamard.value, tile16.value, stochastic.value>(out, x, how, tile_scratch);
  };
  auto choose = [](bool b, auto next) { if (b) next(std::true_type{}); else next(std::false_type{}); };
  choose(how.transpose, [&](auto t) { choose(how.hadamard == 16, [&](auto h) { choose(how.tile16, [&](auto b) { choose(how.stochastic, [&](auto s) { go(t, h, b, s); }); }); }); });
}

// alpha = product of the two operands' tensor scales, one of them absent (null) for an operand that is not quantized.
__global__ void alpha_kernel(float* alpha, const float* amax_a, const float* amax_b) {
  const float a = amax_a ? tensor_scale_decode(*amax_a) : 1.0f, b = amax_b ? tensor_scale_decode(*amax_b) : 1.0f;
  *alpha = a * b;
}
inline void gemm_alpha(float* alpha, const float* amax_a, const float* amax_b) { launch(alpha_kernel, 1, 1, 0, alpha, amax_a, amax_b); }
