// Writing and reading.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_memory(Operators<T>& table) {
    serve_families<Family::memory, OnDevice>(table);
}

template void serve_memory(Operators<float>&);
template void serve_memory(Operators<double>&);

}  // namespace ntm::cuda
