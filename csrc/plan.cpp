#include "plan.hpp"

#include <limits>
#include <stdexcept>

#include "sddmm.hpp"
#include "spmm.hpp"

namespace vspdf {

RowColumns::RowColumns(const Plan& plan) : RowBlocks(plan.csr(), 1 << 16) {}

Plan::Plan(int out_features, int in_features, const uint8_t* bits, Isa isa, bool jit)
    : rows_(out_features), cols_(in_features), bits_{bits, int64_t(out_features) * in_features}, isa_(isa), jit_(jit) {
    start_.resize(size_t(rows_) + 1);
    int64_t kept = 0;
    for (int row = 0; row < rows_; ++row) {
        kept += bits_.count(int64_t(row) * cols_, int64_t(row + 1) * cols_);
        if (kept > std::numeric_limits<uint32_t>::max()) {
            throw std::invalid_argument("a plan holds fewer than 2^32 kept weights.");
        }
        start_[row + 1] = uint32_t(kept);
    }
}

Plan::~Plan() = default;

Csr Plan::csr() const {
    Csr csr;
    csr.rows = rows_;
    csr.cols = cols_;
    csr.start = start_;
    csr.col.resize(size_t(nnz()));
    uint32_t* col = csr.col.data();
    for (int row = 0; row < rows_; ++row) {
        const int64_t first = int64_t(row) * cols_;
        bits_.each(first, first + cols_, [&](int64_t at) { *col++ = uint32_t(at - first); });
    }
    return csr;
}

int64_t Plan::forward(void* y, const void* x, int64_t x_stride, const void* values, const void* bias, int64_t tokens,
                      Dtype dtype, Dtype values_dtype, int threads) const {
    return spmm_forward(*this, forward_, y, x, x_stride, values, bias, tokens, dtype, values_dtype, threads);
}

int64_t Plan::grad_input(void* dx, const void* dy, int64_t dy_stride, const void* values, int64_t tokens, Dtype dtype,
                         Dtype values_dtype, int threads) const {
    return spmm_grad_input(*this, transposed_, dx, dy, dy_stride, values, tokens, dtype, values_dtype, threads);
}

int64_t Plan::grad_values(void* dvalues, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                          int64_t tokens, Dtype dtype, Dtype values_dtype, int threads) const {
    return sddmm(*this, gradient_, dvalues, dy, dy_stride, x, x_stride, tokens, dtype, values_dtype, threads);
}

void Plan::prepare(int part) const {
    if (part == 0) {
        forward_.get(*this, false);
    } else if (part == 1) {
        gradient_.get(*this);
    } else {
        transposed_.get(*this, true);
    }
}

size_t Plan::nbytes() const {
    return start_.size() * sizeof(uint32_t) + columns_.nbytes() + forward_.nbytes() + transposed_.nbytes() +
           gradient_.nbytes();
}

std::vector<std::pair<std::string, std::string>> Plan::describe(int64_t tokens) const {
    return {{"forward", spmm_describe(*this, false, forward_, tokens)},
            {"grad_input", spmm_describe(*this, true, transposed_, tokens)},
            {"grad_values", sddmm_describe(*this, tokens)}};
}

}  // namespace vspdf
