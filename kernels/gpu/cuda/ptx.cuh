// The instructions that C++ has no names for: tensor cores (mma.sync, wgmma), ldmatrix, asynchronous copies. PTX ISA 9.7.14, 9.7.15, 9.7.9.
//
// mma: a warp multiplies A[16,k] B[k,8] + C[16,8], 32 bytes of k. With g = lane/4, t = lane%4: register r of A holds bytes
// 4t + 16(r/2) .. +3 of row g + 8(r%2); register r of B bytes 4t + 16r .. of column g; C[i] is row g + 8(i/2), column 2t + i%2.
#pragma once
#include "common.cuh"

#ifndef LEADLINE_HOST
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ void mma_e4m3_native(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
// Four 8x8 matrices of 16-bit numbers: lane l names row l%8 of matrix l/8; register m gets row l/4, columns 2(l%4), +1 of matrix m.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same of the transposed matrices: rows 2(l%4), +1 of column l/4.
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// 16 bytes to shared memory, zeros unless `real` (`from` is an address all the same); they are there after cp_async_wait and a barrier.
__device__ __forceinline__ void cp_async(void* to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
}
// The same of 4 bytes, where nothing is better aligned.
template <int BYTES>
__device__ __forceinline__ void cp_async_piece(void* to, const void* from, bool real) {
    if (BYTES == 16) cp_async(to, from, real);
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(real ? 4 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What was written to shared memory by ordinary stores and copies becomes visible to wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Nothing that reads or writes the accumulator may move across: the instructions above do not name it.
__device__ __forceinline__ void hold(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
// D[64,128] = A[64,32] B[128,32]^T (+ D): d[4j + i] is row 16·warp + g + 8(i/2), column 8j + 2t + i%2.
__device__ __forceinline__ void wgmma_n128(float (&d)[64], u64 a, u64 b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "%64, %65, p, 1, 1;\n}\n"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
        : "l"(a), "l"(b), "r"(int(add)));
}
#undef D8
#endif
#endif

// An operand of wgmma in shared memory: rows of 128 bytes, 1,024-byte groups of 8 rows, 16-byte chunk c of row r at chunk c ^ r%8.
__device__ __forceinline__ u64 wgmma_operand(const void* first) {
    return u64(shared_address(first) >> 4 & 0x3fff) | 1ull << 16 | u64(1024 >> 4) << 32 | 1ull << 62;
}
__device__ __forceinline__ constexpr int swizzled(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }
