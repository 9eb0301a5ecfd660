// kernels/profile.cuh -- where the time of a step goes: a clock around every kernel, GEMM, copy and fill (option --profile).
//
// How     launch(), gemm() and the copies of cuda.cuh open a ProfileSpan, which costs one branch while no profile is taken. On a GPU a span is
//         two events on the stream, read after the step; on the CPU, where every launch waits for its end, the clock.
//         What lies between two spans is a gap: the GPU waits for the host. Gaps are summed by the pair of spans that they lie between.
// Error   An event itself takes the GPU about a microsecond, so kernels of a few microseconds look longer than they are. The table shows the
//         time of the last steps before the profile beside the time of the profiled ones.
#pragma once            // included by cuda.cuh, which defines CUDA_CHECK and main_stream
#include <cxxabi.h>
#include <algorithm>
#include <chrono>
#include <map>
#include <string>
#include <utility>
#include <vector>
#ifdef CPU_BUILD
#include <dlfcn.h>
#endif

// "void foo<4, true>(float*, int)" -> "foo<4, true>"
inline std::string short_kernel_name(std::string name) {
  if (name.empty() || name.back() != ')') return name;
  size_t open = name.size();
  for (int depth = 0; open-- > 0;) {
    depth += name[open] == ')' ? 1 : name[open] == '(' ? -1 : 0;
    if (depth == 0) break;
  }
  name.resize(open);
  return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}
inline std::string kernel_name(const void* kernel) {
  const char* symbol = nullptr;
#ifdef CPU_BUILD
  Dl_info info;
  if (dladdr((void*)kernel, &info)) symbol = info.dli_sname;
#elif CUDART_VERSION >= 12030
  if (cudaFuncGetName(&symbol, kernel) != cudaSuccess) symbol = nullptr;
#endif
  if (!symbol) { char text[32]; snprintf(text, sizeof text, "kernel at %p", kernel); return text; }
  int status = 0;
  char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string name = short_kernel_name(status == 0 ? readable : symbol);
  free(readable);
  return name;
}

struct Profile {
  bool on = false;

  // Called around every optimizer step, with the device idle. The first `warm_up` steps are only timed, the next `steps` are profiled; returns
  // true when the last of them has ended.
  void begin_step(int warm_up, int steps) {
    warm_up_ = warm_up; steps_ = steps;
    on = steps_ > 0 && step_ >= warm_up_ && step_ < warm_up_ + steps_;
    start_ = now();
    used_ = 0;
    if (on) mark();
  }
  bool end_step() {
    const double ms = now() - start_;
    if (step_ > 0 && step_ < warm_up_) { before_ms_ += ms; before_steps_++; }      // the first step makes plans and loads modules
    if (on) collect(ms);
    on = false;
    return ++step_ == warm_up_ + steps_ && steps_ > 0;
  }

  // A span: `name` or, if that is null, the kernel; flops and bytes where they are known.
  void begin(const void* kernel, const char* name, double flops, double bytes) {
    int row;
    if (kernel) {
      const auto at = of_kernel_.find(kernel);
      row = at != of_kernel_.end() ? at->second : of_kernel_[kernel] = row_of(kernel_name(kernel));
    } else row = row_of(name);
    rows_[row].flops += flops;
    rows_[row].bytes += bytes;
    spans_.push_back(row);
    mark();
  }
  void end() { mark(); }
  void print() const;

 private:
  struct Row { std::string name; long long calls = 0; double ms = 0, flops = 0, bytes = 0; };
  int warm_up_ = 0, steps_ = 0, step_ = 0, before_steps_ = 0;
  double start_ = 0, step_ms_ = 0, before_ms_ = 0;
  std::vector<Row> rows_;
  std::map<std::string, int> of_name_;
  std::map<const void*, int> of_kernel_;
  std::map<std::pair<int, int>, std::pair<double, long long>> gaps_;   // {row before, row after}, -1: the step's begin or end -> ms, count
  std::vector<int> spans_;                       // of this step: their rows; marks_ holds the step's begin, then begin and end of each
  size_t used_ = 0;

  int row_of(const std::string& name) {
    const auto [at, fresh] = of_name_.emplace(name, (int)rows_.size());
    if (fresh) rows_.push_back({name});
    return at->second;
  }
  static double now() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
#ifdef CPU_BUILD
  std::vector<double> marks_;
  void mark() { marks_.resize(std::max(marks_.size(), used_ + 1)); marks_[used_++] = now(); }
  double between(size_t a, size_t b) const { return marks_[b] - marks_[a]; }
#else
  std::vector<cudaEvent_t> marks_;
  void mark() {
    if (used_ == marks_.size()) { marks_.push_back(nullptr); CUDA_CHECK(cudaEventCreate(&marks_.back())); }
    CUDA_CHECK(cudaEventRecord(marks_[used_++], main_stream));
  }
  double between(size_t a, size_t b) const { float ms = 0; CUDA_CHECK(cudaEventElapsedTime(&ms, marks_[a], marks_[b])); return ms; }
#endif
  void collect(double ms) {
    step_ms_ += ms;
    double covered_to = 0;
    int before = -1;
    auto gap = [&](int after, double t) { auto& g = gaps_[{before, after}]; g.first += t; g.second++; };
    for (size_t i = 0; i < spans_.size(); i++) {
      Row& r = rows_[spans_[i]];
      r.calls++;
      r.ms += between(2 * i + 1, 2 * i + 2);
      gap(spans_[i], between(2 * i, 2 * i + 1));
      covered_to += between(2 * i, 2 * i + 2);
      before = spans_[i];
    }
    gap(-1, ms - covered_to);
    spans_.clear();
  }
};
inline Profile profile;

inline void Profile::print() const {
  std::vector<Row> rows = rows_;
  std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.ms > b.ms; });
  const double step = step_ms_ / steps_, unit = kOnCpu ? 1e9 : 1e12;
  double covered = 0;
  long long calls = 0;
  for (const Row& r : rows) { covered += r.ms / steps_; calls += r.calls; }
  printf("\nprofile of %d steps\n  %-72s %8s %10s %7s %10s %8s\n", steps_, "kernel", "calls", "ms", "share", kOnCpu ? "GFLOP/s" : "TFLOP/s", "GB/s");
  for (const Row& r : rows) {
    char flops[32] = "", bytes[32] = "";
    if (r.flops > 0) snprintf(flops, sizeof flops, "%.1f", r.flops / (r.ms * 1e-3) / unit);
    if (r.bytes > 0) snprintf(bytes, sizeof bytes, "%.0f", r.bytes / (r.ms * 1e-3) / 1e9);
    printf("  %-72s %8.1f %10.3f %6.1f%% %10s %8s\n", r.name.substr(0, 72).c_str(), (double)r.calls / steps_, r.ms / steps_, 100 * r.ms / steps_ / step, flops, bytes);
  }
  printf("  %-72s %8.1f %10.3f %6.1f%%\n  %-72s %8s %10.3f %6.1f%%\n  %-72s %8s %10.3f\n", "all of these", (double)calls / steps_, covered, 100 * covered / step, "gaps", "", step - covered,
         100 * (step - covered) / step, "a profiled step", "", step);
  if (before_steps_) printf("  %-72s %8s %10.3f\n", "a step before, without the profile's events", "", before_ms_ / before_steps_);
  std::vector<std::pair<std::pair<double, long long>, std::pair<int, int>>> gaps;
  for (auto& [pair, g] : gaps_) gaps.push_back({g, pair});
  std::sort(gaps.rbegin(), gaps.rend());
  gaps.resize(std::min(gaps.size(), (size_t)10));
  auto name = [&](int row) { return row < 0 ? std::string("-") : rows_[row].name.substr(0, 48); };
  printf("largest gaps, ms a step\n");
  for (auto& [g, pair] : gaps) printf("  %8.3f in %6.1f  between  %-48s  and  %s\n", g.first / steps_, (double)g.second / steps_, name(pair.first).c_str(), name(pair.second).c_str());
  fflush(stdout);
}

// Around a piece of device work, from here to the end of the scope.
struct ProfileSpan {
  bool on;
  explicit ProfileSpan(const void* kernel) : on(profile.on) { if (on) profile.begin(kernel, nullptr, 0, 0); }
  explicit ProfileSpan(const char* name, double bytes) : on(profile.on) { if (on) profile.begin(nullptr, name, 0, bytes); }
  ProfileSpan(const char* what, int M, int N, int K, const char* layout) : on(profile.on) {
    if (!on) return;
    char name[128];
    snprintf(name, sizeof name, "%s %d x %d x %d %s", what, M, N, K, layout);
    profile.begin(nullptr, name, 2.0 * M * N * K, 0);
  }
  ~ProfileSpan() { if (on) profile.end(); }
  ProfileSpan(const ProfileSpan&) = delete;
};
