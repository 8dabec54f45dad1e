// What an SRAM of banks makes of an operation: how long its accesses take, and its half-precision words.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "fabric.hpp"

namespace vspdf::fabric {

namespace {

// Cycle by cycle, oldest access first: writes, accumulator reads, operand reads. Elements stay in order; a stage that
// is held up lets the ones ahead of it go on, so that a stall travels down the pipeline as a gap. Two operands of one
// element in one bank group take the two read ports' cycle each, whenever the second is read. The operation ends when
// its last element has entered: the pipeline drains beside the next instruction.
int64_t memory_cycles(const Machine& m, const Access& x, int64_t steps) {
    const bool reads0 = x.arith != Arith::kFill;
    const bool reads1 = x.arith != Arith::kFill && x.arith != Arith::kMove;
    const bool writes = x.arith != Arith::kDot;
    const int delay = x.arith == Arith::kFmac ? m.accumulator_delay : 0;  // from multiplicand to accumulator
    auto bank = [&](int which, int64_t step) {                            // of an access: its first word's
        return int((x.base[which] + step * x.advance[which]) / m.bank_bytes % m.banks);
    };
    auto same_group = [&](int a, int b) { return a % m.read_groups == b % m.read_groups; };
    std::vector<int64_t> ready(steps);    // when the last operand of a step was read
    std::vector<int64_t> entered(steps);  // when its first was
    int64_t in = 0, accumulated = 0, written = 0, t = 0, gate = 0;
    bool half_in = false;  // one of two colliding operands is read
    for (; in < steps; ++t) {
        const int64_t complete = delay ? accumulated : in;
        int write = -1, late = -1;
        if (writes && written < complete && t >= ready[written] + m.write_delay) write = bank(0, written++);
        if (delay) {
            const int64_t gone = accumulated;
            if (accumulated < in && t >= entered[accumulated] + delay && bank(1, accumulated) != write) {
                late = bank(1, accumulated);
                ready[accumulated++] = t;
            }
            if (t < gate || in - gone > delay) continue;  // its predecessor still reads, or no room before the adder
            const int first = bank(2, in);
            if (first == write || (late >= 0 && same_group(first, late))) continue;
            gate = t + 1 + same_group(first, bank(1, in));
            entered[in++] = t;
            continue;
        }
        const int first = reads0 ? bank(1, in) : -1, second = reads1 ? bank(2, in) : -1;
        const bool collide = reads0 && reads1 && same_group(first, second);
        if (!half_in && reads0 && first == write) continue;
        if (collide && !half_in) {
            half_in = true;
            continue;
        }
        if (reads1 && second == write) {
            half_in |= collide;
            continue;
        }
        half_in = false;
        ready[in++] = t;
    }
    return std::max(t, gate);
}

// Elements a cycle that a stride allows of `full`: the table of the CSL language's appendix, in 16-bit words.
int simd_width(int64_t stride, int full) {
    if (stride == 0 || stride == 1) return full;
    constexpr int most[8] = {1, 2, 8, 8, 2, 8, 8, 2};
    return std::min(full, most[(stride % 8 + 8) % 8]);
}

}  // namespace

int64_t vector_cycles(const Machine& m, Access x, int64_t length, bool half, bool pair, const int64_t* strides) {
    const int size = half ? 2 : 4;
    const bool reads1 = x.arith != Arith::kFill && x.arith != Arith::kMove;
    const bool fmac = x.arith == Arith::kFmac || x.arith == Arith::kDot;
    const double per_cycle = half ? m.fmac_fp16_rate : fmac ? m.fmac_fp32_rate : pair ? m.pair_rate : 1;
    int lanes = std::max(1, std::min(int(per_cycle), m.port_bytes / size));
    if (x.arith != Arith::kDot) lanes = simd_width(strides[0], lanes);
    if (x.arith != Arith::kFill) lanes = simd_width(strides[1], lanes);
    if (reads1) lanes = simd_width(strides[2], lanes);
    const int64_t period = int64_t(m.banks) * m.bank_bytes;
    for (int k = 0; k < 3; ++k) {
        x.advance[k] = (strides[k] * lanes * size % period + period) % period;
        x.base[k] = (x.base[k] % period + period) % period;
    }
    const int64_t steps = (length + lanes - 1) / lanes;
    return std::max(memory_cycles(m, x, steps), int64_t(std::ceil(double(length) / per_cycle - 1e-9)));
}

float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    uint32_t out;
    if (magnitude >= 0x7c00u) {
        out = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        out = sign | ((magnitude << 13) + 0x38000000u);
    } else {
        const float tiny = float(magnitude) * 0x1p-24f;
        std::memcpy(&out, &tiny, 4);
        out |= sign;
    }
    float value;
    std::memcpy(&value, &out, 4);
    return value;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // subnormal half: the float adder rounds to nearest even for us
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return uint16_t(sign | (bits - 0x3f000000u));
    }
    return uint16_t(sign | ((bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13));
}

}  // namespace vspdf::fabric
