#include "isa.hpp"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace vspdf {

#if defined(__linux__)
static std::string capacity_of(int core) {
    return "/sys/devices/system/cpu/cpu" + std::to_string(core) + "/cpu_capacity";
}
#endif

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "plain"; }

std::vector<Isa> isas() {
    std::vector<Isa> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
        found.push_back(Isa::avx512);
    }
    if (avx2) found.push_back(Isa::avx2);
#endif
    found.push_back(Isa::plain);
    return found;
}

Isa choose_isa(const std::string& name) {
    const char* forced = std::getenv("VSPDF_ISA");
    const bool from_env = name.empty() && forced && *forced;
    const std::string wanted = from_env ? forced : name;
    const std::vector<Isa> have = isas();
    if (wanted.empty()) return have.front();
    std::string names;
    for (Isa isa : have) {
        if (wanted == isa_name(isa)) return isa;
        names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
    }
    const bool known = wanted == "avx512" || wanted == "avx2" || wanted == "plain";
    throw std::invalid_argument(std::string(from_env ? "VSPDF_ISA" : "isa") + ": '" + wanted +
                                (known ? "' cannot run here" : "' is no instruction set of the kernels") +
                                "; this machine has: " + names + ".");
}

bool jit_wanted(Isa isa) {
    const char* jit = std::getenv("VSPDF_JIT");
    const std::string wanted = jit ? jit : "";
    return isa != Isa::plain && wanted != "0" && (isa == Isa::avx512 || wanted == "1");
}

bool fast_bf16_pairs() {
#if defined(__x86_64__)
    static const bool fast = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
    return fast;
#else
    return false;
#endif
}

bool packs_ahead() {
#if defined(__x86_64__)
    static const bool intel = __builtin_cpu_is("intel");
    return !intel;
#else
    return true;
#endif
}

int tasks_for(int threads) {
    static const int each = [] {
        constexpr int kEven = 1, kUneven = 3;
#if defined(__APPLE__)
        int levels = 0;
        size_t size = sizeof levels;
        if (sysctlbyname("hw.nperflevels", &levels, &size, nullptr, 0) == 0 && levels > 1) return kUneven;
#elif defined(__linux__)
        if (access("/sys/devices/cpu_atom", F_OK) == 0) return kUneven;
        long first = 0;
        for (int core = 0; std::FILE* file = std::fopen(capacity_of(core).c_str(), "r"); ++core) {
            long capacity = 0;
            const bool read = std::fscanf(file, "%ld", &capacity) == 1;
            std::fclose(file);
            if (core == 0) first = capacity;
            if (read && capacity != first) return kUneven;
        }
#endif
        return kEven;
    }();
    return threads == 1 ? 1 : threads * each;
}

int64_t first_level_bytes() {
    static const int64_t bytes = [] {
        int64_t found = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
        found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
        return found > 0 ? found : int64_t(32) << 10;
    }();
    return bytes;
}

int64_t second_level_bytes() {
    static const int64_t bytes = [] {
        int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return found > 0 ? found : int64_t(1) << 20;
    }();
    return bytes;
}

}  // namespace vspdf
