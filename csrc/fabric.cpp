#include "fabric.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace vspdf::fabric {

namespace {

const char* kPortNames[kPorts] = {"west", "east", "north", "south", "ramp"};
constexpr int8_t kPortOf[17] = {-1, 0, 1, -1, 2, -1, -1, -1, 3, -1, -1, -1, -1, -1, -1, -1, 4};  // of a single bit

int opposite(int port) { return port ^ 1; }

template <class T>
T load_word(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

}  // namespace

void Fifo::push(const Wavelet& w) {
    int tail = head + count;
    if (tail >= int(slots.size())) tail -= int(slots.size());
    slots[tail] = w;
    ++count;
}

Wavelet Fifo::pop(int64_t now) {
    const Wavelet w = slots[head];
    if (++head == int(slots.size())) head = 0;
    --count;
    if (popped_at != now) {
        popped_at = now;
        popped = 0;
    }
    ++popped;
    return w;
}

// ---- set-up
// ----------------------------------------------------------------------------------------------------------

Fabric::Fabric(int width, int height, Machine machine) : width_(width), height_(height), m_(std::move(machine)) {
    if (width < 1 || height < 1) throw std::invalid_argument("a region needs at least 1 x 1 PEs.");
    if (m_.colours < 1 || m_.colours > 64) throw std::invalid_argument("a machine may have 1 to 64 colours.");
    if (m_.hop_cycles < 1 || m_.hop_cycles >= kWheel || m_.ramp_cycles < 1 || m_.ramp_cycles >= kWheel) {
        throw std::invalid_argument("a hop and the ramp may take 1 to " + std::to_string(kWheel - 1) + " cycles.");
    }
    pes_.resize(size_t(width) * height);
    routers_.resize(pes_.size());
    sources_of_.resize(pes_.size());
    for (Pe& e : pes_) {
        e.in.resize(m_.in_queue_depth.size());
        for (size_t q = 0; q < e.in.size(); ++q) e.in[q].slots.resize(m_.in_queue_depth[q] + m_.ramp_cycles);
        e.out.resize(m_.out_queue_depth.size());
        for (size_t q = 0; q < e.out.size(); ++q) e.out[q].slots.resize(m_.out_queue_depth[q]);
        e.out_colour.assign(e.out.size(), -1);
        e.task_of_queue.assign(e.in.size(), -1);
        e.control_of_queue.assign(e.in.size(), -1);
    }
    for (Router& r : routers_) {
        r.index.fill(-1);
        r.queue_of.fill(-1);
    }
}

int Fabric::at(int x, int y) const {
    if (x < 0 || y < 0 || x >= width_ || y >= height_) {
        throw std::invalid_argument("PE (" + std::to_string(x) + ", " + std::to_string(y) +
                                    ") is outside the region of " + std::to_string(width_) + " x " +
                                    std::to_string(height_) + ".");
    }
    return y * width_ + x;
}

std::string Fabric::name(int p) const {
    return "PE (" + std::to_string(p % width_) + ", " + std::to_string(p / width_) + ")";
}

void Fabric::fail(int p, const std::string& what) const {
    throw std::runtime_error(name(p) + ", cycle " + std::to_string(now_) + ": " + what);
}

int Fabric::neighbour(int p, int port) const {
    const int x = p % width_, y = p / width_;
    switch (port) {
        case kWest:
            return x > 0 ? p - 1 : -1;
        case kEast:
            return x + 1 < width_ ? p + 1 : -1;
        case kNorth:
            return y > 0 ? p - width_ : -1;
        case kSouth:
            return y + 1 < height_ ? p + width_ : -1;
        default:
            return -1;
    }
}

void Fabric::route(int x, int y, int colour, const std::vector<SwitchPosition>& positions) {
    const int p = at(x, y);
    if (colour < 0 || colour >= m_.colours) {
        throw std::invalid_argument("colour " + std::to_string(colour) +
                                    " does not exist: this machine has colours 0 to " + std::to_string(m_.colours - 1) +
                                    ".");
    }
    if (positions.empty() || int(positions.size()) > m_.switch_positions) {
        throw std::invalid_argument("a colour has 1 to " + std::to_string(m_.switch_positions) +
                                    " switch positions, not " + std::to_string(positions.size()) + ".");
    }
    Router& r = routers_[p];
    if (r.index[colour] >= 0) {
        throw std::invalid_argument(name(p) + ": colour " + std::to_string(colour) + " already has a route.");
    }
    Channel channel;
    channel.colour = colour;
    channel.positions = positions;
    uint8_t rx = 0;
    for (const SwitchPosition& s : positions) {
        if (!s.tx || !s.rx) throw std::invalid_argument(name(p) + ": a route needs at least one rx and one tx port.");
        rx |= s.rx;
    }
    channel.fifo.slots.resize(m_.router_buffer + (rx & 1 << kRamp ? m_.ramp_cycles : 0));
    r.index[colour] = int8_t(r.channels.size());
    r.channels.push_back(std::move(channel));
}

void Fabric::filter(int x, int y, int colour, int ports, int low, int high) {
    const int p = at(x, y);
    const int index = colour >= 0 && colour < m_.colours ? routers_[p].index[colour] : -1;
    if (index < 0) throw std::invalid_argument(name(p) + ": colour " + std::to_string(colour) + " has no route.");
    Channel& c = routers_[p].channels[index];
    c.filtered = uint8_t(ports), c.low = low, c.high = high;
}

void Fabric::queue(int x, int y, int colour, int in_queue) {
    const int p = at(x, y);
    if (in_queue < 0 || in_queue >= int(pes_[p].in.size())) {
        throw std::invalid_argument("in-queue " + std::to_string(in_queue) + " does not exist: this machine has " +
                                    std::to_string(pes_[p].in.size()) + ".");
    }
    if (colour < 0 || colour >= m_.colours)
        throw std::invalid_argument("colour " + std::to_string(colour) + " does not exist.");
    routers_[p].queue_of[colour] = int8_t(in_queue);
}

void Fabric::bind(int x, int y, int colour, int task, bool control) {
    const int p = at(x, y);
    const int q = colour >= 0 && colour < m_.colours ? routers_[p].queue_of[colour] : -1;
    if (q < 0)
        throw std::invalid_argument(name(p) + ": colour " + std::to_string(colour) +
                                    " has no in-queue to bind a task to.");
    (control ? pes_[p].control_of_queue : pes_[p].task_of_queue)[q] = int8_t(task);
}

int Fabric::add_code(Code code) {
    codes_.push_back(std::move(code));
    return int(codes_.size()) - 1;
}

void Fabric::load(int x, int y, int code) {
    Pe& e = pes_[at(x, y)];
    const Code& c = codes_.at(code);
    e.code = code;
    e.dsrs = c.dsrs;
    e.active.assign(c.entry.size(), 0);
    e.blocked.assign(c.entry.size(), 0);
    for (const Dsr& d : c.dsrs) {
        if (d.kind == Dsr::kFabricOut) {
            if (d.queue >= int(e.out.size()))
                throw std::invalid_argument("out-queue " + std::to_string(d.queue) + " does not exist.");
            if (e.out_colour[d.queue] >= 0 && e.out_colour[d.queue] != d.colour) {
                throw std::invalid_argument(name(at(x, y)) + ": out-queue " + std::to_string(d.queue) +
                                            " serves one colour, not two.");
            }
            e.out_colour[d.queue] = d.colour;
        } else if (d.kind == Dsr::kFabricIn && d.queue >= int(e.in.size())) {
            throw std::invalid_argument("in-queue " + std::to_string(d.queue) + " does not exist.");
        }
    }
}

void Fabric::set_register(int x, int y, int reg, int value) { pes_[at(x, y)].r.at(reg) = value; }

void Fabric::activate(int x, int y, int task) {
    const int p = at(x, y);
    pes_[p].active.at(task) = 1;
    schedule_pe(p, now_);
}

void Fabric::block(int x, int y, int task) { pes_[at(x, y)].blocked.at(task) = 1; }

uint8_t* Fabric::memory(int x, int y, int64_t address, int64_t bytes) {
    const int p = at(x, y);
    if (address < 0 || bytes < 0 || address + bytes > m_.sram_bytes) {
        throw std::invalid_argument(name(p) + ": bytes " + std::to_string(address) + " to " +
                                    std::to_string(address + bytes) + " do not fit its SRAM of " +
                                    std::to_string(m_.sram_bytes) + " bytes.");
    }
    std::vector<uint8_t>& sram = pes_[p].sram;
    if (int64_t(sram.size()) < address + bytes) sram.resize(address + bytes, 0);
    return sram.data() + address;
}

void Fabric::source(int x, int y, int port, int colour, std::vector<uint32_t> values, std::vector<uint8_t> control,
                    int interval) {
    const int p = at(x, y);
    if (colour < 0 || colour >= m_.colours || routers_[p].index[colour] < 0) {
        throw std::invalid_argument(name(p) + ": colour " + std::to_string(colour) +
                                    " has no route for the host's stream.");
    }
    if (!control.empty() && control.size() != values.size())
        throw std::invalid_argument("control flags and values differ in length.");
    sources_of_[p].push_back(int(sources_.size()));
    sources_.push_back({p, port, colour, std::move(values), std::move(control), 0, std::max(1, interval), 0});
    schedule_router(p, now_);
}

void Fabric::sink(int x, int y, int port, int colour) { sinks_[{at(x, y), port, colour}]; }

const std::vector<std::pair<int64_t, uint32_t>>& Fabric::sunk(int x, int y, int port, int colour) const {
    return sinks_.at({at(x, y), port, colour});
}

// Every link a route uses must end in a router that accepts it, and no colour may run in a circle.
void Fabric::check_routes() const {
    for (int p = 0; p < int(routers_.size()); ++p) {
        for (const Channel& c : routers_[p].channels) {
            for (const SwitchPosition& s : c.positions) {
                for (int port = 0; port < kRamp; ++port) {
                    if (!(s.tx & 1 << port)) continue;
                    const int q = neighbour(p, port);
                    const std::string where =
                        name(p) + ": colour " + std::to_string(c.colour) + " leaves to the " + kPortNames[port];
                    if (q < 0) {
                        if (!sinks_.count({p, port, c.colour})) {
                            throw std::invalid_argument(where + ", off the region, where no host stream takes it.");
                        }
                        continue;
                    }
                    const int index = routers_[q].index[c.colour];
                    uint8_t rx = 0;
                    if (index >= 0) {
                        for (const SwitchPosition& t : routers_[q].channels[index].positions) rx |= t.rx;
                    }
                    if (!(rx & 1 << opposite(port))) {
                        throw std::invalid_argument(where + ", but " + name(q) + " does not accept it from the " +
                                                    kPortNames[opposite(port)] + ".");
                    }
                }
                if (s.tx & 1 << kRamp && routers_[p].queue_of[c.colour] < 0) {
                    throw std::invalid_argument(name(p) + ": colour " + std::to_string(c.colour) +
                                                " goes down the ramp, but has no in-queue there.");
                }
            }
        }
    }
    // Loops, among colours without switches (a switch may open one in time).
    std::vector<uint8_t> seen(routers_.size());
    for (int colour = 0; colour < m_.colours; ++colour) {
        std::fill(seen.begin(), seen.end(), 0);
        for (int start = 0; start < int(routers_.size()); ++start) {
            if (seen[start] || routers_[start].index[colour] < 0) continue;
            std::vector<std::pair<int, int>> stack{{start, 0}};
            seen[start] = 1;
            while (!stack.empty()) {
                auto& [p, port] = stack.back();
                if (port == kRamp) {
                    seen[p] = 2;
                    stack.pop_back();
                    continue;
                }
                const int out = port++;
                const Channel& c = routers_[p].channels[routers_[p].index[colour]];
                if (c.positions.size() > 1 || !(c.positions[0].tx & 1 << out)) continue;
                const int q = neighbour(p, out);
                if (q < 0) continue;
                if (seen[q] == 1) {
                    throw std::invalid_argument("the route of colour " + std::to_string(colour) +
                                                " runs in a circle through " + name(q) + ".");
                }
                if (!seen[q]) {
                    seen[q] = 1;
                    stack.push_back({q, 0});
                }
            }
        }
    }
}

// ---- time
// ------------------------------------------------------------------------------------------------------------

void Fabric::schedule_pe(int p, int64_t when) {
    if (when < now_ + kWheel) {
        wheel_pe_[when % kWheel].push_back(p);
    } else {
        later_.push({when, p});
    }
}

void Fabric::schedule_router(int p, int64_t when) {
    Router& r = routers_[p];
    if (r.wake == when) return;
    r.wake = when;
    wheel_router_[when % kWheel].push_back(p);
}

int64_t Fabric::run(int64_t max_cycles) {
    check_routes();
    std::vector<int> pes, routers;
    for (;;) {
        int64_t next = -1;
        for (int64_t t = now_; t < now_ + kWheel; ++t) {
            if (!wheel_pe_[t % kWheel].empty() || !wheel_router_[t % kWheel].empty()) {
                next = t;
                break;
            }
        }
        if (!later_.empty() && (next < 0 || later_.top().first < next)) next = later_.top().first;
        if (next < 0) break;
        if (next > max_cycles) {
            throw std::runtime_error("not finished after " + std::to_string(max_cycles) +
                                     " cycles; raise max_cycles if that is expected.");
        }
        now_ = next;
        pes.swap(wheel_pe_[now_ % kWheel]);
        routers.swap(wheel_router_[now_ % kWheel]);
        wheel_pe_[now_ % kWheel].clear();
        wheel_router_[now_ % kWheel].clear();
        while (!later_.empty() && later_.top().first == now_) {
            pes.push_back(later_.top().second);
            later_.pop();
        }
        events_ += int64_t(pes.size() + routers.size());
        for (int p : pes) step_pe(p);
        for (int p : routers) step_router(p);
    }
    if (unfinished()) throw Deadlock(explain_deadlock());
    for (Pe& e : pes_) {
        now_ = std::max({now_, e.busy_until, e.stream_until});
    }
    for (Pe& e : pes_) count_to(e, now_);
    return now_;
}

// Attributes the span since the last visit: busy until the datapath was free, then the reason noted for waiting.
void Fabric::count_to(Pe& e, int64_t when) {
    if (when <= e.counted_to) return;
    const int64_t busy_end = std::clamp(std::max(e.busy_until, e.stream_until), e.counted_to, when);
    e.stats.busy += busy_end - e.counted_to;
    const int64_t rest = when - busy_end;
    (e.reason == 0 ? e.stats.idle : e.reason == 1 ? e.stats.wait_data : e.stats.back_pressure) += rest;
    e.counted_to = when;
}

// ---- routers
// ---------------------------------------------------------------------------------------------------------

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

// ---- processing elements
// ---------------------------------------------------------------------------------------------

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
        if (int(e.threads.size()) >= m_.micro_threads) fail(p, "more micro-threads than the machine has.");
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

void Fabric::execute(int p, Pe& e) {
    const Code& code = codes_[e.code];
    // Scalar instructions run on until something takes the datapath for long or the task ends; their cycles add up.
    int64_t spent = 0;
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
        if (spent > 1 << 20) fail(p, "a task runs without end.");
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

// ---- when nothing moves
// ----------------------------------------------------------------------------------------------

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
