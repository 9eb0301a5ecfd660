// kernels/linear.cuh -- forward and backward of a linear layer Y = X W^T under a recipe.
//
// X [T,K], W [N,K], Y [T,N], all row-major floatX; dW [N,K] FP32, accumulated. The three GEMMs and their six operands are those of
// recipe.cuh. Each operand is either the tensor itself, or is quantized on the way into scratch memory that the next layer reuses:
// row copies for fprop's X and W and dgrad's dY, column (transposed) copies for dgrad's W^T, wgrad's dY^T and X^T.
//
// What the forward leaves for the backward (LinearSaved): where dgrad.w or wgrad.x says `source forward`, the packed codes and scales of W or X;
// where wgrad.x says `source original`, those of X^T, quantized as soon as X is there: 4.5 bits an element (FP8: 8) instead of the 16 of X in
// BF16, which need not be kept. Further QuEST's masks, one bit an element; and the scales of W for DGE. With `--keep operands` X^T waits as the values that
// the emulated GEMM reads: 16 bits again, but nothing to unpack.
// The other way, `--keep values`: X is kept itself, and the backward pass quantizes everything again, with the same random numbers: the same bits.
// Bias, residual and GELU go in with fprop's GEMM (LinearEpilogue), GELU where that GEMM can (run_gemm()); SwiGLU is another kernel's work.
#pragma once
#include "estimator.cuh"
#include "gemm.cuh"
#include "gemm_fp4.cuh"
#include "mlp.cuh"        // defines: residual_forward, gelu_forward
#include "quantize.cuh"
#include "recipe.cuh"

// Which random numbers a layer draws: every (layer, operand) has its own stream of every step.
struct LinearKey {
  uint64_t seed = 0;
  uint32_t step = 0;                        // counts micro-batches
  uint32_t layer = 0;                       // unique for every linear layer of the model
};
enum OperandIndex { kFpropX, kFpropW, kDgradDy, kDgradW, kWgradDy, kWgradX };
inline RandomKey operand_key(LinearKey key, OperandIndex which) { return {key.seed, key.step, key.layer * 8 + (uint32_t)which}; }
// The signs of a GEMM's rotation, the same for both operands; `first` is its operand 1.
inline SignBits rotation_signs(const OperandRecipe& how, OperandIndex first, LinearKey key) {
  SignBits s;
  if (how.signs == Signs::none) return s;
  if (how.signs == Signs::fixed && how.rht == 16) { s.word[0] = kFixedSigns; return s; }
  RandomKey k = {0, 0, 0};                                                 // larger fixed rotations: any bits will do
  if (how.signs == Signs::fresh) { k = operand_key(key, first); k.stream |= 0x80000000u; }
  const uint4 r = random_block(k, 0);
  s.word[0] = r.x | (uint64_t)r.y << 32;
  s.word[1] = r.z | (uint64_t)r.w << 32;
  return s;
}

// ------------------------------------------------------------------ memory
// Device scalars, all set to 0 by one fill before a forward pass. Every search for a maximum takes one, and so does every alpha; nobody gives his back
// before the next forward pass, so that what is saved for the backward pass keeps its own.
struct Scalars {
  static constexpr int kLayer = 32;         // for the two passes of a linear layer, which take up to 23 (OutControl, Q-EMA, --keep values)
  float* all = nullptr;
  int size = 0, taken = 0;
  std::map<const floatX*, std::pair<size_t, float*>> weights = {};              // their sizes and maxima, if these are known
  void start() { device_zero(all, size); taken = 0; weights.clear(); }
  float* take(int n = 1) {
    if (taken + n > size) die("Scalars: all %d are taken; start() comes before a forward pass", size);
    taken += n;
    return all + taken - n;
  }
  // max|W|, or null
  float* weight_max(const floatX* W, size_t elements) const {
    const auto known = weights.find(W);
    return known != weights.end() && known->second.first == elements ? known->second.second : nullptr;
  }
};
// Finds the maxima of weights that stay as they are until the next start().
inline void find_weight_maxima(Scalars& s, const std::vector<const floatX*>& W, const std::vector<size_t>& elements) {
  if (W.empty()) return;
  float* const amax = s.take((int)W.size());
  amax_of_arrays(amax, W.data(), elements.data(), (int)W.size());
  for (size_t i = 0; i < W.size(); i++) s.weights[W[i]] = {elements[i], amax + i};
}
// Does an operand made from a tensor take max|x| as it is?
inline bool takes_plain_max(const OperandRecipe& o) {
  return needs_amax(o) && o.format != Format::fp4_vector && !o.rht && o.source == Source::original;
}
// Scratch for the two quantized operands of the GEMM in flight.
struct LinearScratch {
  floatX* values[3] = {};                   // linear_scratch_elements(...) elements; the third linear_third_elements(...), or null
  uint32_t* tiles = nullptr;                // linear_tile_words(...): maxima of 16x16 tiles and other groups of blocks, pseudo-scales
  Scalars* scalars = nullptr;               // maxima of operands, and alphas
  float* rotated = nullptr;                 // linear_scratch_elements(...), if linear_needs_rotated(recipe): an operand before rounding, or a
                                            // gradient before un-rotation
  Fp4Ways ways;                             // what multiplies FP4 operands: the emulation, or FP4 tensor cores, which take them packed:
  uint8_t *codes[3] = {}, *scales[3] = {};  // elements/2 and elements/16 bytes; only where a way is native
  float* outer[3] = {};                     // elements/128
  // The same with these for its two operands.
  LinearScratch with_slots(int first, int second) const {
    LinearScratch s = *this;
    for (int i = 0; i < 2; i++) {
      const int from = i ? second : first;
      s.values[i] = values[from]; s.codes[i] = codes[from]; s.scales[i] = scales[from]; s.outer[i] = outer[from];
    }
    return s;
  }
};
// Elements that one quantized operand of a layer with these shapes may take, whatever the size of its rotation.
inline size_t linear_scratch_elements(int T, int K, int N) {
  const size_t t = round_up(T, 128), k = round_up(K, 128), n = round_up(N, 128);
  return max(max(t * k, t * n), n * k);
}
// Where both copies of dY are made at once, dY^T waits in the second slot: dgrad's W^T has a third of its own, small as weights are, and wgrad's X^T
// takes the first, which dgrad has left.
inline size_t linear_third_elements(int K, int N) { return (size_t)round_up(K, 128) * round_up(N, 128); }
inline bool linear_wants_third(const Recipe& r) { return pair_is_known(r.dgrad.dy, r.wgrad.dy); }
inline size_t linear_tile_words(int T, int K, int N) {
  T = round_up(T, 128), K = round_up(K, 128), N = round_up(N, 128);        // a rotated operand has whole groups of columns, and its transpose of rows
  return max(group_words(T, K), max(group_words(T, N) + group_words(N, T), group_words(N, K)));                   // both copies of dY may need them
}
// Does a gradient pass through FP32 scratch on its way (estimator.cuh), or do rotated weights (Q-EMA)?
inline bool linear_needs_rotated(const Recipe& r) {
  const bool rotated_forward = (r.fprop.x.format != Format::bf16 && r.fprop.x.rht) || (r.fprop.w.format != Format::bf16 && r.fprop.w.rht);
  return r.estimator.w != Estimator::ste || r.estimator.x != Estimator::ste || rotated_forward;
}

// What is added to X W^T before it is rounded: bias [N] and residual [T,N]; null: nothing. They are not free there: .135 ms a layer, 1.6 ms a step.
// A kernel of its own for the residual costs 2.5 ms a step, one fused with the norm that follows an estimated 1.8 (GPT-2 124M B64, H100).
// gelu_input [T,N]: takes that sum, and Y its GELU, which then must not lie where X does. null: Y is the sum.
struct LinearEpilogue { const floatX *bias = nullptr, *residual = nullptr; floatX* gelu_input = nullptr; };

// What the forward pass leaves for the backward pass of one layer: packed operands (xt: or values). Allocated with want_linear_saved(), but for
// their maxima, which are Scalars.
struct LinearSaved {
  Operand4 x, w;                            // of fprop, for double quantization
  Operand4 xt;                              // wgrad's X^T; not there: the backward pass quantizes it from X
  bool again = false;                       // --keep values: the backward pass fills x and w, from X and W. (Then all layers may share the memory.)
};
// How X waits for the backward pass: as codes; so, but X^T, where it is quantized as soon as X is there, as the values that wgrad's GEMM reads; X itself.
enum class Keep { codes, operands, values };
inline bool from_forward_pass(const OperandRecipe& o) { return o.format != Format::bf16 && o.source == Source::forward; }
inline bool uses_dge(const Recipe& r) {
  return r.estimator.w == Estimator::dge && r.fprop.w.format != Format::bf16 && r.fprop.w.format != Format::exact;
}
inline bool saves_x(const Recipe& r) { return from_forward_pass(r.wgrad.x) || r.estimator.x == Estimator::quest_mask; }
inline bool saves_w(const Recipe& r) { return from_forward_pass(r.dgrad.w) || r.estimator.w == Estimator::quest_mask || uses_dge(r); }
// Can X^T be quantized as soon as X is there, and wait packed?
inline bool can_save_xt(const Recipe& r) { return r.wgrad.x.format != Format::bf16 && r.wgrad.x.format != Format::exact && r.wgrad.x.source == Source::original; }
// Does the backward pass read X itself? Unless it has xt, or X in its FP4 form.
inline bool keeps_x(const Recipe& r) { return !from_forward_pass(r.wgrad.x); }
// Calls want(pointer to a pointer, number of elements) for each array that the recipe's LinearSaved needs. with_xt: also X^T, if the recipe can;
// in BF16 with xt_values, which is for the emulation: 16 bits an element, and nothing to unpack.
template <class Want> void want_linear_saved(LinearSaved& s, const Recipe& r, int T, int K, int N, Want want, bool with_xt = false, bool xt_values = false) {
  auto operand = [&](Operand4& o, const OperandRecipe& how, int rows, int cols, bool mask) {
    const PackedBytes b = packed_bytes(how, rows, cols, mask);
    if (b.codes) want(&o.codes, b.codes);
    if (b.scales) want(&o.scales, b.scales);
    if (b.values) want(&o.values, b.values / sizeof(floatX));
    if (b.outer) want(&o.outer, b.outer / sizeof(float));
    if (b.mask) want(&o.mask, b.mask / sizeof(uint32_t));
  };
  if (saves_x(r)) operand(s.x, r.fprop.x, T, K, r.estimator.x == Estimator::quest_mask);
  if (saves_w(r)) operand(s.w, r.fprop.w, N, K, r.estimator.w == Estimator::quest_mask);
  if (with_xt && can_save_xt(r) && xt_values) want(&s.xt.values, (size_t)K * operand_ld(rotated_cols(T, r.wgrad.x.rht)));
  else if (with_xt && can_save_xt(r)) operand(s.xt, r.wgrad.x, K, T, false);
}

// ------------------------------------------------------------------ operands
// An operand ready for the GEMM. amax: null where alpha takes no factor for it. data: null where it is packed. alpha: of the GEMM, if the kernel that
// made this operand writes it.
struct ReadyOperand {
  const floatX* data; int ld; bool transposed; const float* amax;
  OperandRecipe how;
  Operand4 packed;
  const float* alpha = nullptr;
  bool quantized() const { return how.format != Format::bf16; }
};

// How the GEMM of two such operands runs: on FP4 tensor cores where both are FP4 with the same scales and there is a way for these.
inline GemmWay fp4_way_of(const OperandRecipe& a, const OperandRecipe& b, const Fp4Ways& ways) {
  if (a.format != b.format || a.outer != b.outer) return GemmWay::emulated;
  if (a.format == Format::mxfp4) return ways.mx;
  if (a.format != Format::nvfp4) return GemmWay::emulated;
  return a.outer == Outer::b1x128 ? ways.outer : ways.plain;
}

// Which operand of which GEMM of which layer: what its random numbers depend on, and its place in the scratch memory; and how that GEMM runs.
struct OperandPlace {
  OperandIndex which, first;                // first: operand 1 of the same GEMM
  LinearKey key;
  GemmWay way;
  const ReadyOperand* other = nullptr;      // the GEMM's other operand, if its maximum is known: then the kernel that makes this one writes alpha
};
// out.amax is to be a scalar that was taken for this.
inline QuantizeHow quantize_how(const OperandRecipe& how, OperandPlace place, bool transpose, const LinearScratch& s) {
  const SignBits signs = rotation_signs(how, place.first, place.key);
  QuantizeHow q;
  q.recipe = how;
  q.transpose = transpose;
  q.sign_bits[0] = signs.word[0];
  q.sign_bits[1] = signs.word[1];
  q.key = operand_key(place.key, place.which);
  q.amax_is_zero = true;
  if (place.other) q.alpha = {s.scalars->take(), place.other->amax, place.other->how};
  return q;
}
inline ReadyOperand ready_operand(const Operand4& out, const QuantizeHow& q) {
  return {out.values, out.ld, false, amax_for_alpha(out, q.recipe), q.recipe, out, q.alpha.alpha};
}
// The frame of an operand from a source of [rows, cols], before transposition; its arrays are those of `save`, else of the scratch.
inline Operand4 operand_frame(const OperandRecipe& how, OperandPlace place, int rows, int cols, bool transpose, const LinearScratch& s,
                              const Operand4* save) {
  const int slot = place.which != place.first;
  Operand4 out = save ? *save : Operand4{};
  out.rows = transpose ? cols : rows;
  out.cols = transpose ? rows : cols;
  out.ld = operand_ld(rotated_cols(out.cols, how.rht));
  out.amax = s.scalars->take();
  if (place.way == GemmWay::emulated) {
    if (!out.values) out.values = s.values[slot];
  } else {                                                              // packed, and nothing else
    if (!out.codes) out.codes = s.codes[slot];
    if (!out.scales) out.scales = s.scales[slot];
    if (!out.outer && how.outer == Outer::b1x128) out.outer = s.outer[slot];
  }
  return out;
}
// x is [rows, cols] in memory; with `transpose` the operand is x^T. save: where its packed form is kept, or null. amax: if somebody found it already.
inline ReadyOperand prepare_operand(const OperandRecipe& how, OperandPlace place, const floatX* x, int rows, int cols, bool transpose,
                                    const LinearScratch& s, Operand4* save = nullptr, float* amax = nullptr) {
  if (how.format == Format::bf16) return {x, cols, transpose, nullptr, how, {}};
  Operand4 out = operand_frame(how, place, rows, cols, transpose, s, save);
  QuantizeHow q = quantize_how(how, place, transpose, s);
  if (amax) { out.amax = amax; q.amax_known = true; }
  quantize(out, x, q, s.tiles);
  if (save) { save->rows = out.rows; save->cols = rotated_cols(out.cols, how.rht); save->ld = out.ld; save->amax = out.amax; }
  return ready_operand(out, q);
}
// Double quantization: the transpose of what the forward pass computed with.
inline ReadyOperand prepare_forward_operand(const OperandRecipe& how, OperandPlace place, const Operand4& saved, const OperandRecipe& saved_how,
                                            const LinearScratch& s) {
  const Operand4 out = operand_frame(how, place, saved.rows, saved.cols, true, s, nullptr);
  const QuantizeHow q = quantize_how(how, place, true, s);
  quantize(out, saved, saved_how, q, s.tiles);
  return ready_operand(out, q);
}
// What waits, packed or as values, alone: x, or x^T, into the arrays of `save`.
inline void save_operand(const OperandRecipe& how, OperandPlace place, const floatX* x, int rows, int cols, bool transpose, const LinearScratch& s,
                         Operand4* save) {
  save->rows = transpose ? cols : rows;
  save->cols = transpose ? rows : cols;
  save->ld = operand_ld(rotated_cols(save->cols, how.rht));
  save->amax = s.scalars->take();
  quantize(*save, x, quantize_how(how, place, transpose, s), s.tiles);
  save->cols = rotated_cols(save->cols, how.rht);
}
// And what became of it: ready for FP4 tensor cores as it is; for the emulation, its values.
inline ReadyOperand saved_operand(const OperandRecipe& how, OperandPlace place, const Operand4& saved, const LinearScratch& s) {
  Operand4 out = saved;
  if (place.way == GemmWay::emulated && !out.values) {
    out.values = s.values[place.which != place.first];
    unpack_values(out, how);
  }
  return {out.values, out.ld, false, amax_for_alpha(saved, how), how, out};
}
inline OperandPlace xt_place(LinearKey key) { return {kWgradX, kWgradDy, key, GemmWay::emulated}; }
inline bool saves_xt(const Recipe& r, const LinearSaved* saved) { return saved && (saved->xt.codes || saved->xt.values) && can_save_xt(r); }
// X^T as it waits, and dY^T's place: where X^T waits, its maximum has been known for long, and it is dY^T that comes last.
inline ReadyOperand packed_xt(const Recipe& r, const LinearSaved* saved) {
  return saves_xt(r, saved) ? ReadyOperand{nullptr, saved->xt.ld, false, amax_for_alpha(saved->xt, r.wgrad.x), r.wgrad.x, saved->xt} : ReadyOperand{};
}
inline OperandPlace dyt_place(const Recipe& r, LinearKey key, const LinearScratch& s, const ReadyOperand& xt) {
  return {kWgradDy, kWgradDy, key, fp4_way_of(r.wgrad.dy, r.wgrad.x, s.ways), xt.quantized() ? &xt : nullptr};
}
inline void save_xt(const floatX* X, int T, int K, const Recipe& r, LinearKey key, const LinearScratch& s, LinearSaved* saved) {
  if (saves_xt(r, saved)) save_operand(r.wgrad.x, xt_place(key), X, T, K, true, s, &saved->xt);
}
// x [rows, cols] as it is and, packed into the arrays of `save`, x^T. amax: max|x|, of both, if somebody found it already.
inline ReadyOperand prepare_both(const OperandRecipe& how, OperandPlace place, const OperandRecipe& turned, OperandPlace turned_place,
                                 const floatX* x, int rows, int cols, const LinearScratch& s, Operand4* save, float* amax = nullptr) {
  Operand4 out = operand_frame(how, place, rows, cols, false, s, nullptr);
  save->rows = cols;
  save->cols = rows;
  save->ld = operand_ld(rotated_cols(rows, turned.rht));
  save->amax = s.scalars->take();
  QuantizeHow q = quantize_how(how, place, false, s), turned_q = quantize_how(turned, turned_place, true, s);
  if (amax) { out.amax = save->amax = amax; q.amax_known = turned_q.amax_known = true; }
  quantize_both(out, q, *save, turned_q, x, s.tiles);
  save->cols = rotated_cols(rows, turned.rht);
  return ready_operand(out, q);
}
// On FP4 tensor cores. K: without padding.
inline void run_gemm_fp4(const Gemm& g, int K, const ReadyOperand& a, const ReadyOperand& b, GemmWay way) {
  GemmFp4 f;
  f.M = g.M; f.N = g.N; f.K = K; f.lda = a.ld; f.ldb = b.ld; f.mx = a.how.format == Format::mxfp4;
  f.a_codes = a.packed.codes; f.a_scales = a.packed.scales; f.a_outer = a.how.outer == Outer::b1x128 ? a.packed.outer : nullptr;
  f.b_codes = b.packed.codes; f.b_scales = b.packed.scales; f.b_outer = b.how.outer == Outer::b1x128 ? b.packed.outer : nullptr;
  f.D = g.D; f.ldd = g.ldd; f.d_fp32 = g.d_fp32; f.alpha = g.alpha;
  const bool apart = way == GemmWay::cublaslt && (g.bias || g.C);          // the library's FP4 GEMM has no such epilogue
  if (!apart) { f.accumulate = g.accumulate; f.C = g.C; f.bias = g.bias; }
  gemm_fp4(f, way);
  if (apart) residual_forward((floatX*)g.D, (const floatX*)g.C, (const floatX*)g.D, g.bias, g.M, g.N);
}
// With g.gelu_input, rows are as long as N; g.C, if added, is given.
// (cuBLASLt's GELU is of the FP32 sum: on a GPU the steps of a GPT-2 through FP4 tensor cores equal the emulation's up to that rounding only.)
inline void run_gemm(Gemm g, const ReadyOperand& a, const ReadyOperand& b, const LinearScratch& s, GemmWay way) {
  const int K = rotated_cols(g.K, a.how.rht);
  g.A = a.data; g.lda = a.ld; g.a_transposed = a.transposed;
  g.B = b.data; g.ldb = b.ld; g.b_transposed = b.transposed;
  if (a.quantized() && b.quantized()) g.K = a.ld;          // the padding too: zeros, except in a last group that was rotated and is full
  if (a.amax || b.amax) {
    g.alpha = b.alpha ? b.alpha : a.alpha;
    if (!g.alpha) {
      float* const alpha = s.scalars->take();
      gemm_alpha(alpha, a.amax, b.amax, a.how, b.how);
      g.alpha = alpha;
    }
  }
  floatX* const activated = g.gelu_input && !(way == GemmWay::emulated && gemm_has_gelu(g)) ? (floatX*)g.D : nullptr;      // by a kernel of its own
  if (activated) { g.D = g.gelu_input; g.gelu_input = nullptr; }
  if (way == GemmWay::emulated) gemm(g); else run_gemm_fp4(g, K, a, b, way);
  if (activated) gelu_forward(activated, (const floatX*)g.D, (size_t)g.M * g.N);
}

// ------------------------------------------------------------------ the layer
// Is X^T quantized together with X?
inline bool makes_both(const Recipe& r, const LinearSaved* saved) { return saves_xt(r, saved) && !saves_x(r) && share_amax(r.fprop.x, r.wgrad.x); }
// Does linear_forward() want max|X| as it is, so that the kernel that writes X may find it?
inline bool wants_x_amax(const Recipe& r, const LinearSaved* saved) {
  return takes_plain_max(r.fprop.x) && (!makes_both(r, saved) || takes_plain_max(r.wgrad.x));
}
// Y = X W^T + bias + residual, or the GELU of that. saved: where the operands for the backward pass are kept; null without a backward pass.
// x_amax: max|X|, if somebody found it already; not read unless wants_x_amax(). rows_known: with a scale for each row of X, s.tiles holds the largest of
// each already.
inline void linear_forward(floatX* Y, const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key,
                           const LinearScratch& s, LinearSaved* saved = nullptr, LinearEpilogue add = {}, float* x_amax = nullptr, bool rows_known = false) {
  // Outlier control (outliers.cuh) works around this function: it hands in X clamped, or some columns of X and W, and adds the rest to Y.
  const GemmWay way = fp4_way_of(r.fprop.x, r.fprop.w, s.ways);
  const bool both = makes_both(r, saved);
  if (!wants_x_amax(r, saved)) x_amax = nullptr;
  if (rows_known) x_amax = s.scalars->take();                              // nothing to search for; a scale for each row has no use for this one
  const OperandPlace x_place = {kFpropX, kFpropX, key, way};
  const ReadyOperand x = both ? prepare_both(r.fprop.x, x_place, r.wgrad.x, xt_place(key), X, T, K, s, &saved->xt, x_amax)
                              : prepare_operand(r.fprop.x, x_place, X, T, K, false, s, saved && saves_x(r) ? &saved->x : nullptr, x_amax);
  const ReadyOperand w = prepare_operand(r.fprop.w, {kFpropW, kFpropX, key, way, &x}, W, N, K, false, s, saved && saves_w(r) ? &saved->w : nullptr,
                                         takes_plain_max(r.fprop.w) ? s.scalars->weight_max(W, (size_t)N * K) : nullptr);
  Gemm g;
  g.M = T; g.N = N; g.K = K; g.D = Y; g.ldd = N;
  g.bias = add.bias; g.C = add.residual; g.accumulate = add.residual != nullptr; g.gelu_input = add.gelu_input;
  run_gemm(g, x, w, s, way);
  if (!both) save_xt(X, T, K, r, key, s, saved);
}

// What linear_forward() with the same arguments saves of fprop's operands, without its GEMM: for a caller who would rather quantize X and W again
// than keep them packed. The same key gives the same random numbers, hence the same codes.
inline void linear_save(const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key, const LinearScratch& s,
                        LinearSaved* saved) {
  if (saves_x(r)) save_operand(r.fprop.x, {kFpropX, kFpropX, key, GemmWay::emulated}, X, T, K, false, s, &saved->x);
  if (saves_w(r)) save_operand(r.fprop.w, {kFpropW, kFpropX, key, GemmWay::emulated}, W, N, K, false, s, &saved->w);
}

// dY's amax (dy_amax), or its operand (ready), if somebody has it already.
// dX = dY W; or from the forward's rotated W: dX = (dY Wh * mask) H
inline void linear_dgrad(floatX* dX, const floatX* dY, const floatX* W, int T, int K, int N, const Recipe& r, LinearKey key,
                         const LinearScratch& s, const LinearSaved* saved = nullptr, float* dy_amax = nullptr, const ReadyOperand* ready = nullptr) {
  const bool doubled = from_forward_pass(r.dgrad.w), masked = r.estimator.x == Estimator::quest_mask;
  if ((doubled || masked) && !saved) die("linear_dgrad: recipe %s needs what the forward pass saved", r.name.c_str());
  const GemmWay way = fp4_way_of(r.dgrad.dy, r.dgrad.w, s.ways);
  const ReadyOperand dy = ready ? *ready : prepare_operand(r.dgrad.dy, {kDgradDy, kDgradDy, key, way}, dY, T, N, false, s, nullptr, dy_amax);
  const OperandPlace place = {kDgradW, kDgradDy, key, way, &dy};
  const ReadyOperand w = doubled ? prepare_forward_operand(r.dgrad.w, place, saved->w, r.fprop.w, s)
                                 : prepare_operand(r.dgrad.w, place, W, N, K, true, s, nullptr,
                                                   takes_plain_max(r.dgrad.w) ? s.scalars->weight_max(W, (size_t)N * K) : nullptr);
  const int rht = doubled ? r.fprop.w.rht : 0, width = rotated_cols(K, rht);
  Gemm g;
  g.M = T; g.N = width; g.K = N; g.D = dX; g.ldd = width;
  if (!rht && !masked) return run_gemm(g, dy, w, s, way);
  g.D = s.rotated; g.d_fp32 = true;
  run_gemm(g, dy, w, s, way);
  unrotate(dX, s.rotated, masked ? saved->x.mask : nullptr, saved->x.ld / 32, T, K, rht, rotation_signs(r.fprop.w, kFpropX, key), false);
}

// dW += dY^T X, in FP32; or from the forward's rotated X: dW += (dY^T Xh * mask) H; or dW += (dY^T X) * f'(W / scale), which needs W
inline void linear_wgrad(float* dW, const floatX* dY, const floatX* X, int T, int K, int N, const Recipe& r, LinearKey key,
                         const LinearScratch& s, const LinearSaved* saved = nullptr, const floatX* W = nullptr, float* dyt_amax = nullptr,
                         const ReadyOperand* ready = nullptr) {
  const bool doubled = from_forward_pass(r.wgrad.x), masked = r.estimator.w == Estimator::quest_mask, with_dge = uses_dge(r);
  if (((doubled || masked || with_dge) && !saved) || (with_dge && !W)) die("linear_wgrad: recipe %s needs what the forward pass saved", r.name.c_str());
  const GemmWay way = fp4_way_of(r.wgrad.dy, r.wgrad.x, s.ways);
  const ReadyOperand xt = packed_xt(r, saved);
  const ReadyOperand dy = ready ? *ready : prepare_operand(r.wgrad.dy, dyt_place(r, key, s, xt), dY, T, N, true, s, nullptr, dyt_amax);
  const OperandPlace place = {kWgradX, kWgradDy, key, way, &dy};
  const ReadyOperand x = doubled ? prepare_forward_operand(r.wgrad.x, place, saved->x, r.fprop.x, s)
                         : saves_xt(r, saved) ? saved_operand(r.wgrad.x, place, saved->xt, s)
                         : prepare_operand(r.wgrad.x, place, X, T, K, true, s);
  const int rht = doubled ? r.fprop.x.rht : 0, width = rotated_cols(K, rht);
  Gemm g;
  g.M = N; g.N = width; g.K = T; g.D = dW; g.ldd = width; g.d_fp32 = true; g.accumulate = true;
  if (!rht && !masked && !with_dge) return run_gemm(g, dy, x, s, way);
  g.D = s.rotated; g.accumulate = false;
  run_gemm(g, dy, x, s, way);
  if (with_dge) dge(dW, s.rotated, W, saved->w, r.fprop.w, r.dge_k, N, K);
  else unrotate(dW, s.rotated, masked ? saved->w.mask : nullptr, saved->w.ld / 32, N, K, rht, rotation_signs(r.fprop.x, kFpropX, key), true);
}

// Of dY and of dY^T, as they are rotated.
struct DyAmax { float *straight = nullptr, *turned = nullptr; };
inline DyAmax amax_of_dy(const floatX* dY, int T, int N, const Recipe& r, LinearKey key, const LinearScratch& s) {
  const DyAmax amax = {s.scalars->take(), s.scalars->take()};
  amax_of_both(amax.straight, amax.turned, dY, T, N, quantize_how(r.dgrad.dy, {kDgradDy, kDgradDy, key, GemmWay::emulated}, false, s),
               quantize_how(r.wgrad.dy, {kWgradDy, kWgradDy, key, GemmWay::emulated}, true, s));
  return amax;
}
// Both gradients; dX may be null (the first layer of a model that ends there). X may be null where keeps_x(r) is false, or saved has X^T.
// Where X was kept instead of its codes (saved->again), linear_save() comes first.
inline void linear_backward(floatX* dX, float* dW, const floatX* dY, const floatX* X, const floatX* W, int T, int K, int N, const Recipe& r,
                            LinearKey key, const LinearScratch& s, const LinearSaved* saved = nullptr) {
  if (dX && s.values[2] && linear_wants_third(r)) {            // both copies of dY at once
    const LinearScratch d = s.with_slots(0, 2), w = s.with_slots(1, 0);
    const OperandPlace straight = {kDgradDy, kDgradDy, key, fp4_way_of(r.dgrad.dy, r.dgrad.w, s.ways)};
    const ReadyOperand xt = packed_xt(r, saved);
    const OperandPlace turned = dyt_place(r, key, s, xt);
    const Operand4 dy = operand_frame(r.dgrad.dy, straight, T, N, false, d, nullptr), dyt = operand_frame(r.wgrad.dy, turned, T, N, true, w, nullptr);
    const QuantizeHow q = quantize_how(r.dgrad.dy, straight, false, s), qt = quantize_how(r.wgrad.dy, turned, true, s);
    quantize_both(dy, q, dyt, qt, dY, s.tiles);
    const ReadyOperand a = ready_operand(dy, q), b = ready_operand(dyt, qt);
    linear_dgrad(dX, dY, W, T, K, N, r, key, d, saved, nullptr, &a);
    return linear_wgrad(dW, dY, X, T, K, N, r, key, w, saved, W, nullptr, &b);
  }
  const DyAmax amax = dX && share_amax(r.dgrad.dy, r.wgrad.dy) ? amax_of_dy(dY, T, N, r, key, s) : DyAmax{};
  if (dX) linear_dgrad(dX, dY, W, T, K, N, r, key, s, saved, amax.straight);
  linear_wgrad(dW, dY, X, T, K, N, r, key, s, saved, W, amax.turned);
}
