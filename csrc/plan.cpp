#include "plan.hpp"

#include <limits>
#include <stdexcept>

#include "sddmm.hpp"
#include "spmm.hpp"

namespace vspdf {

Csr transpose(const Csr& csr, std::vector<uint32_t>& source) {
    Csr result;
    result.rows = csr.cols;
    result.cols = csr.rows;
    result.start.assign(size_t(csr.cols) + 1, 0);
    result.col.resize(csr.col.size());
    source.resize(csr.col.size());
    for (uint16_t col : csr.col) ++result.start[col + 1];
    for (int row = 0; row < csr.cols; ++row) result.start[row + 1] += result.start[row];
    std::vector<uint32_t> next(result.start.begin(), result.start.end() - 1);
    for (int row = 0; row < csr.rows; ++row) {
        for (uint32_t i = csr.start[row]; i < csr.start[row + 1]; ++i) {
            const uint32_t to = next[csr.col[i]]++;
            result.col[to] = uint16_t(row);
            source[to] = i;
        }
    }
    return result;
}

Plan::Plan(int out_features, int in_features, const int64_t* crow, const int32_t* cols, Isa isa, bool jit)
    : isa_(isa), jit_(jit && isa == Isa::avx512) {
    if (out_features < 1 || in_features < 1 || out_features > 65536 || in_features > 65536) {
        throw std::invalid_argument("a plan needs 1 to 65536 features on each side, not " +
                                    std::to_string(out_features) + " x " + std::to_string(in_features) + ".");
    }
    csr_.rows = out_features;
    csr_.cols = in_features;
    csr_.start.resize(size_t(out_features) + 1);
    if (crow[0] != 0 || crow[out_features] > std::numeric_limits<uint32_t>::max()) {
        throw std::invalid_argument("crow must start at 0 and count fewer than 2^32 kept weights.");
    }
    for (int row = 0; row < out_features; ++row) {
        if (crow[row + 1] < crow[row]) throw std::invalid_argument("crow must not decrease.");
        csr_.start[row + 1] = uint32_t(crow[row + 1]);
    }
    csr_.col.resize(csr_.start[out_features]);
    for (int row = 0; row < out_features; ++row) {
        int32_t last = -1;
        for (uint32_t i = csr_.start[row]; i < csr_.start[row + 1]; ++i) {
            if (cols[i] <= last || cols[i] >= in_features) {
                throw std::invalid_argument("cols must ascend in each row and lie in [0, " +
                                            std::to_string(in_features) + ").");
            }
            last = cols[i];
            csr_.col[i] = uint16_t(last);
        }
    }
}

Plan::~Plan() = default;

int64_t Plan::forward(void* y, const void* x, int64_t x_stride, const void* values, const void* bias, int64_t tokens,
                      Dtype dtype, int threads) const {
    return spmm_forward(*this, forward_, y, x, x_stride, values, bias, tokens, dtype, threads);
}

int64_t Plan::grad_input(void* dx, const void* dy, int64_t dy_stride, const void* values, int64_t tokens, Dtype dtype,
                         int threads) const {
    return spmm_grad_input(*this, transposed_, dx, dy, dy_stride, values, tokens, dtype, threads);
}

int64_t Plan::grad_values(void* dvalues, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                          int64_t tokens, Dtype dtype, int threads) const {
    return sddmm(*this, gradient_, dvalues, dy, dy_stride, x, x_stride, tokens, dtype, threads);
}

void Plan::prepare() const {
    forward_.get(*this, false);
    transposed_.get(*this, true);
    gradient_.get(*this);
}

size_t Plan::nbytes() const { return csr_.nbytes() + forward_.nbytes() + transposed_.nbytes() + gradient_.nbytes(); }

std::vector<std::pair<std::string, std::string>> Plan::describe(int64_t tokens, int threads) const {
    return {{"forward", spmm_describe(*this, false, forward_, tokens, threads)},
            {"grad_input", spmm_describe(*this, true, transposed_, tokens, threads)},
            {"grad_values", sddmm_describe(*this, tokens, threads)}};
}

}  // namespace vspdf
