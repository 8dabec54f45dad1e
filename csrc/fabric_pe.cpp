// What a processing element does in a cycle: tasks, scalar instructions, and who has the datapath.
#include <algorithm>

#include "fabric.hpp"

namespace vspdf::fabric {

bool Fabric::has_work(const Pe& e) const {
    if (e.busy_until > now_) return true;
    if (e.waiting) return false;
    if (e.task >= 0) return true;
    for (size_t t = 0; t < e.active.size(); ++t) {
        if (e.active[t] && !e.blocked[t]) return true;
    }
    for (size_t q = 0; q < e.in.size(); ++q) {
        if (!e.in[q].is_ready(now_)) continue;
        const int task = e.in[q].slots[e.in[q].head].control ? e.control_of_queue[q] : e.task_of_queue[q];
        if (task >= 0 && !e.blocked[task]) return true;
    }
    return false;
}

void Fabric::execute(int p, Pe& e) {
    const Code& code = codes_[e.code];
    // Scalar instructions run on until something takes the datapath for long or the task ends; their cycles add up.
    int64_t spent = 0, steps = 0;
    auto word = [&](int address) -> uint8_t* {
        if (address < 0 || address + 4 > int(e.sram.size())) {
            fail(p, "accesses SRAM at byte " + std::to_string(address) + ", outside the " +
                        std::to_string(e.sram.size()) + " in use.");
        }
        return e.sram.data() + address;
    };
    for (;;) {
        const Instr& i = code.instrs[e.pc++];
        switch (i.op) {
            case Op::kWork:
                break;
            case Op::kLi:
                e.r[i.a] = i.imm;
                break;
            case Op::kAdd:
                e.r[i.a] = e.r[i.b] + e.r[i.c] + i.imm;
                break;
            case Op::kMul:
                e.r[i.a] = e.r[i.b] * i.imm;
                break;
            case Op::kLoad:
                e.r[i.a] = load_word<int32_t>(word(i.imm + 4 * e.r[i.b]));
                break;
            case Op::kLoadF:
                if (i.c) {
                    const int address = i.imm + 2 * e.r[i.b];
                    e.f[i.a] = half_to_float(load_word<uint16_t>(word(address & ~3) + (address & 3)));
                } else {
                    e.f[i.a] = load_word<float>(word(i.imm + 4 * e.r[i.b]));
                }
                break;
            case Op::kStoreF:
                std::memcpy(word(i.imm + 4 * e.r[i.b]), &e.f[i.a], 4);
                break;
            case Op::kUnpack:
                e.f[i.a] = half_to_float(uint16_t(e.argument.value >> 16));
                e.r[i.b] = int32_t(e.argument.value & 0xffffu);
                break;
            case Op::kSetBase:
                e.dsrs[i.a].base = i.imm + e.r[i.b];
                break;
            case Op::kSetLength:
                e.dsrs[i.a].length = e.r[i.b];
                break;
            case Op::kLess:
                if (e.r[i.a] < e.r[i.b]) e.pc = i.imm;
                break;
            case Op::kEqual:
                if (e.r[i.a] == e.r[i.b]) e.pc = i.imm;
                break;
            case Op::kJump:
                e.pc = i.imm;
                break;
            case Op::kBlock:
                e.blocked[i.a] = 1;
                break;
            // The rest has effects at a definite time: first let the cycles spent so far pass.
            case Op::kUnblock:
            case Op::kActivate:
            case Op::kSend:
            case Op::kSwitch:
            case Op::kStamp:
            case Op::kVector:
            case Op::kEnd: {
                if (spent) {
                    --e.pc;
                    e.busy_until = now_ + spent;
                    e.stats.scalar += spent;
                    note(p, now_, e.busy_until, 3, e.task);
                    return;
                }
                if (i.op == Op::kVector) {
                    start_vector(p, e, code.vectors[i.a], i.cycles);
                    return;
                }
                if (i.op == Op::kSend) {
                    Fifo& fifo = e.out[i.b];
                    if (!fifo.has_room(now_)) {
                        --e.pc;
                        e.reason = 2;
                        return;
                    }
                    uint32_t bits;
                    std::memcpy(&bits, &e.f[i.a], 4);
                    if (e.out_colour[i.b] < 0) e.out_colour[i.b] = i.c;
                    fifo.push({bits, i.imm != 0, now_ + 1});
                    ++e.outgoing;
                    schedule_router(p, now_ + 1);
                } else if (i.op == Op::kSwitch) {
                    Channel& c = routers_[p].channels.at(routers_[p].index.at(i.a));
                    bool inside = c.position != i.b && c.fifo.count > 0;
                    for (size_t q = 0; q < e.out.size() && c.position != i.b; ++q)
                        inside |= e.out_colour[q] == i.a && e.out[q].count > 0;
                    if (inside) {  // the router wakes it when the last has left
                        --e.pc;
                        return;
                    }
                    c.position = i.b;
                    wake_feeders(p, c);
                } else if (i.op == Op::kUnblock) {
                    e.blocked[i.a] = 0;
                } else if (i.op == Op::kActivate) {
                    e.active[i.a] = 1;
                } else if (i.op == Op::kStamp) {
                    count_to(e, now_);
                    e.stamps[i.a] = now_;
                    e.stats_at[i.a] = e.stats;
                } else {
                    e.task = -1;
                    if (!i.cycles) return;
                }
                if (i.cycles) {
                    e.busy_until = now_ + i.cycles;
                    e.stats.scalar += i.cycles;
                    return;
                }
                break;
            }
        }
        if (i.op < Op::kActivate) spent += i.cycles;
        if (i.op == Op::kBlock) spent += i.cycles;
        if (++steps > 1 << 20) fail(p, "a task runs without end.");  // not by cycles: a machine may be slow
    }
}

void Fabric::step_pe(int p) {
    Pe& e = pes_[p];
    if (e.visited == now_) return;
    e.visited = now_;
    count_to(e, now_);
    e.reason = 0;
    const bool main = has_work(e);
    // Task and micro-threads take turns where both want the datapath.
    bool streamed = false;
    const bool was_working = e.busy_until > now_, starting = now_ < e.starting_until;
    const bool contended = main && !starting;
    if (!(contended && e.streamed_at == now_ - 1)) {
        if (!e.threads.empty()) streamed = step_thread(p, e, contended);
    }
    if (streamed) {
        e.streamed_at = now_;
        if (starting) {
            --e.stats.task_switch;  // a cycle of the start-up that was put to use
        } else if (was_working) {
            ++e.busy_until;
        } else {
            e.stream_until = now_ + 1;
        }
    }
    if (!was_working && !streamed) {
        while (e.busy_until <= now_ && !e.waiting) {
            if (e.task >= 0) {
                const int pc = e.pc;
                execute(p, e);
                if (e.task >= 0 && e.busy_until <= now_ && !e.waiting && e.pc == pc) break;  // an out-queue is full
                continue;
            }
            int task = -1;
            for (size_t t = 0; t < e.active.size() && task < 0; ++t) {
                if (e.active[t] && !e.blocked[t]) task = int(t), e.active[t] = 0;
            }
            for (size_t q = 0; q < e.in.size() && task < 0; ++q) {
                if (!e.in[q].is_ready(now_)) continue;
                const bool control = e.in[q].slots[e.in[q].head].control;
                const int bound = control ? e.control_of_queue[q] : e.task_of_queue[q];
                if (bound < 0 || e.blocked[bound]) continue;
                task = bound;
                e.argument = e.in[q].pop(now_);
                schedule_router(p, now_ + 1);
            }
            if (task < 0) break;
            e.task = task;
            e.pc = codes_[e.code].entry[task];
            const int own = codes_[e.code].entry_cycles[task];
            const int cycles = own >= 0 ? own : m_.task_switch;
            e.busy_until = now_ + cycles;
            if (own >= 0) e.starting_until = e.busy_until;
            e.stats.task_switch += cycles;
            note(p, now_, e.busy_until, 0, task);
        }
    }
    if (e.busy_until > now_ && e.busy_until != now_ + 1) schedule_pe(p, e.busy_until);
    // A micro-thread that stood back goes on in the next start-up, or when the task has nothing left to do.
    bool stood_back = false;
    if (!streamed && (e.starting_until > now_ || e.busy_until <= now_)) {
        int reason = 0;
        for (const MicroThread& t : e.threads) stood_back |= t.start <= now_ && can_step(e, t, reason);
    }
    if (streamed || stood_back || e.busy_until == now_ + 1) schedule_pe(p, now_ + 1);
}

}  // namespace vspdf::fabric
