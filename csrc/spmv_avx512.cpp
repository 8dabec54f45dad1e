// SpMV by the bits of the mask, AVX-512: sixteen positions at a time, kept values expanded into their places.
#if defined(__x86_64__)

#include "spmv.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace vspdf {
namespace {

__mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : __mmask16((1u << n) - 1); }

// Sixteen values from v on, or as many as there are.
__m512 load(const float* v, const float* end) {
    return v + 16 <= end ? _mm512_loadu_ps(v) : _mm512_maskz_loadu_ps(first(end - v), v);
}
__m512 load(const bf16* v, const bf16* end) {
    const __m256i half = v + 16 <= end ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))
                                       : _mm256_maskz_loadu_epi16(first(end - v), v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int T, class Value>
void dots(const Spmv<Value>& w, int row0, int row1) {
    constexpr int U = T == 1 ? 4 : 2;  // sums of their own hide the latency of the multiply-add
    const int row_bytes = w.cols / 8;
    for (int r = row0; r < row1; ++r) {
        __m512 sum[T][U] = {};
        const Value* v = w.values + w.start[r];
        const uint8_t* bits = w.bits + int64_t(r) * row_bytes;
        for (int c = 0; c < w.cols; c += 64, bits += 8) {
            uint64_t word = 0;
            std::memcpy(&word, bits, size_t(std::min(8, row_bytes - c / 8)));
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
                const int at = c + 16 * q;
                if (at >= w.cols) break;
                const uint32_t mine = uint32_t(word >> 16 * q) & 0xFFFF;
                const __m512 weight = _mm512_maskz_expand_ps(__mmask16(mine), load(v, w.end));
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const float* x = w.x + int64_t(t) * w.cols + at;
                    const __m512 in = at + 16 <= w.cols ? _mm512_loadu_ps(x)
                                                        : _mm512_maskz_loadu_ps(first(w.cols - at), x);
                    sum[t][q % U] = _mm512_fmadd_ps(weight, in, sum[t][q % U]);
                }
                v += __builtin_popcount(mine);
            }
        }
        for (int t = 0; t < T; ++t) {
            for (int u = 1; u < U; ++u) sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][u]);
            w.y[int64_t(t) * w.rows + r] = _mm512_reduce_add_ps(sum[t][0]);
        }
    }
}

template <class Value>
void by_tokens(const Spmv<Value>& w, int row0, int row1) {
    switch (w.tokens) {
        case 1: return dots<1>(w, row0, row1);
        case 2: return dots<2>(w, row0, row1);
        case 3: return dots<3>(w, row0, row1);
        default: return dots<4>(w, row0, row1);
    }
}

}  // namespace

void spmv_avx512(const Spmv<float>& work, int row0, int row1) { by_tokens(work, row0, row1); }
void spmv_avx512(const Spmv<bf16>& work, int row0, int row1) { by_tokens(work, row0, row1); }

}  // namespace vspdf

#endif
