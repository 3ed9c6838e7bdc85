// Narrow formats and scale recipes: ref/cast.py, ref/fp8_recipes.py, operation by operation in float32.
//
// A format is sign | exponent | mantissa with gradual underflow. -DFORMAT=E4M3FN chooses one.
#pragma once
#include "common.cuh"

template <int MANTISSA_BITS, int LEAST_EXPONENT, u32 LARGEST, u32 NAN_CODE_, u32 INF_CODE_, int BITS_, bool NEGATIVE_ZERO_ = true>
struct Format {
    static constexpr int M = MANTISSA_BITS, EMIN = LEAST_EXPONENT, BITS = BITS_;
    static constexpr u32 MAX_CODE = LARGEST, NAN_CODE = NAN_CODE_, INF_CODE = INF_CODE_;  // 0: the format has none
    static constexpr bool SIGNED = EMIN != -127, NEGATIVE_ZERO = NEGATIVE_ZERO_;
};
typedef Format<3, -6, 0x7e, 0x7f, 0, 8> E4M3FN;
typedef Format<2, -14, 0x7b, 0x7e, 0x7c, 8> E5M2;
typedef Format<3, -7, 0x7f, 0x80, 0, 8, false> E4M3FNUZ;
typedef Format<2, -15, 0x7f, 0x80, 0, 8, false> E5M2FNUZ;
typedef Format<1, 0, 7, 0, 0, 4> E2M1;
typedef Format<0, -127, 0xfe, 0xff, 0, 8> E8M0;
typedef Format<6, -14, 0x7bf, 0x7e0, 0x7c0, 12> E5M6;
typedef Format<7, -126, 0x7f7f, 0x7fc0, 0x7f80, 16> BF16;
typedef Format<10, -14, 0x7bff, 0x7e00, 0x7c00, 16> FP16;
typedef Format<10, -126, 0x3fbff, 0x3fe00, 0x3fc00, 19> TF32;

enum Rounding { HALF_EVEN, HALF_AWAY, HALF_ZERO, TOWARD_ZERO, STOCHASTIC };

// 2^e for -149 <= e <= 127
__device__ __forceinline__ float power_of_two(int e) {
    return __uint_as_float(e < -126 ? 1u << (e + 149) : u32(e + 127) << 23);
}

// The bit pattern of x. `random` in [0,1) is read by STOCHASTIC alone.
template <class F>
__device__ __forceinline__ u32 encode(float x, bool saturate, int rounding, float random = 0.f) {
    const u32 bits = __float_as_uint(x), magnitude = bits & ABS_BITS;
    if (magnitude > INF_BITS || (!F::SIGNED && (magnitude == 0 || bits >> 31))) return F::NAN_CODE;
    const bool infinite = magnitude == INF_BITS;
    // |x| = m 2^(e - 23), 2^23 <= m < 2^24 unless x is 0; infinity stands in as the largest float
    const u32 finite = infinite ? INF_BITS - 1 : magnitude;
    int e = int(finite >> 23) - 127;
    u32 m = (finite & 0x7fffff) | 0x800000;
    if (finite < 0x800000) {
        const int up = finite ? __clz(int(finite)) - 8 : 0;
        m = finite << up, e = finite ? -126 - up : F::EMIN;
    }
    const int steps = e > F::EMIN ? e - F::EMIN : 0, cut = 23 - F::M + (e < F::EMIN ? F::EMIN - e : 0);
    const int shift = cut < 31 ? cut : 31;  // m < 2^24: beyond, all is cut off and below half
    u32 q = m >> shift;
    const u32 rest = m & ((1u << shift) - 1), half = 1u << (shift - 1);
    bool up = false;
    if (rounding == HALF_EVEN) up = rest > half || (rest == half && (q & 1));
    else if (rounding == HALF_AWAY) up = rest >= half;
    else if (rounding == HALF_ZERO) up = rest > half;
    else if (rounding == STOCHASTIC) {
        const int by = cut < 126 ? cut : 126;
        up = float(rest) * power_of_two(-by) * power_of_two(by - cut) > random;
    }
    q += up;
    if (!F::SIGNED) q = (q > 1 ? q : 1) - 1;
    u32 code = (u32(steps) << F::M) + q;  // a carry out of the mantissa moves into the exponent by itself
    const bool above = code > F::MAX_CODE, beyond = rounding == TOWARD_ZERO ? infinite : infinite || above;
    if (beyond) {
        if (!saturate && F::INF_CODE == 0) return F::NAN_CODE;
        code = saturate ? F::MAX_CODE : F::INF_CODE;
    } else if (above) code = F::MAX_CODE;
    if (F::SIGNED && bits >> 31 && (F::NEGATIVE_ZERO || code)) code |= 1u << (F::BITS - 1);
    return code;
}

template <class F>
__device__ __forceinline__ float decode(u32 code) {
    const u32 magnitude = F::SIGNED ? code & ((1u << (F::BITS - 1)) - 1) : code;
    const bool negative = F::SIGNED && code >> (F::BITS - 1);
    if (!F::NEGATIVE_ZERO && code == F::NAN_CODE) return __uint_as_float(0x7fc00000u);
    if (magnitude > F::MAX_CODE)
        return __uint_as_float(F::INF_CODE && magnitude == F::INF_CODE ? INF_BITS | u32(negative) << 31 : 0x7fc00000u);
    const u32 field = magnitude >> F::M, mantissa = magnitude & ((1u << F::M) - 1);
    const u32 units = mantissa + ((field > 0 || !F::SIGNED) ? 1u << F::M : 0);
    const int steps = F::SIGNED ? (field > 0 ? int(field) - 1 : 0) : int(field);
    const float x = float(units) * power_of_two(steps + F::EMIN - F::M);
    return negative ? -x : x;
}

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };

// Two saturated codes, nearest even (or HALF_ZERO): the chip's own conversion where it has one.
template <class F>
__device__ __forceinline__ u32 encode_pair(float low, float high, int rounding) {
#if !defined(LEADLINE_HOST) && __CUDA_ARCH__ >= 890
    if (Same<F, E4M3FN>::value && rounding == HALF_EVEN) {
        u16 pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
        return pair;
    }
#endif
    return encode<F>(low, true, rounding) | encode<F>(high, true, rounding) << (F::BITS > 8 ? 16 : 8);
}

enum ScaleRule { QUOTIENT, PRODUCT, INVERSE };                     // a / MAX, a * (1/MAX), 1 / (MAX/a)
enum PowerRule { AS_IS, LOG2, BITS_UP };                           // 2^ceil(log2 s): log2 rounded to float32, or exactly
enum ValueRule { DIVIDE, TIMES_INVERSE, TIMES_MAX_OVER_AMAX };     // x / s, x * (1/s), x * (MAX/a)

struct Recipe {
    float amax_min, scale_min;
    int scale, power, value;
};
struct Scale {
    float scale, by;  // what dequantising multiplies by; what encoding multiplies x by, or divides
};

// s up to a power of two. LOG2: log2(s) = e + log2(1 + f) rounds to e where log2(1 + f) is under half the gap between e and the next float.
__device__ __forceinline__ float round_scale_up(float s, int power) {
    const u32 bits = __float_as_uint(s), fraction = bits & 0x7fffff, low = bits - fraction;
    if (bits >= INF_BITS || fraction == 0) return s;
    if (low == 0) return __uint_as_float(1u << (32 - __clz(int(bits - 1))));
    if (power == LOG2) {
        const float e = float(int(low >> 23) - 127);
        const float next = __uint_as_float(e < 0.f ? __float_as_uint(e) - 1 : __float_as_uint(e) + 1);
        if (double(fraction) / 8388608.0 < 0.5 * 0.69314718055994530942 * double(next - e)) return __uint_as_float(low);
    }
    return __uint_as_float(low + 0x800000);
}

// The scale of a tile from a = max |x|.
template <class F>
__device__ __forceinline__ Scale scale_of(float a, const Recipe& r) {
    const float top = decode<F>(F::MAX_CODE);
    a = a > r.amax_min ? a : r.amax_min;
    Scale out;
    if (r.scale == INVERSE) {
        float inverse = 1.f;
        if (a > 0.f && __float_as_uint(a) != INF_BITS) {
            inverse = __fdiv_rn(top, a);
            if (__float_as_uint(inverse) == INF_BITS) inverse = __uint_as_float(INF_BITS - 1);
        }
        out.scale = __fdiv_rn(1.f, r.power == AS_IS ? inverse : __uint_as_float(__float_as_uint(inverse) & INF_BITS));
        out.by = r.value == TIMES_MAX_OVER_AMAX ? inverse : __fdiv_rn(1.f, out.scale);
        return out;
    }
    float s = r.scale == QUOTIENT ? __fdiv_rn(a, top) : __fmul_rn(a, __fdiv_rn(1.f, top));
    s = s > r.scale_min ? s : r.scale_min;
    if (r.power != AS_IS) s = round_scale_up(s, r.power);
    out.scale = s;
    out.by = r.value == DIVIDE ? s : r.value == TIMES_INVERSE ? __fdiv_rn(1.f, s) : __fdiv_rn(top, a);
    return out;
}

// What is encoded. Division by a power of two is exact as a product with its inverse.
__device__ __forceinline__ float scaled(float x, const Scale& s, const Recipe& r) {
    return r.value == DIVIDE ? __fdiv_rn(x, s.by) : __fmul_rn(x, s.by);
}

// V codes at columns at.. of a row.
template <class F, int V, class Code>
__device__ __forceinline__ void store_codes(Code* row, const float (&v)[V], int at, int limit, bool whole, int rounding) {
    constexpr int PAIR = 2 * sizeof(Code);
    u32 pairs[V / 2];
    for (int i = 0; i < V / 2; i++) pairs[i] = encode_pair<F>(v[2 * i], v[2 * i + 1], rounding);
    if (whole && at + V <= limit) {
        for (int i = 0; i < V / 4; i++) {
            if (PAIR == 2) reinterpret_cast<u32*>(row + at)[i] = pairs[2 * i] | pairs[2 * i + 1] << 16;
            else reinterpret_cast<uint2*>(row + at)[i] = make_uint2(pairs[2 * i], pairs[2 * i + 1]);
        }
    } else {
        for (int i = 0; i < V; i++)
            if (at + i < limit) row[at + i] = Code(pairs[i / 2] >> (i % 2 * 8 * int(sizeof(Code))));
    }
}
