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
// The value of index 0..7. Written as arithmetic, not as a table, so that a loop over 16 codes vectorizes on the CPU.
__host__ __device__ __forceinline__ float e2m1_magnitude(int index) {
  return 0.5f * (float)index + 0.5f * (float)(index > 4 ? index - 4 : 0) + (index == 7 ? 1.0f : 0.0f);
}
__host__ __device__ __forceinline__ float e2m1_decode(int code) {
  const float m = e2m1_magnitude(code & 7);
  return code & 8 ? -m : m;
}
// The grid has steps of .5 below 2, of 1 below 4, of 2 up to 6. In units of the step a value is t in [0, 4), and its index is t rounded,
// plus 0, 2 or 4. Written so that 16 of them vectorize and a GPU needs no slow conversion. 6 and more, and NaN, end at index 7.
struct E2M1Step { float t; int offset; };
__host__ __device__ __forceinline__ E2M1Step e2m1_step(float a) {
  a = a < 6.0f ? a : 6.0f;
  const int from2 = a >= 2.0f, from4 = a >= 4.0f;         // arithmetic on comparisons, not branches
  return {a * (2.0f - (float)from2 - 0.5f * (float)from4), 2 * from2 + 2 * from4};
}
// Index of the nearest grid value of |v|; a tie goes to the even index, as t goes to the even integer: adding 1.5 * 2^23 leaves no
// bits for a fraction.
__host__ __device__ __forceinline__ int e2m1_index_rn(float a) {
  const E2M1Step s = e2m1_step(a);
  return (int)(float_bits(s.t + 12582912.0f) - 0x4b400000u) + s.offset;
}
__host__ __device__ __forceinline__ int e2m1_sign(float v) {          // 8 if the sign bit is set; NaN counts as positive
  return v != v ? 0 : (int)(float_bits(v) >> 28 & 8);
}
// Round to nearest even code.
__host__ __device__ __forceinline__ int e2m1_encode(float v) { return e2m1_sign(v) | e2m1_index_rn(fabsf(v)); }

// Stochastic rounding with u in [0, 1): up with probability (|v| - lo) / (hi - lo). |v| - lo is exact, so nothing is lost.
__host__ __device__ __forceinline__ int e2m1_index_sr(float a, float u) {
  const E2M1Step s = e2m1_step(a);
  const int lo = (int)(s.t >= 1.0f) + (int)(s.t >= 2.0f) + (int)(s.t >= 3.0f);
  return lo + s.offset + (int)(u < s.t - (float)lo);
}
__host__ __device__ __forceinline__ int e2m1_encode_sr(float v, float u) { return e2m1_sign(v) | e2m1_index_sr(fabsf(v), u); }

// ------------------------------------------------------------------ E4M3
__host__ __device__ inline float e4m3_decode(uint8_t byte) {
  const int e = byte >> 3 & 15, m = byte & 7;
  if ((byte & 0x7f) == 0x7f) return bits_float(0x7fffffffu);
  const float a = e == 0 ? (float)m * 0x1p-9f : bits_float((unsigned)(e + 120) << 23 | (unsigned)m << 20);
  return byte & 0x80 ? -a : a;
}
// Round to nearest even, saturating at 448.
__host__ __device__ inline uint8_t e4m3_encode(float v) {
  const unsigned bits = float_bits(v), sign = bits >> 24 & 0x80, a = bits & 0x7fffffff;
  if (a > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  if (a >= 0x43e00000u) return (uint8_t)(sign | 0x7e);                                        // 448 and above
  if (a < 0x3c800000u) return (uint8_t)(sign | (unsigned)rintf(fabsf(v) * 512.0f));           // below 2^-6: steps of 2^-9
  return (uint8_t)(sign | (((a + 0x7ffff + (a >> 20 & 1)) >> 20) - (120u << 3)));
}

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
__host__ __device__ inline uint8_t e5m2_encode(float v) {
  const unsigned bits = float_bits(v), sign = bits >> 24 & 0x80, a = bits & 0x7fffffff;
  if (a > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  if (a >= 0x47600000u) return (uint8_t)(sign | 0x7b);                                        // 57344 and above
  if (a < 0x38800000u) return (uint8_t)(sign | (unsigned)rintf(fabsf(v) * 65536.0f));         // below 2^-14: steps of 2^-16
  return (uint8_t)(sign | (((a + 0xfffff + (a >> 21 & 1)) >> 21) - (112u << 2)));
}

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
__host__ __device__ inline size_t scale_offset(int row, int block, int blocks) {
  return ((size_t)(row / 128) * ((blocks + 3) / 4) + block / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
}
// Bytes of the scale buffer of an operand [rows, cols] with one scale for 16 columns.
__host__ __device__ inline size_t scale_bytes(int rows, int cols) {
  return (size_t)ceil_div(rows, 128) * ceil_div(ceil_div(cols, 16), 4) * 512;
}
