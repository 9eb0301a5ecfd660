// kernels/norm.cuh -- LayerNorm and RMSNorm, forward and backward.
//
// What    xhat = (x - mean) * rstd,  out = xhat * weight + bias        rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//         RMSNorm is the same without mean and bias; one kernel serves both (kCenter says which).
//         Backward, with g = dout * weight and means over the row:
//             dx      += rstd * (g - mean(g) - xhat * mean(g * xhat))        (RMSNorm: without mean(g))
//             dweight += sum over rows of dout * xhat,   dbias += sum over rows of dout
//             dx_sums += sum over rows of the new dx: where dx is the gradient of a residual stream, the gradient of the bias of the
//             branch that ended there; the row is in registers here, and would be read again otherwise
// Shapes  x, out, dout, dx: [T, C] floatX. weight, bias, dweight, dbias: [C] FP32. mean, rstd: [T] FP32, kept for the backward pass.
// How     Forward: a warp a row, which it holds in registers where it fits (up to 1024 channels in BF16); else three passes (mean, variance,
//         output), the last two out of L1. The variance is a sum of squared deviations: E[x^2] - mean^2 would lose all digits where the
//         mean is large.
//         Backward: dx needs sums along rows, dweight sums along columns. On a GPU a block is as wide as a row, 16 bytes a thread, and
//         holds 3 rows in registers: it reads them once, finds their means with one barrier, writes dx, and keeps the sums of its columns
//         in registers to its end. For other widths, and on the CPU: a block takes 16 rows at a time; first its warps find the rows'
//         means, then its threads each own some columns and walk down the 16 rows, which are still in L1.
//         At 65536 x 768 on an H100 the latter took 188 us, 2.14 TB/s of 2.88 that a copy reaches, and the bias gradient 37 us more.
// Source  Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467.
// Cost    forward: reads 2 and writes 2 bytes an element (BF16); backward: reads 6, writes 2. 10 to 25 operations an element: bound by memory.
//         The forward's maximum, for the quantizer that follows (amax.cuh): half an operation an element, and no byte.
// Error   FP32 inside; out and dx are rounded once to floatX.
#pragma once
#include "rows.cuh"

// ------------------------------------------------------------------ forward
// kAmax: amax takes the largest |out| (amax.cuh).
template <bool kCenter, bool kAmax, int kLanes, int kVec>
__global__ void __launch_bounds__(kRowsPerBlock * kLanes, kCenter ? 6 - kAmax : kMostRowBlocks)
norm_forward_kernel(floatX* out, float* mean_out, float* rstd_out, const floatX* x, const float* weight, const float* bias, int T, int C, float eps,
                    [[maybe_unused]] float* amax) {
  const int lane = row_lane<kLanes>();
  int row = row_index<kLanes>();
  if (!has_row<kAmax>(row, T)) return;
  x += (size_t)row * C;
  out += (size_t)row * C;
  const float mean = kCenter ? row_sum<kLanes, kVec>(x, C, [](float v) { return v; }) / C : 0.0f;
  const float variance = row_sum<kLanes, kVec>(x, C, [=](float v) { return (v - mean) * (v - mean); }) / C;
  const float rstd = 1.0f / sqrtf(variance + eps);
  constexpr int kMap = kVec == 1 ? 1 : kMapVec<kLanes>;
  StoredMax<floatX, kMap> most;
  for (int c = lane * kMap; c < C; c += kLanes * kMap) {
    const Vec<floatX, kMap> v = load_vec<kMap>(x + c);
    const Vec<float, kMap> w = load_vec<kMap>(weight + c), b = kCenter ? load_vec<kMap>(bias + c) : Vec<float, kMap>{};
    Vec<floatX, kMap> o;
    for (int i = 0; i < kMap; i++) o.v[i] = from_float<floatX>((to_float(v.v[i]) - mean) * rstd * w.v[i] + b.v[i]);
    store_vec(out + c, o);
    if (kAmax) most.add(o);
  }
  if (lane == 0) {
    if (kCenter) mean_out[row] = mean;
    rstd_out[row] = rstd;
  }
  if constexpr (kAmax) raise_row_amax<kLanes>(amax, most.bits());
}

// The same by whole warps, with the row in registers: it is read once, all loads of a row are under way together, and the sums are those of
// row_sum, in its order, so the bits are too. kHold: vectors of a row in each lane.
template <bool kCenter, bool kAmax, int kHold>
__global__ void __launch_bounds__(kRowsPerBlock * 32, kHold == 1 ? kMostRowBlocks : 4)
norm_forward_held_kernel(floatX* __restrict__ out, float* __restrict__ mean_out, float* __restrict__ rstd_out, const floatX* __restrict__ x,
                         const float* __restrict__ weight, const float* __restrict__ bias, int T, int C, float eps,
                         [[maybe_unused]] float* amax) {
  const int lane = row_lane<32>();
  int row = row_index<32>();
  if (!has_row<kAmax>(row, T)) return;
  x += (size_t)row * C;
  out += (size_t)row * C;
  Vec<floatX, kVecX> held[kHold];
#pragma unroll
  for (int h = 0; h < kHold; h++) {
    const int c = (h * 32 + lane) * kVecX;
    held[h] = c < C ? load_vec<kVecX>(x + c) : Vec<floatX, kVecX>{};
  }
  auto sum_of = [&](auto f) {
    float sum[kVecX] = {};
#pragma unroll
    for (int h = 0; h < kHold; h++) {
      if ((h * 32 + lane) * kVecX >= C) break;
      for (int i = 0; i < kVecX; i++) sum[i] += f(to_float(held[h].v[i]));
    }
    for (int i = 1; i < kVecX; i++) sum[0] += sum[i];
    return lanes_sum<32>(sum[0]);
  };
  const float mean = kCenter ? sum_of([](float v) { return v; }) / C : 0.0f;
  const float variance = sum_of([=](float v) { return (v - mean) * (v - mean); }) / C;
  const float rstd = 1.0f / sqrtf(variance + eps);
  StoredMax<floatX, kVecX> most;
#pragma unroll
  for (int h = 0; h < kHold; h++) {
    const int c = (h * 32 + lane) * kVecX;
    if (c >= C) break;
    const Vec<float, kVecX> w = load_vec<kVecX>(weight + c), b = kCenter ? load_vec<kVecX>(bias + c) : Vec<float, kVecX>{};
    Vec<floatX, kVecX> o;
    for (int i = 0; i < kVecX; i++) o.v[i] = from_float<floatX>((to_float(held[h].v[i]) - mean) * rstd * w.v[i] + b.v[i]);
    store_vec(out + c, o);
    if (kAmax) most.add(o);
  }
  if (lane == 0) {
    if (kCenter) mean_out[row] = mean;
    rstd_out[row] = rstd;
  }
  if constexpr (kAmax) raise_row_amax<32>(amax, most.bits());
}

template <bool kCenter, bool kAmax, int kLanes>
void norm_forward(floatX* out, float* mean, float* rstd, const floatX* x, const float* weight, const float* bias, int T, int C, float eps, float* amax) {
  auto kernel = C % kVecX == 0 ? norm_forward_kernel<kCenter, kAmax, kLanes, kVecX> : norm_forward_kernel<kCenter, kAmax, kLanes, 1>;
  if (kLanes == 32 && C % kVecX == 0) {
    const int hold = ceil_div(C, 32 * kVecX);
    if (hold == 1) kernel = norm_forward_held_kernel<kCenter, kAmax, 1>;
    if (hold == 2) kernel = norm_forward_held_kernel<kCenter, kAmax, 2>;
    if (hold == 3) kernel = norm_forward_held_kernel<kCenter, kAmax, 3>;
    if (hold == 4) kernel = norm_forward_held_kernel<kCenter, kAmax, 4>;
  }
  launch(kernel, row_grid(T), row_block<kLanes>(), 0, out, mean, rstd, x, weight, bias, T, C, eps, amax);
}
// amax: null, or takes max|out| (amax.cuh).
template <int kLanes = kRowLanes>
void layernorm_forward(floatX* out, float* mean, float* rstd, const floatX* x, const float* weight, const float* bias, int T, int C, float eps,
                       float* amax = nullptr) {
  auto forward = amax ? norm_forward<true, true, kLanes> : norm_forward<true, false, kLanes>;
  forward(out, mean, rstd, x, weight, bias, T, C, eps, amax);
}
template <int kLanes = kRowLanes>
void rmsnorm_forward(floatX* out, float* rstd, const floatX* x, const float* weight, int T, int C, float eps, float* amax = nullptr) {
  auto forward = amax ? norm_forward<false, true, kLanes> : norm_forward<false, false, kLanes>;
  forward(out, nullptr, rstd, x, weight, nullptr, T, C, eps, amax);
}

// ------------------------------------------------------------------ backward
constexpr int kNormTile = 16;             // rows a block takes at a time: 16 x 768 channels of x and dout are 48 KB, four such fit L1
constexpr int kNormThreads = 256;

struct NormRow { float mean, rstd, mean_g, mean_gx; };   // what dx needs to know about its row

// mean(g) and mean(g * xhat) of one row, by the kLanes threads that share it.
template <bool kCenter, int kLanes, int kVec>
__device__ inline NormRow norm_row_means(const floatX* dout, const floatX* x, const float* weight, float mean, float rstd, int C) {
  RowSum<kLanes, kVec> g_sum[kVec] = {}, gx_sum[kVec] = {};
  for (int c = row_lane<kLanes>() * kVec; c < C; c += kLanes * kVec) {
    const Vec<floatX, kVec> d = load_vec<kVec>(dout + c), v = load_vec<kVec>(x + c);
    const Vec<float, kVec> w = load_vec<kVec>(weight + c);
    for (int i = 0; i < kVec; i++) {
      const float g = to_float(d.v[i]) * w.v[i];
      g_sum[i] += g;
      gx_sum[i] += g * ((to_float(v.v[i]) - mean) * rstd);
    }
  }
  for (int i = 1; i < kVec; i++) { g_sum[0] += g_sum[i]; gx_sum[0] += gx_sum[i]; }
  return {mean, rstd, kCenter ? lanes_sum<kLanes>((float)g_sum[0]) / C : 0.0f, lanes_sum<kLanes>((float)gx_sum[0]) / C};
}

// partial: [gridDim.x * groups, sums, C], the column sums of the rows that one group of threads has seen: dweight | dbias | dx_sums, the second
// with kCenter, the last with_dx.
template <bool kCenter, int kLanes, int kVec>
__global__ void __launch_bounds__(kNormThreads, 4)
norm_backward_kernel(floatX* __restrict__ dx, float* __restrict__ partial, const floatX* __restrict__ dout, const floatX* __restrict__ x,
                     const float* weight, const float* mean, const float* rstd, int T, int C, int groups, bool with_dx) {
  __shared__ NormRow row_means[kNormTile];
  const int lane = row_lane<kLanes>(), vectors = C / kVec, share = ceil_div(kNormTile, groups), sums_of = (kCenter ? 2 : 1) + with_dx;
  for (int tile = blockIdx.x * kNormTile; tile < T; tile += gridDim.x * kNormTile) {
    const int rows = min(kNormTile, T - tile);
    for (int r = threadIdx.x / kLanes; r < rows; r += blockDim.x / kLanes) {
      const int t = tile + r;
      const NormRow means = norm_row_means<kCenter, kLanes, kVec>(dout + (size_t)t * C, x + (size_t)t * C, weight, kCenter ? mean[t] : 0.0f, rstd[t], C);
      if (lane == 0) row_means[r] = means;
    }
    __syncthreads();
    // Now by columns. If there are more threads than vectors in a row, several groups of threads share the rows.
    for (int item = threadIdx.x; item < groups * vectors; item += blockDim.x) {
      const int group = item / vectors, c = item % vectors * kVec;
      Vec<float, kVec> dweight = {}, dbias = {}, dx_sum = {};
      const Vec<float, kVec> w = load_vec<kVec>(weight + c);
      const int end = min(rows, (group + 1) * share);
      for (int r = group * share; r < end; r++) {
        const NormRow m = row_means[r];
        const size_t at = (size_t)(tile + r) * C + c;
        const Vec<floatX, kVec> d = load_vec<kVec>(dout + at), v = load_vec<kVec>(x + at);
        Vec<floatX, kVec> o = load_vec<kVec>(dx + at);
        for (int i = 0; i < kVec; i++) {
          const float dy = to_float(d.v[i]), xhat = (to_float(v.v[i]) - m.mean) * m.rstd;
          dweight.v[i] += dy * xhat;
          if (kCenter) dbias.v[i] += dy;
          o.v[i] = from_float<floatX>(to_float(o.v[i]) + m.rstd * (dy * w.v[i] - m.mean_g - xhat * m.mean_gx));
          dx_sum.v[i] += to_float(o.v[i]);
        }
        store_vec(dx + at, o);
      }
      // The running sums belong to this thread alone, and stay in L2.
      float* sums = partial + (size_t)(blockIdx.x * groups + group) * sums_of * C + c;
      const bool first = tile == (int)blockIdx.x * kNormTile;
      write_sums(sums, dweight, !first);
      if (kCenter) write_sums(sums + C, dbias, !first);
      if (with_dx) write_sums(sums + (sums_of - 1) * (size_t)C, dx_sum, !first);
    }
    __syncthreads();                       // row_means is about to be overwritten
  }
}

// Tells the compiler that x is new here, so that it keeps the packed BF16 across a barrier and not the unpacked values: half the registers.
template <int N> __device__ inline void unpack_again(Vec<floatX, N>& x) {
#ifndef CPU_BUILD
  uint4 bits = *reinterpret_cast<uint4*>(&x);
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  *reinterpret_cast<uint4*>(&x) = bits;
#else
  (void)x;
#endif
}
// The same where a row is at most kNormThreads vectors. Block: a thread a vector, rounded up to whole warps. partial: [gridDim.x, sums, C].
constexpr int kNormRows = 3;              // rows a block has in registers: 9 loads under way in each thread; 4 do not fit in 128 registers
template <bool kCenter>
__global__ void __launch_bounds__(kNormThreads, 2)
norm_backward_block_kernel(floatX* __restrict__ dx, float* __restrict__ partial, const floatX* __restrict__ dout, const floatX* __restrict__ x,
                           const float* __restrict__ weight, const float* __restrict__ mean, const float* __restrict__ rstd, int T, int C, bool with_dx) {
  __shared__ float2 row_sums[2][kNormRows][kNormThreads / 32];       // of each warp; two sets, so that one barrier a turn is enough
  const int c = threadIdx.x * kVecX, warps = blockDim.x / 32;
  const bool inside = c < C;
  const Vec<float, kVecX> w = inside ? load_vec<kVecX>(weight + c) : Vec<float, kVecX>{};
  Vec<float, kVecX> dweight = {}, dbias = {}, dx_sum = {};
  int set = 0;
  for (int first = blockIdx.x * kNormRows; first < T; first += gridDim.x * kNormRows, set ^= 1) {
    Vec<floatX, kVecX> d[kNormRows], v[kNormRows], o[kNormRows];
    NormRow row[kNormRows];
#pragma unroll
    for (int r = 0; r < kNormRows; r++) {
      const bool live = first + r < T;
      const size_t at = (size_t)(first + r) * C + c;
      d[r] = live && inside ? load_vec<kVecX>(dout + at) : Vec<floatX, kVecX>{};
      v[r] = live && inside ? load_vec<kVecX>(x + at) : Vec<floatX, kVecX>{};
      o[r] = live && inside ? load_vec<kVecX>(dx + at) : Vec<floatX, kVecX>{};
      row[r].mean = kCenter && live ? mean[first + r] : 0.0f;
      row[r].rstd = live ? rstd[first + r] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kNormRows; r++) {
      float g_sum = 0, gx_sum = 0;
      for (int i = 0; i < kVecX; i++) {
        const float g = to_float(d[r].v[i]) * w.v[i];
        g_sum += g;
        gx_sum += g * ((to_float(v[r].v[i]) - row[r].mean) * row[r].rstd);
      }
      const float g = kCenter ? lanes_sum<32>(g_sum) : 0.0f, gx = lanes_sum<32>(gx_sum);
      if (threadIdx.x % 32 == 0) row_sums[set][r][threadIdx.x / 32] = make_float2(g, gx);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kNormRows; r++) {
      unpack_again(d[r]);
      unpack_again(v[r]);
      float g_sum = 0, gx_sum = 0;
      for (int i = 0; i < warps; i++) { g_sum += row_sums[set][r][i].x; gx_sum += row_sums[set][r][i].y; }
      const float mean_g = g_sum / C, mean_gx = gx_sum / C;
      for (int i = 0; i < kVecX; i++) {
        const float dy = to_float(d[r].v[i]), xhat = (to_float(v[r].v[i]) - row[r].mean) * row[r].rstd;
        dweight.v[i] += dy * xhat;
        if (kCenter) dbias.v[i] += dy;
        o[r].v[i] = from_float<floatX>(to_float(o[r].v[i]) + row[r].rstd * (dy * w.v[i] - mean_g - xhat * mean_gx));
        dx_sum.v[i] += to_float(o[r].v[i]);           // rows beyond T add 0
      }
      if (inside && first + r < T) store_vec(dx + (size_t)(first + r) * C + c, o[r]);
    }
  }
  if (!inside) return;
  const int sums_of = (kCenter ? 2 : 1) + with_dx;
  float* sums = partial + (size_t)blockIdx.x * sums_of * C + c;
  store_vec(sums, dweight);
  if (kCenter) store_vec(sums + C, dbias);
  if (with_dx) store_vec(sums + (sums_of - 1) * (size_t)C, dx_sum);
}
inline bool norm_rows_fit(int C) { return C % kVecX == 0 && C / kVecX <= kNormThreads; }
// As many blocks as run at once, at 128 registers a thread: 512 threads a multiprocessor.
inline int norm_backward_wide_blocks(int T, int C) { return min(ceil_div(T, kNormRows), kOnCpu ? 8 : multiprocessors() * max(1, 512 / round_up(C / kVecX, 32))); }

// At most 4 blocks a multiprocessor (reduction_blocks), which is how many fit: one wave.
inline int norm_backward_blocks(int T) { return min(ceil_div(T, kNormTile), reduction_blocks()); }
inline int norm_backward_groups(int vectors, int threads) { return max(1, min(kNormTile, threads / vectors)); }
// Floats of scratch that the backward functions need (either one, at any kLanes).
inline size_t norm_backward_scratch(int T, int C) {
  const int vectors = C % kVecX == 0 ? C / kVecX : C;
  const int slots = norm_backward_blocks(T) * norm_backward_groups(vectors, kNormThreads);
  return (size_t)max(slots, norm_rows_fit(C) ? norm_backward_wide_blocks(T, C) : 0) * 3 * C;
}

template <bool kCenter, int kLanes>
void norm_backward(floatX* dx, float* dweight, float* dbias, const floatX* dout, const floatX* x, const float* weight, const float* mean,
                   const float* rstd, float* scratch, int T, int C, float* dx_sums) {
  const int sums = (kCenter ? 2 : 1) + (dx_sums != nullptr);
  const SumOuts outs = {{dweight, kCenter ? dbias : dx_sums, dx_sums}};
  if (kLanes == 32 && norm_rows_fit(C)) {
    const int blocks = norm_backward_wide_blocks(T, C);
    launch(norm_backward_block_kernel<kCenter>, blocks, round_up(C / kVecX, 32), 0, dx, scratch, dout, x, weight, mean, rstd, T, C, dx_sums != nullptr);
    return sum_slots<kLanes>(outs, sums, scratch, blocks, C);
  }
  // On the CPU a block is one thread, and its vectors are so long that the compiler makes SIMD loops of them.
  constexpr int kThreads = kLanes == 1 ? 1 : kNormThreads, kVec = kLanes == 1 ? 64 : kVecX;
  const bool vectors = C % kVec == 0;
  const int blocks = norm_backward_blocks(T), groups = norm_backward_groups(vectors ? C / kVec : C, kThreads);
  auto kernel = vectors ? norm_backward_kernel<kCenter, kLanes, kVec> : norm_backward_kernel<kCenter, kLanes, 1>;
  launch(kernel, blocks, kThreads, 0, dx, scratch, dout, x, weight, mean, rstd, T, C, groups, dx_sums != nullptr);
  sum_slots<kLanes>(outs, sums, scratch, blocks * groups, C);
}
// dx (floatX), dweight, dbias and dx_sums (FP32; may be null) are added to. scratch: norm_backward_scratch(T, C) floats.
template <int kLanes = kRowLanes>
void layernorm_backward(floatX* dx, float* dweight, float* dbias, const floatX* dout, const floatX* x, const float* weight, const float* mean,
                        const float* rstd, float* scratch, int T, int C, float* dx_sums = nullptr) {
  norm_backward<true, kLanes>(dx, dweight, dbias, dout, x, weight, mean, rstd, scratch, T, C, dx_sums);
}
template <int kLanes = kRowLanes>
void rmsnorm_backward(floatX* dx, float* dweight, const floatX* dout, const floatX* x, const float* weight, const float* rstd, float* scratch, int T, int C,
                      float* dx_sums = nullptr) {
  norm_backward<false, kLanes>(dx, dweight, nullptr, dout, x, weight, nullptr, rstd, scratch, T, C, dx_sums);
}
