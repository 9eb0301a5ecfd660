// dev/reference_recipes.h -- the oracle, second part: every quantizer that a row of kernels/recipe.cuh can name, once more in plain C++ on
// the host, one element after the other. Like reference.h it includes nothing from kernels/ and shares no code with it.
//
//   formats      E4M3 rounded up and stochastically, E5M2, powers of two: by search over the representable values
//   rotation     RHT of 16 to 128 with 128 sign bits: FP32 butterflies in the project's order; fresh signs from Philox
//   quantize     NVFP4 (one tensor scale or 1x128, 4/6, scale up, MS-EDEN), MXFP4 (OCP, up, QuEST, range-matched), vector-wise, FP8, MXFP8
//   mxfp4_through_e4m3   two E4M3 bytes for one E8M0 byte, and the blocks that this loses
//   estimators   DGE; QuEST's mask and un-rotation
//   linear       forward and backward of Y = X W^T under six operands, in double on exactly dequantized operands
//
// Where the specification gives an order of FP32 operations, it is repeated literally, since codes must be equal bit for bit: sums run
// in ascending index order, every operation is rounded to FP32 (compile with -ffp-contract=off).
#pragma once
#include <functional>
#include "reference.h"

namespace reference {

// ------------------------------------------------------------------------------------------------------------------------------
// Formats

// |x| between two neighbours of an ascending table of n values: the lower index (n - 1 when at or beyond the last).
inline int below_in_table(const double* table, int n, double a) { return (int)(std::upper_bound(table, table + n, a) - table) - 1; }

inline const double* e4m3_table() {                    // the 127 magnitudes, 0 .. 448
  static const std::array<double, 127> table = [] {
    std::array<double, 127> t{};
    for (int i = 0; i < 127; i++) t[i] = e4m3_value((uint8_t)i);
    return t;
  }();
  return table.data();
}
// The smallest E4M3 value >= x, 448 if there is none. x >= 0: a scale.
inline uint8_t e4m3_up(float x) {
  if (x != x) return 0x7f;
  int i = below_in_table(e4m3_table(), 127, x);
  return (uint8_t)(i < 126 && e4m3_table()[i] < x ? i + 1 : i);
}
// Stochastic rounding of x >= 0: between neighbours lo <= x < hi the higher one if u < (x - lo) / (hi - lo). 448 and more: 448.
inline uint8_t e4m3_sr(float x, double u) {
  if (x != x) return 0x7f;
  const double* t = e4m3_table();
  int i = below_in_table(t, 127, x);
  return (uint8_t)(i < 126 && u < (x - t[i]) / (t[i + 1] - t[i]) ? i + 1 : i);
}

// E5M2 (OCP 8-bit Floating Point 1.0): 1-5-2 bits, bias 15, subnormals m * 2^-16, 0x7c infinity, above it NaN, largest 57344.
inline double e5m2_value(uint8_t byte) {
  int exponent = (byte >> 2) & 31, mantissa = byte & 3;
  double a = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent == 0 ? std::ldexp(mantissa, -16) : std::ldexp(4 + mantissa, exponent - 17);
  return byte & 0x80 ? -a : a;
}
// Round to nearest even, saturating (no infinity comes out).
inline uint8_t e5m2_rn(float x) {
  static const std::array<double, 124> table = [] {
    std::array<double, 124> t{};
    for (int i = 0; i < 124; i++) t[i] = e5m2_value((uint8_t)i);
    return t;
  }();
  int sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return (uint8_t)(0x7f | sign);
  return (uint8_t)(nearest_in_table(table.data(), 124, std::fabs((double)x)) | sign);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Rotation

typedef std::array<uint64_t, 2> SignBits;              // bit i % 64 of word i / 64 set: input i is negated
inline bool negated(const SignBits& signs, int i) { return signs[i / 64] >> (i % 64) & 1; }
// Fresh signs of one GEMM of one layer call: bit i % 32 of word i / 32 of Philox with the top bit of the stream set.
inline SignBits fresh_signs(uint64_t seed, uint32_t step, uint32_t stream) {
  Counter w = philox4x32_10({0, 0, step, stream | 0x80000000u}, {(uint32_t)seed, (uint32_t)(seed >> 32)});
  return {w[0] | (uint64_t)w[1] << 32, w[2] | (uint64_t)w[3] << 32};
}
// y = (x * s) H_n / sqrt(n) of n FP32 values in place: negate, butterflies (a, b) -> (a + b, a - b) of distance 1, 2, 4, ..., at last
// times the FP32 number nearest to 1/sqrt(n). sums: without that.
inline float rht_factor(int n) { return (float)(1 / std::sqrt((double)n)); }
inline void rht_fp32(float* v, int n, const SignBits& signs, bool sums = false) {
  for (int i = 0; i < n; i++) if (negated(signs, i)) v[i] = -v[i];
  for (int distance = 1; distance < n; distance *= 2)
    for (int i = 0; i < n; i++)
      if (!(i & distance)) {
        float a = v[i], b = v[i + distance];
        v[i] = a + b;
        v[i + distance] = a - b;
      }
  if (!sums) for (int i = 0; i < n; i++) v[i] *= rht_factor(n);
}
// The same by the definition of the matrix, in double.
inline Array rht_exact(const Array& x, const SignBits& signs) {
  int n = (int)x.size();
  Array y(n, 0.);
  for (int j = 0; j < n; j++)
    for (int i = 0; i < n; i++) y[j] += x[i] * (negated(signs, i) ? -1 : 1) * hadamard_entry(i, j) / std::sqrt((double)n);
  return y;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Quantizers

enum class Kind { exact, nvfp4, mxfp4, vector, e4m3, e5m2, mxfp8 };
enum class Round { nearest, stochastic, eden16, eden128 };
enum class Scale { standard, up, headroom, four_six, ocp, quest_floor, quest_nearest, range34, post_hoc };

struct Quantizer {
  Kind kind = Kind::exact;
  bool tile16 = false, outer128 = false;
  Round round = Round::nearest;
  Scale scale = Scale::standard;
  int rht = 0;
  bool rotated_to_bf16 = false;          // NVIDIA's: the rotated value is rounded to BF16 before anything else
  SignBits signs = {0, 0};
  bool transpose = false;
  uint64_t seed = 0; uint32_t step = 0, stream = 0;
  bool choose_by_sr = false;             // 4/6 that compares the stochastically rounded candidates: the trap that makes it biased
};

struct Quantized {
  int rows = 0, cols = 0, width = 0;     // width: cols, padded with zeros to whole blocks and whole rotation groups
  int block = 0;                         // elements under one scale byte (0: there are none)
  float amax = 0;                        // max|input|
  std::vector<float> input;              // [rows, width], what was rounded: after transposition and rotation
  float waiting = 1;                     // a factor of `input` that is not in it yet
  std::vector<uint8_t> codes;            // [rows, width] E2M1 codes or FP8 bytes
  std::vector<uint8_t> scales;           // [rows, width / block]
  std::vector<uint8_t> mask;             // [rows, width] QuEST: |x / scale| < 6
  std::vector<float> outer;              // FP32 scales of [rows, 128 columns] (1x128) or [rows] (vector-wise)
  Array stored;                          // [rows, width] code * scale, times the FP32 scale of 1x128 and vector-wise: exact
  double tensor = 1;                     // the factor that the GEMM's alpha takes
  double value(size_t i) const { return stored[i] * tensor; }
};

inline float largest_float() { return std::numeric_limits<float>::max(); }
// 8 random bits for each element, 16 blocks of a row counted through all rows; a block of 32 has two.
inline double element_uniform(const Quantizer& how, uint64_t block16, int j) {
  Counter w = philox4x32_10({(uint32_t)block16, (uint32_t)(block16 >> 32), how.step, how.stream}, {(uint32_t)how.seed, (uint32_t)(how.seed >> 32)});
  return (2 * (int)(w[j / 4] >> (8 * (j % 4)) & 255) + 1) / 512.;
}
// Of the scale of block b in row r: 16 bits, from `bit` on. Rows r, r + 4, r + 8 and r + 12 of sixteen share a draw, a word each.
inline double scale_uniform(const Quantizer& how, uint64_t r, uint64_t b, uint64_t blocks, int bit = 0) {
  uint64_t block16 = (4 * (r / 16) + r % 4) * blocks + b;
  Counter w = philox4x32_10({(uint32_t)block16, (uint32_t)(block16 >> 32), how.step, how.stream}, {(uint32_t)how.seed, (uint32_t)(how.seed >> 32)});
  return (2. * (w[r % 16 / 4] >> bit & 0xffff) + 1) / 131072.;
}
// Codes of n (16 or 32) scaled values v, the first of which lies in 16-block block16.
inline void round_e2m1(uint8_t* codes, const float* v, int n, const Quantizer& how, uint64_t block16) {
  for (int j = 0; j < n; j++)
    codes[j] = how.round == Round::stochastic ? e2m1_sr(v[j], element_uniform(how, block16 + j / 16, j % 16)) : e2m1_rn(v[j]);
}

// The rotated operand [rows, width].
inline Quantized rotated_operand(const std::vector<float>& x, int src_rows, int src_cols, const Quantizer& how) {
  Quantized q;
  q.rows = how.transpose ? src_cols : src_rows;
  q.cols = how.transpose ? src_rows : src_cols;
  q.block = how.kind == Kind::nvfp4 ? 16 : how.kind == Kind::mxfp4 || how.kind == Kind::mxfp8 ? 32 : 0;
  int unit = std::max(how.rht, std::max(q.block, 16));
  q.width = (q.cols + unit - 1) / unit * unit;
  q.input.assign((size_t)q.rows * q.width, 0.f);
  for (int r = 0; r < q.rows; r++)
    for (int c = 0; c < q.cols; c++) q.input[(size_t)r * q.width + c] = how.transpose ? x[(size_t)c * src_cols + r] : x[(size_t)r * src_cols + c];
  const bool sums = how.rht && how.kind == Kind::nvfp4 && how.scale == Scale::post_hoc && !how.rotated_to_bf16;
  if (sums) q.waiting = rht_factor(how.rht);
  if (how.rht)
    for (int r = 0; r < q.rows; r++)
      for (int c = 0; c < q.cols; c += how.rht) rht_fp32(&q.input[(size_t)r * q.width + c], how.rht, how.signs, sums);
  if (how.rotated_to_bf16)
    for (float& v : q.input) v = round_bf16(v);
  q.amax = max_abs(q.input.data(), q.input.size());
  q.codes.assign(q.input.size(), 0);
  q.stored.assign(q.input.size(), 0.);
  if (q.block) q.scales.assign(q.input.size() / q.block, 0);
  return q;
}

// NVFP4 with one FP32 scale a tensor. `top`: 448, or 256 for 4/6. `most`: where the block maximum goes: 6, or with headroom 6*16/17, which the
// rounding of the E4M3 scale (down by at most 1/17) cannot lift above 6.
inline void nvfp4_tensor(Quantized& q, const Quantizer& how) {
  const float top = how.scale == Scale::four_six ? 256 : 448;
  const float most = how.scale == Scale::headroom ? 6.f * 16.f / 17.f : 6.f;
  float encode = q.amax == 0 || std::isinf(q.amax) ? 1.f : std::min(top * most / q.amax, largest_float());
  const float sixth = 1.f / 6.f, factor = encode * sixth, decode = 1.f / encode;
  q.tensor = q.amax / (top * most);                     // FP32
  int blocks = q.width / 16;
  for (int r = 0; r < q.rows; r++)
    for (int b = 0; b < blocks; b++) {
      int first = how.tile16 ? r / 16 * 16 : r, last = how.tile16 ? std::min(first + 15, q.rows - 1) : r;
      float amax = 0;
      for (int s = first; s <= last; s++) amax = std::max(amax, max_abs(&q.input[(size_t)s * q.width + 16 * b], 16));
      float wanted = std::min(amax * factor, largest_float());
      if (how.scale == Scale::headroom) wanted = wanted * (17.f / 16.f);
      uint64_t block = (uint64_t)r * blocks + b;
      // One candidate, or two: the block maximum to 6, and to 4 with a scale 1.5 times as large.
      struct Candidate { uint8_t scale, codes[16]; float squares[16]; };
      auto candidate = [&](float scale, int row, bool nearest) {
        Candidate c;
        c.scale = how.scale == Scale::up ? e4m3_up(scale) : e4m3_rn(scale);
        float stored = (float)e4m3_value(c.scale) * decode, inverse = std::min(1.f / stored, largest_float()), v[16];
        const float* x = &q.input[(size_t)row * q.width + 16 * b];
        for (int j = 0; j < 16; j++) v[j] = x[j] * inverse;
        if (nearest) for (int j = 0; j < 16; j++) c.codes[j] = e2m1_rn(v[j]);
        else round_e2m1(c.codes, v, 16, how, (uint64_t)row * blocks + b);
        for (int j = 0; j < 16; j++) {
          float d = (float)e2m1_value(c.codes[j]) * stored - x[j];
          c.squares[j] = d * d;
        }
        return c;
      };
      // The sum of a tile runs through the rows of the source, so that a matrix and its transpose choose alike.
      auto squared_error = [&](float scale) {
        float square[16][16], sum = 0;
        for (int s = first; s <= last; s++) {
          Candidate c = candidate(scale, s, !how.choose_by_sr);
          for (int j = 0; j < 16; j++) square[s - first][j] = c.squares[j];
        }
        int n = last - first + 1;
        if (how.transpose) for (int j = 0; j < 16; j++) for (int s = 0; s < n; s++) sum = sum + square[s][j];
        else for (int s = 0; s < n; s++) for (int j = 0; j < 16; j++) sum = sum + square[s][j];
        return sum;
      };
      float scale = wanted;
      if (how.scale == Scale::four_six) {
        float larger = std::min(wanted * 1.5f, largest_float());
        if (squared_error(larger) < squared_error(wanted)) scale = larger;
      }
      Candidate c = candidate(scale, r, false);
      q.scales[block] = c.scale;
      for (int j = 0; j < 16; j++) {
        q.codes[block * 16 + j] = c.codes[j];
        q.stored[block * 16 + j] = e2m1_value(c.codes[j]) * e4m3_value(c.scale);
      }
    }
}

// NVFP4 with one FP32 scale for 1x128 (TetraJet-v2). With 4/6, as for a tensor: 256 instead of 448, and the better of two scales.
inline void nvfp4_outer(Quantized& q, const Quantizer& how) {
  const float top = how.scale == Scale::four_six ? 256 : 448;
  for (int r = 0; r < q.rows; r++)
    for (int c = 0; c < q.width; c += 16) {
      int group = c / 128 * 128;
      const float* x = &q.input[(size_t)r * q.width];
      float outer = max_abs(x + group, std::min(128, q.width - group)) / top / 6.f;
      if (outer == 0) outer = 1;
      if (c == group) q.outer.push_back(outer);
      float s = max_abs(x + c, 16) / outer / 6.f, v[16];
      if (s == 0) s = 0x1p-9f;
      uint64_t block = ((uint64_t)r * q.width + c) / 16;
      uint8_t byte = 0;
      auto scaled = [&](float wanted) {
        byte = how.scale == Scale::up ? e4m3_up(wanted) : e4m3_rn(wanted);
        if (byte == 0) byte = 1;                       // 2^-9 also where s was not zero but rounds to it: x / 0 has no code
        float step = outer * (float)e4m3_value(byte), error = 0;
        for (int j = 0; j < 16; j++) {
          v[j] = x[c + j] / step;
          float d = (float)e2m1_value(e2m1_rn(v[j])) * step - x[c + j], square = d * d;
          error = error + square;
        }
        return error;
      };
      if (how.scale == Scale::four_six) {
        float six = scaled(s), four = scaled(s * 1.5f);
        scaled(four < six ? s * 1.5f : s);
      } else scaled(s);
      q.scales[block] = byte;
      round_e2m1(&q.codes[block * 16], v, 16, how, block);
      for (int j = 0; j < 16; j++) q.stored[block * 16 + j] = e2m1_value(q.codes[block * 16 + j]) * e4m3_value(byte) * outer;
    }
}

// MS-EDEN (Quartet II, arXiv 2601.22813, Algorithm 1): rounding to nearest, then the length of the block is corrected in its scale,
// and that is where the randomness is.
constexpr double kEdenScale = 6 / ((17. / 16) * .93);
inline void nvfp4_eden(Quantized& q, const Quantizer& how, std::vector<float>* corrections = nullptr) {
  const float s = (float)kEdenScale;
  float t = q.amax / 255.99f / s;
  if (t == 0) t = 1;
  q.tensor = t;
  int blocks = q.width / 16, together = how.round == Round::eden128 ? 8 : 1;
  for (int r = 0; r < q.rows; r++)
    for (int b = 0; b < blocks; b += together) {
      size_t first = (size_t)r * blocks + b, end = first + std::min(together, blocks - b);
      float vv = 0, vq = 0, scale[8];                   // v is relative to its own block's scale, over one block as over eight
      for (size_t i = first; i < end; i++) {
        const float* y = &q.input[i * 16];
        scale[i - first] = (float)e4m3_value(e4m3_rn(max_abs(y, 16) / s / t));
        if (scale[i - first] == 0) scale[i - first] = 1;
        float step = scale[i - first] * t;
        for (int j = 0; j < 16; j++) {
          float v = y[j] / step;
          uint8_t code = e2m1_rn(v);
          vv = std::fma(v, v, vv);                             // each product is added before it is rounded
          vq = std::fma(v, (float)e2m1_value(code), vq);
          q.codes[i * 16 + j] = code;
        }
      }
      float correction = vq == 0 ? 1.f : vv / vq;
      for (size_t i = first; i < end; i++) {
        q.scales[i] = e4m3_sr(scale[i - first] * correction, scale_uniform(how, r, i - (size_t)r * blocks, blocks));
        for (int j = 0; j < 16; j++) q.stored[i * 16 + j] = e2m1_value(q.codes[i * 16 + j]) * e4m3_value(q.scales[i]);
        if (corrections) corrections->push_back(correction);
      }
    }
}

// floor(log2 v) of v > 0, exactly.
inline int floor_log2(double v) {
  int e;
  std::frexp(v, &e);
  return e - 1;
}
// Multiples of an eighth of the power of two at or below x > 0: 4 significant bits.
inline double e8m3_rn(double x) {
  double step = std::ldexp(1., floor_log2(x) - 3), n = std::floor(x / step), rest = x / step - n;
  return (rest > .5 || (rest == .5 && std::fmod(n, 2) == 1) ? n + 1 : n) * step;
}
inline double e8m3_sr(double x, double u) {
  double step = std::ldexp(1., floor_log2(x) - 3), n = std::floor(x / step);
  return (u < x / step - n ? n + 1 : n) * step;
}
// MS-EDEN with post hoc range alignment (Quartet II, section 7): first pseudo-scales of 4 significant bits, whatever their exponents, corrected and
// rounded stochastically; then the power of two that takes the largest one to 128 .. 240; then E4M3, which rounds only what becomes subnormal.
inline void nvfp4_post_hoc(Quantized& q, const Quantizer& how) {
  const float h = q.waiting;
  const int blocks = q.width / 16, together = how.round == Round::eden128 ? 8 : 1;
  std::vector<double> pseudo(q.scales.size());
  for (int r = 0; r < q.rows; r++)
    for (int b = 0; b < blocks; b += together) {
      const int end = std::min(b + together, blocks);
      float vv = 0, vq = 0;
      for (int i = b; i < end; i++) {
        const float* y = &q.input[((size_t)r * blocks + i) * 16];
        const float wanted = max_abs(y, 16) * (h / (float)kEdenScale);
        if (!std::isfinite(wanted)) { q.stored.assign(q.stored.size(), NAN); return; }
        const float p = (float)e8m3_rn(std::max(wanted, 0x1p-110f)), inverse = 1.f / p, encode = h * inverse;
        for (int j = 0; j < 16; j++) {
          const float v = y[j] * encode;
          uint8_t code = e2m1_rn(round_bf16(v));
          if (code == 8) code = 0;                             // no -0
          vv = std::fma(v, v, vv);
          vq = std::fma(v, (float)e2m1_value(code), vq);
          q.codes[((size_t)r * blocks + i) * 16 + j] = code;
        }
        pseudo[(size_t)r * blocks + i] = wanted == 0 && max_abs(y, 16) == 0 ? 0 : p;
      }
      const float correction = vq == 0 ? 1.f : vv / vq;
      for (int i = b; i < end; i++) {
        double& c = pseudo[(size_t)r * blocks + i];
        if (c != 0) c = e8m3_sr((float)c * correction, scale_uniform(how, r, i, blocks));
      }
    }
  double most = 0;
  for (double c : pseudo) most = std::max(most, c);
  q.tensor = most == 0 ? 1 : std::ldexp(1., floor_log2(most) - 7);
  for (int r = 0; r < q.rows; r++)
    for (int b = 0; b < blocks; b++) {
      const size_t i = (size_t)r * blocks + b;
      q.scales[i] = e4m3_sr((float)(pseudo[i] / q.tensor), scale_uniform(how, r, b, blocks, 16));
      for (int j = 0; j < 16; j++) q.stored[i * 16 + j] = e2m1_value(q.codes[i * 16 + j]) * e4m3_value(q.scales[i]);
    }
}
inline uint8_t e8m0_byte(int exponent) { return (uint8_t)std::min(254, std::max(0, exponent + 127)); }

// QuEST's scale of 32 rotated values (Quartet, arXiv 2505.14669): Gaussian-optimal, from the standard deviation.
inline float quest_std(const float* x) {
  float sum = 0, squares = 0;
  for (int j = 0; j < 32; j++) sum = sum + x[j];
  for (int j = 0; j < 32; j++) { float square = x[j] * x[j]; squares = squares + square; }
  float mean = sum / 32.f, mean_square = squares / 32.f, square_mean = mean * mean;
  return std::sqrt(std::max(mean_square - square_mean, 0.f));
}
inline uint8_t mxfp4_scale(const float* x, Scale rule) {
  float amax = max_abs(x, 32);
  if (amax != amax) return 255;
  if (rule == Scale::quest_floor || rule == Scale::quest_nearest) {
    float s = (float)(2.92247856 / 6) * quest_std(x);
    s = s + 1e-8f;
    if (!std::isfinite(s)) return s != s ? 255 : 254;
    int e = floor_log2(s);
    if (rule == Scale::quest_nearest && s * std::ldexp(1., -e) >= std::sqrt(2.)) e++;      // nearest in the exponent: 2^(e + 1/2) is the middle
    return e8m0_byte(e);
  }
  if (rule == Scale::up) return e8m0_ceil(amax / 6.f);
  if (amax == 0) return 0;
  if (std::isinf(amax)) return 254;
  // OCP: the largest power of two that E2M1 holds is 4 = 2^2. Range-matched: S = 2^(floor(log2 amax) - 2) / (3/4) = 2^floor(log2 amax) / 3:
  // the byte is floor(log2 amax), and one third goes to the GEMM's alpha.
  return e8m0_byte(floor_log2(amax) - (rule == Scale::ocp ? 2 : 0));
}
inline void mxfp4(Quantized& q, const Quantizer& how) {
  if (how.scale == Scale::range34) q.tensor = 1. / 3;
  bool quest = how.scale == Scale::quest_floor || how.scale == Scale::quest_nearest;
  if (quest) q.mask.assign(q.input.size(), 0);
  for (size_t b = 0; b < q.input.size() / 32; b++) {
    const float* x = &q.input[b * 32];
    q.scales[b] = mxfp4_scale(x, how.scale);
    double scale = e8m0_value(q.scales[b]), factor = (how.scale == Scale::range34 ? 3 : 1) / scale;
    float v[32];
    for (int j = 0; j < 32; j++) {
      v[j] = (float)(x[j] * factor);                   // one rounding: the factor is 2^-e, or 3 * 2^-e
      if (quest) q.mask[b * 32 + j] = std::fabs(v[j]) < 6;
    }
    round_e2m1(&q.codes[b * 32], v, 32, how, 2 * b);
    for (int j = 0; j < 32; j++) q.stored[b * 32 + j] = e2m1_value(q.codes[b * 32 + j]) * scale;
  }
}

// One FP32 scale absmax/6 a row of the operand.
inline void vector_wise(Quantized& q, const Quantizer& how) {
  for (int r = 0; r < q.rows; r++) {
    float scale = max_abs(&q.input[(size_t)r * q.width], q.width) / 6.f;
    if (scale == 0) scale = 1;
    q.outer.push_back(scale);
    for (int c = 0; c < q.width; c += 16) {
      size_t at = (size_t)r * q.width + c;
      float v[16];
      for (int j = 0; j < 16; j++) v[j] = q.input[at + j] / scale;
      round_e2m1(&q.codes[at], v, 16, how, at / 16);
      for (int j = 0; j < 16; j++) q.stored[at + j] = e2m1_value(q.codes[at + j]) * scale;
    }
  }
}

// FP8 with one scale a tensor: the largest value goes to the largest code.
inline void fp8_tensor(Quantized& q, bool e4m3) {
  const float top = e4m3 ? 448 : 57344;
  float encode = q.amax == 0 || std::isinf(q.amax) ? 1.f : std::min(top / q.amax, largest_float());
  q.tensor = q.amax / top;                             // FP32
  for (size_t i = 0; i < q.input.size(); i++) {
    float v = q.input[i] * encode;
    q.codes[i] = e4m3 ? e4m3_rn(v) : e5m2_rn(v);
    q.stored[i] = e4m3 ? e4m3_value(q.codes[i]) : e5m2_value(q.codes[i]);
  }
}
// E4M3 with an E8M0 scale for 32, rounded up so that nothing saturates.
inline void mxfp8(Quantized& q) {
  for (size_t b = 0; b < q.input.size() / 32; b++) {
    q.scales[b] = e8m0_ceil(max_abs(&q.input[b * 32], 32) / 448.f);
    double scale = e8m0_value(q.scales[b]);
    for (size_t i = b * 32; i < b * 32 + 32; i++) {
      q.codes[i] = e4m3_rn((float)(q.input[i] / scale));
      q.stored[i] = e4m3_value(q.codes[i]) * scale;
    }
  }
}

inline Quantized quantize(const std::vector<float>& x, int src_rows, int src_cols, const Quantizer& how) {
  Quantized q = rotated_operand(x, src_rows, src_cols, how);
  bool eden = how.round == Round::eden16 || how.round == Round::eden128;
  switch (how.kind) {
    case Kind::exact: for (size_t i = 0; i < q.input.size(); i++) q.stored[i] = q.input[i]; break;
    case Kind::nvfp4: if (eden && how.scale == Scale::post_hoc) nvfp4_post_hoc(q, how); else if (eden) nvfp4_eden(q, how); else if (how.outer128) nvfp4_outer(q, how); else nvfp4_tensor(q, how); break;
    case Kind::mxfp4: mxfp4(q, how); break;
    case Kind::vector: vector_wise(q, how); break;
    case Kind::e4m3: fp8_tensor(q, true); break;
    case Kind::e5m2: fp8_tensor(q, false); break;
    case Kind::mxfp8: mxfp8(q); break;
  }
  return q;
}
inline Array dequantized(const Quantized& q) {
  Array v(q.stored.size());
  for (size_t i = 0; i < v.size(); i++) v[i] = q.value(i);
  return v;
}

// What an FP4 element is divided by: the scale of its block, the outer one and the tensor's.
inline double element_scale(const Quantized& q, int r, int c) {
  double scale = q.tensor;
  if (q.block == 16) scale *= e4m3_value(q.scales[((size_t)r * q.width + c) / 16]);
  if (q.block == 32) scale *= e8m0_value(q.scales[((size_t)r * q.width + c) / 32]);
  if (!q.outer.empty()) scale *= q.block ? q.outer[(size_t)r * ((q.width + 127) / 128) + c / 128] : q.outer[r];
  return scale;
}

// Mean over the rows of |error|^2 / |x|^2.
inline double row_error(const Quantized& q) {
  double total = 0;
  for (int r = 0; r < q.rows; r++) {
    double error = 0, norm = 0;
    for (size_t i = (size_t)r * q.width; i < (size_t)(r + 1) * q.width; i++) {
      double input = (double)q.input[i] * q.waiting, d = q.value(i) - input;
      error += d * d;
      norm += input * input;
    }
    total += error / norm;
  }
  return total / q.rows;
}

// MXFP4 on NVFP4 hardware: the largest exponent of the tensor becomes 2^8 in E4M3, every other block a power of two below it, twice (a
// block of 32 is two of 16). 2^-9 is the smallest: a block more than 2^17 below the largest is flushed to zero. Blocks that hold only zeros
// have scale 0; they neither set the largest exponent nor count as flushed.
struct ThroughE4m3 { int top_exponent = -127; long long flushed = 0; std::vector<uint8_t> scales; };   // value = code * e4m3(scale) * 2^(top - 8)
inline ThroughE4m3 mxfp4_through_e4m3(const Quantized& q) {
  ThroughE4m3 out;
  auto alive = [&](size_t b) { for (int j = 0; j < 32; j++) if (q.codes[b * 32 + j] & 7) return true; return false; };
  for (size_t b = 0; b < q.scales.size(); b++) if (alive(b)) out.top_exponent = std::max(out.top_exponent, q.scales[b] - 127);
  for (size_t b = 0; b < q.scales.size(); b++) {
    int exponent = 8 + (q.scales[b] - 127) - out.top_exponent;
    uint8_t byte = 0;
    if (alive(b) && exponent >= -9) byte = e4m3_rn((float)std::ldexp(1., exponent));
    if (alive(b) && exponent < -9) out.flushed++;
    out.scales.push_back(byte);
    out.scales.push_back(byte);
  }
  return out;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Gradient estimators

// DGE (Wang et al., arXiv 2501.17116): derivative of the soft staircase between the grid points lo <= x <= hi around x.
inline double dge(double x, double k) {
  double a = std::min(std::fabs(x), 6.);
  int i = std::min(below_in_table(kE2m1Grid, 8, a), 6);
  double lo = kE2m1Grid[i], hi = kE2m1Grid[i + 1], u = std::fabs(2 * (a - lo) / (hi - lo) - 1);
  return u == 0 ? 3. : std::min(3., 1 / k * std::pow(u, 1 / k - 1));
}

// ------------------------------------------------------------------------------------------------------------------------------
// A linear layer under six operands

struct LinearHow {
  Quantizer fprop_x, fprop_w, dgrad_dy, dgrad_w, wgrad_dy, wgrad_x;     // transposes are set here, not by the caller
  bool double_w = false, double_x = false;      // dgrad's W^T, wgrad's X^T from the forward's own quantized value
  bool mask_w = false, mask_x = false;          // QuEST: gradients of what was clipped are dropped
  double dge_k = 0;                             // of W; 0: straight through
};
struct LinearOut { Array Y, dX, dW; };           // [T,N], [T,K], [N,K]

// Undoes the forward's rotation of the columns of g [rows, width] and cuts the padding. No signs: QuEST's rotation has none, and other
// signs act on the output side of the inverse.
inline Array unrotated(const Array& g, int rows, int width, int cols, int n, const SignBits& signs) {
  Array out((size_t)rows * cols);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < width; c += std::max(n, 1)) {
      Array part(&g[(size_t)r * width + c], &g[(size_t)r * width + c] + std::max(n, 1));
      if (n) part = rht_exact(part, {0, 0});
      for (int j = 0; j < std::max(n, 1); j++)
        if (c + j < cols) out[(size_t)r * cols + c + j] = part[j] * (n && negated(signs, j) ? -1 : 1);
    }
  return out;
}
inline LinearOut linear(const std::vector<float>& X, const std::vector<float>& W, const std::vector<float>& dY, int T, int K, int N, LinearHow how) {
  LinearOut out;
  Quantized x = quantize(X, T, K, how.fprop_x), w = quantize(W, N, K, how.fprop_w);
  out.Y = gemm(dequantized(x), dequantized(w), T, N, x.width);

  // The backward's view of X and W: the original, or what the forward computed with, in the forward's basis.
  auto floats = [](const Array& a) { return std::vector<float>(a.begin(), a.end()); };
  const std::vector<float> w_source = how.double_w ? floats(dequantized(w)) : W, x_source = how.double_x ? floats(dequantized(x)) : X;
  how.dgrad_w.transpose = how.wgrad_dy.transpose = how.wgrad_x.transpose = true;
  int kw = how.double_w ? w.width : K, kx = how.double_x ? x.width : K;
  Quantized dy = quantize(dY, T, N, how.dgrad_dy), wt = quantize(w_source, N, kw, how.dgrad_w);
  Array dx = gemm(dequantized(dy), dequantized(wt), T, kw, dy.width);
  Quantized dyt = quantize(dY, T, N, how.wgrad_dy), xt = quantize(x_source, T, kx, how.wgrad_x);
  Array dw = gemm(dequantized(dyt), dequantized(xt), N, kx, dyt.width);
  if (how.mask_x && !x.mask.empty()) for (size_t i = 0; i < dx.size(); i++) dx[i] *= x.mask[i];
  if (how.mask_w && !w.mask.empty()) for (size_t i = 0; i < dw.size(); i++) dw[i] *= w.mask[i];
  out.dX = unrotated(dx, T, kw, K, how.double_w ? how.fprop_w.rht : 0, how.fprop_w.signs);
  out.dW = unrotated(dw, N, kx, K, how.double_x ? how.fprop_x.rht : 0, how.fprop_x.signs);
  if (how.dge_k > 0)
    for (int n = 0; n < N; n++)
      for (int k = 0; k < K; k++) out.dW[(size_t)n * K + k] *= dge(W[(size_t)n * K + k] / element_scale(w, n, k), how.dge_k);
  return out;
}

}  // namespace reference
