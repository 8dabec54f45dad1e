// A region of a wafer of small cores: an event simulator that computes, counts cycles and explains where they went.
//
// Every processing element (PE) has banked SRAM, a scalar core that runs one task at a time, vector operations whose
// operands are SRAM or fabric streams, micro-threads for the streaming ones, and a router with five ports. Time skips
// to the next event; results do not depend on the order in which PEs are visited within a cycle. All costs come in with
// `Machine`: this file knows mechanisms, simulator/machines/*.yaml knows numbers.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <queue>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace vspdf::fabric {

// Router ports.
enum Port : uint8_t { kWest = 0, kEast = 1, kNorth = 2, kSouth = 3, kRamp = 4, kPorts = 5 };
inline constexpr const char* kPortNames[kPorts] = {"west", "east", "north", "south", "ramp"};
inline int opposite(int port) { return port ^ 1; }  // of the four links

struct Machine {
    int colours = 24;
    int switch_positions = 4;
    int hop_cycles = 1;
    int ramp_cycles = 2;
    int router_buffer = 4;             // wavelets a router holds per colour
    std::vector<int> in_queue_depth;   // words
    std::vector<int> out_queue_depth;  // words
    int micro_threads = 8;
    int sram_bytes = 49152;
    int banks = 8;
    int read_groups = 4;        // two reads collide when their banks are equal modulo this
    int bank_bytes = 4;         // consecutive bytes in one bank
    int port_bytes = 8;         // of one access
    int accumulator_delay = 5;  // cycles from reading an FMAC's multiplicand to reading what it adds to
    int write_delay = 3;        // cycles from an operation's last read to the write of its result
    int vector_startup = 6;
    int pair_startup = 35;      // of the two-per-cycle mode
    double pair_rate = 2;       // fp32 multiplications or additions per cycle in that mode
    double fmac_fp32_rate = 1;  // per cycle
    double fmac_fp16_rate = 4;
    int task_switch = 10;
};

// A data-structure register: where a vector operand lives.
struct Dsr {
    enum Kind : uint8_t { kMemory, kFabricIn, kFabricOut } kind = kMemory;
    bool half = false;  // fp16 elements, two per wavelet
    int base = 0;       // bytes
    int length = 0;     // elements
    int stride = 1;     // elements; 0 repeats one
    int queue = 0;
    int colour = 0;
};

enum class Op : uint8_t {
    kWork,       // scalar instructions whose result no later one needs here
    kLi,         // r[a] = imm
    kAdd,        // r[a] = r[b] + r[c] + imm
    kMul,        // r[a] = r[b] * imm
    kLoad,       // r[a] = word at imm + 4 r[b]
    kLoadF,      // f[a] = float at imm + 4 r[b]; c: fp16 at imm + 2 r[b]
    kStoreF,     // float at imm + 4 r[b] = f[a]
    kUnpack,     // arrived wavelet: f[a] = high half as fp16, r[b] = low half
    kSetBase,    // dsr[a].base = imm + r[b]
    kSetLength,  // dsr[a].length = r[b]
    kVector,     // vectors[a]
    kLess,       // if r[a] < r[b] go to imm
    kEqual,      // if r[a] == r[b] go to imm
    kJump,       // go to imm
    kActivate,   // task a becomes runnable
    kBlock,      // task a may not start
    kUnblock,
    kSend,    // f[a] as one wavelet through out-queue b on colour c; imm: 1 as control
    kSwitch,  // colour a's switch to position b, once its out-queues and router hold no wavelet of it
    kStamp,   // stamps[a] = now
    kEnd,
};

struct Instr {
    Op op = Op::kEnd;
    int a = 0, b = 0, c = 0, imm = 0;
    int cycles = 1;
};

enum class Arith : uint8_t { kMove, kFill, kAdd, kMul, kFmac, kDot };

struct Vector {
    Arith arith = Arith::kMove;
    int dst = 0, src0 = 0, src1 = 0;  // DSR numbers
    int scalar = 0;                   // f register: factor of kFmac, value of kFill, result of kDot
    bool chained = false;             // follows its like without a gap: no start-up, the pipeline stays full
    bool async = false;               // as a micro-thread beside the task
    bool pair = false;                // two fp32 per cycle
    bool low = false;                 // priority of a micro-thread: only where the datapath is idle
    int then_activate = -1, then_unblock = -1;
};

// Code is shared by many PEs; task t starts at entry[t].
struct Code {
    std::vector<Instr> instrs;
    std::vector<Vector> vectors;
    std::vector<Dsr> dsrs;
    std::vector<int> entry;
    std::vector<int> entry_cycles;  // from being chosen to the first instruction; -1: the machine's task switch
};

// How an operation walks through SRAM: destination, first source (an FMAC's accumulator), second source.
struct Access {
    Arith arith = Arith::kMove;
    int64_t base[3] = {0, 0, 0}, advance[3] = {0, 0, 0};  // bytes
};

// Cycles until the last of `length` elements has entered the pipeline, by datapath or banks, without start-up.
int64_t vector_cycles(const Machine& m, Access x, int64_t length, bool half, bool pair, const int64_t* strides);

struct Wavelet {
    uint32_t value;
    bool control;
    int64_t ready;
};

// A FIFO whose freed slots become visible to the sender in the next cycle, so that visiting order does not matter.
struct Fifo {
    std::vector<Wavelet> slots;
    int head = 0, count = 0, popped = 0;
    int64_t popped_at = -1;

    int occupied(int64_t now) const { return count + (popped_at == now ? popped : 0); }
    bool has_room(int64_t now) const { return occupied(now) < int(slots.size()); }
    bool is_ready(int64_t now) const { return count > 0 && slots[head].ready <= now; }
    void push(const Wavelet& w) {
        int tail = head + count;
        if (tail >= int(slots.size())) tail -= int(slots.size());
        slots[tail] = w;
        ++count;
    }
    Wavelet pop(int64_t now) {
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
};

struct SwitchPosition {
    uint8_t rx = 0, tx = 0;  // bit masks of ports
};

// One colour in one router.
struct Channel {
    int colour = 0;
    std::vector<SwitchPosition> positions;
    int position = 0;
    Fifo fifo;
    uint8_t pending = 0;  // ports that the head still has to leave by
    bool head_open = false;
    uint8_t filtered = 0;  // ports that take only data whose index (low 16 bits) lies in [low, high)
    int low = 0, high = 0;

    // Ports that a wavelet leaves by.
    uint8_t ways(const Wavelet& w) const {
        const int index = int(w.value & 0xffffu);
        const uint8_t tx = positions[position].tx;
        return w.control || (low <= index && index < high) ? tx : uint8_t(tx & ~filtered);
    }
};

struct MicroThread {
    Vector vector;
    Dsr dst, src0, src1;
    int done = 0, length = 0;
    int64_t start = 0;
    float scalar = 0;
    bool sync = false;
};

struct PeStats {
    int64_t busy = 0, wait_data = 0, back_pressure = 0, idle = 0;     // by spans of time: their sum is `cycles`
    int64_t vector = 0, bank_stall = 0, scalar = 0, task_switch = 0;  // at issue: their sum is `busy`
    int64_t fmacs = 0, adds = 0, sent = 0, received = 0, forwarded = 0;
};

struct TraceEvent {
    int pe;
    int64_t begin, end;
    int kind;  // 0 task switch, 1 vector operation in SRAM, 2 streaming operation, 3 scalar instructions
    int id;
};

class Deadlock : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class Fabric {
  public:
    Fabric(int width, int height, Machine machine);

    // Set-up; errors name the PE and colour. `positions`: up to 4 (rx, tx) masks; a control wavelet that leaves a
    // router moves on to the next, the last goes back to the first.
    void route(int x, int y, int colour, const std::vector<SwitchPosition>& positions);
    void filter(int x, int y, int colour, int ports, int low, int high);  // data by index; control wavelets pass
    void queue(int x, int y, int colour, int in_queue);                   // deliver this colour to that in-queue
    void bind(int x, int y, int colour, int task, bool control);
    int add_code(Code code);
    void load(int x, int y, int code);
    void set_register(int x, int y, int reg, int value);
    void activate(int x, int y, int task);
    void block(int x, int y, int task);
    uint8_t* memory(int x, int y, int64_t address, int64_t bytes);  // checked
    // The host feeds a link at the region's edge (or any port), one wavelet per `interval` cycles at most.
    void source(int x, int y, int port, int colour, std::vector<uint32_t> values, std::vector<uint8_t> control,
                int interval);
    void sink(int x, int y, int port, int colour);
    const std::vector<std::pair<int64_t, uint32_t>>& sunk(int x, int y, int port, int colour) const;

    // Runs until nothing is left to do; throws Deadlock with an explanation, or std::runtime_error past max_cycles.
    int64_t run(int64_t max_cycles);

    int width() const { return width_; }
    int height() const { return height_; }
    int64_t cycles() const { return now_; }
    const PeStats& stats(int p) const { return pes_[p].stats; }
    const PeStats& stats_at(int p, int slot) const { return pes_[p].stats_at[slot]; }  // when the stamp was set
    int64_t stamp(int p, int slot) const { return pes_[p].stamps[slot]; }
    const std::array<int64_t, 64>& sent() const { return sent_; }
    const std::array<int64_t, 64>& delivered() const { return delivered_; }
    // What `sent` wavelets had to become: each counted once, plus copies at forks, less those that a filter kept.
    const std::array<int64_t, 64>& due() const { return due_; }
    int64_t events() const { return events_; }
    void trace(size_t most) { trace_limit_ = most; }  // events to note; 0: none
    const std::vector<TraceEvent>& trace_events() const { return trace_; }

    static constexpr int kStamps = 8;

  private:
    struct Pe {
        int code = -1;
        std::vector<uint8_t> sram;
        std::array<int32_t, 16> r{};
        std::array<float, 8> f{};
        std::vector<Dsr> dsrs;
        std::vector<uint8_t> active, blocked;  // per task
        std::vector<int8_t> task_of_queue, control_of_queue;
        std::vector<Fifo> in;
        std::vector<Fifo> out;
        std::vector<int> out_colour;  // colour of each out-queue's stream
        std::vector<MicroThread> threads;
        int next_thread = 0, next_out = 0;
        int outgoing = 0;  // wavelets in all out-queues
        int task = -1, pc = 0;
        Wavelet argument{};
        bool waiting = false;        // for its synchronous streaming operation
        int64_t starting_until = 0;  // a hardware-triggered task's start-up: the datapath is idle
        int64_t busy_until = 0, stream_until = 0, counted_to = 0, visited = -1, streamed_at = -2;
        int reason = 0;  // of not being busy: 0 idle, 1 data, 2 back-pressure
        std::array<int64_t, kStamps> stamps{};
        PeStats stats;
        std::array<PeStats, kStamps> stats_at{};
    };
    struct Router {
        std::vector<Channel> channels;
        std::array<int8_t, 64> index;     // colour -> channel
        std::array<int8_t, 64> queue_of;  // colour -> in-queue
        int turn = 0;
        std::array<int8_t, kPorts> holder{-1, -1, -1, -1, -1};  // channel that used the port last
        int64_t wake = -1, visited = -1;
    };
    struct Source {
        int router, port, colour;
        std::vector<uint32_t> values;
        std::vector<uint8_t> control;
        size_t next = 0;
        int interval = 1;
        int64_t ready = 0;
    };

    struct Timing {
        uint64_t hash;
        Arith arith;
        bool pair, half;
        int length;
        std::array<uint64_t, 3> base;
        std::array<int, 3> stride;
        bool operator==(const Timing& o) const {
            return arith == o.arith && pair == o.pair && half == o.half && length == o.length && base == o.base &&
                   stride == o.stride;
        }
    };
    struct Hash {
        size_t operator()(const Timing& t) const { return size_t(t.hash); }
    };

    int at(int x, int y) const;
    std::string name(int p) const;
    int neighbour(int p, int port) const;
    void check_routes() const;
    void schedule_pe(int p, int64_t when) {
        if (when < now_ + kWheel) {
            wheel_pe_[when % kWheel].push_back(p);
        } else {
            later_.push({when, p});
        }
    }
    void schedule_router(int p, int64_t when) {
        Router& r = routers_[p];
        if (r.wake == when) return;
        r.wake = when;
        wheel_router_[when % kWheel].push_back(p);
    }
    void step_pe(int p);
    void step_router(int p);
    bool send(int p, Channel& channel, int port, const Wavelet& wavelet);
    void wake_feeders(int p, const Channel& channel);
    bool has_work(const Pe& e) const;
    bool step_thread(int p, Pe& e, bool contended);
    bool can_step(const Pe& e, const MicroThread& t, int& reason) const;
    void element(int p, Pe& e, MicroThread& t);
    void finish(Pe& e, const Vector& v);
    void execute(int p, Pe& e);
    void start_vector(int p, Pe& e, const Vector& v, int issue);
    void compute(int p, Pe& e, const Vector& v);
    int64_t datapath_cycles(const Vector& v, int64_t length, bool half) const;
    int64_t timed(const Vector& v, const Dsr& dst, const Dsr& src0, const Dsr& src1, int length, bool half);
    float get(int p, const Pe& e, const Dsr& d, int i) const;
    void put(int p, Pe& e, const Dsr& d, int i, float value);
    void count_to(Pe& e, int64_t when);
    void note(int p, int64_t begin, int64_t end, int kind, int id) {
        if (trace_.size() < trace_limit_) trace_.push_back({p, begin, end, kind, id});
    }
    [[noreturn]] void fail(int p, const std::string& what) const;
    std::string explain_deadlock() const;
    bool unfinished() const;

    int width_, height_;
    Machine m_;
    std::vector<Pe> pes_;
    std::vector<Router> routers_;
    std::vector<Code> codes_;
    std::vector<Source> sources_;
    std::vector<std::vector<int>> sources_of_;
    std::map<std::array<int, 3>, std::vector<std::pair<int64_t, uint32_t>>> sinks_;
    int64_t now_ = 0, events_ = 0;
    std::array<int64_t, 64> sent_{}, delivered_{}, due_{};
    std::unordered_map<Timing, int64_t, Hash> timings_;
    size_t trace_limit_ = 0;
    std::vector<TraceEvent> trace_;

    static constexpr int kWheel = 64;
    std::array<std::vector<int>, kWheel> wheel_pe_, wheel_router_;
    std::priority_queue<std::pair<int64_t, int>, std::vector<std::pair<int64_t, int>>, std::greater<>> later_;
};

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

template <class T>
T load_word(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

}  // namespace vspdf::fabric
