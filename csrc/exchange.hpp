// Masks that move: which weights go, which positions come, and where the others are afterwards.
#pragma once

#include <cstdint>
#include <vector>

namespace vspdf {

// Clears the positions of the `count` smallest magnitudes among `values`, which are those of the kept positions in
// order; of equal ones the first. NaN counts as the largest.
void drop_lowest(uint8_t* bits, int64_t numel, const float* values, int64_t nnz, int64_t count, int threads);

// Goes through `hits` in order and sets the bit of each that is not taken yet, until there are `limit`; returns how
// many.
int64_t accept(uint8_t* taken, const int64_t* hits, int64_t n, int64_t limit);

// Takes vectors over the kept weights of one mask to ones over those of another: zeros where there was none. Their four
// bytes a weight are moved as they are, floats or not.
void moved(const std::vector<float*>& out, const std::vector<const float*>& values, const uint8_t* old_bits,
           const uint8_t* new_bits, int64_t numel, int64_t old_nnz, int64_t new_nnz, int threads);

}  // namespace vspdf
