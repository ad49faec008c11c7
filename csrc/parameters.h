// The parameters of the backends' functions one by one, with the members of structs: their number, values and names.
//
// C++ does not list a struct's members, but initialises them one after the other from objects that convert to any type.
// So a parameter is built from a source that is asked for one value after the other, each of the type that is wanted:
//
//   value<T>()    the next value, a number or a pointer
//   within<T>()   the source for the members of struct T, which comes next: this one or another
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace ntm {

struct Anything {
    template <class T>
    operator T() const;  // never called
};

template <class Struct, class... Members>
auto takes(int) -> decltype(Struct{Members()...}, std::true_type());
template <class Struct, class... Members>
std::false_type takes(...);

// The number of members of a struct: tries to initialise it with one more at a time.
template <class Struct, class... Some>
constexpr std::size_t members() {
    if constexpr (decltype(takes<Struct, Some..., Anything>(0))::value)
        return members<Struct, Some..., Anything>();
    else
        return sizeof...(Some);
}

template <class T, class Source>
constexpr T next(Source&& source);

template <class Source>
struct Member {
    Source& source;

    template <class T>
    constexpr operator T() const {
        return next<T>(source);
    }
};

template <class Struct, class Source, std::size_t... I>
constexpr Struct built(Source&& source, std::index_sequence<I...>) {
    return {(static_cast<void>(I), Member<std::remove_reference_t<Source>>{source})...};  // braces: from left to right
}

// The next parameter: a number, a pointer or a struct
template <class T, class Source>
constexpr T next(Source&& source) {
    if constexpr (std::is_class_v<T>)
        return built<T>(source.template within<T>(), std::make_index_sequence<members<T>()>());
    else
        return source.template value<T>();
}

// Counts what it is asked for.
struct Counter {
    std::size_t numbers = 0, pointers = 0;
    bool numbers_first = true;

    template <class T>
    constexpr T value() {
        numbers_first = numbers_first && (std::is_pointer_v<T> || pointers == 0);
        ++(std::is_pointer_v<T> ? pointers : numbers);
        return T();
    }
    template <class T>
    constexpr Counter& within() {
        return *this;
    }
};
template <class... Parameters>
constexpr Counter counted() {
    Counter counter;
    (static_cast<void>(next<Parameters>(counter)), ...);
    return counter;
}

// The number of words, with one space between them
constexpr std::size_t words(std::string_view text) {
    std::size_t count = 1;
    for (char c : text) count += c == ' ';
    return count;
}

struct Signature {
    std::vector<std::string> numbers, pointers;
};

// Notes the name of every value that it is asked for. `rest` has the parameters' names; a struct has those of its
// members. Pointer members get the parameter's name as a prefix, because two parameters may be of one struct.
struct Namer {
    Signature& signature;
    std::string_view rest;
    std::string prefix = {};

    std::string word() {
        const std::string_view first = rest.substr(0, rest.find(' '));
        rest.remove_prefix(first.size() + (first.size() < rest.size()));
        return prefix + std::string(first);
    }
    template <class T>
    T value() {
        (std::is_pointer_v<T> ? signature.pointers : signature.numbers).push_back(word());
        return T();
    }
    template <class T>
    Namer within() {
        static_assert(words(T::names) == members<T>(), "a name for every member");
        const std::string own = word();
        return {signature, T::names, counted<T>().numbers ? prefix : own + "_"};
    }
};

}  // namespace ntm
