// The gradient of the kept weights: dvalues[i] = sum over tokens of dy[t, row(i)] x[t, col(i)].
#pragma once

#include "plan.hpp"

namespace vspdf {

// What the gradient product knows of a pattern.
class SddmmPart {
  public:
    explicit SddmmPart(const Plan&) {}
    size_t nbytes() const { return 0; }
};

int64_t sddmm(const SddmmPart& part, const Csr& csr, void* dvalues, const void* dy, int64_t dy_stride, const void* x,
              int64_t x_stride, int64_t tokens, Dtype dtype, int threads);
std::string sddmm_describe(const Plan& plan, int64_t tokens, int threads);

}  // namespace vspdf
