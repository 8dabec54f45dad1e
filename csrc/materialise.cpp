#include "materialise.hpp"

#include <algorithm>

#include "parallel.hpp"

namespace vspdf {
namespace {

constexpr int kRows = 64;  // rows a task

// `rows(first, last, value)`: positions of a span of whole rows, and the place of its first value.
template <class Rows>
void by_rows(const Plan& plan, int threads, const Rows& rows) {
    parallel_for((plan.rows() + kRows - 1) / kRows, threads, [&](int64_t task) {
        const int64_t begin = task * kRows, end = std::min<int64_t>(begin + kRows, plan.rows());
        rows(begin * plan.cols(), end * plan.cols(), plan.start()[begin]);
    });
}

template <class T>
void scatter_as(const Plan& plan, T* dense, const T* values, int threads) {
    by_rows(plan, threads, [&](int64_t first, int64_t last, uint32_t value) {
        std::fill(dense + first, dense + last, T(0));
        const T* next = values + value;
        plan.bits().each(first, last, [&](int64_t at) { dense[at] = *next++; });
    });
}

template <class T>
void gather_as(const Plan& plan, T* values, const T* dense, int threads) {
    by_rows(plan, threads, [&](int64_t first, int64_t last, uint32_t value) {
        T* next = values + value;
        plan.bits().each(first, last, [&](int64_t at) { *next++ = dense[at]; });
    });
}

}  // namespace

// Bits are moved, never converted: integers of the element's size do.
void scatter(const Plan& plan, void* dense, const void* values, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) {
        scatter_as(plan, static_cast<uint32_t*>(dense), static_cast<const uint32_t*>(values), threads);
    } else {
        scatter_as(plan, static_cast<uint16_t*>(dense), static_cast<const uint16_t*>(values), threads);
    }
}

void gather(const Plan& plan, void* values, const void* dense, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) {
        gather_as(plan, static_cast<uint32_t*>(values), static_cast<const uint32_t*>(dense), threads);
    } else {
        gather_as(plan, static_cast<uint16_t*>(values), static_cast<const uint16_t*>(dense), threads);
    }
}

}  // namespace vspdf
