// dev/test_model.h -- the whole model: against PyTorch, on a real checkpoint, and as a program that is killed, resumed and misused.
// Included by test_fp4.cu after train_fp4.cu.
#pragma once
#include <sys/stat.h>
#include <fstream>
#include <sstream>
#include "testing.h"

// ------------------------------------------------------------------ small helpers
inline std::string read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream s;
  s << in.rdbuf();
  return s.str();
}
inline bool file_exists(const std::string& path) { return access(path.c_str(), R_OK) == 0; }
inline std::string temp_dir() {                                // one for the whole run, removed at its end
  static std::string dir = [] {
    std::string t = (getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp") + std::string("/test_fp4_XXXXXX");
    if (!mkdtemp(t.data())) die("cannot make a temporary directory like %s", t.c_str());
    return t;
  }();
  return dir;
}
inline std::string program_path(const char* name) {            // the program built beside this one
  char self[4096];
  const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  if (n <= 0) die("cannot find this program's own path");
  self[n] = 0;
  return std::string(self).substr(0, std::string(self).rfind('/') + 1) + name;
}
// Runs a shell command and collects what it prints.
inline ChildResult shell(const std::string& command) {
  return in_child([&] { execl("/bin/sh", "sh", "-c", command.c_str(), (char*)nullptr); _exit(127); });
}
inline ChildResult train_program(const std::string& arguments, const std::string& environment = "") { return shell(environment + " exec " + program_path("train_fp4") + " " + arguments); }

inline double cosine(const std::vector<float>& a, const std::vector<float>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); i++) { ab += (double)a[i] * b[i]; aa += (double)a[i] * a[i]; bb += (double)b[i] * b[i]; }
  return ab / std::sqrt(aa * bb);
}
inline double norm_ratio(const std::vector<float>& a, const std::vector<float>& b) {
  double aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); i++) { aa += (double)a[i] * a[i]; bb += (double)b[i] * b[i]; }
  return std::sqrt(aa / bb);
}

inline Recipe recipe_named(const char* name) {
  Options o;
  o.recipe = name;
  return find_recipe(o);
}
// A model ready to train; weights from a directory, or random.
inline void make_model(Model& m, const ModelConfig& config, const char* recipe, int B, int S, const std::string& weights = "", GemmWay way = GemmWay::emulated) {
  m.config = config;
  m.recipe = recipe_named(recipe);
  m.bf16 = recipe_named("bf16");
  m.B = B; m.S = S; m.V = round_up(config.vocab, 128); m.training = true; m.seed = 1;
  m.scratch.ways = {way, way, way};
  make_params(m);
  allocate_model(m, false);
  if (weights.empty()) init_weights(m); else load_weights(m, weights);
}
inline void free_model(Model& m) { device_free(m.arena.memory); }
inline ModelConfig tiny_llama() {
  ModelConfig c;
  c.llama = true; c.layers = 2; c.channels = 64; c.heads = 4; c.kv_heads = 2; c.head_dim = 16; c.ffn = 160; c.vocab = 256; c.max_seq = 64; c.rope_theta = 10000; c.tied = false;
  return c;
}
// The gradient of one parameter, by its Hugging Face name, in that layout.
inline std::vector<float> hf_gradient(const Model& m, const Param& p, const HfTensor& h) {
  (void)m;
  std::vector<float> x((size_t)h.rows * p.cols);
  to_host(x.data(), p.weight->grad + (size_t)h.first_row * p.cols, x.size());
  return p.conv1d ? transposed(x, h.rows, p.cols) : x;
}
inline std::vector<float> all_gradients(const Model& m) {
  std::vector<float> x, all;
  for (const Param& p : m.params) { x.resize(p.size()); to_host(x.data(), p.weight->grad, p.size()); all.insert(all.end(), x.begin(), x.end()); }
  return all;
}
inline std::vector<float> all_logits(Model& m, int T) {                     // (T, vocab)
  std::vector<float> out;
  std::vector<floatX> row(m.V);
  for (int t = 0; t < T; t++) {
    logits_forward(m, m.logits, t, 1);
    to_host(row.data(), m.logits, m.V);
    for (int v = 0; v < m.config.vocab; v++) out.push_back(to_float(row[v]));
  }
  return out;
}

// ------------------------------------------------------------------ against PyTorch
constexpr bool kFp32 = sizeof(floatX) == 4;

inline void test_fixture(const std::string& name) {
  const std::string dir = "dev/fixtures/" + name;
  if (!file_exists(dir + "/expected.safetensors")) { skip(name + " equals PyTorch", dir + " is not here; run from the repository"); return; }
  SafetensorsReader expected(dir + "/expected.safetensors");
  const std::vector<int64_t> shape = expected.shape("tokens");
  const int B = (int)shape[0], S = (int)shape[1], T = B * S;
  std::vector<int> tokens(T), targets(T);
  expected.read_raw("tokens", "I32", {B, S}, tokens.data());
  expected.read_raw("targets", "I32", {B, S}, targets.data());
  Model m;
  make_model(m, read_config(dir), "bf16", B, S, dir);
  auto read = [&](const std::string& n) { std::vector<float> x((size_t)shape_elements(expected.shape(n))); expected.read_f32(n, expected.shape(n), x.data()); return x; };

  load_batch(m, tokens.data(), targets.data(), B, S);
  forward(m, B, S, 0);
  // BF16 activations carry 2^-9 relative error each; through two blocks the logits agree to about a percent.
  const double logits = rel_error(all_logits(m, T), read("logits"));
  check(name + ": logits equal PyTorch's", logits < (kFp32 ? 2e-6 : 2.5e-2), "relative error %.2e", logits);
  const double loss = accumulate_gradients(m, B, S, 1, 0, [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); }), want = read("loss")[0];
  // Roundings move the loss of the gpt2 fixture by -6e-3 +- 2e-3 (random errors of 2^-9 at every GEMM, 12 draws): BF16 weights shift it.
  check(name + ": loss equals PyTorch's", std::fabs(loss - want) < (kFp32 ? 2e-6 : 1.2e-2), "%.6f, PyTorch %.6f", loss, want);

  double worst_cosine = 1, worst_ratio = 0, worst_error = 0;
  std::string at = "none";
  int compared = 0;
  for (const Param& p : m.params) for (const HfTensor& h : p.hf) {
    const std::vector<float> g = hf_gradient(m, p, h), w = read("grad." + h.name);
    const double e = rel_error(g, w), c = cosine(g, w), r = std::fabs(norm_ratio(g, w) - 1);
    if (!(e <= worst_error)) { worst_error = e; at = h.name; }
    if (!(c >= worst_cosine)) worst_cosine = c;
    if (!(r <= worst_ratio)) worst_ratio = r;
    compared++;
  }
  int in_file = 0;
  for (const SafeTensor& t : expected.tensors) in_file += starts_with(t.name, "grad.");
  check(name + ": every gradient of the fixture is compared", compared == in_file, "%d of %d", compared, in_file);
  if (kFp32) check(name + ": all gradients equal PyTorch's", worst_error < 1e-5, "largest relative error %.2e (%s)", worst_error, at.c_str());
  else check(name + ": all gradients agree with PyTorch's in direction and length", worst_cosine > 0.998 && worst_ratio < 0.02, "least cosine %.5f, norm off by at most %.4f, relative error %.3f (%s)", worst_cosine, worst_ratio, worst_error, at.c_str());

  // Three steps of AdamW with clipping at 1, no schedule.
  const std::vector<float> losses = read("adamw.losses"), norms = read("adamw.grad_norms");
  double loss_error = 0, norm_error = 0;
  for (int step = 0; step < 3; step++) {
    const double l = accumulate_gradients(m, B, S, 1, (uint32_t)step, [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); });
    const float n = gradient_norm(m, 1.0f);
    update(m, {1e-3f, 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0.1f);
    const double le = std::fabs(l - losses[step]), ne = std::fabs(n / norms[step] - 1);
    if (!(le <= loss_error)) loss_error = le;
    if (!(ne <= norm_error)) norm_error = ne;
  }
  check(name + ": three AdamW steps give PyTorch's losses and gradient norms", loss_error < (kFp32 ? 5e-6 : 1e-2) && norm_error < (kFp32 ? 2e-5 : 2e-2), "loss off by %.1e, norm by %.1e of itself", loss_error, norm_error);
  for (const Param& p : m.params) for (const HfTensor& h : p.hf) if (expected.has("adamw.after." + h.name)) {
    std::vector<float> x((size_t)h.rows * p.cols);
    to_host(x.data(), p.weight->master + (size_t)h.first_row * p.cols, x.size());
    if (p.conv1d) x = transposed(x, h.rows, p.cols);
    const double e = rel_error(x, read("adamw.after." + h.name));
    check(name + ": " + h.name + " after three steps equals PyTorch's", e < (kFp32 ? 1e-5 : 2e-2), "relative error %.1e", e);
  }
  free_model(m);
}

inline void test_round_trip(const std::string& name) {
  const std::string dir = "dev/fixtures/" + name, copy = temp_dir() + "/copy_" + name;
  if (!file_exists(dir + "/model.safetensors")) { skip(name + " survives loading and saving", dir + " is not here"); return; }
  Model m;
  make_model(m, read_config(dir), "bf16", 1, 8, dir);
  AtomicDirectory out(copy);
  save_weights(m, out.path());
  out.commit();
  SafetensorsReader a(dir), b(copy);
  bool same = true;
  for (const SafeTensor& t : a.tensors) if (!b.has(t.name) || b.get(t.name).bytes != t.bytes || memcmp(b.get(t.name).data, t.data, t.bytes)) same = false;
  check(name + ": loaded and saved again, every tensor has the same name, shape and bits", same && a.tensors.size() == b.tensors.size(), "%zu tensors", b.tensors.size());
  free_model(m);
}

// ------------------------------------------------------------------ a real trained model
inline void test_stories() {
  if (!section("stories260K: a real trained checkpoint")) return;
  const std::string data = (getenv("FP4_TEST_DATA") ? getenv("FP4_TEST_DATA") : "data") + std::string("/stories260K");
  if (!file_exists(data + "/stories260K.bin") || !file_exists(data + "/story0.nll.txt")) {
    skip("mean NLL of two stories", data + "/stories260K.bin or story0.nll.txt is not here; FP4_TEST_DATA names the directory above stories260K");
    return;
  }
  const std::string dir = temp_dir() + "/stories";
  const ChildResult converted = shell("python3 scripts/llama2c_to_hf.py " + data + "/stories260K.bin " + dir);
  if (!check("scripts/llama2c_to_hf.py converts it", converted.exit_code == 0, "%s", converted.exit_code ? converted.output.c_str() : "")) return;
  const double want[2] = {1.316, 1.239};
  for (int story = 0; story < 2; story++) {
    std::ifstream in(data + "/story" + std::to_string(story) + ".nll.txt");
    std::vector<int> tokens = {}, targets;
    std::vector<double> nll;
    for (std::string line; std::getline(in, line);) {
      int position, token, next;
      double n;
      if (sscanf(line.c_str(), "%d %d %d %lf", &position, &token, &next, &n) == 4) { tokens.push_back(token); targets.push_back(next); nll.push_back(n); }
    }
    const int S = (int)tokens.size();
    if (S == 0) { check("story" + std::to_string(story) + ".nll.txt has tokens", false); return; }
    Model m;
    make_model(m, read_config(dir), "bf16", 1, S, dir);
    load_batch(m, tokens.data(), targets.data(), 1, S);
    forward(m, 1, S, 0);
    const double mean = head_loss(m, S, 0) / S;
    std::vector<float> losses(S);
    to_host(losses.data(), m.losses, S);
    const double each = max_error(losses, nll);
    check("story" + std::to_string(story) + ": mean NLL is that of the model's own inference program", std::fabs(mean - want[story]) < (kFp32 ? 1e-3 : 1e-2), "%.4f over %d tokens, expected %.3f", mean, S, want[story]);
    check("story" + std::to_string(story) + ": so is the NLL of every token", each < (kFp32 ? 1e-3 : 0.35), "largest difference %.2g", each);
    free_model(m);
  }
}

// ------------------------------------------------------------------ training behaves
inline void test_training() {
  if (!section("training a tiny model")) return;
  const int B = 4, S = 48, T = B * S;
  std::vector<int> tokens(T), targets(T);
  Rng rng(5);
  for (int i = 0; i < T; i++) tokens[i] = rng.below(60);
  for (int i = 0; i < T; i++) targets[i] = rng.below(60);
  auto load = [&](Model& m) { return [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); }; };

  std::vector<float> bf16_gradients;
  for (const char* recipe : {"bf16", "nvfp4"}) {
    Model m;
    make_model(m, tiny_llama(), recipe, B, S);
    const double first = accumulate_gradients(m, B, S, 1, 0, load(m));
    const std::vector<float> g = all_gradients(m);
    if (bf16_gradients.empty()) bf16_gradients = g;
    else {
      const double c = cosine(g, bf16_gradients), r = norm_ratio(g, bf16_gradients);
      // A single quantized GEMM has a relative error of .17; embedding and lm_head gradients dilute it, depth adds to it.
      check("nvfp4's gradient points where bf16's does, and is not equal to it", c > 0.9 && c < 0.9999 && std::fabs(r - 1) < 0.15, "cosine %.4f, norm ratio %.4f", c, r);
    }
    int zero = 0;
    for (const Param& p : m.params) for (const HfTensor& h : p.hf) { bool any = false; for (float v : hf_gradient(m, p, h)) any |= v != 0 && std::isfinite(v); zero += !any; }
    check(std::string(recipe) + ": no parameter's gradient is zero throughout", zero == 0, "%d are", zero);
    double loss = first;
    for (int step = 0; step < 120; step++) {
      loss = accumulate_gradients(m, B, S, 1, (uint32_t)step, load(m));
      gradient_norm(m, 1);
      update(m, {3e-3f, 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0);
    }
    check(std::string(recipe) + ": one batch of random targets is learnt by heart", loss < 0.25 * first, "loss %.3f -> %.3f in 120 steps", first, loss);
    free_model(m);
  }
  {                                                            // two halves accumulate to the whole
    Model m;
    make_model(m, tiny_llama(), "bf16", B, S);
    const double whole_loss = accumulate_gradients(m, B, S, 1, 0, load(m));
    const std::vector<float> whole = all_gradients(m);
    const double half_loss = accumulate_gradients(m, B / 2, S, 2, 0, [&](int i) { load_batch(m, tokens.data() + i * T / 2, targets.data() + i * T / 2, B / 2, S); });
    const double e = rel_error(all_gradients(m), whole);
    check("two micro-batches accumulate to the gradient and loss of one large batch", e < (kFp32 ? 1e-5 : 2e-2) && std::fabs(half_loss - whole_loss) < 1e-3, "relative error %.1e", e);
    const std::vector<float> once = all_gradients(m);
    accumulate_gradients(m, B / 2, S, 2, 0, [&](int i) { load_batch(m, tokens.data() + i * T / 2, targets.data() + i * T / 2, B / 2, S); });
    check("the same step computed twice gives the same bits", all_gradients(m) == once);
    free_model(m);
  }
  {                                                            // stochastic rounding follows seed and step
    Model m;
    m.keep = Keep::values;                                     // for the blocks that become BF16 below
    make_model(m, tiny_llama(), "nvfp4", B, S);
    accumulate_gradients(m, B, S, 1, 7, load(m));
    const std::vector<float> a = all_gradients(m);
    accumulate_gradients(m, B, S, 1, 7, load(m));
    const std::vector<float> b = all_gradients(m);
    accumulate_gradients(m, B, S, 1, 8, load(m));
    const std::vector<float> c = all_gradients(m);
    check("nvfp4: one step's random rounding is reproducible", a == b);
    check("nvfp4: another step rounds differently", a != c);
    m.bf16_first = 2;
    accumulate_gradients(m, B, S, 1, 7, load(m));
    const std::vector<float> d = all_gradients(m);
    Model n;
    make_model(n, tiny_llama(), "bf16", B, S);
    accumulate_gradients(n, B, S, 1, 7, load(n));
    check("nvfp4 with all blocks kept in BF16 equals bf16", d == all_gradients(n));
    free_model(m);
    free_model(n);
  }
  for (const char* recipe : {"nvfp4", "tetrajet", "quartet2"}) {   // the FP4 tensor-core GEMM, here on the model of its instruction
    if (kFp32) { skip(std::string(recipe) + ": steps through the mma kernel give the bits of the emulation", "FP32 activations show roundings of the emulation's FP32 sums that BF16 hides"); continue; }
    const int steps = std::string(recipe) == "nvfp4" ? 20 : 3;
    std::vector<float> weights[2];
    for (GemmWay way : {GemmWay::emulated, GemmWay::mma}) {
      Model m;
      make_model(m, tiny_llama(), recipe, 2, 32, "", way);
      for (int step = 0; step < steps; step++) {
        accumulate_gradients(m, 2, 32, 1, (uint32_t)step, [&](int) { load_batch(m, tokens.data(), targets.data(), 2, 32); });
        gradient_norm(m, 1);
        update(m, {3e-3f, 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0);
      }
      std::vector<float>& w = weights[way == GemmWay::mma];
      w.resize(m.elements);
      to_host(w.data(), m.master, m.elements);
      free_model(m);
    }
    check(std::string(recipe) + ": " + std::to_string(steps) + " steps through the mma kernel on packed codes give the bits of the emulation", weights[0] == weights[1], "relative difference %.1e", rel_error(weights[0], weights[1]));
  }
  {                                                            // a GPT-2 learns too (biases, learned positions, GELU)
    ModelConfig c;
    c.layers = 2; c.channels = 64; c.heads = c.kv_heads = 4; c.head_dim = 16; c.ffn = 256; c.vocab = 100; c.max_seq = S;
    Model m;
    make_model(m, c, "nvfp4", B, S);
    double first = 0, loss = 0;
    for (int step = 0; step < 120; step++) {
      loss = accumulate_gradients(m, B, S, 1, (uint32_t)step, load(m));
      if (step == 0) first = loss;
      gradient_norm(m, 1);
      update(m, {3e-3f, 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0);
    }
    check("nvfp4, GPT-2: one batch of random targets is learnt by heart", loss < 0.25 * first, "loss %.3f -> %.3f", first, loss);
    free_model(m);
  }
}

inline void test_schedules() {
  if (!section("schedules and sampling")) return;
  Options o;
  o.steps = 100; o.warmup = 10; o.lr = 1; o.min_lr = 0.1f;
  check("warm-up rises linearly and ends at the peak", learning_rate(o, 0) == 0.1f && learning_rate(o, 9) == 1.0f && learning_rate(o, 10) == 1.0f);
  check("cosine is half way down in the middle and near the end at its minimum", std::fabs(learning_rate(o, 55) - 0.55) < 1e-6 && std::fabs(learning_rate(o, 99) - 0.1) < 1e-3);
  o.schedule = "wsd"; o.decay_fraction = 0.2f;
  check("wsd is constant, then falls linearly", learning_rate(o, 79) == 1.0f && std::fabs(learning_rate(o, 90) - 0.55) < 1e-6);
  o.schedule = "constant";
  check("constant stays", learning_rate(o, 99) == 1.0f);
  const std::vector<float> logits = {0, 1, 2, 3};
  check("temperature 0 takes the likeliest token", sample_token(logits, 0, 1, 0.99) == 3);
  check("top-p keeps only the likeliest tokens", sample_token(logits, 1, 0.6f, 0.999) == 3 && sample_token(logits, 1, 0.7f, 0.999) == 2);
  Rng rng(3);
  int counts[4] = {};
  const int n = 40000;
  for (int i = 0; i < n; i++) counts[sample_token(logits, 1, 1, rng.uniform())]++;
  double z = 0, worst = 0;
  for (float l : logits) z += std::exp(l);
  for (int i = 0; i < 4; i++) { const double p = std::exp(logits[i]) / z, sigma = std::fabs(counts[i] - n * p) / std::sqrt(n * p * (1 - p)); if (!(sigma <= worst)) worst = sigma; }
  check("tokens are drawn with their probabilities", worst < 4.5, "worst of four counts is %.1f sigma off", worst);
}

// ------------------------------------------------------------------ the program
inline std::string small_run() {       // a run of a few seconds on one core
  return "--model llama:1M --train 'kernels/*.cuh' --batch 2 --seq 64 --val-batches 1 --val-every 0 --sample-length 0 --keep-checkpoints 0 ";
}
inline bool same_weights(const std::string& a, const std::string& b) {
  const std::string x = read_text(a + "/model.safetensors"), y = read_text(b + "/model.safetensors");
  return !x.empty() && x == y && read_text(a + "/trainer_state.safetensors") == read_text(b + "/trainer_state.safetensors");
}

inline void test_program() {
  if (!section("the program: resume, reproducibility, interruption")) return;
  if (!file_exists(program_path("train_fp4"))) { check("train_fp4 stands beside this program", false, "%s", program_path("train_fp4").c_str()); return; }
  const std::string t = temp_dir(), run = small_run() + "--steps 6 --save-every 3 ";
  const ChildResult first = train_program(run + "--out " + t + "/a");
  if (!check("a short run ends well", first.exit_code == 0, "exit %d %s", first.exit_code, first.exit_code ? first.output.c_str() : "")) return;
  check("it prints the untrained and the final validation loss", first.output.find("step     0/6  val loss 5.") != std::string::npos && first.output.find("step     6/6  val loss ") != std::string::npos);
  const std::string log = read_text(t + "/a/log.csv");
  check("log.csv has a header and a line a step", std::count(log.begin(), log.end(), '\n') == 7 && starts_with(log, "step,tokens,train_loss,val_loss,lr,grad_norm,ms,tok_per_s\n"));
  check("command.txt holds the command and the recipe", read_text(t + "/a/command.txt").find("wgrad.dy.rht=16") != std::string::npos);
  train_program(run + "--out " + t + "/b", kOnCpu ? "CUDA_ON_CPU_THREADS=1" : "");
  check("the same seed gives the same bits, whatever the number of cores", same_weights(t + "/a/step_000006", t + "/b/step_000006"));
  if (kOnCpu) {
    train_program(run + "--out " + t + "/c", "CUDA_ON_CPU_REVERSE=1");
    check("so does the opposite order of threads and blocks", same_weights(t + "/a/step_000006", t + "/c/step_000006"));
  }
  train_program(run + "--seed 4 --out " + t + "/d");
  check("another seed gives other weights", !same_weights(t + "/a/step_000006", t + "/d/step_000006"));
  shell("rm -rf " + t + "/b/step_000006");
  const ChildResult resumed = train_program(run + "--resume --out " + t + "/b");
  check("a run resumed in the middle ends with the same bits as an undisturbed one", resumed.exit_code == 0 && same_weights(t + "/a/step_000006", t + "/b/step_000006"), "exit %d", resumed.exit_code);
  const std::string log_b = read_text(t + "/b/log.csv");
  check("its log has every step once", std::count(log_b.begin(), log_b.end(), '\n') == 7);
  const ChildResult again = train_program(run + "--out " + t + "/a");
  check("a finished run's directory is not overwritten", again.exit_code == 1 && again.output.find("--resume") != std::string::npos, "exit %d", again.exit_code);
  const ChildResult done = train_program(run + "--resume --out " + t + "/a");
  check("resuming a finished run does nothing, and says it is there", done.exit_code == 0 && done.output.find("step_000006") != std::string::npos, "exit %d", done.exit_code);

  // The newest checkpoint is damaged: the one before it is taken.
  shell("truncate -s 1000 " + t + "/a/step_000006/model.safetensors");
  const ChildResult damaged = train_program(run + "--resume --out " + t + "/a");
  check("a damaged newest checkpoint is passed over for the one before", damaged.exit_code == 0 && damaged.output.find("after step 3") != std::string::npos && same_weights(t + "/a/step_000006", t + "/b/step_000006"), "exit %d", damaged.exit_code);

  // --eval-only of a checkpoint agrees with itself whatever the batch
  const ChildResult eval1 = train_program("--eval-only --train 'kernels/*.cuh' --recipe bf16 --batch 3 --seq 64 --init-from " + t + "/a/step_000006");
  const ChildResult eval2 = train_program("--eval-only --train 'kernels/*.cuh' --recipe bf16 --batch 16 --seq 64 --init-from " + t + "/a/step_000006");
  auto loss_of = [](const ChildResult& r) { const size_t at = r.output.rfind("val loss "); return at == std::string::npos ? NAN : atof(r.output.c_str() + at + 9); };
  check("--eval-only gives one loss for every batch size", eval1.exit_code == 0 && std::fabs(loss_of(eval1) - loss_of(eval2)) < 2e-3, "%.4f and %.4f", loss_of(eval1), loss_of(eval2));

  // Ctrl-C: the step ends, the state is saved, the run goes on to the same bits.
  const std::string slow = small_run() + "--steps 6 ";
  const ChildResult interrupted_run = shell("(" + program_path("train_fp4") + " " + slow + "--out " + t + "/e & p=$!; while ! grep -q '^2,' " + t + "/e/log.csv 2>/dev/null; do sleep 0.05; kill -0 $p 2>/dev/null || break; done; kill -INT $p; wait $p; echo exit $?)");
  if (interrupted_run.output.find("exit 130") != std::string::npos) {
    check("Ctrl-C finishes the step, saves and says how to go on", interrupted_run.output.find("--resume") != std::string::npos);
    train_program(slow + "--resume --out " + t + "/e");
    check("and going on gives the bits of an undisturbed run", same_weights(t + "/e/step_000006", t + "/b/step_000006"));
  } else skip("Ctrl-C saves", "the run ended before the signal reached it");
}

inline void test_kill(int kills) {
  if (!section("the program: kill -9 at random moments")) return;
  const std::string t = temp_dir(), run = small_run() + "--steps 40 --save-every 1 --keep-checkpoints 2 --recipe nvfp4 ";
  const ChildResult twin = train_program(run + "--out " + t + "/twin");
  if (!check("the undisturbed twin ends well", twin.exit_code == 0, "exit %d", twin.exit_code)) return;
  Rng rng(11);
  int killed = 0, failed_resumes = 0, incomplete = 0;
  for (int i = 0; i < 10 * kills && killed < kills; i++) {
    const std::string go = program_path("train_fp4") + " " + run + "--out " + t + "/killed" + (find_newest_checkpoint(t + "/killed").empty() ? "" : " --resume");
    const int wait_ms = 150 + rng.below(600);
    const ChildResult r = shell(go + " > " + t + "/killed.log 2>&1 & p=$!; sleep " + std::to_string(wait_ms / 1000.0) + "; kill -9 $p 2>/dev/null && echo killed; wait $p; echo exit $?");
    if (r.output.find("exit 137") != std::string::npos) killed++;
    else if (r.output.find("exit 0") == std::string::npos) failed_resumes++;
    else {                                                    // it ran to its end: start over
      if (!same_weights(t + "/killed/step_000040", t + "/twin/step_000040")) incomplete++;
      shell("rm -rf " + t + "/killed");
    }
  }
  const std::string resume = find_newest_checkpoint(t + "/killed").empty() ? "" : " --resume";
  const ChildResult last = train_program(run + "--out " + t + "/killed" + resume);
  check("after every kill the run resumed", failed_resumes == 0 && last.exit_code == 0, "%d kills, %d failures", killed, failed_resumes);
  check("as many kills as planned were made", killed == kills, "%d", killed);
  check("in the end the weights and the optimizer have the bits of the undisturbed twin", incomplete == 0 && same_weights(t + "/killed/step_000040", t + "/twin/step_000040"));
  int stale = 0;
  std::vector<std::string> names;
  list_directory(t + "/killed", &names);
  for (const std::string& n : names) stale += n[0] == '.';
  check("no temporary file of a killed save is left", stale == 0, "%d", stale);
}

inline void test_errors() {
  if (!section("the program: errors")) return;
  const std::string t = temp_dir();
  struct Case { const char* what; std::string arguments; int exit_code; const char* message; };
  auto header = [&](const std::string& path, int magic, int version, int count, int real, int token) {
    int h[256] = {magic, version, count};
    std::vector<uint16_t> tokens(real, (uint16_t)token);
    std::ofstream f(path, std::ios::binary);
    f.write((char*)h, sizeof h);
    f.write((char*)tokens.data(), real * 2);
  };
  header(t + "/good.bin", 20240520, 1, 2000, 2000, 5);
  header(t + "/short.bin", 20240520, 1, 5000, 2000, 5);
  header(t + "/version.bin", 20240520, 9, 2000, 2000, 5);
  header(t + "/range.bin", 20240520, 1, 2000, 2000, 300);
  { std::ofstream f(t + "/tiny.txt"); f << "hello"; }
  const std::string fixture = "dev/fixtures/llama";
  shell("mkdir -p " + t + "/missing " + t + "/shape " + t + "/cut && cp " + fixture + "/config.json " + t + "/missing/ && cp " + fixture + "/config.json " + t + "/cut/ && sed 's/\"intermediate_size\": 80/\"intermediate_size\": 96/' " +
        fixture + "/config.json > " + t + "/shape/config.json && cp " + fixture + "/model.safetensors " + t + "/shape/ && head -c 20000 " + fixture + "/model.safetensors > " + t + "/cut/model.safetensors && "
        "sed 's/model.norm.weight/model.nurm.weight/' " + fixture + "/model.safetensors > " + t + "/missing/model.safetensors");
  const std::string tokens = "--train " + t + "/good.bin --seq 16 --batch 1 --steps 1 --sample-length 0 --out " + t + "/x ", vocab = tokens + "--vocab 256 ";
  const Case cases[] = {
      {"an unknown option", "--frobnicate 1", 2, "--frobnicate"},
      {"an option without its value", "--steps", 2, "--steps"},
      {"a word that is no number", "--batch many", 2, "--batch"},
      {"a batch of 0", "--batch 0", 2, "from 1"},
      {"a negative learning rate", "--lr -1", 2, "--lr"},
      {"a learning rate that is not a number", "--lr nan", 2, "--lr"},
      {"an unknown recipe", "--recipe fp3", 2, "nvfp4"},
      {"an unknown field", "--set fprop.y.rounding=nearest", 2, "fprop.x.rounding"},
      {"a value a field does not take", "--set dgrad.dy.rounding=up", 2, "stochastic"},
      {"a rotation on one side only", "--set wgrad.x.rht=0", 2, "same rht"},
      {"an unknown schedule", "--schedule linear", 2, "cosine"},
      {"an unknown model", "--model gpt9:d1 --train kernels/cuda.cuh", 2, "gpt2:d2"},
      {"a total batch that is no multiple", "--total-batch 1000", 2, "multiple"},
      {"--resume without --out", "--resume", 2, "--out"},
      {"--resume with nothing to resume", "--resume --out " + t + "/nothing", 1, "no finished checkpoint"},
      {"missing data", "--train " + t + "/none.bin", 1, "none.bin"},
      {"a pattern that matches nothing", "--train '" + t + "/*.none'", 1, ".none"},
      {"a text shorter than a sequence", "--train " + t + "/tiny.txt", 1, "lower --seq"},
      {"a truncated token file", "--train " + t + "/short.bin", 1, "short.bin"},
      {"a token file of another version", "--train " + t + "/version.bin", 1, "version.bin"},
      {"a token outside the vocabulary", "--train " + t + "/range.bin --seq 16 --vocab 256", 1, "token 300"},
      {"a checkpoint without one tensor", vocab + "--init-from " + t + "/missing", 1, "model.norm.weight"},
      {"a checkpoint of another shape", vocab + "--init-from " + t + "/shape", 1, "mlp.gate_proj.weight"},
      {"a truncated checkpoint", vocab + "--init-from " + t + "/cut", 1, "model.safetensors"},
      {"a directory without a model", vocab + "--init-from " + t, 1, "config.json"},
  };
  for (const Case& c : cases) {
    const ChildResult r = train_program(c.arguments);
    const bool one_line = std::count(r.output.begin(), r.output.end(), '\n') >= 1 && r.output.find("error: ") != std::string::npos;
    check(std::string(c.what) + " is an error of one line, exit " + std::to_string(c.exit_code), r.exit_code == c.exit_code && one_line && r.output.find(c.message) != std::string::npos, "exit %d: %s", r.exit_code,
          r.output.substr(r.output.rfind("error: ") == std::string::npos ? 0 : r.output.rfind("error: ")).substr(0, 220).c_str());
  }
  {                                                                  // a weight that is not a number: the step is refused and nothing is written
    Model m;
    make_model(m, tiny_llama(), "bf16", 1, 16);
    AtomicDirectory dir(t + "/nan");
    std::vector<float> bad(m.params.back().size(), 0.1f);
    bad[5] = NAN;
    set_param(m.params.back(), bad.data());
    save_weights(m, dir.path());
    dir.commit();
    free_model(m);
    const ChildResult r = train_program(vocab + "--steps 3 --init-from " + t + "/nan");
    check("a loss that is not finite stops the run with an error, exit 1", r.exit_code == 1 && r.output.find("error: step 1: the loss is") != std::string::npos && find_newest_checkpoint(t + "/x").empty(), "exit %d", r.exit_code);
  }
  {                                                                  // the disk fills up while a checkpoint is written (files limited to 300 KB)
    const ChildResult r = shell("trap '' XFSZ; ulimit -f 300; exec " + program_path("train_fp4") + " --train 'kernels/*.cuh' --seq 32 --batch 1 --steps 2 --sample-length 0 --val-batches 1 --out " + t + "/full");
    check("a full disk during a save is an error that names the file, and leaves no half checkpoint", r.exit_code == 1 && r.output.find("model.safetensors") != std::string::npos && find_newest_checkpoint(t + "/full").empty(), "exit %d: %s",
          r.exit_code, r.output.substr(r.output.rfind("error: ") == std::string::npos ? 0 : r.output.rfind("error: ")).substr(0, 160).c_str());
  }
  const ChildResult help = train_program("--help"), recipes = train_program("--list-recipes");
  check("--help lists every option with its default", help.exit_code == 0 && help.output.find("--top-p X") != std::string::npos && help.output.find("[720]") != std::string::npos);
  check("--list-recipes prints the table", recipes.exit_code == 0 && recipes.output.find("2509.25149") != std::string::npos);
}

// Trains a small model of each family for 20 steps and writes it, with tokens and this program's logits for them, so that
// `python3 dev/make_fixtures.py check-export DIR/gpt2 DIR/gpt2.safetensors` can compare with transformers. (test_fp4 --export DIR)
inline void export_models(const std::string& dir) {
  for (bool llama : {false, true}) {
    ModelConfig c = tiny_llama();
    c.vocab = 300; c.layers = 3;
    if (!llama) { c.llama = false; c.kv_heads = c.heads; c.ffn = 256; c.tied = true; c.norm_eps = 1e-5f; }
    const int B = 3, S = 40, T = B * S;
    Model m;
    make_model(m, c, "nvfp4", B, S);
    Rng rng(9);
    std::vector<int> tokens(T), targets(T);
    for (int i = 0; i < T; i++) { tokens[i] = rng.below(c.vocab); targets[i] = rng.below(c.vocab); }
    for (int step = 0; step < 20; step++) {
      accumulate_gradients(m, B, S, 1, (uint32_t)step, [&](int) { load_batch(m, tokens.data(), targets.data(), B, S); });
      gradient_norm(m, 1);
      update(m, {1e-3f, 0.9f, 0.95f, 1e-8f, 0, step + 1}, 0.1f);
    }
    m.bf16_first = c.layers;                                        // transformers knows no FP4: compare without quantization
    load_batch(m, tokens.data(), targets.data(), B, S);
    forward(m, B, S, 0);
    const std::vector<float> logits = all_logits(m, T);
    const std::string name = dir + (llama ? "/llama" : "/gpt2");
    AtomicDirectory out(name);
    save_weights(m, out.path());
    out.commit();
    SafetensorsWriter w(name + ".safetensors");
    w.declare("logits", "F32", {B, S, c.vocab});
    w.declare("tokens", "I32", {B, S});
    w.write_f32(logits.data(), logits.size());
    w.write(tokens.data(), tokens.size() * sizeof(int));
    w.finish();
    printf("wrote %s and %s.safetensors\n", name.c_str(), name.c_str());
    free_model(m);
  }
}

inline void test_model() {
  if (section("the model against PyTorch")) {
    for (const char* name : {"gpt2", "llama", "llama_tied"}) test_fixture(name);
    for (const char* name : {"gpt2", "llama", "llama_tied"}) test_round_trip(name);
  }
  test_stories();
  test_training();
  test_schedules();
}
