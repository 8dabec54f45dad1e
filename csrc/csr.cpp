#include "csr.hpp"

#include <limits>
#include <stdexcept>

namespace vspdf {

Csr transpose(const Csr& csr) {
    Csr result;
    result.rows = csr.cols;
    result.cols = csr.rows;
    result.start.assign(size_t(csr.cols) + 1, 0);
    result.col.resize(csr.col.size());
    for (uint32_t col : csr.col) ++result.start[col + 1];
    for (int row = 0; row < csr.cols; ++row) result.start[row + 1] += result.start[row];
    std::vector<uint32_t> next(result.start.begin(), result.start.end() - 1);
    for (int row = 0; row < csr.rows; ++row) {
        for (uint32_t i = csr.start[row]; i < csr.start[row + 1]; ++i) result.col[next[csr.col[i]]++] = uint32_t(row);
    }
    return result;
}

RowBlocks::RowBlocks(const Csr& csr, int block_cols)
    : rows(csr.rows), cols(csr.cols), block(block_cols), blocks((csr.cols + block_cols - 1) / block_cols) {
    if (block - 1 > std::numeric_limits<uint16_t>::max()) throw std::logic_error("a column fits 16 bits.");
    edge.resize(size_t(blocks + 1) * rows);
    col.resize(csr.col.size());
    for (int r = 0; r < rows; ++r) {
        uint32_t i = csr.start[r];
        const uint32_t end = csr.start[r + 1];
        for (int b = 0; b < blocks; ++b) {
            const uint32_t first = uint32_t(b) * uint32_t(block);
            edge[size_t(b) * rows + r] = i;
            for (; i < end && csr.col[i] - first < uint32_t(block); ++i) col[i] = uint16_t(csr.col[i] - first);
        }
        edge[size_t(blocks) * rows + r] = end;
    }
}

SortedBlocks::SortedBlocks(const Csr& csr, int block_cols)
    : rows(csr.rows),
      cols(csr.cols),
      block(block_cols),
      blocks((csr.cols + block_cols - 1) / block_cols),
      bands((csr.rows + kBand - 1) / kBand) {
    if (block > std::numeric_limits<uint8_t>::max()) throw std::logic_error("a row's weights in a block fit a byte.");
    start.reserve(size_t(bands) * blocks + 1);
    order.reserve(size_t(rows) * blocks);
    count.reserve(size_t(rows) * blocks);
    col.reserve(csr.col.size());
    std::vector<uint32_t> next(csr.start.begin(), csr.start.end() - 1), end(next), place(size_t(block) + 2);
    std::vector<uint8_t> sorted(kBand);
    for (int band = 0; band < bands; ++band) {
        const int row0 = band * kBand, n = band_rows(band);
        for (int b = 0; b < blocks; ++b) {
            const uint32_t first = uint32_t(b) * uint32_t(block);
            std::fill(place.begin(), place.end(), 0);
            for (int r = row0; r < row0 + n; ++r) {
                while (end[r] < csr.start[r + 1] && csr.col[end[r]] - first < uint32_t(block)) ++end[r];
                ++place[size_t(block) - (end[r] - next[r]) + 1];
            }
            for (int i = 0; i <= block; ++i) place[i + 1] += place[i];
            for (int r = row0; r < row0 + n; ++r)
                sorted[place[size_t(block) - (end[r] - next[r])]++] = uint8_t(r - row0);
            start.push_back(uint32_t(col.size()));
            for (int i = 0; i < n; ++i) {
                const int r = row0 + sorted[i];
                order.push_back(sorted[i]);
                count.push_back(uint8_t(end[r] - next[r]));
                for (; next[r] < end[r]; ++next[r]) col.push_back(uint8_t(csr.col[next[r]] - first));
            }
        }
    }
    start.push_back(uint32_t(col.size()));
}

}  // namespace vspdf
