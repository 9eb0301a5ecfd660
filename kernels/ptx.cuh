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
// All of it needs sm_80.
#pragma once
#include "cuda.cuh"
#ifdef CPU_BUILD
#include <deque>
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
