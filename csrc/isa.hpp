// Which instruction set runs: found at run time, lowered by VSPDF_ISA or by name.
#pragma once

#include <string>
#include <vector>

namespace vspdf {

enum class Isa { plain, avx2, avx512 };

const char* isa_name(Isa isa);
std::vector<Isa> isas();  // what this machine can run, best first

// The named set; "" means VSPDF_ISA or else the best. Throws std::invalid_argument for a name unknown or not available.
Isa choose_isa(const std::string& name);

// Whether kernels may be generated at run time (VSPDF_JIT=0 says no). Only AVX-512 has any.
bool jit_allowed();

}  // namespace vspdf
