// How the items of an operator are dealt out to a device: only here sizes meet the device's limits, and here are the
// numbers of a launch that may be tuned. (The packed format is in product.h. Python has its own: LARGEST_HIDDEN in
// engines/choose.py; CAPTURED_AT, KEYS, SHARE in engines/graphs.py.) Without CUDA, so that tests can ask it anything.
#pragma once

#include "core/sequence.h"

namespace ntm::cuda {

// What CUDA gives.
constexpr int warp_size = 32;
constexpr Size most_blocks = (Size(1) << 31) - 1;  // of a grid

// What may be tuned. Kernels, tests and reports name these numbers.
//
// A warp to an item:
constexpr int warps_per_block = 4;
constexpr int warp_blocks = 4;       // blocks of such warps for which a multiprocessor must have registers
constexpr Size resident_warps = 12;  // on a multiprocessor, so that some can work while others wait for memory
constexpr Size widest_of_warp = 256;  // numbers of the widest loop for which a warp is enough
constexpr int warp_numbers = 4;      // numbers of a lane at a time: 128 locations are one tile of a warp
// A block to an item:
constexpr int most_threads = 256;
constexpr Size block_exchange = 2 * 512;  // numbers in shared memory, for exchanging sums between warps
constexpr int workspace_blocks = 2;       // of a multiprocessor, if their scratch is in the workspace
// Any team:
constexpr int rows_at_once = 4;     // rows whose sums are added up side by side
constexpr int vectors_at_once = 4;  // of 16 bytes, that a thread copies at a time
// A block to a tile of a sequence's elements:
constexpr int most_elements = 8;  // of a tile: a thread holds a product's sums for all of them
// Threads of the block, which has a multiprocessor for itself: two blocks would read the weights twice. There are as
// many as there are registers for.
constexpr int sequence_threads_float32 = 512;
constexpr int sequence_threads_float64 = 256;
constexpr int sequence_blocks = 1;  // on a multiprocessor
// The grid that packs the weights of sequences:
constexpr int pack_threads = 256;  // of a block
constexpr Size most_pack_blocks = 1024;

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
    Size staged;    // numbers of scratch that an item takes if its memories are copied to shared memory too
    Size unstaged;  // and if they are left where they are
    Size reserved;  // numbers of shared memory that a block needs besides
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

constexpr Size smaller(Size a, Size b) { return a < b ? a : b; }
constexpr Size round_up(Size n, Size to) { return (n + to - 1) / to * to; }

// Which kernels there are besides those of unstaged blocks, which serve all sizes.
struct Kernels {
    bool warps, block;
};

constexpr Plan plan(const Demand& d, const Limits& limits, const Kernels& kernels) {
    const Size reserved = d.reserved * d.real;
    // A warp to an item, if there are enough items for every multiprocessor and it has room for their scratch.
    const Size of_warps = warps_per_block * d.staged * d.real;
    const Size fitting = limits.shared_per_multiprocessor / (of_warps + limits.shared_reserved) * warps_per_block;
    if (kernels.warps && d.width <= widest_of_warp && of_warps <= limits.shared_per_block &&
        fitting >= resident_warps && d.items >= limits.multiprocessors * resident_warps)
        return {Way::warps, smaller((d.items + warps_per_block - 1) / warps_per_block, most_blocks),
                warps_per_block * warp_size, of_warps, 0};

    const int threads = int(smaller(round_up(d.width, warp_size), most_threads));
    const Size blocks = smaller(d.items, most_blocks);
    const Size staged = reserved + d.staged * d.real, unstaged = reserved + d.unstaged * d.real;
    if (kernels.block && staged <= limits.shared_per_block) return {Way::block, blocks, threads, staged, 0};
    if (unstaged <= limits.shared_per_block) return {Way::unstaged, blocks, threads, unstaged, 0};
    const Size few = smaller(d.items, workspace_blocks * limits.multiprocessors);
    return {Way::workspace, few, threads, reserved, few * d.unstaged * d.real};
}

// How a sequence's batch is dealt out: a block takes a tile of elements through all of time.
struct SequencePlan {
    int elements;       // of a tile; 0 if not even one fits
    int group;          // threads that work on one element
    int threads;        // of a block: all of them work on the controller's products
    bool holds_memory;  // in shared memory; else the memories stay where they are
    Size blocks;
    Size shared;  // bytes of a block; if not even one element fits, those that it would take
};

constexpr int sequence_threads(Size real) {
    return real == sizeof(float) ? sequence_threads_float32 : sequence_threads_float64;
}
// Numbers through which a group's warps exchange sums: two halves, each with a number for every thread.
constexpr Size exchange_room(int group) { return room(2 * group); }

constexpr SequencePlan sequence_tile(const SequenceSizes& s, bool backward, Size real, int elements, bool holds) {
    const int threads = sequence_threads(real);
    int group = threads / elements;
    while (group > warp_size && group / 2 >= s.step.N) group /= 2;
    const SequenceStaging staging = {true, false, true, holds, elements};
    const Size scratch = backward ? SequenceBackwardFrame<char>::scratch(s, elements, staging)
                                  : SequenceFrame<char>::scratch(s, elements, true, staging);
    return {elements, group, threads, holds, (s.B + elements - 1) / elements,
            (elements * exchange_room(group) + scratch) * real};
}

// Tiles are as large as fit, because the weights are read once for each tile, but not so large that a multiprocessor
// gets no block. Memories are held in shared memory if at least one fits, and if there is a kernel for it (holding).
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
