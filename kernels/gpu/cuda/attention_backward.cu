// P = exp(z - lse), dP = do v^T, D = sum_v do o - dlse:   dz = P (dP - D),   dq = scale dz k,   dk = scale dz^T q,   dv = P^T do
//
// Two kernels, so that nothing is added in an order that changes from run to run; each computes P again. attention_dkv: block (i, key head,
// b) has keys 64 i .. 64 i + 63, its 4 warps 16 each, and goes through the queries of every head that shares them, 32 at a time; scores
// are transposed, rows are keys. attention_dq: block (i, head, b) has queries 64 i .., and goes through the keys, 32 at a time. row_dots
// makes D first. A query without keys (lse = +inf) has no gradient. -DDK -DDV: multiples of 8.
// No register spills on sm_80 and sm_90a.
#include "attend.cuh"

constexpr int OWN = 64, OTHERS = 32, THREADS = 128, K16 = div_up(DK, 16), V16 = div_up(DV, 16);
constexpr int WIDE = padded(DK) * 2, OWN_BYTES = OWN * WIDE, OTHER_BYTES = OTHERS * WIDE;
constexpr int STAGE = OTHERS * (WIDE + padded(DV) * 2), OWN_ALL = OWN * (WIDE + padded(DV) * 2);

struct Sizes {
    int s, t, h, g;
    __device__ i64 query(int b, int i, int head) const { return (i64(b) * s + i) * h + head; }
    __device__ i64 key(int b, int j, int head) const { return (i64(b) * t + j) * g + head; }
    __device__ i64 row(int b, int i, int head) const { return (i64(b) * h + head) * s + i; }  // of lse
};

// D[b,h,s]: one warp a query and head.
extern "C" __global__ void __launch_bounds__(THREADS)
row_dots(const u16* __restrict__ o, const u16* __restrict__ d_o, const float* __restrict__ lse, const float* __restrict__ dlse,
         float* __restrict__ d,
         int s, int h, int rows) {
    const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0.f;
    for (int c = lane; row < rows && c < DV; c += 32) sum += bf16_value(o[i64(row) * DV + c]) * bf16_value(d_o[i64(row) * DV + c]);
    sum = sum_over(sum, 32);
    if (row >= rows || lane) return;
    const i64 at = (i64(row / h / s) * h + row % h) * s + row / h % s;
    d[at] = (__float_as_uint(lse[at]) & ABS_BITS) == INF_BITS ? 0.f : sum - dlse[at];
}

// exp(z - lse) where the key is seen, from z·log2(e)
__device__ __forceinline__ float weight(float z, float lse, int query, int key, const Sizes& n, int causal) {
    const bool seen = query < n.s && key < n.t && (!causal || key <= query + n.t - n.s);
    return seen && lse < __uint_as_float(INF_BITS) ? exp2f(z - lse * LOG2E) : 0.f;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_dkv(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u16* __restrict__ d_o,
              const float* __restrict__ lse, const float* __restrict__ d, u16* __restrict__ dk, u16* __restrict__ dv, int s, int t, int h,
              int g, float scale, int causal) {
    DYNAMIC_SHARED(shared);
    const Sizes n = {s, t, h, g};
    unsigned char *k_tile = shared, *v_tile = k_tile + OWN_BYTES, *stages = shared + OWN_ALL;
    const int key_head = blockIdx.y, b = blockIdx.z, first = blockIdx.x * OWN, lane = threadIdx.x % 32, top = threadIdx.x / 32 * 16;
    // The first query that sees a key of this block, and how many blocks of queries there are for all heads.
    const int start = causal ? max(0, first - (t - s)) / OTHERS : 0, per_head = max(0, div_up(s, OTHERS) - start),
        blocks = per_head * (h / g);
    const auto fetch = [&](int i) {
        unsigned char* stage = stages + i % 2 * STAGE;
        const int head = key_head * (h / g) + i / per_head, at = (start + i % per_head) * OTHERS;
        copy_rows<DK>(stage, OTHERS, [&](int r) { return at + r < s ? q + n.query(b, at + r, head) * DK : nullptr; });
        copy_rows<DV>(stage + OTHER_BYTES, OTHERS, [&](int r) { return at + r < s ? d_o + n.query(b, at + r, head) * DV : nullptr; });
        cp_async_commit();
    };
    copy_rows<DK>(k_tile, OWN, [&](int r) { return first + r < t ? k + n.key(b, first + r, key_head) * DK : nullptr; });
    copy_rows<DV>(v_tile, OWN, [&](int r) { return first + r < t ? v + n.key(b, first + r, key_head) * DV : nullptr; });
    float of_k[2 * K16][4] = {}, of_v[2 * V16][4] = {};
    if (blocks) fetch(0);
#pragma unroll 1
    for (int i = 0; i < blocks; i++) {
        cp_async_wait<0>();
        __syncthreads();
        if (i + 1 < blocks) fetch(i + 1);
        const unsigned char *q_tile = stages + i % 2 * STAGE, *o_tile = q_tile + OTHER_BYTES;
        const int head = key_head * (h / g) + i / per_head, at = (start + i % per_head) * OTHERS;
        const float *lse_of = lse + n.row(b, 0, head), *d_of = d + n.row(b, 0, head);
        float p[OTHERS / 8][4] = {}, dz[OTHERS / 8][4] = {};
        add_scores<DK, 1>(p, k_tile, top, q_tile);
        add_scores<DV, 1>(dz, v_tile, top, o_tile);
#pragma unroll
        for (int x = 0; x < OTHERS / 8; x++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int query = at + x * 8 + lane % 4 * 2 + j % 2, key = first + top + lane / 4 + j / 2 * 8;
                p[x][j] = weight(p[x][j] * (scale * LOG2E), query < s ? lse_of[query] : 0.f, query, key, n, causal);
                dz[x][j] = p[x][j] * (dz[x][j] - (query < s ? d_of[query] : 0.f)) * scale;
            }
#pragma unroll
        for (int x = 0; x < OTHERS / 16; x++) {
            u32 pa[4], za[4];
            as_a(pa, p[2 * x], p[2 * x + 1]);
            as_a(za, dz[2 * x], dz[2 * x + 1]);
            add_weighted<DV>(of_v, pa, o_tile, x);
            add_weighted<DK>(of_k, za, q_tile, x);
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int key = first + top + lane / 4 + i * 8;
        if (key >= t) continue;
        write_row<DK>(dk + n.key(b, key, key_head) * DK, of_k, i);
        write_row<DV>(dv + n.key(b, key, key_head) * DV, of_v, i);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_dq(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u16* __restrict__ d_o,
             const float* __restrict__ lse,
             const float* __restrict__ d, u16* __restrict__ dq, int s, int t, int h, int g, float scale, int causal) {
    DYNAMIC_SHARED(shared);
    const Sizes n = {s, t, h, g};
    unsigned char *q_tile = shared, *o_tile = q_tile + OWN_BYTES, *stages = shared + OWN_ALL;
    const int head = blockIdx.y, b = blockIdx.z, key_head = head / (h / g), first = blockIdx.x * OWN, lane = threadIdx.x % 32;
    const int top = threadIdx.x / 32 * 16, seen = causal ? min(t, first + OWN + t - s) : t, blocks = seen > 0 ? div_up(seen, OTHERS) : 0;
    const auto fetch = [&](int i) {
        unsigned char* stage = stages + i % 2 * STAGE;
        copy_rows<DK>(stage, OTHERS, [&](int r) { return i * OTHERS + r < t ? k + n.key(b, i * OTHERS + r, key_head) * DK : nullptr; });
        copy_rows<DV>(stage + OTHER_BYTES, OTHERS, [&](int r) { return i * OTHERS + r < t ? v + n.key(b, i * OTHERS + r, key_head) * DV :
            nullptr; });
        cp_async_commit();
    };
    copy_rows<DK>(q_tile, OWN, [&](int r) { return first + r < s ? q + n.query(b, first + r, head) * DK : nullptr; });
    copy_rows<DV>(o_tile, OWN, [&](int r) { return first + r < s ? d_o + n.query(b, first + r, head) * DV : nullptr; });
    float lse_of_row[2], d_of_row[2], of_q[2 * K16][4] = {};
    for (int i = 0; i < 2; i++) {
        const int query = first + top + lane / 4 + i * 8;
        const i64 row = n.row(b, query < s ? query : 0, head);
        lse_of_row[i] = lse[row], d_of_row[i] = d[row];
    }
    if (blocks) fetch(0);
#pragma unroll 1
    for (int i = 0; i < blocks; i++) {
        cp_async_wait<0>();
        __syncthreads();
        if (i + 1 < blocks) fetch(i + 1);
        const unsigned char *k_tile = stages + i % 2 * STAGE, *v_tile = k_tile + OTHER_BYTES;
        float p[OTHERS / 8][4] = {}, dz[OTHERS / 8][4] = {};
        add_scores<DK, 2>(p, q_tile, top, k_tile);
        add_scores<DV, 2>(dz, o_tile, top, v_tile);
#pragma unroll
        for (int x = 0; x < OTHERS / 8; x++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int key = i * OTHERS + x * 8 + lane % 4 * 2 + j % 2, query = first + top + lane / 4 + j / 2 * 8;
                dz[x][j] = weight(p[x][j] * (scale * LOG2E), lse_of_row[j / 2], query, key, n,
                    causal) * (dz[x][j] - d_of_row[j / 2]) * scale;
            }
#pragma unroll
        for (int x = 0; x < OTHERS / 16; x++) {
            u32 za[4];
            as_a(za, dz[2 * x], dz[2 * x + 1]);
            add_weighted<DK>(of_q, za, k_tile, x);
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int query = first + top + lane / 4 + i * 8;
        if (query < s) write_row<DK>(dq + n.query(b, query, head) * DK, of_q, i);
    }
}
