// The coreset kernels compiled for avx512; setup.py gives this file its compiler flags.
#include "coreset/kernels.inl"

namespace pyoptim::coreset {

const Kernels& kernels_avx512() {
  static const Kernels kernels = make_kernels("avx512");
  return kernels;
}

}  // namespace pyoptim::coreset
