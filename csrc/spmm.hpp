// Sparse weight times dense tokens: y = x W^T + bias, and dx = dy W, which is the same with the transposed pattern.
#pragma once

#include <variant>

#include "plan.hpp"
#include "spmm_jit.hpp"

namespace vspdf {

// Loops over blocks of features, and how row-major values come into their order.
class SpmmLoops {
  public:
    // `csr` is that of the product, the transpose of the weight's if `transposed`.
    SpmmLoops(const Csr& csr, bool transposed, int tile);

    const SortedBlocks& blocks() const { return blocks_; }
    // out[i] = values in the order of the blocks; `start`: where each row of the weight begins in `values`.
    template <class T>
    void refresh(float* out, const T* values, const uint32_t* start, int threads) const;
    size_t nbytes() const { return blocks_.nbytes() + columns_.size() * sizeof(uint32_t); }

  private:
    template <class T>
    void refresh_rows(float* out, const T* values, const uint32_t* start, int band) const;
    template <class T>
    void refresh_columns(float* out, const T* values, int band) const;

    SortedBlocks blocks_;
    std::vector<uint32_t> columns_;  // [band][col]: where in row-major order a column's values of the band begin; of
                                     // the transpose only
};

// What one of the two products knows of a pattern, whose rows are the product's outputs.
class SpmmPart {
  public:
    SpmmPart(const Plan& plan, bool transposed);

    size_t nbytes() const;

    std::string why;  // it is loops
    std::variant<SpmmLoops, SpmmProgram> work;
};

// y[tokens, out] = x W^T + bias
int64_t spmm_forward(const Plan& plan, const Lazy<SpmmPart>& part, void* y, const void* x, int64_t x_stride,
                     const void* values, const void* bias, int64_t tokens, Dtype dtype, Dtype values_dtype,
                     int threads);
// dx[tokens, in] = dy W
int64_t spmm_grad_input(const Plan& plan, const Lazy<SpmmPart>& part, void* dx, const void* dy, int64_t dy_stride,
                        const void* values, int64_t tokens, Dtype dtype, Dtype values_dtype, int threads);
// One line on the kernel that would run.
std::string spmm_describe(const Plan& plan, bool transposed, const Lazy<SpmmPart>& part, int64_t tokens);

}  // namespace vspdf
