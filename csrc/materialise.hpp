// Between kept values and the dense matrix: what the dense path of `auto` needs.
#pragma once

#include "plan.hpp"

namespace vspdf {

// dense[out, in] = values at kept positions, zero elsewhere.
void scatter(const Plan& plan, void* dense, const void* values, Dtype dtype, int threads);

// values[nnz] = dense[out, in] at kept positions.
void gather(const Plan& plan, void* values, const void* dense, Dtype dtype, int threads);

}  // namespace vspdf
