// Content addressing, and the whole addressing of a head.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_addressing(Operators<T>& table) {
    serve_families<Family::addressing, OnDevice>(table);
}

template void serve_addressing(Operators<float>&);
template void serve_addressing(Operators<double>&);

}  // namespace ntm::cuda
