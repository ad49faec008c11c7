// The launch plan for every size against the limits of several devices: whatever comes out must be launchable, must hold
// the scratch that its kernel uses, and must be the best way that fits.
#include <cstdio>
#include <cstdlib>

#include "cuda/plan.h"

using namespace ntm::cuda;
using ntm::Size;

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
    CHECK(p.threads >= 32 && p.threads % 32 == 0 && p.threads <= 256, d, p);  // the kernels' launch bounds
    CHECK(p.blocks >= 1 && p.blocks <= 2147483647, d, p);
    CHECK(p.shared >= 0 && p.shared <= limits.shared_per_block, d, p);
    const Size reserved = d.reserved * d.real, staged = reserved + d.staged * d.real;
    const Size unstaged = reserved + d.unstaged * d.real;
    switch (p.way) {
        case Way::warps:
            CHECK(kernels.warps && p.threads == 128 && d.width <= 256, d, p);
            CHECK(p.shared == 4 * d.staged * d.real && p.workspace == 0, d, p);
            CHECK(p.blocks * 4 >= d.items || p.blocks == 2147483647, d, p);
            // Enough of them run at once, and there are enough for every multiprocessor.
            CHECK(12 / 4 * (p.shared + limits.shared_reserved) <= limits.shared_per_multiprocessor, d, p);
            CHECK(d.items >= 12 * limits.multiprocessors, d, p);
            break;
        case Way::block:
            CHECK(kernels.block && p.shared == staged && p.workspace == 0, d, p);
            CHECK(p.blocks == d.items || p.blocks == 2147483647, d, p);
            break;
        case Way::unstaged:
            CHECK(!kernels.block || staged > limits.shared_per_block, d, p);
            CHECK(p.shared == unstaged && p.workspace == 0, d, p);
            CHECK(p.blocks == d.items || p.blocks == 2147483647, d, p);
            break;
        case Way::workspace:
            CHECK(unstaged > limits.shared_per_block, d, p);
            CHECK(p.shared == reserved && p.blocks <= 2 * limits.multiprocessors && p.blocks <= d.items, d, p);
            CHECK(p.workspace == p.blocks * d.unstaged * d.real, d, p);
            break;
    }
    if (p.way != Way::warps) {  // a thread a location, as far as a block goes
        CHECK(p.threads == (d.width >= 256 ? 256 : (d.width + 31) / 32 * 32), d, p);
    }
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
                            const Demand d = {n, width, real, 5 * width + (M + 2) * width, 5 * width, 1024};
                            check(d, limits, kernels);
                            met[int(plan(d, limits, kernels).way)] = true;
                        }
    for (bool way : met)
        if (!way && ++failures) std::printf("a way was never taken\n");

    // The standard sizes on an H200: a head's addressing by warps, a memory of 1024 x 64 floats left where it is.
    const Limits& h200 = devices[3];
    const Kernels both = {true, true};
    if (plan({16384, 128, 4, 900, 700, 1024}, h200, both).way != Way::warps && ++failures)
        std::printf("the standard sizes are not served by warps\n");
    if (plan({64, 128, 4, 900, 700, 1024}, h200, both).way != Way::block && ++failures)
        std::printf("a small batch is not served by blocks\n");
    if (plan({64, 1024, 4, 70000, 6000, 1024}, h200, both).way != Way::unstaged && ++failures)
        std::printf("a large memory is not left where it is\n");
    if (plan({64, 16384, 4, 16384 * 520, 16384 * 8, 1024}, h200, both).way != Way::workspace && ++failures)
        std::printf("a scratch beyond shared memory does not go to the workspace\n");
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
