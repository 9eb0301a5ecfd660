// kernels/loss.cuh -- softmax, cross-entropy and its gradient, in one kernel and in place.
//
// What    lse  = log sum over the vocabulary of exp(logit)
//         loss = lse - logit[target]                                            (0 where target is -1)
//         dlogit[v] = grad_scale * ((1 + 2 z lse) * exp(logit[v] - lse) - (v == target))
//         z is the weight of the z-loss z * lse^2, which keeps logits from drifting; `losses` holds the cross-entropy alone.
// Shapes  logits: [rows, Vp] floatX, replaced by dlogits if write_grad. Vp >= V: columns V to Vp are padding, not part of the
//         softmax, and get gradient 0. losses: [rows] FP32. targets: [rows] int, in [0, V) or -1.
// How     The logits of a batch are the largest tensor of the program and probabilities would be another: they are never stored. One
//         pass finds maximum and sum together (online softmax: when the maximum grows, the sum so far is scaled down), a second one
//         turns the row into its gradient. A row is shared by kGroups * kLanes threads: 512 on a GPU where the vocabulary is large. The row
//         waits for its second pass in shared memory, where two of 100 KB fit a multiprocessor (H100); elsewhere three rows are open at a
//         time, and the second pass reads from L2, last read first (5.4 ms for 65536 x 50304 on an H100, 2.44 TB/s of a copy's 2.88).
// NaN     A logit that is not finite (-inf too: nothing is masked here, so it is an overflow) makes the row's loss and gradient NaN.
// Source  Milakov and Gimelshein, arXiv 1805.02867 (online softmax); PaLM, arXiv 2204.02311, section 5 (z-loss).
// Cost    reads 2 and writes 2 bytes an element (BF16) if shared memory or L2 serves the second pass; two exponentials an element.
// Error   FP32 inside; dlogits are rounded once to floatX.
#pragma once
#include "ptx.cuh"      // defines: ex2_approx
#include "rows.cuh"

struct OnlineSoftmax { float max, sum; };      // of the logits seen so far: the largest, and the sum of exp(logit - largest)

template <int N> __device__ inline void add_logits(OnlineSoftmax& s, const float (&logit)[N]) {
  float high = logit[0];
  for (int i = 1; i < N; i++) high = fmaxf(high, logit[i]);
  if (high > s.max) {
    s.sum *= ex2_approx((s.max - high) * kLog2E);
    s.max = high;
  }
  float part = 0;                              // summed apart: fewer additions to the large sum, fewer rounding errors
  for (int i = 0; i < N; i++) part += ex2_approx((logit[i] - s.max) * kLog2E) + 0 * logit[i];   // 0 * inf is NaN: no infinity passes unseen
  s.sum += part;
}
// Every one of kLanes lanes gets the softmax of what all of them have seen.
template <int kLanes> __device__ inline OnlineSoftmax merge_lanes(OnlineSoftmax s) {
  const float max = lanes_max<kLanes>(s.max);
  return {max, lanes_sum<kLanes>(s.sum * ex2_approx((s.max - max) * kLog2E))};
}

// One block a row. kKeep: in shared memory, Vp elements; each thread reads what it wrote itself.
template <int kLanes, int kGroups, int kVec, bool kKeep = false>
__global__ void __launch_bounds__(kLanes * kGroups, kGroups == 1 ? 1 : kKeep ? 2 : 3)
softmax_cross_entropy_kernel(floatX* logits, float* losses, const int* targets, int V, int Vp, float grad_scale, float z_loss, bool write_grad) {
  __shared__ OnlineSoftmax groups[kGroups];
  DYNAMIC_SHARED(floatX, kept);
  constexpr int kStep = kLanes * kGroups * kVec;
  const int row = blockIdx.x, target = targets[row], first = threadIdx.x * kVec;
  logits += (size_t)row * Vp;
  if (target < 0) {
    if (first == 0) losses[row] = 0;
    if (write_grad) for (int v = first; v < Vp; v += kStep) store_vec(logits + v, Vec<floatX, kVec>{});
    return;
  }
  const float target_logit = target < V ? to_float(logits[target]) : NAN;         // read before anyone overwrites it

  OnlineSoftmax s = {-FLT_MAX, 0};                 // not -inf: a thread without logits must not compute inf - inf
  Vec<floatX, kVec> next = {};
  if (kKeep && first < V) next = load_vec<kVec>(logits + first);
  for (int v = first; v < V; v += kStep) {
    const Vec<floatX, kVec> x = kKeep ? next : load_vec<kVec>(logits + v);
    if (kKeep && v + kStep < V) next = load_vec<kVec>(logits + v + kStep);        // under way while this one is worked on
    if (kKeep) store_vec(kept + v, x);
    float logit[kVec];
    for (int i = 0; i < kVec; i++) logit[i] = to_float(x.v[i]);
    if (v + kVec > V) for (int i = 0; i < kVec; i++) if (v + i >= V) logit[i] = -FLT_MAX;    // padding: adds 0
    add_logits(s, logit);
  }
  s = merge_lanes<kLanes>(s);
  if (threadIdx.x % kLanes == 0) groups[threadIdx.x / kLanes] = s;
  __syncthreads();
  s = merge_lanes<kGroups>(groups[threadIdx.x % kGroups]);
  const float log_sum = logf(s.sum), lse = s.max + log_sum;
  if (first == 0) losses[row] = log_sum + (s.max - target_logit);
  if (!write_grad) return;

  const float scale = grad_scale * (1 + 2 * z_loss * lse) / s.sum;
  for (int v = (Vp - 1) / kStep * kStep + first; v >= 0; v -= kStep) {            // backwards: what was read last is still in the cache
    if (v >= Vp) continue;
    Vec<floatX, kVec> x = {};                                                     // beyond V all is padding
    if (v < V) x = load_vec<kVec>(kKeep ? kept + v : logits + v);
    float d[kVec];
    for (int i = 0; i < kVec; i++) d[i] = ex2_approx((to_float(x.v[i]) - s.max) * kLog2E) * scale;
    if (v <= target && target < v + kVec) for (int i = 0; i < kVec; i++) if (v + i == target) d[i] -= grad_scale;
    if (v + kVec > V) for (int i = 0; i < kVec; i++) if (v + i >= V) d[i] = 0;
    Vec<floatX, kVec> o;
    for (int i = 0; i < kVec; i++) o.v[i] = from_float<floatX>(d[i]);
    store_vec(logits + v, o);
  }
}

inline bool two_rows_fit(size_t bytes) {
#ifdef CPU_BUILD
  return bytes <= 64 * 1024;
#else
  static const int most = [] { int n = 0; CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0)); return n; }();
  return 2 * (bytes + 2048) <= (size_t)most;               // the system takes 1 KB of a block, the kernel itself less
#endif
}
// rows >= 1. Rows with target -1 count nothing; a target of V or above, which no right caller passes, gives loss NaN.
template <int kLanes = kRowLanes>
void softmax_cross_entropy(floatX* logits, float* losses, const int* targets, int rows, int V, int Vp, float grad_scale, float z_loss, bool write_grad) {
  constexpr int kGroups = kLanes == 1 ? 1 : 16, kWide = 2 * kVecX;                // two loads under way in each thread
  auto kernel = softmax_cross_entropy_kernel<kLanes, kGroups, kWide>;
  int threads = kLanes * kGroups;
  size_t shared = 0;
  if (kLanes > 1 && two_rows_fit(Vp * sizeof(floatX)) && write_grad) {
    kernel = softmax_cross_entropy_kernel<kLanes, kGroups, kWide, true>;
    shared = Vp * sizeof(floatX);
  }
  if (V <= 4096 || Vp % kWide != 0) {                                             // a warp a row
    kernel = Vp % kVecX == 0 ? softmax_cross_entropy_kernel<kLanes, 1, kVecX> : softmax_cross_entropy_kernel<kLanes, 1, 1>;
    threads = kLanes;
    shared = 0;
  }
  launch(kernel, rows, threads, shared, logits, losses, targets, V, Vp, grad_scale, z_loss, write_grad);
}
