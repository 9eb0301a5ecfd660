// kernels/rows.cuh -- what the kernels on activations [T, C] share: how rows are dealt out, and how columns are summed.
//
// Rows    A row kernel gives each row to kLanes neighbouring threads: a warp on a GPU, one thread on the CPU (kRowLanes). Lane l
//         takes the vectors l, l + kLanes, ... of the row, so that a warp reads 512 bytes in a row. A second pass over the row
//         finds it in L1.
// Vectors Everything is written for kVec neighbouring elements at a time: 16 bytes (kVecX elements of floatX) if C is a multiple of
//         that, else one element; the same code either way. Pointers are 16-byte aligned, as all of device_alloc's are.
// Columns out[c] += sum over t of x[t, c], the gradient of everything that was broadcast over rows. A thread owns kVec columns and
//         walks down a range of rows (a slot); the sums of the slots [slots, C] are then summed by a warp a column. No atomics, a
//         fixed order: the same bits every time. Reads x once, plus the sums of the slots, written and read (a few %).
#pragma once
#include <type_traits>
#include "amax.cuh"     // defines: StoredMax, raise_amax
#include "cuda.cuh"

constexpr int kVecX = 16 / sizeof(floatX);
// The same for loops that only map elements to elements: on the CPU these are plain loops, which its compiler turns into SIMD.
template <int kLanes> constexpr int kMapVec = kLanes == 1 ? 1 : kVecX;
constexpr int kRowsPerBlock = 8;          // of a row kernel: 256 threads on a GPU
// Blocks of it that a multiprocessor holds at most: of 2048 threads, on consumer GPUs of 1536.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostRowBlocks = 6;
#else
constexpr int kMostRowBlocks = 8;
#endif
// The row this thread works on, and its place among the row's threads. Launched as <<<row_grid(rows), row_block<kLanes>()>>>.
template <int kLanes> __device__ inline int row_index() { return blockIdx.x * kRowsPerBlock + threadIdx.x / kLanes; }
template <int kLanes> __device__ inline int row_lane() { return threadIdx.x % kLanes; }
inline dim3 row_grid(int rows) { return dim3(ceil_div(rows, kRowsPerBlock)); }
template <int kLanes> inline dim3 row_block() { return dim3(kRowsPerBlock * kLanes); }

// The sum of f(x[c]) over a row, in every lane. kVec sums run side by side: the CPU's compiler makes them one SIMD register (it may
// not reorder a single sum), and rounding errors grow kVec times slower. A single thread with a single sum adds in double instead.
template <int kLanes, int kVec> using RowSum = std::conditional_t<kLanes * kVec == 1, double, float>;
template <int kLanes, int kVec, class F> __device__ inline float row_sum(const floatX* x, int C, F f) {
  RowSum<kLanes, kVec> sum[kVec] = {};
  for (int c = row_lane<kLanes>() * kVec; c < C; c += kLanes * kVec) {
    const Vec<floatX, kVec> v = load_vec<kVec>(x + c);
    for (int i = 0; i < kVec; i++) sum[i] += f(to_float(v.v[i]));
  }
  for (int i = 1; i < kVec; i++) sum[0] += sum[i];
  return lanes_sum<kLanes>((float)sum[0]);
}

// Is there a row for this thread? Where the block is to end in raise_row_amax() there is for all: those beyond the last row do that one once more.
template <bool kAmax> __device__ inline bool has_row(int& row, int T) {
  if (row < T) return true;
  if (kAmax) row = T - 1;
  return kAmax;
}
// raise_amax() by a row kernel: all threads of a block come here, each with the largest of what it stored. (One of them goes on: else a warp for every
// row of the tensor would ask the same address.)
template <int kLanes> __device__ inline void raise_row_amax(float* amax, uint32_t bits) {
  if constexpr (kLanes == 1) {
    raise_amax(amax, bits);
  } else {
    __shared__ uint32_t of_row[kRowsPerBlock];
    bits = lanes_most<kLanes>(bits);
    if (row_lane<kLanes>() == 0) of_row[threadIdx.x / kLanes] = bits;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < kRowsPerBlock; i++) bits = max(bits, of_row[i]);
    raise_amax(amax, bits);
  }
}

// ------------------------------------------------------------------ flat arrays, for functions of single elements
// A thread takes a run of kFlatRun vectors: one on a GPU; more on the CPU, where starting a thread costs a few ns.
constexpr int kFlatRun = kOnCpu ? 64 : 1, kFlatThreads = kOnCpu ? 8 : 256;
template <int kVec> __device__ inline size_t flat_begin() { return ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * (kFlatRun * kVec); }
inline dim3 flat_grid(size_t n, int vec) { return dim3((unsigned)ceil_div(n, (size_t)kFlatThreads * kFlatRun * vec)); }

// ------------------------------------------------------------------ columns
// out[i] = sums[i], or out[i] += sums[i].
template <int kVec> __device__ inline void write_sums(float* out, Vec<float, kVec> sums, bool accumulate) {
  if (accumulate) {
    const Vec<float, kVec> before = load_vec<kVec>(out);
    for (int i = 0; i < kVec; i++) sums.v[i] += before.v[i];
  }
  store_vec(out, sums);
}

// out[0 .. kVec) = the sum of x[r, 0 .. kVec) over rows 0 .. rows, shared by kLanes threads (kAccumulate: added to what is there).
template <int kLanes, int kVec, bool kAccumulate, class T> __device__ inline void add_columns(float* out, const T* x, int lane, int rows, size_t ld) {
  Vec<float, kVec> sum = {};
#pragma unroll 8                          // eight loads under way in each thread
  for (int r = lane; r < rows; r += kLanes) {
    const Vec<T, kVec> v = load_vec<kVec>(x + r * ld);
    for (int i = 0; i < kVec; i++) sum.v[i] += to_float(v.v[i]);
  }
  for (int i = 0; i < kVec; i++) sum.v[i] = lanes_sum<kLanes>(sum.v[i]);
  if (lane == 0) write_sums<kVec>(out, sum, kAccumulate);
}

// out[slot, c] = sum of x[r, c] over the rows r of the slot. x is [rows, cols], out [slots, cols]. A thread takes kVec columns. Grid: (groups of
// columns, slots), 32 threads a block.
template <int kVec> __global__ void column_sums_kernel(float* out, const floatX* x, int rows, int cols, int rows_per_slot) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * kVec, first = blockIdx.y * rows_per_slot;
  if (c >= cols) return;
  add_columns<1, kVec, false>(out + (size_t)blockIdx.y * cols + c, x + (size_t)first * cols + c, 0, max(0, min(rows - first, rows_per_slot)), cols);
}

// First stage: scratch[slot, c], each slot with an equal range of the rows.
inline void column_sums_of_slots(float* scratch, const floatX* x, int rows, int cols, int slots) {
  const bool vectors = cols % kVecX == 0;
  auto kernel = vectors ? column_sums_kernel<kVecX> : column_sums_kernel<1>;
  launch(kernel, dim3(ceil_div(cols, 32 * (vectors ? kVecX : 1)), slots), 32, 0, scratch, x, rows, cols, ceil_div(rows, slots));
}
// Last stage, for up to three sums that stand side by side in a row of scratch [slots, outs x cols]: out[i][c] += sum over the slots. A warp reads
// 32 slots by 8 columns at a time: whole 32-byte sectors.
struct SumOuts { float* out[3]; };
template <int kLanes, int kVec> __global__ void sum_slots_kernel(SumOuts to, const float* scratch, int slots, int cols) {
  const int lane = threadIdx.x % kLanes, c = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes * kVec;
  if (c >= cols) return;
  float* out = blockIdx.y == 0 ? to.out[0] : blockIdx.y == 1 ? to.out[1] : to.out[2];
  add_columns<kLanes, kVec, true>(out + c, scratch + (size_t)blockIdx.y * cols + c, lane, slots, (size_t)gridDim.y * cols);
}
template <int kLanes = kRowLanes> void sum_slots(SumOuts to, int outs, const float* scratch, int slots, int cols) {
  const bool vectors = cols % 8 == 0;
  launch(vectors ? sum_slots_kernel<kLanes, 8> : sum_slots_kernel<kLanes, 1>, dim3(ceil_div(cols, 32 / kLanes * (vectors ? 8 : 1)), outs), 32, 0, to, scratch, slots, cols);
}
