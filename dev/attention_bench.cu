// dev/attention_bench.cu -- the attention kernels in use, and the simple ones: are they right, do they repeat, how fast are they. The table
// in kernels/attention.cuh was measured with this; other tiles are one more line in forwards() or backwards().
//   nvcc -std=c++17 -O3 -arch=sm_90 dev/attention_bench.cu -o attention_bench && ./attention_bench
// TFLOP/s are counted as 2 T^2 D for each batch row and head forward, 2.5 times that backward, however much a kernel computes. Errors:
// rms(error) / rms(result) of a small shape against the simple version in float. Times: median of runs of ten launches.
#include <algorithm>
#include <string>
#include <vector>
#include "../kernels/attention.cuh"

struct Shape { int B, T, H, KV, D; };
struct Forward { const char* name; int D, runs; void (*run)(bf16* out, float* lse, const bf16* qkv, int B, int T, int H, int KV, int D, float* amax); };
struct Backward {
  const char* name;
  int D, runs;
  void (*run)(bf16* dqkv, const bf16* dout, const bf16* qkv, const bf16* out, const float* lse, float* scratch, int B, int T, int H, int KV, int D);
  size_t (*scratch)(int B, int T, int H);
};

// A random sequence: sums of 4 uniform numbers
__global__ void fill_kernel(bf16* x, size_t n, uint32_t seed) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull + seed;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull; z = (z ^ z >> 27) * 0x94D049BB133111EBull; z ^= z >> 31;
  float sum = 0;
  for (int k = 0; k < 4; k++) sum += (float)(z >> 16 * k & 0xffff) / 65536.f - 0.5f;
  x[i] = to_bf16(sum * 1.7320508f);
}
__global__ void widen_kernel(float* y, const bf16* x, size_t n) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i < n) y[i] = to_float(x[i]);
}
__global__ void differ_kernel(unsigned* count, const uint32_t* x, const uint32_t* y, size_t n) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i < n && x[i] != y[i]) atomicAdd(count, 1u);
}
static bf16* random_values(size_t n, uint32_t seed) {
  bf16* x = device_alloc<bf16>(n);
  launch(fill_kernel, (unsigned)ceil_div(n, (size_t)256), 256, 0, x, n, seed);
  return x;
}
static float* widened(const bf16* x, size_t n) {
  float* y = device_alloc<float>(n);
  launch(widen_kernel, (unsigned)ceil_div(n, (size_t)256), 256, 0, y, x, n);
  return y;
}
static unsigned differences(const bf16* x, const bf16* y, size_t n) {
  static unsigned* count = device_alloc<unsigned>(1);
  device_zero(count, 1);
  launch(differ_kernel, (unsigned)ceil_div(n / 2, (size_t)256), 256, 0, count, (const uint32_t*)x, (const uint32_t*)y, n / 2);
  unsigned c;
  to_host(&c, count, 1);
  return c;
}
static double error(const bf16* x, const float* ref, size_t n, size_t ld, size_t from, size_t to) {
  std::vector<bf16> a(n);
  std::vector<float> b(n);
  to_host(a.data(), x, n);
  to_host(b.data(), ref, n);
  double e = 0, r = 0;
  for (size_t i = 0; i < n; i++)
    if (i % ld >= from && i % ld < to) { const double d = (double)to_float(a[i]) - b[i]; e += d * d; r += (double)b[i] * b[i]; }
  return sqrt(e / r);
}
// Several launches in a row between two events, as in a step: a single one would also show how long the GPU takes to start.
template <class F> double median_ms(F f, int runs) {
  static cudaEvent_t a = nullptr, b = nullptr;
  if (!a) { CUDA_CHECK(cudaEventCreate(&a)); CUDA_CHECK(cudaEventCreate(&b)); }
  const int in_a_row = runs > 1 ? 10 : 1;
  std::vector<float> times(runs);
  for (float& ms : times) {
    CUDA_CHECK(cudaEventRecord(a));
    for (int i = 0; i < in_a_row; i++) f();
    CUDA_CHECK(cudaEventRecord(b));
    CUDA_CHECK(cudaEventSynchronize(b));
    CUDA_CHECK(cudaEventElapsedTime(&ms, a, b));
    ms /= in_a_row;
  }
  std::sort(times.begin(), times.end());
  return times[runs / 2];
}

struct Buffers {
  Shape s;
  size_t n_qkv, n_out, n_lse;
  bf16 *qkv, *dout, *out, *out2, *dqkv, *dqkv2;
  float *lse, *scratch;
  Buffers(Shape s_, size_t scratch_floats) : s(s_) {
    const size_t tokens = (size_t)s.B * s.T;
    n_qkv = tokens * (s.H + 2 * s.KV) * s.D; n_out = tokens * s.H * s.D; n_lse = tokens * s.H;
    qkv = random_values(n_qkv, 1); dout = random_values(n_out, 2);
    out = device_alloc<bf16>(n_out); out2 = device_alloc<bf16>(n_out); dqkv = device_alloc<bf16>(n_qkv); dqkv2 = device_alloc<bf16>(n_qkv);
    lse = device_alloc<float>(n_lse); scratch = device_alloc<float>(scratch_floats);
  }
  ~Buffers() {
    for (bf16* p : {qkv, dout, out, out2, dqkv, dqkv2}) device_free(p);
    for (float* p : {lse, scratch}) device_free(p);
  }
};

static const std::vector<Forward>& forwards();
static const std::vector<Backward>& backwards();
static size_t scratch_floats(Shape s) {
  size_t n = 1;
  for (const Backward& b : backwards()) if (b.D == s.D) n = std::max(n, b.scratch(s.B, s.T, s.H));
  return n;
}

static void check_errors(Shape s) {
  Buffers x(s, scratch_floats(s));
  float *qkv = widened(x.qkv, x.n_qkv), *dout = widened(x.dout, x.n_out);
  float *out = device_alloc<float>(x.n_out), *dqkv = device_alloc<float>(x.n_qkv), *delta = device_alloc<float>(x.n_lse);
  attention_forward_simple<float>(out, x.lse, qkv, s.B, s.T, s.H, s.KV, s.D);
  attention_backward_simple<float>(dqkv, dout, qkv, out, x.lse, delta, s.B, s.T, s.H, s.KV, s.D);
  printf("errors at B %d T %d H %d KV %d D %d\n", s.B, s.T, s.H, s.KV, s.D);
  const size_t ld = (size_t)(s.H + 2 * s.KV) * s.D, q = (size_t)s.H * s.D, k = q + (size_t)s.KV * s.D;
  for (const Forward& f : forwards()) {
    if (f.D != s.D) continue;
    CUDA_CHECK(cudaMemset(x.out, 0xff, x.n_out * 2));
    f.run(x.out, x.lse, x.qkv, s.B, s.T, s.H, s.KV, s.D, nullptr);
    printf("  fwd %-20s %.2e\n", f.name, error(x.out, out, x.n_out, 1, 0, 1));
  }
  for (const Backward& f : backwards()) {
    if (f.D != s.D) continue;
    CUDA_CHECK(cudaMemset(x.dqkv, 0xff, x.n_qkv * 2));
    f.run(x.dqkv, x.dout, x.qkv, x.out, x.lse, x.scratch, s.B, s.T, s.H, s.KV, s.D);
    auto of = [&](size_t from, size_t to) { return error(x.dqkv, dqkv, x.n_qkv, ld, from, to); };
    printf("  bwd %-20s dq %.2e dk %.2e dv %.2e\n", f.name, of(0, q), of(q, k), of(k, ld));
  }
  fflush(stdout);
  for (float* p : {qkv, dout, out, dqkv, delta}) device_free(p);
}
static void time_shape(Shape s) {
  Buffers x(s, scratch_floats(s));
  const double flops = 2.0 * s.B * s.H * s.T * (double)s.T * s.D;
  printf("B %d T %d H %d KV %d D %d\n", s.B, s.T, s.H, s.KV, s.D);
  for (const Forward& f : forwards()) {
    if (f.D != s.D) continue;
    for (int i = 0; i < 2; i++) f.run(x.out2, x.lse, x.qkv, s.B, s.T, s.H, s.KV, s.D, nullptr);
    const double ms = median_ms([&] { f.run(x.out, x.lse, x.qkv, s.B, s.T, s.H, s.KV, s.D, nullptr); }, f.runs);
    printf("  fwd %-20s %8.3f ms %7.1f TFLOP/s  %u words differ\n", f.name, ms, flops / ms / 1e9, differences(x.out, x.out2, x.n_out));
    fflush(stdout);
  }
  for (const Backward& f : backwards()) {
    if (f.D != s.D) continue;
    for (int i = 0; i < 2; i++) f.run(x.dqkv2, x.dout, x.qkv, x.out, x.lse, x.scratch, s.B, s.T, s.H, s.KV, s.D);
    const double ms = median_ms([&] { f.run(x.dqkv, x.dout, x.qkv, x.out, x.lse, x.scratch, s.B, s.T, s.H, s.KV, s.D); }, f.runs);
    printf("  bwd %-20s %8.3f ms %7.1f TFLOP/s  %u words differ\n", f.name, ms, 2.5 * flops / ms / 1e9, differences(x.dqkv, x.dqkv2, x.n_qkv));
    fflush(stdout);
  }
  const double ms = median_ms([&] { attention_delta(x.scratch, x.dout, x.out, s.B, s.T, s.H, s.D); }, 11);
  printf("  delta alone %8.3f ms, %.0f GB/s\n", ms, 4.0 * x.n_out / ms / 1e6);
}

template <class C> size_t scratch_of(int B, int T, int H) { return backward_scratch<C>(nullptr, B, T, H).floats; }
static size_t scratch_of_simple(int B, int T, int H) { return (size_t)B * T * H; }
// D, keys of a tile
#define FORWARD(D, ...) {#D ", " #__VA_ARGS__, D, 15, attention_forward_tiles<ForwardTiles<D, __VA_ARGS__>>}
// D, warps, blocks of 16 keys a warp owns, warps that share keys, queries of a tile
#define BACKWARD(D, ...) \
  {#D ", " #__VA_ARGS__, D, 15, attention_backward_tiles<BackwardTiles<D, __VA_ARGS__>>, scratch_of<BackwardTiles<D, __VA_ARGS__>>}
static const std::vector<Forward>& forwards() {
  static const std::vector<Forward> list = {FORWARD(64, 64), FORWARD(128, 64), FORWARD(128, 32),
                                            {"simple", 64, 1, attention_forward_simple<bf16>}, {"simple", 128, 1, attention_forward_simple<bf16>}};
  return list;
}
static const std::vector<Backward>& backwards() {
  static const std::vector<Backward> list = {BACKWARD(64, 4, 2, 1, 32), BACKWARD(128, 8, 2, 2, 64), BACKWARD(128, 4, 1, 1, 32),
                                             {"simple", 64, 1, attention_backward_simple<bf16>, scratch_of_simple},
                                             {"simple", 128, 1, attention_backward_simple<bf16>, scratch_of_simple}};
  return list;
}
int main() {
  cudaDeviceProp p;
  CUDA_CHECK(cudaGetDeviceProperties(&p, 0));
  printf("%s, %d multiprocessors\n", p.name, p.multiProcessorCount);
  for (Shape s : {Shape{2, 1000, 4, 2, 64}, Shape{2, 1000, 4, 2, 128}}) check_errors(s);
  for (Shape s : {Shape{32, 1024, 12, 12, 64}, Shape{16, 2048, 16, 16, 128}, Shape{32, 1024, 6, 6, 128}, Shape{32, 1024, 12, 4, 64},
                  Shape{16, 2048, 16, 4, 128}}) time_shape(s);
}
