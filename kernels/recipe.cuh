// kernels/recipe.cuh -- the table: every published FP4 training recipe is one row.
//
// A linear layer Y = X W^T runs three GEMMs, each with two operands. For each of the six operands a row says what it is; kernels do
// what the row says (quantize.cuh one operand, linear.cuh the layer), and no recipe has code of its own.
//
//             operand 1           operand 2          contraction
//     fprop   x    X   [T,K]      w    W   [N,K]     K      Y  = X W^T
//     dgrad   dy   dY  [T,N]      w    W^T [K,N]     N      dX = dY W
//     wgrad   dy   dY^T [N,T]     x    X^T [K,T]     T      dW = dY^T X
//
// THE WORDS OF AN OPERAND
// format     bf16        the tensor as it is; the other words are ignored
//            nvfp4       E2M1 codes, an E4M3 scale for 16 of them along the contraction axis, and an outer FP32 scale
//            mxfp4       E2M1 codes, a power of two (E8M0) for 32 of them. No outer scale
//            fp4_vector  E2M1 codes, one FP32 scale for each row of the operand
//            fp8_e4m3, fp8_e5m2   one FP32 scale a tensor
//            mxfp8       E4M3 codes, a power of two for 32 of them, rounded up
//            exact       no quantization; gathered and rotated like the others, stored as floatX. For tests: it shows whether rotations cancel
// blocks     1x16        16 consecutive elements of the contraction axis share a scale (mxfp4, mxfp8: always 1x32)
//            16x16       so does a square tile: then W and W^T hold the same codes, and the backward pass differentiates the very
//                        weights that the forward pass used. Costs accuracy: error 12.4e-3 instead of 9.05e-3 on Gaussians
// outer      tensor      nvfp4: one FP32 scale a tensor, which the GEMM applies through alpha
//            1x128       one for 128 elements of a row. Tensor cores do not know it; the emulation multiplies it into the BF16 value
// rounding   nearest     smallest error of a single tensor
//            stochastic  unbiased: the errors of independent gradients average out. Twice the error of a single tensor
//            eden16, eden128   MS-EDEN: codes to nearest, then the block scale is corrected for the bias (once for 16 elements, or for 128)
//                        and is itself rounded stochastically. Unbiased after a random rotation, with half of SR's error
// scale      how a block's scale follows from its data
//            standard    nvfp4: largest element -> 6, E4M3 to nearest. About half of the blocks clip a little, up to 6.375 -> 6
//            ceil        nvfp4: E4M3 rounded up; mxfp4: smallest power of two that does not clip. SR is unbiased only where nothing clips
//            headroom    nvfp4: largest element -> 6 * 16/17, so that an E4M3 to nearest never clips either
//            post_hoc    nvfp4 with eden16, eden128: scales of any range first, from which the tensor's follows: no search for max|x| before ("post hoc
//                        range alignment"). `standard` is the paper's Algorithm 1, in which the tensor's scale comes first
//            four_six    nvfp4: largest -> 6 or -> 4, whichever leaves the smaller squared error ("4/6"). Biased under SR, pointless under RHT
//            ocp         mxfp4: exponent floor(log2 max) - 2, from the OCP standard; clips what is above 6
//            quest_floor, quest_nearest   mxfp4: from the standard deviation, 2.92 sigma -> 6; the exponent rounded down, or to nearest
//            range34     mxfp4: largest element -> between 3 and 6 by the factor 3/4: never clips
// rht        0, 16, 32, 64, 128   random Hadamard transform of groups of so many along the contraction axis, before quantization. It spreads
//                        outliers. Both operands of a GEMM must have the same, for the rotation to cancel
// signs      of the RHT: none (a plain Hadamard transform), fixed (one vector for ever; with rht 16 NVIDIA's, and the rotated value rounded to
//                        BF16 as NVIDIA does), fresh (new for each GEMM of each layer of each step)
// source     original    quantized from the BF16 tensor
//            forward     from the value that the forward pass used (double quantization): the BF16 tensor need not be kept, 4.5 bits an element
//                        do; and the gradient is that of the function that the forward pass computed. Only for dgrad.w and wgrad.x
//
// THE WORDS OF A ROW
// estimator.w, estimator.x   of the gradient through the quantizer. ste: as if it were not there. quest_mask: 0 where |v| >= 6, that is, where
//                        the forward clipped. dge (weights): times the slope of a smooth approximation of the grid's staircase, exponent dge_k
// bf16_last              share of the transformer blocks, counted from the output, that stay in BF16
// outliers, occ          outlier control (outliers.cuh), and the quantile at which `occ` clamps; oscillation: of weights (oscillation.cuh)
//
// WHERE THE PAPERS DISAGREE
// Unbiased gradients: all need them, at the price of SR on dY (NVIDIA, fqt), on all four backward operands (TetraJet), or by MS-EDEN (Quartet II);
// quartet-v4 went back to nearest. Which weights the backward uses: the same codes (16x16 tiles, paid for in the forward), the forward's
// codes quantized once more, or simply fresh ones (fqt). Whether to rotate: NVIDIA only wgrad, Quartet II all of the backward,
// fqt nothing. Where the loss is lost: Quartet II measures it mostly in the forward (hence 4/6), TetraJet-v2 in oscillating weights and in
// outliers, NVIDIA in the last blocks (hence a BF16 tail). scripts/compare_recipes.sh lets you measure it yourself.
//
// Never quantized: embedding, lm_head, norms, RoPE, attention, softmax, loss, the residual stream. Master weights, weight gradients across
// micro-batches and Adam moments are FP32. A new recipe is a new row; a new idea is a new word, and its line in quantize.cuh.
#pragma once
#include <cstring>
#include <string>
#include <utility>
#include <vector>
#include "cuda.cuh"

enum class Format { bf16, nvfp4, mxfp4, fp4_vector, fp8_e4m3, fp8_e5m2, mxfp8, exact };
enum class Blocks { b1x16, b16x16 };
enum class Outer { tensor, b1x128 };
enum class Rounding { nearest, stochastic, eden16, eden128 };
enum class ScaleRule { standard, ceil, four_six, ocp, quest_floor, quest_nearest, range34, headroom, post_hoc };
enum class Signs { none, fixed, fresh };
enum class Source { original, forward };
enum class Estimator { ste, quest_mask, dge };

struct OperandRecipe {
  Format format = Format::bf16;
  Blocks blocks = Blocks::b1x16;
  Outer outer = Outer::tensor;
  Rounding rounding = Rounding::nearest;
  ScaleRule scale = ScaleRule::standard;
  int rht = 0;
  Signs signs = Signs::none;
  Source source = Source::original;
};
struct Recipe {
  std::string name, source;               // source: paper and version; and what differs from the authors' code
  struct { OperandRecipe x, w; } fprop;
  struct { OperandRecipe dy, w; } dgrad;
  struct { OperandRecipe dy, x; } wgrad;
  struct { Estimator w = Estimator::ste, x = Estimator::ste; } estimator;
  float dge_k = 5;
  float bf16_last = 0;                    // share of the blocks
  std::string outliers = "none", oscillation = "none";
  float occ = 0.99f;                      // only with outliers = occ
  bool quantizes() const;                 // is any operand not BF16?
};

// ------------------------------------------------------------------ the table
// An operand with some of its words changed, so that a row below can be read aloud.
inline OperandRecipe rotated(OperandRecipe o, int rht, Signs signs) { o.rht = rht; o.signs = signs; return o; }
inline OperandRecipe from_forward(OperandRecipe o) { o.source = Source::forward; return o; }
inline OperandRecipe scaled(OperandRecipe o, ScaleRule scale) { o.scale = scale; return o; }
inline OperandRecipe stochastic(OperandRecipe o) { o.rounding = Rounding::stochastic; return o; }

inline std::vector<Recipe> recipe_table() {
  OperandRecipe fp4, tile, outer128, eden, mxfp4, row_wise, e4m3, e5m2;
  fp4.format = tile.format = outer128.format = eden.format = Format::nvfp4;
  tile.blocks = Blocks::b16x16;
  outer128.outer = Outer::b1x128;
  eden.rounding = Rounding::eden16;
  mxfp4.format = Format::mxfp4;
  row_wise.format = Format::fp4_vector;
  e4m3.format = Format::fp8_e4m3;
  e5m2.format = Format::fp8_e5m2;
  std::vector<Recipe> table;
  auto row = [&](const char* name, const char* source) -> Recipe& {
    table.push_back({});
    table.back().name = name;
    table.back().source = source;
    return table.back();
  };

  row("bf16", "baseline: BF16 operands, FP32 sums");
  {
    Recipe& r = row("fp8", "baseline: E4M3 forward, E5M2 gradients, per-tensor current scaling (arXiv 2209.05433)");
    r.fprop = {e4m3, e4m3};
    r.dgrad = {e5m2, e4m3};
    r.wgrad = {e5m2, e4m3};
  }
  {
    // The authors' library (TransformerEngine) has the same words. Its hardware SR on B200 uses other random bits.
    Recipe& r = row("nvfp4", "NVIDIA, arXiv 2509.25149; random bits are ours, otherwise as released");
    r.fprop = {fp4, tile};
    r.dgrad = {stochastic(fp4), tile};
    r.wgrad = {rotated(stochastic(fp4), 16, Signs::fixed), rotated(fp4, 16, Signs::fixed)};
    r.bf16_last = 0.15f;
  }
  {
    // 4/6 on the weights only: it is biased under SR and useless after a rotation. In tiles: one choice for 16x16 elements.
    Recipe& r = row("nvfp4-46", "nvfp4 with four-over-six (Cook et al., arXiv 2512.02010) on W");
    r.fprop = {fp4, scaled(tile, ScaleRule::four_six)};
    r.dgrad = {stochastic(fp4), scaled(tile, ScaleRule::four_six)};
    r.wgrad = {rotated(stochastic(fp4), 16, Signs::fixed), rotated(fp4, 16, Signs::fixed)};
    r.bf16_last = 0.15f;
  }
  {
    // Block scales to nearest, as released: SR then has a gain of .9974; --set scale=ceil makes it truly unbiased. OsciReset and OutControl,
    // parts of the paper's full recipe, are options: --oscillation osci-reset, --outliers outcontrol.
    Recipe& r = row("tetrajet2", "TetraJet-v2, arXiv 2510.27527, base recipe; an E4M3 scale of 0 becomes 2^-9");
    const OperandRecipe back = rotated(stochastic(outer128), 16, Signs::fresh);
    r.fprop = {outer128, outer128};
    r.dgrad = {back, from_forward(back)};
    r.wgrad = {back, from_forward(back)};
  }
  {
    // The paper draws one set of 128 signs for a backward call; here dgrad and wgrad draw their own. K, N, T need not be multiples of 128:
    // the contraction axis is filled up with zeros. One released path corrects per 128: --set dgrad.rounding=eden128 --set wgrad.rounding=eden128.
    // Scales are found as by the authors' kernels (section 7); Algorithm 1 to the letter: --set dgrad.scale=standard --set wgrad.scale=standard.
    Recipe& r = row("quartet2", "Quartet II, arXiv 2601.22813; signs for each GEMM, correction per 16");
    const OperandRecipe back = rotated(scaled(eden, ScaleRule::post_hoc), 128, Signs::fresh), forward = scaled(fp4, ScaleRule::four_six);
    r.fprop = {forward, forward};
    r.dgrad = {back, from_forward(back)};
    r.wgrad = {back, from_forward(back)};
  }
  {
    // What won in our own comparison (README, dev/results; with scale=standard): gap to bf16 .025 +- .002 of three seeds, quartet2's .037 +- .002. Part by part, with one
    // seed and so within the noise: .034 with quartet2 alone, .027 with OutControl, .024 with the last blocks in BF16 as well. OsciReset, an option,
    // gained .001 to .002; quantizing W and X afresh in the backward pass lost .003.
    Recipe& r = row("best", "ours: quartet2 with TetraJet-v2's OutControl and NVIDIA's last blocks in BF16; the ablation is in dev/results");
    const OperandRecipe back = rotated(scaled(eden, ScaleRule::post_hoc), 128, Signs::fresh), forward = scaled(fp4, ScaleRule::four_six);
    r.fprop = {forward, forward};
    r.dgrad = {back, from_forward(back)};
    r.wgrad = {back, from_forward(back)};
    r.bf16_last = 0.15f;
    r.outliers = "outcontrol";
  }
  for (const bool v4 : {false, true}) {
    // The released code rounds the exponent down (--set fprop.scale=quest_floor); only nearest gives the paper's own error of 1.32e-2.
    Recipe& r = v4 ? row("quartet-v4", "Quartet, arXiv 2505.14669 v4 (January 2026): backward to nearest; exponent to nearest, released code: floor")
                   : row("quartet", "Quartet, arXiv 2505.14669 (May 2025): backward SR; exponent to nearest, released code: floor");
    const OperandRecipe forward = rotated(scaled(mxfp4, ScaleRule::quest_nearest), 32, Signs::none);
    const OperandRecipe nearest = rotated(scaled(mxfp4, ScaleRule::range34), 32, Signs::fresh);
    const OperandRecipe back = v4 ? nearest : stochastic(nearest);
    r.fprop = {forward, forward};
    r.dgrad = {back, from_forward(back)};
    r.wgrad = {back, from_forward(back)};
    r.estimator = {Estimator::quest_mask, Estimator::quest_mask};
  }
  {
    // The backward is FP8 from the original tensors: with the residual of OCC the forward's X is nearly the original. Adam's 8-bit m is an
    // option of the optimizer.
    Recipe& r = row("fp4-dge", "Wang et al., arXiv 2501.17116: DGE, OCC; FP8 backward from the original X and W");
    r.fprop = {row_wise, row_wise};
    r.dgrad = {e5m2, e4m3};
    r.wgrad = {e5m2, e4m3};
    r.estimator.w = Estimator::dge;
    r.outliers = "occ";
  }
  {
    // The phase of quantization-aware fine-tuning at the end is --bf16-from .. --bf16-what backward.
    Recipe& r = row("fqt", "FP4 All the Way, arXiv 2505.19115; without its final phase in BF16, which is an option");
    r.fprop = {fp4, fp4};
    r.dgrad = {stochastic(fp4), fp4};
    r.wgrad = {stochastic(fp4), stochastic(fp4)};
  }
  {
    // Q-EMA and Q-Ramping are options: --oscillation q-ema, q-ramping.
    Recipe& r = row("tetrajet", "TetraJet, arXiv 2502.20853, base recipe");
    const OperandRecipe forward = scaled(mxfp4, ScaleRule::ceil), back = stochastic(forward);
    r.fprop = {forward, forward};
    r.dgrad = {back, from_forward(back)};
    r.wgrad = {back, from_forward(back)};
  }
  return table;
}

// The fixed sign vector of NVIDIA's RHT: bit i set means input i is negated.
constexpr uint32_t kFixedSigns = 0xD7E8;

// ------------------------------------------------------------------ a row as text: --list-recipes and --set
using Words = std::vector<std::string>;
// Calls f(field, value, words, allowed) for every enumerated word of an operand; value is a reference, words[i] the name of value i.
template <class Operand, class F> void for_each_word(Operand& o, F f) {
  static const Words formats = {"bf16", "nvfp4", "mxfp4", "fp4_vector", "fp8_e4m3", "fp8_e5m2", "mxfp8", "exact"};
  static const Words scales = {"standard", "ceil", "four_six", "ocp", "quest_floor", "quest_nearest", "range34", "headroom", "post_hoc"};
  static const Words blocks = {"1x16", "16x16"}, outers = {"tensor", "1x128"}, roundings = {"nearest", "stochastic", "eden16", "eden128"};
  static const Words signs = {"none", "fixed", "fresh"}, sources = {"original", "forward"};
  f("format", o.format, formats);
  f("blocks", o.blocks, blocks);
  f("outer", o.outer, outers);
  f("rounding", o.rounding, roundings);
  f("scale", o.scale, scales);
  f("signs", o.signs, signs);
  f("source", o.source, sources);
}
inline const Words& rht_words() { static const Words w = {"0", "16", "32", "64", "128"}; return w; }
inline const Words& estimator_words() { static const Words w = {"ste", "quest_mask", "dge"}; return w; }
inline const Words& outlier_words() { static const Words w = {"none", "outcontrol", "occ"}; return w; }
inline const Words& oscillation_words() { static const Words w = {"none", "osci-reset", "q-ema", "q-ramping"}; return w; }
inline std::string joined(const Words& words) {
  std::string all;
  for (const std::string& w : words) all += (all.empty() ? "" : ", ") + w;
  return all;
}
inline int word_index(const Words& words, const std::string& word) {        // -1 if it is not there
  for (size_t i = 0; i < words.size(); i++) if (words[i] == word) return (int)i;
  return -1;
}
template <class E> const std::string& word_of(const Words& words, E value) { return words[(size_t)value]; }

struct RecipeField {
  std::string name;                       // "dgrad.dy.rounding"
  std::string value;
  std::string allowed;                    // for messages
};
inline std::vector<std::pair<std::string, OperandRecipe*>> recipe_operands(Recipe& r) {
  return {{"fprop.x", &r.fprop.x}, {"fprop.w", &r.fprop.w}, {"dgrad.dy", &r.dgrad.dy},
          {"dgrad.w", &r.dgrad.w}, {"wgrad.dy", &r.wgrad.dy}, {"wgrad.x", &r.wgrad.x}};
}
inline bool Recipe::quantizes() const {
  Recipe copy = *this;
  for (auto& [name, o] : recipe_operands(copy)) if (o->format != Format::bf16) return true;
  return false;
}
inline std::vector<RecipeField> recipe_fields(Recipe r) {
  std::vector<RecipeField> all;
  auto number = [](float v) { char s[32]; snprintf(s, sizeof s, "%g", v); return std::string(s); };
  for (auto& [name, o] : recipe_operands(r)) {
    const std::string operand = name, rht = std::to_string(o->rht);
    for_each_word(*o, [&](const char* field, auto value, const Words& words) {
      if (!strcmp(field, "signs")) all.push_back({operand + ".rht", rht, joined(rht_words())});     // before signs, which setting rht may change
      all.push_back({operand + "." + field, word_of(words, value), joined(words)});
    });
  }
  all.push_back({"estimator.w", word_of(estimator_words(), r.estimator.w), joined(estimator_words())});
  all.push_back({"estimator.x", word_of(estimator_words(), r.estimator.x), "ste, quest_mask"});
  all.push_back({"dge_k", number(r.dge_k), "a number from 1 to 100"});
  all.push_back({"bf16_last", number(r.bf16_last), "a share from 0 to 1"});
  all.push_back({"outliers", r.outliers, joined(outlier_words())});
  all.push_back({"occ", number(r.occ), "a quantile above 0.5, up to 1"});
  all.push_back({"oscillation", r.oscillation, joined(oscillation_words())});
  return all;
}

// Sets one word of one operand. Returns whether the operand has such a field; *allowed: what the field takes, if not this value.
inline bool operand_set(OperandRecipe& o, const std::string& field, const std::string& value, std::string* allowed) {
  bool found = false;
  for_each_word(o, [&](const char* name, auto& at, const Words& words) {
    if (field != name) return;
    found = true;
    const int i = word_index(words, value);
    if (i < 0) *allowed = joined(words);
    else at = (std::remove_reference_t<decltype(at)>)i;
  });
  if (field == "rht") {
    found = true;
    if (word_index(rht_words(), value) < 0) { *allowed = joined(rht_words()); return true; }
    if (o.rht == 0 && o.signs == Signs::none) o.signs = Signs::fixed;     // a new rotation has signs, unless a later signs=none says otherwise
    o.rht = atoi(value.c_str());
    if (o.rht == 0) o.signs = Signs::none;
  }
  return found;
}
// Sets one field from "name=value". Without an operand ("outer=tensor", "wgrad.rht=16") it sets that word of all quantized operands (of that GEMM).
// Returns an empty string, or what is wrong and what is allowed.
inline std::string recipe_set(Recipe& r, const std::string& assignment) {
  const size_t eq = assignment.find('=');
  if (eq == std::string::npos) return "'" + assignment + "' is not of the form field=value";
  const std::string name = assignment.substr(0, eq), value = assignment.substr(eq + 1);
  auto refuse = [&](const std::string& allowed) { return "field " + name + " does not take '" + value + "'; allowed: " + allowed; };
  auto set_number = [&](float* to, bool (*good)(float), const char* allowed) -> std::string {
    char* end;
    const float f = strtof(value.c_str(), &end);
    if (value.empty() || *end || !good(f)) return refuse(allowed);
    *to = f;
    return "";
  };
  auto set_estimator = [&](Estimator* to, int count) -> std::string {
    const int i = word_index(estimator_words(), value);
    if (i < 0 || i >= count) return refuse(count == 3 ? joined(estimator_words()) : "ste, quest_mask");
    *to = (Estimator)i;
    return "";
  };
  auto set_name = [&](std::string* to, const Words& words) -> std::string {
    if (word_index(words, value) < 0) return refuse(joined(words));
    *to = value;
    return "";
  };
  if (name == "bf16_last") return set_number(&r.bf16_last, [](float f) { return f >= 0 && f <= 1; }, "a share from 0 to 1");
  if (name == "dge_k") return set_number(&r.dge_k, [](float f) { return f >= 1 && f <= 100; }, "a number from 1 to 100");
  if (name == "occ") return set_number(&r.occ, [](float f) { return f > 0.5f && f <= 1; }, "a quantile above 0.5, up to 1");
  if (name == "estimator.w") return set_estimator(&r.estimator.w, 3);
  if (name == "estimator.x") return set_estimator(&r.estimator.x, 2);
  if (name == "outliers") return set_name(&r.outliers, outlier_words());
  if (name == "oscillation") return set_name(&r.oscillation, oscillation_words());
  bool found = false;
  std::string allowed;
  for (auto& [operand, o] : recipe_operands(r)) {
    const std::string gemm = operand.substr(0, 5);
    const bool all = name.find('.') == std::string::npos, whole_gemm = name.rfind(gemm + ".", 0) == 0 && name.find('.', 6) == std::string::npos;
    if (name.rfind(operand + ".", 0) == 0) found |= operand_set(*o, name.substr(operand.size() + 1), value, &allowed);
    else if (all || whole_gemm) {
      const std::string field = all ? name : name.substr(6);
      OperandRecipe ignored;                                          // an operand in BF16 stays what it is, but the field is looked up
      found |= operand_set(o->format == Format::bf16 && field != "format" ? ignored : *o, field, value, &allowed);
    }
  }
  if (!allowed.empty()) return refuse(allowed);
  if (found) return "";
  std::string fields;
  for (const RecipeField& f : recipe_fields(r)) fields += (fields.empty() ? "" : " ") + f.name;
  return "there is no field '" + name + "'; fields: " + fields;
}

// ------------------------------------------------------------------ rows that cannot be computed
// What is wrong with one operand: empty if it is sound.
inline std::string operand_problem(const OperandRecipe& o, bool backward_copy) {
  using F = Format; using R = ScaleRule;
  const F f = o.format;
  if (f == F::bf16) return "";
  const bool eden = o.rounding == Rounding::eden16 || o.rounding == Rounding::eden128, mx4 = f == F::mxfp4;
  const bool nv_rule = o.scale == R::ceil || o.scale == R::four_six || o.scale == R::headroom || o.scale == R::post_hoc;
  const bool mx_rule = o.scale == R::ceil || (o.scale >= R::ocp && o.scale <= R::range34);
  if (f == F::nvfp4 && !(o.scale == R::standard || nv_rule)) return "format nvfp4 takes scale standard, ceil, four_six, headroom or post_hoc";
  if (mx4 && !mx_rule) return "format mxfp4 takes scale ocp, ceil, quest_floor, quest_nearest or range34";
  if (f != F::nvfp4 && !mx4 && f != F::exact && o.scale != R::standard) return "this format takes scale standard only";
  if (f != F::nvfp4 && f != F::exact && o.blocks != Blocks::b1x16) return "blocks 16x16 belong to nvfp4";
  if (f != F::nvfp4 && f != F::exact && o.outer != Outer::tensor) return "outer 1x128 belongs to nvfp4";
  if (f != F::nvfp4 && f != F::exact && eden) return "rounding eden16 and eden128 belong to nvfp4";
  if (o.blocks == Blocks::b16x16 && (o.outer != Outer::tensor || eden)) return "blocks 16x16 go with outer tensor, and rounding nearest or stochastic";
  if (o.blocks == Blocks::b16x16 && o.rht > 16) return "blocks 16x16 go with rht 0 or 16";
  if (eden && (o.outer != Outer::tensor || (o.scale != R::standard && o.scale != R::post_hoc)))
    return "rounding eden16 and eden128 go with outer tensor and scale standard or post_hoc";
  if (o.scale == R::post_hoc && !eden) return "scale post_hoc goes with rounding eden16 or eden128";
  if ((f == F::fp8_e4m3 || f == F::fp8_e5m2 || f == F::mxfp8) && o.rounding != Rounding::nearest) return "FP8 is rounded to nearest only";
  if (o.source == Source::forward && !backward_copy) return "source forward is for dgrad.w and wgrad.x: the others are not operands of the forward pass";
  return "";
}
// What is wrong with a row: empty if it is sound.
inline std::string recipe_problem(Recipe& r) {
  for (auto& [name, o] : recipe_operands(r)) {
    const std::string problem = operand_problem(*o, o == &r.dgrad.w || o == &r.wgrad.x);
    if (!problem.empty()) return name + ": " + problem;
  }
  const std::pair<const char*, std::pair<OperandRecipe*, OperandRecipe*>> gemms[] = {
      {"fprop", {&r.fprop.x, &r.fprop.w}}, {"dgrad", {&r.dgrad.dy, &r.dgrad.w}}, {"wgrad", {&r.wgrad.dy, &r.wgrad.x}}};
  for (auto& [gemm, o] : gemms) {
    auto size = [](const OperandRecipe* p) { return p->format == Format::bf16 ? 0 : p->rht; };
    if (size(o.first) != size(o.second))
      return std::string(gemm) + ": both operands need the same rht (a rotation cancels only against itself); have " + std::to_string(size(o.first)) + " and " +
             std::to_string(size(o.second));
    if (size(o.first) && o.first->signs != o.second->signs) return std::string(gemm) + ": both operands need the same signs";
  }
  auto doubled = [](const OperandRecipe& o) { return o.format != Format::bf16 && o.source == Source::forward; };
  auto quest = [](const OperandRecipe& o) {
    return o.format == Format::exact || (o.format == Format::mxfp4 && (o.scale == ScaleRule::quest_floor || o.scale == ScaleRule::quest_nearest));
  };
  if (doubled(r.dgrad.w) && r.fprop.w.format == Format::bf16) return "dgrad.w: source forward needs a quantized fprop.w";
  if (doubled(r.wgrad.x) && r.fprop.x.format == Format::bf16) return "wgrad.x: source forward needs a quantized fprop.x";
  // The mask of X belongs to fprop's (rotated) coordinates, in which dX comes out only if W^T is the forward's; likewise for dW.
  if (r.estimator.x == Estimator::quest_mask && !(quest(r.fprop.x) && doubled(r.dgrad.w)))
    return "estimator.x quest_mask needs fprop.x.scale quest_floor or quest_nearest, and dgrad.w.source forward";
  if (r.estimator.w == Estimator::quest_mask && !(quest(r.fprop.w) && doubled(r.wgrad.x)))
    return "estimator.w quest_mask needs fprop.w.scale quest_floor or quest_nearest, and wgrad.x.source forward";
  if (r.estimator.w == Estimator::dge && r.fprop.w.rht && r.fprop.w.format != Format::bf16) return "estimator.w dge goes with fprop.w.rht 0";
  return "";
}

// One word an operand, for the table: "NVFP4 1x16/128 SR RHT16* 2x"
inline std::string operand_word(const OperandRecipe& o) {
  static const char* formats[] = {"BF16", "NVFP4", "MXFP4", "FP4-row", "E4M3", "E5M2", "MXFP8", "exact"};
  static const char* rules[] = {"", " ceil", " 4/6", " ocp", " quest-floor", " quest", " 3/4", " 16/17", " post-hoc"};
  static const char* roundings[] = {" RN", " SR", " EDEN", " EDEN128"};
  if (o.format == Format::bf16) return "bf16";
  std::string w = formats[(int)o.format];
  if (o.format == Format::nvfp4) w += std::string(o.blocks == Blocks::b16x16 ? " 16x16" : " 1x16") + (o.outer == Outer::b1x128 ? "/128" : "");
  const bool fp4 = o.format == Format::nvfp4 || o.format == Format::mxfp4 || o.format == Format::fp4_vector;
  w += std::string(fp4 ? rules[(int)o.scale] : "") + (fp4 ? roundings[(int)o.rounding] : "");
  if (o.rht) w += (o.signs == Signs::none ? " H" : " RHT") + std::to_string(o.rht) + (o.signs == Signs::fresh ? "*" : "");
  return w + (o.source == Source::forward ? " 2x" : "");
}
