// SpMV by the bits of the mask, AVX-512: sixteen positions at a time, kept values expanded into their places.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

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

// Positions that are masked are multiplied too, by zero. That makes a NaN of an infinity that no weight reads, so that
// they are left out where x is not `finite`; to do so always takes up to a quarter longer.
template <int T, bool finite, class Value>
void dots(const Spmv<Value>& w, int row0, int row1) {
    constexpr int U = T == 1 ? 4 : 2;  // sums of their own hide the latency of the multiply-add
    const int64_t cols = w.cols, row_bytes = cols / 8, words = cols / 64;
    for (int64_t r = row0; r < row1; ++r) {
        __m512 sum[T][U] = {};
        const Value* v = w.values + w.start[r];
        const uint8_t* bits = w.bits + r * row_bytes;
        // Which sum is a constant of the type, and all is inlined: so the sums stay in registers.
        const auto add = [&](auto which, uint32_t mine, __m512 values, int64_t at,
                             __mmask16 lanes) __attribute__((always_inline)) {
            const __m512 weight = _mm512_maskz_expand_ps(__mmask16(mine), values);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const __m512 x = _mm512_maskz_loadu_ps(lanes, w.x + t * cols + at);
                __m512& to = sum[t][which % U];
                to = finite ? _mm512_fmadd_ps(weight, x, to) : _mm512_mask3_fmadd_ps(weight, x, to, __mmask16(mine));
            }
            v += __builtin_popcount(mine);
        };
        int64_t word = 0;
        for (; word < words && v + 80 <= w.end; ++word) {
            uint64_t kept;
            std::memcpy(&kept, bits + 8 * word, 8);
            const int64_t at = 64 * word;
            add(std::integral_constant<int, 0>(), kept & 0xFFFF, whole(v), at, 0xFFFF);
            add(std::integral_constant<int, 1>(), kept >> 16 & 0xFFFF, whole(v), at + 16, 0xFFFF);
            add(std::integral_constant<int, 2>(), kept >> 32 & 0xFFFF, whole(v), at + 32, 0xFFFF);
            add(std::integral_constant<int, 3>(), uint32_t(kept >> 48), whole(v), at + 48, 0xFFFF);
        }
        for (int64_t at = 64 * word; at < cols; at += 16) {  // near an end of the values or of the row
            uint16_t kept = 0;
            std::memcpy(&kept, bits + at / 8, size_t(std::min<int64_t>(2, row_bytes - at / 8)));
            add(std::integral_constant<int, 0>(), kept, load(v, w.end), at, first(cols - at));
        }
        for (int t = 0; t < T; ++t) {
            for (int u = 1; u < U; ++u) sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][u]);
            w.y[t * w.rows + r] = total(sum[t][0]);
        }
    }
}

template <int T, class Value>
void by_kind(const Spmv<Value>& w, int row0, int row1) {
    w.finite ? dots<T, true>(w, row0, row1) : dots<T, false>(w, row0, row1);
}

template <class Value>
void by_tokens(const Spmv<Value>& w, int row0, int row1) {
    switch (w.tokens) {
        case 1:
            return by_kind<1>(w, row0, row1);
        case 2:
            return by_kind<2>(w, row0, row1);
        case 3:
            return by_kind<3>(w, row0, row1);
        default:
            return by_kind<4>(w, row0, row1);
    }
}

}  // namespace

void spmv_avx512(const Spmv<float>& work, int row0, int row1) { by_tokens(work, row0, row1); }
void spmv_avx512(const Spmv<bf16>& work, int row0, int row1) { by_tokens(work, row0, row1); }

}  // namespace vspdf

#endif
