// kernels/recipe.cuh -- the table: every FP4 training recipe is one row.
//
// A linear layer Y = X W^T runs three GEMMs, each with two operands. For each of the six operands a row says what it is:
//
//             operand 1           operand 2          contraction
//     fprop   x    X   [T,K]      w    W   [N,K]     K      Y  = X W^T
//     dgrad   dy   dY  [T,N]      w    W^T [K,N]     N      dX = dY W
//     wgrad   dy   dY^T [N,T]     x    X^T [K,T]     T      dW = dY^T X
//
// format     bf16     the tensor as it is
//            nvfp4    E2M1 codes, an E4M3 scale for each block along the contraction axis, one FP32 scale a tensor (quantize.cuh)
// blocks     1x16     16 consecutive elements of the contraction axis share a scale
//            16x16    so does a square tile: then W and W^T get the same codes, and the backward pass differentiates the same
//                     weights that the forward pass used. Costs accuracy (error 12.4e-3 instead of 9.05e-3 on Gaussians)
// rounding   nearest  smallest error
//            stochastic  unbiased: errors of independent gradients average out. Twice the error of a single tensor
// rht        0 or 16  random Hadamard transform along the contraction axis before quantization. Both operands of a GEMM must have
//                     the same, for the rotation to cancel
//
// Then bf16_last: the share of transformer blocks, counted from the output, that stay in BF16. Embedding, lm_head, norms, RoPE,
// attention, loss and the residual stream are never quantized; master weights, weight gradients and Adam moments are FP32.
#pragma once
#include <cstring>
#include <string>
#include <vector>
#include "cuda.cuh"

enum class Format { bf16, nvfp4 };
enum class Blocks { b1x16, b16x16 };
enum class Rounding { nearest, stochastic };

struct OperandRecipe {
  Format format = Format::bf16;
  Blocks blocks = Blocks::b1x16;
  Rounding rounding = Rounding::nearest;
  int rht = 0;
};
struct Recipe {
  std::string name, source;
  struct { OperandRecipe x, w; } fprop;
  struct { OperandRecipe dy, w; } dgrad;
  struct { OperandRecipe dy, x; } wgrad;
  float bf16_last = 0;                    // share of the blocks
  bool quantizes() const;                 // is any operand not BF16?
};

inline std::vector<Recipe> recipe_table() {
  using F = Format; using B = Blocks; using R = Rounding;
  const OperandRecipe bf16 = {};
  const OperandRecipe rn = {F::nvfp4, B::b1x16, R::nearest, 0}, tile = {F::nvfp4, B::b16x16, R::nearest, 0}, sr = {F::nvfp4, B::b1x16, R::stochastic, 0};
  const OperandRecipe rn_rht = {F::nvfp4, B::b1x16, R::nearest, 16}, sr_rht = {F::nvfp4, B::b1x16, R::stochastic, 16};
  return {
    // name     source                                    fprop: x, w    dgrad: dy, w   wgrad: dy, x       BF16 tail
    {"bf16",  "baseline: BF16 operands, FP32 sums",     {bf16, bf16},  {bf16, bf16},  {bf16, bf16},      0},
    {"nvfp4", "NVIDIA, arXiv 2509.25149",               {rn, tile},    {sr, tile},    {sr_rht, rn_rht},  0.15f},
  };
}

// The one fixed sign vector of NVIDIA's RHT: bit i set means input i is negated.
constexpr uint32_t kFixedSigns = 0xD7E8;

// ------------------------------------------------------------------ a row as text: --list-recipes and --set
struct RecipeField {
  std::string name;                       // "dgrad.dy.rounding"
  std::string value;
  std::string allowed;                    // for messages
};
inline std::vector<std::pair<std::string, OperandRecipe*>> recipe_operands(Recipe& r) {
  return {{"fprop.x", &r.fprop.x}, {"fprop.w", &r.fprop.w}, {"dgrad.dy", &r.dgrad.dy}, {"dgrad.w", &r.dgrad.w}, {"wgrad.dy", &r.wgrad.dy}, {"wgrad.x", &r.wgrad.x}};
}
inline bool Recipe::quantizes() const {
  Recipe copy = *this;
  for (auto& [name, o] : recipe_operands(copy)) if (o->format != Format::bf16) return true;
  return false;
}
inline std::vector<RecipeField> recipe_fields(Recipe r) {
  std::vector<RecipeField> all;
  for (auto& [name, o] : recipe_operands(r)) {
    all.push_back({name + ".format", o->format == Format::bf16 ? "bf16" : "nvfp4", "bf16, nvfp4"});
    all.push_back({name + ".blocks", o->blocks == Blocks::b1x16 ? "1x16" : "16x16", "1x16, 16x16"});
    all.push_back({name + ".rounding", o->rounding == Rounding::nearest ? "nearest" : "stochastic", "nearest, stochastic"});
    all.push_back({name + ".rht", std::to_string(o->rht), "0, 16"});
  }
  char last[32];
  snprintf(last, sizeof last, "%g", r.bf16_last);
  all.push_back({"bf16_last", last, "a share from 0 to 1"});
  return all;
}
// Sets one field from "name=value". Returns an empty string, or what is wrong and what is allowed.
inline std::string recipe_set(Recipe& r, const std::string& assignment) {
  const size_t eq = assignment.find('=');
  if (eq == std::string::npos) return "'" + assignment + "' is not of the form field=value";
  const std::string name = assignment.substr(0, eq), value = assignment.substr(eq + 1);
  auto refuse = [&](const std::string& allowed) { return "field " + name + " does not take '" + value + "'; allowed: " + allowed; };
  if (name == "bf16_last") {
    char* end;
    const float f = strtof(value.c_str(), &end);
    if (value.empty() || *end || !(f >= 0 && f <= 1)) return refuse("a share from 0 to 1");
    r.bf16_last = f;
    return "";
  }
  for (auto& [operand, o] : recipe_operands(r)) {
    if (name == operand + ".format") {
      if (value != "bf16" && value != "nvfp4") return refuse("bf16, nvfp4");
      o->format = value == "bf16" ? Format::bf16 : Format::nvfp4;
      return "";
    }
    if (name == operand + ".blocks") {
      if (value != "1x16" && value != "16x16") return refuse("1x16, 16x16");
      o->blocks = value == "1x16" ? Blocks::b1x16 : Blocks::b16x16;
      return "";
    }
    if (name == operand + ".rounding") {
      if (value != "nearest" && value != "stochastic") return refuse("nearest, stochastic");
      o->rounding = value == "nearest" ? Rounding::nearest : Rounding::stochastic;
      return "";
    }
    if (name == operand + ".rht") {
      if (value != "0" && value != "16") return refuse("0, 16");
      o->rht = value == "16" ? 16 : 0;
      return "";
    }
  }
  std::string fields;
  for (const RecipeField& f : recipe_fields(r)) fields += (fields.empty() ? "" : " ") + f.name;
  return "there is no field '" + name + "'; fields: " + fields;
}
// A row that cannot be computed: empty if it is sound.
inline std::string recipe_problem(Recipe& r) {
  const std::pair<const char*, std::pair<OperandRecipe*, OperandRecipe*>> gemms[] = {
      {"fprop", {&r.fprop.x, &r.fprop.w}}, {"dgrad", {&r.dgrad.dy, &r.dgrad.w}}, {"wgrad", {&r.wgrad.dy, &r.wgrad.x}}};
  for (auto& [gemm, o] : gemms) {
    auto size = [](const OperandRecipe* p) { return p->format == Format::bf16 ? 0 : p->rht; };
    if (size(o.first) != size(o.second))
      return std::string(gemm) + ": both operands need the same rht (a rotation cancels only against itself); have " + std::to_string(size(o.first)) + " and " + std::to_string(size(o.second));
  }
  return "";
}
// One word an operand: "nvfp4-16x16-sr-rht16"
inline std::string operand_word(const OperandRecipe& o) {
  if (o.format == Format::bf16) return "bf16";
  std::string w = o.blocks == Blocks::b16x16 ? "16x16" : "1x16";
  w += o.rounding == Rounding::stochastic ? " SR" : " RN";
  if (o.rht) w += " RHT" + std::to_string(o.rht);
  return "NVFP4 " + w;
}
