// Tasks that may run out of memory.
#pragma once

#include <atomic>
#include <functional>
#include <new>
#include <utility>

#include "cpu/engine.hpp"

namespace pyoptim::coreset {

// Runs tasks on torch's threads, which an exception must not leave: it is thrown after them.
class Guarded {
 public:
  explicit Guarded(std::function<void(int64_t)> task) : task_(std::move(task)) {}

  void run(int64_t n_tasks, bool serial) {
    const auto call = [](int64_t i, void* self) { static_cast<Guarded*>(self)->call(i); };
    cpu::run_tasks(n_tasks, serial, call, this);
    if (failed_) throw std::bad_alloc();
  }

 private:
  void call(int64_t i) {
    if (failed_) return;
    try {
      task_(i);
    } catch (const std::bad_alloc&) {
      failed_ = true;
    }
  }

  std::function<void(int64_t)> task_;
  std::atomic<bool> failed_{false};
};

}  // namespace pyoptim::coreset
