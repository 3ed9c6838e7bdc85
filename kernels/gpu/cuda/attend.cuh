// What the attention kernels share: tiles of bfloat16 rows in shared memory, and fragments of them. Rows are padded to 128 bytes; row r's
// 16-byte chunk c lies at chunk c ^ r%8, so that the eight rows of an ldmatrix fall into different banks.
#pragma once
#include "ptx.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ constexpr int padded(int width) { return div_up(width, 64) * 64; }

// Element (row, 8 chunk) of a tile whose rows have WIDTH numbers.
template <int WIDTH>
__device__ __forceinline__ constexpr int at(int row, int chunk) {
    return row * padded(WIDTH) * 2 + (chunk ^ (row & 7)) * 16;
}

// A[16,16] at row r, step k of 16.
template <int WIDTH>
__device__ __forceinline__ void load_a(u32 (&a)[4], const unsigned char* tile, int r, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix(a, tile + at<WIDTH>(r + lane % 16, k * 2 + lane / 16));
}
// B[16 columns, 16 of k] from rows n..n+15 of a tile [n][k]: registers 0, 1 are columns n..n+7, registers 2, 3 the next eight.
template <int WIDTH>
__device__ __forceinline__ void load_b(u32 (&b)[4], const unsigned char* tile, int n, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix(b, tile + at<WIDTH>(n + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
}
// The same from a tile [k][n], transposed on the way: rows 16 k.., columns n..n+15.
template <int WIDTH>
__device__ __forceinline__ void load_b_trans(u32 (&b)[4], const unsigned char* tile, int n, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix_trans(b, tile + at<WIDTH>(k * 16 + lane % 16, n / 8 + lane / 16));
}
// A[16,16] from a tile [k][m], transposed: rows m..m+15 of A are the tile's columns.
template <int WIDTH>
__device__ __forceinline__ void load_a_trans(u32 (&a)[4], const unsigned char* tile, int m, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix_trans(a, tile + at<WIDTH>(k * 16 + lane / 16 * 8 + lane % 8, m / 8 + lane / 8 % 2));
}
// C[16,16] += A B, as two instructions of eight columns.
__device__ __forceinline__ void multiply(float (&low)[4], float (&high)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    const u32 first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_bf16(low, a, first);
    mma_bf16(high, a, second);
}
// C[16,8 COUNT] += A Bᵀ over WIDTH: A from rows top.. of its tile, B the rows from n on of a tile [n][k]. UNROLL steps at a time.
template <int WIDTH, int UNROLL, int COUNT>
__device__ __forceinline__ void add_scores(float (&c)[COUNT][4], const unsigned char* a_tile, int top, const unsigned char* b_tile,
                                           int n = 0) {
#pragma unroll UNROLL
    for (int k = 0; k < div_up(WIDTH, 16); k++) {
        u32 a[4], b[4];
        load_a<WIDTH>(a, a_tile, top, k);
#pragma unroll
        for (int j = 0; j < COUNT / 2; j++) {
            load_b<WIDTH>(b, b_tile, n + j * 16, k);
            multiply(c[2 * j], c[2 * j + 1], a, b);
        }
    }
}
// C[16,8 COUNT] += A B, A of 16 rows, B rows 16 k.. of a tile [k][n], its columns from 16 first on.
template <int WIDTH, int COUNT>
__device__ __forceinline__ void add_weighted(float (&c)[COUNT][4], const u32 (&a)[4], const unsigned char* b_tile, int k, int first = 0) {
    u32 b[4];
#pragma unroll
    for (int j = 0; j < COUNT / 2; j++) {
        load_b_trans<WIDTH>(b, b_tile, (first + j) * 16, k);
        multiply(c[2 * j], c[2 * j + 1], a, b);
    }
}

// Two neighbouring 16x8 fragments of C as a 16x16 fragment of A: the same lanes hold the same elements.
__device__ __forceinline__ void as_a(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = bf16_pair(left[0], left[1]), a[1] = bf16_pair(left[2], left[3]);
    a[2] = bf16_pair(right[0], right[1]), a[3] = bf16_pair(right[2], right[3]);
}
// Row lane/4 + 8 half of fragments side by side, WIDTH columns, times `factor`.
template <int WIDTH, int COUNT>
__device__ __forceinline__ void write_row(u16* row, const float (&c)[COUNT][4], int half, float factor = 1.f) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const int column = j * 8 + threadIdx.x % 4 * 2;
        if (column < WIDTH) *reinterpret_cast<u32*>(row + column) = bf16_pair(c[j][2 * half] * factor, c[j][2 * half + 1] * factor);
    }
}

// Starts the copy of `rows` rows of WIDTH numbers, row r from `row_of(r)`: zeros where that is null, and beyond WIDTH.
template <int WIDTH, class Row>
__device__ __forceinline__ void copy_rows(unsigned char* tile, int rows, Row row_of) {
    constexpr int CHUNKS = padded(WIDTH) / 8;
    for (int piece = threadIdx.x; piece < rows * CHUNKS; piece += blockDim.x) {
        const int r = piece / CHUNKS, c = piece % CHUNKS;
        const u16* from = row_of(r);
        if (from && c * 8 < WIDTH) cp_async(tile + at<WIDTH>(r, c), from + c * 8, true);
        else *reinterpret_cast<uint4*>(tile + at<WIDTH>(r, c)) = make_uint4(0, 0, 0, 0);
    }
}

// log(sum exp z) from the largest z·log2(e) and the sum of 2^(z·log2(e) - largest); +inf for a row without keys (FlashMLA's sign).
__device__ __forceinline__ float lse_of(float largest, float total) {
    return total == 0.f ? __uint_as_float(INF_BITS) : (largest + log2f(total)) * LN2;
}
// What one more logit in the denominator leaves.
__device__ __forceinline__ float kept_share(float sink, float lse) { return __fdiv_rn(1.f, 1.f + expf(sink - lse)); }
