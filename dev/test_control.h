// dev/test_control.h -- what watches over training: oscillation control, outlier control, formats of the optimizer's states, and switches
// to BF16. The references here are plain C++ and share nothing with kernels/. Included by test_fp4.cu after train_fp4.cu.
#pragma once
#include <algorithm>
#include <array>
#include <map>
#include "../kernels/oscillation.cuh"
#include "../kernels/outliers.cuh"
#include "reference.h"
#include "test_model.h"
#include "testing.h"

// =====================================================================================================================================
namespace reference_control {

typedef std::vector<float> Floats;

// ------------------------------------------------------------------ stochastic rounding to a table of values
// The neighbours of |x| in an ascending table of nonnegative values; above the last one, the last one.
inline double round_up_with(const std::vector<double>& table, double x, double u) {
  const double a = std::fabs(x);
  size_t i = 0;
  while (i + 1 < table.size() && table[i + 1] <= a) i++;
  double value = table[i];
  if (i + 1 < table.size() && u < (a - table[i]) / (table[i + 1] - table[i])) value = table[i + 1];
  return std::copysign(value, x);
}
inline const std::vector<double>& e4m3_table() {
  static const std::vector<double> t = [] { std::vector<double> v; for (int i = 0; i < 127; i++) v.push_back(reference::e4m3_value((uint8_t)i)); return v; }();
  return t;
}
// BF16: in units of the last place of x, adding r / 2^16 of a unit and cutting off.
inline float bf16_with(float x, uint32_t r) {
  if (x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1., std::max(exponent - 8, -133)), steps = std::fabs((double)x) / unit;
  return std::copysign((float)((std::floor(steps + r / 65536.) * unit)), x);
}

// ------------------------------------------------------------------ AdamW with small states, and ramping
struct Adam {
  float lr, beta1, beta2, eps, decay;
  int m_format = 0, v_format = 0;             // 0 FP32, 1 BF16, 2 E4M3
  bool e8m0 = false;
  Floats w, m, v;                             // m and v as values
  Floats scale;                               // of blocks of 128 of m
  Floats sum;                                 // ramping
  std::vector<int> count, period;             // empty: none

  void step(const Floats& grad, float clip, int t, uint64_t seed, uint32_t stream) {
    const float decay_now = (float)(1 - (double)lr * decay), one_beta1 = (float)(1 - (double)beta1), one_beta2 = (float)(1 - (double)beta2);
    const float size = (float)(lr / (1 - std::pow((double)beta1, t))), root = (float)std::sqrt(1 - std::pow((double)beta2, t));
    const size_t n = w.size();
    Floats fresh(m);
    std::vector<bool> rests(n, false);
    std::vector<uint32_t> random(n);
    for (size_t i = 0; i < n; i++) {
      const reference::Counter words = reference::philox4x32_10({(uint32_t)(i / 4), 0, (uint32_t)t, stream}, {(uint32_t)seed, (uint32_t)(seed >> 32)});
      random[i] = words[i % 4];
      float g = grad[i] * clip, times = 1;
      if (!period.empty()) {
        if (count[i] > 0) g += sum[i];
        times = (float)++count[i];
        rests[i] = count[i] < period[i];
        sum[i] = rests[i] ? g : 0;
        if (!rests[i]) { if (count[i] > 1) g /= times; count[i] = 0; }
      }
      if (rests[i]) continue;
      w[i] *= times == 1 ? decay_now : 1 - times * (1 - decay_now);
      fresh[i] = m[i] + one_beta1 * (g - m[i]);
      const float a = beta2 * v[i], b = one_beta2 * g, c = b * g;
      const float second = a + c;
      const float denominator = std::sqrt(second) / root + eps;
      const float ratio = fresh[i] / denominator, change = times * size;
      w[i] -= change * ratio;
      v[i] = v_format == 1 ? bf16_with(second, random[i] >> 16) : second;
    }
    for (size_t b = 0; b < n; b += 128) {
      const size_t end = std::min(n, b + 128);
      float s = 1;
      if (m_format == 2) {
        float amax = 0;
        for (size_t i = b; i < end; i++) amax = std::max(amax, std::fabs(fresh[i]));
        s = amax / 448.f;
        if (e8m0) s = (float)reference::e8m0_value(reference::e8m0_ceil(s));
      }
      for (size_t i = b; i < end; i++) {
        if (rests[i] && (m_format != 2 || s == scale[b / 128])) continue;
        const uint32_t r = random[i] & 65535;
        if (m_format == 0) m[i] = fresh[i];
        else if (m_format == 1) m[i] = bf16_with(fresh[i], r);
        else { const float scaled = s == 0 ? 0 : fresh[i] / s; m[i] = (float)round_up_with(e4m3_table(), scaled, (2 * r + 1) / 131072.) * s; }
      }
      if (m_format == 2) scale[b / 128] = s;
    }
  }
};

// ------------------------------------------------------------------ FP4 with one scale a row (vector-wise), RN, and how good it is
inline Floats vector_fp4(const Floats& x, int rows, int cols) {
  Floats q(x.size());
  for (int r = 0; r < rows; r++) {
    float amax = 0;
    for (int c = 0; c < cols; c++) amax = std::max(amax, std::fabs(x[(size_t)r * cols + c]));
    const float scale = amax / 6;
    for (int c = 0; c < cols; c++) q[(size_t)r * cols + c] = scale == 0 ? 0 : (float)reference::e2m1_value(reference::e2m1_rn(x[(size_t)r * cols + c] / scale)) * scale;
  }
  return q;
}
struct Quality { double cosine, snr; };       // snr in dB
inline Quality quality(const Floats& q, const Floats& x) {
  double qx = 0, qq = 0, xx = 0, ee = 0;
  for (size_t i = 0; i < x.size(); i++) { qx += (double)q[i] * x[i]; qq += (double)q[i] * q[i]; xx += (double)x[i] * x[i]; ee += std::pow((double)q[i] - x[i], 2); }
  return {qx / std::sqrt(qq * xx), 10 * std::log10(xx / ee)};
}
// MXFP8: E4M3, one power of two for 32, rounded up, so that nothing clips.
inline Floats mxfp8(const Floats& x, int rows, int cols) {
  Floats q(x.size());
  for (int r = 0; r < rows; r++) for (int b = 0; b < cols; b += 32) {
    const size_t first = (size_t)r * cols + b, last = first + std::min(32, cols - b);
    float amax = 0;
    for (size_t i = first; i < last; i++) amax = std::max(amax, std::fabs(x[i]));
    const double scale = reference::e8m0_value(reference::e8m0_ceil(amax / 448.f));
    for (size_t i = first; i < last; i++) q[i] = (float)(reference::e4m3_value(reference::e4m3_rn((float)(x[i] / scale))) * scale);
  }
  return q;
}
inline Floats nvfp4(const Floats& x, int rows, int cols) {
  const reference::Nvfp4 q = reference::nvfp4(x, rows, cols, {});
  Floats v((size_t)rows * cols);
  for (int r = 0; r < rows; r++) for (int c = 0; c < cols; c++) v[(size_t)r * cols + c] = (float)(q.values[(size_t)r * 16 * q.blocks + c] * ((double)q.amax / 2688));
  return v;
}
inline Floats transposed(const Floats& x, int rows, int cols) {
  Floats y(x.size());
  for (int r = 0; r < rows; r++) for (int c = 0; c < cols; c++) y[(size_t)c * rows + r] = x[(size_t)r * cols + c];
  return y;
}
inline Floats columns_of(const Floats& x, int rows, int cols, const std::vector<int>& which) {
  Floats y;
  for (int r = 0; r < rows; r++) for (int c : which) y.push_back(x[(size_t)r * cols + c]);
  return y;
}
// D [M,N] += A [M,K] B [N,K]^T
inline void multiply(reference::Array& d, const Floats& a, const Floats& b, int M, int N, int K) {
  for (int m = 0; m < M; m++) for (int n = 0; n < N; n++) {
    double sum = 0;
    for (int k = 0; k < K; k++) sum += (double)a[(size_t)m * K + k] * b[(size_t)n * K + k];
    d[(size_t)m * N + n] += sum;
  }
}
// Q-EMA's rule for one weight on its scale: of the two grid values around |w|, the one nearer to the average, which counts in w's direction.
inline double toward(double w, double average) {
  const double a = std::fabs(w), e = w < 0 || std::signbit(w) ? -average : average;
  int lo = 7;
  while (reference::kE2m1Grid[lo] > a) lo--;
  if (lo == 7) return std::copysign(6, w);
  const double below = reference::kE2m1Grid[lo], above = reference::kE2m1Grid[lo + 1];
  if (std::fabs(e - below) == std::fabs(e - above)) return std::copysign(lo % 2 ? above : below, w);
  return std::copysign(std::fabs(e - below) < std::fabs(e - above) ? below : above, w);
}
// Row quantile by sorting.
inline Floats clamp_rows(const Floats& x, int rows, int cols, double alpha) {
  Floats c(x);
  const int rank = std::min((int)std::lround((1 - alpha) * (cols - 1)), (cols - 1) / 2);
  for (int r = 0; r < rows; r++) {
    Floats sorted(x.begin() + (size_t)r * cols, x.begin() + (size_t)(r + 1) * cols);
    std::sort(sorted.begin(), sorted.end());
    for (int i = 0; i < cols; i++) c[(size_t)r * cols + i] = std::min(std::max(c[(size_t)r * cols + i], sorted[rank]), sorted[cols - 1 - rank]);
  }
  return c;
}
}  // namespace reference_control

// =====================================================================================================================================
namespace control_tests {
using reference_control::Floats;

template <class T> struct Device {            // an array on the device, from and to the host
  T* p;
  size_t n;
  explicit Device(size_t n_) : p(device_alloc<T>(n_)), n(n_) {}
  Device(const std::vector<T>& x) : Device(x.size()) { set(x); }
  Device(const Device&) = delete;
  ~Device() { device_free(p); }
  void set(const std::vector<T>& x) { to_device(p, x.data(), n); device_sync(); }
  std::vector<T> get() const { std::vector<T> x(n); to_host(x.data(), p, n); return x; }
};
inline std::vector<floatX> to_x(const Floats& f) { std::vector<floatX> x(f.size()); for (size_t i = 0; i < f.size(); i++) x[i] = from_float<floatX>(f[i]); return x; }
inline Floats from_x(const std::vector<floatX>& x) { Floats f(x.size()); for (size_t i = 0; i < x.size(); i++) f[i] = to_float(x[i]); return f; }
inline Floats rounded_x(const Floats& f) { return from_x(to_x(f)); }
inline int differ(const Floats& a, const Floats& b) {           // elements whose bits differ (both zeros are one)
  int n = a.size() != b.size();
  for (size_t i = 0; i < std::min(a.size(), b.size()); i++) n += !(a[i] == b[i]);
  return n;
}
inline Floats normals(Rng& rng, size_t n, double size = 1) { Floats x(n); for (float& v : x) v = (float)(size * rng.normal()); return x; }

// ------------------------------------------------------------------ stochastic rounding
inline void test_state_rounding() {
  Rng rng(1);
  double worst = 0;
  int strangers = 0;
  for (int k = 0; k < 200; k++) {
    const float x = (float)(rng.normal() * std::pow(10, rng.uniform() * 12 - 6));
    double sum = 0;
    for (uint32_t r = 0; r < 65536; r++) {
      const float y = to_float(bf16_stochastic(x, r));
      sum += y;
      if (k < 20) strangers += y != reference_control::bf16_with(x, r);
    }
    const double e = std::fabs(sum / 65536 - x) / std::fabs(x);
    if (!(e <= worst)) worst = e;
  }
  check("BF16: the mean over all 65536 random numbers is the value itself", worst < 1e-12, "relative error %.1e", worst);
  check("BF16: each draw is the reference's", strangers == 0, "%d differ", strangers);
  const std::vector<double>& table = reference_control::e4m3_table();
  double bias = 0;
  int wrong = 0;
  for (int i = 0; i + 1 < 127; i++) for (double at : {0., .125, .3, .5, .77, .99999}) {
    const float x = (float)((table[i] + at * (table[i + 1] - table[i])) * (i % 2 ? -1 : 1));
    double sum = 0;
    for (uint32_t r = 0; r < 65536; r += at == .3 && i % 16 == 0 ? 1 : 16) {
      const double y = reference::e4m3_value(e4m3_stochastic(x, r));
      if (y != reference_control::round_up_with(table, x, (2 * r + 1) / 131072.)) wrong++;
      sum += y;
    }
    if (at == .3 && i % 16 == 0) { const double e = std::fabs(sum / 65536 - x) / (table[i + 1] - table[i]); if (!(e <= bias)) bias = e; }
  }
  check("E4M3: over all neighbouring pairs, subnormals and binade edges too, each draw is the reference's", wrong == 0, "%d differ", wrong);
  check("E4M3: the mean over all 65536 random numbers is the value, to half a random step", bias <= 0.5001 / 65536, "%.2e of a grid step", bias);
  check("E4M3 saturates at 448, and a NaN stays", e4m3_stochastic(500, 65535) == 0x7e && e4m3_stochastic(-1e30f, 0) == 0xfe && (e4m3_stochastic(NAN, 0) & 0x7f) == 0x7f);
}

// ------------------------------------------------------------------ AdamW's states
struct AdamRun {                              // the kernel under test, with its states on the device
  size_t n;
  AdamFormats f;
  Device<float> w, grad, clip, sum;
  Device<char> m, v, scale;
  Device<uint8_t> count, period;
  AdamRun(AdamFormats f_, const Floats& w0) : n(w0.size()), f(f_), w(w0), grad(n), clip(Floats{0.5f}), sum(n), m(n * 4), v(n * 4), scale(state_blocks(n) * 4), count(n), period(n) {
    device_zero(m.p, m.n); device_zero(v.p, v.n); device_zero(scale.p, scale.n); device_zero(sum.p, n); device_zero(count.p, n);
  }
  AdamState state() { return {f, m.p, v.p, scale.p}; }
  template <int kLanes = kRowLanes> void step(const Floats& g, AdamW o, uint64_t seed, uint32_t stream, bool ramp) {
    grad.set(g);
    adamw_update<kLanes>(w.p, nullptr, state(), grad.p, clip.p, n, o, {seed, (uint32_t)o.step, stream}, ramp ? Ramp{sum.p, count.p, period.p} : Ramp{});
  }
  Floats scales() { const std::vector<char> s = scale.get(); Floats x(state_blocks(n)); for (size_t i = 0; i < x.size(); i++) { if (f.e8m0) x[i] = (float)reference::e8m0_value((uint8_t)s[i]); else memcpy(&x[i], &s[4 * i], 4); } return x; }
  Floats values(const Device<char>& of, StateFormat format) {
    const std::vector<char> bytes = of.get();
    const Floats s = scales();
    Floats x(n);
    for (size_t i = 0; i < n; i++) {
      uint16_t half;
      if (format == StateFormat::fp32) memcpy(&x[i], &bytes[4 * i], 4);
      else if (format == StateFormat::bf16) { memcpy(&half, &bytes[2 * i], 2); const uint32_t bits = (uint32_t)half << 16; memcpy(&x[i], &bits, 4); }
      else x[i] = (float)reference::e4m3_value((uint8_t)bytes[i]) * s[i / 128];
    }
    return x;
  }
  Floats m_values() { return values(m, f.m); }
  Floats v_values() { return values(v, f.v); }
};

inline void test_adam_formats() {
  struct Case { const char* name; AdamFormats f; int m, v; double bytes; };
  using F = StateFormat;
  const Case cases[] = {{"m FP32, v BF16", {F::fp32, F::bf16, false}, 0, 1, 6}, {"m BF16, v FP32", {F::bf16, F::fp32, false}, 1, 0, 6}, {"m BF16, v BF16", {F::bf16, F::bf16, false}, 1, 1, 4},
                        {"m FP8, v FP32", {F::fp8, F::fp32, false}, 2, 0, 5 + 4 / 128.}, {"m FP8, v BF16", {F::fp8, F::bf16, false}, 2, 1, 3 + 4 / 128.}, {"m FP8 with E8M0 scales, v BF16", {F::fp8, F::bf16, true}, 2, 1, 3 + 1 / 128.}};
  for (const Case& c : cases) for (bool ramp : {false, true}) {
    const int n = 1000, steps = 12;              // seven blocks of 128 and a part of one
    Rng rng(7);
    const Floats w0 = normals(rng, n, 0.1);
    AdamRun run(c.f, w0), wide(c.f, w0);
    reference_control::Adam ref{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, c.m, c.v, c.f.e8m0, w0, Floats(n, 0), Floats(n, 0), Floats(state_blocks(n), 0), {}, {}, {}};
    if (ramp) {
      ref.sum.assign(n, 0); ref.count.assign(n, 0);
      std::vector<uint8_t> period(n);
      for (int i = 0; i < n; i++) ref.period.push_back(period[i] = (uint8_t)(1 + (i % 3 == 0 ? rng.below(6) : 0)));
      run.period.set(period); wide.period.set(period);
    }
    const AdamW o = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 0};
    int wrong = 0, lanes = 0;
    double relative = 0;
    for (int t = 1; t <= steps; t++) {
      Floats g = normals(rng, n, 1e-2);
      for (int i = 0; i < n; i += 37) g[i] *= 1000;                        // blocks with an outlier
      for (int i = 512; i < 640; i++) g[i] = 0;                            // a block of zeros
      AdamW now = o;
      now.step = t;
      run.step(g, now, 77, 5, ramp);
      ref.step(g, 0.5f, t, 77, 5);
      wrong += differ(run.m_values(), ref.m) + differ(run.v_values(), ref.v);
      const double e = rel_error(run.w.get(), ref.w);
      if (!(e <= relative)) relative = e;
      if (kOnCpu) { wide.step<32>(g, now, 77, 5, ramp); lanes += differ(run.m_values(), wide.m_values()) + differ(run.w.get(), wide.w.get()) + differ(run.v_values(), wide.v_values()); }
    }
    // A GPU contracts a*b + c: a value that lies at the edge of its random draw may then round the other way.
    const std::string what = std::string(c.name) + (ramp ? ", ramping" : "");
    check(what + ": states equal the reference's bit for bit over 12 steps, weights to FP32's rounding", (kOnCpu ? wrong == 0 : wrong <= steps * n / 100) && relative < (kOnCpu ? 1e-6 : 1e-3), "%d of %d differ, weights %.1e", wrong, 2 * n * steps, relative);
    if (kOnCpu) check(what + ": a warp a block gives the bits of one thread a block", lanes == 0, "%d differ", lanes);
    if (!ramp) {
      const double bytes = (double)(n * (state_bytes(c.f.m) + state_bytes(c.f.v))) / n + state_scale_bytes(c.f) / 128.;
      check(std::string(c.name) + ": takes the bytes an element that it promises, FP32 takes 8", bytes == c.bytes, "%.4f", bytes);
    }
  }
  {                                             // ramping with every period 1 is the plain update
    Rng rng(8);
    const Floats w0 = normals(rng, 300);
    AdamRun plain({}, w0), ramped({}, w0);
    ramped.period.set(std::vector<uint8_t>(300, 1));
    for (int t = 1; t <= 5; t++) { const Floats g = normals(rng, 300); plain.step(g, {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, t}, 1, 1, false); ramped.step(g, {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, t}, 1, 1, true); }
    const double e = rel_error(ramped.w.get(), plain.w.get());
    check("ramping with all periods 1 is the plain update", kOnCpu ? e == 0 : e < 1e-6, "relative difference %.1e", e);
  }
  {                                             // v in BF16 with beta2 = .999: it must rise to g^2, which rounding to nearest never lets it do
    const int n = 1 << 14, steps = 400;
    AdamRun run({F::fp32, F::bf16, false}, Floats(n, 0)), fp8({F::fp8, F::fp32, false}, Floats(n, 0));
    const Floats g(n, 2.0f);
    Floats uneven(n);
    for (int i = 0; i < n; i++) uneven[i] = 2.0f * (float)(1 + i % 128) / 128;
    float nearest = 0;
    for (int t = 1; t <= steps; t++) {
      run.step(g, {0, 0.9f, 0.999f, 1e-8f, 0, t}, 3, 9, false);
      fp8.step(uneven, {0, 0.99f, 0.999f, 1e-8f, 0, t}, 3, 9, false);
      nearest = reference::round_bf16(0.999f * nearest + 0.001f * 1);
    }
    double mean = 0, want = 1 - std::pow(0.999, steps);
    for (float v : run.v_values()) mean += v / n;
    const double e = std::fabs(mean / want - 1);
    // each step rounds by up to 2^-8 of the value: standard deviation about 2^-8 / 2 sqrt(steps) for one element
    const double sigma = 0x1p-9 * std::sqrt((double)steps) / std::sqrt((double)n);
    check("v in BF16 is unbiased over 400 steps of beta2 = .999: mean of 16384 elements within 4 sigma", e < 4 * sigma, "%.6f, exact %.6f: off by %.1e, sigma %.1e; rounding to nearest would end at %.4f", mean, want, e, sigma, nearest);
    check("(the test can fail: rounding v to nearest is far off)", std::fabs(nearest / want - 1) > 0.1);
    const Floats m = fp8.m_values();
    double worst = 0;
    for (int k = 0; k < 128; k++) {
      double sum = 0;
      for (int i = k; i < n; i += 128) sum += m[i];
      const double exact = 0.5 * uneven[k] * (1 - std::pow(0.99, steps)), off = std::fabs(sum / (n / 128) - exact) / exact;
      if (!(off <= worst)) worst = off;
    }
    // a draw moves m by at most a grid step, 2^-3 of it (more for the smallest elements: 1/128 of the maximum is 3.5 = 448/128); beta1 = .99 remembers about 100 draws
    check("m in FP8 is unbiased at every size within a block, over 400 steps", worst < 0.15, "largest relative deviation of the mean of 128 blocks %.3f", worst);
  }
}

inline void test_optimizer_states() {
  if (!section("AdamW's states in BF16 and FP8")) return;
  test_state_rounding();
  test_adam_formats();
}

// ------------------------------------------------------------------ windows
inline void test_windows() {
  const WindowSchedule s = {12, 6, 3};
  std::string phases;
  for (int step = 0; step < 26; step++) phases += "-owf"[(int)window_phase(s, step)];
  check("a window opens at r = 0, watches for 1 .. D, finishes at D + 1, from the start on", phases == "------------owwwf-owwwf-ow", "%s", phases.c_str());
  bool state = true;
  for (int step = 0; step < 26; step++) state = state && window_is_open(s, step) == (window_phase(s, step) == WindowPhase::open || window_phase(s, step) == WindowPhase::watch);
  check("there is state to keep exactly while it is open", state);
  check("a sound schedule has no problem", window_problem(s, 5, 100, "x").empty());
  check("a start inside the warm-up is refused", window_problem(s, 13, 100, "x").find("warm-up") != std::string::npos);
  bool inside = true;
  for (int start = 12; start < 18; start++) { WindowSchedule t = s; t.start = start; inside = inside && (window_problem(t, 0, 100, "x").find("inside a window") != std::string::npos) == (start >= 13 && start <= 16); }
  check("a start inside a window is refused, one between windows is not", inside);
  check("a run too short for one window is refused", !window_problem(s, 0, 15, "x").empty() && window_problem(s, 0, 16, "x").empty());
  check("a period that cannot hold the detection is refused", !window_problem({12, 4, 3}, 0, 100, "x").empty());
}

// ------------------------------------------------------------------ the kernels of oscillation.cuh
inline void test_oscillation_kernels() {
  Rng rng(21);
  const int n = 1234;
  Floats w = normals(rng, n), prev = normals(rng, n), q = normals(rng, n), q_prev = normals(rng, n), dq(n, 0.25f), dw(n, 0.5f);
  Device<float> dev_w(w), dev_prev(prev), dev_q(q), dev_q_prev(q_prev), dev_dq(dq), dev_dw(dw);
  watch(dev_prev.p, dev_dq.p, dev_dw.p, dev_w.p, dev_q.p, dev_q_prev.p, n);
  for (int i = 0; i < n; i++) { dq[i] += std::fabs(q[i] - q_prev[i]); dw[i] += std::fabs(w[i] - prev[i]); }
  check("watching adds |Q(W) - Q(W_prev)| and |W - W_prev| and moves W_prev on", differ(dev_dq.get(), dq) + differ(dev_dw.get(), dw) + differ(dev_prev.get(), w) == 0);

  for (int i = 0; i < n; i++) {
    dw[i] = i % 5 == 0 ? 0 : (float)rng.uniform() * 0.1f;
    dq[i] = i % 7 == 0 ? 0 : (float)rng.uniform();
    if (i % 11 == 0 && dw[i] > 0) { dw[i] = 0.125f; dq[i] = 1; }           // exactly tau
  }
  dev_dq.set(dq); dev_dw.set(dw);
  Floats want = w, delta(n);
  OsciCounts counts;
  for (int i = 0; i < n; i++) {
    const bool hit = dw[i] > 0 && dq[i] / dw[i] >= 8;
    counts.moved += dw[i] > 0; counts.flipped += dq[i] > 0; counts.oscillating += hit; counts.reset += hit && q[i] != w[i];
    if (hit) want[i] = q[i];
    delta[i] = hit ? q[i] - w[i] : 0;
  }
  Device<OsciCounts> dev_counts(std::vector<OsciCounts>(1));
  Device<float> dev_delta(w);
  osci_reset<false>(dev_counts.p, dev_w.p, dev_q.p, dev_dq.p, dev_dw.p, 8, n);
  const OsciCounts got = dev_counts.get()[0];
  osci_reset<true>(dev_counts.p, dev_delta.p, dev_q.p, dev_dq.p, dev_dw.p, 8, n);
  check("a reset puts W on Q(W) where distQ / distW >= tau, exactly tau included, and nowhere else", differ(dev_w.get(), want) == 0 && differ(dev_delta.get(), delta) == 0);
  check("it counts what moved, flipped, oscillates and was reset", got.moved == counts.moved && got.flipped == counts.flipped && got.oscillating == counts.oscillating && got.reset == counts.reset && counts.reset > 100,
        "%u %u %u %u of %d", got.moved, got.flipped, got.oscillating, got.reset, n);

  Device<float> average(prev);
  Floats e = prev;
  for (int k = 0; k < 3; k++) { weight_average(average.p, dev_w.p, 0.998f, n); for (int i = 0; i < n; i++) { const float a = 0.998f * e[i], b = (1 - 0.998f) * want[i]; e[i] = a + b; } }
  const double off = rel_error(average.get(), e);
  check("Q-EMA's average is b E + (1-b) W", kOnCpu ? off == 0 : off < 1e-6, "relative difference %.1e", off);

  Device<uint8_t> period(n);
  Device<unsigned> ramped(std::vector<unsigned>(1, 0u));
  ramp_periods(period.p, ramped.p, dev_dq.p, dev_dw.p, 16, n);
  const std::vector<uint8_t> p = period.get();
  int wrong = 0, sizes[4] = {};
  unsigned above = 0;
  for (int i = 0; i < n; i++) {
    const float ratio = (dq[i] / 16) / (dw[i] + 1e-8f);
    const double n_i = std::min(std::floor((double)ratio) * 5 + 1, 16.);
    wrong += p[i] != n_i;
    above += p[i] > 1;
    sizes[n_i == 1 ? 0 : n_i == 6 ? 1 : n_i == 11 ? 2 : 3]++;
  }
  check("Q-Ramping's period is min(floor((distQ/16)/(distW+1e-8))*5 + 1, Nmax): 1, 6, 11, 16", wrong == 0 && above == ramped.get()[0] && sizes[0] && sizes[1] && sizes[2] && sizes[3], "%d %d %d %d elements, %d wrong", sizes[0], sizes[1], sizes[2], sizes[3], wrong);
}

// ------------------------------------------------------------------ the pieces of outliers.cuh
// Both sets of columns at once. Widths with and without whole vectors; strides larger than the sets; rows that do not fill a block.
template <bool kShared> void test_column_sets() {
  Rng rng(37);
  int wrong = 0, not_back = 0, touched = 0;
  for (int K : {160, 320, 100, 6000}) for (int second : {32, K / 2 / 8 * 8, 5}) for (int wider : {0, 8, 3}) {
    const int rows = K > 1000 ? 5 : 43, n = K - second, ld[2] = {n + wider, second + wider};
    const Floats x = rounded_x(normals(rng, (size_t)rows * K));
    std::vector<int> order(K);
    for (int i = 0; i < K; i++) order[i] = i;
    for (int i = K - 1; i > 0; i--) std::swap(order[i], order[rng.below(i + 1)]);
    Device<int> columns(order);
    Device<floatX> dev_x(to_x(x)), a(to_x(Floats((size_t)rows * ld[0], 7))), b(to_x(Floats((size_t)rows * ld[1], 7))), back((size_t)rows * K);
    const ColumnSets<floatX> sets = {a.p, b.p, n, ld[0], ld[1]};
    split_columns<kShared>(sets, dev_x.p, columns.p, rows, K);
    const Floats got[2] = {from_x(a.get()), from_x(b.get())};
    for (int r = 0; r < rows; r++) for (int i = 0; i < K; i++) wrong += got[i >= n][(size_t)r * ld[i >= n] + (i >= n ? i - n : i)] != x[(size_t)r * K + order[i]];
    for (int set = 0; set < 2; set++) for (int r = 0; r < rows; r++) for (int i = 0; i < wider; i++) touched += got[set][(size_t)(r + 1) * ld[set] - 1 - i] != 7;
    join_columns<kShared>(back.p, sets, columns.p, rows, K);
    not_back += differ(from_x(back.get()), x);
  }
  check(std::string("two sets of columns apart, and joined again") + (kShared ? " (through shared memory)" : ""), wrong == 0 && not_back == 0 && touched == 0, "%d differ, %d after joining, %d written beside", wrong, not_back, touched);
}
inline void test_outlier_kernels() {
  Rng rng(31);
  const int T = 150, K = 300;
  Floats x = normals(rng, (size_t)T * K);
  std::vector<int> planted;
  while (planted.size() < 20) { const int c = rng.below(K); if (std::find(planted.begin(), planted.end(), c) == planted.end()) planted.push_back(c); }
  for (int c : planted) for (int t = 0; t < T; t++) x[(size_t)t * K + c] *= 8;
  x = rounded_x(x);
  Device<floatX> dev_x(to_x(x));
  Device<float> sums(Floats(K, 0)), scratch(column_norms_scratch(K));
  for (int k = 0; k < 2; k++) add_column_norms(sums.p, dev_x.p, T, K, scratch.p);
  double worst = 0;
  Floats s = sums.get();
  for (int c = 0; c < K; c++) { double sq = 0; for (int t = 0; t < T; t++) sq += std::pow((double)x[(size_t)t * K + c], 2); const double e = std::fabs(s[c] / (2 * std::sqrt(sq)) - 1); if (!(e <= worst)) worst = e; }
  check("the norms of the columns add up over steps", worst < 1e-5, "largest relative error %.1e", worst);
  const std::vector<int> sorted = outlier_order(s, 20, true), memory = outlier_order(s, 20, false);
  std::vector<int> chosen(sorted.end() - 20, sorted.end()), all(sorted);
  std::sort(chosen.begin(), chosen.end()); std::sort(planted.begin(), planted.end()); std::sort(all.begin(), all.end());
  bool falling = true, permutation = true;
  for (int i = 0; i + 1 < K - 20; i++) falling = falling && s[sorted[i]] >= s[sorted[i + 1]];
  for (int i = 0; i < K; i++) permutation = permutation && all[i] == i;
  check("OutControl chooses exactly the planted channels", chosen == planted && permutation);
  check("sorted: the FP4 channels fall in norm; memory: both sets keep their order", falling && std::is_sorted(memory.begin(), memory.end() - 20) && std::is_sorted(memory.end() - 20, memory.end()) && std::vector<int>(memory.end() - 20, memory.end()) == planted);
  int m;
  check("10 % of the columns, rounded up to 128", outlier_columns(1024, 0.1f) == 128 && outlier_columns(1792, 0.1f) == 256 && outlier_columns(640, 0.1f) == 128 && outlier_columns(3584, 0.1f) == 384 && outlier_columns(1280, 0.1f) == 128);
  check("a small layer is not swallowed: a smaller multiple, less than half of it", outlier_columns(128, 0.1f, &m) == 32 && m == 32 && outlier_columns(256, 0.1f, &m) == 64 && m == 64 && outlier_columns(384, 0.1f, &m) == 128 && outlier_columns(96, 0.1f, &m) == 32 && outlier_columns(64, 0.1f) == 0);

  Device<int> columns(sorted);
  Device<floatX> gathered((size_t)T * K), back(to_x(Floats((size_t)T * K, 0)));
  gather_columns(gathered.p, dev_x.p, columns.p, T, K - 20, K);
  const Floats g = from_x(gathered.get());
  int wrong = 0;
  for (int t = 0; t < T; t++) for (int i = 0; i < K - 20; i++) wrong += g[(size_t)t * (K - 20) + i] != x[(size_t)t * K + sorted[i]];
  scatter_columns(back.p, gathered.p, columns.p, T, K - 20, K);
  gather_columns(gathered.p, dev_x.p, columns.p + K - 20, T, 20, K);
  scatter_columns(back.p, gathered.p, columns.p + K - 20, T, 20, K);
  check("columns gathered and scattered again are the matrix", wrong == 0 && differ(from_x(back.get()), x) == 0);
  test_column_sets<!kOnCpu>();
  if (kOnCpu) test_column_sets<true>();
}
template <int kLanes> void test_occ_split() {
  Rng rng(41);
  int wrong = 0, wrong_rows = 0, residual = 0;
  double exact = 0;
  for (int K : {1, 7, 128, 200, 640, 1000, 1792, 2304}) for (double alpha : {0.5, 0.97, 0.99, 0.999}) {
    const int T = 9;
    Floats x = normals(rng, (size_t)T * K);
    for (int i = 0; i < T * K; i += 5) x[i] *= 30;
    for (int i = 0; i < T * K; i += 9) x[i] = i % 2 ? 0.0f : -0.0f;
    for (int i = 0; i < K; i++) { x[i] = 3; x[K + i] = i % 3 ? 1 : -1e30f; x[2 * K + i] *= std::exp2((float)(i % 60)); }      // rows far from Gaussian
    x = rounded_x(x);
    Device<floatX> dev_x(to_x(x)), clamped(x.size()), rest(x.size());
    Device<uint32_t> row_amax(T);
    occ_split<kLanes>(clamped.p, rest.p, dev_x.p, T, K, (float)alpha, row_amax.p);
    const Floats c = from_x(clamped.get()), r = from_x(rest.get()), want = reference_control::clamp_rows(x, T, K, (float)alpha);
    wrong += differ(c, want);
    const std::vector<uint32_t> most = row_amax.get();
    for (int t = 0; t < T; t++) {
      float m = 0;
      for (int i = 0; i < K; i++) m = std::max(m, std::fabs(want[(size_t)t * K + i]));
      wrong_rows += bits_float(most[t]) != m;
    }
    for (size_t i = 0; i < x.size(); i++) {
      residual += r[i] != 0;
      const double e = std::fabs((double)c[i] + r[i] - x[i]) / (std::fabs(x[i]) + std::fabs(c[i]) + 1e-30);
      if (!(e <= exact)) exact = e;
    }
  }
  check("OCC clamps at the quantiles of the row, found by sorting" + std::string(kLanes == 1 ? "" : " (a warp a row)"), wrong == 0 && residual > 0, "%d differ", wrong);
  check("and finds the largest of each clamped row", wrong_rows == 0, "%d differ", wrong_rows);
  check("clamped + residual is X, to the rounding of the residual", exact <= (sizeof(floatX) == 2 ? 0x1p-8 : 0x1p-23), "relative error %.1e", exact);
}

// ------------------------------------------------------------------ models under control
// As main() sets one up. The options stay the caller's.
inline void start(Model& m, Options& o, const ModelConfig& config, int B, int S) {
  m.config = config;
  m.recipe = find_recipe(o);
  m.bf16 = recipe_named("bf16");
  m.B = B; m.S = S; m.V = round_up(config.vocab, 128); m.training = true; m.seed = (uint64_t)o.seed;
  configure_control(m, o);
  make_params(m);
  allocate_model(m, false);
  init_weights(m);
}
inline void finish(Model& m) { free_window(m); free_model(m); }
inline Floats master_of(const Param& p) { Floats w(p.size()); to_host(w.data(), p.weight->master, w.size()); return w; }

// ------------------------------------------------------------------ OsciReset on constructed weights
// Weights of step t. In each 16 x 16 tile an anchor keeps amax at .06, so that the grid is .01 times E2M1's. Of the others, by their column:
//   1 swings by .001 about .025, the middle of .02 and .03: distQ / distW = 10         2 swings as far about .02: never leaves its interval
//   3 drifts from .010 to .039 in 25 steps: distQ / distW about 1                        4 lies still on a middle
//   5 swings by .002 about .025: ratio 5, below tau                                       the rest lie still
inline Floats constructed_weights(int rows, int cols, int t) {
  Floats w((size_t)rows * cols);
  const float side = t % 2 ? 1.0f : -1.0f;
  for (int r = 0; r < rows; r++) for (int c = 0; c < cols; c++) {
    float& v = w[(size_t)r * cols + c];
    const float sign = (r + c / 16) % 3 ? 1.0f : -1.0f;
    v = 0.001f * (float)((r * 7 + c * 3) % 50);
    if (c % 16 == 0) v = 0.06f;
    if (c % 16 == 1) v = 0.025f + 0.0005f * side;
    if (c % 16 == 2) v = 0.020f + 0.0005f * side;
    if (c % 16 == 3) v = 0.010f + 0.029f * (float)t / 25;
    if (c % 16 == 4) v = 0.025f;
    if (c % 16 == 5) v = 0.025f + 0.0010f * side;
    v *= sign;
  }
  return w;
}
// Q(W) with one scale for 16 x 16, FP32.
inline Floats reference_grid(const Floats& w, int rows, int cols, bool tile16) {
  reference::Nvfp4How how;
  how.tile16 = tile16;
  const reference::Nvfp4 q = reference::nvfp4(w, rows, cols, how);
  Floats x((size_t)rows * cols);
  const float scale = q.amax / 2688.0f;
  for (int r = 0; r < rows; r++) for (int c = 0; c < cols; c++) x[(size_t)r * cols + c] = q.values[(size_t)r * 16 * q.blocks + c] * scale;
  return x;
}
inline void put_constructed(Model& m, int t) { for (const Param& p : m.params) if (p.watched) set_param(p, constructed_weights(p.rows, p.cols, t).data()); }

inline void test_osci_reset() {
  Options o;
  o.recipe = "nvfp4"; o.set = {"bf16_last=0"}; o.steps = 100; o.warmup = 0; o.seed = 3;
  o.oscillation = "osci-reset"; o.osci_start = 40; o.osci_period = 40; o.osci_detect = 20; o.out = temp_dir() + "/osci";
  Model m, resumed;
  start(m, o, tiny_llama(), 1, 16);
  check("every matrix of the four linear layers is watched, nothing else", std::count_if(m.params.begin(), m.params.end(), [](const Param& p) { return p.watched; }) == 4 * m.config.layers);
  make_directories(o.out);
  const int finish_step = 61;
  bool outside = true;
  for (int t = 36; t <= 54; t++) {
    put_constructed(m, t - 40);
    oscillation_step(m, t, nullptr);
    outside = outside && (m.control.open.prev != nullptr) == (t >= 40);
  }
  check("memory is taken when the window opens", outside);
  save_checkpoint(m, o, {54, 7, -1}, "r");                       // in the middle of the window
  start(resumed, o, tiny_llama(), 1, 16);
  const RunState state = load_checkpoint(resumed, o, o.out + "/step_000054", "r");
  bool same = state.step == 54 && resumed.control.open.prev, loaded = false;
  for (Model* which : {&m, &resumed}) for (int t = 55; t <= finish_step; t++) { put_constructed(*which, t - 40); oscillation_step(*which, t, nullptr); }
  int wrong = 0, swinging = 0, swinging_reset = 0, others_reset = 0, resumed_differs = 0;
  for (size_t i = 0; i < m.params.size(); i++) {
    const Param& p = m.params[i];
    if (!p.watched) continue;
    // the same in plain C++
    Floats prev = constructed_weights(p.rows, p.cols, 0), dist_q(p.size(), 0), dist_w(p.size(), 0);
    for (int t = 1; t <= 20; t++) {
      const Floats w = constructed_weights(p.rows, p.cols, t), q = reference_grid(w, p.rows, p.cols, true), q_prev = reference_grid(prev, p.rows, p.cols, true);
      for (size_t k = 0; k < w.size(); k++) { dist_q[k] += std::fabs(q[k] - q_prev[k]); dist_w[k] += std::fabs(w[k] - prev[k]); }
      prev = w;
    }
    const Floats before = constructed_weights(p.rows, p.cols, 21), q = reference_grid(before, p.rows, p.cols, true), after = master_of(p);
    Floats want = before;
    for (size_t k = 0; k < want.size(); k++) {
      if (dist_w[k] > 0 && dist_q[k] / dist_w[k] >= 8) want[k] = q[k];
      const bool swings = k % p.cols % 16 == 1, moved = after[k] != before[k];
      swinging += swings;
      swinging_reset += swings && moved && (std::fabs(std::fabs(after[k]) - 0.02f) < 1e-6f || std::fabs(std::fabs(after[k]) - 0.03f) < 1e-6f);
      others_reset += !swings && moved;
    }
    wrong += differ(after, want);
    resumed_differs += differ(after, master_of(resumed.params[i]));
    std::vector<floatX> copy(p.size());
    to_host(copy.data(), p.weight->work, copy.size());
    loaded = loaded || differ(from_x(copy), rounded_x(after)) != 0;
  }
  check("the weights that swing across a middle are put on their grid value", swinging > 0 && swinging_reset == swinging, "%d of %d", swinging_reset, swinging);
  check("those that drift, swing inside their interval, swing too far or lie still keep their bits", others_reset == 0, "%d changed", others_reset);
  check("all weights have the bits of the detector in plain C++", wrong == 0, "%d differ", wrong);
  check("the working copy follows", !loaded);
  check("a run resumed inside the window resets the same weights to the same bits", same && resumed_differs == 0, "%d differ", resumed_differs);
  check("and afterwards the window's memory is free", !m.control.open.prev && !resumed.control.open.prev);
  SafetensorsReader r(o.out + "/step_000054/trainer_state.safetensors");
  check("the checkpoint inside the window holds three FP32 copies", r.has("window.prev.block0.qkv") && r.has("window.dist_q.block1.down") && r.has("window.dist_w.block1.down"));
  save_checkpoint(m, o, {61, 7, -1}, "r");
  SafetensorsReader later(o.out + "/step_000061/trainer_state.safetensors");
  check("one outside holds none", !later.has("window.prev.block0.qkv"));
  finish(m);
  finish(resumed);
}

// With OutControl the grid is that of the gathered FP4 columns, and the FP8 columns have none.
inline ModelConfig small_llama() {                       // 96 channels: OutControl takes 32 of them
  ModelConfig c = tiny_llama();
  c.channels = 96; c.heads = 6; c.kv_heads = 3; c.ffn = 192; c.vocab = 64;
  return c;
}
inline void test_osci_reset_columns() {
  Options o;
  o.recipe = "fqt"; o.steps = 100; o.warmup = 0; o.seed = 3;
  o.oscillation = "osci-reset"; o.osci_start = 40; o.osci_period = 40; o.osci_detect = 20;
  o.outliers = "outcontrol"; o.outlier_start = 1; o.outlier_steps = 1;
  Model m;
  start(m, o, small_llama(), 1, 16);
  Rng rng(13);
  for (auto& block : m.control.columns) for (OutlierLayer& l : block) {
    Floats sums(l.K);
    for (float& v : sums) v = (float)rng.uniform();
    to_device(l.sums, sums.data(), l.K);
    device_sync();
  }
  choose_outliers(m, 1, nullptr);
  for (int t = 40; t <= 61; t++) { put_constructed(m, t - 40); oscillation_step(m, t, nullptr); }
  int wrong = 0, reset = 0, fp8_changed = 0;
  for (const Param& p : m.params) {
    if (!p.watched) continue;
    int which = 0;
    while (p.weight != &m.layers[p.block].linear(which)) which++;
    const OutlierLayer& l = m.control.columns[p.block][which];
    std::vector<int> order(l.K);
    to_host(order.data(), l.columns, l.K);
    const std::vector<int> fp4(order.begin(), order.end() - l.fp8);
    const int n = (int)fp4.size();
    auto weights = [&](int t) { return reference_control::columns_of(constructed_weights(p.rows, p.cols, t), p.rows, p.cols, fp4); };
    Floats prev = weights(0), dist_q(prev.size(), 0), dist_w(prev.size(), 0);
    for (int t = 1; t <= 20; t++) {
      const Floats w = weights(t), q = reference_grid(w, p.rows, n, false), q_prev = reference_grid(prev, p.rows, n, false);
      for (size_t k = 0; k < w.size(); k++) { dist_q[k] += std::fabs(q[k] - q_prev[k]); dist_w[k] += std::fabs(w[k] - prev[k]); }
      prev = w;
    }
    const Floats before = constructed_weights(p.rows, p.cols, 21), q = reference_grid(weights(21), p.rows, n, false), after = master_of(p);
    Floats want = before;
    for (int r = 0; r < p.rows; r++) for (int i = 0; i < n; i++) {
      const size_t k = (size_t)r * n + i;
      if (dist_w[k] > 0 && dist_q[k] / dist_w[k] >= 8) { want[(size_t)r * p.cols + fp4[i]] = q[k]; reset++; }
    }
    wrong += differ(after, want);
    for (int r = 0; r < p.rows; r++) for (int i = n; i < p.cols; i++) fp8_changed += after[(size_t)r * p.cols + order[i]] != before[(size_t)r * p.cols + order[i]];
  }
  check("with OutControl: the detector's grid is that of the gathered FP4 columns, as in plain C++; FP8 columns are left alone", wrong == 0 && fp8_changed == 0 && reset > 100, "%d differ, %d reset", wrong, reset);
  finish(m);
}
// QuEST rounds H W: the weights swing in the rotated coordinates, and are put on the grid there.
inline void test_osci_reset_rotated() {
  Options o;
  o.recipe = "quartet"; o.steps = 100; o.warmup = 0; o.seed = 3;
  o.oscillation = "osci-reset"; o.osci_start = 40; o.osci_period = 40; o.osci_detect = 20;
  Model m;
  start(m, o, small_llama(), 1, 16);
  // In groups of 32, standard deviation about .025: QuEST's step is 2^-6. Every other group has a weight that swings about .75 * 2^-6, a middle of the grid.
  auto rotated = [](int rows, int cols, int t) {
    Floats v((size_t)rows * cols);
    for (int r = 0; r < rows; r++) for (int c = 0; c < cols; c++) {
      v[(size_t)r * cols + c] = (c % 2 ? -1 : 1) * 0.001f * (float)((r * 7 + c * 13) % 45);
      if (c % 64 == 1) v[(size_t)r * cols + c] = 0.75f * 0x1p-6f + (t % 2 ? 0.0003f : -0.0003f);
    }
    return v;
  };
  auto rotate = [](const Floats& v) {                         // H is its own inverse
    Floats w(v.size());
    for (size_t g = 0; g < v.size(); g += 32) {
      const reference::Array part = reference::rht(reference::Array(v.begin() + g, v.begin() + g + 32), 0);
      for (int i = 0; i < 32; i++) w[g + i] = (float)part[i];
    }
    return w;
  };
  for (int t = 40; t <= 61; t++) {
    for (const Param& p : m.params) if (p.watched) set_param(p, rotate(rotated(p.rows, p.cols, t)).data());
    oscillation_step(m, t, nullptr);
  }
  int swinging = 0, on_grid = 0, other_bits = 0;
  double others = 0;
  for (const Param& p : m.params) {
    if (!p.watched) continue;
    const Floats before = rotated(p.rows, p.cols, 61), w_before = rotate(before), w = master_of(p), after = rotate(w);
    for (size_t k = 0; k < after.size(); k++) {
      const size_t c = k % p.cols;
      if (c % 64 == 1) { swinging++; on_grid += std::fabs(after[k] - 0x1p-6) < 1e-7 || std::fabs(after[k] - 0x1p-7) < 1e-7; }
      else { const double e = std::fabs(after[k] - before[k]); if (!(e <= others)) others = e; }
      if (c % 64 >= 32) other_bits += w[k] != w_before[k];
    }
  }
  check("a recipe that rotates W: weights that swing there are put on the grid there, their neighbours stay within FP32's rounding", on_grid == swinging && others < 1e-7, "%d of %d, others off by %.1e", on_grid, swinging, others);
  check("and groups without such a weight keep their bits", other_bits == 0, "%d differ", other_bits);
  finish(m);
}

// ------------------------------------------------------------------ a linear layer alone
struct Layer {
  int T, K, N;
  Recipe r;
  Floats x, w, dy;                                  // as BF16 holds them
  Device<floatX> dx_x, dev_w, dev_dy, y, dx;
  Device<float> dw;
  LinearScratch s;
  Scalars scalars;
  LinearSaved saved;
  LayerControl how;
  std::vector<void*> blocks;
  template <class P> void take(P** where, size_t n) { *where = device_alloc<P>(n); blocks.push_back(*where); }
  Layer(const Recipe& r_, int T_, int K_, int N_, const Floats& x_, const Floats& w_, const Floats& dy_)
      : T(T_), K(K_), N(N_), r(r_), x(rounded_x(x_)), w(rounded_x(w_)), dy(rounded_x(dy_)), dx_x(to_x(x)), dev_w(to_x(w)), dev_dy(to_x(dy)), y((size_t)T_ * N_), dx((size_t)T_ * K_), dw((size_t)N_ * K_) {
    for (int i = 0; i < 2; i++) take(&s.values[i], linear_scratch_elements(T, K, N));
    take(&s.tiles, linear_tile_words(T, K, N)); take(&s.rotated, linear_scratch_elements(T, K, N));
    take(&scalars.all, scalars.size = Scalars::kLayer);
    scalars.start();
    s.scalars = &scalars;
    want_linear_saved(saved, r, T, K, N, [&](auto** where, size_t n) { take(where, n); });
    OutlierScratch& o = how.scratch;
    take(&o.x, (size_t)T * K); take(&o.w, (size_t)N * K); take(&o.y, (size_t)T * max(N, K)); take(&o.dw, outlier_dw_elements(K, N)); take(&o.norms, column_norms_scratch(K)); take(&o.average, (size_t)N * K);
    GridScratch& g = how.toward.packed;
    const PackedBytes b = packed_bytes(r.fprop.w, N, K);
    take(&g.codes, b.codes); take(&g.scales, b.scales); take(&g.outer, b.outer / 4);
  }
  ~Layer() { for (void* p : blocks) device_free((char*)p); }
  LinearKey key() const { return {11, 3, 2}; }
  void forward() { linear_forward(how, y.p, dx_x.p, dev_w.p, T, K, N, r, key(), s, &saved); }
  void backward() { device_zero(dw.p, dw.n); linear_backward(how, dx.p, dw.p, dev_dy.p, keeps_x(r) || how.occ || how.split ? dx_x.p : nullptr, dev_w.p, T, K, N, r, key(), s, &saved); }
};
inline Recipe row_with(const char* name, const std::vector<std::string>& set) {
  Options o;
  o.recipe = name; o.set = set;
  return find_recipe(o);
}
// Values of BF16 results carry its rounding; FP32 builds do not.
constexpr double kResult = sizeof(floatX) == 2 ? 4e-3 : 2e-6;

// ------------------------------------------------------------------ Q-EMA
// Codes, as values, and what they are multiplied by.
inline Floats packed_codes(const Operand4& p, const uint8_t* codes) {
  std::vector<uint8_t> bytes((size_t)p.rows * p.ld / 2);
  to_host(bytes.data(), codes, bytes.size());
  Floats v((size_t)p.rows * p.cols);
  for (int r = 0; r < p.rows; r++) for (int c = 0; c < p.cols; c++) v[(size_t)r * p.cols + c] = (float)reference::e2m1_value(bytes[((size_t)r * p.ld + c) / 2] >> (4 * (c % 2)) & 15);
  return v;
}
inline void test_q_ema() {
  Rng rng(51);
  const int T = 16, K = 96, N = 48;
  const Floats x = normals(rng, (size_t)T * K), w = normals(rng, (size_t)N * K, 0.02), dy = normals(rng, (size_t)T * N);
  struct Case { const char* name; Recipe r; };
  const Case cases[] = {{"NVFP4 16x16", row_with("nvfp4", {})}, {"NVFP4 1x16", row_with("fqt", {})}, {"MXFP4, double quantization", row_with("tetrajet", {})}, {"one scale a row", row_with("fp4-dge", {"outliers=none"})}};
  for (const Case& c : cases) for (bool same : {true, false}) {
    Layer layer(c.r, T, K, N, x, w, dy);
    Floats average = layer.w;
    if (!same) for (float& a : average) a += (float)(rng.normal() * 0.003);
    Device<float> dev_average(average);
    layer.how.toward.average = dev_average.p;
    layer.forward();
    Operand4 p;
    p.rows = N; p.cols = K; p.ld = operand_ld(K);
    const Floats codes = packed_codes(p, saves_w(c.r) ? layer.saved.w.codes : layer.how.toward.packed.codes);
    // plain C++: the weights in units of their scale
    Floats unit((size_t)N * K), factor((size_t)N * K), back((size_t)N * K);
    const float amax = reference::max_abs(layer.w.data(), layer.w.size());
    for (int r = 0; r < N; r++) for (int k = 0; k < K; k++) {
      const size_t i = (size_t)r * K + k;
      const int block = c.r.fprop.w.format == Format::mxfp4 ? 32 : c.r.fprop.w.format == Format::fp4_vector ? K : 16, first = k / block * block;
      float most = 0;
      for (int rr = c.r.fprop.w.blocks == Blocks::b16x16 ? r / 16 * 16 : r; rr <= (c.r.fprop.w.blocks == Blocks::b16x16 ? r / 16 * 16 + 15 : r); rr++) most = std::max(most, reference::max_abs(&layer.w[(size_t)rr * K + first], std::min(block, K - first)));
      if (c.r.fprop.w.format == Format::mxfp4) { const double s = reference::e8m0_value(reference::e8m0_ceil(most / 6)); factor[i] = (float)(1 / s); back[i] = (float)s; unit[i] = layer.w[i] * factor[i]; }
      else if (c.r.fprop.w.format == Format::fp4_vector) { back[i] = most / 6; unit[i] = layer.w[i] / back[i]; }
      else { uint8_t byte; reference::nvfp4_scale(amax, most, &byte, &factor[i]); unit[i] = layer.w[i] * factor[i]; back[i] = (float)reference::e4m3_value(byte) * (amax / 2688); }
    }
    int wrong = 0, flipped = 0;
    Floats values(codes.size());
    for (size_t i = 0; i < codes.size(); i++) {
      const float e = c.r.fprop.w.format == Format::fp4_vector ? average[i] / back[i] : average[i] * factor[i];
      const double want = reference_control::toward(unit[i], e), nearest = reference::e2m1_value(reference::e2m1_rn(unit[i]));
      wrong += codes[i] != want;
      flipped += want != nearest;
      values[i] = (float)want * back[i];
    }
    reference::Array y((size_t)T * N, 0.);
    Floats xq = c.r.fprop.x.format == Format::mxfp4 ? Floats() : c.r.fprop.x.format == Format::fp4_vector ? reference_control::vector_fp4(layer.x, T, K) : reference_control::nvfp4(layer.x, T, K);
    if (same) check(std::string(c.name) + ": Q-EMA with the weights as their own average is rounding to nearest", wrong == 0 && flipped == 0, "%d codes differ, %d of the reference's", wrong, flipped);
    else {
      check(std::string(c.name) + ": Q-EMA takes the neighbour nearer to the average", wrong == 0 && flipped > (int)codes.size() / 50, "%d of %zu codes differ; %d are not the nearest", wrong, codes.size(), flipped);
      if (xq.empty()) continue;
      reference_control::multiply(y, xq, values, T, N, K);
      const double e = rel_error(from_x(layer.y.get()), y);
      check(std::string(c.name) + ": and the layer computes with those weights", e < kResult, "relative error %.1e", e);
    }
  }
  {                                                  // QuEST rotates W: the average lives in the rotated coordinates
    Layer layer(row_with("quartet", {}), T, K, N, x, w, dy), plain(row_with("quartet", {}), T, K, N, x, w, dy);
    Floats average = layer.w;
    Device<float> dev_average(average), scratch(average.size());
    rotate_rows(dev_average.p, scratch.p, N, K, 32);
    Floats rotated = dev_average.get();
    double worst = 0;
    for (int r = 0; r < N; r++) for (int g = 0; g < K; g += 32) {
      reference::Array part(32);
      for (int i = 0; i < 32; i++) part[i] = layer.w[(size_t)r * K + g + i];
      const reference::Array want = reference::rht(part, 0);
      for (int i = 0; i < 32; i++) { const double e = std::fabs(rotated[(size_t)r * K + g + i] - want[i]); if (!(e <= worst)) worst = e; }
    }
    layer.how.toward.average = dev_average.p;
    layer.forward();
    plain.forward();
    check("a recipe that rotates W: its own rotated weights as average give the plain forward pass", worst < 1e-7 && differ(from_x(layer.y.get()), from_x(plain.y.get())) == 0, "rotation off by %.1e", worst);
    for (float& v : rotated) v *= 1.3f;
    dev_average.set(rotated);
    layer.forward();
    check("and another average another one", differ(from_x(layer.y.get()), from_x(plain.y.get())) > T * N / 2);
  }
}

// ------------------------------------------------------------------ OutControl
inline void test_out_control() {
  Rng rng(61);
  const int T = 64, K = 160, N = 96, fp8 = 32;
  Floats x = normals(rng, (size_t)T * K), w = normals(rng, (size_t)N * K, 0.05), dy = normals(rng, (size_t)T * N, 0.01);
  std::vector<float> sums(K, 1.0f);
  for (int i = 0; i < fp8; i++) { const int c = (i * 37 + 5) % K; sums[c] = 10; for (int t = 0; t < T; t++) x[(size_t)t * K + c] *= 20; }
  for (int c = 0; c < K; c++) sums[c] += 0.001f * (float)rng.uniform();
  for (bool sorted : {true, false}) {
    const std::vector<int> order = outlier_order(sums, fp8, sorted), a(order.begin(), order.end() - fp8), b(order.end() - fp8, order.end());
    Device<int> columns(order);
    const OutlierLayer split = {K, fp8, columns.p, nullptr};
    Layer layer(row_with("fqt", {"rounding=nearest"}), T, K, N, x, w, dy);
    layer.how.split = &split;
    layer.forward();
    layer.backward();
    using namespace reference_control;
    reference::Array y((size_t)T * N, 0.), dx((size_t)T * K, 0.), dw((size_t)N * K, 0.);
    const Floats dyt = reference_control::transposed(layer.dy, T, N);
    for (const std::vector<int>& set : {a, b}) {
      const bool eight = set == b;
      const int n = (int)set.size();
      const Floats xs = columns_of(layer.x, T, K, set), ws = columns_of(layer.w, N, K, set);
      auto quantize_set = [&](const Floats& v, int rows, int cols) { return eight ? mxfp8(v, rows, cols) : reference_control::nvfp4(v, rows, cols); };
      multiply(y, quantize_set(xs, T, n), quantize_set(ws, N, n), T, N, n);
      reference::Array part_x((size_t)T * n, 0.), part_w((size_t)N * n, 0.);
      multiply(part_x, reference_control::nvfp4(layer.dy, T, N), reference_control::nvfp4(reference_control::transposed(ws, N, n), n, N), T, n, N);
      multiply(part_w, quantize_set(dyt, N, T), quantize_set(reference_control::transposed(xs, T, n), n, T), N, n, T);
      for (int t = 0; t < T; t++) for (int i = 0; i < n; i++) dx[(size_t)t * K + set[i]] = part_x[(size_t)t * n + i];
      for (int j = 0; j < N; j++) for (int i = 0; i < n; i++) dw[(size_t)j * K + set[i]] = part_w[(size_t)j * n + i];
    }
    const double ey = rel_error(from_x(layer.y.get()), y), ex = rel_error(from_x(layer.dx.get()), dx), ew = rel_error(layer.dw.get(), dw);
    const std::string order_name = sorted ? "sorted: " : "in memory's order: ";
    check(order_name + "Y, dX and dW are those of the FP4 columns and of the FP8 columns, each quantized in plain C++", ey < kResult && ex < kResult && ew < 1e-5, "relative errors %.1e %.1e %.1e", ey, ex, ew);
    Layer plain(row_with("fqt", {"rounding=nearest"}), T, K, N, x, w, dy);
    plain.forward();
    reference::Array exact((size_t)T * N, 0.);
    multiply(exact, layer.x, layer.w, T, N, K);
    const double with = rel_error(from_x(layer.y.get()), exact), without = rel_error(from_x(plain.y.get()), exact);
    check(order_name + "the product of data with outliers in 20 % of the columns comes out nearer to the truth", with < 0.6 * without, "relative error %.3f instead of %.3f", with, without);
  }
  {                                                  // double quantization: dgrad starts from what the forward used, FP8 columns included
    const std::vector<int> order = outlier_order(sums, fp8, true);
    Device<int> columns(order);
    const OutlierLayer split = {K, fp8, columns.p, nullptr};
    Layer layer(row_with("fqt", {"dgrad.format=exact", "dgrad.w.source=forward"}), T, K, N, x, w, dy);
    layer.how.split = &split;
    layer.forward();
    layer.backward();
    using namespace reference_control;
    Floats used((size_t)N * K);
    for (bool eight : {false, true}) {
      const std::vector<int> set(eight ? order.end() - fp8 : order.begin(), eight ? order.end() : order.end() - fp8);
      const Floats ws = columns_of(layer.w, N, K, set), q = eight ? mxfp8(ws, N, (int)set.size()) : reference_control::nvfp4(ws, N, (int)set.size());
      for (int j = 0; j < N; j++) for (size_t i = 0; i < set.size(); i++) used[(size_t)j * K + set[i]] = q[j * set.size() + i];
    }
    reference::Array dx((size_t)T * K, 0.), original((size_t)T * K, 0.);
    multiply(dx, layer.dy, reference_control::transposed(used, N, K), T, K, N);
    multiply(original, layer.dy, reference_control::transposed(layer.w, N, K), T, K, N);
    auto part = [&](const reference::Array& all, bool eight) { reference::Array y; for (int t = 0; t < T; t++) for (int i = eight ? K - fp8 : 0; i < (eight ? K : K - fp8); i++) y.push_back(all[(size_t)t * K + order[i]]); return y; };
    const Floats got = from_x(layer.dx.get());
    const reference::Array all(got.begin(), got.end());
    const double e4 = rel_error(part(all, false), part(dx, false)), e8 = rel_error(part(all, true), part(dx, true)), wrong = rel_error(part(all, true), part(original, true));
    check("double quantization: dX comes from the forward's own FP4 and FP8 weights", e4 < kResult && e8 < kResult && wrong > 2 * kResult, "relative errors %.1e %.1e; FP8 columns from the original weights would differ by %.1e", e4, e8, wrong);
  }
  for (const char* name : {"tetrajet2", "quartet", "fp4-dge", "nvfp4"}) {        // any recipe: gradients point where BF16's do
    const std::vector<int> order = outlier_order(sums, fp8, true);
    Device<int> columns(order);
    const OutlierLayer split = {K, fp8, columns.p, nullptr};
    Layer layer(row_with(name, {"outliers=none"}), T, K, N, x, w, dy), exact(row_with("bf16", {}), T, K, N, x, w, dy);
    layer.how.split = &split;
    for (Layer* l : {&layer, &exact}) { l->forward(); l->backward(); }
    const double cy = cosine(from_x(layer.y.get()), from_x(exact.y.get())), cx = cosine(from_x(layer.dx.get()), from_x(exact.dx.get())), cw = cosine(layer.dw.get(), exact.dw.get());
    const double ry = norm_ratio(from_x(layer.y.get()), from_x(exact.y.get())), rx = norm_ratio(from_x(layer.dx.get()), from_x(exact.dx.get())), rw = norm_ratio(layer.dw.get(), exact.dw.get());
    const bool dge = layer.r.estimator.w == Estimator::dge;                     // bends dW on purpose
    check(std::string("OutControl with ") + name + ": Y, dX and dW agree with BF16's in direction and length", cy > 0.98 && cx > 0.9 && cw > (dge ? 0.8 : 0.95) && std::fabs(ry - 1) < 0.1 && std::fabs(rx - 1) < 0.15 && (dge || std::fabs(rw - 1) < 0.1),
          "cosines %.4f %.4f %.4f, norms %.3f %.3f %.3f", cy, cx, cw, ry, rx, rw);
  }
}

// ------------------------------------------------------------------ OCC
inline void test_occ() {
  Rng rng(71);
  const int T = 64, K = 160, N = 96;
  Floats x = normals(rng, (size_t)T * K), w = normals(rng, (size_t)N * K, 0.05), dy = normals(rng, (size_t)T * N, 0.01);
  for (size_t i = 0; i < x.size(); i += 61) x[i] *= 25;
  {
    Layer layer(row_with("fp4-dge", {"occ=0.98"}), T, K, N, x, w, dy);
    layer.how.occ = true;
    layer.forward();
    using namespace reference_control;
    const Floats clamped = clamp_rows(layer.x, T, K, 0.98);
    Floats rest(clamped.size());
    for (size_t i = 0; i < rest.size(); i++) rest[i] = layer.x[i] - clamped[i];
    reference::Array y((size_t)T * N, 0.);
    multiply(y, vector_fp4(clamped, T, K), vector_fp4(layer.w, N, K), T, N, K);
    multiply(y, rest, layer.w, T, N, K);
    const double e = rel_error(from_x(layer.y.get()), y);
    check("OCC: Y is the product of the clamped X in FP4 plus that of the rest in high precision", e < 1.5 * kResult + (sizeof(floatX) == 2 ? 2e-3 : 0), "relative error %.1e", e);
  }
  {                                                  // without quantization nothing may be lost, also where wgrad works from the saved, clamped X
    Layer layer(row_with("tetrajet2", {"format=exact", "outer=tensor"}), T, K, N, x, w, dy), exact(row_with("bf16", {}), T, K, N, x, w, dy);
    layer.how.occ = true;
    for (Layer* l : {&layer, &exact}) { l->forward(); l->backward(); }
    const double ey = rel_error(from_x(layer.y.get()), from_x(exact.y.get())), ex = rel_error(from_x(layer.dx.get()), from_x(exact.dx.get())), ew = rel_error(layer.dw.get(), exact.dw.get());
    check("OCC around exact operands is the plain layer, with double quantization too", ey < 2 * kResult && ex < 2 * kResult && ew < 2 * kResult, "relative errors %.1e %.1e %.1e", ey, ex, ew);
  }
  // The table of arXiv 2501.17116: activations, one scale a token. Ours: Gaussian with a heavy tail that differs by channel.
  const int rows = 64, cols = 1024;
  Floats a = normals(rng, (size_t)rows * cols);
  for (int c = 0; c < cols; c++) { const double size = c % 128 == 7 ? 8 : c % 32 == 3 ? 2.5 : 1; for (int t = 0; t < rows; t++) a[(size_t)t * cols + c] *= (float)(size * (rng.below(200) == 0 ? 3 : 1)); }
  a = rounded_x(a);
  Device<floatX> dev_a(to_x(a)), clamped(a.size()), rest(a.size());
  std::vector<reference_control::Quality> q;
  q.push_back(reference_control::quality(reference_control::vector_fp4(a, rows, cols), a));
  for (float alpha : {0.999f, 0.99f, 0.97f}) {
    occ_split(clamped.p, rest.p, dev_a.p, rows, cols, alpha);
    Floats v = reference_control::vector_fp4(from_x(clamped.get()), rows, cols);
    const Floats r = from_x(rest.get());
    for (size_t i = 0; i < v.size(); i++) v[i] += r[i];
    q.push_back(reference_control::quality(v, a));
  }
  bool rises = true;
  for (int i = 0; i + 1 < 4; i++) rises = rises && q[i + 1].cosine > q[i].cosine && q[i + 1].snr > q[i].snr;
  check("OCC's table: cosine and SNR rise from no clamping over .999 and .99 to .97", rises, "%.2f %% %.1f dB; %.2f %% %.1f dB; %.2f %% %.1f dB; %.2f %% %.1f dB (published, on a model's activations: 92.19 8.3; 99.61 15.3; 100 18.4; - 20.9)",
        100 * q[0].cosine, q[0].snr, 100 * q[1].cosine, q[1].snr, 100 * q[2].cosine, q[2].snr, 100 * q[3].cosine, q[3].snr);
}

inline void test_control_errors() {
  if (!file_exists(program_path("train_fp4"))) { skip("options of control that make no sense are errors", "train_fp4 does not stand beside this program"); return; }
  struct Case { const char* what; std::string arguments; const char* message; };
  const Case cases[] = {{"a start inside the warm-up", "--steps 1000 --oscillation osci-reset --osci-start 0", "warm-up"},
                        {"a start inside a window", "--steps 1000 --oscillation osci-reset --osci-start 610", "inside a window"},
                        {"a run too short for a window", "--steps 100 --oscillation osci-reset", "does not end"},
                        {"oscillation control of BF16 weights", "--steps 1000 --recipe bf16 --oscillation osci-reset", "FP4 grid"},
                        {"an unknown oscillation control", "--oscillation calm", "osci-reset"},
                        {"OutControl in a run that ends before its choice", "--steps 100 --outliers outcontrol", "--outlier-start"},
                        {"OutControl that chooses inside a window of OsciReset", "--steps 1000 --outliers outcontrol --outlier-start 790 --oscillation osci-reset", "under the window"},
                        {"an unknown format of m", "--adam-m fp4", "bf16, fp8"},
                        {"an unknown form to keep", "--keep 2", "codes, operands, values"},
                        {"v in FP8", "--adam-v fp8", "fp32, bf16"},
                        {"a share above 1", "--bf16-from 1.5", "--bf16-from"}};
  for (const Case& c : cases) {
    const ChildResult r = train_program(c.arguments + " --train 'kernels/*.cuh' --out " + temp_dir() + "/none");
    check(std::string(c.what) + " is an error, exit 2", r.exit_code == 2 && r.output.find(c.message) != std::string::npos, "exit %d: %s", r.exit_code, r.output.substr(r.output.rfind("error: ") == std::string::npos ? 0 : r.output.rfind("error: ")).substr(0, 200).c_str());
  }
}

// ------------------------------------------------------------------ the model: switches of precision, fqt's monitor, OutControl's choice
struct Batch {
  int B, S;
  std::vector<int> tokens, targets;
  Batch(int B_, int S_, int vocab) : B(B_), S(S_), tokens(B_ * S_), targets(B_ * S_) { Rng rng(5); for (int& t : tokens) t = rng.below(vocab); for (int& t : targets) t = rng.below(vocab); }
  double gradients(Model& m, int step) const { return accumulate_gradients(m, B, S, 1, (uint32_t)step, [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); }); }
};

// Of a whole model: elements of every watched matrix with periods 1 and 3 in turn.
inline void test_q_ramping_model() {
  const Batch batch(2, 32, 60);
  Options o;
  o.recipe = "tetrajet"; o.oscillation = "q-ramping"; o.osci_start = 0; o.warmup = 0; o.seed = 9; o.bf16_what = "forward";
  Model m;
  start(m, o, small_llama(), batch.B, batch.S);
  std::vector<uint8_t> period(m.control.watched);
  for (size_t i = 0; i < period.size(); i++) period[i] = i % 2 ? 3 : 1;
  to_device(m.control.ramp.period, period.data(), period.size());
  std::vector<Floats> before;
  for (const Param& p : m.params) before.push_back(master_of(p));
  size_t early = 0, due = 0, still = 0, waiting = 0;            // with period 3: moved before their third step, and in it; the others: did not move
  for (int step = 1; step <= 3; step++) {
    batch.gradients(m, step);
    gradient_norm(m, 1);
    update(m, {1e-2f, 0.9f, 0.95f, 1e-8f, 0, step}, 0.1f);
    for (size_t n = 0; n < m.params.size(); n++) {
      const Param& p = m.params[n];
      if (!p.watched) continue;
      const Floats now = master_of(p);
      for (size_t i = 0; i < now.size(); i++) {
        const bool moved = now[i] != before[n][i];
        if (i % 2 == 0) still += !moved;
        else if (step < 3) early += moved;
        else { waiting++; due += moved; }
        if (i % 2 == 0) before[n][i] = now[i];
      }
    }
  }
  check("Q-Ramping in a model: a weight of period 3 moves in every third step, one of period 1 in each", early == 0 && due > 0.99 * waiting && still < 0.01 * waiting,
        "%zu of %zu moved early, %zu in time, %zu of period 1 stood still", early, waiting, due, still);
  finish(m);
}

inline void test_switches() {
  const Batch batch(2, 32, 60);
  Options bf16;
  bf16.recipe = "bf16"; bf16.seed = 9; bf16.bf16_what = "forward";
  Model exact;
  start(exact, bf16, small_llama(), batch.B, batch.S);
  const double exact_loss = batch.gradients(exact, 3);
  const Floats exact_gradient = all_gradients(exact);
  for (const char* name : {"nvfp4", "tetrajet2", "quartet", "fp4-dge", "fp8"}) for (const char* what : {"forward", "backward", "all"}) {
    Options o;
    o.recipe = name; o.seed = 9; o.steps = 8; o.bf16_from = 0.5; o.bf16_what = what;
    Model m;
    start(m, o, small_llama(), batch.B, batch.S);
    RunState state;
    state.step = 3;
    choose_precision(m, o, state, nullptr);
    const double before = batch.gradients(m, 3);
    const Floats gradient_before = all_gradients(m);
    state.step = 4;
    choose_precision(m, o, state, nullptr);
    const double after = batch.gradients(m, 3);
    const Floats gradient_after = all_gradients(m);
    const std::string title = std::string(name) + ", " + what + " in BF16: ";
    const bool all = !strcmp(what, "all"), forward = !strcmp(what, "forward");
    if (all) check(title + "after the switch loss and gradient are bf16's, bit for bit; before they are not", after == exact_loss && gradient_after == exact_gradient && before != exact_loss && gradient_before != exact_gradient, "loss %.6f, then %.6f", before, after);
    else if (forward) {
      check(title + "after the switch the loss is bf16's, bit for bit, and the gradient still quantized", after == exact_loss && before != exact_loss && gradient_after != exact_gradient && cosine(gradient_after, exact_gradient) > 0.9, "cosine %.4f", cosine(gradient_after, exact_gradient));
    } else {
      check(title + "the loss stays the quantized one, the gradient loses its noise", after == before && gradient_after != gradient_before && cosine(gradient_after, exact_gradient) > cosine(gradient_before, exact_gradient) - 0.02 && cosine(gradient_after, exact_gradient) > (m.recipe.estimator.w == Estimator::dge ? 0.8 : 0.9),
            "cosine with bf16's %.4f, then %.4f", cosine(gradient_before, exact_gradient), cosine(gradient_after, exact_gradient));
    }
    finish(m);
  }
  finish(exact);
}

inline void test_monitor() {
  const Batch batch(2, 32, 60);
  Options o;
  o.recipe = "fqt"; o.seed = 9; o.steps = 8; o.fqt_every = 1; o.bf16_trigger = "fqt"; o.bf16_what = "backward";
  Model m;
  start(m, o, small_llama(), batch.B, batch.S);
  const Recipe recipe = m.recipe;
  m.recipe = without_backward(recipe);
  batch.gradients(m, 3);
  m.recipe = recipe;
  keep_clean_gradient(m);
  const Floats clean = all_gradients(m);
  batch.gradients(m, 3);
  const Floats noisy = all_gradients(m);
  double signal = 0, noise = 0, d = 0;
  size_t at = 0;
  for (const Param& p : m.params) {
    for (size_t i = 0; i < p.size(); i++, at++) if (p.watched) { signal += (double)clean[at] * clean[at]; noise += std::pow((double)noisy[at] - clean[at], 2); d++; }
  }
  const double sigma = std::sqrt(noise / d), want = std::sqrt(signal) / (sigma * std::sqrt(d)), got = gradient_over_noise(m);
  check("fqt's monitor is |g| / (sigma_q sqrt d) over the weights of quantized layers", std::fabs(got / want - 1) < 1e-5 && want > 1, "%.4f, in plain C++ %.4f", got, want);
  // The gradient shrinks to nothing while the noise stays: the trigger.
  for (double keep : {3.0, 1.0}) {
    m.recipe = without_backward(recipe);
    batch.gradients(m, 3);
    m.recipe = recipe;
    keep_clean_gradient(m);
    Rng rng(4);
    double norm = 0;
    for (const Param& p : m.params) if (p.watched) { Floats g(p.size()); to_host(g.data(), p.weight->grad, g.size()); for (float v : g) norm += (double)v * v; }
    for (const Param& p : m.params) if (p.watched) {
      Floats g(p.size());
      to_host(g.data(), p.weight->grad, g.size());
      for (float& v : g) v += (float)(rng.normal() * std::sqrt(norm / d) / keep);
      to_device(p.weight->grad, g.data(), g.size());
      device_sync();
    }
    RunState state;
    state.step = 5;
    watch_noise(m, o, state, nullptr);
    check(keep > 2 ? "above sqrt(3) it does nothing" : "below sqrt(3) it asks for BF16 from the next step on", state.switched_at == (keep > 2 ? -1 : 6));
    if (keep < 2) {
      choose_precision(m, o, state, nullptr);
      const bool not_yet = !m.control.switched;
      state.step = 6;
      choose_precision(m, o, state, nullptr);
      check("and then the backward pass is in BF16", not_yet && m.control.switched && m.block_recipe(0).dgrad.dy.format == Format::bf16 && m.block_recipe(0).fprop.x.format != Format::bf16);
    }
  }
  finish(m);
}

inline void test_outcontrol_model() {
  const Batch batch(2, 32, 60);
  Options o;
  o.recipe = "tetrajet2"; o.seed = 9; o.steps = 20; o.outliers = "outcontrol"; o.outlier_start = 2; o.outlier_steps = 3;
  Model m;
  start(m, o, small_llama(), batch.B, batch.S);
  Floats gain(m.config.channels, 1.0f);
  for (int c : {7, 40, 90}) gain[c] = 30;
  set_param(*std::find_if(m.params.begin(), m.params.end(), [&](const Param& p) { return p.weight == &m.layers[0].ln1; }), gain.data());
  const int K = m.config.channels;
  Floats sums(K, 0);
  for (int step = 0; step < 3; step++) {
    m.control.collecting = true;
    batch.gradients(m, step);
    m.control.collecting = false;
    std::vector<floatX> x((size_t)batch.B * batch.S * K);
    to_host(x.data(), m.acts[0].ln1, x.size());
    for (int c = 0; c < K; c++) { double sq = 0; for (int t = 0; t < batch.B * batch.S; t++) sq += std::pow(to_float(x[(size_t)t * K + c]), 2); sums[c] += (float)std::sqrt(sq); }
  }
  const Floats before = all_gradients(m);
  load_batch(m, batch.tokens.data(), batch.targets.data(), batch.B, batch.S);
  forward(m, batch.B, batch.S, 77);                    // as a validation: not summed
  const OutlierLayer& first = m.control.columns[0][0];
  Floats got(K);
  to_host(got.data(), first.sums, K);
  check("OutControl sums the norms of each layer's input, in training passes only", rel_error(got, sums) < 1e-5, "relative error %.1e", rel_error(got, sums));
  choose_outliers(m, 4, nullptr);
  std::vector<int> order(K);
  to_host(order.data(), first.columns, K);
  const std::vector<int> fp8(order.end() - first.fp8, order.end());
  bool has = first.fp8 == 32;
  for (int c : {7, 40, 90}) has = has && std::find(fp8.begin(), fp8.end(), c) != fp8.end();
  check("the channels that a norm makes large are among its 32 FP8 channels", has && order == outlier_order(got, 32, true));
  batch.gradients(m, 2);
  const Floats after = all_gradients(m);
  Options plain;
  plain.recipe = "bf16"; plain.seed = 9; plain.bf16_what = "forward";
  Model exact;
  start(exact, plain, small_llama(), batch.B, batch.S);
  set_param(*std::find_if(exact.params.begin(), exact.params.end(), [&](const Param& p) { return p.weight == &exact.layers[0].ln1; }), gain.data());
  batch.gradients(exact, 2);
  const Floats truth = all_gradients(exact);
  check("with it the whole model's gradient comes nearer to bf16's", cosine(after, truth) > cosine(before, truth) && cosine(after, truth) > 0.95, "cosine %.4f, before the choice %.4f", cosine(after, truth), cosine(before, truth));
  o.out = temp_dir() + "/outcontrol";
  make_directories(o.out);
  save_checkpoint(m, o, {4, 1, -1}, "r");
  Model again;
  start(again, o, small_llama(), batch.B, batch.S);
  load_checkpoint(again, o, o.out + "/step_000004", "r");
  std::vector<int> loaded(K);
  to_host(loaded.data(), again.control.columns[0][0].columns, K);
  batch.gradients(again, 2);
  check("the choice is in the checkpoint, and resuming gives the same gradient to the bit", again.control.chosen && loaded == order && all_gradients(again) == after);
  finish(m); finish(again); finish(exact);
}

// ------------------------------------------------------------------ whole runs: each control resumed in its middle
inline void test_control_runs() {
  if (!file_exists(program_path("train_fp4"))) { skip("runs under control resume bit for bit", "train_fp4 does not stand beside this program"); return; }
  struct Case { const char* name; std::string arguments; const char* says; };
  const Case cases[] = {{"m in FP8, v in BF16", "--adam-m fp8 --adam-v bf16", "E4M3 with FP32 scales"},
                        {"m in FP8 with E8M0 scales", "--adam-m fp8 --adam-scale e8m0", "E4M3 with E8M0 scales"},
                        {"OsciReset inside a window", "--recipe tetrajet2 --oscillation osci-reset --warmup 0 --osci-start 3 --osci-period 3 --osci-detect 1 --osci-tau 2", "were reset"},
                        {"Q-EMA", "--recipe tetrajet --oscillation q-ema", "q-ema: decay"},
                        {"Q-Ramping inside a window", "--recipe tetrajet --oscillation q-ramping --warmup 0 --osci-start 3 --osci-period 3 --osci-detect 1", "longer steps"},
                        {"Q-Ramping with periods", "--recipe tetrajet --oscillation q-ramping --osci-start 0 --osci-period 4 --osci-detect 2 --warmup 0 --adam-m bf16", "longer steps"},
                        {"OutControl inside its choice", "--recipe nvfp4 --outliers outcontrol --outlier-start 2 --outlier-steps 3", "from now on in MXFP8"},
                        {"OutControl and OsciReset together", "--recipe tetrajet2 --outliers outcontrol --outlier-start 1 --outlier-steps 1 --oscillation osci-reset --warmup 0 --osci-start 3 --osci-period 3 --osci-detect 1 --osci-tau 2", "were reset"},
                        {"OutControl and Q-EMA together", "--recipe tetrajet --outliers outcontrol --outlier-start 1 --outlier-steps 1 --oscillation q-ema", "from now on in MXFP8"},
                        {"OCC", "--recipe nvfp4 --outliers occ --set occ=0.98", "occ: quantile"},
                        {"BF16 forward from the middle", "--recipe quartet2 --bf16-from 0.5", "from now on the forward pass"},
                        {"fqt's monitor and trigger", "--recipe fqt --bf16-trigger fqt --fqt-every 2", "gradient over quantization noise"}};
  const std::string t = temp_dir() + "/control";
  shell("mkdir -p " + t + " && cp kernels/cuda.cuh kernels/attention.cuh " + t);
  for (const Case& c : cases) {
    const std::string run = "--model llama:1M --train '" + t + "/*.cuh' --batch 2 --seq 64 --val-batches 1 --val-every 0 --sample-length 0 --keep-checkpoints 0 --steps 8 --save-every 3 " + c.arguments;
    const std::string out = " --out " + t + "/" + std::to_string(&c - cases);
    const ChildResult whole = train_program(run + out);
    const std::string dir = t + "/" + std::to_string(&c - cases);
    if (!check(std::string(c.name) + ": a short run ends well and says so", whole.exit_code == 0 && whole.output.find(c.says) != std::string::npos, "exit %d %s", whole.exit_code, whole.exit_code ? whole.output.substr(whole.output.size() > 200 ? whole.output.size() - 200 : 0).c_str() : "")) continue;
    const std::string events = read_text(dir + "/control.csv");
    shell("mv " + dir + "/step_000008 " + dir + "/whole && rm -rf " + dir + "/step_000006");
    const ChildResult resumed = train_program(run + out + " --resume");
    check(std::string(c.name) + ": resumed after step 3 it ends with the same bits, and control.csv is the same", resumed.exit_code == 0 && same_weights(dir + "/whole", dir + "/step_000008") && read_text(dir + "/control.csv") == events, "exit %d", resumed.exit_code);
  }
}

// ------------------------------------------------------------------ --keep: the form in which X waits for the backward pass
inline void test_unpack() {
  std::vector<OperandRecipe> words;
  auto add = [&](OperandRecipe o) { if (o.format != Format::bf16 && o.format != Format::exact) words.push_back(o); };
  for (Recipe& r : recipe_table()) for (auto& [name, o] : recipe_operands(r)) add(*o);
  OperandRecipe more;
  more.format = Format::mxfp8; add(more);
  more.format = Format::nvfp4; more.scale = ScaleRule::headroom; more.outer = Outer::b1x128; add(more);
  more.scale = ScaleRule::standard; more.outer = Outer::tensor; more.rounding = Rounding::eden128; more.rht = 64; more.signs = Signs::fresh; add(more);
  Rng rng(71);
  int cases = 0, wrong = 0;
  std::string at;
  for (const OperandRecipe& o : words) for (auto& [rows, cols] : {std::pair(37, 75), std::pair(40, 288), std::pair(130, 16)}) for (bool transpose : {false, true}) {
    Floats x = normals(rng, (size_t)rows * cols, 0.05);
    for (int i = 0; i < rows * cols; i += 31) x[i] = i % 2 ? 0 : -0.0f;
    for (size_t i = 128; i < 160 && cols > 200 && i < x.size(); i++) x[i] = 0;             // whole blocks of zeros
    Device<floatX> in(to_x(x));
    const int R = transpose ? cols : rows, C = transpose ? rows : cols, ld = operand_ld(rotated_cols(C, o.rht));
    const PackedBytes b = packed_bytes(o, R, C);
    Device<uint8_t> codes(b.codes), scales(max(b.scales, (size_t)1));
    Device<floatX> values((size_t)R * ld), unpacked((size_t)R * ld);
    Device<float> outer(b.outer / 4 + 1), amax(1), rotated((size_t)R * ld);
    Device<uint32_t> groups(group_words(round_up(R, 128), round_up(C, 128)));
    Operand4 out;
    out.rows = R; out.cols = C; out.ld = ld; out.codes = codes.p; out.scales = scales.p; out.values = values.p; out.outer = outer.p; out.amax = amax.p;
    QuantizeHow how = quantize_how(o, {kWgradX, kWgradDy, {3, 1, 4}, GemmWay::emulated}, transpose, {});
    how.amax_is_zero = false;
    quantize(out, in.p, how, groups.p);
    out.cols = rotated_cols(C, o.rht);
    out.values = unpacked.p;
    unpack_values(out, o);
    const std::vector<floatX> a = values.get(), c = unpacked.get();
    cases++;
    if (memcmp(a.data(), c.data(), a.size() * sizeof(floatX))) { wrong++; at = operand_word(o) + " " + std::to_string(R) + "x" + std::to_string(C); }
  }
  check("unpacked codes are the values that the quantizer writes, bit for bit: every operand of the table, odd sizes, zeros of both signs", wrong == 0, "%d of %d cases differ %s", wrong, cases, at.c_str());
}
// A linear layer's data, and the five controls that it may stand under: none, OCC, OutControl with 32 columns split off, Q-EMA, the last two together.
struct Controls {
  static constexpr int kCount = 5, T = 48, K = 160, N = 96;
  Floats x, w, dy, average;
  Device<float> dev_average;
  Device<int> columns;
  OutlierLayer outliers;
  Controls(Rng& rng, double w_size)
      : x(normals(rng, (size_t)T * K)), w(normals(rng, (size_t)N * K, w_size)), dy(normals(rng, (size_t)T * N)), average(near(w, rng)), dev_average(average),
        columns(order()), outliers{K, 32, columns.p, nullptr} {}
  static Floats near(Floats v, Rng& rng) { for (float& a : v) a += (float)(rng.normal() * 0.003); return v; }
  static std::vector<int> order() { std::vector<int> o(K); for (int i = 0; i < K; i++) o[i] = (i * 7) % K; return o; }
  static bool has_occ(int control) { return control == 1; }
  static bool has_split(int control) { return control == 2 || control == 4; }
  static bool has_toward(int control) { return control > 2; }
  static const char* name(int control) {
    static const char* const names[kCount] = {"alone", "with OCC", "with OutControl", "with Q-EMA", "with OutControl and Q-EMA"};
    return names[control];
  }
  void set(LayerControl& how, int control) const {
    how.occ = has_occ(control);
    how.split = has_split(control) ? &outliers : nullptr;
    how.toward.average = has_toward(control) ? dev_average.p : nullptr;
  }
};
// A layer under control, its operands kept by the forward pass or quantized again in the backward pass.
inline void test_keep_layer() {
  Rng rng(72);
  const Controls c(rng, 0.02);
  const int T = c.T, K = c.K, N = c.N;
  for (const char* row : {"tetrajet2", "tetrajet", "quartet2", "quartet", "fp4-dge", "nvfp4"}) for (int control = 0; control < c.kCount; control++) {
    const Recipe r = row_with(row, {"outliers=none"});
    if (c.has_toward(control) && r.fprop.w.rht) continue;
    Floats dx[2], dw[2];
    for (bool again : {false, true}) {
      Layer layer(r, T, K, N, c.x, c.w, c.dy);
      c.set(layer.how, control);
      if (again) linear_forward(layer.how, layer.y.p, layer.dx_x.p, layer.dev_w.p, T, K, N, r, layer.key(), layer.s, nullptr);
      else layer.forward();
      layer.saved.again = again;
      device_zero(layer.dw.p, layer.dw.n);
      linear_backward(layer.how, layer.dx.p, layer.dw.p, layer.dev_dy.p, layer.dx_x.p, layer.dev_w.p, T, K, N, r, layer.key(), layer.s, &layer.saved);
      dx[again] = from_x(layer.dx.get()); dw[again] = layer.dw.get();
    }
    check(std::string(row) + " " + c.name(control) + ": quantized again in the backward pass, dX and dW have the same bits", dx[0] == dx[1] && dw[0] == dw[1], "relative differences %.1e, %.1e", rel_error(dx[1], dx[0]), rel_error(dw[1], dw[0]));
  }
}
// GELU after a layer, under every control: what linear_forward() does with gelu_input is what it does without, and then gelu_forward(). The same bits,
// but for a GPU's epilogue, where a different order of sums may turn a rounding, and GELU is of the sum before that.
inline void test_gelu_layer() {
  Rng rng(74);
  const Controls c(rng, 0.1);
  const int T = c.T, K = c.K, N = c.N;
  Device<floatX> bias(to_x(normals(rng, N)));
  for (const char* row : {"bf16", "nvfp4", "tetrajet"}) for (int control = 0; control < (row[0] == 'b' ? 1 : c.kCount); control++) {
    const bool adds = c.has_occ(control) || c.has_split(control);
    Layer layer(row_with(row, {"outliers=none"}), T, K, N, c.x, c.w, c.dy);
    c.set(layer.how, control);
    Device<floatX> act((size_t)T * N), sums((size_t)T * N), apart((size_t)T * N);
    auto forward = [&](floatX* Y, LinearEpilogue add) { linear_forward(layer.how, Y, layer.dx_x.p, layer.dev_w.p, T, K, N, layer.r, layer.key(), layer.s, &layer.saved, add); };
    forward(act.p, {bias.p, nullptr, sums.p});
    forward(layer.y.p, {bias.p});
    gelu_forward(apart.p, layer.y.p, (size_t)T * N);
    const Floats got = from_x(act.get()), got_sums = from_x(sums.get()), want = from_x(apart.get()), want_sums = from_x(layer.y.get());
    const bool same = got == want && got_sums == want_sums, exact = kOnCpu || adds;
    check(std::string(row) + " " + c.name(control) + ": GELU by linear_forward() is that of gelu_forward()" + (exact ? ", bit for bit" : ""),
          exact ? same : rel_error(got, want) < 2 * kResult && rel_error(got_sums, want_sums) < kResult, "relative differences %.1e, before GELU %.1e", rel_error(got, want), rel_error(got_sums, want_sums));
  }
}
// max|X| from the caller, under every control. Where wants_x_amax() says so it is taken: Y has the bits of the layer that searches, and others with another
// maximum. Elsewhere the largest X is not the largest that is quantized, or not looked for, and any number may stand there.
inline void test_maximum_layer() {
  Rng rng(75);
  const Controls c(rng, 0.1);
  const int T = c.T, K = c.K, N = c.N;
  Device<float> maxima(Floats{0, 0});
  int taken = 0, left = 0, wrong = 0;
  std::string first, takers;
  for (const Recipe& row : recipe_table()) for (int control = 0; control < c.kCount; control++) for (bool with_xt : {false, true}) {
    if (row.name == "bf16" || (c.has_toward(control) && !is_fp4(row.fprop.w.format)) || (with_xt && !can_save_xt(row))) continue;
    Layer layer(row, T, K, N, c.x, c.w, c.dy);
    if (with_xt) want_linear_saved(layer.saved, row, T, K, N, [&](auto** where, size_t n) { layer.take(where, n); }, true);
    c.set(layer.how, control);
    auto run = [&](float* amax) {
      layer.scalars.start();
      linear_forward(layer.how, layer.y.p, layer.dx_x.p, layer.dev_w.p, T, K, N, row, layer.key(), layer.s, &layer.saved, {}, amax);
      Floats y = from_x(layer.y.get());
      device_zero(layer.dw.p, layer.dw.n);
      linear_backward(layer.how, layer.dx.p, layer.dw.p, layer.dev_dy.p, layer.dx_x.p, layer.dev_w.p, T, K, N, row, layer.key(), layer.s, &layer.saved);
      const Floats dw = layer.dw.get();
      y.insert(y.end(), dw.begin(), dw.end());
      return y;
    };
    const float largest = reference::max_abs(layer.x.data(), layer.x.size());
    const float both[2] = {largest, 2.7f * largest};
    to_device(maxima.p, both, 2);
    device_sync();
    const Floats searched = run(nullptr), given = run(maxima.p), other = run(maxima.p + 1);
    const bool wants = wants_x_amax(layer.how, row, &layer.saved), right = given == searched && (other != searched) == wants;
    (wants ? taken : left)++;
    if (wants && control == 0 && takers.find(row.name) == std::string::npos) takers += " " + row.name;
    if (!right && !wrong++) first = row.name + " control " + std::to_string(control);
  }
  check("max|X| from the caller: the bits of a search, where a layer takes it, and no matter where it does not", wrong == 0 && taken > 10 && left > 30,
        "%d wrong %s; %d layers take it (%s), %d do not", wrong, first.c_str(), taken, takers.c_str() + 1, left);
}
// The same in a whole model, of an odd number of tokens: losses and gradients of two steps.
inline void test_maximum_model() {
  const int B = 3, S = 37;
  Rng rng(76);
  std::vector<int> tokens(B * S), targets(B * S);
  for (int& t : tokens) t = rng.below(250);
  for (int& t : targets) t = rng.below(250);
  struct Run { Floats gradients; double loss; int scalars; };
  for (const bool llama : {true, false}) for (const char* recipe : {"quartet2", "fp8", "fqt", "nvfp4", "best"}) for (const Keep keep : {Keep::codes, Keep::values}) {
    auto run = [&](bool search) {
      ModelConfig config = tiny_llama();
      if (!llama) { config.llama = false; config.kv_heads = config.heads; config.ffn = 256; config.tied = true; }
      Options o;
      o.recipe = recipe;
      Model m;
      m.keep = keep;
      start(m, o, config, B, S);
      m.search_maxima = search;
      Run r = {};
      for (uint32_t step = 0; step < 2; step++) {
        r.loss += accumulate_gradients(m, B, S, 1, step, [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); });
        const Floats g = all_gradients(m);
        r.gradients.insert(r.gradients.end(), g.begin(), g.end());
      }
      r.scalars = m.scalars.taken;
      free_model(m);
      return r;
    };
    const Run found = run(false), searched = run(true);
    check(std::string(recipe) + (llama ? ", Llama" : ", GPT-2") + (keep == Keep::codes ? ", --keep codes" : ", --keep values") + ": with maxima by the kernels that write X, losses and gradients of a search, bit for bit",
          found.gradients == searched.gradients && found.loss == searched.loss && found.scalars > searched.scalars, "loss %.5f; %d maxima", found.loss / 2, found.scalars - searched.scalars);
  }
}
inline void test_keep_model() {
  const int B = 2, S = 40;
  Rng rng(73);
  std::vector<int> tokens(B * S), targets(B * S);
  for (int& t : tokens) t = rng.below(250);
  for (int& t : targets) t = rng.below(250);
  struct Run { Floats weights; std::vector<double> losses; bool codes; };
  ModelConfig config = tiny_llama();
  auto run = [&](const char* recipe, const std::vector<std::string>& set, GemmWay way, Keep keep, int steps) {
    Options o;
    o.recipe = recipe; o.set = set; o.outliers = "none";
    Model m;
    m.keep = keep;
    m.scratch.ways = {way, way, way};
    start(m, o, config, B, S);
    Run r;
    for (int step = 0; step < steps; step++) {
      r.losses.push_back(accumulate_gradients(m, B, S, 1, (uint32_t)step, [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); }));
      gradient_norm(m, 1);
      update(m, {3e-3f, 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0);
    }
    r.weights.resize(m.elements);
    to_host(r.weights.data(), m.master, m.elements);
    r.codes = keeps_codes(m);
    free_model(m);
    return r;
  };
  auto compare = [&](const char* recipe, GemmWay way, int steps, const std::vector<std::string>& set = {}) {
    const Run codes = run(recipe, set, way, Keep::codes, steps), operands = run(recipe, set, way, Keep::operands, steps), values = run(recipe, set, way, Keep::values, steps);
    std::string words;
    for (const std::string& s : set) words += " --set " + s;
    check(recipe + words + (config.llama ? "" : ", GPT-2") + (way == GemmWay::mma ? ", through the mma kernel: " : ": ") + std::to_string(steps) + " steps with --keep codes, operands and values give the same losses and weights, bit for bit",
          codes.weights == values.weights && codes.losses == values.losses && codes.weights == operands.weights && codes.losses == operands.losses && codes.codes && operands.codes && !values.codes, "loss %.5f", codes.losses.back());
  };
  auto bytes = [&](const char* recipe, Keep keep) {                     // of everything, with enough tokens that the inputs outweigh the padding of scales
    Model m;
    m.keep = keep;
    make_model(m, tiny_llama(), recipe, 16, 64);
    const size_t n = m.arena.total();
    free_model(m);
    return (double)n;
  };
  for (const Recipe& row : recipe_table()) {
    compare(row.name.c_str(), GemmWay::emulated, 3);
    const double codes = bytes(row.name.c_str(), Keep::codes), operands = bytes(row.name.c_str(), Keep::operands), values = bytes(row.name.c_str(), Keep::values);
    const bool xt = can_save_xt(row);
    check(row.name + ": --keep operands takes " + (xt ? "more memory" : "the same"), xt ? operands > codes : operands == codes, "%.2f and %.2f MB", codes / 1e6, operands / 1e6);
    // Of two blocks, with 1024 tokens: ln1, ln2 and act, 2 x 1024 x (64 + 64 + 160) elements, less the one set that passes by; FP4 keeps a third of it.
    const double inputs = 2 * 1024. * (64 + 64 + 160) * sizeof(floatX), passing = 1024. * 160 * sizeof(floatX);
    if (row.wgrad.x.format == Format::bf16) check(row.name + ": nothing is quantized, so --keep changes no memory", codes == values, "%.2f and %.2f MB", codes / 1e6, values / 1e6);
    else check(row.name + ": --keep codes takes less memory", codes < values && values - codes < inputs - passing, "%.2f and %.2f MB; at most %.2f to gain", codes / 1e6, values / 1e6, (inputs - passing) / 1e6);
  }
  for (const char* recipe : {"nvfp4", "tetrajet"}) compare(recipe, GemmWay::mma, 2);
  // X^T from the original in words that no row has so: fresh signs, outer scales, MS-EDEN, MXFP4
  compare("tetrajet2", GemmWay::emulated, 2, {"wgrad.x.source=original"});
  compare("tetrajet2", GemmWay::mma, 2, {"wgrad.x.source=original"});
  compare("quartet2", GemmWay::emulated, 2, {"wgrad.x.source=original"});
  compare("quartet2", GemmWay::emulated, 2, {"wgrad.x.source=original", "wgrad.rounding=eden128"});
  compare("quartet-v4", GemmWay::emulated, 2, {"wgrad.x.source=original", "estimator.w=ste"});
  compare("nvfp4", GemmWay::emulated, 2, {"wgrad.x.format=exact", "wgrad.dy.format=exact"});
  config.llama = false; config.kv_heads = config.heads; config.ffn = 256; config.tied = true;       // GELU's GEMM writes act, and ln2 is still wanted
  compare("nvfp4", GemmWay::emulated, 3);
  compare("nvfp4", GemmWay::mma, 2);
  compare("tetrajet2", GemmWay::emulated, 2);
  compare("nvfp4", GemmWay::emulated, 3, {"fprop.x.format=bf16", "fprop.w.format=bf16"});           // there the GEMM reads ln2 itself
}
inline void test_keep_forced() {
  struct Case { const char* what; const char* recipe; const char* outliers; double bf16_from; const char* bf16_what; int fqt_every; const char* says; };
  const Case cases[] = {{"nothing", "nvfp4", "none", 1, "forward", 0, nullptr}, {"OCC", "nvfp4", "occ", 1, "forward", 0, "outlier control"}, {"fqt's monitor", "fqt", "none", 1, "backward", 2, "--fqt-every"},
                        {"a switch of the backward pass to BF16", "nvfp4", "none", 0.5, "backward", 0, "after the switch"}, {"a switch of the forward pass that X^T's codes came from", "tetrajet2", "none", 0.5, "forward", 0, "after the switch"},
                        {"a switch of the forward pass, X^T from the original", "nvfp4", "none", 0.5, "forward", 0, nullptr}};
  for (const Case& c : cases) {
    Options o;
    o.recipe = c.recipe; o.outliers = c.outliers; o.bf16_from = c.bf16_from; o.bf16_what = c.bf16_what; o.fqt_every = c.fqt_every; o.seed = 9; o.steps = 8;
    Model m;
    start(m, o, small_llama(), 2, 32);
    const char* why = needs_values(m);
    check(std::string("--keep codes under ") + c.what + (c.says ? " becomes values, and says why" : " stays codes"), c.says ? why && strstr(why, c.says) && !keeps_codes(m) : !why && keeps_codes(m), "%s", why ? why : "");
    finish(m);
  }
}
inline void test_keep_program() {
  if (!file_exists(program_path("train_fp4"))) { skip("--keep in the program", "train_fp4 does not stand beside this program"); return; }
  const std::string t = temp_dir() + "/keep", run = "--model llama:1M --train 'kernels/*.cuh' --batch 16 --seq 64 --steps 2 --val-batches 1 --val-every 0 --sample-length 0 --recipe nvfp4 ";
  const ChildResult codes = train_program(run + "--out " + t + "/codes"), operands = train_program(run + "--keep operands --out " + t + "/operands"), values = train_program(run + "--keep values --out " + t + "/values"), occ = train_program(run + "--outliers occ --out " + t + "/occ");
  auto total = [](const ChildResult& r) { const size_t at = r.output.find("\n  total"); return at == std::string::npos ? -1.0 : atof(r.output.c_str() + at + 8); };
  check("nvfp4 with --keep values takes more memory, says so in its table, and ends with the same bits", codes.exit_code == 0 && values.exit_code == 0 && total(codes) > 0 && total(codes) < total(values) && same_weights(t + "/codes/step_000002", t + "/values/step_000002"), "%.1f and %.1f MB", total(codes), total(values));
  check("so it does with --keep operands, and says how much waits", operands.exit_code == 0 && total(codes) < total(operands) && operands.output.find("  --keep operands: the backward pass keeps ") != std::string::npos && same_weights(t + "/codes/step_000002", t + "/operands/step_000002"), "%.1f and %.1f MB", total(codes), total(operands));
  check("the table says what --keep codes leaves out", codes.output.find("  --keep codes: the backward pass keeps ") != std::string::npos && values.output.find("--keep codes") == std::string::npos);
  check("outlier control makes it --keep values, and a line says why", occ.exit_code == 0 && occ.output.find("  --keep values, not codes: outlier control") != std::string::npos, "exit %d", occ.exit_code);
}
}  // namespace control_tests

// Kernels and small models.
inline void test_control() {
  using namespace control_tests;
  test_optimizer_states();
  if (section("oscillation control")) { test_windows(); test_oscillation_kernels(); test_osci_reset(); test_osci_reset_columns(); test_osci_reset_rotated(); test_q_ema(); test_q_ramping_model(); }
  if (section("outlier control")) {
    test_outlier_kernels();
    test_occ_split<kRowLanes>();
    if (kOnCpu) test_occ_split<32>();
    test_out_control();
    test_occ();
    test_outcontrol_model();
  }
  if (section("precision late in training")) { test_switches(); test_monitor(); }
  if (section("--keep: codes, operands or values for the backward pass")) { test_unpack(); test_keep_layer(); test_keep_forced(); }
  if (section("GELU after a linear layer")) test_gelu_layer();
  if (section("maxima by the kernels that write X")) { test_maximum_layer(); test_maximum_model(); }
}
// The program, with options of control, and what takes long. Needs ./train_fp4 beside this program.
inline void test_control_program() {
  using namespace control_tests;
  if (section("the program: options of control that make no sense")) test_control_errors();
  if (section("the program: runs under control, resumed")) test_control_runs();
  if (section("the program: --keep")) { test_keep_model(); test_keep_program(); }          // every row: long under sanitizers
}
