// Included by one translation unit per instruction set, which defines VSPDF_WIDTH, and VSPDF_PAIRS where a lane holds
// two tokens in bf16. Everything here is local to that unit: a function shared by name could be linked from the wrong
// instruction set.

#include "sddmm_kernels.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vspdf {
namespace {

constexpr int W = VSPDF_WIDTH;
constexpr int kLines = W == 8 ? 6 : 8;  // together with a group's sums they fit the registers
typedef float V __attribute__((vector_size(4 * W)));
typedef float VU __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }

#if defined(VSPDF_PAIRS)
constexpr int kDepth = 2;
inline void add_product(V& sum, V a, V b) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
constexpr int kDepth = 1;
inline void add_product(V& sum, V a, V b) { sum += a * b; }
#endif

// out[i] = sum of the lanes of v[i]. Each level adds halves of two vectors into one: one half is blended, one shuffled,
// so that both vector ports share the work.
#if VSPDF_WIDTH == 16
inline V reduce(V (&v)[16]) {
    const __m512i swap = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
    V half[8], quarter[4], eighth[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        half[i] = _mm512_mask_blend_ps(0xFF00, v[i], v[i + 8]) + _mm512_shuffle_f32x4(v[i], v[i + 8], 0x4E);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        quarter[i] =
            _mm512_mask_blend_ps(0xF0F0, half[i], half[i + 4]) + _mm512_permutex2var_ps(half[i], swap, half[i + 4]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const V a = quarter[2 * i], b = quarter[2 * i + 1];
        eighth[i] = _mm512_mask_blend_ps(0xCCCC, a, b) + _mm512_shuffle_ps(a, b, 0x4E);
    }
    return _mm512_shuffle_ps(eighth[0], eighth[1], 0x88) + _mm512_shuffle_ps(eighth[0], eighth[1], 0xDD);
}
#elif VSPDF_WIDTH == 8
inline V reduce(V (&v)[8]) {
    V half[4], quarter[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        half[i] = _mm256_blend_ps(v[i], v[i + 4], 0xF0) + _mm256_permute2f128_ps(v[i], v[i + 4], 0x21);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const V a = half[2 * i], b = half[2 * i + 1];
        quarter[i] = _mm256_blend_ps(a, b, 0xCC) + _mm256_shuffle_ps(a, b, 0x4E);
    }
    return _mm256_shuffle_ps(quarter[0], quarter[1], 0x88) + _mm256_shuffle_ps(quarter[0], quarter[1], 0xDD);
}
#else
inline V reduce(V (&v)[4]) {
    V sum;
    for (int i = 0; i < W; ++i) sum[i] = v[i][0] + v[i][1] + (v[i][2] + v[i][3]);
    return sum;
}
#endif

// Adds a chunk of Lines vectors of tokens to a group's sums. `x` is the tile's first column of that chunk.
template <int Lines>
inline void add_chunk(V (&sum)[W], const uint8_t* cols, unsigned starts, const uint16_t* rows, const float* x,
                      const float* dy) {
    V gradient[Lines];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        // One kept weight after the other: the compiler would compute all addresses and tests first, and spill them.
        asm volatile("" : "+r"(starts) : : "memory");
        if (i == 0 || (starts & 1u << i)) {
            const float* row = dy + size_t(*rows++) * (Lines * W);
#pragma GCC unroll 8
            for (int l = 0; l < Lines; ++l) gradient[l] = load(row + l * W);
        }
        const float* col = x + size_t(cols[i]) * (Lines * W);
#pragma GCC unroll 8
        for (int l = 0; l < Lines; ++l) add_product(sum[i], gradient[l], load(col + l * W));
    }
}

// The last chunk has Tail lines, 0 if it is full.
template <int Tail>
int64_t tile_with(float* sums, const SddmmPart& part, const SddmmTile& tile, SddmmOperand x, SddmmOperand dy,
                  int chunks, bool first) {
    const uint16_t* rows = part.rows.data() + tile.segment;
    const uint8_t* cols = part.cols.data() + size_t(tile.group) * W;
    int64_t macs = 0;
    for (uint32_t g = tile.group; g < tile.group + tile.groups; ++g, sums += W, cols += W) {
        const unsigned starts = part.starts[g];
        V sum[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) sum[i] = V{};
        for (int c = 0; c < chunks; ++c) {
            add_chunk<kLines>(sum, cols, starts, rows, x.at(c, kLines * W), dy.at(c, kLines * W));
        }
        if constexpr (Tail > 0) {
            add_chunk<Tail>(sum, cols, starts, rows, x.at(chunks, Tail * W), dy.at(chunks, Tail * W));
        }
        V total = reduce(sum);
        if (!first) total += load(sums);
        store(sums, total);
        rows += __builtin_popcount(starts);
        macs += W * W * kDepth * (int64_t(chunks) * kLines + Tail);
    }
    return macs;
}

template <int Tail = kLines - 1>
int64_t tile(float* sums, const SddmmPart& part, const SddmmTile& t, SddmmOperand x, SddmmOperand dy, int tokens,
             bool first) {
    const int lines = (tokens + W * kDepth - 1) / (W * kDepth);
    if constexpr (Tail > 0) {
        if (lines % kLines != Tail) return tile<Tail - 1>(sums, part, t, x, dy, tokens, first);
    }
    return tile_with<Tail>(sums, part, t, x, dy, lines / kLines, first);
}

template <class T>
inline void copy(T* out, const float* sums, int n) {
#if VSPDF_WIDTH == 16
    if constexpr (sizeof(T) == 4) {
        for (; n > 0; n -= W, out += W, sums += W) {
            const __mmask16 mask = __mmask16(n < W ? (1u << n) - 1 : 0xFFFF);
            _mm512_mask_storeu_ps(out, mask, _mm512_maskz_loadu_ps(mask, sums));
        }
        return;
    }
#endif
    for (int i = 0; i < n; ++i) from_float(sums[i], out[i]);
}

template <class T>
T* unpack(T* dvalues, const SddmmTile* tiles, const SddmmRun* runs, int n, const float* sums) {
    for (int i = 0; i < n; ++i) {
        copy(dvalues, sums + size_t(tiles[i].group) * W + runs[i].first, runs[i].length);
        dvalues += runs[i].length;
    }
    return dvalues;
}

}  // namespace

extern const SddmmKernels VSPDF_TABLE;
const SddmmKernels VSPDF_TABLE = {W, kLines, kDepth, tile<>, unpack<float>, unpack<bf16>};

}  // namespace vspdf
