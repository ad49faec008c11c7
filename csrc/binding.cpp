// Python's way to the native code: loads backends, and calls the functions in their tables.
//
// Every operator becomes two functions in Python, whose values are deduced from the table:
//
//   NAME(backend, is_double, threads, device, stream, workspace, *scalars, *pointers)
//   NAME_workspace(backend, is_double, device, *scalars) -> bytes of workspace; RuntimeError where these sizes cannot
//                  be served
//
// The structs come member by member, pointers as integers (tensor.data_ptr()). signature(NAME) tells all the names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "operators.h"
#include "parameters.h"
#include "tensors.h"

namespace py = pybind11;

namespace ntm {
namespace {

struct Loaded {
    const Backend* table;
    Error (*problem)();  // optional: why this machine cannot run the backend, nullptr when it can
};

std::vector<Loaded> loaded;  // indexed by the id that Python holds; backends stay until the process ends

int load(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(dlerror());
    auto table = reinterpret_cast<decltype(&ntm_backend)>(dlsym(library, "ntm_backend"));
    if (!table) throw std::runtime_error(path + " exports no ntm_backend");
    loaded.push_back({table(), reinterpret_cast<Error (*)()>(dlsym(library, "ntm_problem"))});
    return static_cast<int>(loaded.size()) - 1;
}

const Loaded& get(int backend) { return loaded.at(static_cast<std::size_t>(backend)); }

// 4: x86-64-v4, 3: x86-64-v3, 1: any other processor. Asks the operating system too: without its support for
// the wide registers the compiler's check says no.
int cpu_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
          __builtin_cpu_supports("bmi2")))
        return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? 4
               : 3;
#else
    return 1;
#endif
}

// The values of a call from Python, in their order. A failure leaves Python's error set.
template <bool pointers_too>
struct Given {
    PyObject* const* values;

    template <class T>
    T value() {
        if constexpr (std::is_pointer_v<T>) {
            return pointers_too ? static_cast<T>(PyLong_AsVoidPtr(*values++)) : nullptr;
        } else if constexpr (std::is_floating_point_v<T>) {
            return static_cast<T>(PyFloat_AsDouble(*values++));
        } else {
            const long long value = PyLong_AsLongLong(*values++);
            if (value != static_cast<long long>(static_cast<T>(value)))
                PyErr_Format(PyExc_OverflowError, "%lld is too large a size", value);
            return static_cast<T>(value);
        }
    }
    template <class T>
    Given& within() {
        return *this;
    }
};

// Calls the operator, or only asks it for the bytes of its workspace.
template <bool asks, class... Parameters>
PyObject* call(const char* backend, Error (*operation)(Launch, Parameters...), PyObject* const* values,
               Py_ssize_t count) {
    if (!operation) return PyErr_Format(PyExc_RuntimeError, "ntm_fast: %s does not serve this operator", backend);
    constexpr Counter own = counted<Parameters...>();
    constexpr Py_ssize_t expected = asks ? 1 + own.numbers : 4 + own.numbers + own.pointers;
    if (count != expected)
        return PyErr_Format(PyExc_TypeError, "takes %zd values after backend and is_double, got %zd", expected, count);
    Given<!asks> given{values};
    Launch launch;
    Size needed = 0;
    if constexpr (asks) {
        launch.device = next<int>(given);
        launch.needed = &needed;
    } else {
        launch.threads = next<int>(given);
        launch.device = next<int>(given);
        launch.stream = next<void*>(given);
        launch.workspace = next<void*>(given);
    }
    std::tuple<Parameters...> parameters{next<Parameters>(given)...};  // braces: from left to right
    if (PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    Error error = std::apply([&](const Parameters&... all) { return operation(launch, all...); }, parameters);
    PyEval_RestoreThread(state);
    if (error) return PyErr_Format(PyExc_RuntimeError, "%s", error);
    if constexpr (asks) return PyLong_FromLongLong(needed);
    Py_RETURN_NONE;
}

// One operator as Python sees it. Written against Python's C API: pybind11's dispatch of ten arguments takes
// 0.8 us, this 0.2 us, and a training step makes thousands of calls.
template <auto f32, auto f64>
struct Operator {
    template <bool asks>
    static PyObject* python(PyObject*, PyObject* const* values, Py_ssize_t count) {
        if (count < 2) return PyErr_Format(PyExc_TypeError, "takes a backend and is_double first");
        const std::size_t id = PyLong_AsSize_t(values[0]);
        if (PyErr_Occurred()) return nullptr;
        if (id >= loaded.size()) return PyErr_Format(PyExc_IndexError, "no backend has the id %zu", id);
        const Backend& table = *loaded[id].table;
        return PyObject_IsTrue(values[1]) ? call<asks>(table.name, table.f64.*f64, values + 2, count - 2)
                                          : call<asks>(table.name, table.f32.*f32, values + 2, count - 2);
    }
    static bool served(const Backend& table, bool is_double) {
        return is_double ? table.f64.*f64 != nullptr : table.f32.*f32 != nullptr;
    }
};

template <class... Parameters>
constexpr bool names_fit(Error (*Operators<float>::*)(Launch, Parameters...), std::string_view names) {
    return words(names) == sizeof...(Parameters) && counted<Parameters...>().numbers_first;
}
template <class... Parameters>
Signature signature(Error (*Operators<float>::*)(Launch, Parameters...), std::string_view names) {
    Signature found;
    Namer namer{found, names};
    (static_cast<void>(next<Parameters>(namer)), ...);
    return found;
}

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
struct Entry {
    const char *name, *workspace_name;
    Function python, workspace;
    bool (*served)(const Backend&, bool is_double);
    Signature signature;
};
template <auto f32, auto f64>
Entry entry(const char* name, const char* workspace_name, const char* names) {
    using Own = Operator<f32, f64>;
    return {name, workspace_name, &Own::template python<false>, &Own::template python<true>, &Own::served,
            signature(f32, names)};
}

using F = Operators<float>;
using D = Operators<double>;
#define NTM_NAMES_FIT(family, name, Body, names) \
    static_assert(names_fit(&F::name, names), #name ": a name for every parameter, sizes and options before pointers");
NTM_OPERATORS(NTM_NAMES_FIT)
#define NTM_ENTRY(family, name, Body, names) entry<&F::name, &D::name>(#name, #name "_workspace", names),
const std::vector<Entry> operators = {NTM_OPERATORS(NTM_ENTRY)};

const Entry& find(const std::string& name) {
    for (const Entry& entry : operators)
        if (name == entry.name) return entry;
    throw std::invalid_argument("no operator is called " + name);
}

}  // namespace
}  // namespace ntm

PYBIND11_MODULE(_C, m) {
    using namespace ntm;
    static std::vector<PyMethodDef> methods;  // Python keeps pointers into it
    const auto add = [](const char* name, Function function) {
        methods.push_back({name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
                           nullptr});
    };
    for (const Entry& entry : operators) {
        add(entry.name, entry.python);
        add(entry.workspace_name, entry.workspace);
    }
    methods.push_back({nullptr, nullptr, 0, nullptr});
    if (PyModule_AddFunctions(m.ptr(), methods.data()) < 0) throw py::error_already_set();

    m.def("load", &load, "Load the backend in this file and return its id.");
    m.def("describe",
          [](int backend) {
              const Backend& table = *get(backend).table;
              return py::dict(py::arg("name") = table.name, py::arg("takes_ends") = table.takes_ends,
                              py::arg("bounded") = table.bounded);
          },
          "What a backend says of itself (struct Backend in csrc/operators.h).");
    m.def("problem", [](int backend) { return get(backend).problem ? get(backend).problem() : nullptr; },
          "Why this machine cannot run the backend; None when it can.");
    m.def("serves", [](int backend, bool is_double, const std::string& name) {
        return find(name).served(*get(backend).table, is_double);
    });
    m.def("signature",
          [](const std::string& name) {
              const auto& [numbers, pointers] = find(name).signature;
              return py::make_tuple(py::tuple(py::cast(numbers)), py::tuple(py::cast(pointers)));
          },
          "The names of an operator's values after those of the launch: (sizes and options, pointers).");
    m.def("cpu_level", &cpu_level);
    m.def("pooled", &pooled, "A tensor of these sizes from the pool, as a capsule for torch.from_dlpack.");
    m.def("exchange_with", &exchange_with, "Look at tensors of these types by torch's table for DLPack.");
    m.def("layouts", &layouts, "How tensors lie, as bytes, and their addresses; None where that cannot be said.");
    m.def("empty_as", &empty_as, "Tensors that lie so, and their addresses.");
    m.def("release_pool", [] { return pool().release(); });
}
