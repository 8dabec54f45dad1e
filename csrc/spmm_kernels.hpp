// The inner loops of SpMM, compiled once per instruction set and chosen at run time.
//
// Tokens are the vector lanes: a tile of L tokens of x[tokens, features] is packed as [features][L], so one line of a
// tile is one feature of L tokens, and a kept weight is one number times a line.
#pragma once

#include <cstdint>

#include "bf16.hpp"
#include "isa.hpp"

namespace vspdf {

struct SpmmKernels {
    int width;  // floats in a vector
    int tile;   // tokens in a tile of the blocked loops: the widest of `rows`

    // out[f * lanes + t] = x[t * stride + f]; lanes from `tokens` on become zero. `lanes` is a multiple of `width`.
    void (*pack)(float* out, int lanes, const float* x, int64_t stride, int tokens, int features);
    void (*pack_bf16)(float* out, int lanes, const bf16* x, int64_t stride, int tokens, int features);
    // Two tokens in each lane, as they are: which two is the same for every feature.
    void (*pack_pairs)(float* out, int lanes, const bf16* x, int64_t stride, int tokens, int features);

    // out[t * stride + f] = y[f * lanes + t] + bias[f] (bias may be null); `stream` bypasses the caches where it can.
    void (*unpack)(float* out, int64_t stride, const float* y, int lanes, int tokens, int features, const float* bias,
                   bool stream);
    void (*unpack_bf16)(bf16* out, int64_t stride, const float* y, int lanes, int tokens, int features,
                        const float* bias, bool stream);

    // y[r][:] (+)= sum over i in [lo[r], hi[r]) of values[i] x[col[i]][:], for `n` rows; `first` overwrites y.
    // Indexed by log2 of the vectors in a line. Returns the multiply-adds executed.
    using Rows = int64_t (*)(float* y, const float* x, const float* values, const uint16_t* col, const uint32_t* lo,
                             const uint32_t* hi, int n, bool first);
    Rows rows[4];
    // The same for a block of columns, whose values come row after row in the order of `row`, `count` for each.
    using Sorted = int64_t (*)(float* y, const float* x, const float* values, const uint8_t* col, const uint8_t* row,
                               const uint8_t* count, int n, bool first);
    Sorted sorted[4];
    // dx[col[i]][:] += values[i] dy[r][:] for i in [lo[r], hi[r]), for `n` rows.
    using Scatter = int64_t (*)(float* dx, const float* dy, const float* values, const uint16_t* col,
                                const uint32_t* lo, const uint32_t* hi, int n);
    Scatter scatter[4];

    // The same for one token, whose features need no packing: y[r] (+)= sum of values[i] x[col[i]], and dx[col[i]] +=
    // ...
    void (*dots)(float* y, const float* x, const float* values, const uint16_t* col, const uint32_t* lo,
                 const uint32_t* hi, int n, bool first);
    Scatter scatter_one;

    // 2 x the multiply-adds of `rounds` rounds that touch registers only
    int64_t (*fma_rounds)(int64_t rounds);
};

const SpmmKernels& spmm_kernels(Isa isa);
extern const SpmmKernels spmm_kernels_plain;
#if defined(__x86_64__)
extern const SpmmKernels spmm_kernels_avx2, spmm_kernels_avx512;
#endif

// Multiply-adds per second from registers, in GFLOP/s, on `threads` threads for about `seconds`: the machine's ceiling.
double fma_peak(int threads, double seconds, Isa isa);

}  // namespace vspdf
