// Work shared out over threads, with scratch for each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>

#include "cpu/thread.h"
#include "operators.h"

namespace ntm::cpu {
namespace {

constexpr Size grain = 8192;  // touched numbers that are worth a thread: some microseconds

// Scratch of the calling thread, aligned to a cache line, uninitialised. It stays for the next call, unless it is very
// large: fresh memory costs a page fault every 4 KB. One object for each Use at a time.
template <class T, int Use>
class Scratch {
public:
    explicit Scratch(Size count) {
        const std::size_t bytes = count * sizeof(T);
        if (kept.size >= bytes) return;
        kept.release();
        kept.memory = ::operator new(bytes, alignment, std::nothrow);
        if (kept.memory) kept.size = bytes;
    }
    ~Scratch() {
        if (kept.size > most) kept.release();
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T* get() const { return static_cast<T*>(kept.memory); }  // nullptr where there is no memory

private:
    static constexpr std::align_val_t alignment{64};
    static constexpr std::size_t most = std::size_t(32) << 20;

    struct Kept {
        void* memory = nullptr;
        std::size_t size = 0;

        void release() {
            ::operator delete(memory, alignment);
            *this = {};
        }
        ~Kept() { release(); }
    };
    static thread_local Kept kept;
};
template <class T, int Use>
thread_local typename Scratch<T, Use>::Kept Scratch<T, Use>::kept;

constexpr Error out_of_memory = "ntm_fast: out of memory for the scratch of the CPU kernels";

// While it lives, the calling thread takes subnormal numbers for 0, as operands and as results. A processor may need a
// hundred times as long for one, and what a machine has learned makes many: weightings far from the focus, gradients of
// saturated gates.
class FlushedSubnormals {
public:
#if defined(__SSE2__)
    FlushedSubnormals() { __builtin_ia32_ldmxcsr(found | 0x8040); }  // results to zero, operands to zero
    ~FlushedSubnormals() { __builtin_ia32_ldmxcsr(found); }
    const unsigned found = __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
    FlushedSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(found));
        asm volatile("msr fpcr, %0" : : "r"(found | (1ull << 24)));
    }
    ~FlushedSubnormals() { asm volatile("msr fpcr, %0" : : "r"(found)); }
    unsigned long long found;
#endif
    FlushedSubnormals(const FlushedSubnormals&) = delete;
    FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;
};

// How items are dealt out to threads: in shares of equal number, or one after the other to whoever is free.
enum class Deal { in_equal_shares, in_turn };

// Calls f(team, i, scratch) for every item; cost is the numbers an item touches, scratch those it needs for itself.
template <class T, class F>
Error parallel(Size items, Size cost, Size scratch, const Launch& launch, F f, Deal deal = Deal::in_equal_shares) {
    if (items == 0) return nullptr;
    const Size threads = std::max<Size>(1, std::min({Size(launch.threads), items, items * cost / grain}));
    const Size piece = Arena<T>::size(scratch);
    const Scratch<T, 0> memory(threads * piece);
    if (scratch != 0 && !memory.get()) return out_of_memory;
    // One copy of the code, whether one thread runs it or several: in two, the compiler may fuse different products and
    // sums, and the answers would depend on the number of threads.
    T* const all = memory.get();
    std::atomic<Size> taken{0};
    auto share = [&](Size thread) __attribute__((noinline, noclone)) {
        T* own = all + thread * piece;
        const bool in_turn = deal == Deal::in_turn;
        const Size end = in_turn ? items : items * (thread + 1) / threads;
        Size i = in_turn ? taken++ : items * thread / threads;
        for (; i < end; i = in_turn ? taken++ : i + 1) f(Thread<T>{}, i, own);
    };
    auto flushed = [&](Size thread) {
        const FlushedSubnormals flushed;
        share(thread);  // a call, which the compiler leaves between the two
    };
    if (threads == 1) {
        flushed(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (Size thread = 0; thread < threads; ++thread) flushed(thread);
    }
    return nullptr;
}

struct OnThreads {
    template <class Body, class T = typename Body::Real>
    static Error run(const Body& body, const Launch& launch) {
        if (launch.needed) return nullptr;
        return parallel<T>(body.items(), body.cost(), body.scratch(false), launch,
                           [=](auto team, Size i, T* scratch) { body(team, i, Arena<T>{scratch}); });
    }
};

}  // namespace
}  // namespace ntm::cpu
