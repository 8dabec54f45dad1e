// Included by one translation unit per instruction set, which defines VSPDF_WIDTH. Everything here is local to that
// unit: a function shared by name could be linked from the wrong instruction set.

#include <cstring>

#include "spmm_kernels.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vspdf {
namespace {

constexpr int W = VSPDF_WIDTH;
typedef float V __attribute__((vector_size(4 * W)));
typedef float VU __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
inline V splat(float x) { return x - V{}; }

// ---- Transposes -------------------------------------------------------------------------------------------------
// transpose4: rows 4 c to 4 c + 3 of the transpose of the W x W block at `block`. Rows are gathered in 128-bit lanes by
// loads, so that only the 4 x 4 transposes inside the lanes need the shuffle port.

#if VSPDF_WIDTH == 16
inline void transpose4(__m512* out, const float* block, int64_t stride, int c) {
    __m512 z[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const float* p = block + i * stride + 4 * c;
        z[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
        z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x00F0, _mm_loadu_ps(p + 4 * stride));
        z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x0F00, _mm_loadu_ps(p + 8 * stride));
        z[i] = _mm512_mask_broadcast_f32x4(z[i], 0xF000, _mm_loadu_ps(p + 12 * stride));
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
    const __m512d p = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
    const __m512d q = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
    out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, p));
    out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, p));
    out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, q));
    out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, q));
}
inline void stream(float* p, V v) { _mm512_stream_ps(p, v); }
#elif VSPDF_WIDTH == 8
inline void transpose4(__m256* out, const float* block, int64_t stride, int c) {
    __m256 z[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const float* p = block + i * stride + 4 * c;
        z[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
    }
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0], z[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(z[0], z[1]));
    const __m256d p = _mm256_castps_pd(_mm256_unpacklo_ps(z[2], z[3]));
    const __m256d q = _mm256_castps_pd(_mm256_unpackhi_ps(z[2], z[3]));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, p));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, p));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, q));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, q));
}
inline void stream(float* p, V v) { _mm256_stream_ps(p, v); }
#else
// a[0] b[0] a[1] b[1] and a[2] b[2] a[3] b[3]: one instruction of NEON and of SSE each.
inline V zip_low(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#else
    typedef int32_t Lanes __attribute__((vector_size(16)));
    return __builtin_shuffle(a, b, Lanes{0, 4, 1, 5});
#endif
}
inline V zip_high(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
    typedef int32_t Lanes __attribute__((vector_size(16)));
    return __builtin_shuffle(a, b, Lanes{2, 6, 3, 7});
#endif
}
inline void transpose4(V* out, const float* block, int64_t stride, int) {
    const V a = load(block), b = load(block + stride), c = load(block + 2 * stride), d = load(block + 3 * stride);
    const V ac = zip_low(a, c), bd = zip_low(b, d), ca = zip_high(a, c), db = zip_high(b, d);
    out[0] = zip_low(ac, bd);
    out[1] = zip_high(ac, bd);
    out[2] = zip_low(ca, db);
    out[3] = zip_high(ca, db);
}
inline void stream(float* p, V v) { store(p, v); }
#endif

inline void transpose(V* out, const float* block, int64_t stride) {
#pragma GCC unroll 4
    for (int c = 0; c < W / 4; ++c) transpose4(out + 4 * c, block, stride, c);
}

// ---- bfloat16 ---------------------------------------------------------------------------------------------------

typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W), aligned(2), may_alias));

// W numbers as they are, in the lower halves of the lanes.
inline U load_halves(const bf16* p) { return __builtin_convertvector(*reinterpret_cast<const H*>(p), U); }
inline V load_wide(const float* p) { return load(p); }
inline V load_wide(const bf16* p) { return reinterpret_cast<V>(load_halves(p) << 16); }

// In the lower halves: to nearest, ties to even, as PyTorch rounds; NaN stays NaN.
inline U round_to_halves(V v) {
    const U bits = reinterpret_cast<U>(v), nan = reinterpret_cast<U>(v != v);
    return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) & ~nan) | (0x7FC0 & nan);
}

inline void store_narrow(float* p, V v) { store(p, v); }
inline void store_narrow(bf16* p, V v) { *reinterpret_cast<H*>(p) = __builtin_convertvector(round_to_halves(v), H); }

// Two neighbours of W elements each, past the caches: `p` is aligned to a vector.
inline void stream_two(float* p, V a, V b) {
    stream(p, a);
    stream(p + W, b);
}
inline void stream_two(bf16* p, V a, V b) {
    H halves[2] = {__builtin_convertvector(round_to_halves(a), H), __builtin_convertvector(round_to_halves(b), H)};
    V both;
    std::memcpy(&both, halves, sizeof both);
    stream(reinterpret_cast<float*>(p), both);
}

// ---- Packing ----------------------------------------------------------------------------------------------------

template <class T>
void pack_edge(float* out, int lanes, const T* x, int64_t stride, int tokens, int features) {
    for (int f = 0; f < features; ++f) {
        for (int t = 0; t < W; ++t) out[f * lanes + t] = t < tokens ? to_float(x[t * stride + f]) : 0.f;
    }
}

template <class T>
void pack(float* out, int lanes, const T* x, int64_t stride, int tokens, int features) {
    const bool ahead = packs_ahead();
    for (int t = 0; t < lanes; t += W) {
        const int here = tokens - t < 0 ? 0 : tokens - t < W ? tokens - t : W;
        const T* rows = x + (here > 0 ? t * stride : 0);
        int f = 0;
        for (; here == W && f + W <= features; f += W) {
            if (ahead) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) __builtin_prefetch(rows + (W + i) * stride + f, 0, 2);
            }
            V column[W];
            if constexpr (sizeof(T) == 4) {
                transpose(column, rows + f, stride);
            } else {
                float block[W * W];
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) store(block + i * W, load_wide(rows + i * stride + f));
                transpose(column, block, W);
            }
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) store(out + int64_t(f + j) * lanes + t, column[j]);
        }
        pack_edge(out + int64_t(f) * lanes + t, lanes, rows + f, stride, here, features - f);
    }
}

// Lane t of a vector holds tokens t and t + W of its two vectors of tokens.
void pack_pairs(float* out, int lanes, const bf16* x, int64_t stride, int tokens, int features) {
    for (int t = 0; t < lanes; t += W) {
        const int here = tokens - 2 * t < 0 ? 0 : tokens - 2 * t < 2 * W ? tokens - 2 * t : 2 * W;
        const bf16* rows = x + (here > 0 ? 2 * t * stride : 0);
        int f = 0;
        for (; here == 2 * W && f + W <= features; f += W) {
            float block[W * W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                const U low = load_halves(rows + i * stride + f), high = load_halves(rows + (i + W) * stride + f);
                store(block + i * W, reinterpret_cast<V>(low | high << 16));
            }
            V column[W];
            transpose(column, block, W);
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) store(out + int64_t(f + j) * lanes + t, column[j]);
        }
        for (; f < features; ++f) {
            for (int i = 0; i < W; ++i) {
                const uint32_t low = i < here ? rows[i * stride + f].bits : 0;
                const uint32_t high = i + W < here ? rows[(i + W) * stride + f].bits : 0;
                const uint32_t pair = low | high << 16;
                std::memcpy(out + int64_t(f) * lanes + t + i, &pair, sizeof pair);
            }
        }
    }
}

// Lines of a known length spare the arithmetic of addresses; 0: any.
template <int Lanes, class T>
void unpack_lanes(T* out, int64_t stride, const float* y, int any_lanes, int tokens, int features, const float* bias,
                  bool streaming) {
    const int lanes = Lanes ? Lanes : any_lanes;
    streaming = streaming && stride * sizeof(T) % (4 * W) == 0 && reinterpret_cast<uintptr_t>(out) % (4 * W) == 0;
    for (int t = 0; t < tokens; t += W) {
        const int here = tokens - t < W ? tokens - t : W;
        int f = 0;
        // Four blocks side by side: memory takes runs of a row better than single vectors.
        for (; here == W && streaming && f + 4 * W <= features; f += 4 * W) {
            V shift[4];
            for (int b = 0; b < 4; ++b) shift[b] = bias ? load(bias + f + b * W) : V{};
            for (int c = 0; c < W / 4; ++c) {
                V row[4][4];
#pragma GCC unroll 4
                for (int b = 0; b < 4; ++b) transpose4(row[b], y + int64_t(f + b * W) * lanes + t, lanes, c);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    T* to = out + (t + 4 * c + i) * stride + f;
                    stream_two(to, row[0][i] + shift[0], row[1][i] + shift[1]);
                    stream_two(to + 2 * W, row[2][i] + shift[2], row[3][i] + shift[3]);
                }
            }
        }
        for (; f < features; f += W) {
            const float* block = y + int64_t(f) * lanes + t;
            T* to = out + t * stride + f;
            if (here < W || features - f < W) {
                for (int i = 0; i < here; ++i) {
                    for (int j = 0; j < W && f + j < features; ++j) {
                        from_float(block[int64_t(j) * lanes + i] + (bias ? bias[f + j] : 0.f), to[i * stride + j]);
                    }
                }
                continue;
            }
            V row[W];
            transpose(row, block, lanes);
            const V shift = bias ? load(bias + f) : V{};
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store_narrow(to + i * stride, row[i] + shift);
        }
    }
}

template <class T>
void unpack(T* out, int64_t stride, const float* y, int lanes, int tokens, int features, const float* bias,
            bool streaming) {
    const auto run = lanes == 16 ? unpack_lanes<16, T> : lanes == 64 ? unpack_lanes<64, T> : unpack_lanes<0, T>;
    run(out, stride, y, lanes, tokens, features, bias, streaming);
}

// ---- Row loops --------------------------------------------------------------------------------------------------

// One row: S vectors make a line; U kept weights at a time have sums of their own, to hide the latency of the
// multiply-add.
template <int S, int U, class Column>
inline void row(float* y, const float* x, const float* values, const Column* col, uint32_t count, bool first) {
    constexpr int L = S * W;
    V sum[U][S];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) sum[u][s] = u == 0 && !first ? load(y + s * W) : V{};
    }
    uint32_t i = 0;
    for (; i + U <= count; i += U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
            const float* line = x + size_t(col[i + u]) * L;
            const V value = splat(values[i + u]);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) sum[u][s] += value * load(line + s * W);
        }
    }
    for (; U > 1 && i < count; ++i) {
        const float* line = x + size_t(col[i]) * L;
        const V value = splat(values[i]);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) sum[0][s] += value * load(line + s * W);
    }
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 8
        for (int u = 1; u < U; ++u) sum[0][s] += sum[u][s];
        store(y + s * W, sum[0][s]);
    }
}

template <int S, int U>
int64_t rows(float* y, const float* x, const float* values, const uint16_t* col, const uint32_t* lo,
             const uint32_t* hi, int n, bool first) {
    constexpr int L = S * W;
    int64_t done = 0;
    for (int r = 0; r < n; ++r) {
        row<S, U>(y + r * L, x, values + lo[r], col + lo[r], hi[r] - lo[r], first);
        done += hi[r] - lo[r];
    }
    return done * L;
}

template <int S, int U>
int64_t sorted(float* y, const float* x, const float* values, const uint8_t* col, const uint8_t* at,
               const uint8_t* count, int n, bool first) {
    constexpr int L = S * W;
    int64_t done = 0;
    for (int r = 0; r < n; ++r) {
        row<S, U>(y + at[r] * L, x, values + done, col + done, count[r], first);
        done += count[r];
    }
    return done * L;
}

template <int S>
int64_t scatter(float* dx, const float* dy, const float* values, const uint16_t* col, const uint32_t* lo,
                const uint32_t* hi, int n) {
    constexpr int L = S * W;
    int64_t macs = 0;
    for (int r = 0; r < n; ++r, dy += L) {
        V gradient[S];
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) gradient[s] = load(dy + s * W);
        for (uint32_t i = lo[r]; i < hi[r]; ++i) {
            float* line = dx + size_t(col[i]) * L;
            const V value = splat(values[i]);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) store(line + s * W, load(line + s * W) + value * gradient[s]);
        }
        macs += int64_t(hi[r] - lo[r]) * L;
    }
    return macs;
}

// Values come as vectors, so that only x is loaded number by number: loads of floats are what limits a row's sum.
void dots(float* y, const float* x, const float* values, const uint16_t* col, const uint32_t* lo, const uint32_t* hi,
          int n, bool first) {
    typedef float Four __attribute__((vector_size(16)));
    typedef float FourU __attribute__((vector_size(16), aligned(4), may_alias));
    constexpr int U = 4;  // sums of their own hide the latency of the multiply-add
    for (int r = 0; r < n; ++r) {
        Four sum[U] = {};
        uint32_t i = lo[r];
        const uint32_t end = hi[r];
        const auto add = [&](Four& to, uint32_t at) {
            uint64_t c;  // four columns
            std::memcpy(&c, col + at, sizeof c);
            to += *reinterpret_cast<const FourU*>(values + at) *
                  Four{x[c & 0xFFFF], x[c >> 16 & 0xFFFF], x[c >> 32 & 0xFFFF], x[c >> 48]};
        };
        for (; i + 4 * U <= end; i += 4 * U) {
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) add(sum[u], i + 4 * u);
        }
        for (; i + 4 <= end; i += 4) add(sum[0], i);
        float rest = 0;
        for (; i < end; ++i) rest += values[i] * x[col[i]];
        const Four four = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        const float total = (four[0] + four[1]) + (four[2] + four[3]) + rest;
        y[r] = first ? total : y[r] + total;
    }
}

int64_t scatter_one(float* dx, const float* dy, const float* values, const uint16_t* col, const uint32_t* lo,
                    const uint32_t* hi, int n) {
    constexpr int U = 4;
    int64_t macs = 0;
    for (int r = 0; r < n; ++r) {
        uint32_t i = lo[r];
        const uint32_t end = hi[r];
        macs += end - i;
        for (; i + U <= end; i += U) {  // a row's columns differ: all are read before any is written
            float sum[U];
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) sum[u] = dx[col[i + u]] + values[i + u] * dy[r];
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) dx[col[i + u]] = sum[u];
        }
        for (; i < end; ++i) dx[col[i]] += values[i] * dy[r];
    }
    return macs;
}

int64_t fma_rounds(int64_t rounds) {
    constexpr int N = 10;  // chains enough to fill two pipes of latency 4, few enough to stay in registers
    V sum[N], a = splat(1.f), b = splat(1e-9f);
#pragma GCC unroll 10
    for (int i = 0; i < N; ++i) sum[i] = splat(float(i));
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 10
        for (int i = 0; i < N; ++i) sum[i] = sum[i] * a + b;
#if defined(__GNUC__) && defined(__x86_64__)
        asm volatile("" : "+x"(a), "+x"(b));  // keeps the loop
#endif
    }
    V total = sum[0];
    for (int i = 1; i < N; ++i) total += sum[i];
    volatile float sink = total[0];
    (void)sink;
    return 2 * rounds * N * W;
}

}  // namespace

extern const SpmmKernels VSPDF_TABLE;
const SpmmKernels VSPDF_TABLE = {
    W,
    W == 16 ? 4 * W : 8 * W,
    pack<float>,
    pack<bf16>,
    pack_pairs,
    unpack<float>,
    unpack<bf16>,
    {rows<1, 4>, rows<2, 4>, rows<4, 2>, rows<8, 1>},
    {sorted<1, 4>, sorted<2, 4>, sorted<4, 2>, sorted<8, 1>},
    {scatter<1>, scatter<2>, scatter<4>, scatter<8>},
    dots,
    scatter_one,
    fma_rounds,
};

}  // namespace vspdf
