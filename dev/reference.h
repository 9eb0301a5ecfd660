// dev/reference.h -- the oracle: every kernel of the project once more, in plain C++17 on the host, as slow and as literal as the
// formulas are. It includes nothing from kernels/ and shares no code with what it checks: not the rounding, not the scale layout,
// not the random numbers, not the Hadamard matrix. A kernel and its reference must agree because both are right.
//
//   formats      bf16, E2M1, E4M3, E8M0: by search over the table of representable values, not by bit tricks
//   philox       Philox4x32-10 from the paper
//   hadamard     Sylvester matrix by its definition, in double; and the FP32 butterflies, whose rounding a kernel must repeat
//   nvfp4        quantization of a matrix, FP32 in the order of the specification: bit equality is demanded
//   layout       the 128x4 tiles of the scale bytes, by enumeration of the offsets
//   gemm         exact integer product of two NVFP4 operands; a product in double
//   layers       norms, RoPE, attention, GELU, SwiGLU, bias, embedding, loss, AdamW, forward and backward, in double
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace reference {

typedef std::vector<double> Array;

// ------------------------------------------------------------------------------------------------------------------------------
// Number formats

// BF16: 8 significant bits, the exponents of FP32 (smallest denormal 2^-133), round to nearest, ties to even.
// (nearbyint rounds ties to even: the default rounding mode of IEEE 754.)
inline float round_bf16(float x) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;                                             // |x| in [2^(exponent-1), 2^exponent)
  std::frexp(x, &exponent);
  int last_bit = std::max(exponent - 8, -133);              // weight of the last bit that BF16 keeps
  double rounded = std::ldexp(std::nearbyint(std::ldexp((double)x, -last_bit)), last_bit);
  if (std::fabs(rounded) >= 0x1p128) return std::copysign(INFINITY, x);
  return (float)rounded;
}

// Where in an ascending table (first entry 0) is the value nearest to a >= 0? A tie goes to the even index, since the index is the
// code and the code's last bit is the significand's last bit. Beyond the last entry: the last one (saturation).
inline int nearest_in_table(const double* table, int n, double a) {
  int above = (int)(std::upper_bound(table, table + n, a) - table);
  if (above == n) return n - 1;
  int below = above - 1;
  double to_below = a - table[below], to_above = table[above] - a;
  if (to_below != to_above) return to_below < to_above ? below : above;
  return below % 2 == 0 ? below : above;
}

// E2M1 (OCP Microscaling Formats 1.0, 5.3.3): sign<<3 | index into this grid. NaN does not exist; converting one gives +6 (PTX ISA, cvt).
constexpr double kE2m1Grid[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
inline double e2m1_value(uint8_t code) { return (code & 8 ? -1 : 1) * kE2m1Grid[code & 7]; }
inline uint8_t e2m1_rn(float x) {
  if (x != x) return 7;
  return (uint8_t)(nearest_in_table(kE2m1Grid, 8, std::fabs((double)x)) | (std::signbit(x) ? 8 : 0));
}
// Stochastic rounding: lo <= |x| < hi are neighbours on the grid; hi with probability (|x|-lo)/(hi-lo), that is if u is below it.
inline uint8_t e2m1_sr(float x, double u) {
  if (x != x) return 7;
  double a = std::fabs((double)x);
  int lo = 0;
  while (lo < 7 && kE2m1Grid[lo + 1] <= a) lo++;
  if (lo < 7 && u < (a - kE2m1Grid[lo]) / (kE2m1Grid[lo + 1] - kE2m1Grid[lo])) lo++;
  return (uint8_t)(lo | (std::signbit(x) ? 8 : 0));
}

// E4M3 (OCP 8-bit Floating Point 1.0): 1-4-3 bits, bias 7, subnormals m * 2^-9, no infinity, 0x7f and 0xff are NaN, largest 448.
inline double e4m3_value(uint8_t byte) {
  int exponent = (byte >> 3) & 15, mantissa = byte & 7;
  double a = exponent == 15 && mantissa == 7 ? NAN : exponent == 0 ? mantissa / 512. : (1 + mantissa / 8.) * std::pow(2., exponent - 7);
  return byte & 0x80 ? -a : a;
}
inline uint8_t e4m3_rn(float x) {
  static const std::array<double, 127> table = [] {
    std::array<double, 127> t{};
    for (int i = 0; i < 127; i++) t[i] = e4m3_value((uint8_t)i);
    return t;
  }();
  int sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return (uint8_t)(0x7f | sign);
  return (uint8_t)(nearest_in_table(table.data(), 127, std::fabs((double)x)) | sign);
}

// E8M0 (OCP Microscaling Formats 1.0, 5.4.1): 2^(byte-127); 255 is NaN.
inline double e8m0_value(uint8_t byte) { return byte == 255 ? NAN : std::ldexp(1., byte - 127); }
// The largest power of two <= v (the smallest of all if v is below it), and the smallest one >= v (the largest if v is above), by
// search. MXFP4 scales: OCP takes floor(log2 amax) - 2 = e8m0_floor(amax/4), truncation-free is e8m0_ceil(amax/6).
inline uint8_t e8m0_floor(float v) {
  if (v != v) return 255;
  int byte = 254;
  while (byte > 0 && e8m0_value((uint8_t)byte) > v) byte--;
  return (uint8_t)byte;
}
inline uint8_t e8m0_ceil(float v) {
  if (v != v) return 255;
  int byte = 0;
  while (byte < 254 && e8m0_value((uint8_t)byte) < v) byte++;
  return (uint8_t)byte;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Random numbers: Philox4x32-10. Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11), section 3.3:
// one round is two S-boxes on the halves (L, R):  R' = mullo(L, M),  L' = mulhi(L, M) xor k xor R;  between the rounds the halves
// cross over and the key advances by a Weyl sequence. Known answers (Random123, kat_vectors) are in the test.
typedef std::array<uint32_t, 4> Counter;
typedef std::array<uint32_t, 2> Key;
inline Counter philox4x32_10(Counter c, Key k) {
  const uint64_t multiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
  const uint32_t weyl[2] = {0x9E3779B9u, 0xBB67AE85u};    // golden ratio; sqrt(3) - 1
  for (int round = 0; round < 10; round++) {
    uint64_t first = multiplier[0] * c[0], second = multiplier[1] * c[2];
    Counter next;
    next[0] = (uint32_t)(second / 0x100000000u) ^ c[1] ^ k[0];
    next[1] = (uint32_t)(second % 0x100000000u);
    next[2] = (uint32_t)(first / 0x100000000u) ^ c[3] ^ k[1];
    next[3] = (uint32_t)(first % 0x100000000u);
    c = next;
    for (int i = 0; i < 2; i++) k[i] += weyl[i];
  }
  return c;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Hadamard

// Entry (i, j) of Sylvester's matrix of +1 and -1: the parity of the common bits.
inline int hadamard_entry(int i, int j) {
  int parity = 0;
  for (int common = i & j; common; common >>= 1) parity ^= common & 1;
  return parity ? -1 : 1;
}
// y = (x * s) H_n / sqrt(n), s_i = -1 where bit i of the signs is set: the definition, in double.
inline Array rht(const Array& x, uint32_t signs) {
  int n = (int)x.size();
  Array y(n, 0.);
  for (int j = 0; j < n; j++)
    for (int i = 0; i < n; i++) y[j] += x[i] * ((signs >> i) & 1 ? -1 : 1) * hadamard_entry(i, j) / std::sqrt((double)n);
  return y;
}
// The same for n = 16 in FP32, in the one order that the project uses (so that bits can be compared): negate by the signs, then
// butterflies (a, b) -> (a + b, a - b) at distance 1, 2, 4, 8, each rounded to FP32, at last times 1/4.
inline void rht16_fp32(float* v, uint32_t signs) {
  for (int i = 0; i < 16; i++) if ((signs >> i) & 1) v[i] = -v[i];
  for (int distance = 1; distance < 16; distance *= 2)
    for (int pair = 0; pair < 16; pair += 2 * distance)
      for (int i = pair; i < pair + distance; i++) {
        float a = v[i], b = v[i + distance];
        v[i] = a + b;
        v[i + distance] = a - b;
      }
  for (int i = 0; i < 16; i++) v[i] *= .25f;
}

// ------------------------------------------------------------------------------------------------------------------------------
// NVFP4 (arXiv 2509.25149, and the specification of the recipes, section 2)

struct Nvfp4How {
  bool transpose = false;      // the operand is the transposed source
  bool tile16 = false;         // one scale for 16x16 instead of 1x16
  bool stochastic = false;
  bool rht16 = false;          // rotate groups of 16 along the columns, round the result to BF16
  uint32_t signs = 0;
  uint64_t seed = 0; uint32_t step = 0, stream = 0;
};
struct Nvfp4 {
  int rows = 0, cols = 0, blocks = 0;      // blocks = ceil(cols / 16)
  float amax = 0;
  std::vector<float> input;                // [rows, 16 blocks], what was rounded: after transposition and rotation
  std::vector<uint8_t> codes;              // [rows, 16 blocks], one code an entry
  std::vector<uint8_t> scales;             // [rows, blocks]
  std::vector<float> values;               // [rows, 16 blocks], code * scale, without the tensor scale amax/2688
};

// max|x|; a NaN anywhere gives NaN.
inline float max_abs(const float* x, size_t n) {
  float m = 0;
  for (size_t i = 0; i < n; i++) {
    float a = std::fabs(x[i]);
    if (a > m || a != a) m = a;
    if (a != a) break;
  }
  return m;
}

// The element j of block i of a stochastic operand rounds with u = (2r+1)/512, r a byte of Philox(counter {i, step, stream}, key seed).
inline double nvfp4_uniform(const Nvfp4How& how, uint64_t i, int j) {
  Counter words = philox4x32_10({(uint32_t)i, (uint32_t)(i >> 32), how.step, how.stream}, {(uint32_t)how.seed, (uint32_t)(how.seed >> 32)});
  int r = (words[j / 4] >> (8 * (j % 4))) & 255;
  return (2 * r + 1) / 512.;
}

// The scale byte and the factor of the elements, from the two maxima. FP32, each operation rounded, in this order.
inline void nvfp4_scale(float amax, float block_amax, uint8_t* scale, float* factor) {
  const float largest = std::numeric_limits<float>::max();
  float tensor = amax == 0 || std::isinf(amax) ? 1.f : std::min(2688.f / amax, largest);
  float sixth = 1.f / 6.f;
  float tensor_sixth = tensor * sixth;
  *scale = e4m3_rn(std::min(block_amax * tensor_sixth, largest));
  float back = 1.f / tensor;
  float stored = (float)e4m3_value(*scale) * back;
  *factor = std::min(1.f / stored, largest);
}

// Quantizes the row-major matrix x [src_rows, src_cols]. The last group of a row is padded with zeros up to 16.
inline Nvfp4 nvfp4(const std::vector<float>& x, int src_rows, int src_cols, const Nvfp4How& how) {
  Nvfp4 q;
  q.rows = how.transpose ? src_cols : src_rows;
  q.cols = how.transpose ? src_rows : src_cols;
  q.blocks = (q.cols + 15) / 16;
  size_t width = 16 * (size_t)q.blocks, n = q.rows * width;
  q.input.assign(n, 0.f);
  for (int r = 0; r < q.rows; r++)
    for (int c = 0; c < q.cols; c++) q.input[r * width + c] = how.transpose ? x[(size_t)c * src_cols + r] : x[(size_t)r * src_cols + c];
  if (how.rht16) {
    for (size_t i = 0; i < n; i += 16) rht16_fp32(&q.input[i], how.signs);
    for (float& v : q.input) v = round_bf16(v);
  }
  q.amax = max_abs(q.input.data(), n);
  q.codes.resize(n); q.values.resize(n); q.scales.resize((size_t)q.rows * q.blocks);
  for (int r = 0; r < q.rows; r++)
    for (int b = 0; b < q.blocks; b++) {
      int first = how.tile16 ? r / 16 * 16 : r, last = how.tile16 ? std::min(first + 15, q.rows - 1) : r;
      float block_amax = 0;
      for (int s = first; s <= last; s++) block_amax = std::max(block_amax, max_abs(&q.input[s * width + 16 * b], 16));
      uint64_t block = (uint64_t)r * q.blocks + b;
      float factor;
      nvfp4_scale(q.amax, block_amax, &q.scales[block], &factor);
      for (int j = 0; j < 16; j++) {
        size_t i = r * width + 16 * b + j;
        float v = q.input[i] * factor;
        q.codes[i] = how.stochastic ? e2m1_sr(v, nvfp4_uniform(how, block, j)) : e2m1_rn(v);
        q.values[i] = (float)(e2m1_value(q.codes[i]) * e4m3_value(q.scales[block]));
      }
    }
  return q;
}

// The 128x4 layout of scale bytes (cuBLAS documentation, "1D block scaling factors layout"), by enumeration: the matrix of scales is cut into
// tiles of 128 rows by 4 blocks, 512 bytes each, tiles in row-major order. Within a tile the bytes run over 32 rows r; for
// each over the 4 groups of 32 rows (r, r+32, r+64, r+96); for each over the 4 blocks. entry[offset] = {row, block}; rows and
// blocks past the end are padding, which must hold zeros.
struct ScaleEntry { int row, block; };
inline std::vector<ScaleEntry> scale_layout_128x4(int rows, int blocks) {
  std::vector<ScaleEntry> entry;
  for (int tile_row = 0; tile_row < rows; tile_row += 128)
    for (int tile_block = 0; tile_block < blocks; tile_block += 4)
      for (int r = 0; r < 32; r++)
        for (int group = 0; group < 4; group++)
          for (int b = 0; b < 4; b++) entry.push_back({tile_row + 32 * group + r, tile_block + b});
  return entry;
}
inline std::vector<uint8_t> tile_scales_128x4(const Nvfp4& q) {
  std::vector<uint8_t> bytes;
  for (ScaleEntry e : scale_layout_128x4(q.rows, q.blocks))
    bytes.push_back(e.row < q.rows && e.block < q.blocks ? q.scales[(size_t)e.row * q.blocks + e.block] : 0);
  return bytes;
}

// Mean over the rows of |error|^2 / |x|^2: the figure in the tables of the papers. The value of a code includes the tensor scale.
inline double nvfp4_row_error(const Nvfp4& q) {
  size_t width = 16 * (size_t)q.blocks;
  double total = 0;
  for (int r = 0; r < q.rows; r++) {
    double error = 0, norm = 0;
    for (size_t i = r * width; i < (r + 1) * width; i++) {
      double d = q.values[i] * ((double)q.amax / 2688) - q.input[i];
      error += d * d;
      norm += (double)q.input[i] * q.input[i];
    }
    total += error / norm;
  }
  return total / q.rows;
}

// ------------------------------------------------------------------------------------------------------------------------------
// GEMM

// D[M,N] = A B^T of code * scale, exact: a code is a multiple of 1/2, a scale of 2^-9, a product of two values of 2^-20. The sum of
// K < 2^20 integers fits int64 (12 * 229376 squared is 2^42.8). Returned as double: exact below 2^53 units, which tests stay under.
inline Array gemm_nvfp4_exact(const Nvfp4& a, const Nvfp4& b) {
  auto integers = [](const Nvfp4& q) {
    std::vector<int64_t> units(q.codes.size());
    for (size_t i = 0; i < units.size(); i++)
      units[i] = std::llrint(e2m1_value(q.codes[i]) * 2) * std::llrint(e4m3_value(q.scales[i / 16]) * 512);
    return units;
  };
  std::vector<int64_t> ai = integers(a), bi = integers(b);
  size_t width = 16 * (size_t)a.blocks;
  Array d((size_t)a.rows * b.rows);
  for (int m = 0; m < a.rows; m++)
    for (int n = 0; n < b.rows; n++) {
      int64_t sum = 0;
      for (size_t k = 0; k < width; k++) sum += ai[m * width + k] * bi[n * width + k];
      d[(size_t)m * b.rows + n] = std::ldexp((double)sum, -20);
    }
  return d;
}
// D[M,N] = A B^T with A [M,K], B [N,K].
inline Array gemm(const Array& a, const Array& b, int M, int N, int K) {
  Array d((size_t)M * N, 0.);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++)
      for (int k = 0; k < K; k++) d[(size_t)m * N + n] += a[(size_t)m * K + k] * b[(size_t)n * K + k];
  return d;
}
inline Array transposed(const Array& x, int rows, int cols) {
  Array y(x.size());
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) y[(size_t)c * rows + r] = x[(size_t)r * cols + c];
  return y;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Layers, in double. A backward function returns the gradients themselves (a kernel adds them to what is there).

// LayerNorm (Ba et al., arXiv 1607.06450): xhat = (x - mean) rstd, out = xhat w + b; population variance.
struct Norm { Array out, mean, rstd; };
inline Norm layernorm(const Array& x, const Array& w, const Array& b, int T, int C, double eps) {
  Norm n{Array(x.size()), Array(T), Array(T)};
  for (int t = 0; t < T; t++) {
    const double* row = &x[(size_t)t * C];
    double mean = 0, variance = 0;
    for (int c = 0; c < C; c++) mean += row[c] / C;
    for (int c = 0; c < C; c++) variance += (row[c] - mean) * (row[c] - mean) / C;
    n.mean[t] = mean;
    n.rstd[t] = 1 / std::sqrt(variance + eps);
    for (int c = 0; c < C; c++) n.out[(size_t)t * C + c] = (row[c] - mean) * n.rstd[t] * w[c] + b[c];
  }
  return n;
}
struct NormGradient { Array dx, dweight, dbias; };
inline NormGradient layernorm_backward(const Array& dout, const Array& x, const Array& w, int T, int C, double eps) {
  Norm n = layernorm(x, w, Array(C, 0.), T, C, eps);
  NormGradient g{Array(x.size()), Array(C, 0.), Array(C, 0.)};
  for (int t = 0; t < T; t++) {
    double mean_g = 0, mean_gx = 0;                             // means over the row of dxhat and dxhat * xhat
    for (int pass = 0; pass < 2; pass++)
      for (int c = 0; c < C; c++) {
        size_t i = (size_t)t * C + c;
        double xhat = (x[i] - n.mean[t]) * n.rstd[t], dxhat = dout[i] * w[c];
        if (pass == 0) {
          mean_g += dxhat / C;
          mean_gx += dxhat * xhat / C;
          g.dweight[c] += dout[i] * xhat;
          g.dbias[c] += dout[i];
        } else g.dx[i] = n.rstd[t] * (dxhat - mean_g - xhat * mean_gx);
      }
  }
  return g;
}

// RMSNorm (Zhang and Sennrich, arXiv 1910.07467): out = x rstd w, rstd = 1/sqrt(mean(x^2) + eps).
inline Norm rmsnorm(const Array& x, const Array& w, int T, int C, double eps) {
  Norm n{Array(x.size()), Array(), Array(T)};
  for (int t = 0; t < T; t++) {
    double square = 0;
    for (int c = 0; c < C; c++) square += x[(size_t)t * C + c] * x[(size_t)t * C + c] / C;
    n.rstd[t] = 1 / std::sqrt(square + eps);
    for (int c = 0; c < C; c++) n.out[(size_t)t * C + c] = x[(size_t)t * C + c] * n.rstd[t] * w[c];
  }
  return n;
}
inline NormGradient rmsnorm_backward(const Array& dout, const Array& x, const Array& w, int T, int C, double eps) {
  Norm n = rmsnorm(x, w, T, C, eps);
  NormGradient g{Array(x.size()), Array(C, 0.), Array()};
  for (int t = 0; t < T; t++) {
    double mean_gx = 0;
    for (int c = 0; c < C; c++) {
      size_t i = (size_t)t * C + c;
      mean_gx += dout[i] * w[c] * x[i] * n.rstd[t] / C;
      g.dweight[c] += dout[i] * x[i] * n.rstd[t];
    }
    for (int c = 0; c < C; c++) {
      size_t i = (size_t)t * C + c;
      g.dx[i] = n.rstd[t] * (dout[i] * w[c] - x[i] * n.rstd[t] * mean_gx);
    }
  }
  return g;
}

// RoPE (Su et al., arXiv 2104.09864) as Hugging Face's Llama has it ("rotate half"): coordinates i and i + D/2 of a head are one
// pair, turned by the angle t theta^(-2i/D). The q and k heads of qkv [B*T, (H + 2 KV) D]; v stays. direction -1: the inverse.
inline Array rope(Array qkv, int B, int T, int H, int KV, int D, double theta, int direction) {
  size_t width = (size_t)(H + 2 * KV) * D;
  for (int b = 0; b < B; b++)
    for (int t = 0; t < T; t++)
      for (int head = 0; head < H + KV; head++)
        for (int i = 0; i < D / 2; i++) {
          double angle = direction * t * std::pow(theta, -2. * i / D);
          double* p = &qkv[((size_t)b * T + t) * width + (size_t)head * D + i];
          double re = p[0], im = p[D / 2];
          p[0] = re * std::cos(angle) - im * std::sin(angle);
          p[D / 2] = im * std::cos(angle) + re * std::sin(angle);
        }
  return qkv;
}

// Causal attention with grouped keys and values (head h reads kv head h / (H/KV)): the whole T x T softmax, scale 1/sqrt(D).
struct Attention { Array out, lse; };                    // [B*T, H*D], [B, H, T] natural logarithm
struct AttentionPointers { const double *q, *k, *v; };   // row s of the heads of (b, h)
inline AttentionPointers attention_heads(const Array& qkv, int b, int s, int h, int T, int H, int KV, int D) {
  const double* row = &qkv[((size_t)b * T + s) * (H + 2 * KV) * D];
  int kv = h / (H / KV);
  return {row + h * D, row + (H + kv) * D, row + (H + KV + kv) * D};
}
inline Array attention_probabilities(const Array& qkv, int b, int t, int h, int T, int H, int KV, int D, double* lse) {
  Array p(t + 1);
  const double* q = attention_heads(qkv, b, t, h, T, H, KV, D).q;
  for (int s = 0; s <= t; s++) {
    const double* k = attention_heads(qkv, b, s, h, T, H, KV, D).k;
    for (int i = 0; i < D; i++) p[s] += q[i] * k[i] / std::sqrt((double)D);
  }
  double largest = *std::max_element(p.begin(), p.end()), sum = 0;
  for (double& x : p) sum += x = std::exp(x - largest);
  for (double& x : p) x /= sum;
  *lse = largest + std::log(sum);
  return p;
}
inline Attention attention(const Array& qkv, int B, int T, int H, int KV, int D) {
  Attention a{Array((size_t)B * T * H * D, 0.), Array((size_t)B * H * T)};
  for (int b = 0; b < B; b++)
    for (int h = 0; h < H; h++)
      for (int t = 0; t < T; t++) {
        Array p = attention_probabilities(qkv, b, t, h, T, H, KV, D, &a.lse[((size_t)b * H + h) * T + t]);
        for (int s = 0; s <= t; s++)
          for (int i = 0; i < D; i++) a.out[(((size_t)b * T + t) * H + h) * D + i] += p[s] * attention_heads(qkv, b, s, h, T, H, KV, D).v[i];
      }
  return a;
}
inline Array attention_backward(const Array& dout, const Array& qkv, int B, int T, int H, int KV, int D) {
  Array dqkv(qkv.size(), 0.);
  for (int b = 0; b < B; b++)
    for (int h = 0; h < H; h++)
      for (int t = 0; t < T; t++) {
        double lse;
        Array p = attention_probabilities(qkv, b, t, h, T, H, KV, D, &lse), dp(t + 1);
        const double* g = &dout[(((size_t)b * T + t) * H + h) * D];
        AttentionPointers at_t = attention_heads(qkv, b, t, h, T, H, KV, D);
        double delta = 0;                                // sum_s p dp
        for (int s = 0; s <= t; s++) {
          for (int i = 0; i < D; i++) dp[s] += g[i] * attention_heads(qkv, b, s, h, T, H, KV, D).v[i];
          delta += p[s] * dp[s];
        }
        for (int s = 0; s <= t; s++) {
          AttentionPointers at_s = attention_heads(qkv, b, s, h, T, H, KV, D);
          double ds = p[s] * (dp[s] - delta) / std::sqrt((double)D);
          for (int i = 0; i < D; i++) {
            dqkv[at_t.q + i - qkv.data()] += ds * at_s.k[i];
            dqkv[at_s.k + i - qkv.data()] += ds * at_t.q[i];
            dqkv[at_s.v + i - qkv.data()] += p[s] * g[i];
          }
        }
      }
  return dqkv;
}

// GELU, tanh form (Hendrycks and Gimpel, arXiv 1606.08415): x/2 (1 + tanh(sqrt(2/pi) (x + .044715 x^3))).
inline double gelu(double x) {
  const double pi = std::acos(-1.);
  return .5 * x * (1 + std::tanh(std::sqrt(2 / pi) * (x + .044715 * x * x * x)));
}
inline double gelu_derivative(double x) {
  const double pi = std::acos(-1.);
  double t = std::tanh(std::sqrt(2 / pi) * (x + .044715 * x * x * x));
  return .5 * (1 + t) + .5 * x * (1 - t * t) * std::sqrt(2 / pi) * (1 + 3 * .044715 * x * x);
}

// SwiGLU (Shazeer, arXiv 2002.05202): silu(gate) * up, of rows gate | up.
inline Array swiglu(const Array& gate_up, int T, int F) {
  Array out((size_t)T * F);
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f++) {
      double gate = gate_up[(size_t)t * 2 * F + f], up = gate_up[(size_t)t * 2 * F + F + f];
      out[(size_t)t * F + f] = gate / (1 + std::exp(-gate)) * up;
    }
  return out;
}
inline Array swiglu_backward(const Array& dout, const Array& gate_up, int T, int F) {
  Array d(gate_up.size());
  for (int t = 0; t < T; t++)
    for (int f = 0; f < F; f++) {
      size_t i = (size_t)t * 2 * F + f;
      double gate = gate_up[i], up = gate_up[i + F], s = 1 / (1 + std::exp(-gate)), g = dout[(size_t)t * F + f];
      d[i] = g * up * (s + gate * s * (1 - s));
      d[i + F] = g * gate * s;
    }
  return d;
}

// Sums of the columns of x [T, N]: the gradient of a bias.
inline Array column_sums(const Array& x, int T, int N) {
  Array sums(N, 0.);
  for (int t = 0; t < T; t++)
    for (int n = 0; n < N; n++) sums[n] += x[(size_t)t * N + n];
  return sums;
}

// out = wte[token] + wpe[position] (wpe may be empty); the gradients are sums over the rows that used an entry.
inline Array embedding(const std::vector<int>& tokens, const Array& wte, const Array& wpe, int T, int C) {
  Array out(tokens.size() * C);
  for (size_t i = 0; i < tokens.size(); i++)
    for (int c = 0; c < C; c++) out[i * C + c] = wte[(size_t)tokens[i] * C + c] + (wpe.empty() ? 0 : wpe[(i % T) * C + c]);
  return out;
}
inline void embedding_backward(Array& dwte, Array& dwpe, const std::vector<int>& tokens, const Array& dout, int T, int C) {
  for (size_t i = 0; i < tokens.size(); i++)
    for (int c = 0; c < C; c++) {
      if (!dwte.empty()) dwte[(size_t)tokens[i] * C + c] += dout[i * C + c];
      if (!dwpe.empty()) dwpe[(i % T) * C + c] += dout[i * C + c];
    }
}

// Cross-entropy of softmax over the first V of Vp columns, and z-loss (PaLM, arXiv 2204.02311, section 5: z log^2 Z). losses holds
// the cross-entropy alone; dlogits belongs to grad_scale * sum(cross-entropy + z lse^2). Target -1: the row does not count.
struct Loss { Array losses, lse, dlogits; };
inline Loss softmax_cross_entropy(const Array& logits, const std::vector<int>& targets, int V, int Vp, double grad_scale, double z) {
  size_t rows = targets.size();
  Loss l{Array(rows, 0.), Array(rows, 0.), Array(rows * Vp, 0.)};
  for (size_t r = 0; r < rows; r++) {
    const double* x = &logits[r * Vp];
    double largest = *std::max_element(x, x + V), sum = 0;
    for (int v = 0; v < V; v++) sum += std::exp(x[v] - largest);
    l.lse[r] = largest + std::log(sum);
    if (targets[r] < 0) continue;
    l.losses[r] = l.lse[r] - x[targets[r]];
    for (int v = 0; v < V; v++)
      l.dlogits[r * Vp + v] = grad_scale * ((1 + 2 * z * l.lse[r]) * std::exp(x[v] - l.lse[r]) - (v == targets[r]));
  }
  return l;
}

// AdamW (Loshchilov and Hutter, arXiv 1711.05101) in the order of torch.optim.AdamW: decay first, epsilon after the bias correction.
struct AdamWSettings { double lr, beta1, beta2, eps, weight_decay; int step; };   // step counts from 1
inline void adamw(Array& w, Array& m, Array& v, const Array& grad, double grad_scale, AdamWSettings o) {
  double correction1 = 1 - std::pow(o.beta1, o.step), correction2 = 1 - std::pow(o.beta2, o.step);
  for (size_t i = 0; i < w.size(); i++) {
    double g = grad[i] * grad_scale;
    w[i] *= 1 - o.lr * o.weight_decay;
    m[i] = o.beta1 * m[i] + (1 - o.beta1) * g;
    v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g;
    w[i] -= o.lr / correction1 * m[i] / (std::sqrt(v[i]) / std::sqrt(correction2) + o.eps);
  }
}
inline double norm(const Array& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}
// torch.nn.utils.clip_grad_norm_: the factor of all gradients. clip 0: no clipping.
inline double clip_scale(double norm, double clip) { return clip == 0 ? 1 : std::min(1., clip / (norm + 1e-6)); }

}  // namespace reference
