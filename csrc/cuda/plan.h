// How the items of an operator are dealt out to a device: the one place where sizes meet the device's limits. Host code
// without CUDA, so that tests can ask it anything.
#pragma once

#include "core/sequence.h"

namespace ntm::cuda {

struct Limits {
    int multiprocessors;
    Size shared_per_block;  // bytes, all that a kernel may opt in to
    Size shared_per_multiprocessor;
    Size shared_reserved;  // by the system, for every block
};

// What an operator needs.
struct Demand {
    Size items;
    Size width;     // the numbers that its widest loop over locations goes over
    Size real;      // bytes of a number
    Size staged;    // scratch of an item in numbers, its memories in shared memory too
    Size unstaged;  // the same with the memories left where they are
    Size reserved;  // numbers that a block needs besides
};

enum class Way {
    warps,      // a warp to an item, its scratch and memories in shared memory
    block,      // a block to an item, likewise
    unstaged,   // a block to an item, memories where they are, scratch in shared memory
    workspace,  // the same with the scratch in the caller's workspace
};

struct Plan {
    Way way;
    Size blocks;
    int threads;     // of a block
    Size shared;     // bytes of a block
    Size workspace;  // bytes in all
};

constexpr int warp_size = 32;
constexpr int warps_per_block = 4;
constexpr int most_threads = 256;
constexpr Size most_blocks = (Size(1) << 31) - 1;
constexpr Size wide = 256;         // numbers for which a warp is enough
constexpr Size resident_warps = 12;  // on a multiprocessor, from which the others hide what one waits for

constexpr Size smaller(Size a, Size b) { return a < b ? a : b; }
constexpr Size round_up(Size n, Size to) { return (n + to - 1) / to * to; }

// Which kernels there are besides those of unstaged blocks, which serve all sizes.
struct Kernels {
    bool warps, block;
};

constexpr Plan plan(const Demand& d, const Limits& limits, const Kernels& kernels) {
    const Size reserved = d.reserved * d.real;
    // A warp an item where there are enough items for every multiprocessor, and room on it for their scratch.
    const Size of_warps = warps_per_block * d.staged * d.real;
    const Size fitting = limits.shared_per_multiprocessor / (of_warps + limits.shared_reserved) * warps_per_block;
    if (kernels.warps && d.width <= wide && of_warps <= limits.shared_per_block && fitting >= resident_warps &&
        d.items >= limits.multiprocessors * resident_warps)
        return {Way::warps, smaller((d.items + warps_per_block - 1) / warps_per_block, most_blocks),
                warps_per_block * warp_size, of_warps, 0};

    const int threads = int(smaller(round_up(d.width, warp_size), most_threads));
    const Size blocks = smaller(d.items, most_blocks);
    const Size staged = reserved + d.staged * d.real, unstaged = reserved + d.unstaged * d.real;
    if (kernels.block && staged <= limits.shared_per_block) return {Way::block, blocks, threads, staged, 0};
    if (unstaged <= limits.shared_per_block) return {Way::unstaged, blocks, threads, unstaged, 0};
    const Size few = smaller(d.items, 2 * limits.multiprocessors);  // each with its scratch
    return {Way::workspace, few, threads, reserved, few * d.unstaged * d.real};
}

// How a sequence's batch is dealt out: a block takes a tile of elements through all of time.
struct SequencePlan {
    int elements;       // of a tile; 0 where not even one fits
    int group;          // threads that work on one of them
    int threads;        // of a block: for the controller's products all work on all
    bool holds_memory;  // in shared memory; else the memories stay where they are
    Size blocks;
    Size shared;  // bytes of a block; where nothing fits, those that one element would take
};

constexpr int most_elements = 8;  // a product's sums that a thread holds at once
// Of a block: as many as there are registers for. Two blocks on a multiprocessor would read the weights twice.
constexpr int sequence_threads(Size real) { return real == sizeof(float) ? 512 : 256; }
// What a group's warps find goes through a number for each of its threads, in two halves.
constexpr Size exchange_room(int group) { return room(2 * group); }

constexpr SequencePlan sequence_tile(const SequenceSizes& s, bool backward, Size real, int elements, bool holds) {
    const int threads = sequence_threads(real);
    int group = threads / elements;
    while (group > warp_size && group / 2 >= s.step.N) group /= 2;
    const SequenceStaging staging = {true, false, holds, elements};
    const Size scratch = backward ? SequenceBackwardFrame<char>::scratch(s, elements, staging)
                                  : SequenceFrame<char>::scratch(s, elements, true, staging);
    return {elements, group, threads, holds, (s.B + elements - 1) / elements,
            (elements * exchange_room(group) + scratch) * real};
}

// A tile that gives every multiprocessor a block, where there are elements enough, and then as many of them as fit: the
// weights are read once for a tile. Memories are held where one fits, and where there is a kernel for it.
constexpr SequencePlan sequence_plan(const SequenceSizes& s, bool backward, Size real, const Limits& limits,
                                     bool holding) {
    int wanted = 1;
    while (wanted < most_elements && (s.B + wanted - 1) / wanted > limits.multiprocessors) wanted *= 2;
    for (int holds = holding; holds >= 0; --holds)
        for (int elements = wanted; elements > 0; elements /= 2) {
            const SequencePlan plan = sequence_tile(s, backward, real, elements, holds);
            if (plan.shared <= limits.shared_per_block) return plan;
        }
    SequencePlan none = sequence_tile(s, backward, real, 1, false);
    none.elements = 0;
    return none;
}

}  // namespace ntm::cuda
