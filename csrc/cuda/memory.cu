// Writing and reading.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_memory(Operators<T>& table) {
    serve<EraseAddWrite<T>, OnDevice>(table.erase_add_write);
    serve<EraseAddWriteBackward<T>, OnDevice>(table.erase_add_write_backward);
    serve<Read<T>, OnDevice>(table.read);
    serve<ReadBackward<T>, OnDevice>(table.read_backward);
}

template void serve_memory(Operators<float>&);
template void serve_memory(Operators<double>&);

}  // namespace ntm::cuda
