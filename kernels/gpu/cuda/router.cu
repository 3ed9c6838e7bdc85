// topk_idx[n,k] = Topk(s + bias in the best groups),   topk_weight[n,k] = factor s[n,idx] / (sum_k s[n,idx] + eps)     router.noaux_tc
// The same with s = softmax(logits), no bias, and a group's largest s as its score                                      router.softmax
//
// -DTYPE=float|u16 (bfloat16 bits)  -DPER: e <= 32 PER  -DBEST=2|1: how many of a group's largest make its score  -DBIAS=0|1.
// One warp a token; lane l has experts PER l .. PER l + PER - 1. A choice is the largest key of the warp, and of equal ones the lowest
// lane's, in it the lowest expert's: ties go to the lowest index. Keys order as floats do, and 0 is below them all: gone, or no expert.
// Where a group is 2^m whole lanes, its score is made by exchanges; else lane g reads group g. No register spills.
#include "fp8.cuh"

constexpr int WARPS = 4;
enum Scoring { SIGMOID, SOFTMAX, SQRT_SOFTPLUS };

__device__ __forceinline__ u32 key_of(float x) {
    const u32 u = __float_as_uint(x + 0.f);  // -0 ties with +0
    return u >> 31 ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float sigmoid_like(float x, int scoring) {
    const float small = expf(x >= 0.f ? -x : x);
    if (scoring == SIGMOID) return __fdiv_rn(x >= 0.f ? 1.f : small, 1.f + small);
    return __fsqrt_rn(log1pf(small) + (x > 0.f ? x : 0.f));
}
__device__ __forceinline__ float gate(float x, int bf16) { return bf16 ? bf16_value(bf16_bits(x)) : x; }

// The lane with the largest key, the lowest of equal ones; what that key is.
__device__ __forceinline__ int winner(u32 key, u32& top) {
    top = __reduce_max_sync(FULL, key);
    return __ffs(__ballot_sync(FULL, key == top)) - 1;
}
// Two numbers in descending order take in two more.
__device__ __forceinline__ void merge(float& first, float& second, float a, float b) {
    const float low = a < first ? a : first;
    first = a > first ? a : first;
    second = second > low ? second : low;
    second = second > b ? second : b;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
router(const TYPE* __restrict__ logits, const float* __restrict__ bias, int* __restrict__ topk_idx, TYPE* __restrict__ topk_weight,
       int* __restrict__ found, int n, int e, int whole, int k, int n_group, int topk_group, int scoring, int bf16_gate, int fill_zero,
       int normalise, int clamp, float eps, float factor) {
    __shared__ float scores[WARPS][32 * PER], choice[WARPS][32 * PER];
    const float low = __uint_as_float(0xff800000u);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = lane * PER;
    const i64 row = i64(blockIdx.x) * WARPS + warp, token = row < n ? row : n - 1;
    float s[PER], t[PER];
    bool finite = true;
    load<PER>(t, logits + token * e, first, e, whole);
    float most = low, total = 0.f;
    for (int i = 0; i < PER; i++) {
        finite &= (__float_as_uint(t[i]) & ABS_BITS) < INF_BITS;
        t[i] = gate(t[i], bf16_gate);
        most = first + i < e && t[i] > most ? t[i] : most;
    }
    if (scoring == SOFTMAX) {
        most = max_over(most, 32);
        for (int i = 0; i < PER; i++) {
            s[i] = first + i < e ? expf(t[i] - most) : 0.f;
            total += s[i];
        }
        total = sum_over(total, 32);
    }
    for (int i = 0; i < PER; i++) {
        s[i] = gate(scoring == SOFTMAX ? __fdiv_rn(s[i], total) : sigmoid_like(t[i], scoring), bf16_gate);
        const float b = BIAS && first + i < e ? bias[first + i] : 0.f;
        finite &= (__float_as_uint(b) & ABS_BITS) < INF_BITS;
        t[i] = first + i < e ? s[i] + b : low;
        scores[warp][first + i] = s[i];
        choice[warp][first + i] = t[i];
    }
    if (!finite) *found = 1;
    __syncwarp();

    u32 kept = FULL;  // bit g: group g takes part
    const int size = e / n_group, lanes = size / PER;
    if (n_group > 1) {
        float best = low, second = low;
        if (size % PER == 0 && (lanes & (lanes - 1)) == 0) {
            for (int i = 0; i < PER; i++) merge(best, second, t[i], low);
            for (int step = lanes / 2; step; step /= 2) {
                const float a = __shfl_xor_sync(FULL, best, step), b = __shfl_xor_sync(FULL, second, step);
                merge(best, second, a, b);
            }
            best = __shfl_sync(FULL, best, lane * lanes & 31);
            second = __shfl_sync(FULL, second, lane * lanes & 31);
        } else if (lane < n_group) {
            for (int i = 0; i < size; i++) merge(best, second, choice[warp][lane * size + i], low);
        }
        u32 key = lane < n_group ? key_of(BEST == 2 ? best + second : best) : 0, top;
        kept = 0;
        for (int j = 0; j < topk_group; j++) {
            const int g = winner(key, top);
            kept |= 1u << g;
            if (lane == g) key = 0;
        }
    }

    u32 keys[PER];
    for (int i = 0; i < PER; i++) {
        const bool in = kept >> (n_group > 1 ? (first + i) / size & 31 : 0) & 1;
        keys[i] = first + i < e ? key_of(in ? t[i] : fill_zero ? 0.f : low) : 0;
    }
    int mine = 0;  // lane j: what slot j chose
    for (int j = 0; j < k; j++) {
        u32 best = 0, top;
        int at = 0;
        for (int i = 0; i < PER; i++)
            if (keys[i] > best) best = keys[i], at = i;
        const int lane_of_best = winner(best, top);
        const int expert = __shfl_sync(FULL, first + at, lane_of_best);
        for (int i = 0; i < PER; i++)
            if (first + i == expert) keys[i] = 0;
        if (lane == j) mine = expert;
    }
    float weight = lane < k ? scores[warp][mine] : 0.f, denominator = 1.f;
    if (normalise) {
        denominator = sum_over(weight, 32);
        denominator = clamp ? (denominator > eps ? denominator : eps) : denominator + eps;
    }
    if (row >= n || lane >= k) return;
    const float out[1] = {__fmul_rn(__fdiv_rn(weight, denominator), factor)};
    topk_idx[row * k + lane] = mine;
    store<1>(topk_weight + row * k, out, lane, k, false);
}
