// z[r,t] = scale sum_k q[b,r,k] K_b[t,k],   lse = log sum_t exp z,   o[b,r,c] = sum_t exp(z - lse) K_b[t,c], c < C        mla.decode
//
// Absorbed MLA: row r = s·h + head, one key head K_b[t] = page block_table[b, t/page], slot t%page, whose first C channels are the values.
// Block (i, b, p) has rows 64 i .. 64 i + 63 of sequence b and part p of its keys, in blocks of 64: an online softmax. Its 8 warps are
// 4 row groups of 16 by 2 halves: half j scores keys 32 j .. 32 j + 31 of a block, and holds channels N16·16 j .. of o. The weights go
// through shared memory as bfloat16. With several parts the result is float32 and attention.merge adds them.
// -DK -DC: widths, multiples of 8  -DLAYOUT=0 bfloat16, 1 fp8_v32, 2 fp8_v4 (ref/mla_cache.py)  -DROPE: channels that are bfloat16 in an
// FP8 cache  -DSTAGES=1|2 key blocks in flight  -DPIECE=4|16 bytes a copy of FP8 tokens takes. No register spills.
#include "attend.cuh"
#include "fp8.cuh"

constexpr int ROWS = 64, KEYS = 64, THREADS = 256, N16 = div_up(C, 32), SCALED = LAYOUT == 1 ? 128 : 64;
constexpr int TILE_BYTES = ROWS * padded(K) * 2, CODED = K - ROPE, SCALES = div_up(CODED, SCALED);
constexpr int TOKEN_BYTES = CODED + (LAYOUT == 1 ? 4 * SCALES : 0) + 2 * ROPE;

struct Cache {
    const unsigned char* pages;
    const int* table;  // of this sequence
    int page, length;
    i64 page_bytes;
};
__device__ __forceinline__ const unsigned char* page_of(const Cache& cache, int t) {
    return cache.pages + cache.table[t / cache.page] * cache.page_bytes;
}

// Starts the copies of key block n: bfloat16 rows to their place, FP8 tokens as they are.
__device__ __forceinline__ void fetch(const Cache& cache, unsigned char* to, int n) {
#if LAYOUT == 0
    copy_rows<K>(to, KEYS, [&](int r) {
        const int t = n * KEYS + r;
        return t < cache.length ? reinterpret_cast<const u16*>(page_of(cache, t)) + i64(t % cache.page) * K : nullptr;
    });
#else
    constexpr int PIECES = TOKEN_BYTES / PIECE;
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        const int t = n * KEYS + i / PIECES, at = i % PIECES * PIECE;
        if (t >= cache.length) continue;  // widen does not read it
        cp_async_piece<PIECE>(to + i / PIECES * TOKEN_BYTES + at, page_of(cache, t) + i64(t % cache.page) * TOKEN_BYTES + at, true);
    }
#endif
    cp_async_commit();
}

// FP8 tokens to bfloat16 rows: code times scale, rounded once. Eight channels at a time.
__device__ __forceinline__ void widen(const Cache& cache, const unsigned char* raw, unsigned char* tile, int n) {
    constexpr int CHUNKS = padded(K) / 8;  // zeros beyond K and beyond the sequence
    for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS * 8, t = n * KEYS + r;
        const unsigned char* token = raw + r * TOKEN_BYTES;
        uint4 out = make_uint4(0, 0, 0, 0);
        if (t < cache.length && c >= CODED && c < K) {
            const u32* rope = reinterpret_cast<const u32*>(token + TOKEN_BYTES - 2 * ROPE + (c - CODED) * 2);
            out = make_uint4(rope[0], rope[1], rope[2], rope[3]);
        } else if (t < cache.length && c < CODED) {
            float scale;
            if (LAYOUT == 1) scale = reinterpret_cast<const float*>(token + CODED)[c / SCALED];
            else scale = decode<E8M0>(page_of(cache, t)[i64(cache.page) * TOKEN_BYTES + t % cache.page * (SCALES + 1) + c / SCALED]);
            u32 pair[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                pair[j] = bf16_pair(decode<E4M3FN>(token[c + 2 * j]) * scale, decode<E4M3FN>(token[c + 2 * j + 1]) * scale);
            out = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
        *reinterpret_cast<uint4*>(tile + at<K>(r, c / 8)) = out;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_decode(const u16* __restrict__ q, const unsigned char* __restrict__ pages, const int* __restrict__ block_table,
           const int* __restrict__ seqlens,
           const float* __restrict__ sink, u16* __restrict__ o, float* __restrict__ lse, float* __restrict__ o_parts, int s, int h,
               int blocks,
           int page, i64 page_bytes, float scale, int causal) {
    DYNAMIC_SHARED(shared);
    unsigned char *q_tile = shared, *k_tiles = q_tile + TILE_BYTES, *p_tile = k_tiles + STAGES * TILE_BYTES;
    float* exchange = reinterpret_cast<float*>(p_tile + ROWS * KEYS * 2);  // [2][ROWS]
    unsigned char* raw = reinterpret_cast<unsigned char*>(exchange + 2 * ROWS);
    const int b = blockIdx.y, parts = gridDim.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32, top = warp / 2 * 16, half = warp % 2;
    const Cache cache = {pages, block_table + i64(b) * blocks, page, seqlens[b], page_bytes};
    const int all = div_up(cache.length, KEYS), share = div_up(all, parts), first = blockIdx.z * share;
    const int last = first + share < all ? first + share : all, rows = s * h;
    const float low = __uint_as_float(0xff800000u), to_log2 = scale * LOG2E;
    const i64 q_row = i64(b) * rows;

    copy_rows<K>(q_tile, ROWS, [&](int r) {
        const int row = blockIdx.x * ROWS + r;
        return row < rows ? q + (q_row + row) * K : nullptr;
    });
    if (first < last) fetch(cache, LAYOUT ? raw : k_tiles, first);
    float acc[2 * N16][4] = {}, largest[2] = {low, low}, total[2] = {0.f, 0.f};
    for (int n = first; n < last; n++) {
        cp_async_wait<0>();
        __syncthreads();  // block n is there, and block n - 1 was read
        unsigned char* k_tile = k_tiles + (n - first) % STAGES * TILE_BYTES;
        if (LAYOUT) {
            widen(cache, raw, k_tile, n);
            __syncthreads();
        }
        if ((LAYOUT || STAGES == 2) && n + 1 < last) fetch(cache, LAYOUT ? raw : k_tiles + (n + 1 - first) % STAGES * TILE_BYTES, n + 1);

        float z[4][4] = {};
        add_scores<K, 2>(z, q_tile, top, k_tile, half * 32);
        float most[2] = {low, low};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int t = n * KEYS + half * 32 + i * 8 + lane % 4 * 2 + j % 2, row = blockIdx.x * ROWS + top + lane / 4 + j / 2 * 8;
                const int seen = causal ? row / h + cache.length - s : cache.length - 1;
                z[i][j] = t <= seen && t < cache.length ? z[i][j] * to_log2 : low;
                most[j / 2] = fmaxf(most[j / 2], z[i][j]);
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = max_over(most[i], 4);
            if (lane % 4 == 0) exchange[half * ROWS + top + lane / 4 + i * 8] = most[i];
        }
        __syncthreads();
        float shrink[2], base[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = top + lane / 4 + i * 8;
            const float now = fmaxf(largest[i], fmaxf(exchange[r], exchange[ROWS + r]));
            base[i] = now == low ? 0.f : now;  // a row that has seen nothing yet
            shrink[i] = exp2f(largest[i] - base[i]);
            total[i] *= shrink[i];
            largest[i] = now;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float p0 = exp2f(z[i][2 * j] - base[j]), p1 = exp2f(z[i][2 * j + 1] - base[j]);
                total[j] += p0 + p1;
                const int key = half * 32 + i * 8;
                *reinterpret_cast<u32*>(p_tile + at<KEYS>(top + lane / 4 + j * 8, key / 8) + lane % 4 * 4) = bf16_pair(p0, p1);
            }
#pragma unroll
        for (int i = 0; i < 2 * N16; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] *= shrink[j / 2];
        __syncthreads();  // both halves' weights are there
#pragma unroll 2
        for (int k = 0; k < KEYS / 16; k++) {
            u32 pa[4];
            load_a<KEYS>(pa, p_tile, top, k);
            add_weighted<K>(acc, pa, k_tile, k, half * N16);
        }
        if (!LAYOUT && STAGES == 1 && n + 1 < last) {
            __syncthreads();
            fetch(cache, k_tiles, n + 1);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] = sum_over(total[i], 4);
        if (lane % 4 == 0) exchange[half * ROWS + top + lane / 4 + i * 8] = total[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = top + lane / 4 + i * 8, row = blockIdx.x * ROWS + r;
        if (row >= rows) continue;
        const float sum = exchange[r] + exchange[ROWS + r], logsum = lse_of(largest[i], sum);
        float factor = sum == 0.f ? 0.f : __fdiv_rn(1.f, sum);
        if (parts == 1 && sink && sum != 0.f) factor *= kept_share(sink[row % h], logsum);
        const i64 part = i64(blockIdx.z) * gridDim.y * rows + q_row;
        if (half == 0 && lane % 4 == 0) lse[part + i64(row % h) * s + row / h] = logsum;
#pragma unroll
        for (int j = 0; j < 2 * N16; j++) {
            const int c = half * N16 * 16 + j * 8 + lane % 4 * 2;
            if (c >= C) continue;
            const float x = acc[j][2 * i] * factor, y = acc[j][2 * i + 1] * factor;
            if (parts == 1) *reinterpret_cast<u32*>(o + (q_row + row) * C + c) = bf16_pair(x, y);
            else *reinterpret_cast<float2*>(o_parts + (part + row) * C + c) = make_float2(x, y);
        }
    }
}
