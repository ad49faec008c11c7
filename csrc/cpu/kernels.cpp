// The CPU backend, compiled once per variant: every operator parallel over its items, a thread to each.
//
// Its parts are headers that only this file includes. They are in unnamed namespaces, so that the compiler knows which
// functions are called once and can inline these.
#include "cpu/gradients.h"
#include "cpu/parallel.h"
#include "cpu/sequence.h"
#include "operators.h"

namespace ntm::cpu {
namespace {

template <class T>
Operators<T> operators() {
    Operators<T> table{};
    serve_families<with_a_body, OnThreads>(table);
    table.ntm_sequence = ntm_sequence<T>;
    table.ntm_sequence_backward = ntm_sequence_backward<T>;
    table.ntm_sequence_weight_gradients = ntm_sequence_weight_gradients<T>;
    return table;
}

const Backend backend = {NTM_VARIANT, /*takes_ends*/ true, /*bounded*/ false, operators<float>(), operators<double>()};

}  // namespace
}  // namespace ntm::cpu

extern "C" const ntm::Backend* ntm_backend() { return &ntm::cpu::backend; }
