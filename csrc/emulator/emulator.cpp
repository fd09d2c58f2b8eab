// Runs kernels on a CPU, one thread after the other in any order. A thread that has to wait for
// others gives its place to them; one that ends makes room for the next on the same stack.
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/cuda.hpp"

pyoptim::gpu::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace pyoptim::gpu::emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarpThreads = 32;
constexpr int kDevices = 2;

enum class State { fresh, running, waiting, ended };

struct Fiber;

struct Copy {
  void* to;
  const void* from;
  int n, size;  // bytes read, and written: zeros behind them
  int group;
};

struct Thread {
  State state = State::fresh;
  Place place = {};
  uint32_t mask = 0;  // the threads of the warp that it waits for; 0: the whole block
  uint64_t value = 0;
  uint64_t received[kWarpThreads];
  Fiber* fiber = nullptr;
  std::vector<Copy> copies;
  int n_groups = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  unsigned thread = 0;

  explicit Fiber(void (*body)()) {
    (void)getcontext(&context);  // fills the structure and cannot fail
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
  }
};

struct SharedArray {
  const void* site;
  std::unique_ptr<char[]> memory;
  bool is_fresh;
};

bool same_place(const Place& a, const Place& b) { return a.what == b.what && a.line == b.line; }

// The multiprocessor: it runs one block at a time.
class Machine {
 public:
  void seed(unsigned value) {
    shuffles_ = value != 0;
    random_.seed(value);
  }

  void run(int64_t n_blocks, int n_threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    blockDim.x = static_cast<unsigned>(n_threads);
    gridDim.x = static_cast<unsigned>(n_blocks);
    for (const unsigned block : shuffled(gridDim.x)) {
      blockIdx.x = block;
      run_block();
    }
  }

  void* shared(const void* site, size_t bytes) {
    auto found = std::find_if(
        shared_.begin(), shared_.end(), [&](const SharedArray& a) { return a.site == site; });
    if (found == shared_.end()) {
      shared_.push_back({site, std::unique_ptr<char[]>(new char[bytes]), true});
      found = shared_.end() - 1;
    }
    // What nobody wrote is NaN in every block.
    if (found->is_fresh) std::memset(found->memory.get(), 0xff, bytes);
    found->is_fresh = false;
    return found->memory.get();
  }

  void meet_block(Place place) {
    wait_at(place, 0, 0);
    if (++n_in_barrier_ < threads_.size()) return pause();
    const bool together = std::all_of(threads_.begin(), threads_.end(), [&](const Thread& t) {
      return t.mask == 0 && same_place(t.place, place);
    });
    if (!together) return pause();  // for ever: the scheduler will tell
    n_in_barrier_ = 0;
    for (unsigned t = 0; t < threads_.size(); ++t) release(t);
  }

  const uint64_t* meet_warp(Place place, uint32_t mask, uint64_t value) {
    const unsigned first = current() / kWarpThreads * kWarpThreads;
    wait_at(place, mask, value);
    bool complete = mask >> (current() - first) & 1u;  // who names not itself waits for ever
    for_each_of(mask, first, [&](const Thread& t) {
      complete =
          complete && t.state == State::waiting && t.mask == mask && same_place(t.place, place);
    });
    if (complete) exchange(mask, first);
    if (!complete) pause();
    return threads_[current()].received;
  }

  void copy_later(void* to, const void* from, int n, int size) {
    std::memset(to, 0xff, static_cast<size_t>(size));
    Thread& thread = threads_[current()];
    thread.copies.push_back({to, from, n, size, thread.n_groups});
  }

  void commit_copies() { ++threads_[current()].n_groups; }

  void wait_for_copies(int n_groups_left) {
    Thread& thread = threads_[current()];
    const auto is_late = [&](const Copy& c) { return c.group >= thread.n_groups - n_groups_left; };
    for (const Copy& copy : thread.copies) {
      if (is_late(copy)) continue;
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.n));
      std::memset(static_cast<char*>(copy.to) + copy.n, 0, static_cast<size_t>(copy.size - copy.n));
    }
    const auto done = std::stable_partition(thread.copies.begin(), thread.copies.end(), is_late);
    thread.copies.erase(done, thread.copies.end());
  }

  unsigned current() const { return running_->thread; }

 private:
  std::vector<unsigned> shuffled(unsigned n) {
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; ++i) order[i] = i;
    if (shuffles_) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void run_block() {
    threads_.assign(blockDim.x, Thread());
    order_ = shuffled(blockDim.x);
    n_started_ = n_ended_ = n_in_barrier_ = 0;
    ready_.clear();
    for (SharedArray& array : shared_) array.is_fresh = true;
    while (n_started_ < threads_.size() || !ready_.empty()) resume(choose());
    if (n_ended_ == threads_.size()) return;
    const std::string text = describe();
    fibers_.clear();  // with the frames of threads that never end
    idle_.clear();
    throw std::runtime_error(text);
  }

  // A thread that can go on, or a fiber for the next new one.
  Fiber* choose() {
    const bool can_start = n_started_ < threads_.size();
    if (ready_.empty() || (can_start && !(shuffles_ && random_() % 2))) return idle_fiber();
    const size_t i = shuffles_ ? random_() % ready_.size() : 0;
    Fiber* const fiber = threads_[ready_[i]].fiber;
    ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(i));
    return fiber;
  }

  Fiber* idle_fiber() {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(fiber_main));
      return fibers_.back().get();
    }
    Fiber* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  void resume(Fiber* fiber) {
    running_ = fiber;
    threadIdx.x = fiber->thread;
    if (swapcontext(&scheduler_, &fiber->context) != 0) std::abort();
  }

  static void fiber_main();

  // Runs new threads to their end, until one has to wait or there are no more.
  void run_threads() {
    while (n_started_ < threads_.size()) {
      Fiber* const self = running_;
      self->thread = order_[n_started_++];
      threadIdx.x = self->thread;
      threads_[self->thread].state = State::running;
      threads_[self->thread].fiber = self;
      (*kernel_)();
      threads_[self->thread].state = State::ended;
      ++n_ended_;
    }
    idle_.push_back(running_);
    leave();
  }

  void leave() {
    if (swapcontext(&running_->context, &scheduler_) != 0) std::abort();
  }

  void wait_at(Place place, uint32_t mask, uint64_t value) {
    Thread& thread = threads_[current()];
    thread.state = State::waiting;
    thread.place = place;
    thread.mask = mask;
    thread.value = value;
  }

  void pause() { leave(); }

  void release(unsigned t) {
    threads_[t].state = State::running;
    if (t != current()) ready_.push_back(t);
  }

  template <class Visit>
  void for_each_of(uint32_t mask, unsigned first, Visit visit) {
    for (unsigned i = 0; i < kWarpThreads && first + i < threads_.size(); ++i) {
      if (mask >> i & 1u) visit(threads_[first + i]);
    }
  }

  void exchange(uint32_t mask, unsigned first) {
    for_each_of(mask, first, [&](Thread& to) {
      for (unsigned i = 0; i < kWarpThreads && first + i < threads_.size(); ++i) {
        to.received[i] = threads_[first + i].value;
      }
    });
    for_each_of(
        mask, first, [&](Thread& t) { release(static_cast<unsigned>(&t - threads_.data())); });
  }

  // Who waits where.
  std::string describe() const {
    std::string text = "threads of block " + std::to_string(blockIdx.x) +
                       " wait for each other: " + std::to_string(n_ended_) + " have ended";
    std::vector<bool> told(threads_.size());
    for (size_t t = 0; t < threads_.size(); ++t) {
      if (told[t] || threads_[t].state != State::waiting) continue;
      int count = 0;
      for (size_t u = t; u < threads_.size(); ++u) {
        const bool same =
            threads_[u].state == State::waiting && same_place(threads_[u].place, threads_[t].place);
        count += same;
        told[u] = told[u] || same;
      }
      text += ", " + std::to_string(count) + " wait at " + threads_[t].place.what + " in line " +
              std::to_string(threads_[t].place.line);
    }
    return text;
  }

  const std::function<void()>* kernel_ = nullptr;
  bool shuffles_ = false;
  std::minstd_rand random_;
  std::vector<Thread> threads_;
  std::vector<unsigned> order_;
  std::vector<unsigned> ready_;
  size_t n_started_ = 0, n_ended_ = 0, n_in_barrier_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::vector<SharedArray> shared_;
  ucontext_t scheduler_;
  Fiber* running_ = nullptr;
};

// What a machine without a GPU can know of a launch, and what it can be made to do.
struct Device {
  std::mutex busy;
  Machine machine;
  int fail_in = 0;  // launches until one fails; 0: none
  int last_device = -1;
  cudaStream_t last_stream = nullptr;

  Device() {
    const char* const seed = std::getenv("PYOPTIM_EMULATOR_SEED");
    machine.seed(seed ? static_cast<unsigned>(std::strtoul(seed, nullptr, 10)) : 0);
  }
};

Device& device() {
  static Device device;
  return device;
}

void Machine::fiber_main() {
  for (;;) device().machine.run_threads();
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_failure;

cudaError_t fail(cudaError_t error, const std::string& why) {
  last_failure = why;
  return last_error = error;
}

}  // namespace

cudaError_t run(int64_t n_blocks,
                int n_threads,
                cudaStream_t stream,
                const std::function<void()>& kernel) {
  Device& d = device();
  const std::lock_guard<std::mutex> lock(d.busy);
  d.last_device = current_device;
  d.last_stream = stream;
  if (n_blocks < 1 || n_blocks > 0x7fffffff) {
    return fail(cudaErrorInvalidValue, "a launch of " + std::to_string(n_blocks) + " blocks");
  }
  if (d.fail_in > 0 && --d.fail_in == 0) return fail(cudaErrorLaunchFailure, "asked to fail");
  try {
    d.machine.run(n_blocks, n_threads, kernel);
  } catch (const std::runtime_error& error) {
    return fail(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

void* shared(const void* site, size_t bytes) { return device().machine.shared(site, bytes); }
void meet_block(Place place) { device().machine.meet_block(place); }
const uint64_t* meet_warp(Place place, uint32_t mask, uint64_t value) {
  return device().machine.meet_warp(place, mask, value);
}
unsigned lane() { return threadIdx.x % kWarpThreads; }
void copy_later(void* to, const void* from, int n, int size) {
  device().machine.copy_later(to, from, n, size);
}
void commit_copies() { device().machine.commit_copies(); }
void wait_for_copies(int n_groups_left) { device().machine.wait_for_copies(n_groups_left); }

}  // namespace pyoptim::gpu::emulator

using namespace pyoptim::gpu::emulator;

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) {
    return fail(cudaErrorInvalidDevice, "there is no device " + std::to_string(device));
  }
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "an error of another kind";
}

const char* cudaGetErrorString(cudaError_t error) {
  return last_error == error && error != cudaSuccess ? last_failure.c_str()
                                                     : cudaGetErrorName(error);
}

// For tests.
#define PYOPTIM_EXPORT extern "C" __attribute__((visibility("default")))

// The order of blocks and threads: 0 is ascending, every other number a shuffle of its own.
PYOPTIM_EXPORT void pyoptim_emulator_seed(unsigned value) {
  const std::lock_guard<std::mutex> lock(device().busy);
  device().machine.seed(value);
}

// The n-th launch from now fails.
PYOPTIM_EXPORT void pyoptim_emulator_fail_in(int n) { device().fail_in = n; }

PYOPTIM_EXPORT int pyoptim_emulator_current_device() { return current_device; }

// Where the last launch went.
PYOPTIM_EXPORT int pyoptim_emulator_last_device() { return device().last_device; }
PYOPTIM_EXPORT uint64_t pyoptim_emulator_last_stream() {
  return reinterpret_cast<uint64_t>(device().last_stream);
}
