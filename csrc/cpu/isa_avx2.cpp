// The kernels compiled for avx2; setup.py gives this file its compiler flags.
#include "cpu/engine.inl"

namespace pyoptim::cpu {

const KernelTable& kernels_avx2() {
  static const KernelTable table = make_table("avx2");
  return table;
}

}  // namespace pyoptim::cpu
