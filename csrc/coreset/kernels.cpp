// Chooses the coreset kernels of the instruction set in use.
#include "coreset/kernels.hpp"

#include <string>

#include "cpu/engine.hpp"

namespace pyoptim::coreset {

const Kernels& kernels_baseline();
#if defined(PYOPTIM_X86)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

const Kernels& active_kernels() {
#if defined(PYOPTIM_X86)
  const std::string isa = cpu::active_kernels().isa;
  if (__builtin_cpu_supports("fma")) {
    if (isa == "avx512" || isa == "avx512_bf16") return kernels_avx512();
    if (isa == "avx2") return kernels_avx2();
  }
#endif
  return kernels_baseline();
}

}  // namespace pyoptim::coreset
