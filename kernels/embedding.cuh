// kernels/embedding.cuh -- token and position embedding, forward and backward.
//
// What    out[b, t] = wte[token[b, t]] + wpe[t]              (wpe only where positions are learned: GPT-2)
//         dwte[v] += sum of dout over the places where token v stands,   dwpe[t] += sum over b of dout[b, t]
// Shapes  tokens: [B, T] int, each in [0, V). wte: [V, C], wpe: [>= T, C], out, dout: [B*T, C] floatX. dwte, dwpe: FP32.
// How     The sum over a token's places must not depend on which thread comes first (no atomics): the host sorts the places by token,
//         and each token that occurs becomes a segment that one block sums. A frequent token (4 % of the places can be a comma) would
//         keep a single warp busy long after all others are done, hence 8 warps a segment.
// Cost    forward: reads 2 (wte) + 2 (wpe, mostly L2), writes 2 bytes an element. Backward: reads 2, and 8 for each element of dwte touched.
// Error   FP32 sums in a fixed order.
#pragma once
#include <vector>
#include "rows.cuh"

// ------------------------------------------------------------------ forward
template <int kLanes, int kVec>
__global__ void embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, int rows, int T, int C) {
  const int row = row_index<kLanes>();
  if (row >= rows) return;
  const floatX* token = wte + (size_t)tokens[row] * C;
  const floatX* position = wpe ? wpe + (size_t)(row % T) * C : nullptr;
  for (int c = row_lane<kLanes>() * kVec; c < C; c += kLanes * kVec) {
    Vec<floatX, kVec> o = load_vec<kVec>(token + c);
    if (position) {
      const Vec<floatX, kVec> p = load_vec<kVec>(position + c);
      for (int i = 0; i < kVec; i++) o.v[i] = from_float<floatX>(to_float(o.v[i]) + to_float(p.v[i]));
    }
    store_vec(out + (size_t)row * C + c, o);
  }
}
// wpe may be null. Tokens are not checked here: sort_tokens and the loader do.
template <int kLanes = kRowLanes>
void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, int B, int T, int C) {
  auto kernel = C % kVecX == 0 ? embedding_forward_kernel<kLanes, kMapVec<kLanes>> : embedding_forward_kernel<kLanes, 1>;
  launch(kernel, row_grid(B * T), row_block<kLanes>(), 0, out, tokens, wte, wpe, B * T, T, C);
}

// ------------------------------------------------------------------ backward of wte
// Host: sorts the n places of tokens[] by token, keeping the order of equal ones (a counting sort). order: [n] places; segment s is
// order[segment_start[s]] up to order[segment_start[s + 1]], all of token segment_token[s]. Both need room for min(n, vocab) segments,
// segment_start for one more. Returns the number of segments. A token outside the vocabulary ends the program.
inline int sort_tokens(const int* tokens, int n, int vocab, int* order, int* segment_start, int* segment_token) {
  std::vector<int> next(vocab, 0);                   // first how often a token occurs, then where its next place goes
  for (int i = 0; i < n; i++) {
    if (tokens[i] < 0 || tokens[i] >= vocab)
      die("token %d at place %d of the batch is outside the vocabulary of %d; were the data made with another tokenizer (--train, --val)?", tokens[i], i, vocab);
    next[tokens[i]]++;
  }
  int segments = 0, start = 0;
  for (int v = 0; v < vocab; v++) {
    const int count = next[v];
    next[v] = start;
    if (count == 0) continue;
    segment_start[segments] = start;
    segment_token[segments++] = v;
    start += count;
  }
  segment_start[segments] = n;
  for (int i = 0; i < n; i++) order[next[tokens[i]]++] = i;
  return segments;
}

// dwte[token of segment blockIdx.x] += the sum of its rows. Block: 32 threads (each kVec columns) by kGroups, which take every
// kGroups-th row each.
template <int kGroups, int kVec>
__global__ void embedding_backward_kernel(float* dwte, const floatX* dout, const int* order, const int* segment_start, const int* segment_token, int C) {
  __shared__ float sums[kGroups][kVec][32];
  const int segment = blockIdx.x, group = threadIdx.y, c = (blockIdx.y * 32 + threadIdx.x) * kVec;
  const int start = segment_start[segment], end = segment_start[segment + 1];
  Vec<float, kVec> sum = {};
  if (c < C) {
    for (int r = start + group; r < end; r += kGroups) {
      const Vec<floatX, kVec> d = load_vec<kVec>(dout + (size_t)order[r] * C + c);
      for (int i = 0; i < kVec; i++) sum.v[i] += to_float(d.v[i]);
    }
  }
  if (kGroups > 1) {
    for (int i = 0; i < kVec; i++) sums[group][i][threadIdx.x] = sum.v[i];
    __syncthreads();
    for (int g = 1; g < kGroups; g++)
      for (int i = 0; i < kVec; i++) sum.v[i] += sums[g][i][threadIdx.x];     // used by group 0
  }
  if (group == 0 && c < C) write_sums(dwte + (size_t)segment_token[segment] * C + c, sum, true);
}
// order, segment_start, segment_token: from sort_tokens, on the device.
template <int kLanes = kRowLanes>
void embedding_backward(float* dwte, const floatX* dout, const int* order, const int* segment_start, const int* segment_token, int segments, int C) {
  constexpr int kGroups = kLanes == 1 ? 1 : 8;       // the CPU goes without the barrier
  const bool vectors = C % kVecX == 0;
  launch(vectors ? embedding_backward_kernel<kGroups, kVecX> : embedding_backward_kernel<kGroups, 1>,
         dim3(segments, ceil_div(C, 32 * (vectors ? kVecX : 1))), dim3(32, kGroups), 0, dwte, dout, order, segment_start, segment_token, C);
}

// ------------------------------------------------------------------ backward of wpe
template <int kVec> __global__ void position_embedding_backward_kernel(float* dwpe, const floatX* dout, int B, size_t n) {   // n = T * C
  const size_t begin = flat_begin<kVec>(), end = min(begin + kFlatRun * kVec, n);
  for (size_t at = begin; at < end; at += kVec) {
    Vec<float, kVec> sum = load_vec<kVec>(dwpe + at);
    for (int b = 0; b < B; b++) {
      const Vec<floatX, kVec> d = load_vec<kVec>(dout + b * n + at);
      for (int i = 0; i < kVec; i++) sum.v[i] += to_float(d.v[i]);
    }
    store_vec(dwpe + at, sum);
  }
}
// dwpe[t] += sum over b of dout[b, t].
inline void position_embedding_backward(float* dwpe, const floatX* dout, int B, int T, int C) {
  const size_t n = (size_t)T * C;
  const bool vectors = n % kVecX == 0;
  launch(vectors ? position_embedding_backward_kernel<kVecX> : position_embedding_backward_kernel<1>, flat_grid(n, vectors ? kVecX : 1), kFlatThreads, 0,
         dwpe, dout, B, n);
}
