// kernels/quantize.cuh -- one GEMM operand, from BF16 (or FP32) to FP4 or FP8, as its words in recipe.cuh say.
//
// Shapes  An operand is [rows, cols] with blocks along cols, the contraction axis of its GEMM. The same kernels make the row copy
//         (of x itself) and the column copy (of x transposed): one thread gathers the values of a block wherever they lie.
// Output  packed: codes and block scales, outer scales, and QuEST's mask (struct Operand4)
//         values: floatX [rows, ld], code * block scale, which BF16 holds exactly: a BF16 GEMM on them computes what an FP4 tensor
//                 core computes. Either or both may be asked for.
//         ld = operand_ld(cols) is a multiple of 32. Padding columns hold zeros, padding scales too.
//
// nvfp4   x[16] -> 16 E2M1 codes + one E4M3 scale byte, under one FP32 scale for the tensor. In FP32, in exactly this order:
//
//             S_enc = min(448*6 / amax, FLT_MAX);  1 if amax is 0 or inf         amax = max|x| of the tensor; four_six: 256 instead of 448
//             byte  = e4m3( min(block_amax * (S_enc * (1/6)), FLT_MAX) )
//             enc   = min( 1 / (float(byte) * (1/S_enc)), FLT_MAX )
//             code  = e2m1( x * enc )                                            to nearest, or stochastically
//             value = code * float(byte) * amax / (6*448)                        the last factor goes to the GEMM's alpha
//
//         Two levels of scale: E4M3 alone spans too little. About half of all blocks land slightly above 6 (up to 6.375, since
//         the byte may have been rounded down) and saturate.
//         Blocks 16x16: one amax for a tile, its byte repeated for its 16 rows, so that W and W^T hold the same codes and scales.
//         Outer 1x128 (TetraJet-v2): os = amax128/448/6; s = amax16/os/6; byte = e4m3(s), 2^-9 where that is 0; code = e2m1(x / (os*float(byte))).
//         MS-EDEN (Quartet II): t = amax/255.99/s, s = 6/((17/16)*.93); byte = e4m3(amax16/s/t), 1.0 where that is 0; v = x/(byte*t);
//         code = e2m1(v) to nearest; S = sum(v*v)/sum(v*code); byte = e4m3_sr(byte * S). The 256 leaves headroom for S > 1.
// mxfp4   x[32] -> 32 E2M1 codes + one E8M0 byte e:  code = e2m1(x / 2^e), value = code * 2^e. No scale of the tensor, but range34 rounds
//         3x / 2^e and leaves the factor 1/3 to alpha.
// mxfp8   the same with E4M3 codes and e = ceil(log2(amax/448)).
// fp4_vector   code = e2m1(x / s), s = amax of the row / 6. The value is code * s, rounded to floatX: relative error 2^-9 in BF16
//         (so with outer 1x128): far below FP4's own noise. The packed form is exact.
// fp8     code = e4m3(x * min(448/amax, FLT_MAX)) (e5m2: 57344); value = code, amax/448 goes to alpha.
//
// Rotation   rht 16 of nvfp4 from the original is done in registers. Everything else that rotates, and what starts from the forward's codes,
//         goes through a pass of its own (gather_kernel) that writes the rotated operand in FP32; the kernels then read that.
// NaN     A NaN anywhere makes amax NaN (an unsigned comparison of bits, not fmaxf, which drops it), hence alpha NaN, hence the
//         loss: E2M1 itself has no NaN and would hide it as 6. Formats without a tensor scale make the block's scale NaN.
// Source  NVIDIA, arXiv 2509.25149, appendix C; the other papers are named in recipe.cuh. Random bits: philox.cuh.
// Cost    amax: reads x once. Codes: reads x once, writes 2 bytes a value (values) or 0.56 (packed). About 20 operations a value
//         with RN, 30 with SR, 4 more with RHT: bound by memory on a GPU. The rotation pass: reads x, writes 4 bytes a value.
#pragma once
#include <type_traits>
#include "formats.cuh"
#include "hadamard.cuh"
#include "philox.cuh"
#include "recipe.cuh"

struct Operand4 {
  int rows = 0, cols = 0, ld = 0;   // [rows, cols], cols = contraction axis, ld = operand_ld(cols, rht)
  uint8_t* codes = nullptr;         // FP4: [rows, ld/2], two a byte, even element in the low nibble; FP8: [rows, ld]
  uint8_t* scales = nullptr;        // nvfp4: E4M3, one for 16 columns; mxfp4, mxfp8: E8M0, one for 32; in the 128x4 layout (formats.cuh)
  floatX* values = nullptr;         // [rows, ld]
  float* amax = nullptr;            // device scalar: max|x| after rotation. Not written for mxfp4, mxfp8, exact
  float* outer = nullptr;           // outer 1x128: [rows, ceil(cols/128)]; fp4_vector: [rows]. What a code and its block scale are multiplied by
  uint32_t* mask = nullptr;         // [rows, ld/32]: bit c%32 of word c/32 set where |x / 2^e| < 6, that is, where mxfp4 did not clip
};
inline int operand_ld(int cols, int rht = 0) { return round_up(cols, max(32, rht)); }
// The columns of an operand after rotation: a ragged last group is filled up with zeros, and after the rotation they are not zeros.
inline int rotated_cols(int cols, int rht) { return rht ? round_up(cols, rht) : cols; }

struct QuantizeHow {
  OperandRecipe recipe = {};
  bool transpose = false;           // quantize x^T
  uint64_t sign_bits[2] = {0, 0};   // of the rotation: bit i set negates input i
  RandomKey key = {};               // of the stochastic rounding
  // the same in the older words of quantize_nvfp4()
  bool tile16 = false, stochastic = false;
  int hadamard = 0;
  uint32_t signs = 0;
};
// Device memory that quantize() needs besides its output; both may be null where the recipe does not need them.
struct QuantizeScratch {
  uint32_t* groups = nullptr;       // group_words(rows, cols): maxima of tiles, of 128 columns, of rows; corrections of MS-EDEN
  float* rotated = nullptr;         // rows * rotated_cols(cols, rht): the operand after rotation
};
inline size_t group_words(int rows, int cols) { return (size_t)round_up(rows, 16) * ceil_div(cols, 128); }

// ------------------------------------------------------------------ properties of an operand's recipe
__host__ __device__ inline bool is_eden(const OperandRecipe& how) { return how.rounding == Rounding::eden16 || how.rounding == Rounding::eden128; }
__host__ __device__ inline bool is_fp8(Format f) { return f == Format::fp8_e4m3 || f == Format::fp8_e5m2; }
__host__ __device__ inline bool is_mx(Format f) { return f == Format::mxfp4 || f == Format::mxfp8; }
// NVIDIA's transform rounds the rotated value to BF16, so that one tensor in memory could have been the input.
__host__ __device__ inline bool rounds_rotated(const OperandRecipe& how) { return how.format == Format::nvfp4 && how.rht == 16 && how.signs == Signs::fixed; }

// ------------------------------------------------------------------ the FP32 scale of a tensor
constexpr float kEdenRange = 255.99f, kEdenStep = (float)(6 / ((17.0 / 16) * 0.93));       // MS-EDEN: the largest element of a block -> 6.0721
// The largest value of a tensor, in units of its FP32 scale.
__host__ __device__ inline float nvfp4_range(ScaleRule rule) {
  return rule == ScaleRule::four_six ? 256 * kE2M1Max : rule == ScaleRule::headroom ? kE4M3Max * (kE2M1Max * 16 / 17) : kE4M3Max * kE2M1Max;
}
struct TensorScale { float encode, decode; };      // S_enc and 1 / S_enc
__host__ __device__ inline TensorScale tensor_scale(float amax, float range = kE4M3Max * kE2M1Max) {
  float s = fminf(range / amax, FLT_MAX);
  if (amax == 0 || amax == INFINITY) s = 1;
  return {s, 1.0f / s};
}
__host__ __device__ inline float eden_tensor_scale(float amax) {
  const float t = amax / kEdenRange / kEdenStep;
  return t == 0 ? 1.0f : t;
}
// The factor that a GEMM's alpha takes for an operand.
__host__ __device__ inline float tensor_scale_decode(const OperandRecipe& how, float amax) {
  if (how.format == Format::nvfp4 && how.outer == Outer::tensor) return is_eden(how) ? eden_tensor_scale(amax) : amax / nvfp4_range(how.scale);
  if (is_fp8(how.format)) return amax / (how.format == Format::fp8_e4m3 ? kE4M3Max : kE5M2Max);
  if (how.format == Format::mxfp4 && how.scale == ScaleRule::range34) return 1.0f / 3.0f;
  return 1;
}
__host__ __device__ inline float tensor_scale_decode(float amax) { return amax / (kE4M3Max * kE2M1Max); }       // of plain NVFP4

// ------------------------------------------------------------------ loading
// The 16 values of block (row, block) of the operand, zeros beyond the edge, rotated if asked.
template <bool kTranspose, bool kHadamard, class T>
__device__ __forceinline__ void load_block(float (&v)[16], const T* x, int row, int block, int rows, int cols, uint32_t signs, bool round_rotated) {
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
    if (round_rotated) {
#pragma unroll
      for (int j = 0; j < 16; j++) v[j] = to_float(to_bf16(v[j]));
    }
  }
}
// max|v| as the bits of a nonnegative float: ordered like the floats themselves, with NaN above all.
template <int kN> __device__ __forceinline__ unsigned block_amax_bits(const float (&v)[kN]) {
  unsigned m = 0;
#pragma unroll
  for (int j = 0; j < kN; j++) m = max(m, float_bits(v[j]) & 0x7fffffffu);
  return m;
}
// What every kernel below wants to know.
struct BlockHow {
  OperandRecipe recipe;
  uint32_t signs;                   // of a rotation in registers
  RandomKey key;
  unsigned rows_covered, blocks_covered;     // with padding
};
// The row and the block of a thread: neighbouring threads are neighbours in memory.
struct BlockPlace { int row, block; bool inside; };
template <bool kTranspose> __device__ __forceinline__ BlockPlace block_place(const BlockHow& how) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kTranspose) return {(int)(i % how.rows_covered), (int)(i / how.rows_covered), i < how.rows_covered * how.blocks_covered};
  return {(int)(i / how.blocks_covered), (int)(i % how.blocks_covered), i < how.rows_covered * how.blocks_covered};
}

// ------------------------------------------------------------------ pass 1: amax of the tensor, and of groups of blocks
enum class Groups { none, tile16, columns128, row };
__device__ __forceinline__ size_t group_index(Groups groups, int row, int block, int blocks) {
  if (groups == Groups::tile16) return (size_t)(row / 16) * blocks + block;
  return groups == Groups::columns128 ? (size_t)row * ceil_div(blocks, 8) + block / 8 : (size_t)row;
}
template <bool kTranspose, bool kHadamard, int kLanes, class T>
__global__ void amax_kernel(unsigned* amax, unsigned* group_amax, Groups groups, const T* x, int rows, int cols, uint32_t signs, bool round_rotated) {
  const unsigned blocks = ceil_div(cols, 16), n = (unsigned)rows * blocks;
  unsigned most = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const int row = kTranspose ? i % rows : i / blocks, block = kTranspose ? i / rows : i % blocks;   // neighbours in memory
    float v[16];
    load_block<kTranspose, kHadamard>(v, x, row, block, rows, cols, signs, round_rotated);
    const unsigned m = block_amax_bits(v);
    if (groups != Groups::none) atomicMax(&group_amax[group_index(groups, row, block, blocks)], m);
    most = max(most, m);
  }
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, o));
  if (threadIdx.x % kLanes == 0) atomicMax(amax, most);
}

// ------------------------------------------------------------------ rounding and storing 16 codes
// index[j]: the grid index of |v[j]|. `block16`: number of the 16-block in its operand, which names its random bits.
__device__ __forceinline__ void round_block(int (&index)[16], const float (&v)[16], bool stochastic, RandomKey key, uint64_t block16) {
  if (stochastic) {
    const uint4 r = random_block(key, block16);
    uint8_t random[16];
    memcpy(random, &r, 16);
    float u[16];                                   // midpoints of 256 intervals: unbiased, and never 0 or 1
#pragma unroll
    for (int j = 0; j < 16; j++) u[j] = (float)(2 * random[j] + 1) * (1.0f / 512);
#pragma unroll
    for (int j = 0; j < 16; j++) index[j] = e2m1_index_sr(fabsf(v[j]), u[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 16; j++) index[j] = e2m1_index_rn(fabsf(v[j]));
  }
}
// Writes codes, and values index * scale * outer, of 16 elements from column `col` on; the signs are those of v.
__device__ __forceinline__ void store_block(const Operand4& out, int row, int col, const int (&index)[16], const float (&v)[16], float scale,
                                            float outer) {
  const size_t at = (size_t)row * out.ld + col;
  if (out.codes) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 16; j++) words[j / 8] |= (uint32_t)(index[j] | e2m1_sign(v[j])) << (4 * (j % 8));
    *reinterpret_cast<uint2*>(out.codes + at / 2) = make_uint2(words[0], words[1]);
  }
  if (out.values) {
    Vec<floatX, 16> q;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float magnitude = e2m1_magnitude(index[j]) * scale * outer;
      q.v[j] = from_float<floatX>(bits_float(float_bits(magnitude) | (float_bits(v[j]) & 0x80000000u)));
    }
    store_vec(out.values + at, q);
  }
}
// Zeros for 16 columns of padding. bytes: 8 (FP4) or 16 (FP8) of codes.
__device__ __forceinline__ void clear_block(const Operand4& out, int row, int col, int bytes) {
  const size_t at = (size_t)row * out.ld + col;
  if (out.codes) for (int j = 0; j < bytes; j++) out.codes[at * bytes / 16 + j] = 0;
  if (out.values) for (int j = 0; j < 16; j++) out.values[at + j] = from_float<floatX>(0);
}

// ------------------------------------------------------------------ NVFP4
// The scale of one block of 16: an element v lies on the E2M1 grid at v * encode or, where `divide` is not 0, at v / divide; decode undoes that.
struct BlockScale {
  uint8_t byte;
  float scale, outer;               // float(byte), and the FP32 scale that goes with it
  float encode, divide;
  __device__ __forceinline__ float on_grid(float v) const { return divide != 0 ? v / divide : __fmul_rn(v, encode); }
  // squared error of an element, rounded to nearest
  __device__ __forceinline__ float error(float v) const {
    const float d = __fsub_rn(e2m1_magnitude(e2m1_index_rn(fabsf(on_grid(v)))) * (scale * outer), fabsf(v));
    return __fmul_rn(d, d);
  }
};
// outer_amax: of the tensor, or of 128 columns. stretch: 1; 1.5 maps the largest element to 4 instead of 6.
__device__ __forceinline__ BlockScale block_scale(const OperandRecipe& how, float block_amax, float outer_amax, float stretch = 1) {
  BlockScale s;
  const float range = nvfp4_range(how.scale);
  if (how.scale == ScaleRule::headroom) stretch *= 17.0f / 16;
  if (how.outer == Outer::tensor && !is_eden(how)) {
    const TensorScale t = tensor_scale(outer_amax, range);
    const float wanted = fminf(block_amax * (t.encode * (1.0f / 6.0f)), FLT_MAX) * stretch;
    s.byte = how.scale == ScaleRule::ceil ? e4m3_encode_ceil(wanted) : e4m3_encode(wanted);
    s.scale = e4m3_decode(s.byte);
    s.outer = t.decode;
    s.encode = fminf(1.0f / (s.scale * t.decode), FLT_MAX);
    s.divide = 0;
  } else {
    const bool eden = is_eden(how);
    s.outer = eden ? eden_tensor_scale(outer_amax) : outer_amax == 0 ? 1.0f : outer_amax / (range / 6) / 6;
    const float wanted = (eden ? block_amax / kEdenStep / s.outer : block_amax / s.outer / 6) * stretch;
    s.byte = how.scale == ScaleRule::ceil ? e4m3_encode_ceil(wanted) : e4m3_encode(wanted);
    if (s.byte == 0) s.byte = eden ? 0x38 : 0x01;         // 1.0 or 2^-9. The scale that was rounded to 0 as well: never divide by 0
    s.scale = e4m3_decode(s.byte);
    s.encode = 0;
    s.divide = s.outer * s.scale;
  }
  return s;
}
// Four over six: the block's squared error with its largest element at 6 and at 4. Sums in ascending order.
struct ErrorPair {
  float six = 0, four = 0;
  __device__ __forceinline__ void add(const float (&v)[16], const BlockScale& at6, const BlockScale& at4) {
    float block6 = 0, block4 = 0;
    for (int j = 0; j < 16; j++) { block6 = __fadd_rn(block6, at6.error(v[j])); block4 = __fadd_rn(block4, at4.error(v[j])); }
    six = __fadd_rn(six, block6);
    four = __fadd_rn(four, block4);
  }
};
// Four over six in 16x16 tiles: one choice for the 256 elements, left in the tile's sign bit. A thread a tile. Without a rotation it goes through the
// rows of the source, also for the transposed operand, so that W and W^T choose alike.
template <bool kTranspose, bool kHadamard, class T>
__global__ void tile_four_six_kernel(unsigned* tile_amax, const T* x, int rows, int cols, BlockHow how, const float* amax) {
  const int blocks = ceil_div(cols, 16), tile = blockIdx.x * blockDim.x + threadIdx.x;
  if (tile >= ceil_div(rows, 16) * blocks) return;
  constexpr bool kTurn = kTranspose && !kHadamard;          // walk through the source instead of the operand
  const int walk_row = kTurn ? tile % blocks : tile / blocks, walk_block = kTurn ? tile / blocks : tile % blocks;
  const int walk_rows = kTurn ? cols : rows, walk_cols = kTurn ? rows : cols;
  const float tile_max = bits_float(tile_amax[tile]);
  const BlockScale at6 = block_scale(how.recipe, tile_max, *amax), at4 = block_scale(how.recipe, tile_max, *amax, 1.5f);
  ErrorPair error;
  for (int row = walk_row * 16; row < min(walk_row * 16 + 16, walk_rows); row++) {
    float v[16];
    load_block<kTranspose && !kTurn, kHadamard>(v, x, row, walk_block, walk_rows, walk_cols, how.signs, rounds_rotated(how.recipe));
    error.add(v, at6, at4);
  }
  if (error.four < error.six) tile_amax[tile] |= 0x80000000u;
}

// MS-EDEN: sums over a block that is on the grid, of v*v and of v*q; their quotient corrects the bias of rounding to nearest.
struct EdenSums {
  float vv = 0, vq = 0;
  __device__ __forceinline__ void add(const float (&v)[16], const int (&index)[16]) {
    for (int j = 0; j < 16; j++) {
      vv = __fadd_rn(vv, __fmul_rn(v[j], v[j]));
      vq = __fadd_rn(vq, __fmul_rn(fabsf(v[j]), e2m1_magnitude(index[j])));
    }
  }
  __device__ __forceinline__ float correction() const { return vq == 0 ? 1.0f : vv / vq; }
};
// corrections[row, block/8]: MS-EDEN with one correction for 128 elements. A thread for 8 blocks.
__global__ void eden128_kernel(float* corrections, const float* x, int rows, int cols, OperandRecipe how, const float* amax) {
  const int blocks = ceil_div(cols, 16), groups = ceil_div(blocks, 8), i = blockIdx.x * blockDim.x + threadIdx.x, row = i / groups;
  if (row >= rows) return;
  EdenSums sums;
  for (int block = i % groups * 8; block < min(i % groups * 8 + 8, blocks); block++) {
    float v[16];
    int index[16];
    load_block<false, false>(v, x, row, block, rows, cols, 0, false);
    const BlockScale s = block_scale(how, bits_float(block_amax_bits(v)), *amax);
    for (int j = 0; j < 16; j++) v[j] = s.on_grid(v[j]);
    round_block(index, v, false, {}, 0);
    sums.add(v, index);
  }
  corrections[i] = sums.correction();
}

// Pass 2: codes and scales. A thread a block of 16.
template <bool kTranspose, bool kHadamard, class T>
__global__ void nvfp4_kernel(Operand4 out, const unsigned* groups, const T* x, BlockHow how) {
  const OperandRecipe& recipe = how.recipe;
  const auto [row, block, inside] = block_place<kTranspose>(how);
  if (!inside) return;
  const int blocks = ceil_div(out.cols, 16);
  if (row >= out.rows || block >= blocks) {        // padding
    if (out.scales) out.scales[scale_offset(row, block, blocks)] = 0;
    if (row < out.rows && block * 16 < out.ld) clear_block(out, row, block * 16, 8);
    return;
  }
  float v[16];
  load_block<kTranspose, kHadamard>(v, x, row, block, out.rows, out.cols, how.signs, rounds_rotated(recipe));
  const bool tile = recipe.blocks == Blocks::b16x16, wide = recipe.outer == Outer::b1x128;
  const unsigned tile_word = tile ? groups[group_index(Groups::tile16, row, block, blocks)] : 0;
  const float block_amax = bits_float(tile ? tile_word & 0x7fffffffu : block_amax_bits(v));
  const float outer_amax = wide ? bits_float(groups[group_index(Groups::columns128, row, block, blocks)]) : *out.amax;
  BlockScale s = block_scale(recipe, block_amax, outer_amax);
  if (recipe.scale == ScaleRule::four_six) {
    const BlockScale four = block_scale(recipe, block_amax, outer_amax, 1.5f);
    ErrorPair error;
    if (!tile) error.add(v, s, four);
    if (tile ? tile_word >> 31 != 0 : error.four < error.six) s = four;
  }
  if (s.divide != 0) {
#pragma unroll
    for (int j = 0; j < 16; j++) v[j] = v[j] / s.divide;
  } else {
#pragma unroll
    for (int j = 0; j < 16; j++) v[j] = __fmul_rn(v[j], s.encode);
  }
  int index[16];
  const uint64_t block16 = (uint64_t)row * blocks + block;
  round_block(index, v, recipe.rounding == Rounding::stochastic, how.key, block16);
  if (is_eden(recipe)) {                           // the scale takes the correction, and is rounded stochastically: 16 random bits
    float correction;
    if (recipe.rounding == Rounding::eden128) correction = bits_float(groups[group_index(Groups::columns128, row, block, blocks)]);
    else { EdenSums sums; sums.add(v, index); correction = sums.correction(); }
    const float u = (float)(2 * (random_block(how.key, block16).x & 0xffff) + 1) * 0x1p-17f;
    s.byte = e4m3_encode_sr(s.scale * correction, u);
    s.scale = e4m3_decode(s.byte);
  }
  if (out.scales) out.scales[scale_offset(row, block, blocks)] = s.byte;
  if (wide && out.outer && block % 8 == 0) out.outer[group_index(Groups::columns128, row, block, blocks)] = s.outer;
  store_block(out, row, block * 16, index, v, s.scale, wide ? s.outer : 1.0f);
}

// ------------------------------------------------------------------ one scale for each row of the operand
template <bool kTranspose, class T> __global__ void vector_kernel(Operand4 out, const unsigned* row_amax, const T* x, BlockHow how) {
  const auto [row, block, inside] = block_place<kTranspose>(how);
  if (!inside) return;
  const int blocks = ceil_div(out.cols, 16);
  if (block >= blocks) { clear_block(out, row, block * 16, 8); return; }
  float v[16];
  load_block<kTranspose, false>(v, x, row, block, out.rows, out.cols, 0, false);
  float scale = bits_float(row_amax[row]) / kE2M1Max;
  if (scale == 0) scale = 1;
  for (int j = 0; j < 16; j++) v[j] = v[j] / scale;
  int index[16];
  round_block(index, v, how.recipe.rounding == Rounding::stochastic, how.key, (uint64_t)row * blocks + block);
  if (out.outer && block == 0) out.outer[row] = scale;
  store_block(out, row, block * 16, index, v, scale, 1);
}

// ------------------------------------------------------------------ MXFP4, MXFP8: a power of two for 32 elements
// Population standard deviation; the variance, which rounding may have made negative, is clamped. Sums in ascending order.
__device__ inline float standard_deviation(const float (&v)[32]) {
  float sum = 0, squares = 0;
  for (int j = 0; j < 32; j++) { sum = __fadd_rn(sum, v[j]); squares = __fadd_rn(squares, __fmul_rn(v[j], v[j])); }
  const float mean = sum / 32, variance = __fsub_rn(squares / 32, __fmul_rn(mean, mean));
  return sqrtf(variance < 0 ? 0.0f : variance);             // a NaN stays
}
__device__ inline uint8_t mx_scale(const OperandRecipe& how, const float (&v)[32]) {
  const float amax = bits_float(block_amax_bits(v));
  if (how.format == Format::mxfp8) return e8m0_encode_ceil(amax / kE4M3Max);
  if (how.scale == ScaleRule::ceil) return e8m0_encode_ceil(amax / kE2M1Max);
  if (how.scale == ScaleRule::range34) return e8m0_encode_floor(amax);
  if (how.scale == ScaleRule::ocp) {
    const uint8_t floor = e8m0_encode_floor(amax);
    return amax >= INFINITY || amax != amax ? floor : floor < 2 ? 0 : floor - 2;
  }
  // QuEST: the E2M1 grid with the smallest squared error on Gaussians reaches to 2.92 sigma
  const float s = __fadd_rn(__fmul_rn((float)(2.92247856 / 6), standard_deviation(v)), 1e-8f);
  return how.scale == ScaleRule::quest_floor ? e8m0_encode_floor(s) : e8m0_encode_nearest(s);
}
// A thread a block of 32.
template <bool kTranspose, class T> __global__ void mx_kernel(Operand4 out, const T* x, BlockHow how) {
  const auto [row, block, inside] = block_place<kTranspose>(how);
  if (!inside) return;
  const int blocks = ceil_div(out.cols, 32);
  const bool fp8 = how.recipe.format == Format::mxfp8;
  if (row >= out.rows || block >= blocks) {        // padding
    if (out.scales) out.scales[scale_offset(row, block, blocks)] = 0;
    if (row < out.rows && block * 32 < out.ld) {
      for (int half = 0; half < 2; half++) clear_block(out, row, block * 32 + half * 16, fp8 ? 16 : 8);
      if (out.mask) out.mask[(size_t)row * (out.ld / 32) + block] = 0;
    }
    return;
  }
  float v[32];
  for (int half = 0; half < 2; half++) {
    float part[16];
    load_block<kTranspose, false>(part, x, row, 2 * block + half, out.rows, out.cols, 0, false);
#pragma unroll
    for (int j = 0; j < 16; j++) v[half * 16 + j] = part[j];
  }
  const uint8_t byte = mx_scale(how.recipe, v);
  const float scale = e8m0_decode(byte), reciprocal = e8m0_reciprocal(byte);
  if (how.recipe.format == Format::mxfp4 && how.recipe.scale == ScaleRule::range34) for (int j = 0; j < 32; j++) v[j] *= 3;
  for (int j = 0; j < 32; j++) v[j] *= reciprocal;
  if (out.scales) out.scales[scale_offset(row, block, blocks)] = byte;
  if (out.mask) {
    uint32_t word = 0;
    for (int j = 0; j < 32; j++) word |= (uint32_t)(fabsf(v[j]) < kE2M1Max) << j;
    out.mask[(size_t)row * (out.ld / 32) + block] = word;
  }
  const size_t at = (size_t)row * out.ld + block * 32;
  if (fp8) {
    for (int j = 0; j < 32; j++) {
      const uint8_t code = e4m3_encode(v[j]);
      if (out.codes) out.codes[at + j] = code;
      if (out.values) out.values[at + j] = from_float<floatX>(e4m3_decode(code) * scale);
    }
    return;
  }
  for (int half = 0; half < 2; half++) {
    float part[16];
    int index[16];
#pragma unroll
    for (int j = 0; j < 16; j++) part[j] = v[half * 16 + j];
    round_block(index, part, how.recipe.rounding == Rounding::stochastic, how.key, 2 * ((uint64_t)row * blocks + block) + half);
    store_block(out, row, block * 32 + half * 16, index, part, scale, 1);
  }
}

// ------------------------------------------------------------------ FP8, one scale a tensor; and no quantization at all
template <bool kTranspose, class T> __global__ void fp8_kernel(Operand4 out, const T* x, BlockHow how) {
  const auto [row, block, inside] = block_place<kTranspose>(how);
  if (!inside) return;
  if (block >= ceil_div(out.cols, 16)) { clear_block(out, row, block * 16, 16); return; }
  float v[16];
  load_block<kTranspose, false>(v, x, row, block, out.rows, out.cols, 0, false);
  const bool e4m3 = how.recipe.format == Format::fp8_e4m3;
  const float encode = tensor_scale(*out.amax, e4m3 ? kE4M3Max : kE5M2Max).encode;
  const size_t at = (size_t)row * out.ld + block * 16;
  for (int j = 0; j < 16; j++) {
    const float scaled = v[j] * encode;
    const uint8_t code = e4m3 ? e4m3_encode(scaled) : e5m2_encode(scaled);
    if (out.codes) out.codes[at + j] = code;
    if (out.values) out.values[at + j] = from_float<floatX>(e4m3 ? e4m3_decode(code) : e5m2_decode(code));
  }
}
template <bool kTranspose, class T> __global__ void exact_kernel(Operand4 out, const T* x, BlockHow how) {
  const auto [row, block, inside] = block_place<kTranspose>(how);
  if (!inside) return;
  float v[16];
  load_block<kTranspose, false>(v, x, row, block, out.rows, out.cols, 0, false);
  for (int j = 0; j < 16; j++) out.values[(size_t)row * out.ld + block * 16 + j] = from_float<floatX>(v[j]);
  if (out.mask && block % 2 == 0) out.mask[(size_t)row * (out.ld / 32) + block / 2] = 0xffffffffu;
}

// ------------------------------------------------------------------ dequantization: what a packed operand stands for
// The FP32 scale of element (row, col): its block's, times the outer one.
struct ElementScale { float block, outer; };
__device__ inline ElementScale element_scale(const Operand4& p, const OperandRecipe& how, int row, int col) {
  ElementScale s = {1, 1};
  if (how.format == Format::nvfp4) s.block = e4m3_decode(p.scales[scale_offset(row, col / 16, ceil_div(p.cols, 16))]);
  if (is_mx(how.format)) s.block = e8m0_decode(p.scales[scale_offset(row, col / 32, ceil_div(p.cols, 32))]);
  if (how.format == Format::fp4_vector) s.outer = p.outer[row];
  else if (how.format == Format::nvfp4 && how.outer == Outer::b1x128) s.outer = p.outer[(size_t)row * ceil_div(p.cols, 128) + col / 128];
  else if (how.format != Format::exact) s.outer = tensor_scale_decode(how, p.amax ? *p.amax : 1.0f);
  return s;
}
__device__ inline float dequantized(const Operand4& p, const OperandRecipe& how, int row, int col) {
  const size_t at = (size_t)row * p.ld + col;
  if (how.format == Format::exact) return to_float(p.values[at]);
  const ElementScale s = element_scale(p, how, row, col);
  const bool e4m3 = how.format == Format::fp8_e4m3 || how.format == Format::mxfp8;
  const float code = how.format == Format::fp8_e5m2 ? e5m2_decode(p.codes[at])
                     : e4m3 ? e4m3_decode(p.codes[at]) : e2m1_decode(p.codes[at / 2] >> (4 * (col % 2)) & 15);
  return code * s.block * s.outer;
}
template <class T> __global__ void dequantize_kernel(T* out, Operand4 p, OperandRecipe how) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i / p.cols;
  if (row < (unsigned)p.rows) out[i] = from_float<T>(dequantized(p, how, row, i % p.cols));
}
// out [rows, cols] = the values of a packed operand, all scales included.
template <class T> void dequantize(T* out, const Operand4& p, const OperandRecipe& how) {
  launch(dequantize_kernel<T>, ceil_div((unsigned)p.rows * p.cols, 256u), 256, 0, out, p, how);
}

// ------------------------------------------------------------------ the gather and rotation pass
// Where a value comes from, by row and column of the source (before transposition).
template <class T> struct Matrix {
  const T* x; int cols;
  __device__ float operator()(int r, int c) const { return to_float(x[(size_t)r * cols + c]); }
};
struct Packed {
  Operand4 operand; OperandRecipe how;
  __device__ float operator()(int r, int c) const { return dequantized(operand, how, r, c); }
};
// out [rows, cols] FP32 = the source or its transpose, rotated (unless kRotate is false) in groups of kN columns; cols is a multiple of kN, and
// the source has `valid` of them, the rest are zeros. A block takes 32 rows of one group. kLanes neighbouring threads share a row's group: kN/4
// on a GPU, one on the CPU. A transposed source is read along its own rows, through shared memory.
template <int kN, int kLanes, bool kRotate, bool kTranspose, class Source>
__global__ void gather_kernel(float* out, Source x, int rows, int cols, int valid, SignBits signs) {
  constexpr int kPer = kN / kLanes;
  const int first_col = blockIdx.x * kN, first_row = blockIdx.y * 32, lane = threadIdx.x % kLanes;
  constexpr bool kStaged = kTranspose && kLanes > 1;
  __shared__ float staged[kStaged ? kN : 1][kStaged ? 33 : 1];
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < kN * 32; i += blockDim.x) {
      const int c = first_col + i / 32, r = first_row + i % 32;
      staged[i / 32][i % 32] = c < valid && r < rows ? x(c, r) : 0.0f;
    }
    __syncthreads();
  }
  for (int r = threadIdx.x / kLanes; r < 32; r += blockDim.x / kLanes) {     // whole warps leave together: the shuffles below need all lanes
    const int row = first_row + r;
    float v[kPer];
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const int i = lane + kLanes * j, c = first_col + i;
      if constexpr (kStaged) v[j] = staged[i][r];
      else v[j] = row < rows && c < valid ? (kTranspose ? x(c, row) : x(row, c)) : 0.0f;
      if (kRotate) v[j] = negate_if(v[j], signs.negated(i));
    }
    if constexpr (kRotate) hadamard<kN, kLanes>(v, lane);
    if (row < rows) {
#pragma unroll
      for (int j = 0; j < kPer; j++) out[(size_t)row * cols + first_col + lane + kLanes * j] = v[j];
    }
  }
}
template <class Source> void gather(float* out, const Source& x, int rows, int cols, int valid, bool transpose, int rht, SignBits signs) {
  auto go = [&](auto n, auto rotate, auto turned) {
    constexpr int kN = n.value, kLanes = kOnCpu ? 1 : kN / 4;
    const dim3 grid(ceil_div(cols, kN), ceil_div(rows, 32));
    launch(gather_kernel<kN, kLanes, rotate.value, turned.value, Source>, grid, kOnCpu ? 32 : 256, 0, out, x, rows, cols, valid, signs);
  };
  auto by_size = [&](auto turned) {
    switch (rht) {
      case 0: return go(std::integral_constant<int, 16>{}, std::false_type{}, turned);
      case 16: return go(std::integral_constant<int, 16>{}, std::true_type{}, turned);
      case 32: return go(std::integral_constant<int, 32>{}, std::true_type{}, turned);
      case 64: return go(std::integral_constant<int, 64>{}, std::true_type{}, turned);
      case 128: return go(std::integral_constant<int, 128>{}, std::true_type{}, turned);
    }
    die("rht %d: 0, 16, 32, 64 and 128 exist", rht);
  };
  if (transpose) by_size(std::true_type{}); else by_size(std::false_type{});
}

// ------------------------------------------------------------------ the host side
template <bool kTranspose, bool kHadamard, class T>
void launch_amax(const Operand4& out, Groups groups, uint32_t* group_amax, const T* x, uint32_t signs, bool round_rotated) {
  const unsigned blocks = ceil_div(out.cols, 16);
  device_zero(out.amax, 1);
  if (groups == Groups::tile16) device_zero(group_amax, (size_t)ceil_div(out.rows, 16) * blocks);
  if (groups == Groups::columns128) device_zero(group_amax, (size_t)out.rows * ceil_div(blocks, 8u));
  if (groups == Groups::row) device_zero(group_amax, (size_t)out.rows);
  constexpr int kThreads = kOnCpu ? 32 : 256;
  const unsigned grid = min((unsigned)reduction_blocks(), ceil_div((unsigned)out.rows * blocks, (unsigned)kThreads));
  launch(amax_kernel<kTranspose, kHadamard, kRowLanes, T>, grid, kThreads, 0, (unsigned*)out.amax, group_amax, groups, x, out.rows, out.cols, signs,
         round_rotated);
}

template <bool kTranspose, bool kHadamard, class T> void launch_nvfp4(const Operand4& out, const T* x, BlockHow how, uint32_t* groups) {
  const OperandRecipe& r = how.recipe;
  const unsigned blocks = ceil_div(out.cols, 16), threads = 256;
  const Groups kind = r.blocks == Blocks::b16x16 ? Groups::tile16 : r.outer == Outer::b1x128 ? Groups::columns128 : Groups::none;
  launch_amax<kTranspose, kHadamard>(out, kind, groups, x, how.signs, rounds_rotated(r));
  if (r.blocks == Blocks::b16x16 && r.scale == ScaleRule::four_six) {
    const unsigned tiles = ceil_div(out.rows, 16) * blocks, tile_threads = kOnCpu ? 8 : 64;
    launch(tile_four_six_kernel<kTranspose, kHadamard, T>, ceil_div(tiles, tile_threads), tile_threads, 0, groups, x, out.rows, out.cols, how, out.amax);
  }
  if constexpr (std::is_same_v<T, float> && !kTranspose && !kHadamard)
    if (r.rounding == Rounding::eden128)
      launch(eden128_kernel, ceil_div((unsigned)out.rows * ceil_div(blocks, 8u), 64u), 64, 0, (float*)groups, x, out.rows, out.cols, r, out.amax);
  // The scale buffer has padding rows and blocks to clear; the emulation has neither, only columns up to ld.
  how.rows_covered = out.scales ? round_up(out.rows, 128) : out.rows;
  how.blocks_covered = out.scales ? round_up(blocks, 4u) : out.ld / 16;
  launch(nvfp4_kernel<kTranspose, kHadamard, T>, ceil_div(how.rows_covered * how.blocks_covered, threads), threads, 0, out, groups, x, how);
}
template <bool kTranspose, class T> void launch_other_formats(const Operand4& out, const T* x, BlockHow how, uint32_t* groups) {
  const unsigned threads = 256;
  how.rows_covered = out.rows;
  how.blocks_covered = out.ld / 16;
  const unsigned grid = ceil_div(how.rows_covered * how.blocks_covered, threads);
  switch (how.recipe.format) {
    case Format::fp4_vector:
      launch_amax<kTranspose, false>(out, Groups::row, groups, x, 0, false);
      return launch(vector_kernel<kTranspose, T>, grid, threads, 0, out, groups, x, how);
    case Format::fp8_e4m3: case Format::fp8_e5m2:
      launch_amax<kTranspose, false>(out, Groups::none, nullptr, x, 0, false);
      return launch(fp8_kernel<kTranspose, T>, grid, threads, 0, out, x, how);
    case Format::exact: return launch(exact_kernel<kTranspose, T>, grid, threads, 0, out, x, how);
    default:
      how.rows_covered = out.scales ? round_up(out.rows, 128) : out.rows;
      how.blocks_covered = out.scales ? round_up(ceil_div(out.ld, 32), 4) : out.ld / 32;
      launch(mx_kernel<kTranspose, T>, ceil_div(how.rows_covered * how.blocks_covered, threads), threads, 0, out, x, how);
  }
}
// x is a matrix of the operand's shape, or of the transposed one; any rotation that is left to do is NVFP4's of 16 in registers.
template <class T> void quantize_matrix(const Operand4& out, const T* x, const QuantizeHow& how, bool transpose, int rht, uint32_t* groups) {
  const BlockHow block = {how.recipe, how.recipe.signs == Signs::none ? 0 : (uint32_t)how.sign_bits[0], how.key, 0, 0};
  auto go = [&](auto turned) {
    if (how.recipe.format != Format::nvfp4) launch_other_formats<turned.value>(out, x, block, groups);
    else if (rht) launch_nvfp4<turned.value, true>(out, x, block, groups);
    else launch_nvfp4<turned.value, false>(out, x, block, groups);
  };
  if (transpose) go(std::true_type{}); else go(std::false_type{});
}

inline void check_operand(const Operand4& out, const OperandRecipe& r, const QuantizeScratch& scratch, bool gathers) {
  const std::string problem = operand_problem(r, true);
  if (!problem.empty() || r.format == Format::bf16) die("quantize: %s", problem.empty() ? "format bf16 is not quantized" : problem.c_str());
  if ((size_t)round_up(out.rows, 128) * round_up(out.cols, 64) / 16 >= 1u << 31)
    die("operand [%d, %d] is too large to quantize in one piece; lower --batch", out.rows, out.cols);
  const bool vector = r.format == Format::fp4_vector, nv = r.format == Format::nvfp4;
  const bool grouped = vector || (nv && (r.blocks == Blocks::b16x16 || r.outer == Outer::b1x128 || r.rounding == Rounding::eden128));
  const bool half_packed = (nv || is_mx(r.format)) && !out.codes != !out.scales, no_amax = (nv || vector || is_fp8(r.format)) && !out.amax;
  const bool no_scratch = (grouped && !scratch.groups) || (gathers && !scratch.rotated), no_values = r.format == Format::exact && !out.values;
  if (out.ld != operand_ld(out.cols) || no_scratch || half_packed || no_amax || no_values)
    die("quantize: operand [%d, %d] ld %d: bad leading dimension, or missing buffers", out.rows, out.cols, out.ld);
}
// The operand of a source (Matrix or Packed) that has to go through the gather pass.
template <class Source> void quantize_gathered(Operand4 out, const Source& x, const QuantizeHow& how, QuantizeScratch scratch) {
  const int valid = out.cols, rht = how.recipe.rht;
  out.cols = round_up(out.cols, max(16, rht));                  // whole groups; 16 or fewer columns more do not change ld nor the number of blocks
  check_operand(out, how.recipe, scratch, true);
  SignBits signs;
  if (how.recipe.signs != Signs::none) { signs.word[0] = how.sign_bits[0]; signs.word[1] = how.sign_bits[1]; }
  gather(scratch.rotated, x, out.rows, out.cols, valid, how.transpose, rht, signs);
  quantize_matrix(out, (const float*)scratch.rotated, how, false, 0, scratch.groups);
}

// Quantizes x, row-major bf16 or float, into the operand `out`, whose shape is that of x (or of x^T with how.transpose) and whose
// pointers say what is written. out.ld = operand_ld(cols, rht). With rht 32 and more, a contraction axis that ends in a part of a group makes
// an operand of rotated_cols(cols, rht) columns; out.cols is that of the source.
// The source's rows and the operand's must start on 16-byte boundaries where cols is a multiple of 8 (any device_alloc does).
template <class T> void quantize(const Operand4& out, const T* x, const QuantizeHow& how, QuantizeScratch scratch = {}) {
  const OperandRecipe& r = how.recipe;
  const bool in_registers = r.rht == 0 || (r.rht == 16 && r.format == Format::nvfp4);
  if (!in_registers || r.rounding == Rounding::eden128) return quantize_gathered(out, Matrix<T>{x, how.transpose ? out.rows : out.cols}, how, scratch);
  check_operand(out, r, scratch, false);
  quantize_matrix(out, x, how, how.transpose, r.rht, scratch.groups);
}
// The same from a packed operand, which `from_how` describes: double quantization. out has the shape of `from` (of its transpose, with how.transpose).
inline void quantize(const Operand4& out, const Operand4& from, const OperandRecipe& from_how, const QuantizeHow& how, QuantizeScratch scratch) {
  quantize_gathered(out, Packed{from, from_how}, how, scratch);
}
// NVFP4 with one scale a tensor, in the words tile16, stochastic, hadamard, signs. tile_scratch: ceil(rows/16) * ceil(cols/16) words, for 16x16 only.
template <class T> void quantize_nvfp4(const Operand4& out, const T* x, QuantizeHow how, uint32_t* tile_scratch = nullptr) {
  how.recipe = {};
  how.recipe.format = Format::nvfp4;
  how.recipe.blocks = how.tile16 ? Blocks::b16x16 : Blocks::b1x16;
  how.recipe.rounding = how.stochastic ? Rounding::stochastic : Rounding::nearest;
  how.recipe.rht = how.hadamard;
  how.recipe.signs = how.hadamard ? Signs::fixed : Signs::none;
  how.sign_bits[0] = how.signs;
  quantize(out, x, how, {tile_scratch, nullptr});
}

// alpha = product of the two operands' tensor scales, one of them absent (null) for an operand that has none.
__global__ void alpha_kernel(float* alpha, const float* amax_a, OperandRecipe a, const float* amax_b, OperandRecipe b) {
  *alpha = (amax_a ? tensor_scale_decode(a, *amax_a) : 1.0f) * (amax_b ? tensor_scale_decode(b, *amax_b) : 1.0f);
}
inline OperandRecipe plain_nvfp4() { OperandRecipe r; r.format = Format::nvfp4; return r; }
inline void gemm_alpha(float* alpha, const float* amax_a, const float* amax_b, const OperandRecipe& a = plain_nvfp4(),
                       const OperandRecipe& b = plain_nvfp4()) {
  launch(alpha_kernel, 1, 1, 0, alpha, amax_a, a, amax_b, b);
}

// ------------------------------------------------------------------ bytes of a packed operand
struct PackedBytes {
  size_t codes = 0, scales = 0, outer = 0, mask = 0, values = 0;
  size_t total() const { return codes + scales + outer + mask + values; }
};
inline PackedBytes packed_bytes(const OperandRecipe& how, int rows, int cols, bool mask = false) {
  cols = rotated_cols(cols, how.rht);
  const size_t n = (size_t)rows * operand_ld(cols);
  PackedBytes b;
  if (how.format == Format::exact) b.values = n * sizeof(floatX);
  else b.codes = is_fp8(how.format) || how.format == Format::mxfp8 ? n : n / 2;
  if (how.format == Format::nvfp4) b.scales = scale_bytes(rows, cols);
  if (is_mx(how.format)) b.scales = scale_bytes(rows, ceil_div(cols, 2));          // one for 32
  if (how.format == Format::fp4_vector) b.outer = (size_t)rows * 4;
  if (how.outer == Outer::b1x128) b.outer = (size_t)rows * ceil_div(cols, 128) * 4;
  if (mask) b.mask = n / 8;
  return b;
}

// ------------------------------------------------------------------ MXFP4 on NVFP4 tensor cores
// A power of two from 2^-9 to 2^8 is an E4M3 value, so two equal E4M3 bytes do the work of one E8M0 byte, relative to the largest exponent of
// the tensor: it becomes 2^8, and *factor = 2^(largest - 8) goes to alpha. Blocks more than 2^17 below the largest become 0: *flushed counts
// them. Blocks whose codes are all zero have no say in the largest exponent, get scale 0, and are not counted. A NaN scale stays one.
__device__ inline bool mx_block_lives(const Operand4& mx, int row, int block32) {
  const uint8_t* codes = mx.codes + ((size_t)row * mx.ld + block32 * 32) / 2;
  int any = 0;
  for (int j = 0; j < 16; j++) any |= codes[j] & 0x77;
  return any != 0;
}
__global__ void largest_exponent_kernel(unsigned* largest, Operand4 mx) {
  const int blocks = ceil_div(mx.cols, 32), i = blockIdx.x * blockDim.x + threadIdx.x, row = i / blocks;
  if (row >= mx.rows) return;
  const uint8_t byte = mx.scales[scale_offset(row, i % blocks, blocks)];
  if (byte != 255 && mx_block_lives(mx, row, i % blocks)) atomicMax(largest, (unsigned)byte);
}
__global__ void mx_as_nv_kernel(uint8_t* e4m3_scales, float* factor, unsigned* flushed, const unsigned* largest, Operand4 mx) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, covered = round_up(ceil_div(mx.cols, 16), 4);
  const int row = i / covered, block = i % covered, blocks = ceil_div(mx.cols, 16), blocks32 = ceil_div(mx.cols, 32);
  if (i == 0) *factor = ldexpf(1.0f, (int)*largest - 127 - 8);
  if (row >= round_up(mx.rows, 128)) return;
  uint8_t byte = 0;
  if (row < mx.rows && block / 2 < blocks32 && mx_block_lives(mx, row, block / 2)) {
    const uint8_t e8m0 = mx.scales[scale_offset(row, block / 2, blocks32)];
    const int exponent = (int)e8m0 - (int)*largest + 8;
    byte = e8m0 == 255 ? 0x7f : exponent < -9 ? 0 : e4m3_encode(ldexpf(1.0f, exponent));
    if (exponent < -9 && block % 2 == 0) atomicAdd(flushed, 1u);
  }
  e4m3_scales[scale_offset(row, block, blocks)] = byte;
}
// mx: a packed MXFP4 operand. e4m3_scales: scale_bytes(rows, cols) bytes; factor, flushed and largest (scratch): device scalars.
inline void mxfp4_as_nvfp4(uint8_t* e4m3_scales, float* factor, unsigned* flushed, unsigned* largest, const Operand4& mx) {
  device_zero(largest, 1);
  device_zero(flushed, 1);
  launch(largest_exponent_kernel, ceil_div((unsigned)mx.rows * ceil_div(mx.cols, 32), 256u), 256, 0, largest, mx);
  const unsigned covered = round_up(mx.rows, 128) * round_up(ceil_div(mx.cols, 16), 4);
  launch(mx_as_nv_kernel, ceil_div(covered, 256u), 256, 0, e4m3_scales, factor, flushed, largest, mx);
}
