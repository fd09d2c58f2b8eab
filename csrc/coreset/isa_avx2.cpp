// The coreset kernels compiled for avx2; setup.py gives this file its compiler flags.
#include "coreset/kernels.inl"

namespace pyoptim::coreset {

const Kernels& kernels_avx2() {
  static const Kernels kernels = make_kernels("avx2");
  return kernels;
}

}  // namespace pyoptim::coreset
