// dev/test_formats.h -- number formats and random numbers of kernels/formats.cuh and kernels/philox.cuh, exhaustively or at every
// point where a rounding can go wrong, against dev/reference.h and against the CUDA toolkit's own host conversions.
#pragma once
#include <string>
#include <vector>
#include "../kernels/cuda.cuh"
#include "../kernels/formats.cuh"
#include "../kernels/philox.cuh"
#include "reference.h"
#include "testing.h"

// dev/cuda_header_codecs.cpp
extern "C" int cuda_codecs_present();
extern "C" uint8_t cuda_e2m1(float x);
extern "C" float cuda_e2m1_value(uint8_t code);
extern "C" uint8_t cuda_e4m3(float x);
extern "C" float cuda_e4m3_value(uint8_t byte);
extern "C" float cuda_e8m0_value(uint8_t byte);
extern "C" uint8_t cuda_e2m1_pair(float x, float y);

// ------------------------------------------------------------------------------------------------------------------------------
// Shared by all tests: an array on the device. It starts as NaN (0xff bytes), so what a kernel forgets to write shows, and is
// followed by a guard that no kernel may touch.
template <class T> struct TestArray {
  static constexpr size_t kGuard = 256;
  T* p;
  size_t n;
  explicit TestArray(size_t n) : p(device_alloc<T>(n + kGuard)), n(n) {}
  TestArray(const std::vector<T>& x) : TestArray(x.size()) { to_device(p, x.data(), n); device_sync(); }
  ~TestArray() { device_free(p); }
  TestArray(const TestArray&) = delete;
  TestArray& operator=(const TestArray&) = delete;
  std::vector<T> host(size_t count) const { std::vector<T> x(count); to_host(x.data(), p, count); return x; }
  std::vector<T> host() const { return host(n); }
  void set(const std::vector<T>& x) { to_device(p, x.data(), n); device_sync(); }
  bool guard_intact() const {
    std::vector<T> x = host(n + kGuard);
    const unsigned char* bytes = (const unsigned char*)(x.data() + n);
    for (size_t i = 0; i < kGuard * sizeof(T); i++) if (bytes[i] != 0xff) return false;
    return true;
  }
};
// Doubles to what the device holds, and back.
template <class T> std::vector<T> narrow(const reference::Array& x) {
  std::vector<T> y(x.size());
  for (size_t i = 0; i < x.size(); i++) y[i] = from_float<T>((float)x[i]);
  return y;
}
template <class T> reference::Array widen(const std::vector<T>& x) {
  reference::Array y(x.size());
  for (size_t i = 0; i < x.size(); i++) y[i] = to_float(x[i]);
  return y;
}
inline bool same_float(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }   // any NaN equals any NaN

// Counts disagreements and remembers the first.
struct Mismatches {
  size_t count = 0, total = 0;
  std::string first;
  void add(bool equal, const char* what, double at, double got, double expected) {
    total++;
    if (equal || count++) return;
    char text[200];
    snprintf(text, sizeof text, "; first: %s at %.9g: %.9g, expected %.9g", what, at, got, expected);
    first = text;
  }
  bool report(const std::string& sentence) const {
    return check(sentence, count == 0 && total > 0, "%zu of %zu differ%s", count, total, first.c_str());
  }
};

// ------------------------------------------------------------------------------------------------------------------------------

// Every float where a conversion to 4, 8 or 16 bits may go wrong: all BF16 values, all values and midpoints of the E2M1 and E4M3
// tables with their neighbours up to 2 ulp, denormals, extremes, infinities, NaN, and a random sample of all bit patterns.
inline std::vector<float> difficult_floats() {
  std::vector<float> x;
  for (uint32_t b = 0; b < 65536; b++) x.push_back(bits_float(b << 16));
  std::vector<double> points;
  for (int c = 0; c < 7; c++) points.push_back((reference::kE2m1Grid[c] + reference::kE2m1Grid[c + 1]) / 2);
  for (int c = 0; c < 126; c++) points.push_back((reference::e4m3_value((uint8_t)c) + reference::e4m3_value((uint8_t)(c + 1))) / 2);
  for (int c = 0; c < 127; c++) points.push_back(reference::e4m3_value((uint8_t)c));    // holds the E2M1 grid too
  points.push_back(464);                                                                // where 448 and a 480 would tie
  for (double p : points)
    for (int ulp = -2; ulp <= 2; ulp++)
      for (float sign : {1.f, -1.f}) x.push_back(sign * bits_float(float_bits((float)p) + (p == 0 && ulp < 0 ? 0 : ulp)));
  for (uint32_t b : {0x00000001u, 0x007fffffu, 0x00800000u, 0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fc00000u, 0x7fffffffu})
    for (uint32_t sign : {0u, 0x80000000u}) x.push_back(bits_float(b | sign));
  Rng rng(11);
  for (int i = 0; i < 50000; i++) x.push_back(bits_float((uint32_t)(rng.next() >> 32)));
  for (int i = 0; i < 50000; i++) x.push_back((float)(rng.normal() * 8));
  return x;
}

// One kernel for all conversions, so that the same source line is tested on the device and on the host.
enum FormatFunction { kE2m1Encode, kE2m1Decode, kE4m3Encode, kE4m3Decode, kE8m0Floor, kE8m0Ceil, kE8m0Decode, kBf16, kE2m1EncodeSr, kE2m1EncodeByte };
__host__ __device__ inline uint32_t format_function(int which, float x, float u) {
  switch (which) {
    case kE2m1Encode: return (uint32_t)e2m1_encode(x);
    case kE2m1EncodeSr: return (uint32_t)e2m1_encode_sr(x, u);
    case kE2m1EncodeByte: {                                  // the byte in each of its four places, among others
      const uint32_t byte = 255 - (uint32_t)(u * 256);
      int code[4];
      for (int at = 0; at < 4; at++) {
        const uint32_t bytes = (0x5aa5c33cu & ~(0xffu << 8 * at)) | byte << 8 * at;
        const float a = x != x ? 6.0f : fminf(fabsf(x), 0x1p126f);
        code[at] = e2m1_sign(x) | min((int)(e2m1_lifted_sr(a, e2m1_byte_part(bytes, at, 0x7fff), 4) >> 24), 7);
#ifdef CPU_BUILD
        const float8 eight = e2m1_round_bytes8(float8{} + x, all8(bytes >> 8 * at & 0xff));              // the CPU's
        for (int j = 0; j < 8; j++) if (code[at] != (e2m1_sign(x) | e2m1_index(eight[j]))) code[at] = 98;
#endif
      }
      return (uint32_t)(code[0] == code[1] && code[0] == code[2] && code[0] == code[3] ? code[0] : 99);
    }
    case kE4m3Encode: return e4m3_encode(x);
    case kE8m0Floor: return e8m0_encode_floor(x);
    case kE8m0Ceil: return e8m0_encode_ceil(x);
  }
  float y = which == kE2m1Decode ? e2m1_decode((int)x) : which == kE4m3Decode ? e4m3_decode((uint8_t)x)
          : which == kE8m0Decode ? e8m0_decode((uint8_t)x) : to_float(from_float<bf16>(x));
  return float_bits(y);
}
__global__ void format_kernel(uint32_t* out, const float* x, const float* u, int n, int which) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = format_function(which, x[i], u ? u[i] : 0.f);
}
inline std::vector<uint32_t> format_on_device(int which, const std::vector<float>& x, const std::vector<float>& u) {
  TestArray<float> dx(x), du(u);
  TestArray<uint32_t> out(x.size());
  launch(format_kernel, dim3(ceil_div((int)x.size(), 256)), dim3(256), 0, out.p, (const float*)dx.p,
         u.empty() ? (const float*)nullptr : (const float*)du.p, (int)x.size(), which);
  return out.host();
}

// Runs one conversion on the device and on the host and compares both with expected(x, u), given as the bits that are returned.
template <class Expected> void check_format(const std::string& sentence, int which, bool is_value, const std::vector<float>& x,
                                            const std::vector<float>& u, Expected expected) {
  std::vector<uint32_t> device = format_on_device(which, x, u);
  Mismatches m;
  for (size_t i = 0; i < x.size(); i++) {
    uint32_t host = format_function(which, x[i], u.empty() ? 0.f : u[i]);
    uint32_t want = expected(x[i], u.empty() ? 0.f : u[i]);
    auto number = [&](uint32_t bits) { return is_value ? (double)bits_float(bits) : (double)bits; };
    auto equal = [&](uint32_t got) { return is_value ? same_float(bits_float(got), bits_float(want)) : got == want; };
    m.add(equal(device[i]), "device", x[i], number(device[i]), number(want));
    m.add(equal(host), "host", x[i], number(host), number(want));
  }
  m.report(sentence);
}

inline void test_conversions() {
  using namespace reference;
  std::vector<float> all = difficult_floats(), none, codes, bf16_ties;
  for (int c = 0; c < 256; c++) codes.push_back((float)c);
  std::vector<float> codes16(codes.begin(), codes.begin() + 16);
  for (uint32_t high = 0; high < 65536; high++)
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) bf16_ties.push_back(bits_float(high << 16 | low));

  check_format("BF16: every value and every midpoint rounds to nearest even, NaN stays NaN", kBf16, true, bf16_ties, none,
               [](float x, float) { return float_bits(round_bf16(x)); });
  check_format("E2M1: all 16 codes decode", kE2m1Decode, true, codes16, none, [](float c, float) { return float_bits((float)e2m1_value((uint8_t)c)); });
  check_format("E2M1: encode is nearest, ties to even code, saturating, NaN to +6", kE2m1Encode, false, all, none,
               [](float x, float) { return e2m1_rn(x); });
  check_format("E4M3: all 256 bytes decode", kE4m3Decode, true, codes, none, [](float c, float) { return float_bits((float)e4m3_value((uint8_t)c)); });
  check_format("E4M3: encode is nearest even with subnormals, saturating at 448, NaN to 7f or ff", kE4m3Encode, false, all, none,
               [](float x, float) { return e4m3_rn(x); });
  check_format("E8M0: all 256 bytes decode", kE8m0Decode, true, codes, none, [](float c, float) { return float_bits((float)e8m0_value((uint8_t)c)); });
  std::vector<float> amax;
  for (float x : all) if (!(x < 0)) amax.push_back(std::fabs(x));
  for (int e = -149; e < 128; e++)                          // where both step
    for (int ulp = -1; ulp <= 1; ulp++) amax.push_back(bits_float(float_bits((float)std::ldexp(1., e)) + ulp));
  check_format("E8M0: the power of two at or below a value", kE8m0Floor, false, amax, none, [](float x, float) { return e8m0_floor(x); });
  check_format("E8M0: the power of two at or above a value", kE8m0Ceil, false, amax, none, [](float x, float) { return e8m0_ceil(x); });
}

inline void test_stochastic_encode() {
  std::vector<float> x, u;
  Rng rng(12);
  for (int r = 0; r < 256; r++)
    for (int i = 0; i < 420; i++) {                        // a grid of 1/64 up to 6.5 (exact grid values included), then anything
      x.push_back((i & 1 ? -1 : 1) * (i < 417 ? i / 64.f : (float)(rng.normal() * 4)));
      u.push_back((2 * r + 1) / 512.f);
    }
  for (int r = 0; r < 256; r++)                             // exactly at the threshold (stays below) and one ulp beside it
    for (int c = 0; c < 7; c++)
      for (int ulp = -1; ulp <= 1; ulp++) {
        float lo = (float)reference::kE2m1Grid[c], step = (float)reference::kE2m1Grid[c + 1] - lo, random = (2 * r + 1) / 512.f;
        x.push_back(bits_float(float_bits(lo + step * random) + ulp));
        u.push_back(random);
      }
  for (float special : {0.f, -0.f, 1e-38f, 1e-45f, 5.9999995f, 6.f, 6.375f, 1e30f, INFINITY, -INFINITY, NAN}) { x.push_back(special); u.push_back(1 / 512.f); }
  check_format("E2M1 stochastic: hi where u < (|v|-lo)/(hi-lo), for all 256 values of u", kE2m1EncodeSr, false, x, u,
               [](float v, float r) { return reference::e2m1_sr(v, r); });
  for (int r = 0; r < 256; r++)                             // every BF16 value from 2^-14 to 8, with every tenth byte
    for (uint32_t high = 0x3880; high < 0x4100; high++) if ((high + r) % 10 == 0) { x.push_back(bits_float(high << 16)); u.push_back((2 * r + 1) / 512.f); }
  for (int i = 0; i < 100000; i++) { x.push_back((float)(rng.normal() * 3)); u.push_back((2 * (float)rng.below(256) + 1) / 512.f); }
  check_format("E2M1 stochastic, as the quantizers round, with a byte: the same", kE2m1EncodeByte, false, x, u,
               [](float v, float r) { return reference::e2m1_sr(v, r); });
  Mismatches exact;
  for (int code = 0; code < 16; code++)
    for (int r = 0; r < 256; r++) {
      int got = e2m1_encode_sr((float)reference::e2m1_value((uint8_t)code), (2 * r + 1) / 512.f);
      exact.add(got == code, "code", code, got, code);
    }
  exact.report("E2M1 stochastic: a value on the grid never moves");
}

inline void test_cuda_headers() {
  const char* sentence = "E2M1 and E4M3 equal the conversions of cuda_fp4.h and cuda_fp8.h";
  if (!cuda_codecs_present()) return skip(sentence, "the CUDA toolkit's headers were not found");
  Mismatches m, pairs;
  std::vector<float> all = difficult_floats();
  for (float x : all) {
    m.add(e2m1_encode(x) == cuda_e2m1(x), "E2M1", x, e2m1_encode(x), cuda_e2m1(x));
    // the sign of a NaN is not specified: PTX gives 7f, the header on the host keeps the sign
    bool both_nan = x != x && (e4m3_encode(x) & 0x7f) == 0x7f && (cuda_e4m3(x) & 0x7f) == 0x7f;
    m.add(both_nan || e4m3_encode(x) == cuda_e4m3(x), "E4M3", x, e4m3_encode(x), cuda_e4m3(x));
  }
  for (int c = 0; c < 256; c++) {
    if (c < 16) m.add(same_float(e2m1_decode(c), cuda_e2m1_value((uint8_t)c)), "E2M1 code", c, e2m1_decode(c), cuda_e2m1_value((uint8_t)c));
    m.add(same_float(e4m3_decode((uint8_t)c), cuda_e4m3_value((uint8_t)c)), "E4M3 byte", c, e4m3_decode((uint8_t)c), cuda_e4m3_value((uint8_t)c));
    m.add(same_float(e8m0_decode((uint8_t)c), cuda_e8m0_value((uint8_t)c)), "E8M0 byte", c, e8m0_decode((uint8_t)c), cuda_e8m0_value((uint8_t)c));
  }
  m.report(sentence);
  for (int lo = 0; lo < 16; lo++)
    for (int hi = 0; hi < 16; hi++) {
      uint8_t packed = cuda_e2m1_pair((float)reference::e2m1_value((uint8_t)lo), (float)reference::e2m1_value((uint8_t)hi));
      pairs.add(packed == (lo | hi << 4), "pair", lo, packed, lo | hi << 4);
    }
  pairs.report("the even element is the low nibble of a byte, as in cuda_fp4.h");
}

// ------------------------------------------------------------------------------------------------------------------------------

__global__ void philox_kernel(uint4* out, const uint4* counter, const uint2* key, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = philox4x32(counter[i], key[i]);
}

inline void test_philox() {
  struct KnownAnswer { reference::Counter counter; reference::Key key; reference::Counter out; };
  const KnownAnswer known[3] = {       // Random123, kat_vectors, philox4x32 10
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
  std::vector<uint4> counters;
  std::vector<uint2> keys;
  std::vector<reference::Counter> expected;
  bool reference_right = true;
  for (const KnownAnswer& k : known) {
    counters.push_back({k.counter[0], k.counter[1], k.counter[2], k.counter[3]});
    keys.push_back({k.key[0], k.key[1]});
    expected.push_back(k.out);
    reference_right = reference_right && reference::philox4x32_10(k.counter, k.key) == k.out;
  }
  check("Philox4x32-10: the reference gives the published answers", reference_right, "%d of them", (int)(sizeof known / sizeof *known));
  Rng rng(13);
  auto word = [&] { return (uint32_t)(rng.next() >> 32); };
  for (int i = 0; i < 10000; i++) {
    reference::Counter c{word(), word(), word(), word()};
    reference::Key k{word(), word()};
    counters.push_back({c[0], c[1], c[2], c[3]});
    keys.push_back({k[0], k[1]});
    expected.push_back(reference::philox4x32_10(c, k));
  }
  int n = (int)counters.size();
  TestArray<uint4> in(counters), out(counters.size());
  TestArray<uint2> key(keys);
  launch(philox_kernel, dim3(ceil_div(n, 128)), dim3(128), 0, out.p, (const uint4*)in.p, (const uint2*)key.p, n);
  std::vector<uint4> device = out.host();
  auto same = [](uint4 a, const reference::Counter& b) { return a.x == b[0] && a.y == b[1] && a.z == b[2] && a.w == b[3]; };
  Mismatches answers, random;
  for (int i = 0; i < n; i++) {
    Mismatches& m = i < 3 ? answers : random;
    m.add(same(device[i], expected[i]), "device, word 0", i, device[i].x, expected[i][0]);
    uint4 host = philox4x32(counters[i], keys[i]);
    m.add(same(host, expected[i]), "host, word 0", i, host.x, expected[i][0]);
  }
  answers.report("Philox4x32-10: the kernel gives the three published answers, on the device and on the host");
  random.report("Philox4x32-10: kernel and reference agree on random counters and keys");
#ifdef CPU_BUILD
  Mismatches eight;
  for (int i = 0; i < 1000; i++) {
    const RandomKey key{rng.next(), word(), word()};
    const uint64_t first = i % 2 ? rng.next() : (uint64_t)word() << 32 | (0xffffffffu - i / 2 % 8);     // where the counter's low word runs over
    uint4 drawn[8];
    random_blocks8(drawn, key, first);
    for (int j = 0; j < 8; j++) {
      const uint4 one = random_block(key, first + j);
      eight.add(memcmp(&drawn[j], &one, sizeof one) == 0, "block", (double)j, drawn[j].x, one.x);
    }
  }
  eight.report("eight blocks of random bits at once are those drawn one by one");
#endif
}

// Every sign and index in every one of the 8 places, beside codes of other kinds.
inline void test_nibbles() {
  auto byte = [](uint32_t code) { return (code & 8) << 4 | (code & 7) << 1; };                                   // s000iii0
  Mismatches words;
  for (uint32_t others : {0u, 15u, 5u, 10u})
    for (int at = 0; at < 8; at++)
      for (uint32_t code = 0; code < 16; code++) {
        uint32_t half[2] = {}, expected = 0;
        for (int j = 0; j < 8; j++) {
          const uint32_t c = j == at ? code : others;
          half[j % 2] |= byte(c) << 8 * (j / 2);
          expected |= c << 4 * j;
        }
        words.add(e2m1_nibbles(half[0], half[1]) == expected, "code", code, e2m1_nibbles(half[0], half[1]), expected);
      }
  words.report("eight E2M1 codes in a word: every code in every place");
  Mismatches bytes;
  for (int c = 0; c < 128; c++) bytes.add(e4m3_code(e4m3_decode((uint8_t)c)) == c, "code", c, e4m3_code(e4m3_decode((uint8_t)c)), c);
  bytes.add(e4m3_code(bits_float(0x7fc00000u)) == 0x7f, "NaN", 0, e4m3_code(bits_float(0x7fc00000u)), 0x7f);
  bytes.report("E4M3: the code of each value that is one");
}
// All mantissas of one binade for each divisor: in the others nothing else happens. Of the first divisor also some at the ends of the range.
inline void test_quotients() {
  std::vector<float> divisors = {6, kEdenStep};
  for (ScaleRule rule : {ScaleRule::standard, ScaleRule::ceil, ScaleRule::headroom, ScaleRule::four_six}) divisors.push_back(nvfp4_range(rule) / 6);
  long wrong = 0;
  for (float c : divisors)
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa++) {
      const float x = bits_float(127u << 23 | mantissa);
      wrong += quotient(x, c) != x / c;
    }
  const float c = divisors[0];
  int ends = 0;
  for (int e : {-79, 79})
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 4093) ends += quotient(bits_float((127u + e) << 23 | mantissa), c) != bits_float((127u + e) << 23 | mantissa) / c;
  check("division by the constants of the scales, by multiplication and a correction, is correctly rounded", wrong == 0 && ends == 0,
        "%d divisors, 2^23 mantissas each: %ld wrong, and %d at the ends of the range", (int)divisors.size(), wrong, ends);
}

// Random pairs, divisors at the ends of their mantissas among them; the hard quotients; zeros of both signs.
inline void test_divisors() {
  Mismatches random, hard, zeros;
  Rng rng(23);
  auto add = [](Mismatches& m, float v, float d) {
    const float q = Divisor(d).quotient(v);
    m.add(float_bits(q) == float_bits(v / d), "v", v, q, v / d);
  };
  auto mantissa = [&] { return (uint32_t)rng.next() & 0x7fffffu; };
  for (int i = 0; i < 20000000; i++) {
    const uint32_t at = i % 4 == 0 ? (uint32_t)i / 4 % 65536 : i % 4 == 1 ? 0x7fffffu - (uint32_t)i / 4 % 65536 : mantissa();
    const float d = bits_float((uint32_t)(127 - 79 + rng.below(158)) << 23 | at);
    add(random, bits_float((uint32_t)(127 - 20 + rng.below(40)) << 23 | mantissa()) * (i % 2 ? d : 1.0f), d);
  }
  // The quotients nearest to the middle of two floats: of integers v and d below 2^24, with 2^24 v = d m + e, m odd (2^25 for quotients below 1): v is e
  // over a power of two, modulo d. Without its correction the first quotient is wrong here.
  for (int i = 0; i < 1000000; i++) {
    const int64_t d = 1 << 23 | mantissa() | 1;
    for (int digits : {24, 25}) {
      int64_t power = 1;                                       // 2^-digits modulo d
      for (int k = 0; k < digits; k++) power = power % 2 ? (power + d) / 2 : power / 2;
      for (int e : {-3, -1, 1, 3}) {
        const int64_t rest = (e * power % d + d) % d, v = digits == 24 ? rest + d : rest;
        if (v < 1 << 24 && 2 * v > d) add(hard, (float)v, (float)d);
      }
    }
  }
  for (float d : {1.0f, 3.0f, 0.7f, 0x1.fffffep79f, 0x1.000002p-80f}) for (float v : {0.0f, -0.0f}) add(zeros, v, d);
  random.report("division by a reciprocal and one correction: the correctly rounded quotient");
  hard.report("of quotients next to the middle of two floats");
  zeros.report("of zeros, which keep their sign");
}

inline void test_formats() {
  if (!section("formats and random numbers")) return;
  test_divisors();
  test_nibbles();
  test_quotients();
  test_conversions();
  test_stochastic_encode();
  test_cuda_headers();
  test_philox();
}
