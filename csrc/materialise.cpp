#include "materialise.hpp"

#include <algorithm>

#include "parallel.hpp"

namespace vspdf {
namespace {

constexpr int kRows = 64;  // rows a task

// `row(n, first, last)` for every row of the pattern and the span of its values.
template <class Row>
void by_rows(const Csr& csr, int threads, const Row& row) {
    parallel_for((csr.rows + kRows - 1) / kRows, threads, [&](int64_t task) {
        const int end = std::min<int64_t>((task + 1) * kRows, csr.rows);
        for (int n = int(task) * kRows; n < end; ++n) row(n, csr.start[n], csr.start[n + 1]);
    });
}

template <class T>
void scatter_as(const Csr& csr, T* dense, const T* values, int threads) {
    by_rows(csr, threads, [&](int n, uint32_t first, uint32_t last) {
        T* row = dense + int64_t(n) * csr.cols;
        std::fill_n(row, csr.cols, T(0));
        for (uint32_t i = first; i < last; ++i) row[csr.col[i]] = values[i];
    });
}

template <class T>
void gather_as(const Csr& csr, T* values, const T* dense, int threads) {
    by_rows(csr, threads, [&](int n, uint32_t first, uint32_t last) {
        const T* row = dense + int64_t(n) * csr.cols;
        for (uint32_t i = first; i < last; ++i) values[i] = row[csr.col[i]];
    });
}

}  // namespace

// Bits are moved, never converted: integers of the element's size do.
void scatter(const Csr& csr, void* dense, const void* values, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) {
        scatter_as(csr, static_cast<uint32_t*>(dense), static_cast<const uint32_t*>(values), threads);
    } else {
        scatter_as(csr, static_cast<uint16_t*>(dense), static_cast<const uint16_t*>(values), threads);
    }
}

void gather(const Csr& csr, void* values, const void* dense, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) {
        gather_as(csr, static_cast<uint32_t*>(values), static_cast<const uint32_t*>(dense), threads);
    } else {
        gather_as(csr, static_cast<uint16_t*>(values), static_cast<const uint16_t*>(dense), threads);
    }
}

}  // namespace vspdf
