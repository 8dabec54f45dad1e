#include "exchange.hpp"

#include <cstring>
#include <vector>

namespace vspdf {
namespace {

uint32_t magnitude(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;  // ordered as magnitudes are
}

// Bin of the one that has `rank` others before it; `rank` becomes that within the bin.
uint32_t bin_of(const std::vector<uint32_t>& counts, int64_t& rank) {
    uint32_t bin = 0;
    while (rank >= counts[bin]) rank -= counts[bin++];
    return bin;
}

uint64_t word_at(const uint8_t* bits, int64_t byte, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, bits + byte, size_t(bytes - byte < 8 ? bytes - byte : 8));
    return word;
}

}  // namespace

void drop_lowest(uint8_t* bits, int64_t numel, const float* values, int64_t nnz, int64_t count) {
    if (count <= 0) return;
    // The magnitude of the last to go, upper half first; `rank`: how many of exactly that go before it.
    std::vector<uint32_t> counts(1 << 16, 0);
    for (int64_t i = 0; i < nnz; ++i) ++counts[magnitude(values[i]) >> 16];
    int64_t rank = count - 1;
    const uint32_t upper = bin_of(counts, rank);
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t i = 0; i < nnz; ++i) {
        const uint32_t m = magnitude(values[i]);
        if (m >> 16 == upper) ++counts[m & 0xFFFF];
    }
    const uint32_t edge = upper << 16 | bin_of(counts, rank);
    int64_t equal = rank + 1;
    const int64_t bytes = (numel + 7) / 8;
    for (int64_t byte = 0; byte < bytes; byte += 8) {
        uint64_t word = word_at(bits, byte, bytes), gone = 0;
        for (uint64_t left = word; left; left &= left - 1) {
            const uint32_t m = magnitude(*values++);
            uint64_t goes = m < edge;
            if (m == edge) goes = equal-- > 0;  // seldom: the other is no branch
            gone |= goes << __builtin_ctzll(left);
        }
        word &= ~gone;
        std::memcpy(bits + byte, &word, size_t(bytes - byte < 8 ? bytes - byte : 8));
    }
}

int64_t accept(uint8_t* taken, uint8_t* bits, const int64_t* hits, int64_t n, int64_t limit) {
    int64_t found = 0;
    for (int64_t i = 0; i < n && found < limit; ++i) {
        const int64_t byte = hits[i] / 8;
        const unsigned bit = 1u << hits[i] % 8, is_free = ~unsigned(taken[byte]) & bit;
        taken[byte] |= uint8_t(is_free);
        bits[byte] |= uint8_t(is_free);
        found += is_free != 0;
    }
    return found;
}

void places(int32_t* from, const uint8_t* old_bits, const uint8_t* new_bits, int64_t numel) {
    const int64_t bytes = (numel + 7) / 8;
    int32_t i = 0;
    for (int64_t byte = 0; byte < bytes; byte += 8) {
        const uint64_t old_word = word_at(old_bits, byte, bytes), new_word = word_at(new_bits, byte, bytes);
        int32_t found[65];  // every position is written, and kept if it is new: random bits foretell no branch
        int n = 0;
        for (uint64_t left = old_word | new_word; left; left &= left - 1) {
            const int at = __builtin_ctzll(left);
            const int was = old_word >> at & 1, is = new_word >> at & 1;
            found[n] = i | (was - 1);  // -1 where it was not
            n += is;
            i += was;
        }
        std::memcpy(from, found, size_t(n) * sizeof *from);
        from += n;
    }
}

void moved(float* out, const float* values, const int32_t* from, int64_t n) {
    const float zero = 0;
    if (!values) values = &zero;       // no weights before: all are new
    for (int64_t j = 0; j < n; ++j) {  // masks for branches here too
        const int32_t none = from[j] >> 31;
        int32_t word;
        std::memcpy(&word, values + (from[j] & ~none), sizeof word);
        word &= ~none;
        std::memcpy(out + j, &word, sizeof word);
    }
}

}  // namespace vspdf
