// The kernels compiled for avx512; setup.py gives this file its compiler flags.
#include "cpu/engine.inl"

namespace pyoptim::cpu {

const KernelTable& kernels_avx512() {
  static const KernelTable table = make_table("avx512");
  return table;
}

}  // namespace pyoptim::cpu
