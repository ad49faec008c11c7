// The contract between the binding and the backends: one table of plain functions per backend and dtype.
//
// Every function takes a Launch, sizes, options and pointers to contiguous arrays (the shape stands behind each), and
// returns nullptr or the text of what went wrong. Outputs are fully overwritten. A null entry
// means that the backend does not serve that operator.
//
// A new operator, and its backward: each a body in core/element/*.h, an entry in Operators<T> and a line in
// NTM_OPERATORS.
//
// B batch, H heads of one kind, R read and W write heads, N locations, M width, K = 2S+1 shifts. For the
// controller's gates H is the hidden size.
// A memory is location-minor, [B, M, N]: seen from PyTorch, the transpose of the paper's (B, N, M).
#pragma once

#include <limits>

#include "core/element.h"
#include "core/sequence.h"

namespace ntm {

using Error = const char*;

// How to run: the number of CPU threads; or the CUDA device and stream, and a workspace there, for what does not fit in
// shared memory. If needed is not null, nothing runs, and the arrays may be null: the number of workspace bytes is
// stored there. It starts at 0, so an operator without a workspace leaves it.
struct Launch {
    int threads = 1;
    int device = 0;
    void* stream = nullptr;
    void* workspace = nullptr;
    Size* needed = nullptr;
};

template <class T>
struct Operators {
    Error (*content_addressing)(Launch, Size B, Size H, Size N, Size M, double eps,
                                const T* memory,        // [B, M, N]
                                const T* key,           // [B, H, M]
                                const T* beta,          // [B, H]
                                T* content);            // [B, H, N]
    Error (*content_addressing_backward)(Launch, Size B, Size H, Size N, Size M, double eps,
                                         const T* memory, const T* key, const T* beta,
                                         const T* content,        // [B, H, N]  the forward's output
                                         const T* grad_content,   // [B, H, N]
                                         T* grad_memory,          // [B, M, N]
                                         T* grad_key,             // [B, H, M]
                                         T* grad_beta);           // [B, H]
    Error (*interpolate)(Launch, Size B, Size H, Size N,
                         const T* content,   // [B, H, N]
                         const T* previous,  // [B, H, N]
                         const T* gate,      // [B, H]
                         T* gated);          // [B, H, N]
    Error (*interpolate_backward)(Launch, Size B, Size H, Size N,
                                  const T* content, const T* previous, const T* gate,
                                  const T* grad_gated,  // [B, H, N]
                                  T* grad_content, T* grad_previous, T* grad_gate);
    Error (*circular_shift)(Launch, Size B, Size H, Size N, Size K,
                            const T* weights,  // [B, H, N]
                            const T* shift,    // [B, H, K]
                            T* shifted);       // [B, H, N]
    Error (*circular_shift_backward)(Launch, Size B, Size H, Size N, Size K,
                                     const T* weights, const T* shift,
                                     const T* grad_shifted,  // [B, H, N]
                                     T* grad_weights, T* grad_shift);
    Error (*sharpen)(Launch, Size B, Size H, Size N,
                     const T* weights,  // [B, H, N]
                     const T* gamma,    // [B, H]
                     T* sharpened);     // [B, H, N]
    Error (*sharpen_backward)(Launch, Size B, Size H, Size N,
                              const T* weights, const T* gamma,
                              const T* sharpened,       // [B, H, N]  the forward's output
                              const T* grad_sharpened,  // [B, H, N]
                              T* grad_weights, T* grad_gamma);
    Error (*address)(Launch, Size B, Size H, Size N, Size M, Size K, double eps,
                     const T* memory, const T* previous, const T* key, const T* beta, const T* gate,
                     const T* shift, const T* gamma,
                     T* weights);  // [B, H, N]
    Error (*address_backward)(Launch, Size B, Size H, Size N, Size M, Size K, double eps,
                              const T* memory, const T* previous, const T* key, const T* beta, const T* gate,
                              const T* shift, const T* gamma,
                              const T* weights,       // [B, H, N]  the forward's output
                              const T* grad_weights,  // [B, H, N]
                              T* grad_memory, T* grad_previous, T* grad_key, T* grad_beta, T* grad_gate,
                              T* grad_shift, T* grad_gamma);
    Error (*erase_add_write)(Launch, Size B, Size H, Size N, Size M,
                             const T* memory,   // [B, M, N]
                             const T* weights,  // [B, H, N]
                             const T* erase,    // [B, H, M]
                             const T* add,      // [B, H, M]
                             T* written);       // [B, M, N]
    Error (*erase_add_write_backward)(Launch, Size B, Size H, Size N, Size M,
                                      const T* memory, const T* weights, const T* erase, const T* add,
                                      const T* grad_written,  // [B, M, N]
                                      T* grad_memory, T* grad_weights, T* grad_erase, T* grad_add);
    Error (*read)(Launch, Size B, Size H, Size N, Size M,
                  const T* memory,   // [B, M, N]
                  const T* weights,  // [B, H, N]
                  T* reads);         // [B, H, M]
    Error (*read_backward)(Launch, Size B, Size H, Size N, Size M,
                           const T* memory, const T* weights,
                           const T* grad_reads,  // [B, H, M]
                           T* grad_memory, T* grad_weights);
    Error (*memory_step)(Launch, StepSizes, StepOptions,
                         const T* memory,         // [B, M, N]  M_{t-1}
                         const T* read_weights,   // [B, R, N]  of the previous step
                         const T* write_weights,  // [B, W, N]  of the previous step
                         const T* params,         // [B, P]
                         T* reads,                // [B, R, M]
                         T* new_memory,           // [B, M, N]  M_t
                         T* new_read_weights,     // [B, R, N]
                         T* new_write_weights);   // [B, W, N]
    Error (*memory_step_backward)(Launch, StepSizes, StepOptions,
                                  const T* memory, const T* read_weights, const T* write_weights, const T* params,
                                  const T* new_memory, const T* new_read_weights, const T* new_write_weights,
                                  const T* grad_reads, const T* grad_new_memory,
                                  const T* grad_new_read_weights, const T* grad_new_write_weights,
                                  T* grad_memory, T* grad_read_weights, T* grad_write_weights,
                                  T* grad_params);  // [B, P]
    Error (*lstm_gates)(Launch, Size B, Size H,
                        const T* gates,  // [B, 4H]  i, f, g, o, as in nn.LSTM
                        const T* cell,   // [B, H]
                        T* hidden,       // [B, H]
                        T* new_cell);    // [B, H]
    Error (*lstm_gates_backward)(Launch, Size B, Size H,
                                 const T* gates, const T* cell, const T* new_cell,
                                 const T* grad_hidden, const T* grad_new_cell,
                                 T* grad_gates, T* grad_cell);
    Error (*gru_gates)(Launch, Size B, Size H,
                       const T* input_gates,   // [B, 3H]  r, z, n, as in nn.GRU
                       const T* hidden_gates,  // [B, 3H]
                       const T* hidden,        // [B, H]
                       T* new_hidden);         // [B, H]
    Error (*gru_gates_backward)(Launch, Size B, Size H,
                                const T* input_gates, const T* hidden_gates, const T* hidden,
                                const T* grad_new_hidden,  // [B, H]
                                T* grad_input_gates, T* grad_hidden_gates, T* grad_hidden);
    // The whole sequence; see core/sequence.h. weights, as torch has them: for every layer weight_ih [gates, fed], of
    // the first layer [gates, I + fed], weight_hh [gates, H], bias_ih and bias_hh [gates]; then the heads' weight
    // [P, H] and bias [P], and the output layer's [O, H + R M] and [O]. keep: leave in the trail what backward needs.
    // CUDA's kernels do not take the ends (core/sequence.h): inputs and outputs are not used; the trail's x holds the
    // inputs' product before the call, and the features are always left, because the caller makes the outputs of them.
    // order: the lengths of a SequenceOrder (core/sequence/layout.h), or nullptr. Inputs, outputs, trail and their
    // gradients are in that order. At the steps that an element does not take, outputs and gradients of inputs are 0.
    // On CUDA, so are features and hidden states, and the gradients in SequenceGrads.
    Error (*ntm_sequence)(Launch, SequenceSizes, StepOptions, int keep,
                          const T* const* weights,
                          const Index* order,  // [2, B]
                          const T* inputs,  // [T, B, I]
                          T* outputs,       // [T, B, O]
                          SequenceState<const T> initial, SequenceState<T> final,
                          SequenceTrail<T> trail);
    Error (*ntm_sequence_backward)(Launch, SequenceSizes, StepOptions,
                                   const T* const* weights, const Index* order,
                                   SequenceState<const T> initial, const T* final_memory,  // [B, M, N]
                                   SequenceTrail<const T> trail,
                                   const T* grad_outputs,  // [T, B, O]; on CUDA the features', [T, B, H + R M]
                                   SequenceState<const T> grad_final, SequenceState<T> grad_initial,
                                   SequenceGrads<T>,  // x and y may be those of the trail
                                   T* grad_inputs);   // [T, B, I], or nullptr where it is not wanted
    // The gradients of the weights, in the order of weights above, from what forward and backward left. The first step
    // was fed the initial state, whose reads and hidden states are in the order of the inputs here. If all elements
    // share one, its gradients are summed over the batch too. A backend may leave this entry out: then PyTorch
    // computes them.
    Error (*ntm_sequence_weight_gradients)(Launch, SequenceSizes, const Index* order,
                                           const T* inputs,  // [T, B, I]
                                           SequenceState<const T> initial, SequenceTrail<const T> trail,
                                           const T* grad_outputs,  // [T, B, O]
                                           SequenceGrads<const T>, SequenceState<const T> grad,
                                           SequenceState<T> sum, T* const* grad_weights);
};

// Indices are 32 bit, and a sequence's tile has up to eight elements: so all numbers of eight elements must fit.
constexpr Size most_numbers = std::numeric_limits<Index>::max() / 2;
constexpr Error too_large = "ntm_fast: one element of the batch is too large for the native kernels";
constexpr bool is_too_large(const SequenceSizes& s, bool backward) {
    return 8 * (s.step.R + s.step.W) * s.memory() > most_numbers ||
           (backward && sequence_segment(s, 8) > most_numbers) ||
           Size(8) * (s.I + s.O + s.gates() + s.widest() + s.step.params() + s.step.active()) > most_numbers;
}

// Which operators belong together. The CUDA backend compiles each family in a file of its own, side by side.
struct Family {
    enum : unsigned { stages = 1, addressing = 2, memory = 4, step = 8, sequence = 16 };
};
constexpr unsigned with_a_body = ~unsigned(Family::sequence);

template <class T>
struct NoBody;  // for a whole sequence: every backend has its own function for it

// Every operator: X(its family, its entry in Operators, its body in core/element/*.h, the names of its parameters after
// the Launch). A struct is named once; its pointer members get its name as a prefix: "initial" gives initial_memory,
// initial_read_weights ... The gradient of x is grad_x.
#define NTM_OPERATORS(X)                                                                                              \
    X(addressing, content_addressing, ContentAddressing, "B H N M eps memory key beta content")                       \
    X(addressing, content_addressing_backward, ContentAddressingBackward,                                             \
      "B H N M eps memory key beta content grad_content grad_memory grad_key grad_beta")                              \
    X(stages, interpolate, Interpolate, "B H N content previous gate gated")                                          \
    X(stages, interpolate_backward, InterpolateBackward,                                                              \
      "B H N content previous gate grad_gated grad_content grad_previous grad_gate")                                  \
    X(stages, circular_shift, CircularShift, "B H N K weights shift shifted")                                         \
    X(stages, circular_shift_backward, CircularShiftBackward,                                                         \
      "B H N K weights shift grad_shifted grad_weights grad_shift")                                                   \
    X(stages, sharpen, Sharpen, "B H N weights gamma sharpened")                                                      \
    X(stages, sharpen_backward, SharpenBackward,                                                                      \
      "B H N weights gamma sharpened grad_sharpened grad_weights grad_gamma")                                         \
    X(addressing, address, Address, "B H N M K eps memory previous key beta gate shift gamma weights")                \
    X(addressing, address_backward, AddressBackward,                                                                  \
      "B H N M K eps memory previous key beta gate shift gamma weights grad_weights "                                 \
      "grad_memory grad_previous grad_key grad_beta grad_gate grad_shift grad_gamma")                                 \
    X(memory, erase_add_write, EraseAddWrite, "B H N M memory weights erase add written")                             \
    X(memory, erase_add_write_backward, EraseAddWriteBackward,                                                        \
      "B H N M memory weights erase add grad_written grad_memory grad_weights grad_erase grad_add")                   \
    X(memory, read, Read, "B H N M memory weights reads")                                                             \
    X(memory, read_backward, ReadBackward, "B H N M memory weights grad_reads grad_memory grad_weights")              \
    X(step, memory_step, MemoryStep,                                                                                  \
      "sizes options memory read_weights write_weights params reads new_memory new_read_weights new_write_weights")   \
    X(step, memory_step_backward, MemoryStepBackward,                                                                 \
      "sizes options memory read_weights write_weights params new_memory new_read_weights new_write_weights "         \
      "grad_reads grad_new_memory grad_new_read_weights grad_new_write_weights "                                      \
      "grad_memory grad_read_weights grad_write_weights grad_params")                                                 \
    X(stages, lstm_gates, LSTMGates, "B H gates cell hidden new_cell")                                                \
    X(stages, lstm_gates_backward, LSTMGatesBackward,                                                                 \
      "B H gates cell new_cell grad_hidden grad_new_cell grad_gates grad_cell")                                       \
    X(stages, gru_gates, GRUGates, "B H input_gates hidden_gates hidden new_hidden")                                  \
    X(stages, gru_gates_backward, GRUGatesBackward,                                                                   \
      "B H input_gates hidden_gates hidden grad_new_hidden grad_input_gates grad_hidden_gates grad_hidden")           \
    X(sequence, ntm_sequence, NoBody, "sizes options keep weights order inputs outputs initial final trail")          \
    X(sequence, ntm_sequence_backward, NoBody,                                                                        \
      "sizes options weights order initial final_memory trail grad_outputs grad_final grad_initial grad grad_inputs") \
    X(sequence, ntm_sequence_weight_gradients, NoBody,                                                                \
      "sizes order inputs initial trail grad_outputs grad grad_initial sum grad_weights")

// Fills a table's entry: a function that builds the operator's body (core/element.h) from the entry's parameters, and
// lets the backend run it, by Run::run(body, launch).
template <class Body, class Run, class... Parameters>
void serve(Error (*&entry)(Launch, Parameters...)) {
    entry = [](Launch launch, Parameters... parameters) -> Error {
        const Body body{parameters...};
        if (body.cost() > most_numbers || body.scratch(true) > most_numbers) return too_large;
        return Run::run(body, launch);
    };
}

// The same for every operator of these families.
template <unsigned families, class Run, class T>
void serve_families(Operators<T>& table) {
#define NTM_SERVE(family, name, Body, names) \
    if constexpr (families & Family::family) serve<Body<T>, Run>(table.name);
    NTM_OPERATORS(NTM_SERVE)
#undef NTM_SERVE
}

struct Backend {
    const char* name;  // "baseline", "x86-64-v3", "x86-64-v4", or the CUDA architectures, "80;90;120-virtual"
    bool takes_ends;   // whether its ntm_sequence multiplies inputs and features too (core/sequence.h)
    bool bounded;      // whether it works in memory of a limited size. Before a call it must be asked whether the
                       // sizes fit, and for the bytes of workspace.
    Operators<float> f32;
    Operators<double> f64;
};

}  // namespace ntm

// Each backend is a shared object of its own that exports this one symbol.
extern "C" __attribute__((visibility("default"))) const ntm::Backend* ntm_backend();
