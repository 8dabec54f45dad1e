#include "sddmm.hpp"

#include "bf16.hpp"
#include "parallel.hpp"

namespace vspdf {
namespace {

template <class T>
int64_t run(const Csr& csr, T* dvalues, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, int64_t tokens,
            int threads) {
    parallel_for(csr.rows, threads, [&](int64_t row) {
        for (uint32_t i = csr.start[row]; i < csr.start[row + 1]; ++i) {
            float sum = 0;
            for (int64_t t = 0; t < tokens; ++t) {
                sum += to_float(dy[t * dy_stride + row]) * to_float(x[t * x_stride + csr.col[i]]);
            }
            from_float(sum, dvalues[i]);
        }
    });
    return tokens * csr.nnz();
}

}  // namespace

int64_t sddmm(const SddmmPart&, const Csr& csr, void* dvalues, const void* dy, int64_t dy_stride, const void* x,
              int64_t x_stride, int64_t tokens, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) {
        return run(csr, static_cast<float*>(dvalues), static_cast<const float*>(dy), dy_stride,
                   static_cast<const float*>(x), x_stride, tokens, threads);
    }
    return run(csr, static_cast<bf16*>(dvalues), static_cast<const bf16*>(dy), dy_stride, static_cast<const bf16*>(x),
               x_stride, tokens, threads);
}

std::string sddmm_describe(const Plan&, int64_t, int) { return "plain loops over the row-major pattern"; }

}  // namespace vspdf
