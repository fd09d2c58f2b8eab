// Packs y into panels, cuts x into tasks, and settles what the filter leaves over.
#include "coreset/nearest.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "coreset/kernels.hpp"
#include "coreset/memory.hpp"
#include "coreset/tasks.hpp"

namespace pyoptim::coreset {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Packed y that is searched at once: it stays in the last-level cache, and bounds the memory.
constexpr int64_t kBlockBytes = 4 << 20;
// Packed x of a task: with a panel it stays in a second-level cache of 1 MB.
constexpr int64_t kTaskBytes = 256 << 10;
constexpr int64_t kTaskRows = 192;
// For so few rows, packing y costs more than scoring every pair.
constexpr int64_t kFewRows = 8;
// Multiplications below which waking other threads costs about as much as it saves.
constexpr double kSmallProducts = 1e6;
// Norms beyond it would overflow the filter's float32.
constexpr double kHugeNorm = 1e17;
// Candidates that a list has room for besides 2 k: two panels and some.
constexpr int64_t kSpareCandidates = 2 * kMaxColumns + 32;
// Rows that the centre of y is the mean of.
constexpr int64_t kCenterRows = 1024;

std::atomic<int64_t> scored_pairs{0};

int64_t round_up_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Floats between packed rows: whole vectors, and never a power of two apart, where rows would
// compete for the same lines of the cache.
int64_t leading(int64_t d) { return round_up_to(d, 16) + 16; }

double reciprocal_power_of_two(double x) {
  int exponent = 0;
  if (x > 0 && x < kInfinity) (void)std::frexp(x, &exponent);
  return std::ldexp(1.0, std::clamp(-exponent, -120, 120));
}

// -- y
// ---------------------------------------------------------------------------------------------

// A block of y's rows as the filter reads them.
class Block {
 public:
  // Columns [begin, end) of the search. nan_row is set to the first row with a NaN.
  Block(const Search& search, const Kernels& kernels, int64_t begin, int64_t end)
      : search_(search), kernels_(kernels), begin_(begin), n_(end - begin), d_(search.d) {
    const double runs =
        std::max(1.0, std::ceil(static_cast<double>(d_) / static_cast<double>(kernels_.depth)));
    const double depth = std::ceil(static_cast<double>(d_) / runs);
    bound_ = {search.metric, d_, gamma_of(depth + runs), 1, 0, 0};
    scores_all_ = search.x.n <= kFewRows;
    read();
    if (nan_row_ >= 0 || scores_all_) return;
    choose_center();
    pack();
  }

  int64_t nan_row() const { return nan_row_; }
  // Whether the filter is left out.
  bool scores_all() const { return scores_all_; }
  const BlockBound& bound() const { return bound_; }
  const float* center() const { return center_.data(); }
  int64_t n_panels() const { return (n_ + kernels_.columns - 1) / kernels_.columns; }
  int64_t size() const { return n_; }
  int64_t column(int64_t j) const { return begin_ + j; }

  void show(int64_t panel, Scan* scan) const {
    const int64_t first = panel * kernels_.columns, left = n_ - first;
    scan->y = panels_.get() + panel * d_ * kernels_.columns;
    scan->half_norms = half_norms_.get() + first;
    scan->first_column = static_cast<int32_t>(first);
    scan->valid = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  }

 private:
  bool is_sqdist() const { return search_.metric == Metric::sqdist; }
  bool is_cosine() const { return search_.metric == Metric::cosine; }

  double scale_of(int64_t j) const {
    if (!is_cosine()) return bound_.scale;
    return squares_[j] > 0 ? 1 / std::sqrt(squares_[j]) : 0;
  }

  PackRows packing(int64_t j, int64_t n, float* out, double* squares) const {
    PackRows work = {};
    work.data = search_.y.rows ? search_.y.data : search_.y.at(begin_ + j);
    work.rows = search_.y.rows ? search_.y.rows + begin_ + j : nullptr;
    work.dtype = search_.y.dtype;
    work.stride = search_.y.stride;
    work.n_rows = n;
    work.d = d_;
    work.scale = 1;
    work.ld = leading(d_);
    work.out = out;
    work.squares = squares;
    return work;
  }

  // Norms and, of some rows, the mean; finds NaN and what the filter cannot express.
  void read() {
    constexpr int64_t kRows = 16;
    const Scratch<float> rows(kRows * leading(d_));
    squares_.resize(n_);
    std::vector<double> sums(d_, 0.0);
    const int64_t step = std::max<int64_t>(1, n_ / kCenterRows);
    int64_t n_summed = 0;
    for (int64_t j = 0; j < n_; j += kRows) {
      const int64_t n = std::min(kRows, n_ - j);
      kernels_.pack_rows(packing(j, n, rows.get(), squares_.data() + j));
      for (int64_t r = 0; r < n; ++r) {
        if (squares_[j + r] != squares_[j + r]) {
          nan_row_ = search_.y.index(begin_ + j + r);
          return;
        }
        if ((j + r) % step || !(squares_[j + r] < kInfinity)) continue;
        ++n_summed;
        for (int64_t k = 0; k < d_; ++k) sums[k] += rows[r * leading(d_) + k];
      }
    }
    for (double& sum : sums) sum /= static_cast<double>(std::max<int64_t>(n_summed, 1));
    mean_ = std::move(sums);
    find_scale();
  }

  void find_scale() {
    double largest = 0;
    bool is_finite = true;
    for (const double square : squares_) {
      if (square < kInfinity) largest = std::max(largest, square);
      is_finite = is_finite && square < kInfinity;
    }
    // An infinite row is infinitely far from every finite one, but its products are of either sign;
    // and float64 rows may only be too large for float32.
    const bool is_infinite_far = is_sqdist() && search_.y.dtype != DType::f64;
    scores_all_ = scores_all_ || !(is_finite || is_infinite_far);
    if (is_cosine()) return measure_rows();
    bound_.scale = reciprocal_power_of_two(std::sqrt(largest));
  }

  // The rows of a cosine search are divided by their norms.
  void measure_rows() {
    const ScoreKernel dot =
        kernels_.score[static_cast<int>(Score::dot)][static_cast<int>(search_.y.dtype)];
    for (int64_t j = 0; j < n_ && !scores_all_; ++j) {
      const void* const row = search_.y.at(begin_ + j);
      squares_[j] = dot(row, row, d_);
      const bool is_normal = squares_[j] > 1e-60 && squares_[j] < 1e60;
      scores_all_ = !(is_normal || squares_[j] == 0);
    }
  }

  void choose_center() {
    center_.resize(d_);
    double norm = 0;
    // The mean of rows says little of the mean of their directions.
    const double scale = is_cosine() ? 0 : bound_.scale;
    for (int64_t k = 0; k < d_; ++k) {
      center_[k] = static_cast<float>(mean_[k] * scale);
      norm += static_cast<double>(center_[k]) * center_[k];
    }
    bound_.center_norm = std::sqrt(norm) * (1 + 1e-9);
  }

  void pack() {
    panels_ = Scratch<float>(n_panels() * kernels_.columns * d_);
    half_norms_ = Scratch<float>(n_panels() * kernels_.columns);
    norms_ = Scratch<double>(n_panels() * kernels_.columns);
    Guarded packing([this](int64_t panel) { pack_panel(panel); });
    packing.run(n_panels(), n_ * d_ <= cpu::kSerialElements);
    for (int64_t j = 0; j < n_; ++j) bound_.largest = std::max(bound_.largest, norms_[j]);
    bound_.largest *= 1 + 1e-9;
  }

  void pack_panel(int64_t panel) {
    const int64_t width = kernels_.columns, ld = leading(d_), first = panel * width;
    const int64_t n = std::min(width, n_ - first);
    const Scratch<float> rows(width * ld);
    double squares[kMaxColumns];
    for (int64_t c = 0; c < n; ++c) {
      PackRows work = packing(first + c, 1, rows.get() + c * ld, squares + c);
      work.scale = scale_of(first + c);
      work.center = center_.data();
      kernels_.pack_rows(work);
    }
    for (int64_t c = 0; c < width; ++c) {
      const bool is_finite = c < n && squares_[first + c] < kInfinity;
      // What does not exist, or is infinitely far, never has a finite value.
      half_norms_[first + c] = is_finite ? half_norm(squares[c]) : static_cast<float>(kInfinity);
      norms_[first + c] = is_finite ? std::sqrt(squares[c]) : 0;
      if (!is_finite) std::memset(rows.get() + c * ld, 0, d_ * sizeof(float));
    }
    float* const out = panels_.get() + panel * width * d_;
    for (int64_t k = 0; k < d_; ++k) {
      for (int64_t c = 0; c < width; ++c) out[k * width + c] = rows[c * ld + k];
    }
  }

  float half_norm(double square) const {
    return is_sqdist() ? static_cast<float>(0.5 * square) : 0.0f;
  }

  const Search& search_;
  const Kernels& kernels_;
  int64_t begin_, n_, d_;
  BlockBound bound_;
  bool scores_all_ = false;
  int64_t nan_row_ = -1;
  std::vector<double> squares_, mean_;
  std::vector<float> center_;
  Scratch<float> panels_, half_norms_;
  Scratch<double> norms_;
};

// -- the k best of a row
// ---------------------------------------------------------------------------

struct Best {
  double* scores;
  int64_t* indices;
  int64_t k;

  bool is_full() const { return indices[k - 1] >= 0; }
  double worst() const { return scores[k - 1]; }

  // In ascending order of (score, index).
  void insert(double score, int64_t index) {
    if (!is_before(score, index, k - 1)) return;
    int64_t at = k - 1;
    for (; at > 0 && is_before(score, index, at - 1); --at) {
      scores[at] = scores[at - 1];
      indices[at] = indices[at - 1];
    }
    scores[at] = score;
    indices[at] = index;
  }

 private:
  bool is_before(double score, int64_t index, int64_t at) const {
    if (indices[at] < 0 || score < scores[at]) return true;
    return score == scores[at] && index < indices[at];
  }
};

// -- x
// ---------------------------------------------------------------------------------------------

struct Workspace {
  Scratch<float> x, partial;
  Scratch<double> squares, products;
  Scratch<float> thresholds, lowest, slacks;
  Scratch<int32_t> n_candidates;
  Scratch<Candidate> candidates;
};

// Workspaces that tasks take turns with: memory fresh from the system would cost more than a task.
class Pool {
 public:
  Pool() { free_.reserve(cpu::num_threads() + 1); }  // so that giving back cannot fail

  Workspace take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return {};
    Workspace workspace = std::move(free_.back());
    free_.pop_back();
    return workspace;
  }
  void give(Workspace workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace));
  }

 private:
  std::mutex mutex_;
  std::vector<Workspace> free_;
};

// What all tasks of a block share.
struct Work {
  const Search& search;
  const Kernels& kernels;
  const Block& block;
  int64_t rows_per_task;
  int32_t capacity;
  int64_t n_threads;
  Pool pool;
  std::atomic<int64_t> nan_row{-1};

  void report_nan(int64_t row) {
    int64_t known = nan_row.load();
    while ((known < 0 || row < known) && !nan_row.compare_exchange_weak(known, row)) {
    }
  }
};

// Some rows of x against a block of y.
class Task {
 public:
  Task(Work* work, int64_t index) : work_(*work), search_(work->search), block_(work->block) {
    const int dtype = static_cast<int>(search_.x.dtype);
    sqdist_ = work_.kernels.score[static_cast<int>(Score::sqdist)][dtype];
    dot_ = work_.kernels.score[static_cast<int>(Score::dot)][dtype];
    first_ = index * work_.rows_per_task;
    n_ = std::min(work_.rows_per_task, search_.x.n - first_);
    padded_ = round_up_to(n_, work_.kernels.strip);
    space_ = work_.pool.take();
    if (!space_.x.get()) allocate();
  }
  ~Task() {
    scored_pairs.fetch_add(n_scored_, std::memory_order_relaxed);
    work_.pool.give(std::move(space_));
  }

  void run() {
    pack();
    for (int64_t i = 0; i < padded_; ++i) start(i);
    if (!block_.scores_all()) scan();
    for (int64_t i = 0; i < n_; ++i) finish(i);
  }

 private:
  void allocate() {
    const int64_t rows = round_up_to(work_.rows_per_task, work_.kernels.strip), d = search_.d;
    space_.x = Scratch<float>(rows * leading(d));
    if (d > work_.kernels.depth) space_.partial = Scratch<float>(rows * work_.kernels.columns);
    space_.squares = Scratch<double>(rows);
    space_.products = Scratch<double>(rows);
    space_.thresholds = Scratch<float>(rows + kMaxRowLanes);
    space_.lowest = Scratch<float>(rows + kMaxRowLanes);
    space_.slacks = Scratch<float>(rows + kMaxRowLanes);
    space_.n_candidates = Scratch<int32_t>(rows);
    space_.candidates = Scratch<Candidate>(rows * work_.capacity);
  }

  void pack() {
    const bool is_sqdist = search_.metric == Metric::sqdist, has_center = !block_.scores_all();
    PackRows work = {};
    work.data = search_.x.rows ? search_.x.data : search_.x.at(first_);
    work.rows = search_.x.rows ? search_.x.rows + first_ : nullptr;
    work.dtype = search_.x.dtype;
    work.stride = search_.x.stride;
    work.n_rows = n_;
    work.d = search_.d;
    work.scale = is_sqdist ? block_.bound().scale : 1;
    work.center = is_sqdist && has_center ? block_.center() : nullptr;
    work.shift = !is_sqdist && has_center ? block_.center() : nullptr;
    work.ld = leading(search_.d);
    work.out = space_.x.get();
    work.squares = space_.squares.get();
    work.products = space_.products.get();
    work_.kernels.pack_rows(work);
    std::memset(space_.x.get() + n_ * work.ld, 0, (padded_ - n_) * work.ld * sizeof(float));
  }

  Bound bound(int64_t i) const {
    const double norm = std::sqrt(space_.squares[i]) * (1 + 1e-9);
    return {block_.bound(), {norm, space_.products[i]}};
  }

  Best best(int64_t i) const {
    const int64_t at = search_.x.index(first_ + i) * search_.k;
    return {search_.scores + at, search_.indices + at, search_.k};
  }

  // Whether the filter can rule columns out; otherwise all are scored.
  bool is_filtered(int64_t i) const {
    return !block_.scores_all() && space_.squares[i] < kHugeNorm * kHugeNorm;
  }

  void start(int64_t i) {
    space_.n_candidates[i] = 0;
    space_.thresholds[i] = static_cast<float>(kNan);
    if (i >= n_) return;
    if (space_.squares[i] != space_.squares[i]) work_.report_nan(search_.x.index(first_ + i));
    if (!is_filtered(i)) return;
    const Bound bound = this->bound(i);
    space_.lowest[i] = static_cast<float>(kInfinity);
    space_.slacks[i] = round_up(bound.slack());
    const Best best = this->best(i);
    space_.thresholds[i] = static_cast<float>(kInfinity);
    if (best.is_full()) space_.thresholds[i] = round_up(bound.threshold(best.worst()));
  }

  struct Memory {
    const char* data;
    int64_t bytes;
  };

  // What this thread will probably read next: the other threads take the tasks in between.
  Memory next_rows() const {
    const Rows& x = search_.x;
    const int64_t first = first_ + work_.n_threads * work_.rows_per_task;
    if (first >= x.n || x.rows != nullptr || x.stride != search_.d) return {nullptr, 0};
    const int64_t n = std::min(work_.rows_per_task, x.n - first);
    return {static_cast<const char*>(x.at(first)), n * x.stride * item_size(x.dtype)};
  }

  void scan() {
    Scan scan = {};
    scan.x = space_.x.get();
    scan.ld = leading(search_.d);
    scan.n_rows = padded_;
    scan.d = search_.d;
    scan.partial = space_.partial.get();
    scan.rows = {space_.thresholds.get(),
                 space_.lowest.get(),
                 space_.slacks.get(),
                 space_.n_candidates.get()};
    scan.candidates = space_.candidates.get();
    scan.capacity = work_.capacity;
    scan.only_nearest = search_.k == 1;
    scan.make_room = [](void* task, int64_t i) { static_cast<Task*>(task)->make_room(i); };
    scan.context = this;
    const int64_t panels = block_.n_panels();
    const Memory ahead = next_rows();
    // Spread over the task, so that its own loads do not wait behind them.
    const auto share = [&](int64_t panel) { return ahead.bytes / 64 * panel / panels * 64; };
    for (int64_t panel = 0; panel < panels; ++panel) {
      block_.show(panel, &scan);
      scan.ahead = ahead.data + share(panel);
      scan.ahead_bytes = share(panel + 1) - share(panel);
      work_.kernels.scan(scan);
    }
  }

  double score(int64_t i, int64_t column) {
    ++n_scored_;
    const void* const x = search_.x.at(first_ + i);
    const void* const y = search_.y.at(block_.column(column));
    if (search_.metric == Metric::sqdist) return no_nan(sqdist_(x, y, search_.d));
    const double product = dot_(x, y, search_.d);
    if (search_.metric == Metric::ip) return no_nan(-product);
    const double xx = dot_(x, x, search_.d), yy = dot_(y, y, search_.d);
    return no_nan(cosine_distance(product, xx, yy));
  }

  // inf - inf: as far as can be.
  static double no_nan(double score) { return score == score ? score : kInfinity; }

  static double cosine_distance(double product, double xx, double yy) {
    if (xx == 0 || yy == 0) return 1;
    const double square = xx * yy;
    const bool is_normal = square > 1e-280 && square < 1e280;
    const double norms = is_normal ? std::sqrt(square) : std::sqrt(xx) * std::sqrt(yy);
    return 1 - std::clamp(product / norms, -1.0, 1.0);
  }

  void insert(int64_t i, int64_t column, Best* best) {
    const double value = score(i, column);
    best->insert(value, search_.first_index + search_.y.index(block_.column(column)));
  }

  void lower_threshold(int64_t i, const Best& best) {
    const float threshold = round_up(bound(i).threshold(best.worst()));
    space_.thresholds[i] = std::min(space_.thresholds[i], threshold);
  }

  Candidate* list(int64_t i) const { return space_.candidates.get() + i * work_.capacity; }

  // Forgets those of n candidates that the threshold has ruled out since; returns how many are
  // left.
  int32_t drop_ruled_out(int64_t i, int32_t n) {
    Candidate* const list = this->list(i);
    const float threshold = space_.thresholds[i];
    const auto is_out = [threshold](const Candidate& c) { return !(c.value <= threshold); };
    return static_cast<int32_t>(std::remove_if(list, list + n, is_out) - list);
  }

  // Scores the candidates of a row, in the order of their values, until the rest is ruled out.
  void settle(int64_t i) {
    Candidate* const list = this->list(i);
    Best best = this->best(i);
    int32_t n = std::exchange(space_.n_candidates[i], 0);
    if (n == 1) return insert(i, list->column, &best);
    n = drop_ruled_out(i, n);
    std::sort(list, list + n, is_lower);
    for (int32_t c = 0; c < n && list[c].value <= space_.thresholds[i]; ++c) {
      insert(i, list[c].column, &best);
      if (c + 1 < n && best.is_full()) lower_threshold(i, best);
    }
  }

  static bool is_lower(const Candidate& a, const Candidate& b) { return a.value < b.value; }

  // Drops the candidates above the k-th value and its slack; scores them where many are left.
  void make_room(int64_t i) {
    Candidate* const list = this->list(i);
    const int32_t n = space_.n_candidates[i];
    if (n >= search_.k) {
      Candidate* const kth = list + search_.k - 1;
      std::nth_element(list, kth, list + n, is_lower);
      space_.thresholds[i] = std::min(space_.thresholds[i], kth->value + space_.slacks[i]);
    }
    space_.n_candidates[i] = drop_ruled_out(i, n);
    if (space_.n_candidates[i] + 2 * kMaxColumns <= work_.capacity) return;
    settle(i);
    if (best(i).is_full()) lower_threshold(i, best(i));
  }

  void finish(int64_t i) {
    if (space_.squares[i] != space_.squares[i]) return;
    if (is_filtered(i)) return settle(i);
    Best best = this->best(i);
    for (int64_t j = 0; j < block_.size(); ++j) insert(i, j, &best);
  }

  Work& work_;
  const Search& search_;
  const Block& block_;
  ScoreKernel sqdist_, dot_;
  Workspace space_;
  int64_t first_, n_, padded_, n_scored_ = 0;
};

int64_t rows_per_task(const Search& search, const Kernels& kernels, int64_t capacity) {
  const int64_t row_bytes = leading(search.d) * 4 + capacity * sizeof(Candidate) / 4;
  const int64_t fair = search.x.n / (4 * cpu::num_threads()) + 1;
  const int64_t rows = std::min({kTaskRows, kTaskBytes / row_bytes, fair});
  return round_up_to(std::max<int64_t>(rows, 1), kernels.strip);
}

void run_block(const Search& search, const Kernels& kernels, const Block& block, Problem* problem) {
  const auto capacity = static_cast<int32_t>(2 * std::min(search.k, search.y.n) + kSpareCandidates);
  const double pairs = static_cast<double>(search.x.n) * static_cast<double>(block.size());
  const bool is_small = pairs * static_cast<double>(search.d + 1) < kSmallProducts;
  const int64_t per_task = rows_per_task(search, kernels, capacity);
  const int64_t n_threads = is_small ? 1 : cpu::num_threads();
  Work work{search, kernels, block, per_task, capacity, n_threads, {}, {-1}};
  Guarded rows([&work](int64_t i) { Task(&work, i).run(); });
  rows.run((search.x.n + per_task - 1) / per_task, is_small);
  problem->x_row = work.nan_row;
}

}  // namespace

Problem nearest(const Search& search) {
  const Kernels& kernels = active_kernels();
  const int64_t row_bytes = std::max<int64_t>(search.d, 1) * sizeof(float);
  const int64_t columns =
      round_up_to(std::max<int64_t>(kBlockBytes / row_bytes, kMaxColumns), kernels.columns);
  Problem problem;
  for (int64_t j = 0; j < search.y.n && problem.x_row < 0; j += columns) {
    const Block block(search, kernels, j, std::min(j + columns, search.y.n));
    problem.y_row = block.nan_row();
    if (problem.y_row >= 0) return problem;
    run_block(search, kernels, block, &problem);
  }
  return problem;
}

int64_t n_scored() { return scored_pairs; }

}  // namespace pyoptim::coreset
