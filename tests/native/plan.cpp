// The launch plans for every size against the limits of several devices: whatever comes out must be launchable, must
// hold the scratch that its kernel uses, and must be the best way that fits.
#include <cstdio>
#include <cstdlib>

#include "cuda/plan.h"

using namespace ntm;
using namespace ntm::cuda;

namespace {

int failures = 0;

#define CHECK(condition, d, p)                                                                                       \
    do {                                                                                                             \
        if (!(condition) && ++failures <= 20)                                                                        \
            std::printf("%s\n  items %lld width %lld real %lld staged %lld unstaged %lld: way %d blocks %lld threads " \
                        "%d shared %lld workspace %lld\n",                                                           \
                        #condition, (long long)d.items, (long long)d.width, (long long)d.real, (long long)d.staged,   \
                        (long long)d.unstaged, int(p.way), (long long)p.blocks, p.threads, (long long)p.shared,       \
                        (long long)p.workspace);                                                                     \
    } while (0)

// sm_75, sm_80, sm_86, sm_90 (an H100 and an H200), sm_120, and a device of one multiprocessor
constexpr Limits devices[] = {{72, 64 << 10, 64 << 10, 0},        {108, 163 << 10, 164 << 10, 1 << 10},
                              {84, 99 << 10, 100 << 10, 1 << 10}, {132, 227 << 10, 228 << 10, 1 << 10},
                              {170, 99 << 10, 100 << 10, 1 << 10}, {1, 48 << 10, 48 << 10, 0}};

void check(const Demand& d, const Limits& limits, const Kernels& kernels) {
    const Plan p = plan(d, limits, kernels);
    CHECK(p.threads >= warp_size && p.threads % warp_size == 0 && p.threads <= most_threads, d, p);
    CHECK(p.blocks >= 1 && p.blocks <= most_blocks, d, p);
    CHECK(p.shared >= 0 && p.shared <= limits.shared_per_block, d, p);
    const Size reserved = d.reserved * d.real, staged = reserved + d.staged * d.real;
    const Size unstaged = reserved + d.unstaged * d.real;
    switch (p.way) {
        case Way::warps:
            CHECK(kernels.warps && p.threads == warps_per_block * warp_size && d.width <= widest_of_warp, d, p);
            CHECK(p.shared == warps_per_block * d.staged * d.real && p.workspace == 0, d, p);
            CHECK(p.blocks * warps_per_block >= d.items || p.blocks == most_blocks, d, p);
            // Enough of them run at once, and there are enough for every multiprocessor.
            CHECK(resident_warps / warps_per_block * (p.shared + limits.shared_reserved) <=
                      limits.shared_per_multiprocessor,
                  d, p);
            CHECK(d.items >= resident_warps * limits.multiprocessors, d, p);
            break;
        case Way::block:
            CHECK(kernels.block && p.shared == staged && p.workspace == 0, d, p);
            CHECK(p.blocks == d.items || p.blocks == most_blocks, d, p);
            break;
        case Way::unstaged:
            CHECK(!kernels.block || staged > limits.shared_per_block, d, p);
            CHECK(p.shared == unstaged && p.workspace == 0, d, p);
            CHECK(p.blocks == d.items || p.blocks == most_blocks, d, p);
            break;
        case Way::workspace:
            CHECK(unstaged > limits.shared_per_block, d, p);
            CHECK(p.shared == reserved && p.blocks <= d.items, d, p);
            CHECK(p.blocks <= workspace_blocks * limits.multiprocessors, d, p);
            CHECK(p.workspace == p.blocks * d.unstaged * d.real, d, p);
            break;
    }
    if (p.way != Way::warps) {  // a thread a location, as far as a block goes
        CHECK(p.threads == smaller(round_up(d.width, warp_size), most_threads), d, p);
    }
}

// --- whole sequences ---

SequenceSizes sizes(Size B, Index N, Index M, Index H, Index L = 1, Index heads = 1,
                    Controller controller = Controller::lstm, Index every = 1) {
    return {41, B, 9, 8, L, H, controller, {B, heads, heads, N, M, 3}, every, 0};
}

// Numbers of a tile's scratch, by the arena that a kernel takes it from: nothing is left over, nothing short.
struct Crew {
    static constexpr bool staged = true, takes_ends = false;
    static constexpr Size slots(Size E) { return E; }
    char* scratch() const { return nullptr; }
};
template <bool Holds>
struct HoldingCrew : Crew {
    static constexpr bool holds_memory = Holds;
};
template <bool Holds>
Size taken(const SequenceSizes& s, bool backward, int E) {
    const HoldingCrew<Holds> crew;
    char* last = nullptr;  // where the last piece begins
    Size size = s.L * E * s.H;
    if (backward) {
        const SequenceBackwardFrame<char> f(crew, s, E, false, TileState<char>{});
        last = s.has_cell() ? f.grad.cell : f.grad.hidden;
    } else {
        const SequenceFrame<char> f(crew, s, E, true, false, TileState<char>{});
        last = s.has_cell() ? f.state.cell : f.state.hidden;
    }
    return last - static_cast<char*>(nullptr) + room(size);
}

void check(const SequenceSizes& s, bool backward, Size real, const Limits& limits, bool holding) {
    const SequencePlan p = sequence_plan(s, backward, real, limits, holding);
    const Size B = s.B;
    auto expect = [&](bool condition, const char* what) {
        if (!condition && ++failures <= 20)
            std::printf("%s\n  B %lld N %lld M %lld H %lld L %lld backward %d real %lld: elements %d group %d "
                        "threads %d holds %d blocks %lld shared %lld of %lld\n",
                        what, (long long)B, (long long)s.step.N, (long long)s.step.M, (long long)s.H, (long long)s.L,
                        backward, (long long)real, p.elements, p.group, p.threads, p.holds_memory, (long long)p.blocks,
                        (long long)p.shared, (long long)limits.shared_per_block);
    };
    const Size least = sequence_tile(s, backward, real, 1, false).shared;
    expect((p.elements == 0) == (least > limits.shared_per_block), "refused what fits, or took what does not");
    if (p.elements == 0) {
        expect(p.shared == least, "tells another size than the least");
        return;
    }
    expect(p.threads == sequence_threads(real), "threads, for which the registers are counted");
    expect(p.elements <= most_elements && (p.elements & (p.elements - 1)) == 0, "elements");
    const bool power_of_2 = (p.group & (p.group - 1)) == 0;
    expect(p.group >= warp_size && p.group % warp_size == 0 && power_of_2, "a group is not of 2^n warps");
    expect(p.elements * p.group <= p.threads, "more groups than threads");
    expect(p.group == warp_size || p.group / 2 < s.step.N, "half a group would do");
    expect(p.group * p.elements == p.threads || p.group >= s.step.N, "threads idle that could work");
    expect(p.blocks * p.elements >= B && (p.blocks - 1) * p.elements < B, "blocks");
    expect(p.shared <= limits.shared_per_block, "more than a block can have");
    const Size scratch = p.holds_memory ? taken<true>(s, backward, p.elements) : taken<false>(s, backward, p.elements);
    expect(p.shared == (p.elements * 2 * p.group + scratch) * real, "not what the kernel takes");
    expect(holding || !p.holds_memory, "there is no such kernel");
    if (holding && !p.holds_memory)
        expect(sequence_tile(s, backward, real, 1, true).shared > limits.shared_per_block, "a memory would fit");
    // As many as make a block for each multiprocessor, if they fit.
    expect(p.elements == 1 || (B + p.elements / 2 - 1) / (p.elements / 2) > limits.multiprocessors, "too large a tile");
    if (p.elements < most_elements && (B + p.elements - 1) / p.elements > limits.multiprocessors)
        expect(sequence_tile(s, backward, real, 2 * p.elements, p.holds_memory).shared > limits.shared_per_block,
               "twice as many elements would fit");
}

void check_sequences() {
    bool held = false, in_place = false, refused = false;
    for (const Limits& limits : devices)
        for (Size B : {1, 7, 132, 133, 1024, 16384, 100000})
            for (Index N : {1, 20, 128, 1000, 4096})
                for (Index M : {1, 20, 64})
                    for (Index H : {1, 100, 513, 4096})
                        for (Index L : {1, 3})
                            for (int variant = 0; variant < 16; ++variant) {
                                const bool backward = variant & 1, many = variant & 4;
                                const Controller controller = variant & 2 ? Controller::gru : Controller::lstm;
                                const Size real = variant & 8 ? 8 : 4;
                                const SequenceSizes s = sizes(B, N, M, H, L, many ? 4 : 1, controller);
                                check(s, backward, real, limits, real == 4);
                                const SequencePlan p = sequence_plan(s, backward, real, limits, real == 4);
                                (p.elements == 0 ? refused : p.holds_memory ? held : in_place) = true;
                            }
    if (!(held && in_place && refused) && ++failures) std::printf("a way was never taken by sequences\n");

    // The standard job on an H200
    struct {
        Size B;
        int forward, backward;  // elements
    } expected[] = {{1, 1, 1}, {132, 1, 1}, {264, 2, 2}, {1024, 8, 4}, {16384, 8, 4}};
    for (auto [B, forward, backward] : expected) {
        const SequencePlan f = sequence_plan(sizes(B, 128, 20, 100), false, 4, devices[3], true);
        const SequencePlan b = sequence_plan(sizes(B, 128, 20, 100), true, 4, devices[3], true);
        if ((f.elements != forward || b.elements != backward || !f.holds_memory || !b.holds_memory) && ++failures)
            std::printf("standard job, B %lld: tiles of %d and %d\n", (long long)B, f.elements, b.elements);
    }
    if (sequence_plan(sizes(64, 1024, 32, 100), true, 4, devices[3], true).holds_memory && ++failures)
        std::printf("a block cannot hold three memories of 1024 x 32\n");
}

}  // namespace

int main() {
    const Size items[] = {1, 2, 31, 64, 1024, 16384, 65535, 65536, 1 << 20, Size(1) << 33};
    const Size widths[] = {1, 20, 31, 32, 33, 100, 128, 256, 257, 1000, 1024, 4096, 16384};
    const Size memories[] = {0, 20, 64, 512};  // M; 0 for an operator without one
    const Kernels all[] = {{true, true}, {false, true}, {false, false}};
    bool met[4] = {};
    for (const Limits& limits : devices)
        for (Size n : items)
            for (Size width : widths)
                for (Size M : memories)
                    for (Size real : {4, 8})
                        for (const Kernels& kernels : all) {
                            const Demand d = {n, width, real, 5 * width + (M + 2) * width, 5 * width, block_exchange};
                            check(d, limits, kernels);
                            met[int(plan(d, limits, kernels).way)] = true;
                        }
    for (bool way : met)
        if (!way && ++failures) std::printf("a way was never taken\n");

    // The standard sizes on an H200: a head's addressing by warps, a memory of 1024 x 64 floats left where it is.
    const Limits& h200 = devices[3];
    const Kernels both = {true, true};
    if (plan({16384, 128, 4, 900, 700, block_exchange}, h200, both).way != Way::warps && ++failures)
        std::printf("the standard sizes are not served by warps\n");
    if (plan({64, 128, 4, 900, 700, block_exchange}, h200, both).way != Way::block && ++failures)
        std::printf("a small batch is not served by blocks\n");
    if (plan({64, 1024, 4, 70000, 6000, block_exchange}, h200, both).way != Way::unstaged && ++failures)
        std::printf("a large memory is not left where it is\n");
    if (plan({64, 16384, 4, 16384 * 520, 16384 * 8, block_exchange}, h200, both).way != Way::workspace && ++failures)
        std::printf("a scratch beyond shared memory does not go to the workspace\n");
    check_sequences();
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
