// lse[b,h,s] = log sum_p exp lse_parts,   o[b,s,h,v] = sum_p exp(lse_parts[p] - lse) o_parts[p]                       attention.merge
//
// -DTYPE=float|u16 (bfloat16 bits): o's type; parts are float32. Block (b,s,h) has one row; thread t the columns t, t + 128, ... A part
// that saw no key has lse = ±inf and weighs nothing, whatever it holds. A sink scales o by 1/(1 + exp(sink - lse)). No register spills.
#include "attend.cuh"

extern "C" __global__ void __launch_bounds__(128)
merge(const float* __restrict__ o_parts, const float* __restrict__ lse_parts, const float* __restrict__ sink, TYPE* __restrict__ o,
      float* __restrict__ lse, int parts, int s, int h, int v) {
    const i64 row = blockIdx.x, rows = gridDim.x;  // (b·s + i)·h + head
    const int head = int(row % h);
    const i64 query = row / h, at = query / s * h * s + i64(head) * s + query % s;  // in lse[b,h,s]
    float largest = -__uint_as_float(INF_BITS), total = 0.f;
    for (int p = 0; p < parts; p++) {
        const float x = lse_parts[p * rows + at];
        if ((__float_as_uint(x) & ABS_BITS) != INF_BITS) largest = fmaxf(largest, x);
    }
    for (int p = 0; p < parts; p++) {
        const float x = lse_parts[p * rows + at];
        if ((__float_as_uint(x) & ABS_BITS) != INF_BITS) total += expf(x - largest);
    }
    const float logsum = total == 0.f ? __uint_as_float(INF_BITS) : largest + logf(total);
    const float share = sink && total != 0.f ? kept_share(sink[head], logsum) : 1.f;
    if (threadIdx.x == 0) lse[at] = logsum;
    for (int c = threadIdx.x; c < v; c += blockDim.x) {
        float sum[1] = {0.f};
        for (int p = 0; p < parts; p++) {
            const float x = lse_parts[p * rows + at];
            const float w = (__float_as_uint(x) & ABS_BITS) == INF_BITS ? 0.f : expf(x - logsum);
            if (w > 0.f) sum[0] += w * o_parts[(p * rows + row) * v + c];
        }
        sum[0] *= share;
        store<1>(o + row * v, sum, c, v, false);
    }
}
