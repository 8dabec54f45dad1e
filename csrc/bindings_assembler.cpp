// The instructions that generated kernels are made of, one by one, for tests against an independent disassembler.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "assembler.hpp"

namespace py = pybind11;
using namespace vspdf;

namespace {

const char* name(Reg reg) {
    switch (reg) {
        case rdx:
            return "rdx";
        case rsi:
            return "rsi";
        case rdi:
            return "rdi";
        case r8:
            return "r8";
        default:
            return "?";
    }
}

// [(code, what it says)]
class Samples {
  public:
    // `write` appends one instruction to the assembler.
    template <class Assembler, class Write>
    void add(const std::string& text, const Write& write) {
        Assembler assembler;
        write(assembler);
        found.append(
            py::make_tuple(py::bytes(reinterpret_cast<const char*>(assembler.data()), assembler.size()), text));
    }

    py::list found;
};

std::string address(Mem mem) {
    const std::string disp = std::to_string(mem.disp < 0 ? -int64_t(mem.disp) : int64_t(mem.disp));
    return std::string("[") + name(mem.base) + (mem.disp < 0 ? "-" : "+") + disp + "]";
}

}  // namespace

py::list assembler_samples() {
    Samples samples;
    const auto vector = [](char kind, int n) { return std::string(1, kind) + "mm" + std::to_string(n); };
    for (Reg base : {rdx, rsi, rdi, r8}) {
        for (int32_t disp : {0, 4, -4, 32, 64, -128, 127, 128, 508, 512, -512, -8192, 8128, 8192, 12345, -70000}) {
            const Mem mem{base, disp};
            const std::string at = address(mem);
            for (int i : {0, 1, 7, 8, 15, 16, 23, 31}) {
                const int j = 31 - i;
                const std::string zi = vector('z', i), zj = vector('z', j);
                samples.add<Avx512Assembler>("vmovups " + zi + "," + at, [&](auto& a) { a.load(i, mem); });
                samples.add<Avx512Assembler>("vmovups " + at + "," + zi, [&](auto& a) { a.store(mem, i); });
                samples.add<Avx512Assembler>("vfmadd231ps " + zi + "," + zj + "," + at + "{1to16}",
                                             [&](auto& a) { a.fma_broadcast(i, j, mem); });
            }
            for (int i : {0, 1, 7, 8, 13, 15}) {
                const int j = 15 - i;
                const std::string yi = vector('y', i), yj = vector('y', j);
                samples.add<Avx2Assembler>("vmovups " + yi + "," + at, [&](auto& a) { a.load(i, mem); });
                samples.add<Avx2Assembler>("vmovups " + at + "," + yi, [&](auto& a) { a.store(mem, i); });
                samples.add<Avx2Assembler>("vbroadcastss " + yi + "," + at, [&](auto& a) { a.broadcast(i, mem); });
                samples.add<Avx2Assembler>("vfmadd231ps " + yi + "," + yj + "," + at,
                                           [&](auto& a) { a.fma(i, j, mem); });
            }
            samples.add<Assembler>("lea r8," + at, [&](auto& a) { a.lea(r8, mem); });
        }
        for (int32_t value : {1, 127, 128, 256, 8192}) {
            samples.add<Assembler>(std::string("add ") + name(base) + "," + std::to_string(value),
                                   [&](auto& a) { a.add(base, value); });
        }
    }
    for (int i : {0, 7, 8, 15, 16, 31}) {
        const std::string z = vector('z', i);
        samples.add<Avx512Assembler>("vpxord " + z + "," + z + "," + z, [&](auto& a) { a.zero(i); });
    }
    for (int i : {0, 7, 8, 15}) {
        const int j = (i + 8) % 16, k = 15 - i;
        const std::string y = vector('y', i);
        samples.add<Avx2Assembler>("vxorps " + y + "," + y + "," + y, [&](auto& a) { a.zero(i); });
        samples.add<Avx2Assembler>("vfmadd231ps " + y + "," + vector('y', j) + "," + vector('y', k),
                                   [&](auto& a) { a.fma(i, j, k); });
    }
    samples.add<Assembler>("vzeroupper", [](auto& a) { a.vzeroupper(); });
    samples.add<Assembler>("ret", [](auto& a) { a.ret(); });
    return samples.found;
}
