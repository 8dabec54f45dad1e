// What routers do in a cycle: wavelets from channel to channel, forks, filters, switches, turns.
#include "fabric.hpp"

namespace vspdf::fabric {

namespace {

constexpr int8_t kPortOf[17] = {-1, 0, 1, -1, 2, -1, -1, -1, 3, -1, -1, -1, -1, -1, -1, -1, 4};  // of a single bit

}  // namespace

void Fabric::wake_feeders(int p, const Channel& channel) {
    const uint8_t rx = channel.positions[channel.position].rx;
    for (int port = 0; port < kRamp; ++port) {
        if (!(rx & 1 << port)) continue;
        const int q = neighbour(p, port);
        if (q >= 0) schedule_router(q, now_ + 1);
    }
    // The ramp and the host's streams feed the same router, which is awake next cycle anyway.
    schedule_router(p, now_ + 1);
}

bool Fabric::send(int p, Channel& channel, int port, const Wavelet& wavelet) {
    if (port == kRamp) {
        const int q = routers_[p].queue_of[channel.colour];
        Fifo& fifo = pes_[p].in[q];
        if (!fifo.has_room(now_)) return false;
        fifo.push({wavelet.value, wavelet.control, now_ + m_.ramp_cycles});
        ++delivered_[channel.colour];
        ++pes_[p].stats.received;
        schedule_pe(p, now_ + m_.ramp_cycles);
        return true;
    }
    const int q = neighbour(p, port);
    if (q < 0) {
        sinks_.at({p, port, channel.colour}).push_back({now_, wavelet.value});
        ++delivered_[channel.colour];
        return true;
    }
    Router& r = routers_[q];
    Channel& there = r.channels[r.index[channel.colour]];
    if (!(there.positions[there.position].rx & 1 << opposite(port)) || !there.fifo.has_room(now_)) return false;
    there.fifo.push({wavelet.value, wavelet.control, now_ + m_.hop_cycles});
    schedule_router(q, now_ + m_.hop_cycles);
    return true;
}

void Fabric::step_router(int p) {
    Router& r = routers_[p];
    if (r.visited == now_) return;
    r.visited = now_;
    Pe& e = pes_[p];
    bool again = false;
    // Up the ramp: one wavelet per cycle from the PE's out-queues in turn.
    const int queues = e.outgoing ? int(e.out.size()) : 0;
    for (int i = 0, o = e.next_out; i < queues; ++i, o = o + 1 == queues ? 0 : o + 1) {
        Fifo& fifo = e.out[o];
        if (!fifo.count) continue;
        if (!fifo.is_ready(now_)) {
            again = true;
            continue;
        }
        const int index = r.index[e.out_colour[o]];
        if (index < 0) fail(p, "colour " + std::to_string(e.out_colour[o]) + " is sent but has no route here.");
        Channel& c = r.channels[index];
        if (!(c.positions[c.position].rx & 1 << kRamp) || !c.fifo.has_room(now_)) continue;
        const Wavelet w = fifo.pop(now_);
        --e.outgoing;
        c.fifo.push({w.value, w.control, now_ + m_.ramp_cycles});
        schedule_router(p, now_ + m_.ramp_cycles);
        ++sent_[c.colour], ++due_[c.colour];
        ++e.stats.sent;
        e.next_out = o + 1 == queues ? 0 : o + 1;
        schedule_pe(p, now_ + 1);
        again |= fifo.count > 0;
        break;
    }
    // From the host.
    uint8_t fed = 0;
    for (int s : sources_of_[p]) {
        Source& source = sources_[s];
        if (source.next == source.values.size() || fed & 1 << source.port) continue;
        Channel& c = r.channels[r.index[source.colour]];
        if (source.ready > now_) {
            if (source.ready < now_ + kWheel)
                wheel_router_[source.ready % kWheel].push_back(p);
            else
                again = true;
            continue;
        }
        if (!c.fifo.has_room(now_)) continue;
        c.fifo.push(
            {source.values[source.next], !source.control.empty() && source.control[source.next], now_ + m_.hop_cycles});
        ++source.next;
        ++sent_[source.colour], ++due_[source.colour];
        source.ready = now_ + source.interval;
        fed |= uint8_t(1 << source.port);
        again = true;
    }
    // Out by every port at most one wavelet. A colour keeps a port for as long as its stream goes on without a gap;
    // otherwise colours take turns.
    const int n = int(r.channels.size());
    uint8_t used = 0;
    uint64_t open = 0;  // channels whose head is there and has somewhere to go
    auto leave = [&](int i, uint32_t ports) {
        Channel& c = r.channels[i];
        const Wavelet& w = c.fifo.slots[c.fifo.head];
        for (uint32_t left = c.pending & ports; left; left &= left - 1) {
            const uint8_t bit = uint8_t(left & -left);
            const int port = kPortOf[bit];
            if (used & bit) {
                again = true;
            } else if (send(p, c, port, w)) {
                used |= bit;
                c.pending &= uint8_t(~bit);
                r.holder[port] = int8_t(i);
                if (port != kRamp) ++e.stats.forwarded;
            }
        }
    };
    for (int i = 0; i < n; ++i) {
        Channel& c = r.channels[i];
        if (!c.fifo.count) continue;
        if (!c.fifo.is_ready(now_)) {
            again = true;
            continue;
        }
        if (!c.head_open) {
            c.head_open = true;
            c.pending = c.ways(c.fifo.slots[c.fifo.head]);
            for (uint32_t left = c.pending; left; left &= left - 1) ++due_[c.colour];
            --due_[c.colour];
        }
        open |= uint64_t(1) << i;
        uint32_t held = 0;
        for (int port = 0; port < kPorts; ++port) held |= uint32_t(r.holder[port] == i) << port;
        if (held & c.pending) leave(i, held);
    }
    for (int k = 0, i = r.turn; open && k < n; ++k, i = i + 1 == n ? 0 : i + 1) {
        if (!(open >> i & 1)) continue;
        open &= ~(uint64_t(1) << i);
        Channel& c = r.channels[i];
        if (c.pending) leave(i, 0xff);
        if (!c.pending) {
            const bool control = c.fifo.pop(now_).control;
            c.head_open = false;
            if (!c.fifo.count && c.positions.size() > 1) schedule_pe(p, now_ + 1);  // a task may wait to switch
            if (control && c.positions.size() > 1) c.position = (c.position + 1) % int(c.positions.size());
            wake_feeders(p, c);
        }
    }
    if (n) r.turn = (r.turn + 1) % n;
    if (again) schedule_router(p, now_ + 1);
}

}  // namespace vspdf::fabric
