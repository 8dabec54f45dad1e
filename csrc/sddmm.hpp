// The gradient of the kept weights: dvalues[i] = sum over tokens of dy[t, row(i)] x[t, col(i)].
#pragma once

#include "plan.hpp"

namespace vspdf {

// The kept weights in one rectangle of the weight, row after row in the order of `rows`, in groups of as many as a
// vector has lanes.
struct SddmmTile {
    uint32_t group, groups;  // the first, and how many
    uint32_t segment;        // the first
};

// Where the sums of one row's kept weights lie among those of their tile.
struct SddmmRun {
    uint32_t first : 20;
    uint32_t length : 12;
};

// What the gradient product knows of a pattern: its kept weights by tiles, so that the packed tokens of a tile's
// columns stay in the first-level cache while its rows pass.
class SddmmPart {
  public:
    explicit SddmmPart(const Plan& plan);
    size_t nbytes() const;

    int tile_rows, tile_cols;  // of a tile; the last ones may be smaller
    int row_tiles, col_tiles;
    std::vector<SddmmTile> tiles;  // [row_tiles][col_tiles]
    std::vector<uint8_t> cols;     // [group][lane]: column inside the tile
    std::vector<uint16_t> starts;  // [group]: bit i is set where weight i is the first of its row in the group
    std::vector<uint16_t> rows;    // one for every such bit: row inside the tile
    std::vector<SddmmRun> runs;    // [out_features][col_tiles]
};

int64_t sddmm(const Plan& plan, const Lazy<SddmmPart>& part, void* dvalues, const void* dy, int64_t dy_stride,
              const void* x, int64_t x_stride, int64_t tokens, Dtype dtype, Dtype values_dtype, int threads);
std::string sddmm_describe(const Plan& plan, int64_t tokens);

}  // namespace vspdf
