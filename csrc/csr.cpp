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

template <class Column>
RowBlocks<Column>::RowBlocks(const Csr& csr, int block_cols)
    : rows(csr.rows), cols(csr.cols), block(block_cols), blocks((csr.cols + block_cols - 1) / block_cols) {
    if (block - 1 > std::numeric_limits<Column>::max())
        throw std::logic_error("a block's columns must fit their type.");
    edge.resize(size_t(blocks + 1) * rows);
    col.resize(csr.col.size());
    for (int r = 0; r < rows; ++r) {
        uint32_t i = csr.start[r];
        const uint32_t end = csr.start[r + 1];
        for (int b = 0; b < blocks; ++b) {
            const uint32_t first = uint32_t(b) * uint32_t(block);
            edge[size_t(b) * rows + r] = i;
            for (; i < end && csr.col[i] - first < uint32_t(block); ++i) col[i] = Column(csr.col[i] - first);
        }
        edge[size_t(blocks) * rows + r] = end;
    }
}

template struct RowBlocks<uint8_t>;
template struct RowBlocks<uint16_t>;

}  // namespace vspdf
