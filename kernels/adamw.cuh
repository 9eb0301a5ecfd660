// kernels/adamw.cuh -- the optimizer's step, and the gradient norm that clipping needs.
//
// What    g = grad * grad_scale
//         w *= 1 - lr * weight_decay
//         m += (1 - beta1) * (g - m)
//         v  = beta2 * v + (1 - beta2) * g * g
//         w -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//         in this order, which is torch.optim.AdamW's; then copy = w rounded to floatX, the weights that the next forward pass reads.
//         norm = sqrt(sum of grad^2), clip scale = min(1, clip / (norm + 1e-6)): torch.nn.utils.clip_grad_norm_'s.
// Shapes  flat arrays of n elements, all FP32 but the copy. grad_scale stays on the device: the host need not wait for the norm.
// Source  Loshchilov and Hutter, arXiv 1711.05101.
// Cost    adamw: reads 16 and writes 14 bytes an element (with a BF16 copy). grad_norm: reads 4.
// Error   FP32. The norm: FP32 sums of n/4096 squares by each of 4 x kLanes chains, the 4096 sums added in double; fixed order.
#pragma once
#include "rows.cuh"

struct AdamW {
  float lr, beta1, beta2, eps, weight_decay;
  int step;                               // 1 for the first update
};

// ------------------------------------------------------------------ update
struct AdamWFactors { float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_bias2, eps; };

template <int kVec>
__global__ void adamw_kernel(float* __restrict__ master, floatX* __restrict__ copy, float* __restrict__ m, float* __restrict__ v, const float* __restrict__ grad,
                             const float* grad_scale, size_t n, AdamWFactors f) {
  const float scale = *grad_scale;
  const size_t begin = flat_begin<kVec>(), end = min(begin + kFlatRun * kVec, n);
  for (size_t at = begin; at < end; at += kVec) {
    const Vec<float, kVec> g = load_vec<kVec>(grad + at);
    Vec<float, kVec> w = load_vec<kVec>(master + at), m1 = load_vec<kVec>(m + at), m2 = load_vec<kVec>(v + at);
    for (int i = 0; i < kVec; i++) {
      const float gi = g.v[i] * scale;
      w.v[i] *= f.decay;
      m1.v[i] += f.one_minus_beta1 * (gi - m1.v[i]);
      m2.v[i] = f.beta2 * m2.v[i] + f.one_minus_beta2 * gi * gi;
      w.v[i] -= f.step_size * (m1.v[i] / (sqrtf(m2.v[i]) / f.sqrt_bias2 + f.eps));
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
// copy may be null. grad_scale: device scalar. n of any size.
inline void adamw_update(float* master, floatX* copy, float* m, float* v, const float* grad, const float* grad_scale, size_t n, AdamW o) {
  const double bias1 = 1 - pow((double)o.beta1, o.step), bias2 = 1 - pow((double)o.beta2, o.step);
  const AdamWFactors f = {(float)(1 - (double)o.lr * o.weight_decay), (float)(1 - (double)o.beta1), o.beta2, (float)(1 - (double)o.beta2),
                          (float)(o.lr / bias1), (float)sqrt(bias2), o.eps};
  constexpr int kVec = kOnCpu ? 1 : 4;    // as kMapVec
  const size_t body = n / kVec * kVec, rest = n - body;
  if (body) launch(adamw_kernel<kVec>, flat_grid(body, kVec), kFlatThreads, 0, master, copy, m, v, grad, grad_scale, body, f);
  if (rest) launch(adamw_kernel<1>, flat_grid(rest, 1), kFlatThreads, 0, master + body, copy ? copy + body : copy, m + body, v + body, grad + body, grad_scale, rest, f);
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
