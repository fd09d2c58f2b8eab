"""The one list of rules for Triton, by the names of csrc/rules. A new rule is a file and a line.

A rule is a module with

    update(p, g, states, hyper, V)  -> (new param, new states), on blocks in the compute type
    prepare(raw, step, first)       -> the fields of the C++ Hyper struct, in its order, in float64
    N_HYPERS, N_FIELDS              lengths of `raw` and of what prepare returns
    N_STATES                        states of every variant V

and repeats the operations of the C++ header in their order: the results must agree in every bit.
"""

from pyoptim.kernels.rules import adagrad, adam, ascent, expectigrad, rmsprop, sgd

RULES = {
    "sgd": sgd,
    "adam": adam,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "expectigrad": expectigrad,
    "ascent": ascent,
}
