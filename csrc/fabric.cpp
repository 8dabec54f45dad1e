// Time: which elements and routers have something to do in which cycle.
#include "fabric.hpp"

#include <algorithm>

namespace vspdf::fabric {

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

}  // namespace vspdf::fabric
