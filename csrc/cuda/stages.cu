// Operators on weightings alone, and the controllers' gates.
#include "cuda/launch.h"
#include "cuda/serve.h"

namespace ntm::cuda {

template <class T>
void serve_stages(Operators<T>& table) {
    serve<Interpolate<T>, OnDevice>(table.interpolate);
    serve<InterpolateBackward<T>, OnDevice>(table.interpolate_backward);
    serve<CircularShift<T>, OnDevice>(table.circular_shift);
    serve<CircularShiftBackward<T>, OnDevice>(table.circular_shift_backward);
    serve<Sharpen<T>, OnDevice>(table.sharpen);
    serve<SharpenBackward<T>, OnDevice>(table.sharpen_backward);
    serve<LSTMGates<T>, OnDevice>(table.lstm_gates);
    serve<LSTMGatesBackward<T>, OnDevice>(table.lstm_gates_backward);
    serve<GRUGates<T>, OnDevice>(table.gru_gates);
    serve<GRUGatesBackward<T>, OnDevice>(table.gru_gates_backward);
}

template void serve_stages(Operators<float>&);
template void serve_stages(Operators<double>&);

}  // namespace ntm::cuda
