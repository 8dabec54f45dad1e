#include "spmm.hpp"

#include <algorithm>

#include "parallel.hpp"
#include "scratch.hpp"
#include "spmm_run.hpp"
#include "spmv.hpp"

namespace vspdf {
namespace {

constexpr int64_t kStream = 1 << 20;  // bytes of output from which on it bypasses the caches
constexpr int kFewTokens = 64;        // up to here values are read in row-major order, without a plan

// Brings the values into the order of the part's kernel, and runs it.
template <class T>
int64_t run_part(const SpmmKernels& kernels, const Plan& plan, const SpmmPart& part, const Target& y, const Source& x,
                 const T* values, int64_t tokens, int threads) {
    const Scratch packed(sizeof(float) * plan.nnz());
    if (const auto* program = std::get_if<SpmmProgram>(&part.work)) {
        program->refresh(packed.floats(), values, plan.bits(), plan.start().data(), threads);
        return run_program(kernels, *program, y, x, packed.floats(), tokens, threads);
    }
    const SpmmLoops& loops = std::get<SpmmLoops>(part.work);
    loops.refresh(packed.floats(), values, plan.start().data(), threads);
    return run_rows(kernels, loops.blocks(), y, x, packed.floats(), tokens, threads);
}

int64_t run_part(const SpmmKernels& kernels, const Plan& plan, const SpmmPart& part, const Target& y, const Source& x,
                 const void* values, Dtype values_dtype, int64_t tokens, int threads) {
    if (values_dtype == Dtype::f32) {
        return run_part(kernels, plan, part, y, x, static_cast<const float*>(values), tokens, threads);
    }
    return run_part(kernels, plan, part, y, x, static_cast<const bf16*>(values), tokens, threads);
}

std::variant<SpmmLoops, SpmmProgram> make_work(const Plan& plan, bool transposed, std::string& why) {
    if (plan.jit()) {
        SpmmProgram program(plan.bits(), plan.rows(), plan.cols(), transposed, plan.isa(), why);
        if (program.made()) return program;
    } else {
        why = plan.isa() == Isa::plain  ? "generated code needs avx512 or avx2"
              : plan.isa() == Isa::avx2 ? "VSPDF_JIT=1 generates code"
                                        : "memory='low' or VSPDF_JIT=0";
    }
    const Csr csr = transposed ? transpose(plan.csr()) : plan.csr();
    return SpmmLoops(csr, transposed, spmm_kernels(plan.isa()).tile);
}

bool streams(int64_t tokens, int features) { return tokens * features * int64_t(sizeof(float)) >= kStream; }

}  // namespace

const float* as_floats(float* out, const void* values, int64_t n, Dtype dtype, int threads) {
    if (dtype == Dtype::f32) return static_cast<const float*>(values);
    constexpr int64_t kChunk = 1 << 15;
    parallel_for(ceil_div(n, kChunk), threads, [&](int64_t chunk) {
        const int64_t end = std::min(n, (chunk + 1) * kChunk);
        for (int64_t i = chunk * kChunk; i < end; ++i) out[i] = to_float(static_cast<const bf16*>(values)[i]);
    });
    return out;
}

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

SpmmPart::SpmmPart(const Plan& plan, bool transposed) : work(make_work(plan, transposed, why)) {}

size_t SpmmPart::nbytes() const {
    return std::visit([](const auto& way) { return way.nbytes(); }, work);
}

bool by_bits(const Plan& plan, int64_t tokens, Dtype values_dtype) {
    // Measured on Zen 4: below these densities a weight by its position takes less time than the expansion. bfloat16
    // values would have to be converted for that.
    const double least = values_dtype == Dtype::bf16 ? 0.06 : tokens == 1 ? 0.13 : 0.25;
    return plan.isa() == Isa::avx512 && tokens <= kSpmvTokens && plan.cols() % 8 == 0 &&
           double(plan.nnz()) >= least * double(plan.rows()) * plan.cols();
}

int64_t spmm_forward(const Plan& plan, const Lazy<SpmmPart>& part, void* y, const void* x, int64_t x_stride,
                     const void* values, const void* bias, int64_t tokens, Dtype dtype, Dtype values_dtype,
                     int threads) {
    if (tokens == 0) return 0;
    const SpmmKernels& kernels = spmm_kernels(plan.isa());
    const Scratch bias_scratch(bias && values_dtype != Dtype::f32 ? sizeof(float) * plan.rows() : 0);
    const float* shift = bias ? as_floats(bias_scratch.floats(), bias, plan.rows(), values_dtype, 1) : nullptr;
    const Source in{x, x_stride, dtype};
    const Target out{y, plan.rows(), dtype, shift, streams(tokens, plan.rows())};
    if (tokens > kFewTokens) {
        return run_part(kernels, plan, part.get(plan, false), out, in, values, values_dtype, tokens, threads);
    }
    if (by_bits(plan, tokens, values_dtype)) return run_bits(plan, out, in, values, values_dtype, tokens, threads);
    const Scratch scratch(values_dtype != Dtype::f32 ? sizeof(float) * plan.nnz() : 0);
    const float* floats = as_floats(scratch.floats(), values, plan.nnz(), values_dtype, threads);
    if (tokens == 1) return run_dots(kernels, plan.columns(), out, in, floats, threads);
    return run_rows(kernels, static_cast<const RowBlocks&>(plan.columns()), out, in, floats, tokens, threads);
}

int64_t spmm_grad_input(const Plan& plan, const Lazy<SpmmPart>& part, void* dx, const void* dy, int64_t dy_stride,
                        const void* values, int64_t tokens, Dtype dtype, Dtype values_dtype, int threads) {
    if (tokens == 0) return 0;
    const SpmmKernels& kernels = spmm_kernels(plan.isa());
    const Source in{dy, dy_stride, dtype};
    const Target out{dx, plan.cols(), dtype, nullptr, streams(tokens, plan.cols())};
    if (tokens > std::min<int64_t>(kFewTokens, 8 * kernels.width)) {
        return run_part(kernels, plan, part.get(plan, true), out, in, values, values_dtype, tokens, threads);
    }
    const Scratch scratch(values_dtype != Dtype::f32 ? sizeof(float) * plan.nnz() : 0);
    const float* floats = as_floats(scratch.floats(), values, plan.nnz(), values_dtype, threads);
    return run_scatter(kernels, plan.columns(), out, in, floats, tokens, threads);
}

std::string spmm_describe(const Plan& plan, bool transposed, const Lazy<SpmmPart>& part, int64_t tokens) {
    const SpmmKernels& kernels = spmm_kernels(plan.isa());
    if (!transposed && by_bits(plan, tokens, Dtype::f32))
        return "rows in row-major order, by the bits of the mask (few tokens)";
    if (tokens == 1) return std::string(transposed ? "scattered" : "gathered") + " rows in row-major order (one token)";
    if (tokens <= kFewTokens) {
        return std::string(transposed ? "scattered" : "gathered") + " rows in row-major order, lines of " +
               std::to_string(line_vectors(kernels, tokens) * kernels.width) + " tokens (few tokens: no packed plan)";
    }
    const SpmmPart& built = part.get(plan, transposed);
    if (const auto* program = std::get_if<SpmmProgram>(&built.work)) {
        return "generated code, " + std::to_string(program->chains()) + " x " + std::to_string(program->blocks()) +
               " pieces, " + std::to_string(program->code_bytes() >> 10) + " KiB";
    }
    return std::string("row loops (") + isa_name(plan.isa()) + "), tiles of " + std::to_string(kernels.tile) +
           " tokens, " + std::to_string(std::get<SpmmLoops>(built.work).blocks().blocks) + " blocks of features (" +
           built.why + ")";
}

const SpmmKernels& spmm_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return spmm_kernels_avx512;
    if (isa == Isa::avx2) return spmm_kernels_avx2;
#endif
    (void)isa;
    return spmm_kernels_plain;
}

}  // namespace vspdf
