// The shortest way from a tensor to a product: what an operator checks and looks up before the usual call, without
// running Python code. Whatever is unusual it leaves to the operators in Python, which say what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <unordered_set>

#include "plan.hpp"

namespace vspdf {

// A plan that the door finds by the digest of its pattern, as long as it lives. All under Python's lock.
class OpenPlan : public Plan {
  public:
    using Plan::Plan;
    ~OpenPlan();

    // From now on the door runs this product (0: forward, 1: grad_input, 2: grad_values) of so many tokens on this
    // plan, if `chosen` for backend "auto", else for "cpu". `self` is the plan's Python object.
    void open(PyObject* self, const std::string& digest, int product, int64_t tokens, Dtype dtype, Dtype values_dtype,
              bool chosen, int threads);
    PyObject* self() const { return self_; }
    bool is_open(uint64_t way) const { return ways_.count(way) != 0; }
    void shut() { ways_.clear(); }

  private:
    PyObject* self_ = nullptr;  // borrowed: it owns the plan
    std::string digest_;
    std::unordered_set<uint64_t> ways_;
};

void bind_door(pybind11::module_& module);

}  // namespace vspdf
