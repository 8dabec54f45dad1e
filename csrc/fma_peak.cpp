// The machine's ceiling.
#include <chrono>
#include <vector>

#include "parallel.hpp"
#include "spmm_kernels.hpp"

namespace vspdf {

double fma_peak(int threads, double seconds, Isa isa) {
    using Clock = std::chrono::steady_clock;
    const SpmmKernels& kernels = spmm_kernels(isa);
    std::vector<double> rates(size_t(threads), 0.0);
    parallel_for(threads, threads, [&](int64_t thread) {
        int64_t flops = 0;
        double passed = 0;
        for (const auto start = Clock::now(); passed < seconds;) {
            flops += kernels.fma_rounds(20000);
            passed = std::chrono::duration<double>(Clock::now() - start).count();
        }
        rates[size_t(thread)] = double(flops) / passed / 1e9;
    });
    double total = 0;
    for (double rate : rates) total += rate;
    return total;
}

}  // namespace vspdf
