// Each fills in the operators of one family. It is in the file of the family's name.
#pragma once

#include "operators.h"

namespace ntm::cuda {

template <class T>
void serve_stages(Operators<T>&);
template <class T>
void serve_addressing(Operators<T>&);
template <class T>
void serve_memory(Operators<T>&);
template <class T>
void serve_step(Operators<T>&);
template <class T>
void serve_sequence(Operators<T>&);

}  // namespace ntm::cuda
