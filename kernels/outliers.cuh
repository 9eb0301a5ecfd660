// kernels/outliers.cuh -- what to do about the few channels, or the few entries of X, that are far larger than the rest.
//
// OutControl  A static choice of input channels (columns of X and of W) of every linear layer. From step 501 on, for 50 steps, the L2 norms
//             of the columns of X are summed; then the largest 10 % of the columns (rounded up to a multiple of 128) are computed in MXFP8,
//             the others as the recipe says. In the terms of recipe.cuh a layer becomes two layers side by side, each with a row of its own:
//
//                 Y  = X[:,A] W[:,A]^T  under the recipe       A: the FP4 columns
//                    + X[:,B] W[:,B]^T  under its B row        B: the FP8 columns; fprop and wgrad MXFP8 (E4M3, 1x32, scale rounded up, RN,
//                 dX[:,A], dX[:,B]      dY W, all FP4             no RHT), dgrad as the recipe has it (outlier_row)
//                 dW[:,A], dW[:,B]      each under its row
//
//             The columns of dX are rows of the dgrad operand W^T: blocks along N do not mix them, so that computing them apart changes the scale
//             of the whole tensor and nothing else; dY is quantized once for both. `sorted`: the FP4 columns stand in
//             descending order of their norms, as in the authors' code, so that a block holds columns of one size; without, both sets keep their
//             order in memory.
// OCC         Xc = clamp(X, q(1-a), q(a)), quantiles of each row (token); Y = quantized(Xc) W^T + (X - Xc) W^T, the second in BF16. About
//             2 (1-a) of X - Xc is not zero: 2 % for a = .99. It is a dense GEMM here: right, not fast. The quantile is an element of the
//             row (nearest rank), so that Xc is exact in BF16; torch.quantile interpolates between two. It is found by bisection.
// Source      OutControl: TetraJet-v2, arXiv 2510.27527, and the authors' code. There x is quantized twice for the FP8 part of wgrad, and dgrad is
//             one GEMM. OCC: Wang et al., arXiv 2501.17116, section 3.3.
// Cost        OutControl: gathers X and W (4 bytes read and written an element) in both passes, scatters dW, and dX where W has one
//             FP32 scale; quantizes dY^T twice, once a set. OCC: reads X once or twice and writes it twice; about 45 operations an element; and
//             one more GEMM of the layer's size in BF16.
#pragma once
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>
#include "linear.cuh"
#include "oscillation.cuh"
#include "rows.cuh"

// ------------------------------------------------------------------ choosing columns
constexpr int kNormRowSlots = 32;                 // parts of the rows whose squares are summed apart
inline size_t column_norms_scratch(int cols) { return (size_t)kNormRowSlots * cols; }   // floats

__global__ void column_squares_kernel(float* scratch, const floatX* x, int rows, int cols, int rows_per_slot) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * rows_per_slot, end = min(rows, first + rows_per_slot);
  if (c >= cols) return;
  float sum = 0;
  for (int r = first; r < end; r++) { const float v = to_float(x[(size_t)r * cols + c]); sum += v * v; }
  scratch[(size_t)blockIdx.y * cols + c] = sum;
}
__global__ void column_norms_kernel(float* sums, const float* scratch, int cols) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  float sum = 0;
  for (int s = 0; s < kNormRowSlots; s++) sum += scratch[(size_t)s * cols + c];
  sums[c] += sqrtf(sum);
}
// sums[c] += L2 norm of column c of x [rows, cols]. scratch: column_norms_scratch(cols) floats. Fixed order: the same bits every time.
inline void add_column_norms(float* sums, const floatX* x, int rows, int cols, float* scratch) {
  const int threads = kOnCpu ? 32 : 128;
  launch(column_squares_kernel, dim3(ceil_div(cols, threads), kNormRowSlots), threads, 0, scratch, x, rows, cols, ceil_div(rows, kNormRowSlots));
  launch(column_norms_kernel, ceil_div(cols, threads), threads, 0, sums, scratch, cols);
}

// How many of K columns become FP8: the fraction, rounded up to a multiple of 128. In a small layer that would be most or all of it: then a
// multiple of 64 or 32 (a block of MXFP8), the first that takes less than half; 0 if none does. *multiple: which one it was.
inline int outlier_columns(int K, float fraction, int* multiple = nullptr) {
  const int wanted = max(1, (int)(K * (double)fraction));
  for (int m = 128; m >= 32; m /= 2) {
    if (multiple) *multiple = m;
    if (fraction > 0 && 2 * round_up(wanted, m) < K) return round_up(wanted, m);
  }
  return 0;
}
// The columns in the order in which they are gathered: first the K - n that stay in FP4, then the n of the largest sums. Equal sums: the
// lower column counts as larger.
inline std::vector<int> outlier_order(const std::vector<float>& sums, int n, bool sorted) {
  const int K = (int)sums.size();
  std::vector<int> by_size(K);
  std::iota(by_size.begin(), by_size.end(), 0);
  std::stable_sort(by_size.begin(), by_size.end(), [&](int a, int b) { return sums[a] > sums[b]; });
  std::vector<int> large(by_size.begin(), by_size.begin() + n), rest(by_size.begin() + n, by_size.end());
  if (!sorted) { std::sort(large.begin(), large.end()); std::sort(rest.begin(), rest.end()); }
  rest.insert(rest.end(), large.begin(), large.end());
  return rest;
}

// ------------------------------------------------------------------ gathering and scattering columns
template <class T> __global__ void gather_columns_kernel(T* out, const T* x, const int* columns, size_t total, int n, int ld) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, total);
  for (size_t i = begin; i < end; i++) out[i] = x[i / n * ld + columns[i % n]];
}
template <bool kAdd, class T> __global__ void scatter_columns_kernel(T* out, const T* x, const int* columns, size_t total, int n, int ld) {
  const size_t begin = flat_begin<1>(), end = min(begin + kFlatRun, total);
  for (size_t i = begin; i < end; i++) {
    T& to = out[i / n * ld + columns[i % n]];
    if constexpr (kAdd) to += x[i]; else to = x[i];
  }
}
// out [rows, n] = x[:, columns], x [rows, ld]
template <class T> void gather_columns(T* out, const T* x, const int* columns, int rows, int n, int ld) {
  const size_t total = (size_t)rows * n;
  if (total) launch(gather_columns_kernel<T>, flat_grid(total, 1), kFlatThreads, 0, out, x, columns, total, n, ld);
}
// out[:, columns] = x [rows, n], out [rows, ld]. The columns differ from one another.
template <class T> void scatter_columns(T* out, const T* x, const int* columns, int rows, int n, int ld) {
  const size_t total = (size_t)rows * n;
  if (total) launch(scatter_columns_kernel<false, T>, flat_grid(total, 1), kFlatThreads, 0, out, x, columns, total, n, ld);
}
// out[:, columns] += x
inline void scatter_add_columns(float* out, const float* x, const int* columns, int rows, int n, int ld) {
  const size_t total = (size_t)rows * n;
  if (total) launch(scatter_columns_kernel<true, float>, flat_grid(total, 1), kFlatThreads, 0, out, x, columns, total, n, ld);
}
// Both sets of columns at once: x [rows, K] to first [rows, n] and second [rows, K - n], which are x[:, columns], cut behind n; and back again. A
// block takes some whole rows through shared memory (the CPU: straight), so that whatever the order, memory is read and written 16 bytes a thread.
// ld: of first and second.
template <class T> struct ColumnSets { T *first, *second; int n, ld_first, ld_second; };
template <class T> __device__ __forceinline__ T* column_in(const ColumnSets<T>& to, size_t row, int c) {
  return c < to.n ? to.first + row * to.ld_first + c : to.second + row * to.ld_second + c - to.n;
}
template <bool kShared, int kVec, bool kJoin, class T>
__global__ void split_columns_kernel(ColumnSets<T> sets, T* x, const int* columns, int rows, int K, int rows_per_block) {
  DYNAMIC_SHARED(T, tile);
  const int first_row = blockIdx.x * rows_per_block, vectors = K / kVec, count = min(rows_per_block, rows - first_row) * vectors;
  T *const here = x + (size_t)first_row * K, *const part = kShared ? tile : here;
  if constexpr (kShared && !kJoin) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      if constexpr (kVec * sizeof(T) == 16) cp_async<16>(tile + i * kVec, here + i * kVec, true);
      else tile[i] = here[i];
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int r = i / vectors, c = i % vectors * kVec;
    T *const one = column_in(sets, first_row + r, c), *const row = part + r * K;
    const Vec<int, kVec> at = load_vec<kVec>(columns + c);
    Vec<T, kVec> v;
    if (kJoin) v = load_vec<kVec>(one);
#pragma unroll
    for (int j = 0; j < kVec; j++) if (kJoin) row[at.v[j]] = v.v[j]; else v.v[j] = row[at.v[j]];
    if (!kJoin) store_vec(one, v);
  }
  if constexpr (kShared && kJoin) {
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) store_vec(here + i * kVec, load_vec<kVec>(tile + i * kVec));
  }
}
template <bool kJoin, bool kShared, class T> void launch_split_columns(const ColumnSets<T>& sets, T* x, const int* columns, int rows, int K) {
  constexpr int kVec = kShared ? 16 / sizeof(T) : 1, kTile = 20 << 10;                        // bytes
  const int per_block = kShared ? max(1, min(16, kTile / (int)(K * sizeof(T)))) : 8;
  const size_t shared = kShared ? (size_t)per_block * K * sizeof(T) : 0;
  const bool vectors = K % kVec == 0 && sets.n % kVec == 0 && sets.ld_first % kVec == 0 && sets.ld_second % kVec == 0;
  launch(vectors ? split_columns_kernel<kShared, kVec, kJoin, T> : split_columns_kernel<kShared, 1, kJoin, T>, ceil_div(rows, per_block),
         kShared ? 256 : 8, shared, sets, x, columns, rows, K, per_block);
}
template <bool kShared = !kOnCpu, class T> void split_columns(const ColumnSets<T>& to, const T* x, const int* columns, int rows, int K) {
  launch_split_columns<false, kShared>(to, const_cast<T*>(x), columns, rows, K);              // read only
}
template <bool kShared = !kOnCpu, class T> void join_columns(T* x, const ColumnSets<T>& from, const int* columns, int rows, int K) {
  launch_split_columns<true, kShared>(from, x, columns, rows, K);
}

// out[rows[i]] = x[i], rows of ld elements, a multiple of 32
__global__ void scatter_rows_kernel(floatX* out, const floatX* x, const int* rows, int n, int ld) {
  const size_t begin = flat_begin<kVecX>(), end = min(begin + kFlatRun * kVecX, (size_t)n * ld);
  for (size_t i = begin; i < end; i += kVecX) {
    const unsigned row = (unsigned)(i / kVecX) / (unsigned)(ld / kVecX);
    store_vec(out + (size_t)rows[row] * ld + (i - (size_t)row * ld), load_vec<kVecX>(x + i));
  }
}
inline void scatter_rows(floatX* out, const floatX* x, const int* rows, int n, int ld) {
  launch(scatter_rows_kernel, flat_grid((size_t)n * ld, kVecX), kFlatThreads, 0, out, x, rows, n, ld);
}

// ------------------------------------------------------------------ OCC: clamping by quantiles of the row
// Floats as unsigned integers of the same order; a BF16 value has only 16 bits to tell.
constexpr int kKeyBits = sizeof(floatX) * 8;
__device__ inline uint32_t order_key(float x) {
  const uint32_t bits = float_bits(x);
  return (bits >> 31 ? ~bits : bits | 0x80000000u) >> (32 - kKeyBits);
}
__device__ inline float key_value(uint32_t key) {
  const uint32_t bits = key << (32 - kKeyBits);
  return bits_float(bits >> 31 ? bits & 0x7fffffffu : ~bits & ~(kKeyBits == 32 ? 0u : 0xffffu));
}
// The sum of what the lanes of a row have.
template <int kLanes> __device__ inline int lanes_count(int v) {
#ifndef CPU_BUILD
  if (kLanes == 32) return __reduce_add_sync(0xffffffffu, v);
#endif
  return (int)lanes_sum<kLanes>((float)v);                     // rows are shorter than 2^24: exact
}
// A row's keys: kHeld vectors of kVecX in the registers of each lane (in the places beyond the row: the largest key); with 0, read each time anew.
template <int kLanes, int kHeld> struct RowKeys {
  static constexpr uint32_t kLast = 0xffffffffu >> (32 - kKeyBits);
  const floatX* row; int K;
  uint32_t first = kLast, last = 0;                             // of the whole row
  uint32_t held[kHeld ? kHeld * kVecX : 1];
  __device__ __forceinline__ RowKeys(const floatX* row_, int K_) : row(row_), K(K_) {
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int c = (i * kLanes + row_lane<kLanes>()) * kVecX;
      Vec<floatX, kVecX> v = {};
      if (c < K) v = load_vec<kVecX>(row + c);
#pragma unroll
      for (int j = 0; j < kVecX; j++) {
        const uint32_t key = order_key(to_float(v.v[j]));
        held[i * kVecX + j] = c < K ? key : kLast;
        if (c < K) { first = min(first, key); last = max(last, key); }
      }
    }
    if constexpr (kHeld == 0) each([&](uint32_t key) { first = min(first, key); last = max(last, key); });
    first = kLast - lanes_most<kLanes>(kLast - first);
    last = lanes_most<kLanes>(last);
  }
  template <class Use> __device__ __forceinline__ void each(Use use) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld * kVecX; i++) use(held[i]);
    } else {
      for (int c = row_lane<kLanes>(); c < K; c += kLanes) use(order_key(to_float(row[c])));
    }
  }
  __device__ __forceinline__ int below(uint32_t key) const {
    int n = 0;
    each([&](uint32_t k) { n += kKeyBits == 16 ? (k - key) >> 31 : k < key; });            // the sign: two instructions instead of three
    return lanes_count<kLanes>(n);
  }
};
// The element of rank `rank` (0: the smallest) is the largest key with at most `rank` keys below it. It lies in [low, high]; these close in.
template <class Keys> __device__ inline uint32_t key_of_rank(const Keys& keys, int rank, uint32_t low, uint32_t high) {
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + (high - low) % 2;
    if (keys.below(middle) <= rank) low = middle; else high = middle - 1;
  }
  return low;
}
// The elements that have `beyond` others before them from either end of the row. They lie near the ends: there the search starts, with a step of one
// binade that doubles. Some 9 readings of the keys for each, instead of one for every bit of a key.
struct RowEnds { float low, high; };
template <int kLanes, int kHeld> __device__ inline RowEnds row_ends(const floatX* row, int K, int beyond) {
  const RowKeys<kLanes, kHeld> keys(row, K);
  constexpr uint32_t kStep = 128u << (kKeyBits - 16), kLargestStep = 1u << (kKeyBits - 1);
  auto doubled = [](uint32_t step) { return step < kLargestStep ? 2 * step : step; };
  uint32_t low = keys.first, high = keys.last;
  for (uint32_t step = kStep; high - low > step; step = doubled(step)) {
    if (keys.below(low + step) > beyond) { high = low + step - 1; break; }
    low += step;
  }
  const uint32_t lower = key_of_rank(keys, beyond, low, high);
  low = lower, high = keys.last;
  for (uint32_t step = kStep; high - low > step; step = doubled(step)) {
    if (keys.below(high - step) <= K - 1 - beyond) { low = high - step; break; }
    high -= step + 1;
  }
  return {key_value(lower), key_value(key_of_rank(keys, K - 1 - beyond, low, high))};
}
// A row to kLanes threads. row_amax: null, or max|clamped| of each row, as bits (a NaN counts as the largest).
template <int kLanes, int kHeld, int kVec>
__global__ void occ_split_kernel(floatX* clamped, floatX* residual, const floatX* x, uint32_t* row_amax, int T, int K, int rank) {
  const int t = row_index<kLanes>();
  if (t >= T) return;
  const floatX* row = x + (size_t)t * K;
  const RowEnds ends = row_ends<kLanes, kHeld>(row, K, rank);
  uint32_t most = 0;
  for (int c = row_lane<kLanes>() * kVec; c < K; c += kLanes * kVec) {
    const Vec<floatX, kVec> v = load_vec<kVec>(row + c);
    Vec<floatX, kVec> in, out;
#pragma unroll
    for (int j = 0; j < kVec; j++) {
      const float value = to_float(v.v[j]), inside = value < ends.low ? ends.low : value > ends.high ? ends.high : value;      // a NaN stays
      in.v[j] = from_float<floatX>(inside);
      out.v[j] = from_float<floatX>(value - inside);
      most = max(most, float_bits(inside) & 0x7fffffffu);
    }
    store_vec(clamped + (size_t)t * K + c, in);
    store_vec(residual + (size_t)t * K + c, out);
  }
  if (!row_amax) return;
  most = lanes_most<kLanes>(most);
  if (row_lane<kLanes>() == 0) row_amax[t] = most;
}
// How many elements of a row of K lie beyond each quantile.
inline int occ_rank(int K, float alpha) { return min((int)lround((1 - (double)alpha) * (K - 1)), (K - 1) / 2); }
// x [T,K] = clamped + residual (the residual rounded to floatX). kHeld: the first form tried; a row of up to 8 vectors a lane is read once.
constexpr int kMostHeld = 8;
template <int kLanes = kRowLanes, int kHeld = 1>
void occ_split(floatX* clamped, floatX* residual, const floatX* x, int T, int K, float alpha, uint32_t* row_amax = nullptr) {
  auto go = [&](auto kernel) { launch(kernel, row_grid(T), row_block<kLanes>(), 0, clamped, residual, x, row_amax, T, K, occ_rank(K, alpha)); };
  if constexpr (kLanes > 1) {
    if (K % kVecX == 0 && K <= kHeld * kLanes * kVecX) return go(occ_split_kernel<kLanes, kHeld, kVecX>);
    if constexpr (kHeld < kMostHeld) { if (K % kVecX == 0) return occ_split<kLanes, kHeld + 1>(clamped, residual, x, T, K, alpha, row_amax); }
    if (K % kVecX == 0) return go(occ_split_kernel<kLanes, 0, kVecX>);
  }
  go(occ_split_kernel<kLanes, 0, 1>);
}

// ------------------------------------------------------------------ rows derived from a row
inline bool is_fp4(Format f) { return f == Format::nvfp4 || f == Format::mxfp4 || f == Format::fp4_vector; }
// With the forward or the backward pass in BF16. What started from the forward's quantized value then starts from the original, and the
// gradient passes straight through a quantizer that is no longer there.
inline Recipe without_forward(Recipe r) {
  r.fprop.x = r.fprop.w = {};
  r.dgrad.w.source = r.wgrad.x.source = Source::original;
  r.estimator = {};
  return r;
}
inline Recipe without_backward(Recipe r) {
  r.dgrad.dy = r.dgrad.w = r.wgrad.dy = r.wgrad.x = {};
  if (r.estimator.w != Estimator::dge) r.estimator.w = Estimator::ste;         // DGE needs only the forward's W; a mask its rotated gradient too
  r.estimator.x = Estimator::ste;
  return r;
}
// OutControl's B row: fprop and wgrad in MXFP8, dgrad as it is, but from the W that is handed in: that of the forward pass, if the row wants it.
inline Recipe outlier_row(Recipe r) {
  OperandRecipe fp8;
  fp8.format = Format::mxfp8;
  r.fprop = {fp8, fp8};
  r.wgrad = {fp8, fp8};
  r.dgrad.w.source = Source::original;
  r.estimator = {};
  return r;
}

// ------------------------------------------------------------------ the layers
// OutControl of one layer. columns: [K], the FP4 channels, then the FP8 channels; sums: [K], norms summed over steps.
struct OutlierLayer { int K = 0, fp8 = 0; int* columns = nullptr; float* sums = nullptr; };
struct OutlierScratch {
  floatX *x = nullptr, *w = nullptr, *y = nullptr;     // (T,K) (N,K) (T,K); OCC: x and y
  float *dw = nullptr, *norms = nullptr, *average = nullptr;      // outlier_dw_elements(K,N), column_norms_scratch(K); Q-EMA: (N,K)
};
inline size_t outlier_dw_elements(int K, int N) { return (size_t)K * round_up(N, 128); }      // dW of a set; before that, all of W^T quantized
// How a layer is run: what surrounds linear_forward and linear_backward.
struct LayerControl {
  bool occ = false;
  const OutlierLayer* split = nullptr;    // OutControl, once the channels are chosen
  float* collect = nullptr;               // OutControl, while it sums norms: [K]
  TowardAverage toward;                   // Q-EMA, where toward.average is not null
  OutlierScratch scratch;
};
constexpr uint32_t kOutlierLayers = 1 << 20;           // added to the layer's number: B draws other random numbers than A

// The two sets of columns of a matrix of `rows` rows in scratch memory: the FP8 columns in front, whose number is a multiple of 32: all is aligned.
inline ColumnSets<floatX> column_sets(floatX* scratch, int rows, const OutlierLayer& split) {
  const int fp4 = split.K - split.fp8;
  return {scratch + (size_t)rows * split.fp8, scratch, fp4, fp4, split.fp8};
}
// D [M,N] += A B^T
inline void add_product(void* D, int M, int N, int K, const floatX* A, int lda, bool a_transposed, const floatX* B, int ldb, bool b_transposed,
                        bool fp32) {
  Gemm g;
  g.M = M; g.N = N; g.K = K;
  g.A = A; g.lda = lda; g.a_transposed = a_transposed;
  g.B = B; g.ldb = ldb; g.b_transposed = b_transposed;
  g.D = D; g.ldd = N; g.d_fp32 = fp32; g.accumulate = true;
  gemm(g);
}
// Under control X is quantized as it was written only where it is neither split nor clamped.
inline bool wants_x_amax(const LayerControl& how, const Recipe& r, const LinearSaved* saved) { return !how.split && !how.occ && wants_x_amax(r, saved); }
// linear_forward() of linear.cuh under control. x_amax: max|X|, if somebody found it already; not read unless wants_x_amax().
inline void linear_forward(const LayerControl& how, floatX* Y, const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r,
                           LinearKey key, const LinearScratch& s, LinearSaved* saved, LinearEpilogue add = {}, float* x_amax = nullptr) {
  const OutlierScratch& o = how.scratch;
  if (!wants_x_amax(how, r, saved)) x_amax = nullptr;
  if (add.gelu_input && (how.split || how.occ)) {              // GELU comes after what these add
    linear_forward(how, add.gelu_input, X, W, T, K, N, r, key, s, saved, {add.bias, add.residual});
    return gelu_forward(Y, add.gelu_input, (size_t)T * N);
  }
  if (how.collect) add_column_norms(how.collect, X, T, K, o.norms);
  if (how.split) {
    const ColumnSets<floatX> x = column_sets(o.x, T, *how.split), w = column_sets(o.w, N, *how.split);
    split_columns(x, X, how.split->columns, T, K);
    split_columns(w, W, how.split->columns, N, K);
    if (how.toward.average && is_fp4(r.fprop.w.format)) {
      gather_columns(o.average, how.toward.average, how.split->columns, N, w.n, K);
      linear_forward_toward(Y, x.first, w.first, T, w.n, N, r, key, s, saved, {o.average, how.toward.packed}, add);
    } else linear_forward(Y, x.first, w.first, T, w.n, N, r, key, s, saved, add);
    key.layer += kOutlierLayers;
    return linear_forward(Y, x.second, w.second, T, how.split->fp8, N, outlier_row(r), key, s, nullptr, {nullptr, Y});       // Y += ...
  }
  const bool rows_known = how.occ && !how.toward.average && r.fprop.x.format == Format::fp4_vector && r.fprop.x.rht == 0;
  if (how.occ) occ_split(o.x, o.y, X, T, K, r.occ, rows_known ? s.tiles : nullptr);
  const floatX* x = how.occ ? o.x : X;
  if (how.toward.average) linear_forward_toward(Y, x, W, T, K, N, r, key, s, saved, how.toward, add, x_amax);
  else linear_forward(Y, x, W, T, K, N, r, key, s, saved, add, x_amax, rows_known);
  if (how.occ) add_product(Y, T, N, K, o.y, K, false, W, K, false, false);          // Y += (X - Xc) W^T
}

// The weights that the FP8 columns of the forward pass used, in place: w [N, n].
inline void mxfp8_weights(floatX* w, int N, int n, const LinearScratch& s) {
  Operand4 out;
  out.rows = N; out.cols = n; out.ld = operand_ld(n);
  out.values = s.values[1];
  QuantizeHow how;
  how.recipe.format = Format::mxfp8;
  quantize(out, w, how);
  device_copy(w, out.values, (size_t)N * n);            // n is a multiple of 32: no padding
}
// --keep values: what the forward pass would have saved, from X and W, which with `columns` are those columns of the layer's.
inline void save_again(const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key, const LinearScratch& s,
                       LinearSaved* again, const LayerControl& how, const int* columns, int all_columns) {
  if (!how.toward.average || !is_fp4(r.fprop.w.format)) return linear_save(X, W, T, K, N, r, key, s, again);
  if (columns) gather_columns(how.scratch.average, how.toward.average, columns, N, K, all_columns);
  linear_save_toward(X, W, T, K, N, r, key, s, again, {columns ? how.scratch.average : how.toward.average, how.toward.packed});
}
// dX of both sets: dY is quantized once. Where no set has an FP32 scale of its own, W^T is one operand, its rows back in memory's order, and one GEMM
// writes dX as it lies in memory. Else there are two, whose columns are joined.
inline void split_dgrad(const OutlierScratch& o, floatX* dX, const floatX* dY, const ColumnSets<floatX>& w, const OutlierLayer& split, int T, int N,
                        const Recipe& r, LinearKey key, LinearKey key8, const LinearScratch& s, const LinearSaved* saved, float* dy_amax) {
  const OperandRecipe how = r.dgrad.w, how8 = outlier_row(r).dgrad.w;
  const bool doubled = from_forward_pass(how), masked = r.estimator.x == Estimator::quest_mask;
  if ((doubled || masked) && !saved) die("split_dgrad: recipe %s needs what the forward pass saved", r.name.c_str());
  const int K = split.K, fp8 = split.fp8, fp4 = K - fp8, rht = doubled ? r.fprop.w.rht : 0, width = rotated_cols(fp4, rht);
  const bool straight = !rht && !masked;                       // else the FP4 columns come out rotated, or masked, by way of FP32
  const GemmWay way = fp4_way_of(r.dgrad.dy, how, s.ways);
  const ReadyOperand dy = prepare_operand(r.dgrad.dy, {kDgradDy, kDgradDy, key, way}, dY, T, N, false, s, nullptr, dy_amax);
  const OperandPlace place = {kDgradW, kDgradDy, key, way, &dy};
  auto fp4_weights = [&] {
    return doubled ? prepare_forward_operand(how, place, saved->w, r.fprop.w, s) : prepare_operand(how, place, w.first, N, fp4, true, s);
  };
  auto fp8_weights = [&](floatX* values) -> ReadyOperand {     // dY's rotation; random numbers of their own
    if (how8.format == Format::bf16) return {w.second, fp8, true, nullptr, how8, {}};
    Operand4 out = operand_frame(how8, place, N, fp8, true, s, nullptr);
    if (values) out.values = values;
    QuantizeHow q = quantize_how(how8, place, true, s);
    q.key = operand_key(key8, kDgradW);
    quantize(out, w.second, q, s.tiles);
    return ready_operand(out, q);
  };
  ReadyOperand w4 = fp4_weights();
  Gemm g;
  g.M = T; g.K = N;
  if (straight && w4.quantized() && way == GemmWay::emulated && (how.format == Format::fp4_vector || !needs_amax(how))) {
    fp8_weights(s.values[1] + (size_t)fp4 * w4.ld);
    scatter_rows((floatX*)o.dw, w4.data, split.columns, K, w4.ld);
    w4.data = (floatX*)o.dw;
    g.N = K; g.D = dX; g.ldd = K;
    return run_gemm(g, dy, w4, s, way);
  }
  const ColumnSets<floatX> dx = column_sets(o.y, T, split);
  g.N = width; g.D = straight ? dx.first : (void*)s.rotated; g.ldd = width; g.d_fp32 = !straight;
  run_gemm(g, dy, w4, s, way);
  if (!straight)
    unrotate(dx.first, s.rotated, masked ? saved->x.mask : nullptr, saved->x.ld / 32, T, fp4, rht, rotation_signs(r.fprop.w, kFpropX, key), false);
  g.N = fp8; g.D = dx.second; g.ldd = fp8; g.d_fp32 = false;
  run_gemm(g, dy, fp8_weights(nullptr), s, way);
  join_columns(dX, dx, split.columns, T, K);
}
inline void wgrad_columns(float* dW, const floatX* dY, const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key,
                          const LinearScratch& s, const LinearSaved* saved, float* scratch, const int* columns, int n, float* dyt_amax) {
  device_zero(scratch, (size_t)N * n);
  linear_wgrad(scratch, dY, X, T, n, N, r, key, s, saved, W, dyt_amax);
  scatter_add_columns(dW, scratch, columns, N, n, K);
}
// linear_backward() with the FP4 columns apart from the FP8 columns.
inline void split_backward(const LayerControl& how, floatX* dX, float* dW, const floatX* dY, const floatX* X, const floatX* W, int T, int K, int N,
                           const Recipe& r, LinearKey key, const LinearScratch& s, const LinearSaved* saved) {
  const OutlierScratch& o = how.scratch;
  const OutlierLayer& split = *how.split;
  const int fp8 = split.fp8, fp4 = K - fp8;
  const ColumnSets<floatX> x = column_sets(o.x, T, split), w = column_sets(o.w, N, split);
  const Recipe r8 = outlier_row(r);
  LinearKey key8 = key;
  key8.layer += kOutlierLayers;
  split_columns(x, X, split.columns, T, K);
  split_columns(w, W, split.columns, N, K);
  LinearSaved again;
  if (saved && saved->again) {
    again = *saved;
    save_again(x.first, w.first, T, fp4, N, r, key, s, &again, how, split.columns, K);
    saved = &again;
  }
  if (from_forward_pass(r.dgrad.w)) mxfp8_weights(w.second, N, fp8, s);
  const DyAmax amax = dX && share_amax(r.dgrad.dy, r.wgrad.dy) ? amax_of_dy(dY, T, N, r, key, s) : DyAmax{};
  if (dX) split_dgrad(o, dX, dY, w, split, T, N, r, key, key8, s, saved, amax.straight);
  wgrad_columns(dW, dY, x.first, w.first, T, K, N, r, key, s, saved, o.dw, split.columns, fp4, amax.turned);
  wgrad_columns(dW, dY, x.second, w.second, T, K, N, r8, key8, s, nullptr, o.dw, split.columns + fp4, fp8, nullptr);
}
// linear_backward() of linear.cuh under control.
inline void linear_backward(const LayerControl& how, floatX* dX, float* dW, const floatX* dY, const floatX* X, const floatX* W, int T, int K,
                            int N, const Recipe& r, LinearKey key, const LinearScratch& s, const LinearSaved* saved) {
  const OutlierScratch& o = how.scratch;
  if (how.split) return split_backward(how, dX, dW, dY, X, W, T, K, N, r, key, s, saved);
  LinearSaved again;
  const bool split_again = saved && saved->again && saves_x(r);
  if (saved && saved->again) {
    if (how.occ && split_again) occ_split(o.x, o.y, X, T, K, r.occ);
    again = *saved;
    save_again(how.occ ? o.x : X, W, T, K, N, r, key, s, &again, how, nullptr, K);
    saved = &again;
  }
  linear_backward(dX, dW, dY, X, W, T, K, N, r, key, s, saved);
  if (how.occ && !keeps_x(r)) {                           // wgrad took the clamped X that was saved: dW += dY^T (X - Xc)
    if (!split_again) occ_split(o.x, o.y, X, T, K, r.occ);
    add_product(dW, N, K, T, dY, N, true, o.y, K, true, true);
  }
}
