// kernels/mlp.cuh -- what stands between the GEMMs of a block: bias, GELU, SwiGLU, residual.
//
// What    bias       added by the GEMM (gemm.cuh); backward: dbias += column sums of dout (rows.cuh)
//         gelu       out = x/2 (1 + tanh(u)),  u = sqrt(2/pi) (x + 0.044715 x^3)
//                    computed as x * sigmoid(2u), the same function: one exponential and one division, and no cancellation in 1 + tanh
//                    backward: dx = dout * (s + x * s (1 - s) * 2u'),  s = sigmoid(2u); and, while dx is in registers, the gradient of the
//                    bias below it, dbias += column sums of dx, which would read dx again (403 MB at 65536 x 3072: 160 us on an H100)
//         swiglu     out = gate * sigmoid(gate) * up
//                    backward: dup = dout * gate * s,  dgate = dout * up * s (1 + gate (1 - s)),  s = sigmoid(gate)
//         residual   out = a + b + bias, where no GEMM adds them (gemm.cuh)
// Shapes  x, out: [T, N] floatX; bias, dbias: [N] FP32; gate_up: [T, 2F], a row = F gates, then F ups. out may be one of the inputs of
//         the same shape.
// Source  Hendrycks and Gimpel, arXiv 1606.08415 (tanh form: GPT-2's); Shazeer, arXiv 2002.05202.
// Cost    bytes an element, BF16: bias backward 2, gelu 4, backward 6, swiglu 6, backward 10 (an element of out), residual 6.
//         gelu and swiglu are 20 to 30 operations an element: still bound by memory on a GPU, by the exponential on a CPU.
// Error   FP32 inside, one rounding to floatX.
#pragma once
#include "ptx.cuh"      // defines: ex2_approx
#include "rows.cuh"     // defines: row kernels, column sums

// 1 / (1 + exp(-x)) within 4 units in the last place. An exact division would be a third of a GELU's instructions.
__device__ inline float sigmoid(float x) {
  const float d = 1 + ex2_approx(-kLog2E * x);
#ifdef CPU_BUILD
  return 1 / d;
#else
  return __fdividef(1, d);
#endif
}

// The same for several: the exponential is a call on the CPU, and keeps a loop with it from becoming SIMD. The calls themselves
// are then 6 % of a step of `make run`.
template <int kVec> __device__ __forceinline__ void sigmoids(float (&s)[kVec], const Vec<floatX, kVec>& x) {
#ifdef CPU_BUILD
  for (int i = 0; i < kVec; i++) s[i] = -kLog2E * to_float(x.v[i]);
  for (int i = 0; i < kVec; i++) s[i] = ex2_approx(s[i]);
  for (int i = 0; i < kVec; i++) s[i] = 1 / (1 + s[i]);
#else
  for (int i = 0; i < kVec; i++) s[i] = sigmoid(to_float(x.v[i]));
#endif
}

// ------------------------------------------------------------------ bias
// Ranges of rows that are summed apart: on a GPU 512 threads a multiprocessor, each with several loads under way, keep the memory busy.
inline int bias_backward_slots(int T, int N) {
  const int fill = kOnCpu ? 64 : max(1, multiprocessors() * 512 / ceil_div(N, kVecX));
  return min(ceil_div(T, 32), fill);
}
inline size_t bias_backward_scratch(int T, int N) { return (size_t)bias_backward_slots(T, N) * N; }   // floats
// dbias[n] += sum over t of dout[t, n].
template <int kLanes = kRowLanes> void bias_backward(float* dbias, const floatX* dout, float* scratch, int T, int N) {
  const int slots = bias_backward_slots(T, N);
  column_sums_of_slots(scratch, dout, T, N, slots);
  sum_slots<kLanes>({{dbias}}, 1, scratch, slots, N);
}

// ------------------------------------------------------------------ residual
template <int kLanes, int kVec, class BiasT> __global__ void residual_kernel(floatX* out, const floatX* a, const floatX* b, const BiasT* bias, int T, int C) {
  const int row = row_index<kLanes>();
  if (row >= T) return;
  for (int c = row_lane<kLanes>() * kVec; c < C; c += kLanes * kVec) {
    const size_t at = (size_t)row * C + c;
    const Vec<floatX, kVec> va = a ? load_vec<kVec>(a + at) : Vec<floatX, kVec>{}, vb = load_vec<kVec>(b + at);
    const Vec<BiasT, kVec> w = bias ? load_vec<kVec>(bias + c) : Vec<BiasT, kVec>{};
    Vec<floatX, kVec> o;
    for (int i = 0; i < kVec; i++) o.v[i] = from_float<floatX>(to_float(va.v[i]) + (to_float(vb.v[i]) + to_float(w.v[i])));
    store_vec(out + at, o);
  }
}
// out = a + b + bias (FP32 or floatX); a and bias may be null.
template <int kLanes = kRowLanes, class BiasT> void residual_forward(floatX* out, const floatX* a, const floatX* b, const BiasT* bias, int T, int C) {
  auto kernel = C % kVecX == 0 ? residual_kernel<kLanes, kMapVec<kLanes>, BiasT> : residual_kernel<kLanes, 1, BiasT>;
  launch(kernel, row_grid(T), row_block<kLanes>(), 0, out, a, b, bias, T, C);
}

// ------------------------------------------------------------------ GELU: element by element, the shape does not matter
constexpr float kGeluA = 0.7978845608028654f, kGeluB = 0.044715f;   // sqrt(2/pi) and the paper's constant
__device__ inline float gelu(float x) { return x * sigmoid(2 * kGeluA * (x + kGeluB * x * x * x)); }
__device__ inline float gelu_derivative(float x) {
  const float s = sigmoid(2 * kGeluA * (x + kGeluB * x * x * x));
  return s + x * s * (1 - s) * (2 * kGeluA * (1 + 3 * kGeluB * x * x));
}

template <int kVec> __global__ void gelu_forward_kernel(floatX* out, const floatX* x, size_t n) {
  const size_t begin = flat_begin<kVec>(), end = min(begin + kFlatRun * kVec, n);
  for (size_t at = begin; at < end; at += kVec) {
    const Vec<floatX, kVec> v = load_vec<kVec>(x + at);
    Vec<floatX, kVec> o;
    for (int i = 0; i < kVec; i++) o.v[i] = from_float<floatX>(gelu(to_float(v.v[i])));
    store_vec(out + at, o);
  }
}
inline void gelu_forward(floatX* out, const floatX* x, size_t n) {
  const bool vectors = n % kVecX == 0;
  launch(vectors ? gelu_forward_kernel<kVecX> : gelu_forward_kernel<1>, flat_grid(n, vectors ? kVecX : 1), kFlatThreads, 0, out, x, n);
}

// A thread takes kVec columns and walks down the rows of its slot, as in column_sums_kernel. sums: [slots, N].
// Not used: a kernel that also finds the maxima of dx that nvfp4's two copies of it want, plain and with RHT16, a thread holding 16 rows of two columns (of
// four .386, of eight .460): .376 ms, where this one and amax_of_both() take .334 + .107 (H200, 65536 x 3072). .6 % of nvfp4's step, for a hundred lines.
constexpr int kGeluThreads = kOnCpu ? 1 : 128;
template <int kVec>
__global__ void __launch_bounds__(kGeluThreads, 8) gelu_backward_kernel(floatX* dx, float* sums, const floatX* dout, const floatX* x, int T, int N, int rows_per_slot) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * kVec;
  if (c >= N) return;
  const int first = blockIdx.y * rows_per_slot, end = min(T, first + rows_per_slot);
  Vec<float, kVec> sum = {};
  constexpr int kRows = kOnCpu ? 1 : 2;                      // loaded before the first store: dx may be dout, so the compiler cannot move a load up
  for (int r = first; r < end; r += kRows) {
    Vec<floatX, kVec> v[kRows], d[kRows];
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      const size_t at = (size_t)min(r + j, end - 1) * N + c;
      v[j] = load_vec<kVec>(x + at);
      d[j] = load_vec<kVec>(dout + at);
    }
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      if (r + j >= end) break;
      Vec<floatX, kVec> o;
      for (int i = 0; i < kVec; i++) {
        o.v[i] = from_float<floatX>(to_float(d[j].v[i]) * gelu_derivative(to_float(v[j].v[i])));
        sum.v[i] += to_float(o.v[i]);
      }
      store_vec(dx + (size_t)(r + j) * N + c, o);
    }
  }
  store_vec(sums + (size_t)blockIdx.y * N + c, sum);
}
// Slots: one wave of blocks, 1024 threads a multiprocessor.
inline int gelu_backward_slots(int T, int N) {
  const int fill = kOnCpu ? 64 : max(1, multiprocessors() * (1024 / kGeluThreads) / ceil_div(ceil_div(N, kVecX), kGeluThreads));
  return min(T, fill);
}
inline size_t gelu_backward_scratch(int T, int N) { return (size_t)gelu_backward_slots(T, N) * N; }   // floats
// dx = dout * gelu'(x), [T, N]; dbias += the column sums of dx, unless it is null. dx may be dout.
template <int kLanes = kRowLanes> void gelu_backward(floatX* dx, float* dbias, const floatX* dout, const floatX* x, float* scratch, int T, int N) {
  constexpr int kVec = kLanes == 1 ? 64 : kVecX;             // on the CPU vectors are so long that the compiler makes SIMD loops of them
  const int slots = gelu_backward_slots(T, N), vec = N % kVec == 0 ? kVec : 1;
  launch(vec > 1 ? gelu_backward_kernel<kVec> : gelu_backward_kernel<1>, dim3(ceil_div(N, vec * kGeluThreads), slots), kGeluThreads, 0, dx, scratch, dout, x, T, N, ceil_div(T, slots));
  if (dbias) sum_slots<kLanes>({{dbias}}, 1, scratch, slots, N);
}

// ------------------------------------------------------------------ SwiGLU
template <bool kAmax, int kLanes, int kVec> __global__ void swiglu_forward_kernel(floatX* out, const floatX* gate_up, int T, int F, [[maybe_unused]] float* amax) {
  int row = row_index<kLanes>();
  if (!has_row<kAmax>(row, T)) return;
  StoredMax<floatX, kVec> most;
  out += (size_t)row * F;
  gate_up += (size_t)row * 2 * F;
  for (int c = row_lane<kLanes>() * kVec; c < F; c += kLanes * kVec) {
    const Vec<floatX, kVec> gate = load_vec<kVec>(gate_up + c), up = load_vec<kVec>(gate_up + F + c);
    Vec<floatX, kVec> o;
    float s[kVec];
    sigmoids(s, gate);
    for (int i = 0; i < kVec; i++) {
      const float g = to_float(gate.v[i]);
      o.v[i] = from_float<floatX>(g * s[i] * to_float(up.v[i]));
    }
    store_vec(out + c, o);
    if (kAmax) most.add(o);
  }
  if constexpr (kAmax) raise_row_amax<kLanes>(amax, most.bits());
}
template <int kLanes, int kVec> __global__ void swiglu_backward_kernel(floatX* dgate_up, const floatX* dout, const floatX* gate_up, int T, int F) {
  const int row = row_index<kLanes>();
  if (row >= T) return;
  dout += (size_t)row * F;
  gate_up += (size_t)row * 2 * F;
  dgate_up += (size_t)row * 2 * F;
  for (int c = row_lane<kLanes>() * kVec; c < F; c += kLanes * kVec) {
    const Vec<floatX, kVec> gate = load_vec<kVec>(gate_up + c), up = load_vec<kVec>(gate_up + F + c), d = load_vec<kVec>(dout + c);
    Vec<floatX, kVec> dgate, dup;
    float sigmoid_of[kVec];
    sigmoids(sigmoid_of, gate);
    for (int i = 0; i < kVec; i++) {
      const float g = to_float(gate.v[i]), s = sigmoid_of[i], dy = to_float(d.v[i]);
      dgate.v[i] = from_float<floatX>(dy * to_float(up.v[i]) * s * (1 + g * (1 - s)));
      dup.v[i] = from_float<floatX>(dy * g * s);
    }
    store_vec(dgate_up + c, dgate);
    store_vec(dgate_up + F + c, dup);
  }
}
// amax: null, or takes max|out| (amax.cuh).
template <int kLanes = kRowLanes> void swiglu_forward(floatX* out, const floatX* gate_up, int T, int F, float* amax = nullptr) {
  constexpr int kVec = kLanes == 1 ? 64 : kVecX;             // as in gelu_backward()
  auto kernel = F % kVec == 0 ? swiglu_forward_kernel<false, kLanes, kVec> : swiglu_forward_kernel<false, kLanes, 1>;
  if (amax) kernel = F % kVec == 0 ? swiglu_forward_kernel<true, kLanes, kVec> : swiglu_forward_kernel<true, kLanes, 1>;
  launch(kernel, row_grid(T), row_block<kLanes>(), 0, out, gate_up, T, F, amax);
}
template <int kLanes = kRowLanes> void swiglu_backward(floatX* dgate_up, const floatX* dout, const floatX* gate_up, int T, int F) {
  constexpr int kVec = kLanes == 1 ? 64 : kVecX;
  auto kernel = F % kVec == 0 ? swiglu_backward_kernel<kLanes, kVec> : swiglu_backward_kernel<kLanes, 1>;
  launch(kernel, row_grid(T), row_block<kLanes>(), 0, dgate_up, dout, gate_up, T, F);
}
