// A region before it runs: routes, filters, queues, programs, what the host sends and takes; and their check.
#include "fabric.hpp"

namespace vspdf::fabric {

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

}  // namespace vspdf::fabric
