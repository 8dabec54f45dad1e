#include "spmm_jit.hpp"

#include <algorithm>
#include <cmath>

namespace vspdf {
namespace {

constexpr int kPanel = 31;       // rows a panel, one register each; the 32nd holds the line of x
constexpr int kCode = 15 << 10;  // bytes of code in a piece: with its values and lines, near the cores of every make
constexpr double kThin = 0.03;   // density below which a longer block pays: the sums then cost more than the lines
constexpr int kNear = 128;       // a one-byte displacement reaches 128 operands down and 127 up
constexpr Reg kBases[] = {rdi, r8, r9, r10};

struct Entry {
    uint16_t col;
    uint8_t row;  // in the panel
    uint32_t source;
};

// The panel's kept weights by feature, rows ascending in each.
std::vector<Entry> by_feature(const Csr& csr, int row, int end, std::vector<uint32_t>& next) {
    next.assign(size_t(csr.cols) + 1, 0);
    const uint32_t first = csr.start[row], last = csr.start[end];
    for (uint32_t i = first; i < last; ++i) ++next[csr.col[i] + 1];
    for (int k = 0; k < csr.cols; ++k) next[k + 1] += next[k];
    std::vector<Entry> entries(last - first);
    for (int r = row; r < end; ++r) {
        for (uint32_t i = csr.start[r]; i < csr.start[r + 1]; ++i) {
            entries[next[csr.col[i]]++] = {csr.col[i], uint8_t(r - row), i};
        }
    }
    return entries;
}

class PieceWriter {
  public:
    PieceWriter(Assembler& assembler, int features) : a_(assembler) {
        a_.add(rdi, kNear * 64);
        for (int base = 1; base * 2 * kNear < features; ++base) a_.lea(kBases[base], {rdi, base * 2 * kNear * 64});
        a_.add(rsi, kNear * 4);
        a_.add(rdx, kNear * 64);
    }

    // One panel's part of a block; `first`: its sums begin here. Entries are of this block, features from `feature`.
    void panel(int rows, bool first, const Entry* entry, const Entry* end, int feature, std::vector<uint32_t>& source) {
        if (sums_ + rows > 2 * kNear) {
            a_.add(rdx, sums_ * 64);
            sums_ = 0;
        }
        if (first || entry < end) {
            for (int r = 0; r < rows; ++r) first ? a_.zero(r) : a_.load(r, sum(r));
            for (int line = -1; entry < end; ++entry) {
                if (entry->col - feature != line) {
                    line = entry->col - feature;
                    a_.load(kPanel, {kBases[line / (2 * kNear)], (line % (2 * kNear) - kNear) * 64});
                }
                if (values_ == 2 * kNear) {
                    a_.add(rsi, values_ * 4);
                    values_ = 0;
                }
                a_.fma_broadcast(entry->row, kPanel, {rsi, (values_++ - kNear) * 4});
                source.push_back(entry->source);
            }
            for (int r = 0; r < rows; ++r) a_.store(sum(r), r);
        }
        sums_ += rows;
    }

    void finish() {
        a_.vzeroupper();
        a_.ret();
    }

  private:
    Mem sum(int r) const { return {rdx, (sums_ + r - kNear) * 64}; }

    Assembler& a_;
    int values_ = 0, sums_ = 0;  // operands passed since the pointers last moved
};

}  // namespace

SpmmProgram SpmmProgram::build(const Csr& csr, std::vector<uint32_t>& source, std::string& why) {
    SpmmProgram program;
    const double density = double(csr.nnz()) / csr.rows / csr.cols;
    const int longest = density < kThin ? 512 : 256;
    program.blocks = (csr.cols + longest - 1) / longest;
    program.block = (csr.cols + program.blocks - 1) / program.blocks;

    const int panels = (csr.rows + kPanel - 1) / kPanel;
    const double rows = double(csr.rows) / panels;
    const double loads = program.block * (1 - std::pow(1 - density, rows));
    const double bytes = 7 * (program.block * density * rows + loads + 2 * rows);
    const int chained = std::clamp(int(std::lround(kCode / bytes)), 1, panels);
    const int chains = (panels + chained - 1) / chained;
    const auto panel_row = [&](int panel) { return int(int64_t(panel) * csr.rows / panels); };
    const auto chain_panel = [&](int chain) { return int(int64_t(chain) * panels / chains); };

    Assembler assembler;
    assembler.code.reserve(size_t(bytes * panels * program.blocks * 1.1) + 4096);
    source.clear();
    source.reserve(csr.nnz());
    std::vector<uint32_t> next;
    for (int c = 0; c < chains; ++c) {
        const int first = chain_panel(c), last = chain_panel(c + 1);
        program.row.push_back(panel_row(first));
        program.widest = std::max(program.widest, panel_row(last) - panel_row(first));
        std::vector<std::vector<Entry>> entries;
        std::vector<size_t> done(last - first, 0);
        for (int p = first; p < last; ++p) entries.push_back(by_feature(csr, panel_row(p), panel_row(p + 1), next));
        for (int b = 0; b < program.blocks; ++b) {
            const int feature = b * program.block, end = std::min(csr.cols, feature + program.block);
            assembler.align(64);
            program.at.push_back(assembler.size());
            program.value.push_back(uint32_t(source.size()));
            PieceWriter piece(assembler, end - feature);
            for (int p = first; p < last; ++p) {
                const std::vector<Entry>& list = entries[p - first];
                size_t& i = done[p - first];
                const Entry* begin = list.data() + i;
                while (i < list.size() && list[i].col < end) ++i;
                piece.panel(panel_row(p + 1) - panel_row(p), b == 0, begin, list.data() + i, feature, source);
            }
            piece.finish();
        }
    }
    program.row.push_back(csr.rows);
    program.at.push_back(assembler.size());
    program.value.push_back(uint32_t(source.size()));
    program.code = CodeBuffer(assembler.code, why);
    return program;
}

}  // namespace vspdf
