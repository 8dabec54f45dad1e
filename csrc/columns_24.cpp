#include "columns_24.hpp"

#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "parallel.hpp"

namespace vspdf {
namespace {

struct Column {
    uint64_t low = 0, high = 0;  // a bit per row of the panel
};

uint64_t ones(uint64_t word) { return uint64_t(__builtin_popcountll(word)); }

// Kept weights beyond two, over 64 rows of a group of four columns: a row of three has one, a row of four has two.
int excess(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    const uint64_t ab = a & b, cd = c & d;
    return int(ones((ab & (c | d)) | (cd & (a | b))) + ones(ab & cd));
}

struct Random {  // splitmix64: Steele, Lea, Flood 2014
    uint64_t state;
    uint64_t operator()() {
        uint64_t z = (state += 0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t n) { return uint32_t(((*this)() >> 32) * n >> 32); }
};

class Panel {
  public:
    Panel(int32_t* order, std::vector<Column> columns, uint64_t seed)
        : order_(order), columns_(std::move(columns)), random_{seed}, groups_(uint32_t(columns_.size() / 4)) {
        cost_.resize(groups_);
        position_.assign(groups_, -1);
        for (uint32_t g = 0; g < groups_; ++g) update(g, cost_of(g));
    }

    int64_t anneal(int64_t proposals) {
        if (groups_ < 2) return total_;
        const double hot = 0.6, cold = 0.12;
        uint64_t accept[8];  // by rise in cost: chance of a step up, of 2^32
        for (int64_t i = 0; i < proposals && total_; ++i) {
            if (i % 4096 == 0) {
                const double temperature = hot * std::pow(cold / hot, double(i) / double(proposals));
                for (int rise = 0; rise < 8; ++rise)
                    accept[rise] = uint64_t(4294967296.0 * std::exp(-rise / temperature));
            }
            // One side is a group that has too many: the others have nothing to gain.
            const uint32_t bad = bad_[random_.below(uint32_t(bad_.size()))];
            uint32_t other = random_.below(groups_ - 1);
            other += other >= bad;
            const uint32_t draw = uint32_t(random_() >> 60), a = bad * 4 + (draw & 3), b = other * 4 + (draw >> 2);
            std::swap(columns_[a], columns_[b]);
            const int cost_bad = cost_of(bad), cost_other = cost_of(other);
            const int rise = cost_bad + cost_other - cost_[bad] - cost_[other];
            if (rise <= 0 || (rise < 8 && (random_() >> 32) < accept[rise])) {
                std::swap(order_[a], order_[b]);
                update(bad, cost_bad);
                update(other, cost_other);
            } else {
                std::swap(columns_[a], columns_[b]);
            }
        }
        return total_;
    }

  private:
    int cost_of(uint32_t g) const {
        const Column* c = &columns_[g * 4];
        return excess(c[0].low, c[1].low, c[2].low, c[3].low) + excess(c[0].high, c[1].high, c[2].high, c[3].high);
    }

    void update(uint32_t g, int cost) {
        total_ += cost - cost_[g];
        cost_[g] = cost;
        if (cost && position_[g] < 0) {
            position_[g] = int32_t(bad_.size());
            bad_.push_back(g);
        } else if (!cost && position_[g] >= 0) {
            position_[bad_.back()] = position_[g];
            bad_[size_t(position_[g])] = bad_.back();
            bad_.pop_back();
            position_[g] = -1;
        }
    }

    int32_t* order_;
    std::vector<Column> columns_;
    Random random_;
    uint32_t groups_;
    int64_t total_ = 0;
    std::vector<int> cost_;
    std::vector<uint32_t> bad_;      // groups that cost anything
    std::vector<int32_t> position_;  // of each group in `bad_`, or -1
};

}  // namespace

int64_t columns_24(int32_t* order, const uint8_t* mask, int64_t rows, int64_t columns, uint64_t seed, int64_t proposals,
                   int threads) {
    const int64_t width = (columns + 3) / 4 * 4, panels = (rows + kRows24 - 1) / kRows24;
    std::atomic<int64_t> rest{0};
    parallel_for(panels, threads, [&](int64_t p) {
        std::vector<Column> bits(static_cast<size_t>(width));
        for (int64_t r = p * kRows24; r < std::min(rows, (p + 1) * kRows24); ++r) {
            const int64_t bit = r - p * kRows24;
            for (int64_t k = 0; k < columns; ++k) {
                Column& column = bits[size_t(k)];
                (bit < 64 ? column.low : column.high) |= uint64_t(mask[r * columns + k]) << (bit % 64);
            }
        }
        int32_t* here = order + p * width;
        std::iota(here, here + width, 0);
        rest += Panel(here, std::move(bits), seed * 0x9E3779B97F4A7C15 + uint64_t(p)).anneal(proposals);
    });
    return rest;
}

}  // namespace vspdf
