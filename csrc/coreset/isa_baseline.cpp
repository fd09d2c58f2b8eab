// The coreset kernels compiled for baseline; setup.py gives this file its compiler flags.
#include "coreset/kernels.inl"

namespace pyoptim::coreset {

const Kernels& kernels_baseline() {
  static const Kernels kernels = make_kernels("baseline");
  return kernels;
}

}  // namespace pyoptim::coreset
