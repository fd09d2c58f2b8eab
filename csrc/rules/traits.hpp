// What a rule may say of itself beyond what every rule says, and what holds where it is silent.
#pragma once

#include <type_traits>

namespace pyoptim {
namespace {

#define PYOPTIM_TRAIT(kTrait, otherwise)                                                  \
  template <class Rule, class = void>                                                     \
  constexpr bool kTrait##OrNot = otherwise;                                               \
  template <class Rule>                                                                   \
  constexpr bool kTrait##OrNot<Rule, std::void_t<decltype(Rule::kTrait)>> = Rule::kTrait; \
  template <class Rule>                                                                   \
  constexpr bool kTrait = kTrait##OrNot<Rule>;

// Its states are no more than written.
PYOPTIM_TRAIT(kReadsStates, true)
// Its states are no more than read, and its step is not counted.
PYOPTIM_TRAIT(kWritesStates, true)
// update returns a Product (rules/line_search.hpp), which can be added up over all elements.
PYOPTIM_TRAIT(kYieldsTerm, false)
// It has kernels for half-precision parameters with a float32 copy.
PYOPTIM_TRAIT(kHasMaster, false)

#undef PYOPTIM_TRAIT

}  // namespace
}  // namespace pyoptim
