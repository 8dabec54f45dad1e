// What an SRAM of banks makes of an operation: how long its accesses take, and its half-precision words.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "fabric.hpp"

namespace vspdf::fabric {

namespace {

// Cycle by cycle, oldest access first: writes, accumulator reads, operand reads. Elements stay in order; a stage that
// is held up lets the ones ahead of it go on, so that a stall travels down the pipeline as a gap.
int64_t memory_cycles(const Machine& m, const Access& x, int64_t steps) {
    const bool reads0 = x.arith != Arith::kFill;
    const bool reads1 = x.arith != Arith::kFill && x.arith != Arith::kMove;
    const bool writes = x.arith != Arith::kDot;
    const int delay = x.arith == Arith::kFmac ? m.accumulator_delay : 0;  // from multiplicand to accumulator
    auto banks = [&](int which, int64_t step, int* out) {                 // those one access touches
        const int64_t begin = x.base[which] + step * x.advance[which];
        const int64_t first = begin / m.bank_bytes, last = (begin + x.bytes - 1) / m.bank_bytes;
        const int count = int(std::min<int64_t>({last - first + 1, m.banks, 64}));
        for (int k = 0; k < count; ++k) out[k] = int((first + k) % m.banks);
        return count;
    };
    int write[64], late[64], first[64], second[64];
    auto overlap = [](const int* a, int na, const int* b, int nb, int modulus) {
        for (int i = 0; i < na; ++i) {
            for (int k = 0; k < nb; ++k) {
                if (a[i] % modulus == b[k] % modulus) return true;
            }
        }
        return false;
    };
    std::vector<int64_t> ready(steps);    // when the last operand of a step was read
    std::vector<int64_t> entered(steps);  // when its first was
    int64_t in = 0, accumulated = 0, written = 0, t = 0;
    bool half_in = false;  // one of two colliding operands is read
    for (; (delay ? accumulated : in) < steps; ++t) {
        const int64_t complete = delay ? accumulated : in;
        int n_write = 0, n_late = 0;
        if (writes && written < complete && t >= ready[written] + m.write_delay) n_write = banks(0, written++, write);
        const int64_t gone = accumulated;
        if (delay && accumulated < in && t >= entered[accumulated] + delay) {
            n_late = banks(1, accumulated, late);
            if (overlap(late, n_late, write, n_write, m.banks)) {
                n_late = 0;
            } else {
                ready[accumulated++] = t;
            }
        }
        if (delay) {
            if (in == steps || in - gone > delay) continue;  // all are on their way, or no room before the adder
            const int n = banks(2, in, first);
            if (overlap(first, n, write, n_write, m.banks) || overlap(first, n, late, n_late, m.read_groups)) continue;
            entered[in++] = t;
            continue;
        }
        const int n0 = reads0 ? banks(1, in, first) : 0, n1 = reads1 ? banks(2, in, second) : 0;
        const bool collide = overlap(first, n0, second, n1, m.read_groups);
        if (!half_in && overlap(first, n0, write, n_write, m.banks)) continue;
        if (collide && !half_in) {
            half_in = true;
            continue;
        }
        if (overlap(second, n1, write, n_write, m.banks)) {
            half_in |= n0 > 0 && collide;
            continue;
        }
        half_in = false;
        ready[in++] = t;
    }
    return t;
}

}  // namespace

int64_t vector_cycles(const Machine& m, Access x, int64_t length, bool half, bool pair, const int64_t* strides) {
    const int size = half ? 2 : 4;
    const bool reads1 = x.arith != Arith::kFill && x.arith != Arith::kMove;
    const bool dense = (x.arith == Arith::kDot || strides[0] == 1) && (x.arith == Arith::kFill || strides[1] == 1) &&
                       (!reads1 || strides[2] == 1);
    const bool fmac = x.arith == Arith::kFmac || x.arith == Arith::kDot;
    const double per_cycle = half ? m.fmac_fp16_rate : fmac ? m.fmac_fp32_rate : pair ? m.pair_rate : 1;
    const int lanes = dense ? std::max(1, std::min(int(per_cycle), m.port_bytes / size)) : 1;
    x.bytes = lanes * size;
    const int64_t period = int64_t(m.banks) * m.bank_bytes;
    for (int k = 0; k < 3; ++k) {
        x.advance[k] = (strides[k] * x.bytes % period + period) % period;
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
