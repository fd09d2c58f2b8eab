// What the engine's files offer each other: one function per kernel, which returns the first error.
#pragma once

#include <algorithm>

#include "cuda/api.hpp"
#include "cuda/device.hpp"

namespace pyoptim::gpu {

// What Api::tune sets; 0 leaves the choice to the engine.
struct Settings {
  int64_t chunk;
  int64_t rows_per_launch;
};
Settings settings();

// Elements per block. Two 16-byte accesses per array, of the smallest elements, keep every thread
// busy once; more of them per block where the step is large enough for thousands of blocks anyway.
inline int64_t choose_chunk(int64_t total) {
  constexpr int64_t kLeast = 2 * 8 * kThreads, kMost = 16 * kLeast, kBlocks = 4096, kVector = 8;
  if (const int64_t asked = settings().chunk) return (asked + kVector - 1) / kVector * kVector;
  return std::clamp((total / kBlocks + kLeast - 1) / kLeast * kLeast, kLeast, kMost);
}

inline int choose_rows(int capacity) {
  const int64_t asked = settings().rows_per_launch;
  return static_cast<int>(asked > 0 ? std::min<int64_t>(asked, capacity) : capacity);
}

// Where the things that a launch's rows refer to are in its table.
template <int kSlots>
class Slots {
 public:
  void clear() { n_ = 0; }

  // The slot of `index`, -1 when it would need one too many; `fill` is called for a fresh slot.
  template <class Fill>
  int find(int64_t index, Fill fill) {
    for (int slot = n_ - 1; slot >= 0; --slot) {
      if (indices_[slot] == index) return slot;
    }
    if (n_ == kSlots) return -1;
    indices_[n_] = index;
    fill(n_);
    return n_++;
  }

 private:
  int n_ = 0;
  int64_t indices_[kSlots];
};

// More blocks than this are too many for one launch.
constexpr int64_t kMaxBlocks = 0x7fffffff;

template <class T>
struct TypeOf {
  using type = T;
};

// Calls body(TypeOf<E>()) with the elements' type.
template <class Body>
cudaError_t with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f64:
      return body(TypeOf<double>());
    case DType::f32:
      return body(TypeOf<float>());
    case DType::bf16:
      return body(TypeOf<Bf16>());
    case DType::f16:
      return body(TypeOf<F16>());
    case DType::unsupported:
      break;
  }
  return cudaErrorInvalidValue;
}

#define PYOPTIM_DECLARE(Rule)                             \
  cudaError_t update_##Rule(const Update&, cudaStream_t); \
  cudaError_t prepare_##Rule(const Prepare&, cudaStream_t);
PYOPTIM_FOR_EACH_RULE(PYOPTIM_DECLARE)
#undef PYOPTIM_DECLARE

cudaError_t partials(const Partials&, cudaStream_t);
cudaError_t norms(const Norms&, cudaStream_t);
cudaError_t clip(const Clip&, cudaStream_t);
cudaError_t scale(const Scale&, cudaStream_t);
cudaError_t row_sums(const RowSums&, cudaStream_t);
cudaError_t squares(const Squares&, cudaStream_t);
cudaError_t pack_rows(const PackRows&, cudaStream_t);
cudaError_t filter(const Filter&, cudaStream_t);
cudaError_t certify(const Certify&, cudaStream_t);
cudaError_t scores(const Scores&, cudaStream_t);
cudaError_t step_center(const CenterStep&, cudaStream_t);
cudaError_t center_sqdist(const CenterSqdist&, cudaStream_t);
// Unscales the gradients of an update by its factors; they are written.
cudaError_t unscale(const Update&, cudaStream_t);

// Of Update::workspace, for the rules that project.
int64_t workspace_bytes(const Update&);

}  // namespace pyoptim::gpu
