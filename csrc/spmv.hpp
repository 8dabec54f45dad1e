// SpMV by the bits of the mask: y = x W^T for a few tokens, as generation asks for.
//
// Few tokens are bound by the bytes of the weights. A kept weight costs its value and a bit for every position, kept or
// not; no plan is read beside them. bfloat16 values are read as such. Only where a row begins at a whole byte.
#pragma once

#include <cstdint>

#include "bf16.hpp"

namespace vspdf {

constexpr int kSpmvTokens = 4;

// Rows [row0, row1) of y[tokens][rows]; `values` in row-major order, `end` behind the last, `start` of each row's.
template <class Value>
struct Spmv {
    float* y;
    int64_t rows;
    const float* x;  // [tokens][cols]
    int cols, tokens;
    bool finite;  // all of x
    const Value *values, *end;
    const uint32_t* start;
    const uint8_t* bits;
};

#if defined(__x86_64__)
void spmv_avx512(const Spmv<float>& work, int row0, int row1);
void spmv_avx512(const Spmv<bf16>& work, int row0, int row1);
#endif

}  // namespace vspdf
