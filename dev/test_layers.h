// dev/test_layers.h -- the kernels around the GEMMs, and the GEMM itself, against dev/reference.h: norms, RoPE, attention, GELU, SwiGLU,
// bias, residual, embedding, loss, AdamW, gradient norm; forward and backward, at odd sizes, with poisoned outputs.
//
// Tolerances follow the arithmetic. An output is allowed   relative * |ref| + absolute:
//   relative   one rounding to floatX: 2^-8 for BF16 (half of its last bit), 2^-23 for FP32;
//   absolute   FP32 arithmetic inside: a small multiple of 2^-24 times the size of the terms that were added.
// Inputs are what the device holds: rounded to floatX before the reference sees them.
#pragma once
#include <string>
#include <vector>
#include "../kernels/adamw.cuh"
#include "../kernels/attention.cuh"
#include "../kernels/embedding.cuh"
#include "../kernels/linear.cuh"
#include "../kernels/loss.cuh"
#include "../kernels/mlp.cuh"
#include "../kernels/norm.cuh"
#include "../kernels/rope.cuh"
#include "test_formats.h"

constexpr double kRoundX = sizeof(floatX) == 2 ? 0x1p-8 : 0x1p-23;
constexpr double kRoundFp32 = 0x1p-23;
constexpr double kUlp = 0x1p-24;             // half of the last bit of an FP32 number near 1

// ------------------------------------------------------------------------------------------------------------------------------
// Comparing

// The worst |out - ref| / (relative |ref| + absolute) over many runs of a kernel; at most 1 is right. NaN is worse than everything.
struct Worst {
  double ratio = 0;
  bool guards = true;
  int runs = 0;
  std::string where = "nothing ran";
  void add(double r, const std::string& at) {
    if (!runs++ || !(r <= ratio)) { ratio = r == r ? r : INFINITY; where = at; }
  }
  template <class T> void compare(const TestArray<T>& out, const reference::Array& ref, double relative, double absolute, const std::string& at) {
    reference::Array got = widen(out.host());
    double worst = got.size() == ref.size() ? 0 : INFINITY;
    for (size_t i = 0; i < ref.size() && i < got.size(); i++) {
      double r = std::fabs(got[i] - ref[i]) / (relative * std::fabs(ref[i]) + absolute + 1e-300);
      if (!(r <= worst)) worst = r == r ? r : INFINITY;
    }
    add(worst, at);
    guards = guards && out.guard_intact();
  }
  bool report(const std::string& sentence) const {
    return check(sentence, runs > 0 && ratio <= 1 && guards, "%d comparisons, worst %.2f of the tolerance (%s)%s", runs, ratio, where.c_str(),
                 guards ? "" : "; wrote beyond a buffer");
  }
};

inline reference::Array random_array(size_t n, Rng& rng, double scale = 1, double mean = 0) {
  reference::Array x(n);
  for (double& v : x) v = mean + scale * rng.normal();
  return x;
}
inline double largest(const reference::Array& x) {
  double m = 0;
  for (double v : x) if (!(std::fabs(v) <= m)) m = std::fabs(v);
  return m;
}
inline reference::Array sum(reference::Array a, const reference::Array& b) {
  for (size_t i = 0; i < a.size(); i++) a[i] += b[i];
  return a;
}
// A device array with random contents; `values` is what it holds.
template <class T> struct RandomInput : TestArray<T> {
  reference::Array values;
  RandomInput(const reference::Array& x) : TestArray<T>(narrow<T>(x)), values(widen(narrow<T>(x))) {}
};
typedef RandomInput<floatX> InputX;
typedef RandomInput<float> InputFp32;
template <class T> bool same_bits(const TestArray<T>& a, const TestArray<T>& b) { return a.n == b.n && !memcmp(a.host().data(), b.host().data(), a.n * sizeof(T)); }
inline std::string shape(std::initializer_list<int> sizes) {
  std::string s;
  for (int n : sizes) s += (s.empty() ? "" : "x") + std::to_string(n);
  return s;
}
inline std::string lanes_name(int lanes) { return lanes == 1 ? ", one thread a row" : ", " + std::to_string(lanes) + " lanes a row"; }

// ------------------------------------------------------------------------------------------------------------------------------
// The references themselves: every backward formula against central differences of its forward formula, in double.

// forward(x) is a number, gradient its claimed gradient at x. Compares directional derivatives.
template <class F> double gradient_error(const reference::Array& x, const reference::Array& gradient, const F& forward, Rng& rng) {
  double worst = 0;
  for (int i = 0; i < 4; i++) {
    reference::Array direction = random_array(x.size(), rng), plus = x, minus = x;
    const double h = 1e-5;
    double analytic = 0, scale = 0;
    for (size_t k = 0; k < x.size(); k++) {
      plus[k] += h * direction[k];
      minus[k] -= h * direction[k];
      analytic += gradient[k] * direction[k];
      scale += gradient[k] * gradient[k];
    }
    double numeric = (forward(plus) - forward(minus)) / (2 * h), e = std::fabs(numeric - analytic) / (std::sqrt(scale) + 1e-12);
    if (!(e <= worst)) worst = e == e ? e : INFINITY;
  }
  return worst;
}
inline double dot(const reference::Array& a, const reference::Array& b) {
  double s = 0;
  for (size_t i = 0; i < a.size(); i++) s += a[i] * b[i];
  return s;
}

inline void test_references() {
  using namespace reference;
  Rng rng(100);
  const int T = 5, C = 12, B = 2, H = 4, KV = 2, D = 6;
  Array x = random_array(T * C, rng, 1.5, .3), w = random_array(C, rng), b = random_array(C, rng), g = random_array(T * C, rng);
  NormGradient ln = layernorm_backward(g, x, w, T, C, 1e-5), rms = rmsnorm_backward(g, x, w, T, C, 1e-5);
  double norms = std::max({gradient_error(x, ln.dx, [&](const Array& y) { return dot(g, layernorm(y, w, b, T, C, 1e-5).out); }, rng),
                           gradient_error(w, ln.dweight, [&](const Array& y) { return dot(g, layernorm(x, y, b, T, C, 1e-5).out); }, rng),
                           gradient_error(b, ln.dbias, [&](const Array& y) { return dot(g, layernorm(x, w, y, T, C, 1e-5).out); }, rng),
                           gradient_error(x, rms.dx, [&](const Array& y) { return dot(g, rmsnorm(y, w, T, C, 1e-5).out); }, rng),
                           gradient_error(w, rms.dweight, [&](const Array& y) { return dot(g, rmsnorm(x, y, T, C, 1e-5).out); }, rng)});
  Array qkv = random_array((size_t)B * T * (H + 2 * KV) * D, rng), gqkv = random_array(qkv.size(), rng), gout = random_array((size_t)B * T * H * D, rng);
  double turned = gradient_error(qkv, rope(gqkv, B, T, H, KV, D, 10000, -1), [&](const Array& y) { return dot(gqkv, rope(y, B, T, H, KV, D, 10000, 1)); }, rng);
  double attended = gradient_error(qkv, reference::attention_backward(gout, qkv, B, T, H, KV, D),
                                   [&](const Array& y) { return dot(gout, attention(y, B, T, H, KV, D).out); }, rng);
  Array gate_up = random_array(T * 2 * C, rng, 2), dgelu(x.size());
  for (size_t i = 0; i < x.size(); i++) dgelu[i] = g[i] * reference::gelu_derivative(x[i]);
  auto gelu_sum = [&](const Array& y) { double s = 0; for (size_t i = 0; i < y.size(); i++) s += g[i] * reference::gelu(y[i]); return s; };
  double acted = std::max(gradient_error(x, dgelu, gelu_sum, rng),
                          gradient_error(gate_up, reference::swiglu_backward(g, gate_up, T, C), [&](const Array& y) { return dot(g, swiglu(y, T, C)); }, rng));
  std::vector<int> targets = {3, -1, 0, 9, 3};
  auto total = [&](const Array& y) {
    Loss l = reference::softmax_cross_entropy(y, targets, 10, C, 1, .01);
    double s = 0;
    for (int t = 0; t < T; t++) if (targets[t] >= 0) s += .7 * (l.losses[t] + .01 * l.lse[t] * l.lse[t]);
    return s;
  };
  double lost = gradient_error(x, reference::softmax_cross_entropy(x, targets, 10, C, .7, .01).dlogits, total, rng);
  double worst = std::max({norms, turned, attended, acted, lost});
  check("the references' gradients agree with central differences (norms, RoPE, attention, GELU, SwiGLU, loss with z term)", worst < 1e-7,
        "norms %.0e, RoPE %.0e, attention %.0e, activations %.0e, loss %.0e", norms, turned, attended, acted, lost);
}

// ------------------------------------------------------------------------------------------------------------------------------
// GEMM

// One run: D [M,N] inside rows of ldd, operands inside rows of lda and ldb whose rest is NaN.
struct GemmCase { int M, N, K; bool a_transposed, b_transposed, d_fp32, accumulate, with_alpha, with_bias, with_c; };
inline std::vector<floatX> in_wider_rows(const reference::Array& x, int rows, int cols, int ld) {
  std::vector<floatX> y((size_t)rows * ld, from_float<floatX>(NAN));
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) y[(size_t)r * ld + c] = from_float<floatX>((float)x[(size_t)r * cols + c]);
  return y;
}
template <class DType> void test_gemm_case(const GemmCase& g, Worst& worst, int& rest_touched, Rng& rng) {
  const int lda = (g.a_transposed ? g.M : g.K) + 8, ldb = (g.b_transposed ? g.N : g.K) + 16, ldd = g.N + 8;
  reference::Array a = widen(narrow<floatX>(random_array((size_t)g.M * g.K, rng))), b = widen(narrow<floatX>(random_array((size_t)g.N * g.K, rng)));
  TestArray<floatX> A(g.a_transposed ? in_wider_rows(reference::transposed(a, g.M, g.K), g.K, g.M, lda) : in_wider_rows(a, g.M, g.K, lda));
  TestArray<floatX> B(g.b_transposed ? in_wider_rows(reference::transposed(b, g.N, g.K), g.K, g.N, ldb) : in_wider_rows(b, g.N, g.K, ldb));
  const float alpha = g.with_alpha ? .37f : 1.f;
  TestArray<float> scalar(std::vector<float>{alpha});
  std::vector<DType> before((size_t)g.M * ldd);
  for (size_t i = 0; i < before.size(); i++) before[i] = from_float<DType>((int)(i % ldd) < g.N && g.accumulate ? (float)rng.normal() : NAN);
  TestArray<DType> D(before), C(before);
  InputX bias(random_array(g.N, rng));
  if (g.with_c) D.set(std::vector<DType>(before.size(), from_float<DType>(NAN)));                     // what is added lies elsewhere
  Gemm call;
  call.M = g.M; call.N = g.N; call.K = g.K;
  call.A = A.p; call.lda = lda; call.a_transposed = g.a_transposed;
  call.B = B.p; call.ldb = ldb; call.b_transposed = g.b_transposed;
  call.D = D.p; call.ldd = ldd; call.d_fp32 = g.d_fp32; call.accumulate = g.accumulate;
  call.alpha = g.with_alpha ? scalar.p : nullptr;
  call.bias = g.with_bias ? bias.p : nullptr;
  call.C = g.with_c ? C.p : nullptr;
  const std::vector<DType> start = D.host();
  gemm(call);
  std::vector<DType> after = D.host();
  reference::Array exact = reference::gemm(a, b, g.M, g.N, g.K);
  double bad = 0;
  for (int m = 0; m < g.M; m++)
    for (int n = 0; n < ldd; n++) {
      size_t i = (size_t)m * ldd + n;
      if (n >= g.N) { rest_touched += memcmp(&after[i], &start[i], sizeof(DType)) != 0; continue; }
      const double from_c = g.accumulate ? to_float(before[i]) : 0, from_bias = g.with_bias ? bias.values[n] : 0, old = from_c + from_bias;
      double terms = std::fabs(from_c) + std::fabs(from_bias), ref = alpha * exact[(size_t)m * g.N + n] + old;
      for (int k = 0; k < g.K; k++) terms += std::fabs(alpha * a[(size_t)m * g.K + k] * b[(size_t)n * g.K + k]);
      double relative = sizeof(DType) == 2 ? 0x1p-8 : kRoundFp32;              // errors of additions walk; tensor cores truncate once for 16 of them
      double r = std::fabs(to_float(after[i]) - ref) / (relative * std::fabs(ref) + 2 * kUlp * (2 + std::sqrt(g.K) + g.K / 16.) * terms);
      if (!(r <= bad)) bad = r == r ? r : INFINITY;
    }
  worst.guards = worst.guards && A.guard_intact() && B.guard_intact() && D.guard_intact();
  worst.add(bad, shape({g.M, g.N, g.K}) + (g.a_transposed ? " A^T" : "") + (g.b_transposed ? " B^T" : "") + (g.accumulate ? " accumulate" : "") + (g.with_bias ? " bias" : "") + (g.with_c ? " C" : ""));
}

inline void test_gemm() {
  const int sizes[][3] = {{1, 1, 1}, {3, 5, 7}, {1, 40, 33}, {40, 1, 16}, {16, 16, 32}, {33, 65, 17}, {96, 128, 64}, {100, 131, 200}, {7, 300, 45}, {20, 37, 530}};
  Rng rng(110);
  for (int transposed = 0; transposed < 4; transposed++) {
    Worst worst;
    int rest_touched = 0;
    for (auto& s : sizes)
      for (int options = 0; options < 8; options++) {
        GemmCase g{s[0], s[1], s[2], (transposed & 1) != 0, (transposed & 2) != 0, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0, false, false};
        g.d_fp32 ? test_gemm_case<float>(g, worst, rest_touched, rng) : test_gemm_case<floatX>(g, worst, rest_touched, rng);
      }
    for (auto& s : sizes)                                    // what the epilogue adds, alone and together; a bias only in D's type
      for (int options = 0; options < 6; options++) {
        GemmCase g{s[0], s[1], s[2], (transposed & 1) != 0, (transposed & 2) != 0, options == 5, options != 1, options > 2, options < 5, options != 1 && options != 3};
        g.d_fp32 ? test_gemm_case<float>(g, worst, rest_touched, rng) : test_gemm_case<floatX>(g, worst, rest_touched, rng);
      }
    worst.add(rest_touched ? INFINITY : 0, "elements of D beyond column N were written");
    worst.report(std::string("GEMM, A ") + (transposed & 1 ? "[K,M]" : "[M,K]") + ", B " + (transposed & 2 ? "[K,N]" : "[N,K]") +
                 ": odd sizes, wide rows, floatX and FP32 output, accumulate, alpha, bias, C");
  }
}

// Products of NVFP4 values are multiples of 2^-20 and sums of ordinary data fit FP32 exactly: any machine, any order, the same bits.
inline void test_gemm_exact() {
  const int M = 75, N = 90, K = 1000, ld = 1024;
  Rng rng(120);
  auto operand = [&](int rows, bool tile16) {
    std::vector<float> x((size_t)rows * K);
    for (float& v : x) v = (float)rng.normal();
    reference::Nvfp4How how;
    how.tile16 = tile16;
    return reference::nvfp4(x, rows, K, how);
  };
  reference::Nvfp4 a = operand(M, false), b = operand(N, true);
  reference::Array exact = reference::gemm_nvfp4_exact(a, b);
  auto values = [&](const reference::Nvfp4& q) { return in_wider_rows(reference::Array(q.values.begin(), q.values.end()), q.rows, 16 * q.blocks, ld); };
  TestArray<floatX> A(values(a)), B(values(b)), d(exact.size());
  TestArray<float> d_fp32(exact.size());
  float alpha = (a.amax / 2688.f) * (b.amax / 2688.f);
  TestArray<float> scalar(std::vector<float>{alpha});
  Mismatches plain, scaled;
  for (bool with_alpha : {false, true}) {
    Gemm g;
    g.M = M; g.N = N; g.K = 16 * a.blocks; g.A = A.p; g.B = B.p; g.lda = g.ldb = ld; g.ldd = N; g.alpha = with_alpha ? scalar.p : nullptr;
    g.D = d.p;
    gemm(g);
    g.D = d_fp32.p; g.d_fp32 = true;
    gemm(g);
    std::vector<floatX> x = d.host();
    std::vector<float> f = d_fp32.host();
    for (size_t i = 0; i < exact.size(); i++) {
      float want = with_alpha ? alpha * (float)exact[i] : (float)exact[i], want_x = sizeof(floatX) == 2 ? reference::round_bf16(want) : want;
      Mismatches& m = with_alpha ? scaled : plain;
      m.add((double)(float)exact[i] == exact[i], "does not fit FP32, element", (double)i, exact[i], exact[i]);
      m.add(f[i] == want, "FP32 element", (double)i, f[i], want);
      m.add(to_float(x[i]) == want_x, "floatX element", (double)i, to_float(x[i]), want_x);
    }
  }
  plain.report("GEMM of NVFP4 operands equals the integer product exactly (FP32 D), rounded once (floatX D)");
  scaled.report("and with alpha: the exact product times alpha, rounded once in FP32");
}

// GELU in the GEMM's epilogue, beside the same GEMM without it and gelu_forward(). With s the sum and e what FP32 arithmetic does to it:
//   gelu_input   s rounded once: kRoundX |s| + e
//   D            gelu(s) rounded once: kRoundX |gelu(s)| + 1.13 e (GELU's steepest slope), and of the two ways one each:
//                  the library's  of the FP32 sum, by the hardware's tanh, relative error 2^-11: half of that times |s|; allowed is twice as much
//                  gelu_forward() of the rounded sum: 1.13 kRoundX |s|
// so that the two D may differ by the sum of all of this. Where gelu_forward() is what runs, and everywhere on the CPU, they have the same bits.
struct GeluCase { int M, N, K; bool a_transposed, b_transposed, with_alpha, with_bias, wide; };
struct GeluResults { Worst sums, values, apart; Mismatches bits, again, rest; int in_gemm = 0, cases = 0, form_n = 0; double to_tanh = 0, to_erf = 0; bool guards = true; };
inline void test_gemm_gelu_case(const GeluCase& c, GeluResults& out, Rng& rng) {
  const int ldd = c.N + (c.wide ? 8 : 0);
  const size_t n = (size_t)c.M * ldd;
  InputX A(random_array((size_t)c.M * c.K, rng, 2)), B(random_array((size_t)c.N * c.K, rng, c.with_alpha ? 1 : 1 / std::sqrt(c.K))), bias(random_array(c.N, rng));
  const float alpha = c.with_alpha ? (float)(1 / std::sqrt(c.K)) : 1;           // s: a standard deviation of 2
  TestArray<float> scalar(std::vector<float>{alpha});
  const std::vector<floatX> nothing(n, from_float<floatX>(NAN));
  TestArray<floatX> D(nothing), input(nothing), plain(nothing), activated(n);
  Gemm g;
  g.M = c.M; g.N = c.N; g.K = c.K; g.a_transposed = c.a_transposed; g.b_transposed = c.b_transposed;
  g.A = A.p; g.lda = c.a_transposed ? c.M : c.K; g.B = B.p; g.ldb = c.b_transposed ? c.N : c.K; g.ldd = ldd;
  g.alpha = c.with_alpha ? scalar.p : nullptr;
  g.bias = c.with_bias ? bias.p : nullptr;
  g.D = plain.p;
  gemm(g);
  gelu_forward(activated.p, plain.p, n);
  g.D = D.p; g.gelu_input = input.p;
  const bool fused = gemm_has_gelu(g);
  if (!fused && c.wide) return;
  auto run = [&] {
    D.set(nothing); input.set(nothing);
    if (c.wide) gemm(g);
    else run_gemm(g, {g.A, g.lda, g.a_transposed, nullptr, {}, {}}, {g.B, g.ldb, g.b_transposed, nullptr, {}, {}}, LinearScratch{}, GemmWay::emulated);
    return D.host();
  };
  const std::vector<floatX> got = run(), got_sums = input.host(), again = run(), again_sums = input.host(), sums = plain.host(), apart = activated.host();
  const size_t step = 1 + (size_t)((double)c.M * c.N * c.K / 2e7);              // a large case: some of its elements
  const std::string at = shape({c.M, c.N, c.K}) + (c.with_bias ? " bias" : "");
  double worst_sum = 0, worst = 0, worst_apart = 0;
  auto raise = [](double& w, double error, double tolerance) { if (!(error / tolerance <= w)) w = error == error ? error / tolerance : INFINITY; };
  for (size_t i = 0; i < n; i++) {
    const size_t m = i / ldd, col = i % ldd;
    const bool inside = (int)col < c.N;
    out.again.add(!memcmp(&got[i], &again[i], sizeof(floatX)) && !memcmp(&got_sums[i], &again_sums[i], sizeof(floatX)), "element", (double)i, to_float(again[i]), to_float(got[i]));
    if (!inside) { out.rest.add(!memcmp(&got[i], &nothing[i], sizeof(floatX)) && !memcmp(&got_sums[i], &nothing[i], sizeof(floatX)), "element", (double)i, to_float(got[i]), NAN); continue; }
    if (kOnCpu || !fused) out.bits.add(!memcmp(&got[i], &apart[i], sizeof(floatX)) && !memcmp(&got_sums[i], &sums[i], sizeof(floatX)), "element", (double)i, to_float(got[i]), to_float(apart[i]));
    if (i % step) continue;
    double s = c.with_bias ? bias.values[col] : 0, terms = std::fabs(s);
    for (size_t k = 0; k < (size_t)c.K; k++) {
      const double t = alpha * A.values[c.a_transposed ? k * c.M + m : m * c.K + k] * B.values[c.b_transposed ? k * c.N + col : col * c.K + k];
      s += t; terms += std::fabs(t);
    }
    const double e = 2 * kUlp * (2 + std::sqrt(c.K) + c.K / 16.) * terms, value = reference::gelu(s), kernel = 1.13 * kRoundX * std::fabs(s), library = 0x1p-11 * std::fabs(s);
    const bool by_library = fused && !kOnCpu;
    raise(worst_sum, std::fabs(to_float(got_sums[i]) - s), kRoundX * std::fabs(s) + e);
    raise(worst, std::fabs(to_float(got[i]) - value), (kRoundX + 8 * kUlp) * std::fabs(value) + 1.13 * e + 12 * kUlp + (by_library ? library : kernel));
    raise(worst_apart, std::fabs((double)to_float(got[i]) - to_float(apart[i])),
          kRoundX * (std::fabs((double)to_float(got[i])) + std::fabs((double)to_float(apart[i]))) + 2 * 1.13 * e + 24 * kUlp + kernel + library);
    if (s > -3 && s < -2) { out.form_n++; out.to_tanh += to_float(got[i]) - value; out.to_erf += to_float(got[i]) - 0.5 * s * std::erfc(-s / std::sqrt(2.0)); }
  }
  out.sums.add(worst_sum, at); out.values.add(worst, at); out.apart.add(worst_apart, at);
  out.guards = out.guards && D.guard_intact() && input.guard_intact();
  out.in_gemm += fused; out.cases++;
#ifndef CPU_BUILD
  if (!fused) return;
  D.set(nothing); input.set(nothing);
  cublas_check_at(run_plan(g, plan_of(g), plan_of(g).first, D.p), "the first algorithm", g);
  const std::vector<floatX> first = D.host(), first_sums = input.host();
  for (size_t i = 0; i < n; i++)
    out.bits.add(!memcmp(&got[i], &first[i], sizeof(floatX)) && !memcmp(&got_sums[i], &first_sums[i], sizeof(floatX)), "element", (double)i, to_float(got[i]), to_float(first[i]));
#endif
}
inline void test_gemm_gelu() {
  GeluResults out;
  Rng rng(132);
  const int sizes[][3] = {{1, 8, 8}, {33, 72, 40}, {96, 128, 64}, {128, 392, 768}, {8, 304, 1032}, {3, 5, 7}, {33, 65, 17}, {40, 1, 16}, {7, 300, 45}, {31, 72, 45}};
  for (auto& s : sizes) for (int options = 0; options < 8; options++)
    test_gemm_gelu_case({s[0], s[1], s[2], options == 5, options == 6, (options & 2) != 0, (options & 1) != 0, options > 3}, out, rng);
  if (!kOnCpu) for (bool with_bias : {true, false}) test_gemm_gelu_case({8200, 1032, 640, false, false, false, with_bias, with_bias}, out, rng);   // many algorithms are tried
  const std::string count = " (" + std::to_string(out.in_gemm) + " of " + std::to_string(out.cases) + " cases in the GEMM)";
  out.sums.report("GEMM with GELU: the sum before it, rounded once" + count);
  out.values.report("GEMM with GELU: D is the GELU of the sum, in the tanh form");
  out.apart.report("and differs from GEMM and gelu_forward() within the roundings of both ways");
  out.bits.report(kOnCpu ? "and has their bits, D and the sum" : "and has their bits where gelu_forward() ran, and elsewhere those of the heuristic's first algorithm, D and the sum");
  out.again.report("and has the same bits the second time");
  out.rest.report("and elements beyond column N stay");
  check("and nothing is written beyond the buffers", out.guards);
  check("GELU on (-3, -2) is nearer to the tanh form than to the exact one", out.form_n > 500 && std::fabs(out.to_tanh) < std::fabs(out.to_erf), "mean difference %.1e, exact form %.1e, of %d",
        out.to_tanh / out.form_n, out.to_erf / out.form_n, out.form_n);
  if (kOnCpu || sizeof(floatX) == 2) check("aligned shapes have GELU in the GEMM", out.in_gemm >= 30, "%d cases", out.in_gemm);
  else check("FP32 has no GELU in the GEMM", out.in_gemm == 0);
}

// A large GEMM is run many times at its first use, to find the fastest algorithm (choose_fastest() in gemm.cuh). None of it may show in D.
#ifndef CPU_BUILD
struct LargeGemms { Mismatches values, bits, again, rest; int timed = 0, chosen = 0, shapes = 0; bool guards = true; };
template <class DType> void test_gemm_large_case(const GemmCase& c, LargeGemms& out, Rng& rng) {
  const int ldd = c.N + 8;
  InputX A(random_array((size_t)c.M * c.K, rng)), B(random_array((size_t)c.N * c.K, rng)), bias(random_array(c.N, rng));
  std::vector<DType> before((size_t)c.M * ldd), elsewhere(before.size(), from_float<DType>(NAN));
  for (size_t i = 0; i < before.size(); i++) before[i] = from_float<DType>((int)(i % ldd) < c.N && c.accumulate ? 8 * (float)rng.normal() : NAN);
  TestArray<DType> D(c.with_c ? elsewhere : before), C(before);
  Gemm g;
  g.M = c.M; g.N = c.N; g.K = c.K; g.a_transposed = c.a_transposed; g.b_transposed = c.b_transposed; g.d_fp32 = c.d_fp32; g.accumulate = c.accumulate;
  g.A = A.p; g.lda = c.a_transposed ? c.M : c.K; g.B = B.p; g.ldb = c.b_transposed ? c.N : c.K; g.D = D.p; g.ldd = ldd;
  if (c.with_bias) g.bias = bias.p;
  if (c.with_c) g.C = C.p;
  auto run = [&](bool first) {
    D.set(c.with_c ? elsewhere : before);
    if (!first) gemm(g);
    else cublas_check_at(run_plan(g, plan_of(g), plan_of(g).first, D.p), "the first algorithm", g);
    return D.host();
  };
  const std::vector<DType> got = run(false), again = run(false), first = run(true);
  for (size_t i = 0; i < got.size(); i++) {
    const bool inside = (int)(i % ldd) < c.N;
    out.bits.add(!memcmp(&got[i], &first[i], sizeof(DType)), "element", (double)i, to_float(got[i]), to_float(first[i]));
    out.again.add(!memcmp(&got[i], &again[i], sizeof(DType)), "element", (double)i, to_float(again[i]), to_float(got[i]));
    if (!inside) out.rest.add(!memcmp(&got[i], &before[i], sizeof(DType)), "element", (double)i, to_float(got[i]), NAN);
  }
  for (int sample = 0; sample < 4000; sample++) {            // against the sum itself, in double
    const size_t m = rng.below(c.M), n = rng.below(c.N), i = m * ldd + n;
    double ref = (c.accumulate ? to_float(before[i]) : 0) + (c.with_bias ? bias.values[n] : 0), terms = std::fabs(ref);
    for (size_t k = 0; k < (size_t)c.K; k++) {
      const double t = A.values[c.a_transposed ? k * c.M + m : m * c.K + k] * B.values[c.b_transposed ? k * c.N + n : n * c.K + k];
      ref += t; terms += std::fabs(t);
    }
    const double tolerance = (sizeof(DType) == 2 ? 0x1p-8 : kRoundFp32) * std::fabs(ref) + 2 * kUlp * (2 + std::sqrt(c.K) + c.K / 16.) * terms;
    out.values.add(std::fabs(to_float(got[i]) - ref) <= tolerance, "element", (double)i, to_float(got[i]), ref);
  }
  const CublasLt::Plan& p = plan_of(g);
  out.timed += p.timed; out.chosen += memcmp(&p.algo, &p.first, sizeof p.algo) != 0; out.shapes++;
  out.guards = out.guards && D.guard_intact() && C.guard_intact();
}
inline void test_gemm_large() {
  const int M = 8200, N = 1032, K = 640;                     // 1.1e10 flops: large for choose_fastest()
  Rng rng(130);
  LargeGemms out;
  test_gemm_large_case<floatX>({M, N, K, false, false, false, false, false, false, false}, out, rng);
  test_gemm_large_case<floatX>({M, N, K, false, true, false, false, false, true, false}, out, rng);
  test_gemm_large_case<floatX>({M, N, K, false, false, false, true, false, true, true}, out, rng);
  test_gemm_large_case<floatX>({M, N, K, false, false, false, true, false, false, false}, out, rng);      // into D itself: once, not once a run
  test_gemm_large_case<float>({M, N, K, true, true, true, true, false, false, false}, out, rng);
  char timed[100];
  snprintf(timed, sizeof timed, " (%d shapes, %d algorithms timed, another than the first chosen %d times)", out.shapes, out.timed, out.chosen);
  out.values.report("large GEMMs are right at their first use: D written, D added to once, C and bias added once");
  out.bits.report("the algorithm that was chosen by its time gives every bit of the heuristic's first" + std::string(timed));
  out.again.report("and the second use gives the bits of the first use");
  out.rest.report("and elements of D beyond column N stay");
  check("and nothing is written beyond the buffers", out.guards);
}
#else
// On the CPU an element is one sum in ascending order, whatever pieces K goes in.
inline void test_gemm_order() {
  Rng rng(131);
  Mismatches order;
  for (int transposed = 0; transposed < 4; transposed++)
    for (int K : {cpu_gemm::kDepth - 1, cpu_gemm::kDepth, cpu_gemm::kDepth + 1, 2 * cpu_gemm::kDepth + 21}) {
      Gemm g;
      g.M = 110; g.N = 45; g.K = K; g.a_transposed = transposed & 1; g.b_transposed = transposed & 2; g.d_fp32 = true;
      InputX A(random_array((size_t)g.M * K, rng)), B(random_array((size_t)g.N * K, rng));
      TestArray<float> D(std::vector<float>((size_t)g.M * g.N, NAN));
      g.A = A.p; g.lda = g.a_transposed ? g.M : K; g.B = B.p; g.ldb = g.b_transposed ? g.N : K; g.D = D.p; g.ldd = g.N;
      gemm(g);
      const std::vector<float> got = D.host();
      for (int m = 0; m < g.M; m++) for (int n = 0; n < g.N; n++) {
        float sum = 0;
        for (int k = 0; k < K; k++) {
          const float a = (float)A.values[g.a_transposed ? (size_t)k * g.M + m : (size_t)m * K + k], b = (float)B.values[g.b_transposed ? (size_t)k * g.N + n : (size_t)n * K + k];
#if defined(__FMA__) && defined(__AVX2__)
          sum = fmaf(a, b, sum);
#else
          sum = a * b + sum;
#endif
        }
        const float value = got[(size_t)m * g.N + n];
        order.add(value == sum, "element", m * g.N + n, value, sum);
      }
    }
  order.report("the CPU's GEMM adds up every element in ascending order, bit for bit, in one piece of K or in several");
}
inline void test_gemm_large() {
  test_gemm_order();
  skip("a large GEMM's algorithm, chosen by its time, gives the bits of the heuristic's first", "the CPU has one algorithm");
}
#endif

// ------------------------------------------------------------------------------------------------------------------------------
// Maxima of what kernels store (amax.cuh)

// Inputs by kind: random; with the largest entry at place `at`; zeros; with a NaN there; with an infinity there.
enum MaximumKind { kPlainMaximum, kLargeEntry, kAllZero, kNanEntry, kInfiniteEntry, kMaximumKinds };
inline reference::Array maximum_input(size_t n, int kind, size_t at, Rng& rng) {
  reference::Array x = random_array(n, rng, kind == kAllZero ? 0 : 1);
  const double entries[kMaximumKinds] = {x[at], -3000, 0, NAN, -INFINITY};
  x[at] = entries[kind];
  return x;
}
struct StoredMaxima {
  Mismatches bits, search, outputs;
  int nans = 0, infinities = 0, zeros = 0, last = 0;
  // run(float* amax) writes out [rows, cols]: with null and with a scalar the same, and the scalar is its largest value, as the search has it.
  template <class T, class Run> void compare(TestArray<T>& out, int rows, int cols, const std::string& at, Run run) {
    run(nullptr);
    const std::vector<T> alone = out.host();
    const TestArray<float> found(std::vector<float>{0}), searched(std::vector<float>{0, 0});
    out.set(std::vector<T>(out.n, from_float<T>(1e30f)));
    run(found.p);
    const std::vector<T> with = out.host();
    amax_of_both(searched.p, searched.p + 1, out.p, rows, cols, QuantizeHow{});
    uint32_t most = 0;
    for (T v : with) most = std::max(most, float_bits(to_float(v)) & 0x7fffffffu);
    const float want = bits_float(most), got = found.host()[0], by_search = searched.host()[0];
    bits.add(same_float(got, want), at.c_str(), rows, got, want);
    search.add(float_bits(got) == float_bits(by_search), at.c_str(), rows, got, by_search);
    outputs.add(!memcmp(alone.data(), with.data(), out.n * sizeof(T)) && out.guard_intact() && found.guard_intact(), at.c_str(), rows, 0, 0);
    nans += want != want; infinities += std::isinf(want); zeros += want == 0;
    last += (float_bits(to_float(with.back())) & 0x7fffffffu) == most && !(want != want);
  }
  void report(const std::string& name, bool with_infinities) const {
    bits.report(name + ": the maximum of what was stored, with zeros, NaN and infinity among the inputs");
    search.report(name + ": it has the bits of a search");
    outputs.report(name + ": with a maximum it stores what it stores without");
    check(name + ": such maxima are among these", nans > 0 && zeros > 0 && last > 0 && (infinities > 0 || !with_infinities), "%d NaN, %d infinite, %d zero, %d in the last place",
          nans, infinities, zeros, last);
  }
};
template <int kLanes> void test_norm_maxima() {
  const int sizes[][2] = {{1, 1}, {3, 7}, {5, 64}, {17, 96}, {9, 768}, {4, 1025}, {30, 40}, {5, 1000}, {2, 1032}, {6, 2048}, {11, 520}};
  StoredMaxima layer, rms, swiglu;
  Rng rng(131);
  for (auto& s : sizes) for (int kind = 0; kind < kMaximumKinds; kind++) for (bool last : {true, false}) {
    const int T = s[0], C = s[1];
    const size_t n = (size_t)T * C, at = last ? n - 1 : (size_t)rng.below((int)n);
    const std::string where = shape({T, C}) + " kind " + std::to_string(kind);
    // an infinity among x makes its row NaN: for one in `out` it is among LayerNorm's biases, RMSNorm's weights
    const bool infinite = kind == kInfiniteEntry, zero = kind == kAllZero;
    const InputX x(maximum_input(n, infinite ? kPlainMaximum : kind, at, rng));
    const InputFp32 w(random_array(C, rng, zero ? 0 : 1)), b(maximum_input(C, infinite || zero ? kind : kPlainMaximum, C - 1, rng));
    const InputFp32 rms_w(maximum_input(C, infinite || zero ? kind : kPlainMaximum, C - 1, rng));
    TestArray<floatX> out(n);
    TestArray<float> mu(T), rstd(T);
    layer.compare(out, T, C, where, [&](float* amax) { layernorm_forward<kLanes>(out.p, mu.p, rstd.p, x.p, w.p, b.p, T, C, 1e-5f, amax); });
    rms.compare(out, T, C, where, [&](float* amax) { rmsnorm_forward<kLanes>(out.p, rstd.p, x.p, rms_w.p, T, C, 1e-6f, amax); });
    reference::Array gate_up = random_array(2 * n, rng, kind == kAllZero ? 0 : 1);
    const size_t up = at / C * 2 * C + C + at % C;
    gate_up[up] = maximum_input(1, kind, 0, rng)[0];
    gate_up[up - C] = kind == kAllZero ? 0 : 2;
    const InputX both(gate_up);
    swiglu.compare(out, T, C, where, [&](float* amax) { swiglu_forward<kLanes>(out.p, both.p, T, C, amax); });
  }
  layer.report("LayerNorm" + lanes_name(kLanes), true);
  rms.report("RMSNorm" + lanes_name(kLanes), true);
  swiglu.report("SwiGLU" + lanes_name(kLanes), true);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Norms

// sums = before + the column sums of dx as it was stored
inline void compare_dx_sums(Worst& worst, InputFp32& sums, const InputFp32& before, InputX& dx, int T, int C, const std::string& at) {
  const reference::Array stored = widen(dx.host());
  worst.compare(sums, sum(before.values, reference::column_sums(stored, T, C)), kRoundFp32, 4 * kUlp * std::sqrt((double)T) * largest(stored), at + " sums of dx");
}
template <int kLanes> void test_layernorm(int T, int C, double scale, double mean, Worst& forward, Worst& backward, bool& deterministic, Rng& rng) {
  const float eps = 1e-5f;
  const std::string at = shape({T, C}) + (mean > 1 ? " large mean" : "");
  InputX x(random_array((size_t)T * C, rng, scale, mean)), dout(random_array((size_t)T * C, rng)), dx0(random_array((size_t)T * C, rng));
  InputFp32 w(random_array(C, rng, .5, 1)), b(random_array(C, rng)), dw0(random_array(C, rng)), db0(random_array(C, rng));
  TestArray<floatX> out((size_t)T * C);
  TestArray<float> mu(T), rstd(T), scratch(norm_backward_scratch(T, C));
  layernorm_forward<kLanes>(out.p, mu.p, rstd.p, x.p, w.p, b.p, T, C, eps);
  reference::Norm ref = reference::layernorm(x.values, w.values, b.values, T, C, eps);
  // x - mean loses what FP32 cannot hold of the mean: a few ulp of the largest |x|, times rstd
  double cancellation = 6 * kUlp * largest(x.values) * largest(ref.rstd), row = (4 + std::sqrt((double)C)) * kUlp, terms = row + cancellation;
  forward.compare(out, ref.out, kRoundX, terms * (1 + largest(w.values)), at);
  forward.compare(mu, ref.mean, 0, 6 * kUlp * largest(x.values), at + " mean");
  forward.compare(rstd, ref.rstd, row + cancellation, 0, at + " rstd");

  reference::NormGradient g = reference::layernorm_backward(dout.values, x.values, w.values, T, C, eps);
  for (int run = 0; run < 2; run++) {
    InputX dx(dx0.values), dx_again(dx0.values);
    InputFp32 dw(dw0.values), db(db0.values), dw_again(dw0.values), db_again(db0.values);
    InputFp32 sums(db0.values), sums_again(db0.values);
    layernorm_backward<kLanes>(dx.p, dw.p, db.p, dout.p, x.p, w.p, mu.p, rstd.p, scratch.p, T, C, run ? sums.p : nullptr);
    layernorm_backward<kLanes>(dx_again.p, dw_again.p, db_again.p, dout.p, x.p, w.p, mu.p, rstd.p, scratch.p, T, C, sums_again.p);
    deterministic = deterministic && same_bits(dx, dx_again) && same_bits(dw, dw_again) && same_bits(db, db_again) && same_bits(sums, run ? sums_again : db0);
    compare_dx_sums(backward, sums_again, db0, dx, T, C, at);
    double size = largest(dout.values) * largest(w.values) * (1 + largest(ref.rstd));
    backward.compare(dx, sum(dx0.values, g.dx), kRoundX, 2 * terms * size, at + " dx");
    backward.compare(dw, sum(dw0.values, g.dweight), kRoundFp32, 2 * terms * largest(dout.values) * std::sqrt((double)T) * 4, at + " dweight");
    backward.compare(db, sum(db0.values, g.dbias), kRoundFp32, 4 * kUlp * std::sqrt((double)T) * largest(dout.values), at + " dbias");
  }
  forward.guards = forward.guards && scratch.guard_intact();
}

template <int kLanes> void test_rmsnorm(int T, int C, Worst& forward, Worst& backward, bool& deterministic, Rng& rng) {
  const float eps = 1e-6f;
  const std::string at = shape({T, C});
  InputX x(random_array((size_t)T * C, rng, 2)), dout(random_array((size_t)T * C, rng)), dx0(random_array((size_t)T * C, rng));
  InputFp32 w(random_array(C, rng, .5, 1)), dw0(random_array(C, rng));
  TestArray<floatX> out((size_t)T * C);
  TestArray<float> rstd(T), scratch(norm_backward_scratch(T, C));
  rmsnorm_forward<kLanes>(out.p, rstd.p, x.p, w.p, T, C, eps);
  reference::Norm ref = reference::rmsnorm(x.values, w.values, T, C, eps);
  const double row = (4 + std::sqrt((double)C)) * kUlp;          // a sum of C squares, at worst by one thread in one chain
  forward.compare(out, ref.out, kRoundX, row * (1 + largest(ref.out)), at);
  forward.compare(rstd, ref.rstd, row, 0, at + " rstd");
  reference::NormGradient g = reference::rmsnorm_backward(dout.values, x.values, w.values, T, C, eps);
  InputX dx(dx0.values), dx_again(dx0.values);
  InputFp32 dw(dw0.values), dw_again(dw0.values);
  InputFp32 sums(dw0.values);
  rmsnorm_backward<kLanes>(dx.p, dw.p, dout.p, x.p, w.p, rstd.p, scratch.p, T, C);
  rmsnorm_backward<kLanes>(dx_again.p, dw_again.p, dout.p, x.p, w.p, rstd.p, scratch.p, T, C, sums.p);
  compare_dx_sums(backward, sums, dw0, dx, T, C, at);
  deterministic = deterministic && same_bits(dx, dx_again) && same_bits(dw, dw_again);
  double size = largest(dout.values) * largest(w.values) * (1 + largest(ref.rstd)) * 4;
  backward.compare(dx, sum(dx0.values, g.dx), kRoundX, row * size, at + " dx");
  backward.compare(dw, sum(dw0.values, g.dweight), kRoundFp32, 4 * kUlp * std::sqrt((double)T) * largest(dout.values) * 4, at + " dweight");
  forward.guards = forward.guards && scratch.guard_intact();
}

template <int kLanes> void test_norms() {
  const int sizes[][2] = {{1, 1}, {1, 8}, {3, 7}, {5, 64}, {17, 96}, {33, 130}, {9, 768}, {4, 1025}, {130, 40}, {5, 1000}, {6, 2048}, {3, 2056}, {60, 520}};
  Worst ln_forward, ln_backward, rms_forward, rms_backward;
  bool deterministic = true;
  Rng rng(130);
  for (auto& s : sizes) {
    test_layernorm<kLanes>(s[0], s[1], 2, .5, ln_forward, ln_backward, deterministic, rng);
    test_rmsnorm<kLanes>(s[0], s[1], rms_forward, rms_backward, deterministic, rng);
  }
  test_layernorm<kLanes>(6, 200, 8, 1000, ln_forward, ln_backward, deterministic, rng);   // E[x^2] - mean^2 would be off by far
  ln_forward.report("LayerNorm forward, a mean 100 times the deviation included" + lanes_name(kLanes));
  ln_backward.report("LayerNorm backward adds to dx, dweight, dbias, and sums dx" + lanes_name(kLanes));
  rms_forward.report("RMSNorm forward" + lanes_name(kLanes));
  rms_backward.report("RMSNorm backward adds to dx, dweight, and sums dx" + lanes_name(kLanes));
  check("norm gradients: the same bits twice" + lanes_name(kLanes), deterministic, "all sizes");
}

// ------------------------------------------------------------------------------------------------------------------------------
// RoPE

inline void test_rope() {
  struct { int B, T, H, KV, D; } sizes[] = {{1, 1, 1, 1, 2}, {2, 7, 3, 1, 8}, {1, 33, 4, 2, 64}, {3, 5, 2, 2, 128}, {1, 19, 6, 3, 10}};
  Worst forward, backward, table;
  const double theta = 10000;
  for (auto& s : sizes) {
    Rng rng(140);
    std::vector<float> cos_sin((size_t)s.T * s.D);
    rope_table(cos_sin.data(), s.T, s.D, (float)theta);
    TestArray<float> device_table(cos_sin);
    for (int direction : {1, -1}) {
      InputX qkv(random_array((size_t)s.B * s.T * (s.H + 2 * s.KV) * s.D, rng));
      reference::Array ref = reference::rope(qkv.values, s.B, s.T, s.H, s.KV, s.D, theta, direction);
      direction > 0 ? rope_forward(qkv.p, device_table.p, s.B, s.T, s.H, s.KV, s.D) : rope_backward(qkv.p, device_table.p, s.B, s.T, s.H, s.KV, s.D);
      (direction > 0 ? forward : backward).compare(qkv, ref, kRoundX, 3 * kUlp * largest(ref), shape({s.B, s.T, s.H, s.KV, s.D}));
    }
  }
  // far positions: t theta^(-2i/D) computed in FP32 would be off by 1e-4
  const int T = 5000, D = 64;
  std::vector<float> cos_sin((size_t)T * D);
  rope_table(cos_sin.data(), T, D, 500000.f);
  double worst = 0;
  for (int t = 0; t < T; t++)
    for (int i = 0; i < D / 2; i++) {
      const float* entry = &cos_sin[((size_t)t * D / 2 + i) * 2];
      double angle = t * std::pow(500000., -2. * i / D), c = entry[0] - std::cos(angle), s = entry[1] - std::sin(angle);
      double e = std::max(std::fabs(c), std::fabs(s));
      if (!(e <= worst)) worst = e == e ? e : INFINITY;
    }
  forward.report("RoPE forward (pairs i and i + D/2), v untouched");
  backward.report("RoPE backward is the inverse rotation");
  check("RoPE table is exact to FP32 up to position 5000", worst <= 1.5 * kUlp, "worst error %.1e", worst);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Bias, residual, GELU, SwiGLU

template <int kLanes> void test_mlp() {
  Worst bias, bias_gradient, residual, gelu, forward, backward;
  bool deterministic = true;
  Rng rng(150);
  const int sizes[][2] = {{1, 1}, {3, 7}, {5, 64}, {33, 130}, {9, 768}, {130, 40}, {257, 9}};
  for (auto& s : sizes) {
    int T = s[0], N = s[1];
    size_t n = (size_t)T * N;
    std::string at = shape({T, N});
    InputX x(random_array(n, rng)), a(random_array(n, rng)), b(random_array(n, rng)), dout(random_array(n, rng)), gate_up(random_array(2 * n, rng, 3));
    InputFp32 w(random_array(N, rng)), dbias(random_array(N, rng)), dbias_again(dbias.values);
    TestArray<floatX> out(n), dgate_up(2 * n);
    TestArray<float> scratch(bias_backward_scratch(T, N));
    reference::Array with_bias = x.values, both = sum(a.values, b.values), all = both;
    for (size_t i = 0; i < n; i++) { with_bias[i] += w.values[i % N]; all[i] += w.values[i % N]; }
    double small = kUlp * (largest(x.values) + largest(a.values) + largest(b.values) + largest(w.values));
    residual_forward<kLanes>(x.p, (const floatX*)nullptr, x.p, w.p, T, N);
    bias.compare(x, with_bias, kRoundX, small, at);
    residual_forward<kLanes>(out.p, a.p, b.p, w.p, T, N);
    residual.compare(out, all, kRoundX, small, at + " with bias");
    residual_forward<kLanes>(out.p, a.p, b.p, (const float*)nullptr, T, N);
    residual.compare(out, both, kRoundX, small, at + " without bias");
    residual_forward<kLanes>(a.p, a.p, b.p, w.p, T, N);
    residual.compare(a, all, kRoundX, small, at + " in place");
    reference::Array gradient = sum(dbias.values, reference::column_sums(dout.values, T, N));
    bias_backward<kLanes>(dbias.p, dout.p, scratch.p, T, N);
    bias_backward<kLanes>(dbias_again.p, dout.p, scratch.p, T, N);
    deterministic = deterministic && same_bits(dbias, dbias_again) && scratch.guard_intact();
    bias_gradient.compare(dbias, gradient, kRoundFp32, 4 * kUlp * std::sqrt((double)T) * largest(dout.values), at);
    // GELU's backward pass sums what it stored
    TestArray<floatX> dx(n), dx_again(n);
    TestArray<float> gelu_scratch(gelu_backward_scratch(T, N));
    InputFp32 sums(dbias.values), sums_again(dbias.values);
    gelu_backward<kLanes>(dx.p, sums.p, dout.p, x.p, gelu_scratch.p, T, N);
    gelu_backward<kLanes>(dx_again.p, sums_again.p, dout.p, x.p, gelu_scratch.p, T, N);
    deterministic = deterministic && same_bits(sums, sums_again) && gelu_scratch.guard_intact();
    const std::vector<floatX> x_now = x.host();
    reference::Array stored = widen(dx.host()), slope(n);
    for (size_t i = 0; i < n; i++) slope[i] = dout.values[i] * reference::gelu_derivative(to_float(x_now[i]));
    gelu.compare(dx, slope, kRoundX + 8 * kUlp, 48 * kUlp * largest(dout.values), at);
    gelu.compare(sums, sum(dbias.values, reference::column_sums(stored, T, N)), kRoundFp32, 4 * kUlp * std::sqrt((double)T) * largest(stored), at + " dbias");
    swiglu_forward<kLanes>(out.p, gate_up.p, T, N);
    reference::Array ref = reference::swiglu(gate_up.values, T, N);
    forward.compare(out, ref, kRoundX + 16 * kUlp, 0, at);
    swiglu_backward<kLanes>(dgate_up.p, dout.p, gate_up.p, T, N);
    ref = reference::swiglu_backward(dout.values, gate_up.values, T, N);
    backward.compare(dgate_up, ref, kRoundX + 8 * kUlp, 4 * kUlp * largest(dout.values) * largest(gate_up.values), at);
  }
  bias.report("residual: b + bias, in place" + lanes_name(kLanes));
  residual.report("residual: a + b, and a + b + bias" + lanes_name(kLanes));
  bias_gradient.report("bias gradient adds the column sums" + lanes_name(kLanes));
  gelu.report("GELU backward, and the bias gradient that it adds" + lanes_name(kLanes));
  check("bias gradients: the same bits twice" + lanes_name(kLanes), deterministic, "all sizes");
  forward.report("SwiGLU forward" + lanes_name(kLanes));
  backward.report("SwiGLU backward" + lanes_name(kLanes));
}

inline void test_activations() {
  Worst forward, backward, gated;
  Rng rng(160);
  for (size_t n : {1u, 7u, 8u, 1000u, 4099u, 70000u}) {
    reference::Array data = random_array(n, rng, 3);
    const double extremes[] = {0, -0., 30, -30, 1e4, -1e4, 1e-30, -8, 8, -12.5};
    for (size_t i = 0; i < n && i < 10; i++) data[i] = extremes[n < 10 ? n - 1 - i : i];
    InputX x(data), dout(random_array(n, rng));
    TestArray<floatX> out(n), dx(n);
    gelu_forward(out.p, x.p, n);
    TestArray<float> scratch(gelu_backward_scratch(1, n));
    gelu_backward(dx.p, nullptr, dout.p, x.p, scratch.p, 1, n);
    reference::Array ref(n), gradient(n);
    for (size_t i = 0; i < n; i++) { ref[i] = reference::gelu(x.values[i]); gradient[i] = dout.values[i] * reference::gelu_derivative(x.values[i]); }
    forward.compare(out, ref, kRoundX + 8 * kUlp, 12 * kUlp, std::to_string(n));                    // tanh near -1 cancels: |x| ulp
    backward.compare(dx, gradient, kRoundX + 8 * kUlp, 48 * kUlp * largest(dout.values), std::to_string(n));
    gelu_backward(dout.p, nullptr, dout.p, x.p, scratch.p, 1, n);
    forward.guards = forward.guards && scratch.guard_intact();
    gelu_forward(x.p, x.p, n);
    forward.compare(x, ref, kRoundX + 8 * kUlp, 12 * kUlp, std::to_string(n) + " in place");
    backward.compare(dout, gradient, kRoundX + 8 * kUlp, 48 * kUlp * largest(dout.values), std::to_string(n) + " in place");
  }
  // gates so large that exp overflows
  const int T = 3, F = 9;
  reference::Array data = random_array(T * 2 * F, rng);
  const double extremes[] = {1e4, -1e4, 100, -100, 88.8, -88.8, -104, 0, 20};
  for (int f = 0; f < F; f++) data[2 * F + f] = extremes[f];
  InputX gate_up(data), dout(random_array(T * F, rng));
  TestArray<floatX> out(T * F), d(T * 2 * F);
  swiglu_forward(out.p, gate_up.p, T, F);
  swiglu_backward(d.p, dout.p, gate_up.p, T, F);
  gated.compare(out, reference::swiglu(gate_up.values, T, F), kRoundX + 16 * kUlp, 1e-30, "forward");
  gated.compare(d, reference::swiglu_backward(dout.values, gate_up.values, T, F), kRoundX + 16 * kUlp, 32 * kUlp, "backward");
  forward.report("GELU forward (tanh form), +-1e4 included");
  backward.report("GELU backward, +-1e4 included");
  gated.report("SwiGLU with gates up to +-1e4, forward and backward");
}

// ------------------------------------------------------------------------------------------------------------------------------
// Embedding

inline void test_sort_tokens() {
  int wrong = 0;
  Rng rng(170);
  for (int n : {1, 2, 50, 1000}) {
    const int vocab = 60;
    std::vector<int> tokens(n), order(n, -1), start(std::min(n, vocab) + 1, -1), token(std::min(n, vocab), -1), seen(n, 0);
    for (int& t : tokens) t = rng.below(3) ? rng.below(vocab) : 7;
    int segments = sort_tokens(tokens.data(), n, vocab, order.data(), start.data(), token.data());
    wrong += start[0] != 0 || start[segments] != n;
    for (int s = 0; s < segments; s++) {
      wrong += start[s + 1] <= start[s] || (s && token[s] <= token[s - 1]);
      for (int i = start[s]; i < start[s + 1]; i++) {
        wrong += tokens[order[i]] != token[s] || seen[order[i]]++ || (i > start[s] && order[i] <= order[i - 1]);
      }
    }
  }
  check("sort_tokens: each position once, grouped by token, in order", wrong == 0, "%d violations", wrong);
  ChildResult r = in_child([] {
    int token = 60, order, start[2], segment;
    sort_tokens(&token, 1, 60, &order, start, &segment);
  });
  check("sort_tokens refuses a token outside the vocabulary", r.exit_code == 1 && r.output.find("error: ") != std::string::npos, "exit code %d", r.exit_code);
}

template <int kLanes> void test_embedding() {
  Worst forward, backward;
  bool deterministic = true;
  Rng rng(180);
  struct { int B, T, C, V; } sizes[] = {{1, 1, 1, 1}, {2, 5, 7, 11}, {3, 33, 64, 20}, {4, 16, 130, 50}, {1, 700, 24, 3}};
  for (auto& s : sizes) {
    int n = s.B * s.T;
    std::string at = shape({s.B, s.T, s.C});
    std::vector<int> tokens(n), order(n), start(std::min(n, s.V) + 1), token(std::min(n, s.V));
    for (int& t : tokens) t = rng.below(s.V);
    InputX wte(random_array((size_t)s.V * s.C, rng)), wpe(random_array((size_t)s.T * s.C, rng)), dout(random_array((size_t)n * s.C, rng));
    TestArray<int> device_tokens(tokens);
    TestArray<floatX> out((size_t)n * s.C);
    embedding_forward<kLanes>(out.p, device_tokens.p, wte.p, wpe.p, s.B, s.T, s.C);
    forward.compare(out, reference::embedding(tokens, wte.values, wpe.values, s.T, s.C), kRoundX, 4 * kUlp, at + " with positions");
    embedding_forward<kLanes>(out.p, device_tokens.p, wte.p, (const floatX*)nullptr, s.B, s.T, s.C);
    forward.compare(out, reference::embedding(tokens, wte.values, {}, s.T, s.C), 0, 0, at + " tokens alone");

    InputFp32 dwte(random_array((size_t)s.V * s.C, rng)), dwpe(random_array((size_t)s.T * s.C, rng)), dwte_again(dwte.values), dwpe_again(dwpe.values);
    reference::Array ref_wte = dwte.values, ref_wpe = dwpe.values;
    reference::embedding_backward(ref_wte, ref_wpe, tokens, dout.values, s.T, s.C);
    int segments = sort_tokens(tokens.data(), n, s.V, order.data(), start.data(), token.data());
    TestArray<int> device_order(order), device_start(start), device_token(token);
    for (InputFp32* d : {&dwte, &dwte_again}) embedding_backward<kLanes>(d->p, dout.p, device_order.p, device_start.p, device_token.p, segments, s.C);
    for (InputFp32* d : {&dwpe, &dwpe_again}) position_embedding_backward(d->p, dout.p, s.B, s.T, s.C);
    deterministic = deterministic && same_bits(dwte, dwte_again) && same_bits(dwpe, dwpe_again);
    backward.compare(dwte, ref_wte, kRoundFp32, 4 * kUlp * std::sqrt((double)n) * largest(dout.values), at + " dwte");
    backward.compare(dwpe, ref_wpe, kRoundFp32, 2 * kUlp * s.B * largest(dout.values), at + " dwpe");
  }
  forward.report("embedding forward; without positions an exact copy" + lanes_name(kLanes));
  backward.report("embedding backward adds to dwte and dwpe, repeated tokens included" + lanes_name(kLanes));
  check("embedding gradients: the same bits twice" + lanes_name(kLanes), deterministic, "all sizes");
}

// ------------------------------------------------------------------------------------------------------------------------------
// Loss

template <int kLanes> void test_loss_values() {
  Worst losses, gradients;
  int padding = 0, ignored = 0, touched = 0;
  Rng rng(190);
  struct { int rows, V, Vp; } sizes[] = {{1, 1, 1}, {1, 3, 8}, {5, 50, 64}, {37, 257, 384}, {3, 5003, 5120}, {2, 1000, 1001}};
  for (auto& s : sizes)
    for (float z : {0.f, .01f}) {
      std::string at = shape({s.rows, s.V, s.Vp}) + (z > 0 ? " z-loss" : "");
      reference::Array data = random_array((size_t)s.rows * s.Vp, rng, 4);
      std::vector<int> targets(s.rows);
      for (int r = 0; r < s.rows; r++) {
        targets[r] = r % 4 == 2 ? -1 : rng.below(s.V);
        for (int v = s.V; v < s.Vp; v++) data[(size_t)r * s.Vp + v] = v % 2 ? NAN : 1e9;         // padding must not be read
      }
      const float scale = 1.f / 48;
      InputX logits(data), untouched(data);
      TestArray<int> device_targets(targets);
      TestArray<float> loss(s.rows), loss_only(s.rows);
      reference::Loss ref = reference::softmax_cross_entropy(logits.values, targets, s.V, s.Vp, scale, z);
      softmax_cross_entropy<kLanes>(logits.p, loss.p, device_targets.p, s.rows, s.V, s.Vp, scale, z, true);
      softmax_cross_entropy<kLanes>(untouched.p, loss_only.p, device_targets.p, s.rows, s.V, s.Vp, scale, z, false);
      losses.compare(loss, ref.losses, 8 * kUlp, 8 * kUlp * largest(ref.lse), at);
      losses.compare(loss_only, ref.losses, 8 * kUlp, 8 * kUlp * largest(ref.lse), at + " without gradient");
      gradients.compare(logits, ref.dlogits, kRoundX + 16 * kUlp * (1 + largest(ref.lse)), 8 * kUlp * scale, at);
      std::vector<floatX> after = logits.host(), same = untouched.host(), before = narrow<floatX>(data);
      std::vector<float> got = loss.host();
      touched += memcmp(same.data(), before.data(), same.size() * sizeof(floatX)) != 0;
      for (int r = 0; r < s.rows; r++)
        for (int v = 0; v < s.Vp; v++) {
          float g = to_float(after[(size_t)r * s.Vp + v]);
          padding += v >= s.V && !(g == 0);
          ignored += targets[r] < 0 && !(g == 0 && got[r] == 0);
        }
    }
  losses.report("cross-entropy over the vocabulary, without the z term" + lanes_name(kLanes));
  gradients.report("dlogits = scale ((1 + 2 z lse) p - onehot)" + lanes_name(kLanes));
  check("padding columns of the logits are not read and get gradient 0" + lanes_name(kLanes), padding == 0, "%d wrong", padding);
  check("a row with target -1 has loss 0 and gradient 0" + lanes_name(kLanes), ignored == 0, "%d wrong", ignored);
  check("without write_grad the logits stay as they were" + lanes_name(kLanes), touched == 0, "%d of %d changed", touched, (int)(2 * sizeof sizes / sizeof *sizes));
}

template <int kLanes> void test_loss_extremes() {
  const int V = 300, Vp = 304;
  enum { kTargetHigh, kTargetLow, kAllLow, kPlusInfinity, kMinusInfinity, kTargetMinusInfinity, kNan, kRows };
  reference::Array data((size_t)kRows * Vp, 0.);
  std::vector<int> targets(kRows, 17);
  data[kTargetHigh * Vp + 17] = 1e4;
  data[kTargetLow * Vp + 17] = -1e4;
  for (int v = 0; v < V; v++) data[kAllLow * Vp + v] = -1e4;
  data[kPlusInfinity * Vp + 40] = INFINITY;
  data[kMinusInfinity * Vp + 40] = -INFINITY;                     // nothing is masked in a language model's logits: an overflow
  data[kTargetMinusInfinity * Vp + 17] = -INFINITY;
  data[kNan * Vp + 299] = NAN;
  InputX logits(data);
  TestArray<int> device_targets(targets);
  TestArray<float> loss(kRows);
  softmax_cross_entropy<kLanes>(logits.p, loss.p, device_targets.p, kRows, V, Vp, 1.f, 0.f, true);
  std::vector<float> l = loss.host();
  reference::Array d = widen(logits.host()), stored = widen(narrow<floatX>(data));
  double high = -stored[kTargetLow * Vp + 17];            // 1e4 as floatX holds it
  auto close = [](double got, double want) { return std::fabs(got - want) <= 1e-6 * (1 + std::fabs(want)); };
  check("logits of +-1e4: loss 0, 1e4 + log(299), log(300)" + lanes_name(kLanes),
        close(l[kTargetHigh], 0) && close(l[kTargetLow], high + std::log(299.)) && std::fabs(l[kAllLow] - std::log(300.)) < 1e-3,
        "%g %g %g", l[kTargetHigh], l[kTargetLow], l[kAllLow]);
  bool finite = true;
  for (int i = 0; i < 3 * Vp; i++) finite = finite && std::isfinite(d[i]);
  check("and finite gradients: 0 at a sure target, -1 at an impossible one" + lanes_name(kLanes),
        finite && close(d[kTargetHigh * Vp + 17], 0) && close(d[kTargetLow * Vp + 17], -1),
        "%g %g", d[kTargetHigh * Vp + 17], d[kTargetLow * Vp + 17]);
  check("an infinite or NaN logit makes the loss non-finite" + lanes_name(kLanes),
        !std::isfinite(l[kPlusInfinity]) && !std::isfinite(l[kMinusInfinity]) && !std::isfinite(l[kTargetMinusInfinity]) && !std::isfinite(l[kNan]),
        "%g %g %g %g", l[kPlusInfinity], l[kMinusInfinity], l[kTargetMinusInfinity], l[kNan]);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Optimizer

inline void test_adamw() {
  Worst weights, moments;
  int copies = 0;
  Rng rng(200);
  for (size_t n : {1u, 7u, 64u, 1000u, 4099u}) {
    AdamW o;
    o.lr = 3e-3f; o.beta1 = .9f; o.beta2 = .95f; o.eps = 1e-8f; o.weight_decay = .1f;
    const float scale = .25f;
    InputFp32 w(random_array(n, rng));
    TestArray<float> m(std::vector<float>(n, 0.f)), v(std::vector<float>(n, 0.f)), grad_scale(std::vector<float>{scale});
    TestArray<floatX> copy(n);
    reference::Array rw = w.values, rm(n, 0.), rv(n, 0.);
    for (int step = 1; step <= 5; step++) {
      InputFp32 g(random_array(n, rng, step == 3 ? 1e-6 : 1));
      o.step = step;
      bool with_copy = step != 2;
      adamw_update(w.p, with_copy ? copy.p : (floatX*)nullptr, m.p, v.p, g.p, grad_scale.p, n, o);
      reference::adamw(rw, rm, rv, g.values, scale, {o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, step});
      std::string at = std::to_string(n) + " step " + std::to_string(step);
      weights.compare(w, rw, 16 * kUlp, 64 * kUlp * o.lr * step, at);      // an update is at most about lr
      moments.compare(m, rm, 4 * kUlp, 4 * kUlp * largest(rm), at + " m");
      moments.compare(v, rv, 16 * kUlp, 1e-30, at + " v");
      std::vector<float> master = w.host();
      std::vector<floatX> stored = copy.host();
      for (size_t i = 0; i < n && with_copy; i++) copies += to_float(stored[i]) != (sizeof(floatX) == 2 ? reference::round_bf16(master[i]) : master[i]);
    }
    weights.guards = weights.guards && m.guard_intact() && v.guard_intact() && copy.guard_intact();
  }
  weights.report("AdamW: five steps as torch.optim.AdamW, the gradient scaled");
  moments.report("AdamW: moments");
  check("AdamW: the working copy is the master weight, rounded once; it may be absent", copies == 0, "%d differ", copies);
  // several parameters in a row: the same bits as one by one, groups of 64 with and without decay
  {
    const size_t n = 320;
    const int groups[] = {1, 0, 0, 1, 0};
    AdamW o{3e-3f, .9f, .95f, 1e-8f, .1f, 3};
    InputFp32 w(random_array(n, rng)), g(random_array(n, rng)), m1(random_array(n, rng)), m2(random_array(n, rng)), w_one(w.values), m1_one(m1.values), m2_one(m2.values);
    for (double& x : m2.values) x = std::fabs(x);
    TestArray<float> v(narrow<float>(m2.values)), v_one(narrow<float>(m2.values)), scale(std::vector<float>{.5f});
    TestArray<uint8_t> decayed(std::vector<uint8_t>(groups, groups + 5));
    TestArray<floatX> copy(n), copy_one(n);
    adamw_update(w.p, copy.p, m1.p, v.p, g.p, scale.p, n, o, decayed.p);
    for (size_t i = 0; i < 5; i++) {
      AdamW one = o;
      one.weight_decay = groups[i] ? o.weight_decay : 0;
      adamw_update(w_one.p + 64 * i, copy_one.p + 64 * i, m1_one.p + 64 * i, v_one.p + 64 * i, g.p + 64 * i, scale.p, 64, one);
    }
    check("AdamW: all parameters in one launch have the bits of one launch each", same_bits(w, w_one) && same_bits(copy, copy_one) && same_bits(m1, m1_one) && same_bits(v, v_one), "320 elements");
  }
  // a late step: 1 - beta2^t must not be lost, and a zero gradient with no history must not divide by zero
  AdamW late;
  late.lr = 1e-3f; late.beta1 = .9f; late.beta2 = .999f; late.eps = 1e-8f; late.weight_decay = 0; late.step = 100000;
  TestArray<float> w(std::vector<float>{1.f, 1.f}), m(std::vector<float>{.5f, 0.f}), v(std::vector<float>{.25f, 0.f});
  TestArray<float> g(std::vector<float>{.5f, 0.f}), one(std::vector<float>{1.f});
  adamw_update(w.p, (floatX*)nullptr, m.p, v.p, g.p, one.p, 2, late);
  std::vector<float> out = w.host();
  check("AdamW: at step 100000 a steady gradient moves a weight by lr; no gradient, no history: it stays",
        std::fabs(out[0] - .999) < 1e-6 && out[1] == 1.f, "%.7f %.7f", out[0], out[1]);
}

template <int kLanes> void test_grad_norm() {
  Worst worst;
  bool deterministic = true;
  Rng rng(210);
  TestArray<float> scratch(grad_norm_scratch());
  const bool few = kOnCpu && kLanes > 1;                   // 4096 warps on fibers take half a second a run
  auto run = [&](const TestArray<float>& g, float clip) {
    TestArray<float> out(2);
    grad_norm<kLanes>(out.p, g.p, g.n, clip, scratch.p);
    return out.host();
  };
  for (size_t n : {1u, 31u, 1000u, 100003u})
    for (float clip : {0.f, 1.f, 1e9f}) {
      if (few && (n < 1000 || clip != 1)) continue;
      InputFp32 g(random_array(n, rng, .1));
      std::vector<float> got = run(g, clip), again = run(g, clip);
      double norm = reference::norm(g.values), scale = reference::clip_scale(norm, clip);
      std::string at = std::to_string(n) + " clip " + std::to_string(clip);
      worst.add(std::fabs(got[0] - norm) / (norm * 3 * kUlp), at + " norm");
      worst.add(std::fabs(got[1] - scale) / (scale * 4 * kUlp), at + " scale");
      deterministic = deterministic && got == again;
    }
  worst.guards = scratch.guard_intact();
  worst.report("gradient norm and clip scale = min(1, clip/(norm + 1e-6)), 1 without clipping" + lanes_name(kLanes));
  check("gradient norm: the same bits twice" + lanes_name(kLanes), deterministic, "all sizes");
  int lost = 0;
  for (float bad : {NAN, INFINITY, -INFINITY})
    for (size_t where : {0u, 4999u, 9999u}) {
      if (few && where != 9999) continue;
      std::vector<float> g(10000, 1.f);
      g[where] = bad;
      lost += std::isfinite(run(TestArray<float>(g), 1.f)[0]);
    }
  check("a NaN or infinity among the gradients makes the norm non-finite" + lanes_name(kLanes), lost == 0, "%d of %d lost", lost, few ? 3 : 9);
}

// ------------------------------------------------------------------------------------------------------------------------------
// Attention

// One version of the kernels: forward and backward under one name.
template <class Value> struct AttentionVersion {
  const char* name;
  void (*forward)(Value* out, float* lse, const Value* qkv, int B, int T, int H, int KV, int D, float* amax);
  void (*backward)(Value* dqkv, const Value* dout, const Value* qkv, const Value* out, const float* lse, float* scratch, int B, int T, int H, int KV, int D);
  size_t (*scratch)(int B, int T, int H, int D);           // floats
};
struct AttentionShape { int B, T, H, KV, D; };

// scale: of q and k; a large one makes the softmax pick single keys.
template <class Value> void test_attention_case(const AttentionVersion<Value>& version, AttentionShape s, double scale, Worst& forward, Worst& backward,
                                                bool& deterministic, Rng& rng) {
  const int B = s.B, T = s.T, H = s.H, KV = s.KV, D = s.D;
  const double round = sizeof(Value) == 2 ? 0x1p-8 : kRoundFp32;
  size_t tokens = (size_t)B * T, width = (size_t)(H + 2 * KV) * D;
  reference::Array data = random_array(tokens * width, rng);
  for (size_t i = 0; i < data.size(); i++) if (i % width < (size_t)(H + KV) * D) data[i] *= scale;
  RandomInput<Value> qkv(data), dout(random_array(tokens * H * D, rng));
  TestArray<Value> out(tokens * H * D), dqkv(qkv.n), dqkv_again(qkv.n);
  TestArray<float> lse((size_t)B * H * T), scratch(version.scratch(B, T, H, D));
  std::string at = shape({B, T, H, KV, D});
  version.forward(out.p, lse.p, qkv.p, B, T, H, KV, D, nullptr);
  reference::Attention ref = reference::attention(qkv.values, B, T, H, KV, D);
  // On BF16 tensor cores the probabilities are rounded to BF16 before they meet V: half an ulp of each, and the errors average out.
  // Scores are sums in FP32, and the error of a score is a relative error of its probability.
  double score = largest(ref.lse), inside = round / 2 + 4 * kUlp * (1 + score);
  forward.compare(out, ref.out, round, inside * largest(ref.out), at);
  forward.compare(lse, ref.lse, 8 * kUlp, 8 * kUlp * (1 + score), at + " lse");
  for (TestArray<Value>* d : {&dqkv, &dqkv_again}) version.backward(d->p, dout.p, qkv.p, out.p, lse.p, scratch.p, B, T, H, KV, D);
  deterministic = deterministic && same_bits(dqkv, dqkv_again);
  // P and dS are rounded, and delta is made of an output that was: dP - delta then carries an error of size round * |delta|, which counts
  // where the softmax is sharp, since there dP - delta itself is small.
  reference::Array gradient = reference::attention_backward(dout.values, qkv.values, B, T, H, KV, D);
  double sharp = scale > 1 ? 3 : 1;
  backward.compare(dqkv, gradient, round, sharp * 4 * inside * largest(gradient), at);
  backward.add(rel_error(widen(dqkv.host()), gradient) / (sharp * 1.5 * inside), at + " relative L2");
  backward.guards = backward.guards && lse.guard_intact() && scratch.guard_intact() && out.guard_intact() && dqkv_again.guard_intact();
}

template <class Value> void test_attention(const AttentionVersion<Value>& version) {
  const AttentionShape shapes[] = {{1, 1, 1, 1, 8}, {2, 5, 2, 1, 8}, {1, 33, 4, 2, 16}, {2, 65, 3, 3, 32}, {1, 130, 2, 1, 64}, {1, 70, 2, 2, 128}, {1, 50, 6, 2, 40},
                                   {1, 17, 2, 2, 10}, {2, 64, 8, 1, 24}, {1, 20, 1, 1, 126}, {1, 300, 1, 1, 64}, {1, 290, 2, 1, 128}};
  Worst forward, backward, sharp_forward, sharp_backward;
  bool deterministic = true;
  Rng rng(220);
  for (const AttentionShape& s : shapes) test_attention_case(version, s, 1, forward, backward, deterministic, rng);
  for (int i : {2, 4, 6}) test_attention_case(version, shapes[i], 8, sharp_forward, sharp_backward, deterministic, rng);
  std::string name = std::string(", ") + version.name;
  forward.report("attention forward: causal, grouped heads, odd lengths and head sizes, and lse" + name);
  backward.report("attention backward: dq, dk, dv" + name);
  sharp_forward.report("attention forward with scores in the hundreds" + name);
  sharp_backward.report("attention backward with scores in the hundreds" + name);
  check("attention gradients: the same bits twice" + name, deterministic, "all sizes");
  StoredMaxima maxima;
  // the last query lies in either half of 16 rows, and in either 16 of a warp's 32
  const AttentionShape ends[] = {{1, 1, 1, 1, 8}, {2, 5, 2, 1, 8}, {1, 130, 2, 1, 64}, {1, 140, 1, 1, 64}, {1, 70, 2, 2, 128}, {1, 124, 1, 1, 128}, {1, 17, 2, 2, 10}, {2, 64, 8, 1, 24}};
  for (const AttentionShape& s : ends) for (int kind = 0; kind < kMaximumKinds; kind++) {
    const int width = (s.H + 2 * s.KV) * s.D;
    const size_t tokens = (size_t)s.B * s.T;
    // the last key's last value counts for the last query alone; an infinity among the first key's values for all
    const RandomInput<Value> qkv(maximum_input(tokens * width, kind, kind == kInfiniteEntry ? width - 1 : tokens * width - 1, rng));
    TestArray<Value> out(tokens * s.H * s.D);
    TestArray<float> lse(tokens * s.H);
    maxima.compare(out, (int)tokens, s.H * s.D, shape({s.B, s.T, s.H, s.KV, s.D}) + " kind " + std::to_string(kind),
                   [&](float* amax) { version.forward(out.p, lse.p, qkv.p, s.B, s.T, s.H, s.KV, s.D, amax); });
  }
  maxima.report("attention forward" + name, false);
}
// The tensor core version as it is where a block may use kShared bytes of shared memory.
template <size_t kShared> AttentionVersion<bf16> tensor_core_version(const char* name) {
  return {name, [](bf16* out, float* lse, const bf16* qkv, int B, int T, int H, int KV, int D, float* amax) { attention_forward_mma(out, lse, qkv, B, T, H, KV, D, amax, kShared); },
          [](bf16* dqkv, const bf16* dout, const bf16* qkv, const bf16* out, const float* lse, float* scratch, int B, int T, int H, int KV, int D) {
            attention_backward_mma(dqkv, dout, qkv, out, lse, scratch, B, T, H, KV, D, kShared); },
          [](int B, int T, int H, int D) { return attention_backward_mma_scratch(B, T, H, D, kShared); }};
}
// Blocks add to dQ one after the other. The second block of two, alone on the machine, must wait for the first for ever, and must not wait
// where the counters say that the first has been there.
inline void test_attention_order() {
  using C = BackwardTiles<64, 4, 2, 1, 32>;
  const int T = C::kN + 2, D = 8;
  const size_t floats = attention_backward_mma_scratch(1, T, 1, D);
  TestArray<bf16> qkv(3 * T * D), dqkv(3 * T * D), dout(T * D);
  TestArray<float> lse(T), scratch(floats);
  auto second_block = [&](int adders_before) {
    return in_child([&] {
      alarm(1);
      const BackwardScratch s = backward_scratch<C>(scratch.p, 1, T, 1);
      std::fill(s.done, s.done + s.counters, adders_before);
      *s.ticket = 1;
      launch(attention_backward_mma_kernel<C>, 1, C::kThreads, C::kShared, dqkv.p, dout.p, qkv.p, lse.p, s, T, 1, 1, D);
    });
  };
  const ChildResult waits = second_block(0), goes_on = second_block(1);
  check("attention backward: a block adds to dQ when the block before has, not earlier", waits.signal == SIGALRM && goes_on.exit_code == 0,
        "before: signal %d, after: exit code %d", waits.signal, goes_on.exit_code);
}
inline void test_attentions() {
  auto rows = [](int B, int T, int H, int) { return (size_t)B * T * H; };
  test_attention<floatX>({"what the model calls", attention_forward, attention_backward, attention_backward_scratch});
  if (shared_memory_limit() >= 176 << 10) test_attention<bf16>(tensor_core_version<(176 << 10)>("tensor core version"));
  test_attention<bf16>(tensor_core_version<(98 << 10)>("tensor core version for 99 KB of shared memory"));
  test_attention<float>({"simple FP32, a thread a row", attention_forward_simple<float, 1, 64>, attention_backward_simple<float, 1, 64>, rows});
  test_attention<bf16>({"simple BF16, a thread a row", attention_forward_simple<bf16, 1, 64>, attention_backward_simple<bf16, 1, 64>, rows});
  if (kOnCpu) test_attention_order();
}

// ------------------------------------------------------------------------------------------------------------------------------

template <int kLanes> void test_lane_kernels() {
  test_norms<kLanes>();
  test_norm_maxima<kLanes>();
  test_mlp<kLanes>();
  test_embedding<kLanes>();
  test_loss_values<kLanes>();
  test_loss_extremes<kLanes>();
  test_grad_norm<kLanes>();
}

inline void test_layers() {
  if (section("layers: references")) test_references();
  if (section("layers: GEMM")) {
    test_gemm();
    test_gemm_exact();
    test_gemm_gelu();
    test_gemm_large();
  }
  if (section("layers: norms, MLP, embedding, loss, gradient norm")) {
    test_lane_kernels<kRowLanes>();
    if (kOnCpu) test_lane_kernels<32>();                   // the form that a GPU runs, on fibers
  }
  if (section("layers: RoPE, activations, sorting of tokens, AdamW")) {
    test_rope();
    test_activations();
    test_sort_tokens();
    test_adamw();
  }
  if (section("layers: attention")) test_attentions();
}
