// The one door to OpenMP; without it everything runs on one thread.
#pragma once

#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace vspdf {

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

// Runs fn(task) for task in [0, tasks) on at most `threads` threads. The first exception is thrown again here.
template <class Fn>
void parallel_for(int64_t tasks, int threads, const Fn& fn) {
    if (tasks < threads) threads = int(tasks);
#ifdef _OPENMP
    if (threads > 1) {
        std::exception_ptr error;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            try {
                fn(task);
            } catch (...) {
#pragma omp critical(vspdf_error)
                error = std::current_exception();
            }
        }
        if (error) std::rethrow_exception(error);
        return;
    }
#endif
    for (int64_t task = 0; task < tasks; ++task) fn(task);
}

}  // namespace vspdf
