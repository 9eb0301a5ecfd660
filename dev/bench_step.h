// dev/bench_step.h -- the whole training step, as train_fp4.cu takes it: forward, loss, backward, gradient norm, AdamW. Part of `make bench`; included
// by test_fp4.cu after train_fp4.cu.
//
// GPT-2 124M on a GPU, with as many sequences of 1024 tokens as its memory holds, up to 32; a small GPT-2 on a CPU. FP4 GEMMs run in the way that
// --gemm auto chooses on this machine, after its self-check.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

// Sequences that fit. The memory tables of these runs say 2.8 GB and 0.29 GB a sequence; the rest is room for the library and the driver.
inline int bench_batch() {
#ifdef CPU_BUILD
  return 4;
#else
  size_t free_bytes = 0, all = 0;
  CUDA_CHECK(cudaMemGetInfo(&free_bytes, &all));
  int B = 32;
  while (B > 1 && 4e9 + 0.36e9 * B > (double)free_bytes) B /= 2;
  return B;
#endif
}

// Median time of a step in seconds.
inline double bench_step(Model& m, int B, int S) {
  std::vector<int> tokens((size_t)B * S), targets(tokens.size());
  Rng rng(1);
  for (int& t : tokens) t = rng.below(m.config.vocab);
  for (int& t : targets) t = rng.below(m.config.vocab);
  std::vector<double> times;
  for (int step = 0; step < (kOnCpu ? 4 : 10); step++) {
    const auto start = std::chrono::steady_clock::now();
    accumulate_gradients(m, B, S, 1, (uint32_t)step, [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); });
    gradient_norm(m, 1);
    update(m, {1e-4f, 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0.1f);
    device_sync();
    if (step >= (kOnCpu ? 1 : 3)) times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());     // plans are made, clocks have settled
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

inline void bench_steps() {
  const int S = kOnCpu ? 128 : 1024, B = bench_batch();
  printf("\nthe whole step: %s, %d sequences of %d tokens\n", kOnCpu ? "a GPT-2 of 4 blocks, 256 channels" : "GPT-2 124M", B, S);
  double bf16 = 0;
  for (const char* name : {"bf16", "nvfp4", "tetrajet2", "quartet2"}) {
    Options o;
    o.recipe = name;
    Model m;
    m.recipe = find_recipe(o);
    m.bf16 = recipe_table()[0];
    m.config = preset(kOnCpu ? "gpt2:d4" : "gpt2:d12", kOnCpu ? 256 : 50257, S);
    m.bf16_last = bf16_tail(m.recipe, -1, m.config.layers);
    m.B = B; m.S = S; m.V = round_up(m.config.vocab, 128); m.training = true; m.seed = 1;
    make_params(m);
    const std::string native = choose_fp4_ways(m, "auto");
    allocate_model(m, false);
    init_weights(m);
    const double t = bench_step(m, B, S);
    if (bf16 == 0) bf16 = t;
    printf("  %-10s %9.1f ms  %9.0f tok/s  %5.2f of bf16's speed  %7.2f GB%s\n", name, t * 1e3, B * S / t, bf16 / t, m.arena.total() / 1e9,
           !m.recipe.quantizes() ? "" : native.empty() ? "  emulated" : ("\n             " + native).c_str());
    fflush(stdout);
    device_free(m.arena.memory);
  }
}
