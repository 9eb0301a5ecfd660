// kernels/attention.cuh -- causal attention with grouped heads, forward and backward, without ever storing a T x T matrix.
//
//   S = scale Q K^T    scale = 1 / sqrt(D)       S[i][j] only for j <= i (causal)
//   P = softmax(S)     P[i][j] = exp(S[i][j] - lse[i]),   lse[i] = log sum_j exp(S[i][j])
//   O = P V
// for each batch row b and query head h; head h reads key and value head h / (H / KV) (grouped-query attention, GQA).
//   dV = P^T dO    dP = dO V^T    dS = P * (dP - delta),   delta[i] = sum_d dO[i][d] O[i][d]    dQ = scale dS K    dK = scale dS^T Q
//
// Layouts   qkv, dqkv [B*T, (H + 2 KV) * D]: query heads, then key heads, then value heads.   out, dout [B*T, H * D].
//           lse, delta [B, H, T] float. lse is the natural logarithm.
// Limits    D even, 8 .. 128; any T; KV divides H; qkv, dqkv, out and dout aligned to 16 bytes. dqkv is overwritten.
// Source    FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithms 1 and 2: walk over tiles of keys; keep the running maximum m
//           and sum l of each query; when m grows, what was summed so far is scaled by exp(m_old - m_new).
//
// Cost      One product over the causal half is T^2 D flops (2 T^2 D / 2) for each b and h. Forward: 2 products, backward: 5 (S, dP, dV, dK,
//           dQ); the simple version walks over queries for dK and dV and over keys for dQ, and computes S and dP twice: 7.
//           Bytes, each matrix once: forward (2 H + 2 KV) D elements a token, backward (5 H + 6 KV) D. Forward without GQA that is T / 4
//           flops a byte. Backward also adds up dQ in float, H D floats of scratch a token, read and written T / 256 times on average.
//           Forward it also finds max|O| for the quantizer that follows, if that asks (amax.cuh): from what each warp stores at its end.
//
// How       Forward: a block owns queries and walks over the keys they see; scores and probabilities never leave the registers.
//           Backward: delta is a pass of its own, for it needs whole rows of dO and O. Then a block owns keys, sums their dK and dV in
//           registers and walks over the queries that see them. It has a part of dQ of each of them, other blocks have the rest: the
//           parts are added up in a float buffer, one block after the other, and the last block writes dQ.
// Same bits Every sum has a fixed order, so the same inputs give the same bits. No float is added by an atomic: for dQ a counter says
//           whose turn it is, the blocks of the last keys first. (An integer atomic hands out the work; who does it changes no sum.)
// Error     against double, normal inputs, rms(error) / rms(result): float 3e-7 forward, 6e-7 backward; bf16 2e-3 and 2.5e-3. The mma
//           version rounds P and dS to bf16 before they are multiplied, as every tensor core implementation does; sums are float.
//           delta comes from the rounded O: with keys of size 500 to 1000 dQ in bf16 was off by 3e-2 to 8e-2 (float: 4e-5).
//
// Two versions. `simple` is the algorithm and nothing else; it works for float and bf16 and is what trains on a CPU, and on a GPU where
// activations are FP32. `mma` is for bf16 on tensor cores (sm_80 on). attention_forward and attention_backward at the end choose.
//
// Measured on an H100, TFLOP/s of 2 T^2 D flops a head forward, 5 T^2 D backward (delta included), B 32 T 1024 or B 16 T 2048. Those in use:
// dev/attention_bench.cu; (1): measured in another run, which gave up to 6 % less where both have measured the same tiles.
//   T                                                                         1024    2048    1024    1024    2048
//   heads x D                                                              12 x 64 16 x 128 6 x 128 12 x 64 16 x 128
//   key heads                                                                   12      16       6       4       4
//   forward   16 queries a warp (D 128: fewer registers), rescaled always (1)  180     201     167     180
//             32 queries a warp, 64 keys a tile (1)                            217     315     248     218
//             ... rescaled only when a maximum grew                            226     325     251     228     326   <- in use
//             ... 32 keys a tile (D 128: less shared memory), rescaled (1)     198     278     221     197           <- D 128, 99 KB
//             FlashAttention-2                                                 192     292     204     187
//   backward  two kernels, dQ and dK dV: 7 products (1)                        138     164     141     137
//             one kernel, 16 keys a warp, 8 warps, 64 queries a tile             -     197     158       -     182
//             ... 4 warps, 32 queries (D 128: less shared memory) (1)          135     172     141     129
//             ... ... a warp has 32 rows of dQ (1)                               -     176     145       -           <- D 128, A100, 99 KB
//             ... 4 warps, 64 queries                                          149       -       -     152
//             32 keys a warp, 4 warps, 32 queries                              154       -       -     143           <- D 64
//             two warps share 32 keys, 8 warps, 64 queries                       -     218     175       -     201   <- D 128
//             FlashAttention-2                                                 128     207     139     119
// FlashAttention-2: PyTorch's scaled_dot_product_attention with its flash backend, on a machine of the same kind at another time.
// Both in one call, ten launches in a row, H200, the first three columns: forward 222 322 249 (the second 309 another time) against 212 305 240, backward 170 227 184 against 152 226 165.
// (Before, each launch was timed alone, which counts what PyTorch's host takes to start it: 191 283 210, 133 214 140.)
//
// Limit     Shared memory, by arithmetic and these measurements (no profiler has run). A fragment for two mma is 4 clocks of a multiprocessor's
//           shared memory (512 bytes); two mma are 2 clocks of its tensor cores at their peak. To use a fragment for two more, 32 rows a
//           warp instead of 16, was the largest gain; more rows do not fit, all kernels use 228 to 255 of 255 registers. Beyond that lie
//           instructions that read shared memory themselves (wgmma on Hopper, tcgen05 on B200), a kernel for each. Delta is a twentieth
//           of the backward pass or less, at 2.5 TB/s or more.
// Not kept  Backward, TFLOP/s of the columns with D 128: to skip, in the diagonal tile, queries that lie before all keys of a warp: 200, 166, 183
//           instead of 218, 175, 201 (D 64: 155, 142 instead of 154, 143); together with red.global.add.v4.f32 for dQ, in the same fixed
//           order: 220, 178, 206 (D 64: 156, 145): 1 to 2 % for an instruction of sm_90. D 64 with 4 key heads: 16 keys a warp
//           are 6 % faster, but 3 % slower with 12: one shape for both is simpler.
#pragma once
#include <type_traits>
#include "amax.cuh"    // defines: StoredMax, raise_amax
#include "cuda.cuh"    // defines: launch, bf16, floatX, DYNAMIC_SHARED, lanes_sum, Vec
#include "ptx.cuh"     // defines: mma_m16n8k16_bf16, ldmatrix_x4, cp_async, ex2_approx, pack_bf16

constexpr float kLn2 = 0.693147181f;
constexpr int kMaxHeadSize = 128;

// Where head h of batch row b begins in qkv (or dqkv), for each of q, k, v. Rows are `ld` elements apart.
template <class Value> struct HeadRows { Value *q, *k, *v; size_t ld; };
template <class Value> __device__ inline HeadRows<Value> head_rows(Value* qkv, int b, int h, int T, int H, int KV, int D) {
  const size_t ld = (size_t)(H + 2 * KV) * D;
  Value* first = qkv + b * T * ld;
  const int kv = h / (H / KV);
  return {first + h * D, first + (H + kv) * D, first + (H + KV + kv) * D, ld};
}

// delta[i] = sum_d dO[i][d] O[i][d]; and sets n counters to 0 for the kernel that follows. kLanes lanes a row, kWidth elements at once.
template <class Value, int kLanes, int kWidth>
__global__ void attention_delta_kernel(float* delta, const Value* dout, const Value* out, int T, int H, int D, int* counters, size_t n) {
  const int h = blockIdx.x, t = (blockIdx.y * blockDim.x + threadIdx.x) / kLanes, b = blockIdx.z, lane = threadIdx.x % kLanes;
  const size_t row = (((size_t)b * T + t) * H + h) * D;
  float sum[2] = {0, 0};
  for (int d = kWidth * lane; t < T && d < D; d += kWidth * kLanes) {
    const Vec<Value, kWidth> x = load_vec<kWidth>(dout + row + d), y = load_vec<kWidth>(out + row + d);
    for (int i = 0; i < kWidth; i++) sum[i % 2] += to_float(x.v[i]) * to_float(y.v[i]);
  }
  const float total = lanes_sum<kLanes>(sum[0] + sum[1]);
  if (lane == 0 && t < T) delta[((size_t)b * H + h) * T + t] = total;
  const size_t block = ((size_t)b * gridDim.y + blockIdx.y) * gridDim.x + h, step = (size_t)gridDim.x * gridDim.y * gridDim.z * blockDim.x;
  for (size_t i = block * blockDim.x + threadIdx.x; i < n; i += step) counters[i] = 0;
}
template <class Value, int kLanes = kOnCpu ? 1 : 8>
void attention_delta(float* delta, const Value* dout, const Value* out, int B, int T, int H, int D, int* counters = nullptr, size_t n = 0) {
  const int threads = 256;
  const auto kernel = D % 8 == 0 ? attention_delta_kernel<Value, kLanes, 8> : attention_delta_kernel<Value, kLanes, 2>;
  launch(kernel, dim3(H, ceil_div(T, threads / kLanes), B), threads, 0, delta, dout, out, T, H, D, counters, n);
}

// ================================================================== simple version
// A thread owns kRows rows (queries; in dK and dV: keys) and keeps what belongs to them as arrays x[d][r], r = 0 .. kRows-1. Every
// step is then "the same for all r", with r innermost and contiguous, and no sum runs across r:
//   GPU   kRows = 1, kThreads = 64 threads a block: RowVector<1> is float, the lanes of the warp are the parallel rows
//   CPU   kRows = 32, kThreads = 1: RowVector<32> is a vector of the processor, and a barrier among one thread costs nothing
// The other side comes in tiles of kTileRows rows, as float, in shared memory. D is padded to a multiple of 4 with zeros.
//
// The vector type is written out because g++ does not vectorize the plain loops well: it keeps sums that are arrays in memory (19
// against 71 GFLOP/s: products of 32 x 32 x 32, one core of an AMD EPYC, g++ 12 -O3) and takes a float `a < b ? c : d` for a branch.
constexpr int kTileRows = 32;
template <int kRows> struct RowVector { using type = float; static constexpr int kWidth = 1; };     // kWidth: rows in one vector
#ifdef CPU_BUILD
#ifdef __AVX__
constexpr int kSimdBytes = 32;
#else
constexpr int kSimdBytes = 16;
#endif
typedef float SimdFloat __attribute__((vector_size(kSimdBytes), may_alias));
typedef unsigned SimdUint __attribute__((vector_size(kSimdBytes)));
template <> struct RowVector<32> { typedef SimdFloat type; static constexpr int kWidth = kSimdBytes / 4; };
#endif
template <int kRows> __device__ inline typename RowVector<kRows>::type& rows_at(float& x) {   // the vector that begins at x
  return *reinterpret_cast<typename RowVector<kRows>::type*>(&x);
}

#if defined(CPU_BUILD) && !defined(__clang__)
#define UNROLL _Pragma("GCC unroll 8")     // g++ keeps sum[][] in registers only if told to unroll
#else
#define UNROLL
#endif
// c[m][r] += sum_k a[m][k] b[k][r] for m < M, M a multiple of 4; a[m][k] is a[m * a_m + k * a_k]. All products below are this one.
template <int kRows>
__device__ inline void multiply_add(float (*c)[kRows], int M, const float* a, int a_m, int a_k, float (*b)[kRows], int K) {
  constexpr int kW = RowVector<kRows>::kWidth, kN = kRows == 1 ? 1 : 2;        // 4 x 2 vectors of sums at once
  for (int m = 0; m < M; m += 4, a += 4 * a_m)
    for (int r = 0; r < kRows; r += kW * kN) {
      typename RowVector<kRows>::type sum[4][kN];
      UNROLL for (int i = 0; i < 4; i++) UNROLL for (int n = 0; n < kN; n++) sum[i][n] = rows_at<kRows>(c[m + i][r + n * kW]);
      for (int k = 0; k < K; k++)
        UNROLL for (int i = 0; i < 4; i++) UNROLL for (int n = 0; n < kN; n++) sum[i][n] += a[i * a_m + k * a_k] * rows_at<kRows>(b[k][r + n * kW]);
      UNROLL for (int i = 0; i < 4; i++) UNROLL for (int n = 0; n < kN; n++) rows_at<kRows>(c[m + i][r + n * kW]) = sum[i][n];
    }
}
#undef UNROLL

// 2^x for x <= 127, NaN for NaN, 0 below 2^-126. For a vector: x = n + f, |f| <= 1/2; 2^f is the first seven terms of exp(f ln 2),
// relative error 1.2e-7; n goes into the exponent bits.
__device__ inline float exp2_of(float x) { return exp2f(x); }
#ifdef CPU_BUILD
inline SimdFloat exp2_of(SimdFloat x) {
  const SimdFloat zero = {}, lowest = zero - 126;
  const SimdFloat clamped = x < lowest ? lowest : x;
  const SimdFloat shifted = clamped + 12582912.0f;     // 1.5 * 2^23: the addition rounds to an integer, found in the low bits
  const SimdFloat y = (clamped - (shifted - 12582912.0f)) * kLn2;
  const SimdFloat power = 1 + y * (1 + y * (1 / 2.f + y * (1 / 6.f + y * (1 / 24.f + y * (1 / 120.f + y * (1 / 720.f))))));
  const SimdFloat result = (SimdFloat)((SimdUint)power + ((SimdUint)shifted << 23));
  return x < lowest ? zero : x == x ? result : x;      // (the bits of a NaN must not be added to: 0xffffffff would become finite)
}
#endif

// x[d][r] = factor * row row0 + r of `from`; zeros past row T and past column D
template <int kRows, class Value>
__device__ inline void load_own(float (*x)[kRows], const Value* from, size_t ld, int row0, int T, int D, float factor) {
  for (int r = 0; r < kRows; r++)
    for (int d = 0; d < round_up(D, 4); d++) x[d][r] = row0 + r < T && d < D ? factor * to_float(from[(row0 + r) * ld + d]) : 0;
}
// The same way back. Returns the largest of what it stored, as StoredMax has it.
template <int kRows, class Value>
__device__ inline uint32_t store_own(Value* to, size_t ld, const float (*x)[kRows], const float* factor, int row0, int T, int D) {
  StoredMax<Value, 1> most;
  for (int r = 0; r < kRows && row0 + r < T; r++)
    for (int d = 0; d < D; d++) {
      const Vec<Value, 1> y = {{from_float<Value>(x[d][r] * factor[r])}};
      store_vec(to + (row0 + r) * ld + d, y);
      most.add(y);
    }
  return most.bits();
}
// The block's threads together: tile[j][d] = row row0 + j of `from` as float, zeros past row T and past column D
template <int kThreads, class Value> __device__ inline void load_tile(float* tile, const Value* from, size_t ld, int row0, int T, int D) {
  const int padded = round_up(D, 4);
  for (int j = 0; j < kTileRows; j++) {
    const int columns = row0 + j < T ? D : 0;
    const Value* row = from + (row0 + j) * ld;
    for (int d = threadIdx.x; d < columns; d += kThreads) tile[j * padded + d] = to_float(row[d]);
    for (int d = columns + threadIdx.x; d < padded; d += kThreads) tile[j * padded + d] = 0;
  }
}
template <int kRows> __device__ inline void set_zero(float (*x)[kRows], int n) {
  for (int i = 0; i < n; i++) for (int r = 0; r < kRows; r++) x[i][r] = 0;
}

template <class Value, int kRows, int kThreads>
__global__ void __launch_bounds__(kThreads) attention_forward_simple_kernel(Value* out, float* lse, const Value* qkv, int T, int H, int KV, int D, float* amax) {
  __shared__ float k_tile[kTileRows * kMaxHeadSize], v_tile[kTileRows * kMaxHeadSize];
  const int first = ((int)gridDim.x - 1 - (int)blockIdx.x) * kRows * kThreads, h = blockIdx.y, b = blockIdx.z;   // long rows first
  const int row0 = first + threadIdx.x * kRows, Dp = round_up(D, 4);
  const HeadRows<const Value> x = head_rows(qkv, b, h, T, H, KV, D);
  using Vector = typename RowVector<kRows>::type;
  constexpr int kW = RowVector<kRows>::kWidth;
  auto at = [](float& y) -> Vector& { return rows_at<kRows>(y); };
  alignas(64) float q[kMaxHeadSize][kRows], o[kMaxHeadSize][kRows], s[kTileRows][kRows], max[kRows], sum[kRows], position[kRows];
  load_own<kRows>(q, x.q, x.ld, row0, T, D, kLog2E / sqrtf(D));
  set_zero<kRows>(o, Dp);
  for (int r = 0; r < kRows; r++) { max[r] = -FLT_MAX; sum[r] = 0; position[r] = row0 + r; }

  for (int key0 = 0; key0 < min(T, first + kRows * kThreads); key0 += kTileRows) {
    __syncthreads();                                       // everybody is done with the tile before
    load_tile<kThreads>(k_tile, x.k, x.ld, key0, T, D);
    load_tile<kThreads>(v_tile, x.v, x.ld, key0, T, D);
    __syncthreads();
    set_zero<kRows>(s, kTileRows);
    multiply_add<kRows>(s, kTileRows, k_tile, Dp, 1, q, D);                     // s[j][r] = k_j q_r, in units of log 2
    const bool diagonal = key0 + kTileRows - 1 > row0;
    for (int r = 0; r < kRows; r += kW) {
      const Vector minus_infinity = Vector{} - INFINITY;
      Vector new_max = at(max[r]);
      for (int j = 0; j < kTileRows; j++) {
        if (diagonal) at(s[j][r]) = at(position[r]) >= float(key0 + j) ? at(s[j][r]) : minus_infinity;
        new_max = at(s[j][r]) > new_max ? at(s[j][r]) : new_max;
      }
      const Vector factor = exp2_of(at(max[r]) - new_max);
      Vector new_sum = at(sum[r]) * factor;
      for (int j = 0; j < kTileRows; j++) {
        at(s[j][r]) = exp2_of(at(s[j][r]) - new_max);
        new_sum += at(s[j][r]);
      }
      for (int d = 0; d < Dp; d++) at(o[d][r]) *= factor;
      at(max[r]) = new_max;
      at(sum[r]) = new_sum;
    }
    multiply_add<kRows>(o, Dp, v_tile, 1, Dp, s, kTileRows);                    // o[d][r] += sum_j v_j[d] p_rj
  }
  for (int r = 0; r < kRows; r++) {
    if (row0 + r < T) lse[((size_t)b * H + h) * T + row0 + r] = max[r] * kLn2 + logf(sum[r]);
    sum[r] = 1 / sum[r];
  }
  const uint32_t most = store_own<kRows>(out + (size_t)b * T * H * D + h * D, (size_t)H * D, o, sum, row0, T, D);
  if (amax) raise_amax(amax, most);
}

// dQ: a thread owns queries and walks over the keys.
template <class Value, int kRows, int kThreads>
__global__ void __launch_bounds__(kThreads) attention_backward_q_simple_kernel(Value* dqkv, const Value* dout, const Value* qkv, const float* lse,
                                                                               const float* delta, int T, int H, int KV, int D) {
  __shared__ float k_tile[kTileRows * kMaxHeadSize], v_tile[kTileRows * kMaxHeadSize];
  const int first = ((int)gridDim.x - 1 - (int)blockIdx.x) * kRows * kThreads, h = blockIdx.y, b = blockIdx.z;
  const int row0 = first + threadIdx.x * kRows, Dp = round_up(D, 4);
  const HeadRows<const Value> x = head_rows(qkv, b, h, T, H, KV, D);
  const size_t stats = ((size_t)b * H + h) * T;
  alignas(64) float q[kMaxHeadSize][kRows], dO[kMaxHeadSize][kRows], dq[kMaxHeadSize][kRows];
  alignas(64) float s[kTileRows][kRows], dp[kTileRows][kRows], lse2[kRows], delta_own[kRows], position[kRows], scale[kRows];
  using Vector = typename RowVector<kRows>::type;
  auto at = [](float& y) -> Vector& { return rows_at<kRows>(y); };
  load_own<kRows>(q, x.q, x.ld, row0, T, D, kLog2E / sqrtf(D));
  load_own<kRows>(dO, dout + (size_t)b * T * H * D + h * D, (size_t)H * D, row0, T, D, 1);
  set_zero<kRows>(dq, Dp);
  for (int r = 0; r < kRows; r++) {
    lse2[r] = row0 + r < T ? lse[stats + row0 + r] * kLog2E : 0;
    delta_own[r] = row0 + r < T ? delta[stats + row0 + r] : 0;
    position[r] = row0 + r;
    scale[r] = 1 / sqrtf(D);
  }
  for (int key0 = 0; key0 < min(T, first + kRows * kThreads); key0 += kTileRows) {
    __syncthreads();
    load_tile<kThreads>(k_tile, x.k, x.ld, key0, T, D);
    load_tile<kThreads>(v_tile, x.v, x.ld, key0, T, D);
    __syncthreads();
    set_zero<kRows>(s, kTileRows);
    set_zero<kRows>(dp, kTileRows);
    multiply_add<kRows>(s, kTileRows, k_tile, Dp, 1, q, D);
    multiply_add<kRows>(dp, kTileRows, v_tile, Dp, 1, dO, D);
    for (int j = 0; j < kTileRows; j++)
      for (int r = 0; r < kRows; r += RowVector<kRows>::kWidth) {
        const Vector zero = {}, p = exp2_of(at(s[j][r]) - at(lse2[r]));
        at(s[j][r]) = at(position[r]) >= float(key0 + j) ? p * (at(dp[j][r]) - at(delta_own[r])) : zero;   // dS
      }
    multiply_add<kRows>(dq, Dp, k_tile, 1, Dp, s, kTileRows);
  }
  store_own<kRows>(head_rows(dqkv, b, h, T, H, KV, D).q, x.ld, dq, scale, row0, T, D);
}

// dK and dV: a thread owns keys and walks over the queries that see them, of every head of the group.
template <class Value, int kRows, int kThreads>
__global__ void __launch_bounds__(kThreads) attention_backward_kv_simple_kernel(Value* dqkv, const Value* dout, const Value* qkv, const float* lse,
                                                                                const float* delta, int T, int H, int KV, int D) {
  __shared__ float q_tile[kTileRows * kMaxHeadSize], do_tile[kTileRows * kMaxHeadSize], lse2[kTileRows], delta_tile[kTileRows];
  const int first = blockIdx.x * kRows * kThreads, kv = blockIdx.y, b = blockIdx.z, group = H / KV;
  const int row0 = first + threadIdx.x * kRows, Dp = round_up(D, 4);
  HeadRows<const Value> x = head_rows(qkv, b, kv * group, T, H, KV, D);
  alignas(64) float k[kMaxHeadSize][kRows], v[kMaxHeadSize][kRows], dk[kMaxHeadSize][kRows], dv[kMaxHeadSize][kRows];
  alignas(64) float s[kTileRows][kRows], dp[kTileRows][kRows], position[kRows], scale[kRows], one[kRows];
  using Vector = typename RowVector<kRows>::type;
  auto at = [](float& y) -> Vector& { return rows_at<kRows>(y); };
  load_own<kRows>(k, x.k, x.ld, row0, T, D, kLog2E / sqrtf(D));
  load_own<kRows>(v, x.v, x.ld, row0, T, D, 1);
  set_zero<kRows>(dk, Dp);
  set_zero<kRows>(dv, Dp);
  for (int r = 0; r < kRows; r++) { position[r] = row0 + r; scale[r] = 1 / sqrtf(D); one[r] = 1; }

  for (int h = kv * group; h < (kv + 1) * group; h++) {
    const Value* q_rows = head_rows(qkv, b, h, T, H, KV, D).q;
    const size_t stats = ((size_t)b * H + h) * T;
    for (int query0 = first / kTileRows * kTileRows; query0 < T; query0 += kTileRows) {
      __syncthreads();
      load_tile<kThreads>(q_tile, q_rows, x.ld, query0, T, D);
      load_tile<kThreads>(do_tile, dout + (size_t)b * T * H * D + h * D, (size_t)H * D, query0, T, D);
      for (int i = threadIdx.x; i < kTileRows; i += kThreads) {
        lse2[i] = query0 + i < T ? lse[stats + query0 + i] * kLog2E : 0;
        delta_tile[i] = query0 + i < T ? delta[stats + query0 + i] : 0;
      }
      __syncthreads();
      set_zero<kRows>(s, kTileRows);
      set_zero<kRows>(dp, kTileRows);
      multiply_add<kRows>(s, kTileRows, q_tile, Dp, 1, k, D);
      multiply_add<kRows>(dp, kTileRows, do_tile, Dp, 1, v, D);
      for (int i = 0; i < kTileRows; i++)
        for (int r = 0; r < kRows; r += RowVector<kRows>::kWidth) {
          const Vector zero = {}, p = at(position[r]) <= float(query0 + i) ? exp2_of(at(s[i][r]) - lse2[i]) : zero;
          at(s[i][r]) = p;
          at(dp[i][r]) = p * (at(dp[i][r]) - delta_tile[i]);                       // dS
        }
      multiply_add<kRows>(dv, Dp, do_tile, 1, Dp, s, kTileRows);
      multiply_add<kRows>(dk, Dp, q_tile, 1, Dp, dp, kTileRows);
    }
  }
  const HeadRows<Value> d = head_rows(dqkv, b, kv * group, T, H, KV, D);
  store_own<kRows>(d.k, d.ld, dk, scale, row0, T, D);
  store_own<kRows>(d.v, d.ld, dv, one, row0, T, D);
}

inline void check_attention_shape(int B, int T, int H, int KV, int D) {
  if (B < 1 || T < 1 || H < 1 || KV < 1 || H % KV || D % 2 || D < 8 || D > kMaxHeadSize)
    die("attention of B=%d T=%d H=%d KV=%d D=%d: the head size must be even, 8 to %d, and the key heads must divide the query heads",
        B, T, H, KV, D, kMaxHeadSize);
}
constexpr int kSimpleRows = kOnCpu ? 32 : 1, kSimpleThreads = kOnCpu ? 1 : 64;   // the tests also run <1, 64> on the CPU

template <class Value, int kRows = kSimpleRows, int kThreads = kSimpleThreads>
void attention_forward_simple(Value* out, float* lse, const Value* qkv, int B, int T, int H, int KV, int D, float* amax = nullptr) {
  check_attention_shape(B, T, H, KV, D);
  const dim3 grid(ceil_div(T, kRows * kThreads), H, B);
  launch(attention_forward_simple_kernel<Value, kRows, kThreads>, grid, kThreads, 0, out, lse, qkv, T, H, KV, D, amax);
}
template <class Value, int kRows = kSimpleRows, int kThreads = kSimpleThreads>
void attention_backward_simple(Value* dqkv, const Value* dout, const Value* qkv, const Value* out, const float* lse, float* delta,
                               int B, int T, int H, int KV, int D) {
  check_attention_shape(B, T, H, KV, D);
  attention_delta(delta, dout, out, B, T, H, D);
  const int tiles = ceil_div(T, kRows * kThreads);
  launch(attention_backward_kv_simple_kernel<Value, kRows, kThreads>, dim3(tiles, KV, B), kThreads, 0, dqkv, dout, qkv, lse, delta, T, H, KV, D);
  launch(attention_backward_q_simple_kernel<Value, kRows, kThreads>, dim3(tiles, H, B), kThreads, 0, dqkv, dout, qkv, lse, delta, T, H, KV, D);
}

// ================================================================== tensor core version
// Both sides of a product pass through shared memory: the tile of the other side in two stages, cp.async fills one while the warps read
// the other. A warp owns 16 kM rows. A fragment that one ldmatrix fetches serves two mma for each 16 rows, so kM = 2 halves what is read
// from shared memory, which is the limit; registers allow it where the results of a row take no more than 128 of them.
// Scores, probabilities and dS stay in registers; a result of one product is rounded in place into an operand of the next.
// Tiles are kD = 64 or 128 columns wide, zeros behind D: a head size between is computed as the next of them. A row of a tile has 8
// elements more: an odd number of 16-byte units, so the 8 rows that ldmatrix reads at once lie in different banks.
template <int kD> constexpr int kMmaStride = kD + 8;                                 // elements from row to row of a tile

// Starts the copy of kRows rows of `from`, row0 on, into a tile; zeros past row T and column D. Almost every tile lies inside: then a
// thread keeps its column, and a piece costs the copy and one 64-bit addition.
template <int kD, int kRows, int kThreads> __device__ inline void start_tile(bf16* tile, const bf16* from, size_t ld, int row0, int T, int D) {
  constexpr int kPieces = kD / 8, kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kRows % kStep == 0, "every thread copies the same number of pieces");
  if (D == kD && row0 + kRows <= T) {
    const int r = threadIdx.x / kPieces, d = threadIdx.x % kPieces * 8;
    const bf16* p = from + (row0 + r) * ld + d;
    bf16* to = tile + r * kMmaStride<kD> + d;
#pragma unroll
    for (int i = 0; i < kRows / kStep; i++, p += kStep * ld) cp_async<16>(to + i * kStep * kMmaStride<kD>, p, true);
    return;
  }
  auto copy = [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value, kElements = kBytes / 2, kInRow = kD / kElements;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kInRow; i += kThreads) {
      const int r = i / kInRow, d = i % kInRow * kElements;
      const bool inside = row0 + r < T && d < D;
      cp_async<kBytes>(tile + r * kMmaStride<kD> + d, inside ? from + (row0 + r) * ld + d : from, inside);
    }
  };
  if (D % 8 == 0) copy(std::integral_constant<int, 16>());
  else copy(std::integral_constant<int, 4>());            // rows are then aligned to 4 bytes only
}

// Which row and column of a 16 x 16 piece of a tile this lane names to ldmatrix_x4, so that the four registers are an A fragment (or,
// transposed, the B fragments of columns 0-7 and 8-15), or the B fragments of rows 0-7 and 8-15 (plain).
template <int kD> __device__ inline int a_offset() { return threadIdx.x % 16 * kMmaStride<kD> + threadIdx.x % 32 / 16 * 8; }
template <int kD> __device__ inline int b_offset() {
  const int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * kMmaStride<kD> + lane / 8 % 2 * 8;
}
// The A fragments of columns 16 k on of 16 kM rows of a tile
template <int kD, int kM> __device__ inline void load_fragments(uint32_t (&a)[kM][4], const bf16* rows, int k) {
#pragma unroll
  for (int m = 0; m < kM; m++) ldmatrix_x4(a[m], rows + m * 16 * kMmaStride<kD> + a_offset<kD>() + 16 * k);
}

// c[kM][16 x 8 kN8] = A times the transpose of 8 kN8 rows of a tile. fragments(k, a): the kM fragments of columns 16 k on of A.
template <int kD, int kM, int kN8, class Get>
__device__ inline void product_transposed(float (&c)[kM][kN8][4], Get fragments, const bf16* rows) {
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int n = 0; n < kN8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) c[m][n][i] = 0;
#pragma unroll
  for (int k = 0; k < kD / 16; k++) {
    uint32_t a[kM][4];
    fragments(k, a);
#pragma unroll
    for (int n = 0; n < kN8 / 2; n++) {
      uint32_t b[4];
      ldmatrix_x4(b, rows + 16 * n * kMmaStride<kD> + b_offset<kD>() + 16 * k);
#pragma unroll
      for (int m = 0; m < kM; m++) {
        mma_m16n8k16_bf16(c[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16_bf16(c[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}
// c[kM][16 x kColumns] += A[16 x 16] times 16 rows of a tile
template <int kD, int kColumns, int kM>
__device__ inline void product_rows(float (&c)[kM][kColumns / 8][4], const uint32_t (&a)[kM][4], const bf16* rows) {
#pragma unroll
  for (int n = 0; n < kColumns / 16; n++) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, rows + a_offset<kD>() + 16 * n);
#pragma unroll
    for (int m = 0; m < kM; m++) {
      mma_m16n8k16_bf16(c[m][2 * n], a[m], b[0], b[1]);
      mma_m16n8k16_bf16(c[m][2 * n + 1], a[m], b[2], b[3]);
    }
  }
}
// A 16 x 16 result, rounded, as the A fragment of the next product
__device__ inline void pack_fragment(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_bf16(left[0], left[1]);
  a[1] = pack_bf16(left[2], left[3]);
  a[2] = pack_bf16(right[0], right[1]);
  a[3] = pack_bf16(right[2], right[3]);
}
// Writes 16 rows from row0 on and kColumns columns from column0 on: row g times factor0, row g + 8 times factor1. Returns the largest of what
// this thread stored, as StoredMax has it.
template <int kColumns>
__device__ inline uint32_t store_block(bf16* to, size_t ld, const float (&c)[kColumns / 8][4], float factor0, float factor1, int row0, int column0,
                                       int T, int D) {
  StoredMax<bf16, 2> most;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row0 + threadIdx.x % 32 / 4 + 8 * half;
    const float factor = half ? factor1 : factor0;
    if (row >= T) continue;
#pragma unroll
    for (int n = 0; n < kColumns / 8; n++) {
      const int d = column0 + 8 * n + threadIdx.x % 4 * 2;
      if (d >= D) continue;
      const Vec<bf16, 2> y = {{to_bf16(c[n][2 * half] * factor), to_bf16(c[n][2 * half + 1] * factor)}};
      store_vec(to + row * ld + d, y);
      most.add(y);
    }
  }
  return most.bits();
}
// What a block may use of shared memory: 227 KB on H100 and B200, 163 KB on A100, 99 KB on GeForce.
inline size_t shared_memory_limit() {
#ifdef CPU_BUILD
  return 227 * 1024;
#else
  static size_t n = [] { int v = 0; CUDA_CHECK(cudaDeviceGetAttribute(&v, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)); return (size_t)v; }();
  return n - 1024;                                                              // what a kernel declares itself
#endif
}

// ------------------------------------------------------------------ forward
// A block is 4 warps of 32 queries and walks over tiles of kN keys.
template <int kD_, int kN_> struct ForwardTiles {
  static constexpr int kD = kD_, kN = kN_, kM = 2, kThreads = 128, kRows = 128, kTile = kN * kMmaStride<kD>;
  static constexpr bool kQRegs = kD == 64;             // queries as fragments in registers, else fetched again for each tile of keys
  static constexpr int kQTile = kQRegs ? 0 : kRows * kMmaStride<kD>;           // in registers: they pass through the second stage
  static constexpr size_t kShared = (4 * kTile + kQTile) * sizeof(bf16);
  static_assert(!kQRegs || 2 * kN >= kRows, "the queries fit into the second stage");
};
// A row's sums are rescaled only when its maximum has grown by a factor of more than 2^8: exp(s - m) with the m of before is then at most
// 2^8, and no precision is lost in floating point. Only that the largest probability is no longer the 1 that rounding to bf16 leaves alone.
constexpr float kMaxGrowth = 8;

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2) attention_forward_mma_kernel(bf16* out, float* lse, const bf16* qkv, int T, int H, int KV, int D, float* amax) {
  constexpr int kD = C::kD, kM = C::kM, kN = C::kN;
  DYNAMIC_SHARED(bf16, shared);
  const int first = ((int)gridDim.x - 1 - (int)blockIdx.x) * C::kRows, h = blockIdx.y, b = blockIdx.z;      // long rows first
  const int warp = threadIdx.x / 32, row0 = first + warp * 16 * kM, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const HeadRows<const bf16> x = head_rows(qkv, b, h, T, H, KV, D);
  const float scale = kLog2E / sqrtf(D);
  const int tiles = ceil_div(min(T, first + C::kRows), kN);
  bf16* q_tile = shared + (C::kQRegs ? 2 : 4) * C::kTile;
  const bf16* q_rows = q_tile + warp * 16 * kM * kMmaStride<kD>;
  auto start_copy = [&](int tile) {
    bf16* stage = shared + tile % 2 * 2 * C::kTile;
    start_tile<kD, kN, C::kThreads>(stage, x.k, x.ld, tile * kN, T, D);
    start_tile<kD, kN, C::kThreads>(stage + C::kTile, x.v, x.ld, tile * kN, T, D);
    cp_async_commit();
  };
  start_tile<kD, C::kRows, C::kThreads>(q_tile, x.q, x.ld, first, T, D);
  cp_async_commit();
  start_copy(0);
  uint32_t q[C::kQRegs ? kD / 16 : 1][kM][4];
  if constexpr (C::kQRegs) {
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kD / 16; k++) load_fragments<kD, kM>(q[k], q_rows, k);
  }
  auto queries = [&](int k, uint32_t (&a)[kM][4]) {
    if constexpr (C::kQRegs) {
#pragma unroll
      for (int i = 0; i < 4 * kM; i++) a[i / 4][i % 4] = q[k][i / 4][i % 4];
    } else load_fragments<kD, kM>(a, q_rows, k);
  };

  float o[kM][kD / 8][4] = {}, max[kM][2], sum[kM][2] = {};                    // [2]: rows g and g + 8. sum: this lane's columns only
#pragma unroll
  for (int m = 0; m < kM; m++) max[m][0] = max[m][1] = -FLT_MAX;
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();                             // this tile is here, and everybody is done with the stage that is filled next
    if (tile + 1 < tiles) start_copy(tile + 1);
    const int key0 = tile * kN;
    if (key0 >= row0 + 16 * kM) continue;        // all keys lie after this warp's queries
    const bf16 *k_rows = shared + tile % 2 * 2 * C::kTile, *v_rows = k_rows + C::kTile;
    float s[kM][kN / 8][4];
    product_transposed<kD, kM, kN / 8>(s, queries, k_rows);
    if (key0 + kN - 1 > row0) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kN / 8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (key0 + 8 * n + 2 * t + i % 2 > row0 + 16 * m + g + i / 2 * 8) s[m][n][i] = -INFINITY;
    }
    float new_max[kM][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float y = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kN / 8; n++) y = fmaxf(y, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        y = fmaxf(y, __shfl_xor_sync(0xffffffffu, y, 1));                      // the four lanes that share a row
        y = fmaxf(y, __shfl_xor_sync(0xffffffffu, y, 2));
        new_max[m][half] = y;
        grown = grown || (y - max[m][half]) * scale > kMaxGrowth;
      }
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float y = fmaxf(max[m][half], new_max[m][half]), factor = ex2_approx((max[m][half] - y) * scale);
          max[m][half] = y;
          sum[m][half] *= factor;
#pragma unroll
          for (int n = 0; n < kD / 8; n++) { o[m][n][2 * half] *= factor; o[m][n][2 * half + 1] *= factor; }
        }
    }
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float shift = max[m][half] * scale;
#pragma unroll
        for (int n = 0; n < kN / 8; n++)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) {
            s[m][n][i] = ex2_approx(s[m][n][i] * scale - shift);
            sum[m][half] += s[m][n][i];
          }
      }
#pragma unroll
    for (int c = 0; c < kN / 16; c++) {
      uint32_t p[kM][4];
#pragma unroll
      for (int m = 0; m < kM; m++) pack_fragment(p[m], s[m][2 * c], s[m][2 * c + 1]);
      product_rows<kD, kD, kM>(o, p, v_rows + 16 * c * kMmaStride<kD>);
    }
  }
  uint32_t most = 0;
#pragma unroll
  for (int m = 0; m < kM; m++) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = sum[m][half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      factor[half] = 1 / total;
      const int row = row0 + 16 * m + g + 8 * half;
      if (t == 0 && row < T) lse[((size_t)b * H + h) * T + row] = max[m][half] * scale * kLn2 + logf(total);
    }
    most = ::max(most, store_block<kD>(out + (size_t)b * T * H * D + h * D, (size_t)H * D, o[m], factor[0], factor[1], row0 + 16 * m, 0, T, D));
  }
  if (!amax) return;
  most = lanes_most<32>(most);
  if (threadIdx.x % 32 == 0) raise_amax(amax, most);
}
template <class C> void attention_forward_tiles(bf16* out, float* lse, const bf16* qkv, int B, int T, int H, int KV, int D, float* amax = nullptr) {
  check_attention_shape(B, T, H, KV, D);
  launch(attention_forward_mma_kernel<C>, dim3(ceil_div(T, C::kRows), H, B), C::kThreads, C::kShared, out, lse, qkv, T, H, KV, D, amax);
}
inline void attention_forward_mma(bf16* out, float* lse, const bf16* qkv, int B, int T, int H, int KV, int D, float* amax = nullptr,
                                  size_t shared = shared_memory_limit()) {
  using Small = ForwardTiles<64, 64>;
  using Large = ForwardTiles<128, 64>;
  using LargeLess = ForwardTiles<128, 32>;                                     // 70 KB of shared memory instead of 104
  if (D <= Small::kD) attention_forward_tiles<Small>(out, lse, qkv, B, T, H, KV, D, amax);
  else if (Large::kShared <= shared) attention_forward_tiles<Large>(out, lse, qkv, B, T, H, KV, D, amax);
  else attention_forward_tiles<LargeLess>(out, lse, qkv, B, T, H, KV, D, amax);
}

// ------------------------------------------------------------------ backward
// A block owns kN keys and walks over the queries that see them, of every head of the group; kS warps own 16 kM of these keys and hold
// their dK and dV. Keys are rows from the start (S^T = K Q^T), so P^T and dS^T are at hand as operands of dV and dK without a
// transposition. For dQ the warps share dS through shared memory; a warp computes 16 kDqM rows of it.
// kS = 2: for D = 128 the sums of dK and dV of 32 keys are too many registers for a warp. So two warps share 32 keys: each computes S and dP
// of half of the queries of a tile and sums half of the columns of dK and dV, and takes the other half of P and dS from shared memory.
// With kM = 2 a fragment of Q or dO serves two mma again.
//
// dQ of a query sums over keys, so over blocks: each block adds its part into a float buffer once the block of the next keys has added
// its own (a counter for each warp's part says how many have). So the order of the sum is fixed: the keys of the diagonal first, the first
// keys last; and the last one writes dQ. Blocks of a head start together, the block of keys j sees its queries j, j + 1, ...: when it comes
// to query tile i, the block of keys j + 1 has left it one step before. Nobody waits in the ideal case. A block waits only for blocks that
// drew an earlier ticket, so for blocks that run or have ended: no deadlock, whatever order the machine starts blocks in.
template <int kD_, int kWarps_, int kM_, int kS_, int kQ_> struct BackwardTiles {
  static constexpr int kD = kD_, kWarps = kWarps_, kM = kM_, kS = kS_, kQ = kQ_;     // kQ: queries of a tile
  static constexpr int kThreads = 32 * kWarps, kMinBlocks = 8 / kWarps, kN = 16 * kM * kWarps / kS;
  static constexpr int kDsStride = kQ + 8;
  static constexpr int kOwn = kN * kMmaStride<kD>, kTile = kQ * kMmaStride<kD>, kDsTile = kN * kDsStride;
  static constexpr size_t kShared = (2 * kOwn + 4 * kTile + (kS > 1 ? 2 : 1) * kDsTile) * sizeof(bf16) + 4 * kQ * sizeof(float);
  static constexpr int kDqM = kD / 64, kRowGroups = kQ / (16 * kDqM), kColumns = kD / (kWarps / kRowGroups);   // dQ: 16 kDqM x kColumns a warp
  static_assert(kWarps % kRowGroups == 0 && kColumns % 16 == 0 && kN % kQ == 0 && kQ % (16 * kS) == 0, "every warp has the same to do");
  static_assert(2 * kQ <= kThreads, "a thread copies one number of the statistics");
};
// One piece of memory: delta [B, H, T], the sums of dQ [B, H, query tiles, kQ, kD], how many blocks have added to each warp's part of a
// tile [B, H, query tiles, warps], and the next ticket.
struct BackwardScratch { float *delta, *dq; int* done; size_t counters; int* ticket; size_t floats; };
template <class C> BackwardScratch backward_scratch(float* scratch, int B, int T, int H) {
  const size_t heads = (size_t)B * H, tiles = ceil_div(T, C::kQ), delta = round_up(heads * T, (size_t)4), dq = heads * tiles * C::kQ * C::kD;
  const size_t counters = heads * tiles * C::kWarps + 1;
  int* done = (int*)(scratch + delta + dq);
  return {scratch, scratch + delta, done, counters, done + counters - 1, delta + dq + counters};
}
__device__ inline int load_acquire(const int* p) {
#ifdef CPU_BUILD
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#else
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#endif
}
__device__ inline void store_release(int* p, int v) {
#ifdef CPU_BUILD
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
#endif
}
__device__ inline Vec<float, 4> load_l2(const float* p) {      // another block has written it: not from L1
#ifdef CPU_BUILD
  return *(const Vec<float, 4>*)p;
#else
  Vec<float, 4> x;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.v[0]), "=f"(x.v[1]), "=f"(x.v[2]), "=f"(x.v[3]) : "l"(p) : "memory");
  return x;
#endif
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
attention_backward_mma_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse, BackwardScratch scratch, int T, int H, int KV, int D) {
  constexpr int kD = C::kD, kM = C::kM, kQ = C::kQ, kN = C::kN, kS = C::kS, kOwnQ = kQ / kS, kOwnD = kD / kS;
  DYNAMIC_SHARED(bf16, shared);
  __shared__ int drawn;
  bf16 *k_tile = shared, *v_tile = k_tile + C::kOwn, *q_tiles = v_tile + C::kOwn, *do_tiles = q_tiles + 2 * C::kTile;
  bf16 *ds_tile = do_tiles + 2 * C::kTile, *p_tile = ds_tile + C::kDsTile;     // [kN][kQ]; P only if warps share keys
  float* stats = (float*)(p_tile + (kS > 1 ? C::kDsTile : 0));                 // [stage][lse, delta][kQ]
  if (threadIdx.x == 0) drawn = atomicAdd(scratch.ticket, 1);
  __syncthreads();
  const int blocks = ceil_div(T, kN), group = H / KV;
  const int j = blocks - 1 - drawn % blocks, kv = drawn / blocks % KV, b = drawn / blocks / KV, first = j * kN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = first + warp / kS * 16 * kM, g = lane / 4, t = lane % 4;
  const HeadRows<const bf16> x = head_rows(qkv, b, kv * group, T, H, KV, D);
  const float scale = kLog2E / sqrtf(D);
  const int all_tiles = ceil_div(T, kQ), first_tile = first / kQ, steps = (all_tiles - first_tile) * group;
  int copy_head = 0, copy_tile = first_tile;                                   // what is copied next
  auto start_copy = [&](int stage) {
    const int h = kv * group + copy_head, query0 = copy_tile * kQ;
    start_tile<kD, kQ, C::kThreads>(q_tiles + stage * C::kTile, x.q + copy_head * D, x.ld, query0, T, D);
    start_tile<kD, kQ, C::kThreads>(do_tiles + stage * C::kTile, dout + (size_t)b * T * H * D + h * D, (size_t)H * D, query0, T, D);
    if (threadIdx.x < 2 * kQ) {
      const int i = threadIdx.x % kQ;
      const float* from = (threadIdx.x < kQ ? lse : scratch.delta) + ((size_t)b * H + h) * T;
      cp_async<4>(stats + stage * 2 * kQ + threadIdx.x, query0 + i < T ? from + query0 + i : from, query0 + i < T);
    }
    cp_async_commit();
    if (++copy_tile == all_tiles) { copy_tile = first_tile; copy_head++; }
  };
  start_tile<kD, kN, C::kThreads>(k_tile, x.k, x.ld, first, T, D);
  start_tile<kD, kN, C::kThreads>(v_tile, x.v, x.ld, first, T, D);
  start_copy(0);
  // what is this warp's: keys from row `own` of the tile on, of S the queries from own_q on, of dK and dV the columns from own_d on
  const int own = warp / kS * 16 * kM, own_q = warp % kS * kOwnQ, own_d = warp % kS * kOwnD;
  auto keys = [&](int k, uint32_t (&a)[kM][4]) { load_fragments<kD, kM>(a, k_tile + own * kMmaStride<kD>, k); };
  auto values = [&](int k, uint32_t (&a)[kM][4]) { load_fragments<kD, kM>(a, v_tile + own * kMmaStride<kD>, k); };

  float dk[kM][kOwnD / 8][4] = {}, dv[kM][kOwnD / 8][4] = {};
  const int dq_row = warp % C::kRowGroups * 16 * C::kDqM, dq_column = warp / C::kRowGroups * C::kColumns;     // the part of dQ of this warp
  constexpr int kDqN = C::kColumns / 8, kPart = C::kDqM * kDqN;                // fragments of that part, four numbers each
  int tile = first_tile, head = 0;
  int* release = nullptr;                        // the counter to be set when the sums stored in the step before can be seen by all
  int release_value = 0;
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    __syncthreads();
    const int stage = step % 2, query0 = tile * kQ, own_query0 = query0 + own_q;
    if (step + 1 < steps) start_copy(stage ^ 1);
    const bf16 *q_rows = q_tiles + stage * C::kTile, *do_rows = do_tiles + stage * C::kTile;
    const float* stat = stats + stage * 2 * kQ;
    float s[kM][kOwnQ / 8][4], dp[kM][kOwnQ / 8][4];                           // rows: keys, columns: queries
    product_transposed<kD, kM, kOwnQ / 8>(s, keys, q_rows + own_q * kMmaStride<kD>);
#pragma unroll
    for (int n = 0; n < kOwnQ / 8; n++) {
      const Vec<float, 2> l = load_vec<2>(stat + own_q + 8 * n + 2 * t);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[m][n][i] = ex2_approx(s[m][n][i] * scale - l.v[i % 2] * kLog2E);
    }
    product_transposed<kD, kM, kOwnQ / 8>(dp, values, do_rows + own_q * kMmaStride<kD>);
    if (own_query0 < row0 + 16 * kM - 1) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kOwnQ / 8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (row0 + 16 * m + g + i / 2 * 8 > own_query0 + 8 * n + 2 * t + i % 2) s[m][n][i] = 0;
    }
    uint32_t p[kOwnQ / 16][kM][4], ds[kOwnQ / 16][kM][4];
#pragma unroll
    for (int c = 0; c < kOwnQ / 16; c++)
#pragma unroll
      for (int m = 0; m < kM; m++) {
        pack_fragment(p[c][m], s[m][2 * c], s[m][2 * c + 1]);
#pragma unroll
        for (int n = 2 * c; n < 2 * c + 2; n++) {
          const Vec<float, 2> delta = load_vec<2>(stat + kQ + own_q + 8 * n + 2 * t);
#pragma unroll
          for (int i = 0; i < 4; i++) dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - delta.v[i % 2]);
        }
        pack_fragment(ds[c][m], dp[m][2 * c], dp[m][2 * c + 1]);
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const int at = (own + 16 * m + g + r % 2 * 8) * C::kDsStride + own_q + 16 * c + r / 2 * 8 + 2 * t;
          *(uint32_t*)(ds_tile + at) = ds[c][m][r];
          if (kS > 1) *(uint32_t*)(p_tile + at) = p[c][m][r];
        }
      }
#pragma unroll
    for (int c = 0; c < kOwnQ / 16; c++) product_rows<kD, kOwnD, kM>(dv, p[c], do_rows + (own_q + 16 * c) * kMmaStride<kD> + own_d);
    if (release && lane == 0) store_release(release, release_value);
    __syncthreads();                             // dS and P are complete

    float dq[C::kDqM][kDqN][4] = {};
#pragma unroll
    for (int part = 0; part < kN / kQ; part++)           // one loop would be the same, but then ptxas 13.0 spills five registers more
#pragma unroll
      for (int c = part * kQ / 16; c < (part + 1) * kQ / 16; c++) {
        uint32_t a[C::kDqM][4];                  // stored by keys, read by queries
#pragma unroll
        for (int m = 0; m < C::kDqM; m++)
          ldmatrix_x4_trans(a[m], ds_tile + (16 * c + lane / 16 * 8 + lane % 8) * C::kDsStride + dq_row + 16 * m + lane / 8 % 2 * 8);
        product_rows<kD, C::kColumns, C::kDqM>(dq, a, k_tile + 16 * c * kMmaStride<kD> + dq_column);
      }
    const int before = query0 / kN - j, h = kv * group + head;                 // blocks that have added to these queries before this one
    const size_t part = ((size_t)(b * H + h) * all_tiles + tile) * C::kWarps + warp;
    float* sums = scratch.dq + part * kPart * 128 + 4 * lane;
    Vec<float, 4> old[kPart];
    if (before) {
      if (lane == 0) while (load_acquire(scratch.done + part) < before) {}
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPart; i++) old[i] = load_l2(sums + i * 128);        // they arrive behind the next product
    }
#pragma unroll
    for (int c = 0; c < kOwnQ / 16; c++) product_rows<kD, kOwnD, kM>(dk, ds[c], q_rows + (own_q + 16 * c) * kMmaStride<kD> + own_d);
#pragma unroll
    for (int other = 1; other < kS; other++)
#pragma unroll
      for (int c = 0; c < kOwnQ / 16; c++) {     // the queries that the other warps of these keys have computed
        const int query = (warp + other) % kS * kOwnQ + 16 * c;
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; m++) ldmatrix_x4(a[m], p_tile + (own + 16 * m + lane % 16) * C::kDsStride + query + lane / 16 * 8);
        product_rows<kD, kOwnD, kM>(dv, a, do_rows + query * kMmaStride<kD> + own_d);
#pragma unroll
        for (int m = 0; m < kM; m++) ldmatrix_x4(a[m], ds_tile + (own + 16 * m + lane % 16) * C::kDsStride + query + lane / 16 * 8);
        product_rows<kD, kOwnD, kM>(dk, a, q_rows + query * kMmaStride<kD> + own_d);
      }
    auto fragment = [&](int i) -> float (&)[4] { return dq[i / kDqN][i % kDqN]; };
    if (before) {
#pragma unroll
      for (int i = 0; i < 4 * kPart; i++) fragment(i / 4)[i % 4] += old[i / 4].v[i % 4];
    }
    release = nullptr;
    if (j > 0) {
#pragma unroll
      for (int i = 0; i < kPart; i++) store_vec(sums + i * 128, Vec<float, 4>{{fragment(i)[0], fragment(i)[1], fragment(i)[2], fragment(i)[3]}});
      __syncwarp();
      release = scratch.done + part;
      release_value = before + 1;
    } else {
      const HeadRows<bf16> d = head_rows(dqkv, b, h, T, H, KV, D);
#pragma unroll
      for (int m = 0; m < C::kDqM; m++)
        store_block<C::kColumns>(d.q, d.ld, dq[m], scale * kLn2, scale * kLn2, query0 + dq_row + 16 * m, dq_column, T, D);
    }
    if (++tile == all_tiles) { tile = first_tile; head++; }
  }
  if (release && lane == 0) store_release(release, release_value);
  const HeadRows<bf16> d = head_rows(dqkv, b, kv * group, T, H, KV, D);
#pragma unroll
  for (int m = 0; m < kM; m++) {
    store_block<kOwnD>(d.k, d.ld, dk[m], scale * kLn2, scale * kLn2, row0 + 16 * m, own_d, T, D);
    store_block<kOwnD>(d.v, d.ld, dv[m], 1, 1, row0 + 16 * m, own_d, T, D);
  }
}
template <class C> void attention_backward_tiles(bf16* dqkv, const bf16* dout, const bf16* qkv, const bf16* out, const float* lse, float* scratch,
                                                 int B, int T, int H, int KV, int D) {
  check_attention_shape(B, T, H, KV, D);
  const BackwardScratch s = backward_scratch<C>(scratch, B, T, H);
  attention_delta(s.delta, dout, out, B, T, H, D, s.done, s.counters);
  launch(attention_backward_mma_kernel<C>, ceil_div(T, C::kN) * KV * B, C::kThreads, C::kShared, dqkv, dout, qkv, lse, s, T, H, KV, D);
}
// f(BackwardTiles): the tiles for head size D
template <class F> void with_backward_tiles(int D, size_t shared, F f) {
  using Small = BackwardTiles<64, 4, 2, 1, 32>;
  using Large = BackwardTiles<128, 8, 2, 2, 64>;
  using LargeLess = BackwardTiles<128, 4, 1, 1, 32>;                           // 76 KB of shared memory instead of 173: A100, GeForce
  if (D <= Small::kD) f(Small());
  else if (Large::kShared <= shared) f(Large());
  else f(LargeLess());
}
inline void attention_backward_mma(bf16* dqkv, const bf16* dout, const bf16* qkv, const bf16* out, const float* lse, float* scratch,
                                   int B, int T, int H, int KV, int D, size_t shared = shared_memory_limit()) {
  with_backward_tiles(D, shared, [&](auto tiles) { attention_backward_tiles<decltype(tiles)>(dqkv, dout, qkv, out, lse, scratch, B, T, H, KV, D); });
}
inline size_t attention_backward_mma_scratch(int B, int T, int H, int D, size_t shared = shared_memory_limit()) {
  size_t floats = 0;
  with_backward_tiles(D, shared, [&](auto tiles) { floats = backward_scratch<decltype(tiles)>(nullptr, B, T, H).floats; });
  return floats;
}

// ================================================================== what the model calls
// Shapes: see the top of the file. Stop with an error for a head size that is not supported. amax: null, or takes max|out| (amax.cuh).
inline void attention_forward(floatX* out, float* lse, const floatX* qkv, int B, int T, int H, int KV, int D, float* amax = nullptr) {
#if defined(CPU_BUILD) || defined(FP32)
  attention_forward_simple(out, lse, qkv, B, T, H, KV, D, amax);
#else
  attention_forward_mma(out, lse, qkv, B, T, H, KV, D, amax);
#endif
}
// Floats of memory that attention_backward needs for a while; enough for every smaller B and T too.
inline size_t attention_backward_scratch(int B, int T, int H, [[maybe_unused]] int D) {
#if defined(CPU_BUILD) || defined(FP32)
  return (size_t)B * H * T;
#else
  return attention_backward_mma_scratch(B, T, H, D);
#endif
}
// scratch: attention_backward_scratch() floats, aligned to 16 bytes
inline void attention_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out, const float* lse, float* scratch,
                               int B, int T, int H, int KV, int D) {
#if defined(CPU_BUILD) || defined(FP32)
  attention_backward_simple(dqkv, dout, qkv, out, lse, scratch, B, T, H, KV, D);
#else
  attention_backward_mma(dqkv, dout, qkv, out, lse, scratch, B, T, H, KV, D);
#endif
}
