// The memory step of all heads.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_step(Operators<T>& table) {
    serve<MemoryStep<T>, OnDevice>(table.memory_step);
    serve<MemoryStepBackward<T>, OnDevice>(table.memory_step_backward);
}

template void serve_step(Operators<float>&);
template void serve_step(Operators<double>&);

}  // namespace ntm::cuda
