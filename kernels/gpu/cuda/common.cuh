// What every kernel shares: names of integers, bits of bfloat16, reductions over lanes. NVRTC has no <cstdint>.
#pragma once
#ifdef LEADLINE_HOST
#include "mma_host.h"  // tests/cuda_shim: the same text, run on the CPU
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 FULL = 0xffffffffu, INF_BITS = 0x7f800000u, ABS_BITS = 0x7fffffffu;

__device__ __forceinline__ constexpr int div_up(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ float bf16_value(u32 h) { return __uint_as_float(h << 16); }
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// The nearest bfloat16, ties to even; any NaN becomes the positive quiet one.
__device__ __forceinline__ u32 bf16_bits(float x) {
    const u32 u = __float_as_uint(x);
    return (u & ABS_BITS) > INF_BITS ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
#if !defined(LEADLINE_HOST) && __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}

// Over groups of `lanes` consecutive lanes (a power of two); every lane gets the result.
template <class T>
__device__ __forceinline__ T max_over(T v, int lanes) {
    for (int step = lanes / 2; step; step /= 2) {
        const T other = __shfl_xor_sync(FULL, v, step);
        v = other > v ? other : v;
    }
    return v;
}
__device__ __forceinline__ float sum_over(float v, int lanes) {
    for (int step = lanes / 2; step; step /= 2) v += __shfl_xor_sync(FULL, v, step);
    return v;
}

// V consecutive numbers of a row, from column `at`; zeros beyond `limit`. `whole`: rows start at multiples of 16 bytes.
template <int V>
__device__ __forceinline__ void load(float (&v)[V], const float* row, int at, int limit, bool whole) {
    if (whole && at + V <= limit) {
        for (int i = 0; i < V; i += 4) {
            const float4 w = *reinterpret_cast<const float4*>(row + at + i);
            v[i] = w.x, v[i + 1] = w.y, v[i + 2] = w.z, v[i + 3] = w.w;
        }
    } else {
        for (int i = 0; i < V; i++) v[i] = at + i < limit ? row[at + i] : 0.f;
    }
}
template <int V>
__device__ __forceinline__ void load(float (&v)[V], const u16* row, int at, int limit, bool whole) {
    if (whole && at + V <= limit) {
        for (int i = 0; i < V; i += 4) {
            const uint2 w = *reinterpret_cast<const uint2*>(row + at + i);
            v[i] = low_bf16(w.x), v[i + 1] = high_bf16(w.x), v[i + 2] = low_bf16(w.y), v[i + 3] = high_bf16(w.y);
        }
    } else {
        for (int i = 0; i < V; i++) v[i] = at + i < limit ? bf16_value(row[at + i]) : 0.f;
    }
}
template <int V>
__device__ __forceinline__ void store(u16* row, const float (&v)[V], int at, int limit, bool whole) {
    if (whole && at + V <= limit) {
        for (int i = 0; i < V; i += 4)
            *reinterpret_cast<uint2*>(row + at + i) = make_uint2(bf16_pair(v[i], v[i + 1]), bf16_pair(v[i + 2], v[i + 3]));
    } else {
        for (int i = 0; i < V; i++)
            if (at + i < limit) row[at + i] = u16(bf16_bits(v[i]));
    }
}
template <int V>
__device__ __forceinline__ void store(float* row, const float (&v)[V], int at, int limit, bool whole) {
    if (whole && at + V <= limit) {
        for (int i = 0; i < V; i += 4) *reinterpret_cast<float4*>(row + at + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else {
        for (int i = 0; i < V; i++)
            if (at + i < limit) row[at + i] = v[i];
    }
}
