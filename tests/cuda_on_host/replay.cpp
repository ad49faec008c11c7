// Repeats recorded calls of the backend: `replay fault file...`, with the number of a planted fault or 0. For each call
// it prints what it is, the kernel that is launched for it, and whether it gave the recorded bits. Every array is an
// allocation of its own, outputs and workspace full of NaN, so that AddressSanitizer sees who leaves it.
//
// A record is a line of the operator, the device's shared memory, whether in double, the count of sizes and options and
// each of them, the count of arrays, and of each whether it comes "in", goes "out" or is "both" and its bytes; then
// these bytes, end to end: of each array what it held before, unless it only goes out, and what it held after.
#include <cuda_runtime.h>
#include <sanitizer/asan_interface.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "operators.h"

using namespace ntm;

namespace {

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<char, Free>;

// With forbidden ground behind it, wide enough that whoever goes there ruins nothing that matters.
Bytes allocate(std::size_t bytes) {
    constexpr std::size_t guard = 1 << 16;
    Bytes memory(static_cast<char*>(std::malloc(bytes + guard)));
    std::memset(memory.get(), 0xff, bytes + guard);  // NaN as float and as double
    ASAN_POISON_MEMORY_REGION(memory.get() + bytes, guard);
    return memory;
}

struct Array {
    std::string role, before, after;
    Bytes memory;
};

struct Call {
    std::string name, shared;
    bool is_double;
    std::vector<double> scalars;
    std::vector<Array> arrays;
    std::size_t next_scalar = 0, next_array = 0;
    std::vector<const void*> weights = {};  // a sequence's
    Size layers = 0;

    bool read(std::istream& file) {
        std::string line;
        if (!std::getline(file, line)) return false;
        std::istringstream words(line);
        std::size_t count, bytes;
        words >> name >> shared >> is_double >> count;
        for (std::string word; scalars.size() < count && words >> word;)
            scalars.push_back(std::strtod(word.c_str(), nullptr));
        words >> count;
        for (std::string role; arrays.size() < count && words >> role >> bytes;)
            arrays.push_back({role, std::string(bytes, 0), std::string(bytes, 0), allocate(bytes)});
        for (Array& array : arrays) {
            if (array.role != "out") {
                file.read(array.before.data(), array.before.size());
                std::memcpy(array.memory.get(), array.before.data(), array.before.size());
            }
            file.read(array.after.data(), array.after.size());
        }
        return true;
    }
    // Also what only comes in: nobody may change it.
    bool as_recorded() const {
        for (const Array& array : arrays)
            if (std::memcmp(array.memory.get(), array.after.data(), array.after.size()) != 0) return false;
        return true;
    }
};

// An entry's parameters in their order, as in csrc/binding.cpp
template <class T>
T take(Call& call);

template <class Struct, class... Members>
Struct take_members(Call& call) {
    return {take<Members>(call)...};  // braces: from left to right
}
template <class T>
constexpr bool is_state = false;
template <class T>
constexpr bool is_state<SequenceState<T>> = true;
template <class T>
constexpr bool is_trail = false;
template <class T>
constexpr bool is_trail<SequenceTrail<T>> = true;
template <class T>
constexpr bool is_grads = false;
template <class T>
constexpr bool is_grads<SequenceGrads<T>> = true;

template <class T>
T take(Call& call) {
    if constexpr (std::is_same_v<T, StepSizes>) {
        return take_members<T, Size, Index, Index, Index, Index, Index>(call);
    } else if constexpr (std::is_same_v<T, StepOptions>) {
        return take_members<T, int, int, int, double, double>(call);
    } else if constexpr (std::is_same_v<T, SequenceSizes>) {
        const T s = take_members<T, Index, Size, Index, Index, Index, Index, Controller, StepSizes, Index, int>(call);
        call.layers = s.L;
        return s;
    } else if constexpr (is_state<T>) {
        using P = decltype(T::memory);
        return take_members<T, P, P, P, P, P, P>(call);
    } else if constexpr (is_trail<T>) {
        using P = decltype(T::memory);
        return take_members<T, P, P, P, P, P, P, P, P, P, P, P>(call);
    } else if constexpr (is_grads<T>) {
        using P = decltype(T::x);
        return take_members<T, P, P, P, P>(call);
    } else if constexpr (std::is_same_v<T, const float* const*> || std::is_same_v<T, const double* const*>) {
        for (Size i = 0; i < 4 * call.layers + 4; ++i) call.weights.push_back(take<const void*>(call));
        return reinterpret_cast<T>(call.weights.data());
    } else if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(call.arrays[call.next_array++].memory.get());
    } else {
        return static_cast<T>(call.scalars[call.next_scalar++]);
    }
}

template <class... Parameters>
Error run(Error (*operation)(Launch, Parameters...), Call& call) {
    const std::tuple<Parameters...> parameters{take<Parameters>(call)...};
    auto launch = [&](const Launch& how) {
        return std::apply([&](auto... values) { return operation(how, values...); }, parameters);
    };
    Size needed = 0;
    Launch how;
    how.needed = &needed;
    if (const Error error = launch(how)) return error;
    how.needed = nullptr;
    const Bytes workspace = allocate(needed);
    how.workspace = needed ? workspace.get() : nullptr;
    if (needed) std::cerr << "workspace of " << needed << " bytes\n";
    return launch(how);
}

template <class T>
Error run(const Operators<T>& table, Call& call) {
    bool known = false;
    Error error = nullptr;
    auto entry = [&](std::string name, auto forward, auto backward) {
        if (call.name == name) known = true, error = run(forward, call);
        if (call.name == name + "_backward") known = true, error = run(backward, call);
    };
    entry("content_addressing", table.content_addressing, table.content_addressing_backward);
    entry("interpolate", table.interpolate, table.interpolate_backward);
    entry("circular_shift", table.circular_shift, table.circular_shift_backward);
    entry("sharpen", table.sharpen, table.sharpen_backward);
    entry("address", table.address, table.address_backward);
    entry("erase_add_write", table.erase_add_write, table.erase_add_write_backward);
    entry("read", table.read, table.read_backward);
    entry("memory_step", table.memory_step, table.memory_step_backward);
    entry("lstm_gates", table.lstm_gates, table.lstm_gates_backward);
    entry("gru_gates", table.gru_gates, table.gru_gates_backward);
    entry("ntm_sequence", table.ntm_sequence, table.ntm_sequence_backward);
    return known ? error : "no such operator";
}

}  // namespace

int main(int, char** arguments) {
    ntm_planted = std::atoi(*++arguments);
    on_host::trace = true;
    bool all_right = true;
    while (*++arguments) {
        std::ifstream file(*arguments, std::ios::binary);
        for (Call call; call.read(file); call = Call()) {
            std::cerr << "call " << call.name << (call.is_double ? " in double, " : " in float, ") << call.shared
                      << " bytes to a block\n";
            setenv("NTM_HOST_SHARED", call.shared.c_str(), 1);
            const Error error = call.is_double ? run(ntm_backend()->f64, call) : run(ntm_backend()->f32, call);
            const bool right = !error && call.as_recorded();
            std::cerr << (right ? "right" : error ? error : "other numbers than recorded") << "\n";
            all_right = all_right && right;
        }
    }
    std::cerr << "that was all\n";
    return all_right ? 0 : 1;
}
