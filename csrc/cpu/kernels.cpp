// The CPU backend, compiled once per variant: every operator parallel over its items, a thread to each.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "core/element.h"
#include "core/sequence.h"
#include "cpu/product.h"
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

// Calls f(team, i, scratch) for every item; cost is the numbers an item touches, scratch those it needs for itself.
template <class T, class F>
Error parallel(Size items, Size cost, Size scratch, const Launch& launch, F f) {
    if (items == 0) return nullptr;
    const Size threads = std::max<Size>(1, std::min({Size(launch.threads), items, items * cost / grain}));
    const Size piece = Arena<T>::size(scratch);
    const Scratch<T, 0> memory(threads * piece);
    if (scratch != 0 && !memory.get()) return out_of_memory;
    // One copy of the code, whether one thread runs it or several: in two, the compiler may fuse different products and
    // sums, and the answers would depend on the number of threads.
    T* const all = memory.get();
    auto share = [&](Size thread) __attribute__((noinline, noclone)) {
        T* own = all + thread * piece;
        for (Size i = items * thread / threads; i < items * (thread + 1) / threads; ++i) f(Thread<T>{}, i, own);
    };
    if (threads == 1) {
        share(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (Size thread = 0; thread < threads; ++thread) share(thread);
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

// How many memories of an element a step works on: itself, or what it was before and after, and its gradient.
constexpr Size forward_memories = 1, backward_memories = 3;

// Elements that share a pass over the weights: fewer where more memories would crowd the second-level cache, and one
// where its own fill it, unless the weights are larger than one of these.
template <class T>
constexpr Size sequence_tile(const SequenceSizes& s, Size memories) {
    const Size bytes = s.memory() * sizeof(T);
    if (memories * bytes > (768 << 10) && s.memory() > Size(s.L) * s.gates() * s.widest()) return 1;
    return bytes > (16 << 10) ? 4 : 8;
}

// One that multiplies: packed or, where it is used only once, as it is stored, in columns side by side
template <class T>
struct SequenceWeight {
    const T* packed;
    std::array<Columns<T>, 2> stored;
};

// What a sequence needs: one thread does it all.
template <class T>
struct SequenceThread {
    using Real = T;
    static constexpr bool staged = false, takes_ends = true, holds_memory = false;
    static constexpr Size rooms(Size) { return 1; }

    T* own;

    T* scratch() const { return own; }
    static Index again(Index n) { return n; }
    void sync() const {}
    void product(Size E, Size K, Size C, const T* in, const SequenceWeight<T>& weight, T* out) const {
        if (weight.packed)
            cpu::product(E, K, C, in, weight.packed, out);
        else
            product_unpacked(C, in, weight.stored, out);
    }
    template <class F>
    NTM_FN void elements(Size E, F&& f) const {
        for (Index e = 0; e < E; ++e) f(Thread<T>{}, e, Index(0));
    }
};
constexpr SequenceStaging in_place = {false, true, false, 1};

// The weights of a whole sequence, for one direction, and its biases. All are packed but for one step of one element.
template <class T>
struct PackedSequence {
    const Scratch<T, 1> storage;
    std::vector<LayerWeights<T, SequenceWeight<T>>> layers;
    SequenceWeights<T, SequenceWeight<T>> weights;

    static Size size(Size inputs, Size outputs, bool backward) {
        return backward ? packed_size<T>(outputs, inputs) : packed_size<T>(inputs, outputs);
    }
    static Size size(const SequenceSizes& s, bool backward) {
        const Size G = s.gates();
        Size total = room(size(s.H, s.step.params(), backward), size(s.features(), s.O, backward));
        for (Size l = 0; l < s.L; ++l) {
            const Size fed = (backward || l ? 0 : s.I) + s.fed(l);
            total += s.gru ? room(size(fed, G, backward), size(s.H, G, backward))
                           : room(size(fed + s.H, G, backward), G);
        }
        return total;
    }

    PackedSequence(const SequenceSizes& s, const T* const* raw, bool backward) : storage(size(s, backward)) {
        if (!storage.get()) return;
        const Size G = s.gates(), P = s.step.params();
        Arena<T> arena{storage.get()};
        auto take = [&](Size outputs, Columns<T> left, Columns<T> right = {}) -> SequenceWeight<T> {
            const std::array<Columns<T>, 2> stored = {left, right};
            if (!backward && s.T * s.B == 1) return {nullptr, stored};
            const Size inputs = left.count + right.count;
            T* packed = arena.take(size(inputs, outputs, backward));
            Size first = 0;
            for (const auto& [weight, stride, count] : stored) {
                if (backward)
                    pack(outputs, count, weight, stride, first, packed);
                else
                    pack_transposed(outputs, count, weight, stride, inputs, first, packed);
                first += count;
            }
            if (backward) pad(outputs, inputs, packed);
            return {packed, stored};
        };
        for (Size l = 0; l < s.L; ++l, raw += 4) {
            const Size I = l ? 0 : s.I, skipped = backward ? I : 0;
            const Columns<T> fed = {raw[0] + skipped, I + s.fed(l), I - skipped + s.fed(l)};
            const Columns<T> hidden = {raw[1], s.H, s.H};
            if (s.gru) {
                const SequenceWeight<T> own = take(G, fed);
                layers.push_back({own, take(G, hidden), raw[2], raw[3]});
            } else {
                T* bias = arena.take(G);
                for (Size i = 0; i < G; ++i) bias[i] = raw[2][i] + raw[3][i];
                layers.push_back({take(G, fed, hidden), {}, bias, nullptr});
            }
        }
        const SequenceWeight<T> heads = take(P, {raw[0], s.H, s.H});
        weights = {layers.data(), heads, raw[1], take(s.O, {raw[2], s.features(), s.features()}), raw[3]};
    }
};

// Calls f(team, first, count) for tiles of the batch, at most so large and of nearly the same size, as many on every
// thread.
template <class T, class F>
Error sequence_tiles(const SequenceSizes& s, Size most, Size scratch, const Launch& launch, F f) {
    if (s.B == 0) return nullptr;
    const Size threads = std::min<Size>(launch.threads, s.B);
    const Size per_thread = (s.B + threads - 1) / threads;
    const Size tiles = std::min(s.B, threads * ((per_thread + most - 1) / most));
    return parallel<T>(tiles, grain, scratch, launch, [=](auto, Size i, T* own) {
        const Size first = s.B * i / tiles, end = s.B * (i + 1) / tiles;
        f(SequenceThread<T>{own}, first, end - first);
    });
}

template <class T>
Error ntm_sequence(Launch launch, SequenceSizes s, StepOptions o, int keep, const T* const* weights,
                   const T* inputs, T* outputs, SequenceState<const T> initial, SequenceState<T> final,
                   SequenceTrail<T> trail) {
    if (is_too_large(s, false)) return too_large;
    if (launch.needed) return nullptr;
    const PackedSequence<T> packed(s, weights, false);
    if (!packed.storage.get()) return out_of_memory;
    const Size E = std::min(s.B, sequence_tile<T>(s, forward_memories));
    const Size scratch = SequenceFrame<T>::scratch(s, E, keep != 0, in_place);
    return sequence_tiles<T>(s, E, scratch, launch, [&](auto team, Size first, Size count) {
        sequence(team, s, o, first, count, keep != 0, packed.weights, inputs, outputs, initial, final, trail);
    });
}

template <class T>
Error ntm_sequence_backward(Launch launch, SequenceSizes s, StepOptions o, const T* const* weights,
                            SequenceState<const T> initial, const T* final_memory, SequenceTrail<const T> trail,
                            const T* grad_outputs, SequenceState<const T> grad_final, SequenceState<T> grad,
                            SequenceGrads<T> out) {
    if (is_too_large(s, true)) return too_large;
    if (launch.needed) return nullptr;
    const PackedSequence<T> packed(s, weights, true);
    if (!packed.storage.get()) return out_of_memory;
    const Size E = std::min(s.B, sequence_tile<T>(s, backward_memories));
    const Size scratch = SequenceBackwardFrame<T>::scratch(s, E, in_place);
    return sequence_tiles<T>(s, E, scratch + sequence_segment(s, E), launch, [&](auto team, Size first, Size count) {
        sequence_backward(team, s, o, first, count, packed.weights, initial, final_memory, trail, grad_outputs,
                          grad_final, grad, out, team.scratch() + scratch);
    });
}

constexpr Size gradient_rows = 128;  // at a time: the gradients of so many outputs stay in the second-level cache

// A thread has some outputs of every weight, so that the order of a sum does not depend on the number of threads.
template <class T>
Error ntm_sequence_weight_gradients(Launch launch, SequenceSizes s, const T* inputs, SequenceState<const T> initial,
                                    SequenceTrail<const T> trail, const T* grad_outputs,
                                    SequenceGrads<const T> grads, SequenceState<const T> grad, SequenceState<T> sum,
                                    T* const* grad_weights) {
    if (is_too_large(s, true)) return too_large;
    if (launch.needed) return nullptr;
    const Size B = s.B, H = s.H, G = s.gates(), F = s.read_size(), P = s.step.params(), O = s.O, rows = s.T * B;
    const Size shares = launch.threads;
    auto first_of = [=](Size outputs, Size share) {
        return std::min(outputs, (outputs + lanes<T> - 1) / lanes<T> * share / shares * lanes<T>);
    };
    const Size most = (std::max({G, P, O}) / lanes<T> / shares + 2) * lanes<T>;  // outputs of a thread
    const Size room = most * (std::max(s.I + F, H) + H + 1);
    return parallel<T>(shares, rows * G / shares, room, launch, [=](auto team, Size share, T* sums) {
        const T one = 1;
        const Columns<T> ones = {&one, 0, 1};  // what a bias is fed
        auto hidden = [&](Size l, Size n) -> Columns<T> {  // a layer's, from row n on
            if (l + 1 < s.L) return {trail.hidden + (l * rows + n) * H, H, H};
            return {trail.features + n * (H + F), H + F, H};
        };
        auto hidden_before = [&](Size l, Size n) -> Columns<T> {
            if (n >= B) return hidden(l, n - B);
            const TileState<const T> start = initial_of(s, initial, n);
            return {start.hidden + l * start.span * H, s.shared ? 0 : H, H};
        };
        auto reads_before = [&](Size n) -> Columns<T> {
            if (n < B) return {initial_of(s, initial, n).reads, s.shared ? 0 : F, F};
            return {trail.features + (n - B) * (H + F) + H, H + F, F};
        };
        using Two = std::array<Columns<T>, 2>;
        struct Target {
            T* grad;  // [outputs, columns]
            Size columns;
        };
        // The gradients of everything that grad's outputs were fed through, from what fed(n) says it was from row n on.
        auto gradients = [&](Size outputs, const T* grad, auto fed, std::initializer_list<Target> targets) {
            const Size first = first_of(outputs, share), count = first_of(outputs, share + 1) - first;
            Size columns = 0;
            for (const Target& target : targets) columns += target.columns;
            std::fill_n(sums, columns * count, T(0));
            for (Size n = 0, end; n < rows; n = end) {
                end = std::min(n < B ? B : rows, n + gradient_rows);  // the first step was fed the initial state
                add_weight_gradient(end - n, count, grad + n * outputs + first, outputs, fed(n), sums);
            }
            const T* from = sums;
            for (const Target& target : targets) {
                T* to = target.grad + first * target.columns;
                transpose(target.columns, count, from, count, to, target.columns);
                from += target.columns * count;
            }
        };
        T* const* to = grad_weights;
        for (Size l = 0; l < s.L; ++l, to += 4) {
            const T* dx = l ? grads.upper_x + (l - 1) * rows * G : grads.x;
            const Size I = l ? H : s.I, R = l ? 0 : F;
            auto below = [&](Size n) { return l ? hidden(l - 1, n) : Columns<T>{inputs + n * s.I, s.I, s.I}; };
            auto reads = [&](Size n) { return l ? Columns<T>{} : reads_before(n); };
            if (s.gru) {
                using Three = std::array<Columns<T>, 3>;
                gradients(G, dx, [&](Size n) { return Three{below(n), reads(n), ones}; }, {{to[0], I + R}, {to[2], 1}});
                gradients(G, grads.y + l * rows * G, [&](Size n) { return Two{hidden_before(l, n), ones}; },
                          {{to[1], H}, {to[3], 1}});
            } else {
                using Four = std::array<Columns<T>, 4>;
                gradients(G, dx, [&](Size n) { return Four{below(n), reads(n), hidden_before(l, n), ones}; },
                          {{to[0], I + R}, {to[1], H}, {to[2], 1}});
                const Size first = first_of(G, share);
                copy(team, first_of(G, share + 1) - first, to[2] + first, to[3] + first);
            }
        }
        gradients(P, grads.params, [&](Size n) { return Two{hidden(s.L - 1, n), ones}; }, {{to[0], H}, {to[1], 1}});
        auto sum_up = [&](Size size, const T* of_elements, T* to) {  // [B, size]
            const Size first = first_of(size, share), count = first_of(size, share + 1) - first;
            std::fill_n(to + first, count, T(0));
            add_weight_gradient(B, count, of_elements + first, size, std::array<Columns<T>, 1>{ones}, to + first);
        };
        if (s.shared) {
            sum_up(s.memory(), grad.memory, sum.memory);
            sum_up(s.step.R * s.step.N, grad.read_weights, sum.read_weights);
            sum_up(s.step.W * s.step.N, grad.write_weights, sum.write_weights);
            sum_up(F, grad.reads, sum.reads);
            for (Size l = 0; l < s.L; ++l) {
                sum_up(H, grad.hidden + l * B * H, sum.hidden + l * H);
                if (!s.gru) sum_up(H, grad.cell + l * B * H, sum.cell + l * H);
            }
        }
        auto features = [&](Size n) { return Two{Columns<T>{trail.features + n * (H + F), H + F, H + F}, ones}; };
        gradients(O, grad_outputs, features, {{to[2], H + F}, {to[3], 1}});
    });
}

template <class T>
Operators<T> operators() {
    Operators<T> table{};
    serve_families<with_a_body, OnThreads>(table);
    table.ntm_sequence = ntm_sequence<T>;
    table.ntm_sequence_backward = ntm_sequence_backward<T>;
    table.ntm_sequence_weight_gradients = ntm_sequence_weight_gradients<T>;
    return table;
}

const Backend backend = {NTM_VARIANT, /*takes_ends*/ true, /*bounded*/ false, operators<float>(), operators<double>()};

}  // namespace
}  // namespace ntm::cpu

extern "C" const ntm::Backend* ntm_backend() { return &ntm::cpu::backend; }
