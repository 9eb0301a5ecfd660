// train_control.cuh -- what watches over training and changes it late: oscillation control, outlier control, precision. train_fp4.cu, which
// includes this file where its Model is complete, calls
//
//     configure_control, control_text   what options and recipe ask for; in words
//     want_control, start_control       memory; states at the start of a run
//     layer_control                     how one linear layer is watched over: forward and backward hand it to linear_*
//     keep_clean_gradient, watch_noise  fqt's monitor: gradient over quantization noise
//     choose_precision                  BF16 late in training
//     choose_outliers                   OutControl's columns, once their norms are summed
//     oscillation_step                  after an update: a step of OsciReset's and Q-Ramping's windows, or of Q-EMA's average
//
// Its state is struct Control in train_fp4.cu, where checkpoints save it. The kernels are in kernels/oscillation.cuh and kernels/outliers.cuh.
#pragma once

// control.csv: a line an event: step, what, value. A resumed run keeps the lines up to its step.
struct EventLog {
  std::string path;
  EventLog(const std::string& path_, int resume_step) : path(path_) {
    std::string kept = "step,what,value\n";
    if (FILE* old = resume_step > 0 ? fopen(path.c_str(), "r") : nullptr) {
      char line[512];
      while (fgets(line, sizeof line, old)) if (line[0] >= '0' && line[0] <= '9' && strchr(line, '\n') && atoi(line) <= resume_step) kept += line;
      fclose(old);
    }
    if (kept.find('\n') + 1 < kept.size() || is_file(path)) write_file_atomic(path, kept);
  }
  static bool is_file(const std::string& path) { return access(path.c_str(), F_OK) == 0; }
  void line(int step, const std::string& what, double value) {                   // the file appears with its first line
    const bool fresh = !is_file(path);
    FILE* f = fopen(path.c_str(), "a");
    if (!f || (fresh && fprintf(f, "step,what,value\n") < 0) || fprintf(f, "%d,%s,%.8g\n", step, what.c_str(), value) < 0 || fclose(f))
      die("cannot write %s: %s", path.c_str(), strerror(errno));
  }
};

// ------------------------------------------------------------------ from the options
// The recipe with one pass in BF16. What started from the forward pass's quantized value then starts from the original.
Recipe late_recipe(Recipe r, const std::string& what) {
  if (what != "backward") r = without_forward(r);
  if (what != "forward") r = without_backward(r);
  return r;
}
// What the command line and the recipe's row ask for. Call it before make_params. A row's own wish that a run is too short for is left out,
// with a note; one of the command line is an error.
void configure_control(Model& m, Options& o) {
  Control& c = m.control;
  auto format = [](const std::string& name) { return name == "fp8" ? StateFormat::fp8 : name == "bf16" ? StateFormat::bf16 : StateFormat::fp32; };
  m.adam = {format(o.adam_m), format(o.adam_v), o.adam_scale == "e8m0"};
  c.oscillation = o.oscillation.empty() ? m.recipe.oscillation : o.oscillation;
  c.outliers = o.outliers.empty() ? m.recipe.outliers : o.outliers;
  c.late = late_recipe(m.recipe, o.bf16_what);
  c.may_switch = o.bf16_from < 1 || o.bf16_trigger == "fqt";
  c.monitor = o.fqt_every > 0;
  c.tau = o.osci_tau; c.ema = o.ema; c.ramp_most = o.ramp_most;
  c.outlier_fraction = o.outlier_fraction; c.sorted = o.outlier_order == "sorted";
  std::string oscillation, outliers;                            // what is wrong
  const OperandRecipe& w = m.recipe.fprop.w;
  const bool grid = is_fp4(w.format) && w.rounding == Rounding::nearest && (w.rht == 0 || w.signs == Signs::none);
  if (c.oscillation != "none" && !grid)
    oscillation = c.oscillation + ": needs an FP4 grid that stays in place: the recipe's fprop.w in FP4, rounded to nearest, without random signs; " +
                  "it is " + operand_word(w);
  if (c.oscillation != "none" && oscillation.empty() && w.rht) {                     // the grid lies in rotated coordinates
    for (const LayerShape& s : layer_shapes(m))
      if (s.K % w.rht)
        oscillation = c.oscillation + ": the recipe rotates W in groups of " + std::to_string(w.rht) + ", which " + std::to_string(s.K) +
                      " input channels do not divide into";
    if (c.oscillation == "q-ema" && c.outliers == "outcontrol") oscillation = "q-ema: not with this recipe's rotation of W";
  }
  if (oscillation.empty() && (c.oscillation == "osci-reset" || c.oscillation == "q-ramping")) {
    const bool ramp = c.oscillation == "q-ramping";
    c.window.period = o.osci_period;
    c.window.detect = o.osci_detect ? o.osci_detect : ramp ? 30 : 50;
    c.window.start = o.osci_start >= 0 ? o.osci_start : round_up(ramp ? max(1, o.warmup) : (int)ceil(0.65 * o.steps), c.window.period);
    if (!o.eval_only) oscillation = window_problem(c.window, o.warmup, o.steps, c.oscillation.c_str());
  }
  if (c.outliers == "outcontrol" && !m.recipe.quantizes()) outliers = "outcontrol: the recipe quantizes nothing";
  const std::string choice = "after step " + std::to_string(o.outlier_start + o.outlier_steps - 1);
  if (c.outliers == "outcontrol" && !o.eval_only && o.outlier_start + o.outlier_steps > o.steps)
    outliers = "outcontrol: the channels are chosen " + choice + ", but the run has " + std::to_string(o.steps) +
               "; lower --outlier-start or --outlier-steps";
  const bool windows = c.oscillation == "osci-reset" || c.oscillation == "q-ramping";
  if (outliers.empty() && oscillation.empty() && c.outliers == "outcontrol" && windows && c.window.start < o.outlier_start + o.outlier_steps)
    oscillation = c.oscillation + ": --osci-start " + std::to_string(c.window.start) + " comes before outcontrol has chosen its channels, " + choice +
                  "; the grid would change under the window";
  if (c.outliers == "occ" && !is_fp4(m.recipe.fprop.x.format))
    outliers = "occ: needs fprop.x in FP4 and a quantile; set the recipe's field occ, such as --set occ=0.99";
  auto settle = [](const char* option, const std::string& problem, const std::string& asked, std::string* name) {
    if (problem.empty()) return;
    if (!asked.empty()) die_usage("--%s %s", option, problem.c_str());
    printf("note: %s. Left out\n", problem.c_str());
    *name = "none";
  };
  settle("oscillation", oscillation, o.oscillation, &c.oscillation);
  settle("outliers", outliers, o.outliers, &c.outliers);
}
// In words: how a run is watched over. Empty if it is not.
std::string control_text(const Model& m, const Options& o) {
  const Control& c = m.control;
  std::string text;
  auto add = [&](const char* format, auto... values) {
    char s[256];
    snprintf(s, sizeof s, format, values...);
    text += s;
  };
  const WindowSchedule& w = c.window;
  if (c.oscillation == "osci-reset") add(" osci-reset: from step %d, every %d, over %d, tau %g;", w.start, w.period, w.detect, c.tau);
  if (c.oscillation == "q-ramping") add(" q-ramping: from step %d, every %d, over %d, at most %d steps;", w.start, w.period, w.detect, c.ramp_most);
  if (c.oscillation == "q-ema") add(" q-ema: decay %g;", c.ema);
  if (c.outliers == "occ") add(" occ: quantile %g;", m.recipe.occ);
  if (c.outliers == "outcontrol") {
    const char* order = c.sorted ? "sorted" : "in memory's order";
    add(" outcontrol: norms of steps %d to %d, %s;", o.outlier_start, o.outlier_start + o.outlier_steps - 1, order);
    const char* names[4] = {"qkv", "out", "up", "down"};
    for (int i = 0; i < 4; i++) {
      int multiple;
      const int K = layer_shapes(m)[i].K, n = outlier_columns(K, c.outlier_fraction, &multiple);
      add(" %s %d of %d", names[i], n, K);
      if (n == 0) add("%s", " (too few channels: none)");
      else if (multiple < 128) add(" (rounded up to %d, not 128, which would be half or more)", multiple);
    }
    text += ";";
  }
  if (o.bf16_trigger == "fqt" || o.bf16_from < 1) {
    if (o.bf16_trigger == "fqt") add(" BF16 %s: when the gradient sinks into its quantization noise;", o.bf16_what.c_str());
    else add(" BF16 %s: from step %d on;", o.bf16_what.c_str(), (int)ceil(o.bf16_from * o.steps));
  }
  const char* scales = m.adam.m == StateFormat::fp8 && m.adam.e8m0 ? " with E8M0 scales" : "";
  if (!m.adam.all_fp32()) add(" AdamW m %s%s, v %s;", o.adam_m.c_str(), scales, o.adam_v.c_str());
  if (!text.empty()) text.pop_back();
  return text;
}

// ------------------------------------------------------------------ memory and states
size_t largest_watched(const Model& m) {
  size_t most = 0;
  for (const Param& p : m.params) if (p.watched) most = max(most, p.size());
  return most;
}
// The largest packed matrix on the grid of the forward pass.
struct PackedGrid { PackedBytes bytes; size_t groups = 0; };
PackedGrid largest_grid(const Model& m) {
  PackedGrid g;
  for (const Param& p : m.params) if (p.watched) {
    const PackedBytes b = packed_bytes(m.recipe.fprop.w, p.rows, p.cols);
    g.bytes.codes = max(g.bytes.codes, b.codes); g.bytes.scales = max(g.bytes.scales, b.scales); g.bytes.outer = max(g.bytes.outer, b.outer);
    g.groups = max(g.groups, group_words(p.rows, p.cols));
  }
  return g;
}
// Device memory of an open window.
size_t window_bytes(const Model& m) {
  const PackedGrid grid = largest_grid(m);
  return 3 * sizeof(float) * (m.control.watched + largest_watched(m)) + grid.bytes.total() + grid.groups * sizeof(uint32_t);
}
// Memory of what watches over training. The window of OsciReset and Q-Ramping comes and goes: window_bytes().
void want_control(Model& m) {
  Control& c = m.control;
  Arena& a = m.arena;
  const size_t T = (size_t)m.B * m.S;
  if (m.training && c.oscillation == "q-ramping") {
    a.want(&c.ramp.sum, c.watched, "Q-Ramping: summed gradients, periods");
    a.want(&c.ramp.count, c.watched, "Q-Ramping: summed gradients, periods");
    a.want(&c.ramp.period, c.watched, "Q-Ramping: summed gradients, periods");
  }
  if (c.oscillation == "q-ema") {
    const PackedGrid most = largest_grid(m);
    a.want(&c.average, c.watched, "Q-EMA: average of the weights, FP32");
    a.want(&c.packed_weight.codes, most.bytes.codes, "Q-EMA: one matrix, packed; one in FP32");
    a.want(&c.packed_weight.scales, most.bytes.scales, "Q-EMA: one matrix, packed; one in FP32");
    a.want(&c.packed_weight.outer, most.bytes.outer / 4, "Q-EMA: one matrix, packed; one in FP32");
    a.want(&c.outlier_scratch.average, 2 * largest_watched(m), "Q-EMA: one matrix, packed; one in FP32");
  }
  if (m.training && c.monitor) a.want(&c.clean, c.watched, "gradient without quantization noise, FP32");
  if (m.training && (c.oscillation == "osci-reset" || c.oscillation == "q-ramping")) a.later = window_bytes(m);
  if (c.outliers == "none") return;
  size_t x = 0, w = 0, dw = 0, norms = 0;
  for (const LayerShape& s : layer_shapes(m)) {
    x = max(x, T * s.K); w = max(w, (size_t)s.N * s.K); dw = max(dw, outlier_dw_elements(s.K, s.N));
    norms = max(norms, column_norms_scratch(s.K));
  }
  const char* label = c.outliers == "occ" ? "OCC: clamped X and the rest" : "OutControl: gathered operands of a layer";
  if (c.outliers == "occ") { a.want(&c.outlier_scratch.x, x, label); a.want(&c.outlier_scratch.y, x, label); return; }
  a.want(&c.outlier_scratch.x, x, label); a.want(&c.outlier_scratch.w, w, label);
  if (m.training) { a.want(&c.outlier_scratch.y, x, label); a.want(&c.outlier_scratch.dw, dw, label); }
  a.want(&c.outlier_scratch.norms, norms, label);
  c.columns.resize(m.config.layers);
  for (int l = 0; l < m.config.layers; l++) for (int i = 0; i < 4; i++) {
    if (m.block_is_bf16(l)) continue;
    OutlierLayer& o = c.columns[l][i];
    o.K = layer_shapes(m)[i].K;
    o.fp8 = outlier_columns(o.K, c.outlier_fraction);
    a.want(&o.columns, o.K, "OutControl: columns, norms");
    a.want(&o.sums, o.K, "OutControl: columns, norms");
  }
}

// The states of Control at the start of a run. Q-EMA's average starts from the weights: begin_average, once they are there.
void start_control(Model& m) {
  Control& c = m.control;
  if (c.ramp.sum) {
    const std::vector<uint8_t> ones(c.watched, 1);
    to_device(c.ramp.period, ones.data(), c.watched);
    device_zero(c.ramp.sum, c.watched); device_zero(c.ramp.count, c.watched);
    device_sync();
  }
  for (auto& block : c.columns) for (OutlierLayer& o : block) if (o.K) device_zero(o.sums, o.K);
}
// The master weights in the coordinates in which the forward pass rounds: themselves, or rotated, in Q-EMA's scratch.
const float* rounding_coordinates(const Model& m, const Param& p) {
  const int rht = m.recipe.fprop.w.rht;
  float *w = m.control.outlier_scratch.average, *scratch = w + p.size();
  if (rht == 0) return p.weight->master;
  device_copy(w, p.weight->master, p.size());
  rotate_rows(w, scratch, p.rows, p.cols, rht);
  return w;
}
void begin_average(Model& m) {
  if (!m.control.average) return;
  for (const Param& p : m.params)
    if (p.watched) device_copy(m.control.average + p.weight->watch_offset, rounding_coordinates(m, p), p.size());
}

// ------------------------------------------------------------------ a linear layer
// How layer `which` of block l is watched over: outlier control, Q-EMA.
LayerControl layer_control(const Model& m, int l, int which) {
  const Control& c = m.control;
  LayerControl how;
  const OperandRecipe &x = m.block_recipe(l).fprop.x, &w = m.block_recipe(l).fprop.w;
  if (m.block_is_bf16(l)) return how;
  how.scratch = c.outlier_scratch;
  how.occ = c.outliers == "occ" && is_fp4(x.format);
  if (c.outliers == "outcontrol") {
    const OutlierLayer& o = c.columns[l][which];
    if (c.chosen && o.fp8 && m.block_recipe(l).quantizes()) how.split = &o;
    if (c.collecting) how.collect = o.sums;
  }
  if (c.average && is_fp4(w.format)) how.toward = {c.average + m.layers[l].linear(which).watch_offset, c.packed_weight};
  return how;
}

// ------------------------------------------------------------------ oscillation
// One watched matrix as the detector sees it: the coordinates in which the forward pass rounds. OutControl: its FP4 columns alone. A recipe
// that rotates W: the rotated W.
struct WatchedView { int rows, cols; const int* columns; int rht; size_t size() const { return (size_t)rows * cols; } };
WatchedView watched_view(const Model& m, const Param& p) {
  int which = 0;
  while (p.weight != &m.layers[p.block].linear(which)) which++;
  const OperandRecipe& w = m.recipe.fprop.w;
  if (!m.control.chosen) return {p.rows, p.cols, nullptr, w.rht};
  const OutlierLayer& o = m.control.columns[p.block][which];
  return {p.rows, o.K - o.fp8, o.fp8 ? o.columns : nullptr, w.rht};
}
void view_of(const Model& m, float* out, float* scratch, const Param& p) {
  const WatchedView v = watched_view(m, p);
  if (v.columns) gather_columns(out, p.weight->master, v.columns, v.rows, v.cols, p.cols);
  else device_copy(out, p.weight->master, v.size());
  if (v.rht) rotate_rows(out, scratch, v.rows, v.cols, v.rht);
}
void free_window(Model& m) {
  Control::Open& o = m.control.open;
  if (!o.prev) return;
  device_sync();
  for (float* p : {o.prev, o.dist_q, o.dist_w, o.w, o.q, o.q_prev, o.grid.outer, o.grid.amax}) device_free(p);
  device_free(o.grid.codes); device_free(o.grid.scales); device_free(o.grid.groups); device_free(o.counts);
  o = {};
}
void open_window(Model& m) {
  Control::Open& o = m.control.open;
  free_window(m);
  for (float** p : {&o.prev, &o.dist_q, &o.dist_w}) { *p = device_alloc<float>(m.control.watched); device_zero(*p, m.control.watched); }
  for (float** p : {&o.w, &o.q, &o.q_prev}) *p = device_alloc<float>(largest_watched(m));
  const PackedGrid most = largest_grid(m);
  o.grid = {device_alloc<uint8_t>(most.bytes.codes), device_alloc<uint8_t>(most.bytes.scales), device_alloc<float>(most.bytes.outer / 4),
            device_alloc<float>(1), device_alloc<uint32_t>(most.groups)};
  o.counts = device_alloc<OsciCounts>(1);
}
// After the update that finished step `step` (1 for the first). What it found goes to the terminal and to control.csv.
void oscillation_step(Model& m, int step, EventLog* log) {
  Control& c = m.control;
  if (c.oscillation == "q-ema") {
    for (const Param& p : m.params) if (p.watched) weight_average(c.average + p.weight->watch_offset, rounding_coordinates(m, p), c.ema, p.size());
    return;
  }
  if (c.oscillation != "osci-reset" && c.oscillation != "q-ramping") return;
  if (c.switched && c.late.fprop.w.format == Format::bf16) { free_window(m); return; }        // no grid any more
  const WindowPhase phase = window_phase(c.window, step);
  if (phase == WindowPhase::none) return;
  if (phase == WindowPhase::open) {
    open_window(m);
    for (const Param& p : m.params) if (p.watched) view_of(m, c.open.prev + p.weight->watch_offset, c.open.q, p);
    return;
  }
  if (!c.open.prev) return;                                     // resumed or switched in the middle without its state: waits for the next window
  const Control::Open& s = c.open;
  device_zero(s.counts, 1);
  double elements = 0;
  for (const Param& p : m.params) {
    if (!p.watched) continue;
    const WatchedView v = watched_view(m, p);
    const size_t at = p.weight->watch_offset;
    float *prev = c.open.prev + at, *dist_q = c.open.dist_q + at, *dist_w = c.open.dist_w + at;
    elements += v.size();
    if (phase == WindowPhase::finish && c.oscillation == "q-ramping") {
      ramp_periods(c.ramp.period + at, &s.counts->oscillating, dist_q, dist_w, c.ramp_most, v.size());
      continue;
    }
    view_of(m, s.w, s.q, p);
    quantized_weight(s.q, s.w, v.rows, v.cols, m.recipe.fprop.w, s.grid);
    if (phase == WindowPhase::watch) {
      quantized_weight(s.q_prev, prev, v.rows, v.cols, m.recipe.fprop.w, s.grid);
      watch(prev, dist_q, dist_w, s.w, s.q, s.q_prev, v.size());
      continue;
    }
    if (v.rht) {                                                // W += (change in the rotated coordinates) rotated back
      osci_reset<true>(s.counts, s.w, s.q, dist_q, dist_w, c.tau, v.size());
      rotate_rows(s.w, s.q_prev, v.rows, v.cols, v.rht);
      if (v.columns) {
        gather_columns(s.q, p.weight->master, v.columns, v.rows, v.cols, p.cols);
        add_changes(s.q, s.w, v.size());
        scatter_columns(p.weight->master, s.q, v.columns, v.rows, v.cols, p.cols);
      } else add_changes(p.weight->master, s.w, v.size());
    } else {
      osci_reset<false>(s.counts, s.w, s.q, dist_q, dist_w, c.tau, v.size());
      if (v.columns) scatter_columns(p.weight->master, s.w, v.columns, v.rows, v.cols, p.cols);
      else device_copy(p.weight->master, s.w, v.size());
    }
    if (work_copy(p)) round_copy(work_copy(p), p.weight->master, p.size());
  }
  if (phase == WindowPhase::finish) {
    OsciCounts n;
    to_host(&n, s.counts, 1);
    free_window(m);
    if (c.oscillation == "q-ramping") {
      printf("step %5d  Q-Ramping: %.3f %% of %.0f weights take longer steps from now on\n", step, 100 * n.oscillating / elements, elements);
      if (log) log->line(step, "ramp_share", n.oscillating / elements);
    } else {
      const double moved = n.moved / elements, flipped = n.flipped / elements, oscillating = n.oscillating / elements, reset = n.reset / elements;
      printf("step %5d  OsciReset: of %.0f weights %.2f %% moved, %.2f %% changed their quantized value, %.3f %% oscillate, %.3f %% were reset\n",
             step, elements, 100 * moved, 100 * flipped, 100 * oscillating, 100 * reset);
      if (!log) return;
      log->line(step, "osci_moved", moved); log->line(step, "osci_flipped", flipped);
      log->line(step, "osci_oscillating", oscillating); log->line(step, "osci_reset", reset);
    }
  }
}

// ------------------------------------------------------------------ OutControl
// After the last step that summed norms: chooses the columns of every layer.
void choose_outliers(Model& m, int step, EventLog* log) {
  Control& c = m.control;
  double fp8 = 0, all = 0;
  for (int l = 0; l < m.config.layers; l++) for (OutlierLayer& o : c.columns[l]) {
    if (o.K == 0) continue;
    std::vector<float> sums(o.K);
    to_host(sums.data(), o.sums, o.K);
    const std::vector<int> order = outlier_order(sums, o.fp8, c.sorted);
    to_device(o.columns, order.data(), o.K);
    device_sync();
    fp8 += o.fp8; all += o.K;
  }
  c.chosen = true;
  printf("step %5d  OutControl: %.1f %% of the input channels from now on in MXFP8\n", step, 100 * fp8 / all);
  if (log) log->line(step, "outlier_share", fp8 / all);
}

// ------------------------------------------------------------------ precision late in training
// fqt's monitor, |g| / (sigma_q sqrt d) over the d weights of the quantized layers: g is a step's gradient with the backward pass in BF16,
// sigma_q sqrt d the norm of its difference from the same step's quantized gradient. First half: after the pass in BF16; second: after the other.
void keep_clean_gradient(Model& m) {
  device_zero(m.control.clean, m.control.watched);
  for (const Param& p : m.params) if (p.watched) device_copy(m.control.clean + p.weight->watch_offset, p.weight->grad, p.size());
}
double gradient_over_noise(Model& m) {
  const size_t n = m.control.watched;
  float clean, noise;
  grad_norm(m.norm, m.control.clean, n, 0, m.reduce);
  to_host(&clean, m.norm, 1);
  for (const Param& p : m.params) if (p.watched) subtract(m.control.clean + p.weight->watch_offset, p.weight->grad, p.size());
  grad_norm(m.norm, m.control.clean, n, 0, m.reduce);
  to_host(&noise, m.norm, 1);
  return (double)clean / noise;
}

// Is it time for BF16? By the step, or because fqt's monitor said so.
void choose_precision(Model& m, const Options& o, const RunState& state, EventLog* log) {
  const double at = o.bf16_trigger == "fqt" ? state.switched_at : o.bf16_from < 1 ? ceil(o.bf16_from * o.steps) : -1;
  m.control.switched = at >= 0 && state.step >= at;
  if (state.step != at) return;
  printf("step %5d  from now on %s in BF16\n", state.step, o.bf16_what == "all" ? "all passes" : ("the " + o.bf16_what + " pass").c_str());
  if (log) log->line(state.step, "bf16_" + o.bf16_what, 1);
}
void watch_noise(Model& m, const Options& o, RunState& state, EventLog* log) {
  constexpr double kThreshold = 1.7320508;          // sqrt(3): arXiv 2505.19115
  const double ratio = gradient_over_noise(m);
  printf("step %5d  gradient over quantization noise %.3f\n", state.step, ratio);
  if (log) log->line(state.step, "gradient_over_noise", ratio);
  if (o.bf16_trigger == "fqt" && ratio < kThreshold) state.switched_at = state.step + 1;
}
