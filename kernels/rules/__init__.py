"""The one list of rules for Triton, by the names of csrc/rules. A new rule is a file and a line.

A rule is a module with

    update(p, g, states, hyper, V)  -> (new param, new states), on blocks in the compute type
    prepare(raw, step, first)       -> the fields of the C++ Hyper struct, in its order, in float64
    N_HYPERS, N_FIELDS              lengths of `raw` and of what prepare returns
    N_STATES                        states of every variant V

A rule that projects has in place of `update`

    average(g, states, hyper)       -> new states
    direction(g, states, hyper, V)  -> the direction, from the states as they are stored
    projection(hyper)               -> (eps, step_size, decay, projected_decay, delta)
    READS_GRAD, PROJECTS_BUFFER     of every variant V, as in csrc/rules/projection.hpp

A rule that yields terms has in place of `update`

    point(p, g, states, hyper, V)   -> (new param, a, b), whose product in float64 is the term
    WRITES_STATES = False           its states are read only, and its steps not counted

and repeats the operations of the C++ header in their order: the results must agree in every bit.
"""

from pyoptim.kernels.rules import (
    adagrad,
    adam,
    adamp,
    ascent,
    expectigrad,
    line_step,
    line_trial,
    rmsprop,
    sgd,
    sgdp,
)

RULES = {
    "sgd": sgd,
    "adam": adam,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "expectigrad": expectigrad,
    "ascent": ascent,
    "adamp": adamp,
    "sgdp": sgdp,
    "line_trial": line_trial,
    "line_step": line_step,
}
