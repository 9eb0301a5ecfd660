// kernels/formats.cuh -- the number formats of FP4 training: E2M1, E4M3, E5M2, E8M0, and where a block scale lies in memory.
//
// E2M1 (FP4)   0 .5 1 1.5 2 3 4 6 and their negatives: code = sign << 3 | index. Ties go to the even index. Above 6: saturates.
// E4M3 (FP8)   1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448, smallest 2^-9, no infinity, 0x7f is NaN.
// E5M2 (FP8)   1 sign, 5 exponent (bias 15), 2 mantissa bits; largest 57344, smallest 2^-16; we saturate and never make an infinity.
// E8M0         a power of two: 2^(byte - 127); 255 is NaN.
// Source       OCP Microscaling Formats 1.0; PTX ISA `cvt` (saturating conversions: NaN -> +6 in E2M1, NaN in E4M3).
// These functions are plain arithmetic so that host and device, CPU and every GPU agree bit for bit. They are checked over
// all codes and all BF16 values, and against the host conversions of cuda_fp4.h / cuda_fp8.h where those are installed.
#pragma once
#include "cuda.cuh"

constexpr float kE2M1Max = 6;
constexpr float kE4M3Max = 448;
constexpr float kE5M2Max = 57344;

// ------------------------------------------------------------------ E2M1
// The value of index 0..7. Read as the bits of a float, an index in the place of the exponent's last bit and the mantissa's first is that value
// times 2^-126, be it denormal. A CPU is slow with denormals: there it is arithmetic that a loop over 16 codes can vectorize.
__host__ __device__ __forceinline__ float e2m1_magnitude(int index) {
  if (!kOnCpu) return bits_float((uint32_t)index << 22) * 0x1p126f;
  return 0.5f * (float)index + 0.5f * (float)(index > 4 ? index - 4 : 0) + (index == 7 ? 1.0f : 0.0f);
}
// And back: the index of a value of the grid.
__host__ __device__ __forceinline__ int e2m1_index(float magnitude) {
  if (!kOnCpu) return (int)(float_bits(magnitude * 0x1p-126f) >> 22);
  const int above_half = (int)(float_bits(magnitude) >> 22) - 252;
  return (above_half > 0 ? above_half : 0) + (magnitude == 0.5f);
}
__host__ __device__ __forceinline__ float e2m1_decode(int code) {
  const float m = e2m1_magnitude(code & 7);
  return code & 8 ? -m : m;
}
// Rounding is arithmetic on floats: what the emulation wants is the rounded value, and only a packed operand its code. The grid has steps of .5
// below 2, of 1 below 4, of 2 up to 6: half the power of two below the value, which is taken as 1 at least.
__host__ __device__ __forceinline__ float e2m1_saturate(float a) {             // NaN -> 6
#ifdef __CUDA_ARCH__
  return fminf(a, 6.0f);
#else
  return a < 6.0f ? a : 6.0f;                                                // a loop of these vectorizes
#endif
}
__host__ __device__ __forceinline__ uint32_t e2m1_binade(float a) {           // that power of two, as bits
  const uint32_t b = float_bits(a) & 0x7f800000u;
  return b > 0x3f800000u ? b : 0x3f800000u;
}
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float e2m1_binade_value(float a) { return fmaxf(bits_float(float_bits(a) & 0x7f800000u), 1.0f); }       // as a float
#endif
// |v| = a to the nearest grid value; a tie goes to the even index: adding 2^22 powers of two leaves no bits below a step. A GPU does half as many
// integer operations, minima and maxima in the same time as multiply-adds: there the power of two is a float, and two multiply-adds do the rest.
// below7: without saturation, for a < 7.
__host__ __device__ __forceinline__ float e2m1_round_below7(float a) {
#ifdef __CUDA_ARCH__
  const float binade = e2m1_binade_value(a);
  return fmaf(binade, -0x1p22f, fmaf(binade, 0x1p22f, a));
#else
  const float magic = bits_float(e2m1_binade(a) + (22u << 23));
  return (a + magic) - magic;
#endif
}
__host__ __device__ __forceinline__ float e2m1_round(float a) { return e2m1_round_below7(e2m1_saturate(a)); }
// Stochastically, with u in [0, 1): up with probability (a - lo) / step. lo: the step's bits of a, found below the first bit of a + 2 binades; bits
// that could round that sum up are cut off first. Nothing here is rounded.
__host__ __device__ __forceinline__ float e2m1_round_sr(float a, float u) {
  a = e2m1_saturate(a);
  const uint32_t binade = e2m1_binade(a);
  const float twice = bits_float(binade + (1u << 23)), step = bits_float(binade - (1u << 23));
  const float lo = bits_float(float_bits(bits_float(float_bits(a) & 0xfffff000u) + twice) & 0xffe00000u) - twice;
  return lo + (u * step < a - lo ? step : 0.0f);
}
// The middle of the r-th of 256 intervals of [0, 1): (2r + 1) / 512.
__host__ __device__ __forceinline__ float byte_uniform(uint32_t r) { return bits_float(0x3f804000u | r << 15) - 1.0f; }
// e2m1_round_sr(a, byte_uniform(r)) for a GPU, where operations are what bounds the quantizers: its index, of 0 <= a <= 2^126, as the upper byte; below it
// is what is left over. A value too large has an index above 7. The bits of a * 2^-126, be it denormal, are its place on the grid (compare
// e2m1_magnitude()), in units of 2^-22 steps; rounded up, so that the least excess counts. It goes up where the byte, and a half less a unit, in units
// of 2^-8 steps carry into it.
// All that four times as large. part: e2m1_byte_part(); four: 4.
__host__ __device__ __forceinline__ uint32_t e2m1_lifted_sr(float a, uint32_t part, uint32_t four) {
#ifdef __CUDA_ARCH__
  return float_bits(__fmul_ru(a, 0x1p-126f)) * four + part;
#else
  const uint32_t place = a < 1 ? (uint32_t)ceil((double)a * 0x1p23) : float_bits(a) - (126u << 23);
  return place * four + part;
#endif
}
// filler: 0x7fff
__host__ __device__ __forceinline__ uint32_t e2m1_byte_part(uint32_t complements, int which, uint32_t filler) {
#ifdef __CUDA_ARCH__
  return __byte_perm(complements, filler, 0x6054 + (which << 8));
#else
  return (complements >> 8 * which & 0xff) << 16 | filler;
#endif
}
__host__ __device__ __forceinline__ int e2m1_index_rn(float a) { return e2m1_index(e2m1_round(a)); }
__host__ __device__ __forceinline__ int e2m1_index_sr(float a, float u) { return e2m1_index(e2m1_round_sr(a, u)); }
__host__ __device__ __forceinline__ int e2m1_sign(float v) {          // 8 if the sign bit is set; NaN counts as positive
  return v != v ? 0 : (int)(float_bits(v) >> 28 & 8);
}
// Round to nearest even code.
__host__ __device__ __forceinline__ int e2m1_encode(float v) { return e2m1_sign(v) | e2m1_index_rn(fabsf(v)); }

__host__ __device__ __forceinline__ int e2m1_encode_sr(float v, float u) { return e2m1_sign(v) | e2m1_index_sr(fabsf(v), u); }

// Eight codes in a word, the first in the lowest 4 bits, from two words of bytes s000iii0: those of the even codes, and of the odd ones. All four bytes of
// a word move at once; what they push over their edges is masked away.
__host__ __device__ __forceinline__ uint32_t e2m1_nibbles(uint32_t even, uint32_t odd) {
  const uint32_t below = (even >> 1 & 0x07070707u) | (even >> 4 & ~0x07070707u), above = (odd & 0x80808080u) | (odd << 3 & ~0x80808080u);
  return (below & 0x0f0f0f0fu) | (above & 0xf0f0f0f0u);
}
#ifndef CPU_BUILD
// The codes of 8 values of the grid, with the floats' signs. An FP16 number 2^-14 times as large has its code in its upper byte, as s000iii0 (compare
// e2m1_magnitude()).
__device__ __forceinline__ uint32_t e2m1_pack8(const float (&v)[8]) {
  auto two = [&](int low, int high) {
    const __half2 h = __hmul2(__floats2half2_rn(v[low], v[high]), __float2half2_rn(0x1p-14f));
    return *reinterpret_cast<const uint32_t*>(&h);
  };
  return e2m1_nibbles(__byte_perm(two(0, 2), two(4, 6), 0x7531), __byte_perm(two(1, 3), two(5, 7), 0x7531));
}
#endif

// ------------------------------------------------------------------ E4M3, and what it shares with E5M2
// The code of an 8-bit float with kMantissa bits after the point and this exponent bias: to nearest even, saturating at the value of code `largest`.
// NaN: 0x7f with the sign.
template <int kMantissa, int kBias> __host__ __device__ inline uint8_t fp8_encode(float v, uint8_t largest) {
  constexpr int kDrop = 23 - kMantissa;                                                       // bits of FP32's mantissa that go away
  constexpr unsigned kLift = 127 - kBias, kHalf = (1u << (kDrop - 1)) - 1;                     // FP32's exponent is larger by kLift
  const unsigned bits = float_bits(v), sign = bits >> 24 & 0x80, a = bits & 0x7fffffff;
  if (a > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  if (a >= ((unsigned)largest << kDrop) + (kLift << 23)) return (uint8_t)(sign | largest);
  if (a < (kLift + 1) << 23) return (uint8_t)(sign | (unsigned)rintf(fabsf(v) * (float)(1 << (kBias - 1 + kMantissa))));   // equal steps
  return (uint8_t)(sign | (((a + kHalf + (a >> kDrop & 1)) >> kDrop) - (kLift << kMantissa)));
}
__host__ __device__ inline float e4m3_decode(uint8_t byte) {
  const int e = byte >> 3 & 15, m = byte & 7;
  if ((byte & 0x7f) == 0x7f) return bits_float(0x7fffffffu);
  const float a = e == 0 ? (float)m * 0x1p-9f : bits_float((unsigned)(e + 120) << 23 | (unsigned)m << 20);
  return byte & 0x80 ? -a : a;
}
// Round to nearest even, saturating at 448.
__host__ __device__ inline uint8_t e4m3_encode(float v) { return fp8_encode<3, 7>(v, 0x7e); }

// The code of a float that is a nonnegative E4M3 value already, or a NaN.
__host__ __device__ __forceinline__ uint8_t e4m3_code(float value) {
  const uint32_t bits = float_bits(value);
  if (bits < 0x3c800000u) return (uint8_t)(value * 512.0f);                                   // below 2^-6: steps of 2^-9
  return (uint8_t)min((bits >> 20) - (120u << 3), 0x7fu);
}
// v rounded to E4M3, as a float: what e4m3_decode(e4m3_encode(v)) gives, without a code in between.
__host__ __device__ __forceinline__ float fp8_round_positive(float v, float most, uint32_t smallest_binade, uint32_t mantissa_bits) {
  const float a = v > most ? most : v;                                        // a NaN stays
  const uint32_t b = float_bits(a) & 0x7f800000u;
  const float magic = bits_float((b > smallest_binade ? b : smallest_binade) + ((23 - mantissa_bits) << 23));
  return (a + magic) - magic;
}
__host__ __device__ __forceinline__ float fp8_round(float v, float most, uint32_t smallest_binade, uint32_t mantissa_bits) {
  const float r = fp8_round_positive(fabsf(v), most, smallest_binade, mantissa_bits);
  return r != r ? bits_float(0x7fffffffu) : bits_float(float_bits(r) | (float_bits(v) & 0x80000000u));
}
__host__ __device__ __forceinline__ float e4m3_round(float v) { return fp8_round(v, kE4M3Max, (127u - 6) << 23, 3); }
// The same of v >= 0, or NaN.
__host__ __device__ __forceinline__ float e4m3_round_scale(float v) {
  return kOnCpu ? e4m3_round(v) : fp8_round_positive(v, kE4M3Max, (127u - 6) << 23, 3);        // the NaN that a GPU makes is 0x7fffffff already
}
__host__ __device__ __forceinline__ float e5m2_round(float v) { return fp8_round(v, kE5M2Max, (127u - 14) << 23, 2); }

// The smallest E4M3 value >= v, for v >= 0; saturates at 448. The codes of nonnegative values are in the order of the values, so one
// more is the next value, across the ends of binades and out of the subnormals too.
__host__ __device__ inline uint8_t e4m3_encode_ceil(float v) {
  const uint8_t nearest = e4m3_encode(v);
  return (uint8_t)(nearest + (nearest < 0x7e && e4m3_decode(nearest) < v));
}
// Stochastic rounding of v >= 0 with u in [0, 1): up with probability (v - lo) / (hi - lo), which is exact in FP32; saturates at 448.
__host__ __device__ inline uint8_t e4m3_encode_sr(float v, float u) {
  const unsigned a = float_bits(v) & 0x7fffffff;
  if (a > 0x7f800000u) return 0x7f;
  if (a >= 0x43e00000u) return 0x7e;                                                          // 448 and above
  if (a < 0x3c800000u) {                                                                      // below 2^-6: steps of 2^-9
    const float steps = fabsf(v) * 512.0f, lo = floorf(steps);
    return (uint8_t)((unsigned)lo + (u < steps - lo));
  }
  return (uint8_t)((a >> 20) - (120u << 3) + (u < (float)(a & 0xfffff) * 0x1p-20f));
}

// ------------------------------------------------------------------ E5M2
__host__ __device__ inline float e5m2_decode(uint8_t byte) {
  const int e = byte >> 2 & 31, m = byte & 3;
  if (e == 31) return bits_float((byte & 0x80u) << 24 | (m ? 0x7fffffffu : 0x7f800000u));
  const float a = e == 0 ? (float)m * 0x1p-16f : bits_float((unsigned)(e + 112) << 23 | (unsigned)m << 21);
  return byte & 0x80 ? -a : a;
}
// Round to nearest even, saturating at 57344.
__host__ __device__ inline uint8_t e5m2_encode(float v) { return fp8_encode<2, 15>(v, 0x7b); }

// ------------------------------------------------------------------ E8M0: scales of MXFP4 and MXFP8, v >= 0
__host__ __device__ inline float e8m0_decode(uint8_t byte) {
  if (byte == 255) return bits_float(0x7fffffffu);
  return byte == 0 ? 0x1p-127f : bits_float((unsigned)byte << 23);
}
// The largest power of two <= v (smallest code if v is below it); saturates at 2^127.
__host__ __device__ inline uint8_t e8m0_encode_floor(float v) {
  const unsigned a = float_bits(v) & 0x7fffffff;
  if (a > 0x7f800000u) return 255;
  if (a == 0x7f800000u) return 254;
  return (uint8_t)(a >> 23);
}
// The power of two nearest to v on a logarithmic scale: round(log2 v), up from sqrt(2) on (whose mantissa lies between 0x3504f3 and 0x3504f4).
__host__ __device__ inline uint8_t e8m0_encode_nearest(float v) {
  const uint8_t floor = e8m0_encode_floor(v);
  return (uint8_t)(floor + (floor > 0 && floor < 254 && (float_bits(v) & 0x7fffff) > 0x3504f3));
}
// 2^(127 - byte), the reciprocal of a scale: exact, since 254 - byte is a code again. NaN stays NaN.
__host__ __device__ inline float e8m0_reciprocal(uint8_t byte) { return e8m0_decode(byte == 255 ? 255 : (uint8_t)(254 - byte)); }
// The smallest power of two >= v (PTX cvt.rp.satfinite.ue8m0x2); saturates at 2^127.
__host__ __device__ inline uint8_t e8m0_encode_ceil(float v) {
  const unsigned a = float_bits(v) & 0x7fffffff;
  if (a > 0x7f800000u) return 255;
  if (a <= 0x00400000u) return 0;                                          // up to 2^-127
  const unsigned up = (a >> 23) + ((a & 0x7fffff) != 0);
  return (uint8_t)(up < 254 ? up : 254);
}

// ------------------------------------------------------------------ where block scales lie: the 128x4 tiled layout
// cuBLASLt, tcgen05 and our mma.sync kernel all read block scales from tiles of 128 rows x 4 blocks, 512 bytes each:
//
//   tile (row / 128, block / 4), tiles row-major over ceil(blocks / 4);   inside a tile, byte
//       (row % 32) * 16  +  (row % 128) / 32 * 4  +  block % 4
//
// so the four scales of one row and 64 consecutive elements are one aligned 32-bit word, and rows r, r+32, r+64, r+96 share
// 16 bytes. Rows and blocks beyond the matrix are zero: they are read by the hardware.
// Source: cuBLAS documentation, "1D block scaling factors layout"; CUTLASS Sm1xxBlockScaledConfig.
__host__ __device__ inline size_t scale_offset(unsigned row, unsigned block, unsigned blocks) {
  return ((size_t)(row / 128) * ((blocks + 3) / 4) + block / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
}
// Bytes of the scale buffer of an operand [rows, cols] with one scale for 16 columns.
__host__ __device__ inline size_t scale_bytes(int rows, int cols) {
  return (size_t)ceil_div(rows, 128) * ceil_div(ceil_div(cols, 16), 4) * 512;
}
