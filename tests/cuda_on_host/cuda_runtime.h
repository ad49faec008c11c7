// CUDA for g++: as much of it as the kernels in csrc/cuda use, so that the very same files run where there is no GPU.
//
// Every CUDA thread is a fiber, the blocks of a grid run one after another on the calling thread, and a launch returns
// when its grid is done. scheduler.cpp tells what is checked on the way. Not here: atomics, static shared memory, more
// than one dimension of threads, waiting for other blocks.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// `extern __shared__ ...` becomes `extern "C" ...`: one array, in whatever namespace it is declared.
#define __shared__ "C"

#define CUDART_VERSION 13000

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxThreadsPerMultiProcessor,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrReservedSharedMemoryPerBlock,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);  // of a launch that failed: what its threads did wrong

extern dim3 gridDim, blockDim, blockIdx, threadIdx;  // of the thread that runs

// The number of the planted fault that is awake (see plant.py), 0 for none.
extern int ntm_planted;

namespace on_host {

extern bool trace;  // whether every launch is told on stderr

enum Meeting : char { block_barrier, group_barrier, warp_barrier, shuffle };
struct Place {  // in the source, for messages; and threads that meet must meet there
    const char* file;
    int line;
};

// The calling thread waits for the others: those of its warp, or those `count` that meet at barrier `id` of the block.
void meet(Meeting, Place, unsigned id = 0, unsigned count = 0);
// The bits that lane `source` of the warp brings to the same shuffle.
std::uint64_t exchange(std::uint64_t bits, unsigned source, unsigned mask, Place);

cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, void (*thread)(void*),
                   void* argument);

template <class T>
T exchange(T value, unsigned source, unsigned mask, Place place) {
    static_assert(std::is_arithmetic_v<T>, "shuffles take numbers");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, source, mask, place);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class... Parameters, std::size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<Parameters*>(arguments[I])...);
}

inline unsigned lane() { return threadIdx.x % 32; }

}  // namespace on_host

#define ON_HOST_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(ON_HOST_PLACE) { on_host::meet(on_host::block_barrier, {file, line}, 0, blockDim.x); }
// Of several warps: those `count` threads from a multiple of `count` on that the calling thread is one of.
inline void __barrier_sync_count(unsigned id, unsigned count, ON_HOST_PLACE) {
    on_host::meet(on_host::group_barrier, {file, line}, id, count);
}
inline void __syncwarp(ON_HOST_PLACE) { on_host::meet(on_host::warp_barrier, {file, line}); }
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source, ON_HOST_PLACE) {
    return on_host::exchange(value, source % 32, mask, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, ON_HOST_PLACE) {
    return on_host::exchange(value, (on_host::lane() ^ bits) % 32, mask, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, ON_HOST_PLACE) {
    const unsigned source = on_host::lane() + delta;
    return on_host::exchange(value, source < 32 ? source : on_host::lane(), mask, {file, line});
}
#undef ON_HOST_PLACE

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
    return on_host::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::size_t shared,
                             cudaStream_t) {
    auto thread = [=] { on_host::call(kernel, arguments, std::index_sequence_for<Parameters...>{}); };
    return on_host::launch(
        reinterpret_cast<const void*>(kernel), grid, block, shared,
        [](void* self) { (*static_cast<decltype(thread)*>(self))(); }, &thread);
}
