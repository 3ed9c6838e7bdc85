// What both FP8 GEMMs share: 128x128 tiles of codes in shared memory, the promotion of a tile's product, and the store of the result.
#pragma once
#include "ptx.cuh"

constexpr int TILE = 128, STAGES = 3, STAGE_BYTES = 2 * TILE * TILE, GEMM_THREADS = 256;

struct Gemm {
    const u8 *a, *b;           // codes [n,d] [o,d], d a multiple of 16
    const float *a_scale, *b_scale;  // [n,tiles] [⌈o/128⌉ or o, tiles]
    void* y;
    int n, o, d, tiles, row, col;  // this block's first row and column of y
    bool scale_each_row, product_first, bf16_out;
};

// The block's part of the whole. expert_of[row/128] chooses a group's weights (negative: none); a null pointer: one group.
__device__ __forceinline__ bool begin(Gemm& g, const int* expert_of) {
    g.tiles = div_up(g.d, TILE), g.row = blockIdx.y * TILE, g.col = blockIdx.x * TILE;
    if (!expert_of) return true;
    const int expert = expert_of[blockIdx.y];
    if (expert < 0) return false;
    g.b += i64(expert) * g.o * g.d;
    g.b_scale += i64(expert) * (g.scale_each_row ? g.o : div_up(g.o, TILE)) * g.tiles;
    return true;
}

// Starts the copies of tile `kt` of both operands into its stage; zeros beyond the matrix. Row r's chunk c lies at chunk c ^ r%8.
__device__ __forceinline__ void fetch(const Gemm& g, unsigned char* shared, int kt) {
    unsigned char* stage = shared + kt % STAGES * STAGE_BYTES;
    if (kt < g.tiles) {
#pragma unroll
        for (int i = 0; i < TILE * 8 / GEMM_THREADS; i++) {
            const int piece = threadIdx.x + i * GEMM_THREADS, r = piece / 8, c = piece % 8, k = kt * TILE + c * 16;
            const bool in_a = g.row + r < g.n && k < g.d, in_b = g.col + r < g.o && k < g.d;
            cp_async(stage + swizzled(r, c), g.a + (in_a ? i64(g.row + r) * g.d + k : 0), in_a);
            cp_async(stage + TILE * TILE + swizzled(r, c), g.b + (in_b ? i64(g.col + r) * g.d + k : 0), in_b);
        }
    }
    cp_async_commit();
}

__device__ __forceinline__ float scale_of_a(const Gemm& g, int r, int kt) {
    return g.row + r < g.n ? g.a_scale[i64(g.row + r) * g.tiles + kt] : 0.f;
}
__device__ __forceinline__ float scale_of_b(const Gemm& g, int c, int kt) {
    if (!g.scale_each_row) return g.b_scale[i64(g.col / TILE) * g.tiles + kt];
    return g.col + c < g.o ? g.b_scale[i64(g.col + c) * g.tiles + kt] : 0.f;
}

// sum += part sa sb, the products rounded one by one (V3) or the scales' product first (V3.2): for one 16x8 fragment.
__device__ __forceinline__ void promote(const Gemm& g, float* sum, const float* part, const float (&sa)[2], const float (&sb)[2]) {
    for (int i = 0; i < 4; i++) {
        const float a = sa[i / 2], b = sb[i % 2];
        sum[i] = __fadd_rn(sum[i], g.product_first ? __fmul_rn(part[i], __fmul_rn(a, b)) : __fmul_rn(__fmul_rn(part[i], a), b));
    }
}

// A 16x8 fragment at row r, column c of the block's tile: rows r + lane/4, +8, columns c + 2(lane%4), +1.
__device__ __forceinline__ void write(const Gemm& g, const float* sum, int r, int c) {
    const int lane = threadIdx.x % 32, column = g.col + c + lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
        const int row = g.row + r + lane / 4 + i / 2 * 8, at = column + i % 2;
        if (row >= g.n || at >= g.o) continue;
        const i64 place = i64(row) * g.o + at;
        if (i % 2 == 0 && g.o % 2 == 0) {
            if (g.bf16_out) *reinterpret_cast<u32*>(static_cast<u16*>(g.y) + place) = bf16_pair(sum[i], sum[i + 1]);
            else *reinterpret_cast<float2*>(static_cast<float*>(g.y) + place) = make_float2(sum[i], sum[i + 1]);
        } else if (g.o % 2) {
            if (g.bf16_out) static_cast<u16*>(g.y)[place] = u16(bf16_bits(sum[i]));
            else static_cast<float*>(g.y)[place] = sum[i];
        }
    }
}
