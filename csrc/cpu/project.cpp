// Cuts the steps of the rules that project into tasks: a tensor goes through its phases while it is
// in the cache, or, where it is large, all such tensors go through each phase together.
#include "cpu/project.hpp"

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>

#include "cpu/engine.hpp"
#include "reduce/order.hpp"

namespace pyoptim::cpu {
namespace {

using reduce::kChunk;

// A tensor of up to so many elements is still in the cache when its next phase reads it.
constexpr int64_t kWholeElements = 1024 * 1024;

Elements moved(const Elements& from, const ProjectKernels& kernels, int64_t n) {
  Elements to = from;
  to.param = static_cast<char*>(from.param) + n * kernels.param_size;
  to.source = static_cast<const char*>(from.source) + n * kernels.param_size;
  to.grad = static_cast<char*>(from.grad) + n * kernels.param_size;
  for (int k = 0; k < kernels.n_states && from.state[k]; ++k) {
    to.state[k] = static_cast<char*>(from.state[k]) + n * kernels.state_size;
  }
  return to;
}

// Folds the sums of chunks, [n_chunks][kSums].
void fold_partials(const double* partials, int64_t n_chunks, double* sums) {
  if (n_chunks == 1) return static_cast<void>(std::copy_n(partials, kSums, sums));
  const FoldKernel fold =
      active_kernels().fold[static_cast<int>(Fold::values)][static_cast<int>(DType::f64)];
  std::vector<double> column(n_chunks);
  for (int k = 0; k < kSums; ++k) {
    for (int64_t c = 0; c < n_chunks; ++c) column[c] = partials[kSums * c + k];
    sums[k] = fold(column.data(), nullptr, 0.0, n_chunks);
  }
}

// The sums over `size` elements: visit(begin, n, sums) gives those of a chunk.
template <class Visit>
void sum_chunks(int64_t size, double* sums, const Visit& visit) {
  if (size <= kChunk) return visit(0, size, sums);
  std::vector<double> partials(kSums * reduce::n_chunks(size));
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    visit(begin, std::min(kChunk, size - begin), &partials[begin / kChunk * kSums]);
  }
  fold_partials(partials.data(), reduce::n_chunks(size), sums);
}

// Rows of dimension 0, each in one piece: where they are, or copied out of the tensor and back.
class Rows {
 public:
  explicit Rows(const TableRow& row)
      : row_(row), size_(row.numel / row.n_rows), is_copied_(row.inner != size_) {}

  // Calls visit(elements of a row) -> whether to go on, for rows [first, last). Only params and
  // grads unless `updates`.
  template <class Visit>
  void for_each(int64_t first, int64_t last, bool updates, const Visit& visit) {
    // Together the rows of a tile use whole cache lines.
    const int64_t tile = is_copied_ ? 64 / row_.project->param_size : last - first;
    bool goes_on = true;
    for (int64_t begin = first; goes_on && begin < last; begin += tile) {
      const int64_t n = std::min(tile, last - begin);
      const Elements at =
          is_copied_ ? copied(begin, n, updates) : moved(row_, *row_.project, begin * size_);
      for (int64_t r = 0; goes_on && r < n; ++r)
        goes_on = visit(moved(at, *row_.project, r * size_));
      if (is_copied_ && updates) copy_back(begin, n);
    }
  }

 private:
  Elements copied(int64_t first, int64_t n, bool with_states) {
    const ProjectKernels& kernels = *row_.project;
    Elements to = {};
    // What is updated in the tile goes back to the parameter, wherever it was read.
    to.param = copy_out(&params_, row_.source, kernels.param_size, first, n);
    to.source = to.param;
    to.grad = copy_out(&grads_, row_.grad, kernels.param_size, first, n);
    for (int k = 0; with_states && k < kernels.n_states; ++k) {
      to.state[k] = copy_out(&states_[k], row_.state[k], kernels.state_size, first, n);
    }
    return to;
  }

  void copy_back(int64_t first, int64_t n) {
    const ProjectKernels& kernels = *row_.project;
    copy(params_.data(), row_.param, kernels.param_size, first, n, true);
    for (int k = 0; k < kernels.n_states; ++k) {
      copy(states_[k].data(), row_.state[k], kernels.state_size, first, n, true);
    }
  }

  void* copy_out(
      std::vector<char>* to, const void* from, int width, int64_t first, int64_t n) const {
    to->resize(n * size_ * width);
    copy(to->data(), const_cast<void*>(from), width, first, n, false);
    return to->data();
  }

  void copy(void* tile, void* tensor, int width, int64_t first, int64_t n, bool is_back) const {
    const auto copy_words = width == 8   ? &Rows::copy_as<uint64_t>
                            : width == 4 ? &Rows::copy_as<uint32_t>
                                         : &Rows::copy_as<uint16_t>;
    (this->*copy_words)(tile, tensor, first, n, is_back);
  }

  template <class Word>
  void copy_as(void* tile, void* tensor, int64_t first, int64_t n, bool is_back) const {
    for (int64_t block = 0; block < size_; block += row_.inner) {
      Word* const blocks = static_cast<Word*>(tensor) + block * row_.n_rows + first * row_.inner;
      for (int64_t r = 0; r < n; ++r) {
        Word* const in_tile = static_cast<Word*>(tile) + r * size_ + block;
        Word* const in_tensor = blocks + r * row_.inner;
        for (int64_t i = 0; i < row_.inner; ++i) {
          (is_back ? in_tensor : in_tile)[i] = (is_back ? in_tile : in_tensor)[i];
        }
      }
    }
  }

  const TableRow& row_;
  const int64_t size_;
  const bool is_copied_;
  std::vector<char> params_, grads_, states_[kMaxStates];
};

// One tensor on its way through the phases of a step.
class Tensor {
 public:
  Tensor(const TableRow& row, const HyperBlock& hyper, double* partials)  // [n_chunks][kSums]
      : row_(row),
        kernels_(*row.project),
        hyper_(&hyper),
        is_channel_(row.n_rows > 1),
        is_deferred_(kernels_.is_deferred(hyper_)),
        partials_(partials) {}

  int64_t n_rows() const { return row_.n_rows; }
  int64_t row_size() const { return row_.numel / row_.n_rows; }
  int64_t n_chunks() const { return reduce::n_chunks(row_.numel); }
  bool is_channel() const { return is_channel_.load(std::memory_order_relaxed); }

  // Phase 0: ends at the first row, of any task, that is not at right angles to its gradient.
  void check_rows(int64_t first, int64_t last) {
    Rows(row_).for_each(first, last, false, [&](const Elements& at) {
      if (!is_orthogonal(at, row_size())) is_channel_ = false;
      return is_channel();
    });
  }

  // Phase 1 where every row was. The directions of a row that is one chunk are still there when its
  // sums are known.
  void project_rows(int64_t first, int64_t last) {
    const int64_t n_kept = std::min(row_size(), kChunk);
    const std::unique_ptr<char[]> directions(new char[n_kept * kernels_.direction_size]);
    const bool are_kept = row_size() <= kChunk;
    Rows(row_).for_each(first, last, true, [&](const Elements& at) {
      double sums[kSums];
      sum_chunks(row_size(), sums, [&](int64_t begin, int64_t n, double* of_chunk) {
        kernels_.average(moved(at, kernels_, begin), hyper_, n, directions.get(), of_chunk);
      });
      kernels_.write(at, hyper_, row_size(), are_kept ? directions.get() : nullptr, sums);
      return true;
    });
  }

  // Phase 1 elsewhere, over chunks; `next` is wanted after the last.
  void sweep_chunks(int64_t first, int64_t last, const Elements* next) {
    for (int64_t c = first; c < last; ++c) {
      const Elements following = chunk(c + 1);
      kernels_.sweep(chunk(c),
                     hyper_,
                     size_of(c),
                     partials_ + kSums * c,
                     c + 1 < n_chunks() ? &following : next);
    }
  }

  // Phase 2: says whether chunks are to be finished.
  bool decide() {
    fold_partials(partials_, n_chunks(), sums_);
    is_layer_ = kernels_.is_orthogonal(hyper_, sums_, row_.numel);
    return is_layer_ || is_deferred_;
  }

  void finish_chunks(int64_t first, int64_t last) const {
    const int64_t end = std::min(last * kChunk, row_.numel), n = end - first * kChunk;
    if (is_deferred_) {
      return kernels_.write(chunk(first), hyper_, n, nullptr, is_layer_ ? sums_ : nullptr);
    }
    kernels_.repair(chunk(first), hyper_, n, sums_);
  }

  // All phases.
  void update(const TableRow* next) {
    if (is_channel()) check_rows(0, row_.n_rows);
    if (is_channel()) return project_rows(0, row_.n_rows);
    sweep_chunks(0, n_chunks(), next);
    if (decide()) finish_chunks(0, n_chunks());
  }

 private:
  // Of a row, by its sums in float64, or where these are not needed to tell, by those of blocks.
  bool is_orthogonal(const Elements& at, int64_t size) const {
    double sums[kSums];
    const auto add_up = [&](auto check) {
      sum_chunks(size, sums, [&](int64_t begin, int64_t n, double* of_chunk) {
        check(moved(at, kernels_, begin), n, of_chunk);
      });
    };
    if (kernels_.check_shortly) {
      add_up(kernels_.check_shortly);
      const Angle angle = kernels_.judge(hyper_, sums, size);
      if (angle != Angle::unknown) return angle == Angle::right;
    }
    add_up(kernels_.check);
    return kernels_.is_orthogonal(hyper_, sums, size);
  }

  Elements chunk(int64_t c) const { return moved(row_, kernels_, c * kChunk); }
  int64_t size_of(int64_t c) const { return std::min(kChunk, row_.numel - c * kChunk); }

  const TableRow& row_;
  const ProjectKernels& kernels_;
  const void* const hyper_;
  std::atomic<bool> is_channel_;
  const bool is_deferred_;
  bool is_layer_ = false;
  double* const partials_;
  double sums_[kSums];
};

// Units [begin, end) of one tensor: rows, chunks or elements, `size` elements each.
struct Piece {
  int64_t tensor;
  int64_t begin, end;
  int64_t size;
};

// Runs visit(piece) for all of them, about kTaskElements a task.
template <class Visit>
void run_pieces(const std::vector<Piece>& pieces, const Visit& visit) {
  struct Work {
    const std::vector<Piece>& pieces;
    const Visit& visit;
    std::vector<size_t> cuts;  // task i runs from cuts[i] to cuts[i + 1]
  };
  Work work{pieces, visit, {0}};
  int64_t total = 0, filled = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int64_t numel = (pieces[i].end - pieces[i].begin) * pieces[i].size;
    total += numel;
    filled += numel;
    if (filled < kTaskElements && i + 1 < pieces.size()) continue;
    work.cuts.push_back(i + 1);
    filled = 0;
  }
  const auto run = [](int64_t task, void* context) {
    const Work& w = *static_cast<const Work*>(context);
    for (size_t i = w.cuts[task]; i < w.cuts[task + 1]; ++i) w.visit(w.pieces[i]);
  };
  run_tasks(static_cast<int64_t>(work.cuts.size()) - 1, total <= kSerialElements, run, &work);
}

// Adds `units` of a tensor, of `size` elements each, in pieces of about kTaskElements.
void cut(int64_t tensor, int64_t units, int64_t size, std::vector<Piece>* pieces) {
  const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, size));
  for (int64_t begin = 0; begin < units; begin += step) {
    pieces->push_back({tensor, begin, std::min(units, begin + step), size});
  }
}

class Step {
 public:
  Step(const std::vector<const TableRow*>& rows, const std::vector<HyperBlock>& hypers)
      : rows_(rows), hypers_(hypers) {
    int64_t total = 0;
    for (const TableRow* row : rows) total += row->numel;
    // One thread alone with a tensor of more than its share would keep the others waiting.
    whole_ = std::max(kTaskElements, std::min(kWholeElements, total / num_threads()));
  }

  void unscale(double inv_scale) {
    std::vector<Piece> pieces;
    for (int64_t t = 0; t < n(); ++t) cut(t, rows_[t]->numel, 1, &pieces);
    run_pieces(pieces, [&](const Piece& piece) {
      rows_[piece.tensor]->unscale(rows_[piece.tensor]->grad, inv_scale, piece.begin, piece.end);
    });
  }

  void run() {
    std::vector<Piece> pieces;
    pieces.reserve(n());
    for (int64_t t = 0; t < n(); ++t) {
      if (!is_projecting(t)) {
        cut(t, rows_[t]->numel, 1, &pieces);
      } else if (rows_[t]->numel > whole_) {
        large_.emplace_back(t, *rows_[t], hyper(t));
      } else {
        pieces.push_back({t, 0, 1, rows_[t]->numel});
      }
    }
    run_pieces(pieces, [&](const Piece& piece) { update(piece); });
    if (large_.empty()) return;
    check_large();
    sweep_large();
    finish_large();
  }

 private:
  // A tensor whose phases are not in one task.
  struct Large {
    int64_t index;
    std::vector<double> partials;
    Tensor tensor;

    Large(int64_t t, const TableRow& row, const HyperBlock& hyper)
        : index(t),
          partials(kSums * reduce::n_chunks(row.numel)),
          tensor(row, hyper, partials.data()) {}
  };

  int64_t n() const { return static_cast<int64_t>(rows_.size()); }
  bool is_projecting(int64_t t) const { return rows_[t]->n_rows > 0 && rows_[t]->numel > 0; }
  const HyperBlock& hyper(int64_t t) const { return hypers_[rows_[t]->hyper]; }
  const TableRow* next(int64_t t) const { return t + 1 < n() ? rows_[t + 1] : nullptr; }

  void update(const Piece& piece) const {
    const int64_t t = piece.tensor;
    const TableRow& row = *rows_[t];
    if (!is_projecting(t)) return row.update(row, &hyper(t), piece.begin, piece.end, next(t));
    double partials[kSums * (kWholeElements / kChunk)];
    Tensor(row, hyper(t), partials).update(next(t));
  }

  void check_large() {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < n_large(); ++i) {
      if (!tensor(i).is_channel()) continue;
      cut(i, tensor(i).n_rows(), tensor(i).row_size(), &pieces);
    }
    run_pieces(pieces, [&](const Piece& piece) {
      if (tensor(piece.tensor).is_channel())
        tensor(piece.tensor).check_rows(piece.begin, piece.end);
    });
  }

  void sweep_large() {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < n_large(); ++i) {
      if (tensor(i).is_channel()) {
        cut(i, tensor(i).n_rows(), tensor(i).row_size(), &pieces);
      } else {
        cut(i, tensor(i).n_chunks(), kChunk, &pieces);
      }
    }
    run_pieces(pieces, [&](const Piece& piece) {
      Tensor& t = tensor(piece.tensor);
      if (t.is_channel()) return t.project_rows(piece.begin, piece.end);
      t.sweep_chunks(piece.begin, piece.end, next(large_[piece.tensor].index));
    });
  }

  void finish_large() {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < n_large(); ++i) {
      if (tensor(i).is_channel() || !tensor(i).decide()) continue;
      cut(i, tensor(i).n_chunks(), kChunk, &pieces);
    }
    run_pieces(pieces, [&](const Piece& piece) {
      tensor(piece.tensor).finish_chunks(piece.begin, piece.end);
    });
  }

  int64_t n_large() const { return static_cast<int64_t>(large_.size()); }
  Tensor& tensor(int64_t i) { return large_[i].tensor; }

  const std::vector<const TableRow*>& rows_;
  const std::vector<HyperBlock>& hypers_;
  std::deque<Large> large_;
  int64_t whole_;
};

}  // namespace

void project_rows(const std::vector<const TableRow*>& rows,
                  const std::vector<HyperBlock>& hypers,
                  double inv_scale) {
  Step step(rows, hypers);
  if (inv_scale != 1.0) step.unscale(inv_scale);
  step.run();
}

}  // namespace pyoptim::cpu
