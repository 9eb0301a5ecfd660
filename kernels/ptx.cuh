// kernels/ptx.cuh -- the few PTX instructions that kernels need by name, each beside its meaning in plain C++.
//
// On a GPU: the instruction. On the CPU (CPU_BUILD): the same computation, for mma and ldmatrix as a collective of the 32 lanes
// of the warp. So the tensor core kernels run, and are tested, without a GPU; and the C++ says what the instruction does.
//
// A warp-wide matrix is spread over the lanes as "fragments" (PTX ISA, section on mma.m16n8k16). With g = lane / 4, t = lane % 4:
//   A, 16 x 16 bf16, 4 registers:  register r holds row g + 8 (r & 1),  columns 2t + 8 (r >> 1) + {0, 1}
//   B, 16 x 8  bf16, 2 registers:  register r holds rows 2t + 8 r + {0, 1},  column g
//   C and D, 16 x 8 float, 4 registers:  register i holds row g + 8 (i >> 1),  column 2t + (i & 1)
// The lower half of a register is the first of its two bf16. Two C fragments side by side (16 x 16), rounded to bf16 in place,
// are an A fragment: attention uses this to feed probabilities into the next product without leaving the registers.
//
// These need sm_80. The FP4 product (m16n8k64, further down, with its own layout) is an instruction of the sm_120 family only; every
// other GPU runs its meaning, through shuffles, so that the same FP4 GEMM can be executed and checked anywhere.
#pragma once
#include "cuda.cuh"
#include "formats.cuh"
#ifdef CPU_BUILD
#include <deque>
#endif

// ------------------------------------------------------------------ max(m, |v|), NaN if either is NaN (the CPU compares bits instead: strips.cuh)
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float max_abs_nan(float m, float v) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(m) : "f"(fabsf(v)));
  return m;
}
#endif

// ------------------------------------------------------------------ d += A B: 16 x 8 float += 16 x 16 bf16 times 16 x 8 bf16
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifndef CPU_BUILD
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct Part { float d[4]; uint32_t a[4], b[2]; } part = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  part = cuda_on_cpu::collective(~0u, part, [](Part* lane) {
    float A[16][16], B[16][8];
    auto half = [](uint32_t r, int h) { return __uint_as_float((h ? r >> 16 : r & 0xffff) << 16); };
    for (int l = 0; l < 32; l++) for (int h = 0; h < 2; h++) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; r++) A[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + h] = half(lane[l].a[r], h);
      for (int r = 0; r < 2; r++) B[2 * t + 8 * r + h][g] = half(lane[l].b[r], h);
    }
    for (int l = 0; l < 32; l++) for (int i = 0; i < 4; i++) {
      const int row = l / 4 + 8 * (i >> 1), column = 2 * (l % 4) + (i & 1);
      double sum = lane[l].d[i];                      // (the hardware aligns the 17 terms and truncates to about 25 bits)
      for (int k = 0; k < 16; k++) sum += (double)A[row][k] * B[k][column];
      lane[l].d[i] = (float)sum;
    }
  });
  for (int i = 0; i < 4; i++) d[i] = part.d[i];
#endif
}

// ------------------------------------------------------------------ d += (A scaled) (B scaled): 16 x 8 float += 16 x 64 E2M1 times 64 x 8 E2M1
// The FP4 tensor core of the sm_120 family: every group of 16 k (NVFP4, E4M3 scales) or 32 k (MXFP4, E8M0 scales) of a row of A and of
// a column of B has a scale of its own, and the instruction multiplies it in. g = lane / 4, t = lane % 4; nibble i of a register is
// bits 4i .. 4i+3; a register holds 8 consecutive k.
//   A, 4 registers:  register r holds row g + 8 (r & 1),  k = 8t + 32 (r >> 1) + i
//   B, 2 registers:  register r holds column g,           k = 8t + 32 r + i
//   C and D as above
//   sfa:  the scales of row g + 8 t, from lanes with t < 2.      NVFP4: bytes 0..3 = groups 0..3 of 16.  MXFP4: bytes 0, 1 = groups 0, 1 of 32
//   sfb:  the scales of column g, from lanes with t = 0.         (the two selectors {byte, thread} are 0; other lanes' words are ignored)
// Source: PTX ISA 9.7.14, "Warp-level matrix multiply-accumulate with block scaling"; CUTLASS mma_traits_sm120.hpp says the same.
#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#if __CUDA_ARCH_FAMILY_SPECIFIC__ / 100 == 12        // compute_120f, 120a, 121a: plain compute_120 has no FP4
#define MMA_FP4_INSTRUCTION 1
#endif
#endif

#ifndef MMA_FP4_INSTRUCTION
// One element of D. sum[j]: products of the j-th group of 16 codes, exact, in units of 1/4; scale_a[j], scale_b[j]: its scales.
//   exact      d + sum of everything, rounded once to FP32: what a tensor core computes on ordinary data, where all terms lie on a coarse grid
//   truncate   what MMA-Sim (arXiv 2511.10909) found in B200 and RTX Blackwell: the groups are exact; they and d are cut off 35 binary digits
//              below the largest exponent (of a group: the sum of its scales' exponents), added, and cut off to FP32
__host__ __device__ inline float mma_fp4_element(float d, const int* sum, const float* scale_a, const float* scale_b, int smallest_exponent,
                                                 bool truncate) {
  double term[5] = {d, 0, 0, 0, 0};
  for (int j = 0; j < 4; j++) term[j + 1] = 0.25 * sum[j] * ((double)scale_a[j] * scale_b[j]);
  if (!truncate) return (float)(term[0] + term[1] + term[2] + term[3] + term[4]);
  auto exponent = [](float x, int smallest) { return x == 0 || x != x ? -126 : max(ilogb((double)x), smallest); };
  int top = exponent(d, -126);
  for (int j = 0; j < 4; j++) top = max(top, exponent(scale_a[j], smallest_exponent) + exponent(scale_b[j], smallest_exponent));
  double all = 0;
  for (int j = 0; j < 5; j++) all += ldexp(trunc(ldexp(term[j], 35 - top)), top - 35);
  const float f = (float)all;
  return fabs((double)f) > fabs(all) ? bits_float(float_bits(f) - 1) : f;           // toward zero
}
template <bool kMx> __host__ __device__ inline float mma_fp4_scale(uint32_t word, int group_of_16) {
  if (kMx) return e8m0_decode((uint8_t)(word >> 8 * (group_of_16 / 2)));
  return e4m3_decode((uint8_t)(word >> 8 * group_of_16 & 0x7f));                     // UE4M3: the sign bit is ignored
}
// Twice the value of nibble i: an integer.
__host__ __device__ inline int mma_fp4_code(uint32_t word, int i) {
  const int code = word >> 4 * i & 15, twice = 0xc8643210u >> 4 * (code & 7) & 15;   // 0 .5 1 1.5 2 3 4 6
  return code & 8 ? -twice : twice;
}
#ifdef CPU_BUILD
template <bool kMx> void mma_fp4_meaning(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t sfa, uint32_t sfb, bool truncate) {
  struct Part { float d[4]; uint32_t a[4], b[2], sfa, sfb; } part = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}, sfa, sfb};
  part = cuda_on_cpu::collective(~0u, part, [truncate](Part* lane) {
    short A[16][64], B[8][64];
    float scale_a[16][4], scale_b[8][4];
    for (int l = 0; l < 32; l++) for (int i = 0; i < 8; i++) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; r++) A[g + 8 * (r & 1)][8 * t + 32 * (r >> 1) + i] = (short)mma_fp4_code(lane[l].a[r], i);
      for (int r = 0; r < 2; r++) B[g][8 * t + 32 * r + i] = (short)mma_fp4_code(lane[l].b[r], i);
    }
    for (int j = 0; j < 4; j++) {
      for (int row = 0; row < 16; row++) scale_a[row][j] = mma_fp4_scale<kMx>(lane[4 * (row % 8) + row / 8].sfa, j);
      for (int column = 0; column < 8; column++) scale_b[column][j] = mma_fp4_scale<kMx>(lane[4 * column].sfb, j);
    }
    for (int l = 0; l < 32; l++) for (int i = 0; i < 4; i++) {
      const int row = l / 4 + 8 * (i >> 1), column = 2 * (l % 4) + (i & 1);
      int sum[4] = {0, 0, 0, 0};
      for (int j = 0; j < 4; j++) for (int k = 16 * j; k < 16 * j + 16; k++) sum[j] += A[row][k] * B[column][k];
      lane[l].d[i] = mma_fp4_element(lane[l].d[i], sum, scale_a[row], scale_b[column], kMx ? -127 : -6, truncate);
    }
  });
  for (int i = 0; i < 4; i++) d[i] = part.d[i];
}
#else
// The same, each lane fetching what its four elements need: the two rows of A from the 4 lanes of its own quad, the two columns of B
// from two other quads. A function of its own (not inlined): a GEMM calls it dozens of times.
template <bool kMx> __device__ __noinline__ float4 mma_fp4_meaning(float4 d, uint4 a, uint2 b, uint32_t sfa, uint32_t sfb, bool truncate) {
  const int lane = threadIdx.x % 32, quad = lane & ~3, t = lane % 4;
  const uint32_t word_a[4] = {a.x, a.y, a.z, a.w}, word_b[2] = {b.x, b.y};
  int sum[2][2][4] = {};                                   // [row g or g + 8][column 2t or 2t + 1][group of 16]
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int u = 0; u < 4; u++) {                          // lane u of a quad holds k = 32 r + 8 u and the 7 that follow
      const uint32_t x[2] = {__shfl_sync(~0u, word_a[2 * r], quad + u), __shfl_sync(~0u, word_a[2 * r + 1], quad + u)};
      const uint32_t y[2] = {__shfl_sync(~0u, word_b[r], 8 * t + u), __shfl_sync(~0u, word_b[r], 8 * t + 4 + u)};
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int c = 0; c < 2; c++)
          for (int i = 0; i < 8; i++) sum[h][c][2 * r + u / 2] += mma_fp4_code(x[h], i) * mma_fp4_code(y[c], i);
    }
  const uint32_t word_sa[2] = {__shfl_sync(~0u, sfa, quad), __shfl_sync(~0u, sfa, quad + 1)};
  const uint32_t word_sb[2] = {__shfl_sync(~0u, sfb, 8 * t), __shfl_sync(~0u, sfb, 8 * t + 4)};
  float out[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float scale_a[4], scale_b[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      scale_a[j] = mma_fp4_scale<kMx>(word_sa[i >> 1], j);
      scale_b[j] = mma_fp4_scale<kMx>(word_sb[i & 1], j);
    }
    out[i] = mma_fp4_element(out[i], sum[i >> 1][i & 1], scale_a, scale_b, kMx ? -127 : -6, truncate);
  }
  return make_float4(out[0], out[1], out[2], out[3]);
}
template <bool kMx> __device__ inline void mma_fp4_meaning(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t sfa,
                                                           uint32_t sfb, bool truncate) {
  const uint4 codes = make_uint4(a[0], a[1], a[2], a[3]);
  const float4 r = mma_fp4_meaning<kMx>(make_float4(d[0], d[1], d[2], d[3]), codes, make_uint2(b0, b1), sfa, sfb, truncate);
  d[0] = r.x; d[1] = r.y; d[2] = r.z; d[3] = r.w;
}
#endif
#endif

// kMx false, NVFP4: E4M3 scales, one for 16 codes. kMx true, MXFP4: E8M0 scales, one for 32, in the lower two bytes of sfa and sfb.
// `truncate` chooses the accumulation where the meaning runs; the instruction does what it does.
template <bool kMx> __device__ inline void mma_m16n8k64_fp4(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t sfa,
                                                            uint32_t sfb, [[maybe_unused]] bool truncate = false) {
#ifdef MMA_FP4_INSTRUCTION
#define MMA_FP4_ASM(scales, type)                                                                                    \
  asm volatile("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::" scales ".f32.e2m1.e2m1.f32." type " " \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {0, 0}, %11, {0, 0};"                     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(sfa), "r"(sfb))
  if constexpr (kMx) MMA_FP4_ASM("2X", "ue8m0");
  else MMA_FP4_ASM("4X", "ue4m3");
#undef MMA_FP4_ASM
#else
  mma_fp4_meaning<kMx>(d, a, b0, b1, sfa, sfb, truncate);
#endif
}
// Does this binary, on this GPU, contain the instruction? (On the CPU and on every GPU outside the sm_120 family: no, its meaning.)
__global__ void mma_fp4_native_kernel(int* native) {
#ifdef MMA_FP4_INSTRUCTION
  *native = 1;
#else
  *native = 0;
#endif
}
inline bool mma_fp4_is_native() {
  static const bool native = [] {
    int* p = device_alloc<int>(1);
    launch(mma_fp4_native_kernel, 1, 1, 0, p);
    int n = 0;
    to_host(&n, p, 1);
    device_free(p);
    return n != 0;
  }();
  return native;
}

// ------------------------------------------------------------------ ldmatrix: four 8 x 8 bf16 matrices from shared memory
// Lane l names the address of row l % 8 of matrix l / 8 (16 bytes, aligned). Register m of lane l receives from matrix m
//   plain:       row l / 4, columns 2 (l % 4) + {0, 1}
//   transposed:  rows 2 (l % 4) + {0, 1}, column l / 4
#ifdef CPU_BUILD
inline void ldmatrix_meaning(uint32_t (&r)[4], const bf16* row, bool transposed) {
  struct Part { const bf16* row; uint32_t r[4]; } part = {row, {}};
  if ((uintptr_t)row % 16) cuda_on_cpu::report("ldmatrix: the address of a row is not a multiple of 16 bytes");
  part = cuda_on_cpu::collective(~0u, part, [transposed](Part* lane) {
    for (int l = 0; l < 32; l++) for (int m = 0; m < 4; m++) {
      auto at = [&](int row, int column) { return (uint32_t)lane[8 * m + row].row[column].bits; };
      const int i = l / 4, j = 2 * (l % 4);
      lane[l].r[m] = transposed ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
    }
  });
  for (int m = 0; m < 4; m++) r[m] = part.r[m];
}
#endif
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const bf16* row) {
#ifndef CPU_BUILD
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
#else
  ldmatrix_meaning(r, row, false);
#endif
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const bf16* row) {
#ifndef CPU_BUILD
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
#else
  ldmatrix_meaning(r, row, true);
#endif
}

// ------------------------------------------------------------------ cp.async: global to shared memory behind the thread's back
// Copies kBytes (4 or 16; both addresses aligned to it), or writes zeros when `inside` is false (global is then not read, but must
// be an address that exists). A thread's copies since its last cp_async_commit form a group; cp_async_wait<n> returns when all but
// the thread's n latest groups have arrived. Other threads see the data after a __syncthreads that follows the wait.
#ifdef CPU_BUILD
// The copy happens as late as it may, in the wait, so that a missing wait shows. Groups by thread of the block that runs now.
struct AsyncCopy { void* shared; const void* global; int bytes, valid; };
inline thread_local std::deque<std::vector<AsyncCopy>> async_copies[1024];   // back(): the group not yet committed
#endif
template <int kBytes> __device__ inline void cp_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 4 || kBytes == 16, "cp_async copies 4 or 16 bytes");
#ifndef CPU_BUILD
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  const int valid = inside ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(global), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(global), "r"(valid) : "memory");
#else
  if ((uintptr_t)shared % kBytes || (uintptr_t)global % kBytes) cuda_on_cpu::report("cp.async: an address is not aligned to the copy's size");
  auto& groups = async_copies[cuda_on_cpu::block.current->tid];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({shared, global, kBytes, inside ? kBytes : 0});
#endif
}
__device__ inline void cp_async_commit() {
#ifndef CPU_BUILD
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  auto& groups = async_copies[cuda_on_cpu::block.current->tid];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
#endif
}
template <int kGroupsLeft> __device__ inline void cp_async_wait() {
#ifndef CPU_BUILD
  asm volatile("cp.async.wait_group %0;" :: "n"(kGroupsLeft) : "memory");
#else
  auto& groups = async_copies[cuda_on_cpu::block.current->tid];
  for (; (int)groups.size() > kGroupsLeft + 1; groups.pop_front())
    for (const AsyncCopy& c : groups.front()) {
      memset(c.shared, 0, c.bytes);
      memcpy(c.shared, c.global, c.valid);
    }
#endif
}

// ------------------------------------------------------------------ small ones
// 2^x, relative error 2^-22; results below 2^-126 become 0. One instruction; exp2f spends two more on subnormal results.
__device__ inline float ex2_approx(float x) {
#ifndef CPU_BUILD
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0.0f : exp2f(x);
#endif
}
// x; but the compiler is not told what it is made of, which it would otherwise do again wherever x is used, to save a register.
__device__ __forceinline__ float in_register(float x) {
#ifndef CPU_BUILD
  asm("" : "+f"(x));
#endif
  return x;
}
__device__ __forceinline__ uint32_t in_register(uint32_t x) {
#ifndef CPU_BUILD
  asm("" : "+r"(x));
#endif
  return x;
}
// Which warp of its block this is. Of what a shuffle gives all lanes the compiler knows that they agree: a branch that depends on it alone leaves constants
// in uniform registers. All lanes call it.
__device__ __forceinline__ int warp_in_block() {
#ifdef CPU_BUILD
  return (int)threadIdx.x / 32;
#else
  return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
#endif
}
// The same; and what is made of it stays behind the branch where this stands: a compiler likes to compute little things before it knows whether they
// are wanted.
__device__ __forceinline__ uint32_t behind_branch(uint32_t x) {
#ifndef CPU_BUILD
  asm volatile("" : "+r"(x));
#endif
  return x;
}
// Two products of bf16, each rounded to nearest even: the lower halves' and the upper halves'.
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
#ifndef CPU_BUILD
  __nv_bfloat162 x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  x = __hmul2(x, y);
  memcpy(&a, &x, 4);
  return a;
#else
  return to_bf16(bits_float(a << 16) * bits_float(b << 16)).bits |
         (uint32_t)to_bf16(bits_float(a & 0xffff0000u) * bits_float(b & 0xffff0000u)).bits << 16;
#endif
}
// max(|m|, |x|) of each of two bf16, NaN if there is one; the signs of the result mean nothing.
__device__ __forceinline__ uint32_t max_abs_bf16x2(uint32_t m, uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  asm("max.NaN.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(m) : "r"(x));
  return m;
#elif !defined(CPU_BUILD)
  asm("{.reg .b32 a; abs.bf16x2 a, %1; max.NaN.bf16x2 %0, %0, a;}" : "+r"(m) : "r"(x));
  return m;
#else
  return max(m & 0x7fffu, x & 0x7fffu) | max(m & 0x7fff0000u, x & 0x7fff0000u);
#endif
}
// The larger of such a pair, as the bits of a nonnegative float: ordered like the floats themselves, with NaN above all.
__device__ __forceinline__ uint32_t pair_amax_bits(uint32_t pair) { return max(pair << 16 & 0x7fff0000u, pair & 0x7fff0000u); }
// Such bits, with the NaN that a GPU's arithmetic makes in the place of one that has kept its own.
__device__ __forceinline__ uint32_t arithmetic_nan(uint32_t bits) { return !kOnCpu && bits > 0x7f800000u ? 0x7fffffffu : bits; }
#ifndef CPU_BUILD
// The upper bytes of two words, each extended by its sign to half of a word.
__device__ __forceinline__ uint32_t upper_bytes(uint32_t low, uint32_t high) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, 0xf7b3;" : "=r"(r) : "r"(low), "r"(high));
  return r;
}
// Four of the eight bytes of two words, by 4 bits each of `which`, all below 8.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(which));
  return r;
}
// (a & b) ^ c in one operation, which the compiler makes two of where it knows too much of c.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// a * b + c of each of two bf16, rounded once; the larger one of each.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
// The smaller one of each of two unsigned halves.
__device__ __forceinline__ uint32_t min_u16x2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
  asm("min.u16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
#else
  return min(a & 0xffffu, b & 0xffffu) | min(a & 0xffff0000u, b & 0xffff0000u);
#endif
}
#endif
// Two floats rounded to bf16 (to nearest even) in one register, the first in the lower half.
__device__ inline uint32_t pack_bf16(float first, float second) {
#ifndef CPU_BUILD
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
#else
  return to_bf16(first).bits | (uint32_t)to_bf16(second).bits << 16;
#endif
}
