#include "spmm_jit.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bf16.hpp"
#include "parallel.hpp"

namespace vspdf {
namespace {

constexpr int kLine = 64;        // bytes of a line of x and of a row's sums
constexpr double kThin = 0.03;   // density below which a longer block pays: the sums then cost more than the lines
constexpr int kThinBlock = 512;  // features
constexpr int kBlock = 256;
constexpr int kRowBits = 5;  // of a row in a panel

// Bit j of word i becomes bit i of word j.
void transpose32(uint32_t* a) {
    uint32_t mask = 0x0000FFFF;
    for (int j = 16; j; j >>= 1, mask ^= mask << j) {
        for (int k = 0; k < 32; k = (k + j + 1) & ~j) {
            const uint32_t t = ((a[k] >> j) ^ a[k + j]) & mask;
            a[k] ^= t << j;
            a[k + j] ^= t;
        }
    }
}

// Writes numbers of rows in panels, one behind the other, eight at a time.
class RowNumbers {
  public:
    explicit RowNumbers(uint8_t* out) : out_(out) {}

    void add(unsigned row) {
        bits_ |= uint64_t(row) << filled_;
        filled_ += kRowBits;
        if (filled_ == 8 * kRowBits) flush();
    }
    void flush() {
        std::memcpy(out_, &bits_, sizeof bits_);  // what is too long is written over
        out_ += kRowBits;
        bits_ = 0;
        filled_ = 0;
    }

  private:
    uint8_t* out_;
    uint64_t bits_ = 0;
    int filled_ = 0;
};

struct NoNumbers {
    void add(unsigned) {}
};

bool any(const uint32_t* masks, int features) {
    uint32_t all = 0;
    for (int f = 0; f < features; ++f) all |= masks[f];
    return all;
}

// Writes the pieces of a program. One-byte displacements reach 128 operands down and 127 up, so that pointers start in
// the middle of what they reach and move seldom.
class Avx512Writer {
  public:
    static constexpr int kPanel = 31;  // rows, one register each; the 32nd holds the line of x
    static_assert(kPanel <= 1 << kRowBits, "a row in a panel fits its bits");
    static constexpr int kCode = 15 << 10;  // bytes of code in a piece: with its values and lines, near any core
    static double bytes(double weights, double lines, double rows) { return 7 * (weights + lines + 2 * rows); }

    // Begins a piece; returns where.
    size_t begin(int features) {
        a.align(kLine);
        const size_t at = a.size();
        sums_ = values_ = 0;
        a.add(rdi, kNear * kLine);
        if (features > 2 * kNear) a.lea(r8, {rdi, 2 * kNear * kLine});
        a.add(rsi, kNear * 4);
        a.add(rdx, kNear * kLine);
        return at;
    }

    // One panel's part of a block of features: bit r of a feature's mask says that row r has a weight there.
    // `first`: its sums begin here. `order` gets the row of every weight, in the order of the code.
    template <class Order>
    void panel(int rows, bool first, const uint32_t* masks, int features, Order& order) {
        if (sums_ + rows > 2 * kNear) {
            a.add(rdx, sums_ * kLine);
            sums_ = 0;
        }
        if (first || any(masks, features)) {
            for (int r = 0; r < rows; ++r) first ? a.zero(r) : a.load(r, sum(r));
            lines(rows, masks, features, order);
            for (int r = 0; r < rows; ++r) a.store(sum(r), r);
        }
        sums_ += rows;
    }

    void finish() {
        a.vzeroupper();
        a.ret();
    }

    Avx512Assembler a;
    uint32_t weights = 0;  // so far

    // The instructions of which nearly all code consists are encoded once, but for their displacement.
    Avx512Writer()
        : line_(coded([](auto& one) { one.load(kPanel, {rdi}); })),
          far_line_(coded([](auto& one) { one.load(kPanel, {r8}); })),
          next_values_(coded([](auto& one) { one.add(rsi, 2 * kNear * 4); })) {
        for (int r = 0; r < kPanel; ++r) {
            fma_[r] = coded([&](auto& one) { one.fma_broadcast(r, kPanel, {rsi}); });
        }
    }

  private:
    static constexpr int kNear = 128;
    static constexpr int kCoded = 7;  // bytes, the last a displacement

    template <class Write>
    static uint64_t coded(const Write& write) {
        Avx512Assembler one;
        write(one);
        return one.word();
    }

    // The lines of a panel and their multiply-adds, nearly all of the code: all that changes is in registers.
    template <class Order>
    void lines(int rows, const uint32_t* masks, int features, Order& order) {
        const size_t most = size_t(rows + 1) * features;  // and some more for the pointer
        uint8_t* out = a.room((most + most / (2 * kNear) + 2) * kCoded);
        const auto near = [&out](uint64_t code, int disp) {
            code |= uint64_t(uint8_t(disp)) << 8 * (kCoded - 1);
            std::memcpy(out, &code, sizeof code);
            out += kCoded;
        };
        Order mine = order;
        int values = values_;
        uint32_t weights = 0;
        for (int line = 0; line < features; ++line) {
            uint32_t mask = masks[line];
            if (!mask) continue;
            near(line < 2 * kNear ? line_ : far_line_, line % (2 * kNear) - kNear);
            for (; mask; mask &= mask - 1) {
                if (values == 2 * kNear) {
                    std::memcpy(out, &next_values_, sizeof next_values_);
                    out += kCoded;
                    values = 0;
                }
                const int row = __builtin_ctz(mask);
                near(fma_[row], values++ - kNear);
                mine.add(unsigned(row));
                ++weights;
            }
        }
        order = mine;
        values_ = values;
        this->weights += weights;
        a.advance(out);
    }

    static_assert(kThinBlock <= 4 * kNear, "two pointers reach a block's lines");
    Mem sum(int r) const { return {rdx, (sums_ + r - kNear) * kLine}; }

    uint64_t line_, far_line_, next_values_, fma_[kPanel];
    int values_ = 0, sums_ = 0;  // operands passed since the pointers last moved
};

// AVX2 has half the registers of half the width and no broadcast inside a multiply-add.
class Avx2Writer {
  public:
    static constexpr int kPanel = 6;  // rows of two registers; two more hold the line of x, one a value
    static constexpr int kCode = 20 << 10;
    static double bytes(double weights, double lines, double rows) { return 16 * (weights + lines + 2 * rows); }

    size_t begin(int) {
        a.align(kLine);
        const size_t at = a.size();
        sums_ = values_ = 0;
        a.add(rsi, kNear * 4);
        return at;
    }

    template <class Order>
    void panel(int rows, bool first, const uint32_t* masks, int features, Order& order) {
        if (first || any(masks, features)) {
            for (int r = 0; r < 2 * rows; ++r) first ? a.zero(r) : a.load(r, sum(r));
            for (int feature = 0; feature < features; ++feature) {
                uint32_t mask = masks[feature];
                if (!mask) continue;
                const Mem line = {rdi, int32_t(feature) * kLine};
                const bool loaded = mask & (mask - 1);  // for one weight the multiply-adds read the line themselves
                if (loaded) {
                    a.load(kX, line);
                    a.load(kX + 1, upper(line));
                }
                for (; mask; mask &= mask - 1) {
                    if (values_ == 2 * kNear) {
                        a.add(rsi, values_ * 4);
                        values_ = 0;
                    }
                    a.broadcast(kValue, {rsi, (values_++ - kNear) * 4});
                    const int row = __builtin_ctz(mask), acc = 2 * row;
                    loaded ? a.fma(acc, kValue, kX) : a.fma(acc, kValue, line);
                    loaded ? a.fma(acc + 1, kValue, kX + 1) : a.fma(acc + 1, kValue, upper(line));
                    order.add(unsigned(row));
                    ++weights;
                }
            }
            for (int r = 0; r < 2 * rows; ++r) a.store(sum(r), r);
        }
        sums_ += rows;
    }

    void finish() {
        a.vzeroupper();
        a.ret();
    }

    Avx2Assembler a;
    uint32_t weights = 0;

  private:
    static constexpr int kNear = 32;  // values that a one-byte displacement reaches
    static constexpr int kX = 2 * kPanel, kValue = kX + 2;
    static_assert(kValue < 16, "sums, a line and a value fit the registers");
    static Mem upper(Mem line) { return {line.base, line.disp + kLine / 2}; }
    Mem sum(int half) const { return {rdx, sums_ * kLine + half * kLine / 2}; }

    int values_ = 0, sums_ = 0;
};

}  // namespace

SpmmProgram::SpmmProgram(const Bits& bits, int out_features, int in_features, bool transposed, Isa isa,
                         std::string& why)
    : rows_(transposed ? in_features : out_features),
      cols_(transposed ? out_features : in_features),
      transposed_(transposed) {
    if (isa == Isa::avx512) {
        write<Avx512Writer>(bits, why);
    } else {
        write<Avx2Writer>(bits, why);
    }
}

// masks[f]: which of the product's rows from `row` to before `end`, at most 32, have a weight of feature f.
void SpmmProgram::panel_masks(const Bits& bits, int row, int end, uint32_t* masks) const {
    const int rows = end - row;
    if (transposed_) {  // a feature is a row of W, and the product's rows are neighbours in it
        for (int f = 0; f < cols_; ++f) masks[f] = uint32_t(bits.word(int64_t(f) * rows_ + row, rows));
        return;
    }
    for (int f = 0; f < cols_; f += 32) {
        uint32_t square[32] = {};
        const int features = std::min(32, cols_ - f);
        for (int r = 0; r < rows; ++r) square[r] = uint32_t(bits.word(int64_t(row + r) * cols_ + f, features));
        transpose32(square);
        std::copy_n(square, features, masks + f);
    }
}

template <class Writer>
void SpmmProgram::write(const Bits& bits, std::string& why) {
    static_assert(Writer::kPanel <= 32, "a panel's rows are the bits of a mask");
    const int64_t nnz = bits.count(0, bits.numel);
    const double density = double(nnz) / double(bits.numel);
    const int longest = density < kThin ? kThinBlock : kBlock;
    blocks_ = (cols_ + longest - 1) / longest;
    block_ = (cols_ + blocks_ - 1) / blocks_;
    panels_ = (rows_ + Writer::kPanel - 1) / Writer::kPanel;
    const double rows = double(rows_) / panels_;
    const double bytes = Writer::bytes(block_ * density * rows, block_ * (1 - std::pow(1 - density, rows)), rows);
    const int chained = std::clamp(int(std::lround(Writer::kCode / bytes)), 1, panels_);
    row_.resize(size_t((panels_ + chained - 1) / chained) + 1, rows_);

    Writer writer;
    writer.a.reserve(size_t(bytes * panels_ * blocks_ * 1.1) + (1 << 17));
    if (!transposed_) order_.resize(size_t(nnz) * kRowBits / 8 + 2 * sizeof(uint64_t), 0);
    RowNumbers order(order_.data());
    NoNumbers none;
    std::vector<uint32_t> masks;
    for (int c = 0; c < chains(); ++c) {
        const int first = chain_panel(c), last = chain_panel(c + 1);
        row_[c] = panel_row(first);
        widest_ = std::max(widest_, panel_row(last) - panel_row(first));
        masks.resize(size_t(last - first) * cols_);
        for (int p = first; p < last; ++p) {
            panel_masks(bits, panel_row(p), panel_row(p + 1), masks.data() + size_t(p - first) * cols_);
        }
        for (int b = 0; b < blocks_; ++b) {
            const int feature = b * block_, features = std::min(cols_, feature + block_) - feature;
            at_.push_back(writer.begin(features));
            value_.push_back(writer.weights);
            for (int p = first; p < last; ++p) {
                const uint32_t* mask = masks.data() + size_t(p - first) * cols_ + feature;
                if (!transposed_) segment_.push_back(writer.weights);
                const int rows = panel_row(p + 1) - panel_row(p);
                if (transposed_) {
                    writer.panel(rows, b == 0, mask, features, none);
                } else {
                    writer.panel(rows, b == 0, mask, features, order);
                }
            }
            writer.finish();
        }
    }
    at_.push_back(writer.a.size());
    value_.push_back(writer.weights);
    if (!transposed_) {
        segment_.push_back(writer.weights);
        order.flush();
    }
    code_ = CodeBuffer(writer.a.data(), writer.a.size(), why);
}

size_t SpmmProgram::nbytes() const {
    return code_.nbytes() + row_.size() * sizeof(int) + at_.size() * sizeof(size_t) + order_.size() +
           (value_.size() + segment_.size()) * sizeof(uint32_t);
}

template <class T>
void SpmmProgram::refresh(float* out, const T* values, const Bits& bits, const uint32_t* start, int threads) const {
    if (!transposed_) {
        parallel_for(chains(), threads, [&](int64_t chain) { refresh_rows(out, values, start, int(chain)); });
        return;
    }
    const int tasks = std::min(threads, chains());
    const bool few = nnz() < 4 * int64_t(panels_) * cols_;  // values in a run, on average
    parallel_for(tasks, threads, [&](int64_t task) {
        const int first = int(chains() * task / tasks), last = int(chains() * (task + 1) / tasks);
        if (few) {
            refresh_runs<8>(out, values, bits, start, first, last);
        } else {
            refresh_runs<16>(out, values, bits, start, first, last);
        }
    });
}

template <class T>
void SpmmProgram::refresh_rows(float* out, const T* values, const uint32_t* start, int chain) const {
    const int first = chain_panel(chain), last = chain_panel(chain + 1);
    std::vector<uint32_t> next(start + row_[chain], start + row_[chain + 1]);
    const uint32_t* segment = segment_.data() + size_t(first) * blocks_;
    // The chain's values lie together, but are read from as many places at once as it has rows.
    constexpr uint32_t kStep = kLine / sizeof(T);
    for (uint32_t i = start[row_[chain]]; i < start[row_[chain + 1]]; i += kStep) __builtin_prefetch(values + i);
    constexpr uint64_t kMask = (1 << kRowBits) - 1;
    const auto rows_from = [&](size_t bit) {
        uint64_t word;
        std::memcpy(&word, order_.data() + bit / 8, sizeof word);
        return word >> bit % 8;
    };
    for (int b = 0; b < blocks_; ++b) {
        for (int p = first; p < last; ++p, ++segment) {
            uint32_t* row = next.data() + (panel_row(p) - row_[chain]);
            uint32_t i = segment[0];
            for (; i + 8 <= segment[1]; i += 8) {
                uint64_t rows = rows_from(size_t(i) * kRowBits);
                for (int j = 0; j < 8; ++j, rows >>= kRowBits) out[i + j] = to_float(values[row[rows & kMask]++]);
            }
            for (; i < segment[1]; ++i) {
                out[i] = to_float(values[row[rows_from(size_t(i) * kRowBits) & kMask]++]);
            }
        }
    }
}

// Runs move as whole vectors where neither side has an end: what is written too far is written again.
template <int Run, class T>
void SpmmProgram::refresh_runs(float* out, const T* values, const Bits& bits, const uint32_t* start, int first_chain,
                               int last_chain) const {
    std::vector<uint32_t> next(start, start + cols_);  // by row of W, which is a feature here
    for (int f = 0; first_chain > 0 && f < cols_; ++f) {
        const int64_t row = int64_t(f) * rows_;
        next[f] += uint32_t(bits.count(row, row + row_[first_chain]));
    }
    const int64_t nnz = value_.back(), end = value_[size_t(last_chain) * blocks_];
    int64_t i = value_[size_t(first_chain) * blocks_];
    for (int c = first_chain; c < last_chain; ++c) {
        for (int b = 0; b < blocks_; ++b) {
            const int last = std::min((b + 1) * block_, cols_);
            for (int p = chain_panel(c); p < chain_panel(c + 1); ++p) {
                const int first_row = panel_row(p), rows = panel_row(p + 1) - first_row;
                for (int f = b * block_; f < last; ++f) {
                    int left = __builtin_popcountll(bits.word(int64_t(f) * rows_ + first_row, rows));
                    int64_t at = next[f];
                    next[f] += uint32_t(left);
                    for (; left > 0 && at + Run <= nnz && i + Run <= end; left -= Run, at += Run, i += Run) {
                        for (int j = 0; j < Run; ++j) out[i + j] = to_float(values[at + j]);
                    }
                    if (left < 0) i += left;  // so much of the last vector did not belong to the run
                    for (; left > 0; --left) out[i++] = to_float(values[at++]);
                }
            }
        }
    }
}

template void SpmmProgram::refresh(float*, const float*, const Bits&, const uint32_t*, int) const;
template void SpmmProgram::refresh(float*, const bf16*, const Bits&, const uint32_t*, int) const;

}  // namespace vspdf
