// kernels/gemm_fp4.cuh -- the FP4 tensor-core GEMM: packed codes and block scales in, BF16 or FP32 out.
//
// What    D[M,N] = alpha * A B^T (+ D),  A [M,K] and B [N,K] row-major and packed: two E2M1 codes a byte, low nibble first, and block
//         scales in the 128x4 tiles below: the bytes that quantize.cuh writes, nothing is rearranged in between.
//             NVFP4   E4M3 scale for 16 k;  one FP32 scale a tensor, which is part of alpha, or one for 1x128 ("outer", [rows, ceil(K/128)])
//             MXFP4   E8M0 scale for 32 k
// Ways    cublaslt    sm_100, sm_103 (B200, B300) and sm_120, sm_121 (RTX 50, RTX PRO, GB10). NVFP4 without outer scales. Library code.
//         mma         our own kernel, the second half of this file. The instruction exists on sm_120 and sm_121. Everywhere else (H100,
//                     CPU) the same kernel runs on the instruction's meaning (ptx.cuh): far slower, there to be executed and checked.
//         emulated    gemm.cuh on the operand's values in BF16: every GPU, every CPU
// State   Compiled for Blackwell, executed through the model of the instruction, not yet run on the chip.
//         Nobody has to believe that a way is right: fp4_self_check compares it with the emulation, on the user's GPU, before the first step.
//
// -------------------------------------------------------------------------------------------------------------------------------------
// The scale tile: 128 rows x 4 blocks, 512 bytes. Row r, block b lies at  r % 32 * 16 + r / 32 * 4 + b % 4:
//
//     byte      0  1  2  3     4  5  6  7     8  9 10 11    12 13 14 15
//               row 0          row 32         row 64        row 96              one 32-bit word: the four scales of one row over
//     byte     16 ..           20 ..          24 ..         28 ..               64 k (NVFP4) or 128 k (MXFP4)
//               row 1          row 33         row 65        row 97
//      ...
//     byte    496 ..                                       508 .. 511
//               row 31         row 63         row 95        row 127
//
// and tiles follow each other along k first, then along the rows: tile (row / 128) * ceil(blocks / 4) + block / 4.
//
// The fragments of one instruction, m16n8k64. A warp's 32 lanes are 8 quads; g = lane / 4 names the quad, t = lane % 4 the lane in it.
//
//     A, 16 x 64            k  0..7     8..15    16..23   24..31     32..39   40..47   48..55   56..63
//                  row g      t=0 a0   t=1 a0   t=2 a0   t=3 a0  |  t=0 a2   t=1 a2   t=2 a2   t=3 a2        a register: 8 codes
//                  row g+8    t=0 a1   t=1 a1   t=2 a1   t=3 a1  |  t=0 a3   t=1 a3   t=2 a3   t=3 a3        along k, 4 bytes
//     B, 64 x 8    column g   t=0 b0   t=1 b0   t=2 b0   t=3 b0  |  t=0 b1   t=1 b1   t=2 b1   t=3 b1
//     D, 16 x 8             column  0    1    2    3    4    5    6    7
//                  row g          t=0 d0 d1   t=1 d0 d1   t=2 d0 d1   t=3 d0 d1
//                  row g+8        t=0 d2 d3   t=1 d2 d3   t=2 d2 d3   t=3 d2 d3
//     scales of A  row g from lane t=0, row g+8 from lane t=1;  of B: column g from lane t=0.  One word of the tile above each:
//                  NVFP4   byte 0: k 0..15   byte 1: k 16..31   byte 2: k 32..47   byte 3: k 48..63
//                  MXFP4   byte 0: k 0..31   byte 1: k 32..63   bytes 2, 3: the next instruction's, shifted down for it
//
// Half of A (8 rows x 32 k) is 8 rows of 16 bytes: what ldmatrix calls an 8x8 matrix. One ldmatrix.x4 loads a whole fragment of A, or
// two of B. Nothing is unpacked, permuted or scaled by the kernel.
//
// Why the BF16 emulation computes the same. Code x E4M3 scale has at most 2 + 4 significant bits and lies between 2^-10 and 2688: exact in
// BF16. A product of two such values has at most 12 bits: exact in FP32. It is a multiple of 2^-20, so a sum over K < 2^20 fits 63 bits: the
// tests' reference is an int64. What FP32 accumulation loses depends on the data, not on the way: on ordinary tensors every partial sum
// fits 24 bits, nothing is rounded, and every way and every order gives the same bits.
//
// What differs in accumulation, when sums do not fit. The FP4 tensor core adds 64 k at once: exact within 16, then aligned to the largest exponent,
// cut off after 35 fraction bits, cut off to FP32. Hopper's BF16 core adds 16 k at once with 25 bits. The meaning (ptx.cuh) adds exactly
// and rounds once per 64 k, or truncates like the chip if asked. The worst case differs by 1e-5 of the result (log-normal block
// scales, K = 16384), the quantization error is 1e-1.
//
// Cost    2 M N K flops; bytes: .5625 (M + N) K in (NVFP4), 2 or 4 (8 to accumulate) M N out. At K = 768 the output weighs more than
//         both operands: see the table of `make bench`.
// Source  PTX ISA 9.7.14; cuBLAS documentation, "1D block scaling factors layout"; MMA-Sim, arXiv 2511.10909.
#pragma once
#include <chrono>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#include "formats.cuh"
#include "gemm.cuh"
#include "ptx.cuh"

struct GemmFp4 {
  int M = 0, N = 0, K = 0;
  const uint8_t *a_codes = nullptr, *a_scales = nullptr;               // [M, lda/2]; 128x4 tiles over ceil(K/16) (mx: ceil(K/32)) blocks
  const uint8_t *b_codes = nullptr, *b_scales = nullptr;               // [N, ldb/2]; the same
  int lda = 0, ldb = 0;                                                // in elements, multiples of 32. Codes are read up to K rounded up to 32:
                                                                       // zeros, or what a rotation has spread over its last group of 16
  void* D = nullptr; int ldd = 0; bool d_fp32 = false;                 // [M, N] floatX, or float
  bool accumulate = false;                                             // add C
  const void* C = nullptr;                                             // mma only: as D; null: what D holds
  const floatX* bias = nullptr;                                        // mma only: [N], added to every row
  const float* alpha = nullptr;                                        // device scalar; null means 1
  const float *a_outer = nullptr, *b_outer = nullptr;                  // FP32 scales of 1x128, [rows, ceil(K/128)]; both or neither
  bool mx = false;                                                     // MXFP4: E8M0 scales, one for 32
};
enum class GemmWay { automatic, cublaslt, mma, emulated };
inline const char* gemm_way_name(GemmWay w) { return w == GemmWay::automatic ? "auto" : w == GemmWay::cublaslt ? "cublaslt" : w == GemmWay::mma ? "mma" : "emulated"; }

inline std::string fp4_shape_text(const GemmFp4& g) {
  char text[200];
  snprintf(text, sizeof text, "M %d N %d K %d, A and B E2M1 with %s, D %s%s", g.M, g.N, g.K, g.mx ? "E8M0 scales of 32" : g.a_outer ? "E4M3 scales of 16 and FP32 scales of 128" : "E4M3 scales of 16",
           g.d_fp32 || sizeof(floatX) == 4 ? "FP32" : "BF16", g.accumulate ? ", accumulated" : "");
  return text;
}
// Why this way cannot run this GEMM; empty if it can. (What only the library knows, such as a missing kernel, is its own error later.)
inline std::string fp4_refusal(const GemmFp4& g, GemmWay way) {
  auto off = [](const void* p) { return (uintptr_t)p % 16 != 0; };
  if (!g.a_outer != !g.b_outer) return "outer scales of one operand only";
  if (g.mx && g.a_outer) return "MXFP4 has no outer scales";
  if (g.lda % 32 || g.ldb % 32 || g.lda < round_up(g.K, 32) || g.ldb < round_up(g.K, 32)) return "lda and ldb must be multiples of 32 and hold K";
  if (off(g.a_codes) || off(g.b_codes) || off(g.a_scales) || off(g.b_scales)) return "codes and scales must start on 16-byte boundaries";
  if (way == GemmWay::mma) return "";
  if (way != GemmWay::cublaslt) return "no FP4 tensor cores in this way";
  if (g.mx) return "cuBLASLt has no MXFP4";
  if (g.a_outer) return "cuBLASLt has no 1x128 outer scales for FP4 (--set outer=tensor, or --gemm mma)";
  const int n = g.d_fp32 || sizeof(floatX) == 4 ? 4 : 8;
  if (g.N % n || g.ldd % n || off(g.D)) return "cuBLASLt wants N and ldd to be multiples of " + std::to_string(n) + " and D on a 16-byte boundary";
  return "";
}

// =====================================================================================================================================
// cublaslt. The library is column-major: its A is our B, its B our A, its D [N, M] our D [M, N]; both operands contract along their
// first dimension (TN, the only form for FP4). alpha and beta stay on the device. Biases and residuals are another kernel's work (run_gemm).
#ifndef CPU_BUILD
inline void fp4_cublas_check(cublasStatus_t s, const char* what, const GemmFp4& g) {
  if (s != CUBLAS_STATUS_SUCCESS)
    die("cuBLASLt: %s refused the FP4 GEMM %s, with status %d (%s); run with --gemm mma (sm_120, sm_121) or --gemm emulated", what, fp4_shape_text(g).c_str(), (int)s, cublasLtGetStatusString(s));
}
// Descriptor and layouts: host objects that need no GPU, so that a test can read them back anywhere.
struct Fp4Plan { cublasLtMatmulDesc_t desc; cublasLtMatrixLayout_t a, b, d; cublasLtMatmulAlgo_t algo; };
inline void fp4_set(Fp4Plan& p, cublasLtMatmulDescAttributes_t what, const void* value, size_t bytes, const GemmFp4& g) {
  fp4_cublas_check(cublasLtMatmulDescSetAttribute(p.desc, what, value, bytes), "cublasLtMatmulDescSetAttribute", g);
}
inline Fp4Plan fp4_descriptors(const GemmFp4& g) {
  Fp4Plan p = {};
  const cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
  const int32_t scale_mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3;
  const cublasLtPointerMode_t on_device = CUBLASLT_POINTER_MODE_DEVICE;
  fp4_cublas_check(cublasLtMatmulDescCreate(&p.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate", g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed, g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_TRANSB, &plain, sizeof plain, g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &scale_mode, sizeof scale_mode, g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &scale_mode, sizeof scale_mode, g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &g.b_scales, sizeof g.b_scales, g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &g.a_scales, sizeof g.a_scales, g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_POINTER_MODE, &on_device, sizeof on_device, g);
  auto layout = [&](cublasLtMatrixLayout_t* l, cudaDataType_t type, int rows, int cols, int ld) { fp4_cublas_check(cublasLtMatrixLayoutCreate(l, type, rows, cols, ld), "cublasLtMatrixLayoutCreate", g); };
  const int K = round_up(g.K, 32);                           // the library wants multiples of 32: see lda
  layout(&p.a, CUDA_R_4F_E2M1, K, g.N, g.ldb);
  layout(&p.b, CUDA_R_4F_E2M1, K, g.M, g.lda);
  layout(&p.d, g.d_fp32 || sizeof(floatX) == 4 ? CUDA_R_32F : CUDA_R_16BF, g.N, g.M, g.ldd);
  return p;
}
inline Fp4Plan fp4_plan(const GemmFp4& g) {
  Fp4Plan p = fp4_descriptors(g);
  cublasLtMatmulPreference_t preference;
  fp4_cublas_check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate", g);
  auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const void* v, size_t n) { fp4_cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, what, v, n), "cublasLtMatmulPreferenceSetAttribute", g); };
  const size_t workspace = CublasLt::kWorkspace;
  const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, aligned = 16;    // sums split over K are put together in FP32, as in gemm.cuh
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction);
  for (auto what : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    prefer(what, &aligned, sizeof aligned);
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  fp4_cublas_check(cublasLtMatmulAlgoGetHeuristic(cublaslt().handle, p.desc, p.a, p.b, p.d, p.d, preference, 1, &result, &found), "cublasLtMatmulAlgoGetHeuristic", g);
  fp4_cublas_check(found ? result.state : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic", g);
  cublasLtMatmulPreferenceDestroy(preference);
  p.algo = result.algo;
  return p;
}
inline void gemm_fp4_cublaslt(const GemmFp4& g) {
  using Key = std::tuple<int, int, int, int, int, int, int>;
  static std::map<Key, Fp4Plan>* plans = new std::map<Key, Fp4Plan>;           // a plan is made once for a shape
  CublasLt& lt = cublaslt();
  const Key key = {g.M, g.N, g.K, g.lda, g.ldb, g.ldd, g.d_fp32 + 2 * g.accumulate};
  auto at = plans->find(key);
  if (at == plans->end()) at = plans->emplace(key, fp4_plan(g)).first;
  Fp4Plan& p = at->second;
  fp4_set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &g.b_scales, sizeof g.b_scales, g);
  fp4_set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &g.a_scales, sizeof g.a_scales, g);
  const ProfileSpan span("FP4 GEMM", g.M, g.N, g.K, g.d_fp32 ? "A B^T in FP32" : "A B^T");
  fp4_cublas_check(cublasLtMatmul(lt.handle, p.desc, g.alpha ? g.alpha : lt.constants + 1, g.b_codes, p.a, g.a_codes, p.b, lt.constants + (g.accumulate ? 1 : 0), g.D, p.d, g.D, p.d, &p.algo,
                                  lt.workspace, CublasLt::kWorkspace, main_stream), "cublasLtMatmul", g);
}
#endif

// =====================================================================================================================================
// mma: our own kernel.
//
// A block computes a 128 x 128 tile of D in slabs of 128 k. A slab is two instructions deep, two scale tiles of each operand (one in
// MXFP4), and one outer scale. Two slabs are in shared memory: one that is multiplied, one that cp.async fills meanwhile.
//
//     shared memory, one stage (18 KB):   A codes 128 rows x 64 bytes | B codes 128 x 64 | A scales 2 x 512 | B scales 2 x 512
//
// Four warps of 64 x 64 each (4 x 8 instructions a step of 64 k, 128 accumulators a lane). With outer scales a slab's sum must be kept apart
// until the scales have multiplied it: eight warps of 64 x 32, 64 + 64 accumulators.
//
// Few tiles, long K (weight gradients: 36 tiles, K = 65536): the slabs are shared out among `parts` blocks, each writes FP32 sums to a
// workspace, and a second kernel adds them in order. No atomics: the same bits every time.
//
// On paper, RTX 5090 (170 SMs; 4 tensor cores, each an m16n8k64 in 16 clocks: 1024 flops x 4 x 170 x 2.4 GHz = 1.67 PFLOP/s), a slab of a block:
//     tensor cores      128 x 128 x 128 / 2048 a clock                                                1024 clocks
//     shared, reads     4 warps x 2 steps x (8 ldmatrix.x4 of 4 + 4 and 8 scale words of 2)           448        44 %
//     shared, writes    18 KB / 128                                                                   144        14 %
//     instructions      245 a warp for its 64 multiplications, 4 schedulers                           245        24 %   (from the disassembly)
//     L2 to SM          18 KB in 1024 clocks                                                          18 bytes a clock: 7.4 TB/s over the chip
//     memory            operands come from L2 (96 MB); D once: see Cost
// So the tensor cores are the limit in the inner loop, L2 next (a 256 x 128 tile would need 5.5 TB/s, but leaves one block an SM and half as
// many blocks to hide the epilogue). Two blocks an SM may use 50 KB (have 36) and 255 registers: ptxas 13.0 for sm_120f gives 242 (NVFP4),
// 252 (MXFP4), 255 (outer scales), nothing spilled. With outer scales a slab costs 440 instructions a warp for 32 multiplications, two
// warps a scheduler: 86 % of its issue slots, so expect that form at two thirds of the plain one.
//     banks    A row is 64 bytes; unswizzled, the 8 rows of an ldmatrix would meet in 8 of 32 banks. The 16-byte chunk c of row r lies at
//              c ^ (r / 2 ^ r / 8): conflict-free for rows 0..7 and for the rows 0 1 4 5 8 9 12 13 that B's fragments take (below)
//     stores   A lane's columns of a pair of fragments are chosen to be neighbours (Fp4Layout::column): 4 BF16, 8 bytes; a quad fills
//              a 32-byte sector

constexpr int kFp4Tile = 128;                 // rows of A, rows of B in a block's tile
constexpr int kFp4Slab = 128;                 // k in a stage
constexpr int kFp4Stages = 2;
struct Fp4Stage {
  uint8_t codes[2][kFp4Tile * kFp4Slab / 2];  // A, B: swizzled
  uint8_t scales[2][2 * 512];                 // A, B: two tiles of 128 rows x 4 blocks (mx: one)
};

// Every choice of the kernel that could be made wrongly without any sign but wrong numbers. In one place, because the tests replace each
// by a plausible mistake and must see it caught.
struct Fp4Layout {
  // ldmatrix: 8x8 matrix m of a fragment of A starts at this row, this k
  __device__ int a_row(int m) const { return 8 * (m & 1); }
  __device__ int a_k(int m) const { return 32 * (m >> 1); }
  // and matrix m of a pair of B's fragments is fragment b_fragment of the pair, this k
  __device__ int b_fragment(int m) const { return m >> 1; }
  __device__ int b_k(int m) const { return 32 * (m & 1); }
  // Column c of fragment f, as a row of the warp's part of B. Free to choose: lanes hold columns 2t, 2t+1 of each fragment, and here those
  // of fragments 2p and 2p+1 together are 4t .. 4t+3 of 16.
  __device__ int column(int f, int c) const { return 16 * (f / 2) + 4 * (c / 2) + 2 * (f & 1) + (c & 1); }
  // whose scales a lane hands to the instruction
  __device__ int scale_a_row(int lane) const { return lane / 4 + 8 * (lane & 1); }
  __device__ int scale_b_column(int lane) const { return lane / 4; }
  // a row's word in a scale tile; a tile's place among all; which word and which half of it step s of a slab takes
  __device__ int scale_word(int row) const { return row % 32 * 16 + row / 32 * 4; }
  __device__ size_t scale_tile(int row_tile, int k_tile, int row_tiles, int k_tiles) const { (void)row_tiles; return (size_t)row_tile * k_tiles + k_tile; }
  __device__ int scale_step(int step) const { return step; }
  __device__ int mx_half(int step) const { return step; }
  // which of d0..d3 is row g + 8h, column 2t + c
  __device__ int d_register(int h, int c) const { return 2 * h + c; }
  // which slab's outer scale
  __device__ int outer_slab(int slab) const { return slab; }
  __device__ int next_stage(int slab) const { return slab % kFp4Stages; }
};

__device__ __forceinline__ int fp4_swizzle(int row, int chunk) { return row * (kFp4Slab / 2) + ((chunk ^ row >> 1 ^ row >> 3) & 3) * 16; }

// Starts the copies of one slab. Rows and k beyond the matrices become zeros.
template <bool kMx, int kThreads, class L> __device__ inline void fp4_load_slab(Fp4Stage& stage, const GemmFp4& g, int m0, int n0, int slab, L layout) {
  constexpr int kChunks = kFp4Slab / 32, kPerOperand = kFp4Tile * kChunks;                // of 16 bytes, 32 codes
  static_assert(2 * kPerOperand % kThreads == 0, "every thread copies the same number of chunks");
#pragma unroll
  for (int j = 0; j < 2 * kPerOperand / kThreads; j++) {
    const int i = j * kThreads + threadIdx.x;
    const int operand = i / kPerOperand, row = i % kPerOperand / kChunks, chunk = i % kChunks;
    const int from_row = (operand ? n0 : m0) + row, k = slab * kFp4Slab + 32 * chunk;
    const uint8_t* codes = operand ? g.b_codes : g.a_codes;
    const bool inside = from_row < (operand ? g.N : g.M) && k < g.K;
    const size_t at = inside ? ((size_t)from_row * (operand ? g.ldb : g.lda) + k) / 2 : 0;
    cp_async<16>(stage.codes[operand] + fp4_swizzle(row, chunk), codes + at, inside);
  }
  constexpr int kTiles = kMx ? 1 : 2;                                                     // scale tiles a slab
  const int k_tiles = ceil_div(g.K, kMx ? 128 : 64);
  if (const int i = threadIdx.x; i < 2 * kTiles * 32) {                                   // at most one chunk a thread
    const int operand = i / (kTiles * 32), tile = slab * kTiles + i / 32 % kTiles, rows = operand ? g.N : g.M, row_tile = (operand ? n0 : m0) / 128;
    const uint8_t* scales = operand ? g.b_scales : g.a_scales;
    const bool inside = tile < k_tiles;
    const size_t at = inside ? layout.scale_tile(row_tile, tile, ceil_div(rows, 128), k_tiles) * 512 + i % 32 * 16 : 0;
    cp_async<16>(stage.scales[operand] + i % (kTiles * 32) * 16, scales + at, inside);
  }
}

// Four neighbouring columns of D, from `column`: times alpha, plus C, plus the bias, in the order of gemm.cuh, then rounded to D's type.
__device__ inline void fp4_store(const GemmFp4& g, float alpha, int row, int column, const float (&sum)[4]) {
  if (row >= g.M || column >= g.N) return;
  const size_t at = (size_t)row * g.ldd + column;
  const bool whole = column + 4 <= g.N && g.ldd % 4 == 0 && ((uintptr_t)g.D | (uintptr_t)g.C) % 16 == 0;
  float bias[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) if (g.bias && column + i < g.N) bias[i] = to_float(g.bias[column + i]);
  auto store = [&](auto* d, auto* c) {
    using T = std::remove_pointer_t<decltype(d)>;
    if (whole) {
      Vec<T, 4> out;
      if (g.accumulate) out = load_vec<4>(c);
#pragma unroll
      for (int i = 0; i < 4; i++) { const float y = __fmul_rn(alpha, sum[i]); out.v[i] = from_float<T>(__fadd_rn(g.accumulate ? __fadd_rn(y, to_float(out.v[i])) : y, bias[i])); }
      store_vec(d, out);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (column + i < g.N) { const float y = __fmul_rn(alpha, sum[i]); d[i] = from_float<T>(__fadd_rn(g.accumulate ? __fadd_rn(y, to_float(c[i])) : y, bias[i])); }
    }
  };
  const void* C = g.C ? g.C : g.D;
  if (g.d_fp32) store((float*)g.D + at, (const float*)C + at); else store((floatX*)g.D + at, (const floatX*)C + at);
}

template <bool kOuter> constexpr int kFp4Threads = kOuter ? 256 : 128;
template <bool kMx, bool kOuter, class L>
__global__ void __launch_bounds__(kFp4Threads<kOuter>, kOuter ? 1 : 2) gemm_fp4_kernel(GemmFp4 g, float* workspace, bool truncate, L layout) {
  constexpr int kThreads = kFp4Threads<kOuter>, kWarpN = kOuter ? 32 : 64, kFragments = kWarpN / 8;
  DYNAMIC_SHARED(Fp4Stage, stages);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  const int m0 = blockIdx.y * kFp4Tile, n0 = blockIdx.x * kFp4Tile, wm = warp % 2 * 64, wn = warp / 2 * kWarpN;   // tile in D, warp in tile
  const int slabs = ceil_div(g.K, kFp4Slab), parts = gridDim.z, part = blockIdx.z;
  const int first = (int)((long long)slabs * part / parts), last = (int)((long long)slabs * (part + 1) / parts);

  float sum[4][kFragments][4] = {};                        // D's fragments: rows wm + 16 i + ..., columns wn + column(f, ...)
#pragma unroll
  for (int s = 0; s < kFp4Stages - 1; s++) {
    if (first + s < last) fp4_load_slab<kMx, kThreads>(stages[layout.next_stage(first + s)], g, m0, n0, first + s, layout);
    cp_async_commit();
  }
  for (int slab = first; slab < last; slab++) {
    cp_async_wait<kFp4Stages - 2>();                       // this thread's part of the slab has arrived
    __syncthreads();                                       // everybody's has; and nobody still reads the stage that is filled next
    const int ahead = slab + kFp4Stages - 1;
    if (ahead < last) fp4_load_slab<kMx, kThreads>(stages[layout.next_stage(ahead)], g, m0, n0, ahead, layout);
    cp_async_commit();

    const Fp4Stage& stage = stages[slab % kFp4Stages];
    float slab_sum[kOuter ? 4 : 1][kOuter ? kFragments : 1][4] = {};
    const int m = lane / 8, row8 = lane % 8;               // ldmatrix: this lane names row row8 of matrix m
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const int tile = kMx ? 0 : 512 * layout.scale_step(step), shift = kMx ? 16 * layout.mx_half(step) : 0;
      auto scale_word = [&](int operand, int row) {
        return *reinterpret_cast<const uint32_t*>(stage.scales[operand] + tile + layout.scale_word(row)) >> shift;
      };
      uint32_t a[4][4], sfa[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        ldmatrix_x4(a[i], reinterpret_cast<const bf16*>(stage.codes[0] + fp4_swizzle(wm + 16 * i + layout.a_row(m) + row8, 2 * step + layout.a_k(m) / 32)));
        sfa[i] = scale_word(0, wm + 16 * i + layout.scale_a_row(lane));
      }
#pragma unroll
      for (int pair = 0; pair < kFragments / 2; pair++) {
        uint32_t b[4];
        ldmatrix_x4(b, reinterpret_cast<const bf16*>(stage.codes[1] + fp4_swizzle(wn + layout.column(2 * pair + layout.b_fragment(m), row8), 2 * step + layout.b_k(m) / 32)));
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int f = 2 * pair + h;
          const uint32_t sfb = scale_word(1, wn + layout.column(f, layout.scale_b_column(lane)));
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float(&d)[4] = kOuter ? slab_sum[i % (kOuter ? 4 : 1)][f % (kOuter ? kFragments : 1)] : sum[i][f];
            mma_m16n8k64_fp4<kMx>(d, a[i], b[2 * h], b[2 * h + 1], sfa[i], sfb, truncate);
          }
        }
      }
    }
    if constexpr (kOuter) {                                // sum += (outer scale of the row * outer scale of the column) * slab_sum
      auto outer = [&](const float* scales, int row, int rows) { return row < rows ? scales[(size_t)row * slabs + layout.outer_slab(slab)] : 0.0f; };
      float of_column[kFragments][2];
#pragma unroll
      for (int f = 0; f < kFragments; f++) for (int c = 0; c < 2; c++) of_column[f][c] = outer(g.b_outer, n0 + wn + layout.column(f, 2 * t + c), g.N);
#pragma unroll
      for (int i = 0; i < 4; i++) for (int h = 0; h < 2; h++) {
        const float of_row = outer(g.a_outer, m0 + wm + 16 * i + 8 * h + lane / 4, g.M);
#pragma unroll
        for (int f = 0; f < kFragments; f++) for (int c = 0; c < 2; c++)
          sum[i][f][2 * h + c] = fmaf(__fmul_rn(of_row, of_column[f][c]), slab_sum[i][f][2 * h + c], sum[i][f][2 * h + c]);
      }
    }
  }

  float alpha = 1;
  if (parts > 1) {                                         // a part of the sum, as it is
    g.D = workspace + (size_t)part * g.M * g.N; g.ldd = g.N; g.d_fp32 = true; g.accumulate = false; g.bias = nullptr;
  } else if (g.alpha) alpha = *g.alpha;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int pair = 0; pair < kFragments / 2; pair++) {
        const float four[4] = {sum[i][2 * pair][layout.d_register(h, 0)], sum[i][2 * pair][layout.d_register(h, 1)], sum[i][2 * pair + 1][layout.d_register(h, 0)], sum[i][2 * pair + 1][layout.d_register(h, 1)]};
        fp4_store(g, alpha, m0 + wm + 16 * i + 8 * h + lane / 4, n0 + wn + 16 * pair + 4 * t, four);
      }
}
// Adds the parts in ascending order.
__global__ void gemm_fp4_parts_kernel(GemmFp4 g, const float* workspace, int parts) {
  const int quads = ceil_div(g.N, 4);
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i >= (size_t)g.M * quads) return;
  const int row = (int)(i / quads), column = (int)(i % quads) * 4;
  float sum[4] = {};
  for (int p = 0; p < parts; p++)
    for (int c = 0; c < 4; c++)
      if (column + c < g.N) sum[c] += workspace[((size_t)p * g.M + row) * g.N + column + c];
  fp4_store(g, g.alpha ? *g.alpha : 1.0f, row, column, sum);
}

// Blocks that the machine runs at once, and the workspace that split sums can need: tiles * parts never exceeds it.
inline int fp4_block_slots() { return 2 * multiprocessors(); }
inline float* fp4_workspace() {
  static float* w = device_alloc<float>((size_t)fp4_block_slots() * kFp4Tile * kFp4Tile);
  return w;
}
inline int fp4_parts(int M, int N, int K) {
  const int tiles = ceil_div(M, kFp4Tile) * ceil_div(N, kFp4Tile), slabs = ceil_div(K, kFp4Slab);
  return max(1, min(fp4_block_slots() / tiles, slabs / 4));                    // at least 4 slabs a part
}
struct Fp4MmaHow {
  int parts = 0;                // 0: as many as fill the machine
  bool truncate = false;        // accumulate as the chip is documented to (where the instruction's meaning runs)
};
template <class L = Fp4Layout> void gemm_fp4_mma(const GemmFp4& g, Fp4MmaHow how = {}, L layout = {}) {
  const dim3 grid(ceil_div(g.N, kFp4Tile), ceil_div(g.M, kFp4Tile), 1);
  if (grid.y > 65535) die("the FP4 GEMM %s has too many rows for one launch; lower --batch", fp4_shape_text(g).c_str());
  const int parts = how.parts ? min(how.parts, max(1, fp4_block_slots() / (int)(grid.x * grid.y))) : fp4_parts(g.M, g.N, g.K);
  float* workspace = parts > 1 ? fp4_workspace() : nullptr;
  auto go = [&](auto mx, auto outer) {
    launch(gemm_fp4_kernel<mx.value, outer.value, L>, dim3(grid.x, grid.y, parts), kFp4Threads<outer.value>, kFp4Stages * sizeof(Fp4Stage), g, workspace, how.truncate, layout);
  };
  if (g.mx) go(std::true_type{}, std::false_type{});
  else if (g.a_outer) go(std::false_type{}, std::true_type{});
  else go(std::false_type{}, std::false_type{});
  if (parts > 1) launch(gemm_fp4_parts_kernel, (unsigned)ceil_div((size_t)g.M * ceil_div(g.N, 4), (size_t)256), 256, 0, g, (const float*)workspace, parts);
}

// =====================================================================================================================================
// Which way

// Stops with an error that names the shape if the way cannot run it. `way` is cublaslt or mma.
inline void gemm_fp4(const GemmFp4& g, GemmWay way) {
  const std::string refusal = fp4_refusal(g, way);
  if (!refusal.empty()) die("--gemm %s cannot run the FP4 GEMM %s: %s; run with --gemm emulated", gemm_way_name(way), fp4_shape_text(g).c_str(), refusal.c_str());
#ifndef CPU_BUILD
  if (way == GemmWay::cublaslt) return gemm_fp4_cublaslt(g);
#endif
  gemm_fp4_mma(g);
}

// The way of each kind of FP4 GEMM, chosen once at the start from --gemm and the GPU.
struct Fp4Ways {
  GemmWay plain = GemmWay::emulated, outer = GemmWay::emulated, mx = GemmWay::emulated;   // NVFP4; with 1x128 outer scales; MXFP4
  bool any_native() const { return plain != GemmWay::emulated || outer != GemmWay::emulated || mx != GemmWay::emulated; }
};
// compute_capability: major * 10 + minor, 0 for the CPU.
inline Fp4Ways fp4_ways_for(GemmWay wanted, int compute_capability, bool mma_is_native) {
  const int major = compute_capability / 10;
  const bool library = major == 10 || major == 12;
  if (wanted == GemmWay::cublaslt && !library) die("--gemm cublaslt needs FP4 tensor cores (B200, B300, RTX 50, RTX PRO Blackwell, GB10); this is %s. --gemm auto or emulated runs here",
                                                   compute_capability ? ("a GPU of compute capability " + std::to_string(major) + "." + std::to_string(compute_capability % 10)).c_str() : "a CPU");
  if (wanted == GemmWay::mma) return {GemmWay::mma, GemmWay::mma, GemmWay::mma};
  if (wanted == GemmWay::cublaslt) return {GemmWay::cublaslt, GemmWay::cublaslt, GemmWay::cublaslt};      // outer and mx: refused with an error where asked for
  if (wanted == GemmWay::emulated || !library) return {};
  const GemmWay other = mma_is_native ? GemmWay::mma : GemmWay::emulated;
  return {GemmWay::cublaslt, other, other};
}
inline Fp4Ways fp4_ways(GemmWay wanted) {
#ifdef CPU_BUILD
  return fp4_ways_for(wanted, 0, false);
#else
  int major = 0, minor = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  return fp4_ways_for(wanted, 10 * major + minor, mma_fp4_is_native());
#endif
}
inline bool gemm_way_from_name(const std::string& name, GemmWay* way) {
  for (GemmWay w : {GemmWay::automatic, GemmWay::cublaslt, GemmWay::mma, GemmWay::emulated}) if (name == gemm_way_name(w)) { *way = w; return true; }
  return false;
}
// What the program prints about a way.
inline std::string fp4_way_text(GemmWay way) {
  if (way == GemmWay::cublaslt) return "FP4 tensor cores, cuBLASLt";
  if (way == GemmWay::mma) return mma_fp4_is_native() ? "FP4 tensor cores, our mma.sync kernel" : "our mma.sync kernel on the model of its instruction (slow: this machine has no FP4 tensor cores that it could use)";
  return gemm_way();
}

// =====================================================================================================================================
// The self-check: is a way right on this GPU, with this driver and library?
//
// Random codes and scales, run through the way and through gemm.cuh on the operands' values. The scales are drawn so that every partial sum
// fits FP32's 24 bits (see "why the emulation computes the same"): the results must be equal bit for bit.

__host__ __device__ inline uint32_t fp4_hash(uint64_t x) {               // splitmix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return (uint32_t)(x >> 32 ^ x);
}
struct Fp4Random { uint8_t *codes, *scales; float* outer; int rows, K, ld; bool mx; uint64_t seed; };
// One thread per 8 codes and, where a block begins, its scale. Padding gets zeros.
__global__ void fp4_random_kernel(Fp4Random r) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  const int rows = round_up(r.rows, 128), words = round_up(r.ld, 128) / 8, block = r.mx ? 32 : 16, blocks = ceil_div(r.K, block);
  if (i >= (size_t)rows * words) return;
  const int row = (int)(i / words), k = (int)(i % words) * 8;
  const uint32_t h = fp4_hash(r.seed + 2 * i), h2 = fp4_hash(r.seed + 2 * i + 1);
  if (row < r.rows && k < r.ld) {
    uint32_t codes = 0;
    for (int j = 0; j < 8; j++) if (k + j < r.K) codes |= (h >> 4 * j & 15) << 4 * j;
    *reinterpret_cast<uint32_t*>(r.codes + ((size_t)row * r.ld + k) / 2) = codes;
  }
  if (k % block == 0 && k / block < round_up(blocks, 4)) {
    const bool inside = row < r.rows && k < r.K;
    const uint32_t e = r.K <= 4096 ? h2 >> 8 & 1 : 0, e4m3 = h2 >> 16 & 15 ? (7 + e) << 3 | (h2 & 7) : 0;   // 1 .. 1.875, times 2 if K leaves room; a few are 0
    r.scales[scale_offset(row, k / block, blocks)] = (uint8_t)(!inside ? 0 : r.mx ? 126 + h2 % 3 : e4m3);
  }
  if (r.outer && row < r.rows && k % 128 == 0 && k < r.K) r.outer[(size_t)row * ceil_div(r.K, 128) + k / 128] = r.K <= 16384 && (h2 >> 24 & 1) ? 0.5f : 1.0f;
}
// values[row - first, k] = code * scale * outer, exact in BF16 (the outer scales here are powers of two). One thread an element.
__global__ void fp4_values_kernel(floatX* values, Fp4Random r, int first, int rows) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i >= (size_t)rows * r.ld) return;
  const int row = first + (int)(i / r.ld), k = (int)(i % r.ld), block = r.mx ? 32 : 16;
  float v = 0;
  if (k < r.K) {
    const uint8_t scale = r.scales[scale_offset(row, k / block, ceil_div(r.K, block))];
    v = e2m1_decode(r.codes[((size_t)row * r.ld + k) / 2] >> k % 2 * 4 & 15) * (r.mx ? e8m0_decode(scale) : e4m3_decode(scale));
    if (r.outer) v *= r.outer[(size_t)row * ceil_div(r.K, 128) + k / 128];
  }
  values[i] = from_float<floatX>(v);
}
template <class T> __global__ void fp4_compare_kernel(unsigned* mismatch, const T* a, const T* b, unsigned n) {     // mismatch: ~(index of the first)
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n && !(to_float(a[i]) == to_float(b[i]))) atomicMax(mismatch, ~i);
}

struct Fp4CheckShape { int M, N, K; bool d_fp32, accumulate, outer, mx; };
// The three GEMMs of a linear layer, X [T,K], W [N,K].
inline void fp4_add_linear_shapes(std::vector<Fp4CheckShape>& to, int T, int K, int N, bool outer = false, bool mx = false) {
  to.push_back({T, N, K, false, false, outer, mx});
  to.push_back({T, K, N, false, false, outer, mx});
  to.push_back({N, K, T, true, true, outer, mx});
}
// Returns an empty string, or what differs. `run` runs a GemmFp4.
template <class Run> std::string fp4_check_shape(const Fp4CheckShape& s, Run run) {
  const int ld = round_up(s.K, 32), block = s.mx ? 32 : 16, slabs = ceil_div(s.K, 128);
  auto operand = [&](int rows, uint64_t seed) {
    Fp4Random r = {device_alloc<uint8_t>((size_t)rows * ld / 2), device_alloc<uint8_t>((size_t)ceil_div(rows, 128) * ceil_div(ceil_div(s.K, block), 4) * 512),
                   s.outer ? device_alloc<float>((size_t)rows * slabs) : nullptr, rows, s.K, ld, s.mx, seed};
    launch(fp4_random_kernel, (unsigned)ceil_div((size_t)round_up(rows, 128) * round_up(ld, 128) / 8, (size_t)256), 256, 0, r);
    return r;
  };
  auto values = [&](floatX* v, const Fp4Random& r, int first, int rows) { launch(fp4_values_kernel, (unsigned)ceil_div((size_t)rows * ld, (size_t)256), 256, 0, v, r, first, rows); };
  const Fp4Random a = operand(s.M, 1ull << 40), b = operand(s.N, 1ull << 41);
  const int chunk = (int)min((size_t)s.M, max((size_t)128, ((size_t)64 << 20) / max(ld, s.N)));      // rows emulated at once: bounds the memory
  floatX *b_values = device_alloc<floatX>((size_t)s.N * ld), *a_values = device_alloc<floatX>((size_t)chunk * ld);
  float* alpha = device_alloc<float>(1);
  const float half = 0.5f;
  to_device(alpha, &half, 1);
  unsigned* mismatch = device_alloc<unsigned>(1);
  const size_t bytes = s.d_fp32 ? 4 : sizeof(floatX), n = (size_t)s.M * s.N;
  uint8_t *D = device_alloc<uint8_t>(n * bytes), *want = device_alloc<uint8_t>((size_t)chunk * s.N * bytes);
  if (s.accumulate) device_zero(D, n * bytes);

  GemmFp4 g;
  g.M = s.M; g.N = s.N; g.K = s.K; g.a_codes = a.codes; g.a_scales = a.scales; g.b_codes = b.codes; g.b_scales = b.scales; g.lda = g.ldb = ld;
  g.D = D; g.ldd = s.N; g.d_fp32 = s.d_fp32; g.accumulate = s.accumulate; g.alpha = alpha; g.a_outer = a.outer; g.b_outer = b.outer; g.mx = s.mx;
  for (int again = 0; again <= (int)s.accumulate; again++) run(g);          // accumulated: twice, from zero
  std::string problem;
  values(b_values, b, 0, s.N);
  for (int first = 0; first < s.M && problem.empty(); first += chunk) {
    const int rows = min(chunk, s.M - first);
    values(a_values, a, first, rows);
    Gemm e;
    e.M = rows; e.N = s.N; e.K = ld; e.A = a_values; e.B = b_values; e.lda = e.ldb = ld; e.D = want; e.ldd = s.N; e.d_fp32 = s.d_fp32; e.alpha = alpha; e.accumulate = s.accumulate;
    if (s.accumulate) device_zero(want, (size_t)rows * s.N * bytes);
    for (int again = 0; again <= (int)s.accumulate; again++) gemm(e);
    device_zero(mismatch, 1);
    const uint8_t* got = D + (size_t)first * s.N * bytes;
    const unsigned count = (unsigned)rows * s.N;
    if (bytes == 4) launch(fp4_compare_kernel<float>, ceil_div(count, 256u), 256, 0, mismatch, (const float*)got, (const float*)want, count);
    else launch(fp4_compare_kernel<bf16>, ceil_div(count, 256u), 256, 0, mismatch, (const bf16*)got, (const bf16*)want, count);
    unsigned m = 0;
    to_host(&m, mismatch, 1);
    if (!m) continue;
    const unsigned i = ~m;
    auto element = [&](const uint8_t* from) {
      if (bytes == 4) { float v; to_host((uint8_t*)&v, from + 4 * (size_t)i, 4); return v; }
      bf16 v; to_host((uint8_t*)&v, from + 2 * (size_t)i, 2); return to_float(v);
    };
    char text[120];
    snprintf(text, sizeof text, ": element (%u, %u) is %.9g, the exact emulation says %.9g", first + i / s.N, i % s.N, element(got), element(want));
    problem = fp4_shape_text(g) + text;
  }
  for (uint8_t* p : {a.codes, a.scales, b.codes, b.scales, D, want}) device_free(p);
  if (s.outer) { device_free(a.outer); device_free(b.outer); }
  device_free(a_values); device_free(b_values); device_free(alpha); device_free(mismatch);
  return problem;
}

// Checks one way at the model's shapes {M, N, K, FP32?, accumulated?, outer?, mx?} and at tiles whose edges fall everywhere. Returns the line
// to print; stops the program at the first mismatch. Takes device memory for a while: call it before the arena is taken.
template <class Run> std::string fp4_self_check(const std::vector<Fp4CheckShape>& model_shapes, GemmWay way, Run run) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<Fp4CheckShape> shapes;
  auto add = [&](const Fp4CheckShape& s) {
    for (const Fp4CheckShape& t : shapes) if (t.M == s.M && t.N == s.N && t.K == s.K && t.d_fp32 == s.d_fp32 && t.accumulate == s.accumulate && t.outer == s.outer && t.mx == s.mx) return;
    shapes.push_back(s);
  };
  for (const Fp4CheckShape& s : model_shapes) add(s);
  const size_t distinct = shapes.size();
  bool outer = way == GemmWay::mma, mx = way == GemmWay::mma;
  add({1, 8, 32, false, false, false, false});                              // N is a multiple of 8: cuBLASLt's rule
  add({130, 136, 288, false, false, false, false});
  add({97, 72, 160, true, true, false, false});
  if (way == GemmWay::mma) add({131, 75, 203, true, false, false, false});
  if (outer) add({131, 75, 403, true, true, true, false});
  if (mx) add({131, 75, 403, false, false, false, true});
  for (const Fp4CheckShape& s : shapes) {
    const std::string problem = fp4_check_shape(s, run);
    if (!problem.empty())
      die("self-check of --gemm %s failed on this machine, %s. This way must not be used here: run with --gemm emulated (and please report this line, the GPU and the driver)", gemm_way_name(way), problem.c_str());
  }
  const double ms = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() * 1e3;
  char line[200];
  snprintf(line, sizeof line, "self-check of --gemm %s: %zu shapes of the model and %zu edge tiles equal the exact emulation (%.0f ms)", gemm_way_name(way), distinct, shapes.size() - distinct, ms);
  return line;
}
inline std::string fp4_self_check(const std::vector<Fp4CheckShape>& model_shapes, GemmWay way) {
  return fp4_self_check(model_shapes, way, [way](const GemmFp4& g) { gemm_fp4(g, way); });
}
