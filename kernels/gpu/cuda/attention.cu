// z = scale sum_k q[b,s,h,k] k[b,t,g,k],   lse[b,h,s] = log sum_t exp z,   o[b,s,h,v] = sum_t exp(z - lse) v[b,t,g,v]        attention
//
// MLA's prefill: bfloat16, widths DK of q and k, DV of v, g key heads shared by h/g consecutive heads. Block (i, head, b) has queries
// 128 i .. 128 i + 127 and goes through blocks of 64 keys with an online softmax; its 8 warps have 16 queries each. The weights of a warp
// stay in registers: a 16x8 fragment of C is half of a 16x16 fragment of A. Causal is bottom-right aligned: key j if j <= query + t - s.
// -DDK -DDV: multiples of 8. No register spills.
#include "attend.cuh"

constexpr int QUERIES = 128, KEYS = 64, THREADS = 256, N16 = div_up(DV, 16);
constexpr int Q_BYTES = QUERIES * padded(DK) * 2, K_BYTES = KEYS * padded(DK) * 2, STAGE = K_BYTES + KEYS * padded(DV) * 2;

struct Keys {
    const u16 *k, *v;  // of this sequence and key head, rows g apart
    int t, g;
};
__device__ __forceinline__ void fetch(const Keys& keys, unsigned char* stage, int n) {
    copy_rows<DK>(stage, KEYS, [&](int r) { return n * KEYS + r < keys.t ? keys.k + i64(n * KEYS + r) * keys.g * DK : nullptr; });
    copy_rows<DV>(stage + K_BYTES, KEYS, [&](int r) { return n * KEYS + r < keys.t ? keys.v + i64(n * KEYS + r) * keys.g * DV : nullptr; });
    cp_async_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const float* __restrict__ sink,
          u16* __restrict__ o,
          float* __restrict__ lse, int s, int t, int h, int g, float scale, int causal) {
    DYNAMIC_SHARED(shared);
    unsigned char *q_tile = shared, *stages = shared + Q_BYTES;
    const int head = blockIdx.y, b = blockIdx.z, key_head = head / (h / g), lane = threadIdx.x % 32, top = threadIdx.x / 32 * 16;
    const int first = blockIdx.x * QUERIES;
    const Keys keys = {k + (i64(b) * t * g + key_head) * DK, v + (i64(b) * t * g + key_head) * DV, t, g};
    const int seen = causal ? min(t, first + QUERIES + t - s) : t, blocks = seen > 0 ? div_up(seen, KEYS) : 0;
    const float low = __uint_as_float(0xff800000u), to_log2 = scale * LOG2E;
    copy_rows<DK>(q_tile, QUERIES, [&](int r) { return first + r < s ? q + ((i64(b) * s + first + r) * h + head) * DK : nullptr; });
    if (blocks) fetch(keys, stages, 0);
    float acc[2 * N16][4] = {}, largest[2] = {low, low}, total[2] = {0.f, 0.f};
    for (int n = 0; n < blocks; n++) {
        cp_async_wait<0>();
        __syncthreads();  // block n is there, and block n - 1 was read
        if (n + 1 < blocks) fetch(keys, stages + (n + 1) % 2 * STAGE, n + 1);
        const unsigned char *k_tile = stages + n % 2 * STAGE, *v_tile = k_tile + K_BYTES;
        float z[KEYS / 8][4] = {};
        add_scores<DK, 2>(z, q_tile, top, k_tile);
        float base[2] = {largest[0], largest[1]}, shrink[2];
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int key = n * KEYS + i * 8 + lane % 4 * 2 + j % 2, query = first + top + lane / 4 + j / 2 * 8;
                z[i][j] = key < t && (!causal || key <= query + t - s) ? z[i][j] * to_log2 : low;
                base[j / 2] = fmaxf(base[j / 2], z[i][j]);
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float now = max_over(base[i], 4);
            base[i] = now == low ? 0.f : now;  // a row that has seen nothing yet
            shrink[i] = exp2f(largest[i] - base[i]);
            largest[i] = now, total[i] *= shrink[i];
        }
#pragma unroll
        for (int i = 0; i < 2 * N16; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] *= shrink[j / 2];
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                z[i][j] = exp2f(z[i][j] - base[j / 2]);
                total[j / 2] += z[i][j];
            }
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
            u32 pa[4];
            as_a(pa, z[2 * i], z[2 * i + 1]);
            add_weighted<DV>(acc, pa, v_tile, i);
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int query = first + top + lane / 4 + i * 8;
        const float sum = sum_over(total[i], 4), logsum = lse_of(largest[i], sum);
        if (query >= s) continue;
        float factor = sum == 0.f ? 0.f : __fdiv_rn(1.f, sum);
        if (sink && sum != 0.f) factor *= kept_share(sink[head], logsum);
        if (lane % 4 == 0) lse[(i64(b) * h + head) * s + query] = logsum;
        write_row<DV>(o + ((i64(b) * s + query) * h + head) * DV, acc, i, factor);
    }
}
