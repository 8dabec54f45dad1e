// SpMM as machine code written for one pattern (AVX-512 or AVX2).
//
// A panel is a few rows of the weight, their sums of 16 tokens held in registers. The code of a panel loads each line
// of x (a feature of 16 tokens) that any of its rows needs and multiplies it by every kept weight of that feature: no
// index, no branch. Panels are chained over one block of features, so that the lines of a token slice stay in the
// first-level cache while the chain's code does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "assembler.hpp"
#include "csr.hpp"
#include "isa.hpp"

namespace vspdf {

class SpmmProgram {
  public:
    // x: the slice's line of the block's first feature; values: the piece's; y: the chain's sums, [rows][16].
    // The piece of the first block overwrites y, later ones add to it.
    using Piece = void (*)(const float* x, const float* values, float* y);

    // Of a weight W[out_features, in_features]; `transposed`: the product's rows are its columns. On refusal `why` says
    // what failed and `made()` is false.
    SpmmProgram(const Bits& bits, int out_features, int in_features, bool transposed, Isa isa, std::string& why);

    bool made() const { return code_.entry(); }
    int rows() const { return rows_; }
    int cols() const { return cols_; }
    int block() const { return block_; }  // features in a block
    int blocks() const { return blocks_; }
    int chains() const { return int(row_.size()) - 1; }
    int row(int chain) const { return row_[chain]; }  // chain c computes rows [row(c), row(c + 1))
    int widest() const { return widest_; }            // rows of the longest chain
    // Piece c * blocks + b is that of chain c and block b.
    Piece piece(size_t i) const { return reinterpret_cast<Piece>(reinterpret_cast<uintptr_t>(code_.entry() + at_[i])); }
    const char* code(size_t piece) const { return reinterpret_cast<const char*>(code_.entry() + at_[piece]); }
    size_t code_bytes() const { return at_.back(); }
    int64_t nnz() const { return value_.back(); }
    uint32_t value(size_t piece) const {
        return value_[piece];
    }  // where its values begin; one more entry ends the last
    size_t nbytes() const;

    // out[i] = values in the order the code reads them; `bits` and `start` are the weight's: where its rows begin.
    template <class T>
    void refresh(float* out, const T* values, const Bits& bits, const uint32_t* start, int threads) const;

  private:
    template <class Writer>
    void write(const Bits& bits, std::string& why);
    void panel_masks(const Bits& bits, int row, int end, uint32_t* masks) const;
    int panel_row(int panel) const { return int(int64_t(panel) * rows_ / panels_); }
    int chain_panel(int chain) const { return int(int64_t(chain) * panels_ / chains()); }
    template <class T>
    void refresh_rows(float* out, const T* values, const uint32_t* start, int chain) const;
    template <int Run, class T>
    void refresh_runs(float* out, const T* values, const Bits& bits, const uint32_t* start, int first_chain,
                      int last_chain) const;

    int rows_, cols_;
    bool transposed_;
    int panels_ = 0, block_ = 0, blocks_ = 0, widest_ = 0;
    CodeBuffer code_;
    std::vector<int> row_;
    std::vector<size_t> at_;  // where each piece begins in the code; one more entry ends the last
    std::vector<uint32_t> value_;
    // The order of the values, in that of the code (chain, block, panel, feature, row). Of W itself a row's values come
    // as they are stored: the row in the panel of each value, in five bits, says which is next. Of the transpose, a
    // feature is a row of W, whose values for one panel are neighbours: the weight's bits say how many.
    std::vector<uint8_t> order_;
    std::vector<uint32_t> segment_;  // where each panel's part of each piece begins; only if not transposed
};

}  // namespace vspdf
