// The one list of rules. A new optimizer is a header beside this file and a line here.
#pragma once

#include "rules/adagrad.hpp"
#include "rules/adam.hpp"
#include "rules/adamp.hpp"
#include "rules/ascent.hpp"
#include "rules/expectigrad.hpp"
#include "rules/line_step.hpp"
#include "rules/line_trial.hpp"
#include "rules/projection.hpp"
#include "rules/rmsprop.hpp"
#include "rules/sgd.hpp"
#include "rules/sgdp.hpp"

#define PYOPTIM_FOR_EACH_RULE(X) \
  X(Sgd)                         \
  X(Adam)                        \
  X(RmsProp)                     \
  X(Adagrad)                     \
  X(Expectigrad)                 \
  X(Ascent)                      \
  X(AdamP)                       \
  X(SgdP)                        \
  X(LineTrial)                   \
  X(LineStep)

namespace pyoptim {

enum class RuleId : int {
#define PYOPTIM_RULE_ID(Rule) Rule,
  PYOPTIM_FOR_EACH_RULE(PYOPTIM_RULE_ID)
#undef PYOPTIM_RULE_ID
      count
};

constexpr int kMaxVariants = 6;

}  // namespace pyoptim
