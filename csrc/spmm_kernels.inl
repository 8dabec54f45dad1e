// Included by one translation unit per instruction set, which defines VSPDF_WIDTH. Everything here is local to that
// unit: a function shared by name could be linked from the wrong instruction set.

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
// out[j] = column j of the W x W block at `block`. Rows are gathered in 128-bit lanes by loads, so that only the 4 x 4
// transposes inside the lanes need the shuffle port.

#if VSPDF_WIDTH == 16
// Rows 4 c to 4 c + 3 of the transpose of the block.
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
inline void transpose(__m512* out, const float* block, int64_t stride) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) transpose4(out + 4 * c, block, stride, c);
}
inline void stream(float* p, V v) { _mm512_stream_ps(p, v); }
#elif VSPDF_WIDTH == 8
inline void transpose(__m256* out, const float* block, int64_t stride) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
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
        out[4 * c + 0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, p));
        out[4 * c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, p));
        out[4 * c + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, q));
        out[4 * c + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, q));
    }
}
inline void stream(float* p, V v) { _mm256_stream_ps(p, v); }
#else
inline void transpose(V* out, const float* block, int64_t stride) {
    for (int j = 0; j < W; ++j) {
        float column[W];
        for (int i = 0; i < W; ++i) column[i] = block[i * stride + j];
        out[j] = load(column);
    }
}
inline void stream(float* p, V v) { store(p, v); }
#endif

template <class T>
void pack_edge(float* out, int lanes, const T* x, int64_t stride, int tokens, int features, int width) {
    for (int f = 0; f < features; ++f) {
        for (int t = 0; t < width; ++t) out[f * lanes + t] = t < tokens ? to_float(x[t * stride + f]) : 0.f;
    }
}

template <class T>
void pack(float* out, int lanes, const T* x, int64_t stride, int tokens, int features) {
    for (int t = 0; t < lanes; t += W) {
        const int here = tokens - t < 0 ? 0 : tokens - t < W ? tokens - t : W;
        const T* rows = x + t * stride;
        int f = 0;
        for (; here == W && f + W <= features; f += W) {
            V column[W];
            if constexpr (sizeof(T) == 4) {
                transpose(column, rows + f, stride);
            } else {
                float block[W * W];
                for (int i = 0; i < W; ++i) {
                    for (int j = 0; j < W; ++j) block[i * W + j] = to_float(rows[i * stride + f + j]);
                }
                transpose(column, block, W);
            }
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) store(out + int64_t(f + j) * lanes + t, column[j]);
        }
        pack_edge(out + int64_t(f) * lanes + t, lanes, rows + f, stride, here, features - f, W);
    }
}

template <class T>
void unpack(T* out, int64_t stride, const float* y, int lanes, int tokens, int features, const float* bias,
            bool streaming) {
    streaming = streaming && sizeof(T) == 4 && stride % W == 0 && reinterpret_cast<uintptr_t>(out) % (4 * W) == 0;
    for (int t = 0; t < tokens; t += W) {
        const int here = tokens - t < W ? tokens - t : W;
        int f = 0;
#if VSPDF_WIDTH == 16
        if constexpr (sizeof(T) == 4) {
            // The slices of generated code. Four lines side by side: memory takes runs of a row better than single
            // lines.
            for (; here == W && lanes == W && streaming && f + 4 * W <= features; f += 4 * W) {
                V shift[4];
                for (int b = 0; b < 4; ++b) shift[b] = bias ? load(bias + f + b * W) : V{};
                for (int c = 0; c < 4; ++c) {
                    V row[4][4];
#pragma GCC unroll 4
                    for (int b = 0; b < 4; ++b) transpose4(row[b], y + int64_t(f + b * W) * W, W, c);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
                        for (int b = 0; b < 4; ++b)
                            stream(out + (t + 4 * c + i) * stride + f + b * W, row[b][i] + shift[b]);
                    }
                }
            }
        }
#endif
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
            if (bias) {
                const V b = load(bias + f);
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) row[i] += b;
            }
            if constexpr (sizeof(T) == 4) {
                if (streaming) {
#pragma GCC unroll 16
                    for (int i = 0; i < W; ++i) stream(to + i * stride, row[i]);
                } else {
#pragma GCC unroll 16
                    for (int i = 0; i < W; ++i) store(to + i * stride, row[i]);
                }
            } else {
                for (int i = 0; i < W; ++i) {
                    for (int j = 0; j < W; ++j) from_float(row[i][j], to[i * stride + j]);
                }
            }
        }
    }
}

template <class T>
void gather(float* out, const T* values, const uint32_t* source, int64_t n) {
    int64_t i = 0;
#if VSPDF_WIDTH == 16
    if constexpr (sizeof(T) == 4) {
        for (; i + 16 <= n; i += 16) {
            // A base in the middle lets signed 32-bit indices reach 2^32 values.
            const __m512i at = _mm512_sub_epi32(_mm512_loadu_si512(source + i), _mm512_set1_epi32(INT32_MIN));
            _mm512_storeu_ps(out + i, _mm512_i32gather_ps(at, values + (int64_t(1) << 31), 4));
        }
    }
#endif
    for (; i < n; ++i) out[i] = to_float(values[source[i]]);
}

// ---- Row loops --------------------------------------------------------------------------------------------------

// S vectors make a line; U kept weights at a time have sums of their own, to hide the latency of the multiply-add.
template <int S, int U>
int64_t rows(float* y, const float* x, const float* values, const uint16_t* col, const uint32_t* lo, const uint32_t* hi,
             int n, bool first) {
    constexpr int L = S * W;
    int64_t macs = 0;
    for (int r = 0; r < n; ++r, y += L) {
        V sum[U][S];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) sum[u][s] = u == 0 && !first ? load(y + s * W) : V{};
        }
        uint32_t i = lo[r];
        const uint32_t end = hi[r];
        macs += int64_t(end - i) * L;
        for (; i + U <= end; i += U) {
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) {
                const float* line = x + size_t(col[i + u]) * L;
                const V value = splat(values[i + u]);
#pragma GCC unroll 8
                for (int s = 0; s < S; ++s) sum[u][s] += value * load(line + s * W);
            }
        }
        for (; U > 1 && i < end; ++i) {
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
    return macs;
}

template <int S>
int64_t scatter(float* dx, const float* dy, const float* values, const uint16_t* col, const uint32_t* start, int n) {
    constexpr int L = S * W;
    for (int r = 0; r < n; ++r, dy += L) {
        V gradient[S];
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) gradient[s] = load(dy + s * W);
        for (uint32_t i = start[r]; i < start[r + 1]; ++i) {
            float* line = dx + size_t(col[i]) * L;
            const V value = splat(values[i]);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) store(line + s * W, load(line + s * W) + value * gradient[s]);
        }
    }
    return int64_t(start[n] - start[0]) * L;
}

void dots(float* y, const float* x, const float* values, const uint16_t* col, const uint32_t* start, int n) {
    constexpr int U = 8;  // sums of their own hide the latency of the multiply-add
    for (int r = 0; r < n; ++r) {
        float sum[U] = {};
        uint32_t i = start[r];
        const uint32_t end = start[r + 1];
        for (; i + U <= end; i += U) {
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) sum[u] += values[i + u] * x[col[i + u]];
        }
        for (; i < end; ++i) sum[0] += values[i] * x[col[i]];
        y[r] = (sum[0] + sum[1] + (sum[2] + sum[3])) + (sum[4] + sum[5] + (sum[6] + sum[7]));
    }
}

void scatter_one(float* dx, const float* dy, const float* values, const uint16_t* col, const uint32_t* start, int n) {
    constexpr int U = 4;
    for (int r = 0; r < n; ++r) {
        uint32_t i = start[r];
        const uint32_t end = start[r + 1];
        for (; i + U <= end; i += U) {  // a row's columns differ: all are read before any is written
            float sum[U];
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) sum[u] = dx[col[i + u]] + values[i + u] * dy[r];
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) dx[col[i + u]] = sum[u];
        }
        for (; i < end; ++i) dx[col[i]] += values[i] * dy[r];
    }
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
    unpack<float>,
    unpack<bf16>,
    gather<float>,
    gather<bf16>,
    {rows<1, 4>, rows<2, 4>, rows<4, 2>, rows<8, 1>},
    {scatter<1>, scatter<2>, scatter<4>, scatter<8>},
    dots,
    scatter_one,
    fma_rounds,
};

}  // namespace vspdf
