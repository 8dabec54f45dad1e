// SpMV by the bits of the mask, AVX-512: sixteen positions at a time, kept values expanded into their places.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "spmv.hpp"

namespace vspdf {
namespace {

__mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : __mmask16((1u << n) - 1); }

// GCC 12 warns of what the forms without a mask leave undefined.
__m512 widened(__m256i half) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, half), 16));
}
float total(__m512 v) {
    float each[16], sum = 0;
    _mm512_storeu_ps(each, v);
    for (float one : each) sum += one;
    return sum;
}

// Sixteen values from v on, or as many as there are.
__m512 load(const float* v, const float* end) {
    return v + 16 <= end ? _mm512_loadu_ps(v) : _mm512_maskz_loadu_ps(first(end - v), v);
}
__m512 load(const bf16* v, const bf16* end) {
    const __m256i half = v + 16 <= end ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))
                                       : _mm256_maskz_loadu_epi16(first(end - v), v);
    return widened(half);
}

// Sixteen values from v on, all of which are there. In a register of their own: VEXPANDPS from memory takes Zen 4 twice
// as long.
__m512 whole(const float* v) {
    __m512 values = _mm512_loadu_ps(v);
    asm("" : "+v"(values));
    return values;
}
__m512 whole(const bf16* v) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
    return widened(half);
}

template <int T, class Value>
void dots(const Spmv<Value>& w, int row0, int row1) {
    constexpr int U = T == 1 ? 4 : 2;  // sums of their own hide the latency of the multiply-add
    const int row_bytes = w.cols / 8, words = w.cols / 64;
    for (int r = row0; r < row1; ++r) {
        __m512 sum[T][U] = {};
        const Value* v = w.values + w.start[r];
        const uint8_t* bits = w.bits + int64_t(r) * row_bytes;
        // near: an end of the values or of the row. Inlined, so that the sums stay in registers.
        const auto add = [&](uint32_t mine, int at, int u, bool near) __attribute__((always_inline)) {
            const __m512 weight = _mm512_maskz_expand_ps(__mmask16(mine), near ? load(v, w.end) : whole(v));
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const float* x = w.x + int64_t(t) * w.cols + at;
                const __m512 in = near ? _mm512_maskz_loadu_ps(first(w.cols - at), x) : _mm512_loadu_ps(x);
                sum[t][u] = _mm512_fmadd_ps(weight, in, sum[t][u]);
            }
            v += __builtin_popcount(mine);
        };
        int word = 0;
        for (; word < words && v + 80 <= w.end; ++word) {
            uint64_t kept;
            std::memcpy(&kept, bits + 8 * word, 8);
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) add(uint32_t(kept >> 16 * q) & 0xFFFF, 64 * word + 16 * q, q % U, false);
        }
        for (int at = 64 * word; at < w.cols; at += 16) {
            uint16_t kept = 0;
            std::memcpy(&kept, bits + at / 8, size_t(std::min(2, row_bytes - at / 8)));
            add(kept, at, 0, true);
        }
        for (int t = 0; t < T; ++t) {
            for (int u = 1; u < U; ++u) sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][u]);
            w.y[int64_t(t) * w.rows + r] = total(sum[t][0]);
        }
    }
}

template <class Value>
void by_tokens(const Spmv<Value>& w, int row0, int row1) {
    switch (w.tokens) {
        case 1:
            return dots<1>(w, row0, row1);
        case 2:
            return dots<2>(w, row0, row1);
        case 3:
            return dots<3>(w, row0, row1);
        default:
            return dots<4>(w, row0, row1);
    }
}

}  // namespace

void spmv_avx512(const Spmv<float>& work, int row0, int row1) { by_tokens(work, row0, row1); }
void spmv_avx512(const Spmv<bf16>& work, int row0, int row1) { by_tokens(work, row0, row1); }

}  // namespace vspdf

#endif
