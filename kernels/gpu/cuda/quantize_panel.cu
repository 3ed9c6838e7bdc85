// codes[o,d] = encode(w[o,d] / s),   s = scale[o/TILE, d/TILE] = recipe(max |w| of a TILE x TILE block)     fp8.quantize_block
//                             -DPER_COLUMN=1: s = scale[o/TILE, d], a TILE x 1 tile for each column          fp8.quantize_tile, axis = 0
//
// -DINPUT=float|u16 (bfloat16 bits)  -DCODE=u8|u16  -DFORMAT=E4M3FN..  -DTILE=32|64|128. One pass: a panel of TILE rows and 128 columns
// stays in registers. Block (p, q) has rows TILE q .. and columns 128 p ..; its warp w has rows w, w + 8, .., lane l four columns from 4 l.
// Rows beyond o and columns beyond d are zeros, which change no maximum. No register spills.
#include "fp8.cuh"

constexpr int WARPS = 8, ROWS = TILE / WARPS, WIDTH = 128;

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
quantize_panel(const INPUT* __restrict__ x, CODE* __restrict__ codes, float* __restrict__ scale, int* __restrict__ found_nan, int n,
               int d, int whole,
               int rounding, float amax_min, float scale_min, int scale_rule, int power_rule, int value_rule) {
    __shared__ u32 part[WARPS][WIDTH];
    const Recipe recipe = {amax_min, scale_min, scale_rule, power_rule, value_rule};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.y * TILE + warp, at = blockIdx.x * WIDTH + lane * 4;
    float v[ROWS][4];
    u32 amax[4] = {0, 0, 0, 0};  // of a column; on bits, so that NaNs come out on top
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = first + r * WARPS;
        load<4>(v[r], x + i64(row < n ? row : 0) * d, at, row < n ? d : 0, whole);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 4; i++) {
            const u32 u = __float_as_uint(v[r][i]) & ABS_BITS;
            amax[i] = u > amax[i] ? u : amax[i];
        }
    for (int i = 0; i < 4; i++) part[warp][lane * 4 + i] = amax[i];
    __syncthreads();
    for (int w = 0; w < WARPS; w++)
        for (int i = 0; i < 4; i++) amax[i] = part[w][lane * 4 + i] > amax[i] ? part[w][lane * 4 + i] : amax[i];
    u32 worst = 0;
    for (int i = 0; i < 4; i++) worst = amax[i] > worst ? amax[i] : worst;
    if (!PER_COLUMN) {
        worst = max_over(worst, TILE / 4);
        for (int i = 0; i < 4; i++) amax[i] = worst;
    }
    if (worst > INF_BITS) *found_nan = 1;
    Scale s[PER_COLUMN ? 4 : 1];
    for (int i = 0; i < (PER_COLUMN ? 4 : 1); i++) s[i] = scale_of<FORMAT>(__uint_as_float(amax[i]), recipe);
    if (warp == 0) {
        if (PER_COLUMN) {
            for (int i = 0; i < 4; i++)
                if (at + i < d) scale[i64(blockIdx.y) * d + at + i] = s[PER_COLUMN ? i : 0].scale;
        } else if (at < d && lane % (TILE / 4) == 0) {
            scale[i64(blockIdx.y) * div_up(d, TILE) + at / TILE] = s[0].scale;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = first + r * WARPS;
        for (int i = 0; i < 4; i++) v[r][i] = scaled(v[r][i], s[PER_COLUMN ? i : 0], recipe);
        if (row < n) store_codes<FORMAT, 4>(codes + i64(row) * d, v[r], at, d, whole, rounding);
    }
}
