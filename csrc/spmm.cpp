#include "spmm.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.hpp"
#include "scratch.hpp"
#include "spmm_kernels.hpp"

namespace vspdf {
namespace {

constexpr int kSlice = 16;             // tokens of one call of generated code
constexpr int kFewSlices = 6;          // a block of fewer does not pay for its pass over the code
constexpr int kPackedAll = 1 << 20;    // bytes of packed x: half of a second-level cache
constexpr int kPackedGroup = 1 << 19;  // the same where the sums of all rows need room too
constexpr int kCodeNear = 3 << 18;     // bytes of code and values that stay in the second-level cache
constexpr int kSumsNear = 2 << 20;     // bytes of packed x and sums that do
constexpr double kNearCost = 0.2;      // of a byte from that cache against one from further away
constexpr int64_t kStream = 1 << 20;   // bytes of output from which on it bypasses the caches
constexpr int kSpan = 64;              // rows that leave for the output together: whole runs suit memory better
constexpr int kLine = 64;              // bytes of a cache line
constexpr int kFewTokens = 64;         // up to here values are read in row-major order, without a plan
constexpr int kRowsAtOnce = 256;       // rows whose sums stay near while the blocks of features pass
constexpr int kLines = 32 << 10;       // bytes of packed x that stay in the first-level cache

// Orders stores that bypassed the caches before what other threads see next.
void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The two element types behind one name.
struct Source {
    const void* data;
    int64_t stride;
    Dtype dtype;

    // out[f][t] = data[token + t, feature + f]; lanes from `tokens` on are zero
    void pack(const SpmmKernels& kernels, float* out, int lanes, int64_t token, int tokens, int feature,
              int features) const {
        const int64_t at = token * stride + feature;
        if (dtype == Dtype::f32) {
            kernels.pack(out, lanes, static_cast<const float*>(data) + at, stride, tokens, features);
        } else {
            kernels.pack_bf16(out, lanes, static_cast<const bf16*>(data) + at, stride, tokens, features);
        }
    }
};

struct Target {
    void* data;
    int64_t stride;
    Dtype dtype;
    const float* bias;  // or null
    bool stream;

    // data[token + t, feature + f] = y[f][t] + bias[feature + f]
    void unpack(const SpmmKernels& kernels, const float* y, int lanes, int64_t token, int tokens, int feature,
                int features) const {
        const int64_t at = token * stride + feature;
        const float* shift = bias ? bias + feature : nullptr;
        if (dtype == Dtype::f32) {
            kernels.unpack(static_cast<float*>(data) + at, stride, y, lanes, tokens, features, shift, stream);
        } else {
            kernels.unpack_bf16(static_cast<bf16*>(data) + at, stride, y, lanes, tokens, features, shift, stream);
        }
    }
};

// out[i] = values[source[i]], or values[i] where `source` is null
void refresh(const SpmmKernels& kernels, float* out, const void* values, const uint32_t* source, int64_t n, Dtype dtype,
             int threads) {
    constexpr int64_t kChunk = 1 << 15;
    parallel_for(ceil_div(n, kChunk), threads, [&](int64_t chunk) {
        const int64_t first = chunk * kChunk, count = std::min(kChunk, n - first);
        if (!source) {
            for (int64_t i = first; i < first + count; ++i) out[i] = to_float(static_cast<const bf16*>(values)[i]);
        } else if (dtype == Dtype::f32) {
            kernels.gather(out + first, static_cast<const float*>(values), source + first, count);
        } else {
            kernels.gather_bf16(out + first, static_cast<const bf16*>(values), source + first, count);
        }
    });
}

// Row-major values as float32: the caller's own where they are.
const float* as_floats(const SpmmKernels& kernels, const Scratch& scratch, const void* values, int64_t n, Dtype dtype,
                       int threads) {
    if (dtype == Dtype::f32) return static_cast<const float*>(values);
    refresh(kernels, scratch.floats(), values, nullptr, n, dtype, threads);
    return scratch.floats();
}

// How the work is cut: `units` token units into blocks of `unit_count`, rows into `parts`, for `threads` threads.
struct Cut {
    int64_t blocks;
    int64_t units;  // most units of a block
    int64_t parts;
};
Cut cut(int64_t units, int64_t most, int64_t few, int threads, int64_t row_units) {
    int64_t blocks = ceil_div(units, most);
    if (threads > 1) {
        // A multiple of the threads, unless that leaves blocks too short to pay for a pass over the values.
        const int64_t even = ceil_div(blocks, threads) * threads;
        if (units >= even * few) blocks = even;
    }
    const int64_t block = ceil_div(units, blocks);
    blocks = ceil_div(units, block);
    const int64_t parts = blocks >= threads ? 1 : std::min<int64_t>(row_units, ceil_div(threads, blocks));
    return {blocks, block, parts};
}

// ---- Generated code ---------------------------------------------------------------------------------------------

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
        : code_(reinterpret_cast<const char*>(program.code.entry()) + program.at[piece]),
          values_(reinterpret_cast<const char*>(values + program.value[piece])),
          code_bytes_(program.at[piece + 1] - program.at[piece]),
          value_bytes_((program.value[piece + 1] - program.value[piece]) * sizeof(float)),
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
Pass choose_pass(const SpmmProgram& program, int rows, int cols) {
    const double code = double(program.at.back()) + double(program.value.back()) * sizeof(float);
    Pass best{0, 0};
    double least = 0;
    for (int slices : {16, 12, 8, 6, 5, 4, 3, 2, 1}) {
        const double line = slices * kSlice * double(sizeof(float));
        const bool together = cols * line <= kPackedAll;
        const int most = together ? program.blocks : std::max(int(kPackedGroup / (line * program.block)), 1);
        const int groups = int(ceil_div(program.blocks, most));
        const double sums = groups == 1 ? 0 : groups * rows * 2.0 * kLine;
        const bool code_far = code > kCodeNear, sums_far = rows * line + kPackedGroup > kSumsNear;
        const double moved = code / slices * (code_far ? 1 : kNearCost) + sums * (sums_far ? 1 : kNearCost);
        if (best.slices == 0 || moved < least) {
            best = {slices, int(ceil_div(program.blocks, groups))};
            least = moved;
        }
        if (together) break;
    }
    return best;
}

int64_t run_program(const SpmmKernels& kernels, const SpmmPart& part, const Target& y, const Source& x,
                    const float* values, int64_t tokens, int threads) {
    const SpmmProgram& program = part.program;
    const int blocks = program.blocks;
    const int64_t slices = ceil_div(tokens, kSlice);
    const Pass pass = choose_pass(program, part.rows, part.cols);
    const int group = pass.group;
    const Cut work = cut(slices, pass.slices, kFewSlices, threads, program.chains());
    std::atomic<int64_t> macs{0};

    parallel_for(work.blocks * work.parts, threads, [&](int64_t task) {
        const int64_t part_index = task % work.parts;
        const int chain0 = int(program.chains() * part_index / work.parts);
        const int chain1 = int(program.chains() * (part_index + 1) / work.parts);
        const int row0 = program.row[chain0], row1 = program.row[chain1];
        const int64_t slice0 = task / work.parts * work.units, token0 = slice0 * kSlice;
        const int count = int(std::min(work.units, slices - slice0));
        const auto slice_tokens = [&](int s) { return int(std::min<int64_t>(kSlice, tokens - token0 - s * kSlice)); };

        const int64_t line = int64_t(count) * kSlice * sizeof(float);
        // Sums are [slice][window][16]. If all features pass at once the window slides with the chains: it then needs
        // room for one chain and the rows before it that have not left for the output.
        const bool slides = group == blocks;
        const int window = slides ? std::min(row1 - row0, program.widest + kSpan + kSlice) : row1 - row0;
        const Scratch packed(size_t(line) * std::min(part.cols, group * program.block));
        const Scratch sums(size_t(line) * window);
        int64_t done = 0;

        for (int b0 = 0; b0 < blocks; b0 += group) {
            const int b1 = std::min(blocks, b0 + group);
            const int feature0 = b0 * program.block;
            const int features = std::min(part.cols, b1 * program.block) - feature0;
            for (int s = 0; s < count; ++s) {
                x.pack(kernels, packed.floats() + int64_t(s) * features * kSlice, kSlice, token0 + s * kSlice,
                       slice_tokens(s), feature0, features);
            }
            int left = row0;  // the first row that has not left
            for (int c = chain0; c < chain1; ++c) {
                const int base = slides ? left : row0;  // the window's first row
                // Whole lines of the output leave, the rest of the rows waits for the next chain.
                const int end = program.row[c + 1];
                const int full = c + 1 == chain1 ? end : end / kSlice * kSlice;
                const bool leave = b1 == blocks && (c + 1 == chain1 || full - left >= kSpan);
                for (int b = b0; b < b1; ++b) {
                    const size_t i = size_t(c) * blocks + b;
                    const size_t next = b + 1 < b1 ? i + 1 : c + 1 < chain1 ? size_t(c + 1) * blocks + b0 : i;
                    const Prefetch prefetch(program, values, next, count);
                    const SpmmProgram::Piece piece = program.piece(i);
                    const float* lines = packed.floats() + int64_t(b * program.block - feature0) * kSlice;
                    for (int s = 0; s < count; ++s) {
                        prefetch.step(s);
                        float* sum = sums.floats() + int64_t(s) * window * kSlice;
                        piece(lines + int64_t(s) * features * kSlice, values + program.value[i],
                              sum + (program.row[c] - base) * kSlice);
                        done += int64_t(kSlice) * (program.value[i + 1] - program.value[i]);
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

// ---- Loops ------------------------------------------------------------------------------------------------------

int log2_of(int n) { return n == 1 ? 0 : n == 2 ? 1 : n == 4 ? 2 : 3; }

// The narrowest line of whole vectors for so many tokens, up to the widest.
int line_vectors(const SpmmKernels& kernels, int64_t tokens) {
    int vectors = 1;
    while (vectors * kernels.width < tokens && vectors * kernels.width < kernels.tile) vectors *= 2;
    return vectors;
}

// Row r of block b is [edge[b * rows + r], edge[b * rows + r + next]) of `col`.
int64_t run_rows(const SpmmKernels& kernels, int rows, int cols, const uint32_t* edge, int next, int blocks,
                 const uint16_t* col, const Target& y, const Source& x, const float* values, int64_t tokens,
                 int threads) {
    const int vectors = line_vectors(kernels, tokens), lanes = vectors * kernels.width;
    const SpmmKernels::Rows kernel = kernels.rows[log2_of(vectors)];
    const int64_t tiles = ceil_div(tokens, lanes);
    const Cut work = cut(tiles, 1, 1, threads, ceil_div(rows, kSlice));
    std::atomic<int64_t> macs{0};

    parallel_for(work.blocks * work.parts, threads, [&](int64_t task) {
        const int64_t token = task / work.parts * lanes;
        const int count = int(std::min<int64_t>(lanes, tokens - token));
        const auto part_row = [&](int64_t part) {
            return part == work.parts ? rows : int(rows * part / work.parts / kSlice * kSlice);
        };
        const int row0 = part_row(task % work.parts), row1 = part_row(task % work.parts + 1);
        Scratch packed(sizeof(float) * lanes * cols);
        Scratch sums(sizeof(float) * lanes * std::min(rows, kRowsAtOnce));
        x.pack(kernels, packed.floats(), lanes, token, count, 0, cols);
        int64_t done = 0;
        for (int r = row0; r < row1; r += kRowsAtOnce) {
            const int n = std::min(kRowsAtOnce, row1 - r);
            for (int b = 0; b < blocks; ++b) {
                const uint32_t* lo = edge + int64_t(b) * rows + r;
                const uint32_t* hi = lo + next;
                done += kernel(sums.floats(), packed.floats(), values, col, lo, hi, n, b == 0);
            }
            y.unpack(kernels, sums.floats(), lanes, token, count, r, n);
        }
        fence();
        macs += done;
    });
    return macs;
}

// ---- Few tokens -------------------------------------------------------------------------------------------------

// One token's features as float32: the caller's own where they are.
const float* one_token(const SpmmKernels& kernels, const Scratch& scratch, const Source& x, int features) {
    return as_floats(kernels, scratch, x.data, features, x.dtype, 1);
}

void store_one(const Target& y, const float* sums, int features) {
    for (int f = 0; f < features; ++f) {
        const float value = sums[f] + (y.bias ? y.bias[f] : 0.f);
        if (y.dtype == Dtype::f32) {
            static_cast<float*>(y.data)[f] = value;
        } else {
            from_float(value, static_cast<bf16*>(y.data)[f]);
        }
    }
}

// y = x W^T for one token.
int64_t run_dots(const SpmmKernels& kernels, const Csr& csr, const Target& y, const Source& x, const float* values,
                 int threads) {
    const Scratch floats(x.dtype == Dtype::f32 ? 0 : sizeof(float) * csr.cols);
    const float* from = one_token(kernels, floats, x, csr.cols);
    Scratch sums(sizeof(float) * csr.rows);
    const int64_t parts = std::min<int64_t>(threads, ceil_div(csr.rows, kSlice));
    parallel_for(parts, threads, [&](int64_t part) {
        const int row0 = int(csr.rows * part / parts), row1 = int(csr.rows * (part + 1) / parts);
        kernels.dots(sums.floats() + row0, from, values, csr.col.data(), csr.start.data() + row0, row1 - row0);
    });
    store_one(y, sums.floats(), csr.rows);
    return csr.nnz();
}

// dx = dy W for few tokens: row-major values added into dx, a private copy for each thread.
int64_t run_scatter(const SpmmKernels& kernels, const Csr& csr, const Target& dx, const Source& dy, const float* values,
                    int64_t tokens, int threads) {
    const bool one = tokens == 1;
    const int vectors = line_vectors(kernels, tokens), lanes = one ? 1 : vectors * kernels.width;
    const SpmmKernels::Scatter kernel = kernels.scatter[log2_of(vectors)];
    const int parts = int(std::clamp<int64_t>(csr.nnz() / (8 * csr.cols + 1), 1, threads));
    const int64_t size = int64_t(lanes) * csr.cols;
    Scratch sums(sizeof(float) * size * parts);
    const Scratch floats(one && dy.dtype != Dtype::f32 ? sizeof(float) * csr.rows : 0);
    const float* gradient = one ? one_token(kernels, floats, dy, csr.rows) : nullptr;
    std::atomic<int64_t> macs{0};
    parallel_for(parts, threads, [&](int64_t part) {
        const auto part_row = [&](int64_t i) {
            const uint32_t at = uint32_t(csr.nnz() * i / parts);
            return i == parts ? csr.rows
                              : int(std::lower_bound(csr.start.begin(), csr.start.end(), at) - csr.start.begin());
        };
        const int row0 = part_row(part), row1 = std::max(row0, part_row(part + 1));
        const uint32_t* start = csr.start.data() + row0;
        float* to = sums.floats() + part * size;
        std::fill_n(to, size, 0.f);
        if (one) {
            kernels.scatter_one(to, gradient + row0, values, csr.col.data(), start, row1 - row0);
            macs += start[row1 - row0] - start[0];
            return;
        }
        Scratch packed(sizeof(float) * lanes * (row1 - row0));
        dy.pack(kernels, packed.floats(), lanes, 0, int(tokens), row0, row1 - row0);
        macs += kernel(to, packed.floats(), values, csr.col.data(), start, row1 - row0);
    });
    for (int part = 1; part < parts; ++part) {
        for (int64_t i = 0; i < size; ++i) sums.floats()[i] += sums.floats()[part * size + i];
    }
    if (one) {
        store_one(dx, sums.floats(), csr.cols);
    } else {
        dx.unpack(kernels, sums.floats(), lanes, 0, int(tokens), 0, csr.cols);
    }
    fence();
    return macs;
}

int64_t run_part(const SpmmKernels& kernels, const SpmmPart& part, const Target& y, const Source& x, const void* values,
                 int64_t nnz, int64_t tokens, int threads) {
    const bool own = x.dtype == Dtype::f32 && part.source.empty();
    Scratch scratch(own ? 0 : sizeof(float) * nnz);
    const float* packed = static_cast<const float*>(values);
    if (!own) {
        refresh(kernels, scratch.floats(), values, part.source.empty() ? nullptr : part.source.data(), nnz, x.dtype,
                threads);
        packed = scratch.floats();
    }
    if (part.program.code.entry()) return run_program(kernels, part, y, x, packed, tokens, threads);
    return run_rows(kernels, part.rows, part.cols, part.edge.data(), part.rows, part.blocks, part.col, y, x, packed,
                    tokens, threads);
}

bool streams(int64_t tokens, int features) { return tokens * features * int64_t(sizeof(float)) >= kStream; }

}  // namespace

SpmmPart::SpmmPart(const Plan& plan, bool transposed) {
    if (transposed) transpose = vspdf::transpose(plan.csr(), source);
    const Csr& csr = transposed ? transpose : plan.csr();
    rows = csr.rows;
    cols = csr.cols;
    if (plan.jit()) {
        std::vector<uint32_t> order;
        program = SpmmProgram::build(csr, order, refused);
        if (program.code.entry()) {
            if (transposed) {
                for (uint32_t& i : order) i = source[i];
                transpose = Csr();
            }
            source = std::move(order);
            return;
        }
        program = SpmmProgram();
    }
    col = csr.col.data();
    const SpmmKernels& kernels = spmm_kernels(plan.isa());
    blocks = int(ceil_div(cols, kLines / int(sizeof(float)) / kernels.tile));
    block = int(ceil_div(cols, blocks));
    edge.resize(size_t(blocks + 1) * rows);
    for (int r = 0; r < rows; ++r) {
        uint32_t i = csr.start[r];
        for (int b = 0; b <= blocks; ++b) {
            while (i < csr.start[r + 1] && csr.col[i] < b * block) ++i;
            edge[size_t(b) * rows + r] = b == blocks ? csr.start[r + 1] : i;
        }
    }
}

size_t SpmmPart::nbytes() const {
    return program.nbytes() + edge.size() * sizeof(uint32_t) + transpose.nbytes() + source.size() * sizeof(uint32_t);
}

int64_t spmm_forward(const Plan& plan, const Lazy<SpmmPart>& part, void* y, const void* x, int64_t x_stride,
                     const void* values, const void* bias, int64_t tokens, Dtype dtype, int threads) {
    if (tokens == 0) return 0;
    const SpmmKernels& kernels = spmm_kernels(plan.isa());
    const Csr& csr = plan.csr();
    Scratch bias_scratch(bias && dtype != Dtype::f32 ? sizeof(float) * csr.rows : 0);
    const float* shift = bias ? as_floats(kernels, bias_scratch, bias, csr.rows, dtype, 1) : nullptr;
    const Source in{x, x_stride, dtype};
    const Target out{y, csr.rows, dtype, shift, streams(tokens, csr.rows)};
    if (tokens <= kFewTokens) {
        Scratch scratch(dtype != Dtype::f32 ? sizeof(float) * csr.nnz() : 0);
        const float* floats = as_floats(kernels, scratch, values, csr.nnz(), dtype, threads);
        if (tokens == 1) return run_dots(kernels, csr, out, in, floats, threads);
        return run_rows(kernels, csr.rows, csr.cols, csr.start.data(), 1, 1, csr.col.data(), out, in, floats, tokens,
                        threads);
    }
    return run_part(kernels, part.get(plan, false), out, in, values, csr.nnz(), tokens, threads);
}

int64_t spmm_grad_input(const Plan& plan, const Lazy<SpmmPart>& part, void* dx, const void* dy, int64_t dy_stride,
                        const void* values, int64_t tokens, Dtype dtype, int threads) {
    if (tokens == 0) return 0;
    const SpmmKernels& kernels = spmm_kernels(plan.isa());
    const Csr& csr = plan.csr();
    const Source in{dy, dy_stride, dtype};
    const Target out{dx, csr.cols, dtype, nullptr, streams(tokens, csr.cols)};
    if (tokens <= std::min<int64_t>(kFewTokens, 8 * kernels.width)) {
        Scratch scratch(dtype != Dtype::f32 ? sizeof(float) * csr.nnz() : 0);
        return run_scatter(kernels, csr, out, in, as_floats(kernels, scratch, values, csr.nnz(), dtype, threads),
                           tokens, threads);
    }
    return run_part(kernels, part.get(plan, true), out, in, values, csr.nnz(), tokens, threads);
}

std::string spmm_describe(const Plan& plan, bool transposed, const Lazy<SpmmPart>& part, int64_t tokens, int) {
    const SpmmKernels& kernels = spmm_kernels(plan.isa());
    if (tokens == 1) return std::string(transposed ? "scattered" : "gathered") + " rows in row-major order (one token)";
    if (tokens <= kFewTokens) {
        return std::string(transposed ? "scattered" : "gathered") + " rows in row-major order, lines of " +
               std::to_string(line_vectors(kernels, tokens) * kernels.width) + " tokens (few tokens: no packed plan)";
    }
    const SpmmPart& built = part.get(plan, transposed);
    if (built.program.code.entry()) {
        return "generated code, " + std::to_string(built.program.chains()) + " x " +
               std::to_string(built.program.blocks) + " pieces, " + std::to_string(built.program.code.nbytes() >> 10) +
               " KiB";
    }
    const std::string why = plan.isa() != Isa::avx512 ? "generated code needs avx512"
                            : built.refused.empty()   ? "VSPDF_JIT=0"
                                                      : built.refused;
    return std::string("row loops (") + isa_name(plan.isa()) + "), tiles of " + std::to_string(kernels.tile) +
           " tokens, " + std::to_string(built.blocks) + " blocks of features (" + why + ")";
}

const SpmmKernels& spmm_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return spmm_kernels_avx512;
    if (isa == Isa::avx2) return spmm_kernels_avx2;
#endif
    (void)isa;
    return spmm_kernels_plain;
}

double fma_peak(int threads, double seconds) {
    using Clock = std::chrono::steady_clock;
    const SpmmKernels& kernels = spmm_kernels(isas().front());
    std::vector<double> rates(std::max(threads, 1), 0.0);
    parallel_for(int64_t(rates.size()), threads, [&](int64_t thread) {
        int64_t flops = 0;
        double passed = 0;
        for (const auto start = Clock::now(); passed < seconds;) {
            flops += kernels.fma_rounds(20000);
            passed = std::chrono::duration<double>(Clock::now() - start).count();
        }
        rates[thread] = double(flops) / passed / 1e9;
    });
    double total = 0;
    for (double rate : rates) total += rate;
    return total;
}

}  // namespace vspdf
