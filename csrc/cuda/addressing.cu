// Content addressing, and the whole addressing of a head.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_addressing(Operators<T>& table) {
    serve<ContentAddressing<T>, OnDevice>(table.content_addressing);
    serve<ContentAddressingBackward<T>, OnDevice>(table.content_addressing_backward);
    serve<Address<T>, OnDevice>(table.address);
    serve<AddressBackward<T>, OnDevice>(table.address_backward);
}

template void serve_addressing(Operators<float>&);
template void serve_addressing(Operators<double>&);

}  // namespace ntm::cuda
