// codes[n,d] = encode(x[n,d] / scale[n, d/TILE]),   scale[n,j] = recipe(max |x| of tile j)         fp8.quantize_tile, axis = 1
//
// -DINPUT=float|u16 (bfloat16 bits)  -DCODE=u8|u16  -DFORMAT=E4M3FN..  -DTILE=32|64|128. One pass: a tile stays in registers.
// LANES consecutive lanes hold a tile, V = 16 bytes of it each: tile g = thread / LANES is tile g % tiles of row g / tiles, and lane
// l = thread % LANES has its columns V l .. V l + V - 1. The last tile of a row may be ragged. No register spills.
#include "fp8.cuh"

constexpr int V = 16 / sizeof(INPUT), LANES = TILE / V;

extern "C" __global__ void __launch_bounds__(256)
quantize_tile(const INPUT* __restrict__ x, CODE* __restrict__ codes, float* __restrict__ scale, int* __restrict__ found_nan, int n, int d,
              int whole,
              int rounding, float amax_min, float scale_min, int scale_rule, int power_rule, int value_rule) {
    const Recipe recipe = {amax_min, scale_min, scale_rule, power_rule, value_rule};
    const int tiles = div_up(d, TILE);
    const i64 g = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
    const bool live = g < i64(n) * tiles;  // every lane takes part in the maximum
    const i64 row = live ? g / tiles : 0;
    const int tile = live ? int(g % tiles) : 0, at = tile * TILE + threadIdx.x % LANES * V;
    float v[V];
    load<V>(v, x + row * d, at, live ? d : 0, whole);
    u32 amax = 0;  // on bits: NaNs come out on top
    for (int i = 0; i < V; i++) {
        const u32 u = __float_as_uint(v[i]) & ABS_BITS;
        amax = u > amax ? u : amax;
    }
    amax = max_over(amax, LANES);
    if (!live) return;
    if (amax > INF_BITS) *found_nan = 1;
    const Scale s = scale_of<FORMAT>(__uint_as_float(amax), recipe);
    if (threadIdx.x % LANES == 0) scale[g] = s.scale;
    for (int i = 0; i < V; i++) v[i] = scaled(v[i], s, recipe);
    store_codes<FORMAT, V>(codes + row * d, v, at, d, whole, rounding);
}
