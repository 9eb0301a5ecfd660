// kernels/operand.cuh -- a GEMM operand in FP4 or FP8: where its parts lie, what they stand for, how many bytes they take.
//
// quantize.cuh makes them. packed: codes and block scales, the layout that FP4 tensor cores read; values: code * block scale in floatX, for the emulation.
// An element stands for code * block scale * outer scale; the outer scale of a whole tensor is left to the GEMM's alpha.
#pragma once
#include "formats.cuh"
#include "philox.cuh"     // defines: RandomKey
#include "recipe.cuh"

struct Operand4 {
  int rows = 0, cols = 0, ld = 0;   // [rows, cols], cols = contraction axis, ld = operand_ld(cols, rht)
  uint8_t* codes = nullptr;         // FP4: [rows, ld/2], two a byte, even element in the low nibble; FP8: [rows, ld]
  uint8_t* scales = nullptr;        // nvfp4: E4M3, one for 16 columns; mxfp4, mxfp8: E8M0, one for 32; in the 128x4 layout (formats.cuh)
  floatX* values = nullptr;         // [rows, ld]
  float* amax = nullptr;            // device scalar: max|x| after rotation; post_hoc: the largest pseudo-scale. Not written for outer 1x128, mxfp4, mxfp8, exact
  float* outer = nullptr;           // outer 1x128: [rows, ceil(cols/128)]; fp4_vector: [rows]. What a code and its block scale are multiplied by
  uint32_t* mask = nullptr;         // [rows, ld/32]: bit c%32 of word c/32 set where |x / 2^e| < 6, that is, where mxfp4 did not clip
};
inline int operand_ld(int cols, int rht = 0) { return round_up(cols, max(32, rht)); }
// The columns of an operand after rotation: a ragged last group is filled up with zeros, and after the rotation they are not zeros.
inline int rotated_cols(int cols, int rht) { return rht ? round_up(cols, rht) : cols; }

// alpha of a GEMM, if the kernel that makes one operand is to write it: the other operand's maximum is known by then. other_amax: null for a tensor
// that is not quantized.
struct GemmAlpha {
  float* alpha = nullptr;           // device scalar; null: somebody else's work
  const float* other_amax = nullptr;
  OperandRecipe other = {};
};
struct QuantizeHow {
  OperandRecipe recipe = {};
  bool transpose = false;           // quantize x^T
  uint64_t sign_bits[2] = {0, 0};   // of the rotation: bit i set negates input i
  RandomKey key = {};               // of the stochastic rounding
  bool amax_known = false;          // out.amax holds it already: amax_of_both(), find_weight_maxima() (linear.cuh), the kernel that wrote x (amax.cuh)
  bool amax_is_zero = false;        // out.amax holds 0, so that the search for the maximum need not begin with a fill
  GemmAlpha alpha = {};             // to be written as well
  // the same in the older words of quantize_nvfp4()
  bool tile16 = false, stochastic = false;
  int hadamard = 0;
  uint32_t signs = 0;
};
// Words of scratch that quantize() may need: maxima of rows, choices of tiles, pseudo-scales (half a word for a block).
inline size_t group_words(int rows, int cols) { return (size_t)round_up(rows, 16) * ceil_div(cols, 32); }

// ------------------------------------------------------------------ properties of an operand's recipe
__host__ __device__ inline bool is_eden(const OperandRecipe& how) { return how.rounding == Rounding::eden16 || how.rounding == Rounding::eden128; }
__host__ __device__ inline bool is_fp8(Format f) { return f == Format::fp8_e4m3 || f == Format::fp8_e5m2; }
__host__ __device__ inline bool is_mx(Format f) { return f == Format::mxfp4 || f == Format::mxfp8; }
// MS-EDEN whose block scales are found without the tensor's, which follows from them.
__host__ __device__ constexpr bool is_post_hoc(const OperandRecipe& how) { return how.format == Format::nvfp4 && how.scale == ScaleRule::post_hoc; }
// NVIDIA's transform rounds the rotated value to BF16, so that one tensor in memory could have been the input.
__host__ __device__ inline bool rounds_rotated(const OperandRecipe& how) {
  return how.format == Format::nvfp4 && how.rht == 16 && how.signs == Signs::fixed;
}

// ------------------------------------------------------------------ the FP32 scale of a tensor
constexpr float kEdenRange = 255.99f, kEdenStep = (float)(6 / ((17.0 / 16) * 0.93));       // MS-EDEN: the largest element of a block -> 6.0721
// The largest value of a tensor, in units of its FP32 scale.
__host__ __device__ inline float nvfp4_range(ScaleRule rule) {
  return rule == ScaleRule::four_six ? 256 * kE2M1Max : rule == ScaleRule::headroom ? kE4M3Max * (kE2M1Max * 16 / 17) : kE4M3Max * kE2M1Max;
}
struct TensorScale { float encode, decode, reciprocal; };      // S_enc and 1 / S_enc; of MS-EDEN t and 1 / t, the last two
__host__ __device__ inline TensorScale tensor_scale(float amax, float range = kE4M3Max * kE2M1Max) {
  float s = fminf(range / amax, FLT_MAX);
  if (amax == 0 || amax == INFINITY) s = 1;
  return {s, 1.0f / s, 0};
}
__host__ __device__ inline float eden_tensor_scale(float amax) {
  const float t = amax / kEdenRange / kEdenStep;
  return t == 0 ? 1.0f : t;
}
// Post hoc: the power of two that takes the largest pseudo-scale, which is what `most` is here, to 128 .. 240.
__host__ __device__ inline float post_hoc_tensor_scale(float most) {
  const uint32_t bits = float_bits(most);
  if (bits >= float_bits(INFINITY)) return bits_float(0x7fffffffu);
  return most == 0 ? 1.0f : bits_float((bits & 0x7f800000u) - (7u << 23));
}
// The factor that a GEMM's alpha takes for an operand.
__host__ __device__ inline float tensor_scale_decode(const OperandRecipe& how, float amax) {
  if (how.format == Format::nvfp4 && how.outer == Outer::tensor)
    return is_post_hoc(how) ? post_hoc_tensor_scale(amax) : is_eden(how) ? eden_tensor_scale(amax) : amax / nvfp4_range(how.scale);
  if (is_fp8(how.format)) return amax / (how.format == Format::fp8_e4m3 ? kE4M3Max : kE5M2Max);
  if (how.format == Format::mxfp4 && how.scale == ScaleRule::range34) return 1.0f / 3.0f;
  return 1;
}
// What alpha_of() is to know of an operand. Values of post_hoc that were made without the packed form have the tensor's scale in them.
__host__ __device__ inline float* amax_for_alpha(const Operand4& o, const OperandRecipe& how) { return is_post_hoc(how) && !o.scales ? nullptr : o.amax; }
// alpha: the product of both operands' factors; an operand that has none has no amax.
__device__ inline float alpha_of(const float* amax_a, const OperandRecipe& a, const float* amax_b, const OperandRecipe& b) {
  return (amax_a ? tensor_scale_decode(a, *amax_a) : 1.0f) * (amax_b ? tensor_scale_decode(b, *amax_b) : 1.0f);
}

// ------------------------------------------------------------------ dequantization: what a packed operand stands for
// The FP32 scale of the whole tensor, if its scale is one.
__device__ inline float outer_scale_of_tensor(const Operand4& p, const OperandRecipe& how) {
  const bool wide = how.format == Format::nvfp4 && how.outer == Outer::b1x128;
  const bool elsewhere = how.format == Format::fp4_vector || how.format == Format::exact || wide;
  return elsewhere ? 1.0f : tensor_scale_decode(how, p.amax ? *p.amax : 1.0f);
}
// The FP32 scale of element (row, col): its block's, times the outer one. tensor: outer_scale_of_tensor().
struct ElementScale { float block, outer; };
__device__ __forceinline__ ElementScale element_scale(const Operand4& p, const OperandRecipe& how, int row, int col, float tensor) {
  ElementScale s = {1, tensor};
  if (how.format == Format::nvfp4) s.block = e4m3_decode(p.scales[scale_offset(row, col / 16, ceil_div(p.cols, 16))]);
  if (is_mx(how.format)) s.block = e8m0_decode(p.scales[scale_offset(row, col / 32, ceil_div(p.cols, 32))]);
  if (how.format == Format::fp4_vector) s.outer = p.outer[row];
  if (how.format == Format::nvfp4 && how.outer == Outer::b1x128) s.outer = p.outer[(size_t)row * ceil_div(p.cols, 128) + col / 128];
  return s;
}
__device__ inline ElementScale element_scale(const Operand4& p, const OperandRecipe& how, int row, int col) {
  return element_scale(p, how, row, col, outer_scale_of_tensor(p, how));
}
__device__ inline float dequantized(const Operand4& p, const OperandRecipe& how, int row, int col, float tensor) {
  const size_t at = (size_t)row * p.ld + col;
  if (how.format == Format::exact) return to_float(p.values[at]);
  const ElementScale s = element_scale(p, how, row, col, tensor);
  const bool e4m3 = how.format == Format::fp8_e4m3 || how.format == Format::mxfp8;
  const float code = how.format == Format::fp8_e5m2 ? e5m2_decode(p.codes[at])
                     : e4m3 ? e4m3_decode(p.codes[at]) : e2m1_decode(p.codes[at / 2] >> (4 * (col % 2)) & 15);
  return code * s.block * s.outer;
}
template <class T> __global__ void dequantize_kernel(T* out, Operand4 p, OperandRecipe how) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i / p.cols;
  if (row < (unsigned)p.rows) out[i] = from_float<T>(dequantized(p, how, row, i % p.cols, outer_scale_of_tensor(p, how)));
}
// out [rows, cols] = the values of a packed operand, all scales included.
template <class T> void dequantize(T* out, const Operand4& p, const OperandRecipe& how) {
  launch(dequantize_kernel<T>, ceil_div((unsigned)p.rows * p.cols, 256u), 256, 0, out, p, how);
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
