// Repeats recorded calls of the backend: `replay fault file...`, with the number of a planted fault or 0. With a minus
// before the number it stops after the first call that goes wrong. For each call it prints what it is, the kernel that
// is launched for it, and whether it gave the recorded bits. Every array is an allocation of its own, and outputs and
// workspace are full of NaN, so that AddressSanitizer sees who writes outside.
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
#include "parameters.h"

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

// An entry's parameters in their order, as csrc/parameters.h asks for them
struct Recorded {
    Call& call;

    template <class P>
    P value() {
        if constexpr (std::is_same_v<P, const float* const*> || std::is_same_v<P, const double* const*>) {
            for (Size i = 0; i < 4 * call.layers + 4; ++i) call.weights.push_back(value<const void*>());
            return reinterpret_cast<P>(call.weights.data());
        } else if constexpr (std::is_pointer_v<P>) {
            const Array& array = call.arrays[call.next_array++];  // nullptr where nothing was given
            return array.after.empty() ? nullptr : reinterpret_cast<P>(array.memory.get());
        } else {
            return static_cast<P>(call.scalars[call.next_scalar++]);
        }
    }
    template <class P>
    Recorded& within() {
        return *this;
    }
};

template <class P>
P take(Call& call) {
    const P parameter = next<P>(Recorded{call});
    if constexpr (std::is_same_v<P, SequenceSizes>) call.layers = parameter.L;
    return parameter;
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
#define NTM_REPLAY(family, entry, Body, names) \
    if (call.name == #entry) return run(table.entry, call);
    NTM_OPERATORS(NTM_REPLAY)
#undef NTM_REPLAY
    return "no such operator";
}

}  // namespace

int main(int, char** arguments) {
    const int fault = std::atoi(*++arguments);
    ntm_planted = std::abs(fault);
    const bool first_alone = fault < 0;
    on_host::trace = true;
    bool all_right = true;
    while (*++arguments && (all_right || !first_alone)) {
        std::ifstream file(*arguments, std::ios::binary);
        for (Call call; (all_right || !first_alone) && call.read(file); call = Call()) {
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
