// The memory step of all heads.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_step(Operators<T>& table) {
    serve_families<Family::step, OnDevice>(table);
}

template void serve_step(Operators<float>&);
template void serve_step(Operators<double>&);

}  // namespace ntm::cuda
