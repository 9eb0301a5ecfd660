// kernels/oscillation.cuh -- weights that jump to and fro between two values of the FP4 grid, and three ways to calm them.
//
// The forward pass sees Q(W). Late in training a weight W moves little, but one that lies near the middle between two grid values may cross that
// middle again and again, and each time Q(W) jumps by a whole grid step: noise that no longer averages out.
//
//     OsciReset   finds such weights and puts them on their grid value. Over a window of D steps
//                     distW = sum |W - W_prev|,   distQ = sum |Q(W) - Q(W_prev)|      (W_prev: one step before)
//                 A weight that drifts has distQ about distW; one that oscillates has distQ much larger. Where distQ / distW >= tau, W := Q(W), the middle of
//                 its interval. Adam's moments stay. Steps, once step >= S, with r = step mod P:   r = 0 takes the first W_prev;  r = 1 .. D
//                 watch;  r = D + 1 resets, and frees the window's memory: three FP32 copies of the quantized weights.
//     Q-EMA       E = b E + (1-b) W after each step; the forward pass rounds W not to the nearer of its two grid neighbours, but to the one nearer to E
//                 (on W's scale, with W's sign). quantize.cuh does that; here E is kept.
//     Q-Ramping   measures distQ / distW in the same way, and gives an element that oscillates fewer and longer steps:
//                 period n = min(floor((distQ / 16) / (distW + 1e-8)) * 5 + 1, Nmax): adamw.cuh sums its gradient over n steps, then steps n times as far.
//
// Q       is the forward pass's own quantizer (the recipe's fprop.w), applied to the FP32 master, its values exact in FP32: a detector on
//         another grid finds other weights. Where the recipe rotates W before it quantizes (QuEST), the grid lies in the rotated
//         coordinates: then W, W_prev and Q are taken there, and a reset is rotated back.
// Source  OsciReset: TetraJet-v2, arXiv 2510.27527, and the authors' code. Q-EMA, Q-Ramping: TetraJet, arXiv 2502.20853, algorithms 1 and 2.
//         Q-Ramping's Nmax (16) and how often it measures (every 200 steps) are our choice.
// Cost    watching: two quantizations of W and 24 bytes read, 12 written an element and step. Q-EMA: 8 read, 4 written; E is read by the quantizer.
#pragma once
#include "adamw.cuh"
#include "linear.cuh"

// ------------------------------------------------------------------ when: the windows of OsciReset and Q-Ramping
struct WindowSchedule {
  int start = 0, period = 200, detect = 50;
};
enum class WindowPhase { none, open, watch, finish };
// step counts finished optimizer steps: 1 after the first.
inline WindowPhase window_phase(const WindowSchedule& s, int step) {
  if (step < s.start) return WindowPhase::none;
  const int r = step % s.period;
  return r == 0 ? WindowPhase::open : r <= s.detect ? WindowPhase::watch : r == s.detect + 1 ? WindowPhase::finish : WindowPhase::none;
}
// Is there a window's state to keep after this step?
inline bool window_is_open(const WindowSchedule& s, int step) { return step >= s.start && step % s.period <= s.detect; }
// Empty, or what is wrong with a schedule for a run of `steps` steps.
inline std::string window_problem(const WindowSchedule& s, int warmup, int steps, const char* what) {
  auto text = [](int n) { return std::to_string(n); };
  if (s.detect < 1 || s.period < s.detect + 2) return std::string(what) + ": a window watches for " + text(s.detect) + " steps and needs a period of at least " + text(s.detect + 2) + ", not " + text(s.period);
  if (s.start < warmup) return std::string(what) + ": start " + text(s.start) + " lies in the warm-up, which lasts " + text(warmup) + " steps";
  const int r = s.start % s.period;
  if (r >= 1 && r <= s.detect + 1)
    return std::string(what) + ": start " + text(s.start) + " lies inside a window (steps " + text(s.start - r) + " to " + text(s.start - r + s.detect + 1) + "), whose first weights were never taken; nearest starts: " +
           text(s.start - r) + ", " + text(s.start - r + s.period);
  const int first = round_up(s.start, s.period);
  if (first + s.detect + 1 > steps)
    return std::string(what) + ": the first window, steps " + text(first) + " to " + text(first + s.detect + 1) + ", does not end within the " + text(steps) + " steps of this run; lower the period, the detection or the start";
  return "";
}

// ------------------------------------------------------------------ watching
// dist_w += |w - prev|, dist_q += |q - q_prev|, then prev = w
__global__ void watch_kernel(float* prev, float* dist_q, float* dist_w, const float* w, const float* q, const float* q_prev, size_t n) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, n);
  for (size_t i = begin; i < end; i++) {
    dist_q[i] += fabsf(q[i] - q_prev[i]);
    dist_w[i] += fabsf(w[i] - prev[i]);
    prev[i] = w[i];
  }
}
inline void watch(float* prev, float* dist_q, float* dist_w, const float* w, const float* q, const float* q_prev, size_t n) {
  launch(watch_kernel, flat_grid(n, 1), kFlatThreads, 0, prev, dist_q, dist_w, w, q, q_prev, n);
}

// ------------------------------------------------------------------ OsciReset
__host__ __device__ inline bool oscillates(float dist_q, float dist_w, float tau) { return dist_w > 0 && dist_q / dist_w >= tau; }
// Counts of elements: with distW > 0, with distQ > 0, oscillating, and of those the ones that the reset moves.
struct OsciCounts { unsigned moved = 0, flipped = 0, oscillating = 0, reset = 0; };
// kDelta: w becomes the change (q - w where it oscillates, else 0); otherwise w becomes q where it oscillates.
template <bool kDelta, int kLanes>
__global__ void osci_reset_kernel(OsciCounts* counts, float* w, const float* q, const float* dist_q, const float* dist_w, float tau, size_t n) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, n);
  unsigned moved = 0, flipped = 0, oscillating = 0, reset = 0;
  for (size_t i = begin; i < end; i++) {
    const bool hit = oscillates(dist_q[i], dist_w[i], tau);
    moved += dist_w[i] > 0;
    flipped += dist_q[i] > 0;
    oscillating += hit;
    reset += hit && q[i] != w[i];
    if (kDelta) w[i] = hit ? q[i] - w[i] : 0.0f;
    else if (hit) w[i] = q[i];
  }
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) {
    moved += __shfl_xor_sync(0xffffffffu, moved, o);
    flipped += __shfl_xor_sync(0xffffffffu, flipped, o);
    oscillating += __shfl_xor_sync(0xffffffffu, oscillating, o);
    reset += __shfl_xor_sync(0xffffffffu, reset, o);
  }
  if (threadIdx.x % kLanes) return;                 // integers: the order of the additions does not matter
  atomicAdd(&counts->moved, moved);
  atomicAdd(&counts->flipped, flipped);
  atomicAdd(&counts->oscillating, oscillating);
  atomicAdd(&counts->reset, reset);
}
// Adds to *counts (device).
template <bool kDelta> void osci_reset(OsciCounts* counts, float* w, const float* q, const float* dist_q, const float* dist_w, float tau, size_t n) {
  launch(osci_reset_kernel<kDelta, kRowLanes>, flat_grid(n, 1), kFlatThreads, 0, counts, w, q, dist_q, dist_w, tau, n);
}
// to += from where from is not zero (elsewhere the bits stay), then copy = to in floatX
__global__ void add_changes_kernel(float* to, const float* from, size_t n) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, n);
  for (size_t i = begin; i < end; i++) if (from[i] != 0) to[i] += from[i];
}
inline void add_changes(float* to, const float* from, size_t n) { launch(add_changes_kernel, flat_grid(n, 1), kFlatThreads, 0, to, from, n); }
__global__ void round_copy_kernel(floatX* copy, const float* x, size_t n) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, n);
  for (size_t i = begin; i < end; i++) copy[i] = from_float<floatX>(x[i]);
}
inline void round_copy(floatX* copy, const float* x, size_t n) { launch(round_copy_kernel, flat_grid(n, 1), kFlatThreads, 0, copy, x, n); }

// ------------------------------------------------------------------ Q-EMA
__global__ void weight_average_kernel(float* average, const float* w, float keep, size_t n) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, n);
  for (size_t i = begin; i < end; i++) average[i] = keep * average[i] + (1 - keep) * w[i];
}
// average = keep * average + (1 - keep) * w, FP32
inline void weight_average(float* average, const float* w, float keep, size_t n) { launch(weight_average_kernel, flat_grid(n, 1), kFlatThreads, 0, average, w, keep, n); }

// ------------------------------------------------------------------ Q-Ramping
constexpr float kRampRatio = 16, kRampStep = 5;     // k1 and k2 of the paper
__host__ __device__ inline int ramp_period(float dist_q, float dist_w, int most) {
  const float n = floorf((dist_q / kRampRatio) / (dist_w + 1e-8f)) * kRampStep + 1;
  return n < (float)most ? (int)n : most;
}
__global__ void ramp_periods_kernel(uint8_t* period, unsigned* ramped, const float* dist_q, const float* dist_w, int most, size_t n) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, n);
  unsigned count = 0;
  for (size_t i = begin; i < end; i++) {
    period[i] = (uint8_t)ramp_period(dist_q[i], dist_w[i], most);
    count += period[i] > 1;
  }
  if (count) atomicAdd(ramped, count);
}
// period[n]; *ramped (device) += how many are above 1. most: 1 to 255.
inline void ramp_periods(uint8_t* period, unsigned* ramped, const float* dist_q, const float* dist_w, int most, size_t n) {
  launch(ramp_periods_kernel, flat_grid(n, 1), kFlatThreads, 0, period, ramped, dist_q, dist_w, most, n);
}

// ------------------------------------------------------------------ rotated weights in memory
// out [rows, cols] FP32 = the source or its transpose, rotated (unless kRotate is false) in groups of kN columns; cols is a multiple of kN, and
// the source has `valid` of them, the rest are zeros. A block takes 32 rows of one group. kLanes neighbouring threads share a row's group: kN/4
// on a GPU, one on the CPU. A transposed source is read along its own rows, through shared memory.
template <int kN, int kLanes, bool kRotate, bool kTranspose, class Source>
__global__ void gather_kernel(float* out, Source x, int rows, int cols, int valid, SignBits signs) {
  constexpr int kPer = kN / kLanes;
  const int first_col = blockIdx.x * kN, first_row = blockIdx.y * 32, lane = threadIdx.x % kLanes;
  constexpr bool kStaged = kTranspose && kLanes > 1;
  __shared__ float staged[kStaged ? kN : 1][kStaged ? 33 : 1];
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < kN * 32; i += blockDim.x) {
      const int c = first_col + i / 32, r = first_row + i % 32;
      staged[i / 32][i % 32] = c < valid && r < rows ? x.at(c, r) : 0.0f;
    }
    __syncthreads();
  }
  for (int r = threadIdx.x / kLanes; r < 32; r += blockDim.x / kLanes) {     // whole warps leave together: the shuffles below need all lanes
    const int row = first_row + r;
    float v[kPer];
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const int i = lane + kLanes * j, c = first_col + i;
      if constexpr (kStaged) v[j] = staged[i][r];
      else v[j] = row < rows && c < valid ? (kTranspose ? x.at(c, row) : x.at(row, c)) : 0.0f;
      if (kRotate) v[j] = negate_if(v[j], signs.negated(i));
    }
    if constexpr (kRotate) hadamard<kN, kLanes>(v, lane);
    if (row < rows) {
#pragma unroll
      for (int j = 0; j < kPer; j++) out[(size_t)row * cols + first_col + lane + kLanes * j] = v[j];
    }
  }
}
template <class Source> void gather(float* out, const Source& x, int rows, int cols, int valid, bool transpose, int rht, SignBits signs) {
  auto go = [&](auto n, auto rotate, auto turned) {
    constexpr int kN = n.value, kLanes = kOnCpu ? 1 : kN / 4;
    const dim3 grid(ceil_div(cols, kN), ceil_div(rows, 32));
    launch(gather_kernel<kN, kLanes, rotate.value, turned.value, Source>, grid, kOnCpu ? 32 : 256, 0, out, x, rows, cols, valid, signs);
  };
  auto by_size = [&](auto turned) {
    switch (rht) {
      case 0: return go(std::integral_constant<int, 16>{}, std::false_type{}, turned);
      case 16: return go(std::integral_constant<int, 16>{}, std::true_type{}, turned);
      case 32: return go(std::integral_constant<int, 32>{}, std::true_type{}, turned);
      case 64: return go(std::integral_constant<int, 64>{}, std::true_type{}, turned);
      case 128: return go(std::integral_constant<int, 128>{}, std::true_type{}, turned);
    }
    die("rht %d: 0, 16, 32, 64 and 128 exist", rht);
  };
  if (transpose) by_size(std::true_type{}); else by_size(std::false_type{});
}

// ------------------------------------------------------------------ Q(W)
// The coordinates in which the forward pass rounds W: rotated in place, if the recipe rotates. The transform is its own inverse. cols: a
// multiple of rht. `scratch` as large as w.
inline void rotate_rows(float* w, float* scratch, int rows, int cols, int rht) {
  gather(scratch, Matrix<float>{w, rows, cols}, rows, cols, cols, false, rht, SignBits{});
  device_copy(w, scratch, (size_t)rows * cols);
}
// Memory for the packed Q(W) of the largest matrix.
struct GridScratch { uint8_t *codes = nullptr, *scales = nullptr; float *outer = nullptr, *amax = nullptr; uint32_t* groups = nullptr; };
inline OperandRecipe grid_recipe(OperandRecipe how) { how.rht = 0; how.signs = Signs::none; how.source = Source::original; return how; }
// q [rows, cols] = Q(w) by the forward pass's quantizer, in FP32 with all scales; w in the coordinates in which it rounds.
inline void quantized_weight(float* q, const float* w, int rows, int cols, const OperandRecipe& fprop_w, const GridScratch& s) {
  QuantizeHow how;
  how.recipe = grid_recipe(fprop_w);
  Operand4 packed;
  packed.rows = rows; packed.cols = cols; packed.ld = operand_ld(cols);
  packed.codes = s.codes; packed.scales = s.scales; packed.outer = s.outer; packed.amax = s.amax;
  quantize(packed, w, how, s.groups);
  dequantize(q, packed, how.recipe);
}

// ------------------------------------------------------------------ Q-EMA in the forward pass
// Grid index for |w| = a, between whose neighbours `e` (the average on w's scale, times the sign of w) decides. Midway: the even index, so that e = a
// is rounding to nearest.
__host__ __device__ inline int e2m1_index_toward(float a, float e) {
  const int lo = e2m1_index_sr(a, 1);                           // u = 1 never rounds up
  if (lo == 7) return 7;
  const float middle = 0.5f * (e2m1_magnitude(lo) + e2m1_magnitude(lo + 1));
  return e > middle ? lo + 1 : e < middle ? lo : lo + lo % 2;
}
// A weight in units of its block's scale, with the very operations by which quantize.cuh got there.
__device__ inline float on_grid(float v, const Operand4& p, const OperandRecipe& how, int row, int col) {
  const ElementScale s = element_scale(p, how, row, col);
  if (how.format == Format::fp4_vector) return v / s.outer;
  if (how.format == Format::mxfp4) {
    const uint8_t byte = p.scales[scale_offset(row, col / 32, ceil_div(p.cols, 32))];
    return (how.scale == ScaleRule::range34 ? v * 3 : v) * e8m0_reciprocal(byte);
  }
  if (how.outer == Outer::b1x128) return v / (s.outer * s.block);
  const TensorScale t = tensor_scale(*p.amax, nvfp4_range(how.scale));
  return __fmul_rn(v, fminf(1.0f / (s.block * t.decode), FLT_MAX));
}
// Rounds the codes of a packed operand (and its values) anew, toward the average. x: what was quantized, [rows, x_ld]; average: [rows, average_ld].
template <class T> __global__ void round_toward_kernel(Operand4 p, OperandRecipe how, const T* x, int x_ld, const float* average, int average_ld) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i / (p.ld / 2);       // a thread a byte: two codes
  if (row >= (unsigned)p.rows) return;
  for (int c = i % (p.ld / 2) * 2, h = 0; h < 2; h++, c++) {
    if (c >= p.cols || c >= average_ld) continue;
    const float v = on_grid(to_float(x[(size_t)row * x_ld + c]), p, how, row, c), e = on_grid(average[(size_t)row * average_ld + c], p, how, row, c);
    const int sign = e2m1_sign(v), index = e2m1_index_toward(fabsf(v), sign ? -e : e);
    const size_t at = (size_t)row * p.ld + c;
    p.codes[at / 2] = (uint8_t)((p.codes[at / 2] & (h ? 0x0f : 0xf0)) | (sign | index) << (4 * h));
    if (!p.values) continue;
    const ElementScale s = element_scale(p, how, row, c);
    const float magnitude = how.format == Format::fp4_vector ? e2m1_magnitude(index) * s.outer : e2m1_magnitude(index) * s.block * (how.outer == Outer::b1x128 ? s.outer : 1.0f);
    p.values[at] = from_float<floatX>(sign ? -magnitude : magnitude);
  }
}
// What Q-EMA needs of a layer: the average of W, [N,K], in the coordinates in which the recipe rounds; and room for the packed W.
struct TowardAverage { const float* average = nullptr; GridScratch packed; };
// W, rounded toward its average, as fprop's operand; also into saved->w, if the backward pass wants that. x: the other operand, or null without a GEMM.
inline ReadyOperand prepare_toward(const floatX* W, int N, int K, const Recipe& r, LinearKey key, GemmWay way, const LinearScratch& s, LinearSaved* saved, const TowardAverage& q,
                                   const ReadyOperand* x) {
  Operand4 own;
  own.codes = q.packed.codes; own.scales = q.packed.scales; own.outer = q.packed.outer;
  Operand4* const kept = saved && saves_w(r) ? &saved->w : &own;
  const ReadyOperand w = prepare_operand(r.fprop.w, {kFpropW, kFpropX, key, way, x}, W, N, K, false, s, kept);
  Operand4 p = w.packed;
  p.cols = rotated_cols(K, r.fprop.w.rht);
  const unsigned grid = ceil_div((unsigned)N * (p.ld / 2), 256u);
  if (r.fprop.w.rht == 0) launch(round_toward_kernel<floatX>, grid, 256, 0, p, r.fprop.w, W, K, q.average, K);
  else {
    gather(s.rotated, Matrix<floatX>{W, N, K}, N, p.cols, K, false, r.fprop.w.rht, SignBits{});
    launch(round_toward_kernel<float>, grid, 256, 0, p, r.fprop.w, (const float*)s.rotated, p.cols, q.average, K);
  }
  return w;
}
// linear_forward() with the weights rounded toward their average. What is saved for the backward pass is rounded so as well.
inline void linear_forward_toward(floatX* Y, const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key,
                                  const LinearScratch& s, LinearSaved* saved, const TowardAverage& q, LinearEpilogue add = {},
                                  float* x_amax = nullptr) {
  const GemmWay way = fp4_way_of(r.fprop.x, r.fprop.w, s.ways);
  const ReadyOperand x = prepare_operand(r.fprop.x, {kFpropX, kFpropX, key, way}, X, T, K, false, s, saved && saves_x(r) ? &saved->x : nullptr, x_amax);
  const ReadyOperand w = prepare_toward(W, N, K, r, key, way, s, saved, q, &x);
  Gemm g;
  g.M = T; g.N = N; g.K = K; g.D = Y; g.ldd = N;
  g.bias = add.bias; g.C = add.residual; g.accumulate = add.residual != nullptr; g.gelu_input = add.gelu_input;
  run_gemm(g, x, w, s, way);
  save_xt(X, T, K, r, key, s, saved);
}
// linear_save() likewise.
inline void linear_save_toward(const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key, const LinearScratch& s, LinearSaved* saved, const TowardAverage& q) {
  linear_save(X, W, T, K, N, r, key, s, saved);
  if (saves_w(r)) prepare_toward(W, N, K, r, key, GemmWay::emulated, s, saved, q, nullptr);
}
