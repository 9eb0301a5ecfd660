// kernels/adamw.cuh -- the optimizer's step, and the gradient norm that clipping needs.
//
// What    g = grad * grad_scale
//         w *= 1 - lr * weight_decay
//         m += (1 - beta1) * (g - m)
//         v  = beta2 * v + (1 - beta2) * g * g
//         w -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//         in this order, which is torch.optim.AdamW's; then copy = w rounded to floatX, the weights that the next forward pass reads.
//         norm = sqrt(sum of grad^2), clip scale = min(1, clip / (norm + 1e-6)): torch.nn.utils.clip_grad_norm_'s.
// Shapes  flat arrays of n elements, all FP32 but the copy: one parameter, or all that lie in a row, in one launch (148 launches of GPT-2's
//         took 2.05 ms on an H100, with 0.22 ms between them, for bytes that a copy moves in 1.3). grad_scale stays on the device: the host need not wait for the norm.
// States  m and v may be kept smaller: m in BF16, or in E4M3 with one scale (FP32, or a power of two in E8M0) for 128 elements; v in BF16.
//         The arithmetic stays FP32. What is stored is rounded stochastically: a step changes v by (1 - beta2) of itself at most, less than
//         half a unit in the last place of BF16 for beta2 > .996, and rounding to nearest would then never move it.
//         Bytes of m + v an element: 8 (FP32), 6 (m BF16), 4 (both BF16), 5.03 (m FP8, v FP32), 3.03 (m FP8, v BF16; 3.01 with E8M0).
// Ramp    Q-Ramping (oscillation.cuh): an element of period n sums its gradient over n steps, then takes one step with their mean and n times
//         the learning rate; between, its w, m and v rest.
// Source  Loshchilov and Hutter, arXiv 1711.05101. Formats: m FP8 and v 16 bits as in Wang et al., arXiv 2501.17116 (from Peng et al., FP8-LM,
//         arXiv 2310.18313; their v is FP16 and both round to nearest). Ramping: TetraJet, arXiv 2502.20853.
// Cost    adamw: reads 16 and writes 14 bytes an element (with a BF16 copy); m FP8 and v BF16: 11 and 9. grad_norm: reads 4.
// Error   FP32. BF16 states: unbiased, at most 2^-7 of the value an update. FP8: unbiased, at most 2^-3 of the value or 2^-9 / 448 of the
//         block's maximum. The norm: FP32 sums of n/4096 squares by each of 4 x kLanes chains, the 4096 sums added in double; fixed order.
#pragma once
#include "formats.cuh"
#include "philox.cuh"
#include "rows.cuh"

struct AdamW {
  float lr, beta1, beta2, eps, weight_decay;
  int step;                               // 1 for the first update
};

// ------------------------------------------------------------------ update
constexpr size_t kDecayGroup = 64;        // elements of several parameters in a row: those of a group of 64 all decay, or none does
struct AdamWFactors { float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_bias2, eps; };

template <int kVec>
__global__ void adamw_kernel(float* __restrict__ master, floatX* __restrict__ copy, float* __restrict__ m, float* __restrict__ v, const float* __restrict__ grad,
                             const float* grad_scale, size_t n, AdamWFactors f, const uint8_t* __restrict__ decayed) {
  const float scale = *grad_scale;
  const size_t begin = flat_begin<kVec>(), end = min(begin + kFlatRun * kVec, n);
  for (size_t at = begin; at < end; at += kVec) {
    const Vec<float, kVec> g = load_vec<kVec>(grad + at);
    Vec<float, kVec> w = load_vec<kVec>(master + at), m1 = load_vec<kVec>(m + at), m2 = load_vec<kVec>(v + at);
    const float decay = !decayed || decayed[at / kDecayGroup] ? f.decay : 1.0f;
    for (int i = 0; i < kVec; i++) {
      // Each operation rounded by itself: left to the compiler, what it fuses depended on whether there is a table of groups.
      const float gi = __fmul_rn(g.v[i], scale);
      m1.v[i] = __fadd_rn(m1.v[i], __fmul_rn(f.one_minus_beta1, __fsub_rn(gi, m1.v[i])));
      m2.v[i] = __fadd_rn(__fmul_rn(f.beta2, m2.v[i]), __fmul_rn(__fmul_rn(f.one_minus_beta2, gi), gi));
      const float update = m1.v[i] / __fadd_rn(sqrtf(m2.v[i]) / f.sqrt_bias2, f.eps);
      w.v[i] = __fsub_rn(__fmul_rn(w.v[i], decay), __fmul_rn(f.step_size, update));
    }
    store_vec(master + at, w);
    store_vec(m + at, m1);
    store_vec(v + at, m2);
    if (copy) {
      Vec<floatX, kVec> c;
      for (int i = 0; i < kVec; i++) c.v[i] = from_float<floatX>(w.v[i]);
      store_vec(copy + at, c);
    }
  }
}
inline AdamWFactors adamw_factors(AdamW o) {
  const double bias1 = 1 - pow((double)o.beta1, o.step), bias2 = 1 - pow((double)o.beta2, o.step);
  return {(float)(1 - (double)o.lr * o.weight_decay), (float)(1 - (double)o.beta1), o.beta2, (float)(1 - (double)o.beta2), (float)(o.lr / bias1), (float)sqrt(bias2), o.eps};
}
// copy may be null. grad_scale: device scalar. n of any size. decayed: a byte for each group of 64 elements; null: all decay.
inline void adamw_update(float* master, floatX* copy, float* m, float* v, const float* grad, const float* grad_scale, size_t n, AdamW o, const uint8_t* decayed = nullptr) {
  const AdamWFactors f = adamw_factors(o);
  constexpr int kVec = kOnCpu ? 1 : 4;    // as kMapVec
  const size_t body = n / kVec * kVec, rest = n - body;
#ifdef CPU_BUILD
  if (n % kDecayGroup == 0) {                                 // loops over a group are what the compiler turns into SIMD
    if (n) launch(adamw_kernel<kDecayGroup>, flat_grid(n, kDecayGroup), kFlatThreads, 0, master, copy, m, v, grad, grad_scale, n, f, decayed);
    return;
  }
#endif
  if (decayed && rest) die("AdamW over several parameters: %zu elements are no multiple of %d", n, kVec);
  if (body) launch(adamw_kernel<kVec>, flat_grid(body, kVec), kFlatThreads, 0, master, copy, m, v, grad, grad_scale, body, f, decayed);
  if (rest) launch(adamw_kernel<1>, flat_grid(rest, 1), kFlatThreads, 0, master + body, copy ? copy + body : copy, m + body, v + body, grad + body, grad_scale, rest, f, nullptr);
}

// ------------------------------------------------------------------ smaller states, and ramping
enum class StateFormat { fp32, bf16, fp8 };
struct AdamFormats {
  StateFormat m = StateFormat::fp32, v = StateFormat::fp32;   // v: fp32 or bf16
  bool e8m0 = false;                                          // the scales of an FP8 m: powers of two in a byte, instead of FP32
  bool all_fp32() const { return m == StateFormat::fp32 && v == StateFormat::fp32; }
};
constexpr int kStateBlock = 128;          // elements that share a scale; one warp's work
inline size_t state_bytes(StateFormat f) { return f == StateFormat::fp32 ? 4 : f == StateFormat::bf16 ? 2 : 1; }
inline size_t state_blocks(size_t n) { return ceil_div(n, (size_t)kStateBlock); }
inline size_t state_scale_bytes(AdamFormats f) { return f.m != StateFormat::fp8 ? 0 : f.e8m0 ? 1 : 4; }   // a block

// The states of one parameter. m_scale: [state_blocks(n)], FP8 only. All zero bytes: m = v = 0.
struct AdamState { AdamFormats format; void *m = nullptr, *v = nullptr, *m_scale = nullptr; };
// Of one parameter; [n] each. period 1: an ordinary step. Null: no ramping.
struct Ramp { float* sum = nullptr; uint8_t *count = nullptr, *period = nullptr; };

// Stochastic rounding to BF16: up with probability (dropped bits) / 2^16, r uniform in 0 .. 65535. Infinities and NaN stay.
__host__ __device__ inline bf16 bf16_stochastic(float x, uint32_t r) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return to_bf16(x);
  return to_bf16(bits_float((bits + r) & 0xffff0000u));       // exact
}
// Stochastic rounding to E4M3, saturating at 448: between the neighbours lo and lo + step, up with probability (|x| - lo) / step, in units
// of 2^-16. The distance to lo is exact in FP32: a step is a power of two.
__host__ __device__ inline uint8_t e4m3_stochastic(float x, uint32_t r) {
  const float a = fabsf(x);
  if (!(a < kE4M3Max)) return e4m3_encode(x);                                        // saturates; NaN stays
  const int exponent = (int)(float_bits(a) >> 23) - 127;
  const float step = bits_float((uint32_t)((exponent < -6 ? -6 : exponent) - 3 + 127) << 23);
  const float steps = a / step, lo = floorf(steps);
  const float rounded = (lo + (((float)(2 * r + 1) * 0x1p-17f) < steps - lo ? 1.0f : 0.0f)) * step;
  return e4m3_encode(bits_float(float_bits(rounded) | (float_bits(x) & 0x80000000u)));
}
template <StateFormat kFormat> __device__ inline float state_load(const void* p, size_t i, float scale) {
  if (kFormat == StateFormat::fp32) return ((const float*)p)[i];
  if (kFormat == StateFormat::bf16) return to_float(((const bf16*)p)[i]);
  return e4m3_decode(((const uint8_t*)p)[i]) * scale;
}
template <StateFormat kFormat> __device__ inline void state_store(void* p, size_t i, float x, float scale, uint32_t r) {
  if (kFormat == StateFormat::fp32) ((float*)p)[i] = x;
  else if (kFormat == StateFormat::bf16) ((bf16*)p)[i] = bf16_stochastic(x, r);
  else ((uint8_t*)p)[i] = scale == 0 ? (x != x ? 0x7f : 0) : e4m3_stochastic(x / scale, r);
}

// kLanes threads share a block of 128 elements, four neighbours at a time. Random numbers: element i of the parameter takes word i % 4 of
// Philox block i / 4, the lower half for m, the upper for v; key.stream names the parameter.
template <int kLanes, StateFormat kM, StateFormat kV, bool kRamp>
__global__ void adamw_state_kernel(float* master, floatX* copy, AdamState s, const float* grad, const float* grad_scale, size_t n, AdamWFactors f, RandomKey key, Ramp ramp) {
  constexpr int kEach = kStateBlock / kLanes;
  const size_t block = (size_t)row_index<kLanes>(), first = block * kStateBlock + row_lane<kLanes>() * 4;
  auto element = [=](int j) { return first + j / 4 * (4 * kLanes) + j % 4; };
  if (block * kStateBlock >= n) return;                       // the same for all lanes of a block
  const float clip = *grad_scale;
  float scale = 1;
  if (kM == StateFormat::fp8) scale = s.format.e8m0 ? e8m0_decode(((const uint8_t*)s.m_scale)[block]) : ((const float*)s.m_scale)[block];
  float m1[kEach];
  uint32_t random[kEach];
  bool rests[kEach];
  float amax = 0;
  uint4 words = {};
  for (int j = 0; j < kEach; j++) {
    const size_t i = element(j);
    m1[j] = 0; random[j] = 0; rests[j] = true;
    if (i >= n) continue;
    float g = __fmul_rn(grad[i], clip), times = 1;
    m1[j] = state_load<kM>(s.m, i, scale);
    if (kM != StateFormat::fp32 || kV != StateFormat::fp32) {
      if (j % 4 == 0) words = random_block(key, i / 4);
      random[j] = j % 4 == 0 ? words.x : j % 4 == 1 ? words.y : j % 4 == 2 ? words.z : words.w;
    }
    rests[j] = false;
    if (kRamp) {
      const int count = ramp.count[i] + 1;
      if (count > 1) g += ramp.sum[i];
      rests[j] = count < ramp.period[i];
      ramp.sum[i] = rests[j] ? g : 0.0f;
      ramp.count[i] = (uint8_t)(rests[j] ? count : 0);
      times = (float)count;
      if (count > 1) g /= times;
    }
    if (!rests[j]) {
      float w = master[i], m2 = state_load<kV>(s.v, i, 1);
      w *= times == 1 ? f.decay : 1 - times * (1 - f.decay);
      // Each operation rounded by itself: a state that is then rounded to few bits must not depend on which of them a compiler fuses.
      m1[j] = __fadd_rn(m1[j], __fmul_rn(f.one_minus_beta1, __fsub_rn(g, m1[j])));
      m2 = __fadd_rn(__fmul_rn(f.beta2, m2), __fmul_rn(__fmul_rn(f.one_minus_beta2, g), g));
      w -= times * f.step_size * (m1[j] / (sqrtf(m2) / f.sqrt_bias2 + f.eps));
      master[i] = w;
      if (copy) copy[i] = from_float<floatX>(w);
      state_store<kV>(s.v, i, m2, 1, random[j] >> 16);
    }
    amax = fmaxf(amax, fabsf(m1[j]));
  }
  float new_scale = 1;
  if (kM == StateFormat::fp8) {                               // a resting element's m is rounded anew where its block's scale has changed
    amax = lanes_max<kLanes>(amax);
    new_scale = amax / kE4M3Max;
    if (s.format.e8m0) {
      const uint8_t byte = e8m0_encode_ceil(new_scale);
      new_scale = e8m0_decode(byte);
      if (row_lane<kLanes>() == 0) ((uint8_t*)s.m_scale)[block] = byte;
    } else if (row_lane<kLanes>() == 0) ((float*)s.m_scale)[block] = new_scale;
  }
  for (int j = 0; j < kEach; j++) {
    const size_t i = element(j);
    if (i < n && (!rests[j] || (kM == StateFormat::fp8 && new_scale != scale))) state_store<kM>(s.m, i, m1[j], new_scale, random[j] & 0xffff);
  }
}

// As adamw_update above, for states of any format, and with ramping. key: seed, optimizer step, a stream of this parameter alone.
template <int kLanes = kRowLanes>
void adamw_update(float* master, floatX* copy, const AdamState& s, const float* grad, const float* grad_scale, size_t n, AdamW o, RandomKey key, Ramp ramp = {}) {
  if (s.format.all_fp32() && !ramp.sum) { adamw_update(master, copy, (float*)s.m, (float*)s.v, grad, grad_scale, n, o); return; }
  using F = StateFormat;
  auto go = [&](auto m, auto v, auto ramped) {
    launch(adamw_state_kernel<kLanes, m.value, v.value, ramped.value>, row_grid((int)state_blocks(n)), row_block<kLanes>(), 0, master, copy, s, grad, grad_scale, n, adamw_factors(o), key, ramp);
  };
  auto choose_ramp = [&](auto m, auto v) { if (ramp.sum) go(m, v, std::true_type{}); else go(m, v, std::false_type{}); };
  auto choose_v = [&](auto m) {
    if (s.format.v == F::bf16) choose_ramp(m, std::integral_constant<F, F::bf16>{});
    else choose_ramp(m, std::integral_constant<F, F::fp32>{});
  };
  if (s.format.v == F::fp8) die("AdamW: v is kept in FP32 or BF16; its values span too much for FP8");
  if (s.format.m == F::fp8) choose_v(std::integral_constant<F, F::fp8>{});
  else if (s.format.m == F::bf16) choose_v(std::integral_constant<F, F::bf16>{});
  else choose_v(std::integral_constant<F, F::fp32>{});
}

// ------------------------------------------------------------------ gradient norm
constexpr int kNormSlots = 4096;          // parts of the gradient that are summed apart: a warp each
inline size_t grad_norm_scratch() { return kNormSlots; }   // floats

// scratch[slot] = sum of squares over the slot's part of the gradient (a multiple of 4 elements, but for the end).
template <int kLanes> __global__ void sum_squares_kernel(float* scratch, const float* grads, size_t n, size_t part) {
  const int slot = row_index<kLanes>();
  const size_t begin = min(slot * part, n), end = min(begin + part, n), vectors_end = begin + (end - begin) / 4 * 4;
  float sum[4] = {};
  for (size_t at = begin + row_lane<kLanes>() * 4; at < vectors_end; at += kLanes * 4) {
    const Vec<float, 4> g = load_vec<4>(grads + at);
    for (int i = 0; i < 4; i++) sum[i] += g.v[i] * g.v[i];
  }
  for (size_t at = vectors_end + row_lane<kLanes>(); at < end; at += kLanes) sum[0] += grads[at] * grads[at];
  const float total = lanes_sum<kLanes>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (row_lane<kLanes>() == 0) scratch[slot] = total;
}
template <int kLanes> __global__ void finish_norm_kernel(float* out, const float* scratch, float clip) {
  double sum = 0;
  for (int slot = threadIdx.x; slot < kNormSlots; slot += kLanes) sum += scratch[slot];
  for (int o = kLanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (threadIdx.x != 0) return;
  const float norm = (float)sqrt(sum), scale = clip == 0 ? 1.0f : clip / (norm + 1e-6f);
  out[0] = norm;
  out[1] = scale > 1 ? 1.0f : scale;      // NaN stays NaN, which fminf would turn into 1
}
// out[0] = norm of grads[n], out[1] = clip scale (1 if clip is 0). Not finite if any gradient is not (or a square overflows: 1.8e19).
template <int kLanes = kRowLanes> void grad_norm(float* out, const float* grads, size_t n, float clip, float* scratch) {
  const size_t part = round_up(ceil_div(n, (size_t)kNormSlots), (size_t)4);
  launch(sum_squares_kernel<kLanes>, row_grid(kNormSlots), row_block<kLanes>(), 0, scratch, grads, n, part);
  launch(finish_norm_kernel<kLanes>, 1, kLanes, 0, out, scratch, clip);
}
// a -= b. The norm of the difference of two gradients is their noise (the monitor of fqt, train_fp4.cu).
__global__ void subtract_kernel(float* a, const float* b, size_t n) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, n);
  for (size_t i = begin; i < end; i++) a[i] -= b[i];
}
inline void subtract(float* a, const float* b, size_t n) { launch(subtract_kernel, flat_grid(n, 1), kFlatThreads, 0, a, b, n); }
