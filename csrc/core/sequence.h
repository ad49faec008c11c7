// A whole sequence: the controller, the heads and the memory through all T steps, for a tile of batch elements whose
// memories stay in cache or in shared memory.
//
// Only what is recurrent has to be done here. The gradients of the gates and of the raw head parameters are written
// out, so that one large product afterwards makes weight gradients of them. The inputs' share of the first layer's
// gates and the output layer may be such large products too: a crew takes these ends of the sequence, or leaves them
// to its launcher.
//
// A Crew is the threads that work on a tile: together on the controller's products, and in teams (core/team.h) on the
// elements. It provides
//
//   sync(), staged       as in team.h, for all threads of the crew
//   product(E, K, C, in, weight, out)
//                        out[e, c] += sum_k in[e, k] weight[k, c], rows contiguous; the launcher decides what a weight
//                        is, mostly a packed copy
//   elements(E, f)       calls f(team, e, slot) for every element e of 0..E, shared out over the crew's teams; slot is
//                        a number less than slots(E) that no two elements have at the same time
//   slots(E)             how many elements are worked on at the same time
//   takes_ends           whether it also multiplies the inputs and the output layer, which are not recurrent: only a
//                        crew of a single thread does
//   holds_memory         whether a staged crew copies the memories, too, to scratch
//   scratch()            where the tile's scratch begins
//   again(n)             n, hidden from the optimiser, so that results from it are computed anew. A GPU would otherwise
//                        keep the results in registers from one phase to the next.
#pragma once

#include "core/sequence/backward.h"
#include "core/sequence/forward.h"
