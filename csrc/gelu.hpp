// The Gaussian error linear unit (arXiv:1606.08415), x Phi(x), and its derivative, of contiguous float32.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace vspdf {

// Of Phi, the normal distribution's, or of the form with tanh that stands for it.
enum class Gelu : int { exact = 0, tanh = 1 };

// out[i] = gelu(x[i])
void gelu(float* out, const float* x, int64_t n, Gelu form, Isa isa, int threads);
// dx[i] = dy[i] gelu'(x[i])
void gelu_grad(float* dx, const float* dy, const float* x, int64_t n, Gelu form, Isa isa, int threads);

// The loops, compiled once per instruction set and chosen at run time.
struct GeluKernels {
    void (*value)(float* out, const float* x, int64_t n, Gelu form);
    void (*grad)(float* dx, const float* dy, const float* x, int64_t n, Gelu form);
};
extern const GeluKernels gelu_kernels_plain;
#if defined(__x86_64__)
extern const GeluKernels gelu_kernels_avx2, gelu_kernels_avx512;
#endif

}  // namespace vspdf
