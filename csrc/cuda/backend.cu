// The CUDA backend's table. Its kernels are compiled in several files, side by side.
#include <cuda_runtime.h>

#include <cstdio>

#include "architectures.h"
#include "cuda/serve.h"

namespace ntm::cuda {
namespace {

template <class T>
Operators<T> operators() {
    Operators<T> table{};
    serve_stages(table);
    serve_addressing(table);
    serve_memory(table);
    serve_step(table);
    serve_sequence(table);
    return table;
}

const Backend backend{NTM_ARCHITECTURES, /*takes_ends*/ false, /*bounded*/ true, operators<float>(),
                      operators<double>()};

}  // namespace
}  // namespace ntm::cuda

extern "C" const ntm::Backend* ntm_backend() { return &ntm::cuda::backend; }

// Why this machine cannot run the backend, or nullptr. Asks the driver for its version only: nothing is
// initialised, so a process may still fork.
extern "C" __attribute__((visibility("default"))) ntm::Error ntm_problem() {
    static char text[256];
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        cudaGetLastError();
        return "this machine has no NVIDIA driver";
    }
    // A driver runs cubins of every toolkit of its own major version. It compiles PTX of no newer toolkit than itself.
    constexpr int unit = NTM_CUBINS ? 1000 : 10;
    if (driver / unit < CUDART_VERSION / unit) {
        std::snprintf(text, sizeof text,
                      "the NVIDIA driver supports CUDA %d.%d, and ntm_fast was built with CUDA %d.%d: update the "
                      "driver or rebuild with an older nvcc%s",
                      driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10,
                      NTM_CUBINS ? "" : ", or where the GPU is visible");
        return text;
    }
    return nullptr;
}
