// The Python module vspdf._C. Pointers arrive as integers: the caller owns the memory and guarantees its size.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "assembler.hpp"
#include "bandwidth.hpp"
#include "bindings_door.hpp"
#include "exchange.hpp"
#include "gelu.hpp"
#include "isa.hpp"
#include "materialise.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "scratch.hpp"
#include "spmm_kernels.hpp"

namespace py = pybind11;
using namespace vspdf;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;  // no forcecast: another dtype is an error

std::unique_ptr<OpenPlan> make_plan(int64_t out_features, int64_t in_features, const Array<uint8_t>& bits,
                                    const std::string& isa, bool code) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (out_features < 1 || in_features < 1 || out_features > kMost || in_features > kMost) {
        throw std::invalid_argument("a plan needs 1 to 2^31 - 1 features on each side, not " +
                                    std::to_string(out_features) + " x " + std::to_string(in_features) + ".");
    }
    const int64_t numel = out_features * in_features, bytes = (numel + 7) / 8;
    if (bits.ndim() != 1 || bits.size() != bytes) {
        throw std::invalid_argument("bits must hold " + std::to_string(bytes) + " bytes, not " +
                                    std::to_string(bits.size()) + ".");
    }
    if (bits.writeable()) throw std::invalid_argument("bits must be read-only: the plan goes on reading them.");
    if (numel % 8 && bits.data()[bytes - 1] >> numel % 8) {
        throw std::invalid_argument("bits behind the last position must be zero.");
    }
    const Isa chosen = choose_isa(isa);
    const bool jit = code && jit_wanted(chosen);
    py::gil_scoped_release release;
    return std::make_unique<OpenPlan>(int(out_features), int(in_features), bits.data(), chosen, jit);
}

Dtype dtype_of(int dtype) {
    if (dtype != int(Dtype::f32) && dtype != int(Dtype::bf16)) {
        throw std::invalid_argument("dtype must be 0 (float32) or 1 (bfloat16), not " + std::to_string(dtype) + ".");
    }
    return Dtype(dtype);
}

// What a call says of its size; threads at least 1.
void check_call(int64_t tokens, int64_t stride, int threads) {
    if (tokens < 0 || stride < 0 || threads < 1) {
        throw std::invalid_argument("tokens and strides must be at least 0 and threads at least 1, not " +
                                    std::to_string(tokens) + ", " + std::to_string(stride) + " and " +
                                    std::to_string(threads) + ".");
    }
}

void check_bits(const Array<uint8_t>& bits, int64_t numel) {
    if (bits.ndim() != 1 || numel < 0 || bits.size() != (numel + 7) / 8) {
        throw std::invalid_argument("bits must hold " + std::to_string((numel + 7) / 8) + " bytes, not " +
                                    std::to_string(bits.size()) + ".");
    }
}

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_fabric(py::module_& module);  // bindings_fabric.cpp
py::list assembler_samples();           // bindings_assembler.cpp

PYBIND11_MODULE(_C, m) {
    m.doc() = "Sparse linear layers on CPUs: three products of a weight that exists only at kept positions.";
    m.attr("openmp") = kOpenMP;
    bind_fabric(m);
    bind_door(m);
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (Isa isa : isas()) names.push_back(isa_name(isa));
            return names;
        },
        "Instruction sets that can run here, best first.");

    m.def(
        "fma_peak",
        [](int threads, double seconds, const std::string& isa) {
            check_call(0, 0, threads);
            return fma_peak(threads, seconds, choose_isa(isa));
        },
        py::arg("threads"), py::arg("seconds") = 0.2, py::arg("isa") = "", py::call_guard<py::gil_scoped_release>(),
        "GFLOP/s of multiply-adds from registers of the instruction set that the kernels use: the ceiling.");

    m.def(
        "read_bandwidth",
        [](int threads, int64_t nbytes, double seconds, const std::string& isa) {
            check_call(0, 0, threads);
            return read_bandwidth(threads, seconds, nbytes, choose_isa(isa));
        },
        py::arg("threads"), py::arg("nbytes"), py::arg("seconds") = 0.1, py::arg("isa") = "",
        py::call_guard<py::gil_scoped_release>(),
        "GB/s at which so many threads read so many bytes each, again and again.");

    m.def(
        "gelu",
        [](uintptr_t out, uintptr_t x, int64_t n, bool tanh, int threads) {
            check_call(n, 0, threads);
            gelu(pointer<float>(out), pointer<const float>(x), n, Gelu(tanh), choose_isa(""), threads);
        },
        py::call_guard<py::gil_scoped_release>(), "GELU of n float32 numbers, exact or by tanh.");
    m.def(
        "gelu_grad",
        [](uintptr_t dx, uintptr_t dy, uintptr_t x, int64_t n, bool tanh, int threads) {
            check_call(n, 0, threads);
            gelu_grad(pointer<float>(dx), pointer<const float>(dy), pointer<const float>(x), n, Gelu(tanh),
                      choose_isa(""), threads);
        },
        py::call_guard<py::gil_scoped_release>(), "dy times the derivative of GELU at x.");

    m.def("assembler_samples", &assembler_samples,
          "Every instruction that kernels are generated from, over registers and displacements: (code, what it says).");

    m.def(
        "drop_lowest",
        [](Array<uint8_t> bits, int64_t numel, uintptr_t values, int64_t nnz, int64_t count, int threads) {
            check_bits(bits, numel);
            check_call(0, 0, threads);
            if (count > nnz) throw std::invalid_argument("no more values can go than there are.");
            uint8_t* to = bits.mutable_data();
            py::gil_scoped_release release;
            drop_lowest(to, numel, pointer<const float>(values), nnz, count, threads);
        },
        "Clears the bits of the smallest magnitudes among the values of the kept positions, of equal ones the first.");
    m.def(
        "accept",
        [](Array<uint8_t> taken, int64_t numel, const Array<int64_t>& hits, int64_t limit) {
            check_bits(taken, numel);
            uint8_t* to = taken.mutable_data();
            const int64_t *from = hits.data(), n = hits.size();
            py::gil_scoped_release release;
            if (!std::all_of(from, from + n, [&](int64_t hit) { return hit >= 0 && hit < numel; })) {
                throw std::invalid_argument("a hit is out of range.");
            }
            return accept(to, from, n, limit);
        },
        "Sets the bits of positions that are not taken yet, in order, until there are enough; returns how many.");
    m.def(
        "moved",
        [](const std::vector<uintptr_t>& out, const std::vector<uintptr_t>& values, const Array<uint8_t>& old_bits,
           const Array<uint8_t>& new_bits, int64_t numel, int64_t old_nnz, int64_t new_nnz, int threads) {
            check_bits(old_bits, numel);
            check_bits(new_bits, numel);
            check_call(0, 0, threads);
            if (out.size() != values.size()) throw std::invalid_argument("each vector has one to go to.");
            std::vector<float*> to;
            std::vector<const float*> from;
            for (uintptr_t at : out) to.push_back(pointer<float>(at));
            for (uintptr_t at : values) from.push_back(pointer<const float>(at));
            const uint8_t *old_data = old_bits.data(), *new_data = new_bits.data();
            py::gil_scoped_release release;
            moved(to, from, old_data, new_data, numel, old_nnz, new_nnz, threads);
        },
        "Vectors of the old mask's weights, four bytes each, in the places of the new one's, zeros where there were "
        "none.");
    m.def(
        "scratch_nbytes", [] { return scratch_nbytes() + kept_code_nbytes(); },
        "Bytes of working memory and of pages for generated code, kept for later calls.");

    m.def(
        "prepare",
        [](const std::vector<const OpenPlan*>& plans, int threads) {
            check_call(0, 0, threads);
            const int64_t parts = Plan::kParts;
            parallel_for(parts * int64_t(plans.size()), threads,
                         [&](int64_t i) { plans[size_t(i / parts)]->prepare(int(i % parts)); });
        },
        py::arg("plans"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "Builds now what products of many tokens would build at first use.");

    const auto release = py::call_guard<py::gil_scoped_release>();
    py::class_<OpenPlan>(m, "Plan")
        .def(py::init(&make_plan), py::arg("out_features"), py::arg("in_features"), py::arg("bits"),
             py::arg("isa") = "", py::arg("code") = true, py::keep_alive<1, 4>())
        .def(
            "forward",
            [](const OpenPlan& plan, uintptr_t y, uintptr_t x, int64_t x_stride, uintptr_t values, uintptr_t bias,
               int64_t tokens, int dtype, int values_dtype, int threads) {
                check_call(tokens, x_stride, threads);
                return plan.forward(pointer(y), pointer(x), x_stride, pointer(values), pointer(bias), tokens,
                                    dtype_of(dtype), dtype_of(values_dtype), threads);
            },
            release)
        .def(
            "grad_input",
            [](const OpenPlan& plan, uintptr_t dx, uintptr_t dy, int64_t dy_stride, uintptr_t values, int64_t tokens,
               int dtype, int values_dtype, int threads) {
                check_call(tokens, dy_stride, threads);
                return plan.grad_input(pointer(dx), pointer(dy), dy_stride, pointer(values), tokens, dtype_of(dtype),
                                       dtype_of(values_dtype), threads);
            },
            release)
        .def(
            "grad_values",
            [](const OpenPlan& plan, uintptr_t dvalues, uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride,
               int64_t tokens, int dtype, int values_dtype, int threads) {
                check_call(tokens, std::min(dy_stride, x_stride), threads);
                return plan.grad_values(pointer(dvalues), pointer(dy), dy_stride, pointer(x), x_stride, tokens,
                                        dtype_of(dtype), dtype_of(values_dtype), threads);
            },
            release)
        .def(
            "scatter",
            [](const OpenPlan& plan, uintptr_t dense, uintptr_t values, int dtype, int threads) {
                check_call(0, 0, threads);
                scatter(plan, pointer(dense), pointer(values), dtype_of(dtype), threads);
            },
            release)
        .def(
            "gather",
            [](const OpenPlan& plan, uintptr_t values, uintptr_t dense, int dtype, int threads) {
                check_call(0, 0, threads);
                gather(plan, pointer(values), pointer(dense), dtype_of(dtype), threads);
            },
            release)
        .def(
            "open",
            [](const py::object& self, const std::string& digest, int product, int64_t tokens, int dtype,
               int values_dtype, bool chosen, int threads) {
                check_call(tokens, 0, threads);
                self.cast<OpenPlan&>().open(self.ptr(), digest, product, tokens, dtype_of(dtype),
                                            dtype_of(values_dtype), chosen, threads);
            },
            "From now on the door runs this product, of so many tokens, on this plan.")
        .def_property_readonly("nbytes", &OpenPlan::nbytes)
        .def_property_readonly("isa", [](const OpenPlan& plan) { return isa_name(plan.isa()); })
        .def("describe", [](const OpenPlan& plan, int64_t tokens) {
            py::dict lines;
            for (const auto& [product, line] : plan.describe(tokens)) lines[product.c_str()] = line;
            return lines;
        });
}
