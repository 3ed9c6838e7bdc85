// Tensor-core instructions on the CPU, with the fragment layouts of the PTX ISA (9.7.14, 9.7.15), and asynchronous copies.
// FP8: the 32 products and the accumulator are cut off below 2^(E - F), E their largest exponent, summed exactly, and cut to a float32
// of `kept` mantissa bits: F = 25 for mma.sync, 13 for wgmma (ref/fp8_accumulate.py says where that is from). BF16: rounded once a product.
#pragma once
#include "host.h"

namespace host {

inline float of_bf16(unsigned h) { return __uint_as_float(h << 16); }
inline float of_e4m3(unsigned b) {
    if ((b & 0x7f) == 0x7f) return NAN;
    const int e = b >> 3 & 15, m = b & 7;
    return (b & 0x80 ? -1.f : 1.f) * std::ldexp(float(e ? 8 + m : m), (e ? e : 1) - 10);
}
inline int exponent(float x, int least) {
    if (x == 0 || !std::isfinite(x)) return -1000;
    return std::max(std::ilogb(x), least);
}
// c + Σ a b as an FP8 tensor core with `fraction` bits adds.
inline float fused(float c, const unsigned char* a, const unsigned char* b, int n, int fraction, int kept) {
    int top = exponent(c, -126);
    for (int i = 0; i < n; i++) top = std::max(top, exponent(of_e4m3(a[i]), -6) + exponent(of_e4m3(b[i]), -6));
    top = std::max(top, -200);
    double sum = std::trunc(std::ldexp(double(c), fraction - top));
    for (int i = 0; i < n; i++) sum += std::trunc(std::ldexp(double(of_e4m3(a[i])) * of_e4m3(b[i]), fraction - top));
    sum = std::ldexp(sum, top - fraction);
    if (sum == 0 || !std::isfinite(sum)) return float(sum + 0.0);
    const int unit = std::max(std::ilogb(sum), -126) - kept;
    return float(std::ldexp(std::trunc(std::ldexp(sum, -unit)), unit));
}

struct Fragments {
    unsigned a[4], b[2];
    float c[4];
};
struct Quad {
    float c[4];
};
struct Words {
    unsigned r[4];
};

// The element that a lane's register holds: row and column of A, of C; B is read as its transpose, [n][k].
constexpr int row_a(int lane, int reg) { return lane / 4 + 8 * (reg % 2); }
constexpr int row_c(int lane, int i) { return lane / 4 + 8 * (i / 2); }
constexpr int col_c(int lane, int i) { return lane % 4 * 2 + i % 2; }

template <int BYTES, class Dot>
Quad mma(const char* name, const Fragments& own, Dot dot) {
    return exchange<Fragments, Quad>(name, 32, own, [&](const Fragments** in, Quad** out) {
        // 32 bytes of k: 16 numbers of two bytes or 32 of one. Register 0/1 (A), 0 (B): bytes 4(lane%4).., the next ones 16 further.
        alignas(4) unsigned char a[16][32], b[8][32];
        for (int l = 0; l < 32; l++) {
            for (int r = 0; r < 4; r++) std::memcpy(&a[row_a(l, r)][l % 4 * 4 + 16 * (r / 2)], &in[l]->a[r], 4);
            for (int r = 0; r < 2; r++) std::memcpy(&b[l / 4][l % 4 * 4 + 16 * r], &in[l]->b[r], 4);
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) out[l]->c[i] = dot(in[l]->c[i], a[row_c(l, i)], b[col_c(l, i)]);
    });
}
inline float dot_bf16(float c, const unsigned char* a, const unsigned char* b) {
    double sum = c;
    for (int k = 0; k < 16; k++) sum += double(of_bf16(a[2 * k] | a[2 * k + 1] << 8)) * of_bf16(b[2 * k] | b[2 * k + 1] << 8);
    return float(sum);
}

// A shared address: its place in the arena.
inline unsigned shared_address(const void* p) { return unsigned(static_cast<const unsigned char*>(p) - arena); }
// Byte (row, k) of the operand that a wgmma descriptor names: rows of 128 bytes, groups of 8 rows `stride` apart, 128-byte swizzle.
inline unsigned char swizzled(unsigned long long desc, int row, int k) {
    const unsigned start = unsigned(desc & 0x3fff) << 4, stride = unsigned(desc >> 32 & 0x3fff) << 4;
    if (desc >> 62 != 1) fail("wgmma: the descriptor's swizzle is not 128 bytes");
    const unsigned at = start + row / 8 * stride + row % 8 * 128 + k;
    return arena[at ^ (at >> 7 & 7) << 4];
}
template <int N>
struct Wide {
    float d[N / 2];
    unsigned long long a, b;
    bool add;
};
template <int N>
Wide<N> wgmma(const Wide<N>& own) {
    return exchange<Wide<N>, Wide<N>>("wgmma", 128, own, [](const Wide<N>** in, Wide<N>** out) {
        static unsigned char a[64][32], b[N][32];
        for (int k = 0; k < 32; k++) {
            for (int r = 0; r < 64; r++) a[r][k] = swizzled(in[0]->a, r, k);
            for (int r = 0; r < N; r++) b[r][k] = swizzled(in[0]->b, r, k);
        }
        for (int t = 0; t < 128; t++)
            for (int i = 0; i < N / 2; i++)
                out[t]->d[i] = fused(in[t]->add ? in[t]->d[i] : 0.f, a[t / 32 * 16 + row_c(t % 32, i % 4)], b[i / 4 * 8 + col_c(t % 32,
                    i % 4)], 32, 13, 13);
    });
}

}  // namespace host

inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const host::Fragments own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    const host::Quad d = host::mma<2>("mma_bf16", own, host::dot_bf16);
    for (int i = 0; i < 4; i++) c[i] = d.c[i];
}
inline void mma_e4m3_native(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const host::Fragments own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    const auto dot = [](float c, const unsigned char* a, const unsigned char* b) { return host::fused(c, a, b, 32, 25, 23); };
    const host::Quad d = host::mma<1>("mma_e4m3", own, dot);
    for (int i = 0; i < 4; i++) c[i] = d.c[i];
}
// Lane l names row l % 8 of matrix l / 8 (8 rows of 16 bytes); lane l gets bytes 4(l%4) of row l/4, or transposed, column l/4 as 16-bit
// pairs.
inline host::Words ldmatrix_host(const char* name, const void* row, bool transposed) {
    return host::exchange<const void*, host::Words>(name, 32, row, [&](const void* const** in, host::Words** out) {
        for (int m = 0; m < 4; m++)
            for (int l = 0; l < 32; l++) {
                unsigned short pair[2];
                for (int i = 0; i < 2; i++) {
                    const int r = transposed ? l % 4 * 2 + i : l / 4, c = transposed ? l / 4 : l % 4 * 2 + i;
                    std::memcpy(&pair[i], static_cast<const char*>(*in[8 * m + r]) + 2 * c, 2);
                }
                out[l]->r[m] = pair[0] | unsigned(pair[1]) << 16;
            }
    });
}
inline void ldmatrix(unsigned (&r)[4], const void* row) {
    const host::Words w = ldmatrix_host("ldmatrix", row, false);
    for (int i = 0; i < 4; i++) r[i] = w.r[i];
}
inline void ldmatrix_trans(unsigned (&r)[4], const void* row) {
    const host::Words w = ldmatrix_host("ldmatrix.trans", row, true);
    for (int i = 0; i < 4; i++) r[i] = w.r[i];
}
// Copies of 16 bytes, `used` of them real and zeros after. With an even seed they land at the wait, as late as they may.
inline void land(const host::Copy& c) {
    std::memset(c.to, 0, c.bytes);
    if (c.used) std::memcpy(c.to, c.from, c.used);
}
template <int BYTES> void cp_async_piece(void* to, const void* from, bool real) {
    const host::Copy c{to, from, BYTES, size_t(real ? BYTES : 0)};
    if ((reinterpret_cast<uintptr_t>(to) | (real ? reinterpret_cast<uintptr_t>(from) :
        0)) % BYTES) host::fail("cp.async: an address is not aligned");
    if (host::seed % 2) land(c);
    else host::now->groups.back().push_back(c);
}
inline void cp_async(void* to, const void* from, bool real) { cp_async_piece<16>(to, from, real); }
inline void cp_async_commit() { host::now->groups.emplace_back(); }
template <int LEFT> void cp_async_wait() {
    auto& groups = host::now->groups;  // the last one is open and stays
    while (groups.size() > LEFT + 1u) {
        for (const host::Copy& c : groups.front()) land(c);
        groups.erase(groups.begin());
    }
}
inline void fence_async() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
inline void hold(float (&)[64]) {}
template <int LEFT> void wgmma_wait() {}
inline void wgmma_n128(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
    host::Wide<128> own{{}, a, b, add};
    for (int i = 0; i < 64; i++) own.d[i] = d[i];
    own = host::wgmma<128>(own);
    for (int i = 0; i < 64; i++) d[i] = own.d[i];
}
inline unsigned shared_address(const void* p) { return host::shared_address(p); }
