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
// Cost      One product over the causal half is T^2 D flops (2 T^2 D / 2) for each b and h. Forward: 2 products. Backward: 7, though
//           the formulas above need only 5 (S, dP, dV, dK, dQ). dK and dV sum over queries, dQ over keys: one kernel that did all
//           would have to add into dQ from many blocks at once, with float atomics, in an order that changes from run to run. We
//           promise the same bits for the same seed, so there are two kernels, and S and dP are computed twice.
//           Bytes, each matrix once: forward (2 H + 2 KV) D elements a token, backward (5 H + 6 KV) D (the second kernel reads Q, K,
//           V and dO again, mostly from L2): T / 4 flops a byte forward without GQA, so the flops dominate from T of about 600 on (H100).
// Error     against double, normal inputs, rms(error) / rms(result): float 3e-7 forward, 6e-7 backward; bf16 2e-3 and 4e-3. The mma
//           version rounds P and dS to bf16 before they are multiplied, as every tensor core implementation does; sums are float.
//           delta comes from the rounded O: with keys of size 500 to 1000 dQ in bf16 was off by 3e-2 to 8e-2 (float: 4e-5).
//
// Two versions. `simple` is the algorithm and nothing else; it works for float and bf16 and is what trains on a CPU. `mma` is for
// bf16 on tensor cores (sm_80 on). attention_forward and attention_backward at the end choose.
#pragma once
#include <type_traits>
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

// delta[i] = sum_d dO[i][d] O[i][d], needed by both backward versions. kLanes lanes a row.
template <class Value, int kLanes>
__global__ void attention_delta_kernel(float* delta, const Value* dout, const Value* out, int T, int H, int D, int rows) {
  const int row = (int)((blockIdx.x * (size_t)blockDim.x + threadIdx.x) / kLanes), lane = threadIdx.x % kLanes;   // row: (b, t, h)
  if (row >= rows) return;
  float sum[2] = {0, 0};
  for (int d = 2 * lane; d < D; d += 2 * kLanes) {
    const Vec<Value, 2> x = load_vec<2>(dout + (size_t)row * D + d), y = load_vec<2>(out + (size_t)row * D + d);
    for (int i = 0; i < 2; i++) sum[i] += to_float(x.v[i]) * to_float(y.v[i]);
  }
  const float total = lanes_sum<kLanes>(sum[0] + sum[1]);
  const int h = row % H, t = row / H % T, b = row / H / T;
  if (lane == 0) delta[((size_t)b * H + h) * T + t] = total;
}
template <class Value, int kLanes = kRowLanes> void attention_delta(float* delta, const Value* dout, const Value* out, int B, int T, int H, int D) {
  const int rows = B * T * H, threads = 128;
  launch(attention_delta_kernel<Value, kLanes>, ceil_div(rows, threads / kLanes), threads, 0, delta, dout, out, T, H, D, rows);
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
template <int kRows, class Value>
__device__ inline void store_own(Value* to, size_t ld, const float (*x)[kRows], const float* factor, int row0, int T, int D) {
  for (int r = 0; r < kRows && row0 + r < T; r++)
    for (int d = 0; d < D; d++) to[(row0 + r) * ld + d] = from_float<Value>(x[d][r] * factor[r]);
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
__global__ void __launch_bounds__(kThreads) attention_forward_simple_kernel(Value* out, float* lse, const Value* qkv, int T, int H, int KV, int D) {
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
  store_own<kRows>(out + (size_t)b * T * H * D + h * D, (size_t)H * D, o, sum, row0, T, D);
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
void attention_forward_simple(Value* out, float* lse, const Value* qkv, int B, int T, int H, int KV, int D) {
  check_attention_shape(B, T, H, KV, D);
  const dim3 grid(ceil_div(T, kRows * kThreads), H, B);
  launch(attention_forward_simple_kernel<Value, kRows, kThreads>, grid, kThreads, 0, out, lse, qkv, T, H, KV, D);
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
// A block is 4 warps. A warp owns 16 rows (queries; in dK and dV: keys; 32 queries in the forward of heads up to 64) and holds them as
// A fragments in registers, its results as C fragments. The other side comes in tiles of 64 rows through shared memory, two stages:
// cp.async fills one while the warps read the other with ldmatrix. Inside a tile the warp goes by chunks of 16 rows, one mma deep:
// the 16 x 16 probabilities of a chunk are rounded in place into the A fragment of the next product and never leave the registers.
// In dK and dV the roles are exchanged from the start (S^T = K Q^T), so that P^T and dS^T are at hand without a transposition.
// Tiles are kD columns wide, D rounded up to 32, 64, 96 or 128, zeros behind D. A row of a tile has 8 elements more than that: an odd
// number of 16-byte units, so the 8 rows that ldmatrix reads at once lie in different banks.
// Shared memory: 4 tiles = 8 (kD + 8) 64 bytes: 20, 36, 52, 68 KB (+ 1 KB in dK and dV). The block's own rows pass through the
// second stage before it is needed.
constexpr int kMmaThreads = 128, kMmaTile = 64;
template <int kD> constexpr int kMmaStride = kD + 8;                                 // elements from row to row of a tile
template <int kD> constexpr int kMmaTileSize = kMmaTile * kMmaStride<kD>;            // elements of a tile
template <int kD> constexpr size_t kMmaShared = 4 * kMmaTileSize<kD> * sizeof(bf16);

// Starts the copy of kRows rows of `from`, row0 on, into a tile; zeros past row T and column D.
template <int kD, int kRows> __device__ inline void copy_tile(bf16* tile, const bf16* from, size_t ld, int row0, int T, int D) {
  auto copy = [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value, kElements = kBytes / 2, kPieces = kD / kElements;
#pragma unroll 1      // unrolled, the addresses cost 8 to 74 registers and the forward of D = 64 spills (nvcc 13.0, sm_90)
    for (int i = threadIdx.x; i < kRows * kPieces; i += kMmaThreads) {
      const int r = i / kPieces, d = i % kPieces * kElements;
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

// 16 rows of a tile as A fragments
template <int kD> __device__ inline void load_fragments(uint32_t (&a)[kD / 16][4], const bf16* rows) {
#pragma unroll
  for (int k = 0; k < kD / 16; k++) ldmatrix_x4(a[k], rows + a_offset<kD>() + 16 * k);
}
// c[16 x 16] = A[16 x kD] times the transpose of 16 rows of a tile, for each of kM blocks of 16 rows of A
template <int kD, int kM> __device__ inline void multiply_transposed(float (&c)[kM][2][4], const uint32_t (&a)[kM][kD / 16][4], const bf16* rows) {
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int i = 0; i < 8; i++) c[m][i / 4][i % 4] = 0;
#pragma unroll
  for (int k = 0; k < kD / 16; k++) {
    uint32_t b[4];
    ldmatrix_x4(b, rows + b_offset<kD>() + 16 * k);
#pragma unroll
    for (int m = 0; m < kM; m++) {
      mma_m16n8k16_bf16(c[m][0], a[m][k], b[0], b[1]);
      mma_m16n8k16_bf16(c[m][1], a[m][k], b[2], b[3]);
    }
  }
}
// c[16 x kD] += A[16 x 16] times 16 rows of a tile
template <int kD, int kM> __device__ inline void multiply_rows(float (&c)[kM][kD / 8][4], const uint32_t (&a)[kM][4], const bf16* rows) {
#pragma unroll
  for (int n = 0; n < kD / 16; n++) {
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
__device__ inline void pack_fragment(uint32_t (&a)[4], const float (&c)[2][4]) {
  a[0] = pack_bf16(c[0][0], c[0][1]);
  a[1] = pack_bf16(c[0][2], c[0][3]);
  a[2] = pack_bf16(c[1][0], c[1][1]);
  a[3] = pack_bf16(c[1][2], c[1][3]);
}
// Writes 16 rows from row0 on of a result, row g times factor[0], row g + 8 times factor[1]
template <int kD>
__device__ inline void store_fragments(bf16* to, size_t ld, const float (&c)[kD / 8][4], const float (&factor)[2], int row0, int T, int D) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row0 + threadIdx.x % 32 / 4 + 8 * half;
    if (row >= T) continue;
#pragma unroll
    for (int n = 0; n < kD / 8; n++) {
      const int d = 8 * n + threadIdx.x % 4 * 2;
      if (d < D) store_vec(to + row * ld + d, Vec<bf16, 2>{{to_bf16(c[n][2 * half] * factor[half]), to_bf16(c[n][2 * half + 1] * factor[half])}});
    }
  }
}

// kM: blocks of 16 queries a warp owns. The block owns 64 kM queries.
template <int kD, int kM>
__global__ void __launch_bounds__(kMmaThreads, kM == 1 ? 3 : 2)      // blocks a multiprocessor that the registers must allow
attention_forward_mma_kernel(bf16* out, float* lse, const bf16* qkv, int T, int H, int KV, int D) {
  DYNAMIC_SHARED(bf16, shared);
  bf16 *k_tiles = shared, *v_tiles = shared + kMmaTileSize<kD>;                // stage s: 2 s tiles further
  const int first = ((int)gridDim.x - 1 - (int)blockIdx.x) * 64 * kM, h = blockIdx.y, b = blockIdx.z;      // long rows first
  const int warp = threadIdx.x / 32, row0 = first + warp * 16 * kM, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const HeadRows<const bf16> x = head_rows(qkv, b, h, T, H, KV, D);
  const float scale = kLog2E / sqrtf(D);
  auto start_copy = [&](int tile) {
    copy_tile<kD, kMmaTile>(k_tiles + tile % 2 * 2 * kMmaTileSize<kD>, x.k, x.ld, tile * kMmaTile, T, D);
    copy_tile<kD, kMmaTile>(v_tiles + tile % 2 * 2 * kMmaTileSize<kD>, x.v, x.ld, tile * kMmaTile, T, D);
    cp_async_commit();
  };
  static_assert(kM <= 2, "the queries pass through the second stage, which is 128 rows");
  copy_tile<kD, 64 * kM>(shared + 2 * kMmaTileSize<kD>, x.q, x.ld, first, T, D);
  cp_async_commit();
  start_copy(0);
  cp_async_wait<1>();
  __syncthreads();
  uint32_t q[kM][kD / 16][4];
#pragma unroll
  for (int m = 0; m < kM; m++) load_fragments<kD>(q[m], shared + 2 * kMmaTileSize<kD> + (warp * kM + m) * 16 * kMmaStride<kD>);

  float o[kM][kD / 8][4] = {}, max[kM][2], sum[kM][2] = {};                    // [2]: rows g and g + 8. sum: this lane's columns only
#pragma unroll
  for (int m = 0; m < kM; m++) max[m][0] = max[m][1] = -FLT_MAX;
  const int tiles = ceil_div(min(T, first + 64 * kM), kMmaTile);
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();                             // this tile is here, and everybody is done with the stage that is filled next
    if (tile + 1 < tiles) start_copy(tile + 1);
    const int key0 = tile * kMmaTile;
    if (key0 >= row0 + 16 * kM) continue;        // all keys lie after this warp's queries
    const bf16 *k_rows = k_tiles + tile % 2 * 2 * kMmaTileSize<kD>, *v_rows = v_tiles + tile % 2 * 2 * kMmaTileSize<kD>;

    float s[4][kM][2][4];                        // chunks of 16 keys
#pragma unroll
    for (int c = 0; c < 4; c++) multiply_transposed<kD, kM>(s[c], q, k_rows + 16 * c * kMmaStride<kD>);
    if (key0 + kMmaTile - 1 > row0) {
#pragma unroll
      for (int c = 0; c < 4; c++)
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int i = 0; i < 8; i++)
            if (key0 + 16 * c + i / 4 * 8 + 2 * t + i % 2 > row0 + 16 * m + g + i % 4 / 2 * 8) s[c][m][i / 4][i % 4] = -INFINITY;
    }
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float new_max = max[m][half];
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) new_max = fmaxf(new_max, s[c][m][i / 2][2 * half + i % 2]);
        new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));    // the four lanes that share a row
        new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
        const float factor = ex2_approx((max[m][half] - new_max) * scale);
        max[m][half] = new_max;
        sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < kD / 8; n++) { o[m][n][2 * half] *= factor; o[m][n][2 * half + 1] *= factor; }
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& p = s[c][m][i / 2][2 * half + i % 2];
            p = ex2_approx(p * scale - new_max * scale);
            sum[m][half] += p;
          }
      }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      uint32_t p[kM][4];
#pragma unroll
      for (int m = 0; m < kM; m++) pack_fragment(p[m], s[c][m]);
      multiply_rows<kD, kM>(o, p, v_rows + 16 * c * kMmaStride<kD>);
    }
  }
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
    store_fragments<kD>(out + (size_t)b * T * H * D + h * D, (size_t)H * D, o[m], factor, row0 + 16 * m, T, D);
  }
}

// dQ: 16 queries a warp, walks over the keys.
template <int kD>
__global__ void __launch_bounds__(kMmaThreads) attention_backward_q_mma_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse,
                                                                               const float* delta, int T, int H, int KV, int D) {
  DYNAMIC_SHARED(bf16, shared);
  bf16 *k_tiles = shared, *v_tiles = shared + kMmaTileSize<kD>;
  const int first = ((int)gridDim.x - 1 - (int)blockIdx.x) * 64, h = blockIdx.y, b = blockIdx.z;
  const int warp = threadIdx.x / 32, row0 = first + warp * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const HeadRows<const bf16> x = head_rows(qkv, b, h, T, H, KV, D);
  const float scale = kLog2E / sqrtf(D);
  auto start_copy = [&](int tile) {
    copy_tile<kD, kMmaTile>(k_tiles + tile % 2 * 2 * kMmaTileSize<kD>, x.k, x.ld, tile * kMmaTile, T, D);
    copy_tile<kD, kMmaTile>(v_tiles + tile % 2 * 2 * kMmaTileSize<kD>, x.v, x.ld, tile * kMmaTile, T, D);
    cp_async_commit();
  };
  copy_tile<kD, 64>(shared + 2 * kMmaTileSize<kD>, x.q, x.ld, first, T, D);
  copy_tile<kD, 64>(shared + 3 * kMmaTileSize<kD>, dout + (size_t)b * T * H * D + h * D, (size_t)H * D, first, T, D);
  cp_async_commit();
  start_copy(0);
  cp_async_wait<1>();
  __syncthreads();
  uint32_t q[1][kD / 16][4], dO[1][kD / 16][4];
  load_fragments<kD>(q[0], shared + 2 * kMmaTileSize<kD> + warp * 16 * kMmaStride<kD>);
  load_fragments<kD>(dO[0], shared + 3 * kMmaTileSize<kD> + warp * 16 * kMmaStride<kD>);
  float dq[1][kD / 8][4] = {}, lse2[2], delta_own[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row0 + g + 8 * half;
    lse2[half] = row < T ? lse[((size_t)b * H + h) * T + row] * kLog2E : 0;
    delta_own[half] = row < T ? delta[((size_t)b * H + h) * T + row] : 0;
  }
  const int tiles = ceil_div(min(T, first + 64), kMmaTile);
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tiles) start_copy(tile + 1);
    const bf16 *k_rows = k_tiles + tile % 2 * 2 * kMmaTileSize<kD>, *v_rows = v_tiles + tile % 2 * 2 * kMmaTileSize<kD>;
    for (int c = 0; c < 4; c++, k_rows += 16 * kMmaStride<kD>, v_rows += 16 * kMmaStride<kD>) {
      const int key0 = tile * kMmaTile + 16 * c;
      if (key0 > row0) break;                    // (row0 and key0 are multiples of 16)
      float s[1][2][4], dp[1][2][4];
      multiply_transposed<kD, 1>(s, q, k_rows);
      multiply_transposed<kD, 1>(dp, dO, v_rows);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int half = i % 4 / 2, key = key0 + i / 4 * 8 + 2 * t + i % 2, query = row0 + g + 8 * half;
        const float p = ex2_approx(s[0][i / 4][i % 4] * scale - lse2[half]);
        s[0][i / 4][i % 4] = key <= query ? p * (dp[0][i / 4][i % 4] - delta_own[half]) : 0;
      }
      uint32_t ds[1][4];
      pack_fragment(ds[0], s[0]);
      multiply_rows<kD, 1>(dq, ds, k_rows);
    }
  }
  const float factor[2] = {scale * kLn2, scale * kLn2};
  store_fragments<kD>(head_rows(dqkv, b, h, T, H, KV, D).q, x.ld, dq[0], factor, row0, T, D);
}

// dK and dV: 16 keys a warp, walks over the queries that see them, of every head of the group.
template <int kD>
__global__ void __launch_bounds__(kMmaThreads) attention_backward_kv_mma_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse,
                                                                                const float* delta, int T, int H, int KV, int D) {
  DYNAMIC_SHARED(bf16, shared);
  bf16 *q_tiles = shared, *do_tiles = shared + kMmaTileSize<kD>;
  float* stats = (float*)(shared + 4 * kMmaTileSize<kD>);                      // [stage][lse, delta][64 queries]
  const int first = blockIdx.x * 64, kv = blockIdx.y, b = blockIdx.z, group = H / KV;
  const int warp = threadIdx.x / 32, row0 = first + warp * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const HeadRows<const bf16> x = head_rows(qkv, b, kv * group, T, H, KV, D);
  const float scale = kLog2E / sqrtf(D);
  const int first_tile = first / kMmaTile, tiles = ceil_div(T, kMmaTile) - first_tile;      // of one head
  auto start_copy = [&](int step) {                                                         // step: (head of the group, tile)
    const int h = kv * group + step / tiles, query0 = (first_tile + step % tiles) * kMmaTile, stage = step % 2;
    copy_tile<kD, kMmaTile>(q_tiles + stage * 2 * kMmaTileSize<kD>, x.q + step / tiles * D, x.ld, query0, T, D);
    copy_tile<kD, kMmaTile>(do_tiles + stage * 2 * kMmaTileSize<kD>, dout + (size_t)b * T * H * D + h * D, (size_t)H * D, query0, T, D);
    const int i = threadIdx.x % 64;
    const float* from = (threadIdx.x < 64 ? lse : delta) + ((size_t)b * H + h) * T;
    cp_async<4>(stats + stage * 128 + threadIdx.x, query0 + i < T ? from + query0 + i : from, query0 + i < T);
    cp_async_commit();
  };
  copy_tile<kD, 64>(shared + 2 * kMmaTileSize<kD>, x.k, x.ld, first, T, D);
  copy_tile<kD, 64>(shared + 3 * kMmaTileSize<kD>, x.v, x.ld, first, T, D);
  cp_async_commit();
  start_copy(0);
  cp_async_wait<1>();
  __syncthreads();
  uint32_t k[1][kD / 16][4], v[1][kD / 16][4];
  load_fragments<kD>(k[0], shared + 2 * kMmaTileSize<kD> + warp * 16 * kMmaStride<kD>);
  load_fragments<kD>(v[0], shared + 3 * kMmaTileSize<kD> + warp * 16 * kMmaStride<kD>);
  float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};

  for (int step = 0; step < tiles * group; step++) {
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < tiles * group) start_copy(step + 1);
    const bf16 *q_rows = q_tiles + step % 2 * 2 * kMmaTileSize<kD>, *do_rows = do_tiles + step % 2 * 2 * kMmaTileSize<kD>;
    for (int c = 0; c < 4; c++, q_rows += 16 * kMmaStride<kD>, do_rows += 16 * kMmaStride<kD>) {
      const int query0 = (first_tile + step % tiles) * kMmaTile + 16 * c;
      if (query0 < row0) continue;               // all of these queries lie before this warp's keys
      float s[1][2][4], dp[1][2][4];             // rows: keys, columns: queries
      multiply_transposed<kD, 1>(s, k, q_rows);
      multiply_transposed<kD, 1>(dp, v, do_rows);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int column = i / 4 * 8 + 2 * t + i % 2, key = row0 + g + i % 4 / 2 * 8;
        const float* stat = stats + step % 2 * 128 + 16 * c + column;
        const float p = key <= query0 + column ? ex2_approx(s[0][i / 4][i % 4] * scale - stat[0] * kLog2E) : 0;
        s[0][i / 4][i % 4] = p;
        dp[0][i / 4][i % 4] = p * (dp[0][i / 4][i % 4] - stat[64]);
      }
      uint32_t p[1][4], ds[1][4];
      pack_fragment(p[0], s[0]);
      pack_fragment(ds[0], dp[0]);
      multiply_rows<kD, 1>(dv, p, do_rows);
      multiply_rows<kD, 1>(dk, ds, q_rows);
    }
  }
  const HeadRows<bf16> d = head_rows(dqkv, b, kv * group, T, H, KV, D);
  const float factor[2] = {scale * kLn2, scale * kLn2}, one[2] = {1, 1};
  store_fragments<kD>(d.k, d.ld, dk[0], factor, row0, T, D);
  store_fragments<kD>(d.v, d.ld, dv[0], one, row0, T, D);
}

// f(integral_constant<int, kD>): the width of the tiles for head size D
template <class F> void with_tile_width(int D, F f) {
  if (D <= 32) f(std::integral_constant<int, 32>());
  else if (D <= 64) f(std::integral_constant<int, 64>());
  else if (D <= 96) f(std::integral_constant<int, 96>());
  else f(std::integral_constant<int, 128>());
}
inline void attention_forward_mma(bf16* out, float* lse, const bf16* qkv, int B, int T, int H, int KV, int D) {
  check_attention_shape(B, T, H, KV, D);
  with_tile_width(D, [&](auto width) {
    constexpr int kD = decltype(width)::value, kM = kD <= 64 ? 2 : 1;
    launch(attention_forward_mma_kernel<kD, kM>, dim3(ceil_div(T, 64 * kM), H, B), kMmaThreads, kMmaShared<kD>, out, lse, qkv, T, H, KV, D);
  });
}
inline void attention_backward_mma(bf16* dqkv, const bf16* dout, const bf16* qkv, const bf16* out, const float* lse, float* delta,
                                   int B, int T, int H, int KV, int D) {
  check_attention_shape(B, T, H, KV, D);
  attention_delta(delta, dout, out, B, T, H, D);
  with_tile_width(D, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    const int tiles = ceil_div(T, 64);
    launch(attention_backward_kv_mma_kernel<kD>, dim3(tiles, KV, B), kMmaThreads, kMmaShared<kD> + 1024, dqkv, dout, qkv, lse, delta, T, H, KV, D);
    launch(attention_backward_q_mma_kernel<kD>, dim3(tiles, H, B), kMmaThreads, kMmaShared<kD>, dqkv, dout, qkv, lse, delta, T, H, KV, D);
  });
}

// ================================================================== what the model calls
// out and lse from qkv. delta is scratch. Shapes: see the top of the file. Stops with an error for a head size that is not supported.
inline void attention_forward(floatX* out, float* lse, const floatX* qkv, int B, int T, int H, int KV, int D) {
#if defined(CPU_BUILD) || defined(FP32)
  attention_forward_simple(out, lse, qkv, B, T, H, KV, D);
#else
  attention_forward_mma(out, lse, qkv, B, T, H, KV, D);
#endif
}
inline void attention_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out, const float* lse, float* delta,
                               int B, int T, int H, int KV, int D) {
#if defined(CPU_BUILD) || defined(FP32)
  attention_backward_simple(dqkv, dout, qkv, out, lse, delta, B, T, H, KV, D);
#else
  attention_backward_mma(dqkv, dout, qkv, out, lse, delta, B, T, H, KV, D);
#endif
}
