// The operators: what each does for one of its items, which is a batch element, or one head of it if the heads have no
// gradient in common. Launchers share the items out over teams.
//
// An operator's members are the parameters of its entry in operators.h, in the same order, and
//
//   items()          how many there are
//   width()          the numbers that an item's widest tiles() goes over
//   cost()           the numbers that an item touches
//   scratch(staged)  the numbers of scratch that an item takes, with what a staged team copies there
//   operator()(team, i, arena)
//                    does item i
#pragma once

#include "core/element/addressing.h"
#include "core/element/gates.h"
#include "core/element/memory.h"
#include "core/element/step.h"
#include "core/element/weightings.h"
