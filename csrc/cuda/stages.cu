// Operators on weightings alone, and the controllers' gates.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_stages(Operators<T>& table) {
    serve_families<Family::stages, OnDevice>(table);
}

template void serve_stages(Operators<float>&);
template void serve_stages(Operators<double>&);

}  // namespace ntm::cuda
