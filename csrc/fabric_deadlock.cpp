// When nothing moves: whether anything is left to do, and an explanation of who waits for whom.
#include "fabric.hpp"

namespace vspdf::fabric {

bool Fabric::unfinished() const {
    for (size_t p = 0; p < pes_.size(); ++p) {
        const Pe& e = pes_[p];
        if (!e.threads.empty() || e.task >= 0) return true;
        for (const Fifo& f : e.in) {
            if (f.count) return true;
        }
        for (const Fifo& f : e.out) {
            if (f.count) return true;
        }
        for (const Channel& c : routers_[p].channels) {
            if (c.fifo.count) return true;
        }
    }
    for (const Source& s : sources_) {
        if (s.next < s.values.size()) return true;
    }
    return false;
}

std::string Fabric::explain_deadlock() const {
    std::string text = "deadlock at cycle " + std::to_string(now_) + ": nothing can move, yet";
    int told = 0, more = 0;
    auto tell = [&](const std::string& line) {
        if (told < 16) {
            text += "\n  " + line;
            ++told;
        } else {
            ++more;
        }
    };
    for (int p = 0; p < int(pes_.size()); ++p) {
        const Pe& e = pes_[p];
        for (const MicroThread& t : e.threads) {
            const std::string progress =
                " (" + std::to_string(t.done) + " of " + std::to_string(t.length) + " elements done)";
            for (const Dsr* d : {&t.src0, &t.src1}) {
                if (d->kind == Dsr::kFabricIn && !e.in[d->queue].count) {
                    int colour = d->colour;
                    for (int c = 0; c < 64; ++c) {
                        if (routers_[p].queue_of[c] == d->queue) colour = c;
                    }
                    tell(name(p) + " waits for data on colour " + std::to_string(colour) + progress + ".");
                }
            }
            if (t.dst.kind == Dsr::kFabricOut && e.out[t.dst.queue].count) {
                tell(name(p) + " waits to send on colour " + std::to_string(t.dst.colour) + progress +
                     ": its out-queue is full.");
            }
        }
        if (e.task >= 0 && !e.waiting)
            tell(name(p) + " is inside task " + std::to_string(e.task) + " and waits to send.");
        for (size_t q = 0; q < e.in.size(); ++q) {
            if (!e.in[q].count) continue;
            const Wavelet& w = e.in[q].slots[e.in[q].head];
            const int bound = w.control ? e.control_of_queue[q] : e.task_of_queue[q];
            const std::string why = bound < 0          ? "nobody reads it"
                                    : e.blocked[bound] ? "its task is blocked"
                                                       : "its PE is waiting";
            tell(name(p) + " holds " + std::to_string(e.in[q].count) + " wavelets in in-queue " + std::to_string(q) +
                 ": " + why + ".");
        }
        for (const Channel& c : routers_[p].channels) {
            if (!c.fifo.count) continue;
            std::string to;
            const uint8_t left = c.head_open ? c.pending : c.ways(c.fifo.slots[c.fifo.head]);
            for (int port = 0; port < kPorts; ++port) {
                if (left & 1 << port) to += (to.empty() ? "" : ", ") + std::string(kPortNames[port]);
            }
            tell("the router of " + name(p) + " holds " + std::to_string(c.fifo.count) + " wavelets of colour " +
                 std::to_string(c.colour) + " for " + to + ", which takes none.");
        }
    }
    for (const Source& s : sources_) {
        if (s.next < s.values.size()) {
            tell("the host still has " + std::to_string(s.values.size() - s.next) + " wavelets of colour " +
                 std::to_string(s.colour) + " for " + name(s.router) + ".");
        }
    }
    if (more) text += "\n  and " + std::to_string(more) + " more.";
    return text;
}

}  // namespace vspdf::fabric
