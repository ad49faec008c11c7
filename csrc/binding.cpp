// The only file that knows Python: loads backends and lends their tables of plain functions to it, and memory.
//
// Every entry of Operators<T> becomes a Python function (backend, is_double, ...), its further parameters deduced
// from the table: pointers arrive as integers (tensor.data_ptr()), the small structs member by member.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "operators.h"
#include "pool.h"

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

// From Python's values, as many as a parameter has members, to the parameter. A failure leaves Python's error set.
template <class T>
struct From {
    static constexpr Py_ssize_t width = 1;
    static T python(PyObject* const*& values) {
        if constexpr (std::is_pointer_v<T>)
            return static_cast<T>(PyLong_AsVoidPtr(*values++));
        else if constexpr (std::is_floating_point_v<T>)
            return static_cast<T>(PyFloat_AsDouble(*values++));
        else {
            const long long value = PyLong_AsLongLong(*values++);
            if (value != static_cast<T>(value)) PyErr_Format(PyExc_OverflowError, "%lld is too large a size", value);
            return static_cast<T>(value);
        }
    }
};
template <class Struct, class... Members>
struct FromMembers {
    static constexpr Py_ssize_t width = (0 + ... + From<Members>::width);
    static Struct python(PyObject* const*& values) {
        return {From<Members>::python(values)...};  // braces: from left to right
    }
};
template <>
struct From<Launch> : FromMembers<Launch, int, int, void*, void*, Size*> {};
template <>
struct From<StepSizes> : FromMembers<StepSizes, Size, Index, Index, Index, Index, Index> {};
template <>
struct From<StepOptions> : FromMembers<StepOptions, int, int, int, double, double> {};
template <class T>
struct From<SequenceState<T>> : FromMembers<SequenceState<T>, T*, T*, T*, T*, T*, T*> {};
template <class T>
struct From<SequenceTrail<T>> : FromMembers<SequenceTrail<T>, T*, T*, T*, T*, T*, T*, T*, T*, T*, T*, T*> {};
template <class T>
struct From<SequenceGrads<T>> : FromMembers<SequenceGrads<T>, T*, T*, T*, T*> {};
template <>
struct From<SequenceSizes>
    : FromMembers<SequenceSizes, Index, Size, Index, Index, Index, Index, int, StepSizes, Index, int> {};

template <class... Parameters>
PyObject* call(const char* backend, Error (*operation)(Parameters...), PyObject* const* values, Py_ssize_t count) {
    if (!operation) return PyErr_Format(PyExc_RuntimeError, "ntm_fast: %s does not serve this operator", backend);
    constexpr Py_ssize_t expected = (0 + ... + From<Parameters>::width);
    if (count != expected)
        return PyErr_Format(PyExc_TypeError, "takes %zd values after backend and is_double, got %zd", expected, count);
    std::tuple<Parameters...> parameters{From<Parameters>::python(values)...};
    if (PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    Error error = std::apply(operation, parameters);
    PyEval_RestoreThread(state);
    if (error) return PyErr_Format(PyExc_RuntimeError, "%s", error);
    Py_RETURN_NONE;
}

// One operator as Python sees it. Written against Python's C API: pybind11's dispatch of ten arguments takes
// 0.8 us, this 0.2 us, and a training step makes thousands of calls.
template <auto f32, auto f64>
struct Operator {
    static PyObject* python(PyObject*, PyObject* const* values, Py_ssize_t count) {
        if (count < 2) return PyErr_Format(PyExc_TypeError, "takes a backend and is_double first");
        const std::size_t id = PyLong_AsSize_t(values[0]);
        if (PyErr_Occurred()) return nullptr;
        if (id >= loaded.size()) return PyErr_Format(PyExc_IndexError, "no backend has the id %zu", id);
        const Backend& table = *loaded[id].table;
        return PyObject_IsTrue(values[1]) ? call(table.name, table.f64.*f64, values + 2, count - 2)
                                    : call(table.name, table.f32.*f32, values + 2, count - 2);
    }
    static bool served(const Backend& table, bool is_double) {
        return is_double ? table.f64.*f64 != nullptr : table.f32.*f32 != nullptr;
    }
};

struct Entry {
    PyObject* (*python)(PyObject*, PyObject* const*, Py_ssize_t);
    bool (*served)(const Backend&, bool is_double);
};
template <auto f32, auto f64>
constexpr Entry entry = {&Operator<f32, f64>::python, &Operator<f32, f64>::served};

using F = Operators<float>;
using D = Operators<double>;
const std::map<std::string, Entry> operators = {
    {"content_addressing", entry<&F::content_addressing, &D::content_addressing>},
    {"content_addressing_backward", entry<&F::content_addressing_backward, &D::content_addressing_backward>},
    {"interpolate", entry<&F::interpolate, &D::interpolate>},
    {"interpolate_backward", entry<&F::interpolate_backward, &D::interpolate_backward>},
    {"circular_shift", entry<&F::circular_shift, &D::circular_shift>},
    {"circular_shift_backward", entry<&F::circular_shift_backward, &D::circular_shift_backward>},
    {"sharpen", entry<&F::sharpen, &D::sharpen>},
    {"sharpen_backward", entry<&F::sharpen_backward, &D::sharpen_backward>},
    {"address", entry<&F::address, &D::address>},
    {"address_backward", entry<&F::address_backward, &D::address_backward>},
    {"erase_add_write", entry<&F::erase_add_write, &D::erase_add_write>},
    {"erase_add_write_backward", entry<&F::erase_add_write_backward, &D::erase_add_write_backward>},
    {"read", entry<&F::read, &D::read>},
    {"read_backward", entry<&F::read_backward, &D::read_backward>},
    {"memory_step", entry<&F::memory_step, &D::memory_step>},
    {"memory_step_backward", entry<&F::memory_step_backward, &D::memory_step_backward>},
    {"lstm_gates", entry<&F::lstm_gates, &D::lstm_gates>},
    {"lstm_gates_backward", entry<&F::lstm_gates_backward, &D::lstm_gates_backward>},
    {"gru_gates", entry<&F::gru_gates, &D::gru_gates>},
    {"gru_gates_backward", entry<&F::gru_gates_backward, &D::gru_gates_backward>},
    {"ntm_sequence", entry<&F::ntm_sequence, &D::ntm_sequence>},
    {"ntm_sequence_backward", entry<&F::ntm_sequence_backward, &D::ntm_sequence_backward>},
    {"ntm_sequence_weight_gradients", entry<&F::ntm_sequence_weight_gradients, &D::ntm_sequence_weight_gradients>},
};

// --- tensors, as DLPack's stable C interface (dlpack.h, versions 0.x and 1.x) shows and takes them -------------------

struct DLTensor {
    void* data;
    std::int32_t device_type, device_id;  // 1, the CPU
    std::int32_t ndim;
    std::uint8_t code, bits;  // 2, floating
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};
struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};
struct DLVersion {
    std::uint32_t major, minor;
};
struct DLManagedTensorVersioned {
    DLVersion version;
    void* context;
    void (*deleter)(DLManagedTensorVersioned*);
    std::uint64_t flags;
    DLTensor tensor;
};
struct DLExchange {  // DLPackExchangeAPI
    DLVersion version;
    const DLExchange* previous;
    int (*allocate)(DLTensor*, DLManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
    int (*take)(void*, DLManagedTensorVersioned**);
    int (*give)(DLManagedTensorVersioned*, void**);  // to Python
    int (*show)(void*, DLTensor*);
    int (*stream)(int, std::int32_t, void**);
};

Pool& pool() {
    static Pool* const pool = new Pool(std::size_t(256) << 20);  // never destroyed: tensors may outlive everything else
    return *pool;
}

// A tensor in main memory that is DLPack's to hand over. Its memory comes from the pool, or from the C library.
template <class Managed>
struct Owned : Managed {
    std::vector<std::int64_t> sizes, strides;  // strides: none where it is contiguous
    std::size_t bytes;
    bool from_pool;

    static constexpr std::align_val_t alignment{64};

    // Uninitialised.
    static Managed* make(std::vector<std::int64_t> sizes, std::vector<std::int64_t> strides, std::size_t numbers,
                         bool is_double, bool from_pool) {
        auto self = std::make_unique<Owned>();
        self->sizes = std::move(sizes);
        self->strides = std::move(strides);
        self->bytes = numbers * (is_double ? sizeof(double) : sizeof(float));
        self->from_pool = from_pool;
        void* memory = from_pool ? pool().take(self->bytes) : ::operator new(self->bytes, alignment, std::nothrow);
        if (!memory) throw std::bad_alloc();
        self->tensor = {memory, 1, 0, static_cast<std::int32_t>(self->sizes.size()),
                        2,      static_cast<std::uint8_t>(is_double ? 64 : 32), 1, self->sizes.data(),
                        self->strides.empty() ? nullptr : self->strides.data(), 0};
        self->deleter = [](Managed* tensor) {  // on any thread, with or without Python's lock
            auto* self = static_cast<Owned*>(tensor);
            if (self->from_pool)
                pool().give(self->tensor.data, self->bytes);
            else
                ::operator delete(self->tensor.data, alignment);
            delete self;
        };
        return self.release();
    }
};

// A capsule for torch.from_dlpack: a contiguous tensor, uninitialised, whose storage goes back to the pool.
py::object pooled(std::vector<std::int64_t> sizes, bool is_double) {
    std::size_t numbers = 1;
    for (std::int64_t size : sizes) numbers *= size;
    DLManagedTensor* owned = Owned<DLManagedTensor>::make(std::move(sizes), {}, numbers, is_double, true);
    PyObject* capsule = PyCapsule_New(owned, "dltensor", [](PyObject* capsule) {
        if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // taken over: a tensor owns it now
        auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
        tensor->deleter(tensor);
    });
    if (!capsule) {
        owned->deleter(owned);
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(capsule);
}

// What torch lends, from 2.10 on: to look at a tensor takes a tenth of a microsecond, and from Python one and more.
struct Exchange {
    const DLExchange* api = nullptr;
    std::vector<py::handle> types;  // exactly these are looked at: others may mean more than what they hold
};
Exchange& exchange() {
    static Exchange exchange;
    return exchange;
}

void exchange_with(py::handle table, const py::args& types) {
    constexpr const char* name = "dlpack_exchange_api";
    if (!PyCapsule_IsValid(table.ptr(), name)) return;
    auto* api = static_cast<const DLExchange*>(PyCapsule_GetPointer(table.ptr(), name));
    while (api && api->version.major > 1) api = api->previous;
    if (!api || api->version.major != 1 || !api->show) return;
    exchange().types.clear();
    for (py::handle type : types) exchange().types.push_back(type.inc_ref());  // never let go of
    exchange().api = api;
}

// How a tensor lies; its sizes and strides follow.
struct Layout {
    std::int32_t ndim, bits;
};

// How float32 and float64 tensors in main memory lie, in a string to compare, and where. None if there are others.
py::object layouts(const py::tuple& tensors) {
    const auto& [api, types] = exchange();
    if (!api) return py::none();
    std::string found;
    found.reserve(64 * tensors.size());
    const auto append = [&](const void* data, std::size_t bytes) {
        found.append(static_cast<const char*>(data), bytes);
    };
    py::list addresses(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        PyObject* tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
        const auto is_its = [&](py::handle type) { return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(tensor)); };
        if (std::none_of(types.begin(), types.end(), is_its)) return py::none();
        DLTensor view;
        if (api->show(tensor, &view)) {
            PyErr_Clear();  // sparse, on a device that DLPack does not know, ...
            return py::none();
        }
        if (!view.data) return py::none();  // empty, or nothing that can be read
        if (view.device_type != 1 || view.code != 2 || view.lanes != 1 || (view.bits != 32 && view.bits != 64))
            return py::none();
        const Layout layout{view.ndim, view.bits};
        append(&layout, sizeof layout);
        append(view.shape, view.ndim * sizeof *view.shape);
        append(view.strides, view.ndim * sizeof *view.strides);
        const auto* data = static_cast<const char*>(view.data) + view.byte_offset;
        PyList_SET_ITEM(addresses.ptr(), i, PyLong_FromVoidPtr(const_cast<char*>(data)));
    }
    return py::make_tuple(py::bytes(found), std::move(addresses));
}

// Tensors that lie as such a string says, uninitialised, and where; from the pool if they have so many numbers.
py::tuple empty_as(const py::bytes& layouts, std::size_t pooled_from) {
    using Owner = Owned<DLManagedTensorVersioned>;
    py::list tensors, addresses;
    const std::string_view all = layouts;
    for (const char* next = all.data(); next != all.data() + all.size();) {
        Layout layout;
        std::memcpy(&layout, next, sizeof layout);
        next += sizeof layout;
        std::vector<std::int64_t> sizes(layout.ndim), strides(layout.ndim);
        for (auto* numbers : {&sizes, &strides}) {
            std::memcpy(numbers->data(), next, layout.ndim * sizeof(std::int64_t));
            next += layout.ndim * sizeof(std::int64_t);
        }
        std::size_t last = 0;
        bool empty = false;
        for (std::int32_t i = 0; i < layout.ndim; ++i) {
            last += (sizes[i] - 1) * strides[i];
            empty |= sizes[i] == 0;
        }
        const std::size_t numbers = empty ? 0 : last + 1;
        DLManagedTensorVersioned* owned = Owner::make(std::move(sizes), std::move(strides), numbers, layout.bits == 64,
                                                      numbers >= pooled_from);
        owned->version = {1, 0};
        void* const address = owned->tensor.data;
        void* tensor = nullptr;
        if (exchange().api->give(owned, &tensor)) throw py::error_already_set();
        if (!tensor) throw std::bad_alloc();
        tensors.append(py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor)));
        addresses.append(py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(address)));
    }
    return py::make_tuple(std::move(tensors), std::move(addresses));
}

}  // namespace
}  // namespace ntm

PYBIND11_MODULE(_C, m) {
    using namespace ntm;
    static std::vector<PyMethodDef> methods;  // Python keeps pointers into it
    for (const auto& [name, entry] : operators)
        methods.push_back({name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry.python)),
                           METH_FASTCALL, nullptr});
    methods.push_back({nullptr, nullptr, 0, nullptr});
    if (PyModule_AddFunctions(m.ptr(), methods.data()) < 0) throw py::error_already_set();

    m.def("load", &load, "Load the backend in this file and return its id.");
    m.def("name", [](int backend) { return get(backend).table->name; });
    m.def("problem", [](int backend) { return get(backend).problem ? get(backend).problem() : nullptr; },
          "Why this machine cannot run the backend; None when it can.");
    m.def("serves", [](int backend, bool is_double, const std::string& name) {
        auto found = operators.find(name);
        if (found == operators.end()) throw std::invalid_argument("no operator is called " + name);
        return found->second.served(*get(backend).table, is_double);
    });
    m.def("cpu_level", &cpu_level);
    m.def("pooled", &pooled, "A tensor of these sizes from the pool, as a capsule for torch.from_dlpack.");
    m.def("exchange_with", &exchange_with, "Look at tensors of these types by torch's table for DLPack.");
    m.def("layouts", &layouts, "How tensors lie, as bytes, and their addresses; None where that cannot be said.");
    m.def("empty_as", &empty_as, "Tensors that lie so, and their addresses.");
    m.def("release_pool", [] { return pool().release(); });
}
