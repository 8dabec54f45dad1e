// SpMM as machine code written for one pattern (AVX-512).
//
// A panel is at most 31 rows of the weight, their sums of 16 tokens held in 31 registers; the last register holds one
// line of x (a feature of 16 tokens). The code of a panel loads each line that any of its rows needs and then does one
// `vfmadd231ps sum, line, [value]{1to16}` per kept weight: 7 bytes, no index, no branch. Panels are chained over one
// block of features, so that the lines of a token slice stay in the first-level cache while the chain's code does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "assembler.hpp"
#include "plan.hpp"

namespace vspdf {

struct SpmmProgram {
    // x: the slice's line of the block's first feature; values: the piece's; y: the chain's sums, [rows][16].
    // The piece of the first block overwrites y, later ones add to it.
    using Piece = void (*)(const float* x, const float* values, float* y);

    CodeBuffer code;  // no entry: refused, and nothing else is set
    int block = 0;    // features in a block
    int blocks = 0;
    int widest = 0;               // rows of the longest chain
    std::vector<int> row;         // chain c computes rows [row[c], row[c + 1])
    std::vector<size_t> at;       // piece c * blocks + b begins here in the code; one more entry ends the last
    std::vector<uint32_t> value;  // and here in the packed values, which are in the order the code reads them

    int chains() const { return int(row.size()) - 1; }
    Piece piece(size_t i) const { return reinterpret_cast<Piece>(reinterpret_cast<uintptr_t>(code.entry() + at[i])); }
    size_t nbytes() const {
        return code.nbytes() + row.size() * sizeof(int) + at.size() * sizeof(size_t) + value.size() * sizeof(uint32_t);
    }

    // Fills `source` with the place in `csr` of each packed value. On refusal `why` says what failed.
    static SpmmProgram build(const Csr& csr, std::vector<uint32_t>& source, std::string& why);
};

}  // namespace vspdf
