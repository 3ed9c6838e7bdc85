// CUDA C++ on the CPU: each thread of a block is a fiber, so that barriers and warp instructions are exchanges of values. C++20, by g++.
//
// One block runs at a time and one fiber at a time, so a run is deterministic. `seed` chooses the order in which fibers and blocks run, and
// when asynchronous copies land (even: at the wait, odd: at once): a missing barrier shows as results that depend on the seed. Shared
// memory starts as NaN. A barrier that not every thread reaches, or lanes at different instructions, ends the launch with a message.
// extern "C" kernels are called through host::launch. Instructions of the tensor cores are in mma_host.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = host::arena

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr size_t STACK = 96 << 10, SHARED = 228 << 10;
alignas(1024) inline unsigned char arena[SHARED];
enum State { READY, BARRIER, EXCHANGE, DONE };

struct Copy {
    void* to;
    const void* from;
    size_t bytes, used;
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    dim3 thread;
    State state = DONE;
    const char* where = "";
    const void* in = nullptr;
    void* out = nullptr;
    int width = 32;
    std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is open
};
inline std::vector<Fiber*> fibers;
inline ucontext_t scheduler;
inline Fiber* now;
inline int count;
inline unsigned seed;
inline std::function<void()> body;
inline std::string failure;

inline unsigned dynamic_random(unsigned& s) { return s = s * 1664525u + 1013904223u; }

inline void pause(State state, const char* where) {
    now->state = state;
    now->where = where;
    swapcontext(&now->context, &scheduler);
}
inline void entry() {
    body();
    now->state = DONE;
    swapcontext(&now->context, &scheduler);
}
// Fiber i goes on with its own thread index in the global that kernels read.
inline void enter(int i) {
    now = fibers[i];
    threadIdx = now->thread;
    swapcontext(&scheduler, &now->context);
}
inline bool fail(const std::string& message) {
    if (failure.empty()) failure = message;
    return false;
}

inline bool run_block(const std::vector<int>& order) {
    unsigned random = seed * 2654435761u + 12345u;
    std::vector<int> turn = order;
    for (;;) {
        bool moved = false;
        if (seed > 1)
            for (int i = count - 1; i > 0; i--) std::swap(turn[i], turn[dynamic_random(random) % (i + 1)]);
        for (int i : turn)
            if (fibers[i]->state == READY) enter(i), moved = true;
        if (!failure.empty()) return false;
        int at_barrier = 0, done = 0;
        for (int i = 0; i < count; i++) at_barrier += fibers[i]->state == BARRIER, done += fibers[i]->state == DONE;
        if (done == count) return true;
        if (at_barrier == count) {
            for (int i = 0; i < count; i++) fibers[i]->state = READY;
            moved = true;
        }
        if (!moved)
            for (int i = 0; i < count; i++)
                if (fibers[i]->state != DONE)
                    return fail("thread " + std::to_string(i) + " waits at " + fibers[i]->where + " for threads that never come");
    }
}

inline const char* launch(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared, unsigned order) {
    failure.clear();
    body = kernel, seed = order, gridDim = grid, blockDim = block;
    count = static_cast<int>(block.x * block.y * block.z);
    if (count < 1 || count > 1024) return "a block has 1 to 1024 threads";
    if (shared > SHARED - 1024) return "a block has at most 227 KiB of shared memory";
    while (static_cast<int>(fibers.size()) < count) fibers.push_back(new Fiber);
    std::vector<int> turn(count);
    for (int i = 0; i < count; i++) turn[i] = seed % 2 ? count - 1 - i : i;
    const unsigned long long blocks = 1ull * grid.x * grid.y * grid.z;
    for (unsigned long long n = 0; n < blocks; n++) {
        const unsigned long long b = seed % 2 ? blocks - 1 - n : n;
        blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
        std::memset(arena, 0xff, SHARED);
        for (int i = 0; i < count; i++) {
            Fiber& f = *fibers[i];
            f.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            f.state = READY, f.groups.assign(1, {});
            getcontext(&f.context);
            f.context.uc_stack = {f.stack.get(), 0, STACK};
            f.context.uc_link = nullptr;
            makecontext(&f.context, entry, 0);
        }
        if (!run_block(turn)) return failure.c_str();
        for (size_t i = shared; i < SHARED; i++)
            if (arena[i] != 0xff) return "the kernel wrote beyond its dynamic shared memory";
    }
    return nullptr;
}

// An instruction of `width` consecutive threads: the last to arrive computes all results from all operands.
template <class In, class Out, class F>
Out exchange(const char* where, int width, const In& in, F&& together) {
    const int me = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)), first = me / width * width;
    Out out{};
    now->in = &in, now->out = &out, now->width = width;
    Fiber* const self = now;
    self->state = EXCHANGE, self->where = where;
    bool all = true;
    for (int i = first; i < first + width; i++) {
        if (i >= count) return fail(std::string(where) + ": the block has no whole warp"), out;
        all &= fibers[i]->state == EXCHANGE && fibers[i]->where == where;
    }
    if (!all) {
        pause(EXCHANGE, where);
        return out;
    }
    std::vector<const In*> ins(width);
    std::vector<Out*> outs(width);
    for (int i = 0; i < width; i++) ins[i] = static_cast<const In*>(fibers[first + i]->in),
        outs[i] = static_cast<Out*>(fibers[first + i]->out);
    together(ins.data(), outs.data());
    for (int i = first; i < first + width; i++) fibers[i]->state = READY;
    return out;
}

template <class... Args, size_t... I>
std::function<void()> bound(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
    return [=] { kernel(*static_cast<std::remove_reference_t<Args>*>(args[I])...); };
}
template <class... Args>
const char* call(void (*kernel)(Args...), const unsigned* grid, const unsigned* block, size_t shared, unsigned order, void** args) {
    return launch(bound(kernel, args, std::index_sequence_for<Args...>{}), {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
        shared, order);
}

}  // namespace host

// Barriers and exchanges. One name a source line, so that lanes at different lines are told apart.
inline void __syncthreads() { host::pause(host::BARRIER, "__syncthreads"); }
inline void __syncwarp(unsigned = ~0u) { host::exchange<int, int>("__syncwarp", 32, 0, [](const int**, int**) {}); }
template <class T>
T shuffle(const char* where, T value, int lane) {
    const std::pair<T, int> in{value, lane};
    return host::exchange<std::pair<T, int>, T>(where, 32, in, [](const std::pair<T, int>** i, T** o) {
        for (int l = 0; l < 32; l++) *o[l] = i[i[l]->second & 31]->first;
    });
}
inline int lane_of_thread() { return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }
template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) { return shuffle("__shfl_sync", v,
    lane_of_thread() / width * width + lane % width); }
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return shuffle("__shfl_xor_sync", v, lane_of_thread() ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T v, int by) {
    const int l = lane_of_thread();
    return shuffle("__shfl_up_sync", v, l >= by ? l - by : l);
}
template <class T> T __shfl_down_sync(unsigned, T v, int by) {
    const int l = lane_of_thread();
    return shuffle("__shfl_down_sync", v, l + by < 32 ? l + by : l);
}
inline unsigned __ballot_sync(unsigned, bool v) {
    return host::exchange<bool, unsigned>("__ballot_sync", 32, v, [](const bool** i, unsigned** o) {
        unsigned all = 0;
        for (int l = 0; l < 32; l++) all |= unsigned(*i[l]) << l;
        for (int l = 0; l < 32; l++) *o[l] = all;
    });
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
    return host::exchange<unsigned, unsigned>("__reduce_max_sync", 32, v, [](const unsigned** i, unsigned** o) {
        unsigned most = 0;
        for (int l = 0; l < 32; l++) most = std::max(most, *i[l]);
        for (int l = 0; l < 32; l++) *o[l] = most;
    });
}
inline unsigned __match_any_sync(unsigned, int v) {
    return host::exchange<int, unsigned>("__match_any_sync", 32, v, [](const int** i, unsigned** o) {
        for (int l = 0; l < 32; l++) {
            *o[l] = 0;
            for (int m = 0; m < 32; m++) *o[l] |= unsigned(*i[m] == *i[l]) << m;
        }
    });
}
inline bool __any_sync(unsigned m, bool v) { return __ballot_sync(m, v) != 0; }

// Bits and arithmetic, each rounded once. Compile with -ffp-contract=off.
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline int __popc(unsigned u) { return __builtin_popcount(u); }
inline int __clz(int u) { return u ? __builtin_clz(unsigned(u)) : 32; }
inline int __ffs(int u) { return __builtin_ffs(u); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
using std::min, std::max;
template <class T> T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
template <class T> T atomicMax(T* p, T v) { T old = *p; *p = std::max(*p, v); return old; }
template <class T> T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
inline void __threadfence() {}
template <class T> T __ldg(const T* p) { return *p; }
