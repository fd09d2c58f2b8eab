// Aligned scratch memory that is not written before it is used.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace pyoptim::coreset {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!memory_) throw std::bad_alloc();
  }
  T* get() const { return memory_.get(); }
  T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace pyoptim::coreset
