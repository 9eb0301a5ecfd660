// dev/bench.h -- `make bench`: what each kernel reaches on this machine, beside what bounds it.
//
// Memory-bound kernels are shown as bytes moved a second (each input read once, each output written once) and as a share of a plain
// copy of the same number of bytes; GEMMs and attention as flops a second. Medians of repeated runs; inputs are random.
#pragma once
#include <algorithm>
#include <chrono>
#include "../kernels/adamw.cuh"
#include "../kernels/attention.cuh"
#include "../kernels/linear.cuh"
#include "../kernels/loss.cuh"
#include "../kernels/mlp.cuh"
#include "../kernels/norm.cuh"
#include "quantize_simple.cuh"
#include "testing.h"

// Median time of f in seconds.
template <class F> double bench_seconds(F f) {
  const double budget = kOnCpu ? 0.3 : 0.05;                       // seconds a kernel
  f();
  device_sync();
  std::vector<double> times;
  double spent = 0;
  while ((times.size() < 5 || spent < budget) && times.size() < 200 && !(times.size() >= 2 && spent > 20 * budget)) {
    double s;
#ifdef CPU_BUILD
    const auto start = std::chrono::steady_clock::now();
    f();
    s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
#else
    static cudaEvent_t a = nullptr, b = nullptr;
    if (!a) { CUDA_CHECK(cudaEventCreate(&a)); CUDA_CHECK(cudaEventCreate(&b)); }
    CUDA_CHECK(cudaEventRecord(a, main_stream));
    f();
    CUDA_CHECK(cudaEventRecord(b, main_stream));
    CUDA_CHECK(cudaEventSynchronize(b));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, a, b));
    s = ms / 1e3;
#endif
    times.push_back(s);
    spent += s;
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <class T> T* bench_random(size_t n) {
  Rng rng(n);
  std::vector<T> part(std::min(n, (size_t)1 << 20));
  for (T& v : part) v = from_float<T>((float)rng.normal());
  T* p = device_alloc<T>(n);
  for (size_t i = 0; i < n; i += part.size()) to_device(p + i, part.data(), std::min(part.size(), n - i));
  device_sync();
  return p;
}

inline void bench() {
  const int T = kOnCpu ? 2048 : 32768, C = kOnCpu ? 256 : 768, F = 4 * C, V = kOnCpu ? 512 : 50304, B = T / 1024, S = 1024, logit_rows = kOnCpu ? T : 4096;
  const size_t n = (size_t)T * F;
  floatX *x = bench_random<floatX>(n), *y = bench_random<floatX>(n), *z = bench_random<floatX>(n);
  printf("shapes of GPT-2 124M%s: T %d tokens, C %d, F %d, V %d\n\n", kOnCpu ? ", smaller for a CPU" : "", T, C, F, V);

  double copy = 0;
  auto row = [&](const char* name, double bytes, auto f) {
    const double rate = bytes / bench_seconds(f);
    if (copy == 0) copy = rate;
    printf("  %-58s %9.1f GB/s  %5.0f %% of a copy\n", name, rate / 1e9, 100 * rate / copy);
    fflush(stdout);
  };
  const double X = sizeof(floatX), e = (double)T * F;
  printf("memory-bound kernels (bytes: inputs read once, outputs written once)\n");
  row("copy", 2 * X * e, [&] { device_copy(y, x, n); });

  uint32_t* const tiles = device_alloc<uint32_t>(linear_tile_words(T, C, F));
  float* const amax = device_alloc<float>(2);
  uint8_t *codes = device_alloc<uint8_t>(n / 2), *scales = device_alloc<uint8_t>(std::max(scale_bytes(T, F), scale_bytes(F, T)));
  auto quantizer = [&](const char* name, int rows, int cols, bool transpose, bool tile16, bool stochastic, int hadamard, bool packed,
                       bool amax_known = false) {
    Operand4 out;
    out.rows = transpose ? cols : rows; out.cols = transpose ? rows : cols; out.ld = operand_ld(out.cols); out.amax = amax;
    if (packed) { out.codes = codes; out.scales = scales; } else out.values = y;
    QuantizeHow how;
    how.transpose = transpose; how.tile16 = tile16; how.stochastic = stochastic; how.hadamard = hadamard; how.signs = kFixedSigns;
    const double elements = (double)rows * cols;
    if (amax_known) { quantize_nvfp4(out, x, how, tiles); how.amax_known = true; }
    const std::string full = std::string("NVFP4 ") + name + (amax_known ? ", amax known" : packed ? ", packed" : ", values");
    row(full.c_str(), elements * (X + (packed ? 0.5625 : X)), [&] { quantize_nvfp4(out, x, how, tiles); });
  };
  for (int form : {0, 1, 2}) {                              // values with and without the pass that finds amax; packed
    const bool packed = form == 2, known = form == 1;
    quantizer("fprop X: 1x16 RN", T, F, false, false, false, 0, packed, known);
    quantizer("fprop W: 16x16 RN", F, C, false, true, false, 0, packed, known);
    quantizer("dgrad dY: 1x16 SR", T, F, false, false, true, 0, packed, known);
    quantizer("dgrad W^T: 16x16 RN, column copy", F, C, true, true, false, 0, packed, known);
    quantizer("wgrad dY^T: 1x16 SR RHT16, column copy", T, F, true, false, true, 16, packed, known);
    quantizer("wgrad X^T: 1x16 RN RHT16, column copy", T, F, true, false, false, 16, packed, known);
  }
  QuantizeHow turned;
  turned.recipe = plain_nvfp4();
  turned.recipe.rht = 16; turned.recipe.signs = Signs::fixed; turned.sign_bits[0] = kFixedSigns;
  row("amax of a tensor and of its rotated transpose", X * e, [&] { amax_of_both(amax, amax + 1, x, T, F, turned); });
#ifndef FP32
  for (bool transpose : {false, true}) {                     // the first chapter, for comparison
    Operand4 out;
    out.rows = transpose ? F : T; out.cols = transpose ? T : F; out.ld = operand_ld(out.cols); out.amax = amax; out.values = y;
    QuantizeHow how;
    how.recipe.format = Format::nvfp4; how.transpose = transpose; how.sign_bits[0] = kFixedSigns;
    if (transpose) { how.recipe.rounding = Rounding::stochastic; how.recipe.rht = 16; how.recipe.signs = Signs::fixed; }
    row(transpose ? "NVFP4 wgrad dY^T: 1x16 SR RHT16, simple" : "NVFP4 fprop X: 1x16 RN, simple", 2 * X * e, [&] { quantize_simple(out, x, how); });
  }
#endif
  float *stat = device_alloc<float>(2 * T), *weight = bench_random<float>(n / 4), *reduce = device_alloc<float>(std::max(std::max(norm_backward_scratch(T, C), grad_norm_scratch()), std::max(bias_backward_scratch(T, F), gelu_backward_scratch(T, F))));
  float *grad = device_alloc<float>(n / 4), *m = device_alloc<float>(n / 4), *v = device_alloc<float>(n / 4);
  device_zero(grad, n / 4); device_zero(m, n / 4); device_zero(v, n / 4);
  const double tc = (double)T * C;
  row("layernorm forward", 2 * X * tc, [&] { layernorm_forward(y, stat, stat + T, x, weight, weight + C, T, C, 1e-5f); });
  row("layernorm backward, with a bias gradient", 4 * X * tc, [&] { layernorm_backward(z, grad, grad + C, y, x, weight, stat, stat + T, reduce, T, C, grad + 2 * C); });
  row("rmsnorm forward", 2 * X * tc, [&] { rmsnorm_forward(y, stat + T, x, weight, T, C, 1e-5f); });
  row("rmsnorm backward", 4 * X * tc, [&] { rmsnorm_backward(z, grad, y, x, weight, stat + T, reduce, T, C); });
  row("GELU forward", 2 * X * e, [&] { gelu_forward(y, x, n); });
  row("GELU backward, with the bias gradient", 3 * X * e, [&] { gelu_backward(z, grad, y, x, reduce, T, F); });
  row("SwiGLU forward", 1.5 * X * e, [&] { swiglu_forward(y, x, T, F / 2); });
  row("SwiGLU backward", 2.5 * X * e, [&] { swiglu_backward(z, y, x, T, F / 2); });
  row("bias gradient", X * e, [&] { bias_backward(grad, x, reduce, T, F); });
  row("residual addition", 3 * X * tc, [&] { residual_forward(z, x, y, weight, T, C); });
  {
    floatX* logits = bench_random<floatX>((size_t)logit_rows * V);
    std::vector<int> t(logit_rows, 3);
    int* targets = device_alloc<int>(logit_rows);
    to_device(targets, t.data(), t.size());
    row("softmax cross-entropy, forward and gradient in place", 3 * X * logit_rows * V, [&] { softmax_cross_entropy(logits, stat, targets, logit_rows, V, V, 1e-5f, 0, true); });
    device_free(logits);
    device_free(targets);
  }
  const size_t params = n / 4;
  device_zero(reduce, 2);
  row("AdamW, FP32 state, BF16 copy", (double)params * (16 + 12 + X), [&] { adamw_update(weight, sizeof(floatX) == 2 ? z : nullptr, m, v, grad, reduce, params, AdamW{1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 1}); });
  row("gradient norm", 4.0 * params, [&] { grad_norm(stat, grad, params, 1, reduce); });

  printf("\nGEMM: %s\n", gemm_way());
  const int shapes[5][2] = {{C, C}, {3 * C, C}, {F, C}, {C, F}, {V, C}};
  for (auto& sh : shapes) {
    const int N = sh[0], K = sh[1], M = N == V ? logit_rows : T;
    floatX *a = bench_random<floatX>((size_t)M * K), *b = bench_random<floatX>((size_t)N * K), *d = device_alloc<floatX>((size_t)M * N);
    Gemm g;
    g.M = M; g.N = N; g.K = K; g.A = a; g.lda = K; g.B = b; g.ldb = K; g.D = d; g.ldd = N;
    const double t = bench_seconds([&] { gemm(g); });
    printf("  fprop %6d x %6d x %6d %40.2f ms  %8.1f %s\n", M, N, K, t * 1e3, 2.0 * M * N * K / t / (kOnCpu ? 1e9 : 1e12), kOnCpu ? "GFLOP/s" : "TFLOP/s");
    fflush(stdout);
    device_free(a); device_free(b); device_free(d);
  }

  {                                                         // GELU in the GEMM's epilogue, and apart
    floatX *a = bench_random<floatX>((size_t)T * C), *b = bench_random<floatX>((size_t)F * C), *bias = bench_random<floatX>(F);
    Gemm g;
    g.M = T; g.N = F; g.K = C; g.A = a; g.lda = C; g.B = b; g.ldb = C; g.D = y; g.ldd = F; g.bias = bias;
    const double apart = bench_seconds([&] { gemm(g); gelu_forward(z, y, n); });
    g.D = z; g.gelu_input = y;
    const bool has = gemm_has_gelu(g);
    const double fused = has ? bench_seconds([&] { gemm(g); }) : 0;
    printf("  fprop %6d x %6d x %6d + bias, then GELU %22.2f ms, in its epilogue ", T, F, C, apart * 1e3);
    if (has) printf("%.2f ms\n", fused * 1e3);
    else printf("not here\n");
    device_free(a); device_free(b); device_free(bias);
  }

  printf("\nattention, causal: flops 2 S^2 D a head forward, 2.5 times that backward (the kernels recompute and do more)\n");
  for (int D : {64, 128}) {
    const int h = C / D, kv = h, width = (h + 2 * kv) * D;
    floatX *qkv = bench_random<floatX>((size_t)T * width), *out = device_alloc<floatX>((size_t)T * h * D), *dout = bench_random<floatX>((size_t)T * h * D), *dqkv = device_alloc<floatX>((size_t)T * width);
    float *lse = device_alloc<float>((size_t)T * h), *scratch = device_alloc<float>(attention_backward_scratch(B, S, h, D));
    const double flops = 2.0 * B * h * (double)S * S * D;
    const double f = bench_seconds([&] { attention_forward(out, lse, qkv, B, S, h, kv, D); });
    const double b = bench_seconds([&] { attention_backward(dqkv, dout, qkv, out, lse, scratch, B, S, h, kv, D); });
    printf("  B %d S %d H %d D %3d: forward %8.2f ms %7.1f, backward %8.2f ms %7.1f %s\n", B, S, h, D, f * 1e3, flops / f / (kOnCpu ? 1e9 : 1e12), b * 1e3, 2.5 * flops / b / (kOnCpu ? 1e9 : 1e12), kOnCpu ? "GFLOP/s" : "TFLOP/s");
    fflush(stdout);
    device_free(qkv); device_free(out); device_free(dout); device_free(dqkv); device_free(lse); device_free(scratch);
  }
}
