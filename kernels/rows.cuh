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
#include "cuda.cuh"

constexpr int kVecX = 16 / sizeof(floatX);
// The same for loops that only map elements to elements: on the CPU these are plain loops, which its compiler turns into SIMD.
template <int kLanes> constexpr int kMapVec = kLanes == 1 ? 1 : kVecX;
constexpr int kRowsPerBlock = 8;          // of a row kernel: 256 threads on a GPU
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

// out[slot, c] = sum of x[r, c] over the rows r of the slot (kAccumulate: added to what is there). x is [rows, cols] with row stride
// ld, out [slots, cols]. kLanes threads share kVec columns. Grid: (groups of columns, slots), 32 threads a block.
template <int kLanes, int kVec, bool kAccumulate, class T>
__global__ void column_sums_kernel(float* out, const T* x, int rows, int cols, int ld, int rows_per_slot) {
  const int lane = threadIdx.x % kLanes, c = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes * kVec;
  if (c >= cols) return;
  const int first = blockIdx.y * rows_per_slot, end = min(rows, first + rows_per_slot);
  Vec<float, kVec> sum = {};
#pragma unroll 8                          // eight loads under way in each thread
  for (int r = first + lane; r < end; r += kLanes) {
    const Vec<T, kVec> v = load_vec<kVec>(x + (size_t)r * ld + c);
    for (int i = 0; i < kVec; i++) sum.v[i] += to_float(v.v[i]);
  }
  for (int i = 0; i < kVec; i++) sum.v[i] = lanes_sum<kLanes>(sum.v[i]);
  if (lane == 0) write_sums<kVec>(out + (size_t)blockIdx.y * cols + c, sum, kAccumulate);
}

// First stage: scratch[slot, c], each slot with an equal range of the rows.
inline void column_sums_of_slots(float* scratch, const floatX* x, int rows, int cols, int slots) {
  const bool vectors = cols % kVecX == 0;
  auto kernel = vectors ? column_sums_kernel<1, kVecX, false, floatX> : column_sums_kernel<1, 1, false, floatX>;
  launch(kernel, dim3(ceil_div(cols, 32 * (vectors ? kVecX : 1)), slots), 32, 0, scratch, x, rows, cols, cols, ceil_div(rows, slots));
}
// Last stage: out[c] += sum over the slots. A warp reads 32 slots by 8 columns at a time: whole 32-byte sectors.
template <int kLanes = kRowLanes> void sum_slots(float* out, const float* scratch, int slots, int cols, int ld) {
  const bool vectors = cols % 8 == 0;
  auto kernel = vectors ? column_sums_kernel<kLanes, 8, true, float> : column_sums_kernel<kLanes, 1, true, float>;
  launch(kernel, dim3(ceil_div(cols, 32 / kLanes * (vectors ? 8 : 1)), 1), 32, 0, out, scratch, slots, cols, ld, slots);
}
