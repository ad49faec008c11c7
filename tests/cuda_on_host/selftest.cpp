// The harness finds each kind of fault, in a kernel of a block, in one of warps and in one of groups of warps. Without
// a fault this exits with 0; with one, with 1 where the scheduler or the numbers tell, or as a sanitizer wants that
// does.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

extern __shared__ __align__(16) unsigned char ntm_shared[];

namespace {

const char* const faults[] = {
    "clean",          "no barrier",       "two blocks write", "read behind",        "write behind",
    "write before",   "unwritten",        "half a warp waits", "half a block waits", "half a warp leaves",
    "barrier and shuffle", "two places",      "one block ahead",
    // of groups
    "groups mix",         "no __syncthreads", "one id for two",   "two counts",        "two ids in a warp",
    "a warp leaves",      "a warp goes on",   "count 0",          "count 48",          "count 512",
    "id 0",               "id 16",            "one room",
};

bool planted(const char* fault) { return std::strcmp(faults[ntm_planted], fault) == 0; }

template <bool whole_block>
__device__ void sync() {
    whole_block ? __syncthreads() : __syncwarp();
}

// y = the sum of x over the team + the own x - the next one's; a team is a block or a warp of it
template <bool whole_block>
__global__ void __launch_bounds__(1024) kernel(const float* x /*[grid, block]*/, float* y /*[grid, block]*/) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const unsigned size = whole_block ? blockDim.x : 32, rank = whole_block ? threadIdx.x : lane;
    float* room = reinterpret_cast<float*>(ntm_shared) + threadIdx.x - rank;  // [size]
    float* partial = reinterpret_cast<float*>(ntm_shared) + blockDim.x;        // [warps]
    const unsigned first = blockIdx.x * blockDim.x;
    const float own = x[first + threadIdx.x];

    if (planted("one block ahead") && blockIdx.x == 0) y[blockDim.x + threadIdx.x] = 0;  // which the next one writes
    room[rank] = own;
    if (lane < 16) {
        if (planted("half a warp leaves")) return;
        if (planted("half a warp waits")) __syncthreads();
        if (planted("barrier and shuffle") || planted("two places")) __syncwarp();
    } else {
        if (planted("barrier and shuffle")) __shfl_sync(~0u, own, 0);
        if (planted("two places")) __syncwarp();
    }
    if (planted("half a block waits") && warp < warps / 2) __syncthreads();
    sync<whole_block>();
    float result = -room[(rank + 1) % size];
    // Without it, a thread that was at the first barrier stores what another, just behind it, has not loaded yet.
    if (!planted("no barrier")) sync<whole_block>();
    room[rank] = 2 * result;
    sync<whole_block>();
    result -= room[(rank + size - 1) % size] / 2;  // which is -own

    float sum = own;
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    if (whole_block) {
        if (lane == 0) partial[warp] = sum;
        sync<true>();
        sum = 0;
        for (unsigned i = 0; i < warps; ++i) sum += partial[i];
    }
    // What a shuffle brings, to be right: the sum stays as it is.
    sum += __shfl_down_sync(~0u, lane == 31 ? 0 : own, 1) - (lane < 30 ? x[first + threadIdx.x + 1] : 0);
    sum += __shfl_sync(~0u, static_cast<double>(own), 5) - x[first + threadIdx.x - lane + 5];
    if (planted("read behind")) sum += partial[warps];
    if (planted("write behind")) partial[warps] = sum;
    if (planted("write before")) reinterpret_cast<float*>(ntm_shared)[-1] = sum;
    if (planted("unwritten") && threadIdx.x == 7) return;
    y[planted("two blocks write") ? threadIdx.x : first + threadIdx.x] = sum + result;
}

// What it gives
template <bool whole_block>
float sums(const float* x /*[block]*/, unsigned block, unsigned thread) {
    const unsigned size = whole_block ? block : 32, first = thread / size * size;
    float y = x[thread] - x[first + (thread - first + 1) % size];
    for (unsigned k = 0; k < size; ++k) y += x[first + k];
    return y;
}

struct Group {
    unsigned id, first, count, turns;

    unsigned after(unsigned thread, unsigned steps) const { return first + (thread - first + steps) % count; }
};

// Of a block of 256 threads, two groups of different sizes; the others are in none and take no turns.
Group group_of(unsigned thread) {
    if (thread < 128) return {1, 0, 128, 3};
    if (thread < 192) return {planted("one id for two") ? 1u : 15u, 128, 64, 6};
    return {0, 192, 64, 0};
}
// All together, at a barrier that some have used before
constexpr Group everybody = {1, 0, 256, 2};

// In every turn, the threads of a group get the number of the next one.
__device__ float turned(float x, Group group) {
    const unsigned thread = threadIdx.x, warp = thread / 32;
    unsigned id = group.id, count = group.count;
    if (planted("id 0")) id = 0;
    if (planted("id 16")) id = 16;
    if (planted("count 0")) count = 0;
    if (planted("count 48")) count = 48;
    if (planted("count 512")) count = 512;
    if (planted("two counts") && warp == 1) count = 64;
    if (planted("two ids in a warp") && thread % 32 >= 16) id = 2;
    if (planted("half a warp waits") && thread % 32 >= 16) return x;
    if (planted("a warp goes on") && warp == 5) return x;
    for (unsigned i = 0; i < group.turns; ++i) {
        // Two in turn, or a thread stores its next number where another has not loaded this one yet.
        float* room = reinterpret_cast<float*>(ntm_shared) + (planted("one room") ? 0 : i % 2 * blockDim.x);  // [block]
        room[thread] = x;
        if (planted("two places") && warp == 1) __barrier_sync_count(id, count);
        else if (!planted("no barrier")) __barrier_sync_count(id, count);
        x = room[planted("groups mix") && thread == 127 ? 128 : group.after(thread, 1)];
    }
    return x;
}

__global__ void group_kernel(const float* x /*[grid, block]*/, float* y /*[grid, block]*/) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (planted("a warp leaves") && threadIdx.x / 32 == 5) return;
    if (planted("half a warp leaves") && threadIdx.x < 16) return;
    const float once = turned(x[i], group_of(threadIdx.x));
    if (!planted("no __syncthreads")) __syncthreads();
    y[i] = turned(once, everybody);
}

float turns(const float* x /*[block]*/, unsigned, unsigned thread) {
    const unsigned from = everybody.after(thread, everybody.turns);
    const Group group = group_of(from);
    return x[group.after(from, group.turns)];
}

bool right(void (*kernel)(const float*, float*), float (*gives)(const float*, unsigned, unsigned), unsigned block,
           unsigned shared /*numbers*/) {
    const unsigned grid = 3;
    std::vector<float> x(grid * block), y(grid * block, NAN);
    for (unsigned i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
    const float* in = x.data();
    float* out = y.data();
    void* arguments[] = {&in, &out};
    if (cudaLaunchKernel(kernel, grid, block, arguments, shared * sizeof(float), nullptr) != cudaSuccess) return false;
    for (unsigned i = 0; i < y.size(); ++i) {
        const float expected = gives(&x[i / block * block], block, i % block);
        if (y[i] != expected) {
            std::printf("y[%u] is %g, expected %g\n", i, y[i], expected);
            return false;
        }
    }
    return true;
}

// A launch that CUDA refuses is refused, and what it allows is not.
bool limits() {
    const float* in = nullptr;
    void* arguments[] = {&in, &in};
    auto launch = [&](dim3 grid, dim3 block, std::size_t shared) {
        return cudaLaunchKernel(kernel<true>, grid, block, arguments, shared, nullptr);
    };
    int optin = 0;
    return launch(0, 32, 0) == cudaErrorInvalidConfiguration && launch(1, 1025, 0) == cudaErrorInvalidConfiguration &&
           launch(1, 32, (48 << 10) + 1) == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue &&
           cudaGetLastError() == cudaSuccess &&
           cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess &&
           cudaFuncSetAttribute(kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, optin + 1) ==
               cudaErrorInvalidValue &&
           cudaFuncSetAttribute(kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, optin) == cudaSuccess;
}

}  // namespace

// `selftest fault block|warp|group`
int main(int, char** arguments) {
    while (std::strcmp(faults[ntm_planted], arguments[1]) != 0) ++ntm_planted;
    const bool groups = std::strcmp(arguments[2], "group") == 0, blocks = std::strcmp(arguments[2], "block") == 0;
    bool done = !groups || right(group_kernel, turns, 256, 2 * 256);
    for (unsigned block : {32, 128, 256})
        if (done && !groups)
            done = right(blocks ? kernel<true> : kernel<false>, blocks ? sums<true> : sums<false>, block,
                         block + block / 32);
    if (!ntm_planted && !limits()) std::printf("a limit is not kept\n"), done = false;
    return done ? 0 : 1;
}
