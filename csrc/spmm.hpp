// Sparse weight times dense tokens: y = x W^T + bias, and dx = dy W, which is the same with the transposed pattern.
#pragma once

#include "plan.hpp"

namespace vspdf {

// What one of the two products knows of a pattern.
class SpmmPart {
  public:
    explicit SpmmPart(const Plan&) {}
    size_t nbytes() const { return 0; }
};

int64_t spmm_forward(const Csr& csr, const SpmmPart& part, void* y, const void* x, int64_t x_stride, const void* values,
                     const void* bias, int64_t tokens, Dtype dtype, int threads);
int64_t spmm_grad_input(const Csr& csr, const SpmmPart& part, void* dx, const void* dy, int64_t dy_stride,
                        const void* values, int64_t tokens, Dtype dtype, int threads);
std::string spmm_describe(const Plan& plan, int64_t tokens, int threads);

}  // namespace vspdf
