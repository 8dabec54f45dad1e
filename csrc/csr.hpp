// Kept positions of a weight W[rows, cols], in the forms that plans are made from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace vspdf {

// A row-major mask of `numel` positions, eight to a byte, the lowest bit first. The caller owns the memory.
struct Bits {
    const uint8_t* data;
    int64_t numel;

    // fn(position) for every kept position in [first, last), ascending.
    template <class Fn>
    void each(int64_t first, int64_t last, const Fn& fn) const {
        for (int64_t at = first; at < last;) {
            const int shift = int(at % 8), count = int(std::min<int64_t>(64 - shift, last - at));
            uint64_t word = load(at / 8) >> shift;
            if (count < 64) word &= (uint64_t(1) << count) - 1;
            for (; word; word &= word - 1) fn(at + __builtin_ctzll(word));
            at += count;
        }
    }

    // Kept positions in [first, last): up to a whole byte, by whole words, and the rest.
    int64_t count(int64_t first, int64_t last) const {
        int64_t kept = 0, at = first;
        const auto some = [&](int64_t count) {
            kept += __builtin_popcountll(word(at, int(count)));
            at += count;
        };
        if (at % 8) some(std::min(last, at / 8 * 8 + 8) - at);
        for (; last - at >= 64; at += 64) {
            uint64_t whole;
            std::memcpy(&whole, data + at / 8, 8);
            kept += __builtin_popcountll(whole);
        }
        while (at < last) some(std::min<int64_t>(last - at, 32));
        return kept;
    }

    // The next `count` positions, at most 57, the first in the lowest bit.
    uint64_t word(int64_t at, int count) const { return load(at / 8) >> at % 8 & ((uint64_t(1) << count) - 1); }

    // The positions of a byte and the seven after it; none behind the last.
    uint64_t load(int64_t byte) const {
        uint64_t word = 0;
        const int64_t end = (numel + 7) / 8;
        if (byte + 8 <= end) {
            std::memcpy(&word, data + byte, 8);  // little-endian machines only, as all that PyTorch runs on
        } else {
            for (int64_t i = byte; i < end; ++i) word |= uint64_t(data[i]) << 8 * (i - byte);
        }
        return word;
    }
};

// Compressed rows, columns ascending in each: what parts of a plan are built from, and then forgotten.
struct Csr {
    int rows = 0;
    int cols = 0;
    std::vector<uint32_t> start;  // rows + 1
    std::vector<uint32_t> col;    // nnz

    int64_t nnz() const { return int64_t(col.size()); }
    double density() const { return double(nnz()) / rows / cols; }
};

Csr transpose(const Csr& csr);

// The kept weights of each row, cut into blocks of columns; a column is counted from the first of its block. Their
// order is row-major.
struct RowBlocks {
    RowBlocks(const Csr& csr, int block_cols);

    int rows, cols;
    int block, blocks;           // columns in a block, and how many
    std::vector<uint32_t> edge;  // block b of row r is [edge[b * rows + r], edge[(b + 1) * rows + r]) of the weights
    std::vector<uint16_t> col;   // nnz

    const uint32_t* lo(int b) const { return edge.data() + int64_t(b) * rows; }
    const uint32_t* hi(int b) const { return lo(b + 1); }
    size_t nbytes() const { return edge.size() * sizeof(uint32_t) + col.size() * sizeof(uint16_t); }
};

// The same in the order in which loops over many tokens read it: by bands of rows, then by blocks of columns, then by
// rows, those with most weights first, so that the processor foresees how long the next one is.
struct SortedBlocks {
    static constexpr int kBand = 256;  // rows

    SortedBlocks(const Csr& csr, int block_cols);

    int rows, cols;
    int block, blocks, bands;
    std::vector<uint32_t> start;  // [band][block]: its first weight; one more entry ends the last
    std::vector<uint8_t> order;   // [band][block][i]: the i-th row, inside the band
    std::vector<uint8_t> count;   // [band][block][i]: its weights
    std::vector<uint8_t> col;     // nnz: column inside the block

    int band_rows(int band) const { return std::min(rows - band * kBand, kBand); }
    // Where a block's rows begin in `order` and `count`.
    size_t at(int band, int b) const { return size_t(band) * kBand * blocks + size_t(b) * band_rows(band); }
    uint32_t first(int band, int b) const { return start[size_t(band) * blocks + b]; }
    size_t nbytes() const { return start.size() * sizeof(uint32_t) + order.size() + count.size() + col.size(); }
};

}  // namespace vspdf
