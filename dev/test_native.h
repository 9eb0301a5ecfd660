// dev/test_native.h -- the FP4 GEMM on packed codes and scales (kernels/gemm_fp4.cuh) and its instruction (kernels/ptx.cuh).
//
// Where there is no Blackwell GPU the instruction is replaced by its meaning in C++, so what is proven here is the kernel around it and that
// the meaning is the documented one: fragments are filled, and read back, by a table written here from the PTX manual's wording. Then
// the GEMM equals the exact integer product bit for bit; each of a list of plausible mistakes is planted and must be caught; and the
// start-up self-check must stop the program for them. On a GPU of the sm_120 family the same tests run the instruction.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <vector>
#include "gemm_versions.cuh"
#include "test_formats.h"

namespace native {

// ------------------------------------------------------------------------------------------------------------------------------
// Operands

enum ScaleKind { kOrdinaryScales, kAllScales };       // 2^-1 .. 3.75, with zeros; or every finite byte (MXFP4: 2^-40 .. 2^40)
struct Packed {                                       // [rows, K] of random codes, as a matrix and as the bytes that a kernel reads
  int rows, K, ld, block, blocks;
  bool mx;
  std::vector<uint8_t> code, scale;                   // [rows, K], [rows, blocks]
  std::vector<float> outer;                           // [rows, ceil(K/128)]
  std::vector<uint8_t> codes, scales;                 // packed [rows, ld/2], tiled
};
inline Packed random_operand(int rows, int K, Rng& rng, bool mx = false, bool outer = false, ScaleKind kind = kOrdinaryScales, int extra = 0) {
  Packed p;
  p.rows = rows; p.K = K; p.mx = mx;
  p.ld = (K + 31) / 32 * 32 + extra;
  p.block = mx ? 32 : 16;
  p.blocks = (K + p.block - 1) / p.block;
  p.code.resize((size_t)rows * K);
  p.scale.resize((size_t)rows * p.blocks);
  for (uint8_t& c : p.code) c = (uint8_t)rng.below(16);
  for (uint8_t& s : p.scale) {
    if (mx) s = (uint8_t)(kind == kAllScales ? 87 + rng.below(81) : 125 + rng.below(5));
    else s = (uint8_t)(kind == kAllScales ? rng.below(127) : rng.below(16) ? 6 * 8 + rng.below(24) : 0);
  }
  if (outer) {
    p.outer.resize((size_t)rows * ((K + 127) / 128));
    for (float& o : p.outer) o = (float)std::exp(rng.normal());
  }
  p.codes.assign((size_t)rows * p.ld / 2, 0);
  for (int r = 0; r < rows; r++)
    for (int k = 0; k < p.ld; k++) {
      uint8_t c = k < K ? p.code[(size_t)r * K + k] : k < (K + 31) / 32 * 32 ? 0 : 5;   // beyond the next multiple of 32: nobody may look
      p.codes[((size_t)r * p.ld + k) / 2] |= (uint8_t)(c << (k % 2 ? 4 : 0));
    }
  for (reference::ScaleEntry e : reference::scale_layout_128x4(rows, p.blocks))
    p.scales.push_back(e.row < rows && e.block < p.blocks ? p.scale[(size_t)e.row * p.blocks + e.block] : 0);
  return p;
}
inline double value(const Packed& p, int row, int k) {
  uint8_t s = p.scale[(size_t)row * p.blocks + k / p.block];
  return reference::e2m1_value(p.code[(size_t)row * p.K + k]) * (p.mx ? reference::e8m0_value(s) : reference::e4m3_value(s));
}
// k from first to last of A B^T. NVFP4: integers, units of 2^-20. MXFP4: units of 2^-22 (ordinary scales: 2^-2 .. 2^2, codes 2^-1).
inline reference::Array exact_product(const Packed& a, const Packed& b, int first, int last) {
  reference::Array d((size_t)a.rows * b.rows);
  auto units = [](const Packed& p) {
    std::vector<int64_t> u((size_t)p.rows * p.K);
    for (int r = 0; r < p.rows; r++) for (int k = 0; k < p.K; k++) u[(size_t)r * p.K + k] = std::llrint(std::ldexp(value(p, r, k), p.mx ? 11 : 10));
    return u;
  };
  std::vector<int64_t> x = units(a), y = units(b);
  for (int m = 0; m < a.rows; m++)
    for (int n = 0; n < b.rows; n++) {
      int64_t sum = 0;
      for (int k = first; k < std::min(last, a.K); k++) sum += x[(size_t)m * a.K + k] * y[(size_t)n * b.K + k];
      d[(size_t)m * b.rows + n] = std::ldexp((double)sum, a.mx ? -22 : -20);
    }
  return d;
}

// ------------------------------------------------------------------------------------------------------------------------------
// The instruction

struct LaneRegisters { uint32_t a[4], b[2], sfa, sfb; float d[4]; };
template <bool kMx> __global__ void one_mma_kernel(LaneRegisters* lanes, bool truncate) {
  LaneRegisters r = lanes[threadIdx.x];
  mma_m16n8k64_fp4<kMx>(r.d, r.a, r.b[0], r.b[1], r.sfa, r.sfb, truncate);
  for (int i = 0; i < 4; i++) lanes[threadIdx.x].d[i] = r.d[i];
}
// The documented truncation, by MMA-Sim's description: groups of 16 exact; they and c cut off at 35 fraction bits below the largest exponent,
// that of a group being the sum of its two scales' exponents; the sum cut off to FP32.
inline float documented_accumulation(float c, const double* group, const int* group_exponent) {
  auto cut = [](double x, int bit) { return std::ldexp(std::trunc(std::ldexp(x, -bit)), bit); };
  int top = c == 0 ? -126 : std::max(std::ilogb(c), -126);
  for (int j = 0; j < 4; j++) top = std::max(top, group_exponent[j]);
  double sum = cut(c, top - 35);
  for (int j = 0; j < 4; j++) sum += cut(group[j], top - 35);
  float f = (float)sum;
  return std::fabs((double)f) > std::fabs(sum) ? std::nextafterf(f, 0.f) : f;
}
inline int scale_exponent(const Packed& p, int row, int group16) {
  int g = p.mx ? group16 / 2 : group16;
  if (g >= p.blocks) return -126;
  uint8_t s = p.scale[(size_t)row * p.blocks + g];
  if (p.mx) return s - 127;
  return s == 0 ? -126 : std::max((int)std::floor(std::log2(reference::e4m3_value(s))), -6);
}
// One step of 64 k for one element, on top of c: from the values, in double.
inline float step_reference(float c, const Packed& a, const Packed& b, int m, int n, int k0, bool truncate) {
  double group[4] = {0, 0, 0, 0};
  int exponent[4];
  for (int j = 0; j < 4; j++) {
    for (int k = k0 + 16 * j; k < std::min(k0 + 16 * j + 16, a.K); k++) group[j] += value(a, m, k) * value(b, n, k);
    exponent[j] = scale_exponent(a, m, k0 / 16 + j) + scale_exponent(b, n, k0 / 16 + j);
  }
  return truncate ? documented_accumulation(c, group, exponent) : (float)(c + group[0] + group[1] + group[2] + group[3]);
}

inline void test_instruction(bool mx, bool truncate, ScaleKind kind) {
  Rng rng(501 + mx + 2 * truncate);
  Mismatches m;
  for (int round = 0; round < 40; round++) {
    Packed a = random_operand(16, 64, rng, mx, false, kind), b = random_operand(8, 64, rng, mx, false, kind);
    float c[16][8];
    for (auto& row : c) for (float& x : row) x = kind == kAllScales ? (float)(rng.normal() * std::exp(6 * rng.normal())) : (float)(rng.below(4001) - 2000) / 16;
    // The manual's tables, from the matrix's side. Words that the manual says are not read hold NaN scales.
    std::vector<LaneRegisters> lanes(32);
    for (LaneRegisters& l : lanes) { memset(&l, 0, sizeof l); l.sfa = l.sfb = mx ? 0xffffffffu : 0x7f7f7f7fu; }
    for (int k = 0; k < 64; k++) {
      const int t = k % 32 / 8, half = k / 32, shift = 4 * (k % 8);
      for (int row = 0; row < 16; row++) lanes[4 * (row % 8) + t].a[row / 8 + 2 * half] |= (uint32_t)a.code[row * 64 + k] << shift;
      for (int column = 0; column < 8; column++) lanes[4 * column + t].b[half] |= (uint32_t)b.code[column * 64 + k] << shift;
    }
    auto word = [&](const Packed& p, int row) {
      uint32_t w = mx ? 0xffff0000u : 0;                                  // MXFP4: the upper two bytes are not selected
      for (int j = 0; j < p.blocks; j++) w |= (uint32_t)(p.scale[row * p.blocks + j] | (!mx && rng.below(2) ? 0x80 : 0)) << 8 * j;    // UE4M3 has no sign
      return w;
    };
    for (int row = 0; row < 16; row++) lanes[4 * (row % 8) + row / 8].sfa = word(a, row);
    for (int column = 0; column < 8; column++) lanes[4 * column].sfb = word(b, column);
    for (int row = 0; row < 16; row++) for (int column = 0; column < 8; column++) lanes[4 * (row % 8) + column / 2].d[2 * (row / 8) + column % 2] = c[row][column];
    TestArray<LaneRegisters> device(lanes);
    if (mx) launch(one_mma_kernel<true>, 1, 32, 0, device.p, truncate); else launch(one_mma_kernel<false>, 1, 32, 0, device.p, truncate);
    std::vector<LaneRegisters> out = device.host();
    for (int row = 0; row < 16; row++) for (int column = 0; column < 8; column++) {
      float got = out[4 * (row % 8) + column / 2].d[2 * (row / 8) + column % 2], want = step_reference(c[row][column], a, b, row, column, 0, truncate);
      m.add(got == want, "element (row * 8 + column)", 8 * row + column, got, want);
    }
  }
  m.report(std::string(mx ? "MXFP4" : "NVFP4") + " m16n8k64: fragments and scales as the PTX manual's tables say, " +
           (truncate ? "truncated as documented, all scales" : kind == kAllScales ? "exact, all scales" : "exact, ordinary scales"));
}
inline void test_nan_scale() {
  Rng rng(77);
  bool spreads = true;
  for (bool mx : {false, true}) {
    std::vector<LaneRegisters> lanes(32);
    for (LaneRegisters& l : lanes) { for (uint32_t& x : l.a) x = 0x22222222; l.b[0] = l.b[1] = 0x22222222; l.sfa = l.sfb = mx ? 0x7f7f7f7f : 0x38383838; for (float& x : l.d) x = 0; }
    lanes[4 * 3].sfa = mx ? 0x7fff : 0x3838387f;                          // row 3
    TestArray<LaneRegisters> device(lanes);
    if (mx) launch(one_mma_kernel<true>, 1, 32, 0, device.p, false); else launch(one_mma_kernel<false>, 1, 32, 0, device.p, false);
    std::vector<LaneRegisters> out = device.host();
    for (int l = 0; l < 32; l++) for (int i = 0; i < 4; i++) spreads = spreads && (l / 4 == 3 && i < 2 ? std::isnan(out[l].d[i]) : out[l].d[i] == 64);
  }
  check("a NaN scale makes its row NaN, and only its row", spreads);
}

// ------------------------------------------------------------------------------------------------------------------------------
// The GEMM

struct Case { int M, N, K; bool d_fp32 = true, accumulate = false, alpha = false, outer = false, mx = false; int parts = 1; int extra = 0; bool truncate = false; ScaleKind scales = kOrdinaryScales; };
struct CaseResult { std::vector<float> got, want; bool fits = true, guards = true; };

inline std::vector<float> reference_output(const Case& c, const Packed& a, const Packed& b, const std::vector<float>& before, float alpha, bool* fits) {
  const size_t n = (size_t)c.M * c.N;
  std::vector<float> sum(n);
  if (c.truncate || c.scales == kAllScales) {
    for (int m = 0; m < c.M; m++) for (int j = 0; j < c.N; j++)
      for (int k = 0; k < c.K; k += 64) sum[(size_t)m * c.N + j] = step_reference(sum[(size_t)m * c.N + j], a, b, m, j, k, c.truncate);
  } else if (c.outer) {                                   // FP32 across slabs, in this order: C += (osA * osB) * slab
    for (int slab = 0; slab * 128 < c.K; slab++) {
      reference::Array part = exact_product(a, b, 128 * slab, 128 * slab + 128);
      const int slabs = (c.K + 127) / 128;
      for (int m = 0; m < c.M; m++) for (int j = 0; j < c.N; j++) {
        const size_t i = (size_t)m * c.N + j;
        const float scale = a.outer[(size_t)m * slabs + slab] * b.outer[(size_t)j * slabs + slab];
        *fits = *fits && (double)(float)part[i] == part[i];
        sum[i] = std::fma(scale, (float)part[i], sum[i]);
      }
    }
  } else {
    reference::Array exact = exact_product(a, b, 0, c.K);
    for (size_t i = 0; i < n; i++) { sum[i] = (float)exact[i]; *fits = *fits && (double)sum[i] == exact[i]; }
  }
  for (size_t i = 0; i < n; i++) {
    float y = alpha * sum[i];
    if (c.accumulate) y = y + before[i];                    // two roundings, as the kernel does on every machine
    sum[i] = !c.d_fp32 && sizeof(floatX) == 2 ? reference::round_bf16(y) : y;
  }
  return sum;
}

// Runs `run` (a callable on GemmFp4) on the case; D has rows wider than N, whose rest and guard must stay untouched.
template <class D, class Run> CaseResult run_case(const Case& c, Rng& rng, Run run) {
  Packed a = random_operand(c.M, c.K, rng, c.mx, c.outer, c.scales, c.extra), b = random_operand(c.N, c.K, rng, c.mx, c.outer, c.scales, 2 * c.extra);
  const int ldd = c.extra ? c.N + 5 : c.N;
  TestArray<uint8_t> ac(a.codes), as(a.scales), bc(b.codes), bs(b.scales);
  TestArray<float> ao(a.outer), bo(b.outer);
  const float alpha = c.alpha ? 0.0371f : 1.0f;
  TestArray<float> scalar(std::vector<float>{alpha});
  std::vector<float> before((size_t)c.M * c.N), wide((size_t)c.M * ldd, -77.f);
  for (float& x : before) x = (float)(rng.below(65) - 32);
  for (int m = 0; m < c.M; m++) for (int n = 0; n < c.N; n++) wide[(size_t)m * ldd + n] = c.accumulate ? before[(size_t)m * c.N + n] : NAN;
  TestArray<D> d(narrow<D>(reference::Array(wide.begin(), wide.end())));
  GemmFp4 g;
  g.M = c.M; g.N = c.N; g.K = c.K; g.a_codes = ac.p; g.a_scales = as.p; g.b_codes = bc.p; g.b_scales = bs.p; g.lda = a.ld; g.ldb = b.ld;
  g.D = d.p; g.ldd = ldd; g.d_fp32 = c.d_fp32; g.accumulate = c.accumulate; g.alpha = c.alpha ? scalar.p : nullptr; g.mx = c.mx;
  if (c.outer) { g.a_outer = ao.p; g.b_outer = bo.p; }
  run(g);
  CaseResult r;
  std::vector<D> out = d.host();
  for (int m = 0; m < c.M; m++) for (int n = 0; n < ldd; n++) {
    const float x = to_float(out[(size_t)m * ldd + n]);
    if (n < c.N) r.got.push_back(x); else r.guards = r.guards && x == -77;
  }
  r.guards = r.guards && d.guard_intact();
  r.want = reference_output(c, a, b, before, alpha, &r.fits);
  return r;
}
template <class Run> CaseResult run_case_of(const Case& c, Rng& rng, Run run) { return c.d_fp32 ? run_case<float>(c, rng, run) : run_case<floatX>(c, rng, run); }
inline std::string case_name(const Case& c) {
  return std::to_string(c.M) + "x" + std::to_string(c.N) + "x" + std::to_string(c.K) + (c.d_fp32 ? " FP32" : " floatX") + (c.accumulate ? " accumulate" : "") + (c.alpha ? " alpha" : "") + (c.parts > 1 ? " in parts" : "");
}
inline void add_case(Mismatches& m, const Case& c, const CaseResult& r) {
  m.add(r.guards, (case_name(c) + ": written beyond D").c_str(), 0, 0, 0);
  m.add(r.fits, (case_name(c) + ": the test's own data does not fit FP32").c_str(), 0, 0, 0);
  for (size_t i = 0; i < r.want.size(); i++) m.add(r.got[i] == r.want[i], (case_name(c) + " element").c_str(), (double)i, r.got[i], r.want[i]);
}
inline auto mma_way(const Case& c) { return [c](const GemmFp4& g) { gemm_fp4_mma(g, {c.parts, c.truncate}); }; }

inline const std::vector<std::array<int, 3>>& odd_sizes() {
  static const std::vector<std::array<int, 3>> sizes = {{1, 1, 1}, {3, 5, 16}, {17, 9, 33}, {75, 90, 203}, {128, 128, 128}, {130, 72, 320}, {33, 135, 417}};
  return sizes;
}
inline void test_gemm_cases(const char* title, bool outer, bool mx) {
  Rng rng(520 + outer + 2 * mx);
  Mismatches m;
  for (auto& s : odd_sizes())
    for (int options = 0; options < 8; options++) {
      Case c{s[0], s[1], s[2], (options & 1) != 0, (options & 2) != 0, (options & 4) != 0, outer, mx};
      if (s[0] * s[1] * s[2] > 1000000 && options != 0 && options != 7 && kOnCpu) continue;
      c.extra = options % 3 * 32;
      add_case(m, c, run_case_of(c, rng, mma_way(c)));
    }
  m.report(title);
}
inline void test_parts() {
  Rng rng(531);
  Mismatches m;
  const int most = std::min(fp4_block_slots(), 5);
  for (int parts = 2; parts <= most; parts++) {
    Case c{75, 90, 1100, parts % 2 == 0, parts % 3 != 0, true};
    c.parts = parts;
    add_case(m, c, run_case_of(c, rng, mma_way(c)));
    c.outer = c.d_fp32 = true;
    CaseResult whole, split;                              // outer scales: the order of FP32 sums differs between parts, so compare closely, not exactly
    Rng again = rng;
    split = run_case_of(c, rng, mma_way(c));
    c.parts = 1;
    whole = run_case_of(c, again, mma_way(c));
    m.add(rel_error(split.got, whole.got) < 1e-6, "outer scales in parts, relative error", parts, rel_error(split.got, whole.got), 0);
  }
  if (most < 2) skip("K shared out among blocks", "one core: nothing to share");
  else m.report("K shared out among several blocks: the same sums");
}
inline void test_versions() {
  Rng rng(540);
  Mismatches one, two;
  for (auto& s : odd_sizes()) {
    Case c{s[0], s[1], s[2]};
    c.alpha = true; c.extra = 32;
    add_case(one, c, run_case_of(c, rng, gemm_fp4_v1));
    add_case(two, c, run_case_of(c, rng, gemm_fp4_v2));
  }
  one.report("version 1 (one warp a tile) equals the integer product");
  two.report("version 2 (tiles in shared memory) equals the integer product");
}
inline void test_truncation() {
  if (mma_fp4_is_native()) { skip("the documented truncation in a GEMM", "the instruction itself runs here"); return; }
  Mismatches m;
  size_t differs = 0, total = 0;
  for (bool mx : {false, true}) {
    Case c{40, 24, 1000};
    c.mx = mx; c.scales = kAllScales; c.truncate = true;
    Rng rng(550), again(550);
    CaseResult t = run_case_of(c, rng, mma_way(c));
    add_case(m, c, t);
    c.truncate = false;
    CaseResult e = run_case_of(c, again, mma_way(c));
    add_case(m, c, e);
    total += t.got.size();
    for (size_t i = 0; i < t.got.size(); i++) differs += t.got[i] != e.got[i];
  }
  m.report("scales over the whole range: exact and truncated accumulation equal the documented models bit for bit");
  check("and there the two do differ, so the option does something", differs > 0 && differs < total, "%zu of %zu elements", differs, total);
}

// From tensors: quantized (by the reference, which the quantizer equals), then the packed bytes here and the values through the emulation.
struct QuantizedOperand { TestArray<uint8_t> codes, scales; TestArray<floatX> values; int ld; float amax; };
inline std::unique_ptr<QuantizedOperand> quantized(int rows, int K, reference::Nvfp4How how, Rng& rng) {
  std::vector<float> x((size_t)rows * K);
  for (float& v : x) v = reference::round_bf16((float)rng.normal());
  const reference::Nvfp4 q = reference::nvfp4(x, rows, K, how);
  const int ld = (K + 31) / 32 * 32, width = 16 * q.blocks;
  std::vector<uint8_t> codes((size_t)rows * ld / 2);
  reference::Array values((size_t)rows * ld, 0.);
  for (int r = 0; r < rows; r++) for (int k = 0; k < width; k++) {
    codes[((size_t)r * ld + k) / 2] |= (uint8_t)(q.codes[(size_t)r * width + k] << (k % 2 ? 4 : 0));
    values[(size_t)r * ld + k] = q.values[(size_t)r * width + k];
  }
  return std::unique_ptr<QuantizedOperand>(new QuantizedOperand{codes, reference::tile_scales_128x4(q), narrow<floatX>(values), ld, q.amax});
}
inline void test_against_emulation() {
  Rng rng(560);
  Mismatches m;
  // K are multiples of 16: a last group of a single element has a far smaller scale, and with it the FP32 sums of the emulation round.
  const int sizes[][3] = {{75, 90, 208}, {33, 135, 416}, {128, 64, 256}};
  for (auto& s : sizes)
    for (int kind = 0; kind < 3; kind++) {                // operands like fprop's, dgrad's and wgrad's in the recipe nvfp4
      const int M = s[0], N = s[1], K = s[2];
      reference::Nvfp4How first, second;
      first.stochastic = kind > 0;
      first.rht16 = second.rht16 = kind == 2;
      first.signs = second.signs = 0xD7E8;
      second.tile16 = kind < 2;
      auto a = quantized(M, K, first, rng), b = quantized(N, K, second, rng);
      TestArray<float> alpha(std::vector<float>{(a->amax / 2688.f) * (b->amax / 2688.f)}), d(std::vector<float>((size_t)M * N, 0.f)), want(std::vector<float>((size_t)M * N, 0.f));
      Gemm e;
      e.M = M; e.N = N; e.K = a->ld; e.A = a->values.p; e.B = b->values.p; e.lda = a->ld; e.ldb = b->ld; e.D = want.p; e.ldd = N; e.d_fp32 = true; e.accumulate = true; e.alpha = alpha.p;
      GemmFp4 g;
      g.M = M; g.N = N; g.K = K; g.a_codes = a->codes.p; g.a_scales = a->scales.p; g.b_codes = b->codes.p; g.b_scales = b->scales.p; g.lda = a->ld; g.ldb = b->ld;
      g.D = d.p; g.ldd = N; g.d_fp32 = true; g.accumulate = true; g.alpha = alpha.p;
      gemm(e);
      gemm_fp4_mma(g);
      std::vector<float> x = d.host(), y = want.host();
      for (size_t i = 0; i < x.size(); i++) m.add(x[i] == y[i], "element", (double)i, x[i], y[i]);
    }
  m.report("quantized tensors (RN, SR, RHT, 16x16): packed bytes through the FP4 kernel = values through the emulation, bit for bit");
}

// ------------------------------------------------------------------------------------------------------------------------------
// Planted mistakes. Each is something that somebody could have written, that compiles, runs and returns plausible numbers.

enum Plant { kNone, kRegistersA, kRegisterRowsA, kHalvesB, kFragmentsB, kScaleLaneA, kScaleLaneB, kScaleRowMajor, kScaleTileTransposed, kScaleStep, kScaleTileOrder, kColumnsStraight, kColumnsMirrored, kRegistersD, kStage,
             kOuterFirst, kOuterLate, kMxHalf, kPlants };
inline const char* plant_name(int p) {
  const char* names[kPlants] = {"none", "registers a1 and a2 exchanged", "rows g and g+8 of A exchanged", "registers b0 and b1 exchanged", "the two fragments of a pair of B exchanged",
                                "A's scale of row g+8 from lanes t = 2, 3 instead of 1", "B's scale from the column lane % 8", "scale tile read row by row, 4 bytes each", "scale tile with its 32 x 4 order the other way round",
                                "the second step of a slab with the first step's scales", "scale tiles numbered down the rows first", "B's columns loaded in plain order, stored interleaved", "B's columns interleaved the other way",
                                "d1 and d2 exchanged", "slabs loaded into the other stage", "the outer scale of the first slab for all", "outer scales one slab late", "MXFP4: the lower half of the scale word twice"};
  return names[p];
}
struct PlantedLayout {
  int plant = kNone;
  Fp4Layout right = {};
  __device__ int a_row(int m) const { return plant == kRegistersA ? 8 * (m >> 1) : plant == kRegisterRowsA ? 8 - 8 * (m & 1) : right.a_row(m); }
  __device__ int a_k(int m) const { return plant == kRegistersA ? 32 * (m & 1) : right.a_k(m); }
  __device__ int b_fragment(int m) const { return plant == kFragmentsB ? 1 - (m >> 1) : right.b_fragment(m); }
  __device__ int b_k(int m) const { return plant == kHalvesB ? 32 - 32 * (m & 1) : right.b_k(m); }
  __device__ int column(int f, int c) const { return plant == kColumnsStraight ? 8 * f + c : plant == kColumnsMirrored ? 16 * (f / 2) + 4 * (c / 2) + 2 * (1 - (f & 1)) + (c & 1) : right.column(f, c); }
  __device__ int scale_a_row(int lane) const { return plant == kScaleLaneA ? lane / 4 + 8 * (lane >> 1 & 1) : right.scale_a_row(lane); }
  __device__ int scale_b_column(int lane) const { return plant == kScaleLaneB ? lane % 8 : right.scale_b_column(lane); }
  __device__ int scale_word(int row) const { return plant == kScaleRowMajor ? 4 * row : plant == kScaleTileTransposed ? row % 4 * 128 + row / 4 * 4 : right.scale_word(row); }
  __device__ size_t scale_tile(int row_tile, int k_tile, int row_tiles, int k_tiles) const {
    return plant == kScaleTileOrder ? (size_t)k_tile * row_tiles + row_tile : right.scale_tile(row_tile, k_tile, row_tiles, k_tiles);
  }
  __device__ int scale_step(int step) const { return plant == kScaleStep ? 0 : right.scale_step(step); }
  __device__ int mx_half(int step) const { return plant == kMxHalf ? 0 : right.mx_half(step); }
  __device__ int d_register(int h, int c) const { return plant == kRegistersD ? 2 * c + h : right.d_register(h, c); }
  __device__ int outer_slab(int slab) const { return plant == kOuterFirst ? 0 : plant == kOuterLate ? max(slab - 1, 0) : right.outer_slab(slab); }
  __device__ int next_stage(int slab) const { return plant == kStage ? (slab + 1) % kFp4Stages : right.next_stage(slab); }
};
inline void test_plants() {
  for (int plant = 0; plant < kPlants; plant++) {
    Case c{150, 70, 300};
    c.outer = plant == kOuterFirst || plant == kOuterLate;
    c.mx = plant == kMxHalf;
    Rng rng(580);
    CaseResult r = run_case_of(c, rng, [&](const GemmFp4& g) { gemm_fp4_mma(g, {1, false}, PlantedLayout{plant}); });
    size_t wrong = 0;
    for (size_t i = 0; i < r.want.size(); i++) wrong += !(r.got[i] == r.want[i]);       // NaN is wrong
    if (plant == kNone) check("nothing planted: nothing found", wrong == 0 && r.guards, "%zu of %zu elements", wrong, r.want.size());
    else check(std::string("planted and caught: ") + plant_name(plant), wrong > 0, "%zu of %zu elements wrong", wrong, r.want.size());
  }
  // and one in the bytes themselves
  Rng rng(581);
  Case c{150, 70, 300};
  CaseResult r = run_case_of(c, rng, [&](GemmFp4 g) {
    std::vector<uint8_t> codes((size_t)g.M * g.lda / 2);
    to_host(codes.data(), g.a_codes, codes.size());
    for (uint8_t& x : codes) x = (uint8_t)(x >> 4 | x << 4);
    TestArray<uint8_t> swapped(codes);
    g.a_codes = swapped.p;
    gemm_fp4_mma(g);
  });
  size_t wrong = 0;
  for (size_t i = 0; i < r.want.size(); i++) wrong += !(r.got[i] == r.want[i]);
  check("planted and caught: A packed with the high nibble first", wrong > 0, "%zu of %zu elements wrong", wrong, r.want.size());
}

// ------------------------------------------------------------------------------------------------------------------------------
// The self-check and the choice of the way

inline void test_self_check() {
  const std::vector<Fp4CheckShape> shapes = {{96, 64, 128, false, false, false, false}, {64, 128, 96, true, true, false, false}, {96, 64, 128, false, false, false, false}};
  const std::string line = fp4_self_check(shapes, GemmWay::mma);
  check("the self-check passes the mma way, and counts each shape of the model once", line.find("2 shapes of the model and 6 edge tiles equal") != std::string::npos, "%s", line.c_str());
  const Fp4Ways automatic = fp4_ways(GemmWay::automatic);
  if (automatic.plain == GemmWay::cublaslt) {
    const std::string library = fp4_self_check(shapes, GemmWay::cublaslt);
    check("and cuBLASLt's", library.find("equal") != std::string::npos, "%s", library.c_str());
  } else skip("the self-check of cuBLASLt's way", "no FP4 tensor cores here");
}
// The same with every planted mistake. (One of them races, and in its own section it stays out of compute-sanitizer's way: README.)
inline void test_self_check_of_plants() {
  const Fp4CheckShape plain = {131, 75, 403, true, false, false, false}, outer = {131, 75, 403, true, true, true, false}, mx = {131, 75, 403, false, false, false, true};
  int caught = 0, named = 0;
  std::string missed;
  for (int plant = 1; plant < kPlants; plant++) {
    const Fp4CheckShape& s = plant == kMxHalf ? mx : plant == kOuterFirst || plant == kOuterLate ? outer : plant == kScaleTileOrder ? (const Fp4CheckShape&)outer : plain;
    const std::string problem = fp4_check_shape(s, [&](const GemmFp4& g) { gemm_fp4_mma(g, {1, false}, PlantedLayout{plant}); });
    caught += !problem.empty();
    named += problem.find("element (") != std::string::npos && problem.find("the exact emulation says") != std::string::npos;
    if (problem.empty()) missed += std::string("; missed: ") + plant_name(plant);
  }
  check("the self-check finds each planted mistake and names an element", caught == kPlants - 1 && named == caught, "%d of %d%s", caught, kPlants - 1, missed.c_str());
  if (kOnCpu) {
    ChildResult r = in_child([&] { fp4_self_check({{96, 64, 128, false, false, false, false}}, GemmWay::mma, [](const GemmFp4& g) { gemm_fp4_mma(g, {1, false}, PlantedLayout{kRegistersA}); }); });
    check("a mismatch stops the program with one line that names the element and offers --gemm emulated",
          r.exit_code == 1 && r.output.rfind("error: ", 0) == 0 && r.output.find("element (") != std::string::npos && r.output.find("--gemm emulated") != std::string::npos, "%s", r.output.substr(0, 300).c_str());
  }
}
inline void test_ways() {
  auto same = [](Fp4Ways w, GemmWay plain, GemmWay outer, GemmWay mx) { return w.plain == plain && w.outer == outer && w.mx == mx; };
  using W = GemmWay;
  bool ok = true;
  for (int cc : {100, 103}) ok = ok && same(fp4_ways_for(W::automatic, cc, false), W::cublaslt, W::emulated, W::emulated);
  for (int cc : {120, 121}) ok = ok && same(fp4_ways_for(W::automatic, cc, true), W::cublaslt, W::mma, W::mma) && same(fp4_ways_for(W::automatic, cc, false), W::cublaslt, W::emulated, W::emulated);
  for (int cc : {0, 80, 89, 90, 110}) ok = ok && same(fp4_ways_for(W::automatic, cc, false), W::emulated, W::emulated, W::emulated) && same(fp4_ways_for(W::mma, cc, false), W::mma, W::mma, W::mma);
  ok = ok && same(fp4_ways_for(W::emulated, 120, true), W::emulated, W::emulated, W::emulated);
  check("--gemm auto takes cuBLASLt on FP4 GPUs, our kernel there for what the library lacks, and the emulation elsewhere", ok);
  GemmFp4 g;
  alignas(16) static uint8_t bytes[16];
  g.M = 4; g.N = 12; g.K = 64; g.lda = g.ldb = 64; g.ldd = 12; g.a_codes = g.b_codes = g.a_scales = g.b_scales = bytes; g.D = bytes;
  auto refused = [&](const char* why) { return fp4_refusal(g, W::cublaslt).find(why) != std::string::npos; };
  ok = sizeof(floatX) == 4 || refused("multiples of 8");
  g.d_fp32 = true; ok = ok && fp4_refusal(g, W::cublaslt).empty() && fp4_refusal(g, W::mma).empty();
  g.mx = true; ok = ok && refused("no MXFP4") && fp4_refusal(g, W::mma).empty();
  float one = 1;
  g.mx = false; g.a_outer = g.b_outer = &one; ok = ok && refused("outer") && fp4_refusal(g, W::mma).empty();
  g.b_outer = nullptr; ok = ok && refused("one operand only");
  g.a_outer = nullptr; g.lda = 48; ok = ok && refused("multiples of 32");
  check("what a way cannot do is refused, with the reason", ok);
  if (kOnCpu) {
    GemmFp4 bad;
    bad.M = 7; bad.N = 12; bad.K = 64; bad.mx = true; bad.lda = bad.ldb = 64; bad.ldd = 12;
    ChildResult r = in_child([&] { gemm_fp4(bad, W::cublaslt); }), chip = in_child([&] { fp4_ways_for(W::cublaslt, 90, false); });
    check("a refusal is an error that names shape, types and the way out", r.exit_code == 1 && r.output.find("M 7 N 12 K 64, A and B E2M1 with E8M0 scales of 32, D ") != std::string::npos && r.output.find("--gemm emulated") != std::string::npos, "%s", r.output.c_str());
    check("--gemm cublaslt on a GPU without FP4 is an error that names the GPU's kind", chip.exit_code == 1 && chip.output.find("compute capability 9.0") != std::string::npos, "%s", chip.output.c_str());
  }
}

#ifndef CPU_BUILD
// What can be known of the library's plan without the chip: descriptor and layouts hold what we meant. No GPU is needed for this part.
inline void test_cublaslt_descriptors() {
  Mismatches m;
  alignas(16) static uint8_t bytes[4][16];
  for (bool fp32 : {false, true}) {
    GemmFp4 g;
    g.M = 1000; g.N = 768; g.K = 1000; g.lda = 1024; g.ldb = 1056; g.ldd = 776; g.d_fp32 = fp32;
    g.a_codes = bytes[0]; g.a_scales = bytes[1]; g.b_codes = bytes[2]; g.b_scales = bytes[3];
    const Fp4Plan p = fp4_descriptors(g);
    auto get = [&](cublasLtMatmulDescAttributes_t what, auto empty) {
      auto v = empty;
      size_t written = 0;
      const cublasStatus_t s = cublasLtMatmulDescGetAttribute(p.desc, what, &v, sizeof v, &written);
      m.add(s == CUBLAS_STATUS_SUCCESS && written == sizeof v, "cublasLtMatmulDescGetAttribute", (double)what, (double)s, 0);
      return v;
    };
    auto expect = [&](const char* name, cublasLtMatmulDescAttributes_t what, auto want) { const auto got = get(what, want); m.add(got == want, name, 0, (double)(intptr_t)got, (double)(intptr_t)want); };
    expect("TRANSA", CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)CUBLAS_OP_T);
    expect("TRANSB", CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)CUBLAS_OP_N);
    expect("COMPUTE_TYPE", CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, (int32_t)CUBLAS_COMPUTE_32F);
    expect("SCALE_TYPE", CUBLASLT_MATMUL_DESC_SCALE_TYPE, (int32_t)CUDA_R_32F);
    expect("POINTER_MODE", CUBLASLT_MATMUL_DESC_POINTER_MODE, (int32_t)CUBLASLT_POINTER_MODE_DEVICE);
    expect("A_SCALE_MODE", CUBLASLT_MATMUL_DESC_A_SCALE_MODE, (int32_t)1);                   // CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3
    expect("B_SCALE_MODE", CUBLASLT_MATMUL_DESC_B_SCALE_MODE, (int32_t)1);
    expect("D_SCALE_MODE", CUBLASLT_MATMUL_DESC_D_SCALE_MODE, (int32_t)CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F);
    expect("EPILOGUE", CUBLASLT_MATMUL_DESC_EPILOGUE, (int32_t)CUBLASLT_EPILOGUE_DEFAULT);
    expect("A_SCALE_POINTER", CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, (const void*)g.b_scales);   // the library's A is our B
    expect("B_SCALE_POINTER", CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, (const void*)g.a_scales);
    expect("D_SCALE_POINTER", CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, (const void*)nullptr);
    auto layout = [&](const char* name, cublasLtMatrixLayout_t l, uint32_t type, uint64_t rows, uint64_t cols, int64_t ld) {
      auto is = [&](cublasLtMatrixLayoutAttribute_t what, auto want) {
        auto got = want;
        size_t written = 0;
        memset(&got, 0x55, sizeof got);
        const cublasStatus_t s = cublasLtMatrixLayoutGetAttribute(l, what, &got, sizeof got, &written);
        m.add(s == CUBLAS_STATUS_SUCCESS && got == want, name, (double)what, (double)got, (double)want);
      };
      is(CUBLASLT_MATRIX_LAYOUT_TYPE, type);
      is(CUBLASLT_MATRIX_LAYOUT_ORDER, (int32_t)CUBLASLT_ORDER_COL);
      is(CUBLASLT_MATRIX_LAYOUT_ROWS, rows);
      is(CUBLASLT_MATRIX_LAYOUT_COLS, cols);
      is(CUBLASLT_MATRIX_LAYOUT_LD, ld);
    };
    layout("layout of A (our B)", p.a, CUDA_R_4F_E2M1, 1024, 768, 1056);                   // K is rounded up to 32
    layout("layout of B (our A)", p.b, CUDA_R_4F_E2M1, 1024, 1000, 1024);
    layout("layout of D", p.d, fp32 || sizeof(floatX) == 4 ? CUDA_R_32F : CUDA_R_16BF, 768, 1000, 776);
    for (cublasLtMatrixLayout_t l : {p.a, p.b, p.d}) cublasLtMatrixLayoutDestroy(l);
    cublasLtMatmulDescDestroy(p.desc);
  }
  m.report("cuBLASLt's descriptor and layouts for NVFP4, read back: TN, scales of 16 in UE4M3, pointers on the device, types, shapes, leading dimensions");
}
#endif

}  // namespace native

inline void test_native() {
  using namespace native;
  if (section("native: the FP4 instruction and its meaning")) {
    printf("  this machine runs %s\n", mma_fp4_is_native() ? "the instruction" : "its meaning");
    for (bool mx : {false, true}) {
      test_instruction(mx, false, kOrdinaryScales);
      if (mma_fp4_is_native()) { skip("all scales, exact and truncated", "the instruction rounds as the chip does"); continue; }
      test_instruction(mx, false, kAllScales);
      test_instruction(mx, true, kAllScales);
    }
    test_nan_scale();
  }
  if (section("native: the FP4 GEMM against exact integers")) {
    test_gemm_cases("NVFP4: odd sizes, wide rows, both outputs, alpha, accumulate", false, false);
    test_gemm_cases("NVFP4 with FP32 scales of 1x128", true, false);
    test_gemm_cases("MXFP4", false, true);
    test_parts();
    test_versions();
    test_truncation();
    test_against_emulation();
  }
  if (section("mistakes planted in the FP4 GEMM")) { test_plants(); test_self_check_of_plants(); }
  if (section("native: the self-check and the ways")) {
    test_self_check();
    test_ways();
#ifdef CPU_BUILD
    skip("cuBLASLt's descriptors", "built without CUDA");
#else
    test_cublaslt_descriptors();
#endif
  }
}
