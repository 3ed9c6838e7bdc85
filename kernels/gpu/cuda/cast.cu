// encode: codes[n] = the bit pattern of the value of FORMAT nearest to x[n];   cast: y[n] = that value;   decode: x[n] = value(codes[n])
//
// -DFORMAT=E4M3FN..  -DCODE=u8|u16. Thread i has elements 4 i .. 4 i + 3, in one load and one store. cast and encode take `random`, one
// number in [0,1) an element, where rounding is STOCHASTIC, and nothing (a null pointer) else. No register spills.
#include "fp8.cuh"

__device__ __forceinline__ void codes_of(u32 (&c)[4], const float* x, const float* random, int at, int n, int whole, int saturate,
    int rounding) {
    float v[4], r[4] = {0.f, 0.f, 0.f, 0.f};
    load<4>(v, x, at, n, whole);
    if (rounding == STOCHASTIC) load<4>(r, random, at, n, whole);
    if (rounding == HALF_EVEN && saturate && FORMAT::BITS == 8) {
        const u32 low = encode_pair<FORMAT>(v[0], v[1], rounding), high = encode_pair<FORMAT>(v[2], v[3], rounding);
        c[0] = low & 0xff, c[1] = low >> 8 & 0xff, c[2] = high & 0xff, c[3] = high >> 8 & 0xff;
    } else {
        for (int i = 0; i < 4; i++) c[i] = encode<FORMAT>(v[i], saturate, rounding, r[i]);
    }
}

extern "C" __global__ void __launch_bounds__(256)
encode_values(const float* __restrict__ x, const float* __restrict__ random, CODE* __restrict__ codes, int n, int whole, int saturate,
              int rounding) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    u32 c[4];
    if (at >= n) return;
    codes_of(c, x, random, at, n, whole, saturate, rounding);
    if (whole && at + 4 <= n) {
        if (sizeof(CODE) == 1) *reinterpret_cast<u32*>(codes + at) = c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
        else *reinterpret_cast<uint2*>(codes + at) = make_uint2(c[0] | c[1] << 16, c[2] | c[3] << 16);
    } else {
        for (int i = 0; i < 4; i++)
            if (at + i < n) codes[at + i] = CODE(c[i]);
    }
}

extern "C" __global__ void __launch_bounds__(256)
cast_values(const float* __restrict__ x, const float* __restrict__ random, float* __restrict__ y, int n, int whole, int saturate,
            int rounding) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    u32 c[4];
    float v[4];
    if (at >= n) return;
    codes_of(c, x, random, at, n, whole, saturate, rounding);
    for (int i = 0; i < 4; i++) v[i] = decode<FORMAT>(c[i]);
    store<4>(y, v, at, n, whole);
}

extern "C" __global__ void __launch_bounds__(256)
decode_codes(const CODE* __restrict__ codes, float* __restrict__ x, int n, int whole) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    float v[4];
    if (at >= n) return;
    if (whole && at + 4 <= n && sizeof(CODE) == 1) {
        const u32 four = *reinterpret_cast<const u32*>(codes + at);
        for (int i = 0; i < 4; i++) v[i] = decode<FORMAT>(four >> 8 * i & 0xff);
    } else {
        for (int i = 0; i < 4; i++) v[i] = at + i < n ? decode<FORMAT>(codes[at + i]) : 0.f;
    }
    store<4>(x, v, at, n, whole);
}
