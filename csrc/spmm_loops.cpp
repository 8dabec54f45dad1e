// SpMM without generated code: loops over blocks of features, and what few tokens run.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "parallel.hpp"
#include "scratch.hpp"
#include "spmm_run.hpp"
#include "spmv.hpp"

namespace vspdf {
namespace {

constexpr int kBand = SortedBlocks::kBand;  // rows whose sums stay near while the blocks of features pass

int log2_of(int n) { return n == 1 ? 0 : n == 2 ? 1 : n == 4 ? 2 : 3; }

// A row's weights in a block are counted in a byte, and lines of more would not stay in the first-level cache.
int block_columns(int cols, int tile) {
    const int most = std::min(int(first_level_bytes() / int64_t(sizeof(float))) / tile, 255);
    const int blocks = int(ceil_div(cols, most));
    return int(ceil_div(cols, blocks));
}

constexpr int unit_rows(const RowBlocks&) { return kSlice; }  // what threads may share out
constexpr int unit_rows(const SortedBlocks&) { return kBand; }

// Adds a block of features to the sums of rows [r, r + n), which lie in one band.
int64_t add_block(const SpmmKernels& kernels, const RowBlocks& blocks, int vectors, int b, int r, int n, float* sums,
                  const float* lines, const float* values) {
    return kernels.rows[log2_of(vectors)](sums, lines, values, blocks.col.data(), blocks.lo(b) + r, blocks.hi(b) + r, n,
                                          b == 0);
}

int64_t add_block(const SpmmKernels& kernels, const SortedBlocks& blocks, int vectors, int b, int r, int n, float* sums,
                  const float* lines, const float* values) {
    const size_t at = blocks.at(r / kBand, b), first = blocks.first(r / kBand, b);
    return kernels.sorted[log2_of(vectors)](sums, lines, values + first, blocks.col.data() + first,
                                            blocks.order.data() + at, blocks.count.data() + at, n, b == 0);
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

}  // namespace

int line_vectors(const SpmmKernels& kernels, int64_t tokens) {
    int vectors = 1;
    while (vectors * kernels.width < tokens && vectors * kernels.width < kernels.tile) vectors *= 2;
    return vectors;
}

template <class Blocks>
int64_t run_rows(const SpmmKernels& kernels, const Blocks& blocks, const Target& y, const Source& x,
                 const float* values, int64_t tokens, int threads) {
    const int vectors = line_vectors(kernels, tokens), lanes = vectors * kernels.width, unit = unit_rows(blocks);
    const Cut work = cut(ceil_div(tokens, lanes), 1, 1, tasks_for(threads), ceil_div(blocks.rows, unit));
    std::atomic<int64_t> macs{0};

    parallel_for(work.blocks * work.parts, threads, [&](int64_t task) {
        const int64_t token = task / work.parts * lanes;
        const int count = int(std::min<int64_t>(lanes, tokens - token));
        const auto part_row = [&](int64_t part) {
            return int(std::min<int64_t>(blocks.rows, ceil_div(blocks.rows, unit) * part / work.parts * unit));
        };
        const int row0 = part_row(task % work.parts), row1 = part_row(task % work.parts + 1);
        const Scratch packed(sizeof(float) * lanes * blocks.cols);
        const Scratch sums(sizeof(float) * lanes * std::min(blocks.rows, kBand));
        x.pack(kernels, packed.floats(), lanes, token, count, 0, blocks.cols);
        int64_t done = 0;
        for (int r = row0; r < row1; r += kBand) {
            const int n = std::min(kBand, row1 - r);
            for (int b = 0; b < blocks.blocks; ++b) {
                const float* lines = packed.floats() + int64_t(b) * blocks.block * lanes;
                done += add_block(kernels, blocks, vectors, b, r, n, sums.floats(), lines, values);
            }
            y.unpack(kernels, sums.floats(), lanes, token, count, r, n);
        }
        fence();
        macs += done;
    });
    return macs;
}

template int64_t run_rows(const SpmmKernels&, const RowBlocks&, const Target&, const Source&, const float*, int64_t,
                          int);
template int64_t run_rows(const SpmmKernels&, const SortedBlocks&, const Target&, const Source&, const float*, int64_t,
                          int);

SpmmLoops::SpmmLoops(const Csr& csr, bool transposed, int tile) : blocks_(csr, block_columns(csr.cols, tile)) {
    if (!transposed) return;
    std::vector<uint32_t> count(csr.cols, 0);  // kept weights of each row of W, a column here, before the band
    columns_.reserve(size_t(blocks_.bands) * csr.cols);
    for (int row = 0; row < csr.rows; row += kBand) {
        columns_.insert(columns_.end(), count.begin(), count.end());
        const uint32_t end = csr.start[std::min(row + kBand, csr.rows)];
        for (uint32_t i = csr.start[row]; i < end; ++i) ++count[csr.col[i]];
    }
    uint32_t start = 0;  // in row-major order, of each row of W
    for (int col = 0; col < csr.cols; start += count[col++]) {
        for (size_t at = size_t(col); at < columns_.size(); at += size_t(csr.cols)) columns_[at] += start;
    }
}

template <class T>
void SpmmLoops::refresh(float* out, const T* values, const uint32_t* start, int threads) const {
    parallel_for(blocks_.bands, threads, [&](int64_t band) {
        if (columns_.empty()) {
            refresh_rows(out, values, start, int(band));
        } else {
            refresh_columns(out, values, int(band));
        }
    });
}

// A row's values for the next block follow those for the last one.
template <class T>
void SpmmLoops::refresh_rows(float* out, const T* values, const uint32_t* start, int band) const {
    const int n = blocks_.band_rows(band);
    std::vector<uint32_t> next(start + band * kBand, start + band * kBand + n);
    out += blocks_.first(band, 0);
    for (int b = 0; b < blocks_.blocks; ++b) {
        const size_t at = blocks_.at(band, b);
        for (size_t i = at; i < at + n; ++i) {
            uint32_t& from = next[blocks_.order[i]];
            for (int j = 0; j < blocks_.count[i]; ++j) *out++ = to_float(values[from++]);
        }
    }
}

// A column, which is a row of W, has its values in the order of the rows, which are not in theirs.
template <class T>
void SpmmLoops::refresh_columns(float* out, const T* values, int band) const {
    const int n = blocks_.band_rows(band);
    const uint32_t* begin = columns_.data() + size_t(band) * blocks_.cols;
    std::vector<uint32_t> next(begin, begin + blocks_.cols);
    uint32_t lo[kBand], hi[kBand];  // by row: its values in this block
    for (int b = 0; b < blocks_.blocks; ++b) {
        const size_t at = blocks_.at(band, b);
        uint32_t end = blocks_.first(band, b);
        for (int i = 0; i < n; ++i) {
            const int row = blocks_.order[at + i];
            lo[row] = end;
            hi[row] = end += blocks_.count[at + i];
        }
        uint32_t* from = next.data() + b * blocks_.block;
        for (int row = 0; row < n; ++row) {
            for (uint32_t i = lo[row]; i < hi[row]; ++i) out[i] = to_float(values[from[blocks_.col[i]]++]);
        }
    }
}

template void SpmmLoops::refresh(float*, const float*, const uint32_t*, int) const;
template void SpmmLoops::refresh(float*, const bf16*, const uint32_t*, int) const;

int64_t run_dots(const SpmmKernels& kernels, const RowColumns& columns, const Target& y, const Source& x,
                 const float* values, int threads) {
    const Scratch floats(x.dtype == Dtype::f32 ? 0 : sizeof(float) * columns.cols);
    const float* from = as_floats(floats.floats(), x.data, columns.cols, x.dtype, 1);
    const Scratch sums(sizeof(float) * columns.rows);
    const int64_t parts = std::min<int64_t>(threads, ceil_div(columns.rows, kSlice));
    parallel_for(parts, threads, [&](int64_t part) {
        const int row0 = int(columns.rows * part / parts), row1 = int(columns.rows * (part + 1) / parts);
        for (int b = 0; b < columns.blocks; ++b) {
            kernels.dots(sums.floats() + row0, from + int64_t(b) * columns.block, values, columns.col.data(),
                         columns.lo(b) + row0, columns.hi(b) + row0, row1 - row0, b == 0);
        }
    });
    store_one(y, sums.floats(), columns.rows);
    return int64_t(columns.col.size());
}

#if defined(__x86_64__)
static bool all_finite(const float* x, int64_t n) {
    constexpr uint32_t exponent = 0x7F800000;  // all ones: infinities and NaN
    uint32_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        found |= (bits & exponent) == exponent;
    }
    return !found;
}

template <class Value>
static void rows_by_bits(const Spmv<Value>& work, int threads) {
    const int64_t parts = std::min<int64_t>(threads, ceil_div(work.rows, kSlice));
    parallel_for(parts, threads, [&](int64_t part) {
        spmv_avx512(work, int(work.rows * part / parts), int(work.rows * (part + 1) / parts));
    });
}
#endif

int64_t run_bits(const Plan& plan, const Target& y, const Source& x, const void* values, Dtype values_dtype,
                 int64_t tokens, int threads) {
#if defined(__x86_64__)
    const int rows = plan.rows(), cols = plan.cols();
    const bool ready = x.dtype == Dtype::f32 && (tokens == 1 || x.stride == cols);
    const Scratch floats(ready ? 0 : sizeof(float) * cols * tokens), sums(sizeof(float) * rows * tokens);
    const float* from = static_cast<const float*>(x.data);
    for (int64_t t = 0; t < tokens && !ready; ++t) {
        float* to = floats.floats() + t * cols;
        for (int c = 0; c < cols; ++c) {
            const int64_t at = t * x.stride + c;
            to[c] = x.dtype == Dtype::f32 ? static_cast<const float*>(x.data)[at]
                                          : to_float(static_cast<const bf16*>(x.data)[at]);
        }
        from = floats.floats();
    }
    const bool finite = all_finite(from, cols * tokens);
    const auto run = [&](const auto* mine) {
        rows_by_bits(Spmv<std::decay_t<decltype(*mine)>>{sums.floats(), rows, from, cols, int(tokens), finite, mine,
                                                         mine + plan.nnz(), plan.start().data(), plan.bits().data},
                     threads);
    };
    values_dtype == Dtype::f32 ? run(static_cast<const float*>(values)) : run(static_cast<const bf16*>(values));
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = t * y.stride * (y.dtype == Dtype::f32 ? 4 : 2);
        store_one(Target{static_cast<char*>(y.data) + at, y.stride, y.dtype, y.bias, false}, sums.floats() + t * rows,
                  rows);
    }
    return int64_t(rows) * cols * tokens;  // lanes of masked positions are multiplied too, by zero
#else
    (void)plan, (void)y, (void)x, (void)values, (void)values_dtype, (void)tokens, (void)threads;
    return 0;
#endif
}

// Row-major values added into dx, a private copy for each thread.
int64_t run_scatter(const SpmmKernels& kernels, const RowColumns& columns, const Target& dx, const Source& dy,
                    const float* values, int64_t tokens, int threads) {
    const bool one = tokens == 1;
    const int vectors = line_vectors(kernels, tokens), lanes = one ? 1 : vectors * kernels.width;
    const SpmmKernels::Scatter kernel = kernels.scatter[log2_of(vectors)];
    const int64_t nnz = int64_t(columns.col.size()), size = int64_t(lanes) * columns.cols;
    const int parts = int(std::clamp<int64_t>(nnz / (8 * int64_t(columns.cols) + 1), 1, threads));
    const Scratch sums(sizeof(float) * size * parts);
    const Scratch floats(one && dy.dtype != Dtype::f32 ? sizeof(float) * columns.rows : 0);
    const float* gradient = one ? as_floats(floats.floats(), dy.data, columns.rows, dy.dtype, 1) : nullptr;
    std::atomic<int64_t> macs{0};
    parallel_for(parts, threads, [&](int64_t part) {
        const auto part_row = [&](int64_t i) {
            if (i == parts) return columns.rows;
            const uint32_t* start = columns.lo(0);
            return int(std::lower_bound(start, start + columns.rows, uint32_t(nnz * i / parts)) - start);
        };
        const int row0 = part_row(part), row1 = std::max(row0, part_row(part + 1)), rows = row1 - row0;
        float* to = sums.floats() + part * size;
        std::fill_n(to, size, 0.f);
        const Scratch packed(one ? 0 : sizeof(float) * lanes * rows);
        if (!one) dy.pack(kernels, packed.floats(), lanes, 0, int(tokens), row0, rows);
        for (int b = 0; b < columns.blocks; ++b) {
            const uint32_t *lo = columns.lo(b) + row0, *hi = columns.hi(b) + row0;
            float* block = to + int64_t(b) * columns.block * lanes;
            macs += one ? kernels.scatter_one(block, gradient + row0, values, columns.col.data(), lo, hi, rows)
                        : kernel(block, packed.floats(), values, columns.col.data(), lo, hi, rows);
        }
    });
    for (int part = 1; part < parts; ++part) {
        for (int64_t i = 0; i < size; ++i) sums.floats()[i] += sums.floats()[part * size + i];
    }
    if (one) {
        store_one(dx, sums.floats(), columns.cols);
    } else {
        dx.unpack(kernels, sums.floats(), lanes, 0, int(tokens), 0, columns.cols);
    }
    fence();
    return macs;
}

}  // namespace vspdf
