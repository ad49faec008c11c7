// The controller's products, [E, K] x [K, C] with the few elements of a tile, by all warps of a block. The elements'
// rows are in shared memory; the weight comes from L2 and is used for all elements at once.
//
// A warp takes 8 columns at a time. Each of its lanes takes one of these columns and a quarter of the k's, four at a
// time. The weight is packed in the order in which the warp reads it, 512 contiguous bytes at a time. The four numbers
// of an element's row that a lane needs are one load, which it shares with seven other lanes.
//
// The order in which an output's terms are added depends on nothing but K, so that an element's answers do not depend
// on the others in its tile.
#pragma once

#include "cuda/team.h"

namespace ntm::cuda {

constexpr int panel_width = 8, quad = 4, quads_at_once = warp_size / panel_width;

// [C / 8][K / 16][4][8][4]: panels of columns, and in each of them the quads of k's, with 0 past K and C
constexpr Size packed_size(Size K, Size C) { return round_up(C, panel_width) * round_up(K, quads_at_once * quad); }

// A weight as torch has it, [outputs, inputs]; rows are stride numbers apart.
template <class T>
struct Weight {
    const T* from;
    Size stride, inputs;
};

// Two weights with the same outputs, joined side by side (the second may have no inputs), to be packed as the [K, C]
// that takes inputs to outputs or, backward, outputs to inputs.
template <class T>
struct Packing {
    Weight<T> first, second;
    Size outputs;
    bool backward;
    T* to;

    constexpr Size inputs() const { return first.inputs + second.inputs; }
    constexpr Size size() const { return backward ? packed_size(outputs, inputs()) : packed_size(inputs(), outputs); }
};

// All threads of the grid pack together.
template <class T>
NTM_FN void pack(const Packing<T>& p) {
    const Size quads = round_up(p.backward ? p.outputs : p.inputs(), quads_at_once * quad) / quad, count = p.size();
    for (Size i = blockIdx.x * Size(blockDim.x) + threadIdx.x; i < count; i += Size(gridDim.x) * blockDim.x) {
        const Size slot = i / quad / panel_width, k = slot % quads * quad + i % quad;
        const Size c = slot / quads * panel_width + i / quad % panel_width;
        const Size output = p.backward ? k : c, input = p.backward ? c : k;
        T value = 0;
        if (output < p.outputs && input < p.inputs()) {
            const bool second = input >= p.first.inputs;
            const Weight<T>& weight = second ? p.second : p.first;
            value = weight.from[output * weight.stride + input - second * p.first.inputs];
        }
        p.to[i] = value;
    }
}

template <class T>
struct __attribute__((may_alias)) __align__(16) Quad {
    T number[quad] = {};
};

// For at most Count elements. Index is wide enough for K and C, because a row is in shared memory.
template <int Count, class T>
NTM_FN void product(Index E, Index K, Index C, const T* in, const T* packed, T* out) {
    const int lane = threadIdx.x % warp_size, column = lane % panel_width, part = lane / panel_width;
    const Index quads = round_up(K, quads_at_once * quad) / quad;
    auto row = [&](auto e) NTM_INLINE { return in + (e < E ? e : E - 1) * K; };  // past the last, the last once more
    NTM_ROLLED
    for (Index panel = threadIdx.x / warp_size; panel * panel_width < C; panel += blockDim.x / warp_size) {
        T sums[Count][1] = {};
        const Quad<T>* weights = reinterpret_cast<const Quad<T>*>(packed) + panel * quads * panel_width + column;
        if (K % quad == 0) {
            Quad<T> next = weights[part * panel_width];
            NTM_ROLLED
            for (Index q = part; q < quads; q += quads_at_once) {
                const Quad<T> weight = next;
                if (q + quads_at_once < quads) next = weights[(q + quads_at_once) * panel_width];
                if (q * quad < K)
                    unroll<Count>([&](auto e) NTM_INLINE {
                        const Quad<T> x = reinterpret_cast<const Quad<T>*>(row(e))[q];
                        unroll<quad>([&](auto i) NTM_INLINE { sums[e][0] += weight.number[i] * x.number[i]; });
                    });
            }
        } else {  // rows are not aligned, so go number by number, in the same order
            NTM_ROLLED
            for (Index k = part * quad; k < K; k += k % quad + 1 < quad ? 1 : 1 + (quads_at_once - 1) * quad) {
                const T weight = weights[k / quad * panel_width].number[k % quad];
                unroll<Count>([&](auto e) NTM_INLINE { sums[e][0] += weight * row(e)[k]; });
            }
        }
        const Index c = panel * panel_width + column;
        sum_rows<warp_size / 2, panel_width>(sums, 0, [&](Index e, const T (&sum)[1]) NTM_INLINE {
            if (e < E && c < C) out[e * C + c] += sum[0];
        });
    }
}

}  // namespace ntm::cuda
