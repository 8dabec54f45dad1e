#include "spmm.hpp"

#include <vector>

#include "bf16.hpp"
#include "parallel.hpp"

namespace vspdf {
namespace {

template <class T>
int64_t forward(const Csr& csr, T* y, const T* x, int64_t x_stride, const T* values, const T* bias, int64_t tokens,
                int threads) {
    parallel_for(tokens, threads, [&](int64_t t) {
        for (int row = 0; row < csr.rows; ++row) {
            float sum = bias ? to_float(bias[row]) : 0;
            for (uint32_t i = csr.start[row]; i < csr.start[row + 1]; ++i) {
                sum += to_float(values[i]) * to_float(x[t * x_stride + csr.col[i]]);
            }
            from_float(sum, y[t * csr.rows + row]);
        }
    });
    return tokens * csr.nnz();
}

template <class T>
int64_t grad_input(const Csr& csr, T* dx, const T* dy, int64_t dy_stride, const T* values, int64_t tokens,
                   int threads) {
    parallel_for(tokens, threads, [&](int64_t t) {
        std::vector<float> sum(csr.cols, 0.f);
        for (int row = 0; row < csr.rows; ++row) {
            const float g = to_float(dy[t * dy_stride + row]);
            for (uint32_t i = csr.start[row]; i < csr.start[row + 1]; ++i) sum[csr.col[i]] += to_float(values[i]) * g;
        }
        for (int k = 0; k < csr.cols; ++k) from_float(sum[k], dx[t * csr.cols + k]);
    });
    return tokens * csr.nnz();
}

}  // namespace

int64_t spmm_forward(const Csr& csr, const SpmmPart&, void* y, const void* x, int64_t x_stride, const void* values,
                     const void* bias, int64_t tokens, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) {
        return forward(csr, static_cast<float*>(y), static_cast<const float*>(x), x_stride,
                       static_cast<const float*>(values), static_cast<const float*>(bias), tokens, threads);
    }
    return forward(csr, static_cast<bf16*>(y), static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(values),
                   static_cast<const bf16*>(bias), tokens, threads);
}

int64_t spmm_grad_input(const Csr& csr, const SpmmPart&, void* dx, const void* dy, int64_t dy_stride,
                        const void* values, int64_t tokens, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) {
        return grad_input(csr, static_cast<float*>(dx), static_cast<const float*>(dy), dy_stride,
                          static_cast<const float*>(values), tokens, threads);
    }
    return grad_input(csr, static_cast<bf16*>(dx), static_cast<const bf16*>(dy), dy_stride,
                      static_cast<const bf16*>(values), tokens, threads);
}

std::string spmm_describe(const Plan&, int64_t, int) { return "plain loops over the row-major pattern"; }

}  // namespace vspdf
