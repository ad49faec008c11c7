// Launching the operators of core/element.h, all by one kernel template. Nothing here waits for the device or allocates
// on it, so that a call can be captured into a graph; it runs on the launch's stream and device.
#pragma once

#include <cstdio>

#include "core/element.h"
#include "cuda/plan.h"
#include "cuda/team.h"
#include "operators.h"

namespace ntm::cuda {

// Of n teams in the grid, team i does items i, i + n, i + 2n, ..., so that any number of items is served. Each team has
// `scratch` numbers: in the workspace if there is one, else in shared memory.
template <class Team, class Body, class T = typename Body::Real>
__global__ void __launch_bounds__(Team::max_threads, Team::min_blocks)
    for_each_item(Body body, Size items, Size scratch, T* workspace) {
    T* const shared = reinterpret_cast<T*>(ntm_shared);
    const Team team(shared);
    const int teams = blockDim.x / team.size(), own = threadIdx.x / team.size();
    Arena<T> arena{shared + Team::reserved + own * scratch};
    if constexpr (!Team::staged)
        if (workspace) arena.next = workspace + blockIdx.x * scratch;
    for (Size i = static_cast<Size>(blockIdx.x) * teams + own; i < items; i += static_cast<Size>(gridDim.x) * teams) {
        body(team, i, arena);
        team.sync();
    }
}

// Makes the launch's device the current one; the destructor restores the caller's.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        status = cudaGetDevice(&previous);
        if (status == cudaSuccess && previous != device) {
            status = cudaSetDevice(device);
            changed = status == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed) cudaSetDevice(previous);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    cudaError_t status;

private:
    int previous = 0;
    bool changed = false;
};

inline Error failure(const char* kernel, cudaError_t status) {
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();  // clears the error, so that no later call is blamed for it
    thread_local char text[256];
    std::snprintf(text, sizeof text, "ntm_fast: kernel %s: %s", kernel, cudaGetErrorString(status));
    return text;
}

inline cudaError_t limits_of(int device, Limits& limits) {
    int values[4];
    constexpr cudaDeviceAttr attributes[] = {
        cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
        cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrReservedSharedMemoryPerBlock};
    for (int i = 0; i < 4; ++i) {
        const cudaError_t status = cudaDeviceGetAttribute(&values[i], attributes[i], device);
        if (status != cudaSuccess) return status;
    }
    limits = {values[0], values[1], values[2], values[3]};
    return cudaSuccess;
}

// T, in a form that lets no argument decide what T is.
template <class T>
struct Given {
    using type = T;
};

template <class... Parameters>
cudaError_t enqueue(void (*kernel)(Parameters...), Size blocks, int threads, Size shared, const Launch& launch,
                    typename Given<Parameters>::type... parameters) {
    constexpr Size without_asking = 48 << 10;  // bytes of shared memory
    if (shared > without_asking) {
        const cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (status != cudaSuccess) return status;
    }
    void* arguments[] = {&parameters...};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                            static_cast<std::size_t>(shared), static_cast<cudaStream_t>(launch.stream));
}

template <class Team, class Body, class T = typename Body::Real>
cudaError_t enqueue(const Body& body, const Plan& plan, const Launch& launch) {
    return enqueue(&for_each_item<Team, Body>, plan.blocks, plan.threads, plan.shared, launch, body, body.items(),
                   body.scratch(Team::staged), plan.workspace ? static_cast<T*>(launch.workspace) : nullptr);
}

// Which kernels an operator has. float64 is there to check gradients with, so one kernel serves all its sizes. A memory
// step has no kernel of warps: an item takes so much shared memory that too few warps would fit.
template <class Body>
constexpr bool single = sizeof(typename Body::Real) == sizeof(float);
template <class Body>
constexpr Kernels kernels = {single<Body>, single<Body>};
template <>
constexpr Kernels kernels<MemoryStep<float>> = {false, true};
template <>
constexpr Kernels kernels<MemoryStepBackward<float>> = {false, true};

struct OnDevice {
    template <class Body, class T = typename Body::Real>
    static Error run(const Body& body, const Launch& launch) {
        if (body.items() == 0) return nullptr;
        const DeviceGuard guard(launch.device);
        if (guard.status != cudaSuccess) return failure(Body::name, guard.status);
        Limits limits;
        if (const Error error = failure(Body::name, limits_of(launch.device, limits))) return error;
        const Demand demand = {body.items(),        body.width(),         sizeof(T), body.scratch(true),
                               body.scratch(false), Block<T, true>::reserved};
        const Plan plan = cuda::plan(demand, limits, kernels<Body>);
        if (launch.needed) {
            *launch.needed = plan.workspace;
            return nullptr;
        }
        if constexpr (kernels<Body>.warps)
            if (plan.way == Way::warps) return failure(Body::name, enqueue<Warp<T>>(body, plan, launch));
        if constexpr (kernels<Body>.block)
            if (plan.way == Way::block) return failure(Body::name, enqueue<Block<T, true>>(body, plan, launch));
        return failure(Body::name, enqueue<Block<T, false>>(body, plan, launch));
    }
};

}  // namespace ntm::cuda
