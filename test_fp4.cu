// test_fp4.cu -- every check of the project, in one program: ./test_fp4 [--only TEXT] [--quick] [--kernels | --no-kernels] [--bench]
//
//     the ground       launch, barriers, shuffles; on the CPU also that what would hang is reported      dev/test_runtime.h
//     formats          E2M1, E4M3, E8M0 over all codes and all BF16 values; Philox's known answers       dev/test_formats.h
//     quantizers       codes, scales and layout bit-equal to dev/reference.h; statistics; GEMMs          dev/test_quantize.h
//     native GEMM      the FP4 tensor-core GEMM on the model of its instruction; planted mistakes        dev/test_native.h
//     recipes          every row of the table: quantizers, golden vectors, error tables, training        dev/test_recipes.h
//     control          oscillation, outliers, optimizer formats, schedules of precision, --keep          dev/test_control.h
//     layers           every kernel, forward and backward, at odd sizes                                  dev/test_layers.h
//     data             tokenizer and loader                                                              dev/test_data.h
//     checkpoints      safetensors, config.json, atomic directories                                      dev/test_checkpoint.h
//     the model        against PyTorch; a real checkpoint; learning by heart; seeds                      dev/test_model.h
//     the program      resume bit for bit, kill -9, errors                                               dev/test_model.h
//
// The same program runs on the GPU and on the CPU. On the CPU the kernels' part runs twice, the second time with threads and blocks in
// the opposite order. dev/reference.h is plain C++ in double precision and shares no code with what it checks.
#define TESTING
#include "train_fp4.cu"
#include "dev/bench.h"
#include "dev/bench_step.h"
#include "dev/gemm_versions.cuh"
#include "dev/test_checkpoint.h"
#include "dev/test_data.h"
#include "dev/test_formats.h"
#include "dev/test_control.h"
#include "dev/test_layers.h"
#include "dev/test_model.h"
#include "dev/test_native.h"
#include "dev/test_quantize.h"
#include "dev/test_recipes.h"
#include "dev/test_runtime.h"

int main(int argc, char** argv) {
  bool quick = false, kernels = false, no_kernels = false, only_bench = false;
  for (int i = 1; i < argc; i++) {
    const std::string a = argv[i];
    if (a == "--quick") quick = true;
    else if (a == "--kernels") kernels = true;
    else if (a == "--no-kernels") no_kernels = true;
    else if (a == "--bench") only_bench = true;
    else if (a == "--export" && i + 1 < argc) { export_models(argv[++i]); return 0; }
    else if (a == "--only" && i + 1 < argc) tests.only = argv[++i];
    else die_usage("there is no option '%s'; allowed: --quick (no long runs), --kernels (kernels only), --no-kernels (all but these), --bench (no checks: times), --export DIR (no checks: models for transformers), --only TEXT (sections whose title contains TEXT)", argv[i]);
  }
#ifndef CPU_BUILD
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) die("no usable NVIDIA GPU or driver here; `make CPU=1 test` runs the same tests on the CPU");
#endif
  std::string machine;
  machine_limit(&machine);
  printf("%s; activations in %s; GEMM: %s\n", machine.c_str(), kFp32 ? "FP32" : "BF16", gemm_way());

  if (only_bench) {
    bench();
    bench_steps();
    const bool native = fp4_ways(GemmWay::automatic).plain != GemmWay::emulated;        // the model of the instruction is slow: small shapes
    bench_gemm_ways(native ? bench_shapes(32768, 768, 3 * 768, 4 * 768) : bench_shapes(256, 256, 3 * 256, 4 * 256));
    printf("\nGPT-2 124M, 32768 tokens:");
    bench_priced_table(bench_shapes(32768, 768, 3 * 768, 4 * 768));
    printf("\nwidth 4096, 16384 tokens:");
    bench_priced_table(bench_shapes(16384, 4096, 3 * 4096, 4 * 4096));
    return 0;
  }

  if (kernels && no_kernels) die_usage("--kernels and --no-kernels leave nothing to check");
  if (!no_kernels) {
    test_runtime();
    test_formats();
    test_quantize();
    test_quantizer_forms();
    test_layers();
    test_native();
  }
  if (!kernels) {
    test_data();
    test_checkpoint();
    test_model();
    test_recipes();
    test_control();
    test_errors();
    if (!quick) {
      test_program();
      test_recipes_program();
      test_control_program();
      test_kill(20);
    }
  }
  if (kOnCpu && !kernels && !no_kernels && !quick && !getenv("CUDA_ON_CPU_REVERSE")) {
    printf("\nOnce more, the kernels with threads and blocks in the opposite order\n");
    fflush(stdout);
    const ChildResult r = shell("CUDA_ON_CPU_REVERSE=1 " + program_path("test_fp4") + " --kernels" + (tests.only.empty() ? "" : " --only '" + tests.only + "'"));
    int passed = 0, failed = 0, skipped = 0;
    const size_t at = r.output.rfind("\n", r.output.size() - 2);
    const bool ended = at != std::string::npos && sscanf(r.output.c_str() + at, "%d passed, %d failed, %d skipped", &passed, &failed, &skipped) == 3;
    if (!ended || failed) printf("%s\n", r.output.c_str());
    tests.passed += passed; tests.failed += failed; tests.skipped += skipped;
    check("the opposite order ran to its end", ended && r.exit_code == (failed ? 1 : 0), "%d passed, %d failed, %d skipped", passed, failed, skipped);
  }
  shell("rm -rf " + temp_dir());
  return tests_summary();
}
