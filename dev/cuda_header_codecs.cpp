// dev/cuda_header_codecs.cpp -- the conversions of the CUDA toolkit's own headers, as a second opinion for the tests. cuda_fp4.h and
// cuda_fp8.h work in a plain host compiler, without a GPU and without a CUDA library, but their names would collide with those of
// the CPU build: hence a translation unit of its own that exports C functions. Where the headers are missing (no toolkit, or
// one older than 12.8) everything returns zero, cuda_codecs_present() too, and the test says that it was skipped.
//   g++ -std=c++17 -O2 -I$CUDA/include -c dev/cuda_header_codecs.cpp
#include <cstdint>

#if __has_include(<cuda_fp4.h>) && __has_include(<cuda_fp8.h>)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"      // in the toolkit's own header
#include <cuda_fp4.h>
#include <cuda_fp8.h>
#pragma GCC diagnostic pop

static float from_half(__half_raw h) { return __half2float(__half(h)); }

extern "C" int cuda_codecs_present() { return 1; }
extern "C" uint8_t cuda_e2m1(float x) { return __nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest); }
extern "C" float cuda_e2m1_value(uint8_t code) { return from_half(__nv_cvt_fp4_to_halfraw(code, __NV_E2M1)); }
extern "C" uint8_t cuda_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
extern "C" float cuda_e4m3_value(uint8_t byte) { return from_half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)); }
extern "C" float cuda_e8m0_value(uint8_t byte) { return __bfloat162float(__nv_bfloat16(__nv_cvt_e8m0_to_bf16raw(byte))); }
// Two elements a byte, as the header packs them: x in the low nibble.
extern "C" uint8_t cuda_e2m1_pair(float x, float y) { return __nv_cvt_float2_to_fp4x2(float2{x, y}, __NV_E2M1, cudaRoundNearest); }

#else

extern "C" int cuda_codecs_present() { return 0; }
extern "C" uint8_t cuda_e2m1(float) { return 0; }
extern "C" float cuda_e2m1_value(uint8_t) { return 0; }
extern "C" uint8_t cuda_e4m3(float) { return 0; }
extern "C" float cuda_e4m3_value(uint8_t) { return 0; }
extern "C" float cuda_e8m0_value(uint8_t) { return 0; }
extern "C" uint8_t cuda_e2m1_pair(float, float) { return 0; }

#endif
