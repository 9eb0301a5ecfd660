// kernels/quantize.cuh -- one GEMM operand, from BF16 (or FP32) to FP4 or FP8, as its words in recipe.cuh say.
//
// Shapes  An operand is [rows, cols] with blocks along cols, the contraction axis of its GEMM. The same kernels make the row copy
//         (of x itself) and the column copy (of x transposed): one thread gathers the values of a block wherever they lie.
// Output  packed: codes and block scales, outer scales, and QuEST's mask (struct Operand4)
//         values: floatX [rows, ld], code * block scale, which BF16 holds exactly: a BF16 GEMM on them computes what an FP4 tensor
//                 core computes. Either or both may be asked for. (post_hoc: values alone have the tensor's scale in them, a power of two.)
//         ld = operand_ld(cols) is a multiple of 32. Padding columns hold zeros, padding scales too.
//
// nvfp4   x[16] -> 16 E2M1 codes + one E4M3 scale byte, under one FP32 scale for the tensor. In FP32, in exactly this order:
//
//             S_enc = min(448*6 / amax, FLT_MAX);  1 if amax is 0 or inf         amax = max|x| of the tensor; four_six: 256 instead of 448
//             byte  = e4m3( min(block_amax * (S_enc * (1/6)), FLT_MAX) )
//             enc   = min( 1 / (float(byte) * (1/S_enc)), FLT_MAX )
//             code  = e2m1( x * enc )                                            to nearest, or stochastically
//             value = code * float(byte) * amax / (6*448)                        the last factor goes to the GEMM's alpha
//
//         Two levels of scale: E4M3 alone spans too little. About half of all blocks land slightly above 6 (up to 6.375, since
//         the byte may have been rounded down) and saturate.
//         Blocks 16x16: one amax for a tile, its byte repeated for its 16 rows, so that W and W^T hold the same codes and scales.
//         Outer 1x128 (TetraJet-v2): os = amax128/448/6; s = amax16/os/6; byte = e4m3(s), 2^-9 where that is 0; code = e2m1(x / (os*float(byte))).
//         MS-EDEN (Quartet II): t = amax/255.99/s, s = 6/((17/16)*.93); byte = e4m3(amax16/s/t), 1.0 where that is 0; v = x/(byte*t);
//         code = e2m1(v) to nearest; S = sum(v*v)/sum(v*code), by multiply-adds; byte = e4m3_sr(byte * S). The 256 leaves headroom for S > 1.
//         post_hoc: the same without t, whose place a power of two takes afterwards (below, where its kernels are).
// mxfp4   x[32] -> 32 E2M1 codes + one E8M0 byte e:  code = e2m1(x / 2^e), value = code * 2^e. No scale of the tensor, but range34 rounds
//         3x / 2^e and leaves the factor 1/3 to alpha.
// mxfp8   the same with E4M3 codes and e = ceil(log2(amax/448)).
// fp4_vector   code = e2m1(x / s), s = amax of the row / 6. The value is code * s, rounded to floatX: relative error 2^-9 in BF16
//         (so with outer 1x128): far below FP4's own noise. The packed form is exact.
// fp8     code = e4m3(x * min(448/amax, FLT_MAX)) (e5m2: 57344); value = code, amax/448 goes to alpha.
//
// Rotation   in registers, and by shuffles between lanes: no rotated copy ever lies in memory.
// NaN     A NaN anywhere makes amax NaN (by a maximum that keeps it, not fmaxf, which drops it), hence alpha NaN, hence the
//         loss: E2M1 itself has no NaN and would hide it as 6. Formats without a tensor scale make the block's scale NaN.
// Source  NVIDIA, arXiv 2509.25149, appendix C; the other papers are named in recipe.cuh. Random bits: philox.cuh.
// Cost    amax: reads x once, for both copies of a tensor where the rows are not rotated, or both copies by 128 (amax_of_both()); not at all where the
//         kernel that wrote x, or one for all weights, has found it (amax.cuh, amax_of_arrays()). Codes: reads x
//         once, for both copies where one kernel makes them (quantize_both()), writes 2 bytes a value (values) or 0.56 (packed). A GPU's memory and
//         the issue of instructions take about as long, so instructions are what counts. Executed for a value of the row copy (Nsight Compute),
//         in three rounds of this: RN 17, 16, 17; SR 25, 23, 19; outer 1x128 RN 30, 25, 22, with SR and RHT16 45, 37, 31; MS-EDEN with RHT128 -, 42,
//         38, post hoc 30 (two values rounded in one operation, a product in the place of a division, scales without the tensor's). In the searches
//         for the maximum, a value and copy, by count in SASS: RHT16 and the plain maximum beside it 14, 6; RHT128 14, 10, of which shuffles 3 and 1;
//         RHT128 from a packed operand 26, 15.
//         Percent of the speed of a copy of the same bytes, values of 32768 x 3072, amax included / known (H100). The first chapter is
//         dev/quantize_simple.cuh.
//                                                            row RN     row SR     column RN RHT16   column SR RHT16
//             a thread a block, with wide loads by rows        54         36          33                27
//             strips in registers; columns by 8-byte loads     58 / 84    50 / 69     21 / 34           20 / 32
//             columns through shared memory                    57 / 85    49 / 70     39 / 58           35 / 49
//             fetched ahead; SR by one directed addition       57 / 83    52 / 73     52 / 74           43 / 59
//             recipe known to the compiler; multiply-adds      65 / 99    63 / 93     56 / 83           55 / 82
//         What changed since (H200, 65536 x 3072, ms, amax known; a copy takes .196; before the stroke values, behind it packed):
//                                        recipe known     fewer instructions     SR and scales by their bits
//             rows      RN                .214 / .226        .201 / .166            .202 / .155
//                       SR                .233 / .294        .221 / .223            .207 / .173
//                       4/6               .260 / .336        .261 / .288            .255 / .269
//                       1x128             .252 / .320        .210 / .215            .211 / .193
//                       1x128 SR RHT16    .345 / .423        .272 / .304            .248 / .249
//                       MS-EDEN RHT128    .379 / .462        .311 / .343            .294 / .307
//             columns   SR RHT16          .294 / .371        .276 / .308            .248 / .251
//                       1x128 SR RHT16    .403 / .491        .341 / .376            .304 / .309
//                       MS-EDEN RHT128    .447 / .539        .362 / .400            .337 / .355
//             both copies   dY SR, SR RHT16                      .487, .430, .372
//                           X RN, RN RHT16 packed                .428, .350, .335
//             both maxima   plain and RHT16                      .155, .108, .109 (to read takes .098)
//                           RHT128 twice                         .294, .178, .178
//             from packed   columns MS-EDEN; 1x128 SR RHT16      .497, .397, .379; -, .374, .344
//                           maximum of columns with RHT128       .237, .180, .181
//         MS-EDEN post hoc, all of it, where the table above is without the search for the maximum (.09 a copy):
//             rows .258, columns .279, both copies of dY .505, from packed .325; of these the second kernel .009 a copy; packed .298, .320
//         What did not pay: two blocks of 16 a lane (spills: 1.3 to 1.6 times as long); all 4 rows of a lane at once (158 registers, 8 warps a
//         multiprocessor, not timed); blocks of rows that stay on (launch_strips()); for both copies six or five blocks of 128 threads, or three of
//         256, with one square, or two of 256 with two (.99 to 1.04); their columns by ldmatrix (dY 1.00, X packed 1.03). Two stores of 16 bytes a
//         lane fill half of each 32-byte sector at a time, and L2 is at 80 to 90 % of its rate in the kernels without a rotation; but an exchange
//         between lanes through shared memory, so that each store fills 512 bytes, helps columns to nearest alone (.95; SR RHT16 1.04, 1x128 1.06,
//         MS-EDEN 1.06, dY 1.06). Divisions out of the usual range and FP8's codes in functions of their own, so that the loop is half as long: 1.00,
//         from packed 1.03 to 1.06. A lane's four rows to four blocks where a matrix is small: weights 1.0, large columns 1.02. The maximum of a rotated
//         block as |a| + |b| of its last butterfly: 1.00. RHT128's butterflies between lanes by a turn through shared memory and back, 24 operations for
//         48 shuffles: rows .98, columns .99, from packed 1.02. Rounding to nearest with signs by pairs: more registers, 1.06; 4/6 without saturation: 1.05.
//         Columns alone, percent of a copy, values under the tensor's scale, 65536 x 3072, amax known (H200, whose memory is 1.4 times as fast as an H100's):
//                                                                              W^T    RN RHT16   SR RHT16
//             tiles of 64 x 128, four warps each, as many as there is room for   80       79         79
//             three of them a multiprocessor: closer together in memory          80       80         82
//             squares of 128 x 128, 16 warps each, one or two, down the rows     86       86         79
//             rows of the square as long as they are; nothing spilled            90       89         85
//             whole sectors by pairs of lanes (store_values())                   92       88         87
//         Between these lines: what a kernel spills it reads back through a cache that its stores keep emptying, 16 bytes a thread cost SR 4 %. Constants
//         move to uniform registers (SR: 40 instructions of 750) only if neither a loop nor a condition of some lanes alone encloses what uses them: so the
//         edges of x are part of the plain case. In place of these squares, one or two a multiprocessor: 128 x 256 and 1024 threads .99 to 1.07 of the time,
//         64 x 256 1.03 to 1.05, 64 x 128 and 256 threads 1.05 to 1.07, the same with three of them in shared memory 1.04 to 1.12, 32 x 256 1.2 (four warps).
//         Reading so that L2 forgets first 1.02 to 1.06. Rows of the operand stored by the copy engine (cp.async.bulk) 1.25 to 1.6. Whole sectors for row
//         copies 1.00 to 1.07, for both copies 1.04 to 1.07. Two rows at once for both copies 1.03 to 1.4, from packed 1.01, post_hoc .97 (used).
//         With the old tiles: three a multiprocessor, 1x128 SR RHT16 1.12, MS-EDEN 1.14 (H100 .95, 1.01); on an H100 streaming stores, the order of the operand's
//         rows, a third tile on its way, 256 bytes read ahead into L2 1.00 (the last for the maximum of columns .95); squares with two blocks of 256 threads,
//         SR RHT16 .98, 1x128 .98, MS-EDEN .94 (H200 1.01, 1.16, 1.09).
#pragma once
#include <map>
#include "operand.cuh"    // defines: Operand4, QuantizeHow, dequantize
#include "philox.cuh"
#include "ptx.cuh"
#include "simd.cuh"       // defines: float8, store8
#include "strips.cuh"     // defines: Matrix, Packed, for_each_strip, rotate_row

// ------------------------------------------------------------------ recipes known to the compiler
// A kernel that asks for every word of a recipe at run time has 5,500 instructions, of which a recipe uses about a tenth, here and there. So a GPU
// has a kernel for each NVFP4 operand that the table of recipes makes from BF16, or doubly (column copies: KnownColumns, below); all others take the one
// for `any`, and so do columns of a matrix whose rows do not start on 16 bytes, and the CPU.
enum class Known { any, rn, tile, tile46, sr, sr16, rn16, outer_rn, outer_sr16, rn46, eden_rht128 };
__host__ __device__ constexpr OperandRecipe known_recipe(Known k) {
  OperandRecipe r;
  r.format = Format::nvfp4;
  if (k == Known::tile || k == Known::tile46) r.blocks = Blocks::b16x16;
  if (k == Known::tile46 || k == Known::rn46) r.scale = ScaleRule::four_six;
  if (k == Known::outer_rn || k == Known::outer_sr16) r.outer = Outer::b1x128;
  if (k == Known::sr || k == Known::sr16 || k == Known::outer_sr16) r.rounding = Rounding::stochastic;
  if (k == Known::eden_rht128) { r.rounding = Rounding::eden16; r.scale = ScaleRule::post_hoc; }
  r.rht = k == Known::eden_rht128 ? 128 : k == Known::sr16 || k == Known::rn16 || k == Known::outer_sr16 ? 16 : 0;
  r.signs = r.rht == 0 ? Signs::none : k == Known::sr16 || k == Known::rn16 ? Signs::fixed : Signs::fresh;
  return r;
}
inline bool is_known(const OperandRecipe& a, Known k, const SignBits& signs) {
  const OperandRecipe b = known_recipe(k);
  if (b.signs == Signs::fixed && (signs.word[0] & 0xffff) != kFixedSigns) return false;
  const bool same_blocks = a.format == b.format && a.blocks == b.blocks && a.outer == b.outer && a.scale == b.scale;
  return same_blocks && a.rounding == b.rounding && a.rht == b.rht && a.signs == b.signs;
}
template <Known... k> struct KnownList {};
template <bool kTranspose, bool kWarp, class Source> struct KnownFor { using List = KnownList<>; };
#ifndef CPU_BUILD
template <> struct KnownFor<false, true, Matrix<bf16>> {
  using List = KnownList<Known::rn, Known::tile, Known::tile46, Known::sr, Known::outer_rn, Known::outer_sr16, Known::rn46>;
};
template <> struct KnownFor<true, true, Matrix<bf16>> {
  using List = KnownList<Known::outer_sr16>;
};
template <> struct KnownFor<true, true, Packed> { using List = KnownList<Known::outer_sr16>; };
#endif

// Blocks of each kernel that a multiprocessor is to hold: what their registers allow and, for columns, the shared memory of their tiles.
constexpr int kMxBlocks = 4, kPlainBlocks = 6;
__host__ __device__ constexpr int amax_blocks(bool columns) { return columns ? 5 : 8; }
// Six for columns of a matrix, and not five: .98 of the time with MS-EDEN, 1.00 with 1x128 (H200). Eight for rows to nearest, which wait for memory.
__host__ __device__ constexpr int nvfp4_blocks(bool columns, bool of_a_matrix, Known k) {
  return !of_a_matrix || k == Known::any ? 5 : columns ? 6 : k == Known::rn || k == Known::tile ? 8 : 5;
}

// What every kernel below wants to know.
struct BlockHow {
  OperandRecipe recipe;
  SignBits signs;
  RandomKey key;
  RoundKeys rounds;                          // of key
  int rows_covered, cols_covered;            // with padding
  GemmAlpha alpha;
  // Every kernel that makes codes calls this: one thread writes alpha, if that is asked for.
  __device__ __forceinline__ void write_alpha(const float* amax) const {
    if (alpha.alpha && blockIdx.x == 0 && threadIdx.x == 0) *alpha.alpha = alpha_of(amax, recipe, alpha.other_amax, alpha.other);
  }
  // A rotation's factor that its input's signs can take with them: a power of two, where nothing is lost by it. Sums that overflow without it do not
  // overflow then: that has to show in the scale of the tensor, whose search for the maximum goes without.
  template <class Rows> __device__ __forceinline__ bool scales_input() const {
    return recipe.rht == 16 && Rows::kFewBits && recipe.outer == Outer::tensor && !is_post_hoc(recipe);
  }
  // Or that waits until a block is divided by its scale: that of post_hoc; and 1/4 of a row with outer scales, on a GPU. Then row() returns it as if it
  // were 1. (Four over six looks at a block before it is divided.)
  __device__ __forceinline__ float late_factor() const {
    if (is_post_hoc(recipe)) return recipe.rht && !rounds_rotated(recipe) ? rotation_scale(recipe.rht) : 1.0f;
    const bool divided = recipe.format == Format::nvfp4 && recipe.outer == Outer::b1x128 && recipe.scale != ScaleRule::four_six;
    return !kOnCpu && divided && recipe.rht == 16 && !rounds_rotated(recipe) ? 0.25f : 1.0f;
  }
  // A row of the operand as it will be rounded; and its max|v| as bits, where a thread has one block. Padding that a rotation has left as -0 is 0 again.
  // known: null, or InputSigns. Two BF16 in a word are one operation less than two floats: in the search for the maximum, and in rounding.
  template <class S, class Rows> __device__ __forceinline__ unsigned row(RowPart<S>& v, Rows& rows, int i, int cols, const InputSigns* known = nullptr) const {
    rows.load(v, i, known && known->flips ? known->flip : nullptr);
    if (recipe.rht == 0) {
      if constexpr (Rows::kPairs) return pair_amax_bits(rows.pairs);
      return block_amax_bits(v[0]);
    }
    const float scale = rotation_scale(recipe.rht);
    const bool round = rounds_rotated(recipe);
    rotate_row<S>(v, recipe.rht, signs, rows.at.along, known);
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      if (late_factor() == 1 && (kOnCpu || !known || !scales_input<Rows>())) {
#pragma unroll
        for (int j = 0; j < S::kUnit; j++) v[u][j] *= scale;
      }
      if (round && kOnCpu) {
        for (int j = 0; j < S::kUnit; j++) v[u][j] = to_float(to_bf16(v[u][j]));
      } else if (round) {
#pragma unroll
        for (int j = 0; j < S::kUnit; j += 2) {
          const uint32_t two = rows.word[j / 2] = pack_bf16(v[u][j], v[u][j + 1]);
          v[u][j] = bits_float(two << 16);
          v[u][j + 1] = bits_float(two & 0xffff0000u);
        }
        if (S::kUnits == 1 && S::kUnit == 16) return pair_amax_bits(max_abs_pairs(rows.word));
      }
      if (S::kUnit == 32 && recipe.rht == 16 && rows.at.col + u * 32 + 16 >= cols) {       // half a block of padding
#pragma unroll
        for (int j = S::kUnit - 16; j < S::kUnit; j++) v[u][j] = 0;
      }
    }
    return block_amax_bits(v[0]);
  }
};
// Calls use(v, row, block) for every block of this thread's strips that needs no other.
template <class S, bool kTranspose, class Source, class Use>
__device__ __forceinline__ void for_each_block(const Source& x, const BlockHow& how, int cols, typename Source::Element* shared, Use use) {
  for_each_strip<S, kTranspose>(x, how.rows_covered, how.cols_covered, shared, [&](auto& rows) {
#pragma unroll 1
    for (int i = 0; i < S::kRows; i++) {
      RowPart<S> part;
      how.row<S>(part, rows, i, cols);
#pragma unroll
      for (int u = 0; u < S::kUnits; u++) use(part[u], rows.row(i), rows.at.col / S::kUnit + u);
    }
  });
}
template <int kN, int kM> __device__ __forceinline__ unsigned row_amax_bits(const float (&v)[kM][kN]) {
  unsigned m = 0;
#pragma unroll
  for (int u = 0; u < kM; u++) m = max(m, block_amax_bits(v[u]));
  return m;
}

// ------------------------------------------------------------------ pass 1: amax of the tensor, or of its rows
// Where a recipe needs no scale of the tensor (outer 1x128, MX formats), there is no such pass. plain: null, or max|x|; rotated: null, or max|x|
// after how.recipe's rotation: both in one reading. row_amax: null, or [rows], zeroed: of the rotated rows, if there is a rotation. Rounding is
// monotonic, so that the largest value is scaled and rounded in the place of all.
// The largest value of rotated rows, which lack the rotation's factor until here, as bits.
__device__ __forceinline__ unsigned finished_amax(const OperandRecipe& how, unsigned m) {
  if (how.rht == 0) return m;
  const float f = bits_float(m) * rotation_scale(how.rht);
  return float_bits(rounds_rotated(how) ? to_float(to_bf16(f)) : f) & 0x7fffffffu;
}
template <bool kTranspose, bool kWarp, class Source, int kRht>
__global__ void __launch_bounds__(kStripThreads, amax_blocks(kTranspose))
amax_kernel(unsigned* plain, unsigned* rotated, unsigned* row_amax, Source x, BlockHow how) {
  using S = Share<kWarp && !Source::kRowCopy ? 32 : 16, kWarp>;             // longer runs are less work, where the registers allow them
  if constexpr (kRht >= 0) how.recipe.rht = kRht;
  alignas(16) __shared__ typename Source::Element shared[shared_elements<S, kTranspose, Source>()];
  unsigned most = 0, most_rotated = 0;
  const Source source = x.ready();
  constexpr bool kKnown = kWarp && kRht > 0;
  [[maybe_unused]] const LaneSigns<kKnown ? kRht : 16, S::kUnit> signs(how.signs, (int)threadIdx.x);
  for_each_strip<S, kTranspose>(source, how.rows_covered, how.cols_covered, shared, [&](auto& rows) {
#pragma unroll 1
    for (int i = 0; i < S::kRows; i++) {
      RowPart<S> v;
      rows.load(v, i);
      if (plain) most = max(most, row_amax_bits(v));
      unsigned m;
      if constexpr (kKnown) {
        m = rotated_amax_bits(v[0], signs);
      } else {
        if (how.recipe.rht && (rotated || row_amax)) rotate_row<S>(v, how.recipe.rht, how.signs, rows.at.along);
        m = row_amax_bits(v);
      }
      most_rotated = max(most_rotated, m);
      if (!row_amax) continue;
      const unsigned whole = max_along<S>(m);
      if (rows.at.along == 0 && rows.row(i) < how.rows_covered) atomicMax(&row_amax[rows.row(i)], finished_amax(how.recipe, whole));
    }
  });
  most = max_down<S>(max_along<S>(most));
  most_rotated = max_down<S>(max_along<S>(most_rotated));
  if (threadIdx.x % S::kLanes) return;
  if (plain) atomicMax(plain, most);
  if (rotated) atomicMax(rotated, finished_amax(how.recipe, most_rotated));
}

// max|x| of each of several arrays, in one launch: of small ones, as weights are, a kernel each would spend its time on starting. amax: one for each, zeroed.
template <class T> struct Arrays {
  static constexpr int kMost = 64;
  const T* x[kMost]; unsigned size[kMost];
};
constexpr int kArrayBlocks = 64;                                 // of an array
template <class T> __global__ void amax_of_arrays_kernel(unsigned* amax, Arrays<T> arrays) {
  const T* const x = arrays.x[blockIdx.y];
  const unsigned size = arrays.size[blockIdx.y];
  const bool aligned = (uintptr_t)x % (8 * sizeof(T)) == 0;
  unsigned most = 0;
  for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * 8; i < size; i += gridDim.x * blockDim.x * 8) {
    float v[8];
    if (aligned && i + 8 <= size) {
      const Vec<T, 8> eight = load_vec<8>(x + i);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = to_float(eight.v[j]);
    } else {
      for (int j = 0; j < 8; j++) v[j] = i + j < size ? to_float(x[i + j]) : 0.0f;
    }
    most = max(most, block_amax_bits(v));
  }
  using S = Share<16, true>;
  most = max_down<S>(max_along<S>(most));
  if (threadIdx.x % 32 == 0) atomicMax(&amax[blockIdx.y], most);
}
template <class T> void amax_of_arrays(float* amax, const T* const* x, const size_t* size, int arrays) {
  for (int first = 0; first < arrays; first += Arrays<T>::kMost) {
    Arrays<T> some = {};
    const int count = min(arrays - first, Arrays<T>::kMost);
    for (int i = 0; i < count; i++) {
      if (size[first + i] >= 1u << 31) die("amax_of_arrays: an array of %zu elements is too large", size[first + i]);
      some.x[i] = x[first + i];
      some.size[i] = (unsigned)size[first + i];
    }
    launch(amax_of_arrays_kernel<T>, dim3(kOnCpu ? 2 : kArrayBlocks, count), kOnCpu ? 32 : 256, 0, (unsigned*)amax + first, some);
  }
}

// ------------------------------------------------------------------ rounding and storing a block
#ifdef CPU_BUILD
__forceinline__ float8 abs8(float8 v) { return (float8)((word8)v & 0x7fffffffu); }
__forceinline__ word8 e2m1_binade8(float8 a) { const word8 b = (word8)a & 0x7f800000u, one = all8(0x3f800000u); return b > one ? b : one; }
__forceinline__ float8 e2m1_saturate8(float8 a) { const float8 six = float8{} + 6.0f; return a < six ? a : six; }
// e2m1_round(|v|) of eight; and e2m1_round_sr(|v|, byte_uniform(r)), 255 - r being the complement. In units of step/512 a value is n = ceil(512 a/step), and
// it goes up where adding 510 - 2r to the part of n below 512 carries. Adding 1.5 * 2^23 leaves an integer in the last bits of a float.
__forceinline__ float8 e2m1_round8(float8 v) {
  const float8 a = e2m1_saturate8(abs8(v)), magic = (float8)(e2m1_binade8(a) + (22u << 23));
  return (a + magic) - magic;
}
__forceinline__ float8 e2m1_round_bytes8(float8 v, word8 complement) {
  const float8 a = e2m1_saturate8(abs8(v)), magic = float8{} + 12582912.0f, zero = {}, one = zero + 1.0f;
  const word8 binade = e2m1_binade8(a);
  const float8 x = a * (float8)((264u << 23) - binade), nearest = x + magic;
  const float8 n = nearest + (nearest - magic < x ? one : zero);                                 // rounded up
  return ((float8)(((word8)n + 2 * complement) & ~511u) - magic) * (float8)(binade - (10u << 23));
}
__forceinline__ word8 load_bytes8(const void* p) {
  typedef uint8_t byte8 __attribute__((vector_size(8)));
  byte8 b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, word8);
}
#endif
// The random bits of a block: of byte r the complement 255 - r, 4 in a word. `block16`: number of the 16-block in its operand; a block of 32 takes two.
struct RandomBytes { uint32_t word[4]; };
__device__ __forceinline__ RandomBytes random_bytes(const uint4& r) { return {~r.x, ~r.y, ~r.z, ~r.w}; }
#ifdef CPU_BUILD
// magnitude[j]: |v[j]| rounded to the grid. drawn: null, or random_block() of each 16.
template <int kN>
__forceinline__ void round_block(float (&magnitude)[kN], const float (&v)[kN], bool stochastic, const BlockHow& how, uint32_t block16,
                                 const uint4* drawn = nullptr) {
  if (!stochastic) {
    for (int j = 0; j < kN; j += 8) store8(magnitude + j, e2m1_round8(load8(v + j)));
    return;
  }
  for (int half = 0; half < kN / 16; half++) {
    const RandomBytes bytes = random_bytes(drawn ? drawn[half] : random_block(how.key, how.rounds, block16 + half));
    for (int j = 0; j < 16; j += 8) store8(magnitude + 16 * half + j, e2m1_round_bytes8(load8(v + 16 * half + j), load_bytes8(&bytes.word[j / 4])));
  }
}
#else
// The same to nearest. kBelow7: all |v| are.
template <bool kBelow7 = false, int kN> __device__ __forceinline__ void round_block(float (&magnitude)[kN], const float (&v)[kN]) {
#pragma unroll
  for (int j = 0; j < kN; j++) magnitude[j] = kBelow7 ? e2m1_round_below7(fabsf(v[j])) : e2m1_round(fabsf(v[j]));
}
// Stochastically, and as indices, two neighbours in the halves of a word. kBelow8: all |v| are; if not, a NaN becomes 6.
template <bool kBelow8, int kN>
__device__ __forceinline__ void round_block_sr(uint32_t (&index)[kN / 2], const float (&v)[kN], const BlockHow& how, uint32_t block16) {
  const uint32_t filler = in_register(0x7fffu), four = in_register(4u);        // so that it is a multiplication: logic and shifts are busier
#pragma unroll
  for (int half = 0; half < kN / 16; half++) {
    const RandomBytes bytes = random_bytes(random_block(how.key, how.rounds, block16 + half));
    auto lifted = [&](int j) {
      const float a = fabsf(v[16 * half + j]);
      return e2m1_lifted_sr(kBelow8 ? a : fminf(a, 8.0f), e2m1_byte_part(bytes.word[j / 4], j % 4, filler), four);
    };
#pragma unroll
    for (int j = 0; j < 16; j += 2) index[8 * half + j / 2] = min_u16x2(upper_bytes(lifted(j), lifted(j + 1)), 0x00070007u);
  }
}
// Words whose halves have the signs of v.
template <int kN> __device__ __forceinline__ void sign_words(uint32_t (&signs)[kN / 2], const float (&v)[kN]) {
#pragma unroll
  for (int j = 0; j < kN; j += 2) signs[j / 2] = __byte_perm(float_bits(v[j]), float_bits(v[j + 1]), 0x7632);
}
#endif
__device__ __forceinline__ float with_sign_of(float magnitude, float v) { return bits_float(float_bits(magnitude) | (float_bits(v) & 0x80000000u)); }
// Is a scale in the middle of the range, so that what is faster than the plain way is as exact? A CPU is as fast the plain way.
__device__ __forceinline__ bool divides(float d) { return !kOnCpu && d > 0x1p-80f && d < 0x1p80f; }
// Which parts of an operand are asked for. On a GPU kept in registers, where a kernel would look at 64 bits of a pointer every time.
struct Parts { uint32_t codes, values, scales; };
__device__ __forceinline__ Parts parts_of(const Operand4& out) {
  return {in_register((uint32_t)(out.codes != nullptr)), in_register((uint32_t)(out.values != nullptr)), in_register((uint32_t)(out.scales != nullptr))};
}
// Writes codes, and values magnitude * scale (* outer), of the elements from column `col` on; the signs are those of v. ScaleKind: a scale with few
// bits, so that its products with magnitudes are BF16 numbers; one of FP32; or one of few bits with an outer scale of FP32.
enum class ScaleKind { few_bits, fp32, outer };
// Stores a lane's 16 values. paired: so does the neighbouring lane, which has the 16 beside them in the same row, and both hold 16 bytes of each other's:
// then a store fills sectors of 32 bytes, and not halves of them.
template <int kN> __device__ __forceinline__ void store_values(floatX* to, const Vec<floatX, kN>& q, [[maybe_unused]] bool paired) {
#ifndef CPU_BUILD
  if constexpr (kN == 16 && sizeof(floatX) == 2) {
    if (paired) {
      const bool odd = threadIdx.x & 1;
      uint32_t w[8], first[4], second[4];
      memcpy(w, &q, sizeof w);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? w[k] : w[4 + k], 1);
        first[k] = odd ? other : w[k];
        second[k] = odd ? w[4 + k] : other;
      }
      uint4* const at = (uint4*)(to - (odd ? 8 : 0));
      at[0] = make_uint4(first[0], first[1], first[2], first[3]);
      at[2] = make_uint4(second[0], second[1], second[2], second[3]);
      return;
    }
  }
#endif
  store_vec(to, q);
}
template <ScaleKind kKind, int kN>
__device__ __forceinline__ void store_block(const Operand4& out, Parts parts, unsigned row, unsigned col, const float (&magnitude)[kN], const float (&v)[kN],
                                            float scale, float outer = 1, [[maybe_unused]] bool paired = false) {
  const size_t at = (size_t)row * (unsigned)out.ld + col;
#ifdef CPU_BUILD
  if (parts.codes) {
    Vec<uint32_t, kN / 8> words = {};
    for (int j = 0; j < kN; j++) words.v[j / 8] |= (uint32_t)(e2m1_index(magnitude[j]) | e2m1_sign(v[j])) << (4 * (j % 8));
    *reinterpret_cast<Vec<uint32_t, kN / 8>*>(out.codes + at / 2) = words;
  }
  if (parts.values) {
    for (int j = 0; j < kN; j += 8) {
      const float8 m = load8(magnitude + j) * scale, o = kKind == ScaleKind::outer ? m * outer : m;
      store8(out.values + at + j, (float8)((word8)o | ((word8)load8(v + j) & 0x80000000u)));
    }
  }
#else
  float rounded[kN];
#pragma unroll
  for (int j = 0; j < kN; j++) rounded[j] = with_sign_of(magnitude[j], v[j]);
  if (parts.codes) {
    Vec<uint32_t, kN / 8> words;
#pragma unroll
    for (int j = 0; j < kN; j += 8) words.v[j / 8] = e2m1_pack8(reinterpret_cast<const float (&)[8]>(rounded[j]));
    *reinterpret_cast<Vec<uint32_t, kN / 8>*>(out.codes + at / 2) = words;
  }
  if (parts.values) {
    Vec<floatX, kN> q;
    if constexpr (kKind == ScaleKind::few_bits && sizeof(floatX) == 2) {           // two products at once, exact as any
      const uint32_t both = pack_bf16(scale, scale);
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        const uint32_t two = mul_bf16x2(pack_bf16(rounded[j], rounded[j + 1]), both);
        memcpy(&q.v[j], &two, 4);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kN; j++) q.v[j] = from_float<floatX>(kKind == ScaleKind::outer ? rounded[j] * scale * outer : rounded[j] * scale);
    }
    store_values(out.values + at, q, paired);
  }
#endif
}
#ifndef CPU_BUILD
// The same from indices, two in a word, and the words that have their signs. In BF16's place an index is 2^-126 times its value (compare
// e2m1_magnitude()).
template <ScaleKind kKind, int kPairs>
__device__ __forceinline__ void store_indices(const Operand4& out, Parts parts, unsigned row, unsigned col, const uint32_t (&index)[kPairs],
                                              const uint32_t (&signs)[kPairs], float scale, float outer = 1, bool paired = false) {
  const size_t at = (size_t)row * (unsigned)out.ld + col;
  if (parts.codes) {
    auto two = [&](int j) {                                      // in the lowest byte
      const uint32_t code = index[j] | (signs[j] >> 12 & 0x00080008u);
      return code + (code >> 12);
    };
    Vec<uint32_t, kPairs / 4> words;
#pragma unroll
    for (int j = 0; j < kPairs; j += 4)
      words.v[j / 4] = __byte_perm(__byte_perm(two(j), two(j + 1), 0x0040), __byte_perm(two(j + 2), two(j + 3), 0x0040), 0x5410);
    *reinterpret_cast<Vec<uint32_t, kPairs / 4>*>(out.codes + at / 2) = words;
  }
  if (!parts.values) return;
  Vec<floatX, 2 * kPairs> q;
  if (kKind == ScaleKind::outer && sizeof(floatX) == 2 && divides(scale * outer)) {
    // The values of the 8 indices, and each element's by its index: their lower bytes and their upper ones, four at once. 1 and 1.5 times the scales; all
    // others are these times a power of two.
    const uint32_t two_three = pack_bf16(scale * outer, 1.5f * scale * outer), half = mul_bf16x2(two_three, 0x3f003f00u) << 16;
    const uint32_t four_five = mul_bf16x2(two_three, 0x40004000u), six_seven = mul_bf16x2(two_three, 0x40804080u);
    const uint32_t lower[2] = {__byte_perm(half, two_three, 0x6420), __byte_perm(four_five, six_seven, 0x6420)};
    const uint32_t upper[2] = {__byte_perm(half, two_three, 0x7531), __byte_perm(four_five, six_seven, 0x7531)};
    const uint32_t lift = in_register(256u);
#pragma unroll
    for (int j = 0; j < kPairs; j += 2) {
      const uint32_t spread = index[j + 1] * lift + index[j], which = spread + (spread >> 12);     // four indices, 4 bits apart
      const uint32_t low = pick_bytes(lower[0], lower[1], which), high = pick_bytes(upper[0], upper[1], which);
      const uint32_t words[2] = {__byte_perm(low, high, 0x5140) | (signs[j] & 0x80008000u), __byte_perm(low, high, 0x7362) | (signs[j + 1] & 0x80008000u)};
      memcpy(&q.v[2 * j], words, sizeof words);
    }
  } else {
    const uint32_t lift = in_register(64u), both = pack_bf16(scale, scale);
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      uint32_t two = mul_bf16x2(index[j] * lift | (signs[j] & 0x80008000u), 0x7e807e80u);           // 2^126
      if (kKind == ScaleKind::few_bits && sizeof(floatX) == 2) {
        two = mul_bf16x2(two, both);
        memcpy(&q.v[2 * j], &two, 4);
      } else {
        for (int k = 0; k < 2; k++) {
          const float r = bits_float(k ? two & 0xffff0000u : two << 16) * scale;
          q.v[2 * j + k] = from_float<floatX>(kKind == ScaleKind::outer ? r * outer : r);
        }
      }
    }
  }
  store_values(out.values + at, q, paired);
}
#endif
// Rounds a block that is on the grid, and stores it.
template <ScaleKind kKind, int kN>
__device__ __forceinline__ void round_and_store(const Operand4& out, int row, int col, const float (&v)[kN], const BlockHow& how, uint32_t block16, float scale) {
  const bool stochastic = how.recipe.rounding == Rounding::stochastic;
  float magnitude[kN];
#ifdef CPU_BUILD
  round_block(magnitude, v, stochastic, how, block16);
#else
  if (stochastic) {
    uint32_t index[kN / 2], signs[kN / 2];
    round_block_sr<false>(index, v, how, block16);
    sign_words(signs, v);
    return store_indices<kKind>(out, parts_of(out), row, col, index, signs, scale);
  }
  round_block(magnitude, v);
#endif
  store_block<kKind>(out, parts_of(out), row, col, magnitude, v, scale);
}
// The same for FP8 elements: values e4m3(v) * scale, or e5m2.
template <int kN>
__device__ __forceinline__ void store_fp8_block(const Operand4& out, int row, int col, const float (&v)[kN], bool e4m3, float scale) {
  const size_t at = (size_t)row * out.ld + col;
  if (out.codes) {
    Vec<uint8_t, kN> codes;
#pragma unroll
    for (int j = 0; j < kN; j++) codes.v[j] = e4m3 ? e4m3_encode(v[j]) : e5m2_encode(v[j]);
    store_vec(out.codes + at, codes);
  }
  if (out.values) {
    Vec<floatX, kN> q;
#pragma unroll
    for (int j = 0; j < kN; j++) q.v[j] = from_float<floatX>((e4m3 ? e4m3_round(v[j]) : e5m2_round(v[j])) * scale);
    store_vec(out.values + at, q);
  }
}
// Zeros for kN columns of padding. bytes: of codes for 16 columns: 8 (FP4) or 16 (FP8).
template <int kN> __device__ __forceinline__ void clear_block(const Operand4& out, int row, int col, int bytes) {
  const size_t at = (size_t)row * out.ld + col;
  if (out.codes) for (int j = 0; j < bytes * (kN / 16); j++) out.codes[at * bytes / 16 + j] = 0;
  if (out.values) for (int j = 0; j < kN; j++) out.values[at + j] = from_float<floatX>(0);
}
// v / d, correctly rounded, in three operations, as the compiler's own division has them once it has found 1/d, which here is found once for all v: a
// first quotient, and its remainder times the rounded 1/d (P. Markstein, IBM J. Res. Dev. 34, 1990), as long as nothing leaves the normal range. The first
// quotient is off by less than one and a half units of its last place, by less than one where the true one lies next to the middle of two floats, and there
// the remainder is exact: the test constructs these. It is taken as q d - v: a zero keeps its sign.
struct Divisor {
  float d, reciprocal;
  __host__ __device__ __forceinline__ explicit Divisor(float divisor) : Divisor(divisor, 1.0f / divisor) {}
  __host__ __device__ __forceinline__ Divisor(float divisor, float rounded_reciprocal) : d(divisor), reciprocal(rounded_reciprocal) {}
  __host__ __device__ __forceinline__ float quotient(float v) const {
    const float q = v * reciprocal;
    return fmaf(fmaf(q, d, -v), -reciprocal, q);
  }
};
// Infinities have an infinite d. Quotients below 2^-126 may be off by their last place: far below the grid, they become 0 all the same.
// factor: of v, 1 or 1/4.
template <int kN> __device__ __forceinline__ void divide_block(float (&v)[kN], float d, float factor = 1) {
  if (divides(d)) {
    const Divisor by(factor == 1 ? d : d * 4);
#pragma unroll
    for (int j = 0; j < kN; j++) v[j] = by.quotient(v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kN; j++) v[j] = v[j] * factor / d;
  }
}

// ------------------------------------------------------------------ NVFP4
// The scale of one block of 16: an element v lies on the E2M1 grid at v * encode or, where `divide` is not 0, at v / divide; decode undoes that.
struct BlockScale {
  float scale, outer;               // an E4M3 value, and the FP32 scale that goes with it
  float encode, divide;
  __device__ __forceinline__ float on_grid(float v) const { return divide != 0 ? v / divide : __fmul_rn(v, encode); }
  // Only a scale that was rounded far down, as the smallest are, makes a value on the grid 7 or more. So do infinities and NaN.
  __device__ __forceinline__ bool usual(float block_amax) const {
    return divide != 0 ? block_amax < 6.99f * divide : block_amax * encode < 6.99f;
  }
  // squared error of an element, and its magnitude, rounded to nearest
  __device__ __forceinline__ float error(float v, float& magnitude) const {
    magnitude = e2m1_round(fabsf(on_grid(v)));
    const float d = __fsub_rn(__fmul_rn(magnitude, scale * outer), fabsf(v));
    return __fmul_rn(d, d);
  }
};
// x / c for a constant c that the formulas below have: its reciprocal and one correction by multiply-add, correctly rounded for each of them (the test
// divides all mantissas); the compiler's own division would not know that.
__host__ __device__ __forceinline__ float quotient(float x, float c) {
  const float r = 1.0f / c, q = x * r;
  return fmaf(-fmaf(q, c, -x), r, q);
}
__device__ __forceinline__ float divided(float x, float c) { return divides(x) ? quotient(x, c) : x / c; }
// The FP32 scale for amax of the tensor, or of 128 columns.
__device__ __forceinline__ TensorScale outer_scale(const OperandRecipe& how, float amax) {
  const float range = nvfp4_range(how.scale);
  if (is_eden(how)) {
    const float t = eden_tensor_scale(amax);
    return {0, t, 1.0f / t};
  }
  if (how.outer == Outer::tensor) return tensor_scale(amax, range);
  return {0, amax == 0 ? 1.0f : divides(amax) ? quotient(quotient(amax, range / 6), 6) : amax / (range / 6) / 6, 0};
}
// stretch: 1; 1.5 maps the largest element to 4 instead of 6.
__device__ __forceinline__ BlockScale block_scale(const OperandRecipe& how, float block_amax, TensorScale t, float stretch = 1) {
  BlockScale s;
  if (how.scale == ScaleRule::headroom) stretch *= 17.0f / 16;
  if (how.outer == Outer::tensor && !is_eden(how)) {
    const float wanted = fminf(block_amax * (t.encode * (1.0f / 6.0f)), FLT_MAX) * stretch;
    s.scale = how.scale == ScaleRule::ceil ? e4m3_decode(e4m3_encode_ceil(wanted)) : e4m3_round_scale(wanted);
    s.outer = t.decode;
    s.encode = fminf(1.0f / (s.scale * t.decode), FLT_MAX);
    s.divide = 0;
  } else {
    const bool eden = is_eden(how);
    s.outer = t.decode;
    float wanted;
    if (!eden) wanted = divided(block_amax / s.outer, 6) * stretch;
    else if (divides(block_amax) && divides(s.outer)) wanted = Divisor(s.outer, t.reciprocal).quotient(quotient(block_amax, kEdenStep)) * stretch;
    else wanted = block_amax / kEdenStep / s.outer * stretch;
    s.scale = how.scale == ScaleRule::ceil ? e4m3_decode(e4m3_encode_ceil(wanted)) : e4m3_round_scale(wanted);
    if (s.scale == 0) s.scale = eden ? 1 : 0x1p-9f;       // the scale that was rounded to 0 as well: never divide by 0
    s.encode = 0;
    s.divide = s.outer * s.scale;
  }
  return s;
}
// Four over six: the block's squared error with its largest element at 6 and at 4, and both roundings. Sums in ascending order.
struct ErrorPair {
  float six = 0, four = 0;
  float rounded6[16], rounded4[16];
  __device__ __forceinline__ void add(const float (&v)[16], const BlockScale& at6, const BlockScale& at4) {
    float block6 = 0, block4 = 0;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      block6 = __fadd_rn(block6, at6.error(v[j], rounded6[j]));
      block4 = __fadd_rn(block4, at4.error(v[j], rounded4[j]));
    }
    six = __fadd_rn(six, block6);
    four = __fadd_rn(four, block4);
  }
};
// Four over six in 16x16 tiles: one choice for the 256 elements; four[tile] = 1 where 4 is better. On a GPU 16 lanes share a tile, a row each; on the
// CPU a thread has it. Without a rotation the rows are those of the source, also for the transposed operand, so that W and W^T choose alike.
template <bool kTranspose, bool kWarp, class Source>
__global__ void tile_four_six_kernel(uint32_t* four, Source x, int rows, int cols, BlockHow how, const float* amax) {
  constexpr int kLanes = kWarp ? 16 : 1;
  const int blocks = ceil_div(cols, 16), thread = blockIdx.x * blockDim.x + threadIdx.x, tile = thread / kLanes, rht = how.recipe.rht;
  const int first_row = tile / blocks * 16, first_col = tile % blocks * 16;             // beyond the last tile: zeros, and nothing is written
  const bool turn = kTranspose && !rht;                     // walk through the source instead of the operand
  x = x.ready();
  auto load = [&](float (&v)[16], int i) {
    if (turn || !kTranspose) {
      const auto run = turn ? x.template run<16>(first_col + i, first_row) : x.template run<16>(first_row + i, first_col);
      for (int j = 0; j < 16; j++) v[j] = run[j];
    } else {
      for (int j = 0; j < 16; j++) v[j] = x.at(first_col + j, first_row + i);
    }
    if (rht) {
      rht16(v, (uint32_t)how.signs.word[0]);
      if (rounds_rotated(how.recipe)) for (float& e : v) e = to_float(to_bf16(e));
    }
  };
  float v[16];
  unsigned most = 0;
  for (int i = threadIdx.x % kLanes; i < 16; i += kLanes) {
    load(v, i);
    most = max(most, block_amax_bits(v));
  }
#pragma unroll
  for (int o = 1; o < kLanes; o *= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, o));
  const TensorScale t = outer_scale(how.recipe, *amax);
  const BlockScale at6 = block_scale(how.recipe, bits_float(most), t), at4 = block_scale(how.recipe, bits_float(most), t, 1.5f);
  ErrorPair error;
  for (int i = threadIdx.x % kLanes; i < 16; i += kLanes) {
    if (!kWarp) load(v, i);
    error.add(v, at6, at4);
  }
  if (kWarp) {                                              // the rows' errors, one after the other
    const ErrorPair own = error;
    error.six = error.four = 0;
    for (int i = 0; i < 16; i++) {
      error.six = __fadd_rn(error.six, __shfl_sync(0xffffffffu, own.six, i, 16));
      error.four = __fadd_rn(error.four, __shfl_sync(0xffffffffu, own.four, i, 16));
    }
  }
  if (thread % kLanes == 0 && tile < ceil_div(rows, 16) * blocks) four[tile] = error.four < error.six;
}

// MS-EDEN: sums over a block that is on the grid, of v*v and of v*q; their quotient corrects the bias of rounding to nearest.
struct EdenSums {
  float vv = 0, vq = 0;
  __device__ __forceinline__ void add(const float (&v)[16], const float (&magnitude)[16]) {
#pragma unroll
    for (int j = 0; j < 16; j++) {
      vv = fmaf(v[j], v[j], vv);
      vq = fmaf(fabsf(v[j]), fabsf(magnitude[j]), vq);
    }
  }
  __device__ __forceinline__ float correction() const { return vq == 0 ? 1.0f : vv / vq; }
};
// One correction for 128 columns: a row's sums run on from block to block, and from lane to lane.
template <class S> __device__ __forceinline__ float eden_correction128(const float (&v)[S::kUnits][16], const float (&magnitude)[S::kUnits][16]) {
  EdenSums sums;
  for (int turn = 0; turn < S::kAlong; turn++) {
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) sums.add(v[u], magnitude[u]);
    if (S::kAlong > 1) {                                      // all go on from what lane `turn` of the row has
      const int from = (int)(threadIdx.x % S::kLanes) / S::kAlong * S::kAlong + turn;
      sums.vv = __shfl_sync(0xffffffffu, sums.vv, from);
      sums.vq = __shfl_sync(0xffffffffu, sums.vq, from);
    }
  }
  return sums.correction();
}

// The random bits of MS-EDEN's scales: four rows of a strip, 4 apart, share a draw, of which row i of the strip takes word i / 4.
__device__ __forceinline__ uint32_t eden_draw(unsigned row, unsigned block, unsigned blocks) { return (row / 16 * 4 + row % 4) * blocks + block; }
__host__ __device__ __forceinline__ float eden_uniform(uint32_t word) { return (float)(2 * (word & 0xffff) + 1) * 0x1p-17f; }
// e4m3_decode(e4m3_encode_sr(v, eden_uniform(word))). From 2^-6 to 448 it is an addition that carries into the mantissa's third bit where the 20 below,
// as a part of it, exceed the uniform number.
__host__ __device__ __forceinline__ float eden_scale(float v, uint32_t word) {
  const uint32_t bits = float_bits(v), least = float_bits(0x1p-6f);
  if (bits - least < float_bits(448.0f) - least) return bits_float((bits + 0xffff7u - 16 * (word & 0xffff)) & ~0xfffffu);
  return e4m3_decode(e4m3_encode_sr(v, eden_uniform(word)));
}

// Pass 2: codes and scales of a strip. four_tiles: the choice of four over six in 16x16 tiles; tensor: known_tensor_scale(); known: null, or InputSigns.
template <class S, class Rows>
__device__ __forceinline__ void nvfp4_strip(Rows& rows, const Operand4& out, const uint32_t* four_tiles, const BlockHow& how, TensorScale tensor,
                                            const InputSigns* known = nullptr) {
  const OperandRecipe& recipe = how.recipe;
  const bool tile = recipe.blocks == Blocks::b16x16, wide = recipe.outer == Outer::b1x128, four_six = recipe.scale == ScaleRule::four_six;
  const unsigned blocks = ceil_div((unsigned)out.cols, 16u), first_block = (unsigned)rows.at.col / 16;
  const bool stochastic = recipe.rounding == Rounding::stochastic;
  const Parts parts = parts_of(out);
  // Do the words of a row have the signs of what is to be rounded?
  [[maybe_unused]] const bool kWords = S::kUnits == 1 && (recipe.rht == 0 ? Rows::kPairs : rounds_rotated(recipe));
  const StripPlace at = rows.at;
  int rows_inside = 0;                                            // of this thread's, the first so many are within the operand
#pragma unroll
  for (int i = 0; i < S::kRows; i++) rows_inside += (unsigned)rows.row(i) < (unsigned)out.rows && (S::kUnits > 1 || first_block < blocks);
  const bool paired = S::kPairedStores && __all_sync(0xffffffffu, rows_inside == S::kRows);
  RowPart<S> v;
  unsigned tile_amax[S::kUnits] = {};
  if (tile) {
#pragma unroll Rows::kUnroll
    for (int i = 0; i < S::kRows; i++) {
      const unsigned most = how.row<S>(v, rows, i, out.cols, known);
#pragma unroll
      for (int u = 0; u < S::kUnits; u++) tile_amax[u] = max(tile_amax[u], S::kUnits == 1 ? most : block_amax_bits(v[u]));
    }
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) tile_amax[u] = max_down<S>(tile_amax[u]);
    rows.start();
  }
  [[maybe_unused]] uint4 eden[4][S::kUnits] = {};                 // a lane's rows share a draw; a thread that has 16 rows has four
#ifdef CPU_BUILD
  if constexpr (!S::kWarp) {
    if (is_eden(recipe)) for (int k = 0; k < 4; k++) random_blocks8(eden[k], how.key, eden_draw(at.row + k, first_block, blocks));
  }
#endif
  if (S::kWarp && is_eden(recipe)) eden[0][0] = random_block(how.key, how.rounds, eden_draw(at.row, first_block, blocks));
#pragma unroll Rows::kUnroll
  for (int i = 0; i < S::kRows; i++) {
    const unsigned row = (unsigned)rows.row(i);
    const unsigned most = how.row<S>(v, rows, i, out.cols, known);
    const float late = how.late_factor();
    unsigned own_amax[S::kUnits], row_amax = 0;
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) row_amax = max(row_amax, own_amax[u] = S::kUnits == 1 ? most : block_amax_bits(v[u]));
    const TensorScale outer = wide ? outer_scale(recipe, bits_float(max_along<S>(row_amax)) * late) : tensor;
    float magnitude[S::kUnits][16];
    BlockScale scale[S::kUnits];
    [[maybe_unused]] uint32_t index[S::kUnits][8], signs[S::kUnits][8];
    [[maybe_unused]] uint4 drawn[S::kUnits];
#ifdef CPU_BUILD
    if constexpr (!S::kWarp) {
      if (stochastic) random_blocks8(drawn, how.key, row * blocks + first_block);
    }
#endif
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      const unsigned block = first_block + u;
      const float block_amax = bits_float(tile ? tile_amax[u] : own_amax[u]) * late;
      BlockScale& s = scale[u];
      s = block_scale(recipe, block_amax, outer);
      if (four_six) {
        const BlockScale four = block_scale(recipe, block_amax, outer, 1.5f);
        if (tile) {
          if (row < (unsigned)out.rows && block < blocks && four_tiles[(size_t)(row / 16) * blocks + block]) s = four;
        } else {
          ErrorPair error;
          error.add(v[u], s, four);
          const bool take_four = error.four < error.six;
          if (take_four) s = four;
          if (recipe.rounding == Rounding::nearest) {            // it has been rounded; of v the sign is left to use, which is that of v on the grid
            if (!kOnCpu && block_amax != block_amax) {          // where a NaN has none
#pragma unroll
              for (int j = 0; j < 16; j++) v[u][j] = v[u][j] != v[u][j] ? bits_float(0x7fffffffu) : v[u][j];
            }
#pragma unroll
            for (int j = 0; j < 16; j++) magnitude[u][j] = take_four ? error.rounded4[j] : error.rounded6[j];
            continue;
          }
        }
      }
      if (s.divide != 0) divide_block(v[u], s.divide, late);
      else {
#pragma unroll
        for (int j = 0; j < 16; j++) v[u][j] = __fmul_rn(v[u][j], s.encode);
      }
#ifdef CPU_BUILD
      round_block(magnitude[u], v[u], stochastic, how, row * blocks + block, S::kWarp ? nullptr : &drawn[u]);
#else
      const bool usual = s.usual(block_amax);
      if (stochastic) {
        if (kWords) {
#pragma unroll
          for (int j = 0; j < 8; j++) signs[u][j] = rows.word[j];
        } else {
          sign_words(signs[u], v[u]);
        }
        if (!usual) {
#pragma unroll
          for (int j = 0; j < 16; j++) v[u][j] = v[u][j] != v[u][j] ? 6.0f : fminf(fmaxf(v[u][j], -6.0f), 6.0f);
          sign_words(signs[u], v[u]);
        }
        round_block_sr<true>(index[u], v[u], how, row * blocks + block);
      } else if (usual && is_eden(recipe)) {
        round_block<true>(magnitude[u], v[u]);
      } else {
        round_block(magnitude[u], v[u]);
      }
#endif
    }
    if (is_eden(recipe)) {                                    // the scale takes the correction, and is rounded stochastically: 16 random bits
      const float correction128 = recipe.rounding == Rounding::eden128 ? eden_correction128<S>(v, magnitude) : 0;
#pragma unroll
      for (int u = 0; u < S::kUnits; u++) {
        EdenSums sums;
        if (recipe.rounding == Rounding::eden16) sums.add(v[u], magnitude[u]);
        const float correction = recipe.rounding == Rounding::eden16 ? sums.correction() : correction128;
        uint4& draw = eden[S::kWarp ? 0 : i % 4][u];             // its next word
        scale[u].scale = eden_scale(scale[u].scale * correction, draw.x);
        draw = make_uint4(draw.y, draw.z, draw.w, 0);
      }
    }
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      const unsigned block = first_block + u, col = block * 16;
      if (i < rows_inside && (S::kUnits == 1 || block < blocks)) {
        if (parts.scales) {
          const uint32_t bits = behind_branch(float_bits(scale[u].scale));
          out.scales[scale_offset(behind_branch(row), block, blocks)] = e4m3_code(bits_float(bits));
        }
        if (wide && out.outer && block % 8 == 0) out.outer[(size_t)row * ceil_div(blocks, 8) + block / 8] = scale[u].outer;
#ifndef CPU_BUILD
        if (stochastic) {
          if (wide) store_indices<ScaleKind::outer>(out, parts, row, col, index[u], signs[u], scale[u].scale, scale[u].outer);
          else store_indices<ScaleKind::few_bits>(out, parts, row, col, index[u], signs[u], scale[u].scale, 1, paired);
          continue;
        }
#endif
        if (wide) store_block<ScaleKind::outer>(out, parts, row, col, magnitude[u], v[u], scale[u].scale, scale[u].outer);
        else store_block<ScaleKind::few_bits>(out, parts, row, col, magnitude[u], v[u], scale[u].scale, 1, paired);
      } else if (row < (unsigned)how.rows_covered && col < (unsigned)how.cols_covered) {           // padding
        if (out.scales) out.scales[scale_offset(row, block, blocks)] = 0;
        if (row < (unsigned)out.rows && col < (unsigned)out.ld) clear_block<16>(out, row, col, 8);
      }
    }
  }
}
template <Known kKnown> __device__ __forceinline__ void make_known(BlockHow& how) {
  if constexpr (kKnown != Known::any) {
    how.recipe = known_recipe(kKnown);
    if (how.recipe.signs == Signs::fixed) how.signs.word[0] = kFixedSigns;
  }
}
__device__ __forceinline__ TensorScale known_tensor_scale(const OperandRecipe& recipe, const float* amax) {
  return recipe.outer == Outer::b1x128 ? TensorScale{} : outer_scale(recipe, *amax);
}
// A lane's InputSigns for the rows of a kernel that knows its rotation.
template <Known kKnown, class Rows> __device__ __forceinline__ InputSigns input_signs(const BlockHow& how) {
  constexpr OperandRecipe kRecipe = known_recipe(kKnown);
  const float factor = how.scales_input<Rows>() ? rotation_scale(kRecipe.rht) : 1.0f;
  return InputSigns(kRecipe.rht, how.signs, kRecipe.signs == Signs::fixed, (int)threadIdx.x % 8, factor);
}
// The source, from which a kernel that knows its recipe reads rows with the signs of a fresh rotation.
template <Known kKnown, class Source> __device__ __forceinline__ Source source_of(const Source& x, [[maybe_unused]] const SignBits& signs) {
  Source source = x.ready();
  if constexpr (!Source::kRowCopy && kKnown != Known::any && known_recipe(kKnown).signs == Signs::fresh) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t low = (uint32_t)signs.word[0];
      source.flip[k] = known_recipe(kKnown).rht == 16 ? (low & 0xffff) * 0x10001u : (uint32_t)(signs.word[k / 2] >> (32 * (k % 2)));
    }
  }
  return source;
}
template <bool kTranspose, bool kWarp, class Source, Known kKnown>
__global__ void __launch_bounds__(kStripThreads, nvfp4_blocks(kTranspose, Source::kRowCopy, kKnown))
nvfp4_kernel(Operand4 out, const uint32_t* four_tiles, Source x, BlockHow how) {
  using S = Share<16, kWarp>;
  make_known<kKnown>(how);
  alignas(16) __shared__ typename Source::Element shared[shared_elements<S, kTranspose, Source>()];
  const Source source = source_of<kKnown>(x, how.signs);
  const TensorScale tensor = known_tensor_scale(how.recipe, out.amax);
  how.write_alpha(out.amax);
  using Rows = std::conditional_t<kTranspose && !Source::kRowCopy, PackedRows<S>, StripRows<S, kTranspose, Source>>;
  [[maybe_unused]] const auto signs = input_signs<kKnown, Rows>(how);
  for_each_strip<S, kTranspose>(source, how.rows_covered, how.cols_covered, shared,
                                [&](auto& rows) { nvfp4_strip<S>(rows, out, four_tiles, how, tensor, kKnown == Known::any ? nullptr : &signs); });
}

// ------------------------------------------------------------------ MS-EDEN with post hoc range alignment
// A scale of the tensor that has to be known before anything is rounded takes a search for the maximum, which reads and rotates everything one time more.
// Quartet II (section 7) does without: the first kernel rounds to codes under scales of a wide range, E8M3, the second takes these pseudo-scales, a
// sixteenth as many as elements, to E4M3. Here
//     y: the rotated row without the factor h = 1/sqrt(n); m = max|y| of the block
//     p = e8m3(m * (h / s)), at least 2^-110;  v = y * (h * (1/p));  code = e2m1(bf16(v)) to nearest, no -0;  S = sum(v*v) / sum(v*code)
//     c = e8m3_sr(p * S), 0 for a block of zeros         the pseudo-scale: a BF16 number
//     T = the power of two that takes the largest c of the tensor to 128 .. 240;  byte = e4m3_sr(c / T)
// T being a power of two, c / T is an E4M3 number as it is, unless it is below 2^-6, a 2^-14th of the largest: so the emulation's values are code * c at
// once (T is in them), and the second kernel looks at the pseudo-scales alone and changes what few small blocks there are. (The paper has any T, keeps
// p * S in BF16 and rounds once, in the second kernel; two roundings, each without a bias, are without a bias.)
// 4 significant bits: to nearest, a tie to the even one; stochastically, as in eden_scale(). a >= 0; a NaN becomes infinity.
__host__ __device__ __forceinline__ uint32_t up_to_infinity(float a) { return float_bits(a) < 0x7f800000u ? float_bits(a) : 0x7f800000u; }
__host__ __device__ __forceinline__ float e8m3_round(float a) {
  const uint32_t bits = up_to_infinity(a);
  return bits_float((bits + 0x7ffffu + (bits >> 20 & 1)) & ~0xfffffu);
}
__host__ __device__ __forceinline__ float e8m3_round_sr(float a, uint32_t word) {
  return bits_float((up_to_infinity(a) + 0xffff7u - 16 * (word & 0xffff)) & ~0xfffffu);
}
// Rounds values, all below 7, and stores them. In BF16 two take one operation: as in e2m1_round(), with 96 = 1.5 * 2^6 powers of two, which leave the
// signs alone. code: what v is rounded to.
struct PostHocCodes {
#ifdef CPU_BUILD
  __forceinline__ void round(const float (&v)[16], float (&code)[16]) {
    for (int j = 0; j < 16; j++) {
      const float a = to_float(to_bf16(v[j])), magnitude = e2m1_round(fabsf(a));
      code[j] = magnitude == 0 ? 0 : with_sign_of(magnitude, a);
    }
  }
  __forceinline__ void store(const Operand4& out, Parts parts, unsigned row, unsigned col, const float (&code)[16], float scale) const {
    float magnitude[16];
    for (int j = 0; j < 16; j++) magnitude[j] = fabsf(code[j]);
    store_block<ScaleKind::few_bits>(out, parts, row, col, magnitude, code, scale);
  }
#else
  uint32_t two[8];
  __device__ __forceinline__ void round(const float (&v)[16], float (&code)[16]) {
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const uint32_t a = pack_bf16(v[j], v[j + 1]), binade = max_bf16x2(a & 0x7f807f80u, 0x3f803f80u);
      two[j / 2] = fma_bf16x2(binade, 0xc2c0c2c0u, fma_bf16x2(binade, 0x42c042c0u, a));
      code[j] = bits_float(two[j / 2] << 16);
      code[j + 1] = bits_float(two[j / 2] & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void store(const Operand4& out, Parts parts, unsigned row, unsigned col, const float (&code)[16], float scale) const {
    const size_t at = (size_t)row * (unsigned)out.ld + col;
    if (parts.codes) {
      Vec<uint32_t, 2> words;
#pragma unroll
      for (int j = 0; j < 16; j += 8) words.v[j / 8] = e2m1_pack8(reinterpret_cast<const float (&)[8]>(code[j]));
      *reinterpret_cast<Vec<uint32_t, 2>*>(out.codes + at / 2) = words;
    }
    if (!parts.values) return;
    Vec<floatX, 16> q;
    const uint32_t both = pack_bf16(scale, scale);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      if constexpr (sizeof(floatX) == 2) {
        const uint32_t values = mul_bf16x2(two[j / 2], both);
        memcpy(&q.v[j], &values, 4);
      } else {
        q.v[j] = from_float<floatX>(code[j] * scale);
        q.v[j + 1] = from_float<floatX>(code[j + 1] * scale);
      }
    }
    store_vec(out.values + at, q);
  }
#endif
};
// The pseudo-scales of rows r, r + 4, r + 8 and r + 12 of sixteen lie side by side: eden_draw()'s unit, 16 bits each. The lowest four of the first two
// are zeros in every pseudo-scale: there the exponent of T lies, as the first kernel knew it, or 0.
__device__ __forceinline__ uint32_t* pseudo_scales(uint32_t* groups, unsigned unit) { return groups + 2 * (size_t)unit; }
__device__ __forceinline__ uint32_t tensor_exponent(float tensor) { return float_bits(tensor) >> 23 & 0xff; }
__device__ __forceinline__ uint32_t spread_exponent(uint32_t e) { return (e & 15) | (e >> 4) << 16; }
__device__ __forceinline__ uint32_t gathered_exponent(uint32_t two) { return (two & 15) | (two >> 12 & 0xf0); }
// What a pseudo-scale below 2^-6 T becomes: T times e4m3_sr(c / T), which is a multiple of 2^-9 there. The uniform number is the other half of its word.
__device__ __forceinline__ float small_scale(float c, float tensor, uint32_t word) {
  const float n = c * bits_float((263u << 23) - float_bits(tensor)), k = truncf(n);               // c / T in units of 2^-9
  return (k + (eden_uniform(word >> 16) < n - k ? 1.0f : 0.0f)) * (tensor * 0x1p-9f);
}
// Codes (if asked for), values and pseudo-scales of a strip. out.amax takes the largest one of these. What others have found by now is a lower bound of
// it, and in 82 to 96 % of the strips of X and dY it has the right exponent already (H200, step 9 of GPT-2): with that T values alone become final here.
// Where it was another the second kernel will know: the result does not depend on who comes first.
template <class S, class Rows>
__device__ __forceinline__ void post_hoc_strip(Rows& rows, const Operand4& out, uint32_t* groups, const BlockHow& how, const InputSigns* known) {
  const OperandRecipe& recipe = how.recipe;
  const unsigned blocks = ceil_div((unsigned)out.cols, 16u), first_block = (unsigned)rows.at.col / 16;
  const Parts parts = parts_of(out);
  const StripPlace at = rows.at;
  const float factor = how.late_factor();
  const unsigned seen = parts.scales ? 0 : *(const volatile unsigned*)out.amax;
  unsigned most = 0;
  constexpr int kDraws = S::kRows / 4;                             // a lane's rows share a draw; a thread that has 16 rows has four
  uint4 draw[kDraws][S::kUnits];
  uint64_t pseudo[kDraws][S::kUnits] = {};
#ifdef CPU_BUILD
  if constexpr (!S::kWarp) {
    for (int k = 0; k < kDraws; k++) random_blocks8(draw[k], how.key, eden_draw(at.row + k, first_block, blocks));
  }
#endif
  if constexpr (S::kWarp) draw[0][0] = random_block(how.key, how.rounds, eden_draw(at.row, first_block, blocks));
#pragma unroll Rows::kUnrollPostHoc
  for (int i = 0; i < S::kRows; i++) {
    const unsigned row = (unsigned)rows.row(i);
    RowPart<S> v;
    const unsigned own = how.row<S>(v, rows, i, out.cols, known);
    float code[S::kUnits][16], p[S::kUnits];
    PostHocCodes rounded[S::kUnits];
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      const unsigned m = S::kUnits == 1 ? own : block_amax_bits(v[u]);           // of NaN: infinity, so that v and all that follows is NaN
      p[u] = e8m3_round(fmaxf(bits_float(min(m, 0x7f800000u)) * (factor / kEdenStep), 0x1p-110f));
      const float encode = factor * (1.0f / p[u]);
#pragma unroll
      for (int j = 0; j < 16; j++) v[u][j] = __fmul_rn(v[u][j], encode);
      rounded[u].round(v[u], code[u]);
      p[u] = m ? p[u] : 0;
    }
    const float correction128 = recipe.rounding == Rounding::eden128 ? eden_correction128<S>(v, code) : 0;
    const int k = S::kWarp ? 0 : i % 4;
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      EdenSums sums;
      if (recipe.rounding == Rounding::eden16) sums.add(v[u], code[u]);
      const uint32_t word = draw[k][u].x;
      draw[k][u] = make_uint4(draw[k][u].y, draw[k][u].z, draw[k][u].w, 0);
      float c = e8m3_round_sr(p[u] * (recipe.rounding == Rounding::eden16 ? sums.correction() : correction128), word);
      pseudo[k][u] = pseudo[k][u] >> 16 | (uint64_t)(float_bits(c) >> 16) << 48;
      most = max(most, float_bits(c));
      const uint32_t least = (behind_branch(seen) & 0x7f800000u) - (13u << 23);                  // 2^-6 T; negative where nothing was seen
      if (c < bits_float(least)) c = small_scale(c, bits_float(least + (6u << 23)), behind_branch(word));
      const unsigned block = first_block + u, col = block * 16;
      if (row < (unsigned)out.rows && block < blocks) {
        rounded[u].store(out, parts, row, col, code[u], c);
      } else if (row < (unsigned)how.rows_covered && col < (unsigned)how.cols_covered) {           // padding
        if (out.scales) out.scales[scale_offset(row, block, blocks)] = 0;
        if (row < (unsigned)out.rows && col < (unsigned)out.ld) clear_block<16>(out, row, col, 8);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kDraws; k++) {
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
      const unsigned row = at.row + k, block = first_block + u;
      if (row < (unsigned)out.rows && block < blocks) {
        const uint32_t exponent = seen ? (seen >> 23) - 7 : 0;
        const Vec<uint32_t, 2> four = {{(uint32_t)pseudo[k][u] | spread_exponent(exponent), (uint32_t)(pseudo[k][u] >> 32)}};
        store_vec(pseudo_scales(groups, eden_draw(row, block, blocks)), four);
      }
    }
  }
  most = max_down<S>(max_along<S>(most));
  if (threadIdx.x % S::kLanes == 0 && most > seen) atomicMax((unsigned*)out.amax, most);
}
template <bool kTranspose, bool kWarp, class Source, Known kKnown>
__global__ void __launch_bounds__(kStripThreads, nvfp4_blocks(kTranspose, Source::kRowCopy, kKnown))
post_hoc_kernel(Operand4 out, uint32_t* groups, Source x, BlockHow how) {
  using S = Share<16, kWarp>;
  make_known<kKnown>(how);
  alignas(16) __shared__ typename Source::Element shared[shared_elements<S, kTranspose, Source>()];
  const Source source = source_of<kKnown>(x, how.signs);
  using Rows = std::conditional_t<kTranspose && !Source::kRowCopy, PackedRows<S>, StripRows<S, kTranspose, Source>>;
  [[maybe_unused]] const auto signs = input_signs<kKnown, Rows>(how);
  for_each_strip<S, kTranspose>(source, how.rows_covered, how.cols_covered, shared,
                                [&](auto& rows) { post_hoc_strip<S>(rows, out, groups, how, kKnown == Known::any ? nullptr : &signs); });
}
// The second kernel, for one operand, or both copies of a matrix. A thread has the 16 blocks of four units. Where the packed form is asked for, it writes
// scale bytes, and values without T. Else most have nothing to do: it changes values of small blocks for which T was another, so that they have the scale
// `had`. One NaN, and all is NaN, as with a scale of the tensor.
struct AlignJob { Operand4 out; uint32_t* groups; unsigned units; BlockHow how; };
struct AlignJobs { AlignJob job[2]; };
__device__ __forceinline__ void pseudo_scales_of(float (&c)[4], const uint32_t* words) {
#pragma unroll
  for (int i = 0; i < 4; i++) c[i] = bits_float((i % 2 ? words[i / 2] : words[i / 2] << 16) & 0xfff00000u);
}
__device__ __forceinline__ void small_scales(float (&scale)[4], const float (&c)[4], float tensor, const uint4& draw) {
  const uint32_t word[4] = {draw.x, draw.y, draw.z, draw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) if (c[i] < 0x1p-6f * tensor) scale[i] = small_scale(c[i], tensor, word[i]);
}
__device__ __forceinline__ bool any_small(const float (&c)[4], float tensor) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; i++) any |= c[i] > 0 && c[i] < 0x1p-6f * tensor;
  return any;
}
__global__ void __launch_bounds__(256, 4) align_post_hoc_kernel(AlignJobs jobs) {
  const AlignJob& job = jobs.job[blockIdx.y];
  const Operand4& out = job.out;
  const unsigned first = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  job.how.write_alpha(amax_for_alpha(out, job.how.recipe));
  if (first >= job.units) return;                                                                 // units are a multiple of 4
  Vec<uint32_t, 4> all[2];
  for (int h = 0; h < 2; h++) all[h] = load_vec<4>(pseudo_scales(job.groups, first + 2 * h));
  const float tensor = post_hoc_tensor_scale(*out.amax);
  const bool packed = out.scales != nullptr, broken = tensor != tensor;
  const unsigned blocks = ceil_div((unsigned)out.cols, 16u), rows = (unsigned)out.rows;
  float c[4];
  if (packed) {
    uint32_t bytes[4] = {};                                                                       // of a row: of four units
#pragma unroll
    for (int h = 0; h < 4; h++) {
      pseudo_scales_of(c, &all[h / 2].v[h % 2 * 2]);
      float scale[4] = {c[0], c[1], c[2], c[3]};
      if (any_small(c, tensor)) small_scales(scale, c, tensor, random_block(job.how.key, job.how.rounds, first + h));
#pragma unroll
      for (int i = 0; i < 4; i++) bytes[i] |= (uint32_t)e4m3_code(scale[i] / tensor) << (8 * h);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      for (unsigned h = 0; h < 4; h++) {
        const unsigned across = (first + h) / blocks, block = (first + h) % blocks, row = across / 4 * 16 + across % 4 + 4 * i;
        if (row >= rows) continue;
        uint8_t* const to = out.scales + scale_offset(row, block, blocks);
        if (blocks % 4 == 0) { *(uint32_t*)to = bytes[i]; break; }                                // four neighbours
        *to = (uint8_t)(bytes[i] >> (8 * h));
      }
    }
    for (unsigned k = 0; out.values && k < 16; k++) {
      const unsigned across = (first + k / 4) / blocks, block = (first + k / 4) % blocks, row = across / 4 * 16 + across % 4 + 4 * (k % 4);
      if (row >= rows) continue;
      const float scale = e4m3_decode(out.scales[scale_offset(row, block, blocks)]);
      for (size_t j = 0, at = (size_t)row * out.ld + block * 16; j < 16; j++, at++)
        out.values[at] = from_float<floatX>(e2m1_decode(out.codes[at / 2] >> (4 * (at % 2)) & 15) * scale);
    }
    return;
  }
  const uint32_t now = spread_exponent(tensor_exponent(tensor)), mask = spread_exponent(0xff);
  bool nothing = true;
#pragma unroll
  for (int h = 0; h < 4; h++) {
    pseudo_scales_of(c, &all[h / 2].v[h % 2 * 2]);
    nothing &= !broken && ((all[h / 2].v[h % 2 * 2] & mask) == now || !any_small(c, tensor));
  }
  if (nothing) return;
#pragma unroll 1
  for (unsigned unit = first; unit < first + 4; unit++) {
    const Vec<uint32_t, 2> words = load_vec<2>(pseudo_scales(job.groups, unit));
    const float before = bits_float(gathered_exponent(words.v[0]) << 23);
    pseudo_scales_of(c, words.v);
    float had[4] = {c[0], c[1], c[2], c[3]}, scale[4] = {c[0], c[1], c[2], c[3]};
    if (any_small(c, tensor)) {
      const uint4 draw = random_block(job.how.key, job.how.rounds, unit);
      small_scales(scale, c, tensor, draw);
      if (before != 0) small_scales(had, c, before, draw);
    }
    const unsigned across = unit / blocks, row = across / 4 * 16 + across % 4;
    floatX* const values = out.values + (size_t)row * out.ld + unit % blocks * 16;
    const size_t step = (size_t)4 * out.ld;
    Vec<floatX, 16> q[4];
    bool change[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {                                                                 // a scale that is 0 under a smaller T is 0 under this one
      change[i] = row + 4 * i < rows && (broken || (had[i] != scale[i] && had[i] != 0));
      if (change[i]) q[i] = load_vec<16>(values + i * step);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (!change[i]) continue;
      const float ratio = broken ? tensor : scale[i] / had[i];
#pragma unroll
      for (int j = 0; j < 16; j++) {                                                              // BF16 rounds the product to what it is to be
        const float value = to_float(q[i].v[j]);
        q[i].v[j] = from_float<floatX>(sizeof(floatX) == 2 || broken ? value * ratio : value / had[i] * scale[i]);
      }
      store_vec(values + i * step, q[i]);
    }
  }
}

// ------------------------------------------------------------------ both copies of a matrix, or their maxima, in one reading
// The gradient dY is quantized twice, by rows and by columns, and X in the forward pass if X^T is to wait packed. A GPU's kernel for each reads the
// matrix, 2 bytes an element each; so does each search for a maximum. Here a block brings a square of 128 x 128 into shared memory once, the next one
// already on its way, and its warps make 8 strips of the row copy from it and 8 of the column copy: the same strips, hence the same bits.
//   bytes an element, values     amax    codes      sum      apart
//   nvfp4: dY                       2    2 + 2 + 2     8        10
//   nvfp4: X, X^T packed            2    2 + 2 + .56  6.56     8.56
//   quartet2: dY, scales post hoc   0    2 + 2 + 2     6         8        and 1/8 + 1/8 of pseudo-scales, written and read, for each copy
// Banks   A row of the square takes 272 bytes: 16 more after its first 128, and 16 more after every 16 rows. Row copy: the 8 lanes that a 16-byte
//         load serves at once are those of one row, lane a at byte 32 a, +16 from a = 4 on: words 0 8 16 24, then 4 12 20 28 (mod 32), 4 words each:
//         all banks once. Column copy: lane (a, d), 16 rows of the square and one column apart, is at word 1092 a + d / 2 = 4 a + d / 2 (mod 32),
//         d < 4: 16 words in 16 banks, two lanes each. cp.async: 8 lanes write 128 bytes in a row.
constexpr int kSquare = 128;
constexpr int kBothThreads = 256, kBothBlocks = 3;             // of a block; blocks that a multiprocessor is to hold
// kColumns: for columns alone (below), where a row of the square takes 256 bytes, and 32 more after every 16 rows.
template <bool kColumns = false> __host__ __device__ constexpr int square_offset(int row, int column) {
  return kColumns ? row * kSquare + row / 16 * 16 + column : row * (kSquare + 8) + row / 16 * 8 + column + column / 64 * 8;
}
template <bool kColumns = false> constexpr size_t kSquareShared = kTiles * square_offset<kColumns>(kSquare, 0) * sizeof(bf16);
template <int kThreads, bool kColumns>
__device__ __forceinline__ void fetch_square(bf16* square, const Matrix<bf16>& x, int first_row, int first_col) {
  constexpr int kStep = kThreads / 16;                          // rows at once
  static_assert(kStep % 16 == 0, "a step is as long in the whole square");
  // Columns alone find their places again for every square, as no register is left to keep them in, and have no case of their own for edges.
  const int thread = (int)(kColumns ? behind_branch(threadIdx.x) : threadIdx.x), r = first_row + thread / 16, part = thread % 16 * 8;
  bf16* to = square + square_offset<kColumns>(thread / 16, part);
  const bf16* from = x.x + (size_t)r * x.cols + first_col + part;
  const size_t step = (size_t)kStep * x.cols;
  if (!kColumns && first_row + kSquare <= x.rows && first_col + kSquare <= x.cols) {
#pragma unroll
    for (int row = 0; row < kSquare; row += kStep, from += step) cp_async<16>(to + square_offset<kColumns>(row, 0), from, true);
    return;
  }
  const bool in_row = first_col + part < x.cols;                // rows of whole 16 bytes
#pragma unroll (kColumns ? kSquare / kStep : 1)
  for (int row = 0; row < kSquare; row += kStep, from += step) {
    const bool inside = in_row && r + row < x.rows;
    cp_async<16>(to + square_offset<kColumns>(row, 0), inside ? from : x.x, inside);
  }
}
// Calls use(square, first row, first column) for this block's squares of the first `down` x `across`. Neighbouring blocks' squares lie side by side; with
// kColumns one below the other, so that what they write lies side by side.
template <int kThreads, bool kColumns = false, class Use>
__device__ __forceinline__ void for_each_square(const Matrix<bf16>& x, unsigned down, unsigned across, bf16* shared, Use use) {
  constexpr int kElements = square_offset<kColumns>(kSquare, 0);
  const unsigned length = kColumns ? down : across, lines = kColumns ? across : down, step = gridDim.x % length, step_lines = gridDim.x / length;
  unsigned place = blockIdx.x % length, line = blockIdx.x / length, turn = 0;             // of the next square, which is not there if there is no such line
  auto row = [&] { return (int)(kColumns ? place : line) * kSquare; };
  auto col = [&] { return (int)(kColumns ? line : place) * kSquare; };
  auto fetch = [&] {
    if (line < lines) fetch_square<kThreads, kColumns>(shared + turn % kTiles * kElements, x, row(), col());
    cp_async_commit();
  };
  fetch();
  while (line < lines) {
    const int first_row = row(), first_col = col();
    const bf16* square = shared + turn++ % kTiles * kElements;
    place += step;
    line += step_lines + (place >= length);
    place -= place >= length ? length : 0;
    fetch();
    cp_async_wait<1>();
    __syncthreads();
    use(square, first_row, first_col);
    __syncthreads();                                            // the square is used up
  }
}
// The rows of a strip, from a square in shared memory. row, col: of the operand, where the square begins; strip: 0 to 7.
template <class S, bool kTranspose> struct SquareRows {
  static constexpr bool kFewBits = true, kPairs = !kTranspose;
  static constexpr int kUnroll = 1, kUnrollPostHoc = 1;
  StripPlace at;
  const bf16* from;
  uint32_t pairs, word[S::kUnit / 2];                           // as in StripRows
  __device__ __forceinline__ SquareRows(const bf16* square, int row, int col, int strip, int rows_covered, int cols_covered) {
    const int lane = (int)threadIdx.x % 32, along = lane % S::kAlong, down = lane / S::kAlong;
    at = {row + strip * 16 + down, col + along * 16, along, row + strip * 16 < rows_covered && col < cols_covered};
    from = square + (kTranspose ? square_offset(along * 16, strip * 16) + down : square_offset(strip * 16 + down, along * 16));
  }
  __device__ __forceinline__ int row(int i) const { return at.row + i * S::kDown; }
  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ void load(RowPart<S>& v, int i, [[maybe_unused]] const uint32_t* flip = nullptr) {
    if constexpr (kTranspose) {
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const bf16 x = from[square_offset(j, 0) + i * S::kDown];
#ifdef CPU_BUILD
        v[0][j] = to_float(x);
#else
        v[0][j] = flip ? flipped_bf16(x, flip[j]) : to_float(x);
#endif
      }
    } else {
      Matrix<bf16>::Words<16> run;
      const Vec<bf16, 16> words = load_vec<16>(from + i * (S::kDown * (kSquare + 8)));
      memcpy(&run, &words, sizeof run);
#pragma unroll
      for (int j = 0; j < 16; j++) {
#ifdef CPU_BUILD
        v[0][j] = run[j];
#else
        v[0][j] = flip ? run.flipped(j, flip[j]) : run[j];
#endif
      }
      if constexpr (kPairs) {
        pairs = max_abs_pairs(run.word);
#pragma unroll
        for (int j = 0; j < 8; j++) word[j] = run.word[j];
      }
    }
  }
};
// Columns alone, where they need no scale of 128 columns. What a GPU's memory takes from few squares at a time it takes fastest, and so few squares are
// to keep a whole multiprocessor busy: a block has 16 warps, each of which makes half a strip, 16 x 64, and a lane two neighbouring rows of the operand,
// which come in one word. Banks: lane (a, d) is at word 1032 a + d = 8 a + d (mod 32), a < 4, d < 8: all of them once.
constexpr int kColumnThreads = 512;
struct HalfStrip {
  static constexpr bool kWarp = true;
  static constexpr int kUnit = 16, kUnits = 1, kAlong = 4, kLanes = 32, kDown = 8, kRows = 2;       // as in Share, but that a
                                                                                                    // lane's rows are neighbours
  static constexpr bool kPairedStores = true;
};
struct SquareColumns {
  static constexpr bool kFewBits = true, kPairs = false;
  static constexpr int kUnroll = 2;
  StripPlace at;
  uint32_t both[16];                                            // elements of both rows
  uint32_t pairs, word[8];                                      // as in StripRows
  __device__ __forceinline__ SquareColumns(const bf16* square, int row, int col) {
    const unsigned thread = behind_branch(threadIdx.x);         // as in fetch_square()
    const int half = (int)(thread / 32), lane = (int)(thread % 32), along = lane % HalfStrip::kAlong, strip = half / 2 * 16;
    const int first = half % 2 * 64 + along * 16, down = lane / HalfStrip::kAlong * 2;
    at = {row + strip + down, col + first, along, true};
    const bf16* from = square + square_offset<true>(first, strip + down);
#pragma unroll
    for (int j = 0; j < 16; j++) both[j] = *(const uint32_t*)(from + square_offset<true>(j, 0));
  }
  __device__ __forceinline__ int row(int i) const { return at.row + i; }
  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ void load(RowPart<HalfStrip>& v, int i, const uint32_t* = nullptr) {
#pragma unroll
    for (int j = 0; j < 16; j++) v[0][j] = bits_float(i ? both[j] & 0xffff0000u : both[j] << 16);
  }
};
template <Known kKnown>
__global__ void __launch_bounds__(kColumnThreads, 2)
nvfp4_columns_kernel(Operand4 out, const uint32_t* four_tiles, Matrix<bf16> x, BlockHow how) {
  constexpr OperandRecipe kRecipe = known_recipe(kKnown);
  static_assert(kRecipe.outer == Outer::tensor && kRecipe.signs != Signs::fresh && kRecipe.rht <= 16 && kRecipe.rounding != Rounding::eden16, "not by half strips");
  make_known<kKnown>(how);
  DYNAMIC_SHARED(bf16, shared);
  const TensorScale tensor = known_tensor_scale(how.recipe, out.amax);
  how.write_alpha(out.amax);
  const auto signs = input_signs<kKnown, SquareColumns>(how);
  const unsigned down = ceil_div((unsigned)how.cols_covered, (unsigned)kSquare), across = ceil_div((unsigned)how.rows_covered, (unsigned)kSquare);
  for_each_square<kColumnThreads, true>(x, down, across, shared, [&](const bf16* square, int row, int col) {
    SquareColumns columns(square, col, row);
    nvfp4_strip<HalfStrip>(columns, out, four_tiles, how, tensor, &signs);
  });
}
template <Known kRow, Known kColumn>
__global__ void __launch_bounds__(kBothThreads, kBothBlocks)
nvfp4_both_kernel(Operand4 row_out, Operand4 column_out, Matrix<bf16> x, BlockHow row_how, BlockHow column_how) {
  using S = Share<16, true>;
  make_known<kRow>(row_how);
  make_known<kColumn>(column_how);
  DYNAMIC_SHARED(bf16, shared);
  const TensorScale row_tensor = known_tensor_scale(row_how.recipe, row_out.amax);
  const TensorScale column_tensor = known_tensor_scale(column_how.recipe, column_out.amax);
  row_how.write_alpha(row_out.amax);
  column_how.write_alpha(column_out.amax);
  const unsigned down = ceil_div((unsigned)max(row_how.rows_covered, column_how.cols_covered), (unsigned)kSquare);
  const unsigned across = ceil_div((unsigned)max(row_how.cols_covered, column_how.rows_covered), (unsigned)kSquare);
  const auto row_signs = input_signs<kRow, SquareRows<S, false>>(row_how);
  const auto column_signs = input_signs<kColumn, SquareRows<S, true>>(column_how);
  for_each_square<kBothThreads>(x, down, across, shared, [&](const bf16* square, int row, int col) {
#pragma unroll 1
    for (int strip = warp_in_block(); strip < 8; strip += kBothThreads / 32) {         // whole warps are inside, or not
      SquareRows<S, false> rows(square, row, col, strip, row_how.rows_covered, row_how.cols_covered);
      if (rows.at.inside) nvfp4_strip<S>(rows, row_out, nullptr, row_how, row_tensor, &row_signs);
      SquareRows<S, true> columns(square, col, row, strip, column_how.rows_covered, column_how.cols_covered);
      if (columns.at.inside) nvfp4_strip<S>(columns, column_out, nullptr, column_how, column_tensor, &column_signs);
    }
  });
}
// The same where both have fresh signs: half of the warps take the rows, half the columns, so that a lane holds the signs of one rotation.
template <Known kKnown>
__global__ void __launch_bounds__(kBothThreads, kBothBlocks)
both_halves_kernel(Operand4 row_out, Operand4 column_out, uint32_t* row_groups, uint32_t* column_groups, Matrix<bf16> x, BlockHow row_how,
                   BlockHow column_how) {
  using S = Share<16, true>;
  constexpr int kWarps = kBothThreads / 64;                      // of a half
  constexpr bool kPostHoc = is_post_hoc(known_recipe(kKnown));
  make_known<kKnown>(row_how);
  make_known<kKnown>(column_how);
  DYNAMIC_SHARED(bf16, shared);
  if (!kPostHoc) { row_how.write_alpha(row_out.amax); column_how.write_alpha(column_out.amax); }
  const int warp = warp_in_block();
  const bool columns = warp >= kWarps;
  SignBits bits;
  for (int k = 0; k < 2; k++) bits.word[k] = columns ? column_how.signs.word[k] : row_how.signs.word[k];
  const InputSigns signs(known_recipe(kKnown).rht, bits, false, (int)threadIdx.x % 8, 1.0f);
  const unsigned down = ceil_div((unsigned)max(row_how.rows_covered, column_how.cols_covered), (unsigned)kSquare);
  const unsigned across = ceil_div((unsigned)max(row_how.cols_covered, column_how.rows_covered), (unsigned)kSquare);
  auto take = [&](auto& rows, const Operand4& out, uint32_t* groups, const BlockHow& how) {
    if (!rows.at.inside) return;
    if constexpr (kPostHoc) post_hoc_strip<S>(rows, out, groups, how, &signs);
    else nvfp4_strip<S>(rows, out, nullptr, how, TensorScale{}, &signs);
  };
  for_each_square<kBothThreads>(x, down, across, shared, [&](const bf16* square, int row, int col) {
#pragma unroll 1
    for (int strip = warp % kWarps; strip < 8; strip += kWarps) {
      if (columns) {
        SquareRows<S, true> rows(square, col, row, strip, column_how.rows_covered, column_how.cols_covered);
        take(rows, column_out, column_groups, column_how);
      } else {
        SquareRows<S, false> rows(square, row, col, strip, row_how.rows_covered, row_how.cols_covered);
        take(rows, row_out, row_groups, row_how);
      }
    }
  });
}
// Runs of 32 elements of rows of the square, or of its columns, four lanes to a line of 128, eight lines at once: as they lie in memory, in pairs, so
// that rows and columns alike take four loads of 16 bytes a lane. A column's pairs come from ldmatrix, which hands each of four lanes 2 of the 8 rows
// that it is told: each lane's lie 32 apart. Banks: two rows 32 bytes apart share what 8 lanes read at once; ldmatrix reads 4 pairs 32 bytes apart.
constexpr int kRun = 32;
using SquareRun = Matrix<bf16>::Words<kRun>;
struct SquareRuns {
  bool columns;
  int from;                                                     // in the square: of what this lane's first load names
  // line: this warp's first row or column; a multiple of 16
  __device__ __forceinline__ SquareRuns(bool by_columns, int line) : columns(by_columns) {
    const int lane = (int)threadIdx.x % 32;
    from = columns ? square_offset(kRun * (lane / 2 % 4) + 2 * (lane / 8) + lane % 2, line) : square_offset(line + 2 * (lane / 4), kRun * (lane % 4));
  }
  // The i-th eight lines.
  __device__ __forceinline__ void load(SquareRun& run, const bf16* square, int i) const {
    const bf16* at = square + from + (columns ? 8 * i : square_offset(i / 2 * 16 + i % 2, 0));
#pragma unroll
    for (int q = 0; q < 4; q++) {
      uint32_t words[4];
      if (columns) {
        ldmatrix_x4_trans(words, at + square_offset(8 * q, 0));
      } else {
        const Vec<uint32_t, 4> eight = load_vec<4>((const uint32_t*)(at + 8 * q));
        memcpy(words, &eight, sizeof words);
      }
      memcpy(&run.word[4 * q], words, sizeof words);
    }
  }
};
// max|x| of the rotated columns and, with a rotation of the rows, of those: half of the warps take the rows, half the columns. Without one: of x as it
// is, from the words that the columns are made of. Beyond the edges of x are zeros, which change no maximum.
template <int kRowRht, int kColumnRht>
__global__ void __launch_bounds__(kBothThreads, kBothBlocks)
amax_both_kernel(unsigned* row_amax, unsigned* column_amax, Matrix<bf16> x, BlockHow row_how, BlockHow column_how) {
  static_assert(kRowRht == 0 || kRowRht == kColumnRht, "half of the warps do as the others do");
  constexpr int kWarps = kBothThreads / 32 / (kRowRht ? 2 : 1), kLines = kSquare / kWarps;
  DYNAMIC_SHARED(bf16, shared);
  const int warp = (int)threadIdx.x / 32, first = warp % kWarps * kLines;
  const bool columns = kRowRht == 0 || warp < kWarps;
  const SquareRuns runs(columns, first);
  SignBits bits;
  for (int k = 0; k < 2; k++) bits.word[k] = columns ? column_how.signs.word[k] : row_how.signs.word[k];
  const LaneSigns<kColumnRht, kRun> signs(bits, (int)threadIdx.x % 4);
  unsigned most = 0, plain = 0;
  const unsigned down = ceil_div((unsigned)x.rows, (unsigned)kSquare), across = ceil_div((unsigned)x.cols, (unsigned)kSquare);
  for_each_square<kBothThreads>(x, down, across, shared, [&](const bf16* square, int, int) {
#pragma unroll 1
    for (int i = 0; i < kLines / 8; i++) {
      SquareRun run;
      runs.load(run, square, i);
      float v[kRun];
#pragma unroll
      for (int j = 0; j < kRun; j++) v[j] = run[j];
      if (!kRowRht) {
#pragma unroll
        for (int j = 0; j < kRun / 2; j++) plain = max_abs_bf16x2(plain, run.word[j]);
      }
      most = max(most, rotated_amax_bits(v, signs));
    }
  });
  plain = arithmetic_nan(pair_amax_bits(plain));
  using S = Share<16, true>;
  most = max_down<S>(max_along<S>(most));
  if (!kRowRht) plain = max_down<S>(max_along<S>(plain));
  if (threadIdx.x % 32) return;
  if (columns) atomicMax(column_amax, finished_amax(column_how.recipe, most));
  else atomicMax(row_amax, finished_amax(row_how.recipe, most));
  if (!kRowRht) atomicMax(row_amax, plain);
}

// ------------------------------------------------------------------ MXFP4, MXFP8: a power of two for 32 elements
// Population standard deviation; the variance, which rounding may have made negative, is clamped. Sums in ascending order.
__device__ inline float standard_deviation(const float (&v)[32]) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int j = 0; j < 32; j++) { sum = __fadd_rn(sum, v[j]); squares = __fadd_rn(squares, __fmul_rn(v[j], v[j])); }
  const float mean = sum / 32, variance = __fsub_rn(squares / 32, __fmul_rn(mean, mean));
  return sqrtf(variance < 0 ? 0.0f : variance);             // a NaN stays
}
__device__ inline uint8_t mx_scale(const OperandRecipe& how, const float (&v)[32]) {
  const float amax = bits_float(block_amax_bits(v));
  if (how.format == Format::mxfp8) return e8m0_encode_ceil(amax / kE4M3Max);
  if (how.scale == ScaleRule::ceil) return e8m0_encode_ceil(amax / kE2M1Max);
  if (how.scale == ScaleRule::range34) return e8m0_encode_floor(amax);
  if (how.scale == ScaleRule::ocp) {
    const uint8_t floor = e8m0_encode_floor(amax);
    return amax >= INFINITY || amax != amax ? floor : floor < 2 ? 0 : floor - 2;
  }
  // QuEST: the E2M1 grid with the smallest squared error on Gaussians reaches to 2.92 sigma
  const float s = __fadd_rn(__fmul_rn((float)(2.92247856 / 6), standard_deviation(v)), 1e-8f);
  return how.scale == ScaleRule::quest_floor ? e8m0_encode_floor(s) : e8m0_encode_nearest(s);
}
template <bool kTranspose, bool kWarp, class Source>
__global__ void __launch_bounds__(kStripThreads, kMxBlocks) mx_kernel(Operand4 out, Source x, BlockHow how) {
  using S = Share<32, kWarp>;
  alignas(16) __shared__ typename Source::Element shared[shared_elements<S, kTranspose, Source>()];
  const Source source = x.ready();
  const int blocks = ceil_div(out.cols, 32);
  how.write_alpha(out.amax);
  const bool fp8 = how.recipe.format == Format::mxfp8, thrice = how.recipe.format == Format::mxfp4 && how.recipe.scale == ScaleRule::range34;
  for_each_block<S, kTranspose>(source, how, out.cols, shared, [&](float (&v)[32], int row, int block) {
    const int col = block * 32;
    if (row >= out.rows || block >= blocks) {               // padding
      if (row >= how.rows_covered || col >= how.cols_covered) return;
      if (out.scales) out.scales[scale_offset(row, block, blocks)] = 0;
      if (row < out.rows && col < out.ld) {
        clear_block<32>(out, row, col, fp8 ? 16 : 8);
        if (out.mask) out.mask[(size_t)row * (out.ld / 32) + block] = 0;
      }
      return;
    }
    const uint8_t byte = mx_scale(how.recipe, v);
    const float scale = e8m0_decode(byte), reciprocal = e8m0_reciprocal(byte);
    if (thrice) {
#pragma unroll
      for (int j = 0; j < 32; j++) v[j] *= 3;
    }
#pragma unroll
    for (int j = 0; j < 32; j++) v[j] *= reciprocal;
    if (out.scales) out.scales[scale_offset(row, block, blocks)] = byte;
    if (out.mask) {
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 32; j++) word |= (uint32_t)(fabsf(v[j]) < kE2M1Max) << j;
      out.mask[(size_t)row * (out.ld / 32) + block] = word;
    }
    if (fp8) { store_fp8_block(out, row, col, v, true, scale); return; }
    round_and_store<ScaleKind::few_bits>(out, row, col, v, how, 2 * ((uint32_t)row * blocks + block), scale);
  });
}

// ------------------------------------------------------------------ one scale for each row; FP8, one scale a tensor; no quantization at all
template <bool kTranspose, bool kWarp, class Source>
__global__ void __launch_bounds__(kStripThreads, kPlainBlocks) plain_kernel(Operand4 out, const unsigned* row_amax, Source x, BlockHow how) {
  using S = Share<16, kWarp>;
  alignas(16) __shared__ typename Source::Element shared[shared_elements<S, kTranspose, Source>()];
  const Source source = x.ready();
  how.write_alpha(out.amax);
  const Format format = how.recipe.format;
  const int blocks = ceil_div(out.cols, 16);
  const bool e4m3 = format == Format::fp8_e4m3;
  const float encode = is_fp8(format) ? tensor_scale(*out.amax, e4m3 ? kE4M3Max : kE5M2Max).encode : 1;
  for_each_block<S, kTranspose>(source, how, out.cols, shared, [&](float (&v)[16], int row, int block) {
    const int col = block * 16;
    if (row >= out.rows || col >= out.ld) return;
    if (format == Format::exact) {
      Vec<floatX, 16> q;
#pragma unroll
      for (int j = 0; j < 16; j++) q.v[j] = from_float<floatX>(block < blocks ? v[j] : 0.0f);
      store_vec(out.values + (size_t)row * out.ld + col, q);
      if (out.mask && block % 2 == 0) out.mask[(size_t)row * (out.ld / 32) + block / 2] = 0xffffffffu;
    } else if (block >= blocks) {
      clear_block<16>(out, row, col, is_fp8(format) ? 16 : 8);
    } else if (is_fp8(format)) {
#pragma unroll
      for (int j = 0; j < 16; j++) v[j] *= encode;
      store_fp8_block(out, row, col, v, e4m3, 1.0f);
    } else {
      float scale = bits_float(row_amax[row]) / kE2M1Max;
      if (scale == 0) scale = 1;
      divide_block(v, scale);
      if (out.outer && block == 0) out.outer[row] = scale;
      round_and_store<ScaleKind::fp32>(out, row, col, v, how, (uint32_t)row * blocks + block, scale);
    }
  });
}

// The values that quantize() would have written beside these codes: without the scale of the tensor, which is alpha's. Padding is zeros. A thread 16,
// which share their scales.
__global__ void unpack_values_kernel(Operand4 p, OperandRecipe how) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i / (p.ld / 16u);
  const int col = (int)(i % (p.ld / 16u)) * 16;
  if (row >= (unsigned)p.rows) return;
  const size_t at = (size_t)row * p.ld + col;
  const bool fp8 = is_fp8(how.format) || how.format == Format::mxfp8;
  Vec<uint32_t, 4> codes;                                      // asked for before the scales are waited for
  if (fp8) codes = load_vec<4>((const uint32_t*)(p.codes + at));
  else { const Vec<uint32_t, 2> half = load_vec<2>((const uint32_t*)(p.codes + at / 2)); codes.v[0] = half.v[0]; codes.v[1] = half.v[1]; }
  const ElementScale s = element_scale(p, how, (int)row, col, 1);
  Vec<floatX, 16> out;
  if (fp8) {
    const bool e5m2 = how.format == Format::fp8_e5m2;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const uint8_t byte = (uint8_t)(codes.v[j / 4] >> (8 * (j % 4)));
      out.v[j] = from_float<floatX>((e5m2 ? e5m2_decode(byte) : e4m3_decode(byte)) * s.block * s.outer);
    }
  } else {
#ifdef CPU_BUILD
    for (int half = 0; half < 2; half++) {
      const word8 code = all8(codes.v[half]) >> word8{0, 4, 8, 12, 16, 20, 24, 28}, index = code & 7;
      const float8 small = 0.5f * __builtin_convertvector(index, float8), large = (float8)((index << 22) + (126u << 23));     // 1 and above
      const float8 value = (float8)((word8)(index < 2 ? small : large) | ((code & 8) << 28));
      store8(p.values + at + 8 * half, value * s.block * s.outer);
    }
    return;
#endif
#pragma unroll
    for (int j = 0; j < 16; j++) out.v[j] = from_float<floatX>(e2m1_decode((int)(codes.v[j / 8] >> (4 * (j % 8)) & 15)) * s.block * s.outer);
  }
  store_vec(p.values + at, out);
}
// p.values from the packed form, which `how` describes; p.values has the same ld.
inline void unpack_values(const Operand4& p, const OperandRecipe& how) {
  launch(unpack_values_kernel, ceil_div((unsigned)p.rows * (p.ld / 16), 256u), 256, 0, p, how);
}

// ------------------------------------------------------------------ the host side
inline bool needs_amax(const OperandRecipe& r) {
  return (r.format == Format::nvfp4 && r.outer == Outer::tensor && !is_post_hoc(r)) || is_fp8(r.format) || r.format == Format::fp4_vector;
}
// Blocks of kernel<<<., threads>>> that the GPU holds at once.
template <class Kernel> unsigned resident_blocks(Kernel kernel, [[maybe_unused]] unsigned threads) {
#ifdef CPU_BUILD
  (void)kernel;
  return 2;                                                    // so few that the tests' blocks stay, too, and fetch ahead
#else
  static std::map<const void*, int> known;                     // one map for all kernels of a type
  int& blocks = known[(const void*)kernel];
  if (!blocks) CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, (int)threads, 0));
  return (unsigned)(max(blocks, 1) * multiprocessors());
#endif
}
// How many blocks with so many bytes of shared memory each a multiprocessor holds.
inline unsigned shared_holds([[maybe_unused]] size_t bytes) {
#ifdef CPU_BUILD
  return 3;
#else
  static const size_t all = [] {
    int n = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0));
    return (size_t)n;
  }();
  return (unsigned)(all / (bytes + 1024));
#endif
}
// Runs a kernel with a warp for every strip (on the CPU: a thread), four strips a block. `stay`: as many blocks as there is room for, which go on to
// the next strips, as for columns, which fetch ahead, and for maxima; if not, a block for every four strips. (Blocks of rows that stay, the next strip's
// first row on its way: 1.00 to 1.09 times as long, SR without a rotation .95; H200.)
template <bool kTranspose, bool kWarp, class Kernel, class... A> void launch_strips(Kernel kernel, bool stay, int rows, int cols, A... args) {
  const unsigned units = strip_units<Share<16, kWarp>, kTranspose>(rows, cols), threads = kWarp ? kStripThreads : 8;
  const unsigned blocks = !kWarp ? ceil_div(units, 8u) : stay ? min(units, resident_blocks(kernel, threads)) : units;
  launch(kernel, blocks, threads, 0, args...);
}
template <bool kTranspose, bool kWarp, class Source>
void launch_amax(float* plain, float* rotated, uint32_t* row_amax, const Source& x, int rows, int cols, BlockHow how) {
  if (row_amax) device_zero(row_amax, (size_t)rows);
  how.rows_covered = rows;
  how.cols_covered = cols;
  auto go = [&](auto kernel) { launch_strips<kTranspose, kWarp>(kernel, true, rows, cols, (unsigned*)plain, (unsigned*)rotated, row_amax, x, how); };
  if constexpr (!kWarp) return go(amax_kernel<kTranspose, kWarp, Source, -1>);
  else if (how.recipe.rht == 0) go(amax_kernel<kTranspose, kWarp, Source, 0>);
  else if (how.recipe.rht == 16) go(amax_kernel<kTranspose, kWarp, Source, 16>);
  else if (how.recipe.rht == 128) go(amax_kernel<kTranspose, kWarp, Source, 128>);
  else go(amax_kernel<kTranspose, kWarp, Source, -1>);
}
// Calls go(std::integral_constant<Known, k>) with the k of the list that this recipe is, if there is one.
template <class Go> bool with_known(const BlockHow&, KnownList<>, Go) { return false; }
template <Known k, Known... others, class Go> bool with_known(const BlockHow& how, KnownList<k, others...>, Go go) {
  if (!is_known(how.recipe, k, how.signs)) return with_known(how, KnownList<others...>{}, go);
  go(std::integral_constant<Known, k>{});
  return true;
}
using KnownColumns = KnownList<Known::rn, Known::tile, Known::tile46, Known::sr, Known::sr16, Known::rn16>;       // of nvfp4_columns_kernel
// Bytes that memory can bring a multiprocessor in a clock: H100 12.8, as it says of itself; by their data sheets A100 13, H200 19, B200 27, RTX 5090 4.
inline double memory_bytes_a_clock() {
#ifdef CPU_BUILD
  return 0;
#else
  static const double bytes = [] {
    int memory = 0, bits = 0, clock = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&memory, cudaDevAttrMemoryClockRate, 0));
    CUDA_CHECK(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, 0));
    CUDA_CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
    return 2.0 * memory * bits / 8 / ((double)max(clock, 1) * multiprocessors());
  }();
  return bytes;
#endif
}
// Blocks of it a multiprocessor: where memory is all that it waits for, one is faster than two. (Consumer GPUs have room for one.)
inline unsigned column_blocks(const OperandRecipe& r, const Operand4& out) {
  const bool waits = !out.codes && (r.rounding == Rounding::nearest || memory_bytes_a_clock() < 16);
  return waits ? 1 : min(2u, shared_holds(kSquareShared<true>));
}
// The scale buffer has padding rows and blocks to clear; the emulation has neither, only columns up to ld.
inline void cover(BlockHow& how, const Operand4& out) {
  const int scale_cols = is_mx(how.recipe.format) ? 32 : 16;
  how.rows_covered = out.scales ? round_up(out.rows, 128) : out.rows;
  how.cols_covered = out.scales ? max(out.ld, round_up(ceil_div(out.cols, scale_cols), 4) * scale_cols) : out.ld;
}
inline AlignJob align_job(const Operand4& out, uint32_t* groups, const BlockHow& how) {
  return {out, groups, (unsigned)(round_up(out.rows, 16) / 4 * ceil_div(out.cols, 16)), how};
}
inline void align_post_hoc(const AlignJobs& jobs, unsigned count) {
  launch(align_post_hoc_kernel, dim3(ceil_div(max(jobs.job[0].units, jobs.job[count - 1].units), 1024u), count), 256, 0, jobs);
}
template <bool kTranspose, bool kWarp, class Source>
void launch_quantize(const Operand4& out, const Source& x, BlockHow how, uint32_t* groups, bool amax_known, bool amax_is_zero) {
  const OperandRecipe& r = how.recipe;
  const bool search = needs_amax(r) && !amax_known;
  if (search && !amax_is_zero) device_zero(out.amax, 1);
  if (search)
    launch_amax<kTranspose, kWarp>(r.rht ? nullptr : out.amax, r.rht ? out.amax : nullptr, r.format == Format::fp4_vector ? groups : nullptr, x,
                                   out.rows, out.cols, how);
  cover(how, out);
  auto go = [&](auto kernel, auto... args) { launch_strips<kTranspose, kWarp>(kernel, kTranspose, how.rows_covered, how.cols_covered, args...); };
  if (is_mx(r.format)) return go(mx_kernel<kTranspose, kWarp, Source>, out, x, how);
  if (r.format != Format::nvfp4) return go(plain_kernel<kTranspose, kWarp, Source>, out, groups, x, how);
  if (is_post_hoc(r)) {
    if (!amax_is_zero) device_zero(out.amax, 1);
    constexpr bool kHasKnown = !kOnCpu && kWarp && !std::is_same_v<Source, Matrix<float>> && (Source::kRowCopy || kTranspose);
    if (kHasKnown && is_known(r, Known::eden_rht128, how.signs))
      go(post_hoc_kernel<kTranspose, kWarp, Source, kHasKnown ? Known::eden_rht128 : Known::any>, out, groups, x, how);
    else go(post_hoc_kernel<kTranspose, kWarp, Source, Known::any>, out, groups, x, how);
    return align_post_hoc({{align_job(out, groups, how), {}}}, 1);
  }
  if (r.blocks == Blocks::b16x16 && r.scale == ScaleRule::four_six) {
    const unsigned tiles = ceil_div(out.rows, 16) * ceil_div(out.cols, 16), threads = kWarp ? 128 : 8;                 // 8 tiles in a block
    launch(tile_four_six_kernel<kTranspose, kWarp, Source>, ceil_div(tiles, 8u), threads, 0, groups, x, out.rows, out.cols, how,
           (const float*)out.amax);
  }
  if constexpr (kTranspose && kWarp && std::is_same_v<Source, Matrix<bf16>>) {
    auto by_squares = [&](auto known) {
      const unsigned squares = ceil_div(how.rows_covered, kSquare) * ceil_div(how.cols_covered, kSquare), most = column_blocks(r, out) * multiprocessors();
      launch(nvfp4_columns_kernel<decltype(known)::value>, min(squares, most), kColumnThreads, kSquareShared<true>, out, groups, x, how);
    };
    if (x.cols % 8 == 0 && with_known(how, KnownColumns{}, by_squares)) return;
  }
  auto by_strips = [&](auto known) { go(nvfp4_kernel<kTranspose, kWarp, Source, decltype(known)::value>, out, groups, x, how); };
  if (!with_known(how, typename KnownFor<kTranspose, kWarp, Source>::List{}, by_strips)) by_strips(std::integral_constant<Known, Known::any>{});
}

inline void check_operand(const Operand4& out, const OperandRecipe& r, const uint32_t* groups) {
  const std::string problem = operand_problem(r, true);
  if (!problem.empty() || r.format == Format::bf16) die("quantize: %s", problem.empty() ? "format bf16 is not quantized" : problem.c_str());
  if ((size_t)round_up(out.rows, 128) * round_up(out.cols, 64) / 16 >= 1u << 31)
    die("operand [%d, %d] is too large to quantize in one piece; lower --batch", out.rows, out.cols);
  const bool vector = r.format == Format::fp4_vector, nv = r.format == Format::nvfp4;
  const bool grouped = vector || is_post_hoc(r) || (nv && r.blocks == Blocks::b16x16 && r.scale == ScaleRule::four_six);
  const bool half_packed = (nv || is_mx(r.format)) && !out.codes != !out.scales, no_amax = (needs_amax(r) || is_post_hoc(r)) && !out.amax;
  if (out.ld != operand_ld(out.cols) || (grouped && !groups) || half_packed || no_amax || (r.format == Format::exact && !out.values))
    die("quantize: operand [%d, %d] ld %d: bad leading dimension, or missing buffers", out.rows, out.cols, out.ld);
}
inline SignBits how_signs(const QuantizeHow& how) {
  SignBits signs;
  if (how.recipe.signs != Signs::none) { signs.word[0] = how.sign_bits[0]; signs.word[1] = how.sign_bits[1]; }
  return signs;
}
inline BlockHow block_how(const QuantizeHow& how) { return {how.recipe, how_signs(how), how.key, round_keys(how.key.seed), 0, 0, how.alpha}; }
template <bool kWarp, class Source> void quantize_source(Operand4 out, const Source& x, const QuantizeHow& how, uint32_t* groups) {
  if (how.recipe.rht) out.cols = round_up(out.cols, how.recipe.rht);          // whole groups; ld stays as it is
  check_operand(out, how.recipe, groups);
  const BlockHow block = block_how(how);
  if (how.transpose) return launch_quantize<true, kWarp>(out, x, block, groups, how.amax_known, how.amax_is_zero);
  if constexpr (Source::kRowCopy) launch_quantize<false, kWarp>(out, x, block, groups, how.amax_known, how.amax_is_zero);
  else die("quantize: from a packed operand only its transpose is made");
}
// Quantizes x, row-major bf16 or float, into the operand `out`, whose shape is that of x (or of x^T with how.transpose) and whose pointers say what is
// written. out.ld = operand_ld(cols, rht). With a rotation, a contraction axis that ends in a part of a group makes an operand of
// rotated_cols(cols, rht) columns; out.cols is that of the source. groups: group_words(rows, cols), for fp4_vector, for 16x16 tiles with four
// over six, and for post_hoc. The source's rows and the operand's must start on 16-byte boundaries where cols is a multiple of 8 (any device_alloc does).
// kWarp: how the work is shared out; only tests choose it.
template <bool kWarp = !kOnCpu, class T> void quantize(const Operand4& out, const T* x, const QuantizeHow& how, uint32_t* groups = nullptr) {
  quantize_source<kWarp>(out, Matrix<T>{x, how.transpose ? out.cols : out.rows, how.transpose ? out.rows : out.cols}, how, groups);
}
// The transpose of a packed operand, which `from_how` describes: double quantization. how.transpose must be set.
template <bool kWarp = !kOnCpu>
void quantize(const Operand4& out, const Operand4& from, const OperandRecipe& from_how, const QuantizeHow& how, uint32_t* groups = nullptr) {
  quantize_source<kWarp>(out, Packed{from, from_how}, how, groups);
}
// Do the row copy of a tensor and its column copy each want a scale of the whole tensor, so that one reading of it serves both?
inline bool share_amax(const OperandRecipe& row, const OperandRecipe& column) {
  return needs_amax(row) && needs_amax(column) && row.format != Format::fp4_vector && column.format != Format::fp4_vector;
}
// The two copies of a matrix that one kernel makes: those of dY in nvfp4 (and nvfp4-46) and fqt, and of X in nvfp4. Codes in .83, .79 and .78 of the
// time of two kernels (H100, 32768 x 3072, values). Those of dY in quartet2 and tetrajet2, with half of the warps for each (65536 x 3072): quartet2 .94 on an
// H200, .95 in a step; tetrajet2 .86 on an H100, where memory counts for more (its step .988), and 1.00 on an H200. With both in every warp, which then
// holds two rotations' signs, 1.02 and 1.01 (H200).
template <Known kRow, Known kColumn> struct KnownPair {};
template <class... pairs> struct PairList {};
using KnownPairs = PairList<KnownPair<Known::sr, Known::sr16>, KnownPair<Known::sr, Known::sr>, KnownPair<Known::rn, Known::rn16>,
                            KnownPair<Known::eden_rht128, Known::eden_rht128>, KnownPair<Known::outer_sr16, Known::outer_sr16>>;
// Calls go(kernel) with the kernel for this pair, if there is one.
template <class Go> bool with_pair(const BlockHow&, const BlockHow&, PairList<>, Go) { return false; }
template <Known kRow, Known kColumn, class... others, class Go>
bool with_pair(const BlockHow& row, const BlockHow& column, PairList<KnownPair<kRow, kColumn>, others...>, Go go) {
  const bool known = is_known(row.recipe, kRow, row.signs) && is_known(column.recipe, kColumn, column.signs);
  if (!known) return with_pair(row, column, PairList<others...>{}, go);
  if constexpr (known_recipe(kRow).signs == Signs::fresh) go(both_halves_kernel<kRow>, std::true_type{});
  else go(nvfp4_both_kernel<kRow, kColumn>, std::false_type{});
  return true;
}
// The same of a recipe alone; the signs may still differ.
template <Known... row, Known... column> bool pair_is_known(const OperandRecipe& r, const OperandRecipe& c, PairList<KnownPair<row, column>...>) {
  SignBits fixed;
  fixed.word[0] = kFixedSigns;
  return ((is_known(r, row, fixed) && is_known(c, column, fixed)) || ...);
}
inline bool pair_is_known(const OperandRecipe& row, const OperandRecipe& column) { return pair_is_known(row, column, KnownPairs{}); }
// Does a multiprocessor hold enough blocks with two squares each? (It takes 208 KB: H100 and B200 have them, A100 and consumer GPUs have not.)
inline bool both_fit() { return shared_holds(kSquareShared<>) >= kBothBlocks; }
inline unsigned both_blocks(unsigned squares) { return min(squares, (unsigned)(kBothBlocks * multiprocessors())); }
// What two operands need to know of x [rows, cols] before they are quantized with amax_known: row: max|x| as `straight` rotates its rows; column:
// that of x^T as `turned` rotates it. In one reading where the rows are not rotated, or both are by 128; else in two.
template <bool kWarp = !kOnCpu, class T>
void amax_of_both(float* row, float* column, const T* x, int rows, int cols, const QuantizeHow& straight, const QuantizeHow& turned) {
  const BlockHow how = block_how(turned), row_how = block_how(straight);
  const Matrix<T> source = {x, rows, cols};
  if (!straight.amax_is_zero) device_zero(row, 1);
  if (!turned.amax_is_zero) device_zero(column, 1);
  if constexpr (kWarp && std::is_same_v<T, bf16>) {
    const int row_rht = row_how.recipe.rht, rht = how.recipe.rht;
    if (((row_rht == 128 && rht == 128) || (row_rht == 0 && rht == 16)) && cols % 8 == 0 && both_fit()) {
      const auto kernel = rht == 128 ? amax_both_kernel<128, 128> : amax_both_kernel<0, 16>;
      launch(kernel, both_blocks(ceil_div(rows, kSquare) * ceil_div(cols, kSquare)), kBothThreads, kSquareShared<>, (unsigned*)row, (unsigned*)column,
             source, row_how, how);
      return;
    }
  }
  float* const plain = row_how.recipe.rht ? nullptr : row;
  if (!plain) launch_amax<false, kWarp>(nullptr, row, nullptr, source, rows, round_up(cols, row_how.recipe.rht), row_how);
  if (how.recipe.rht) launch_amax<true, kWarp>(plain, column, nullptr, source, cols, round_up(rows, how.recipe.rht), how);
  else launch_amax<false, kWarp>(plain, column, nullptr, source, rows, cols, how);
}
template <bool kWarp = !kOnCpu, class T> void amax_of_both(float* row, float* column, const T* x, int rows, int cols, const QuantizeHow& turned) {
  amax_of_both<kWarp>(row, column, x, rows, cols, QuantizeHow{}, turned);
}
// quantize(row, x, ...) and quantize(column, x, ...), bit for bit; column_how.transpose is set. In one reading of x, after one for the maxima, where
// the pair is known, which is what it returns; otherwise one after the other.
template <bool kWarp = !kOnCpu, class T>
bool quantize_both(Operand4 row, QuantizeHow row_how, Operand4 column, QuantizeHow column_how, const T* x, uint32_t* groups = nullptr) {
  const int rows = row.rows, cols = row.cols;
  const bool fit = !row_how.transpose && column_how.transpose && column.rows == cols && column.cols == rows;
  if (!fit) die("quantize_both: these are not the two copies of one matrix");
  if (share_amax(row_how.recipe, column_how.recipe) && !row_how.amax_known && !column_how.amax_known && row.amax != column.amax) {
    amax_of_both<kWarp>(row.amax, column.amax, x, rows, cols, row_how, column_how);
    row_how.amax_known = column_how.amax_known = true;
  }
  if constexpr (kWarp && std::is_same_v<T, bf16>) {
    auto ready = [](const QuantizeHow& how) { return how.amax_known || !needs_amax(how.recipe); };
    if (ready(row_how) && ready(column_how) && cols % 8 == 0 && both_fit()) {
      Operand4 r = row, c = column;
      r.cols = rotated_cols(cols, row_how.recipe.rht);
      c.cols = rotated_cols(rows, column_how.recipe.rht);
      BlockHow a = block_how(row_how), b = block_how(column_how);
      cover(a, r);
      cover(b, c);
      const unsigned squares = ceil_div(max(a.rows_covered, b.cols_covered), kSquare) * ceil_div(max(a.cols_covered, b.rows_covered), kSquare);
      const Matrix<bf16> source = {x, rows, cols};
      auto go = [&](auto kernel, auto halves) {
        check_operand(r, row_how.recipe, groups);
        check_operand(c, column_how.recipe, groups);
        if constexpr (!decltype(halves)::value) {
          launch(kernel, both_blocks(squares), kBothThreads, kSquareShared<>, r, c, source, a, b);
        } else {
          const bool post_hoc = is_post_hoc(a.recipe);
          if (post_hoc && !row_how.amax_is_zero) device_zero(r.amax, 1);
          if (post_hoc && !column_how.amax_is_zero) device_zero(c.amax, 1);
          uint32_t* const others = post_hoc ? groups + group_words(r.rows, r.cols) : nullptr;
          launch(kernel, both_blocks(squares), kBothThreads, kSquareShared<>, r, c, groups, others, source, a, b);
          if (post_hoc) align_post_hoc({{align_job(r, groups, a), align_job(c, others, b)}}, 2);
        }
      };
      if (with_pair(a, b, KnownPairs{}, go)) return true;
    }
  }
  quantize<kWarp>(row, x, row_how, groups);
  quantize<kWarp>(column, x, column_how, groups);
  return false;
}
// NVFP4 with one scale a tensor, in the words tile16, stochastic, hadamard, signs. tile_scratch: ceil(rows/16) * ceil(cols/16) words, for 16x16 only.
template <class T> void quantize_nvfp4(const Operand4& out, const T* x, QuantizeHow how, uint32_t* tile_scratch = nullptr) {
  how.recipe = {};
  how.recipe.format = Format::nvfp4;
  how.recipe.blocks = how.tile16 ? Blocks::b16x16 : Blocks::b1x16;
  how.recipe.rounding = how.stochastic ? Rounding::stochastic : Rounding::nearest;
  how.recipe.rht = how.hadamard;
  how.recipe.signs = how.hadamard ? Signs::fixed : Signs::none;
  how.sign_bits[0] = how.signs;
  quantize(out, x, how, tile_scratch);
}

// alpha by a kernel of its own, where no operand was made after the other's maximum was known (QuantizeHow::alpha).
__global__ void alpha_kernel(float* alpha, const float* amax_a, OperandRecipe a, const float* amax_b, OperandRecipe b) {
  *alpha = alpha_of(amax_a, a, amax_b, b);
}
inline OperandRecipe plain_nvfp4() { OperandRecipe r; r.format = Format::nvfp4; return r; }
inline void gemm_alpha(float* alpha, const float* amax_a, const float* amax_b, const OperandRecipe& a = plain_nvfp4(),
                       const OperandRecipe& b = plain_nvfp4()) {
  launch(alpha_kernel, 1, 1, 0, alpha, amax_a, a, amax_b, b);
}

// ------------------------------------------------------------------ MXFP4 on NVFP4 tensor cores
// A power of two from 2^-9 to 2^8 is an E4M3 value, so two equal E4M3 bytes do the work of one E8M0 byte, relative to the largest exponent of
// the tensor: it becomes 2^8, and *factor = 2^(largest - 8) goes to alpha. Blocks more than 2^17 below the largest become 0: *flushed counts
// them. Blocks whose codes are all zero have no say in the largest exponent, get scale 0, and are not counted. A NaN scale stays one.
__device__ inline bool mx_block_lives(const Operand4& mx, int row, int block32) {
  const uint8_t* codes = mx.codes + ((size_t)row * mx.ld + block32 * 32) / 2;
  int any = 0;
  for (int j = 0; j < 16; j++) any |= codes[j] & 0x77;
  return any != 0;
}
__global__ void largest_exponent_kernel(unsigned* largest, Operand4 mx) {
  const int blocks = ceil_div(mx.cols, 32), i = blockIdx.x * blockDim.x + threadIdx.x, row = i / blocks;
  if (row >= mx.rows) return;
  const uint8_t byte = mx.scales[scale_offset(row, i % blocks, blocks)];
  if (byte != 255 && mx_block_lives(mx, row, i % blocks)) atomicMax(largest, (unsigned)byte);
}
__global__ void mx_as_nv_kernel(uint8_t* e4m3_scales, float* factor, unsigned* flushed, const unsigned* largest, Operand4 mx) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, covered = round_up(ceil_div(mx.cols, 16), 4);
  const int row = i / covered, block = i % covered, blocks = ceil_div(mx.cols, 16), blocks32 = ceil_div(mx.cols, 32);
  if (i == 0) *factor = ldexpf(1.0f, (int)*largest - 127 - 8);
  if (row >= round_up(mx.rows, 128)) return;
  uint8_t byte = 0;
  if (row < mx.rows && block / 2 < blocks32 && mx_block_lives(mx, row, block / 2)) {
    const uint8_t e8m0 = mx.scales[scale_offset(row, block / 2, blocks32)];
    const int exponent = (int)e8m0 - (int)*largest + 8;
    byte = e8m0 == 255 ? 0x7f : exponent < -9 ? 0 : e4m3_encode(ldexpf(1.0f, exponent));
    if (exponent < -9 && block % 2 == 0) atomicAdd(flushed, 1u);
  }
  e4m3_scales[scale_offset(row, block, blocks)] = byte;
}
// mx: a packed MXFP4 operand. e4m3_scales: scale_bytes(rows, cols) bytes; factor, flushed and largest (scratch): device scalars.
inline void mxfp4_as_nvfp4(uint8_t* e4m3_scales, float* factor, unsigned* flushed, unsigned* largest, const Operand4& mx) {
  device_zero(largest, 1);
  device_zero(flushed, 1);
  launch(largest_exponent_kernel, ceil_div((unsigned)mx.rows * ceil_div(mx.cols, 32), 256u), 256, 0, largest, mx);
  const unsigned covered = round_up(mx.rows, 128) * round_up(ceil_div(mx.cols, 16), 4);
  launch(mx_as_nv_kernel, ceil_div(covered, 256u), 256, 0, e4m3_scales, factor, flushed, largest, mx);
}
