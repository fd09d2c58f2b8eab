// Cuts k-center steps, distances and medians into tasks.
#include "coreset/centers.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <utility>
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

// In float32, with a vector of zeros behind it; empty where that is another number.
std::vector<float> narrowed(const double* center, int64_t d) {
  std::vector<float> narrow(d + 16);
  for (int64_t k = 0; k < d; ++k) {
    narrow[k] = static_cast<float>(center[k]);
    if (static_cast<double>(narrow[k]) != center[k]) return {};
  }
  return narrow;
}

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
  const std::vector<float> narrow = narrowed(center, d);
  const float* const near_center = narrow.empty() ? nullptr : narrow.data();
  std::vector<CenterStep> steps(tasks);
  Guarded parts([&](int64_t t) {
    const int64_t begin = t * per_task, end = std::min(begin + per_task, x.n);
    steps[t] = {
        x.data, x.dtype, x.stride, d, center, near_center, min_sqdist, begin, end, -1, -1, -1};
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

// What a task copies stays in the second-level cache while it is read again.
constexpr int64_t kCopyBytes = 1 << 20;
constexpr int64_t kFewestColumns = 16;

// The mean of the two middle values, or the middle value.
double median(double* values, int64_t n) {
  double* const middle = values + n / 2;
  std::nth_element(values, middle, values + n);
  if (n % 2) return *middle;
  const double lower = *std::max_element(values, middle), sum = lower + *middle;
  return std::isinf(sum) ? 0.5 * lower + 0.5 * *middle : 0.5 * sum;
}

// A block of columns of one group.
struct MedianTask {
  int64_t group, from, n, first, width;
};

class Medians {
 public:
  explicit Medians(const Groups& groups) : groups_(groups), kernels_(active_kernels()) {
    copies_.reserve(cpu::num_threads() + 1);  // so that giving back cannot fail
    for (int64_t g = 0, from = 0; g < groups.n_groups; from = groups.ends[g++]) {
      const int64_t n = groups.ends[g] - from;
      const double column_bytes = kernels_.median_share * 4 * static_cast<double>(n + 1);
      const auto fitting = static_cast<int64_t>(kCopyBytes / column_bytes);
      const int64_t width =
          std::clamp(fitting / kFewestColumns * kFewestColumns, kFewestColumns, kMedianColumns);
      copy_size_ = std::max(copy_size_, copy_size(n, std::min(width, groups.d)));
      for (int64_t c = 0; c < groups.d; c += width)
        tasks_.push_back({g, from, n, c, std::min(width, groups.d - c)});
    }
  }

  int64_t run() {
    Guarded tasks([this](int64_t i) {
      const MedianTask& task = tasks_[i];
      double* const out = groups_.out + task.group * groups_.d + task.first;
      if (task.n == 0) {
        std::fill_n(out, task.width, kNan);
      } else if (groups_.x.dtype == DType::f64) {
        select(task, out);
      } else {
        count(task, out);
      }
    });
    tasks.run(static_cast<int64_t>(tasks_.size()), is_small(groups_.x.n, groups_.d));
    return nan_row_;
  }

 private:
  static int64_t copy_size(int64_t n, int64_t width) {
    const int64_t padded = (width + kFewestColumns - 1) / kFewestColumns * kFewestColumns;
    return (padded + 1) * (n + 16);
  }

  // Tasks take turns with copies: memory fresh from the system would cost more than a task.
  Scratch<float> take_copy() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (copies_.empty()) return Scratch<float>(copy_size_);
    Scratch<float> copy = std::move(copies_.back());
    copies_.pop_back();
    return copy;
  }

  void count(const MedianTask& task, double* out) {
    Scratch<float> copy = take_copy();
    const Rows& x = groups_.x;
    ColumnMedians work = {x.rows ? x.data : x.at(task.from),
                          x.dtype,
                          x.stride,
                          x.rows ? x.rows + task.from : nullptr,
                          task.n,
                          task.first,
                          task.width,
                          copy.get(),
                          out,
                          -1};
    kernels_.column_medians(&work);
    if (work.nan_row >= 0) report(x.index(task.from + work.nan_row));
    const std::lock_guard<std::mutex> lock(mutex_);
    copies_.push_back(std::move(copy));
  }

  // float64 columns, one after the other.
  void select(const MedianTask& task, double* out) {
    const Scratch<double> columns(task.n * task.width);
    for (int64_t i = 0; i < task.n; ++i) {
      const auto* const row = static_cast<const double*>(groups_.x.at(task.from + i)) + task.first;
      for (int64_t c = 0; c < task.width; ++c) {
        if (row[c] != row[c]) return report(groups_.x.index(task.from + i));
        columns[c * task.n + i] = row[c];
      }
    }
    for (int64_t c = 0; c < task.width; ++c) out[c] = median(&columns[c * task.n], task.n);
  }

  void report(int64_t row) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (nan_row_ < 0 || row < nan_row_) nan_row_ = row;
  }

  const Groups& groups_;
  const Kernels& kernels_;
  std::vector<MedianTask> tasks_;
  std::vector<Scratch<float>> copies_;
  int64_t copy_size_ = 0;
  int64_t nan_row_ = -1;
  std::mutex mutex_;
};

}  // namespace

int64_t medians(const Groups& groups) { return Medians(groups).run(); }

}  // namespace pyoptim::coreset
