// kernels/rope.cuh -- rotary position embedding, in place.
//
// What    Coordinates i and i + D/2 of a q or k head (Hugging Face's "rotate half" pairing) are a point in the plane; at position t
//         it is turned by the angle t * theta^(-2i/D). Dot products of q and k then depend on the distance of positions alone.
//         Backward: a rotation's gradient is turned back by the same angle.
// Shapes  qkv: [B*T, (H + 2 KV) * D] floatX, a row = H q heads, KV k heads, KV v heads (untouched). cos_sin: [T, D/2, 2] FP32.
// How     A thread holds cosines and sines of kVec pairs in registers and applies them to all H + KV heads of its token.
// Source  Su et al., arXiv 2104.09864.
// Cost    reads and writes the q and k part once (4 bytes an element), the table once a token; 3 operations an element.
// Error   angles in double (t * theta^x in FP32 would be off by 1e-4 at t = 4096), rotation in FP32, one rounding to floatX.
#pragma once
#include "rows.cuh"

// Fills the table on the host; to_device it once. D even.
inline void rope_table(float* cos_sin, int T, int D, double theta) {
  for (int i = 0; i < D / 2; i++) {
    const double frequency = pow(theta, -2.0 * i / D);
    for (int t = 0; t < T; t++) {
      cos_sin[((size_t)t * (D / 2) + i) * 2] = (float)cos(t * frequency);
      cos_sin[((size_t)t * (D / 2) + i) * 2 + 1] = (float)sin(t * frequency);
    }
  }
}

// Block: (vectors in half a head, tokens).
template <int kVec>
__global__ void rope_kernel(floatX* qkv, const float* cos_sin, int tokens, int T, int heads, int row_width, int D, float direction) {
  const int token = blockIdx.x * blockDim.y + threadIdx.y, i = threadIdx.x * kVec, half = D / 2;
  if (token >= tokens) return;
  const Vec<float, 2 * kVec> turn = load_vec<2 * kVec>(cos_sin + ((size_t)(token % T) * half + i) * 2);
  floatX* p = qkv + (size_t)token * row_width + i;
  for (int head = 0; head < heads; head++, p += D) {
    Vec<floatX, kVec> a = load_vec<kVec>(p), b = load_vec<kVec>(p + half);
    for (int j = 0; j < kVec; j++) {
      const float c = turn.v[2 * j], s = direction * turn.v[2 * j + 1], re = to_float(a.v[j]), im = to_float(b.v[j]);
      a.v[j] = from_float<floatX>(re * c - im * s);
      b.v[j] = from_float<floatX>(im * c + re * s);
    }
    store_vec(p, a);
    store_vec(p + half, b);
  }
}

inline void rope_rotate(floatX* qkv, const float* cos_sin, int B, int T, int H, int KV, int D, float direction) {
  const bool vectors = D / 2 % kVecX == 0;
  const int width = D / 2 / (vectors ? kVecX : 1), tokens_per_block = max(1, 128 / width);
  launch(vectors ? rope_kernel<kVecX> : rope_kernel<1>, ceil_div(B * T, tokens_per_block), dim3(width, tokens_per_block), 0, qkv, cos_sin, B * T, T,
         H + KV, (H + 2 * KV) * D, D, direction);
}
// qkv in place; cos_sin from rope_table with the same T (or larger) and D.
inline void rope_forward(floatX* qkv, const float* cos_sin, int B, int T, int H, int KV, int D) { rope_rotate(qkv, cos_sin, B, T, H, KV, D, 1); }
inline void rope_backward(floatX* dqkv, const float* cos_sin, int B, int T, int H, int KV, int D) { rope_rotate(dqkv, cos_sin, B, T, H, KV, D, -1); }
