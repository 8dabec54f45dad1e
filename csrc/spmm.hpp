// Sparse weight times dense tokens: y = x W^T + bias, and dx = dy W, which is the same with the transposed pattern.
#pragma once

#include "plan.hpp"
#include "spmm_jit.hpp"

namespace vspdf {

// What one of the two products knows of a pattern, whose rows are the product's outputs.
class SpmmPart {
  public:
    SpmmPart(const Plan& plan, bool transposed);

    size_t nbytes() const;

    int rows, cols;
    // Generated code, if `program.code.entry()`; `refused` says why it could not be made.
    SpmmProgram program;
    std::string refused;
    // Otherwise loops over blocks of features: row r of block b is [edge[b * rows + r], edge[(b + 1) * rows + r]) of
    // `col`.
    int block = 0, blocks = 0;
    std::vector<uint32_t> edge;
    const uint16_t* col = nullptr;
    Csr transpose;  // owns `col` if transposed
    // Packed value i is values[source[i]]; empty if the row-major order serves.
    std::vector<uint32_t> source;
};

// y[tokens, out] = x W^T + bias
int64_t spmm_forward(const Plan& plan, const Lazy<SpmmPart>& part, void* y, const void* x, int64_t x_stride,
                     const void* values, const void* bias, int64_t tokens, Dtype dtype, int threads);
// dx[tokens, in] = dy W
int64_t spmm_grad_input(const Plan& plan, const Lazy<SpmmPart>& part, void* dx, const void* dy, int64_t dy_stride,
                        const void* values, int64_t tokens, Dtype dtype, int threads);
// One line on the kernel that would run.
std::string spmm_describe(const Plan& plan, bool transposed, const Lazy<SpmmPart>& part, int64_t tokens, int threads);

}  // namespace vspdf
