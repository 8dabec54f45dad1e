// Column orders that make a mask 2:4: at most two kept weights in every four neighbours of a row.
#pragma once

#include <cstdint>

namespace vspdf {

constexpr int kRows24 = 128;  // of a panel, which has an order of its own

// Orders the columns of each panel by simulated annealing.
//   order: out, [panels, width], width = columns rounded up to a multiple of 4. order[p][j] is the column at place j of
//          panel p; numbers from `columns` on are empty ones. It holds an order of all of them before and after.
//   mask:  [rows, columns], row-major, 0 or 1.
//   proposals: swaps tried at most, per panel. The same seed gives the same orders, whatever `threads` is.
// Returns the kept weights that do not fit, over all panels.
int64_t columns_24(int32_t* order, const uint8_t* mask, int64_t rows, int64_t columns, uint64_t seed, int64_t proposals,
                   int threads);

}  // namespace vspdf
