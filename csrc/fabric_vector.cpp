// Vector operations: micro-threads an element at a time, those in memory at once, and their cycles by bank.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "fabric.hpp"

namespace vspdf::fabric {

bool Fabric::can_step(const Pe& e, const MicroThread& t, int& reason) const {
    for (const Dsr* d : {&t.src0, &t.src1}) {
        if (d->kind == Dsr::kFabricIn && !e.in[d->queue].is_ready(now_)) {
            reason = 1;
            return false;
        }
    }
    if (t.dst.kind == Dsr::kFabricOut && !e.out[t.dst.queue].has_room(now_)) {
        reason = 2;
        return false;
    }
    return true;
}

// One element (one wavelet's worth) of one micro-thread; they take turns. `contended`: the task wants the datapath too.
// True if the datapath was used.
bool Fabric::step_thread(int p, Pe& e, bool contended) {
    const int n = int(e.threads.size());
    int best = -1;
    for (int i = 0; i < n; ++i) {
        const int k = (e.next_thread + i) % n;
        MicroThread& t = e.threads[k];
        int reason = 0;
        if (t.start > now_ || (contended && t.vector.low)) continue;
        if (!can_step(e, t, reason)) {
            if (e.reason != 2) e.reason = reason;
            continue;
        }
        if (best < 0 || (e.threads[best].vector.low && !t.vector.low)) best = k;
    }
    if (best < 0) return false;
    element(p, e, e.threads[best]);
    e.next_thread = best + 1 < n ? best + 1 : 0;
    MicroThread& t = e.threads[best];
    if (t.done == t.length) {
        const Vector v = t.vector;
        if (t.sync) e.waiting = false;
        if (v.arith == Arith::kDot) e.f[v.scalar] = t.scalar;
        note(p, t.start, now_ + 1, 2, int(v.arith));
        e.threads.erase(e.threads.begin() + best);
        if (e.next_thread >= int(e.threads.size())) e.next_thread = 0;
        finish(e, v);
    }
    return true;
}

void Fabric::finish(Pe& e, const Vector& v) {
    if (v.then_activate >= 0) e.active[v.then_activate] = 1;
    if (v.then_unblock >= 0) e.blocked[v.then_unblock] = 0;
}

float Fabric::get(int p, const Pe& e, const Dsr& d, int i) const {
    const int64_t size = d.half ? 2 : 4;
    const int64_t address = d.base + int64_t(i) * d.stride * size;
    if (address < 0 || address + size > int64_t(e.sram.size())) {
        fail(p, "reads SRAM at byte " + std::to_string(address) + ", outside the " + std::to_string(e.sram.size()) +
                    " in use.");
    }
    const uint8_t* at = e.sram.data() + address;
    return d.half ? half_to_float(load_word<uint16_t>(at)) : load_word<float>(at);
}

void Fabric::put(int p, Pe& e, const Dsr& d, int i, float value) {
    const int64_t size = d.half ? 2 : 4;
    const int64_t address = d.base + int64_t(i) * d.stride * size;
    if (address < 0 || address + size > int64_t(e.sram.size())) {
        fail(p, "writes SRAM at byte " + std::to_string(address) + ", outside the " + std::to_string(e.sram.size()) +
                    " in use.");
    }
    if (d.half) {
        const uint16_t bits = float_to_half(value);
        std::memcpy(e.sram.data() + address, &bits, 2);
    } else {
        std::memcpy(e.sram.data() + address, &value, 4);
    }
}

void Fabric::element(int p, Pe& e, MicroThread& t) {
    const bool half = t.dst.half || t.src0.half;
    const int lanes = half ? std::min(2, t.length - t.done) : 1;
    uint32_t in0 = 0, in1 = 0, out = 0;
    auto take = [&](const Dsr& d) {
        if (d.kind != Dsr::kFabricIn) return uint32_t(0);
        Fifo& fifo = e.in[d.queue];
        const Wavelet w = fifo.pop(now_);
        schedule_router(p, now_ + 1);
        return w.value;
    };
    const bool unary = t.vector.arith == Arith::kMove || t.vector.arith == Arith::kFill;
    if (t.vector.arith != Arith::kFill) in0 = take(t.src0);
    if (!unary) in1 = take(t.src1);
    auto value = [&](const Dsr& d, uint32_t word, int lane) {
        if (d.kind == Dsr::kMemory) return get(p, e, d, t.done + lane);
        if (half) return half_to_float(uint16_t(word >> 16 * lane));
        float f;
        std::memcpy(&f, &word, 4);
        return f;
    };
    for (int lane = 0; lane < lanes; ++lane) {
        const int i = t.done + lane;
        float result = 0;
        switch (t.vector.arith) {
            case Arith::kFill:
                result = t.scalar;
                break;
            case Arith::kMove:
                result = value(t.src0, in0, lane);
                break;
            case Arith::kAdd:
                result = value(t.src0, in0, lane) + value(t.src1, in1, lane);
                break;
            case Arith::kMul:
                result = value(t.src0, in0, lane) * value(t.src1, in1, lane);
                break;
            case Arith::kFmac:
                result = value(t.src0, in0, lane) + value(t.src1, in1, lane) * t.scalar;
                break;
            case Arith::kDot:
                t.scalar += value(t.src0, in0, lane) * value(t.src1, in1, lane);
                break;
        }
        if (t.vector.arith == Arith::kFmac || t.vector.arith == Arith::kDot) ++e.stats.fmacs;
        if (t.vector.arith == Arith::kAdd) ++e.stats.adds;
        if (t.vector.arith == Arith::kDot) continue;
        if (t.dst.kind == Dsr::kMemory) {
            put(p, e, t.dst, i, result);
        } else if (half) {
            out |= uint32_t(float_to_half(result)) << 16 * lane;
        } else {
            std::memcpy(&out, &result, 4);
        }
    }
    if (t.dst.kind == Dsr::kFabricOut && t.vector.arith != Arith::kDot) {
        e.out[t.dst.queue].push({out, false, now_ + 1});
        ++e.outgoing;
        schedule_router(p, now_ + 1);
    }
    t.done += lanes;
    ++e.stats.vector;
}

int64_t Fabric::datapath_cycles(const Vector& v, int64_t length, bool half) const {
    const bool fmac = v.arith == Arith::kFmac || v.arith == Arith::kDot;
    const double per_cycle = half ? m_.fmac_fp16_rate : fmac ? m_.fmac_fp32_rate : v.pair ? m_.pair_rate : 1;
    return int64_t(std::ceil(double(length) / per_cycle - 1e-9));
}

// The same alignments come again and again: each is timed once.
int64_t Fabric::timed(const Vector& v, const Dsr& dst, const Dsr& src0, const Dsr& src1, int length, bool half) {
    const int64_t period = int64_t(m_.banks) * m_.bank_bytes;
    auto phase = [&](int64_t bytes) { return uint64_t((bytes % period + period) % period); };
    uint64_t key = uint64_t(length) << 4 | uint64_t(v.arith) << 1 | uint64_t(v.pair);
    for (const Dsr* d : {&dst, &src0, &src1}) {
        key = (key * 0x9e3779b97f4a7c15u) ^ (key >> 29) ^ phase(d->base);
        key =
            (key * 0x9e3779b97f4a7c15u) ^ (key >> 29) ^ phase(d->stride * int64_t(half ? 2 : 4)) << 1 ^ uint64_t(half);
    }
    const Timing exact{key,
                       v.arith,
                       v.pair,
                       half,
                       length,
                       {phase(dst.base), phase(src0.base), phase(src1.base)},
                       {dst.stride, src0.stride, src1.stride}};
    auto [at, fresh] = timings_.try_emplace(exact, 0);
    if (fresh) {
        Access x;
        x.arith = v.arith;
        x.base[0] = dst.base, x.base[1] = src0.base, x.base[2] = src1.base;
        const int64_t strides[3] = {dst.stride, src0.stride, src1.stride};
        at->second = vector_cycles(m_, x, length, half, v.pair, strides);
    }
    return at->second;
}

void Fabric::compute(int p, Pe& e, const Vector& v) {
    const Dsr &dst = e.dsrs[v.dst], &src0 = e.dsrs[v.src0], &src1 = e.dsrs[v.src1];
    const int n = v.arith == Arith::kDot ? src0.length : dst.length;
    const float scalar = e.f[v.scalar];
    const bool plain = !dst.half && !src0.half && !src1.half && v.arith == Arith::kFmac && n > 0;
    if (plain) {  // the hot case, checked once
        get(p, e, src1, 0), get(p, e, src1, n - 1), get(p, e, src0, 0), get(p, e, src0, n - 1);
        put(p, e, dst, 0, get(p, e, dst, 0)), put(p, e, dst, n - 1, get(p, e, dst, n - 1));
        float* d = reinterpret_cast<float*>(e.sram.data() + dst.base);
        const float* a = reinterpret_cast<const float*>(e.sram.data() + src0.base);
        const float* b = reinterpret_cast<const float*>(e.sram.data() + src1.base);
        for (int i = 0; i < n; ++i) d[i * dst.stride] = a[i * src0.stride] + b[i * src1.stride] * scalar;
        e.stats.fmacs += n;
        return;
    }
    float sum = 0;
    for (int i = 0; i < n; ++i) {
        switch (v.arith) {
            case Arith::kFill:
                put(p, e, dst, i, scalar);
                break;
            case Arith::kMove:
                put(p, e, dst, i, get(p, e, src0, i));
                break;
            case Arith::kAdd:
                put(p, e, dst, i, get(p, e, src0, i) + get(p, e, src1, i));
                break;
            case Arith::kMul:
                put(p, e, dst, i, get(p, e, src0, i) * get(p, e, src1, i));
                break;
            case Arith::kFmac:
                put(p, e, dst, i, get(p, e, src0, i) + get(p, e, src1, i) * scalar);
                break;
            case Arith::kDot:
                sum += get(p, e, src0, i) * get(p, e, src1, i);
                break;
        }
    }
    if (v.arith == Arith::kFmac || v.arith == Arith::kDot) e.stats.fmacs += n;
    if (v.arith == Arith::kAdd) e.stats.adds += n;
    if (v.arith == Arith::kDot) e.f[v.scalar] = sum;
}

void Fabric::start_vector(int p, Pe& e, const Vector& v, int issue) {
    const Dsr &dst = e.dsrs[v.dst], &src0 = e.dsrs[v.src0], &src1 = e.dsrs[v.src1];
    const bool unary = v.arith == Arith::kMove || v.arith == Arith::kFill;
    const bool streams = dst.kind != Dsr::kMemory || (v.arith != Arith::kFill && src0.kind != Dsr::kMemory) ||
                         (!unary && src1.kind != Dsr::kMemory);
    const int length = v.arith == Arith::kDot ? src0.length : dst.length;
    if (streams) {
        if (int(e.threads.size()) >= m_.micro_threads) {  // a limit of the machine, no fault of the simulator
            throw std::invalid_argument(name(p) + ", cycle " + std::to_string(now_) +
                                        ": the program runs more micro-threads at once than this machine has, " +
                                        std::to_string(m_.micro_threads) + ".");
        }
        MicroThread t;
        t.vector = v;
        t.dst = dst, t.src0 = src0, t.src1 = src1;
        t.length = length;
        const int startup = v.chained ? 0 : m_.vector_startup;
        t.start = now_ + issue + startup;
        t.scalar = v.arith == Arith::kDot ? 0 : e.f[v.scalar];
        t.sync = !v.async;
        if (unary) t.src1.kind = Dsr::kMemory;
        if (v.arith == Arith::kFill) t.src0.kind = Dsr::kMemory;
        e.busy_until = now_ + issue + (v.async ? 0 : startup);
        e.stats.scalar += issue;
        e.stats.vector += v.async ? 0 : startup;
        if (length > 0) {
            e.waiting = t.sync;
            e.threads.push_back(t);
            schedule_pe(p, t.start);
        } else {
            finish(e, v);
        }
        return;
    }
    if (v.async) fail(p, "a micro-thread needs a fabric operand.");
    compute(p, e, v);
    const bool half = dst.half || src0.half;
    const int startup = v.chained ? 0 : v.pair ? m_.pair_startup : m_.vector_startup;
    const int64_t cycles = timed(v, dst, src0, src1, length, half);
    const int64_t datapath = std::min(cycles, datapath_cycles(v, length, half));
    note(p, now_, now_ + issue + startup + cycles, 1, int(v.arith));
    e.busy_until = now_ + issue + startup + cycles;
    e.stats.scalar += issue;
    e.stats.vector += startup + datapath;
    e.stats.bank_stall += cycles - datapath;
    finish(e, v);
}

}  // namespace vspdf::fabric
