// Python's view of the fabric simulator; simulator/core.py wraps it in names.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "fabric.hpp"

namespace py = pybind11;
using namespace vspdf::fabric;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Machine machine(const py::dict& d) {
    Machine m;
    size_t taken = 0;
    auto field = [&](const char* key, auto& value) {
        if (!d.contains(key)) throw std::invalid_argument(std::string("the fabric's machine lacks '") + key + "'.");
        value = d[key].cast<std::decay_t<decltype(value)>>();
        ++taken;
    };
    field("colours", m.colours);
    field("switch_positions", m.switch_positions);
    field("hop_cycles", m.hop_cycles);
    field("ramp_cycles", m.ramp_cycles);
    field("router_buffer", m.router_buffer);
    field("in_queue_depth", m.in_queue_depth);
    field("out_queue_depth", m.out_queue_depth);
    field("micro_threads", m.micro_threads);
    field("sram_bytes", m.sram_bytes);
    field("banks", m.banks);
    field("read_groups", m.read_groups);
    field("bank_bytes", m.bank_bytes);
    field("port_bytes", m.port_bytes);
    field("accumulator_delay", m.accumulator_delay);
    field("write_delay", m.write_delay);
    field("vector_startup", m.vector_startup);
    field("pair_startup", m.pair_startup);
    field("pair_rate", m.pair_rate);
    field("fmac_fp32_rate", m.fmac_fp32_rate);
    field("fmac_fp16_rate", m.fmac_fp16_rate);
    field("task_switch", m.task_switch);
    if (taken != d.size()) throw std::invalid_argument("the fabric's machine has keys that it does not know.");
    return m;
}

// What every PE did, all in all or (slot >= 0) until its stamp.
py::dict statistics(const Fabric& f, int slot) {
    static constexpr std::pair<const char*, int64_t PeStats::*> fields[] = {
        {"busy", &PeStats::busy},
        {"wait_data", &PeStats::wait_data},
        {"back_pressure", &PeStats::back_pressure},
        {"idle", &PeStats::idle},
        {"vector", &PeStats::vector},
        {"bank_stall", &PeStats::bank_stall},
        {"scalar", &PeStats::scalar},
        {"task_switch", &PeStats::task_switch},
        {"fmacs", &PeStats::fmacs},
        {"adds", &PeStats::adds},
        {"sent", &PeStats::sent},
        {"received", &PeStats::received},
        {"forwarded", &PeStats::forwarded},
    };
    if (slot >= Fabric::kStamps) throw std::invalid_argument("no such stamp.");
    py::dict all;
    for (const auto& [name, field] : fields) {
        Array<int64_t> out({f.height(), f.width()});
        for (int p = 0; p < f.width() * f.height(); ++p) {
            out.mutable_data()[p] = (slot < 0 ? f.stats(p) : f.stats_at(p, slot)).*field;
        }
        all[name] = out;
    }
    return all;
}

}  // namespace

void bind_fabric(py::module_& module) {
    py::module_ m = module.def_submodule("fabric", "Event simulator of a region of a wafer.");
    py::register_exception<Deadlock>(m, "Deadlock", PyExc_RuntimeError);
    py::enum_<Op>(m, "Op")
        .value("work", Op::kWork)
        .value("li", Op::kLi)
        .value("add", Op::kAdd)
        .value("mul", Op::kMul)
        .value("load", Op::kLoad)
        .value("load_f", Op::kLoadF)
        .value("store_f", Op::kStoreF)
        .value("unpack", Op::kUnpack)
        .value("set_base", Op::kSetBase)
        .value("set_length", Op::kSetLength)
        .value("vector", Op::kVector)
        .value("less", Op::kLess)
        .value("equal", Op::kEqual)
        .value("jump", Op::kJump)
        .value("activate", Op::kActivate)
        .value("block", Op::kBlock)
        .value("unblock", Op::kUnblock)
        .value("send", Op::kSend)
        .value("switch", Op::kSwitch)
        .value("stamp", Op::kStamp)
        .value("end", Op::kEnd);
    py::enum_<Arith>(m, "Arith")
        .value("move", Arith::kMove)
        .value("fill", Arith::kFill)
        .value("add", Arith::kAdd)
        .value("mul", Arith::kMul)
        .value("fmac", Arith::kFmac)
        .value("dot", Arith::kDot);
    py::class_<Instr>(m, "Instr")
        .def(py::init([](Op op, int a, int b, int c, int imm, int cycles) { return Instr{op, a, b, c, imm, cycles}; }),
             py::arg("op"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("imm"), py::arg("cycles"));
    py::class_<Dsr>(m, "Dsr").def(
        py::init([](const std::string& kind, bool half, int base, int length, int stride, int queue, int colour) {
            Dsr d;
            d.kind = kind == "memory" ? Dsr::kMemory : kind == "in" ? Dsr::kFabricIn : Dsr::kFabricOut;
            d.half = half, d.base = base, d.length = length, d.stride = stride, d.queue = queue, d.colour = colour;
            return d;
        }),
        py::arg("kind"), py::arg("half"), py::arg("base"), py::arg("length"), py::arg("stride"), py::arg("queue"),
        py::arg("colour"));
    py::class_<Vector>(m, "Vector")
        .def(py::init([](Arith arith, int dst, int src0, int src1, int scalar, bool chained, bool async, bool pair,
                         bool low, int activate, int unblock) {
                 return Vector{arith, dst, src0, src1, scalar, chained, async, pair, low, activate, unblock};
             }),
             py::arg("arith"), py::arg("dst"), py::arg("src0"), py::arg("src1"), py::arg("scalar"), py::arg("chained"),
             py::arg("asynchronous"), py::arg("pair"), py::arg("low"), py::arg("then_activate"),
             py::arg("then_unblock"));

    m.def(
        "vector_cycles",
        [](const py::dict& d, Arith arith, std::array<int64_t, 3> base, std::array<int64_t, 3> strides, int64_t length,
           bool half, bool pair) {
            Access x;
            x.arith = arith;
            for (int k = 0; k < 3; ++k) x.base[k] = base[k];
            return vector_cycles(machine(d), x, length, half, pair, strides.data());
        },
        py::arg("machine"), py::arg("arith"), py::arg("base"), py::arg("strides"), py::arg("length"), py::arg("half"),
        py::arg("pair"));

    py::class_<Fabric>(m, "Fabric")
        .def(py::init([](int width, int height, const py::dict& d) { return new Fabric(width, height, machine(d)); }),
             py::arg("width"), py::arg("height"), py::arg("machine"))
        .def("route",
             [](Fabric& f, int x, int y, int colour, const std::vector<std::pair<int, int>>& positions) {
                 std::vector<SwitchPosition> list;
                 for (auto [rx, tx] : positions) list.push_back({uint8_t(rx), uint8_t(tx)});
                 f.route(x, y, colour, list);
             })
        .def("filter", &Fabric::filter)
        .def("queue", &Fabric::queue)
        .def("bind", &Fabric::bind)
        .def("add_code",
             [](Fabric& f, std::vector<Instr> instrs, std::vector<Vector> vectors, std::vector<Dsr> dsrs,
                std::vector<int> entry, std::vector<int> entry_cycles) {
                 return f.add_code({std::move(instrs), std::move(vectors), std::move(dsrs), std::move(entry),
                                    std::move(entry_cycles)});
             })
        .def("load", &Fabric::load)
        .def("set_register", &Fabric::set_register)
        .def("activate", &Fabric::activate)
        .def("block", &Fabric::block)
        .def("write",
             [](Fabric& f, int x, int y, int64_t address, const py::buffer& data) {
                 const py::buffer_info info = data.request();
                 std::memcpy(f.memory(x, y, address, info.size * info.itemsize), info.ptr, info.size * info.itemsize);
             })
        .def("read",
             [](Fabric& f, int x, int y, int64_t address, int64_t bytes) {
                 Array<uint8_t> out(bytes);
                 std::memcpy(out.mutable_data(), f.memory(x, y, address, bytes), bytes);
                 return out;
             })
        .def("source",
             [](Fabric& f, int x, int y, int port, int colour, const Array<uint32_t>& values,
                const Array<uint8_t>& control, int interval) {
                 f.source(x, y, port, colour, {values.data(), values.data() + values.size()},
                          {control.data(), control.data() + control.size()}, interval);
             })
        .def("sink", &Fabric::sink)
        .def("sunk",
             [](const Fabric& f, int x, int y, int port, int colour) {
                 const auto& list = f.sunk(x, y, port, colour);
                 Array<int64_t> times(list.size());
                 Array<uint32_t> values(list.size());
                 for (size_t i = 0; i < list.size(); ++i) {
                     times.mutable_data()[i] = list[i].first;
                     values.mutable_data()[i] = list[i].second;
                 }
                 return py::make_tuple(times, values);
             })
        .def("run", &Fabric::run, py::arg("max_cycles"), py::call_guard<py::gil_scoped_release>())
        .def("trace", &Fabric::trace)
        .def("trace_events",
             [](const Fabric& f) {
                 Array<int64_t> out({int64_t(f.trace_events().size()), int64_t(5)});
                 int64_t* o = out.mutable_data();
                 for (const TraceEvent& t : f.trace_events()) {
                     *o++ = t.pe, *o++ = t.begin, *o++ = t.end, *o++ = t.kind, *o++ = t.id;
                 }
                 return out;
             })
        .def("stamps",
             [](const Fabric& f, int slot) {
                 if (slot < 0 || slot >= Fabric::kStamps) throw std::invalid_argument("no such stamp.");
                 Array<int64_t> out({f.height(), f.width()});
                 for (int p = 0; p < f.width() * f.height(); ++p) out.mutable_data()[p] = f.stamp(p, slot);
                 return out;
             })
        .def("stats", &statistics, py::arg("slot") = -1)
        .def_property_readonly("cycles", &Fabric::cycles)
        .def_property_readonly("events", &Fabric::events)
        .def_property_readonly("sent", &Fabric::sent)
        .def_property_readonly("delivered", &Fabric::delivered)
        .def_property_readonly("due", &Fabric::due);
}
