// Cuts k-center steps, distances and medians into tasks.
#include "coreset/centers.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "coreset/memory.hpp"
#include "coreset/tasks.hpp"

namespace pyoptim::coreset {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Elements of a task: enough to hide its start, few enough to balance threads.
constexpr int64_t kTaskElements = 256 << 10;

int64_t rows_per_task(int64_t d) { return std::max<int64_t>(1, kTaskElements / (d + 1)); }

int64_t n_tasks(int64_t n, int64_t per_task) { return (n + per_task - 1) / per_task; }

bool is_small(int64_t n, int64_t d) { return n * (d + 1) <= cpu::kSerialElements; }

}  // namespace

void pairwise(const Pairs& pairs) {
  // So many rows of y stay in the cache while rows of x pass by.
  const int64_t wide =
      std::max<int64_t>(1, (128 << 10) / ((pairs.d + 1) * item_size(pairs.x.dtype)));
  const int64_t high = 64;
  const ScoreKernel score =
      active_kernels().score[static_cast<int>(Score::sqdist)][static_cast<int>(pairs.x.dtype)];
  const int64_t across = n_tasks(pairs.y.n, wide);
  Guarded tiles([&](int64_t task) {
    const int64_t row = task / across * high, column = task % across * wide;
    for (int64_t i = row; i < std::min(row + high, pairs.x.n); ++i) {
      for (int64_t j = column; j < std::min(column + wide, pairs.y.n); ++j) {
        const double sqdist = score(pairs.x.at(i), pairs.y.at(j), pairs.d);
        const int64_t at = i * pairs.stride + j;
        if (pairs.dtype == DType::f64) {
          static_cast<double*>(pairs.out)[at] = sqdist;
        } else {
          static_cast<float*>(pairs.out)[at] = static_cast<float>(sqdist);
        }
      }
    }
  });
  tiles.run(n_tasks(pairs.x.n, high) * across, is_small(pairs.x.n * pairs.y.n, pairs.d));
}

Farthest step_center(const Rows& x, int64_t d, const double* center, double* min_sqdist) {
  const Kernels& kernels = active_kernels();
  const int64_t per_task = rows_per_task(d), tasks = n_tasks(x.n, per_task);
  std::vector<CenterStep> steps(tasks);
  Guarded parts([&](int64_t t) {
    const int64_t begin = t * per_task, end = std::min(begin + per_task, x.n);
    steps[t] = {x.data, x.dtype, x.stride, d, center, min_sqdist, begin, end, -1, -1, -1};
    kernels.step_center(&steps[t]);
  });
  parts.run(tasks, is_small(x.n, d));
  Farthest found;
  for (const CenterStep& step : steps) {
    if (step.row >= 0 && step.largest > found.sqdist)
      found = {step.row, step.largest, found.nan_row};
    if (found.nan_row < 0) found.nan_row = step.nan_row;
  }
  return found;
}

void center_sqdist(
    const Rows& x, int64_t d, const int64_t* labels, const double* centers, double* out) {
  const ScoreKernel score = active_kernels().to_center[static_cast<int>(x.dtype)];
  const int64_t per_task = rows_per_task(d);
  Guarded parts([&](int64_t t) {
    for (int64_t i = t * per_task; i < std::min((t + 1) * per_task, x.n); ++i) {
      out[i] = score(x.at(i), centers + labels[i] * d, d);
    }
  });
  parts.run(n_tasks(x.n, per_task), is_small(x.n, d));
}

// -- medians
// ---------------------------------------------------------------------------------------

namespace {

// Columns whose elements of a row share two cache lines.
constexpr int64_t kColumns = 32;

// The mean of the two middle values, or the middle value.
template <class T>
double median(T* values, int64_t n) {
  T* const middle = values + n / 2;
  std::nth_element(values, middle, values + n);
  if (n % 2) return *middle;
  const T lower = *std::max_element(values, middle);
  // Each half of the sum is exact but for numbers near the smallest: the sum may be infinite.
  if constexpr (sizeof(T) < sizeof(double)) return 0.5 * (static_cast<double>(lower) + *middle);
  const double sum = lower + *middle;
  return std::isinf(sum) ? 0.5 * lower + 0.5 * *middle : 0.5 * sum;
}

class Medians {
 public:
  explicit Medians(const Groups& groups)
      : groups_(groups), blocks_(n_tasks(groups.d, kColumns)), nan_row_(-1) {}

  int64_t run() {
    Guarded tasks([this](int64_t task) {
      if (groups_.x.dtype == DType::f64) return run_task<double, double>(task);
      if (groups_.x.dtype == DType::f32) return run_task<float, float>(task);
      if (groups_.x.dtype == DType::bf16) return run_task<Bf16, float>(task);
      run_task<F16, float>(task);
    });
    tasks.run(groups_.n_groups * blocks_, is_small(groups_.x.n, groups_.d));
    return nan_row_;
  }

 private:
  template <class E, class T>
  void run_task(int64_t task) {
    const int64_t g = task / blocks_, from = g ? groups_.ends[g - 1] : 0;
    const int64_t n = groups_.ends[g] - from, first = task % blocks_ * kColumns;
    const int64_t width = std::min(kColumns, groups_.d - first);
    const Scratch<T> values(n * kColumns);
    for (int64_t i = 0; i < n; ++i) {
      const E* const row = static_cast<const E*>(groups_.x.at(from + i)) + first;
      for (int64_t c = 0; c < width; ++c) {
        const T value = load(row[c]);
        values[c * n + i] = value;
        if (value != value) return report(groups_.x.index(from + i));
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      groups_.out[g * groups_.d + first + c] = n ? median(&values[c * n], n) : kNan;
    }
  }

  void report(int64_t row) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (nan_row_ < 0 || row < nan_row_) nan_row_ = row;
  }

  const Groups& groups_;
  int64_t blocks_, nan_row_;
  std::mutex mutex_;
};

}  // namespace

int64_t medians(const Groups& groups) { return Medians(groups).run(); }

}  // namespace pyoptim::coreset
