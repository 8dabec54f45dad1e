#pragma once
#include <cstdint>

#include "isa.hpp"

namespace vspdf {

// GB/s at which `threads` threads read `nbytes` each, again and again for about `seconds`: that of the cache they fit
// in.
double read_bandwidth(int threads, double seconds, int64_t nbytes, Isa isa);

}  // namespace vspdf
