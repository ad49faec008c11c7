// A whole sequence: a block takes a tile of elements through all steps. Forward and backward are one launch each, after
// the launches that pack the weights.
#include <vector>

#include "cuda/launch.h"
#include "cuda/product.h"
#include "cuda/serve.h"

namespace ntm::cuda {

// x, hidden from the optimiser.
NTM_FN Index forget(Index x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// A block: all its warps work on the products together, and each group of warps on an element of its own.
template <class T, bool HoldsMemory>
struct BlockCrew {
    using Real = T;
    static constexpr bool staged = true, takes_ends = false, holds_memory = HoldsMemory;
    NTM_FN static constexpr Size slots(Size E) { return E; }

    Group<T> group;
    Index exchange;  // numbers of shared memory for the exchange of all groups; the scratch follows

    NTM_FN T* scratch() const { return reinterpret_cast<T*>(ntm_shared) + exchange; }
    NTM_FN Index again(Index n) const { return forget(n); }
    NTM_FN void sync() const { __syncthreads(); }
    NTM_FN void product(Index E, Index K, Index C, const T* in, const T* packed, T* out) const {
        E = forget(E);
        if (E > most_elements / 2)
            cuda::product<most_elements>(E, K, C, in, packed, out);
        else
            cuda::product<most_elements / 2>(E, K, C, in, packed, out);
    }
    template <class F>
    NTM_FN void elements(Size E, F&& f) const {
        const Index e = forget(group.index);
        if (e < E) f(group, e, e);
    }
};

template <class T>
struct SequenceForward {
    using Real = T;
    static constexpr const char* name = "ntm_sequence";
    static constexpr bool backward = false;
    SequenceSizes s;
    StepOptions o;
    int keep;
    const Index* order;
    SequenceState<const T> initial;
    SequenceState<T> final;
    SequenceTrail<T> trail;

    template <class Crew>
    NTM_FN void operator()(const Crew& crew, Size first, Size E, const SequenceWeights<T>& w, T*) const {
        const T* const inputs = nullptr;
        T* const outputs = nullptr;
        sequence(crew, s, o, first, E, order, keep, w, inputs, outputs, initial, final, trail);
    }
};

template <class T>
struct SequenceBackward {
    using Real = T;
    static constexpr const char* name = "ntm_sequence_backward";
    static constexpr bool backward = true;
    SequenceSizes s;
    StepOptions o;
    const Index* order;
    SequenceState<const T> initial;
    const T* final_memory;
    SequenceTrail<const T> trail;
    const T* grad_features;
    SequenceState<const T> grad_final;
    SequenceState<T> grad;
    SequenceGrads<T> out;

    template <class Crew>
    NTM_FN void operator()(const Crew& crew, Size first, Size E, const SequenceWeights<T>& w, T* segments) const {
        T* const grad_inputs = nullptr;
        sequence_backward(crew, s, o, first, E, order, w, initial, final_memory, trail, grad_features, grad_final,
                          grad, out, grad_inputs, segments + first * sequence_segment(s, 1));
    }
};

template <class Body, bool HoldsMemory, class T = typename Body::Real>
__global__ void __launch_bounds__(sequence_threads(sizeof(T)), sequence_blocks)
    through_time(Body body, SequenceWeights<T> weights, T* segments, int elements, int group) {
    const Size first = static_cast<Size>(blockIdx.x) * elements, E = smaller(elements, body.s.B - first);
    const int index = threadIdx.x / group;
    T* const exchange = reinterpret_cast<T*>(ntm_shared) + index * exchange_room(group);
    const BlockCrew<T, HoldsMemory> crew{Group<T>(exchange, group, index),
                                         static_cast<Index>(elements * exchange_room(group))};
    body(crew, first, E, weights, segments);
}

// What a launch packs: a layer, or the heads, which have one product and no biases to add up.
template <class T>
struct PackedLayer {
    Packing<T> first, second;          // the second, where there are two products
    const T *bias_ih, *bias_hh;        // [gates]  where there is one product,
    T* bias;                           // [gates]  their sum
    Size gates;
    LayerWeights<T> weights, *place;   // where it is packed, and the place in the workspace to write that to
};

template <class T>
__global__ void __launch_bounds__(pack_threads) pack_layer(PackedLayer<T> layer) {
    pack(layer.first);
    pack(layer.second);
    const Size thread = blockIdx.x * Size(blockDim.x) + threadIdx.x;
    if (layer.bias)
        for (Size i = thread; i < layer.gates; i += Size(gridDim.x) * blockDim.x)
            layer.bias[i] = layer.bias_ih[i] + layer.bias_hh[i];
    if (thread == 0 && layer.place) *layer.place = layer.weights;
}

// All weights, packed for one direction, in the caller's workspace. Without a workspace it only counts the numbers, and
// needs no weights.
template <class T>
class PackedSequence {
public:
    PackedSequence(const SequenceSizes& s, const T* const* raw, bool backward, T* workspace) {
        Arena<T> arena{workspace};
        const Size G = s.gates(), P = s.step.params();
        const std::vector<const T*> none(4 * s.L + 2);
        if (!raw) raw = none.data();
        auto* table = reinterpret_cast<LayerWeights<T>*>(arena.take(s.L * sizeof(LayerWeights<T>) / sizeof(T)));
        auto take = [&](Packing<T> packing) {
            packing.backward = backward;
            packing.to = arena.take(packing.size());
            return packing;
        };
        for (Size l = 0; l < s.L; ++l, raw += 4) {
            const Size skipped = l ? 0 : s.I;
            const Weight<T> fed = {raw[0] + skipped, skipped + s.fed(l), s.fed(l)}, hidden = {raw[1], s.H, s.H};
            PackedLayer<T> layer{};
            layer.gates = G;
            layer.place = table + l;
            if (s.products() == 2) {
                layer.first = take({fed, {}, G});
                layer.second = take({hidden, {}, G});
                layer.weights = {layer.first.to, layer.second.to, raw[2], raw[3]};
            } else {
                layer.first = take({fed, hidden, G});
                layer.bias_ih = raw[2], layer.bias_hh = raw[3], layer.bias = arena.take(G);
                layer.weights = {layer.first.to, nullptr, layer.bias, nullptr};
            }
            jobs.push_back(layer);
        }
        PackedLayer<T> heads{};
        heads.first = take({{raw[0], s.H, s.H}, {}, P});
        jobs.push_back(heads);
        weights = {table, heads.first.to, raw[1], nullptr, nullptr, nullptr};
        end = arena.next;
    }

    cudaError_t enqueue(const Launch& launch) const {
        for (const PackedLayer<T>& job : jobs) {
            const Size blocks = smaller((job.first.size() + pack_threads - 1) / pack_threads, most_pack_blocks);
            const cudaError_t status = cuda::enqueue(pack_layer<T>, blocks, pack_threads, 0, launch, job);
            if (status != cudaSuccess) return status;
        }
        return cudaSuccess;
    }

    SequenceWeights<T> weights;
    T* end;

private:
    std::vector<PackedLayer<T>> jobs;
};

template <class Body, class T = typename Body::Real>
Error through_time(const Launch& launch, const Body& body, const T* const* raw) {
    const SequenceSizes& s = body.s;
    if (is_too_large(s, Body::backward)) return too_large;
    const DeviceGuard guard(launch.device);
    if (guard.status != cudaSuccess) return failure(Body::name, guard.status);
    Limits limits;
    if (const Error error = failure(Body::name, limits_of(launch.device, limits))) return error;
    constexpr bool holding = sizeof(T) == sizeof(float);  // float64, for checks, has one kernel for all sizes
    const SequencePlan plan = sequence_plan(s, Body::backward, sizeof(T), limits, holding);
    if (plan.elements == 0) {
        thread_local char text[256];
        std::snprintf(text, sizeof text,
                      "ntm_fast: %s: one element's state takes %lld bytes of a block's shared memory, which the device "
                      "limits to %lld",
                      Body::name, static_cast<long long>(plan.shared), static_cast<long long>(limits.shared_per_block));
        return text;
    }
    T* const workspace = static_cast<T*>(launch.workspace);
    const PackedSequence<T> packed(s, raw, Body::backward, workspace);
    if (launch.needed) {
        const Size segments = Body::backward ? sequence_segment(s, s.B) : 0;
        *launch.needed = (packed.end - workspace + segments) * sizeof(T);
        return nullptr;
    }
    if (s.B == 0) return nullptr;
    if (const Error error = failure("pack_layer", packed.enqueue(launch))) return error;
    auto run = [&](auto* kernel) {
        return failure(Body::name, enqueue(kernel, plan.blocks, plan.threads, plan.shared, launch, body, packed.weights,
                                           packed.end, plan.elements, plan.group));
    };
    if constexpr (holding)
        if (plan.holds_memory) return run(&through_time<Body, true>);
    return run(&through_time<Body, false>);
}

template <class T>
void serve_sequence(Operators<T>& table) {
    table.ntm_sequence = [](Launch launch, SequenceSizes s, StepOptions o, int keep, const T* const* weights,
                            const Index* order, const T*, T*, SequenceState<const T> initial, SequenceState<T> final,
                            SequenceTrail<T> trail) {
        return through_time(launch, SequenceForward<T>{s, o, keep, order, initial, final, trail}, weights);
    };
    table.ntm_sequence_backward = [](Launch launch, SequenceSizes s, StepOptions o, const T* const* weights,
                                     const Index* order, SequenceState<const T> initial, const T* final_memory,
                                     SequenceTrail<const T> trail, const T* grad_features,
                                     SequenceState<const T> grad_final, SequenceState<T> grad, SequenceGrads<T> out,
                                     T*) {
        const SequenceBackward<T> body{s,     o,             order,    initial, final_memory,
                                       trail, grad_features, grad_final, grad,    out};
        return through_time(launch, body, weights);
    };
}

template void serve_sequence(Operators<float>&);
template void serve_sequence(Operators<double>&);

}  // namespace ntm::cuda
