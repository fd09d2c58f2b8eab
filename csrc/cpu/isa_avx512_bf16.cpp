// The kernels compiled for avx512_bf16; setup.py gives this file its compiler flags.
#include "cpu/engine.inl"

namespace pyoptim::cpu {

const KernelTable& kernels_avx512_bf16() {
  static const KernelTable table = make_table("avx512_bf16");
  return table;
}

}  // namespace pyoptim::cpu
