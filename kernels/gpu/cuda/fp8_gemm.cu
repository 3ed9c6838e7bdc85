// y[n,o] = sum_j (sum_{d in tile j of 128} a[n,d] b[o,d]) a_scale[n,j] b_scale[o/128,j],   a, b = values of E4M3 codes       fp8.gemm
//
// With mma.sync. A block makes 128x128 of y, its 8 warps 64x32 each (2 x 4 warps): 4 x 4 fragments of 16x8, twice, the tile's product
// `part` and the promoted float32 sum. Tiles of codes come through three stages in shared memory; ldmatrix reads them: lane l names row
// l%16 (A) or l/16·8 + l%8 (B) and 16-byte chunk l/16 (A) or l/8%2 (B) of a step of 32 bytes of k.
// -DPATH=0: the chip's FP8 instruction (sm_89 and later). -DPATH=1: codes become bfloat16, which holds them exactly, and two bf16
// instructions do a step: for sm_80, and as an accumulator of float32 on any chip. No register spills.
#include "fp8.cuh"
#include "gemm_tile.cuh"

// Four codes as two pairs of bfloat16. 2^120 moves E4M3's exponent to bfloat16's, subnormals included.
__device__ __forceinline__ void widen(u32 codes, u32& low, u32& high) {
    u32 f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 byte = codes >> 8 * i;
        const float x = __uint_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20) * power_of_two(120);
        f[i] = (byte & 0x7f) == 0x7f ? 0x7fc00000u : __float_as_uint(x);
    }
    low = f[0] >> 16 | (f[1] & 0xffff0000u), high = f[2] >> 16 | (f[3] & 0xffff0000u);
}

// part[16,8] += A[16,32] B[8,32]^T. The order of k within a step is free as long as A and B share it.
__device__ __forceinline__ void multiply(float (&part)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if PATH == 0
    mma_e4m3_native(part, a, b);
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 wide_a[4], wide_b[2];
        widen(a[2 * half], wide_a[0], wide_a[2]);
        widen(a[2 * half + 1], wide_a[1], wide_a[3]);
        widen(b[half], wide_b[0], wide_b[1]);
        mma_bf16(part, wide_a, wide_b);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)
fp8_gemm(const u8* a, const float* a_scale, const u8* b, const float* b_scale, const int* expert_of, void* y, int n, int o, int d,
         int scale_each_row, int product_first, int bf16_out) {
    DYNAMIC_SHARED(shared);
    Gemm g = {a, b, a_scale, b_scale, y, n, o, d, 0, 0, 0, bool(scale_each_row), bool(product_first), bool(bf16_out)};
    if (!begin(g, expert_of)) return;
    const int lane = threadIdx.x % 32, top = threadIdx.x / 32 / 4 * 64, left = threadIdx.x / 32 % 4 * 32;
    float sum[4][4][4] = {};
    for (int kt = 0; kt < STAGES - 1; kt++) fetch(g, shared, kt);
    for (int kt = 0; kt < g.tiles; kt++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // tile kt is there, and tile kt - 1 was read
        fetch(g, shared, kt + STAGES - 1);
        const unsigned char *tile_a = shared + kt % STAGES * STAGE_BYTES, *tile_b = tile_a + TILE * TILE;
        float part[4][4][4] = {};
#pragma unroll 1
        for (int step = 0; step < TILE / 32; step++) {
            u32 fa[4][4], fb[2][4];
#pragma unroll
            for (int m = 0; m < 4; m++) ldmatrix(fa[m], tile_a + swizzled(top + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int i = 0; i < 2; i++) ldmatrix(fb[i], tile_b + swizzled(left + i * 16 + lane / 16 * 8 + lane % 8,
                step * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 two[2] = {fb[i / 2][i % 2 * 2], fb[i / 2][i % 2 * 2 + 1]};
                    multiply(part[m][i], fa[m], two);
                }
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const int r = top + m * 16 + lane / 4;
            const float sa[2] = {scale_of_a(g, r, kt), scale_of_a(g, r + 8, kt)};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = left + i * 8 + lane % 4 * 2;
                const float sb[2] = {scale_of_b(g, c, kt), scale_of_b(g, c + 1, kt)};
                promote(g, sum[m][i], part[m][i], sa, sb);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) write(g, sum[m][i], top + m * 16, left + i * 8);
}
