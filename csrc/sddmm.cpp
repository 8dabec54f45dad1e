#include "sddmm.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.hpp"
#include "scratch.hpp"
#include "sddmm_kernels.hpp"
#include "spmm_kernels.hpp"

namespace vspdf {
namespace {

constexpr int kLeastTokens = 128;  // tokens that pay for adding up the lanes
constexpr int kPiece = 512;        // features packed at a time: enough to be read as a stream
constexpr int kTileCols = 256;     // at most: a column inside a tile is a byte
constexpr int kCopied = 16;        // columns copied at a time

static_assert(kTileCols - 1 <= UINT8_MAX && kPiece * kTileCols < 1 << 20, "cols and runs of a tile fit their types");

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One token: an outer product at the kept positions, straight from the row-major pattern.
template <class T, class Value>
int64_t one_token(const Plan& plan, Value* dvalues, const T* dy, const T* x, int threads) {
    const RowColumns& columns = plan.columns();
    const int64_t share = ceil_div(columns.rows, threads);
    parallel_for(ceil_div(columns.rows, share), threads, [&](int64_t task) {
        const int64_t end = std::min<int64_t>(columns.rows, (task + 1) * share);
        for (int b = 0; b < columns.blocks; ++b) {
            const T* block = x + int64_t(b) * columns.block;
            for (int64_t row = task * share; row < end; ++row) {
                const float gradient = to_float(dy[row]);
                for (uint32_t i = columns.lo(b)[row]; i < columns.hi(b)[row]; ++i) {
                    from_float(gradient * to_float(block[columns.col[i]]), dvalues[i]);
                }
            }
        }
    });
    return plan.nnz();
}

// Some features of a matrix of tokens, packed for the kernels.
class Operand {
  public:
    Operand(const void* data, int64_t stride, Dtype dtype, const SddmmKernels& kernels, const SpmmKernels& packing,
            int most_features, int most_tokens)
        : data_(data),
          stride_(stride),
          dtype_(dtype),
          kernels_(kernels),
          packing_(packing),
          packed_(size_t(most_features) * most_tokens / kernels.depth * sizeof(float)) {}

    void pack(int64_t token, int tokens, int feature, int features) {
        feature_ = feature;
        features_ = features;
        const int chunk = kernels_.width * kernels_.lines, line = kernels_.width * kernels_.depth;
        for (int t = 0; t < tokens; t += chunk * kernels_.depth) {
            const int here = std::min(chunk * kernels_.depth, tokens - t);
            const int lanes = int(ceil_div(here, line)) * kernels_.width;
            const int64_t at = (token + t) * stride_ + feature;
            float* out = packed_.floats() + int64_t(t / kernels_.depth) * features;
            if (dtype_ == Dtype::f32) {
                packing_.pack(out, lanes, static_cast<const float*>(data_) + at, stride_, here, features);
            } else {
                const auto pack = kernels_.depth == 2 ? packing_.pack_pairs : packing_.pack_bf16;
                pack(out, lanes, static_cast<const bf16*>(data_) + at, stride_, here, features);
            }
        }
    }

    SddmmOperand from(int feature) const {
        return {packed_.floats(), int64_t(features_) * kernels_.width * kernels_.lines, feature - feature_};
    }

  private:
    const void* data_;
    int64_t stride_;
    Dtype dtype_;
    const SddmmKernels& kernels_;
    const SpmmKernels& packing_;
    Scratch packed_;
    int feature_ = 0, features_ = 0;
};

// One call: threads share the grid of tiles.
class Product {
  public:
    Product(const Plan& plan, const SddmmPart& part, void* dvalues, const void* dy, int64_t dy_stride, const void* x,
            int64_t x_stride, int64_t tokens, Dtype dtype, Dtype values_dtype)
        : rows_(plan.rows()),
          cols_(plan.cols()),
          start_(plan.start()),
          part_(part),
          kernels_(sddmm_kernels(plan.isa(), dtype)),
          packing_(spmm_kernels(plan.isa())),
          dvalues_(dvalues),
          dy_(dy),
          x_(x),
          dy_stride_(dy_stride),
          x_stride_(x_stride),
          tokens_(tokens),
          dtype_(dtype),
          values_dtype_(values_dtype),
          step_(std::max(near() / part.tile_cols, kLeastTokens) / chunk() * chunk() * kernels_.depth),
          sums_(part.cols.size() * sizeof(float)) {}

    int64_t run(int threads) const {
        // The cut of the grid that packs least in all.
        const int tasks = tasks_for(threads);
        const auto packed = [&](int parts) { return double(rows_) / parts + double(cols_) * parts / tasks; };
        int row_parts = 1;
        for (int parts = 2; parts <= tasks; ++parts) {
            if (tasks % parts == 0 && packed(parts) < packed(row_parts)) row_parts = parts;
        }
        row_parts = std::min(row_parts, part_.row_tiles);
        const int col_parts = std::min(tasks / row_parts, part_.col_tiles);
        std::atomic<int64_t> macs{0};
        parallel_for(int64_t(row_parts) * col_parts, threads, [&](int64_t task) {
            const int r = int(task) / col_parts, c = int(task) % col_parts;
            macs += run_part(part_.row_tiles * r / row_parts, part_.row_tiles * (r + 1) / row_parts,
                             part_.col_tiles * c / col_parts, part_.col_tiles * (c + 1) / col_parts);
        });
        return macs;
    }

  private:
    // Floats of packed x that stay in the first-level cache.
    static int near() { return int(first_level_bytes() / int64_t(sizeof(float))); }
    int chunk() const { return kernels_.width * kernels_.lines; }  // lanes
    int row(int r) const { return std::min(rows_, r * part_.tile_rows); }
    int col(int c) const { return std::min(cols_, c * part_.tile_cols); }

    // Tiles [r0, r1) x [c0, c1). The side with fewer features is packed whole and stays in the second-level cache while
    // the other one passes, a tile at a time.
    int64_t run_part(int r0, int r1, int c0, int c1) const {
        const int rows = row(r1) - row(r0), cols = col(c1) - col(c0);
        const bool x_stays = cols <= rows;
        const int col_tiles = std::max(1, kPiece / part_.tile_cols);
        const int x_features = x_stays ? cols : std::min(cols, col_tiles * part_.tile_cols);
        Operand x(x_, x_stride_, dtype_, kernels_, packing_, x_features, step_);
        Operand dy(dy_, dy_stride_, dtype_, kernels_, packing_, x_stays ? part_.tile_rows : rows, step_);
        int64_t macs = 0;
        for (int64_t t = 0; t < tokens_; t += step_) {
            const int here = int(std::min<int64_t>(step_, tokens_ - t));
            const auto tile = [&](int r, int c) {
                const SddmmTile& tile = part_.tiles[size_t(r) * part_.col_tiles + c];
                macs += kernels_.tile(sums_.floats() + size_t(tile.group) * kernels_.width, part_, tile, x.from(col(c)),
                                      dy.from(row(r)), here, t == 0);
            };
            if (x_stays) {
                x.pack(t, here, col(c0), cols);
                for (int r = r0; r < r1; ++r) {
                    dy.pack(t, here, row(r), row(r + 1) - row(r));
                    for (int c = c0; c < c1; ++c) tile(r, c);
                    if (t + step_ >= tokens_) unpack(r, c0, c1);
                }
            } else {
                dy.pack(t, here, row(r0), rows);
                for (int c = c0; c < c1; c += col_tiles) {
                    const int end = std::min(c1, c + col_tiles);
                    x.pack(t, here, col(c), col(end) - col(c));
                    for (int k = c; k < end; ++k) {
                        for (int r = r0; r < r1; ++r) tile(r, k);
                    }
                }
            }
        }
        for (int r = r0; !x_stays && r < r1; ++r) unpack(r, c0, c1);
        return macs;
    }

    void unpack(int r, int c0, int c1) const {
        const SddmmTile* tiles = part_.tiles.data() + size_t(r) * part_.col_tiles + c0;
        for (int k = row(r); k < row(r + 1); ++k) {
            const SddmmRun* runs = part_.runs.data() + size_t(k) * part_.col_tiles;
            size_t at = start_[k];
            for (int c = 0; c < c0; ++c) at += runs[c].length;
            if (values_dtype_ == Dtype::f32) {
                kernels_.unpack(static_cast<float*>(dvalues_) + at, tiles, runs + c0, c1 - c0, sums_.floats());
            } else {
                kernels_.unpack_bf16(static_cast<bf16*>(dvalues_) + at, tiles, runs + c0, c1 - c0, sums_.floats());
            }
        }
    }

    int rows_, cols_;
    const std::vector<uint32_t>& start_;
    const SddmmPart& part_;
    const SddmmKernels& kernels_;
    const SpmmKernels& packing_;
    void* dvalues_;
    const void *dy_, *x_;
    int64_t dy_stride_, x_stride_, tokens_;
    Dtype dtype_, values_dtype_;
    int step_;  // tokens
    Scratch sums_;
};

template <class T>
int64_t one_token(const Plan& plan, void* dvalues, const void* dy, const void* x, Dtype values_dtype, int threads) {
    const T *from = static_cast<const T*>(dy), *to = static_cast<const T*>(x);
    if (values_dtype == Dtype::f32) return one_token(plan, static_cast<float*>(dvalues), from, to, threads);
    return one_token(plan, static_cast<bf16*>(dvalues), from, to, threads);
}

}  // namespace

const SddmmKernels& sddmm_kernels(Isa isa, Dtype dtype) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) {
        return dtype == Dtype::bf16 && fast_bf16_pairs() ? sddmm_kernels_avx512_bf16 : sddmm_kernels_avx512;
    }
    if (isa == Isa::avx2) return sddmm_kernels_avx2;
#endif
    (void)isa;
    (void)dtype;
    return sddmm_kernels_plain;
}

SddmmPart::SddmmPart(const Plan& plan) {
    const Bits& bits = plan.bits();
    const int out_features = plan.rows(), in_features = plan.cols();
    const int width = sddmm_kernels(plan.isa(), Dtype::f32).width;
    const double density = double(plan.nnz()) / out_features / in_features;
    // The sparser the pattern, the more columns it takes for a row of dy to be worth loading.
    tile_cols = density > 0.3 ? 32 : density > 0.02 ? 64 : kTileCols;
    // An even number of tiles, for two threads.
    const int64_t most_tiles = 2 * ceil_div(out_features, 2 * kPiece);
    tile_rows = int(ceil_div(out_features, most_tiles));
    row_tiles = int(ceil_div(out_features, tile_rows));
    col_tiles = int(ceil_div(in_features, tile_cols));
    tiles.reserve(size_t(row_tiles) * col_tiles);
    runs.resize(size_t(out_features) * col_tiles);
    cols.resize(size_t(plan.nnz()) + size_t(row_tiles) * col_tiles * width + kCopied);

    std::vector<uint32_t> from(size_t(tile_rows) * col_tiles);
    std::vector<int> sorted(tile_rows), place(tile_cols + 2);
    for (int first_row = 0; first_row < out_features; first_row += tile_rows) {
        const int here = std::min(out_features - first_row, tile_rows);
        SddmmRun* run = &runs[size_t(first_row) * col_tiles];  // [row][col_tiles], as `from`
        // Columns inside their tiles, row by row, and where those of each tile begin.
        const uint32_t kept = plan.start()[first_row + here] - plan.start()[first_row];
        const Scratch band(kept + kCopied);
        uint8_t* next = band.bytes();
        for (int r = 0; r < here; ++r) {
            const int64_t row = int64_t(first_row + r) * in_features;
            for (int c = 0; c < col_tiles; ++c) {
                const int64_t first = row + c * tile_cols, last = std::min(row + in_features, first + tile_cols);
                const size_t i = size_t(r) * col_tiles + c;
                from[i] = uint32_t(next - band.bytes());
                bits.each(first, last, [&](int64_t at) { *next++ = uint8_t(at - first); });
                run[i].length = uint32_t(next - band.bytes()) - from[i];
            }
        }
        for (int c = 0; c < col_tiles; ++c) {
            // Rows sorted by length: groups then begin rows at the same lanes as the group before, so that the
            // processor foresees the branches there.
            std::fill(place.begin(), place.end(), 0);
            uint32_t total = 0;
            for (int r = 0; r < here; ++r) {
                const uint32_t length = run[size_t(r) * col_tiles + c].length;
                ++place[tile_cols - length + 1];
                total += length;
            }
            for (int i = 0; i <= tile_cols; ++i) place[i + 1] += place[i];
            for (int r = 0; r < here; ++r) sorted[place[tile_cols - run[size_t(r) * col_tiles + c].length]++] = r;

            const uint32_t groups = uint32_t(ceil_div(total, width));
            const SddmmTile tile{uint32_t(starts.size()), groups, uint32_t(rows.size())};
            tiles.push_back(tile);
            starts.resize(starts.size() + groups, 0);
            uint8_t* out = cols.data() + size_t(tile.group) * width;
            uint32_t n = 0;
            for (int k = 0; k < here; ++k) {
                const int r = sorted[k];
                const size_t i = size_t(r) * col_tiles + c;
                const uint32_t end = n + run[i].length;
                run[i].first = n;
                for (uint32_t at = n; at < end; at = (at / width + 1) * width) {  // where it begins in each group
                    starts[tile.group + at / width] |= uint16_t(1u << at % width);
                    rows.push_back(uint16_t(r));
                }
                const uint8_t* in = band.bytes() + from[i];
                for (; n < end; n += kCopied, in += kCopied) std::memcpy(out + n, in, kCopied);  // the next writes over
                n = end;
            }
            std::fill(out + n, out + size_t(groups) * width, uint8_t(0));  // sums that nobody reads
        }
    }
    cols.resize(starts.size() * width);
    cols.shrink_to_fit();
    starts.shrink_to_fit();
    rows.shrink_to_fit();
}

size_t SddmmPart::nbytes() const {
    return tiles.size() * sizeof(SddmmTile) + cols.size() + (starts.size() + rows.size()) * sizeof(uint16_t) +
           runs.size() * sizeof(SddmmRun);
}

int64_t sddmm(const Plan& plan, const Lazy<SddmmPart>& part, void* dvalues, const void* dy, int64_t dy_stride,
              const void* x, int64_t x_stride, int64_t tokens, Dtype dtype, Dtype values_dtype, int threads) {
    if (plan.nnz() == 0) return 0;
    if (tokens == 0) {
        std::memset(dvalues, 0, size_t(plan.nnz()) * (values_dtype == Dtype::f32 ? sizeof(float) : sizeof(bf16)));
        return 0;
    }
    if (tokens > 1) {
        return Product(plan, part.get(plan), dvalues, dy, dy_stride, x, x_stride, tokens, dtype, values_dtype)
            .run(threads);
    }
    if (dtype == Dtype::f32) return one_token<float>(plan, dvalues, dy, x, values_dtype, threads);
    return one_token<bf16>(plan, dvalues, dy, x, values_dtype, threads);
}

std::string sddmm_describe(const Plan& plan, int64_t tokens) {
    if (tokens <= 1) return "row-major order (one token)";
    return std::string("tiles of kept weights in vectors of tokens, ") + isa_name(plan.isa());
}

}  // namespace vspdf
