// bfloat16: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace vspdf {

struct bf16 {
    uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

static inline void from_float(float x, float& y) { y = x; }
// Round to nearest, ties to even, as PyTorch does; NaN stays NaN.
static inline void from_float(float x, bf16& y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y.bits = x != x ? uint16_t(0x7FC0) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace vspdf
