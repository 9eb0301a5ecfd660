// kernels/strips.cuh -- how the quantizers get at the values: which thread holds which elements, from which kind of source, rotated or not.
//
// An operand is a matrix as it lies in memory (row copy), or its transpose (column copy); the source is in BF16 or FP32, or is itself packed (double
// quantization). All that is hidden here, so that quantize.cuh reads as arithmetic on blocks of 16 or 32 values.
#pragma once
#include <type_traits>
#include "formats.cuh"
#include "hadamard.cuh"
#include "operand.cuh"
#include "ptx.cuh"
#include "simd.cuh"       // defines: float8, transpose8

// ------------------------------------------------------------------ who computes what
// An operand is dealt with in strips of 16 rows x 128 columns: a warp a strip on a GPU, a thread a strip on the CPU, where a shuffle would cost
// more than the strip. In a warp, 8 lanes (4 for blocks of 32) lie side by side along a row and hold a block each, so that all that blocks have in
// common is found by shuffles: the tile of 16x16, the outer scale of 1x128, a rotation of up to 128. A lane goes through 4 (2) rows, one by one.
// The row copy reads 32 contiguous bytes a thread. For the column copy the 4 warps of a block bring a tile of 128 rows x 64 columns of the source
// into shared memory, by whole 128-byte lines, and read it from there down its columns. Both write 256 contiguous bytes a row. (The column copies that
// matter most, and both copies at once, are made from squares: quantize.cuh.)
constexpr int kStripThreads = 128;          // of a block on a GPU
template <int kUnitColumns, bool kWarpAStrip> struct Share {
  static constexpr bool kWarp = kWarpAStrip, kPairedStores = false;                 // store_values()
  static constexpr int kUnit = kUnitColumns;                   // columns of a block: 16, or 32 for MX formats
  static constexpr int kUnits = kWarp ? 1 : 128 / kUnit;       // blocks of a row that a thread holds
  static constexpr int kAlong = kWarp ? 128 / kUnit : 1;       // lanes along a row
  static constexpr int kLanes = kWarp ? 32 : 1;
  static constexpr int kDown = kLanes / kAlong;                // lanes down the rows: a thread's rows are kDown apart
  static constexpr int kRows = 16 / kDown;                     // and this many
};
// The columns of one row that a thread holds.
template <class S> using RowPart = float[S::kUnits][S::kUnit];
// A thread's first row and column, and its place along the row.
struct StripPlace { int row, col, along; bool inside; };
// unit: 4 strips, those of a block; on the CPU one strip.
template <class S, bool kTranspose> __device__ __forceinline__ StripPlace strip_place(unsigned unit, int rows_covered, int cols_covered) {
  const unsigned across = ceil_div(cols_covered, 128), down = ceil_div(rows_covered, 16), lane = threadIdx.x % S::kLanes, warp = S::kWarp ? warp_in_block() : 0;
  unsigned strip_row, strip_col;                               // neighbouring strips are neighbours in memory
  if (kTranspose) {
    const unsigned tiles = S::kWarp ? ceil_div(down, 4u) : down;
    strip_row = S::kWarp ? unit % tiles * 4 + warp : unit % tiles;
    strip_col = unit / tiles;
  } else {
    const unsigned strip = S::kWarp ? unit * 4 + warp : unit;
    strip_row = strip / across;
    strip_col = strip % across;
  }
  const int along = lane % S::kAlong, row = (int)(strip_row * 16 + lane / S::kAlong), col = (int)(strip_col * 128) + along * S::kUnits * S::kUnit;
  return {row, col, along, strip_row < down && strip_col < across};
}
template <class S, bool kTranspose> __host__ __device__ inline unsigned strip_units(int rows_covered, int cols_covered) {
  const unsigned across = ceil_div(cols_covered, 128), down = ceil_div(rows_covered, 16);
  return !S::kWarp ? across * down : kTranspose ? across * ceil_div(down, 4u) : ceil_div(across * down, 4u);
}
template <class S> __device__ __forceinline__ unsigned own_unit() { return S::kWarp ? blockIdx.x : blockIdx.x * blockDim.x + threadIdx.x; }
// The largest of what the lanes along a row have; of what the lanes above and below have.
template <class S> __device__ __forceinline__ unsigned max_along(unsigned m) {
#pragma unroll
  for (int o = 1; o < S::kAlong; o *= 2) m = max(m, __shfl_xor_sync(0xffffffffu, m, o));
  return m;
}
template <class S> __device__ __forceinline__ unsigned max_down(unsigned m) {
#pragma unroll
  for (int o = S::kAlong; o < S::kLanes; o *= 2) m = max(m, __shfl_xor_sync(0xffffffffu, m, o));
  return m;
}

// ------------------------------------------------------------------ sources
// A source gives kN neighbouring elements of one of its rows, zeros beyond its edges; kN divides 128, and the column is a multiple of it.
#ifndef CPU_BUILD
__device__ __forceinline__ float flipped_bf16(bf16 x, uint32_t flip) {                 // flip: 0, or 2^31 to change the sign
  uint16_t bits;
  memcpy(&bits, &x, 2);
  return bits_float(((uint32_t)bits << 16) + flip);
}
#endif
template <class T> struct Matrix {
  static constexpr bool kRowCopy = true;
  using Element = T;                                           // of the tile in shared memory
  // On a GPU the elements of a run stay in the words that they were read in until they are used: half as many registers and moves.
  template <int kN> struct Words {
    uint32_t word[kN * sizeof(T) / 4];
    __device__ __forceinline__ float operator[](int j) const {
      return bits_float(sizeof(T) == 4 ? word[j] : j % 2 ? word[j / 2] & 0xffff0000u : word[j / 2] << 16);
    }
#ifndef CPU_BUILD
    // flip: 0, or 2^31 to change the sign. Of BF16 both takes one operation.
    __device__ __forceinline__ float flipped(int j, uint32_t flip) const {
      static_assert(sizeof(T) == 2, "of BF16");
      return bits_float(j % 2 ? and_xor(word[j / 2], 0xffff0000u, flip) : (word[j / 2] << 16) + flip);
    }
#endif
  };
  template <int kN> struct Elements {
    Vec<T, kN> e;
    __device__ __forceinline__ float operator[](int j) const { return to_float(e.v[j]); }
  };
  template <int kN> using Run = std::conditional_t<kOnCpu, Elements<kN>, Words<kN>>;
  const T* x; int rows, cols;
  __device__ Matrix ready() const { return *this; }
  __device__ float at(int r, int c) const { return r < rows && c < cols ? to_float(x[(size_t)r * cols + c]) : 0.0f; }
  __device__ bool aligned() const { return cols % (16 / (int)sizeof(T)) == 0; }          // every row starts on 16 bytes
  template <int kN> __device__ __forceinline__ bool within(int r, int c) const { return r < rows && c + kN <= cols && aligned(); }
  template <int kN> __device__ __forceinline__ Run<kN> run(int r, int c, bool known_within = false) const {
    Run<kN> run;
    const T* from = x + (size_t)r * cols + c;
    if (known_within || within<kN>(r, c)) {
      const Vec<T, kN> v = load_vec<kN>(from);
      memcpy(&run, &v, sizeof v);
      return run;
    }
    constexpr int kPer = kOnCpu ? 1 : 4 / sizeof(T);                                      // elements of a word
#pragma unroll
    for (int j = 0; j < kN; j += kPer) {
      T e[kPer];
#pragma unroll
      for (int k = 0; k < kPer; k++) e[k] = r < rows && c + j + k < cols ? from[j + k] : from_float<T>(0);
      memcpy((char*)&run + j * sizeof(T), e, sizeof e);
    }
    return run;
  }
#ifdef CPU_BUILD
  // A run as floats: without a copy on the way, which vectors would wait for.
  template <int kN> __forceinline__ void floats(float* to, int r, int c) const {
    const T* from = x + (size_t)r * cols + c;
    if (r < rows && c + kN <= cols) for (int j = 0; j < kN; j += 8) store8(to + j, load8(from + j));
    else for (int j = 0; j < kN; j++) to[j] = at(r, c + j);
  }
#endif
};
// A packed operand: double quantization, which is for the transposed copies of the backward pass only.
struct Packed {
  static constexpr bool kRowCopy = false;
  using Element = uint32_t;                                    // of the tile in shared memory: codes and scales as they are
  Operand4 operand; OperandRecipe how;
  float tensor = 1;                                            // FP32 scale of the tensor
  uint32_t flip[4] = {};                                       // bit set: the sign of this source row of 128 changes. For warps' tiles only
  __device__ Packed ready() const { Packed p = *this; p.tensor = outer_scale_of_tensor(operand, how); return p; }
  __device__ float at(int r, int c) const { return r < operand.rows && c < operand.cols ? dequantized(operand, how, r, c, tensor) : 0.0f; }
  template <int kN> struct Run {
    float v[kN];
    __device__ __forceinline__ float operator[](int j) const { return v[j]; }
  };
  __device__ __forceinline__ bool fp4() const {
    return how.format == Format::nvfp4 || how.format == Format::mxfp4 || how.format == Format::fp4_vector;
  }
  template <int kN> __device__ __forceinline__ Run<kN> run(int r, int c) const {
    Run<kN> v;
    if (fp4() && r < operand.rows && c + kN <= operand.cols) {
#pragma unroll
      for (int first = 0; first < kN; first += 8) {            // 8 codes are a word, and share a scale
        const ElementScale s = element_scale(operand, how, r, c + first, tensor);
        const uint32_t codes = *(const uint32_t*)(operand.codes + ((size_t)r * operand.ld + c + first) / 2);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[first + j] = e2m1_decode(codes >> (4 * j) & 15) * s.block * s.outer;
      }
    } else {
      for (int j = 0; j < kN; j++) v.v[j] = at(r, c + j);
    }
    return v;
  }
  template <int kN> __device__ __forceinline__ void floats(float* to, int r, int c) const {
    const Run<kN> v = run<kN>(r, c);
    memcpy(to, v.v, sizeof v);
  }
};

// The tile of the source that a block turns: 128 source rows (operand columns) of 64. 16 bytes more after every 16 rows put what the lanes of a
// warp read at once into different banks.
constexpr int kTileColumns = 64;
template <class E> __host__ __device__ constexpr int tile_offset(int column) { return column * kTileColumns + column / 16 * (int)(16 / sizeof(E)); }
template <class E> __host__ __device__ constexpr int tile_elements() { return tile_offset<E>(128); }

// A packed operand's tile, in words: the codes, 128 source rows of 32 bytes (FP8: 64), as much out of step; 512 bytes of scales as they lie in
// memory; the outer scales of the rows. And what each warp makes of the scales: two factors for a source row (PackedRows). Half of the room for codes
// is left where they are FP4: there each thread keeps 16 words of its own.
__host__ __device__ constexpr int packed_row(unsigned column, int words) { return (int)column * words + (int)(column / 16) * 4; }
constexpr int kPackedScales = packed_row(128, 16), kPackedOuter = kPackedScales + 128, kPackedTile = kPackedOuter + 128;
constexpr int kPackedFactors = packed_row(128, 1), kPackedFree = packed_row(128, 8);

constexpr int kTiles = 2;                                     // that a block has in shared memory, one of them on its way
template <class Source> __host__ __device__ constexpr bool fetched_ahead() { return !Source::kRowCopy || sizeof(typename Source::Element) == 2; }
template <class Source> __host__ __device__ constexpr int source_tile() {
  return Source::kRowCopy ? tile_elements<typename Source::Element>() : kPackedTile;
}
template <class S, bool kTranspose, class Source> __host__ __device__ constexpr int shared_elements() {
  const int more = Source::kRowCopy ? 0 : kStripThreads / 32 * 2 * kPackedFactors + kStripThreads * (S::kUnit - 16);
  return !kTranspose || !S::kWarp ? 1 : (fetched_ahead<Source>() ? kTiles : 1) * source_tile<Source>() + more;
}
// Brings the tile of a unit to shared memory; returns at once if the source is a matrix whose rows are aligned.
template <class S, class Source> __device__ __forceinline__ void fetch_tile(typename Source::Element* tile, const Source& x, StripPlace at) {
  using E = typename Source::Element;
  const int first_row = at.row / 64 * 64, first_col = at.col / 128 * 128;          // the same for the whole block
  if constexpr (std::is_same_v<E, bf16>) {
    if (x.aligned()) {
      constexpr int kStep = kStripThreads / (kTileColumns / 8);                    // source rows at once
      static_assert(kStep == 16, "a step is as long in the whole tile");
      const int lane_row = (int)threadIdx.x / (kTileColumns / 8), part = (int)threadIdx.x % (kTileColumns / 8) * 8;
      E* const to = tile + tile_offset<E>(lane_row) + part;
      const E* from = x.x + (size_t)(first_col + lane_row) * x.cols + first_row + part;
      const size_t step = (size_t)kStep * x.cols;
      if (first_col + 128 <= x.rows && first_row + kTileColumns <= x.cols) {
#pragma unroll
        for (int c = 0; c < 128; c += kStep, from += step) cp_async<16>(to + tile_offset<E>(c), from, true);
        return;
      }
      const bool in_row = first_row + part < x.cols;
#pragma unroll 1
      for (int c = 0; c < 128; c += kStep, from += step) {
        const bool inside = in_row && first_col + lane_row + c < x.rows;
        cp_async<16>(to + tile_offset<E>(c), inside ? from : x.x, inside);
      }
      return;
    }
  }
#pragma unroll
  for (int k = threadIdx.x; k < 128 * kTileColumns / 8; k += kStripThreads) {
    const int c = first_col + k / (kTileColumns / 8), r = first_row + k % (kTileColumns / 8) * 8;
    E* to = tile + tile_offset<E>(c - first_col) + r - first_row;
    const auto run = x.template run<8>(c, r);
    Vec<uint32_t, sizeof(run) / 4> words;
    memcpy(&words, &run, sizeof run);
    store_vec((uint32_t*)to, words);
  }
}

// The same from a packed operand, all of it behind the thread's back. Copies of 16 bytes lie within a row: ld is a multiple of 32.
template <int kCodes> __device__ __forceinline__ void fetch_codes(uint32_t* tile, const Operand4& p, int first_row, int first_col) {
  constexpr int kCopies = 64 / kCodes;                                             // of a row of the tile: kCodes codes each
  const int row = (int)(threadIdx.x / kCopies), part = (int)(threadIdx.x % kCopies), r = first_row + part * kCodes;
  const uint8_t* from = p.codes + ((size_t)(first_col + row) * p.ld + r) * 16 / kCodes;
#pragma unroll
  for (int k = 0; k < kCopies; k++) {
    constexpr int kStep = kStripThreads / kCopies;
    const bool inside = first_col + row + k * kStep < p.rows && r < p.ld;
    cp_async<16>(tile + packed_row(row, kCopies * 4) + packed_row(k * kStep, kCopies * 4) + part * 4, inside ? from : p.codes, inside);
    from += (size_t)kStep * p.ld * 16 / kCodes;
  }
}
template <class S> __device__ __forceinline__ void fetch_tile(uint32_t* tile, const Packed& x, StripPlace at) {
  const int first_row = at.row & ~63, first_col = at.col & ~127;                   // of the operand: columns and rows of the source
  const Operand4& p = x.operand;
  const Format format = x.how.format;
  if (format == Format::exact) return;
  const bool wide = format == Format::nvfp4 && x.how.outer == Outer::b1x128;
  if (x.fp4()) fetch_codes<32>(tile, p, first_row, first_col);
  else fetch_codes<16>(tile, p, first_row, first_col);
  const bool there = first_col < p.rows && first_row < p.cols;
  if ((format == Format::nvfp4 || is_mx(format)) && threadIdx.x < 32) {            // a tile of 128x4
    const unsigned shift = is_mx(format) ? 7 : 6, across = ((unsigned)p.cols + (1u << shift) - 1) >> shift;   // as in scale_offset()
    const size_t from = ((size_t)((unsigned)first_col >> 7) * across + ((unsigned)first_row >> shift)) * 512 + threadIdx.x * 16;
    cp_async<16>(tile + kPackedScales + threadIdx.x * 4, there ? p.scales + from : p.scales, there);
  }
  if (wide || format == Format::fp4_vector) {
    const int c = first_col + (int)threadIdx.x;
    const bool inside = there && c < p.rows;
    const size_t from = wide ? (size_t)c * ceil_div((unsigned)p.cols, 128u) + (unsigned)first_row / 128 : (size_t)c;
    cp_async<4>(tile + kPackedOuter + threadIdx.x, inside ? p.outer + from : p.outer, inside);
  }
}

// max|x| of words that hold two bf16 each, half of them in each half, and of one such word, as the bits of a float.
template <int kN> __device__ __forceinline__ uint32_t max_abs_pairs(const uint32_t (&word)[kN]) {
  uint32_t m = 0;
#pragma unroll
  for (int j = 0; j < kN; j++) m = max_abs_bf16x2(m, word[j]);
  return m;
}

// The rows of a strip that a thread holds, in turn.
template <class S, bool kTranspose, class Source> struct StripRows {
  using E = typename Source::Element;
  static constexpr int kUnroll = 1, kUnrollPostHoc = 1;         // rows at once that pass 2 of NVFP4 deals with
  static constexpr bool kFewBits = sizeof(E) == 2;              // BF16: a quarter of an element is exact, and so are quarters of sums
  static constexpr bool kPairs = !kOnCpu && sizeof(E) == 2 && !kTranspose && S::kUnits == 1;
  uint32_t pairs;                                               // kPairs: the maxima of the elements read, as in max_abs_bf16x2()
  uint32_t word[S::kUnit / 2];                                  // and they themselves; or what BlockHow::row() made of them in BF16
  static constexpr bool kTurned = kTranspose && !S::kWarp;      // the CPU's column copy turns its strip itself
  const Source& x;
  StripPlace at;
  const E* tile;
  float turned[kTurned ? 16 : 1][kTurned ? 128 : 1];
  typename Source::template Run<kTranspose ? 8 : S::kUnit> next;
  bool whole;                                                   // rows that are read ahead: this thread's lie within the source
  // tile: of the block's unit, in shared memory
  __device__ __forceinline__ StripRows(const Source& source, StripPlace place, const E* shared) : x(source), at(place), tile(shared) {
    if constexpr (kTurned) {
      turn();
    } else if constexpr (kTranspose) tile = shared + tile_offset<E>(at.col % 128) + at.row % 64;
    start();
  }
  __device__ __forceinline__ void turn() {
#ifdef CPU_BUILD
    for (int c = 0; c < 128; c += 8) {
      float8 r[2][8];
      for (int k = 0; k < 8; k++) {
        float run[16];
        x.template floats<16>(run, at.col + c + k, at.row);
        r[0][k] = load8(run);
        r[1][k] = load8(run + 8);
      }
      for (int h = 0; h < 2; h++) {
        transpose8(r[h]);
        for (int k = 0; k < 8; k++) store8(&turned[8 * h + k][c], r[h][k]);
      }
    }
#endif
  }
  __device__ __forceinline__ int row(int i) const { return at.row + i * S::kDown; }       // the thread's i-th row of the operand
  // The rows come in order, from 0 on after start(): a row copy reads one row ahead.
  static constexpr bool kAhead = !kTranspose && S::kUnits == 1;
  __device__ __forceinline__ void start() {
    if constexpr (kAhead) {
      whole = x.template within<S::kUnit>(row(S::kRows - 1), at.col);
      next = x.template run<S::kUnit>(at.row, at.col, whole);
    }
  }
  // flip: null, or which signs are to change
  __device__ __forceinline__ void load(RowPart<S>& v, int i, const uint32_t* flip = nullptr) {
    if constexpr (kAhead) {
#pragma unroll
      for (int j = 0; j < S::kUnit; j++) {
        if constexpr (kFewBits && !kOnCpu) v[0][j] = flip ? next.flipped(j, flip[j]) : next[j];
        else v[0][j] = next[j];
      }
      if constexpr (kPairs) {
        pairs = max_abs_pairs(next.word);
#pragma unroll
        for (int j = 0; j < S::kUnit / 2; j++) word[j] = next.word[j];
      }
      if (i + 1 < S::kRows) next = x.template run<S::kUnit>(row(i + 1), at.col, whole);
    } else {
#pragma unroll
      for (int u = 0; u < S::kUnits; u++) {
        if constexpr (kTranspose) {
#pragma unroll
          for (int j = 0; j < S::kUnit; j++) v[u][j] = S::kWarp ? to_float(tile[tile_offset<E>(j) + i * S::kDown]) : turned[i][u * S::kUnit + j];
          if constexpr (kFewBits && !kOnCpu) {
            if (flip) {
#pragma unroll
              for (int j = 0; j < S::kUnit; j++) v[u][j] = flipped_bf16(tile[tile_offset<E>(j) + i * S::kDown], flip[j]);
            }
          }
        } else if constexpr (kOnCpu) {
          x.template floats<S::kUnit>(v[u], row(i), at.col + u * S::kUnit);
        } else {
          const auto run = x.template run<S::kUnit>(row(i), at.col + u * S::kUnit);
#pragma unroll
          for (int j = 0; j < S::kUnit; j++) v[u][j] = run[j];
        }
      }
    }
  }
};

// The same, on a GPU, for the column copy of a packed operand. The 16 columns of the source that are the rows of a strip lie within one block, so
// that each source row has two factors here: an element is (code * first) * second. A code becomes a BF16 number by its place in the word, 2^126
// times too small; `first` is the block scale, too large by 2^118, so that their product is exact; `second` is the outer scale, too large by the
// missing 2^8: outer scales end below 2^118. So this gives the bits of (code * block) * outer. MX: a power of two may be outside BF16's normal
// numbers: `first` is 2^126 alone, `second` the block scale, and the scale of the tensor comes third. fp4_vector likewise, with its row's scale; FP8:
// code * second. Codes of two rows of the strip, 4 apart, lie in one word and are decoded at once.
template <class S> struct PackedRows {
  static constexpr bool kFewBits = false, kPairs = false;
  static constexpr int kUnroll = 1, kUnrollPostHoc = 2;
  uint32_t word[S::kUnit / 2];                                  // as in StripRows
  const Packed& x;
  StripPlace at;
  const uint32_t *codes, *factors;                              // of the first of this thread's columns
  uint32_t* shared;
  uint32_t up_by;                                               // brings a row's code to the upper end of its half of a word
  __device__ __forceinline__ PackedRows(const Packed& source, StripPlace place, const uint32_t* tile, uint32_t* shared_memory)
      : x(source), at(place), shared(shared_memory) {
    uint32_t* all = shared + kTiles * kPackedTile + threadIdx.x / 32 * 2 * kPackedFactors;
    const int column = at.col & 127, lane = (int)(threadIdx.x % 32), to = packed_row(lane, 1);
    const bool fp4 = x.fp4(), nv = x.how.format == Format::nvfp4, mx = is_mx(x.how.format);
    const bool wide = nv && x.how.outer == Outer::b1x128, outer = wide || x.how.format == Format::fp4_vector;
    if (S::kDown == 8) at.row += at.row & 4;                    // a thread's rows are 4 apart in blocks of 32, too
    codes = fp4 ? tile + packed_row(column, 8) + (at.row & 56) / 8 : tile + packed_row(column, 16);
    factors = all + packed_row(column, 1);
    up_by = in_register(0x1000u >> (at.row & 3) * 4);           // a multiplication: the units that shift are busier
    if (x.how.format == Format::exact) return;
    uint32_t scale[4] = {};                                     // of the source rows lane, lane + 32, + 64, + 96
    if (nv || mx) {
      const Vec<uint32_t, 4> words = load_vec<4>(tile + kPackedScales + lane * 4);
      const unsigned bit = ((unsigned)at.row >> (nv ? 4 : 5) & 3) * 8;
#pragma unroll
      for (int k = 0; k < 4; k++) scale[k] = words.v[k] >> bit & 0xff;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int c = lane + 32 * k;
      const bool inside = at.col - column + c < x.operand.rows;
      uint32_t a = 0x7e807e80u;                                 // 2^126, twice
      float b = outer ? bits_float(tile[kPackedOuter + c]) : mx ? e8m0_decode((uint8_t)scale[k]) : x.tensor;
      if (nv) {
        const float e4m3 = bits_float(scale[k] << 20 & 0x07f00000u) * 0x1p119f * 0x1p119f;       // its bits lie 2^120 too low
        a = float_bits(e4m3) | (scale[k] & 0x80) << 24;
        if ((scale[k] & 0x7f) == 0x7f) a = 0x7fff0000u;
        a |= a >> 16;
        b *= 256;
      }
      all[to + packed_row(32 * k, 1)] = inside ? a : 0;
      all[kPackedFactors + to + packed_row(32 * k, 1)] = (inside ? float_bits(b) : 0) ^ x.flip[k] >> lane << 31;      // zeros beyond the edge change, too
    }
    __syncwarp();
  }
  __device__ __forceinline__ int row(int i) const { return at.row + i * 4; }
  __device__ __forceinline__ void start() {}
  // The codes of rows i and i + 1 (i even): 4 bits in each half of a word.
  __device__ __forceinline__ uint32_t two_codes(int j, int i) const { return codes[packed_row(j, 8) + i / 2]; }
  // The factors of 4 source rows.
  __device__ __forceinline__ Vec<uint32_t, 4> first(int four) const { return load_vec<4>(factors + packed_row(4 * four, 1)); }
  __device__ __forceinline__ Vec<float, 4> second(int four) const {
    return load_vec<4>((const float*)factors + kPackedFactors + packed_row(4 * four, 1));
  }
  // Four words of a thread's own, where row i leaves the elements of row i + 1.
  __device__ __forceinline__ uint32_t* own(int four) const {
    const int at = four < 4 ? four / 2 * kPackedTile + kPackedFree + four % 2 * (4 * kStripThreads)
                            : kTiles * kPackedTile + kStripThreads / 32 * 2 * kPackedFactors + (four - 4) * (4 * kStripThreads);
    return shared + at + threadIdx.x * 4;
  }
  // Rows come in order, or from 0 on again. Signs: Packed::flip.
  __device__ __forceinline__ void load(RowPart<S>& v, int i, const uint32_t* = nullptr) {
    if (row(i) >= x.operand.cols) {
#pragma unroll
      for (int j = 0; j < S::kUnit; j++) v[0][j] = 0;
    } else if (x.fp4()) {
#pragma unroll
      for (int four = 0; four < S::kUnit / 4; four++) {
        const Vec<float, 4> last = second(four);
        Vec<uint32_t, 4> two;                                   // the products of rows i and i + 1, in the halves of a word
        if (i % 2 == 0) {
          const Vec<uint32_t, 4> block = first(four);
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const uint32_t up = two_codes(4 * four + k, i) * up_by;
            two.v[k] = mul_bf16x2((up & 0x80008000u) | (up >> 6 & 0x01c001c0u), block.v[k]);
            v[0][4 * four + k] = bits_float(two.v[k] << 16) * last.v[k];
          }
          store_vec(own(four), two);
        } else {
          two = load_vec<4>(own(four));
#pragma unroll
          for (int k = 0; k < 4; k++) v[0][4 * four + k] = bits_float(two.v[k] & 0xffff0000u) * last.v[k];
        }
      }
      if (x.how.format == Format::mxfp4 && x.tensor != 1) {
#pragma unroll
        for (int j = 0; j < S::kUnit; j++) v[0][j] *= x.tensor;
      }
    } else if (x.how.format == Format::exact) {
      const int word = (at.col & 127) / 32;                     // not an index, for which a GPU would put the array into memory
      const uint32_t flips = word == 0 ? x.flip[0] : word == 1 ? x.flip[1] : word == 2 ? x.flip[2] : x.flip[3];
#pragma unroll
      for (int j = 0; j < S::kUnit; j++) v[0][j] = bits_float(float_bits(x.at(at.col + j, row(i))) ^ flips >> (at.col % 32 + j) << 31);
    } else {
      const bool e5m2 = x.how.format == Format::fp8_e5m2;
#pragma unroll
      for (int j = 0; j < S::kUnit; j++) {
        const uint8_t code = ((const uint8_t*)(codes + packed_row(j, 16)))[row(i) & 63];
        v[0][j] = (e5m2 ? e5m2_decode(code) : e4m3_decode(code)) * second(j / 4).v[j % 4];
      }
    }
  }
};

// Calls use(rows) for the strips of this thread (warp). The column copy's blocks stay, and fetch the tile of their next unit while they use one.
template <class S, bool kTranspose, class Source, class Use>
__device__ __forceinline__ void for_each_strip(const Source& x, int rows_covered, int cols_covered, typename Source::Element* shared, Use use) {
  using E = typename Source::Element;
  const unsigned units = strip_units<S, kTranspose>(rows_covered, cols_covered), stride = S::kWarp ? gridDim.x : gridDim.x * blockDim.x;
  constexpr bool kShared = kTranspose && S::kWarp, kAhead = kShared && fetched_ahead<Source>();
  unsigned unit = own_unit<S>();
  auto place = [&](unsigned u) { return strip_place<S, kTranspose>(u, rows_covered, cols_covered); };
  StripPlace next = place(unit);
  if constexpr (kAhead) {
    if (unit < units) fetch_tile<S>(shared, x, next);
    cp_async_commit();
  }
  for (unsigned turn = 0; unit < units; unit += stride, turn++) {
    const StripPlace at = next;
    if (unit + stride < units) next = place(unit + stride);
    E* tile = shared;
    if constexpr (kAhead) {
      tile += turn % kTiles * source_tile<Source>();
      if (unit + stride < units) fetch_tile<S>(shared + (turn + 1) % kTiles * source_tile<Source>(), x, next);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
    } else if constexpr (kShared) {
      fetch_tile<S>(tile, x, at);
      __syncthreads();
    }
    if (at.inside) {                                             // whole warps
      if constexpr (kShared && !Source::kRowCopy) {
        PackedRows<S> rows(x, at, tile, shared);
        use(rows);
      } else {
        StripRows<S, kTranspose, Source> rows(x, at, tile);
        use(rows);
      }
    }
    if constexpr (kShared) __syncthreads();                      // the tile is used up
  }
}

// ------------------------------------------------------------------ rotation
// a, b <- a + b, a - b, element by element
template <int kN> __device__ __forceinline__ void butterfly(float (&a)[kN], float (&b)[kN]) {
#ifdef CPU_BUILD
  for (int j = 0; j < kN; j += 8) { const float8 s = load8(a + j) + load8(b + j); store8(b + j, load8(a + j) - load8(b + j)); store8(a + j, s); }
  return;
#endif
#pragma unroll
  for (int j = 0; j < kN; j++) { const float s = a[j] + b[j]; b[j] = a[j] - b[j]; a[j] = s; }
}
#ifdef CPU_BUILD
// The signs and the butterflies of distance 1 to 8 of 16 neighbours. In a vector, b - a is b + -a, and the partner comes by a shuffle.
__forceinline__ void rotate16(float* v, uint32_t signs) {
  const word8 sign = all8(1u << 31), bits = {1, 2, 4, 8, 16, 32, 64, 128};
  float8 r[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const float8 x = (float8)((word8)load8(v + 8 * h) ^ ((word8)((all8(signs >> 8 * h) & bits) != 0) & sign));
    const float8 y = SHUFFLE8(x, x, 1, 0, 3, 2, 5, 4, 7, 6) + (float8)((word8)x ^ (word8{0, 1, 0, 1, 0, 1, 0, 1} << 31));
    const float8 z = SHUFFLE8(y, y, 2, 3, 0, 1, 6, 7, 4, 5) + (float8)((word8)y ^ (word8{0, 0, 1, 1, 0, 0, 1, 1} << 31));
    r[h] = SHUFFLE8(z, z, 4, 5, 6, 7, 0, 1, 2, 3) + (float8)((word8)z ^ (word8{0, 0, 0, 0, 1, 1, 1, 1} << 31));
  }
  store8(v, r[0] + r[1]);
  store8(v + 8, r[0] - r[1]);
}
#endif
// The signs of a lane's 16 inputs of a rotation. A kernel finds them once, fixed ones as constants, times a factor, which the first butterfly multiplies
// by; fresh ones as bits that change a sign as the input is read.
struct InputSigns {
  float with[16];
  uint32_t flip[16];
  bool flips;
  __device__ __forceinline__ InputSigns(int n, const SignBits& signs, bool fixed, int along, float factor) : flips(n && !fixed) {
    if (n == 0) return;
    const int place = along * 16 % n;
    const uint32_t bits = (uint32_t)((place < 64 ? signs.word[0] : signs.word[1]) >> (place % 64));
#pragma unroll
    for (int j = 0; j < 16; j++) {
      if (fixed) with[j] = negate_if(factor, bits >> j & 1);
      else flip[j] = in_register(bits >> j << 31);
    }
  }
};
// Rotates a row's groups of n columns, without the factor 1/sqrt(n). The butterflies' distances go 1, 2, 4, ... n/2: within a block, then between
// blocks, then between lanes. known: null, or InputSigns.
template <class S> __device__ __forceinline__ void rotate_row(RowPart<S>& v, int n, const SignBits& signs, int along, const InputSigns* known = nullptr) {
#pragma unroll
  for (int u = 0; u < S::kUnits; u++) {
    const int place = (along * S::kUnits + u) * S::kUnit & (n - 1);                       // of the block's first column in its group
    const uint32_t bits = (uint32_t)((place < 64 ? signs.word[0] : signs.word[1]) >> (place % 64));
#ifdef CPU_BUILD
    for (int first = 0; first < S::kUnit; first += 16) rotate16(v[u] + first, n == 16 ? bits : bits >> first);
    if constexpr (S::kUnit == 32) {
      if (n > 16) butterfly(reinterpret_cast<float (&)[16]>(v[u]), reinterpret_cast<float (&)[16]>(v[u][16]));
    }
    continue;
#endif
    // Signs and the first butterfly at once, by multiply-adds: of these a GPU does twice as many in a time as of logic. The same sums.
    auto negated = [&](int j) { return (n == 16 ? bits >> (j % 16) : bits >> j) & 1; };
#pragma unroll
    for (int j = 0; j < S::kUnit; j += 2) {
      if (known && known->flips) {
        const float a = v[u][j], b = v[u][j + 1];
        v[u][j] = a + b;
        v[u][j + 1] = a - b;
        continue;
      }
      const float a = v[u][j] * (known ? known->with[j % 16] : negate_if(1.0f, negated(j)));
      const float b = v[u][j + 1], sign = known ? known->with[(j + 1) % 16] : negate_if(1.0f, negated(j + 1));
      v[u][j] = fmaf(b, sign, a);
      v[u][j + 1] = fmaf(-b, sign, a);
    }
#pragma unroll
    for (int distance = 2; distance < S::kUnit; distance *= 2) {
      if (distance == 16 && n == 16) break;                                         // a rotation of 16 in blocks of 32
#pragma unroll
      for (int j = 0; j < S::kUnit; j++) {
        if (j & distance) continue;
        const float a = v[u][j], b = v[u][j + distance];
        v[u][j] = a + b;
        v[u][j + distance] = a - b;
      }
    }
  }
#pragma unroll
  for (int distance = 1; distance < S::kUnits; distance *= 2) {
    if (distance * S::kUnit >= n) break;
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) if (!(u & distance)) butterfly(v[u], v[u + distance]);
  }
#pragma unroll
  for (int distance = 1; distance < S::kAlong; distance *= 2) {
    if (distance * S::kUnits * S::kUnit >= n) break;
    const float sign = along & distance ? -1.0f : 1.0f;
#pragma unroll
    for (int u = 0; u < S::kUnits; u++) {
#pragma unroll
      for (int j = 0; j < S::kUnit; j++) {
        const float other = __shfl_xor_sync(0xffffffffu, v[u][j], distance);
        v[u][j] = v[u][j] * sign + other;                                            // exact product: fused or not
      }
    }
  }
}
__device__ __forceinline__ float rotation_scale(int n) {                             // 1 / sqrt(n)
  return n == 16 ? 0.25f : n == 32 ? 0.17677669529663687f : n == 64 ? 0.125f : 0.08838834764831845f;
}

// max|v| as the bits of a nonnegative float: ordered like the floats themselves, with NaN above all.
template <int kN> __device__ __forceinline__ unsigned block_amax_bits(const float (&v)[kN]) {
#ifdef __CUDA_ARCH__
  float m = 0;                                               // one operation an element instead of two
#pragma unroll
  for (int j = 0; j < kN; j++) m = max_abs_nan(m, v[j]);
  return float_bits(m);
#else
  unsigned m = 0;
#pragma unroll
  for (int j = 0; j < kN; j++) m = max(m, float_bits(v[j]) & 0x7fffffffu);
  return m;
#endif
}

// ------------------------------------------------------------------ the largest value after a rotation
// For a maximum neither the places nor the signs of the rotated values matter, so that a rotation costs less than rotate_row()'s; the sums are the
// same ones, rounded alike. kPer neighbours of a group of kN are with one lane, or whole groups; the lanes of a group are neighbours in a warp.
//   Signs    Those of the input wait: +-a +-b is the sign of a times (a +-b), and a lane keeps the products of two signs (kPer - 1 of them), with which
//            multiply-adds do the butterflies.
//   Lanes    Before a butterfly between two lanes each sends the half of its values that the other goes on with, so that both butterflies' ends are in
//            one lane: half a shuffle a value instead of one. What is sent must be the same registers in both: where the other lane's is wanted,
//            the butterfly that made it leaves a - b in the place of a + b. That is a factor -1 again, and costs nothing.
//   Maximum  Of the last butterfly's a + b and a - b the larger one is |a| + |b|.
template <int kN, int kPer> struct LaneSigns {
  static constexpr int kHeld = kPer < kN ? kPer : kN, kLanes = kN / kHeld;
  float with[kHeld];                                           // [i]: sign of input i times that of i without its last bit, which it meets
  float across[kLanes];                                        // [k]: this lane's sign times that of the lane at distance 2^k
  // along: this lane's number; its place in its group are the last bits
  __device__ __forceinline__ LaneSigns(const SignBits& signs, int along) {
    auto bits_of = [&](int lane) { return (uint32_t)((lane * kHeld < 64 ? signs.word[0] : signs.word[1]) >> (lane * kHeld % 64)); };
    const uint32_t bits = bits_of(along % kLanes);
#pragma unroll
    for (int i = 1; i < kHeld; i++) {
      uint32_t negated = bits >> i ^ bits >> (i & (i - 1));
#pragma unroll
      for (int k = 0; 1 << k < kLanes; k++) if ((i & -i) == kept_by(k)) negated ^= (uint32_t)along >> k;
      with[i] = in_register(negate_if(1.0f, negated & 1));
    }
#pragma unroll
    for (int k = 0; 1 << k < kLanes; k++) across[k] = in_register(negate_if(1.0f, (bits ^ bits_of(along % kLanes ^ 1 << k)) & 1));
  }
  // The bit of a value's place that says which of two lanes at distance 2^k goes on with it.
  static __device__ __forceinline__ constexpr int kept_by(int k) { return kHeld >> (k + 1); }
};
// max(|a + b|, |a - b|) of all pairs, as bits
template <int kPairs> __device__ __forceinline__ unsigned last_butterfly_amax_bits(const float (&a)[kPairs], const float (&b)[kPairs]) {
  float sum[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; j++) sum[j] = fabsf(a[j]) + fabsf(b[j]);
#ifdef __CUDA_ARCH__
  unsigned m = 0;                                              // two in one operation; a NaN that a GPU makes is 0x7fffffff
#pragma unroll
  for (int j = 0; j < kPairs; j += 2) m = __vimax3_u32(m, float_bits(sum[j]), float_bits(sum[j + 1]));
#else
  unsigned m = block_amax_bits(sum);
#endif
  if (m == 0x7f800000u) {                                      // two infinities make an infinity and a NaN
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      const float both[2] = {a[j] + b[j], a[j] - b[j]};
      m = max(m, block_amax_bits(both));
    }
  }
  return m;
}
// max|v| after the rotation of v, which is used up, without the factor 1/sqrt(kN): as bits. Of what this lane comes to hold: not the values of its own
// place, but of its own group.
template <int kN, int kPer> __device__ __forceinline__ unsigned rotated_amax_bits(float (&v)[kPer], const LaneSigns<kN, kPer>& signs) {
  using L = LaneSigns<kN, kPer>;
  float a[kPer / 2], b[kPer / 2];                              // of the last butterfly
#pragma unroll
  for (int distance = 1; distance < L::kHeld; distance *= 2) {
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      if (j & distance) continue;
      const float x = v[j], y = v[j + distance], sign = signs.with[((j & -distance) | distance) % L::kHeld];
      if (2 * distance == kN) {
        a[j / kN * (kN / 2) + j % kN] = x;
        b[j / kN * (kN / 2) + j % kN] = y;
      } else {
        v[j] = fmaf(y, sign, x);
        v[j + distance] = fmaf(-y, sign, x);
      }
    }
  }
#pragma unroll
  for (int k = 0; 1 << k < L::kLanes; k++) {
    const int bit = L::kept_by(k);
    int pairs = 0;
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      if (j & bit) continue;
      const float x = v[j], y = __shfl_xor_sync(0xffffffffu, v[j + bit], 1 << k);
      v[j] = fmaf(y, signs.across[k], x);
      v[j + bit] = fmaf(-y, signs.across[k], x);
      a[pairs] = x;
      b[pairs++] = y;
    }
  }
  return last_butterfly_amax_bits(a, b);
}
