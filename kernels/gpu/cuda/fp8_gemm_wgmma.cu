// y[n,o] = sum_j (sum_{d in tile j of 128} a[n,d] b[o,d]) a_scale[n,j] b_scale[o/128,j],   a, b = values of E4M3 codes       fp8.gemm
//
// With Hopper's wgmma (sm_90a alone). A block makes 128x128 of y, its two warpgroups 64x128 each. A tile of 128 is four instructions of
// k = 32, whose accumulator starts at zero and is promoted to the float32 sum after the fourth: DeepSeek's N_C = 128. Both operands are
// K-major in shared memory, 128 bytes a row, swizzled; a step of 32 bytes moves the descriptor's address by 2 (units of 16 bytes).
// sum[4 j + i] and part[4 j + i]: row 64 group + 16 warp + lane/4 + 8(i/2), column 8 j + 2(lane%4) + i%2. No register spills.
#include "gemm_tile.cuh"

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)
fp8_gemm_wgmma(const u8* a, const float* a_scale, const u8* b, const float* b_scale, const int* expert_of, void* y, int n, int o, int d,
               int scale_each_row, int product_first, int bf16_out) {
    DYNAMIC_SHARED(shared);
    Gemm g = {a, b, a_scale, b_scale, y, n, o, d, 0, 0, 0, bool(scale_each_row), bool(product_first), bool(bf16_out)};
    if (!begin(g, expert_of)) return;
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128, top = group * 64 + threadIdx.x / 32 % 4 * 16;
    float sum[64] = {};
    for (int kt = 0; kt < STAGES - 1; kt++) fetch(g, shared, kt);
    for (int kt = 0; kt < g.tiles; kt++) {
        cp_async_wait<STAGES - 2>();
        fence_async();    // this thread's copies, before any thread's wgmma
        __syncthreads();  // tile kt is there, and tile kt - 1 was read
        fetch(g, shared, kt + STAGES - 1);
        const unsigned char* tile = shared + kt % STAGES * STAGE_BYTES;
        const u64 of_a = wgmma_operand(tile + group * 64 * TILE), of_b = wgmma_operand(tile + TILE * TILE);
        float part[64];
#pragma unroll
        for (int i = 0; i < 64; i++) part[i] = 0.f;
        hold(part);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE / 32; step++) wgmma_n128(part, of_a + step * 2, of_b + step * 2, step > 0);
        wgmma_commit();
        const float sa[2] = {scale_of_a(g, top + lane / 4, kt), scale_of_a(g, top + lane / 4 + 8, kt)};
        wgmma_wait<0>();
        hold(part);
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const int c = j * 8 + lane % 4 * 2;
            const float sb[2] = {scale_of_b(g, c, kt), scale_of_b(g, c + 1, kt)};
            promote(g, sum + 4 * j, part + 4 * j, sa, sb);
        }
    }
#pragma unroll
    for (int j = 0; j < 16; j++) write(g, sum + 4 * j, top, j * 8);
}
