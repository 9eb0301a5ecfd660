// dev/bench_gemm.cu -- which cuBLASLt algorithm, layout and epilogue is fastest for the GEMMs of a training step (GPT-2 124M).
//
//     nvcc -std=c++17 -O3 -arch=sm_90 dev/bench_gemm.cu -o bench_gemm -lcublasLt && ./bench_gemm [tokens]
//
// For each GEMM, the library's first eight candidates: what they are (numbers of the enumerations in cublasLt.h), the median time of 11 runs, and
// a hash of the result. Two candidates with the same hash gave the same bits. The runs of all GEMMs and candidates take turns without a pause
// between them: the clock, which the power limit sets, is that of a long run for each of them. (Timed one after the other, the first ones
// find a cool chip.) Operands are larger than L2, the widest ones 6 GB.
// scalars device: alpha and beta are read on the device, as gemm.cuh does; host: the library knows beta when it chooses.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>
#include "../kernels/gemm.cuh"
#include "../kernels/mlp.cuh"
#include "../kernels/norm.cuh"

__global__ void fill_kernel(bf16* x, size_t n, uint32_t seed) {                   // about normal: the sum of four uniform numbers
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t h = (uint32_t)i * 2654435761u + seed;
    h ^= h >> 16; h *= 2246822519u; h ^= h >> 13; h *= 3266489917u; h ^= h >> 16;
    x[i] = to_bf16(((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24) - 510.0f) / 148.0f);
  }
}
__global__ void hash_kernel(unsigned long long* out, const uint32_t* x, size_t n) {
  unsigned long long sum = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    sum += (unsigned long long)x[i] * (2 * i + 1);
  atomicAdd(out, sum);                                                            // integers: any order, the same sum
}

enum class Extra { none, bias, c, bias_c, gelu_aux_bias, dgelu };
const char* extra_name(Extra e) {
  static const char* names[] = {"", "+ bias", "+ C", "+ bias + C", "gelu(+ bias), aux", "* gelu'(aux)"};
  return names[(int)e];
}
struct Buffers { bf16 *a, *b, *d, *c, *aux, *bias; float *dw, *sums; unsigned long long* hash; };

// A GEMM, ready to run with each candidate.
constexpr int kCandidates = 8;
struct Case {
  int M, N, K; bool a_transposed, b_transposed, wgrad; Extra extra; bool host;
  Gemm name;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, d;
  cublasLtMatmulHeuristicResult_t results[kCandidates] = {};
  int found = 0;
  std::vector<float> times[kCandidates];
  void* out(const Buffers& m) const { return wgrad ? (void*)m.dw : (void*)m.d; }
};

void prepare(Case& x, const Buffers& m) {
  CublasLt& lt = cublaslt();
  Gemm& g = x.name;
  g.M = x.M; g.N = x.N; g.K = x.K; g.a_transposed = x.a_transposed; g.b_transposed = x.b_transposed; g.d_fp32 = x.wgrad;
  const cublasOperation_t op_first = x.b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T, op_second = x.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublas_check_at(cublasLtMatmulDescCreate(&x.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "desc", g);
  auto set = [&](cublasLtMatmulDescAttributes_t what, const void* v, size_t n) {
    cublas_check_at(cublasLtMatmulDescSetAttribute(x.desc, what, v, n), "attribute", g);
  };
  const cublasLtPointerMode_t mode = x.host ? CUBLASLT_POINTER_MODE_HOST : CUBLASLT_POINTER_MODE_DEVICE;
  set(CUBLASLT_MATMUL_DESC_TRANSA, &op_first, sizeof op_first);
  set(CUBLASLT_MATMUL_DESC_TRANSB, &op_second, sizeof op_second);
  set(CUBLASLT_MATMUL_DESC_POINTER_MODE, &mode, sizeof mode);
  const bool has_bias = x.extra == Extra::bias || x.extra == Extra::bias_c || x.extra == Extra::gelu_aux_bias;
  const cublasLtEpilogue_t epilogue = x.extra == Extra::gelu_aux_bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS
      : x.extra == Extra::dgelu ? CUBLASLT_EPILOGUE_DGELU : has_bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  if (has_bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &m.bias, sizeof m.bias);
  if (x.extra == Extra::gelu_aux_bias || x.extra == Extra::dgelu) {
    const int64_t ld = x.N;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &m.aux, sizeof m.aux);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld, sizeof ld);
  }
  auto layout = [&](cublasLtMatrixLayout_t* l, cudaDataType_t t, int rows, int cols) {
    cublas_check_at(cublasLtMatrixLayoutCreate(l, t, rows, cols, rows), "layout", g);
  };
  layout(&x.a, CUDA_R_16BF, x.b_transposed ? x.N : x.K, x.b_transposed ? x.K : x.N);
  layout(&x.b, CUDA_R_16BF, x.a_transposed ? x.M : x.K, x.a_transposed ? x.K : x.M);
  layout(&x.d, x.wgrad ? CUDA_R_32F : CUDA_R_16BF, x.N, x.M);
  cublasLtMatmulPreference_t preference;
  cublas_check_at(cublasLtMatmulPreferenceCreate(&preference), "preference", g);
  const size_t workspace = CublasLt::kWorkspace;
  const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction);
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt.handle, x.desc, x.a, x.b, x.d, x.d, preference, kCandidates, x.results, &x.found);
  if (status != CUBLAS_STATUS_SUCCESS) x.found = 0;
  cublasLtMatmulPreferenceDestroy(preference);
}

void call(const Case& x, int i, const Buffers& m) {
  static const float host[2] = {0, 1};
  CublasLt& lt = cublaslt();
  const float* constants = x.host ? host : lt.constants;
  const bool adds_c = x.wgrad || x.extra == Extra::c || x.extra == Extra::bias_c;
  const void* C = x.wgrad || !adds_c ? x.out(m) : m.c;
  cublas_check_at(cublasLtMatmul(lt.handle, x.desc, constants + 1, m.b, x.a, m.a, x.b, constants + (adds_c ? 1 : 0), C, x.d, x.out(m), x.d,
                                 &x.results[i].algo, lt.workspace, CublasLt::kWorkspace, main_stream), "cublasLtMatmul", x.name);
}

unsigned long long hash_of(const Case& x, int i, const Buffers& m) {                // from the same D
  const size_t words = (size_t)x.M * x.N / (x.wgrad ? 1 : 2);
  unsigned long long hash;
  CUDA_CHECK(cudaMemsetAsync(x.out(m), 0, words * 4, main_stream)); CUDA_CHECK(cudaMemsetAsync(m.hash, 0, 8, main_stream));
  call(x, i, m);
  hash_kernel<<<1056, 256, 0, main_stream>>>(m.hash, (const uint32_t*)x.out(m), words);
  CUDA_CHECK(cudaMemcpyAsync(&hash, m.hash, 8, cudaMemcpyDeviceToHost, main_stream));
  CUDA_CHECK(cudaStreamSynchronize(main_stream));
  return hash;
}

void print(const Case& x, const Buffers& m) {
  printf("%6d x %5d x %5d %-8s %-18s scalars %s", x.M, x.N, x.K,
         x.a_transposed ? "A^T B" : x.b_transposed ? "A B" : "A B^T", extra_name(x.extra), x.host ? "host" : "device");
  if (!x.found) printf("  the library has no such GEMM");
  printf("\n");
  for (int i = 0; i < x.found; i++) {
    const cublasLtMatmulAlgo_t& algo = x.results[i].algo;
    std::vector<float> t = x.times[i];
    std::sort(t.begin(), t.end());
    const float ms = t[t.size() / 2];
    const unsigned long long hash = hash_of(x, i, m);
    printf("   %d  %7.3f ms %6.1f TFLOP/s  id %d tile %3u stages %2u cluster %2u split-K %d swizzle %u custom %u inner %u waves %.2f "
           "workspace %zu  %08x%s\n", i, ms,
           2.0 * x.M * x.N * x.K / ms / 1e9, algo_attribute<int>(algo, CUBLASLT_ALGO_CONFIG_ID),
           algo_attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_TILE_ID),
           algo_attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID), algo_attribute<uint16_t>(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID),
           algo_attribute<int>(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM), algo_attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING),
           algo_attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION),
           algo_attribute<uint16_t>(algo, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID), x.results[i].wavesCount,
           x.results[i].workspaceSize, (unsigned)(hash ^ hash >> 32), hash == hash_of(x, i, m) ? "" : "  NOT THE SAME BITS TWICE");
  }
}

// Beside the GEMMs: what a separate kernel costs in place of an epilogue.
struct Separate { const char* name; std::function<void()> run; std::vector<float> times; };

int main(int argc, char** argv) {
  const int T = argc > 1 ? atoi(argv[1]) : 65536, C = 768, F = 3072, Q = 2304, V = 50304;
  if (T < 1 || T > 65536 || T % 128) die("tokens: a multiple of 128 up to 65536");
  Buffers m;
  const size_t wide = (size_t)11264 * V, narrow = (size_t)65536 * F;
  m.a = device_alloc<bf16>(wide); m.b = device_alloc<bf16>(narrow); m.d = device_alloc<bf16>(wide);
  m.c = device_alloc<bf16>(narrow); m.aux = device_alloc<bf16>(narrow);
  m.bias = device_alloc<bf16>(65536); m.dw = device_alloc<float>((size_t)V * C); m.hash = device_alloc<unsigned long long>(1);
  m.sums = device_alloc<float>(std::max(gelu_backward_scratch(T, F), bias_backward_scratch(T, F)));
  auto fill = [](bf16* x, size_t n, uint32_t seed) { fill_kernel<<<1056, 256>>>(x, n, seed); };
  fill(m.a, wide, 1); fill(m.b, narrow, 2); fill(m.c, narrow, 3); fill(m.aux, narrow, 4); fill(m.bias, 65536, 5);
  float* const weight = device_alloc<float>(2 * C);
  device_zero(weight, 2 * C);
  device_zero(m.dw, (size_t)V * C);
  device_sync();
  std::vector<Case> cases;
  auto add = [&](int M, int N, int K, bool ta, bool tb, bool wgrad, Extra e) {
    for (bool host : {false, true}) {
      Case x = {};
      x.M = M; x.N = N; x.K = K; x.a_transposed = ta; x.b_transposed = tb; x.wgrad = wgrad; x.extra = e; x.host = host;
      prepare(x, m);
      cases.push_back(x);
    }
  };
  const int layers[4][2] = {{C, Q}, {C, C}, {C, F}, {F, C}};                       // {K, N}: QKV, attention out, MLP up, MLP down
  const Extra forward[4] = {Extra::bias, Extra::bias_c, Extra::bias, Extra::bias_c};
  for (int l = 0; l < 4; l++) for (Extra e : {Extra::none, forward[l]}) add(T, layers[l][1], layers[l][0], false, false, false, e);
  add(T, F, C, false, false, false, Extra::gelu_aux_bias);
  for (auto& l : layers) for (bool plain : {true, false}) add(T, l[0], l[1], false, plain, false, Extra::none);
  for (bool plain : {true, false}) add(T, F, C, false, plain, false, Extra::dgelu);
  for (auto& l : layers) add(l[1], l[0], T, true, true, true, Extra::none);
  for (int rows : {5376, 11264}) {
    add(rows, V, C, false, false, false, Extra::none);
    add(rows, C, V, false, true, false, Extra::none);
    add(V, C, rows, true, true, true, Extra::none);
  }
  std::vector<Separate> separate = {
    {"gelu_forward", [&] { gelu_forward(m.d, m.aux, (size_t)T * F); }, {}},
    {"gelu_backward with sums", [&] { gelu_backward(m.d, m.sums, m.c, m.aux, m.sums, T, F); }, {}},
    {"column sums of 2304", [&] { column_sums_of_slots(m.sums, m.c, T, Q, bias_backward_slots(T, Q)); }, {}},
    {"column sums of 3072", [&] { column_sums_of_slots(m.sums, m.c, T, F, bias_backward_slots(T, F)); }, {}},
    {"residual of 768", [&] { residual_forward(m.d, m.c, m.aux, m.bias, T, C); }, {}},
    {"norm of 768, row held", [&] { layernorm_forward(m.d, m.sums, m.sums + T, m.c, weight, weight + C, T, C, 1e-5f); }, {}},
    {"norm of 768, three passes", [&] {
      launch(norm_forward_kernel<true, false, 32, kVecX>, row_grid(T), row_block<32>(), 0, m.d, m.sums, m.sums + T, m.c, weight, weight + C, T, C, 1e-5f, nullptr);
    }, {}}};

  constexpr int kRounds = 13, kWarm = 2;
  for (int round = 0; round < kRounds; round++) {
    std::vector<cudaEvent_t> events;
    auto record = [&] { cudaEvent_t e; CUDA_CHECK(cudaEventCreate(&e)); CUDA_CHECK(cudaEventRecord(e, main_stream)); events.push_back(e); };
    for (Case& x : cases) for (int i = 0; i < x.found; i++) { record(); call(x, i, m); record(); }
    for (Separate& x : separate) { record(); x.run(); record(); }
    device_sync();
    size_t at = 0;
    auto read = [&](std::vector<float>& times) {
      float ms;
      CUDA_CHECK(cudaEventElapsedTime(&ms, events[at], events[at + 1]));
      at += 2;
      if (round >= kWarm) times.push_back(ms);
    };
    for (Case& x : cases) for (int i = 0; i < x.found; i++) read(x.times[i]);
    for (Separate& x : separate) read(x.times);
    for (cudaEvent_t e : events) cudaEventDestroy(e);
  }
  for (Separate& x : separate) {
    std::sort(x.times.begin(), x.times.end());
    printf("%-30s %7.3f ms\n", x.name, x.times[x.times.size() / 2]);
  }
  for (Case& x : cases) print(x, m);
  printf("cuBLASLt %zu\n", cublasLtGetVersion());
  for (const Case& x : cases) if (x.extra == Extra::gelu_aux_bias && x.found) {      // the library's GELU against ours
    double sums[3] = {};
    std::vector<bf16> d(1 << 20), aux(1 << 20);
    call(x, 0, m);
    to_host(d.data(), m.d, d.size());
    to_host(aux.data(), m.aux, aux.size());
    device_sync();
    for (size_t i = 0; i < d.size(); i++) {
      const double u = to_float(aux[i]), tanh_form = u / (1 + std::exp(-2 * 0.7978845608028654 * (u + 0.044715 * u * u * u)));
      const double erf_form = 0.5 * u * std::erfc(-u / std::sqrt(2.0));
      if (std::fabs(u) > 3) continue;
      sums[0] += 1; sums[1] += std::fabs(to_float(d[i]) - tanh_form); sums[2] += std::fabs(to_float(d[i]) - erf_form);
    }
    printf("GELU epilogue, mean |error| where |x| < 3: against the tanh form %.3e, against erf %.3e, of %.0f\n",
           sums[1] / sums[0], sums[2] / sums[0], sums[0]);
  }
  return 0;
}
