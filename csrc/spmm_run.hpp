// What the ways to run SpMM share: how tokens come and go, and how the work is cut.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "spmm.hpp"
#include "spmm_kernels.hpp"

namespace vspdf {

constexpr int kSlice = 16;  // tokens of one call of generated code, and rows that end a cache line of the output

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Orders stores that bypassed the caches before what other threads see next.
inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Tokens that come in, the two element types behind one name.
struct Source {
    const void* data;
    int64_t stride;
    Dtype dtype;

    // out[f][t] = data[token + t, feature + f]; lanes from `tokens` on are zero
    void pack(const SpmmKernels& kernels, float* out, int lanes, int64_t token, int tokens, int feature,
              int features) const {
        const int64_t at = token * stride + feature;
        if (dtype == Dtype::f32) {
            kernels.pack(out, lanes, static_cast<const float*>(data) + at, stride, tokens, features);
        } else {
            kernels.pack_bf16(out, lanes, static_cast<const bf16*>(data) + at, stride, tokens, features);
        }
    }
};

// Tokens that go out.
struct Target {
    void* data;
    int64_t stride;
    Dtype dtype;
    const float* bias;  // or null
    bool stream;

    // data[token + t, feature + f] = y[f][t] + bias[feature + f]
    void unpack(const SpmmKernels& kernels, const float* y, int lanes, int64_t token, int tokens, int feature,
                int features) const {
        const int64_t at = token * stride + feature;
        const float* shift = bias ? bias + feature : nullptr;
        if (dtype == Dtype::f32) {
            kernels.unpack(static_cast<float*>(data) + at, stride, y, lanes, tokens, features, shift, stream);
        } else {
            kernels.unpack_bf16(static_cast<bf16*>(data) + at, stride, y, lanes, tokens, features, shift, stream);
        }
    }
};

// How the work is cut: `units` token units into blocks of at most `most`, rows into `parts`, for `threads` threads.
struct Cut {
    int64_t blocks;
    int64_t units;  // most units of a block
    int64_t parts;
};
Cut cut(int64_t units, int64_t most, int64_t few, int threads, int64_t row_units);

// Values are float32, in the order that the program or the blocks read them. All return the multiply-adds executed.
int64_t run_program(const SpmmKernels& kernels, const SpmmProgram& program, const Target& y, const Source& x,
                    const float* values, int64_t tokens, int threads);
template <class Blocks>
int64_t run_rows(const SpmmKernels& kernels, const Blocks& blocks, const Target& y, const Source& x,
                 const float* values, int64_t tokens, int threads);

// For few tokens, values in row-major order: y = x W^T for one token, dx = dy W for some.
int64_t run_dots(const SpmmKernels& kernels, const RowColumns& columns, const Target& y, const Source& x,
                 const float* values, int threads);
int64_t run_scatter(const SpmmKernels& kernels, const RowColumns& columns, const Target& dx, const Source& dy,
                    const float* values, int64_t tokens, int threads);

// The same by the bits of the mask, where `by_bits`; values of either type.
bool by_bits(const Plan& plan, int64_t tokens, Dtype values_dtype);
int64_t run_bits(const Plan& plan, const Target& y, const Source& x, const void* values, Dtype values_dtype,
                 int64_t tokens, int threads);

// Vectors of the narrowest line that holds so many tokens, up to the widest line.
int line_vectors(const SpmmKernels& kernels, int64_t tokens);

// `n` values or features as float32: the caller's own where they are, else converted into `out`.
const float* as_floats(float* out, const void* values, int64_t n, Dtype dtype, int threads);

}  // namespace vspdf
