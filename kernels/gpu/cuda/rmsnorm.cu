// y[n,d] = weight[d] x[n,d] rstd[n],   rstd[n] = (mean_d x² + eps)^(-1/2)                                       rmsnorm
// codes, scale = fp8.quantize_tile(y) in tiles of 1x128, with y rounded to its type first                       rmsnorm_quantize
// g = dy weight:   dx = rstd (g - xhat mean_d(g xhat)),   dweight[d] = sum_n dy xhat                            rmsnorm_backward
//
// -DTYPE=float|u16 (bfloat16 bits)  -DCHUNKS: d <= CHUNKS * 256 * V. Arithmetic is float32. One pass: block n has row n in registers,
// thread t the columns (256 c + t) V .. + V - 1 of chunk c, V = 16 bytes; so a tile of 128 is 128/V consecutive lanes.
// -DTWO_ROUNDINGS=1: x rstd is rounded to TYPE before the weight (cast_then_weight). No register spills.
#include "fp8.cuh"

constexpr int V = 16 / sizeof(TYPE), THREADS = 256, WARPS = THREADS / 32;

__device__ __forceinline__ float rounded(float x, const float*) { return x; }
__device__ __forceinline__ float rounded(float x, const u16*) { return bf16_value(bf16_bits(x)); }
__device__ __forceinline__ int column(int chunk) { return (chunk * THREADS + int(threadIdx.x)) * V; }

// The sum over the block's threads, in an order that depends on nothing; every thread gets it.
__device__ __forceinline__ float sum_of_block(float v) {
    __shared__ float part[WARPS];
    v = sum_over(v, 32);
    __syncthreads();  // the last sum was read
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0.f;
    for (int w = 0; w < WARPS; w++) v += part[w];
    return v;
}

// Row x in registers as x, and its rstd.
__device__ __forceinline__ float read_row(float (&v)[CHUNKS][V], const TYPE* x, int d, int whole, float eps) {
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        load<V>(v[c], x, column(c), d, whole);
        for (int i = 0; i < V; i++) squares += v[c][i] * v[c][i];
    }
    return __fdiv_rn(1.f, __fsqrt_rn(__fdiv_rn(sum_of_block(squares), float(d)) + eps));
}
__device__ __forceinline__ void normalised(float (&v)[V], float rstd, const TYPE* weight, int at, int d, int whole) {
    float w[V];
    load<V>(w, weight, at, d, whole);
    for (int i = 0; i < V; i++) {
        const float xhat = v[i] * rstd;
        v[i] = (TWO_ROUNDINGS ? rounded(xhat, weight) : xhat) * w[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rmsnorm(const TYPE* __restrict__ x, const TYPE* __restrict__ weight, TYPE* __restrict__ y, int d, int whole, float eps) {
    const i64 row = i64(blockIdx.x) * d;
    float v[CHUNKS][V];
    const float rstd = read_row(v, x + row, d, whole, eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        normalised(v[c], rstd, weight, column(c), d, whole);
        store<V>(y + row, v[c], column(c), d, whole);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rmsnorm_quantize(const TYPE* __restrict__ x, const TYPE* __restrict__ weight, u8* __restrict__ codes, float* __restrict__ scale,
                 int* __restrict__ found_nan, int d, int whole, float eps, float amax_min, float scale_min, int scale_rule, int power_rule,
                 int value_rule) {
    constexpr int LANES = 128 / V;
    const Recipe recipe = {amax_min, scale_min, scale_rule, power_rule, value_rule};
    const i64 row = i64(blockIdx.x) * d;
    float v[CHUNKS][V];
    const float rstd = read_row(v, x + row, d, whole, eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        normalised(v[c], rstd, weight, column(c), d, whole);
        u32 amax = 0;
        for (int i = 0; i < V; i++) {
            v[c][i] = rounded(v[c][i], x);
            const u32 u = __float_as_uint(v[c][i]) & ABS_BITS;
            amax = u > amax ? u : amax;
        }
        amax = max_over(amax, LANES);
        if (amax > INF_BITS) *found_nan = 1;
        const Scale s = scale_of<E4M3FN>(__uint_as_float(amax), recipe);
        if (threadIdx.x % LANES == 0 && column(c) < d) scale[i64(blockIdx.x) * div_up(d, 128) + column(c) / 128] = s.scale;
        for (int i = 0; i < V; i++) v[c][i] = scaled(v[c][i], s, recipe);
        store_codes<E4M3FN, V>(codes + row, v[c], column(c), d, whole, HALF_EVEN);
    }
}

// Block b has rows b, b + gridDim.x, ...; dweight_parts[b,d] is what they add to dweight (sum_rows adds the parts).
extern "C" __global__ void __launch_bounds__(THREADS)
rmsnorm_backward(const TYPE* __restrict__ dy, const TYPE* __restrict__ x, const TYPE* __restrict__ weight, TYPE* __restrict__ dx,
                 float* __restrict__ dweight_parts, int n, int d, int whole, float eps) {
    float dweight[CHUNKS][V] = {};
    for (int row = blockIdx.x; row < n; row += gridDim.x) {
        float v[CHUNKS][V], g[CHUNKS][V], products = 0.f;
        const float rstd = read_row(v, x + i64(row) * d, d, whole, eps);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            float w[V];
            load<V>(g[c], dy + i64(row) * d, column(c), d, whole);
            load<V>(w, weight, column(c), d, whole);
            for (int i = 0; i < V; i++) {
                v[c][i] *= rstd;
                dweight[c][i] += TWO_ROUNDINGS ? rounded(g[c][i] * rounded(v[c][i], x), x) : g[c][i] * v[c][i];
                g[c][i] = TWO_ROUNDINGS ? rounded(g[c][i] * w[i], x) : g[c][i] * w[i];
                products += g[c][i] * v[c][i];
            }
        }
        const float mean = __fdiv_rn(sum_of_block(products), float(d));
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            for (int i = 0; i < V; i++) g[c][i] = rstd * (g[c][i] - v[c][i] * mean);
            store<V>(dx + i64(row) * d, g[c], column(c), d, whole);
        }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) store<V>(dweight_parts + i64(blockIdx.x) * d, dweight[c], column(c), d, false);
}

// y[d] = sum_n parts[n,d], first row first: thread d.
extern "C" __global__ void __launch_bounds__(THREADS) sum_rows(const float* __restrict__ parts, TYPE* __restrict__ y, int n, int d) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= d) return;
    float sum[1] = {0.f};
    for (int row = 0; row < n; row++) sum[0] += parts[i64(row) * d + at];
    store<1>(y, sum, at, d, false);
}
