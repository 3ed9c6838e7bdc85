// d[m] = c[m] + sum_k a[m,k] b[m,k] of E4M3 codes, exactly as one tensor-core instruction after another adds them     probe accumulator
//
// k is a multiple of 32, one instruction a step. accumulate_mma: warp w computes sums 8 w .. 8 w + 7, the diagonal of a 16x8 product of
// these rows (rows 8..15 of A are zero). accumulate_wgmma (sm_90a): block w computes sums 64 w .. 64 w + 63, the diagonal of 64x128 (rows
// 64..127 of B are zero), its accumulator carried from step to step. Nothing is scaled or promoted. No register spills.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(32)
accumulate_mma(const u8* __restrict__ a, const u8* __restrict__ b, const float* __restrict__ c, float* __restrict__ d, int m, int k) {
#if defined(LEADLINE_HOST) || __CUDA_ARCH__ >= 890
    const int row = threadIdx.x / 4, t = threadIdx.x % 4, sum = blockIdx.x * 8 + row;
    // C[i] is row lane/4, column 2 t + i: on the diagonal where they are equal
    float acc[4] = {};
    for (int i = 0; i < 2; i++)
        if (row == 2 * t + i && sum < m) acc[i] = c[sum];
    for (int at = 0; at < k; at += 32) {
        const u32 *of_a = reinterpret_cast<const u32*>(a + i64(sum) * k + at), *of_b = reinterpret_cast<const u32*>(b + i64(sum) * k + at);
        const bool live = sum < m;
        const u32 fa[4] = {live ? of_a[t] : 0, 0, live ? of_a[4 + t] : 0, 0}, fb[2] = {live ? of_b[t] : 0, live ? of_b[4 + t] : 0};
        mma_e4m3_native(acc, fa, fb);
    }
    for (int i = 0; i < 2; i++)
        if (row == 2 * t + i && sum < m) d[sum] = acc[i];
#endif
}

extern "C" __global__ void __launch_bounds__(128)
accumulate_wgmma(const u8* __restrict__ a, const u8* __restrict__ b, const float* __restrict__ c, float* __restrict__ d, int m, int k) {
#if defined(LEADLINE_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    DYNAMIC_SHARED(shared);  // 64 rows of A, then 128 of B, 128 bytes each
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 64;
    float acc[64];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        acc[i] = row == column && first + row < m ? c[first + row] : 0.f;
    }
    for (int at = 0; at < k; at += 128) {
        __syncthreads();  // the last step was read
        for (int piece = threadIdx.x; piece < 192 * 8; piece += 128) {
            const int r = piece / 8, chunk = piece % 8, row = first + r % 64, byte = at + chunk * 16;
            const u8* from = r < 64 ? a : b;
            const bool real = r < 128 && row < m && byte < k;
            *reinterpret_cast<uint4*>(shared + swizzled(r, chunk)) =
                real ? *reinterpret_cast<const uint4*>(from + i64(row) * k + byte) : make_uint4(0, 0, 0, 0);
        }
        fence_async();
        __syncthreads();
        const u64 of_a = wgmma_operand(shared), of_b = wgmma_operand(shared + 64 * 128);
        for (int step = 0; step < 4 && at + step * 32 < k; step++) {
            hold(acc);
            wgmma_fence();
            wgmma_n128(acc, of_a + step * 2, of_b + step * 2, true);
            wgmma_commit();
            wgmma_wait<0>();
            hold(acc);
        }
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row == column && first + row < m) d[first + row] = acc[i];
    }
#endif
}
