// The kernels compiled for baseline; setup.py gives this file its compiler flags.
#include "cpu/engine.inl"

namespace pyoptim::cpu {

const KernelTable& kernels_baseline() {
  static const KernelTable table = make_table("baseline");
  return table;
}

}  // namespace pyoptim::cpu
