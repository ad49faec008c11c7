// The CUDA backend: launchers on the caller's device and stream. Nothing here waits for the device or
// allocates on it, so a call can be captured into a graph.
#include <cuda_runtime.h>

#include <cstdio>

#include "architectures.h"
#include "operators.h"

namespace ntm {
namespace {

// The launch's device for as long as the guard lives; the caller's again afterwards.
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

Error failure(const char* kernel, cudaError_t status) {
    if (status == cudaSuccess) return nullptr;
    thread_local char text[256];
    std::snprintf(text, sizeof text, "ntm_fast: kernel %s: %s", kernel, cudaGetErrorString(status));
    return text;
}

// Runs launch() on the launch's device and tells what became of it. An error that an earlier, unrelated call
// left behind is not ours: it is taken away first, and torch has raised it already.
template <class F>
Error on_device(const char* kernel, Launch launch, F&& enqueue) {
    DeviceGuard guard(launch.device);
    if (guard.status != cudaSuccess) {
        cudaGetLastError();
        return failure(kernel, guard.status);
    }
    enqueue(static_cast<cudaStream_t>(launch.stream));
    return failure(kernel, cudaGetLastError());
}

constexpr int threads_per_block = 256;

// Enough blocks to fill any device; the kernels stride over what is left.
unsigned blocks_for(Size items) {
    constexpr Size most = 1 << 16;
    Size blocks = (items + threads_per_block - 1) / threads_per_block;
    return static_cast<unsigned>(blocks < most ? blocks : most);
}

template <class T>
__global__ void interpolate_kernel(Size rows, Size N,
                                   const T* __restrict__ content,   // [rows, N]
                                   const T* __restrict__ previous,  // [rows, N]
                                   const T* __restrict__ gate,      // [rows]
                                   T* __restrict__ gated) {         // [rows, N]
    const Size stride = static_cast<Size>(gridDim.x) * blockDim.x;
    for (Size i = static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * N; i += stride) {
        gated[i] = blend(content[i], previous[i], gate[i / N]);
    }
}

template <class T>
Error interpolate(Size B, Size H, Size N, const T* content, const T* previous, const T* gate, T* gated,
                  Launch launch) {
    if (B * H * N == 0) return nullptr;
    return on_device("interpolate", launch, [&](cudaStream_t stream) {
        interpolate_kernel<<<blocks_for(B * H * N), threads_per_block, 0, stream>>>(B * H, N, content, previous, gate,
                                                                                    gated);
    });
}

template <class T>
Operators<T> operators() {
    Operators<T> table{};  // an entry left null is served by the reference
    table.interpolate = interpolate<T>;
    return table;
}

const Backend backend{NTM_ARCHITECTURES, operators<float>(), operators<double>()};

}  // namespace
}  // namespace ntm

extern "C" const ntm::Backend* ntm_backend() { return &ntm::backend; }

// Why this machine cannot run the backend, or nullptr. Asks the driver for its version only: nothing is
// initialised, so a process may still fork.
extern "C" __attribute__((visibility("default"))) ntm::Error ntm_problem() {
    static char text[256];
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        cudaGetLastError();
        return "this machine has no NVIDIA driver";
    }
    // A driver runs programs of every toolkit of its own major version.
    if (driver / 1000 < CUDART_VERSION / 1000) {
        std::snprintf(text, sizeof text,
                      "the NVIDIA driver supports CUDA %d.%d, and ntm_fast was built with CUDA %d.%d: update the "
                      "driver or rebuild with an older nvcc",
                      driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
        return text;
    }
    return nullptr;
}
