// How fast memory is read: the other ceiling.
#include "bandwidth.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.hpp"

namespace vspdf {
namespace {

constexpr int64_t kLine = 16;   // floats
constexpr int64_t kAtOnce = 8;  // lines, a register each: as many as hide the latency of an addition

using Sum = float (*)(const float* x, int64_t lines);

float sum_plain(const float* x, int64_t lines) {
    float sums[kLine] = {};
    for (int64_t i = 0; i < lines * kLine; i += kLine)
        for (int64_t k = 0; k < kLine; ++k) sums[k] += x[i + k];
    float total = 0;
    for (float sum : sums) total += sum;
    return total;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) float sum_avx2(const float* x, int64_t lines) {
    __m256 sums[kAtOnce] = {};
    for (int64_t i = 0; i < lines * kLine; i += kAtOnce * 8)
        for (int k = 0; k < kAtOnce; ++k) sums[k] = _mm256_add_ps(sums[k], _mm256_load_ps(x + i + 8 * k));
    for (int k = 1; k < kAtOnce; ++k) sums[0] = _mm256_add_ps(sums[0], sums[k]);
    return _mm256_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f"))) float sum_avx512(const float* x, int64_t lines) {
    __m512 sums[kAtOnce] = {};
    for (int64_t i = 0; i < lines * kLine; i += kAtOnce * kLine)
        for (int k = 0; k < kAtOnce; ++k) sums[k] = _mm512_add_ps(sums[k], _mm512_load_ps(x + i + kLine * k));
    for (int k = 1; k < kAtOnce; ++k) sums[0] = _mm512_add_ps(sums[0], sums[k]);
    return _mm512_cvtss_f32(sums[0]);
}
#endif

Sum summing([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return sum_avx512;
    if (isa == Isa::avx2) return sum_avx2;
#endif
    return sum_plain;
}

}  // namespace

double read_bandwidth(int threads, double seconds, int64_t nbytes, Isa isa) {
    using Clock = std::chrono::steady_clock;
    const Sum sum = summing(isa);
    const int64_t lines = std::max<int64_t>(1, nbytes / (kLine * kAtOnce * 4)) * kAtOnce;
    const int64_t passes_at_once = std::max<int64_t>(1, (int64_t(1) << 15) / lines);
    std::vector<double> rates(size_t(threads), 0.0);
    std::vector<float> kept(size_t(threads) * kLine);  // so that no sum is left away
    parallel_for(threads, threads, [&](int64_t thread) {
        std::vector<float> own(size_t((lines + 1) * kLine), 1.0f);  // written by the thread that reads it
        const auto address = reinterpret_cast<uintptr_t>(own.data());
        const float* x = own.data() + (64 - address % 64) % 64 / sizeof(float);
        int64_t passes = 0;
        double passed = 0;
        for (const auto start = Clock::now(); passed < seconds; passes += passes_at_once) {
            for (int64_t i = 0; i < passes_at_once; ++i) kept[size_t(thread * kLine)] += sum(x, lines);
            passed = std::chrono::duration<double>(Clock::now() - start).count();
        }
        rates[size_t(thread)] = double(passes) * double(lines * kLine) * sizeof(float) / passed / 1e9;
    });
    double total = 0;
    for (double rate : rates) total += rate;
    return total;
}

}  // namespace vspdf
