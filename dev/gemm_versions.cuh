// dev/gemm_versions.cuh -- how the FP4 GEMM of kernels/gemm_fp4.cuh came to be: from the simplest kernel that is right to the one in use.
// And bench_gemm_ways(): what each way reaches on this machine, and the priced table for Blackwell.
//
// D[M,N] = alpha * A B^T, NVFP4, FP32 out. Fragments, scale tiles and what bounds what: the first page of kernels/gemm_fp4.cuh.
//
//     version                             operands of an instruction come from     limits on paper, RTX 5090 (a tensor core: 16 clocks an instruction)
//     1  a warp, one 16 x 8 tile          global memory                            864 bytes an instruction, 4 cores: 216 bytes a clock and SM; L1 gives
//                                                                                  128: 59 % at best. And nothing hides the latency: expect a tenth
//     2  a block, 64 x 64 in shared       shared memory, 32-bit loads              32 x 32 a warp: 64 rows x 36 bytes for 8 instructions: 56 % of shared
//        memory; load, wait, multiply                                              memory's time, but loading and multiplying take turns: half
//     3  kernels/gemm_fp4.cuh: 128 x 128, ldmatrix, swizzled, two stages,          shared memory 58 %, L2 18 bytes a clock and SM, both hidden behind
//        64 x 64 a warp in registers                                               the tensor cores: the target is 80 % of cuBLASLt's figure
//
// Ideas not taken (no card here to measure them): the instruction's thread selectors would let one 16-byte load bring the scales of four
// fragments (saves 16 of 56 shared-memory clocks a step, but nobody we know of runs selectors other than 0); TMA instead of
// cp.async (frees 9 instructions a thread and slab of 64 multiplications); a 256 x 128 tile (25 % less L2 traffic).
// Not yet run on a Blackwell GPU: the percentages are arithmetic, not measurements.
#pragma once
#include <algorithm>
#include <array>
#include <chrono>
#include <string>
#include <vector>
#include "../kernels/gemm_fp4.cuh"
#include "bench.h"

// ------------------------------------------------------------------ version 1: one warp, one 16 x 8 tile of D, everything from global memory
// Every register is one aligned 32-bit load: this is all that the layouts ask for.
__device__ inline uint32_t fp4_word(const uint8_t* codes, int ld, int row, int k, int rows, int K) {
  return row < rows && k < round_up(K, 16) ? *reinterpret_cast<const uint32_t*>(codes + ((size_t)row * ld + k) / 2) : 0;
}
__device__ inline uint32_t fp4_scale_word(const uint8_t* scales, int row, int k, int rows, int K) {      // 4 blocks of 16 k
  return row < rows ? *reinterpret_cast<const uint32_t*>(scales + scale_offset(row, k / 16, ceil_div(K, 16))) : 0;
}
__device__ inline void fp4_store_fragment(const GemmFp4& g, const float (&d)[4], int row, int column, int lane) {
  for (int i = 0; i < 4; i++) {
    const int r = row + lane / 4 + 8 * (i >> 1), c = column + 2 * (lane % 4) + (i & 1);
    if (r < g.M && c < g.N) ((float*)g.D)[(size_t)r * g.ldd + c] = (g.alpha ? *g.alpha : 1.0f) * d[i];
  }
}
__global__ void gemm_fp4_v1_kernel(GemmFp4 g) {
  const int lane = threadIdx.x % 32, quad = lane / 4, t = lane % 4, m0 = blockIdx.y * 16, n0 = blockIdx.x * 8;
  float d[4] = {0, 0, 0, 0};
  for (int k = 0; k < g.K; k += 64) {
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; r++) a[r] = fp4_word(g.a_codes, g.lda, m0 + quad + 8 * (r & 1), k + 8 * t + 32 * (r >> 1), g.M, g.K);
    for (int r = 0; r < 2; r++) b[r] = fp4_word(g.b_codes, g.ldb, n0 + quad, k + 8 * t + 32 * r, g.N, g.K);
    const uint32_t sfa = fp4_scale_word(g.a_scales, m0 + quad + 8 * (lane & 1), k, g.M, g.K), sfb = fp4_scale_word(g.b_scales, n0 + quad, k, g.N, g.K);
    mma_m16n8k64_fp4<false>(d, a, b[0], b[1], sfa, sfb);
  }
  fp4_store_fragment(g, d, m0, n0, lane);
}
inline void gemm_fp4_v1(const GemmFp4& g) { launch(gemm_fp4_v1_kernel, dim3(ceil_div(g.N, 8), ceil_div(g.M, 16)), 32, 0, g); }

// ------------------------------------------------------------------ version 2: a 64 x 64 tile in shared memory, four warps of 32 x 32
// A byte that has come from global memory is used 64 times instead of 16 or 8. Rows of 32 bytes are padded to 48, so that the 32 words of a
// fragment register (8 rows x 4 lanes) lie in 32 different banks. Load, barrier, multiply, barrier: the two never overlap.
__global__ void __launch_bounds__(128) gemm_fp4_v2_kernel(GemmFp4 g) {
  constexpr int kTile = 64, kWords = 12;                           // 8 words of codes a row, 4 of padding
  __shared__ uint32_t codes[2][kTile * kWords], scales[2][kTile];  // A, B
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, t = lane % 4;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, wm = warp % 2 * 32, wn = warp / 2 * 32;
  float d[2][4][4] = {};
  for (int k = 0; k < g.K; k += 64) {
    for (int i = threadIdx.x; i < kTile * 8; i += blockDim.x) {
      const int row = i / 8, word = i % 8;
      codes[0][row * kWords + word] = fp4_word(g.a_codes, g.lda, m0 + row, k + 8 * word, g.M, g.K);
      codes[1][row * kWords + word] = fp4_word(g.b_codes, g.ldb, n0 + row, k + 8 * word, g.N, g.K);
    }
    for (int row = threadIdx.x; row < kTile; row += blockDim.x) {
      scales[0][row] = fp4_scale_word(g.a_scales, m0 + row, k, g.M, g.K);
      scales[1][row] = fp4_scale_word(g.b_scales, n0 + row, k, g.N, g.K);
    }
    __syncthreads();
    uint32_t a[2][4], b[4][2];
    for (int i = 0; i < 2; i++) for (int r = 0; r < 4; r++) a[i][r] = codes[0][(wm + 16 * i + quad + 8 * (r & 1)) * kWords + t + 4 * (r >> 1)];
    for (int j = 0; j < 4; j++) for (int r = 0; r < 2; r++) b[j][r] = codes[1][(wn + 8 * j + quad) * kWords + t + 4 * r];
    for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++)
      mma_m16n8k64_fp4<false>(d[i][j], a[i], b[j][0], b[j][1], scales[0][wm + 16 * i + quad + 8 * (lane & 1)], scales[1][wn + 8 * j + quad]);
    __syncthreads();
  }
  for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) fp4_store_fragment(g, d[i][j], m0 + wm + 16 * i, n0 + wn + 8 * j, lane);
}
inline void gemm_fp4_v2(const GemmFp4& g) { launch(gemm_fp4_v2_kernel, dim3(ceil_div(g.N, 64), ceil_div(g.M, 64)), 128, 0, g); }

// =====================================================================================================================================
// Bench

struct BenchShape { int M, N, K; bool d_fp32; const char* name; };
// The twelve GEMMs of a GPT-like block: T tokens, C channels, QKV the width of the joint projection, F the width of the MLP.
inline std::vector<BenchShape> bench_shapes(int T, int C, int QKV, int F) {
  return {{T, QKV, C, false, "qkv fprop"}, {T, C, C, false, "attention out fprop"}, {T, F, C, false, "mlp up fprop"}, {T, C, F, false, "mlp down fprop"},
          {T, C, QKV, false, "qkv dgrad"}, {T, C, C, false, "attention out dgrad"}, {T, C, F, false, "mlp up dgrad"}, {T, F, C, false, "mlp down dgrad"},
          {QKV, C, T, true, "qkv wgrad"},  {C, C, T, true, "attention out wgrad"},  {F, C, T, true, "mlp up wgrad"},  {C, F, T, true, "mlp down wgrad"}};
}

// Bytes that an NVFP4 GEMM, and a BF16 GEMM, must move at least: operands once, D once (an accumulated D is read too).
inline double gemm_bytes(const BenchShape& s, double bytes_per_element) {
  return ((double)s.M + s.N) * s.K * bytes_per_element + (double)s.M * s.N * (s.d_fp32 ? 8 : 2);
}
// And the quantizer of both operands: x is read twice (amax, codes), 0.5625 bytes are written.
inline double quantize_bytes(const BenchShape& s) { return ((double)s.M + s.N) * s.K * (2 + 2 + 0.5625); }

// Peak rates. NVIDIA's own sheets were not at hand: what stands here was checked against pages that quote them, named below, and what was found
// nowhere says so. Rates are dense (data sheets like to print twice as much, "with sparsity") and accumulate in FP32.
//   B200       "NVIDIA DGX B200" (brent-newsom-nvidia.github.io, after nvidia.com): 8 GPUs, FP4 144 PFLOP/s sparse, 72 dense, HBM3e 64 TB/s. "B200" (glennklockwood.com,
//              after NVIDIA's Blackwell brief): HGX at 1000 W: FP4 9000 TFLOP/s dense, 18000 sparse; BF16 2250, 4500; 8 TB/s at most. A driver's bus width gives
//              7.67 TB/s (pytorch/ao, pull request 4002).
//   RTX 5090   "NVIDIA RTX 5090 Specs" (spheron.network): 3352 TFLOP/s sparse FP4, 838 sparse FP16 (that is 419 dense with FP16 accumulation, half of it with
//              FP32), 1792 GB/s. The same proportion, BF16 an eighth of FP4, is listed for the RTX PRO 5000 (hmc-tech.com: 1180 and 147.4).
//   GB10       "SM121 CUTLASS kernel optimization results" (forums.developer.nvidia.com, 359960): 500 TFLOP/s dense FP4, 1 PFLOP/s is with sparsity (and 356 measured);
//              "The DGX Spark Handbook" (huggingface.co): 273 GB/s. BF16: not found.
struct DataSheet { const char* name; double fp4, bf16, bytes; const char* source; };     // dense flop/s with FP32 accumulation, bytes/s
inline const std::vector<DataSheet>& data_sheets() {
  static const std::vector<DataSheet> sheets = {
      {"B200", 9000e12, 2250e12, 8000e9, "as quoted from NVIDIA by others: 9 PFLOP/s dense FP4, 18 sparse"},
      {"RTX 5090", 1676e12, 209.5e12, 1792e9, "half of the 3352 that are quoted with sparsity; BF16 an eighth of FP4"},
      {"GB10", 500e12, 125e12, 273e9, "half of the 1 PFLOP/s that is quoted with sparsity; BF16 taken as a quarter: not checked"},
  };
  return sheets;
}
// What a GEMM takes at least on a card: the tensor cores' time or the memory's, whichever is longer.
inline double priced_seconds(const BenchShape& s, double flops, double bytes_per_element, double bytes) {
  return std::max(2.0 * s.M * s.N * s.K / flops, gemm_bytes(s, bytes_per_element) / bytes);
}
inline void bench_priced_table(const std::vector<BenchShape>& shapes) {
  printf("\nPriced, not measured: an ESTIMATE from counted flops and bytes and published peak rates (dense; sources in dev/gemm_versions.cuh); microseconds at least\n");
  for (const DataSheet& d : data_sheets()) printf("  %-9s %6.0f TFLOP/s FP4, %6.1f BF16, %5.0f GB/s (%s)\n", d.name, d.fp4 / 1e12, d.bf16 / 1e12, d.bytes / 1e9, d.source);
  printf("%-20s %6s %6s %6s", "GEMM", "M", "N", "K");
  for (const DataSheet& d : data_sheets()) printf(" | %8s: BF16    FP4 (limit)  +quantize", d.name);
  printf("\n");
  std::vector<double> bf16_total(data_sheets().size()), fp4_total(data_sheets().size());
  for (const BenchShape& s : shapes) {
    printf("%-20s %6d %6d %6d", s.name, s.M, s.N, s.K);
    for (size_t i = 0; i < data_sheets().size(); i++) {
      const DataSheet& d = data_sheets()[i];
      const double wide = priced_seconds(s, d.bf16, 2, d.bytes), fp4 = priced_seconds(s, d.fp4, 0.5625, d.bytes), quantize = quantize_bytes(s) / d.bytes;
      const bool memory = gemm_bytes(s, 0.5625) / d.bytes > 2.0 * s.M * s.N * s.K / d.fp4;
      printf(" | %15.1f %6.1f %-8s %9.1f", wide * 1e6, fp4 * 1e6, memory ? "(memory)" : "(cores)", (fp4 + quantize) * 1e6);
      bf16_total[i] += wide;
      fp4_total[i] += fp4 + quantize;
    }
    printf("\n");
  }
  printf("%-41s", "all of them: BF16 / (FP4 + quantize)");
  for (size_t i = 0; i < data_sheets().size(); i++) printf(" | %41.2f", bf16_total[i] / fp4_total[i]);
  printf("\n(quantize: both operands, each read twice and written once, nothing fused; an operand that two GEMMs share is counted twice)\n");
}

// Prints TFLOP/s of every way that runs on this machine, against BF16, and the priced table.
inline void bench_gemm_ways(const std::vector<BenchShape>& shapes) {
  const Fp4Ways ways = fp4_ways(GemmWay::automatic);
  const bool library = ways.plain == GemmWay::cublaslt, native = mma_fp4_is_native();
  printf("\nGEMMs, TFLOP/s (2 M N K / time). %s\n", library ? "" : native ? "" : "This machine has no FP4 tensor cores: mma runs on the model of its instruction, which says nothing about its speed on a chip that has it");
  printf("%-20s %6s %6s %6s  %9s %9s %9s%s\n", "GEMM", "M", "N", "K", "BF16", "cublaslt", "mma", native ? "  version 1  version 2" : "");
  for (const BenchShape& s : shapes) {
    const int ld = round_up(s.K, 32);
    auto operand = [&](int rows, uint64_t seed) {
      Fp4Random r = {device_alloc<uint8_t>((size_t)rows * ld / 2), device_alloc<uint8_t>(scale_bytes(rows, s.K)), nullptr, rows, s.K, ld, false, seed};
      launch(fp4_random_kernel, (unsigned)ceil_div((size_t)round_up(rows, 128) * round_up(ld, 128) / 8, (size_t)256), 256, 0, r);
      return r;
    };
    const Fp4Random a = operand(s.M, 1), b = operand(s.N, 1ull << 40);
    floatX *av = device_alloc<floatX>((size_t)s.M * ld), *bv = device_alloc<floatX>((size_t)s.N * ld);
    launch(fp4_values_kernel, (unsigned)ceil_div((size_t)s.M * ld, (size_t)256), 256, 0, av, a, 0, s.M);
    launch(fp4_values_kernel, (unsigned)ceil_div((size_t)s.N * ld, (size_t)256), 256, 0, bv, b, 0, s.N);
    uint8_t* D = device_alloc<uint8_t>((size_t)s.M * s.N * 4);
    device_zero(D, (size_t)s.M * s.N * 4);
    Gemm e;
    e.M = s.M; e.N = s.N; e.K = ld; e.A = av; e.B = bv; e.lda = e.ldb = ld; e.D = D; e.ldd = s.N; e.d_fp32 = e.accumulate = s.d_fp32;
    GemmFp4 g;
    g.M = s.M; g.N = s.N; g.K = s.K; g.a_codes = a.codes; g.a_scales = a.scales; g.b_codes = b.codes; g.b_scales = b.scales; g.lda = g.ldb = ld;
    g.D = D; g.ldd = s.N; g.d_fp32 = g.accumulate = s.d_fp32;
    const double flops = 2.0 * s.M * s.N * s.K;
    auto figure = [&](bool runs, auto f) {
      if (!runs) { printf(" %9s", "-"); return; }
      printf(" %9.4g", flops / bench_seconds(f) / 1e12);
      fflush(stdout);
    };
    printf("%-20s %6d %6d %6d ", s.name, s.M, s.N, s.K);
    figure(true, [&] { gemm(e); });
    figure(library && fp4_refusal(g, GemmWay::cublaslt).empty(), [&] { gemm_fp4(g, GemmWay::cublaslt); });
    figure(true, [&] { gemm_fp4(g, GemmWay::mma); });
    if (native && s.d_fp32) {
      printf(" ");
      figure(true, [&] { gemm_fp4_v1(g); });
      printf(" ");
      figure(true, [&] { gemm_fp4_v2(g); });
    }
    printf("\n");
    for (uint8_t* p : {a.codes, a.scales, b.codes, b.scales, D}) device_free(p);
    device_free(av); device_free(bv);
  }
}
