// dev/testing.h -- the smallest test harness that does the job. A test is a sentence that is true or false; the program ends with
// `N passed, N failed, N skipped`. Nothing here knows about CUDA.
#pragma once
#include <sys/wait.h>
#include <unistd.h>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct TestState {
  int passed = 0, failed = 0, skipped = 0;
  bool section_runs = true;
  std::string only;                    // run only the sections whose title contains this
  std::chrono::steady_clock::time_point section_start = std::chrono::steady_clock::now();
};
inline TestState tests;

// Starts a part of the run. Returns whether it is selected by --only: `if (!section("...")) return;`
inline bool section(const char* title) {
  tests.section_runs = tests.only.empty() || std::string(title).find(tests.only) != std::string::npos;
  if (tests.section_runs) printf("\n%s\n", title);
  fflush(stdout);
  return tests.section_runs;
}

// One test. The detail (printf) is shown beside the sentence: the measured figure, so that a log can be read later.
__attribute__((format(printf, 3, 4))) inline bool check(const std::string& sentence, bool ok, const char* detail, ...) {
  char text[512];
  va_list args;
  va_start(args, detail);
  vsnprintf(text, sizeof text, detail, args);
  va_end(args);
  (ok ? tests.passed : tests.failed)++;
  printf("  %s %s%s%s\n", ok ? "ok  " : "FAIL", sentence.c_str(), *text ? ": " : "", text);
  fflush(stdout);
  return ok;
}
inline bool check(const std::string& sentence, bool ok) { return check(sentence, ok, "%s", ""); }
inline void skip(const std::string& sentence, const std::string& why) {
  tests.skipped++;
  printf("  skip %s: %s\n", sentence.c_str(), why.c_str());
}
inline int tests_summary() {
  printf("\n%d passed, %d failed, %d skipped\n", tests.passed, tests.failed, tests.skipped);
  return tests.failed ? 1 : 0;
}

// Runs f in a child process and reports how it ended: for code that is expected to exit or to die.
struct ChildResult { int exit_code = -1, signal = 0; std::string output; };
template <class F> ChildResult in_child(F f) {
  int pipe_fd[2];
  if (pipe(pipe_fd)) { perror("pipe"); exit(1); }
  fflush(stdout); fflush(stderr);
  pid_t pid = fork();
  if (pid == 0) {
    dup2(pipe_fd[1], 1); dup2(pipe_fd[1], 2); close(pipe_fd[0]); close(pipe_fd[1]);
    f();
    fflush(stdout); fflush(stderr);
    _exit(0);
  }
  close(pipe_fd[1]);
  ChildResult r;
  char buf[4096];
  for (ssize_t n; (n = read(pipe_fd[0], buf, sizeof buf)) > 0;) r.output.append(buf, n);
  close(pipe_fd[0]);
  int status = 0;
  waitpid(pid, &status, 0);
  if (WIFEXITED(status)) r.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) r.signal = WTERMSIG(status);
  return r;
}

// A small deterministic generator for test data (xorshift64*), unrelated to the Philox under test.
struct Rng {
  uint64_t s;
  explicit Rng(uint64_t seed) : s(seed * 0x9E3779B97F4A7C15ull + 0x1234567) { for (int i = 0; i < 4; i++) next(); }
  uint64_t next() { s ^= s >> 12; s ^= s << 25; s ^= s >> 27; return s * 0x2545F4914F6CDD1Dull; }
  double uniform() { return (next() >> 11) * 0x1p-53; }                      // [0, 1)
  int below(int n) { return (int)(uniform() * n); }
  double normal() { double u = 1 - uniform(), v = uniform(); return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v); }
};

// ||out - ref|| / ||ref||; NaN or infinity anywhere gives infinity, which passes no test.
template <class A, class B> double rel_error(const A& out, const B& ref) {
  double e = 0, r = 0;
  for (size_t i = 0; i < ref.size(); i++) { double d = (double)out[i] - (double)ref[i]; e += d * d; r += (double)ref[i] * (double)ref[i]; }
  double x = std::sqrt(e) / (std::sqrt(r) + 1e-300);
  return std::isfinite(x) ? x : INFINITY;
}
// The largest |out - ref|, NaN-proof (fmax would drop a NaN).
template <class A, class B> double max_error(const A& out, const B& ref) {
  double worst = 0;
  for (size_t i = 0; i < ref.size(); i++) { double d = std::fabs((double)out[i] - (double)ref[i]); worst = d <= worst ? worst : d == d ? d : INFINITY; }
  return worst;
}
