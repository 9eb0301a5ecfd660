// train_fp4.cu -- trains a GPT-2 or a Llama in FP4, on a GPU or on a CPU. It reads from top to bottom:
//
//     options            what the command line can say
//     parameters         one table: name, shape, decayed?, quantized? Optimizer, checkpoints and counting walk it
//     control            oscillation, outliers, late precision: train_control.cuh
//     activations        what the forward pass keeps for the backward pass; all memory is taken once, from one arena
//     forward, backward  about ten calls a block, each with its shapes
//     update             gradient norm, clipping, AdamW
//     checkpoints        Hugging Face model directories plus the optimizer's state
//     sampling           text from the model
//     main               the loop
//
// The kernels are in kernels/, each file opening with what it computes. The FP4 part is kernels/recipe.cuh (the table of recipes),
// kernels/linear.cuh (a linear layer under a recipe) and kernels/quantize.cuh.
//
// Letters in shape comments: B batch, S sequence length, T = B*S tokens, C channels, H heads, G key/value heads, D channels a head,
// F width of the MLP, V vocabulary padded to a multiple of 128, L blocks ("layers").
#include <signal.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#include <array>
#include <chrono>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>
#include "data/checkpoint.h"       // defines: ModelConfig, read_config, SafetensorsReader, SafetensorsWriter, AtomicDirectory
#include "data/loader.h"           // defines: DataLoader
#include "data/tokenizer.h"        // defines: Tokenizer
#include "kernels/adamw.cuh"       // defines: adamw_update, grad_norm, formats of AdamW's states
#include "kernels/attention.cuh"   // defines: attention_forward, attention_backward
#include "kernels/embedding.cuh"   // defines: embedding_forward, embedding_backward, position_embedding_backward, sort_tokens
#include "kernels/linear.cuh"      // defines: linear_forward, linear_backward; from there gemm, quantize_nvfp4, the table of recipes
#include "kernels/loss.cuh"        // defines: softmax_cross_entropy
#include "kernels/mlp.cuh"         // defines: gelu_*, swiglu_*, bias_backward
#include "kernels/norm.cuh"        // defines: layernorm_*, rmsnorm_*
#include "kernels/oscillation.cuh" // defines: the windows of OsciReset and Q-Ramping, Q-EMA's average
#include "kernels/outliers.cuh"    // defines: OutControl's choice of columns, OCC; linear_forward, linear_backward under a LayerControl
#include "kernels/rope.cuh"        // defines: rope_table, rope_forward, rope_backward

// =====================================================================================================================================
// Options

struct Options {
  // data
  std::string train = "README.md,Makefile,*.cu,*.cuh,kernels/*.cuh,dev/*.h,data/*.h,data/*.cpp,scripts/*,dev/*.py", val, tokenizer;
  double val_fraction = 0.1;
  int vocab = 0;
  // model
  std::string model = "llama:1M", init_from, recipe = "nvfp4", gemm = "auto", keep = "codes";
  std::vector<std::string> set;
  int bf16_first = 0, bf16_last = -1;
  // what changes late in training, and what watches over it
  double bf16_from = 1;
  std::string bf16_what, bf16_trigger = "step";
  int fqt_every = 0;
  std::string oscillation, outliers;             // empty: as the recipe says
  int osci_start = -1, osci_period = 200, osci_detect = 0, ramp_most = 16, outlier_start = 501, outlier_steps = 50;
  float osci_tau = 8, ema = 0.998f, outlier_fraction = 0.1f;
  std::string outlier_order = "sorted";
  // training
  int batch = 4, seq = 128, total_batch = 0, steps = 720;
  float lr = 2e-3f, min_lr = 0.1f, decay_fraction = 0.2f, weight_decay = 0.1f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, clip = 1, z_loss = 0;
  int warmup = -1;
  std::string schedule = "cosine", adam_m = "fp32", adam_v = "fp32", adam_scale = "fp32";
  long long seed = 1337;
  // output
  std::string out;
  int val_every = 180, val_batches = 40, sample_every = 0, sample_length = 256, save_every = 0, keep_checkpoints = 2;
  int profile = 0;
  std::string prompt;
  float temperature = 0.8f, top_p = 0.95f;
  bool resume = false, eval_only = false, list_recipes = false, help = false;
};

struct Option { std::string name; char letter; std::string argument, help, value; std::function<void(const std::string&)> set; };

// The table that --help prints and the parser reads. Each entry checks its own argument.
std::vector<Option> option_table(Options& o) {
  std::vector<Option> table;
  auto text_of = [](double v) { char s[32]; snprintf(s, sizeof s, "%g", v); return std::string(s); };
  auto text = [&](const char* name, char letter, const char* argument, std::string* to, const char* help) {
    table.push_back({name, letter, argument, help, *to, [=](const std::string& v) { *to = v; }});
  };
  auto integer = [&](const char* name, char letter, auto* to, long long low, long long high, const char* help) {
    table.push_back({name, letter, "N", help, text_of((double)*to), [=](const std::string& v) {
      char* end;
      errno = 0;
      const long long n = strtoll(v.c_str(), &end, 10);
      if (v.empty() || *end || errno || n < low || n > high) die_usage("--%s %s: a whole number from %lld to %lld is allowed", name, v.c_str(), low, high);
      *to = (std::remove_pointer_t<decltype(to)>)n;
    }});
  };
  auto number = [&](const char* name, char letter, auto* to, double low, double high, const char* help) {
    table.push_back({name, letter, "X", help, text_of((double)*to), [=](const std::string& v) {
      char* end;
      const double x = strtod(v.c_str(), &end);
      if (v.empty() || *end || !(x >= low && x <= high)) die_usage("--%s %s: a number from %g to %g is allowed", name, v.c_str(), low, high);
      *to = (std::remove_pointer_t<decltype(to)>)x;
    }});
  };
  auto flag = [&](const char* name, char letter, bool* to, const char* help) { table.push_back({name, letter, "", help, "", [=](const std::string&) { *to = true; }}); };

  text("train", 'i', "FILES", &o.train, "training data: token files, text files, patterns, comma separated");
  text("val", 'j', "FILES", &o.val, "validation data; without it, the end of the training data");
  number("val-fraction", 0, &o.val_fraction, 0, 0.9, "share of the training data to validate on when there is no --val");
  text("tokenizer", 0, "FILE", &o.tokenizer, "GPT-2 rank file, to print samples of token models as text");
  integer("vocab", 0, &o.vocab, 0, 65536, "size of the vocabulary; 0: 256 for text, 50257 for token files");
  text("model", 'e', "MODEL", &o.model, "gpt2:d12 (d2..d12, d24, d36, d48), llama:1M, 10M, 30M, 50M, 100M, 200M, 1B, or a directory");
  text("init-from", 0, "DIR", &o.init_from, "start from the weights of this Hugging Face directory");
  text("recipe", 'r', "NAME", &o.recipe, "how linear layers are quantized; see --list-recipes");
  text("gemm", 0, "WAY", &o.gemm, "what multiplies FP4 operands: auto, cublaslt or mma (FP4 tensor cores), emulated (BF16, exact)");
  text("keep", 0, "FORM", &o.keep, "how a linear layer's input waits for the backward pass: codes (4.5 bits an element), operands (codes, but X^T in BF16 if it comes from X) or values (BF16, quantized again)");
  table.push_back({"set", 0, "FIELD=VALUE", "override one field of the recipe, such as dgrad.dy.rounding=nearest; may be repeated", "", [&o](const std::string& v) { o.set.push_back(v); }});
  integer("bf16-first", 0, &o.bf16_first, 0, 10000, "keep the first N blocks in BF16");
  integer("bf16-last", 0, &o.bf16_last, -1, 10000, "keep the last N blocks in BF16; -1: as the recipe says");
  number("bf16-from", 0, &o.bf16_from, 0, 1, "from this share of the steps on, compute in BF16 what --bf16-what says; 1: never");
  text("bf16-what", 0, "WHAT", &o.bf16_what, "forward, backward or all; without it forward, and backward with --bf16-trigger fqt");
  text("bf16-trigger", 0, "WHAT", &o.bf16_trigger, "step: at --bf16-from; fqt: when the gradient sinks below sqrt(3) times its quantization noise");
  integer("fqt-every", 0, &o.fqt_every, 0, 1 << 30, "measure gradient over quantization noise every N steps (a backward pass more); 0: never, or 100 with the trigger");
  text("oscillation", 0, "NAME", &o.oscillation, "none, osci-reset, q-ema or q-ramping; without it, as the recipe says");
  integer("osci-start", 0, &o.osci_start, -1, 1 << 30, "osci-reset, q-ramping: first step of the first window; -1: 65 % of the steps (q-ramping: after the warm-up)");
  integer("osci-period", 0, &o.osci_period, 3, 1 << 30, "osci-reset, q-ramping: steps from window to window");
  integer("osci-detect", 0, &o.osci_detect, 0, 1 << 30, "osci-reset, q-ramping: steps that a window watches; 0: 50, and 30 for q-ramping");
  number("osci-tau", 0, &o.osci_tau, 0, 1e9, "osci-reset: a weight whose quantized value moves this many times as far as itself is reset");
  number("ema", 0, &o.ema, 0, 1, "q-ema: decay of the weights' average");
  integer("ramp-most", 0, &o.ramp_most, 1, 255, "q-ramping: longest period of an element, in steps");
  text("outliers", 0, "NAME", &o.outliers, "none, outcontrol or occ; without it, as the recipe says. The quantile of occ is the recipe's field occ");
  integer("outlier-start", 0, &o.outlier_start, 1, 1 << 30, "outcontrol: first step that sums the norms of the input channels");
  integer("outlier-steps", 0, &o.outlier_steps, 1, 1 << 30, "outcontrol: for how many steps");
  number("outlier-fraction", 0, &o.outlier_fraction, 0, 0.5, "outcontrol: share of the channels in MXFP8, rounded up to a multiple of 128");
  text("outlier-order", 0, "ORDER", &o.outlier_order, "outcontrol: sorted (FP4 channels by falling norm) or memory");
  integer("batch", 'b', &o.batch, 1, 65536, "sequences in a micro-batch");
  integer("seq", 't', &o.seq, 1, 1 << 20, "tokens in a sequence");
  integer("total-batch", 'd', &o.total_batch, 0, 1 << 30, "tokens in a step, a multiple of batch x seq; 0: one micro-batch");
  integer("steps", 'x', &o.steps, 0, 1 << 30, "optimizer steps");
  number("lr", 'l', &o.lr, 0, 10, "peak learning rate");
  integer("warmup", 'u', &o.warmup, -1, 1 << 30, "steps of linear warm-up; -1: a tenth of the steps");
  text("schedule", 'k', "NAME", &o.schedule, "after the warm-up: cosine, wsd (constant, then linear decay) or constant");
  number("min-lr", 'q', &o.min_lr, 0, 1, "final learning rate, as a share of the peak");
  number("decay-fraction", 0, &o.decay_fraction, 0, 1, "wsd: share of the steps that decay");
  number("weight-decay", 'c', &o.weight_decay, 0, 10, "decoupled weight decay of the matrices");
  number("beta1", 0, &o.beta1, 0, 0.9999999, "AdamW");
  number("beta2", 0, &o.beta2, 0, 0.9999999, "AdamW");
  number("eps", 0, &o.eps, 0, 1, "AdamW");
  text("adam-m", 0, "FORMAT", &o.adam_m, "how AdamW keeps m: fp32, bf16 or fp8 (E4M3, a scale for 128 elements)");
  text("adam-v", 0, "FORMAT", &o.adam_v, "how AdamW keeps v: fp32 or bf16");
  text("adam-scale", 0, "FORMAT", &o.adam_scale, "scales of an FP8 m: fp32 or e8m0");
  number("clip", 0, &o.clip, 0, 1e9, "largest gradient norm; 0: do not clip");
  number("z-loss", 0, &o.z_loss, 0, 1, "weight of the squared log-partition in the loss");
  integer("seed", 0, &o.seed, 0, INT64_MAX, "of weights, data order and stochastic rounding");
  text("out", 'o', "DIR", &o.out, "directory of the run; without it, out/ and the time");
  integer("val-every", 'v', &o.val_every, 0, 1 << 30, "validate every N steps; 0: only at the end");
  integer("val-batches", 'm', &o.val_batches, 1, 1 << 30, "micro-batches of a validation");
  integer("sample-every", 's', &o.sample_every, 0, 1 << 30, "print a sample every N steps; 0: only at the end");
  integer("sample-length", 'g', &o.sample_length, 0, 1 << 20, "tokens of a sample; 0: none");
  text("prompt", 'p', "TEXT", &o.prompt, "what a sample continues");
  number("temperature", 0, &o.temperature, 0, 100, "of sampling; 0: the likeliest token");
  number("top-p", 0, &o.top_p, 0.0001, 1, "sample from the likeliest tokens that make up this probability");
  integer("save-every", 'n', &o.save_every, 0, 1 << 30, "write a checkpoint every N steps; 0: only at the end");
  integer("keep-checkpoints", 0, &o.keep_checkpoints, 0, 1 << 30, "checkpoints to keep; 0: all");
  integer("profile", 0, &o.profile, 0, 100000, "after 3 steps, time every kernel of the next N, print the table, and stop; 0: never");
  flag("resume", 'y', &o.resume, "go on from the newest checkpoint in --out");
  flag("eval-only", 0, &o.eval_only, "print the loss over the whole validation data, and stop");
  flag("list-recipes", 0, &o.list_recipes, "print the table of recipes, and stop");
  flag("help", 'h', &o.help, "print this, and stop");
  return table;
}

Options parse_options(int argc, char** argv) {
  Options o;
  const std::vector<Option> table = option_table(o);
  for (int i = 1; i < argc; i++) {
    std::string word = argv[i], value;
    bool has_value = false;
    const size_t eq = word.rfind("--", 0) == 0 ? word.find('=') : std::string::npos;
    if (eq != std::string::npos) { value = word.substr(eq + 1); word.resize(eq); has_value = true; }
    const Option* option = nullptr;
    for (const Option& p : table) if (word == "--" + p.name || (p.letter && word == std::string("-") + p.letter)) option = &p;
    if (!option) die_usage("there is no option '%s'; --help lists them all", argv[i]);
    if (option->argument.empty() && has_value) die_usage("--%s takes no value", option->name.c_str());
    if (!option->argument.empty() && !has_value) {
      if (i + 1 == argc) die_usage("--%s needs a value (%s)", option->name.c_str(), option->help.c_str());
      value = argv[++i];
    }
    option->set(value);
  }
  if (o.schedule != "cosine" && o.schedule != "wsd" && o.schedule != "constant") die_usage("--schedule %s: cosine, wsd and constant are allowed", o.schedule.c_str());
  auto one_of = [](const char* option, const std::string& value, std::vector<std::string> allowed) {
    std::string names;
    for (const std::string& a : allowed) { if (value == a) return; names += (names.empty() ? "" : ", ") + a; }
    die_usage("--%s %s: allowed are %s", option, value.c_str(), names.c_str());
  };
  one_of("keep", o.keep, {"codes", "operands", "values"});
  one_of("adam-m", o.adam_m, {"fp32", "bf16", "fp8"});
  one_of("adam-v", o.adam_v, {"fp32", "bf16"});
  one_of("adam-scale", o.adam_scale, {"fp32", "e8m0"});
  one_of("bf16-trigger", o.bf16_trigger, {"step", "fqt"});
  if (o.bf16_what.empty()) o.bf16_what = o.bf16_trigger == "fqt" ? "backward" : "forward";
  one_of("bf16-what", o.bf16_what, {"forward", "backward", "all"});
  if (!o.oscillation.empty()) one_of("oscillation", o.oscillation, {"none", "osci-reset", "q-ema", "q-ramping"});
  if (!o.outliers.empty()) one_of("outliers", o.outliers, {"none", "outcontrol", "occ"});
  one_of("outlier-order", o.outlier_order, {"sorted", "memory"});
  if (o.bf16_trigger == "fqt" && o.fqt_every == 0) o.fqt_every = 100;
  if (o.profile && o.steps < o.profile + 3) die_usage("--profile %d: takes %d steps, --steps allows %d", o.profile, o.profile + 3, o.steps);
  if (o.resume && o.out.empty()) die_usage("--resume needs --out DIR, the directory of the run to go on with");
  const long long micro = (long long)o.batch * o.seq;
  if (o.total_batch == 0) o.total_batch = (int)min(micro, (long long)INT32_MAX);
  if (micro >= 1 << 30) die_usage("--batch %d x --seq %d: at most 2^30 tokens in a micro-batch; use --total-batch to accumulate", o.batch, o.seq);
  if (o.total_batch % micro) die_usage("--total-batch %d: must be a multiple of batch x seq = %lld", o.total_batch, micro);
  if (o.warmup < 0) o.warmup = o.steps / 10;
  return o;
}

void print_help() {
  Options defaults;
  printf("train_fp4: train a GPT-2 or Llama in FP4. `make run` shows it working.\n\n");
  for (const Option& p : option_table(defaults)) {
    const std::string left = "--" + p.name + (p.letter ? std::string("/-") + p.letter : "") + (p.argument.empty() ? "" : " " + p.argument);
    printf("  %-26s %s%s\n", left.c_str(), p.help.c_str(), p.argument.empty() || p.value.empty() ? "" : (" [" + p.value + "]").c_str());
  }
}

void print_recipes() {
  std::vector<std::vector<std::string>> rows = {{"recipe", "fprop x", "fprop w", "dgrad dy", "dgrad w", "wgrad dy", "wgrad x", "and", "source"}};
  for (Recipe& r : recipe_table()) {
    std::string more;
    auto add = [&](bool yes, const std::string& what) { if (yes) more += (more.empty() ? "" : ", ") + what; };
    add(r.bf16_last > 0, "last " + std::to_string((int)lroundf(100 * r.bf16_last)) + " % BF16");
    add(r.estimator.x == Estimator::quest_mask, "QuEST mask");
    add(r.estimator.w == Estimator::dge, "DGE");
    add(r.outliers != "none", r.outliers);
    add(r.oscillation != "none", r.oscillation);
    rows.push_back({r.name});
    for (auto& [name, o] : recipe_operands(r)) rows.back().push_back(operand_word(*o));
    rows.back().push_back(more);
    rows.back().push_back(r.source);
  }
  for (const std::vector<std::string>& row : rows)
    for (size_t c = 0; c < row.size(); c++) {
      size_t width = 0;
      for (const std::vector<std::string>& other : rows) width = max(width, other[c].size());
      printf("%-*s%s", c + 1 < row.size() ? (int)width : 0, row[c].c_str(), c + 1 < row.size() ? "  " : "\n");
    }
  printf("\nRN to nearest, SR stochastic, EDEN: MS-EDEN, post-hoc: the tensor's scale follows from its blocks'. /128: outer scale for 1x128.\n"
         "H: Hadamard transform, RHT: with random signs, *: fresh for every GEMM. 2x: from the forward pass's quantized value (double quantization).\n"
         "Every word is explained in kernels/recipe.cuh.\nFields for --set, with what they take:\n");
  for (const RecipeField& f : recipe_fields(recipe_table()[0])) if (f.name.rfind("fprop.x.", 0) == 0) printf("  %-22s %s\n", ("<operand>." + f.name.substr(8)).c_str(), f.allowed.c_str());
  for (const RecipeField& f : recipe_fields(recipe_table()[0])) if (std::count(f.name.begin(), f.name.end(), '.') < 2) printf("  %-22s %s\n", f.name.c_str(), f.allowed.c_str());
  printf("<operand>: fprop.x fprop.w dgrad.dy dgrad.w wgrad.dy wgrad.x; a GEMM's name alone means both of its operands, no name all six, as in --set outer=tensor\n");
}

// The row that --recipe and --set name.
Recipe find_recipe(const Options& o) {
  std::string names;
  for (Recipe& r : recipe_table()) {
    names += (names.empty() ? "" : ", ") + r.name;
    if (r.name != o.recipe) continue;
    for (const std::string& s : o.set) {
      const std::string problem = recipe_set(r, s);
      if (!problem.empty()) die_usage("--set: %s", problem.c_str());
    }
    const std::string problem = recipe_problem(r);
    if (!problem.empty()) die_usage("--set: %s", problem.c_str());
    return r;
  }
  die_usage("--recipe %s: there is no such row; rows: %s", o.recipe.c_str(), names.c_str());
}

// =====================================================================================================================================
// The arena: every buffer of the program is announced first, shown as a table, then taken in one piece

struct Arena {
  struct Item { std::string label; size_t bytes; void** where; };
  std::vector<Item> items;
  char* memory = nullptr;
  size_t later = 0;                                 // bytes that the run will take for a while, beside the arena

  template <class T> void want(T** where, size_t n, const char* label) { items.push_back({label, round_up(max(n, (size_t)1) * sizeof(T), (size_t)256), (void**)where}); }
  size_t total() const { size_t n = 0; for (const Item& i : items) n += i.bytes; return n; }
  void print_table() const {                        // buffers of one label together
    std::vector<std::pair<std::string, size_t>> rows;
    for (const Item& i : items) {
      size_t r = 0;
      while (r < rows.size() && rows[r].first != i.label) r++;
      if (r == rows.size()) rows.push_back({i.label, 0});
      rows[r].second += i.bytes;
    }
    printf("memory\n");
    for (auto& [label, bytes] : rows) printf("  %-44s %10.1f MB\n", label.c_str(), bytes / 1e6);
    printf("  %-44s %10.1f MB\n", "total", total() / 1e6);
    if (later) printf("  %-44s %10.1f MB\n", "more, while a window of --oscillation is open", later / 1e6);
  }
  void take() {
#ifndef CPU_BUILD
    size_t free_bytes = 0, all = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &all));
    if (total() + later > free_bytes) die("the run needs %.1f GB of GPU memory, %.1f GB are free: lower --batch (and keep --total-batch), --seq or --model", (total() + later) / 1e9, free_bytes / 1e9);
#endif
    memory = device_alloc<char>(total());
    char* at = memory;
    for (Item& i : items) { *i.where = at; at += i.bytes; }
  }
};

// =====================================================================================================================================
// Parameters

struct Weight {                        // where one parameter lives
  float* master = nullptr;             // FP32: what the optimizer updates
  floatX* work = nullptr;              // the copy that GEMMs and embeddings read (biases too: a GEMM adds them; norms read the master)
  float* grad = nullptr;               // FP32
  size_t watch_offset = 0;             // of the first element in the arrays of all watched parameters (train_control.cuh)
};
struct HfTensor { std::string name; int first_row, rows; };     // rows of a parameter under the name that Hugging Face gives them
struct Param {
  std::string name;
  int rows, cols;                      // cols 1: a vector
  bool decay, quantized;
  float init_std, init_mean;
  bool conv1d;                         // GPT-2's files hold the transpose of a linear layer's weight
  std::vector<HfTensor> hf;
  Weight* weight;
  size_t offset = 0;                   // of the first element in the arrays of all parameters
  size_t block_offset = 0;             // of its first block of 128 in the array of the scales of AdamW's m
  int block = -1;                      // of the model; -1: none
  bool watched = false;                // a matrix of a quantized layer: train_control.cuh looks after it
  size_t size() const { return (size_t)rows * cols; }
};

struct LayerWeights {
  Weight ln1, ln1_bias, qkv, qkv_bias, out, out_bias, ln2, ln2_bias, fc, fc_bias, down, down_bias;
  const Weight& linear(int which) const { return which == 0 ? qkv : which == 1 ? out : which == 2 ? fc : down; }     // the four linear layers
};

// What the forward pass keeps of one block
struct LayerActs {
  floatX *ln1, *qkv, *att, *mid, *ln2, *fc, *act, *result;    // (T,C) (T,(H+2G)D) (T,HD) (T,C) (T,C) (T,2F or F) (T,F) (T,C)
  float *ln1_mean, *ln1_rstd, *ln2_mean, *ln2_rstd, *lse;     // (T) (T) (T) (T) (B,H,S)
  LinearSaved saved[4];                // QKV, attention out, MLP up, MLP down: operands in FP4, masks
};

// What watches over training (train_control.cuh has the code). Arrays of watched parameters have `watched` elements.
struct Control {
  std::string oscillation = "none", outliers = "none";
  size_t watched = 0;
  // OsciReset and Q-Ramping: a window's state, on the device only while it is open
  WindowSchedule window;
  float tau = 8;
  struct Open {
    float *prev = nullptr, *dist_q = nullptr, *dist_w = nullptr;       // W_prev and the two sums
    float *w = nullptr, *q = nullptr, *q_prev = nullptr;               // scratch: one matrix as the detector sees it, Q of it, Q of W_prev
    GridScratch grid;
    OsciCounts* counts = nullptr;
  } open;
  // Q-Ramping: gradients summed so far, of how many steps, and the period; Q-EMA: the weights' average and its decay
  Ramp ramp;
  int ramp_most = 16;
  float *average = nullptr, ema = 0.998f;        // in the coordinates in which the forward pass rounds
  GridScratch packed_weight;
  // OutControl: [blocks][4 layers]
  std::vector<std::array<OutlierLayer, 4>> columns;
  OutlierScratch outlier_scratch;
  float outlier_fraction = 0.1f;
  int outlier_start = 501, outlier_steps = 50;
  bool sorted = true, chosen = false, collecting = false;
  // precision late in training
  Recipe late;                         // the recipe after the switch
  bool may_switch = false;
  bool switched = false;
  // monitor: the gradient of the watched parameters with a BF16 backward pass
  bool monitor = false;
  float* clean = nullptr;
};

struct Model {
  ModelConfig config;
  Recipe recipe, bf16;                 // of the quantized blocks; of the others
  int bf16_first = 0, bf16_last = 0;
  int B = 0, S = 0;                    // the largest batch and sequence that the buffers hold
  int V = 0;                           // config.vocab padded to a multiple of 128
  bool training = false;
  float z_loss = 0;
  uint64_t seed = 0;
  Arena arena;

  std::vector<Param> params;
  Weight wte, wpe, ln_final, ln_final_bias, lm_head;          // lm_head: the same as wte when tied
  std::vector<LayerWeights> layers;
  size_t elements = 0;                 // of all parameters, each padded to 64
  float *master, *grads;               // (elements) each
  uint8_t* decayed;                    // (elements / 64): 1 where weight decay applies
  AdamFormats adam;
  char *m, *v, *m_scale;               // AdamW's states: (elements) each of the format's bytes; scales of an FP8 m, one for 128 elements of a parameter
  size_t state_blocks = 0;             // of all parameters
  Control control;
  floatX* work;                        // (elements); in an FP32 build the same as master

  Keep keep = Keep::codes;             // as asked for: what the run does is keeps_codes()
  LinearSaved again;                   // --keep values: of the layer in the backward pass, quantized again
  std::vector<LayerActs> acts;
  int *tokens, *targets, *order, *segment_start, *segment_token;   // (T) each
  std::vector<int> host_tokens;
  floatX *embedded, *final;            // (T,C) each
  floatX *passing;                     // (T,F): act of the blocks whose backward pass does not read it; their ln1 and ln2 pass by in dnorm
  float *final_mean, *final_rstd, *losses, *rope, *reduce, *norm;
  floatX *logits;                      // (logit_rows, V)
  int logit_rows = 0;
  floatX *dresidual, *dnorm, *datt, *dqkv, *dact, *dfc, *dfinal;
  LinearScratch scratch;
  Scalars scalars;                     // (Scalars::kLayer) for each linear layer
  bool search_maxima = false;          // tests: of inputs of linear layers, although the kernels that write them could find them

  int qkv_width() const { return (config.heads + 2 * config.kv_heads) * config.head_dim; }
  int att_width() const { return config.heads * config.head_dim; }
  int fc_width() const { return config.llama ? 2 * config.ffn : config.ffn; }
  bool block_is_bf16(int l) const { return l < bf16_first || l >= config.layers - bf16_last; }
  const Recipe& block_recipe(int l) const { return block_is_bf16(l) ? bf16 : control.switched ? control.late : recipe; }
  double linear_parameters() const { double n = (double)config.vocab * config.channels; for (const Param& p : params) if (p.quantized) n += p.size(); return n; }
  // forward and backward: 6 flops for each weight of a matrix; attention QK and PV, causal, 6 S H D a block
  double flops_per_token(int seq) const { return 6 * linear_parameters() + 6.0 * config.layers * seq * att_width(); }
};

// The one table of parameters.
void make_params(Model& m) {
  const ModelConfig& c = m.config;
  const float std = 0.02f, residual_std = 0.02f / sqrtf(2.0f * c.layers);     // GPT-2: what adds to the residual stream starts smaller
  m.layers.resize(c.layers);
  auto add = [&](Weight* w, const std::string& name, int rows, int cols, float init_std, float mean, bool quantized, std::vector<HfTensor> hf) {
    const bool matrix = cols > 1, embedding = w == &m.wte || w == &m.wpe;
    m.params.push_back({name, rows, cols, matrix && !embedding, quantized, init_std, mean, quantized && !c.llama, hf, w});
  };
  auto vector = [&](Weight* w, const std::string& name, int n, float value, const std::string& hf) { add(w, name, n, 1, 0, value, false, {{hf, 0, n}}); };
  const std::string root = c.llama ? "model." : "transformer.";
  add(&m.wte, "wte", m.V, c.channels, std, 0, false, {{root + (c.llama ? "embed_tokens.weight" : "wte.weight"), 0, c.vocab}});
  if (!c.llama) add(&m.wpe, "wpe", c.max_seq, c.channels, std, 0, false, {{root + "wpe.weight", 0, c.max_seq}});
  for (int l = 0; l < c.layers; l++) {
    LayerWeights& w = m.layers[l];
    const std::string n = "block" + std::to_string(l) + ".", h = root + (c.llama ? "layers." : "h.") + std::to_string(l) + ".";
    const int q = m.att_width(), kv = c.kv_heads * c.head_dim;
    vector(&w.ln1, n + "ln1", c.channels, 1, h + (c.llama ? "input_layernorm.weight" : "ln_1.weight"));
    if (!c.llama) vector(&w.ln1_bias, n + "ln1.bias", c.channels, 0, h + "ln_1.bias");
    if (c.llama) add(&w.qkv, n + "qkv", q + 2 * kv, c.channels, std, 0, true, {{h + "self_attn.q_proj.weight", 0, q}, {h + "self_attn.k_proj.weight", q, kv}, {h + "self_attn.v_proj.weight", q + kv, kv}});
    else add(&w.qkv, n + "qkv", 3 * q, c.channels, std, 0, true, {{h + "attn.c_attn.weight", 0, 3 * q}});
    if (!c.llama) vector(&w.qkv_bias, n + "qkv.bias", 3 * q, 0, h + "attn.c_attn.bias");
    add(&w.out, n + "out", c.channels, q, residual_std, 0, true, {{h + (c.llama ? "self_attn.o_proj.weight" : "attn.c_proj.weight"), 0, c.channels}});
    if (!c.llama) vector(&w.out_bias, n + "out.bias", c.channels, 0, h + "attn.c_proj.bias");
    vector(&w.ln2, n + "ln2", c.channels, 1, h + (c.llama ? "post_attention_layernorm.weight" : "ln_2.weight"));
    if (!c.llama) vector(&w.ln2_bias, n + "ln2.bias", c.channels, 0, h + "ln_2.bias");
    if (c.llama) add(&w.fc, n + "gate_up", 2 * c.ffn, c.channels, std, 0, true, {{h + "mlp.gate_proj.weight", 0, c.ffn}, {h + "mlp.up_proj.weight", c.ffn, c.ffn}});
    else add(&w.fc, n + "fc", c.ffn, c.channels, std, 0, true, {{h + "mlp.c_fc.weight", 0, c.ffn}});
    if (!c.llama) vector(&w.fc_bias, n + "fc.bias", c.ffn, 0, h + "mlp.c_fc.bias");
    add(&w.down, n + "down", c.channels, c.ffn, residual_std, 0, true, {{h + (c.llama ? "mlp.down_proj.weight" : "mlp.c_proj.weight"), 0, c.channels}});
    if (!c.llama) vector(&w.down_bias, n + "down.bias", c.channels, 0, h + "mlp.c_proj.bias");
    for (Param& p : m.params) if (p.quantized && p.block < 0) p.block = l;
  }
  vector(&m.ln_final, "ln_final", c.channels, 1, root + (c.llama ? "norm.weight" : "ln_f.weight"));
  if (!c.llama) vector(&m.ln_final_bias, "ln_final.bias", c.channels, 0, root + "ln_f.bias");
  if (!c.tied) add(&m.lm_head, "lm_head", m.V, c.channels, std, 0, false, {{"lm_head.weight", 0, c.vocab}});
  for (Param& p : m.params) {
    p.offset = m.elements; m.elements += round_up(p.size(), (size_t)64);
    p.block_offset = m.state_blocks; m.state_blocks += state_blocks(p.size());
    p.watched = p.quantized && !m.block_is_bf16(p.block) && m.recipe.quantizes();
    if (p.watched) { p.weight->watch_offset = m.control.watched; m.control.watched += round_up(p.size(), (size_t)64); }
  }
}

// The shape {K, N} of the four linear layers of a block: QKV, attention out, MLP up (Llama: gate | up), MLP down.
struct LayerShape { int K, N; };
std::array<LayerShape, 4> layer_shapes(const Model& m) {
  return {{{m.config.channels, m.qkv_width()}, {m.att_width(), m.config.channels}, {m.config.channels, m.fc_width()}, {m.config.ffn, m.config.channels}}};
}
// The copy of a matrix that the GEMMs read, where it is not the master itself.
floatX* work_copy(const Param& p) { return sizeof(floatX) == 2 ? p.weight->work : nullptr; }

// What a resumed run needs besides the weights.
struct RunState {
  int step = 0;
  long long sequences = 0;
  int switched_at = -1;                // the step after which fqt's monitor asked for BF16; -1: not yet
};

// What watches over training and changes it late: oscillation and outlier control, precision. It needs the Model.
#include "train_control.cuh"       // defines: configure_control, want_control, layer_control, choose_precision, choose_outliers, oscillation_step

// Why a run must keep the inputs of its linear layers themselves, although --keep codes or operands was asked for; null if it need not.
const char* needs_values(const Model& m) {
  const Control& c = m.control;
  if (c.outliers != "none") return "outlier control reads X in the backward pass";
  if (c.monitor) return "--fqt-every also computes the gradient in BF16";
  // After the switch wgrad's X^T must still be what was packed before: not in BF16, and not from the original where it came from the forward's codes.
  if (c.may_switch && m.recipe.quantizes() && (c.late.wgrad.x.format == Format::bf16 || c.late.wgrad.x.source != m.recipe.wgrad.x.source)) return "the backward pass after the switch to BF16 reads X itself";
  return nullptr;
}
bool keeps_codes(const Model& m) { return m.keep != Keep::values && !needs_values(m); }
// Does the backward pass of block l read the inputs of its linear layers themselves? Not if it works from their FP4 form. (The attention output
// is always kept, attention's backward pass reads it: there X^T is not packed as well.)
bool keeps_linear_inputs(const Model& m, int l) {
  const Recipe& r = m.block_recipe(l);
  return !m.training || !keeps_codes(m) || (keeps_x(r) && !can_save_xt(r));
}

// Announces all memory, takes it, and points every view to its place.
void allocate_model(Model& m, bool print) {
  const ModelConfig& c = m.config;
  const size_t T = (size_t)m.B * m.S, C = c.channels, F = c.ffn;
  const int per_layer = m.training ? c.layers : 1;            // without a backward pass, one set of activations serves all blocks
  Arena& a = m.arena;
  const char* weights = "weights, FP32 master";
  a.want(&m.master, m.elements, weights);
  if (sizeof(floatX) == 2) a.want(&m.work, m.elements, "weights, BF16");
  if (m.training) {
    a.want(&m.grads, m.elements, "gradients, FP32");
    a.want(&m.decayed, m.elements / kDecayGroup, "tokens, losses, reductions");
    a.want(&m.m, m.elements * state_bytes(m.adam.m), m.adam.m == StateFormat::fp32 ? "AdamW m, FP32" : m.adam.m == StateFormat::bf16 ? "AdamW m, BF16" : m.adam.e8m0 ? "AdamW m, E4M3 with E8M0 scales" : "AdamW m, E4M3 with FP32 scales");
    if (m.adam.m == StateFormat::fp8) a.want(&m.m_scale, m.state_blocks * state_scale_bytes(m.adam), m.adam.e8m0 ? "AdamW m, E4M3 with E8M0 scales" : "AdamW m, E4M3 with FP32 scales");
    a.want(&m.v, m.elements * state_bytes(m.adam.v), m.adam.v == StateFormat::fp32 ? "AdamW v, FP32" : "AdamW v, BF16");
  }
  want_control(m);
  m.acts.resize(c.layers);
  const char *kept = "activations of the blocks", *flow = "embedding, residual, final norm", *work = "gradients of activations", *small = "tokens, losses, reductions";
  const bool codes = keeps_codes(m);
  size_t left_out = 0, packed = 0;                            // bytes
  std::map<void*, size_t> again;                              // the members of m.again: the most bytes that a layer needs
  for (int l = 0; l < per_layer; l++) {
    LayerActs& x = m.acts[l];
    a.want(&x.qkv, T * m.qkv_width(), kept); a.want(&x.att, T * m.att_width(), kept); a.want(&x.mid, T * C, kept); a.want(&x.fc, T * m.fc_width(), kept); a.want(&x.result, T * C, kept);
    if (keeps_linear_inputs(m, l)) { a.want(&x.ln1, T * C, kept); a.want(&x.ln2, T * C, kept); a.want(&x.act, T * F, kept); }
    else left_out += T * (2 * C + F) * sizeof(floatX);
    for (int i = 0; m.training && i < 4; i++)
      want_linear_saved(codes ? x.saved[i] : m.again, m.block_recipe(l), (int)T, layer_shapes(m)[i].K, layer_shapes(m)[i].N, [&](auto** where, size_t n) {
        packed += codes * n * sizeof(**where);
        if (codes) a.want(where, n, m.keep == Keep::codes ? "packed inputs and weights for backward" : "quantized inputs and weights for backward");
        else again[where] = max(again[where], n * sizeof(**where));
      }, codes && i != 1, m.keep == Keep::operands && fp4_way_of(m.block_recipe(l).wgrad.dy, m.block_recipe(l).wgrad.x, m.scratch.ways) == GemmWay::emulated);
    a.want(&x.ln1_mean, T, kept); a.want(&x.ln1_rstd, T, kept); a.want(&x.ln2_mean, T, kept); a.want(&x.ln2_rstd, T, kept); a.want(&x.lse, T * c.heads, kept);
  }
  for (auto& [where, bytes] : again) a.want((char**)where, bytes, "a layer's inputs and weights, packed again");
  if (left_out) a.want(&m.passing, T * F, flow);
  a.want(&m.embedded, T * C, flow); a.want(&m.final, T * C, flow); a.want(&m.final_mean, T, flow); a.want(&m.final_rstd, T, flow);
  // Logits are the largest tensor of a small model: they are computed, turned into their gradient and used up a chunk of rows at a time.
  // A chunk has rows for whole waves of tiles of 128 x 256 in the GEMM with the narrow result, dfinal = dlogits lm_head. Larger chunks add to the
  // gradient of the lm_head less often.
  constexpr size_t kLogitBytes = 1152u << 20;
  const size_t most = max((size_t)128, kLogitBytes / sizeof(floatX) / m.V / 128 * 128), wave = kOnCpu ? 128 : 128 * max((size_t)1, multiprocessors() / ceil_div(C, (size_t)256));
  m.logit_rows = (int)min(T, most >= wave ? most / wave * wave : most);
  const size_t attention = m.training ? attention_backward_scratch(m.B, m.S, c.heads, c.head_dim) * sizeof(float) / sizeof(floatX) : 0;
  a.want(&m.logits, max((size_t)m.logit_rows * m.V, attention), "logits, a chunk of rows");         // attention's backward pass has its scratch there
  a.want(&m.tokens, T, small); a.want(&m.targets, T, small); a.want(&m.losses, T, small); a.want(&m.norm, 2, small);
  if (c.llama) a.want(&m.rope, (size_t)m.S * c.head_dim, small);
  size_t quantized = 0, third = 0, tiles = 0;
  const int shapes[4][2] = {{c.channels, m.qkv_width()}, {m.att_width(), c.channels}, {c.channels, m.fc_width()}, {c.ffn, c.channels}};   // {K, N}
  for (auto& s : shapes) {
    quantized = max(quantized, linear_scratch_elements((int)T, s[0], s[1]));
    tiles = max(tiles, linear_tile_words((int)T, s[0], s[1]));
    if (m.training && linear_wants_third(m.recipe)) third = max(third, linear_third_elements(s[0], s[1]));
  }
  for (size_t i = 0, n; m.recipe.quantizes() && i < (third ? 3 : 2); i++) {
    a.want(&m.scratch.values[i], n = i == 2 ? third : quantized, "operands of the GEMM in flight");
    if (!m.scratch.ways.any_native()) continue;                               // FP4 tensor cores take codes and scales
    a.want(&m.scratch.codes[i], n / 2, "operands of the GEMM in flight");
    a.want(&m.scratch.scales[i], n / 16, "operands of the GEMM in flight");
    a.want(&m.scratch.outer[i], n / 128, "operands of the GEMM in flight");
  }
  if (linear_needs_rotated(m.recipe)) a.want(&m.scratch.rotated, quantized, "an operand before rounding, FP32");
  a.want(&m.scratch.tiles, tiles, small);
  m.scalars.size = Scalars::kLayer * 4 * c.layers;
  m.scratch.scalars = &m.scalars;
  a.want(&m.scalars.all, (size_t)m.scalars.size, small);
  if (m.training) {
    a.want(&m.order, T, small); a.want(&m.segment_start, T + 1, small); a.want(&m.segment_token, T, small);
    const size_t reduce = max(max(norm_backward_scratch((int)T, c.channels), grad_norm_scratch()), max(bias_backward_scratch((int)T, m.qkv_width()), gelu_backward_scratch((int)T, m.config.ffn)));
    a.want(&m.reduce, reduce, small);
    // The gradients of a branch are used up one after the other: dfinal, dnorm and datt take turns in one buffer, dact and dqkv in another;
    // GELU's backward pass works in place.
    a.want(&m.dresidual, T * C, work); a.want(&m.dnorm, T * max(C, (size_t)m.att_width()), work); a.want(&m.dact, T * max(F, (size_t)m.qkv_width()), work);
    if (c.llama) a.want(&m.dfc, T * m.fc_width(), work);
  }
  if (print) a.print_table();
  const char* full = sizeof(floatX) == 2 ? "BF16" : "FP32";
  const char* form = m.keep == Keep::codes ? "codes" : "operands";
  if (print && left_out) printf("  --keep %s: the backward pass keeps %.1f MB of %s inputs and weights, and not %.1f MB of inputs in %s\n", form, packed / 1e6, m.keep == Keep::codes ? "packed" : "quantized", left_out / 1e6, full);
  if (print && m.training && m.recipe.quantizes() && m.keep != Keep::values && !codes) printf("  --keep values, not %s: %s; inputs wait in %s, and are quantized again\n", form, needs_values(m), full);
  a.take();
  if (m.training) { m.dfinal = m.datt = m.dnorm; m.dqkv = m.dact; if (!c.llama) m.dfc = m.dact; }
  // Not all three in one buffer: GELU's GEMM writes act while it reads ln2, and X^T is packed from ln2 after it.
  for (int l = 0; l < per_layer; l++) if (!keeps_linear_inputs(m, l)) { m.acts[l].ln1 = m.acts[l].ln2 = m.dnorm; m.acts[l].act = m.passing; }
  m.again.again = true;
  for (int l = 0; l < per_layer && !codes; l++) for (LinearSaved& s : m.acts[l].saved) s = m.again;
  for (int l = per_layer; l < c.layers; l++) m.acts[l] = m.acts[0];
  for (Param& p : m.params) {
    p.weight->master = m.master + p.offset;
    p.weight->work = sizeof(floatX) == 2 ? m.work + p.offset : (floatX*)(m.master + p.offset);
    if (m.training) p.weight->grad = m.grads + p.offset;
  }
  if (c.tied) m.lm_head = m.wte;
  if (c.llama) {
    std::vector<float> table((size_t)m.S * c.head_dim);
    rope_table(table.data(), m.S, c.head_dim, c.rope_theta);
    to_device(m.rope, table.data(), table.size());
    device_sync();
  }
}

// Puts a parameter's values (rows x cols, on the host) where they belong: the master copy and the working copy.
void set_param(const Param& p, const float* values) {
  to_device(p.weight->master, values, p.size());
  std::vector<floatX> copy;
  if (sizeof(floatX) == 2) {
    copy.resize(p.size());
    for (size_t i = 0; i < p.size(); i++) copy[i] = from_float<floatX>(values[i]);
    to_device(p.weight->work, copy.data(), p.size());
  }
  device_sync();                                    // the host buffers go away
}
void zero_padding_and_optimizer(Model& m) {
  device_zero(m.master, m.elements);
  if (sizeof(floatX) == 2) device_zero(m.work, m.elements);
  if (!m.training) return;
  device_zero(m.grads, m.elements);
  device_zero(m.m, m.elements * state_bytes(m.adam.m));
  device_zero(m.v, m.elements * state_bytes(m.adam.v));
  if (m.adam.m == StateFormat::fp8) device_zero(m.m_scale, m.state_blocks * state_scale_bytes(m.adam));
  std::vector<uint8_t> decayed(m.elements / kDecayGroup);
  for (const Param& p : m.params) std::fill_n(decayed.begin() + p.offset / kDecayGroup, ceil_div(p.size(), kDecayGroup), (uint8_t)p.decay);
  to_device(m.decayed, decayed.data(), decayed.size());
  device_sync();
  start_control(m);
}

// Random weights: normal numbers from Philox, element i of parameter p from counter (i / 4, p), so that they depend on nothing else.
void init_weights(Model& m) {
  zero_padding_and_optimizer(m);
  for (size_t n = 0; n < m.params.size(); n++) {
    const Param& p = m.params[n];
    std::vector<float> x(p.size(), p.init_mean);
    const size_t live = p.cols > 1 && p.rows == m.V ? (size_t)m.config.vocab * p.cols : p.size();     // padding rows of the vocabulary stay 0
    auto fill = [&](size_t from, size_t to) {
      for (size_t i = from; i < to; i += 4) {
        const uint4 r = philox4x32(make_uint4((uint32_t)(i / 4), (uint32_t)(i / 4 >> 32), (uint32_t)n, 0x696e6974), make_uint2((uint32_t)m.seed, (uint32_t)(m.seed >> 32)));
        const uint32_t words[4] = {r.x, r.y, r.z, r.w};
        for (int j = 0; j < 4 && i + j < to; j++) {                // Box-Muller: two words make two normals
          const double radius = sqrt(-2 * log((words[j / 2 * 2] + 0.5) * 0x1p-32)), angle = 6.283185307179586 * (words[j / 2 * 2 + 1] * 0x1p-32);
          x[i + j] = p.init_std * (float)(radius * (j % 2 ? sin(angle) : cos(angle)));
        }
      }
    };
    if (p.init_std > 0) {
      const size_t threads = max(1u, std::thread::hardware_concurrency()), part = round_up(live / threads + 1, (size_t)4);
      std::vector<std::thread> pool;
      for (size_t t = 0; t < threads; t++) pool.emplace_back(fill, min(live, t * part), min(live, (t + 1) * part));
      for (std::thread& t : pool) t.join();
    }
    set_param(p, x.data());
  }
  begin_average(m);
}

// =====================================================================================================================================
// Forward

// One batch of tokens (and targets, unless null) to the device.
void load_batch(Model& m, const int* tokens, const int* targets, int B, int S) {
  m.host_tokens.assign(tokens, tokens + (size_t)B * S);
  to_device(m.tokens, tokens, (size_t)B * S);
  if (targets) to_device(m.targets, targets, (size_t)B * S);
}

void norm_forward(const Model& m, floatX* out, float* mean, float* rstd, const floatX* x, const Weight& w, const Weight& bias, int T, float* amax = nullptr) {
  if (m.config.llama) rmsnorm_forward(out, rstd, x, w.master, T, m.config.channels, m.config.norm_eps, amax);
  else layernorm_forward(out, mean, rstd, x, w.master, bias.master, T, m.config.channels, m.config.norm_eps, amax);
}

// Random streams: four linear layers a block.
LinearKey linear_key(const Model& m, uint32_t micro_step, int layer, int which) { return {m.seed, micro_step, (uint32_t)(layer * 4 + which)}; }

// max|W| of every linear layer whose recipe takes it. (Outlier control and Q-EMA, which quantize other weights, search for theirs.)
void find_weight_maxima(Model& m) {
  std::vector<const floatX*> weights;
  std::vector<size_t> elements;
  for (int l = 0; l < m.config.layers; l++) {
    const Recipe& r = m.block_recipe(l);
    for (int i = 0; i < 4 && (takes_plain_max(r.fprop.w) || takes_plain_max(r.dgrad.w)); i++) {
      weights.push_back(m.layers[l].linear(i).work);
      elements.push_back((size_t)layer_shapes(m)[i].K * layer_shapes(m)[i].N);
    }
  }
  find_weight_maxima(m.scalars, weights, elements);
}

// Tokens (B,S) -> m.final (T,C), the input of the lm_head. micro_step names the random numbers of recipes that round stochastically.
void forward(Model& m, int B, int S, uint32_t micro_step) {
  const ModelConfig& c = m.config;
  const int T = B * S, C = c.channels, H = c.heads, G = c.kv_heads, D = c.head_dim, F = c.ffn;
  m.scalars.start();
  find_weight_maxima(m);
  embedding_forward(m.embedded, m.tokens, m.wte.work, c.llama ? nullptr : m.wpe.work, B, S, C);
  const floatX* x = m.embedded;                                                                          // (T,C) the residual stream
  for (int l = 0; l < c.layers; l++) {
    const LayerWeights& w = m.layers[l];
    LayerActs& a = m.acts[l];
    const Recipe& r = m.block_recipe(l);
    auto key = [&](int which) { return linear_key(m, micro_step, l, which); };
    auto control = [&](int which) { return layer_control(m, l, which); };
    auto saved = [&](int which) { return m.training && !a.saved[which].again ? &a.saved[which] : nullptr; };
    // max|x| of a linear layer's input, by the kernel that writes it, where the quantizer would search for it
    auto amax = [&](int which) { return !m.search_maxima && wants_x_amax(control(which), r, saved(which)) ? m.scalars.take() : nullptr; };
    float *const ln1_amax = amax(0), *const att_amax = amax(1), *const ln2_amax = amax(2), *const act_amax = c.llama ? amax(3) : nullptr;
    norm_forward(m, a.ln1, a.ln1_mean, a.ln1_rstd, x, w.ln1, w.ln1_bias, T, ln1_amax);                   // (T,C)
    linear_forward(control(0), a.qkv, a.ln1, w.qkv.work, T, C, m.qkv_width(), r, key(0), m.scratch, saved(0), {w.qkv_bias.work}, ln1_amax);   // (T,C) -> (T,(H+2G)D)
    if (c.llama) rope_forward(a.qkv, m.rope, B, S, H, G, D);
    attention_forward(a.att, a.lse, a.qkv, B, S, H, G, D, att_amax);                                     // -> (T,HD)
    linear_forward(control(1), a.mid, a.att, w.out.work, T, H * D, C, r, key(1), m.scratch, saved(1), {w.out_bias.work, x}, att_amax);   // x + (T,HD) -> (T,C)
    norm_forward(m, a.ln2, a.ln2_mean, a.ln2_rstd, a.mid, w.ln2, w.ln2_bias, T, ln2_amax);               // (T,C)
    if (c.llama) {
      linear_forward(control(2), a.fc, a.ln2, w.fc.work, T, C, m.fc_width(), r, key(2), m.scratch, saved(2), {}, ln2_amax);   // (T,C) -> (T,2F)
      swiglu_forward(a.act, a.fc, T, F, act_amax);                                                       // (T,F)
    } else linear_forward(control(2), a.act, a.ln2, w.fc.work, T, C, F, r, key(2), m.scratch, saved(2), {w.fc_bias.work, nullptr, a.fc}, ln2_amax);   // 2 (T,F)
    linear_forward(control(3), a.result, a.act, w.down.work, T, F, C, r, key(3), m.scratch, saved(3), {w.down_bias.work, a.mid}, act_amax);   // mid + (T,F) -> (T,C)
    x = a.result;
  }
  norm_forward(m, m.final, m.final_mean, m.final_rstd, x, m.ln_final, m.ln_final_bias, T);               // (T,C)
}

// logits (rows,V) = final (rows,C) lm_head^T, for rows first .. first + rows - 1
void logits_forward(Model& m, floatX* logits, int first, int rows) {
  Gemm g;
  g.M = rows; g.N = m.V; g.K = m.config.channels;
  g.A = m.final + (size_t)first * g.K; g.lda = g.K;
  g.B = m.lm_head.work; g.ldb = g.K;
  g.D = logits; g.ldd = m.V;
  gemm(g);
}

// The lm_head and the loss, a chunk of rows at a time. With grad_scale != 0 also their backward pass: m.dfinal and the gradient of the
// lm_head, for a loss of grad_scale * sum over tokens. Returns the sum of the tokens' losses, and how many tokens had a target.
double head_loss(Model& m, int T, float grad_scale, long long* counted = nullptr) {
  const int C = m.config.channels, V = m.V;
  for (int first = 0; first < T; first += m.logit_rows) {
    const int rows = min(m.logit_rows, T - first);
    logits_forward(m, m.logits, first, rows);
    softmax_cross_entropy(m.logits, m.losses + first, m.targets + first, rows, m.config.vocab, V, grad_scale, m.z_loss, grad_scale != 0);   // logits become dlogits
    if (grad_scale == 0) continue;
    Gemm dgrad;                                                          // dfinal (rows,C) = dlogits (rows,V) lm_head (V,C)
    dgrad.M = rows; dgrad.N = C; dgrad.K = V;
    dgrad.A = m.logits; dgrad.lda = V;
    dgrad.B = m.lm_head.work; dgrad.ldb = C; dgrad.b_transposed = true;
    dgrad.D = m.dfinal + (size_t)first * C; dgrad.ldd = C;
    gemm(dgrad);
    Gemm wgrad;                                                          // dlm_head (V,C) += dlogits^T (V,rows) final (rows,C)
    wgrad.M = V; wgrad.N = C; wgrad.K = rows;
    wgrad.A = m.logits; wgrad.lda = V; wgrad.a_transposed = true;
    wgrad.B = m.final + (size_t)first * C; wgrad.ldb = C; wgrad.b_transposed = true;
    wgrad.D = m.lm_head.grad; wgrad.ldd = C; wgrad.d_fp32 = true; wgrad.accumulate = true;
    gemm(wgrad);
  }
  std::vector<float> losses(T);
  std::vector<int> targets(T);
  to_host(losses.data(), m.losses, T);
  to_host(targets.data(), m.targets, T);
  double sum = 0;
  long long n = 0;
  for (int t = 0; t < T; t++) if (targets[t] >= 0) { sum += losses[t]; n++; }
  if (counted) *counted += n;
  return sum;
}

// =====================================================================================================================================
// Backward

// dx_bias: the bias of the branch that ended in this residual stream; its gradient is the sum of dx over the tokens, which adds up here.
void norm_backward(Model& m, floatX* dx, const Weight& dx_bias, const Weight& w, const Weight& bias, const floatX* dout, const floatX* x, const float* mean, const float* rstd, int T) {
  if (m.config.llama) rmsnorm_backward(dx, w.grad, dout, x, w.master, rstd, m.reduce, T, m.config.channels, dx_bias.grad);
  else layernorm_backward(dx, w.grad, bias.grad, dout, x, w.master, mean, rstd, m.reduce, T, m.config.channels, dx_bias.grad);
}

// From m.dfinal (T,C) to the gradients of all parameters, which accumulate. m.dresidual is the gradient of the residual stream: the two
// branches of a block add to it in place.
void backward(Model& m, int B, int S, uint32_t micro_step) {
  const ModelConfig& c = m.config;
  const int T = B * S, C = c.channels, H = c.heads, G = c.kv_heads, D = c.head_dim, F = c.ffn;
  device_zero(m.dresidual, (size_t)T * C);
  norm_backward(m, m.dresidual, m.layers[c.layers - 1].down_bias, m.ln_final, m.ln_final_bias, m.dfinal, m.acts[c.layers - 1].result, m.final_mean, m.final_rstd, T);
  for (int l = c.layers - 1; l >= 0; l--) {
    const LayerWeights& w = m.layers[l];
    const LayerActs& a = m.acts[l];
    const Recipe& r = m.block_recipe(l);
    const floatX* x = l ? m.acts[l - 1].result : m.embedded;
    auto key = [&](int which) { return linear_key(m, micro_step, l, which); };
    auto control = [&](int which) { return layer_control(m, l, which); };
    linear_backward(control(3), m.dact, w.down.grad, m.dresidual, a.act, w.down.work, T, F, C, r, key(3), m.scratch, &a.saved[3]);                   // (T,C) -> (T,F)
    if (c.llama) swiglu_backward(m.dfc, m.dact, a.fc, T, F);                                                              // -> (T,2F)
    else gelu_backward(m.dfc, w.fc_bias.grad, m.dact, a.fc, m.reduce, T, F);                                              // -> (T,F)
    linear_backward(control(2), m.dnorm, w.fc.grad, m.dfc, a.ln2, w.fc.work, T, C, m.fc_width(), r, key(2), m.scratch, &a.saved[2]);                // -> (T,C)
    norm_backward(m, m.dresidual, w.out_bias, w.ln2, w.ln2_bias, m.dnorm, a.mid, a.ln2_mean, a.ln2_rstd, T);                          // adds to (T,C)
    linear_backward(control(1), m.datt, w.out.grad, m.dresidual, a.att, w.out.work, T, H * D, C, r, key(1), m.scratch, &a.saved[1]);                // -> (T,HD)
    attention_backward(m.dqkv, m.datt, a.qkv, a.att, a.lse, (float*)m.logits, B, S, H, G, D);                                // -> (T,(H+2G)D)
    if (c.llama) rope_backward(m.dqkv, m.rope, B, S, H, G, D);
    if (!c.llama) bias_backward(w.qkv_bias.grad, m.dqkv, m.reduce, T, m.qkv_width());
    linear_backward(control(0), m.dnorm, w.qkv.grad, m.dqkv, a.ln1, w.qkv.work, T, C, m.qkv_width(), r, key(0), m.scratch, &a.saved[0]);            // -> (T,C)
    norm_backward(m, m.dresidual, l ? m.layers[l - 1].down_bias : Weight{}, w.ln1, w.ln1_bias, m.dnorm, x, a.ln1_mean, a.ln1_rstd, T);                              // adds to (T,C)
  }
  std::vector<int> order(T), start(T + 1), token(T);
  const int segments = sort_tokens(m.host_tokens.data(), T, c.vocab, order.data(), start.data(), token.data());
  to_device(m.order, order.data(), T);
  to_device(m.segment_start, start.data(), segments + 1);
  to_device(m.segment_token, token.data(), segments);
  embedding_backward(m.wte.grad, m.dresidual, m.order, m.segment_start, m.segment_token, segments, C);
  if (!c.llama) position_embedding_backward(m.wpe.grad, m.dresidual, B, S, C);
  device_sync();                                              // the host arrays go away
}

// =====================================================================================================================================
// Update

float learning_rate(const Options& o, int step) {               // of step 0, 1, ... steps - 1
  if (step < o.warmup) return o.lr * (float)(step + 1) / (float)o.warmup;
  const double done = (double)(step - o.warmup) / max(1, o.steps - o.warmup), low = o.lr * o.min_lr;
  if (o.schedule == "constant") return o.lr;
  if (o.schedule == "wsd") {
    const double left = o.decay_fraction > 0 ? (double)(o.steps - step) / (o.decay_fraction * o.steps) : 1;
    return (float)(left >= 1 ? o.lr : low + (o.lr - low) * left);
  }
  return (float)(low + (o.lr - low) * 0.5 * (1 + cos(M_PI * done)));
}

// Norm of all gradients, before clipping.
float gradient_norm(Model& m, float clip) {
  grad_norm(m.norm, m.grads, m.elements, clip, m.reduce);
  float norm;
  to_host(&norm, m.norm, 1);
  return norm;
}
// The states of a parameter that AdamW keeps.
AdamState adam_state(const Model& m, const Param& p) {
  return {m.adam, m.m + p.offset * state_bytes(m.adam.m), m.v + p.offset * state_bytes(m.adam.v), m.adam.m == StateFormat::fp8 ? m.m_scale + p.block_offset * state_scale_bytes(m.adam) : nullptr};
}
// Q-Ramping's part of a watched parameter; empty without it.
Ramp ramp_of(const Model& m, const Param& p) {
  const Ramp& all = m.control.ramp;
  const size_t at = p.weight->watch_offset;
  return p.watched && all.sum ? Ramp{all.sum + at, all.count + at, all.period + at} : Ramp{};
}
// AdamW on every parameter; step counts from 1. Uses the clip scale that gradient_norm() left on the device.
void update(Model& m, AdamW adamw, float weight_decay) {
  if (m.adam.all_fp32() && !m.control.ramp.sum) {               // all parameters at once
    adamw.weight_decay = weight_decay;
    return adamw_update(m.master, sizeof(floatX) == 2 ? m.work : nullptr, (float*)m.m, (float*)m.v, m.grads, m.norm + 1, m.elements, adamw, m.decayed);
  }
  constexpr uint32_t kStream = 0xA0000000;                      // streams of the linear layers begin at 0, fresh signs at 0x80000000
  for (size_t i = 0; i < m.params.size(); i++) {
    const Param& p = m.params[i];
    adamw.weight_decay = p.decay ? weight_decay : 0;
    adamw_update(p.weight->master, work_copy(p), adam_state(m, p), p.weight->grad, m.norm + 1, p.size(), adamw, {m.seed, (uint32_t)adamw.step, kStream + (uint32_t)i},
                 ramp_of(m, p));
  }
}

// One optimizer step's gradients from `micro_batches` micro-batches of (B,S), loaded by load(i). Returns the mean loss.
// No CUDA graph. Tried (H200, GPT-2 124M, medians of 27 steps in ms; same bits): with the step's five waits of the host as they are; without them; each step
// captured and the graph updated while the GPU is at the one before (1.4 to 2.3 ms of the host; 500 nodes, nvfp4 771); and one graph, not updated, the bound:
//     64 x 1024   bf16 112.1, 113.2; 113.1, 112.6; 112.7; 112.3     nvfp4 131.1, 131.6; 131.0, 130.7; 130.7; 129.8     quartet2 140.1, 138.4; 139.6, 139.3; 139.2; 137.9
//      4 x 1024   bf16   9.90, 9.90;  9.90,  9.88;   9.54;  9.51     nvfp4  12.9, 13.0;  12.9,  12.8;  12.04; 12.05
// The waits cost nothing. A graph gives 4 to 7 % of a small step and no more than its noise (the GPU's power limit) of a large one, for 90 lines and for
// rules that a reader's experiments would break: no wait, no allocation, no choice by what the GPU has found, every shape run once before.
double accumulate_gradients(Model& m, int B, int S, int micro_batches, uint32_t first_micro_step, const std::function<void(int)>& load) {
  device_zero(m.grads, m.elements);
  double sum = 0;
  for (int i = 0; i < micro_batches; i++) {
    load(i);
    forward(m, B, S, first_micro_step + i);
    sum += head_loss(m, B * S, 1.0f / ((float)B * S * micro_batches));
    backward(m, B, S, first_micro_step + i);
  }
  return sum / ((double)B * S * micro_batches);
}

// =====================================================================================================================================
// Checkpoints

// Calls f(tensor name, shape, first row, rows, transposed) for every tensor that Hugging Face expects of a parameter.
std::vector<int64_t> hf_shape(const Param& p, const HfTensor& h) {
  if (p.cols == 1) return {h.rows};
  return p.conv1d ? std::vector<int64_t>{p.cols, h.rows} : std::vector<int64_t>{h.rows, p.cols};
}
std::vector<float> transposed(const std::vector<float>& x, int rows, int cols) {      // (rows,cols) -> (cols,rows)
  std::vector<float> y(x.size());
  for (int i = 0; i < rows; i++) for (int j = 0; j < cols; j++) y[(size_t)j * rows + i] = x[(size_t)i * cols + j];
  return y;
}

void save_weights(const Model& m, const std::string& directory) {
  write_config(directory, m.config);
  SafetensorsWriter w(directory + "/model.safetensors");
  for (const Param& p : m.params) for (const HfTensor& h : p.hf) w.declare(h.name, "F32", hf_shape(p, h));
  for (const Param& p : m.params) for (const HfTensor& h : p.hf) {
    std::vector<float> x((size_t)h.rows * p.cols);
    to_host(x.data(), p.weight->master + (size_t)h.first_row * p.cols, x.size());
    if (p.conv1d) x = transposed(x, h.rows, p.cols);
    w.write_f32(x.data(), x.size());
  }
  w.finish();
}
void load_weights(Model& m, const std::string& directory) {
  zero_padding_and_optimizer(m);
  SafetensorsReader r(directory);
  const std::string prefix = m.config.llama ? "" : gpt2_prefix(r);
  for (const Param& p : m.params) {
    std::vector<float> all(p.size(), 0.0f);
    for (const HfTensor& h : p.hf) {
      std::vector<float> x((size_t)h.rows * p.cols);
      const std::string name = m.config.llama || h.name.rfind("transformer.", 0) != 0 ? h.name : prefix + h.name.substr(strlen("transformer."));
      r.read_f32(name, hf_shape(p, h), x.data());
      if (p.conv1d) x = transposed(x, p.cols, h.rows);
      std::copy(x.begin(), x.end(), all.begin() + (size_t)h.first_row * p.cols);
    }
    set_param(p, all.data());
  }
  begin_average(m);
}

// Everything of trainer_state.safetensors that lies on the device, in its own format: what is written, and read back, bit for bit.
struct StateTensor {
  std::string name, dtype;
  std::vector<int64_t> shape;
  void* data;
  size_t bytes() const { return (size_t)shape_elements(shape) * dtype_bits(dtype) / 8; }
};
std::vector<StateTensor> state_tensors(const Model& m) {
  std::vector<StateTensor> all;
  auto dtype = [](StateFormat f) { return f == StateFormat::fp32 ? "F32" : f == StateFormat::bf16 ? "BF16" : "F8_E4M3"; };
  const Control& c = m.control;
  for (const Param& p : m.params) {
    if (!m.training) continue;
    const AdamState s = adam_state(m, p);
    all.push_back({"m." + p.name, dtype(m.adam.m), {p.rows, p.cols}, s.m});
    if (s.m_scale) all.push_back({"m_scale." + p.name, m.adam.e8m0 ? "F8_E8M0" : "F32", {(int64_t)state_blocks(p.size())}, s.m_scale});
    all.push_back({"v." + p.name, dtype(m.adam.v), {p.rows, p.cols}, s.v});
  }
  for (const Param& p : m.params) {
    if (!p.watched) continue;
    auto floats = [&](const char* what, float* from) { if (from) all.push_back({what + p.name, "F32", {p.rows, p.cols}, from + p.weight->watch_offset}); };
    auto bytes = [&](const char* what, uint8_t* from) { if (from) all.push_back({what + p.name, "U8", {p.rows, p.cols}, from + p.weight->watch_offset}); };
    floats("window.prev.", c.open.prev); floats("window.dist_q.", c.open.dist_q); floats("window.dist_w.", c.open.dist_w);
    floats("ramp.sum.", c.ramp.sum); bytes("ramp.count.", c.ramp.count); bytes("ramp.period.", c.ramp.period);
    floats("average.", c.average);
  }
  for (size_t l = 0; l < c.columns.size(); l++) for (int i = 0; i < 4; i++) {
    const OutlierLayer& o = c.columns[l][i];
    const std::string name = "block" + std::to_string(l) + "." + std::to_string(i);
    if (o.K && c.chosen) all.push_back({"outlier.columns." + name, "I32", {o.K}, o.columns});
    if (o.K && !c.chosen) all.push_back({"outlier.sums." + name, "F32", {o.K}, o.sums});
  }
  return all;
}

// What the order of the columns in a checkpoint depends on.
std::string outlier_words(const Control& c) { return std::to_string(c.outlier_fraction) + (c.sorted ? " sorted" : " memory"); }

void save_checkpoint(const Model& m, const Options& o, const RunState& state, const std::string& run_recipe) {
  AtomicDirectory dir(step_directory(o.out, state.step));
  save_weights(m, dir.path());
  SafetensorsWriter w(dir.path() + "/trainer_state.safetensors");
  w.metadata["step"] = std::to_string(state.step);
  w.metadata["sequences"] = std::to_string(state.sequences);
  w.metadata["seed"] = std::to_string(o.seed);
  w.metadata["recipe"] = run_recipe;
  w.metadata["switched_at"] = std::to_string(state.switched_at);
  w.metadata["window"] = m.control.open.prev ? "open" : "none";
  w.metadata["outliers"] = m.control.outliers != "outcontrol" ? "none" : m.control.chosen ? "chosen" : "sums";
  if (m.control.outliers == "outcontrol") w.metadata["outlier_columns"] = outlier_words(m.control);
  const std::vector<StateTensor> tensors = state_tensors(m);
  for (const StateTensor& t : tensors) w.declare(t.name, t.dtype, t.shape);
  for (const StateTensor& t : tensors) {
    std::vector<char> x(t.bytes());
    to_host(x.data(), (const char*)t.data, x.size());
    w.write(x.data(), x.size());
  }
  w.finish();
  dir.commit();
  prune_checkpoints(o.out, o.keep_checkpoints);
}

RunState load_checkpoint(Model& m, const Options& o, const std::string& directory, const std::string& run_recipe) {
  load_weights(m, directory);
  SafetensorsReader r(directory + "/trainer_state.safetensors");
  auto number = [&](const char* key) {
    const std::string& text = r.metadata[key];
    char* end;
    const long long n = strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end) die("%s/trainer_state.safetensors: metadata has no number '%s'", directory.c_str(), key);
    return n;
  };
  if (number("seed") != o.seed) die("%s was trained with --seed %lld; give the same, or start another run", directory.c_str(), number("seed"));
  if (r.metadata["recipe"] != run_recipe) printf("note: the recipe changes here; the checkpoint was trained with: %s\n", r.metadata["recipe"].c_str());
  // Which states there are follows from the step and the options: the window open in the checkpoint must be one of this run.
  const int step = (int)number("step");
  Control& c = m.control;
  c.chosen = c.outliers == "outcontrol" && r.metadata["outliers"] == "chosen";
  if (c.chosen && r.metadata["outlier_columns"] != outlier_words(c)) die("%s: its OutControl columns were chosen with '%s'; resume with the same --outlier-fraction and --outlier-order", directory.c_str(), r.metadata["outlier_columns"].c_str());
  const bool windows = c.oscillation == "osci-reset" || c.oscillation == "q-ramping", want_open = m.training && windows && window_is_open(c.window, step) && step > 0;
  if (want_open && r.metadata["window"] == "open") open_window(m);
  else if (want_open) printf("note: %s was saved outside of any window of %s; the first one of this run begins with the next period\n", directory.c_str(), c.oscillation.c_str());
  for (const StateTensor& t : state_tensors(m)) {
    if (!r.has(t.name)) die("%s/trainer_state.safetensors has no '%s', which these options need; resume with the options of the run", directory.c_str(), t.name.c_str());
    std::vector<char> x(t.bytes());
    r.read_raw(t.name, t.dtype.c_str(), t.shape, x.data());
    to_device((char*)t.data, x.data(), x.size());
    device_sync();
  }
  return {step, number("sequences"), r.metadata["switched_at"].empty() ? -1 : (int)number("switched_at")};
}

// =====================================================================================================================================
// Sampling

// One token from the logits of a position: the likeliest tokens that make up probability top_p, at a temperature.
int sample_token(const std::vector<float>& logits, float temperature, float top_p, double u) {
  std::vector<int> order(logits.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
  std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  if (temperature == 0) return order[0];
  std::vector<double> p(order.size());
  double sum = 0, kept = 0;
  for (size_t i = 0; i < order.size(); i++) sum += p[i] = exp((logits[order[i]] - logits[order[0]]) / temperature);
  size_t n = 0;
  while (n < p.size() && kept < top_p * sum) kept += p[n++];
  double target = u * kept;
  for (size_t i = 0; i < n; i++) if ((target -= p[i]) < 0) return order[i];
  return order[n - 1];
}

// Continues `tokens` by `count` tokens. The context is the last m.S tokens; every token costs a forward pass over it.
std::vector<int> generate(Model& m, std::vector<int> tokens, int count, float temperature, float top_p, uint64_t seed) {
  std::vector<floatX> row(m.V);
  for (int i = 0; i < count; i++) {
    const int S = (int)min(tokens.size(), (size_t)m.S);
    load_batch(m, tokens.data() + tokens.size() - S, nullptr, 1, S);
    forward(m, 1, S, 0x80000000u + i);
    logits_forward(m, m.logits, S - 1, 1);
    to_host(row.data(), m.logits, m.V);
    std::vector<float> logits(m.config.vocab);
    for (int v = 0; v < m.config.vocab; v++) logits[v] = to_float(row[v]);
    const uint4 r = philox4x32(make_uint4(i, 0, 0, 0x73616d70), make_uint2((uint32_t)seed, (uint32_t)(seed >> 32)));
    tokens.push_back(sample_token(logits, temperature, top_p, r.x * 0x1p-32));
  }
  return tokens;
}

void print_sample(Model& m, const Options& o, const Tokenizer* tokenizer) {
  if (o.sample_length == 0) return;
  std::vector<int> tokens;
  if (tokenizer) for (int t : tokenizer->encode(o.prompt)) tokens.push_back(t);
  if (tokens.empty()) tokens.push_back(tokenizer && tokenizer->end_of_text() >= 0 ? tokenizer->end_of_text() : m.config.vocab > '\n' ? '\n' : 0);
  printf("sample, temperature %g, top-p %g, seed %lld:\n---\n", o.temperature, o.top_p, o.seed);
  for (int t : generate(m, tokens, o.sample_length, o.temperature, o.top_p, (uint64_t)o.seed))
    printf("%s%s", tokenizer ? tokenizer->decode(t).c_str() : std::to_string(t).c_str(), tokenizer ? "" : " ");
  printf("\n---\n");
}

// =====================================================================================================================================
// The run

ModelConfig preset(const std::string& name, int vocab, int seq) {
  ModelConfig c;
  c.vocab = vocab;
  c.max_seq = seq;
  static const struct { const char* name; int layers, channels, heads, kv_heads, head_dim, ffn; } llamas[] = {
      {"1M", 4, 128, 4, 2, 32, 384},      {"10M", 6, 384, 6, 6, 64, 1024},     {"30M", 6, 640, 5, 5, 128, 1792},    {"50M", 7, 768, 6, 6, 128, 2048},
      {"100M", 8, 1024, 8, 8, 128, 2816}, {"200M", 10, 1280, 10, 10, 128, 3584}, {"1B", 16, 2048, 16, 16, 128, 5632}};
  for (auto& l : llamas) if (name == std::string("llama:") + l.name) {
    c.llama = true; c.layers = l.layers; c.channels = l.channels; c.heads = l.heads; c.kv_heads = l.kv_heads; c.head_dim = l.head_dim; c.ffn = l.ffn;
    c.rope_theta = 10000; c.tied = false;
    return c;
  }
  static const struct { int layers, channels, heads; } gpts[] = {{2, 128, 2}, {4, 256, 4}, {6, 384, 6}, {8, 512, 8}, {10, 640, 10}, {12, 768, 12}, {24, 1024, 16}, {36, 1280, 20}, {48, 1600, 25}};
  for (auto& g : gpts) if (name == "gpt2:d" + std::to_string(g.layers)) {
    c.layers = g.layers; c.channels = g.channels; c.heads = c.kv_heads = g.heads; c.head_dim = g.channels / g.heads; c.ffn = 4 * g.channels;
    return c;
  }
  die_usage("--model %s: allowed are gpt2:d2, d4, d6, d8, d10, d12, d24, d36, d48, llama:1M, 10M, 30M, 50M, 100M, 200M, 1B, or a directory with config.json", name.c_str());
}

// The machine's BF16 (GPU) or measured GEMM (CPU) rate in flops a second, and its name: what "percent of the limit" refers to.
double machine_limit(std::string* name) {
#ifdef CPU_BUILD
  const int n = 384;
  std::vector<floatX> x(n * n, from_float<floatX>(1));
  std::vector<float> y(n * n);
  Gemm g;
  g.M = g.N = g.K = g.lda = g.ldb = g.ldd = n; g.A = g.B = x.data(); g.D = y.data(); g.d_fp32 = true;
  double best = 1e9;
  for (int i = 0; i < 5; i++) {
    const auto start = std::chrono::steady_clock::now();
    gemm(g);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  *name = "CPU, " + std::to_string(multiprocessors()) + " cores, GEMM at " + std::to_string((int)(2.0 * n * n * n / best / 1e9)) + " GFLOP/s measured";
  return 2.0 * n * n * n / best;
#else
  cudaDeviceProp p;
  CUDA_CHECK(cudaGetDeviceProperties(&p, 0));
  int khz = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
  // dense BF16 flops a clock and multiprocessor with FP32 accumulation, from NVIDIA's architecture white papers
  const int cc = p.major * 10 + p.minor, per_clock = cc == 80 ? 2048 : cc < 90 ? 512 : cc < 100 ? 4096 : cc < 120 ? 8192 : 512;
  const double limit = (double)p.multiProcessorCount * per_clock * khz * 1e3;
  *name = std::string(p.name) + ", " + std::to_string((int)(limit / 1e12)) + " TFLOP/s BF16 at its highest clock";
  return limit;
#endif
}

// Mean loss over batches of the validation data in order; batches 0: all of it, with the last, shorter window.
double validate(Model& m, const DataLoader& data, int batches, long long* counted = nullptr) {
  std::vector<int> inputs((size_t)m.B * m.S), targets(inputs.size());
  const int64_t windows = batches ? min((int64_t)batches * m.B, data.windows()) : data.windows_and_tail();
  double sum = 0;
  long long n = 0;
  for (int64_t first = 0; first < windows; first += m.B) {
    const int B = (int)min((int64_t)m.B, windows - first);
    data.load_in_order(first, B, inputs.data(), targets.data());
    load_batch(m, inputs.data(), targets.data(), B, m.S);
    forward(m, B, m.S, 0x40000000u + (uint32_t)first);
    sum += head_loss(m, B * m.S, 0, &n);
  }
  if (counted) *counted = n;
  return sum / (double)n;
}

// Decides how FP4 operands are multiplied, and proves every native way on this machine, at the model's shapes, before it is used. Returns what to
// print: nothing where all FP4 GEMMs are emulated.
std::string choose_fp4_ways(Model& m, const std::string& wanted) {
  GemmWay way;
  if (!gemm_way_from_name(wanted, &way)) die_usage("--gemm %s: auto, cublaslt, mma and emulated are allowed", wanted.c_str());
  const Fp4Ways ways = fp4_ways(way);
  std::vector<GemmWay> used;
  Recipe& r = m.recipe;
  for (auto& [a, b] : {std::pair(r.fprop.x, r.fprop.w), std::pair(r.dgrad.dy, r.dgrad.w), std::pair(r.wgrad.dy, r.wgrad.x)}) {
    const GemmWay w = fp4_way_of(a, b, ways);
    if (w != GemmWay::emulated && std::find(used.begin(), used.end(), w) == used.end()) used.push_back(w);
  }
  m.scratch.ways = ways;
  std::string text;
  for (GemmWay w : used) {
    std::vector<Fp4CheckShape> shapes;
    const int T = m.B * m.S, linears[4][2] = {{m.config.channels, m.qkv_width()}, {m.att_width(), m.config.channels}, {m.config.channels, m.fc_width()}, {m.config.ffn, m.config.channels}};
    for (auto& [K, N] : linears) fp4_add_linear_shapes(shapes, T, K, N, r.fprop.x.outer == Outer::b1x128 && w == GemmWay::mma, r.fprop.x.format == Format::mxfp4 && w == GemmWay::mma);
    text += (text.empty() ? "" : "\n         ") + fp4_way_text(w) + ": " + fp4_self_check(shapes, w);
  }
  return text;
}

// How many of the last blocks stay in BF16: as asked, or (-1) the recipe's share.
int bf16_tail(const Recipe& r, int asked, int layers) {
  return min(asked >= 0 ? asked : r.bf16_last > 0 ? max(1, (int)lroundf(r.bf16_last * layers)) : 0, layers);
}

volatile sig_atomic_t interrupted = 0;
void on_interrupt(int) { interrupted = 1; }

std::string time_text(double seconds) {
  char s[32];
  if (seconds < 100) snprintf(s, sizeof s, "%.0fs", seconds);
  else if (seconds < 6000) snprintf(s, sizeof s, "%.0fm%02.0fs", floor(seconds / 60), fmod(seconds, 60));
  else snprintf(s, sizeof s, "%.0fh%02.0fm", floor(seconds / 3600), floor(fmod(seconds, 3600) / 60));
  return s;
}

// The recipe in a line for people; recipe_text() below has every field, for command.txt and checkpoints.
std::string recipe_line(const Model& m) {
  const Recipe& r = m.recipe;
  if (!m.recipe.quantizes()) return r.name;
  auto gemm = [](const char* name, const OperandRecipe& a, const OperandRecipe& b) { return std::string(name) + " " + operand_word(a) + " x " + operand_word(b); };
  std::string s = r.name + ": " + gemm("fprop", r.fprop.x, r.fprop.w) + "; " + gemm("dgrad", r.dgrad.dy, r.dgrad.w) + "; " + gemm("wgrad", r.wgrad.dy, r.wgrad.x);
  if (m.bf16_first) s += "; first " + std::to_string(m.bf16_first) + " blocks BF16";
  if (m.bf16_last) s += "; last " + std::to_string(m.bf16_last) + " of " + std::to_string(m.config.layers) + " blocks BF16";
  return s;
}

std::string recipe_text(const Model& m) {
  std::string s = m.recipe.name + ":";
  for (const RecipeField& f : recipe_fields(m.recipe)) s += " " + f.name + "=" + f.value;
  return s + " bf16 blocks: first " + std::to_string(m.bf16_first) + ", last " + std::to_string(m.bf16_last);
}

// log.csv: one line a step. A resumed run keeps the lines up to its step and drops later ones, which it is about to repeat.
struct LogFile {
  FILE* file = nullptr;
  LogFile(const std::string& path, int resume_step) {
    std::string kept = "step,tokens,train_loss,val_loss,lr,grad_norm,ms,tok_per_s\n";
    if (FILE* old = resume_step > 0 ? fopen(path.c_str(), "r") : nullptr) {
      char line[512];
      while (fgets(line, sizeof line, old)) if (line[0] >= '0' && line[0] <= '9' && strchr(line, '\n') && atoi(line) <= resume_step) kept += line;
      fclose(old);
    }
    write_file_atomic(path, kept);
    file = fopen(path.c_str(), "a");
    if (!file) die("cannot write %s: %s", path.c_str(), strerror(errno));
  }
  ~LogFile() { if (file) fclose(file); }
  void line(int step, long long tokens, double loss, double val, double lr, double norm, double ms, double rate) {
    char val_text[32] = "";
    if (val == val) snprintf(val_text, sizeof val_text, "%.6f", val);
    if (fprintf(file, "%d,%lld,%.6f,%s,%.6g,%.6g,%.3f,%.0f\n", step, tokens, loss, val_text, lr, norm, ms, rate) < 0 || fflush(file))
      die("cannot write log.csv: %s; free some space and go on with --resume", strerror(errno));
  }
};

void train(Model& m, Options& o, const DataLoader& train_data, const DataLoader& val_data, const Tokenizer* tokenizer, RunState state, double limit) {
  const int micro_batches = o.total_batch / (o.batch * o.seq);
  const bool terminal = isatty(1);
  const std::string run_recipe = recipe_text(m);
  LogFile log(o.out + "/log.csv", state.step);
  EventLog events(o.out + "/control.csv", state.step);
  signal(SIGINT, on_interrupt);
  signal(SIGTERM, on_interrupt);
  std::vector<int> inputs((size_t)o.batch * o.seq), targets(inputs.size());
  double ms_mean = 0;
  int saved = state.step > 0 ? state.step : -1;
  if (state.step == 0) printf("step %5d/%d  val loss %.4f  (untrained)\n", 0, o.steps, validate(m, val_data, o.val_batches));
  while (state.step < o.steps && !interrupted) {
    const auto start = std::chrono::steady_clock::now();
    profile.begin_step(3, o.profile);
    auto gradients = [&] {
      return accumulate_gradients(m, o.batch, o.seq, micro_batches, (uint32_t)state.step * micro_batches, [&](int i) {
        train_data.load_shuffled(state.sequences + (long long)i * o.batch, o.batch, inputs.data(), targets.data());
        load_batch(m, inputs.data(), targets.data(), o.batch, o.seq);
      });
    };
    choose_precision(m, o, state, &events);
    const bool monitored = o.fqt_every && state.step % o.fqt_every == 0 && !m.control.switched;
    if (monitored) { const Recipe recipe = m.recipe; m.recipe = without_backward(recipe); gradients(); m.recipe = recipe; keep_clean_gradient(m); }
    m.control.collecting = m.control.outliers == "outcontrol" && !m.control.chosen && state.step + 1 >= o.outlier_start;
    const double loss = gradients();
    m.control.collecting = false;
    if (monitored) watch_noise(m, o, state, &events);
    const float norm = gradient_norm(m, o.clip), lr = learning_rate(o, state.step);
    if (!std::isfinite(loss) || !std::isfinite(norm))
      die("step %d: the loss is %g and the gradient norm %g; nothing was updated. Lower --lr, or go on from the last checkpoint in %s with another --recipe", state.step + 1, loss, norm, o.out.c_str());
    update(m, {lr, o.beta1, o.beta2, o.eps, 0, state.step + 1}, o.weight_decay);
    device_sync();
    if (profile.end_step()) { profile.print(); exit(0); }
    state.step++;
    state.sequences += (long long)micro_batches * o.batch;
    if (m.control.outliers == "outcontrol" && !m.control.chosen && state.step >= o.outlier_start + o.outlier_steps - 1) choose_outliers(m, state.step, &events);
    oscillation_step(m, state.step, &events);

    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    ms_mean = ms_mean == 0 ? ms : 0.9 * ms_mean + 0.1 * ms;
    const double rate = o.total_batch / ms * 1e3;
    printf("%sstep %5d/%d  loss %.4f  norm %.3f  lr %.2e  %.1f ms  %.0f tok/s  %.1f %% of limit  %s left%s", terminal ? "\r\033[K" : "", state.step, o.steps, loss, norm, lr, ms, rate,
           100 * rate * m.flops_per_token(o.seq) / limit, time_text((o.steps - state.step) * ms_mean / 1e3).c_str(), terminal ? "" : "\n");
    const bool last = state.step == o.steps, due = last || (o.val_every && state.step % o.val_every == 0);
    double val = NAN;
    if (due) {
      val = validate(m, val_data, o.val_batches);
      printf("%sstep %5d/%d  val loss %.4f\n", terminal ? "\r\033[K" : "", state.step, o.steps, val);
    }
    fflush(stdout);
    log.line(state.step, (long long)state.step * o.total_batch, loss, val, lr, norm, ms, rate);
    if (!last && o.sample_every && state.step % o.sample_every == 0) print_sample(m, o, tokenizer);
    if (last || (o.save_every && state.step % o.save_every == 0)) { save_checkpoint(m, o, state, run_recipe); saved = state.step; }
  }
  if (interrupted) {
    if (saved != state.step) save_checkpoint(m, o, state, run_recipe);
    printf("%sinterrupted after step %d, saved in %s; go on with the same command, --out %s and --resume\n", terminal ? "\n" : "", state.step, step_directory(o.out, state.step).c_str(), o.out.c_str());
    exit(130);
  }
  print_sample(m, o, tokenizer);
  printf("saved in %s\n", step_directory(o.out, o.steps).c_str());
}

#ifndef TESTING
int main(int argc, char** argv) {
  Options o = parse_options(argc, argv);
  signal(SIGXFSZ, SIG_IGN);                       // a file that grows too large is a write error with a message, not a sudden death
  if (o.help) { print_help(); return 0; }
  if (o.list_recipes) { print_recipes(); return 0; }
#ifndef CPU_BUILD
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) die("no usable NVIDIA GPU or driver here; `make CPU=1` builds the same program for the CPU");
#endif
  // Where the weights come from decides the model.
  std::string run_recipe, checkpoint;
  if (!o.out.empty()) {
    clean_stale(o.out);
    checkpoint = find_newest_checkpoint(o.out);
    if (o.resume && checkpoint.empty()) die("--resume: there is no finished checkpoint in %s", o.out.c_str());
    if (!o.resume && !checkpoint.empty() && !o.eval_only) die("%s already holds %s; add --resume to go on, or choose another --out", o.out.c_str(), checkpoint.c_str());
  } else if (!o.eval_only) {
    const time_t now = time(nullptr);
    char name[64];
    strftime(name, sizeof name, "out/%Y%m%d-%H%M%S", localtime(&now));
    o.out = name;
  }
  const std::string weights = o.resume ? checkpoint : !o.init_from.empty() ? o.init_from : is_directory(o.model) ? o.model : "";

  Model m;
  m.recipe = find_recipe(o);
  m.bf16 = recipe_table()[0];
  // The vocabulary of a new model follows from the data: bytes for text, GPT-2's for token files.
  DataOptions data;
  data.seq_len = o.seq;
  data.seed = (uint64_t)o.seed;
  data.val_fraction = o.val.empty() ? o.val_fraction : 0;
  data.part = o.val.empty() && o.val_fraction > 0 ? DataPart::train : DataPart::all;
  const bool text = DataLoader(o.train, data).is_text();
  m.config = weights.empty() ? preset(o.model, o.vocab ? o.vocab : text ? 256 : 50257, o.seq) : read_config(weights);
  const std::string problem = config_problem(m.config);
  if (!problem.empty()) die_usage("--model %s: %s", o.model.c_str(), problem.c_str());
  if (!weights.empty() && !m.config.llama && o.seq > m.config.max_seq) die_usage("--seq %d: the model in %s has %d positions", o.seq, weights.c_str(), m.config.max_seq);
  data.vocab = m.config.vocab;
  const DataLoader train_data(o.train, data);
  if (data.part == DataPart::train) data.part = DataPart::val;
  data.option = o.val.empty() ? "--train" : "--val";
  const DataLoader val_data(o.val.empty() ? o.train : o.val, data);
  std::unique_ptr<Tokenizer> tokenizer;
  if (!o.tokenizer.empty()) tokenizer = std::make_unique<Tokenizer>(Tokenizer::gpt2(o.tokenizer.c_str()));
  else if (text) tokenizer = std::make_unique<Tokenizer>(Tokenizer::bytes());

  m.bf16_first = min(o.bf16_first, m.config.layers);
  m.bf16_last = bf16_tail(m.recipe, o.bf16_last, m.config.layers);
  m.B = o.batch; m.S = o.seq; m.seed = (uint64_t)o.seed; m.z_loss = o.z_loss;
  m.V = round_up(m.config.vocab, 128);
  m.training = !o.eval_only;
  configure_control(m, o);
  m.keep = o.keep == "values" ? Keep::values : o.keep == "operands" ? Keep::operands : Keep::codes;
  make_params(m);

  std::string machine;
  const double limit = machine_limit(&machine);
  size_t count = 0;
  for (const Param& p : m.params) for (const HfTensor& h : p.hf) count += (size_t)h.rows * p.cols;
  printf("machine  %s\n", machine.c_str());
  printf("GEMM     %s\n", gemm_way());
  const std::string native = choose_fp4_ways(m, o.gemm);
  if (!native.empty()) printf("FP4      %s\n", native.c_str());
  printf("model    %s: %zu parameters, %d blocks, %d channels, %d heads (%d key/value) of %d, MLP %d, vocabulary %d%s\n", m.config.llama ? "Llama" : "GPT-2", count, m.config.layers,
         m.config.channels, m.config.heads, m.config.kv_heads, m.config.head_dim, m.config.ffn, m.config.vocab, weights.empty() ? "" : (", from " + weights).c_str());
  printf("recipe   %s\n", recipe_line(m).c_str());
  const std::string control = control_text(m, o);
  if (!control.empty()) printf("control %s\n", control.c_str());
  printf("data     %lld tokens to train on, %lld to validate on; %d sequences of %d tokens a step\n", (long long)train_data.tokens(), (long long)val_data.tokens(), o.total_batch / o.seq, o.seq);
  allocate_model(m, true);
  fflush(stdout);

  RunState state;
  if (o.resume) {
    state = load_checkpoint(m, o, weights, recipe_text(m));
    printf("resuming %s after step %d\n", weights.c_str(), state.step);
  } else if (!weights.empty()) load_weights(m, weights);
  else init_weights(m);

  if (o.eval_only) {
    if (o.resume) choose_precision(m, o, state, nullptr);
    long long n = 0;
    const double loss = validate(m, val_data, 0, &n);
    printf("val loss %.4f over %lld tokens\n", loss, n);
    return std::isfinite(loss) ? 0 : 1;
  }
  make_directories(o.out);
  std::string command;
  for (int i = 0; i < argc; i++) command += std::string(i ? " " : "") + argv[i];
  write_file_atomic(o.out + "/command.txt", command + "\n" + recipe_text(m) + "\n" + (control.empty() ? "" : "control:" + control + "\n"));
  train(m, o, train_data, val_data, tokenizer.get(), state, limit);
  return 0;
}
#endif
