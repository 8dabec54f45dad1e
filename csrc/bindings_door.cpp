#include "bindings_door.hpp"

#include <chrono>
#include <new>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace py = pybind11;

namespace vspdf {
namespace {

std::unordered_map<std::string, OpenPlan*> plans;

enum Product : int { kForward, kGradInput, kGradValues };

// A call in one number, which the plans that may serve it remember.
uint64_t way(int product, int64_t tokens, Dtype dtype, Dtype values_dtype, bool chosen, int threads) {
    return (uint64_t(tokens) << 20) | (uint64_t(threads) << 5) | (uint64_t(chosen) << 4) |
           (uint64_t(values_dtype) << 3) | (uint64_t(dtype) << 2) | uint64_t(product);
}

constexpr int64_t kMostTokens = int64_t(1) << 40;
constexpr int kMostThreads = 1 << 14;

// What is asked of Python, looked up once; never freed, as the interpreter may end first.
struct World {
    PyTypeObject *tensor, *parameter;
    PyObject *dtypes[2], *strided;
    std::vector<PyObject*> watchers;  // functions: whoever looks on says something true
    PyObject *grad_enabled, *threads, *forward_ad, *tallies, *record;
    PyObject *is_cpu, *layout, *dtype, *shape, *requires_grad, *is_neg, *is_zero, *contiguous, *data_ptr, *new_empty,
        *level, *dtype_keyword, *products[3];
};

World* world = nullptr;

// The call is for Python: unusual, or with an error.
struct Elsewhere {};

// A new reference of the C API, owned.
py::object own(PyObject* made) {
    if (!made) throw Elsewhere{};
    return py::reinterpret_steal<py::object>(made);
}

py::object attribute(PyObject* of, PyObject* name) { return own(PyObject_GetAttr(of, name)); }

bool is_true(PyObject* object) {
    if (object == Py_True || object == Py_False) return object == Py_True;
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) throw Elsewhere{};
    return truth;
}

bool says(PyObject* function) { return is_true(own(PyObject_CallNoArgs(function)).ptr()); }

bool says(PyObject* of, PyObject* method) { return is_true(own(PyObject_CallMethodNoArgs(of, method)).ptr()); }

void require(bool usual) {
    if (!usual) throw Elsewhere{};
}

Dtype dtype_of(PyObject* dtype) {
    require(dtype == world->dtypes[0] || dtype == world->dtypes[1]);
    return dtype == world->dtypes[0] ? Dtype::f32 : Dtype::bf16;
}

void* data(PyObject* tensor) { return PyLong_AsVoidPtr(own(PyObject_CallMethodNoArgs(tensor, world->data_ptr)).ptr()); }

// Contiguous memory on a CPU of one of the kernels' dtypes, and nothing else than that.
struct Memory {
    PyObject* tensor;
    Dtype dtype;
    py::object shape;

    explicit Memory(PyObject* given)
        : tensor(plain(given)), dtype(its_dtype(given)), shape(attribute(given, world->shape)) {
        require(PyTuple_Check(shape.ptr()) && PyTuple_GET_SIZE(shape.ptr()) > 0);
    }
    Py_ssize_t dims() const { return PyTuple_GET_SIZE(shape.ptr()); }
    int64_t size(Py_ssize_t dim) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), dim)); }
    int64_t last() const { return size(dims() - 1); }

  private:
    static PyObject* plain(PyObject* given) {
        require(Py_TYPE(given) == world->tensor || Py_TYPE(given) == world->parameter);
        require(is_true(attribute(given, world->is_cpu).ptr()));
        require(attribute(given, world->layout).ptr() == world->strided);
        require(!says(given, world->is_neg) && !says(given, world->is_zero) && says(given, world->contiguous));
        return given;
    }
    static Dtype its_dtype(PyObject* given) { return dtype_of(attribute(given, world->dtype).ptr()); }
};

int64_t tokens_of(const Memory& x, int64_t features) {
    require(x.last() == features);
    int64_t tokens = 1;
    for (Py_ssize_t dim = 0; dim + 1 < x.dims(); ++dim) {
        require(x.size(dim) < kMostTokens);
        tokens *= x.size(dim);
        require(tokens < kMostTokens);
    }
    return tokens;
}

void require_vector(const Memory& vector, int64_t size, Dtype dtype) {
    require(vector.dims() == 1 && vector.last() == size && vector.dtype == dtype);
}

// The sizes of x but for the last, which is `features`.
py::object resized(const Memory& x, int64_t features) {
    py::object sizes = own(PyTuple_New(x.dims()));
    for (Py_ssize_t dim = 0; dim + 1 < x.dims(); ++dim) {
        PyObject* size = PyTuple_GET_ITEM(x.shape.ptr(), dim);
        Py_INCREF(size);
        PyTuple_SET_ITEM(sizes.ptr(), dim, size);
    }
    PyTuple_SET_ITEM(sizes.ptr(), x.dims() - 1, PyLong_FromLongLong(features));
    return sizes;
}

py::object new_empty(const Memory& like, PyObject* sizes, Dtype dtype) {
    PyObject* arguments[] = {like.tensor, sizes, world->dtypes[int(dtype)]};
    return own(PyObject_VectorcallMethod(world->new_empty, arguments, 2,
                                         dtype == like.dtype ? nullptr : world->dtype_keyword));
}

// Whether autograd must see a product of these.
bool recorded(PyObject* const* tensors, int count) {
    if (PyLong_AsLong(attribute(world->forward_ad, world->level).ptr()) >= 0) return true;
    if (!says(world->grad_enabled)) return false;
    for (int i = 0; i < count; ++i) {
        if (tensors[i] != Py_None && is_true(attribute(tensors[i], world->requires_grad).ptr())) return true;
    }
    return false;
}

OpenPlan* find(PyObject* digest) {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(digest, &length);
    if (!text) throw Elsewhere{};
    const auto found = plans.find(std::string(text, size_t(length)));
    return found == plans.end() ? nullptr : found->second;
}

int number(PyObject* function) { return int(PyLong_AsLong(own(PyObject_CallNoArgs(function)).ptr())); }

bool is_chosen(PyObject* backend) {
    if (PyUnicode_CompareWithASCIIString(backend, "auto") == 0) return true;
    require(PyUnicode_CompareWithASCIIString(backend, "cpu") == 0);
    return false;
}

void record(int product, int64_t tokens, const OpenPlan& plan, int64_t macs, double seconds) {
    if (!PyList_GET_SIZE(world->tallies)) return;
    const int64_t numel = int64_t(plan.rows()) * plan.cols();
    own(PyObject_CallFunction(
        world->record, "OLLLd", world->products[product], static_cast<long long>(2 * tokens * numel),
        static_cast<long long>(2 * tokens * plan.nnz()), static_cast<long long>(2 * macs), seconds));
}

// (product, first tensor, second tensor, bias or dtype or None, digest, backend): the result, or None where the call
// is for Python. What often is returns; the rest throws.
PyObject* answer(PyObject* const* given) {
    const int product = int(PyLong_AsLong(given[0]));
    PyObject* const* tensors = given + 1;
    const int count = product == kForward ? 3 : 2;
    OpenPlan* plan = find(given[4]);
    if (!plan || recorded(tensors, count)) Py_RETURN_NONE;
    for (PyObject* watcher : world->watchers) require(!says(watcher));
    const bool chosen = is_chosen(given[5]);

    const Memory a(tensors[0]), b(tensors[1]);
    const int64_t tokens = tokens_of(a, product == kForward ? plan->cols() : plan->rows());
    Dtype values_dtype = b.dtype;
    void* bias = nullptr;
    if (product == kGradValues) {
        require(tokens_of(b, plan->cols()) == tokens && a.dtype == b.dtype && a.dims() == b.dims());
        for (Py_ssize_t dim = 0; dim + 1 < a.dims(); ++dim) require(a.size(dim) == b.size(dim));
        if (given[3] != Py_None) values_dtype = dtype_of(given[3]);
    } else {
        require_vector(b, plan->nnz(), values_dtype);
        require(values_dtype == a.dtype || values_dtype == Dtype::f32);
        if (given[3] != Py_None) {
            const Memory third(given[3]);
            require_vector(third, plan->rows(), values_dtype);
            bias = data(given[3]);
        }
    }
    const int threads = number(world->threads);
    require(plan->is_open(way(product, tokens, a.dtype, values_dtype, chosen, threads)));

    const py::object sizes = product == kGradValues ? own(Py_BuildValue("(L)", static_cast<long long>(plan->nnz())))
                                                    : resized(a, product == kForward ? plan->rows() : plan->cols());
    py::object result = new_empty(a, sizes.ptr(), product == kGradValues ? values_dtype : a.dtype);
    void* to = data(result.ptr());
    const void *first = data(a.tensor), *second = data(b.tensor);

    const auto alive = py::reinterpret_borrow<py::object>(plan->self());  // another thread may drop it meanwhile
    int64_t macs = 0;
    double seconds = 0;
    {
        py::gil_scoped_release release;
        const auto start = std::chrono::steady_clock::now();
        if (product == kForward) {
            macs = plan->forward(to, first, plan->cols(), second, bias, tokens, a.dtype, values_dtype, threads);
        } else if (product == kGradInput) {
            macs = plan->grad_input(to, first, plan->rows(), second, tokens, a.dtype, values_dtype, threads);
        } else {
            macs = plan->grad_values(to, first, plan->rows(), second, plan->cols(), tokens, a.dtype, values_dtype,
                                     threads);
        }
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    record(product, tokens, *plan, macs, seconds);
    return result.release().ptr();
}

PyObject* door(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 6 || !world) {
        PyErr_SetString(PyExc_TypeError, "the door takes six arguments, once it knows torch.");
        return nullptr;
    }
    try {
        return answer(given);
    } catch (const Elsewhere&) {
        PyErr_Clear();  // what is wrong, Python finds again and says
        Py_RETURN_NONE;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

void know_torch(const py::dict& torch) {
    auto* made = new World;
    const auto take = [&](const char* name) { return py::object(torch[name]).release().ptr(); };
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    made->tensor = reinterpret_cast<PyTypeObject*>(take("tensor"));
    made->parameter = reinterpret_cast<PyTypeObject*>(take("parameter"));
    made->dtypes[0] = take("float32");
    made->dtypes[1] = take("bfloat16");
    made->strided = take("strided");
    for (py::handle watcher : py::list(torch["watchers"])) made->watchers.push_back(watcher.inc_ref().ptr());
    made->grad_enabled = take("grad_enabled");
    made->threads = take("threads");
    made->forward_ad = take("forward_ad");
    made->tallies = py::list(torch["tallies"]).release().ptr();
    made->record = take("record");
    made->is_cpu = name("is_cpu");
    made->layout = name("layout");
    made->dtype = name("dtype");
    made->shape = name("shape");
    made->requires_grad = name("requires_grad");
    made->is_neg = name("is_neg");
    made->is_zero = name("_is_zerotensor");
    made->contiguous = name("is_contiguous");
    made->data_ptr = name("data_ptr");
    made->new_empty = name("new_empty");
    made->level = name("_current_level");
    made->dtype_keyword = PyTuple_Pack(1, made->dtype);
    made->products[kForward] = name("forward");
    made->products[kGradInput] = name("grad_input");
    made->products[kGradValues] = name("grad_values");
    world = made;
}

PyMethodDef door_method = {"door", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&door)), METH_FASTCALL,
                           "The product of (product, tensor, tensor, bias or dtype, digest, backend) where it is open "
                           "and nothing is unusual, else None."};

}  // namespace

OpenPlan::~OpenPlan() {
    const auto found = plans.find(digest_);
    if (found != plans.end() && found->second == this) plans.erase(found);
}

void OpenPlan::open(PyObject* self, const std::string& digest, int product, int64_t tokens, Dtype dtype,
                    Dtype values_dtype, bool chosen, int threads) {
    if (product < kForward || product > kGradValues) throw std::invalid_argument("product must be 0, 1 or 2.");
    constexpr size_t kMost = 4096;  // lengths of text and the like, of one pattern
    if (tokens >= kMostTokens || threads >= kMostThreads) return;
    if (ways_.size() >= kMost) ways_.clear();
    ways_.insert(way(product, tokens, dtype, values_dtype, chosen, threads));
    self_ = self;
    digest_ = digest;
    plans[digest] = this;
}

void bind_door(py::module_& module) {
    module.def("know_torch", &know_torch, "What the door asks of torch and of the ledger, by name.");
    module.def(
        "shut",
        [] {
            for (auto& [digest, plan] : plans) plan->shut();
        },
        "Every choice is open again.");
    module.def("open_plans", [] { return plans.size(); }, "How many plans the door knows.");
    module.attr("door") = py::reinterpret_steal<py::object>(PyCFunction_New(&door_method, nullptr));
}

}  // namespace vspdf
