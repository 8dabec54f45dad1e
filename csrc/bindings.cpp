// The Python module vspdf._C. Pointers arrive as integers: the caller owns the memory and guarantees its size.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.hpp"
#include "materialise.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "spmm_kernels.hpp"

namespace py = pybind11;
using namespace vspdf;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;  // no forcecast: another dtype is an error

std::unique_ptr<Plan> make_plan(int out_features, int in_features, const Array<int64_t>& crow,
                                const Array<int32_t>& cols, const std::string& isa) {
    if (crow.ndim() != 1 || crow.size() != int64_t(out_features) + 1) {
        throw std::invalid_argument("crow must hold out_features + 1 = " + std::to_string(int64_t(out_features) + 1) +
                                    " entries, not " + std::to_string(crow.size()) + ".");
    }
    if (cols.ndim() != 1 || cols.size() != crow.data()[out_features]) {
        throw std::invalid_argument("cols must hold crow[-1] = " + std::to_string(crow.data()[out_features]) +
                                    " entries, not " + std::to_string(cols.size()) + ".");
    }
    const Isa chosen = choose_isa(isa);
    const bool jit = jit_allowed();
    py::gil_scoped_release release;
    return std::make_unique<Plan>(out_features, in_features, crow.data(), cols.data(), chosen, jit);
}

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_fabric(py::module_& module);  // bindings_fabric.cpp

PYBIND11_MODULE(_C, m) {
    m.doc() = "Sparse linear layers on CPUs: three products of a weight that exists only at kept positions.";
    m.attr("openmp") = kOpenMP;
    bind_fabric(m);
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (Isa isa : isas()) names.push_back(isa_name(isa));
            return names;
        },
        "Instruction sets that can run here, best first.");

    m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("seconds") = 0.2, py::call_guard<py::gil_scoped_release>(),
          "GFLOP/s of multiply-adds from registers: the ceiling.");

    const auto release = py::call_guard<py::gil_scoped_release>();
    py::class_<Plan>(m, "Plan")
        .def(py::init(&make_plan), py::arg("out_features"), py::arg("in_features"), py::arg("crow"), py::arg("cols"),
             py::arg("isa") = "")
        .def(
            "forward",
            [](const Plan& plan, uintptr_t y, uintptr_t x, int64_t x_stride, uintptr_t values, uintptr_t bias,
               int64_t tokens, int dtype, int threads) {
                return plan.forward(pointer(y), pointer(x), x_stride, pointer(values), pointer(bias), tokens,
                                    Dtype(dtype), threads);
            },
            release)
        .def(
            "grad_input",
            [](const Plan& plan, uintptr_t dx, uintptr_t dy, int64_t dy_stride, uintptr_t values, int64_t tokens,
               int dtype, int threads) {
                return plan.grad_input(pointer(dx), pointer(dy), dy_stride, pointer(values), tokens, Dtype(dtype),
                                       threads);
            },
            release)
        .def(
            "grad_values",
            [](const Plan& plan, uintptr_t dvalues, uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride,
               int64_t tokens, int dtype, int threads) {
                return plan.grad_values(pointer(dvalues), pointer(dy), dy_stride, pointer(x), x_stride, tokens,
                                        Dtype(dtype), threads);
            },
            release)
        .def(
            "scatter",
            [](const Plan& plan, uintptr_t dense, uintptr_t values, int dtype, int threads) {
                scatter(plan.csr(), pointer(dense), pointer(values), Dtype(dtype), threads);
            },
            release)
        .def(
            "gather",
            [](const Plan& plan, uintptr_t values, uintptr_t dense, int dtype, int threads) {
                gather(plan.csr(), pointer(values), pointer(dense), Dtype(dtype), threads);
            },
            release)
        .def("prepare", &Plan::prepare, release)
        .def_property_readonly("nbytes", &Plan::nbytes)
        .def_property_readonly("isa", [](const Plan& plan) { return isa_name(plan.isa()); })
        .def("describe", [](const Plan& plan, int64_t tokens, int threads) {
            py::dict lines;
            for (const auto& [product, line] : plan.describe(tokens, threads)) lines[product.c_str()] = line;
            return lines;
        });
}
