#include "exchange.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "csr.hpp"
#include "parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vspdf {
namespace {

uint32_t magnitude(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;  // ordered as magnitudes are
}

// Spans of whole words of a mask, one a thread: [edge(i), edge(i + 1)) in bytes.
struct Spans {
    int64_t numel, bytes, count, words;

    Spans(int64_t numel, int threads) : numel(numel), bytes((numel + 7) / 8), words((bytes + 7) / 8) {
        count = std::clamp<int64_t>(words / kLeast, 1, threads);
    }
    int64_t edge(int64_t i) const { return std::min(bytes, words * i / count * 8); }
    // Kept positions before each span.
    std::vector<int64_t> starts(const uint8_t* bits) const {
        std::vector<int64_t> found(size_t(count), 0);
        for (int64_t i = 0; i + 1 < count; ++i) {
            found[size_t(i) + 1] = found[size_t(i)] + Bits{bits, numel}.count(8 * edge(i), 8 * edge(i + 1));
        }
        return found;
    }

    static constexpr int64_t kLeast = 1024;  // words that pay for a thread
};

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

// Magnitudes are told apart by 12 bits, by 12 more, by the last 7; each time those of one bin stay.
constexpr int kShifts[] = {19, 7, 0};

// Bin of the one that has `rank` others before it; `rank` becomes that within the bin. `size(bin)`: how many it has.
template <class Size>
uint32_t bin_of(int64_t& rank, const Size& size) {
    uint32_t bin = 0;
    for (int64_t here = size(0); rank >= here; here = size(++bin)) rank -= here;
    return bin;
}

// The magnitude of which `rank` others are smaller or come before it, among equal ones; `equal`: how many of exactly
// that go, it included, or kAll.
uint32_t edge_of(const float* values, int64_t nnz, int64_t rank, int64_t& equal, int threads) {
    constexpr int kBins = 1 << (31 - kShifts[0]), kLanes = 4;  // neighbours count apart, or they wait for each other
    const int64_t parts = std::clamp<int64_t>(nnz >> 15, 1, threads);
    std::vector<std::vector<uint32_t>> counts(size_t(parts), std::vector<uint32_t>(kBins * kLanes));
    const auto first = [&](int64_t part) { return nnz * part / parts; };
    parallel_for(parts, threads, [&](int64_t part) {
        uint32_t* mine = counts[size_t(part)].data();
        const int64_t end = first(part + 1);
        for (int64_t i = first(part); i < end; ++i) {
            ++mine[(magnitude(values[i]) >> kShifts[0]) * kLanes + i % kLanes];
        }
    });
    const auto in_bin = [&](uint32_t bin, int64_t part) {
        const uint32_t* lane = counts[size_t(part)].data() + size_t(bin) * kLanes;
        return int64_t(lane[0]) + lane[1] + lane[2] + lane[3];
    };
    const uint32_t upper = bin_of(rank, [&](uint32_t bin) {
        int64_t all = 0;
        for (int64_t part = 0; part < parts; ++part) all += in_bin(bin, part);
        return all;
    });
    std::vector<int64_t> at(size_t(parts) + 1, 0);  // a place behind each part's, for those of other bins
    for (int64_t part = 0; part < parts; ++part) at[size_t(part) + 1] = at[size_t(part)] + in_bin(upper, part) + 1;
    std::vector<uint32_t> near(size_t(at.back()));
    parallel_for(parts, threads, [&](int64_t part) {
        uint32_t* out = near.data() + at[size_t(part)];
        const int64_t end = first(part + 1);
        for (int64_t i = first(part); i < end; ++i) {
            const uint32_t m = magnitude(values[i]);
            *out = m;
            out += m >> kShifts[0] == upper;  // random, so no branch
        }
        *out = UINT32_MAX;  // in no bin
    });
    uint32_t edge = upper;
    for (int level = 1; level < 3; ++level) {
        const int shift = kShifts[level], bits = kShifts[level - 1] - shift;
        std::vector<uint32_t> sizes(size_t(1) << bits);
        for (uint32_t m : near) sizes[m >> shift & (sizes.size() - 1)] += m >> kShifts[level - 1] == edge;
        edge = edge << bits | bin_of(rank, [&](uint32_t bin) { return int64_t(sizes[bin]); });
        near.erase(std::remove_if(near.begin(), near.end(), [&](uint32_t m) { return m >> shift != edge; }),
                   near.end());
    }
    equal = rank + 1 < int64_t(near.size()) ? rank + 1 : kAll;
    return edge;
}

// Which kept positions of a word go: those of magnitudes below the edge, and of equal ones the first `equal`.
uint64_t going(uint64_t word, const float* values, uint32_t edge, int64_t& equal) {
    uint64_t gone = 0;
    for (; word; word &= word - 1) {
        const uint32_t m = magnitude(*values++);
        uint64_t goes = m < edge;
        if (m == edge) goes = equal-- > 0;  // seldom: the other is no branch
        gone |= goes << __builtin_ctzll(word);
    }
    return gone;
}

#if defined(__x86_64__)
#define VSPDF_X86_VECTORS 1
bool has_vectors() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }

// The same eight values at a time; may read 64 values from the first. `tie`: one is equal to the edge.
__attribute__((target("avx2,bmi2"))) uint64_t going_in_vectors(uint64_t word, int count, const float* values,
                                                               uint32_t edge, bool& tie) {
    const __m256i most = _mm256_set1_epi32(0x7FFFFFFF), limit = _mm256_set1_epi32(int32_t(edge));
    uint64_t less = 0, same = 0;
    for (int i = 0; i < count; i += 8) {
        const __m256i m = _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(values + i)), most);
        less |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, m))))) << i;
        same |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(limit, m))))) << i;
    }
    tie = _pdep_u64(same, word) != 0;
    return _pdep_u64(less, word);
}
#endif

void drop_span(uint8_t* bits, int64_t numel, int64_t first, int64_t last, const float* values, const float* end,
               uint32_t edge, int64_t equal) {
#if defined(VSPDF_X86_VECTORS)
    static const bool vectors = has_vectors();
#endif
    for (int64_t byte = first; byte < last; byte += 8) {
        uint64_t word = Bits{bits, numel}.load(byte), gone = 0;
        const int count = __builtin_popcountll(word);
        bool one_by_one = true;
#if defined(VSPDF_X86_VECTORS)
        if (vectors && end - values >= 64) gone = going_in_vectors(word, count, values, edge, one_by_one);
#endif
        if (one_by_one) gone = going(word, values, edge, equal);
        values += count;
        word &= ~gone;
        if (last - byte >= 8) {
            std::memcpy(bits + byte, &word, 8);
        } else {
            std::memcpy(bits + byte, &word, size_t(last - byte));
        }
    }
    (void)end;
}

}  // namespace

void drop_lowest(uint8_t* bits, int64_t numel, const float* values, int64_t nnz, int64_t count, int threads) {
    if (count <= 0) return;
    int64_t equal = 0;
    const uint32_t edge = edge_of(values, nnz, count - 1, equal, threads);
    // Where each span's values begin, and how many of those equal to the edge go from it on.
    const Spans spans(numel, threads);
    const std::vector<int64_t> start = spans.starts(bits);
    std::vector<int64_t> left(size_t(spans.count), equal);
    for (int64_t i = 1; equal != kAll && i < spans.count; ++i) {
        const float *from = values + start[size_t(i) - 1], *to = values + start[size_t(i)];
        left[size_t(i)] =
            left[size_t(i) - 1] - std::count_if(from, to, [&](float value) { return magnitude(value) == edge; });
    }
    parallel_for(spans.count, threads, [&](int64_t i) {
        drop_span(bits, numel, spans.edge(i), spans.edge(i + 1), values + start[size_t(i)], values + nnz, edge,
                  left[size_t(i)]);
    });
}

int64_t accept(uint8_t* taken, const int64_t* hits, int64_t n, int64_t limit) {
    int64_t found = 0;
    for (int64_t i = 0; i < n && found < limit; ++i) {
        uint8_t& byte = taken[hits[i] / 8];
        const unsigned bit = 1u << hits[i] % 8;
        found += !(byte & bit);
        byte |= uint8_t(bit);
    }
    return found;
}

namespace {

// One span of vectors from the old mask's places to the new one's, byte by byte of the masks.
struct Mover {
    const std::vector<float*>& out;
    const std::vector<const float*>& values;
    int64_t to, from;          // the next place in all of them
    int64_t to_end, from_end;  // of the span; of all values

    void bits(unsigned was, unsigned is) {
        for (unsigned left = was | is; left; left &= left - 1) {
            const unsigned bit = left & -left;
            if (is & bit) {
                for (size_t k = 0; k < out.size(); ++k) out[k][to] = was & bit ? values[k][from] : 0.0f;
                ++to;
            }
            from += (was & bit) != 0;
        }
    }
};

#if defined(VSPDF_X86_VECTORS)
// By eight bits of a mask: where each kept lane lies among the kept ones, and which lanes those are.
struct Lanes {
    uint8_t among[256][8], kept[256][8];

    Lanes() {
        for (int mask = 0; mask < 256; ++mask) {
            int n = 0;
            for (int lane = 0; lane < 8; ++lane) {
                among[mask][lane] = uint8_t(n);
                kept[mask][n] = uint8_t(lane);
                n += mask >> lane & 1;
            }
            for (; n < 8; ++n) kept[mask][n] = 0;
        }
    }
};

// Eight positions at a time as long as whole vectors may be read and written; returns the first byte that is left.
__attribute__((target("avx2,bmi2"))) int64_t move_in_vectors(Mover& mover, const uint8_t* old_bits,
                                                             const uint8_t* new_bits, int64_t byte, int64_t last) {
    static const Lanes lanes;
    const auto indices = [](const uint8_t* eight) __attribute__((target("avx2,bmi2"))) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
    };
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    float* const* out = mover.out.data();
    const float* const* values = mover.values.data();
    const size_t count = mover.out.size();
    int64_t to = mover.to, from = mover.from;
    for (; byte < last && mover.to_end - to >= 8 && mover.from_end - from >= 8; ++byte) {
        const unsigned was = old_bits[byte], is = new_bits[byte];
        const __m256i there = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(was)), bit), bit);
        const __m256i among = indices(lanes.among[was]), kept = indices(lanes.kept[is]);
        for (size_t k = 0; k < count; ++k) {
            const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values[k] + from), among);
            const __m256 clean = _mm256_and_ps(spread, _mm256_castsi256_ps(there));
            _mm256_storeu_ps(out[k] + to, _mm256_permutevar8x32_ps(clean, kept));
        }
        to += __builtin_popcount(is);
        from += __builtin_popcount(was);
    }
    mover.to = to;
    mover.from = from;
    return byte;
}
#endif

}  // namespace

void moved(const std::vector<float*>& out, const std::vector<const float*>& values, const uint8_t* old_bits,
           const uint8_t* new_bits, int64_t numel, int64_t old_nnz, int64_t new_nnz, int threads) {
    const Spans spans(numel, threads);
    const std::vector<int64_t> was = spans.starts(old_bits);
    std::vector<int64_t> is = spans.starts(new_bits);
    is.push_back(new_nnz);
    parallel_for(spans.count, threads, [&](int64_t i) {
        Mover mover{out, values, is[size_t(i)], was[size_t(i)], is[size_t(i) + 1], old_nnz};
        int64_t byte = spans.edge(i);
        const int64_t last = spans.edge(i + 1);
#if defined(VSPDF_X86_VECTORS)
        static const bool vectors = has_vectors();
        if (vectors) byte = move_in_vectors(mover, old_bits, new_bits, byte, last);
#endif
        for (; byte < last; ++byte) mover.bits(old_bits[byte], new_bits[byte]);
    });
}

}  // namespace vspdf
