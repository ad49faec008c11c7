// How the items of an operator are dealt out to a device: the one place where sizes meet the device's limits. Host code
// without CUDA, so that tests can ask it anything.
#pragma once

#include "core/team.h"

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
                warps_per_block * 32, of_warps, 0};

    const int threads = int(smaller(round_up(d.width, 32), most_threads));
    const Size blocks = smaller(d.items, most_blocks);
    const Size staged = reserved + d.staged * d.real, unstaged = reserved + d.unstaged * d.real;
    if (kernels.block && staged <= limits.shared_per_block) return {Way::block, blocks, threads, staged, 0};
    if (unstaged <= limits.shared_per_block) return {Way::unstaged, blocks, threads, unstaged, 0};
    const Size few = smaller(d.items, 2 * limits.multiprocessors);  // each with its scratch
    return {Way::workspace, few, threads, reserved, few * d.unstaged * d.real};
}

}  // namespace ntm::cuda
