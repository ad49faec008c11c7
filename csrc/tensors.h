// Makes tensors for Python, and looks at Python's: in main memory, some of it from a pool, without torch's own headers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pool.h"

namespace py = pybind11;

namespace ntm {
namespace {

// DLPack's stable C interface: dlpack.h, versions 0.x and 1.x.
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

// A tensor in main memory, to be handed over by DLPack. Its memory comes from the pool, or from the C library.
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

// torch's table of C functions, from 2.10 on. With it a look at a tensor takes 0.1 us, from Python 1 us or more.
struct Exchange {
    const DLExchange* api = nullptr;
    std::vector<py::handle> types;  // exactly these are looked at: subclasses may change what tensors do
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
    for (py::handle type : types) exchange().types.push_back(type.inc_ref());  // never released
    exchange().api = api;
}

// A tensor's layout; its sizes and strides follow.
struct Layout {
    std::int32_t ndim, bits;
};

// The layouts of float32 and float64 tensors in main memory, in a string to compare, and their addresses. None if there
// are others.
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

// Uninitialised tensors with the layouts of such a string, and their addresses; from the pool if they are large enough.
// None where torch has no such table.
py::object empty_as(const py::bytes& layouts, std::size_t pooled_from) {
    if (!exchange().api) return py::none();
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
