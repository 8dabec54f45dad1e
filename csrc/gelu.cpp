#include "gelu.hpp"

#include <algorithm>

#include "parallel.hpp"

namespace vspdf {
namespace {

constexpr int64_t kChunk = 1 << 14;  // numbers at a time, whole vectors of any width

const GeluKernels& gelu_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return gelu_kernels_avx512;
    if (isa == Isa::avx2) return gelu_kernels_avx2;
#endif
    (void)isa;
    return gelu_kernels_plain;
}

template <class Fn>
void by_chunks(int64_t n, int threads, const Fn& fn) {
    parallel_for((n + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
        const int64_t at = chunk * kChunk;
        fn(at, std::min(n - at, kChunk));
    });
}

}  // namespace

void gelu(float* out, const float* x, int64_t n, Gelu form, Isa isa, int threads) {
    const auto run = gelu_kernels(isa).value;
    by_chunks(n, threads, [&](int64_t at, int64_t count) { run(out + at, x + at, count, form); });
}

void gelu_grad(float* dx, const float* dy, const float* x, int64_t n, Gelu form, Isa isa, int threads) {
    const auto run = gelu_kernels(isa).grad;
    by_chunks(n, threads, [&](int64_t at, int64_t count) { run(dx + at, dy + at, x + at, count, form); });
}

}  // namespace vspdf
