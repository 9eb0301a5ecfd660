// dev/bench_gemm.cu -- which cuBLASLt algorithm, layout and epilogue is fastest for the GEMMs of a training step (GPT-2 124M).
//
//     nvcc -std=c++17 -O3 -arch=sm_90 dev/bench_gemm.cu -o bench_gemm -lcublasLt && ./bench_gemm [tokens]
//
// For each GEMM: the time with the library's first choice (which gemm.cuh takes) and the best of its first eight, medians of 11 runs on random
// data; and whether the best gives the same bits twice. Operands are larger than L2, the widest ones 6 GB.
#include <algorithm>
#include <vector>
#include "../kernels/gemm.cuh"

__global__ void fill_kernel(bf16* x, size_t n, uint32_t seed) {                   // about normal: the sum of four uniform numbers
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t h = (uint32_t)i * 2654435761u + seed;
    h ^= h >> 16; h *= 2246822519u; h ^= h >> 13; h *= 3266489917u; h ^= h >> 16;
    x[i] = to_bf16(((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24) - 510.0f) / 148.0f);
  }
}
__global__ void hash_kernel(unsigned long long* out, const uint32_t* x, size_t n) {
  unsigned long long sum = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) sum += (unsigned long long)x[i] * (2 * i + 1);
  atomicAdd(out, sum);                                                            // integers: any order, the same sum
}

enum class Extra { none, bias, c, bias_c, gelu_aux_bias, dgelu, dgelu_bgrad, bgrad };
const char* extra_name(Extra e) {
  static const char* names[] = {"", "+ bias", "+ C", "+ bias + C", "gelu(+ bias), aux", "* gelu'(aux)", "* gelu'(aux), dbias", "dbias of A"};
  return names[(int)e];
}
struct Buffers { bf16 *a, *b, *d, *c, *aux, *bias; float* dbias; unsigned long long* hash; };

void bench_case(const Buffers& m, int M, int N, int K, bool a_transposed, bool b_transposed, bool wgrad, Extra extra) {
  CublasLt& lt = cublaslt();
  Gemm g;
  g.M = M; g.N = N; g.K = K; g.a_transposed = a_transposed; g.b_transposed = b_transposed; g.d_fp32 = wgrad;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, d;
  const cublasOperation_t op_first = b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T, op_second = a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublas_check_at(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "desc", g);
  auto set = [&](cublasLtMatmulDescAttributes_t what, const void* v, size_t n) { cublas_check_at(cublasLtMatmulDescSetAttribute(desc, what, v, n), "attribute", g); };
  const cublasLtPointerMode_t mode = CUBLASLT_POINTER_MODE_DEVICE;
  set(CUBLASLT_MATMUL_DESC_TRANSA, &op_first, sizeof op_first);
  set(CUBLASLT_MATMUL_DESC_TRANSB, &op_second, sizeof op_second);
  set(CUBLASLT_MATMUL_DESC_POINTER_MODE, &mode, sizeof mode);
  const bool adds_c = wgrad || extra == Extra::c || extra == Extra::bias_c, has_bias = extra == Extra::bias || extra == Extra::bias_c || extra == Extra::gelu_aux_bias;
  const cublasLtEpilogue_t epilogue = extra == Extra::none || extra == Extra::c ? CUBLASLT_EPILOGUE_DEFAULT : extra == Extra::bias || extra == Extra::bias_c ? CUBLASLT_EPILOGUE_BIAS
      : extra == Extra::gelu_aux_bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : extra == Extra::dgelu ? CUBLASLT_EPILOGUE_DGELU : extra == Extra::dgelu_bgrad ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_BGRADB;
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  const void* bias = has_bias ? (const void*)m.bias : m.dbias;
  if (has_bias || extra == Extra::dgelu_bgrad || extra == Extra::bgrad) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
  if (extra == Extra::gelu_aux_bias || extra == Extra::dgelu || extra == Extra::dgelu_bgrad) {
    const int64_t ld = N;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &m.aux, sizeof m.aux);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld, sizeof ld);
  }
  auto layout = [&](cublasLtMatrixLayout_t* l, cudaDataType_t t, int rows, int cols) { cublas_check_at(cublasLtMatrixLayoutCreate(l, t, rows, cols, rows), "layout", g); };
  layout(&a, CUDA_R_16BF, b_transposed ? N : K, b_transposed ? K : N);
  layout(&b, CUDA_R_16BF, a_transposed ? M : K, a_transposed ? K : M);
  layout(&d, wgrad ? CUDA_R_32F : CUDA_R_16BF, N, M);
  cublasLtMatmulPreference_t preference;
  cublas_check_at(cublasLtMatmulPreferenceCreate(&preference), "preference", g);
  const size_t workspace = CublasLt::kWorkspace;
  const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction);
  cublasLtMatmulHeuristicResult_t results[8] = {};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt.handle, desc, a, b, d, d, preference, 8, results, &found);
  printf("%6d x %5d x %5d %-8s %-20s ", M, N, K, a_transposed ? "A^T B" : b_transposed ? "A B" : "A B^T", extra_name(extra));
  if (status != CUBLAS_STATUS_SUCCESS || !found) { printf("the library has no such GEMM (status %d)\n", (int)status); return; }

  auto call = [&](int i) {
    return cublasLtMatmul(lt.handle, desc, lt.constants + 1, m.b, a, m.a, b, lt.constants + (adds_c ? 1 : 0), wgrad || !adds_c ? m.d : m.c, d, m.d, d, &results[i].algo, lt.workspace, workspace, main_stream);
  };
  double first = 0, best = 1e30;
  int best_at = 0;
  for (int i = 0; i < found; i++) {
    std::vector<float> times;
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin)); CUDA_CHECK(cudaEventCreate(&end));
    for (int run = 0; run < 13; run++) {
      CUDA_CHECK(cudaEventRecord(begin, main_stream));
      cublas_check_at(call(i), "cublasLtMatmul", g);
      CUDA_CHECK(cudaEventRecord(end, main_stream));
      CUDA_CHECK(cudaEventSynchronize(end));
      float ms;
      CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (run >= 2) times.push_back(ms);
    }
    cudaEventDestroy(begin); cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    if (i == 0) first = times[times.size() / 2];
    if (times[times.size() / 2] < best) { best = times[times.size() / 2]; best_at = i; }
  }
  unsigned long long hash[2] = {};
  for (int run = 0; run < 2; run++) {                                              // from the same D
    const size_t words = (size_t)M * N / (wgrad ? 1 : 2);
    CUDA_CHECK(cudaMemset(m.d, 0, words * 4)); CUDA_CHECK(cudaMemset(m.hash, 0, 8));
    cublas_check_at(call(best_at), "cublasLtMatmul", g);
    hash_kernel<<<1056, 256>>>(m.hash, (const uint32_t*)m.d, words);
    CUDA_CHECK(cudaMemcpy(&hash[run], m.hash, 8, cudaMemcpyDeviceToHost));
  }
  const double flops = 2.0 * M * N * K;
  printf("first %7.3f ms %6.1f TFLOP/s   best %7.3f ms %6.1f (choice %d of %d)%s\n", first, flops / first / 1e9, best, flops / best / 1e9, best_at, found, hash[0] == hash[1] ? "" : "  NOT THE SAME BITS TWICE");
  fflush(stdout);
  cublasLtMatmulPreferenceDestroy(preference); cublasLtMatrixLayoutDestroy(a); cublasLtMatrixLayoutDestroy(b); cublasLtMatrixLayoutDestroy(d); cublasLtMatmulDescDestroy(desc);
}

int main(int argc, char** argv) {
  const int T = argc > 1 ? atoi(argv[1]) : 65536, C = 768, F = 3072, Q = 2304, V = 50304;
  if (T < 1 || T > 65536 || T % 128) die("tokens: a multiple of 128 up to 65536");
  Buffers m;
  const size_t wide = (size_t)16384 * V, narrow = (size_t)65536 * F;
  m.a = device_alloc<bf16>(wide); m.b = device_alloc<bf16>(narrow); m.d = device_alloc<bf16>(wide); m.c = device_alloc<bf16>(narrow); m.aux = device_alloc<bf16>(narrow);
  m.bias = device_alloc<bf16>(65536); m.dbias = device_alloc<float>(65536); m.hash = device_alloc<unsigned long long>(1);
  auto fill = [](bf16* x, size_t n, uint32_t seed) { fill_kernel<<<1056, 256>>>(x, n, seed); };
  fill(m.a, wide, 1); fill(m.b, narrow, 2); fill(m.c, narrow, 3); fill(m.aux, narrow, 4); fill(m.bias, 65536, 5);
  device_sync();
  const int layers[4][2] = {{C, Q}, {C, C}, {C, F}, {F, C}};                       // {K, N}: QKV, attention out, MLP up, MLP down
  const Extra forward[4][3] = {{Extra::none, Extra::bias, Extra::bias}, {Extra::none, Extra::c, Extra::bias_c}, {Extra::none, Extra::bias, Extra::gelu_aux_bias}, {Extra::none, Extra::c, Extra::bias_c}};
  printf("forward: Y = X W^T\n");
  for (int l = 0; l < 4; l++) for (int e = 0; e < 3; e++) if (e == 0 || forward[l][e] != forward[l][e - 1]) bench_case(m, T, layers[l][1], layers[l][0], false, false, false, forward[l][e]);
  printf("gradient of X: dX = dY W, and with a transposed copy of W as A B^T\n");
  for (auto& l : layers) for (bool plain : {true, false}) bench_case(m, T, l[0], l[1], false, plain, false, Extra::none);
  for (bool plain : {true, false}) for (Extra e : {Extra::dgelu, Extra::dgelu_bgrad}) bench_case(m, T, F, C, false, plain, false, e);
  printf("gradient of W: dW += dY^T X in FP32\n");
  for (auto& l : layers) for (Extra e : {Extra::none, Extra::bgrad}) bench_case(m, l[1], l[0], T, true, true, true, e);
  printf("lm_head, a chunk of rows: logits, gradient of its input, gradient of its weights\n");
  for (int rows : {5376, 5632, 8192, 11264}) {
    bench_case(m, rows, V, C, false, false, false, Extra::none);
    bench_case(m, rows, C, V, false, true, false, Extra::none);
    bench_case(m, V, C, rows, true, true, true, Extra::none);
  }
  return 0;
}
