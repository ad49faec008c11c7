// The activations and their derivatives, elementwise on V or Real; NaN in means NaN out.
#pragma once

#include "core/team.h"

namespace ntm {

template <class Math, class V>
NTM_FN V sigmoid(V x) {
    return 1 / (1 + Math::exp(-x));
}

// log(1 + e^x), without overflow above and without loss below
template <class Math, class V>
NTM_FN V softplus(V x) {
    const V magnitude = Math::select(x < 0, -x, x);
    return Math::select(x < 0, V{}, x) + Math::log1p(Math::exp(-magnitude));
}

template <class Math, class V, class T>
NTM_FN V clamp(V x, T clip) {
    return Math::min(V{} + clip, Math::max(V{} - clip, x));
}

// The gradient through clamp: 1 inside and at the bounds, 0 outside.
template <class Math, class V, class T>
NTM_FN V clamp_backward(V x, T clip, V grad) {
    return Math::select(x < -clip, V{}, Math::select(x > clip, V{}, grad));
}

}  // namespace ntm
