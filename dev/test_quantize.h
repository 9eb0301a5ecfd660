// dev/test_quantize.h -- kernels/quantize.cuh and kernels/hadamard.cuh: codes, scale bytes (the whole 128x4 buffer with its padding) and
// values must equal dev/reference.h bit for bit, for every combination of options, at odd sizes, for ordinary and for hostile
// data; then the statistics that a right quantizer reproduces, and what stochastic rounding promises.
#pragma once
#include <string>
#include <vector>
#include "../kernels/linear.cuh"
#include "../kernels/quantize.cuh"
#include "test_formats.h"

constexpr uint32_t kTestSigns = 0xD7E8;      // recipe nvfp4

// The result of a quantizer, kernel or reference, in one form: packed codes [rows, ld/2], tiled scales, values [rows, ld].
struct QuantizedBytes {
  std::vector<uint8_t> codes, scales;
  std::vector<float> values;
  float amax = 0;
  bool guards = true;                         // nothing was written beyond the buffers
};
struct WhatToWrite { bool packed = true, values = true; };

// Runs the kernel on the row-major source x, stored as T.
template <class T> QuantizedBytes quantize_kernel_bytes(const std::vector<float>& x, int src_rows, int src_cols, const QuantizeHow& how,
                                                        WhatToWrite what = {}) {
  Operand4 out;
  out.rows = how.transpose ? src_cols : src_rows;
  out.cols = how.transpose ? src_rows : src_cols;
  out.ld = operand_ld(out.cols);
  size_t n = (size_t)out.rows * out.ld;
  TestArray<T> source(narrow<T>(widen(x)));
  TestArray<uint8_t> codes(n / 2), scales(scale_bytes(out.rows, out.cols));
  TestArray<floatX> values(n);
  TestArray<float> amax(1);
  TestArray<uint32_t> tiles((size_t)ceil_div(out.rows, 16) * ceil_div(out.cols, 16));
  if (what.packed) { out.codes = codes.p; out.scales = scales.p; }
  if (what.values) out.values = values.p;
  out.amax = amax.p;
  quantize_nvfp4(out, (const T*)source.p, how, tiles.p);
  QuantizedBytes q;
  q.codes = codes.host(); q.scales = scales.host(); q.amax = amax.host()[0];
  for (floatX v : values.host()) q.values.push_back(to_float(v));
  q.guards = codes.guard_intact() && scales.guard_intact() && values.guard_intact() && amax.guard_intact() && tiles.guard_intact() && source.guard_intact();
  return q;
}

inline reference::Nvfp4 quantize_reference(const std::vector<float>& x, int src_rows, int src_cols, const QuantizeHow& how) {
  reference::Nvfp4How h;
  h.transpose = how.transpose; h.tile16 = how.tile16; h.stochastic = how.stochastic; h.rht16 = how.hadamard == 16; h.signs = how.signs;
  h.seed = how.key.seed; h.step = how.key.step; h.stream = how.key.stream;
  return reference::nvfp4(x, src_rows, src_cols, h);
}
// The reference in the form of the kernel's buffers: a row is padded with zeros to a multiple of 32.
inline QuantizedBytes reference_bytes(const reference::Nvfp4& q) {
  QuantizedBytes r;
  size_t ld = (q.cols + 31) / 32 * 32, width = 16 * (size_t)q.blocks;
  r.codes.assign(q.rows * ld / 2, 0);
  r.values.assign(q.rows * ld, 0.f);
  for (int row = 0; row < q.rows; row++)
    for (size_t c = 0; c < width; c++) {
      r.codes[(row * ld + c) / 2] |= (uint8_t)(q.codes[row * width + c] << (c % 2 ? 4 : 0));
      r.values[row * ld + c] = q.values[row * width + c];
    }
  r.scales = reference::tile_scales_128x4(q);
  r.amax = q.amax;
  return r;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Data

enum DataKind { kNormal, kHeavyTail, kTies, kZeros, kOutlier, kManyScales, kTinyGradient, kDenormal, kHuge, kInfinity, kNotANumber, kDataKinds };
inline const char* data_kind_name(int kind) {
  const char* names[kDataKinds] = {"normal", "heavy-tailed", "exact ties", "zeros", "one outlier", "scales from 1 to 2^-24", "1e-9", "1e-38 and denormals",
                                   "near FLT_MAX", "infinity", "NaN"};
  return names[kind];
}
inline std::vector<float> quantizer_data(int kind, int rows, int cols, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x((size_t)rows * cols);
  for (size_t i = 0; i < x.size(); i++) {
    double z = rng.normal();
    switch (kind) {
      case kHeavyTail: x[i] = (float)(z * std::exp(3 * rng.normal())); break;
      case kTies: x[i] = (rng.below(49) - 24) / 4.f; break;                 // multiples of 1/4 up to 6
      case kZeros: x[i] = rng.below(2) ? 0.f : -0.f; break;
      case kManyScales: x[i] = (float)std::ldexp(z, -(int)(i / 16 % 25)); break;
      case kTinyGradient: x[i] = (float)(z * 1e-9); break;
      case kDenormal: x[i] = (float)(z * (i % 3 ? 1e-38 : 1e-41)); break;
      case kHuge: x[i] = (float)std::copysign(std::min(std::fabs(z) * 1.5e38, 3.38e38), z); break;
      default: x[i] = (float)z;
    }
  }
  size_t where = x.size() - 1 - x.size() / 3;
  if (kind == kTies) x[0] = 6;
  if (kind == kOutlier) x[where] = -1e30f;
  if (kind == kInfinity) x[where] = -INFINITY;
  if (kind == kNotANumber) x[where] = NAN;
  return x;
}
// What the kernel will see when the source is stored as T.
template <class T> std::vector<float> as_stored(std::vector<float> x) {
  if (sizeof(T) == 2) for (float& v : x) v = reference::round_bf16(v);
  return x;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Bit equality

inline void compare_bytes(Mismatches& m, const QuantizedBytes& got, const QuantizedBytes& want, const std::string& where) {
  auto all = [&](const char* name, const auto& a, const auto& b) {
    std::string what = where + " " + name;
    m.add(a.size() == b.size(), (what + " size").c_str(), 0, (double)a.size(), (double)b.size());
    for (size_t i = 0; i < b.size() && a.size() == b.size(); i++) m.add(memcmp(&a[i], &b[i], sizeof a[i]) == 0, what.c_str(), (double)i, a[i], b[i]);
  };
  m.add(same_float(got.amax, want.amax), (where + " amax").c_str(), 0, got.amax, want.amax);
  m.add(got.guards, (where + " guard overwritten").c_str(), 0, 0, 0);
  if (want.amax != want.amax) return;         // NaN went to alpha, which is all that matters: codes and scales are not defined
  all("codes", got.codes, want.codes);
  all("scales", got.scales, want.scales);
  all("values", got.values, want.values);
}

inline QuantizeHow random_how(bool transpose, bool tile16, bool stochastic, bool hadamard, Rng& rng) {
  QuantizeHow how;
  how.transpose = transpose; how.tile16 = tile16; how.stochastic = stochastic; how.hadamard = hadamard ? 16 : 0;
  how.signs = hadamard ? (uint32_t)(rng.next() >> 48) : 0;
  how.key = {rng.next(), (uint32_t)rng.below(1 << 30), (uint32_t)(rng.next() >> 32)};
  return how;
}

template <class T> void test_bit_equality(bool tile16, bool stochastic, bool hadamard) {
  const int sizes[][2] = {{1, 1}, {3, 16}, {16, 3}, {17, 33}, {32, 32}, {129, 64}, {130, 100}, {128, 128}, {40, 257}, {257, 65}};
  Mismatches m;
  Rng rng(21 + 4 * tile16 + 2 * stochastic + hadamard);
  for (bool transpose : {false, true})
    for (auto& size : sizes)
      for (int kind = 0; kind < kDataKinds; kind++) {
        int rows = size[0], cols = size[1];
        if (rows * cols > 9000 && kind > kHeavyTail) continue;              // hostile data at the smaller sizes
        std::vector<float> x = as_stored<T>(quantizer_data(kind, rows, cols, rng.next()));
        QuantizeHow how = random_how(transpose, tile16, stochastic, hadamard, rng);
        if (hadamard && how.key.step % 2) how.signs = kFixedSigns;                        // kernels of their own have these as constants
        std::string where = std::to_string(rows) + "x" + std::to_string(cols) + (transpose ? "^T " : " ") + data_kind_name(kind);
        compare_bytes(m, quantize_kernel_bytes<T>(x, rows, cols, how), reference_bytes(quantize_reference(x, rows, cols, how)), where);
      }
  m.report(std::string("bit-equal, X and X^T, ") + (sizeof(T) == 2 ? "BF16" : "FP32") + (tile16 ? ", 16x16" : ", 1x16") + (stochastic ? ", SR" : ", RN") +
           (hadamard ? ", RHT16" : "") + ", all sizes and data kinds");
}

// Vectors from other implementations of NVFP4.
inline void test_golden() {
  // one block under a tensor maximum of 7.75 (held by a second block)
  std::vector<float> x = {-3.84375f, -3.875f, .345703125f, 1.078125f, 3.28125f, -3.09375f, -.0329589844f, .38671875f,
                          .76953125f, 2.265625f, -3.6875f, 1.953125f, 3.71875f, -3.40625f, 1.59375f, -.318359375f};
  x.resize(32, 0.f);
  x[16] = 7.75f;
  QuantizedBytes q = quantize_kernel_bytes<float>(x, 1, 32, {});
  const uint8_t golden[8] = {0xff, 0x31, 0xe7, 0x18, 0x62, 0x5f, 0xf7, 0x94};
  check("golden block: amax 7.75, scale 0x76, bytes ff 31 e7 18 62 5f f7 94", q.amax == 7.75f && q.scales[0] == 0x76 && !memcmp(q.codes.data(), golden, 8),
        "scale 0x%02x, first byte %02x", q.scales[0], q.codes[0]);

  std::vector<float> v(128);
  for (int i = 0; i < 128; i++) v[i] = ((37 * i + 11) % 97 - 48) / 16.f;
  v[5] = 12; v[70] = 0;
  const char* codes = "a0291792a0391b82d27b5e06d4fa6e27c4e96d37b5e06d4fa6e27c5e86d3fb5e17d4fa0e27c5f86d3fa5e17c4f96e27c5e06d4fa6e17c5f96d27b5e06d4fa6e2";
  const float scales[8] = {448, 112, 112, 112, 104, 112, 104, 112};
  q = quantize_kernel_bytes<bf16>(v, 1, 128, {});
  int wrong = 0;
  for (int i = 0; i < 128; i++) wrong += "0123456789abcdef"[q.codes[i / 2] >> (4 * (i % 2)) & 15] != codes[i];
  for (int b = 0; b < 8; b++) wrong += reference::e4m3_value(q.scales[b / 4 * 512 + b % 4]) != scales[b];
  check("golden vector of 128: scales 448 112 112 112 104 112 104 112 and all codes", wrong == 0, "%d differ", wrong);
}

// Packed only and values only must write the same, and nothing else.
inline void test_partial_outputs() {
  std::vector<float> x = as_stored<bf16>(quantizer_data(kNormal, 37, 70, 5));
  Rng rng(22);
  QuantizeHow how = random_how(true, false, true, true, rng);
  QuantizedBytes both = quantize_kernel_bytes<bf16>(x, 37, 70, how), packed = quantize_kernel_bytes<bf16>(x, 37, 70, how, {true, false}),
                 values = quantize_kernel_bytes<bf16>(x, 37, 70, how, {false, true});
  check("packed only and values only give what both together give", packed.codes == both.codes && packed.scales == both.scales && values.values == both.values &&
        packed.amax == both.amax && values.amax == both.amax, "amax %g %g %g", both.amax, packed.amax, values.amax);
  QuantizedBytes again = quantize_kernel_bytes<bf16>(x, 37, 70, how);
  check("the same seed gives the same bits", again.codes == both.codes && again.values == both.values, "%zu bytes", both.codes.size());
}

// E2M1 has no NaN: it must reach the GEMM through amax and alpha, wherever it was.
inline void test_nan_is_not_lost() {
  int lost = 0, runs = 0;
  TestArray<float> one(std::vector<float>{1.f}), alpha(1);
  for (int options = 0; options < 16; options++)
    for (size_t where : {0u, 15u, 16u, 17u * 33u - 1u, 280u})
      for (float nan : {NAN, -NAN}) {
        std::vector<float> x = quantizer_data(kNormal, 17, 33, 6);
        x[where] = nan;
        Rng rng(23);
        QuantizeHow how = random_how(options & 1, options & 2, options & 4, options & 8, rng);
        float amax = quantize_kernel_bytes<float>(x, 17, 33, how).amax, amax_bf16 = quantize_kernel_bytes<bf16>(x, 17, 33, how).amax;
        TestArray<float> operand(std::vector<float>{amax});
        gemm_alpha(alpha.p, operand.p, one.p);
        float a = alpha.host()[0];
        runs++;
        lost += amax == amax || amax_bf16 == amax_bf16 || a == a;
      }
  check("a NaN anywhere makes amax and the GEMM's alpha NaN", lost == 0, "lost in %d of %d runs", lost, runs);
  TestArray<float> a(std::vector<float>{7.75f}), b(std::vector<float>{3e-9f});
  gemm_alpha(alpha.p, a.p, b.p);
  float both = alpha.host()[0];
  gemm_alpha(alpha.p, a.p, (const float*)nullptr);
  float single = alpha.host()[0];
  check("alpha = (amaxA/2688)(amaxB/2688) in FP32; an operand that is not quantized counts as 1",
        both == (7.75f / 2688.f) * (3e-9f / 2688.f) && single == 7.75f / 2688.f, "%.9g, %.9g", both, single);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Properties

inline std::vector<float> random_matrix(int rows, int cols, uint64_t seed) { return as_stored<bf16>(quantizer_data(kNormal, rows, cols, seed)); }

inline void test_weights_and_transpose() {
  const int rows = 83, cols = 150;
  std::vector<float> w = as_stored<bf16>(quantizer_data(kHeavyTail, rows, cols, 31));
  QuantizeHow how, turned;
  how.tile16 = turned.tile16 = turned.transpose = true;
  QuantizedBytes a = quantize_kernel_bytes<bf16>(w, rows, cols, how), b = quantize_kernel_bytes<bf16>(w, rows, cols, turned);
  int lda = operand_ld(cols), ldb = operand_ld(rows), codes = 0, values = 0, inexact = 0;
  auto code = [](const QuantizedBytes& q, size_t i) { return q.codes[i / 2] >> (4 * (i % 2)) & 15; };
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) {
      size_t i = (size_t)r * lda + c, j = (size_t)c * ldb + r;
      codes += code(a, i) != code(b, j);
      values += a.values[i] != b.values[j];
      inexact += reference::round_bf16(a.values[i]) != a.values[i];
    }
  check("16x16 blocks: W and W^T hold the same codes and values", codes == 0 && values == 0 && a.amax == b.amax, "%d codes, %d values differ", codes, values);
  check("code * scale is exact in BF16", inexact == 0, "%d inexact", inexact);
}

// A floor under the tensor scale, or an epsilon in a division, makes small gradients explode or vanish.
inline void test_tiny_gradients() {
  std::vector<float> x = random_matrix(33, 128, 32), tiny = x;
  for (float& v : tiny) v *= 0x1p-80f;
  int differ = 0;
  for (int options = 0; options < 8; options++) {
    Rng rng(33);
    QuantizeHow how = random_how(false, options & 1, options & 2, options & 4, rng);
    QuantizedBytes a = quantize_kernel_bytes<bf16>(x, 33, 128, how), b = quantize_kernel_bytes<bf16>(tiny, 33, 128, how);
    differ += a.codes != b.codes || a.scales != b.scales || a.amax * 0x1p-80f != b.amax;
  }
  check("x and x * 2^-80 have the same codes and scales: nothing keeps the tensor scale from being small", differ == 0, "%d of 8 option sets differ", differ);
}

// Mean over the rows of |err|^2 / |x|^2 for N(0,1): 9.05e-3, 12.40e-3, 18.6e-3 (table of the specification).
inline void test_error_statistics() {
  const int rows = 512, cols = 1024;
  std::vector<float> x = quantizer_data(kNormal, rows, cols, 34);
  auto measure = [&](bool tile16, bool stochastic, bool transpose) {
    QuantizeHow how;
    how.tile16 = tile16; how.stochastic = stochastic; how.transpose = transpose; how.key = {7, 8, 9};
    QuantizedBytes q = quantize_kernel_bytes<float>(x, rows, cols, how);
    int r_count = transpose ? cols : rows, c_count = transpose ? rows : cols;
    double total = 0, scale = (double)q.amax / 2688;
    for (int r = 0; r < r_count; r++) {
      double error = 0, norm = 0;
      for (int c = 0; c < c_count; c++) {
        double v = transpose ? x[(size_t)c * cols + r] : x[(size_t)r * cols + c], d = q.values[(size_t)r * c_count + c] * scale - v;
        error += d * d;
        norm += v * v;
      }
      total += error / norm;
    }
    return 1e3 * total / r_count;
  };
  auto near = [](double got, double table) { return std::fabs(got / table - 1) < .015; };
  double rn = measure(false, false, false), rn_t = measure(false, false, true), tile = measure(true, false, false), sr = measure(false, true, false);
  check("squared error of RN 1x16 on N(0,1) is 9.05e-3, rows and columns", near(rn, 9.05) && near(rn_t, 9.05), "%.3fe-3, transposed %.3fe-3", rn, rn_t);
  check("squared error of RN 16x16 on N(0,1) is 12.40e-3", near(tile, 12.40), "%.3fe-3", tile);
  check("squared error of SR 1x16 on N(0,1) is 18.6e-3", near(sr, 18.6), "%.3fe-3", sr);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Hadamard

__global__ void rht16_kernel(float* x, int groups, uint32_t signs) {
  int g = blockIdx.x * blockDim.x + threadIdx.x;
  if (g >= groups) return;
  float v[16];
  for (int i = 0; i < 16; i++) v[i] = x[16 * g + i];
  rht16(v, signs);
  for (int i = 0; i < 16; i++) x[16 * g + i] = v[i];
}
inline std::vector<float> rotated(const std::vector<float>& x, uint32_t signs) {
  TestArray<float> d(x);
  int groups = (int)(x.size() / 16);
  launch(rht16_kernel, dim3(ceil_div(groups, 64)), dim3(64), 0, d.p, groups, signs);
  return d.host();
}

inline void test_hadamard() {
  std::vector<float> x(16 * 500);
  Rng rng(41);
  for (float& v : x) v = (float)(rng.normal() * std::exp(2 * rng.normal()));
  std::vector<float> y = rotated(x, kTestSigns);
  int differ = 0;
  double worst = 0;
  for (size_t g = 0; g < x.size(); g += 16) {
    float v[16];
    std::copy(&x[g], &x[g] + 16, v);
    reference::rht16_fp32(v, kTestSigns);
    for (int i = 0; i < 16; i++) differ += float_bits(v[i]) != float_bits(y[g + i]);
    reference::Array in(&x[g], &x[g] + 16), exact = reference::rht(in, kTestSigns), got(&y[g], &y[g] + 16);
    double e = rel_error(got, exact);
    worst = e <= worst ? worst : e;
  }
  check("RHT16 equals the FP32 butterflies in the stated order bit for bit", differ == 0, "%d differ", differ);
  check("RHT16 is (x s) H16 / 4 by the definition of Sylvester's matrix (4 roundings of 2^-24)", worst < 4 * 0x1p-24, "worst relative error of a group %.1e", worst);

  // On the input side a sign turns one input's whole contribution; on the output side it would turn one output.
  int wrong = 0;
  for (int i = 0; i < 16; i++) {
    std::vector<float> unit(16, 0.f);
    unit[i] = 1;
    std::vector<float> plain = rotated(unit, 0), flipped = rotated(unit, 1u << i), others = rotated(unit, 0xffffu & ~(1u << i));
    for (int j = 0; j < 16; j++) wrong += plain[j] != .25f * reference::hadamard_entry(i, j) || flipped[j] != -plain[j] || others[j] != plain[j];
  }
  check("the signs of the RHT act on the input coordinates", wrong == 0, "%d of 256 entries wrong", wrong);
}

// The values of a quantized operand as doubles [rows, ld], tensor scale included.
inline reference::Array dequantized(const QuantizedBytes& q) {
  reference::Array v(q.values.begin(), q.values.end());
  for (double& x : v) x *= (double)q.amax / 2688;
  return v;
}
// ||a - b||^2 / ||b||^2 and the gain <a, b> / <b, b>.
struct Agreement { double squared, gain; };
inline Agreement agreement(const reference::Array& a, const reference::Array& b) {
  double error = 0, dot = 0, norm = 0;
  for (size_t i = 0; i < b.size(); i++) { error += (a[i] - b[i]) * (a[i] - b[i]); dot += a[i] * b[i]; norm += b[i] * b[i]; }
  return {error / norm, dot / norm};
}

// (X R)(W R)^T = X W^T: with quantization in between an error of quantization remains, with unequal signs nothing agrees. The
// contraction has 200 = 12.5 groups: the last one is padded with zeros before it is rotated.
inline void test_rotation_cancels() {
  const int M = 48, N = 40, K = 200, ld = operand_ld(K);
  std::vector<float> x = random_matrix(M, K, 42), w = random_matrix(N, K, 43), xt(x.size());
  for (int m = 0; m < M; m++)
    for (int k = 0; k < K; k++) xt[(size_t)k * M + m] = x[(size_t)m * K + k];
  reference::Array exact = reference::gemm(reference::Array(x.begin(), x.end()), reference::Array(w.begin(), w.end()), M, N, K);
  QuantizeHow how;
  how.hadamard = 16; how.signs = kTestSigns;
  reference::Array qw = dequantized(quantize_kernel_bytes<bf16>(w, N, K, how));
  auto error = [&](const QuantizedBytes& q) { return std::sqrt(agreement(reference::gemm(dequantized(q), qw, M, N, ld), exact).squared); };
  double same = error(quantize_kernel_bytes<bf16>(x, M, K, how));
  QuantizeHow transposed = how, other = how;
  transposed.transpose = true;
  other.signs ^= 0x0ff0;
  double columns = error(quantize_kernel_bytes<bf16>(xt, K, M, transposed)), different = error(quantize_kernel_bytes<bf16>(x, M, K, other));
  check("the rotation cancels in a GEMM, a ragged contraction axis included: only the error of two RN operands (.135) remains",
        same > .12 && same < .15 && columns == same, "%.4f, from the transposed source %.4f", same, columns);
  check("with unequal signs it does not cancel", different > .7, "%.3f", different);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Stochastic rounding

// Quantizes a matrix of equal elements v. Every block begins with a 6, so that all scales are the same and a code is v's own.
// Returns the decoded elements other than those 6.
inline std::vector<float> constant_draws(float v, int rows, int cols, QuantizeHow how) {
  std::vector<float> x((size_t)rows * cols, v);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++)
      if ((how.transpose ? r : c) % 16 == 0) x[(size_t)r * cols + c] = 6;
  how.stochastic = true;
  QuantizedBytes q = quantize_kernel_bytes<float>(x, rows, cols, how, {false, true});
  int out_rows = how.transpose ? cols : rows, out_cols = how.transpose ? rows : cols;
  std::vector<float> draws;
  for (int r = 0; r < out_rows; r++)
    for (int c = 0; c < out_cols; c++)
      if (c % 16) draws.push_back(q.values[(size_t)r * operand_ld(out_cols) + c] / 448);
  return draws;
}

// 8 random bits at midpoints give a probability rounded to 1/256: the mean may be off by half of that, 1/512 step, whatever n.
inline void test_sr_unbiased() {
  int wrong = 0;
  double worst = 0;
  for (float v : {.001f, .1f, .25f, -.3f, .4999f, .7f, 1.1f, 1.26f, -1.9f, 2.2f, 2.5f, 3.01f, 3.6f, 4.5f, 5.9f, -5.1f}) {
    double lo = 0, step = .5;
    for (int i = 0; i < 7; i++) if (reference::kE2m1Grid[i] <= std::fabs(v)) { lo = reference::kE2m1Grid[i]; step = reference::kE2m1Grid[i + 1] - lo; }
    QuantizeHow how;
    how.key = {1234, 1, 2};
    std::vector<float> draws = constant_draws(v, 69, 1024, how);
    double mean = 0, p = (std::fabs(v) - lo) / step;
    for (float d : draws) {
      mean += d / draws.size();
      wrong += std::fabs(d) != lo && std::fabs(d) != lo + step;
    }
    double allowed = step * (4 * std::sqrt(p * (1 - p) / draws.size()) + 1. / 512), off = std::fabs(mean - v) / allowed;
    worst = off <= worst ? worst : off;
  }
  check("SR is unbiased: mean of 66240 draws within 4 sigma + 1/512 step, for 16 values", worst <= 1, "worst %.2f of the allowance", worst);
  check("SR only ever gives the two neighbours", wrong == 0, "%d others", wrong);
}

inline void test_sr_streams() {
  const int rows = 64, cols = 1024;
  auto coins = [&](uint64_t seed, uint32_t step, uint32_t stream) {       // 2.5 rounds to 2 or 3: a fair coin, -1 or +1
    QuantizeHow how;
    how.key = {seed, step, stream};
    std::vector<float> d = constant_draws(2.5f, rows, cols, how);
    for (float& x : d) x = x > 2.5f ? 1 : -1;
    return d;
  };
  auto correlation = [](const std::vector<float>& a, const std::vector<float>& b, size_t shift) {
    double sum = 0;
    size_t n = a.size() - shift;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i + shift];
    return std::fabs(sum / n) * std::sqrt((double)n);                     // in sigma
  };
  std::vector<float> base = coins(5, 6, 7);
  const size_t per_block = 15, per_row = per_block * cols / 16;
  struct { const char* name; double sigma; } tests[] = {
    {"the next stream", correlation(base, coins(5, 6, 8), 0)}, {"a far stream", correlation(base, coins(5, 6, 7 + (1u << 31)), 0)},
    {"the next step", correlation(base, coins(5, 7, 7), 0)}, {"step and stream exchanged", correlation(base, coins(5, 7, 6), 0)},
    {"the next seed", correlation(base, coins(6, 6, 7), 0)}, {"a seed that differs in its upper half", correlation(base, coins(5 + (1ull << 32), 6, 7), 0)},
    {"the next element", correlation(base, base, 1)}, {"the element 4 on", correlation(base, base, 4)}, {"the element 8 on", correlation(base, base, 8)},
    {"the next block", correlation(base, base, per_block)}, {"the block 2 on", correlation(base, base, 2 * per_block)},
    {"the next row", correlation(base, base, per_row)}, {"the row 16 on", correlation(base, base, 16 * per_row)},
    {"itself, as a control", correlation(base, base, 0)}};
  const int n = (int)(sizeof tests / sizeof *tests);
  double worst = 0;
  const char* name = "";
  for (int i = 0; i < n - 1; i++)
    if (!(tests[i].sigma <= worst)) { worst = tests[i].sigma; name = tests[i].name; }
  check("SR noise does not correlate across streams, steps, seeds, rows, blocks or elements: 13 correlations within 4 sigma", worst <= 4 && tests[n - 1].sigma > 200,
        "worst %.2f sigma (%s); control %.0f", worst, name, tests[n - 1].sigma);
}

// The row copy and the column copy of one dY under two streams: compare the noise of the same element.
inline void test_sr_copies() {
  const int n = 256;
  std::vector<float> x = random_matrix(n, n, 51);
  QuantizeHow row, column;
  row.stochastic = column.stochastic = column.transpose = true;
  row.key = {5, 6, 10}; column.key = {5, 6, 11};
  QuantizedBytes nearest = quantize_kernel_bytes<bf16>(x, n, n, QuantizeHow());
  QuantizedBytes a = quantize_kernel_bytes<bf16>(x, n, n, row), b = quantize_kernel_bytes<bf16>(x, n, n, column);
  double scale = (double)a.amax / 2688, ab = 0, aa = 0, bb = 0;
  size_t non_zero = 0, same_as_nearest = 0;
  for (int r = 0; r < n; r++)
    for (int c = 0; c < n; c++) {
      double v = x[(size_t)r * n + c], ea = a.values[(size_t)r * n + c] * scale - v, eb = b.values[(size_t)c * n + r] * scale - v;
      ab += ea * eb; aa += ea * ea; bb += eb * eb;
      non_zero += a.values[(size_t)r * n + c] != 0;
      same_as_nearest += a.values[(size_t)r * n + c] == nearest.values[(size_t)r * n + c];
    }
  double sigma = std::fabs(ab / std::sqrt(aa * bb)) * n;
  check("SR errors of the row copy and the column copy do not correlate: within 4 sigma", sigma <= 4, "%.2f sigma", sigma);
  // |x| < 0.25 step of the smallest level rounds to 0 sometimes: most of N(0,1) does not
  check("SR is alive: most values are not zero, and a good part differs from RN",
        non_zero > .8 * n * n && same_as_nearest < .85 * n * n && same_as_nearest > .5 * n * n,
        "%.1f %% not zero, %.1f %% as RN", 100. * non_zero / (n * n), 100. * same_as_nearest / (n * n));
}

// ------------------------------------------------------------------------------------------------------------------------------
// Gradient GEMMs

// The mean of B gradient GEMMs with fresh signs and fresh rounding: (relative squared error) * B stays flat if rounding is unbiased, and grows with B otherwise.
inline void test_averaging() {
  const int M = 64, N = 64, K = 512, B = 64;
  std::vector<float> dy = random_matrix(M, K, 61), x = random_matrix(N, K, 62);
  reference::Array exact = reference::gemm(reference::Array(dy.begin(), dy.end()), reference::Array(x.begin(), x.end()), M, N, K);
  double growth[2], single[2];
  for (int stochastic = 0; stochastic < 2; stochastic++) {
    Rng rng(63);
    reference::Array mean(exact.size(), 0.);
    single[stochastic] = 0;
    for (int b = 0; b < B; b++) {
      QuantizeHow how_dy = random_how(false, false, stochastic, true, rng), how_x = how_dy;
      how_x.key.stream ^= 1;
      reference::Array product = reference::gemm(dequantized(quantize_kernel_bytes<bf16>(dy, M, K, how_dy, {false, true})),
                                                 dequantized(quantize_kernel_bytes<bf16>(x, N, K, how_x, {false, true})), M, N, K);
      single[stochastic] += agreement(product, exact).squared / B;
      for (size_t i = 0; i < mean.size(); i++) mean[i] += product[i] / B;
    }
    growth[stochastic] = agreement(mean, exact).squared * B / single[stochastic];
  }
  check("averaging 64 gradient GEMMs: (squared error) * B is flat with SR (saturation costs a few percent)", growth[1] > .85 && growth[1] < 1.15,
        "one GEMM %.4f, times %.3f at B = 64", single[1], growth[1]);
  check("and grows with RN, whose gain is below 1", growth[0] > 1.3, "one GEMM %.4f, times %.3f at B = 64", single[0], growth[0]);
}

// One dgrad and one wgrad of recipe nvfp4 on Gaussians.
inline void test_gradient_gemms() {
  const int T = 256, N = 256, K = 256;
  std::vector<float> dy = random_matrix(T, N, 71), w = random_matrix(N, K, 72), x = random_matrix(T, K, 73);
  auto doubles = [](const std::vector<float>& v) { return reference::Array(v.begin(), v.end()); };
  QuantizeHow how_dy, how_w, how_dyt, how_xt;
  how_dy.stochastic = true; how_dy.key = {1, 2, 3};
  how_w.transpose = how_w.tile16 = true;
  how_dyt.transpose = how_dyt.stochastic = true; how_dyt.hadamard = 16; how_dyt.signs = kTestSigns; how_dyt.key = {1, 2, 4};
  how_xt.transpose = true; how_xt.hadamard = 16; how_xt.signs = kTestSigns;
  auto operand = [](const std::vector<float>& v, int rows, int cols, const QuantizeHow& how) {
    return dequantized(quantize_kernel_bytes<bf16>(v, rows, cols, how));
  };
  Agreement dgrad = agreement(reference::gemm(operand(dy, T, N, how_dy), operand(w, N, K, how_w), T, K, N),
                              reference::gemm(doubles(dy), reference::transposed(doubles(w), N, K), T, K, N));
  Agreement wgrad = agreement(reference::gemm(operand(dy, T, N, how_dyt), operand(x, T, K, how_xt), N, K, T),
                              reference::gemm(reference::transposed(doubles(dy), T, N), reference::transposed(doubles(x), T, K), N, K, T));
  auto good = [](Agreement a, double lo, double hi) { return std::sqrt(a.squared) > lo && std::sqrt(a.squared) < hi && a.gain > .985 && a.gain < .995; };
  // expected: the sums of the operands' squared errors, sqrt(.0186 + .0124) and sqrt(.0186 + .0091)
  check("dgrad of recipe nvfp4 on Gaussians: relative L2 .17-.18, gain .985-.995", good(dgrad, .17, .18), "%.4f, gain %.4f", std::sqrt(dgrad.squared), dgrad.gain);
  check("wgrad of recipe nvfp4 on Gaussians: relative L2 .16-.175, gain .985-.995", good(wgrad, .16, .175), "%.4f, gain %.4f", std::sqrt(wgrad.squared), wgrad.gain);
}

// A contraction that ends inside a group of 16: the rotated group is full, and leaving its padding out would break the rotation.
inline void test_ragged_wgrad() {
  const int K = 64, N = 48;
  Recipe recipe;
  for (const Recipe& r : recipe_table()) if (r.name == "nvfp4") recipe = r;
  double worst = 0, gain_off = 0;
  for (int T : {96, 100, 33, 7}) {
    std::vector<float> dy = random_matrix(T, N, 81), x = random_matrix(T, K, 82);
    TestArray<floatX> device_dy(narrow<floatX>(widen(dy))), device_x(narrow<floatX>(widen(x)));
    TestArray<floatX> first(linear_scratch_elements(T, K, N)), second(linear_scratch_elements(T, K, N));
    TestArray<uint32_t> tiles(linear_tile_words(T, K, N));
    TestArray<float> dw(std::vector<float>(N * K, 0.f)), scalar_memory(Scalars::kLayer);
    Scalars scalars = {scalar_memory.p, Scalars::kLayer};
    scalars.start();
    LinearScratch scratch;
    scratch.values[0] = first.p; scratch.values[1] = second.p; scratch.tiles = tiles.p; scratch.scalars = &scalars;
    linear_wgrad(dw.p, device_dy.p, device_x.p, T, K, N, recipe, {1, 2, 3}, scratch);
    reference::Array exact = reference::gemm(reference::transposed(reference::Array(dy.begin(), dy.end()), T, N),
                                             reference::transposed(reference::Array(x.begin(), x.end()), T, K), N, K, T);
    Agreement a = agreement(widen(dw.host()), exact);
    double l2 = std::sqrt(a.squared), off = std::fabs(a.gain - 1);
    worst = l2 <= worst ? worst : l2;
    gain_off = off <= gain_off ? gain_off : off;
  }
  check("wgrad with a ragged number of tokens (96, 100, 33, 7) is as good as with a whole one: relative L2 below .185, gain within .03",
        worst < .185 && gain_off < .03,
        "worst %.4f, gain off by %.4f", worst, gain_off);
}

inline void test_quantize() {
  if (!section("quantize: NVFP4 operands")) return;
  test_golden();
  for (int options = 0; options < 8; options++) test_bit_equality<bf16>(options & 1, options & 2, options & 4);
  for (int options = 0; options < 8; options++) test_bit_equality<float>(options & 1, options & 2, options & 4);
  test_partial_outputs();
  test_nan_is_not_lost();
  test_weights_and_transpose();
  test_tiny_gradients();
  test_error_statistics();
  test_hadamard();
  test_rotation_cancels();
  test_sr_unbiased();
  test_sr_streams();
  test_sr_copies();
  test_averaging();
  test_gradient_gemms();
  test_ragged_wgrad();
}
