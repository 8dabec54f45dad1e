// Which instruction set runs: found at run time, lowered by VSPDF_ISA or by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vspdf {

enum class Isa { plain, avx2, avx512 };

const char* isa_name(Isa isa);
std::vector<Isa> isas();  // what this machine can run, best first

// The named set; "" means VSPDF_ISA or else the best. Throws std::invalid_argument for a name unknown or not available.
Isa choose_isa(const std::string& name);

// Whether kernels are generated at run time. VSPDF_JIT=0 says no, VSPDF_JIT=1 wherever there is a generator; else only
// for AVX-512: AVX2 takes three times the code a weight, 50 bytes instead of 4 in all, and gains only where the
// second-level cache is small (Zen 3).
bool jit_wanted(Isa isa);

// Whether the processor multiplies pairs of bf16 as fast as single floats. Intel's, but for AMX, take four times as
// long.
bool fast_bf16_pairs();

// Whether packing asks for the next tokens' features while it moves these. On AMD's Zen 5 that gains; Intel's
// processors find such streams by themselves, and more requests than they need take time.
bool packs_ahead();

// Tasks of one size to cut for so many threads: one each, or some more where cores differ in speed (Intel's hybrids,
// most of Arm's), so that the slow ones do not hold up the fast.
int tasks_for(int threads);

// Bytes of the first-level data cache of one core; 32 KiB where the system does not say.
int64_t first_level_bytes();

// Bytes of the second-level cache of one core; 1 MiB where the system does not say.
int64_t second_level_bytes();

}  // namespace vspdf
