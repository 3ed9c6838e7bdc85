// source[i]: the slot token·k + slot that row i holds, rows sorted by (topk_idx, token, slot); place[n,k]: the row of each slot.
//                x_sorted[i] = x[source[i]/k]      moe.permute            y[n] = sum_k w[n,k] y_sorted[place[n,k]]      moe.unpermute
//
// The plan is a stable counting sort in three steps: chunk b of CHUNK slots counts its experts (count_slots); a prefix sum over chunks and
// experts makes each chunk's first row of each expert (first_rows); chunk b hands out rows, 32 slots at a time: a slot's rank is how
// many lower lanes have its expert (place_slots). An expert's rows are filled up to a multiple of `alignment`: source -1, zeros.
// -DTYPE=float|u16 (bfloat16 bits). Slots of expert -1 go nowhere. No atomics decide an order: every run is the same. No register spills.
#include "common.cuh"

constexpr int CHUNK = 1024, EXPERTS = 1024, V = 16 / sizeof(TYPE);

extern "C" __global__ void __launch_bounds__(256) count_slots(const int* __restrict__ topk_idx, int* __restrict__ counts, int slots,
    int e) {
    __shared__ int count[EXPERTS];
    for (int i = threadIdx.x; i < e; i += blockDim.x) count[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < CHUNK; i += blockDim.x) {
        const int slot = blockIdx.x * CHUNK + i;
        if (slot < slots && topk_idx[slot] >= 0) atomicAdd(&count[topk_idx[slot]], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < e; i += blockDim.x) counts[i64(blockIdx.x) * e + i] = count[i];
}

// One block; thread i is expert i. counts[chunks,e] becomes the first row of each chunk and expert; total[e], rows[0] the number of rows.
extern "C" __global__ void __launch_bounds__(EXPERTS)
first_rows(int* __restrict__ counts, int* __restrict__ total, int* __restrict__ rows, int chunks, int e, int alignment) {
    __shared__ int end[EXPERTS];
    const int i = threadIdx.x;
    int sum = 0;
    for (int c = 0; i < e && c < chunks; c++) sum += counts[i64(c) * e + i];
    const int padded = div_up(sum, alignment) * alignment;
    end[i] = padded;
    __syncthreads();
    for (int step = 1; step < EXPERTS; step *= 2) {
        const int before = i >= step ? end[i - step] : 0;
        __syncthreads();
        end[i] += before;
        __syncthreads();
    }
    if (i >= e) return;
    total[i] = sum;
    if (i == e - 1) rows[0] = end[i];
    int row = end[i] - padded;
    for (int c = 0; c < chunks; c++) {
        const int here = counts[i64(c) * e + i];
        counts[i64(c) * e + i] = row;
        row += here;
    }
}

// One warp a chunk. source was filled with -1.
extern "C" __global__ void __launch_bounds__(32)
place_slots(const int* __restrict__ topk_idx, const int* __restrict__ first, int* __restrict__ source, int* __restrict__ place, int slots,
            int e) {
    __shared__ int next[EXPERTS];
    const int lane = threadIdx.x;
    for (int i = lane; i < e; i += 32) next[i] = first[i64(blockIdx.x) * e + i];
    __syncwarp();
    for (int i = 0; i < CHUNK; i += 32) {
        const int slot = blockIdx.x * CHUNK + i + lane, expert = slot < slots ? topk_idx[slot] : -1;
        const u32 same = __match_any_sync(FULL, expert);
        const int row = expert < 0 ? -1 : next[expert] + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (expert >= 0 && (same >> lane) == 1) next[expert] = row + 1;  // the last of its expert
        __syncwarp();
        if (slot < slots) place[slot] = row;
        if (row >= 0) source[row] = slot;
    }
}

// Block i copies row i; thread t has columns t V .. of each stretch.
extern "C" __global__ void __launch_bounds__(256)
gather_rows(const TYPE* __restrict__ x, const int* __restrict__ source, TYPE* __restrict__ x_sorted, int d, int k, int whole) {
    const int slot = source[blockIdx.x];
    const TYPE* from = x + i64(slot < 0 ? 0 : slot / k) * d;
    for (int at = threadIdx.x * V; at < d; at += blockDim.x * V) {
        float v[V];
        load<V>(v, from, at, slot < 0 ? 0 : d, whole);
        store<V>(x_sorted + i64(blockIdx.x) * d, v, at, d, whole);
    }
}

// Block n adds token n's rows, the first slot first; without weights (a null pointer) they weigh 1.
extern "C" __global__ void __launch_bounds__(256)
sum_slots(const TYPE* __restrict__ y_sorted, const int* __restrict__ place, const TYPE* __restrict__ weight, TYPE* __restrict__ y, int d,
          int k, int whole) {
    const i64 token = blockIdx.x;
    for (int at = threadIdx.x * V; at < d; at += blockDim.x * V) {
        float sum[V] = {};
        for (int j = 0; j < k; j++) {
            const int row = place[token * k + j];
            if (row < 0) continue;
            float v[V], w[1] = {1.f};
            load<V>(v, y_sorted + i64(row) * d, at, d, whole);
            if (weight) load<1>(w, weight + token * k, j, k, false);
            for (int i = 0; i < V; i++) sum[i] = sum[i] + w[0] * v[i];
        }
        store<V>(y + token * d, sum, at, d, whole);
    }
}

// dy_sorted[place[n,k]] = w[n,k] dy[n],   dweight[n,k] = sum_d dy[n,d] y_sorted[place[n,k],d]: block n. Rows that hold no slot were zeroed.
extern "C" __global__ void __launch_bounds__(256)
unpermute_backward(const TYPE* __restrict__ dy, const TYPE* __restrict__ y_sorted, const int* __restrict__ place,
                   const TYPE* __restrict__ weight,
                   TYPE* __restrict__ dy_sorted, TYPE* __restrict__ dweight, int d, int k, int whole) {
    __shared__ float part[8];
    const i64 token = blockIdx.x;
    for (int j = 0; j < k; j++) {
        const int row = place[token * k + j];
        float w[1], sum = 0.f;
        load<1>(w, weight + token * k, j, k, false);
        for (int at = threadIdx.x * V; at < d && row >= 0; at += blockDim.x * V) {
            float g[V], v[V];
            load<V>(g, dy + token * d, at, d, whole);
            load<V>(v, y_sorted + i64(row) * d, at, d, whole);
            for (int i = 0; i < V; i++) {
                sum += g[i] * v[i];
                g[i] = w[0] * g[i];
            }
            store<V>(dy_sorted + i64(row) * d, g, at, d, whole);
        }
        sum = sum_over(sum, 32);
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            float all[1] = {0.f};
            for (int i = 0; i < 8; i++) all[0] += part[i];
            store<1>(dweight + token * k, all, j, k, false);
        }
        __syncthreads();
    }
}
