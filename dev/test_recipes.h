// dev/test_recipes.h -- every recipe of kernels/recipe.cuh: its quantizers bit for bit against dev/reference_recipes.h, the golden vectors and the
// published errors, what unbiased means, its linear layer against the oracle's, and a whole tiny model. Included after test_model.h.
#pragma once
#include <string>
#include <vector>
#include "../kernels/linear.cuh"
#include "../kernels/oscillation.cuh"
#include "../kernels/quantize.cuh"
#include "quantize_simple.cuh"
#include "reference_recipes.h"
#include "test_formats.h"
#include "test_quantize.h"

// ------------------------------------------------------------------------------------------------------------------------------
// An operand from the kernel and from the oracle, in one form

// "nvfp4 rounding=stochastic rht=16 signs=fresh": a format and words that differ from the defaults.
inline OperandRecipe operand_of(const std::string& text) {
  OperandRecipe o;
  std::stringstream in("format=" + text);
  for (std::string word; in >> word;) {
    std::string allowed;
    const size_t eq = word.find('=');
    if (!operand_set(o, word.substr(0, eq), word.substr(eq + 1), &allowed) || !allowed.empty()) die("test: '%s' is no operand", text.c_str());
  }
  return o;
}
inline reference::Quantizer oracle_quantizer(const OperandRecipe& o, const QuantizeHow& how) {
  using reference::Kind; using reference::Round; using reference::Scale;
  reference::Quantizer q;
  switch (o.format) {
    case Format::nvfp4: q.kind = Kind::nvfp4; break;
    case Format::mxfp4: q.kind = Kind::mxfp4; break;
    case Format::fp4_vector: q.kind = Kind::vector; break;
    case Format::fp8_e4m3: q.kind = Kind::e4m3; break;
    case Format::fp8_e5m2: q.kind = Kind::e5m2; break;
    case Format::mxfp8: q.kind = Kind::mxfp8; break;
    case Format::bf16: case Format::exact: q.kind = Kind::exact;
  }
  switch (o.rounding) {
    case Rounding::nearest: q.round = Round::nearest; break;
    case Rounding::stochastic: q.round = Round::stochastic; break;
    case Rounding::eden16: q.round = Round::eden16; break;
    case Rounding::eden128: q.round = Round::eden128;
  }
  switch (o.scale) {
    case ScaleRule::standard: q.scale = Scale::standard; break;
    case ScaleRule::ceil: q.scale = Scale::up; break;
    case ScaleRule::headroom: q.scale = Scale::headroom; break;
    case ScaleRule::four_six: q.scale = Scale::four_six; break;
    case ScaleRule::ocp: q.scale = Scale::ocp; break;
    case ScaleRule::quest_floor: q.scale = Scale::quest_floor; break;
    case ScaleRule::quest_nearest: q.scale = Scale::quest_nearest; break;
    case ScaleRule::range34: q.scale = Scale::range34; break;
    case ScaleRule::post_hoc: q.scale = Scale::post_hoc;
  }
  q.tile16 = o.format == Format::nvfp4 && o.blocks == Blocks::b16x16;
  q.outer128 = o.format == Format::nvfp4 && o.outer == Outer::b1x128;
  q.rht = o.format == Format::bf16 ? 0 : o.rht;
  q.rotated_to_bf16 = o.format == Format::nvfp4 && o.rht == 16 && o.signs == Signs::fixed;       // NVIDIA's transform
  if (o.signs != Signs::none) q.signs = {how.sign_bits[0], how.sign_bits[1]};
  q.transpose = how.transpose;
  q.seed = how.key.seed; q.step = how.key.step; q.stream = how.key.stream;
  return q;
}

// All that an operand holds, as on the device; an empty array: this format has none of it.
struct OperandBytes {
  int rows = 0, ld = 0;
  std::vector<uint8_t> codes, scales;
  std::vector<float> values, outer;
  std::vector<uint32_t> mask;
  double tensor = 1;                          // what alpha takes
  bool guards = true;
};
inline bool has_codes(const OperandRecipe& o) { return o.format != Format::exact && o.format != Format::bf16; }
inline bool is_quest(const OperandRecipe& o) {
  return o.format == Format::mxfp4 && (o.scale == ScaleRule::quest_floor || o.scale == ScaleRule::quest_nearest);
}

// Device buffers of an operand, and the operand that points to them.
struct OperandOnDevice {
  PackedBytes bytes;
  TestArray<uint8_t> codes, scales;
  TestArray<floatX> values;
  TestArray<float> outer, amax;
  TestArray<uint32_t> mask, groups;
  Operand4 out;
  static int wide(const OperandRecipe& o, int cols) { return rotated_cols(cols, o.rht); }
  OperandOnDevice(const OperandRecipe& o, int rows, int cols, bool packed = true, bool with_values = true)
      : bytes(packed_bytes(o, rows, cols, is_quest(o))), codes(bytes.codes), scales(bytes.scales), values((size_t)rows * operand_ld(wide(o, cols))),
          outer(bytes.outer / 4), amax(1),
        mask(bytes.mask / 4), groups(group_words(rows, wide(o, cols))) {
    out.rows = rows; out.cols = cols; out.ld = operand_ld(cols, o.rht);
    if (packed && has_codes(o)) { out.codes = codes.p; if (bytes.scales) out.scales = scales.p; if (bytes.outer) out.outer = outer.p;
        if (bytes.mask) out.mask = mask.p; }
    if (with_values) out.values = values.p;
    out.amax = amax.p;
  }
  bool guards() const {
    return codes.guard_intact() && scales.guard_intact() && values.guard_intact() && outer.guard_intact() && amax.guard_intact() &&
        mask.guard_intact() && groups.guard_intact();
  }
  double tensor(const OperandRecipe& o) {
    TestArray<float> alpha(1);
    gemm_alpha(alpha.p, amax_for_alpha(out, o), (const float*)nullptr, o);
    return alpha.host()[0];
  }
  OperandBytes read(const OperandRecipe& o) {
    OperandBytes b;
    b.rows = out.rows; b.ld = out.ld;
    b.codes = codes.host(); b.scales = scales.host(); b.outer = outer.host(); b.mask = mask.host();
    for (floatX v : values.host()) b.values.push_back(to_float(v));
    b.tensor = tensor(o);
    b.guards = guards();
    return b;
  }
};
template <class T> OperandBytes kernel_operand(const std::vector<float>& x, int src_rows, int src_cols, const OperandRecipe& o, QuantizeHow how,
    bool packed = true, bool values = true) {
  how.recipe = o;
  OperandOnDevice d(o, how.transpose ? src_cols : src_rows, how.transpose ? src_rows : src_cols, packed, values);
  TestArray<T> source(narrow<T>(widen(x)));
  quantize(d.out, (const T*)source.p, how, d.groups.p);
  OperandBytes b = d.read(o);
  b.guards = b.guards && source.guard_intact();
  return b;
}
// Scale bytes in the 128x4 layout, by the oracle's enumeration.
inline std::vector<uint8_t> tiled(const std::vector<uint8_t>& scales, int rows, int blocks) {
  std::vector<uint8_t> bytes;
  for (reference::ScaleEntry e : reference::scale_layout_128x4(rows, blocks)) bytes.push_back(e.row < rows && e.block < blocks
      ? scales[(size_t)e.row * blocks + e.block] : 0);
  return bytes;
}
inline OperandBytes oracle_operand(const std::vector<float>& x, int src_rows, int src_cols, const OperandRecipe& o, const QuantizeHow& how,
    reference::Quantized* exact = nullptr) {
  const reference::Quantizer quantizer = oracle_quantizer(o, how);
  const reference::Quantized q = reference::quantize(x, src_rows, src_cols, quantizer);
  OperandBytes b;
  b.rows = q.rows;
  b.ld = (q.width + 31) / 32 * 32;
  const bool eight_bits = o.format == Format::fp8_e4m3 || o.format == Format::fp8_e5m2 || o.format == Format::mxfp8;
  const size_t n = (size_t)b.rows * b.ld;
  if (has_codes(o)) b.codes.assign(eight_bits ? n : n / 2, 0);
  if (is_quest(o)) b.mask.assign(n / 32, 0);
  b.values.assign(n, 0.f);
  for (int r = 0; r < q.rows; r++)
    for (int c = 0; c < b.ld; c++) {
      const size_t at = (size_t)r * b.ld + c, i = (size_t)r * q.width + c;
      if (c >= q.width) { if (is_quest(o)) b.mask[at / 32] |= 1u << (c % 32); continue; }
      if (eight_bits) b.codes[at] = q.codes[i];
      else if (has_codes(o)) b.codes[at / 2] |= (uint8_t)(q.codes[i] << (c % 2 ? 4 : 0));
      if (is_quest(o) && q.mask[i]) b.mask[at / 32] |= 1u << (c % 32);
      b.values[at] = sizeof(floatX) == 2 ? reference::round_bf16((float)q.stored[i]) : (float)q.stored[i];
    }
  if (q.block) b.scales = tiled(q.scales, q.rows, (int)(q.scales.size() / q.rows));
  b.outer = q.outer;
  b.tensor = q.tensor;
  if (exact) *exact = q;
  return b;
}
// tensor * code * scale [rows, ld]
inline reference::Array operand_values(const OperandBytes& b) {
  reference::Array v(b.values.begin(), b.values.end());
  for (double& x : v) x *= b.tensor;
  return v;
}
inline bool has_non_finite(const OperandBytes& b) {
  for (float v : b.values) if (!std::isfinite(v * b.tensor)) return true;
  return false;
}

// ------------------------------------------------------------------------------------------------------------------------------
// Formats: the new conversions

enum RecipeFormatFunction { kE4m3Up, kE4m3Sr, kE4m3EdenSr, kE5m2Encode, kE5m2Decode, kE8m0Nearest };
__host__ __device__ inline uint32_t recipe_format_function(int which, float x, float u) {
  switch (which) {
    case kE4m3Up: return e4m3_encode_ceil(x);
    case kE4m3Sr: return e4m3_encode_sr(x, u);
    case kE4m3EdenSr: return e4m3_encode(eden_scale(x, 0xabcd0000u | (uint32_t)(u * 65536)));
    case kE5m2Encode: return e5m2_encode(x);
    case kE8m0Nearest: return e8m0_encode_nearest(x);
  }
  return float_bits(e5m2_decode((uint8_t)x));
}
__global__ void recipe_format_kernel(uint32_t* out, const float* x, const float* u, int n, int which) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = recipe_format_function(which, x[i], u[i]);
}
template <class Expected> void check_recipe_format(const std::string& sentence, int which, const std::vector<float>& x, std::vector<float> u,
    Expected expected) {
  u.resize(x.size(), 0.f);
  TestArray<float> dx(x), du(u);
  TestArray<uint32_t> out(x.size());
  launch(recipe_format_kernel, dim3(ceil_div((int)x.size(), 256)), dim3(256), 0, out.p, (const float*)dx.p, (const float*)du.p, (int)x.size(), which);
  const std::vector<uint32_t> device = out.host();
  Mismatches m;
  for (size_t i = 0; i < x.size(); i++) {
    const uint32_t want = expected(x[i], u[i]), host = recipe_format_function(which, x[i], u[i]);
    m.add(device[i] == want, "device", x[i], device[i], want);
    m.add(host == want, "host", x[i], host, want);
  }
  m.report(sentence);
}

inline void test_recipe_conversions() {
  using namespace reference;
  std::vector<float> all = difficult_floats(), positive, none, codes, pairs, u;
  for (int i = 0; i < 123; i++)                                            // the E5M2 table, its midpoints, one ulp around both
    for (double p : {e5m2_value((uint8_t)i), (e5m2_value((uint8_t)i) + e5m2_value((uint8_t)(i + 1))) / 2})
      for (int ulp = -1; ulp <= 1; ulp++)
        for (float sign : {1.f, -1.f}) all.push_back(sign * bits_float(float_bits((float)p) + (p == 0 && ulp < 0 ? 0 : ulp)));
  for (float x : all) if (!(x < 0)) positive.push_back(std::fabs(x));
  for (int e = -149; e < 128; e++)                                         // where the nearest power of two steps: 2^(e + 1/2)
    for (int ulp = -2; ulp <= 2; ulp++) positive.push_back(bits_float((uint32_t)std::max(0,
        (int)float_bits((float)std::ldexp(std::sqrt(2.), e)) + ulp)));
  std::vector<float> normal;                                               // QuEST's scale is at least 1e-8: denormals do not matter
  for (float x : positive) if (!(x < 0x1p-126f)) normal.push_back(x);
  for (int c = 0; c < 256; c++) codes.push_back((float)c);
  check_recipe_format("E4M3 rounded up: the smallest value that is not below, 448 at most", kE4m3Up, positive, none,
      [](float x, float) { return e4m3_up(x); });
  check_recipe_format("E5M2: encode is nearest even with subnormals, saturating at 57344", kE5m2Encode, all, none,
      [](float x, float) { return e5m2_rn(x); });
  Mismatches decode;
  for (int c = 0; c < 256; c++) decode.add(same_float(e5m2_decode((uint8_t)c), (float)e5m2_value((uint8_t)c)), "byte", c, e5m2_decode((uint8_t)c),
      e5m2_value((uint8_t)c));
  decode.report("E5M2: all 256 bytes decode");
  check_recipe_format("E8M0: the power of two whose exponent is nearest to log2", kE8m0Nearest, normal, none, [](float x, float) -> uint32_t {
    if (x != x) return 255;
    if (std::isinf(x)) return 254;
    const int e = floor_log2(x);
    return e8m0_byte(e + (x * std::ldexp(1., -e) >= std::sqrt(2.)));
  });
  // E4M3 stochastic: every pair of neighbours, subnormals and binade edges among them, at 17 fractions and 64 random numbers each, and
  // within one ulp of the threshold.
  for (int i = 0; i < 126; i++)
    for (int part = 0; part <= 16; part++)
      for (int r = 0; r < 64; r++) {
        const double lo = e4m3_value((uint8_t)i), step = e4m3_value((uint8_t)(i + 1)) - lo, random = (2. * (r * 1024 + 37 * i % 1024) + 1) / 131072;
        if (part < 16) pairs.push_back((float)(lo + step * part / 16));
        else pairs.push_back(bits_float(float_bits((float)(lo + step * random)) + r % 3 - 1));
        u.push_back((float)random);
      }
  for (float special : {448.f, 449.f, 1e30f, INFINITY, NAN}) { pairs.push_back(special); u.push_back(1 / 131072.f); }
  check_recipe_format("E4M3 stochastic: hi where u < (x-lo)/(hi-lo), for all pairs of neighbours", kE4m3Sr, pairs, u,
      [](float x, float r) { return e4m3_sr(x, r); });
  check_recipe_format("E4M3 stochastic, as MS-EDEN rounds its scales: the same", kE4m3EdenSr, pairs, u, [](float x, float r) { return e4m3_sr(x, r); });
  // Over all 65536 random numbers the mean is exact up to the half step of u.
  double worst = 0;
  for (int i = 0; i < 126; i++) {
    const double lo = e4m3_value((uint8_t)i), step = e4m3_value((uint8_t)(i + 1)) - lo;
    const float x = (float)(lo + step * (.03 + .94 * i / 125));
    int ups = 0, others = 0;
    for (int r = 0; r < 65536; r += 1) {
      const uint8_t got = e4m3_encode_sr(x, (2 * r + 1) / 131072.f);
      ups += got == i + 1;
      others += got != i && got != i + 1;
    }
    const double off = others ? INFINITY : std::fabs(ups / 65536. - (x - lo) / step) * 65536;
    worst = off <= worst ? worst : off;
  }
  check("E4M3 stochastic: between every pair of neighbours the mean over all 65536 random numbers is the value itself", worst <= .5,
      "off by at most %.3f of 1/65536 step", worst);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Bit equality

inline QuantizeHow random_key(Rng& rng, bool transpose) {
  QuantizeHow how;
  how.transpose = transpose;
  how.sign_bits[0] = rng.next();
  how.sign_bits[1] = rng.next();
  how.key = {rng.next(), (uint32_t)rng.below(1 << 30), (uint32_t)(rng.next() >> 32)};
  return how;
}
inline void compare_operands(Mismatches& m, const OperandBytes& got, const OperandBytes& want, const std::string& where) {
  auto all = [&](const char* name, const auto& a, const auto& b) {
    const std::string what = where + " " + name;
    m.add(a.size() == b.size(), (what + " size").c_str(), 0, (double)a.size(), (double)b.size());
    for (size_t i = 0; i < b.size() && a.size() == b.size(); i++)
      if (memcmp(&a[i], &b[i], sizeof a[i])) m.add(false, what.c_str(), (double)i, a[i], b[i]);
    m.total += b.size();
  };
  m.add(got.guards, (where + " guard overwritten").c_str(), 0, 0, 0);
  m.add(got.ld == want.ld, (where + " ld").c_str(), 0, got.ld, want.ld);
  all("codes", got.codes, want.codes);
  all("scales", got.scales, want.scales);
  all("outer", got.outer, want.outer);
  all("mask", got.mask, want.mask);
  all("values", got.values, want.values);
  m.add((float)got.tensor == (float)want.tensor, (where + " tensor scale").c_str(), 0, got.tensor, want.tensor);
}
template <class T> void compare_one(Mismatches& m, Mismatches& lost, const std::string& text, int kind, int rows, int cols, Rng& rng,
    bool transpose) {
  const OperandRecipe o = operand_of(text);
  const QuantizeHow how = random_key(rng, transpose);
  const std::vector<float> x = as_stored<T>(quantizer_data(kind, rows, cols, rng.next()));
  const std::string where = text + ", " + std::to_string(rows) + "x" + std::to_string(cols) + (transpose ? "^T " : " ") + data_kind_name(kind);
  const OperandBytes got = kernel_operand<T>(x, rows, cols, o, how);
  reference::Quantized exact;
  const OperandBytes want = oracle_operand(x, rows, cols, o, how, &exact);
  bool finite = true;                         // a rotation of huge values may overflow, and so may the squares of QuEST
  for (float v : exact.input) finite = finite && std::isfinite(v);
  for (double v : exact.stored) finite = finite && v == v;
  if (finite) compare_operands(m, got, want, where);
  else lost.add(got.guards && has_non_finite(got), where.c_str(), 0, 0, 1);
}

inline std::vector<std::string> operand_texts() {
  return {
    "nvfp4 scale=four_six", "nvfp4 scale=four_six blocks=16x16", "nvfp4 scale=four_six blocks=16x16 rht=16 signs=fixed", "nvfp4 scale=ceil",
    "nvfp4 scale=ceil rounding=stochastic", "nvfp4 scale=headroom rounding=stochastic", "nvfp4 scale=ceil blocks=16x16",
    "nvfp4 rounding=stochastic rht=16 signs=fresh", "nvfp4 rht=64 signs=fixed", "nvfp4 rht=128 signs=none", "nvfp4 scale=four_six rht=32 signs=fresh",
    "nvfp4 scale=four_six rounding=stochastic rht=16 signs=fresh",
    "nvfp4 outer=1x128", "nvfp4 outer=1x128 scale=four_six", "nvfp4 outer=1x128 scale=ceil",
    "nvfp4 outer=1x128 rounding=stochastic rht=16 signs=fresh", "nvfp4 outer=1x128 rht=16 signs=fixed", "nvfp4 outer=1x128 rounding=stochastic rht=16 signs=fixed",
    "nvfp4 outer=1x128 scale=four_six rht=16 signs=fresh", "nvfp4 outer=1x128 scale=four_six rounding=stochastic rht=16 signs=fresh", "nvfp4 outer=1x128 scale=ceil rounding=stochastic rht=128 signs=fresh",
    "nvfp4 rounding=eden16", "nvfp4 rounding=eden128", "nvfp4 rounding=eden16 rht=128 signs=fresh", "nvfp4 rounding=eden128 rht=128 signs=fresh",
    "nvfp4 rounding=eden16 rht=16 signs=fresh",
    "nvfp4 rounding=eden16 scale=post_hoc", "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh", "nvfp4 rounding=eden128 scale=post_hoc rht=128 signs=fresh",
    "nvfp4 rounding=eden16 scale=post_hoc rht=16 signs=fixed", "nvfp4 rounding=eden16 scale=post_hoc rht=64 signs=fresh",
    "mxfp4 scale=ocp", "mxfp4 scale=ceil", "mxfp4 scale=ceil rounding=stochastic", "mxfp4 scale=ocp rounding=stochastic rht=16 signs=fixed",
    "mxfp4 scale=quest_floor rht=32 signs=none",
    "mxfp4 scale=quest_nearest rht=32 signs=none", "mxfp4 scale=quest_nearest", "mxfp4 scale=range34 rounding=stochastic rht=32 signs=fresh",
    "mxfp4 scale=range34 rht=64 signs=fresh", "mxfp4 scale=range34",
    "fp4_vector", "fp4_vector rounding=stochastic rht=32 signs=fresh", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3 rht=16 signs=fresh", "mxfp8",
    "mxfp8 rht=128 signs=fixed",
    "exact rht=16 signs=fixed", "exact rht=32 signs=none", "exact rht=64 signs=fresh", "exact rht=128 signs=fresh", "exact"};
}
inline void test_recipe_bit_equality() {
  const int sizes[][2] = {{1, 1}, {3, 16}, {17, 33}, {5, 130}, {129, 64}, {40, 257}, {33, 384}};
  Mismatches lost;
  std::string group;
  Mismatches m;
  size_t options = 0;
  auto finish = [&] {
    if (!group.empty()) m.report(group + ": bit-equal codes, scales, values, padding under " + std::to_string(options) + " sets of options");
    m = Mismatches();
    options = 0;
  };
  Rng rng(101);
  for (const std::string& text : operand_texts()) {
    const std::string format = text.substr(0, text.find(' '));
    if (format != group) { finish(); group = format; }
    options++;
    int turn = 0;
    for (auto& size : sizes)
      for (int kind = 0; kind < kDataKinds; kind++) {
        if (kind > kHeavyTail && size[0] * size[1] > 1000) continue;
        if (kind == kHuge && text == "mxfp4 scale=range34") continue;         // 3x is infinite above 1.1e38
        const bool transpose = turn++ % 2;
        const int rows = transpose ? size[1] : size[0], cols = transpose ? size[0] : size[1];
        if (turn % 3 == 0) compare_one<float>(m, lost, text, kind, rows, cols, rng, transpose);
        else compare_one<bf16>(m, lost, text, kind, rows, cols, rng, transpose);
      }
  }
  finish();
  lost.report("an infinity or a NaN anywhere shows in the values or in alpha, in every format");
}

// Packed only, values only, both: the same. Decoded from the packed form: the oracle's values in FP32, exactly.
inline void test_packed_and_values() {
  Mismatches partial, decoded, again;
  Rng rng(102);
  for (const std::string& text : operand_texts()) {
    const OperandRecipe o = operand_of(text);
    const int rows = 19, cols = 150;
    const std::vector<float> x = random_matrix(rows, cols, 103);
    const QuantizeHow how = random_key(rng, false);
    reference::Quantized exact;
    const OperandBytes want = oracle_operand(x, rows, cols, o, how, &exact), values = kernel_operand<bf16>(x, rows, cols, o, how, false, true);
    std::vector<float> expected = want.values;
    if (is_post_hoc(o)) for (float& v : expected) v = (float)(v * want.tensor);       // without a packed form the scale of the tensor is in the values
    partial.add(values.values == expected && values.guards, text.c_str(), 0, 0, 0);
    if (!has_codes(o)) continue;
    const OperandBytes packed = kernel_operand<bf16>(x, rows, cols, o, how, true, false);
    partial.add(packed.codes == want.codes && packed.scales == want.scales && packed.outer == want.outer && packed.mask == want.mask && packed.guards,
        text.c_str(), 1, 0, 0);

    QuantizeHow full = how;
    full.recipe = o;
    const int width = rotated_cols(cols, o.rht);
    OperandOnDevice d(o, rows, cols, true, false);
    TestArray<bf16> source(narrow<bf16>(widen(x)));
    quantize(d.out, (const bf16*)source.p, full, d.groups.p);
    TestArray<float> out((size_t)rows * width);
    d.out.cols = width;
    dequantize(out.p, d.out, o);
    const std::vector<float> got = out.host();
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < width; c++) {
        const float expected = (float)exact.value((size_t)r * exact.width + c), g = got[(size_t)r * width + c];
        // range34's factor 1/3 is rounded once more
        const bool same = o.scale == ScaleRule::range34 && o.format == Format::mxfp4 ? std::fabs(g - expected) <= std::fabs(expected) * 0x1p-23f
            : g == expected;
        decoded.add(same, text.c_str(), c, g, expected);
      }
    decoded.add(out.guard_intact(), "guard", 0, 0, 0);
  }
  partial.report("packed only and values only give what both together give, in every format");
  decoded.report("decoded from codes, scales and outer scales alone, every format gives the oracle's values");
}

// dev/quantize_simple.cuh, a thread a block, is what the fast kernels compute.
inline void test_simple_quantizer() {
  Mismatches m;
  Rng rng(176);
  for (const char* text : {"nvfp4", "nvfp4 rounding=stochastic", "nvfp4 rht=16", "nvfp4 rounding=stochastic rht=16"})
    for (bool transpose : {false, true})
      for (auto [src_rows, src_cols] : {std::pair(37, 300), std::pair(256, 192)}) {
        const OperandRecipe o = operand_of(text);
        TestArray<bf16> x(narrow<bf16>(widen(as_stored<bf16>(quantizer_data(kHeavyTail, src_rows, src_cols, 177)))));
        QuantizeHow how = random_key(rng, transpose);
        how.recipe = o;
        OperandOnDevice fast(o, transpose ? src_cols : src_rows, transpose ? src_rows : src_cols, false, true), simple(o, fast.out.rows, fast.out.cols, false, true);
        quantize(fast.out, (const bf16*)x.p, how, fast.groups.p);
        quantize_simple(simple.out, x.p, how);
        const std::vector<floatX> a = fast.values.host(), b = simple.values.host();
        for (int r = 0; r < fast.out.rows; r++)
          for (int c = 0; c < round_up(fast.out.cols, 16); c++) {
            const size_t i = (size_t)r * fast.out.ld + c;
            m.add(memcmp(&a[i], &b[i], sizeof a[i]) == 0, text, (double)i, to_float(b[i]), to_float(a[i]));
          }
        m.add(fast.amax.host()[0] == simple.amax.host()[0] && simple.guards(), text, -1, simple.amax.host()[0], fast.amax.host()[0]);
      }
  m.report("the simple quantizer of dev/ gives the bits of the fast one");
}

#ifdef CPU_BUILD                                              // a GPU build has no use for the CPU's form, and it is long to compile
// On a GPU a warp shares a strip of 16x128 out among its lanes, on the CPU a thread has it alone: the same bits from both forms of every kernel, also
// from a packed source; and amax_of_both() finds what quantize() finds in two readings.
template <bool kWarp> OperandBytes strip_form(const bf16* x, const Operand4* from, const OperandRecipe& from_how, const OperandRecipe& o, const QuantizeHow& how, int rows, int cols) {
  OperandOnDevice d(o, rows, cols);
  if (from) quantize<kWarp>(d.out, *from, from_how, how, d.groups.p);
  else quantize<kWarp>(d.out, x, how, d.groups.p);
  return d.read(o);
}
inline void test_strip_forms() {
  Mismatches m, amax;
  Rng rng(173);
  for (const char* text : {"nvfp4", "nvfp4 blocks=16x16", "nvfp4 rounding=stochastic", "nvfp4 rht=16", "nvfp4 rounding=stochastic rht=16", "nvfp4 blocks=16x16 scale=four_six", "nvfp4 outer=1x128 rounding=stochastic rht=64 signs=fresh", "nvfp4 rounding=eden16 rht=128 signs=fresh",
                           "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh", "nvfp4 rounding=eden128 scale=post_hoc rht=32 signs=fresh", "nvfp4 rounding=eden128 rht=32 signs=fresh", "nvfp4 scale=four_six", "mxfp4 scale=quest_nearest rht=32 signs=none", "mxfp4 scale=range34 rounding=stochastic rht=128 signs=fresh",
                           "mxfp4 scale=ceil rht=16 signs=fresh", "mxfp8", "fp8_e5m2", "fp4_vector rht=16", "exact rht=64 signs=fresh"})
    for (bool transpose : {false, true})
      for (auto [src_rows, src_cols] : {std::pair(37, 300), std::pair(150, 66), std::pair(300, 136), std::pair(33, 520)}) {
        const OperandRecipe o = operand_of(text), from_how = operand_of("nvfp4 outer=1x128");
        TestArray<bf16> x(narrow<bf16>(widen(as_stored<bf16>(quantizer_data(kHeavyTail, src_rows, src_cols, 174)))));
        QuantizeHow how = random_key(rng, transpose);
        how.recipe = o;
        if (o.signs == Signs::fixed) how.sign_bits[0] = kFixedSigns;                       // as the kernels expect that know their recipe
        OperandOnDevice packed(from_how, src_rows, src_cols, true, false);
        QuantizeHow plain;
        plain.recipe = from_how;
        quantize(packed.out, (const bf16*)x.p, plain, packed.groups.p);
        const int rows = transpose ? src_cols : src_rows, cols = transpose ? src_rows : src_cols;
        for (bool doubled : {false, true}) {
          if (doubled && !transpose) continue;
          const Operand4* from = doubled ? &packed.out : nullptr;
          const OperandBytes a = strip_form<true>(x.p, from, from_how, o, how, rows, cols), b = strip_form<false>(x.p, from, from_how, o, how, rows, cols);
          const std::string where = std::string(text) + (transpose ? ", transposed" : "") + (doubled ? ", from a packed operand" : "");
          auto all = [&](const auto& p, const auto& q) { for (size_t i = 0; i < p.size(); i++) m.add(memcmp(&p[i], &q[i], sizeof p[i]) == 0, where.c_str(), (double)i, p[i], q[i]); };
          all(a.codes, b.codes); all(a.scales, b.scales); all(a.outer, b.outer); all(a.mask, b.mask); all(a.values, b.values);
          m.add(a.tensor == b.tensor && a.guards && b.guards, where.c_str(), -1, a.tensor, b.tensor);
        }
        if (!transpose || o.rht == 0 || !needs_amax(o) || o.format == Format::fp4_vector) continue;
        // The largest element somewhere, also in the last row and column: the plain maximum is known, the rotated one is what quantize() finds by itself
        // (which is compared with the oracle elsewhere).
        for (int trial = 0; trial < 24; trial++) {
          std::vector<float> spiked = random_matrix(src_rows, src_cols, 178 + trial);
          const size_t where = trial == 0 ? spiked.size() - 1 : trial == 1 ? 0 : (size_t)rng.below(spiked.size());
          spiked[where] = trial % 2 ? -50.f : 50.f;
          TestArray<bf16> y(narrow<bf16>(widen(as_stored<bf16>(spiked))));
          TestArray<float> both(2);
          if (trial % 3) amax_of_both<true>(both.p, both.p + 1, (const bf16*)y.p, src_rows, src_cols, how);
          else amax_of_both<false>(both.p, both.p + 1, (const bf16*)y.p, src_rows, src_cols, how);
          OperandOnDevice own(o, rows, cols);
          quantize(own.out, (const bf16*)y.p, how, own.groups.p);
          amax.add(both.host()[0] == 50, text, (double)where, both.host()[0], 50);
          amax.add(both.host()[1] == own.amax.host()[0], text, (double)where, both.host()[1], own.amax.host()[0]);
        }
      }
  m.report("a warp a strip and a thread a strip give the same bits, in every format, from a packed operand too");
  amax.report("amax of a tensor and of its rotated transpose in one reading");
}
#else
inline void test_strip_forms() { skip("a warp a strip and a thread a strip give the same bits", "the CPU's build compares them"); }
#endif

// The searches for a maximum rotate in an order of their own, and leave out what a maximum does not need: against the rotation as it is defined, every
// sum rounded, on the host. Values over 2^40, so that another order of the sums gives other bits; infinities that meet in the last sum, or in another;
// sums that overflow; a NaN; nothing but -0.
inline float rotated_maximum(const std::vector<float>& x, int rows, int cols, bool transpose, const OperandRecipe& o, const QuantizeHow& how) {
  const int lines = transpose ? cols : rows, length = transpose ? rows : cols, n = o.rht;
  float m = 0, nan = 0;
  std::vector<float> v(max(n, 1));
  for (int line = 0; line < lines; line++) for (int first = 0; first < length; first += (int)v.size()) {
    for (int i = 0; i < (int)v.size(); i++) {
      const int at = first + i;
      v[i] = at >= length ? 0 : transpose ? x[(size_t)at * cols + line] : x[(size_t)line * cols + at];
      if (n && how.sign_bits[i / 64] >> i % 64 & 1) v[i] = -v[i];
    }
    for (int distance = 1; distance < n; distance *= 2)
      for (int i = 0; i < n; i++) if (!(i & distance)) { const float a = v[i], b = v[i + distance]; v[i] = a + b; v[i + distance] = a - b; }
    for (float e : v) if (e != e) nan = NAN; else m = fmaxf(m, fabsf(e));
  }
  m = (m + nan) * (n == 0 ? 1 : n == 16 ? 0.25f : 0.08838834764831845f);
  return rounds_rotated(o) ? to_float(to_bf16(m)) : m;
}
inline void test_rotated_maxima() {
  Mismatches m, one;
  Rng rng(187);
  const OperandRecipe none = operand_of("nvfp4"), fixed16 = operand_of("nvfp4 rht=16 signs=fixed"), fresh16 = operand_of("nvfp4 rht=16 signs=fresh"),
                      eden = operand_of("nvfp4 rounding=eden16 rht=128 signs=fresh"), from_how = operand_of("nvfp4 outer=1x128");
  int infinite = 0, nans = 0;
  for (const auto& [row, column] : {std::pair(none, fixed16), std::pair(none, fresh16), std::pair(eden, eden)})
    for (auto [rows, cols] : {std::pair(150, 72), std::pair(37, 304), std::pair(129, 136), std::pair(379, 128)})
      for (int trial = 0; trial < 14; trial++) {
#ifdef CUDA_ON_CPU_ASAN
        if (rows > 150) break;                                 // slow there
#endif
        std::vector<float> x = random_matrix(rows, cols, 188 + trial);
        for (float& e : x) e = trial == 13 ? -0.0f : ldexpf(e, trial == 12 ? 126 : (int)rng.below(40) - 20);
        const int height = rows, width = cols, r = (int)rng.below(rows), c = (int)rng.below(cols), last = column.rht / 2;
        auto at = [&](int i, int j) -> float& { return x[(size_t)(i < height ? i : r) * width + (j < width ? j : c)]; };
        if (trial == 7) at(r, c) = NAN;
        if (trial >= 8 && trial <= 11) at(r, c) = INFINITY;
        if (trial == 9) at(r ^ last, c) = at(r, c ^ last) = INFINITY;
        if (trial == 10) at(r ^ 1, c) = at(r, c ^ 2) = -INFINITY;
        if (trial == 11) at((int)rng.below(rows), (int)rng.below(cols)) = -INFINITY;
        std::vector<bf16> stored;
        for (float& e : x) { stored.push_back(to_bf16(e)); e = to_float(stored.back()); }
        TestArray<bf16> y(stored);
        TestArray<float> both(2);
        QuantizeHow how = random_key(rng, false), turned = random_key(rng, true);
        how.recipe = row;
        turned.recipe = column;
        if (column.signs == Signs::fixed) turned.sign_bits[0] = kTestSigns;
        const float by_rows = rotated_maximum(x, rows, cols, false, row, how), by_columns = rotated_maximum(x, rows, cols, true, column, turned);
        char where[64];
        snprintf(where, sizeof where, "rht %d, %d x %d, trial %d", column.rht, rows, cols, trial);
        amax_of_both<true>(both.p, both.p + 1, (const bf16*)y.p, rows, cols, how, turned);
        m.add(same_float(both.host()[0], by_rows), where, 0, both.host()[0], by_rows);
        m.add(same_float(both.host()[1], by_columns), where, 1, both.host()[1], by_columns);
        infinite += by_columns > FLT_MAX;
        nans += by_columns != by_columns;
        // each copy's own search, and from a packed operand
        const BlockHow straight = block_how(how), crossed = block_how(turned);
        const Matrix<bf16> source = {y.p, rows, cols};
        if (row.rht) device_zero(both.p, 1);
        device_zero(both.p + 1, 1);
        if (row.rht) launch_amax<false, true>(nullptr, both.p, nullptr, source, rows, round_up(cols, row.rht), straight);
        launch_amax<true, true>(nullptr, both.p + 1, nullptr, source, cols, round_up(rows, column.rht), crossed);
        one.add(same_float(both.host()[0], by_rows), where, 0, both.host()[0], by_rows);
        one.add(same_float(both.host()[1], by_columns), where, 1, both.host()[1], by_columns);
        OperandOnDevice packed(from_how, rows, cols, true, false);
        QuantizeHow plain;
        plain.recipe = from_how;
        quantize(packed.out, (const bf16*)y.p, plain, packed.groups.p);
        TestArray<float> values((size_t)rows * cols);
        dequantize(values.p, packed.out, from_how);
        device_zero(both.p + 1, 1);
        launch_amax<true, true>(nullptr, both.p + 1, nullptr, Packed{packed.out, from_how}, cols, round_up(rows, column.rht), crossed);
        const float doubled = rotated_maximum(values.host(), rows, cols, true, column, turned);
        one.add(same_float(both.host()[1], doubled), where, 2, both.host()[1], doubled);
      }
  m.report("max|x| of both copies, rotated, to the bit: every sum of the rotation in its order");
  one.report("of one copy alone, and from a packed operand");
  check("among them were infinite ones, and NaN", infinite >= 12 && nans >= 24, "%d, %d", infinite, nans);
}

// So many squares that a block takes several, on a large GPU too: column copies, alone and made together with the row copy, have the bits of the transposed
// matrix's row copy.
inline void test_many_squares() {
  Mismatches m;
  Rng rng(191);
  const int rows = kOnCpu ? 520 : 4360, cols = kOnCpu ? 400 : 2056;             // 5 x 4 squares, 35 x 17: no divisors of a number of blocks
  const std::vector<bf16> x = narrow<bf16>(widen(as_stored<bf16>(quantizer_data(kHeavyTail, rows, cols, 192))));
  std::vector<bf16> turned(x.size());
  for (int r = 0; r < rows; r++) for (int c = 0; c < cols; c++) turned[(size_t)c * rows + r] = x[(size_t)r * cols + c];
  TestArray<bf16> on_device(x), turned_on_device(turned);
  auto key = [&](const OperandRecipe& o) {
    QuantizeHow how = random_key(rng, true);
    how.recipe = o;
    if (o.signs == Signs::fixed) how.sign_bits[0] = kFixedSigns;
    return how;
  };
  auto compare = [&](OperandOnDevice& got, QuantizeHow how, const std::string& text) {
    OperandOnDevice want(how.recipe, cols, rows);
    how.transpose = false;
    quantize(want.out, (const bf16*)turned_on_device.p, how, want.groups.p);
    compare_operands(m, got.read(how.recipe), want.read(how.recipe), text);
  };
  const std::string sr = "nvfp4 rounding=stochastic", rn16 = "nvfp4 rht=16 signs=fixed", sr16 = sr + " rht=16 signs=fixed", outer = sr + " outer=1x128 rht=16 signs=fresh",
                    post_hoc = "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh";
  for (const std::string& text : {std::string("nvfp4"), std::string("nvfp4 blocks=16x16"), sr, rn16, sr16}) {
    const OperandRecipe o = operand_of(text);
    const QuantizeHow how = key(o);
    OperandOnDevice d(o, cols, rows);
    quantize<true>(d.out, (const bf16*)on_device.p, how, d.groups.p);
    compare(d, how, text);
  }
  for (const auto& [row_text, column_text] : {std::pair(sr, sr16), std::pair(std::string("nvfp4"), rn16), std::pair(outer, outer), std::pair(post_hoc, post_hoc)}) {
    const OperandRecipe row = operand_of(row_text), column = operand_of(column_text);
    QuantizeHow how = key(row);
    how.transpose = false;
    const QuantizeHow column_how = key(column);
    OperandOnDevice a(row, rows, cols), b(column, cols, rows), c(row, rows, cols);
    TestArray<uint32_t> groups(group_words(rows, round_up(cols, 128)) + group_words(cols, round_up(rows, 128)));
    quantize_both<true>(a.out, how, b.out, column_how, (const bf16*)on_device.p, groups.p);
    quantize(c.out, (const bf16*)on_device.p, how, c.groups.p);
    compare_operands(m, a.read(row), c.read(row), row_text + ", rows");
    compare(b, column_how, column_text + ", both copies");
  }
  m.report("squares by the hundred: column copies have the bits of the transposed matrix's row copy");
}
// Both copies of a matrix from one reading, and both maxima: the bits of quantize(), once for each copy. Squares at the edges, several for a block, rows
// that do not start on 16 bytes (then there are two kernels); and pairs that no kernel is known for.
inline void test_both_copies() {
  Mismatches m, amax;
  size_t at_once = 0, could = 0;
  Rng rng(182);
  const std::string sr = "nvfp4 rounding=stochastic", sr16 = sr + " rht=16 signs=fixed", outer = sr + " outer=1x128 rht=16 signs=fresh", eden = "nvfp4 rounding=eden16 rht=128 signs=fresh",
                    post_hoc = "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh";
  const std::pair<std::string, std::string> pairs[] = {{sr, sr16}, {sr, sr}, {outer, outer}, {eden, eden}, {post_hoc, post_hoc}, {"nvfp4", "nvfp4 rht=16 signs=fixed"},
                                                       {sr16, "nvfp4 blocks=16x16 scale=four_six"}, {"nvfp4 rounding=eden16 rht=64 signs=fresh", eden}, {"fp8_e5m2", "mxfp4 scale=ocp rht=32 signs=fresh"}};
  for (const auto& [row_text, column_text] : pairs) {
    const OperandRecipe row = operand_of(row_text), column = operand_of(column_text);
    const std::string text = row_text + " / " + column_text;
    for (auto [rows, cols] : {std::pair(37, 304), std::pair(150, 72), std::pair(131, 66), std::pair(8, 8), std::pair(400, 296), std::pair(256, 128)}) {
#ifdef CUDA_ON_CPU_ASAN
      if (rows > 150) break;                                   // slow there
#endif
      if (cols % 8 == 0 && pair_is_known(row, column)) could += 4;
      TestArray<bf16> x(narrow<bf16>(widen(as_stored<bf16>(quantizer_data(kHeavyTail, rows, cols, 183)))));
      for (int form = 0; form < 4; form++) {                   // values, packed, both, and X's: values and packed
        QuantizeHow how = random_key(rng, false), turned = random_key(rng, true);
        how.recipe = row;
        turned.recipe = column;
        for (QuantizeHow* h : {&how, &turned}) if (h->recipe.signs == Signs::fixed) h->sign_bits[0] = kTestSigns;
        const bool row_packed = form == 1 || form == 2, values = form != 1, column_packed = form != 0, column_values = form == 0 || form == 2;
        OperandOnDevice a(row, rows, cols, row_packed, values), b(column, cols, rows, column_packed, column_values);
        OperandOnDevice c(row, rows, cols, row_packed, values), d(column, cols, rows, column_packed, column_values);
        TestArray<uint32_t> groups(group_words(rows, round_up(cols, 128)) + group_words(cols, round_up(rows, 128)));
        TestArray<float> others(std::vector<float>{3.7f, .23f}), alphas(4);
        how.alpha = {alphas.p, others.p, column};
        turned.alpha = {alphas.p + 1, others.p + 1, row};
        at_once += quantize_both<true>(a.out, how, b.out, turned, (const bf16*)x.p, groups.p);
        gemm_alpha(alphas.p + 2, others.p, amax_for_alpha(a.out, row), column, row);
        gemm_alpha(alphas.p + 3, others.p + 1, amax_for_alpha(b.out, column), row, column);
        const std::vector<float> alpha = alphas.host();
        for (int i = 0; i < 2; i++) m.add(alpha[i] == alpha[i + 2], (text + ", alpha").c_str(), i, alpha[i], alpha[i + 2]);
        quantize(c.out, (const bf16*)x.p, how, c.groups.p);
        quantize(d.out, (const bf16*)x.p, turned, d.groups.p);
        compare_operands(m, a.read(row), c.read(row), text + ", rows");
        compare_operands(m, b.read(column), d.read(column), text + ", columns");
        m.add(x.guard_intact() && groups.guard_intact(), "guard", 0, 0, 0);
      }
      if (!share_amax(row, column)) continue;
      for (int trial = 0; trial < 6; trial++) {                // the largest element in a corner, or anywhere
        std::vector<float> spiked = random_matrix(rows, cols, 184 + trial);
        spiked[trial == 0 ? spiked.size() - 1 : trial == 1 ? 0 : (size_t)rng.below(spiked.size())] = trial % 2 ? -50.f : 50.f;
        TestArray<bf16> y(narrow<bf16>(widen(as_stored<bf16>(spiked))));
        TestArray<float> both(2);
        QuantizeHow how = random_key(rng, false), turned = random_key(rng, true);
        how.recipe = row;
        turned.recipe = column;
        amax_of_both<true>(both.p, both.p + 1, (const bf16*)y.p, rows, cols, how, turned);
        OperandOnDevice a(row, rows, cols), b(column, cols, rows);
        quantize(a.out, (const bf16*)y.p, how, a.groups.p);
        quantize(b.out, (const bf16*)y.p, turned, b.groups.p);
        amax.add(both.host()[0] == a.amax.host()[0], (text + ", rows").c_str(), rows, both.host()[0], a.amax.host()[0]);
        amax.add(both.host()[1] == b.amax.host()[0], (text + ", columns").c_str(), rows, both.host()[1], b.amax.host()[0]);
      }
    }
  }
  m.report("both copies of a matrix in one reading have the bits of two readings");
  amax.report("so have both maxima, where either is rotated");
  if (!both_fit()) could = 0;
  check("one kernel made them wherever it could", at_once == could, "%zu of %zu", at_once, could);
  std::string known;
  for (const Recipe& r : recipe_table()) if (linear_wants_third(r)) known += (known.empty() ? "" : " ") + r.name;
  check("one kernel makes both copies of dY in nvfp4, nvfp4-46, tetrajet2, quartet2, best and fqt", known == "nvfp4 nvfp4-46 tetrajet2 quartet2 best fqt", "%s", known.c_str());
}

// The kernel that makes an operand also writes alpha, with the bits of gemm_alpha(): every operand, beside every kind of other operand. With
// amax_is_zero nobody fills amax: what lies there is taken for a maximum.
inline void test_alpha_and_amax() {
  Mismatches alpha, amax;
  Rng rng(185);
  const int rows = 40, cols = 72;
  TestArray<bf16> x(narrow<bf16>(widen(as_stored<bf16>(quantizer_data(kHeavyTail, rows, cols, 186)))));
  TestArray<float> other_amax(std::vector<float>{3.7f}), alphas(2);
  for (const std::string& text : operand_texts()) for (bool transpose : {false, true}) {
    const OperandRecipe o = operand_of(text);
    QuantizeHow how = random_key(rng, transpose);
    how.recipe = o;
    OperandOnDevice plain(o, transpose ? cols : rows, transpose ? rows : cols), d(o, transpose ? cols : rows, transpose ? rows : cols);
    quantize(plain.out, (const bf16*)x.p, how, plain.groups.p);
    how.amax_is_zero = true;
    for (const char* other : {"bf16", "nvfp4", "nvfp4 scale=four_six", "nvfp4 outer=1x128", "nvfp4 rounding=eden16 rht=128 signs=fresh", "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh",
                              "mxfp4 scale=range34", "mxfp8", "fp4_vector", "fp8_e4m3", "fp8_e5m2", "exact"}) {
      how.alpha.alpha = alphas.p;
      how.alpha.other = operand_of(other);
      how.alpha.other_amax = how.alpha.other.format == Format::bf16 ? nullptr : other_amax.p;
      alphas.set({NAN, NAN});
      d.amax.set({0});
      quantize(d.out, (const bf16*)x.p, how, d.groups.p);
      gemm_alpha(alphas.p + 1, how.alpha.other_amax, plain.amax.p, how.alpha.other, o);
      const std::vector<float> both = alphas.host();
      alpha.add(both[0] == both[1] && alphas.guard_intact(), (text + " beside " + other).c_str(), transpose, both[0], both[1]);
    }
    if (!needs_amax(o) && !is_post_hoc(o)) continue;
    compare_operands(amax, d.read(o), plain.read(o), text);
    d.amax.set({1e30f});
    quantize(d.out, (const bf16*)x.p, how, d.groups.p);
    amax.add(d.amax.host()[0] == 1e30f, (text + ", a stale maximum").c_str(), transpose, d.amax.host()[0], 1e30);
  }
  alpha.report("every quantizer writes alpha with the bits of gemm_alpha(), beside every other operand");
  amax.report("a maximum that is 0 already is not filled, and the operand is the same");
  const ChildResult r = in_child([] {
    float memory[2];
    Scalars s = {memory, 2};
    for (int i = 0; i < 3; i++) s.take();
  });
  // max|x| of many arrays, more than one launch takes: of every small size, not aligned, with NaN and infinities.
  Mismatches maxima;
  std::vector<double> all = widen(as_stored<floatX>(quantizer_data(kHeavyTail, 1, 20000, 187)));
  for (auto& [at, v] : {std::pair(700, NAN), std::pair(1500, -INFINITY), std::pair(2500, -NAN), std::pair(2501, INFINITY)}) all[at] = v;
  TestArray<floatX> arrays(narrow<floatX>(all));
  std::vector<const floatX*> where;
  std::vector<size_t> sizes;
  for (int i = 0; i < 150; i++) {
    where.push_back(arrays.p + 131 * i);
    sizes.push_back(i == 60 ? 9000 : (size_t)i);
  }
  TestArray<float> most(std::vector<float>(where.size(), 0.f));
  amax_of_arrays(most.p, where.data(), sizes.data(), (int)where.size());
  const std::vector<float> found = most.host();
  for (size_t i = 0; i < where.size(); i++) {
    double want = 0;
    for (size_t j = 0; j < sizes[i]; j++) {
      const double a = std::fabs(all[131 * i + j]);
      want = want != want || a != a ? NAN : std::max(want, a);
    }
    maxima.add(found[i] == want || (found[i] != found[i] && want != want), "array", (double)i, found[i], want);
  }
  maxima.add(most.guard_intact(), "guard", 0, 0, 1);
  maxima.report("max|x| of 150 arrays at once");
  check("scalars run out with a message", r.exit_code == 1 && r.output.find("all 2 are taken") != std::string::npos, "exit %d", r.exit_code);
}

// Double quantization: from every packed format, what quantize() makes of its dequantized values in FP32; also from codes and scales that no quantizer
// writes: the whole range of E8M0 and of the outer scales, E4M3's subnormals, NaN and infinity. Sizes: ragged; several tiles for a block.
template <bool kWarp> void packed_source_form(Mismatches& m, OperandOnDevice& from, const OperandRecipe& from_how, const OperandBytes& want, const OperandRecipe& o, const QuantizeHow& how,
                                              int rows, int cols, const char* where, bool nan) {
  OperandOnDevice d(o, rows, cols);
  quantize<kWarp>(d.out, from.out, from_how, how, d.groups.p);
  const OperandBytes got = d.read(o);
  auto all = [&](const auto& p, const auto& q) {
    for (size_t i = 0; i < q.size(); i++) m.add(memcmp(&p[i], &q[i], sizeof p[i]) == 0 || (p[i] != p[i] && q[i] != q[i]), where, (double)i, p[i], q[i]);
  };
  all(got.codes, want.codes); all(got.scales, want.scales); all(got.outer, want.outer); all(got.mask, want.mask);
  // Where the source is NaN a code has no sign, but a value has the NaN's, and that depends on the order in which a compiler multiplies.
  std::vector<float> values = got.values, wanted = want.values;
  if (nan) for (size_t i = 0; i < wanted.size(); i++) { values[i] = std::fabs(values[i]); wanted[i] = std::fabs(wanted[i]); }
  all(values, wanted);
  m.add((got.tensor == want.tensor || (got.tensor != got.tensor && want.tensor != want.tensor)) && got.guards && want.guards, where, -1, got.tensor, want.tensor);
}
// Other codes and scales in the place of what a quantizer wrote, codes in the padding columns too. wild: also NaN and infinity.
inline void scramble(OperandOnDevice& d, const OperandRecipe& o, bool wild, Rng& rng) {
  const Operand4& p = d.out;
  std::vector<uint8_t> codes = d.codes.host(), scales = d.scales.host();
  std::vector<float> outer = d.outer.host();
  const bool fp8 = is_fp8(o.format) || o.format == Format::mxfp8, mx = is_mx(o.format);
  for (int r = 0; r < p.rows; r++)
    for (int c = 0; c < p.ld; c++) {
      const size_t at = (size_t)r * p.ld + c;
      const int code = (int)rng.below(256), finite = o.format == Format::fp8_e5m2 ? 0x7b : 0x7e;
      if (fp8) codes[at] = (uint8_t)(wild || (code & 0x7f) <= finite ? code : code & 0x80);
      else codes[at / 2] = (uint8_t)(c % 2 ? (codes[at / 2] & 15) | code << 4 : (codes[at / 2] & 0xf0) | (code & 15));
      const int unit = mx ? 32 : 16;
      if ((mx || o.format == Format::nvfp4) && c % unit == 0 && c < p.cols) {
        const bool nan = wild && rng.below(64) == 0;
        scales[scale_offset(r, c / unit, ceil_div(p.cols, unit))] = (uint8_t)(mx ? (nan ? 255 : rng.below(3) ? 110 + rng.below(20) : rng.below(255)) : (nan ? 127 : rng.below(127)));
      }
    }
  const float extremes[] = {1e-44f, 1e-38f, 1, 0, 0x1p117f, 3e-5f, INFINITY, NAN};
  for (float& e : outer) e = extremes[rng.below(wild ? 8 : 6)];
  d.codes.set(codes); d.scales.set(scales); d.outer.set(outer);
  const std::vector<float> maxima = is_post_hoc(o) ? std::vector<float>{0x1p-110f, 1e-20f, 0x1p125f, 1} : std::vector<float>{1e-44f, 1e-38f, 3.4e38f, 1};    // pseudo-scales
  d.amax.set({wild ? (rng.below(2) ? INFINITY : NAN) : maxima[rng.below(4)]});
}
inline void test_packed_sources() {
  Mismatches m;
  Rng rng(180);
  for (const char* from_text : {"nvfp4", "nvfp4 outer=1x128", "nvfp4 blocks=16x16", "nvfp4 scale=four_six", "nvfp4 rounding=eden16 rht=128 signs=fresh",
                                "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh", "mxfp4 scale=range34", "mxfp4 scale=quest_nearest rht=32",
                                "fp4_vector", "fp8_e4m3", "fp8_e5m2", "mxfp8", "exact"})
    for (const char* text : {"nvfp4 rounding=eden16 rht=128 signs=fresh", "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh", "nvfp4 outer=1x128 rounding=stochastic rht=16 signs=fresh",
                             "nvfp4 blocks=16x16", "mxfp4 scale=range34", "fp4_vector", "exact"})
      for (auto [src_rows, cols] : {std::pair(37, 300), std::pair(150, 66), std::pair(400, 290)})
        for (int kind = 0; kind < 3; kind++) {               // what the quantizer wrote, other numbers, NaN and infinity too
          if (src_rows == 400 && (kind != 1 || (strcmp(text, "fp4_vector") && strncmp(text, "nvfp4 outer", 11)))) continue;
          const OperandRecipe o = operand_of(text), from_how = operand_of(from_text);
          if (from_how.format == Format::exact && kind) continue;
          OperandOnDevice from(from_how, src_rows, cols, true, from_how.format == Format::exact);
          TestArray<bf16> x(narrow<bf16>(widen(as_stored<bf16>(quantizer_data(kHeavyTail, src_rows, cols, 181)))));
          QuantizeHow forward = random_key(rng, false), how = random_key(rng, true);
          forward.recipe = from_how;
          how.recipe = o;
          quantize(from.out, (const bf16*)x.p, forward, from.groups.p);
          from.out.cols = rotated_cols(cols, from_how.rht);
          if (kind) scramble(from, from_how, kind == 2, rng);
          TestArray<float> values((size_t)src_rows * from.out.cols);
          dequantize(values.p, from.out, from_how);
          OperandOnDevice plain(o, from.out.cols, src_rows);
          quantize(plain.out, (const float*)values.p, how, plain.groups.p);
          const OperandBytes want = plain.read(o);
          const std::string where = std::string(from_text) + (kind ? kind == 1 ? ", other numbers" : ", NaN and infinity" : "") + ", to " + text + ", " + std::to_string(src_rows) + "x" + std::to_string(cols);
          packed_source_form<!kOnCpu>(m, from, from_how, want, o, how, from.out.cols, src_rows, where.c_str(), kind == 2);
#ifdef CPU_BUILD
          packed_source_form<true>(m, from, from_how, want, o, how, from.out.cols, src_rows, where.c_str(), kind == 2);
#endif
        }
  m.report("double quantization gives the bits of quantizing the dequantized values, from every packed format and with extreme scales");
}

// 16x16 blocks: W and W^T hold the same codes and scales under every rule, 4/6 with its one choice for a tile among them.
inline void test_tiles_and_transpose() {
  Mismatches m;
  const int rows = 83, cols = 150;
  for (const char* text : {"nvfp4 blocks=16x16", "nvfp4 blocks=16x16 scale=ceil", "nvfp4 blocks=16x16 scale=four_six"})
    for (int kind : {kNormal, kHeavyTail, kTies, kManyScales}) {
      const OperandRecipe o = operand_of(text);
      const std::vector<float> w = as_stored<bf16>(quantizer_data(kind, rows, cols, 104));
      QuantizeHow turned;
      turned.transpose = true;
      const OperandBytes a = kernel_operand<bf16>(w, rows, cols, o, {}), b = kernel_operand<bf16>(w, rows, cols, o, turned);
      for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
          const size_t i = (size_t)r * a.ld + c, j = (size_t)c * b.ld + r;
          const int p = a.codes[i / 2] >> (4 * (i % 2)) & 15, q = b.codes[j / 2] >> (4 * (j % 2)) & 15;
          m.add(p == q && a.values[i] == b.values[j], text, (double)i, a.values[i], b.values[j]);
        }
    }
  m.report("16x16 blocks: W and W^T hold the same codes and values, standard, ceil and four over six");
}

// ------------------------------------------------------------------------------------------------------------------------------
// Golden vectors (the authors' reference functions and an independent model; golden vectors of the specification)

inline std::vector<float> golden_input() {
  std::vector<float> x(128);
  for (int i = 0; i < 128; i++) x[i] = ((37 * i + 11) % 97 - 48) / 16.f;
  x[5] = 12; x[70] = 0;
  return x;
}
inline int golden_code(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }
// Number of codes that differ; at_ties: of those, how many differ by one step where the scaled value v is within 1e-5 of a tie, or are a zero of the
// other sign.
inline int golden_differences(const OperandBytes& q, const char* codes, const std::vector<double>& v, int* at_ties) {
  int differ = 0;
  *at_ties = 0;
  for (int i = 0; i < 128; i++) {
    const int got = q.codes[i / 2] >> (4 * (i % 2)) & 15, want = golden_code(codes[i]);
    if (got == want) continue;
    differ++;
    const double a = reference::e2m1_value((uint8_t)got), b = reference::e2m1_value((uint8_t)want), middle = (a + b) / 2;
    const bool neighbours = std::abs((got & 7) - (want & 7)) <= 1 && (a * b >= 0);
    *at_ties += (a == 0 && b == 0) || (neighbours && std::fabs(v[i] - middle) < 1e-5 * std::fabs(middle));
  }
  return differ;
}
inline std::vector<uint8_t> row_scales(const OperandBytes& q, int blocks) {     // of a single row
  std::vector<uint8_t> s;
  for (int b = 0; b < blocks; b++) s.push_back(q.scales[b / 4 * 512 + b % 4]);
  return s;
}
inline std::vector<uint8_t> e4m3_bytes(std::initializer_list<float> values) {
  std::vector<uint8_t> b;
  for (float v : values) b.push_back(reference::e4m3_rn(v));
  return b;
}

inline void test_recipe_golden() {
  const std::vector<float> x = golden_input();
  QuantizeHow how;
  int ties = 0, differ;
  auto scaled = [&](const OperandRecipe& o, const QuantizeHow& h, auto factor) {      // what was rounded, in units of the grid
    reference::Quantized exact;
    oracle_operand(x, 1, 128, o, h, &exact);
    std::vector<double> v(128);
    for (int i = 0; i < 128; i++) v[i] = exact.input[i] * factor(exact, i);
    return v;
  };
  {
    const OperandRecipe o = operand_of("nvfp4");
    const OperandBytes q = kernel_operand<bf16>(x, 1, 128, o, how);
    differ = golden_differences(q,
        "a0291792a0391b82d27b5e06d4fa6e27c4e96d37b5e06d4fa6e27c5e86d3fb5e17d4fa0e27c5f86d3fa5e17c4f96e27c5e06d4fa6e17c5f96d27b5e06d4fa6e2",
        std::vector<double>(128), &ties);
    check("golden NVFP4 1x16: tensor scale 0x3b924925, 8 scales, 128 codes", float_bits((float)q.tensor) == 0x3b924925u &&
        row_scales(q, 8) == e4m3_bytes({448, 112, 112, 112, 104, 112, 104, 112}) && differ == 0, "%d codes differ, tensor scale 0x%08x", differ,
        float_bits((float)q.tensor));
  }
  {
    const OperandBytes q = kernel_operand<bf16>(x, 1, 128, operand_of("nvfp4 scale=four_six"), how);
    differ = golden_differences(q,
        "a0291792a0391b82d27b5e06d4fa6e27b3d85c26a4d05c3ea6e27c5e86d3fb5e16c3e90d16b4d85c3fa5e17c4f96e27c4d05c2ea4d16b3d96d27b5e06d4fa6e2",
        std::vector<double>(128), &ties);
    check("golden four over six: tensor scale 2^-7, 8 scales (4 taken in blocks 2, 4, 6; 6 wins the ties), 128 codes", q.tensor == 0x1p-7 &&
        row_scales(q, 8) == e4m3_bytes({256, 64, 96, 64, 88, 64, 96, 64}) && differ == 0, "%d codes differ", differ);
  }
  {
    const OperandRecipe o = operand_of("mxfp4 scale=quest_floor rht=32 signs=none");
    const OperandBytes q = kernel_operand<bf16>(x, 1, 128, o, how);
    const int exponent[4] = {0, -1, -1, -1};
    differ = golden_differences(q,
        "5babe3be5b3eb6e34b3eb6e33e6be3b6a868af605006e88e2806e00e0ee006689aee6e67c91111990e6e6e6e991111999c3777f71cc44cc4bcc44cc4c44cc44c",
                                scaled(o, how, [&](const reference::Quantized&, int i) { return std::ldexp(1., -exponent[i / 32]); }), &ties);
    check("golden QuEST (exponent floor): bytes 127 126 126 126 and 128 codes, but for ties and the sign of zeros",
        row_scales(q, 4) == std::vector<uint8_t>({127, 126, 126, 126}) && differ == ties, "%d codes differ, %d of them so", differ, ties);
    check("golden QuEST mask: block 0 none, 1 {5}, 2 {7}, 3 {3,5,6,7}",
        q.mask == std::vector<uint32_t>({~0u, ~(1u << 5), ~(1u << 7), ~(1u << 3 | 7u << 5)}), "%08x %08x %08x %08x", q.mask[0], q.mask[1], q.mask[2],
        q.mask[3]);
  }
  how.sign_bits[0] = how.sign_bits[1] = 0;
  for (int j = 0; j < 128; j++) if (j % 32 % 3 == 0) how.sign_bits[j / 64] |= 1ull << (j % 64);
  {
    const OperandRecipe o = operand_of("mxfp4 scale=range34 rht=32 signs=fresh");
    const OperandBytes q = kernel_operand<bf16>(x, 1, 128, o, how);
    const int exponent[4] = {2, 2, 1, 2};
    differ = golden_differences(q,
        "4c39c3a06d4bd4c4329d25d36a3294949a110a3953319bbb8ac5c249aa322039d2c8a286199e6c545931ad4bfe6e532d1ab111b3c3909231013b912992cdd901",
                                scaled(o, how, [&](const reference::Quantized&, int i) { return 3 * std::ldexp(1., -exponent[i / 32]); }), &ties);
    check("golden Quartet backward (absmax, 3/4): bytes 129 129 128 129, alpha 1/3, 128 codes but for ties",
        row_scales(q, 4) == std::vector<uint8_t>({129, 129, 128, 129}) && differ == ties && (float)q.tensor == (float)(1. / 3),
          "%d codes differ, %d at ties; tensor scale %.6f", differ, ties, q.tensor);
  }
  how.sign_bits[0] = how.sign_bits[1] = 0;
  for (int j = 0; j < 128; j++) if (j % 3 == 0) how.sign_bits[j / 64] |= 1ull << (j % 64);
  const float first[8] = {88, 224, 256, 128, 120, 144, 128, 120},
      corrections[8] = {1.020778f, .992861f, 1.031433f, 1.000643f, .989018f, 1.023194f, .980337f, 1.024838f},
              ups[8] = {.22855f, .90005f, .25146f, .00515f, .83526f, .20875f, .68539f, .37257f};
  for (const char* text : {"nvfp4 rounding=eden16 rht=128 signs=fresh", "nvfp4 rounding=eden128 rht=128 signs=fresh"}) {
    const OperandRecipe o = operand_of(text);
    const bool each = o.rounding == Rounding::eden16;
    const int draws = 4096;
    int wrong_scales = 0;
    double worst = 0;
    OperandBytes q;
    std::vector<int> up(8);
    std::vector<double> chance(8);
    for (int b = 0; b < 8; b++) {
      const double scale = first[b] * (double)(each ? corrections[b] : 1.006636f);
      const int low = reference::below_in_table(reference::e4m3_table(), 127, scale);
      chance[b] = (scale - reference::e4m3_value((uint8_t)low)) / (reference::e4m3_value((uint8_t)(low + 1)) - reference::e4m3_value((uint8_t)low));
      if (each && !(std::fabs(chance[b] - ups[b]) < 2e-4)) wrong_scales++;      // the oracle's own arithmetic against the golden P(up)
    }
    // `draws` rows with the same content: each has its own random numbers, and all have one amax
    std::vector<float> many((size_t)draws * 128);
    for (size_t i = 0; i < many.size(); i++) many[i] = x[i % 128];
    q = kernel_operand<bf16>(many, draws, 128, o, how, true, false);
    for (int r = 0; r < draws; r++)
      for (int b = 0; b < 8; b++) {
        const uint8_t byte = q.scales[((size_t)(r / 128) * 2 + b / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + b % 4];
        const int low = reference::below_in_table(reference::e4m3_table(), 127, first[b] * (double)(each ? corrections[b] : 1.006636f));
        up[b] += byte == low + 1;
        wrong_scales += byte != low && byte != low + 1;
      }
    for (int b = 0; b < 8; b++) {
      const double off = std::fabs(up[b] / (double)draws - chance[b]) / (std::sqrt(chance[b] * (1 - chance[b]) / draws) + 1e-4);
      worst = off <= worst ? worst : off;
    }
    differ = golden_differences(q,
        "6d4baed73d7dd526a83f45c111dad4064c1b03387c2ac1c00b1b55e87a6575d41362fabd2f6cb5d654ed23e65e5714315ea3e7d0400af7c57509d4c37a6ee1aa",
                                scaled(o, how, [&](const reference::Quantized& e, int i) { return 1 / (first[i / 16] * e.tensor); }), &ties);
    check(std::string("golden MS-EDEN, correction per ") + (each ? "16" : "128") +
        ": t = .004680567, 128 codes but for ties, both neighbouring scales in the golden shares (4 sigma of 4096 draws)",
          std::fabs(q.tensor / .004680567 - 1) < 1e-6 && differ == ties && wrong_scales == 0 && worst < 4,
              "t %.9f, %d codes differ, %d at ties; %d wrong scales, worst share %.2f sigma", q.tensor, differ, ties, wrong_scales, worst);
  }
}

// ------------------------------------------------------------------------------------------------------------------------------
// The table of errors. Rows of N(0, s^2), s from 1 to 2 in even steps of its logarithm: a power-of-two scale sees where in its octave the data
// lies (QuEST's floor: 27e-3 at s = 1, 22.3e-3 on average), and it is the average that papers state.

inline void test_error_table() {
  const int rows = 512, cols = 1024;
  Rng rng(111);
  std::vector<float> x((size_t)rows * cols);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) x[(size_t)r * cols + c] = (float)(rng.normal() * std::exp2(r / (double)rows));
  struct { const char* name; const char* operand; double table, tolerance; } cases[] = {
    {"RN 1x16", "nvfp4", 9.05, .01}, {"RN 1x16, outer 1x128", "nvfp4 outer=1x128", 9.05, .01}, {"four over six", "nvfp4 scale=four_six", 7.56, .01},
    {"RN 16x16", "nvfp4 blocks=16x16", 12.40, .015},
    {"SR 1x16, outer 1x128", "nvfp4 outer=1x128 rounding=stochastic", 18.6, .015}, {"SR 1x16", "nvfp4 rounding=stochastic", 18.6, .02},
    {"SR 1x16, maximum to 6*16/17", "nvfp4 scale=headroom rounding=stochastic", 23.5, .015},
    {"SR with the scale rounded up, outer 1x128", "nvfp4 outer=1x128 scale=ceil rounding=stochastic", 21.3, .015},
    {"MS-EDEN per 16", "nvfp4 rounding=eden16 rht=128 signs=fresh", 9.31, .015},
    {"MS-EDEN per 128", "nvfp4 rounding=eden128 rht=128 signs=fresh", 9.72, .015},
    {"MS-EDEN per 16, post hoc", "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh", 9.31, .015},
    {"MS-EDEN per 128, post hoc", "nvfp4 rounding=eden128 scale=post_hoc rht=128 signs=fresh", 9.72, .015},
    {"MXFP4 absmax RN", "mxfp4 scale=range34", 13.7, .015}, {"MXFP4 absmax SR", "mxfp4 scale=range34 rounding=stochastic", 27.8, .015},
    {"QuEST, nearest exponent", "mxfp4 scale=quest_nearest rht=32 signs=none", 13.4, .015},
    {"QuEST, exponent floor", "mxfp4 scale=quest_floor rht=32 signs=none", 22.3, .015}};
  QuantizeHow how = random_key(rng, false);
  for (auto& c : cases) {
    const OperandRecipe o = operand_of(c.operand);
    reference::Quantizer rotation = oracle_quantizer(o, how);
    const reference::Quantized rotated = reference::rotated_operand(x, rows, cols, rotation);
    std::vector<float> input = rotated.input;
    for (float& v : input) v *= rotated.waiting;
    const OperandBytes q = kernel_operand<float>(x, rows, cols, o, how, false, true);
    double total = 0;
    for (int r = 0; r < rows; r++) {
      double error = 0, norm = 0;
      for (int i = r * cols; i < (r + 1) * cols; i++) { const double d = q.values[i] * q.tensor - input[i]; error += d * d;
          norm += (double)input[i] * input[i]; }
      total += error / norm / rows;
    }
    char sentence[200];
    snprintf(sentence, sizeof sentence, "squared error of %s on Gaussians is %.2fe-3 within %.1f %%", c.name, c.table, 100 * c.tolerance);
    check(sentence, std::fabs(1e3 * total / c.table - 1) < c.tolerance, "%.3fe-3", 1e3 * total);
  }
}

// ------------------------------------------------------------------------------------------------------------------------------
// MS-EDEN with post hoc range alignment

// Blocks of 2^0 to 2^-20 times the largest, which the last rows make 32 times as large: from 2^-14 on their scales are subnormal in E4M3, most are 0
// from 2^-17 on. Whatever the draws, a scale stays unbiased, in the packed form as in the values, where only the small ones are rounded a second time. The
// largest rows, at the end, come when most others have been rounded for a smaller one.
inline void test_post_hoc_scales() {
  const OperandRecipe o = operand_of("nvfp4 rounding=eden16 scale=post_hoc");
  const int rows = 8192, all_rows = rows + 48, blocks = 21, cols = 16 * blocks;
  Rng rng(191);
  std::vector<float> one(cols);
  for (int c = 0; c < cols; c++) one[c] = to_float(to_bf16((float)std::ldexp(rng.normal(), -(c / 16))));
  std::vector<float> x((size_t)all_rows * cols);              // rows alike, but for their draws
  for (size_t i = 0; i < x.size(); i++) x[i] = one[i % cols] * (i / cols < (size_t)rows ? 1.f : i / cols < rows + 16u ? 4.f : i / cols < rows + 32u ? 8.f : 32.f);
  const QuantizeHow how = random_key(rng, false);
  const OperandBytes packed = kernel_operand<bf16>(x, all_rows, cols, o, how, true, false), values = kernel_operand<bf16>(x, all_rows, cols, o, how, false, true);
  double worst = 0, apart = 0;
  for (int b = 0; b < blocks; b++) {
    // what the mean is to be: the block's pseudo-scale, corrected; from the formula, in double
    double most = 0, vv = 0, vq = 0;
    int at = 0;
    for (int j = 0; j < 16; j++) if (std::fabs(one[16 * b + j]) > most) { most = std::fabs(one[16 * b + j]); at = 16 * b + j; }
    const double p = reference::e8m3_rn(most / reference::kEdenScale);
    for (int j = 0; j < 16; j++) {
      const double v = one[16 * b + j] / p, q = reference::e2m1_value(reference::e2m1_rn(reference::round_bf16((float)v)));
      vv += v * v;
      vq += v * q;
    }
    const double code = std::fabs(reference::e2m1_value(reference::e2m1_rn(reference::round_bf16((float)(one[at] / p))))), want = p * vv / vq;
    double sum = 0, squares = 0;
    for (int r = 0; r < rows; r++) {
      const uint8_t byte = packed.scales[((size_t)(r / 128) * ceil_div(blocks, 4) + b / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + b % 4];
      const double scale = reference::e4m3_value(byte) * packed.tensor, value = std::fabs(values.values[(size_t)r * values.ld + at]);
      apart = std::max(apart, std::fabs(value - scale * code));
      sum += scale;
      squares += scale * scale;
    }
    const double step = packed.tensor / 512, share = want / step - std::floor(want / step);               // where the scale is subnormal
    const double variance = std::max(squares / rows - sum / rows * sum / rows, want < 8 * step ? share * (1 - share) * step * step : 0.);
    const double mean = sum / rows, sigma = std::sqrt(variance / rows) + want * 1e-4;
    worst = std::max(worst, std::fabs(mean - want) / sigma);
  }
  check("post hoc: scales of blocks down to 2^-25 of the largest are unbiased (4.5 sigma of 8192 draws), and the values hold the packed form's", worst < 4.5 && apart == 0,
        "worst mean %.2f sigma off; values differ by up to %g", worst, apart);
  bool all_nan = true;                                        // as alpha would make them
  for (float bad : {NAN, INFINITY}) {
    std::vector<float> broken(x.begin(), x.begin() + 40 * cols);
    broken[20 * cols + 17] = bad;
    const OperandBytes q = kernel_operand<bf16>(broken, 40, cols, o, how, false, true);
    for (int r = 0; r < 40; r++) for (int c = 0; c < cols; c++) all_nan &= q.values[(size_t)r * q.ld + c] != q.values[(size_t)r * q.ld + c];
  }
  check("post hoc: one NaN or infinity makes all values NaN, where the tensor's scale is in them", all_nan);
}
// 4 significant bits: all of 20 bits below them, and all random numbers of some.
inline void test_e8m3() {
  Mismatches m;
  for (int exponent : {-120, -14, 0, 7, 100})
    for (uint32_t i = 0; i < 1u << 23; i += exponent ? 257 : 1) {
      const float x = (float)std::ldexp(1 + i * 0x1p-23, exponent);
      if (e8m3_round(x) != (float)reference::e8m3_rn(x)) m.add(false, "nearest", x, e8m3_round(x), reference::e8m3_rn(x));
      const uint32_t word = i * 2654435761u;
      const double u = (2. * (word & 0xffff) + 1) / 131072;
      if (e8m3_round_sr(x, word) != (float)reference::e8m3_sr(x, u)) m.add(false, "stochastic", x, e8m3_round_sr(x, word), reference::e8m3_sr(x, u));
      m.total += 2;
    }
  for (uint32_t i = 0; i < 1u << 20; i += 4369)
    for (uint32_t r = 0; r < 1u << 16; r++) {
      const float x = bits_float(0x3f800000u + i);
      if (e8m3_round_sr(x, r | 0xabcd0000u) != (float)reference::e8m3_sr(x, (2. * r + 1) / 131072)) m.add(false, "all random numbers", x, r, 0);
      m.total++;
    }
  m.report("E8M3, to nearest and stochastically, is the oracle's");
}

// ------------------------------------------------------------------------------------------------------------------------------
// Unbiased or not: the mean of B gradient GEMMs, each with signs and random numbers of its own

inline void test_recipe_averaging() {
  const int M = 32, N = 32, K = 512, most = 256;
  const std::vector<float> a = random_matrix(M, K, 121), b = random_matrix(N, K, 122);
  const reference::Array exact = reference::gemm(reference::Array(a.begin(), a.end()), reference::Array(b.begin(), b.end()), M, N, K);
  struct { const char* name; const char* operand; bool flat; double low, high; } cases[] = {
    {"MS-EDEN per 16", "nvfp4 rounding=eden16 rht=128 signs=fresh", true, .017, .022},
    {"MS-EDEN per 128", "nvfp4 rounding=eden128 rht=128 signs=fresh", true, .017, .022},
    {"MS-EDEN per 16, post hoc", "nvfp4 rounding=eden16 scale=post_hoc rht=128 signs=fresh", true, .017, .022},
    {"SR with the scale rounded up", "nvfp4 outer=1x128 scale=ceil rounding=stochastic rht=16 signs=fresh", true, .0405, .0455},
    {"RN", "nvfp4 rht=16 signs=fresh", false, .0165, .0195}, {"four over six", "nvfp4 scale=four_six rht=16 signs=fresh", false, .0135, .0165},
    {"four over six with SR, chosen by the errors of RN", "nvfp4 scale=four_six rounding=stochastic rht=16 signs=fresh", true, .033, .04}};
  for (auto& c : cases) {
    const OperandRecipe o = operand_of(c.operand);
    Rng rng(123);
    reference::Array sum(exact.size(), 0.);
    double one = 0, times[3] = {};                                          // at B = 1 (mean of all), and error * B at 16, 64, 256
    std::vector<double> va((size_t)M * K), vb((size_t)N * K);
    for (int i = 1; i <= most; i++) {
      QuantizeHow how = random_key(rng, false), other = how;
      other.key.stream ^= 1;                                                // same signs, another stream
      const OperandBytes qa = kernel_operand<bf16>(a, M, K, o, how, false, true), qb = kernel_operand<bf16>(b, N, K, o, other, false, true);
      reference::Array product(exact.size());
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
          const float *p = &qa.values[(size_t)m * K], *q = &qb.values[(size_t)n * K];
          double s[8] = {};
          for (int k = 0; k < K; k += 8) for (int j = 0; j < 8; j++) s[j] += (double)p[k + j] * q[k + j];
          product[(size_t)m * N + n] = ((s[0] + s[1]) + (s[2] + s[3]) + ((s[4] + s[5]) + (s[6] + s[7]))) * qa.tensor * qb.tensor;
        }
      for (size_t j = 0; j < sum.size(); j++) sum[j] += product[j];
      one += agreement(product, exact).squared / most;
      if (i == 16 || i == 64 || i == 256) {
        reference::Array mean = sum;
        for (double& v : mean) v /= i;
        times[i == 16 ? 0 : i == 64 ? 1 : 2] = agreement(mean, exact).squared * i;
      }
    }
    // With 1024 outputs and B independent draws the estimate of a flat curve has a standard error of sqrt(2/1024) = 4.4 %, and outputs of a row or
    // column share draws.
    const double growth = times[2] / one;
    const bool known = one > c.low && one < c.high;
    const std::string name = std::string("averaging 256 gradient GEMMs of ") + c.name;
    if (c.flat) check(name + ": (squared error) * B stays flat", known && growth > .8 && growth < 1.2, "B = 1 %.4f, 16 %.4f, 64 %.4f, 256 %.4f", one,
        times[0], times[1], times[2]);
    else check(name + ": it grows, the rounding is biased", known && growth > 1.3, "B = 1 %.4f, 16 %.4f, 64 %.4f, 256 %.4f", one, times[0], times[1],
        times[2]);
  }
}

// 4/6 is called incompatible with SR: whoever rounds both candidates stochastically and keeps the better draw has biased the result. The
// oracle can do it that way; the kernel chooses by the errors of RN, and only what clips biases the draw that follows.
inline void test_four_six_and_sr() {
  const int cols = 2048, draws = 128;
  const std::vector<float> x = random_matrix(1, cols, 124);
  const OperandRecipe o = operand_of("nvfp4 scale=four_six rounding=stochastic");
  double growth[2];
  for (bool by_draw : {false, true}) {
    reference::Array mean(cols, 0.), exact(x.begin(), x.end());
    double one = 0;
    for (int i = 0; i < draws; i++) {
      QuantizeHow how;
      how.key = {7, (uint32_t)i, 3};
      reference::Quantizer q = oracle_quantizer(o, how);
      q.choose_by_sr = by_draw;
      const reference::Array v = by_draw ? dequantized(reference::quantize(x, 1, cols, q))
          : operand_values(kernel_operand<bf16>(x, 1, cols, o, how, false, true));
      one += agreement(v, exact).squared / draws;
      for (int c = 0; c < cols; c++) mean[c] += v[c] / draws;
    }
    growth[by_draw] = agreement(mean, exact).squared * draws / one;
  }
  check("four over six with SR is biased: a little where RN chooses (blocks clip), badly if the better of two draws is kept (the trap)",
      growth[0] > 1.15 && growth[1] > 2, "(squared error) * B at B = 128 grows %.2f-fold and %.2f-fold", growth[0], growth[1]);
}

// ------------------------------------------------------------------------------------------------------------------------------
// A linear layer under every row

inline Recipe recipe_named_row(const std::string& name) {
  for (const Recipe& r : recipe_table()) if (r.name == name) return r;
  die("test: there is no recipe %s", name.c_str());
}
struct LayerData { int T, K, N; std::vector<float> X, W, dY; };
struct LayerRun { reference::Array Y, dX, dW; bool guards = true; };
inline LayerData gaussian_layer(int T, int K, int N, uint64_t seed) {
  return {T, K, N, random_matrix(T, K, seed), random_matrix(N, K, seed + 1), random_matrix(T, N, seed + 2)};
}

// earlier: a step before this one in the same memory, or null.
inline LayerRun run_layer(const Recipe& recipe, const LayerData& d, LinearKey key, bool x_kept = true, bool with_xt = false, bool with_third = true,
                          const LayerData* earlier = nullptr) {
  const int T = d.T, K = d.K, N = d.N;
  auto load = [](const std::vector<float>& x) { return narrow<floatX>(widen(x)); };
  std::vector<float> before((size_t)N * K);                                         // what dW holds already: it is added to
  for (size_t i = 0; i < before.size(); i++) before[i] = (float)(i % 7) / 4;
  TestArray<floatX> X(load(d.X)), W(load(d.W)), dY(load(d.dY)), Y((size_t)T * N), dX((size_t)T * K);
  TestArray<float> dW(before), scalar_memory(Scalars::kLayer), rotated(linear_scratch_elements(T, K, N));
  TestArray<floatX> first(linear_scratch_elements(T, K, N)), second(linear_scratch_elements(T, K, N)), third(linear_third_elements(K, N));
  TestArray<uint32_t> tiles(linear_tile_words(T, K, N));
  LinearScratch scratch;
  scratch.values[0] = first.p; scratch.values[1] = second.p; scratch.values[2] = with_third ? third.p : nullptr; scratch.tiles = tiles.p;
  Scalars scalars = {scalar_memory.p, Scalars::kLayer};
  scratch.scalars = &scalars;
  if (linear_needs_rotated(recipe)) scratch.rotated = rotated.p;
  LinearSaved saved;
  std::vector<std::function<void()>> release;
  want_linear_saved(saved, recipe, T, K, N, [&](auto** p, size_t n) {
    *p = device_alloc<std::remove_reference_t<decltype(**p)>>(n);
    auto q = *p;
    release.push_back([q] { device_free(q); });
  }, with_xt);
  for (const LayerData* now : {earlier, &d}) {
    if (!now) continue;
    X.set(load(now->X)); W.set(load(now->W)); dY.set(load(now->dY)); dW.set(before);
    scalars.start();
    // with others before and behind it
    if (earlier && (takes_plain_max(recipe.fprop.w) || takes_plain_max(recipe.dgrad.w)))
      find_weight_maxima(scalars, {dY.p, W.p, X.p}, {(size_t)T * N, (size_t)N * K, (size_t)T * K});
    linear_forward(Y.p, X.p, W.p, T, K, N, recipe, key, scratch, &saved);
    if (!x_kept) X.set(std::vector<floatX>(X.n, from_float<floatX>(NAN)));          // what need not be kept must not be read
    linear_backward(dX.p, dW.p, dY.p, X.p, W.p, T, K, N, recipe, key, scratch, &saved);
  }
  LayerRun r{widen(Y.host()), widen(dX.host()), widen(dW.host())};
  for (size_t i = 0; i < before.size(); i++) r.dW[i] -= before[i];
  for (bool intact : {X.guard_intact(), W.guard_intact(), dY.guard_intact(), Y.guard_intact(), dX.guard_intact(), dW.guard_intact(),
      scalar_memory.guard_intact(), rotated.guard_intact(), first.guard_intact(),
                      second.guard_intact(), third.guard_intact(), tiles.guard_intact()}) r.guards = r.guards && intact;
  for (auto& f : release) f();
  return r;
}
inline reference::Array as_array(const std::vector<float>& x) { return reference::Array(x.begin(), x.end()); }
inline LayerRun exact_layer(const LayerData& d) {
  LayerRun r;
  r.Y = reference::gemm(as_array(d.X), as_array(d.W), d.T, d.N, d.K);
  r.dX = reference::gemm(as_array(d.dY), reference::transposed(as_array(d.W), d.N, d.K), d.T, d.K, d.N);
  r.dW = reference::gemm(reference::transposed(as_array(d.dY), d.T, d.N), reference::transposed(as_array(d.X), d.T, d.K), d.N, d.K, d.T);
  return r;
}
// The same layer by the oracle: random numbers and signs as linear.cuh documents them.
inline LayerRun oracle_layer(const Recipe& recipe, const LayerData& d, LinearKey key) {
  Recipe r = recipe;
  const std::array<reference::SignBits, 3> fresh = {reference::fresh_signs(key.seed, key.step, key.layer * 8 + 0),
      reference::fresh_signs(key.seed, key.step, key.layer * 8 + 2),
                                                    reference::fresh_signs(key.seed, key.step, key.layer * 8 + 4)};
  reference::LinearHow how;
  reference::Quantizer* to[6] = {&how.fprop_x, &how.fprop_w, &how.dgrad_dy, &how.dgrad_w, &how.wgrad_dy, &how.wgrad_x};
  int i = 0;
  for (auto& [name, o] : recipe_operands(r)) {
    QuantizeHow h;
    h.key = {key.seed, key.step, key.layer * 8 + (uint32_t)i};
    // fixed signs: NVIDIA's 16; for larger rotations Philox's first known answer
    const reference::SignBits signs = o->signs == Signs::fresh ? fresh[i / 2] : o->rht == 16 ? reference::SignBits{kTestSigns, 0}
        : reference::SignBits{0xe169c58d6627e8d5ull, 0x9b00dbd8bc57ac4cull};
    h.sign_bits[0] = signs[0]; h.sign_bits[1] = signs[1];
    *to[i++] = oracle_quantizer(*o, h);
  }
  how.double_w = r.dgrad.w.format != Format::bf16 && r.dgrad.w.source == Source::forward;
  how.double_x = r.wgrad.x.format != Format::bf16 && r.wgrad.x.source == Source::forward;
  how.mask_x = r.estimator.x == Estimator::quest_mask;
  how.mask_w = r.estimator.w == Estimator::quest_mask;
  if (r.estimator.w == Estimator::dge && has_codes(r.fprop.w)) how.dge_k = r.dge_k;
  const reference::LinearOut out = reference::linear(d.X, d.W, d.dY, d.T, d.K, d.N, how);
  return {out.Y, out.dX, out.dW};
}

// The same layer step by step: each operand by itself, which fills its own maximum; alpha by a kernel; and the GEMM. An empty dX or dW: that gradient
// is rotated back, masked or sloped after its GEMM.
struct HandOperand { std::shared_ptr<OperandOnDevice> made; const floatX* data; int ld; bool transposed; OperandRecipe how; };
inline LayerRun layer_by_hand(const Recipe& r, const LayerData& d, LinearKey key) {
  const int T = d.T, K = d.K, N = d.N;
  auto load = [](const std::vector<float>& x) { return narrow<floatX>(widen(x)); };
  std::vector<float> before((size_t)N * K);
  for (size_t i = 0; i < before.size(); i++) before[i] = (float)(i % 7) / 4;
  TestArray<floatX> X(load(d.X)), W(load(d.W)), dY(load(d.dY)), Y((size_t)T * N), dX((size_t)T * K);
  TestArray<float> dW(before), alpha(1);
  auto own_amax = [&](const OperandRecipe& o, OperandIndex which, OperandIndex first, bool transpose) {
    QuantizeHow q = quantize_how(o, {which, first, key, GemmWay::emulated}, transpose, {});
    q.amax_is_zero = false;
    return q;
  };
  auto ready = [](const OperandRecipe& o, std::shared_ptr<OperandOnDevice> made) {
    made->out.cols = rotated_cols(made->out.cols, o.rht);
    return HandOperand{made, made->out.values, made->out.ld, false, o};
  };
  auto operand = [&](const OperandRecipe& o, OperandIndex which, OperandIndex first, const TestArray<floatX>& x, int rows, int cols, bool transpose) {
    if (o.format == Format::bf16) return HandOperand{nullptr, x.p, cols, transpose, o};
    auto made = std::make_shared<OperandOnDevice>(o, transpose ? cols : rows, transpose ? rows : cols);
    quantize(made->out, (const floatX*)x.p, own_amax(o, which, first, transpose), made->groups.p);
    return ready(o, made);
  };
  auto doubled = [&](const OperandRecipe& o, OperandIndex which, OperandIndex first, const HandOperand& from) {
    auto made = std::make_shared<OperandOnDevice>(o, from.made->out.cols, from.made->out.rows);
    quantize(made->out, from.made->out, from.how, own_amax(o, which, first, true), made->groups.p);
    return ready(o, made);
  };
  auto multiply = [&](const HandOperand& a, const HandOperand& b, void* D, int rows, int cols, int along, bool fp32) {
    Gemm g;
    g.M = rows; g.N = cols; g.K = a.made && b.made ? a.ld : along;
    g.A = a.data; g.lda = a.ld; g.a_transposed = a.transposed;
    g.B = b.data; g.ldb = b.ld; g.b_transposed = b.transposed;
    g.D = D; g.ldd = cols; g.d_fp32 = g.accumulate = fp32;
    if (a.made || b.made) {
      gemm_alpha(alpha.p, a.made ? a.made->amax.p : nullptr, b.made ? b.made->amax.p : nullptr, a.how, b.how);
      g.alpha = alpha.p;
    }
    gemm(g);
  };
  const HandOperand x = operand(r.fprop.x, kFpropX, kFpropX, X, T, K, false), w = operand(r.fprop.w, kFpropW, kFpropX, W, N, K, false);
  multiply(x, w, Y.p, T, N, K, false);
  const bool w_again = from_forward_pass(r.dgrad.w), x_again = from_forward_pass(r.wgrad.x);
  LayerRun out{widen(Y.host()), {}, {}};
  if (!(w_again && r.fprop.w.rht) && r.estimator.x == Estimator::ste) {
    multiply(operand(r.dgrad.dy, kDgradDy, kDgradDy, dY, T, N, false),
             w_again ? doubled(r.dgrad.w, kDgradW, kDgradDy, w) : operand(r.dgrad.w, kDgradW, kDgradDy, W, N, K, true), dX.p, T, K, N, false);
    out.dX = widen(dX.host());
  }
  if (!(x_again && r.fprop.x.rht) && r.estimator.w == Estimator::ste) {
    multiply(operand(r.wgrad.dy, kWgradDy, kWgradDy, dY, T, N, true),
             x_again ? doubled(r.wgrad.x, kWgradX, kWgradDy, x) : operand(r.wgrad.x, kWgradX, kWgradDy, X, T, K, true), dW.p, N, K, T, true);
    out.dW = widen(dW.host());
    for (size_t i = 0; i < before.size(); i++) out.dW[i] -= before[i];
  }
  return out;
}
// Every row, and some that only --set makes.
inline std::vector<Recipe> recipes_and_variants() {
  std::vector<Recipe> all = recipe_table();
  const std::vector<std::vector<std::string>> variants = {
      {"tetrajet2", "outer=tensor"}, {"tetrajet2", "scale=ceil", "dgrad.rht=128", "wgrad.rht=64"},
      {"quartet2", "dgrad.rounding=eden128", "wgrad.rounding=eden128"}, {"quartet2", "dgrad.scale=standard", "wgrad.scale=standard"},
      {"quartet", "fprop.scale=quest_floor"},
      {"quartet", "dgrad.w.format=bf16", "dgrad.dy.format=bf16", "estimator.x=ste"},
      {"nvfp4", "fprop.blocks=1x16", "fprop.rht=32", "fprop.signs=fresh"}, {"fqt", "estimator.w=dge", "dge_k=3"}, {"tetrajet", "estimator.w=dge"},
      {"fp8", "fprop.format=mxfp8", "wgrad.dy.format=bf16"}, {"tetrajet2", "fprop.rht=64", "fprop.signs=fresh"}};
  for (const auto& v : variants) {
    Recipe r = recipe_named_row(v[0]);
    for (size_t i = 1; i < v.size(); i++) {
      const std::string problem = recipe_set(r, v[i]);
      if (!problem.empty()) check("--set " + v[i] + " is taken", false, "%s", problem.c_str());
      r.name += " " + v[i];
    }
    const std::string problem = recipe_problem(r);
    if (problem.empty()) all.push_back(r);
    else check(r.name + " can be computed", false, "%s", problem.c_str());
  }
  return all;
}

// Two steps in the same memory, the second with a quarter of the first's maxima, in every order in which the operands of a layer can be made: the
// second step has the bits of a layer that fills every maximum by itself and computes alpha apart.
inline void test_maxima_and_alphas() {
  const LinearKey key = {78, 6, 2};
  size_t stale = 0, runs = 0, compared[3] = {};
  std::string first;
  for (const Recipe& row : recipes_and_variants())
    for (auto& size : {std::array<int, 3>{128, 64, 96}, {65, 72, 40}}) {
      const LayerData d = gaussian_layer(size[0], size[1], size[2], 141);
      LayerData large = gaussian_layer(size[0], size[1], size[2], 142);
      for (std::vector<float>* v : {&large.X, &large.W, &large.dY}) for (float& e : *v) e *= 4;
      const LayerRun want = layer_by_hand(row, d, key);
      compared[0]++; compared[1] += !want.dX.empty(); compared[2] += !want.dW.empty();
      for (bool with_xt : {false, true}) for (bool with_third : {false, true}) {
        if (with_xt && !can_save_xt(row)) continue;
        const LayerRun got = run_layer(row, d, key, true, with_xt, with_third, &large);
        const bool same = got.Y == want.Y && (want.dX.empty() || got.dX == want.dX) && (want.dW.empty() || got.dW == want.dW);
        runs++;
        if (!same && !stale++) first = row.name + (got.Y != want.Y ? ": Y" : !want.dX.empty() && got.dX != want.dX ? ": dX" : ": dW");
      }
    }
  check("a step after one of larger maxima has the bits of one that fills each maximum and computes each alpha by itself",
        stale == 0 && compared[1] > 30 && compared[2] > 25,
        "%zu of %zu differ %s; %zu Y, %zu dX, %zu dW", stale, runs, first.c_str(), compared[0], compared[1], compared[2]);
}
inline void test_layers_of_all_recipes() {
  // Against the oracle, from exactly dequantized operands in double. What remains: the sum in FP32; Y and dX rounded to BF16 (.0017 of their
  // norm); and with an outer scale the operand's own rounding to BF16.
  const LinearKey key = {77, 5, 3};
  for (const Recipe& row : recipes_and_variants()) {
    double worst_y = 0, worst_x = 0, worst_w = 0;
    bool guards = true, alike = true;
    for (auto& size : {std::array<int, 3>{128, 128, 128}, {65, 72, 40}, {33, 200, 136}, {520, 40, 72}}) {
      LayerData d = gaussian_layer(size[0], size[1], size[2], 131);
      for (size_t i = 0; i < d.X.size(); i += 97) d.X[i] *= 16;              // outliers, so that masks and rotations have something to do
      const bool with_xt = can_save_xt(row);
      const LayerRun got = run_layer(row, d, key, keeps_x(row) && !with_xt, with_xt), want = oracle_layer(row, d, key);
      const LayerRun apart = run_layer(row, d, key, true, false, false);       // dY's copies one by one, X^T in the backward pass
      alike = alike && apart.Y == got.Y && apart.dX == got.dX && apart.dW == got.dW;
      const double y = rel_error(got.Y, want.Y), x = rel_error(got.dX, want.dX), w = rel_error(got.dW, want.dW);
      if (!(y <= worst_y)) worst_y = y;
      if (!(x <= worst_x)) worst_x = x;
      if (!(w <= worst_w)) worst_w = w;
      guards = guards && got.guards;
    }
    bool folded = false;
    Recipe r = row;
    for (auto& [name, o] : recipe_operands(r)) folded |= o->format == Format::fp4_vector || (o->format == Format::nvfp4 && o->outer == Outer::b1x128);
    const double bf16_noise = sizeof(floatX) == 2 ? .0019 : 1e-6, operand_noise = sizeof(floatX) == 2 && folded ? .003 : 1e-5;
    check(row.name + ": Y, dX and dW of a linear layer equal the oracle's at three shapes, also with X gone where it need not be kept", guards &&
        worst_y < bf16_noise + operand_noise && worst_x < bf16_noise + operand_noise && worst_w < operand_noise,
          "relative errors %.1e, %.1e, %.1e", worst_y, worst_x, worst_w);
    check(row.name + ": the same bits with the copies of X and dY made at once, and one by one", alike);
  }
}

inline void test_quantization_off() {
  for (const Recipe& row : recipe_table()) {
    Recipe r = row;
    bool rotates = false;
    for (auto& [name, o] : recipe_operands(r))
      if (o->format != Format::bf16) { o->format = Format::exact; rotates |= o->rht != 0; }
    const std::string problem = recipe_problem(r);
    if (!problem.empty()) { check(row.name + " with its quantization switched off can be computed", false, "%s", problem.c_str()); continue; }
    double worst = 0;
    for (auto& size : {std::array<int, 3>{128, 128, 128}, {65, 72, 40}, {33, 200, 136}}) {
      const LayerData d = gaussian_layer(size[0], size[1], size[2], 141);
      const LayerRun got = run_layer(r, d, {78, 6, 4}, keeps_x(r)), want = exact_layer(d);
      for (double e : {rel_error(got.Y, want.Y), rel_error(got.dX, want.dX), rel_error(got.dW, want.dW)}) if (!(e <= worst)) worst = e;
    }
    // Up to three roundings to BF16 (operands after each rotation, result); without rotations only the result's.
    const double allowed = sizeof(floatX) == 2 ? (rotates ? .005 : .0019) : 3e-6;
    check(row.name + " with its quantization switched off, rotations and masks kept: Y, dX and dW are BF16's", worst < allowed,
        "worst relative error %.1e", worst);
  }
}

// On Gaussians errors of operands add: the squared relative L2 of a GEMM is the sum of its operands' e, those of the table of errors (at s = 1); a
// doubly quantized operand has both its errors. (TetraJet's second quantization is free: values on a grid of powers of two fall on the next one.) The
// gain <result, exact> / |exact|^2 is the product of the operands' own g. Rounding to nearest shrinks, stochastic rounding only where it clips.
inline void test_gaussian_layers() {
  struct Operand { double e, g; };
  const Operand none = {0, 1}, rn = {.00905, .9962}, four_six = {.00756, .9973}, tile = {.0124, .9908}, tile46 = {.0120, .991}, sr = {.0187, .998},
      eden = {.0094, 1}, quest = {.0127, .9876}, mx_up = {.0133, .9892}, mx_up_sr = {.0275, 1}, mx34 = {.0139, .9907}, mx34_sr = {.0282, 1},
      row256 = {.0123, .992}, e4m3 = {.0007, .9992}, e5m2 = {.0028, .9989};
  using Operands = std::vector<Operand>;
  struct Expected { const char* name; Operands gemm[3]; };
  const Expected expected[] = {
    {"bf16", {{none}, {none}, {none}}}, {"fp8", {{e4m3, e4m3}, {e5m2, e4m3}, {e5m2, e4m3}}},
    {"nvfp4", {{rn, tile}, {sr, tile}, {sr, rn}}}, {"nvfp4-46", {{rn, tile46}, {sr, tile46}, {sr, rn}}},
    {"tetrajet2", {{rn, rn}, {sr, rn, sr}, {sr, rn, sr}}}, {"quartet2", {{four_six, four_six}, {eden, four_six, eden}, {eden, four_six, eden}}},
    {"best", {{four_six, four_six}, {eden, four_six, eden}, {eden, four_six, eden}}},
    {"quartet", {{quest, quest}, {mx34_sr, quest, mx34_sr}, {mx34_sr, quest, mx34_sr}}},
    {"quartet-v4", {{quest, quest}, {mx34, quest, mx34}, {mx34, quest, mx34}}},
    {"fp4-dge", {{row256, row256}, {e5m2, e4m3}, {}}}, {"fqt", {{rn, rn}, {sr, rn}, {sr, sr}}},
    {"tetrajet", {{mx_up, mx_up}, {mx_up_sr, mx_up}, {mx_up_sr, mx_up}}}};
  const LayerData d = gaussian_layer(256, 256, 256, 151);
  const LayerRun exact = exact_layer(d);
  size_t found = 0;
  for (const Recipe& r : recipe_table()) {
    const Expected* e = nullptr;
    for (const Expected& x : expected) if (r.name == x.name) e = &x;
    if (!e) { check(r.name + " has an expected error in this table", false); continue; }
    found++;
    const LayerRun got = run_layer(r, d, {79, 7, 5});
    const Agreement a[3] = {agreement(got.Y, exact.Y), agreement(got.dX, exact.dX), agreement(got.dW, exact.dW)};
    bool good = true;
    double want_l2[3], want_gain[3];
    for (int i = 0; i < 3; i++) {
      double squared = i < 2 && sizeof(floatX) == 2 ? 3e-6 : 0, gain = 1;       // Y and dX are rounded to BF16
      for (const Operand& o : e->gemm[i]) { squared += o.e; gain *= o.g; }
      want_l2[i] = std::sqrt(squared);
      want_gain[i] = gain;
      if (e->gemm[i].empty()) continue;                                         // DGE changes dW on purpose
      const double l2 = std::sqrt(a[i].squared);
      good = good && l2 > .94 * want_l2[i] - 2e-4 && l2 < 1.06 * want_l2[i] + 2e-4 && std::fabs(a[i].gain - gain) < .005;
    }
    check(r.name + ": fprop, dgrad and wgrad on Gaussians: relative L2 is what their operands' errors add up to, within 6 %; gains are within .005", good,
        "%.4f %.4f %.4f, expected %.4f %.4f %.4f; gains %.4f %.4f %.4f, expected %.4f %.4f %.4f", std::sqrt(a[0].squared), std::sqrt(a[1].squared),
        std::sqrt(a[2].squared), want_l2[0], want_l2[1], want_l2[2],
          a[0].gain, a[1].gain, a[2].gain, want_gain[0], want_gain[1], want_gain[2]);
    if (r.name == "nvfp4")
      check("nvfp4: one dgrad or wgrad GEMM has relative L2 .16-.18 and gain .987-.992", std::sqrt(a[1].squared) > .16 &&
          std::sqrt(a[1].squared) < .18 && std::sqrt(a[2].squared) > .16 && std::sqrt(a[2].squared) < .18 && a[1].gain > .985 && a[1].gain < .9925 &&
          a[2].gain > .985 && a[2].gain < .9925,
            "%.4f %.4f, gains %.4f %.4f", std::sqrt(a[1].squared), std::sqrt(a[2].squared), a[1].gain, a[2].gain);
  }
  check("every row of the table was compared", found == sizeof expected / sizeof *expected, "%zu", found);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Rotation

inline void test_recipe_rotation() {
  Rng rng(161);
  double worst = 0;
  int wrong = 0, lanes = 0;
  for (int n : {16, 32, 64, 128}) {
    const std::string size = "exact rht=" + std::to_string(n);
    QuantizeHow how = random_key(rng, false);
    reference::SignBits signs = {how.sign_bits[0], how.sign_bits[1]};
    // The oracle's butterflies are the matrix of the definition, within log2(n) + 1 roundings.
    for (int trial = 0; trial < 20; trial++) {
      std::vector<float> v(n);
      for (float& x : v) x = (float)(rng.normal() * std::exp(rng.normal()));
      const reference::Array exact = reference::rht_exact(as_array(v), signs);
      reference::rht_fp32(v.data(), n, signs);
      const double e = rel_error(v, exact) / ((std::log2(n) + 1) * 0x1p-24);
      worst = e <= worst ? worst : e;
    }
    // Unit vectors: sign i turns the whole image of input i (a row), not output i (a column).
    std::vector<float> unit((size_t)n * n, 0.f);
    for (int i = 0; i < n; i++) unit[(size_t)i * n + i] = 1;
    const OperandBytes turned = kernel_operand<float>(unit, n, n, operand_of(size + " signs=fresh"), how),
        plain = kernel_operand<float>(unit, n, n, operand_of(size + " signs=none"), how);
    for (int i = 0; i < n; i++)
      for (int j = 0; j < n; j++) {
        const double one = reference::hadamard_entry(i, j) / std::sqrt((double)n), p = plain.values[(size_t)i * plain.ld + j],
            t = turned.values[(size_t)i * plain.ld + j];
        wrong += !(std::fabs(p - one) < .004 * std::fabs(one)) || t != (reference::negated(signs, i) ? -p : p);
      }
    // On a GPU several lanes share a group: the same bits from that form of the kernel.
    const int rows = 37, cols = 2 * n - 5, wide = 2 * n;
    TestArray<float> source(quantizer_data(kHeavyTail, rows, cols, 162)), turned_source(quantizer_data(kHeavyTail, cols, rows, 163)),
        one((size_t)rows * wide), many((size_t)rows * wide);
    SignBits bits;
    bits.word[0] = signs[0]; bits.word[1] = signs[1];
    auto compare = [&](auto size_constant, auto transpose) {
      constexpr int kN = size_constant.value;
      constexpr bool kTranspose = transpose.value;
      const Matrix<float> x = {kTranspose ? turned_source.p : source.p, kTranspose ? cols : rows, kTranspose ? rows : cols};
      launch(gather_kernel<kN, 1, true, kTranspose, Matrix<float>>, dim3(ceil_div(wide, kN), ceil_div(rows, 32)), 32, 0, one.p, x, rows, wide, cols,
          bits);
      launch(gather_kernel<kN, kN / 4, true, kTranspose, Matrix<float>>, dim3(ceil_div(wide, kN), ceil_div(rows, 32)), 256, 0, many.p, x, rows, wide,
          cols, bits);
      const std::vector<float> a = one.host(), b = many.host();
      for (size_t i = 0; i < a.size(); i++) lanes += float_bits(a[i]) != float_bits(b[i]);
      lanes += !one.guard_intact() || !many.guard_intact();
    };
    auto both = [&](auto size_constant) { compare(size_constant, std::false_type{}); compare(size_constant, std::true_type{}); };
    if (n == 16) both(std::integral_constant<int, 16>{});
    if (n == 32) both(std::integral_constant<int, 32>{});
    if (n == 64) both(std::integral_constant<int, 64>{});
    if (n == 128) both(std::integral_constant<int, 128>{});
  }
  check("the oracle's butterflies of 16 to 128 are the matrix of the definition", worst < 1, "worst error %.2f of log2(n)+1 roundings", worst);
  check("RHT 16 to 128: the signs act on the input coordinates", wrong == 0, "%d entries wrong", wrong);
  check("RHT 16 to 128: one thread a group and n/4 lanes a group give the same bits", lanes == 0, "%d differ", lanes);

  // Fresh signs: others for every GEMM, layer and step; fair coins; the same for both operands of a GEMM.
  std::vector<std::pair<uint64_t, uint64_t>> seen;
  OperandRecipe o = operand_of("exact rht=128 signs=fresh");
  int differ = 0;
  double ones = 0;
  for (uint32_t step = 0; step < 40; step++)
    for (uint32_t layer = 0; layer < 40; layer++)
      for (OperandIndex first : {kFpropX, kDgradDy, kWgradDy}) {
        const SignBits s = rotation_signs(o, first, {9, step, layer});
        const reference::SignBits want = reference::fresh_signs(9, step, layer * 8 + (uint32_t)first);
        differ += s.word[0] != want[0] || s.word[1] != want[1];
        seen.push_back({s.word[0], s.word[1]});
        for (int i = 0; i < 128; i++) ones += s.negated(i);
      }
  std::sort(seen.begin(), seen.end());
  const size_t distinct = std::unique(seen.begin(), seen.end()) - seen.begin();
  const double n = 128. * seen.size(), sigma = std::fabs(ones - n / 2) / std::sqrt(n / 4);
  check("fresh signs are Philox's, differ in every GEMM, layer and step, and are fair", differ == 0 && distinct == seen.size() && sigma < 4,
      "%d wrong, %zu of %zu distinct, %.1f sigma from fair", differ, distinct, seen.size(), sigma);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Properties that every quantizer has

// x and x * 2^-80: the same codes. A floor under a scale, or an epsilon, makes tiny gradients explode or vanish. QuEST's 1e-8 is such an epsilon, by
// its
// authors; it stays out. 4/6 compares squared errors, which underflow in FP32 below 1e-20: 2^-40 there.
inline void test_recipe_tiny_gradients() {
  const std::vector<float> x = random_matrix(35, 130, 171);
  Mismatches m;
  Rng rng(172);
  for (const std::string& text : operand_texts()) {
    const OperandRecipe o = operand_of(text);
    if (is_quest(o)) continue;
    const QuantizeHow how = random_key(rng, false);
    const float factor = o.scale == ScaleRule::four_six ? 0x1p-40f : 0x1p-80f;
    std::vector<float> tiny = x;
    for (float& v : tiny) v *= factor;
    const OperandBytes a = kernel_operand<float>(x, 35, 130, o, how), b = kernel_operand<float>(tiny, 35, 130, o, how);
    m.add(a.codes == b.codes, text.c_str(), 0, 0, 0);
    size_t wrong = 0;
    for (size_t i = 0; i < a.values.size(); i++) wrong += !((float)(a.values[i] * a.tensor * factor) == (float)(b.values[i] * b.tensor));
    m.add(wrong == 0, (text + " values").c_str(), 0, (double)wrong, 0);
  }
  m.report("x and x * 2^-80 have the same codes, and values 2^-80 apart, in every format (four over six: 2^-40)");
}

// Two MXFP4 facts: what two E4M3 bytes for one E8M0 byte lose, and nothing else.
inline void test_mxfp4_through_e4m3() {
  const OperandRecipe o = operand_of("mxfp4 scale=ceil");
  Mismatches scales, values;
  long long flushed_total = 0;
  bool counted = true;
  for (int spread : {0, 10, 17, 18, 24}) {
    const int rows = 130, cols = 200;
    std::vector<float> x = random_matrix(rows, cols, 181);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < cols; c++) {
        const int block = c / 32 + r;
        x[(size_t)r * cols + c] = block % 11 == 5 ? 0.f : std::ldexp(std::copysign(1.5f + .25f * (c % 7), x[(size_t)r * cols + c]), spread
            ? -(block % (spread + 1)) : 0);
      }
    QuantizeHow how;
    how.recipe = o;
    OperandOnDevice d(o, rows, cols, true, false);
    TestArray<float> source(x), factor(1);
    TestArray<uint8_t> bytes(scale_bytes(rows, cols));
    TestArray<unsigned> flushed(1), largest(1);
    quantize(d.out, (const float*)source.p, how, d.groups.p);
    mxfp4_as_nvfp4(bytes.p, factor.p, flushed.p, largest.p, d.out);
    reference::Quantized exact;
    oracle_operand(x, rows, cols, o, how, &exact);
    reference::ThroughE4m3 want = reference::mxfp4_through_e4m3(exact);
    const int blocks = exact.width / 16;                                      // whole blocks of 32: 14, where the operand has 13 of 16
    const std::vector<uint8_t> got = bytes.host(), tiles = tiled(want.scales, rows, blocks);
    for (size_t i = 0; i < tiles.size(); i++) scales.add(got[i] == tiles[i], "scale byte", (double)i, got[i], tiles[i]);
    const double f = factor.host()[0];
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < cols; c++) {
        const size_t i = (size_t)r * exact.width + c;
        const double through = reference::e2m1_value(exact.codes[i]) * reference::e4m3_value(want.scales[(size_t)r * blocks + c / 16]) * f;
        values.add(through == exact.value(i) || through == 0, "value", (double)i, through, exact.value(i));
      }
    counted = counted && flushed.host()[0] == (unsigned)want.flushed && bytes.guard_intact() && flushed.guard_intact() && factor.guard_intact() &&
        largest.guard_intact() && (spread <= 17) == (want.flushed == 0);
    flushed_total += want.flushed;
  }
  scales.report("MXFP4 through E4M3: bytes in the 128x4 layout, with padding");
  values.report("MXFP4 through E4M3: every value is exact, or flushed to zero");
  check("MXFP4 through E4M3: blocks more than 2^17 below the largest are flushed and counted, nearer ones and zeros are not", counted &&
      flushed_total > 100, "%lld flushed", flushed_total);
}

inline void test_saved_memory() {
  const int rows = 256, cols = 512;
  auto bits = [&](const char* text, bool mask) { return 8. * (double)packed_bytes(operand_of(text), rows, cols, mask).total() / (rows * cols); };
  check("bits an element that double quantization keeps: NVFP4 4.5, with outer 1x128 4.75, MXFP4 4.25 (5.25 with QuEST's mask)",
        bits("nvfp4", false) == 4.5 && bits("nvfp4 outer=1x128", false) == 4.75 && bits("mxfp4 scale=ceil", false) == 4.25 &&
            bits("mxfp4 scale=quest_nearest rht=32", true) == 5.25, "%.2f, %.2f, %.2f, %.2f", bits("nvfp4", false),
        bits("nvfp4 outer=1x128", false), bits("mxfp4 scale=ceil", false), bits("mxfp4 scale=quest_nearest rht=32", true));
}

inline void test_dge() {
  const double golden[10] = {.2, .4446, .5819, .2186, 2.1088, .2709, .3097, .2709, .2416, .5819};
  int wrong = 0;
  double worst = 0;
  for (int i = 0; i < 20; i++) {
    const float x = (float)(-6 + 12. * i / 19), got = dge_slope(x, 5);
    wrong += !(std::fabs(got - golden[i < 10 ? i : 19 - i]) < 6e-5);
  }
  for (float k : {1.f, 3.f, 5.f, 10.f})
    for (int i = -700; i <= 700; i++) {
      const double e = std::fabs(dge_slope(i / 100.f, k) / reference::dge(i / 100.f, k) - 1);
      worst = e <= worst ? worst : e == e ? e : INFINITY;
    }
  check("DGE: golden slopes at linspace(-6, 6, 20), k = 5", wrong == 0, "%d of 20 wrong", wrong);
  // near a kink or the middle of an interval u itself is a difference of nearby FP32 numbers
  check("DGE: slope equals the oracle's over [-7, 7] for k = 1, 3, 5, 10", worst < 1e-4, "relative error %.1e", worst);
}

// ------------------------------------------------------------------------------------------------------------------------------
// The table as text

inline std::string fields_text(const Recipe& r) {
  std::string all;
  for (const RecipeField& f : recipe_fields(r)) all += f.name + "=" + f.value + "\n";
  return all;
}
inline void test_recipe_table() {
  std::string names, problems;
  int different = 0, rows = 0;
  for (const Recipe& row : recipe_table()) {
    names += row.name + " ";
    rows++;
    Recipe copy = row, built;                                 // an empty row, all fields set from text
    problems += recipe_problem(copy);
    for (const RecipeField& f : recipe_fields(row)) problems += recipe_set(built, f.name + "=" + f.value);
    different += fields_text(built) != fields_text(row);
    problems += recipe_problem(built);
    Recipe again = row;                                       // and set to what they are already
    for (const RecipeField& f : recipe_fields(row)) problems += recipe_set(again, f.name + "=" + f.value);
    different += fields_text(again) != fields_text(row);
  }
  check("the table has the eleven rows of the specification, and our own",
      names == "bf16 fp8 nvfp4 nvfp4-46 tetrajet2 quartet2 best quartet quartet-v4 fp4-dge fqt tetrajet ", "%s", names.c_str());
  check("every row is sound, and survives being written and read as --set text", problems.empty() && different == 0 && rows > 0, "%d differ %s",
      different, problems.c_str());

  // Every value that a field says it allows is taken, and read back; any other is refused with the list.
  int refused = 0, accepted = 0;
  for (const RecipeField& f : recipe_fields(recipe_named_row("quartet"))) {
    std::stringstream in(f.allowed);
    if (f.allowed.find("a ") != 0)
      for (std::string value; std::getline(in, value, ',');) {
        if (value[0] == ' ') value = value.substr(1);
        Recipe r = recipe_named_row("quartet");
        refused += !recipe_set(r, f.name + "=" + value).empty();
        bool back = false;
        for (const RecipeField& g : recipe_fields(r)) back |= g.name == f.name && g.value == value;
        refused += !back;
      }
    for (const char* bad : {"", "no", "-1", "1e9", "nan", "1x17"}) {
      Recipe r = recipe_named_row("quartet");
      const std::string problem = recipe_set(r, f.name + "=" + bad);
      accepted += problem.find(f.allowed) == std::string::npos || fields_text(r) != fields_text(recipe_named_row("quartet"));
    }
  }
  check("--set takes every value that it says a field takes", refused == 0, "%d refused", refused);
  check("--set refuses everything else, names what is allowed and changes nothing", accepted == 0, "%d accepted", accepted);

  struct Refusal { const char* row; std::vector<std::string> set; };
  const std::vector<Refusal> refusals = {
      {"nvfp4", {"wgrad.x.rht=0"}}, {"nvfp4", {"wgrad.x.signs=fresh"}}, {"nvfp4", {"fprop.x.source=forward"}}, {"nvfp4", {"dgrad.dy.source=forward"}},
      {"nvfp4", {"fprop.x.scale=ocp"}}, {"tetrajet", {"fprop.x.scale=four_six"}},
      {"tetrajet2", {"fprop.w.format=bf16"}}, {"tetrajet2", {"fprop.x.format=bf16"}}, {"nvfp4", {"estimator.w=quest_mask"}},
      {"quartet", {"fprop.x.scale=ceil", "fprop.w.scale=ceil"}}, {"quartet", {"dgrad.w.source=original"}},
      {"quartet", {"wgrad.x.source=original"}}, {"tetrajet", {"fprop.x.rounding=eden16"}}, {"tetrajet2", {"fprop.w.blocks=16x16"}},
      {"fp8", {"dgrad.dy.rounding=stochastic"}}, {"fp4-dge", {"fprop.rht=16"}},
      {"quartet2", {"fprop.x.rounding=eden16"}}, {"fp8", {"fprop.x.outer=1x128"}}, {"tetrajet", {"fprop.w.blocks=16x16"}}};
  int missed = 0;
  std::string first;
  for (const Refusal& c : refusals) {
    Recipe r = recipe_named_row(c.row);
    std::string text = c.row, problem;
    for (const std::string& s : c.set) { problem += recipe_set(r, s); text += " " + s; }
    if (!problem.empty() || recipe_problem(r).empty()) { missed++; if (first.empty()) first = text + (problem.empty() ? "" : ": " + problem); }
  }
  check("rows that cannot be computed are refused", missed == 0, "%d of %zu not: %s", missed, refusals.size(), first.c_str());
}

// ------------------------------------------------------------------------------------------------------------------------------
// A whole tiny model under every row

struct ModelBatch {
  static constexpr int B = 4, S = 48, T = B * S;
  std::vector<int> tokens, targets;
  explicit ModelBatch(int symbols) : tokens(T), targets(T) {
    Rng rng(191);
    for (int i = 0; i < T; i++) tokens[i] = rng.below(symbols);
    for (int i = 0; i < T; i++) targets[i] = rng.below(symbols);
  }
  double gradients(Model& m, uint32_t step) const { return accumulate_gradients(m, B, S, 1, step,
      [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); }); }
};

// Initial weights of .02 make the blocks nearly invisible beside the residual stream; these are four times as large, and errors of one GEMM (.13 to
// .27)
// reach all layers above and below. No formula says what comes out: the figures are those of the first sound version. A wrong sign, mask,
// un-rotation,
// stream or scale moves them by far more than the margins, which cover other machines' order of summation.
inline void test_recipe_gradients() {
  struct Measured { const char* name; double cosine, ratio; };
  const Measured measured[] = {{"bf16", 1, 1}, {"fp8", .988, 1}, {"nvfp4", .895, 1}, {"nvfp4-46", .880, 1}, {"tetrajet2", .872, 1},
      {"quartet2", .897, 1.09}, {"best", .897, 1.09}, {"quartet", .797, 1.12}, {"quartet-v4", .818, 1.03},
                               {"fp4-dge", .843, .99}, {"fqt", .884, 1.02}, {"tetrajet", .808, 1.05}};
  const ModelBatch batch(200);
  std::vector<float> reference_gradient;
  size_t compared = 0;
  for (const Recipe& row : recipe_table()) {
    Model m;
    make_model(m, tiny_llama(), row.name.c_str(), ModelBatch::B, ModelBatch::S);
    for (Param& p : m.params)
      if (p.quantized) {
        std::vector<float> w(p.size());
        to_host(w.data(), p.weight->master, w.size());
        for (float& v : w) v *= 4;
        set_param(p, w.data());
      }
    batch.gradients(m, 3);
    const std::vector<float> g = all_gradients(m);
    const std::vector<float> stale((size_t)m.scalars.size, 1e30f);               // what no forward pass may take for a maximum
    to_device(m.scalars.all, stale.data(), stale.size());
    batch.gradients(m, 3);
    const bool again = all_gradients(m) == g;
    batch.gradients(m, 4);
    Recipe copy = row;
    bool random = false;
    for (auto& [name, o] : recipe_operands(copy)) random |= o->format != Format::bf16 &&
        (o->rounding != Rounding::nearest || o->signs == Signs::fresh);
    const bool moves = (all_gradients(m) != g) == random;                       // another step draws other numbers, where there are any
    if (reference_gradient.empty()) reference_gradient = g;
    const double c = cosine(g, reference_gradient), r = norm_ratio(g, reference_gradient);
    for (const Measured& e : measured)
      if (row.name == e.name) {
        const double margin = e.cosine == 1 ? 1e-6 : e.cosine > .98 ? .005 : .04;
        compared++;
        check(row.name +
            ": the gradient of a tiny Llama has its cosine and norm ratio to BF16's; the same bits twice, others at another step if it is random",
            again && moves && std::fabs(c - e.cosine) < margin && std::fabs(r - e.ratio) < (e.cosine == 1 ? 1e-6 : e.cosine > .98 ? .03 : .1),
              "cosine %.4f, expected %.3f; norm ratio %.4f, expected %.2f", c, e.cosine, r, e.ratio);
      }
    free_model(m);
  }
  check("every row's gradient was compared", compared == recipe_table().size() && compared == sizeof measured / sizeof *measured, "%zu", compared);
}
// One batch of random targets is learnt by heart. Embedding and head alone cannot do it: the control leaves the blocks as they are.
inline void test_recipe_training() {
  const int steps = 40;
  const ModelBatch batch(30);
  auto run = [&](const char* recipe, bool blocks_learn) {
    Model m;
    make_model(m, tiny_llama(), recipe, ModelBatch::B, ModelBatch::S);
    double last = 0;
    for (int step = 0; step < steps; step++) {
      const double loss = batch.gradients(m, (uint32_t)step);
      if (step >= steps - 5) last += loss / 5;
      gradient_norm(m, 1);
      if (!blocks_learn) for (Param& p : m.params) if (p.quantized) device_zero(p.weight->grad, p.size());
      update(m, {6e-3f * std::min(1.f, (step + 1) / 6.f), 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0);
    }
    free_model(m);
    return last;
  };
  const double bf16_loss = run("bf16", true), control = run("bf16", false);
  check("bf16 learns a batch by heart in 40 steps, and not with frozen blocks", bf16_loss < .15 && control > 1,
      "mean loss of the last 5 steps %.3f, frozen %.3f", bf16_loss, control);
  for (const Recipe& row : recipe_table())
    if (row.name != "bf16") {
      const double loss = run(row.name.c_str(), true);
      check(row.name + ": so does it, to a loss within .15 of bf16's", std::fabs(loss - bf16_loss) < .15, "%.3f", loss);
    }
}

// Among the kernels' checks: in both thread orders.
inline void test_quantizer_forms() {
  if (section("quantizers: a warp a strip, a thread a strip, a thread a block")) {
    test_strip_forms(); test_rotated_maxima(); test_both_copies(); test_many_squares(); test_alpha_and_amax(); test_packed_sources(); test_simple_quantizer();
  }
}
inline void test_recipes() {
  if (section("recipes: quantizers")) {
    test_recipe_conversions();
    test_recipe_rotation();
    test_recipe_bit_equality();
    test_packed_and_values();
    test_tiles_and_transpose();
    test_recipe_golden();
    test_recipe_tiny_gradients();
    test_mxfp4_through_e4m3();
    test_saved_memory();
  }
  if (section("recipes: errors and bias")) {
    test_e8m3();
    test_post_hoc_scales();
    test_error_table();
    test_recipe_averaging();
    test_four_six_and_sr();
  }
  if (section("recipes: linear layers")) {
    test_layers_of_all_recipes();
    test_maxima_and_alphas();
    test_quantization_off();
    test_gaussian_layers();
    test_dge();
    test_recipe_table();
  }
  if (section("recipes: a whole model")) {
    test_recipe_gradients();
    test_recipe_training();
  }
}

// The program with the options of `make run` (llama:1M, sequence 128, batch 4, on the project's own sources), shortened to so many steps.
// The same initial weights and batches for all: rows differ by up to .03. A missing un-rotation (quartet) costs .75, signs that differ between
// the operands of a GEMM .9 (quartet2) and 1.9 (tetrajet2).
inline void test_recipes_program(int steps = 30) {
  if (!section("the program: every recipe trains what `make run` trains")) return;
  for (const std::string recipe : {"nvfp4", "quartet2", "tetrajet2", "fqt"}) {
    const ChildResult r = train_program("--recipe " + recipe + " --steps 4 --profile 1 --val-batches 1 --sample-length 0 --out " + temp_dir() + "/launches_" + recipe);
    const size_t at = r.output.find("\n  zero ");
    const double fills = r.exit_code || at == std::string::npos ? (double)NAN : atof(r.output.c_str() + at + 8);
    check(recipe + ": a step fills memory for its gradients and once for all maxima, and alpha has no kernel of its own",
          fills <= 4 && r.output.find("nvfp4_kernel") != std::string::npos && r.output.find("alpha_kernel") == std::string::npos, "%.1f fills", fills);
    if (recipe == "quartet2") check("quartet2: nothing is read for its maximum alone but weights",
        r.exit_code == 0 && r.output.find("amax_of_arrays_kernel") != std::string::npos && r.output.find("amax_kernel") == std::string::npos && r.output.find("amax_both_kernel") == std::string::npos);
  }
  auto trained = [&](const std::string& recipe) {
    const ChildResult r = train_program("--recipe " + recipe + " --steps " + std::to_string(steps) + " --val-batches 8 --sample-length 0 --out " + temp_dir() + "/row_" + recipe);
    const size_t at = r.output.rfind("val loss ");
    return r.exit_code || at == std::string::npos ? (double)NAN : atof(r.output.c_str() + at + 9);
  };
  const double bf16 = trained("bf16");
  const std::string within = std::to_string(steps) + " steps: ";
  if (!check("bf16 learns in " + within + "validation loss below 4, from 5.56", bf16 < 4, "%.4f", bf16)) return;
  for (const Recipe& row : recipe_table())
    if (row.name != "bf16") {
      const double loss = trained(row.name);
      check(row.name + " in " + within + "validation loss within .15 of bf16's", std::fabs(loss - bf16) < .15, "%.4f, %+.4f", loss, loss - bf16);
    }
}
