// The harness finds each kind of fault, in a kernel of a block and in one of warps. Without a fault this exits with 0;
// with one, with 1 where the scheduler or the numbers tell, or as a sanitizer wants that does.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

extern __shared__ __align__(16) unsigned char ntm_shared[];

namespace {

const char* const faults[] = {
    "clean",          "no barrier",       "two blocks write", "read behind",        "write behind",
    "write before",   "unwritten",        "half a warp waits", "half a block waits", "half a warp leaves",
    "barrier and shuffle", "two places",
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

template <bool whole_block>
bool right(unsigned grid, unsigned block) {
    std::vector<float> x(grid * block), y(grid * block, NAN);
    for (unsigned i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
    const float* in = x.data();
    float* out = y.data();
    void* arguments[] = {&in, &out};
    const std::size_t shared = (block + block / 32) * sizeof(float);
    if (cudaLaunchKernel(kernel<whole_block>, grid, block, arguments, shared, nullptr) != cudaSuccess) return false;
    for (unsigned i = 0; i < y.size(); ++i) {
        const unsigned size = whole_block ? block : 32, first = i / size * size;
        float expected = x[i] - x[first + (i - first + 1) % size];
        for (unsigned k = 0; k < size; ++k) expected += x[first + k];
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

// `selftest fault block|warp`
int main(int, char** arguments) {
    while (std::strcmp(faults[ntm_planted], arguments[1]) != 0) ++ntm_planted;
    const bool blocks = std::strcmp(arguments[2], "block") == 0;
    bool done = true;
    for (unsigned block : {32, 128, 256}) done = done && (blocks ? right<true>(3, block) : right<false>(3, block));
    if (!ntm_planted && !limits()) std::printf("a limit is not kept\n"), done = false;
    return done ? 0 : 1;
}
