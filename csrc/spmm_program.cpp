// Runs generated code over tokens.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "parallel.hpp"
#include "scratch.hpp"
#include "spmm_run.hpp"

namespace vspdf {
namespace {

constexpr int kFewSlices = 6;  // a block of fewer does not pay for its pass over the code
// Shares of the second-level cache.
constexpr double kPackedAll = 0.5;     // packed x
constexpr double kPackedGroup = 0.25;  // the same where the sums of all rows need room too
constexpr double kCodeNear = 0.375;    // code and values that stay
constexpr double kSumsNear = 1;        // packed x and sums that do
constexpr double kNearCost = 0.2;      // of a byte from that cache against one from further away
constexpr int kSpan = 64;              // rows that leave for the output together: whole runs suit memory better
constexpr int kLine = 64;              // bytes of a cache line

// To the second-level cache. Not the compiler's builtin: gcc 12 drops loops that do nothing else.
void prefetch(const char* line) {
#if defined(__x86_64__)
    asm volatile("prefetcht1 %0" : : "m"(*line));
#else
    (void)line;
#endif
}

// Brings a piece's code and values to the second-level cache, one of `steps` shares at a time.
class Prefetch {
  public:
    Prefetch(const SpmmProgram& program, const float* values, size_t piece, int steps)
        : code_(program.code(piece)),
          values_(reinterpret_cast<const char*>(values + program.value(piece))),
          code_bytes_(program.code(piece + 1) - program.code(piece)),
          value_bytes_((program.value(piece + 1) - program.value(piece)) * sizeof(float)),
          steps_(steps) {}

    void step(int i) const {
        share(code_, code_bytes_, i);
        share(values_, value_bytes_, i);
    }

  private:
    void share(const char* data, int64_t bytes, int i) const {
        const int64_t lines = ceil_div(bytes, kLine), end = lines * (i + 1) / steps_;
        for (int64_t j = lines * i / steps_; j < end; ++j) prefetch(data + j * kLine);
    }

    const char *code_, *values_;
    int64_t code_bytes_, value_bytes_;
    int steps_;
};

// How many slices share one pass over the code, and how many blocks of features pass together.
struct Pass {
    int slices;
    int group;
};

// The pass that moves the fewest bytes a slice between the caches. Short passes bring the code near more often; long
// ones hold more packed lines, so that few features pass together and the sums of all rows come and go between groups.
Pass choose_pass(const SpmmProgram& program) {
    const int rows = program.rows(), cols = program.cols();
    const double code = double(program.code_bytes()) + double(program.nnz()) * sizeof(float);
    const double cache = double(second_level_bytes()), group_bytes = kPackedGroup * cache;
    Pass best{0, 0};
    double least = 0;
    for (int slices : {16, 12, 8, 6, 5, 4, 3, 2, 1}) {
        const double line = slices * kSlice * double(sizeof(float));
        const bool together = cols * line <= kPackedAll * cache;
        const int most = together ? program.blocks() : std::max(int(group_bytes / (line * program.block())), 1);
        const int groups = int(ceil_div(program.blocks(), most));
        const double sums = groups == 1 ? 0 : groups * rows * 2.0 * kLine;
        const bool code_far = code > kCodeNear * cache;
        const bool sums_far = rows * line + group_bytes > kSumsNear * cache;
        const double moved = code / slices * (code_far ? 1 : kNearCost) + sums * (sums_far ? 1 : kNearCost);
        if (best.slices == 0 || moved < least) {
            best = {slices, int(ceil_div(program.blocks(), groups))};
            least = moved;
        }
        if (together) break;
    }
    return best;
}

}  // namespace

int64_t run_program(const SpmmKernels& kernels, const SpmmProgram& program, const Target& y, const Source& x,
                    const float* values, int64_t tokens, int threads) {
    const int blocks = program.blocks();
    const int64_t slices = ceil_div(tokens, kSlice);
    const Pass pass = choose_pass(program);
    const int group = pass.group;
    const Cut work = cut(slices, pass.slices, kFewSlices, tasks_for(threads), program.chains());
    std::atomic<int64_t> macs{0};

    parallel_for(work.blocks * work.parts, threads, [&](int64_t task) {
        const int64_t part_index = task % work.parts;
        const int chain0 = int(program.chains() * part_index / work.parts);
        const int chain1 = int(program.chains() * (part_index + 1) / work.parts);
        const int row0 = program.row(chain0), row1 = program.row(chain1);
        const int64_t slice0 = task / work.parts * work.units, token0 = slice0 * kSlice;
        const int count = int(std::min(work.units, slices - slice0));
        const auto slice_tokens = [&](int s) { return int(std::min<int64_t>(kSlice, tokens - token0 - s * kSlice)); };

        const int64_t line = int64_t(count) * kSlice * sizeof(float);
        // Sums are [slice][window][16]. If all features pass at once the window slides with the chains: it then needs
        // room for one chain and the rows before it that have not left for the output.
        const bool slides = group == blocks;
        const int window = slides ? std::min(row1 - row0, program.widest() + kSpan + kSlice) : row1 - row0;
        const Scratch packed(size_t(line) * std::min(program.cols(), group * program.block()));
        const Scratch sums(size_t(line) * window);
        int64_t done = 0;

        for (int b0 = 0; b0 < blocks; b0 += group) {
            const int b1 = std::min(blocks, b0 + group);
            const int feature0 = b0 * program.block();
            const int features = std::min(program.cols(), b1 * program.block()) - feature0;
            for (int s = 0; s < count; ++s) {
                x.pack(kernels, packed.floats() + int64_t(s) * features * kSlice, kSlice, token0 + s * kSlice,
                       slice_tokens(s), feature0, features);
            }
            int left = row0;  // the first row that has not left
            for (int c = chain0; c < chain1; ++c) {
                const int base = slides ? left : row0;  // the window's first row
                // Whole lines of the output leave, the rest of the rows waits for the next chain.
                const int end = program.row(c + 1);
                const int full = c + 1 == chain1 ? end : end / kSlice * kSlice;
                const bool leave = b1 == blocks && (c + 1 == chain1 || full - left >= kSpan);
                for (int b = b0; b < b1; ++b) {
                    const size_t i = size_t(c) * blocks + b;
                    const size_t next = b + 1 < b1 ? i + 1 : c + 1 < chain1 ? size_t(c + 1) * blocks + b0 : i;
                    const Prefetch prefetch(program, values, next, count);
                    const SpmmProgram::Piece piece = program.piece(i);
                    const float* lines = packed.floats() + int64_t(b * program.block() - feature0) * kSlice;
                    for (int s = 0; s < count; ++s) {
                        prefetch.step(s);
                        float* sum = sums.floats() + int64_t(s) * window * kSlice;
                        piece(lines + int64_t(s) * features * kSlice, values + program.value(i),
                              sum + (program.row(c) - base) * kSlice);
                        done += int64_t(kSlice) * (program.value(i + 1) - program.value(i));
                        if (!leave || b + 1 < b1) continue;
                        sum += (left - base) * kSlice;
                        y.unpack(kernels, sum, kSlice, token0 + s * kSlice, slice_tokens(s), left, full - left);
                        if (slides) std::copy_n(sum + (full - left) * kSlice, (end - full) * kSlice, sum);
                    }
                }
                if (leave) left = full;
            }
        }
        fence();
        macs += done;
    });
    return macs;
}

}  // namespace vspdf
