// The phases of a projecting update that know no rule: dealing tensors, the check of their rows and
// what follows from sums.
#include "cuda/phases.hpp"

namespace pyoptim::gpu {
namespace {

constexpr int kHypers = 8;  // blocks of hyper-parameters in one launch
constexpr int kCheckSums = 3;
static_assert(kGradWeight < kCheckSums && kGradGrad < kCheckSums && kWeightWeight < kCheckSums,
              "the check knows no direction");
// A row that is not at right angles is found among the first few of most tensors without a channel
// view: one in 12 passes by chance at the default delta. deal looks at up to kFirstRows of them,
// of kFirstElements together, so that the check finds little to do in such tensors.
constexpr int64_t kFirstRows = 8, kFirstElements = 4 * kChunk;

struct DealtRow {
  void *param, *grad, *state[2];
  const void* source;
  int64_t numel, n_rows, inner;
  int32_t first_tile, hyper;
};

// Tensors of one launch, by value.
struct DealTable {
  static constexpr int kHeader =
      sizeof(HyperBlock) * kHypers + sizeof(GradFactors) + sizeof(Phases) + 64;
  static constexpr int kRows = (kParameterBytes - kHeader) / static_cast<int>(sizeof(DealtRow));

  HyperBlock hypers[kHypers];
  const HyperBlock* live_hypers;  // device memory; read in place of hypers unless null
  GradFactors factors;
  Phases phases;
  TestFields fields;
  int32_t first_tensor, n_rows;
  DealtRow rows[kRows];
};
static_assert(sizeof(DealTable) <= kParameterBytes, "the table exceeds a kernel's parameters");

__device__ __forceinline__ bool is_off(const Phases& phases) {
  return phases.found_inf && *phases.found_inf != 0;
}

// -- the check ------------------------------------------------------------------------------------

// Whether a block has found that the tensor has no channel view, as far as this thread can know.
__device__ __forceinline__ bool has_failed(const Tensor& t) {
  return *const_cast<const volatile int32_t*>(&t.has_failed) != 0;
}

__device__ __forceinline__ void fail(Tensor& t) {
  *const_cast<volatile int32_t*>(&t.has_failed) = 1;  // by many, always the same
}

template <class P>
struct Checker {
  const P *param, *grad;

  template <int W>
  struct Slice {
    Pack<P, W> param, grad;
  };

  __device__ __forceinline__ explicit Checker(const Tensor& t)
      : param(static_cast<const P*>(t.source)), grad(static_cast<const P*>(t.grad)) {}

  template <int W>
  __device__ __forceinline__ bool is_aligned(int64_t first) const {
    return gpu::is_aligned<P, W>(param + first) && gpu::is_aligned<P, W>(grad + first);
  }

  template <int W>
  __device__ __forceinline__ void read(int64_t at, Slice<W>& slice) const {
    slice = {*reinterpret_cast<const Pack<P, W>*>(param + at),
             *reinterpret_cast<const Pack<P, W>*>(grad + at)};
  }
  template <int W>
  __device__ __forceinline__ void read_one(int64_t at, int k, Slice<W>& slice) const {
    slice.param.x[k] = param[at];
    slice.grad.x[k] = grad[at];
  }

  template <int W>
  __device__ __forceinline__ void write(const Slice<W>&, int64_t) const {}
  template <int W>
  __device__ __forceinline__ void write_one(const Slice<W>&, int, int64_t) const {}

  template <int W, int kN>
  __device__ __forceinline__ void apply(const Slice<W>& slice,
                                        int n,
                                        double (&lanes)[kCheckSums][kN],
                                        int first) const {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k >= n) break;
      const double w = static_cast<double>(load(slice.param.x[k]));
      const double g = static_cast<double>(load(slice.grad.x[k]));
      lanes[kGradWeight][first + k] += g * w;
      lanes[kGradGrad][first + k] += g * g;
      lanes[kWeightWeight][first + k] += w * w;
    }
  }
};

// Rows [begin, end) of a tensor with short rows, until one fails.
template <class P>
__device__ __forceinline__ void check_by_groups(Tensor& t,
                                                const Items& items,
                                                int64_t begin,
                                                int64_t end) {
  const Checker<P> checker(t);
  const Group group(items.row_size);
  const int n_groups = kThreads / group.size;
  for (int64_t first = begin; first < end; first += n_groups) {
    const int64_t row = first + threadIdx.x / group.size;
    Place place(items, row < end ? row : begin);
    if (row >= end) place.size = 0;
    double sums[kCheckSums];
    sum_by_group(checker, place, group, sums);
    const bool fails = row < end && !is_orthogonal(t.test, sums, items.row_size);
    if (fails && group.thread == 0) fail(t);
    if (__any_sync(0xffffffffu, fails || has_failed(t))) return;
  }
}

// The same for longer rows, of up to a chunk.
template <class P>
__device__ __forceinline__ void check_by_block(
    Tensor& t, const Items& items, int64_t begin, int64_t end, double* shared) {
  PYOPTIM_SHARED(int, is_over, 1);
  const Checker<P> checker(t);
  for (int64_t row = begin; row < end; ++row) {
    double sums[kCheckSums];
    if (threadIdx.x == 0) *is_over = has_failed(t);
    sum_by_block(checker, Place(items, row), shared, sums);
    const bool fails = !is_orthogonal(t.test, sums, items.row_size);
    if (fails && threadIdx.x == 0) fail(t);
    if (fails || *is_over) return;
    __syncthreads();  // before thread 0 writes is_over again
  }
}

// One row of a few chunks, by one block.
template <class P>
__device__ __forceinline__ bool is_long_row_orthogonal(const Tensor& t,
                                                       const Items& items,
                                                       int64_t row,
                                                       double* shared) {
  constexpr int kMost = kFirstElements / kChunk;
  const Checker<P> checker(t);
  double sums[kCheckSums], chunks[kCheckSums][kMost] = {};
#pragma unroll
  for (int c = 0; c < kMost; ++c) {
    if (c >= items.n_chunks) break;
    const bool is_strided = items.inner < items.row_size;
    sum_by_block(checker,
                 Place(items, is_strided ? c * items.n_rows + row : row * items.n_chunks + c),
                 shared,
                 sums);
#pragma unroll
    for (int s = 0; s < kCheckSums; ++s) chunks[s][c] = sums[s];
  }
#pragma unroll
  for (int s = 0; s < kCheckSums; ++s) {
    sums[s] = combine_lanes<Kind::squares, kMost>(chunks[s]);
  }
  return is_orthogonal(t.test, sums, items.row_size);
}

// Chunks of long rows: their sums, for fold_long_rows.
template <class P>
__device__ __forceinline__ void sum_items(
    const Tensor& t, const Items& items, int64_t begin, int64_t end, double* shared) {
  const Checker<P> checker(t);
  for (int64_t item = begin; item < end; ++item) {
    const Place place(items, item);
    double sums[kCheckSums];
    sum_by_block(checker, place, shared, sums);
    if (threadIdx.x > 0) continue;
    const int64_t chunk = place.is_contiguous ? item % items.n_chunks : item / items.n_rows;
    double* const to = t.sums + (place.row * items.n_chunks + chunk) * kCheckSums;
    for (int s = 0; s < kCheckSums; ++s) to[s] = sums[s];
  }
}

template <class P>
__device__ __forceinline__ void check_first_rows(Tensor& t, double* shared) {
  const Items items(t);
  int64_t n = t.n_tiles == 1 ? t.n_rows : kFirstElements / items.row_size;
  if (t.n_tiles > 1 && n > kFirstRows) n = kFirstRows;
  if (n > t.n_rows) n = t.n_rows;
  if (items.are_for_groups()) return check_by_groups<P>(t, items, 0, n);
  if (!items.are_long()) return check_by_block<P>(t, items, 0, n, shared);
  for (int64_t row = 0; row < n; ++row) {
    if (is_long_row_orthogonal<P>(t, items, row, shared)) continue;
    if (threadIdx.x == 0) fail(t);
    return;
  }
}

// -- kernels --------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void deal_hyper(const DealTable& table, int row, Tensor* to) {
  const GradFactors& f = table.factors;
  const int index = table.rows[row].hyper;
  to->hyper = table.live_hypers ? table.live_hypers[index] : table.hypers[index];
  T* const fields = reinterpret_cast<T*>(to->hyper.bytes);
  // As the host does for the CPU engine: every rule multiplies the gradient by its sign first.
  fields[0] *= static_cast<T>(f.clip_at ? *f.clip_at : f.clip);
  to->test.sign = static_cast<double>(fields[0]);
  to->test.eps = static_cast<double>(fields[table.fields.eps]);
  to->test.delta = static_cast<double>(fields[table.fields.delta]);
}

__device__ __forceinline__ void deal_row(const DealTable& table, const DealtRow& from, Tensor* to) {
  to->param = from.param;
  to->grad = from.grad;
  to->state[0] = from.state[0];
  to->state[1] = from.state[1];
  to->source = from.source;
  to->numel = from.numel;
  to->n_rows = from.n_rows;
  to->inner = from.inner;
  to->sums = table.phases.sums + static_cast<int64_t>(from.first_tile) * kTileSums;
  to->first_tile = from.first_tile;
  to->n_tiles = static_cast<int32_t>((from.numel + kChunk - 1) / kChunk);
  to->has_failed = from.n_rows < 2;
}

// One block per tensor.
template <class P>
__global__ void __launch_bounds__(kThreads) deal_kernel(const DealTable __grid_constant__ table) {
  PYOPTIM_SHARED(double, shared, kCheckSums*(kLanes + 1));
  if (is_off(table.phases)) return;
  const int row = static_cast<int>(blockIdx.x), tensor = table.first_tensor + row;
  const DealtRow& from = table.rows[row];
  Tensor& t = table.phases.tensors[tensor];
  if (threadIdx.x == 0) {
    deal_row(table, from, &t);
    deal_hyper<typename Compute<P>::type>(table, row, &t);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < t.n_tiles; i += kThreads) {
    table.phases.tensor_of[from.first_tile + i] = tensor;
  }
  if (from.n_rows >= 2) check_first_rows<P>(t, shared);
}

template <class P>
__global__ void __launch_bounds__(kThreads) check_kernel(const Phases phases) {
  PYOPTIM_SHARED(double, shared, kCheckSums*(kLanes + 1));
  if (is_off(phases)) return;
  Tensor& t = phases.tensors[phases.tensor_of[blockIdx.x]];
  // Uniform: while this kernel runs a tensor may fail, but a block leaves at the places above.
  PYOPTIM_SHARED(int, is_over, 1);
  if (threadIdx.x == 0) *is_over = t.n_tiles == 1 || has_failed(t);
  __syncthreads();
  if (*is_over) return;
  const Items items(t);
  const int64_t tile = static_cast<int32_t>(blockIdx.x) - t.first_tile;
  const int64_t begin = items.first(tile, t.n_tiles), end = items.first(tile + 1, t.n_tiles);
  if (items.are_for_groups()) return check_by_groups<P>(t, items, begin, end);
  if (items.are_long()) return sum_items<P>(t, items, begin, end, shared);
  check_by_block<P>(t, items, begin, end, shared);
}

// The sums of kN numbers each of n chunks, which lie one after the other.
template <int kN>
__device__ __forceinline__ void fold(const double* from,
                                     int64_t n,
                                     double* shared,
                                     double (&sums)[kN]) {
  double lanes[kN][kLanesPerThread] = {};
  for (int64_t i = threadIdx.x * kLanesPerThread; i < n; i += kLanes) {
#pragma unroll
    for (int k = 0; k < kLanesPerThread; ++k) {
      if (i + k >= n) break;
#pragma unroll
      for (int s = 0; s < kN; ++s) lanes[s][k] += from[(i + k) * kN + s];
    }
  }
  combine_block(lanes, shared, sums);
}

// The long rows of a tile, of which there are none or one.
struct LongRows {
  int64_t begin, end, n_chunks, row_size;

  __device__ __forceinline__ LongRows(const Tensor& t, int64_t tile)
      : begin(0), end(0), n_chunks(0), row_size(t.n_rows ? t.numel / t.n_rows : 0) {
    n_chunks = (row_size + kChunk - 1) / kChunk;
    if (n_chunks < 2) return;
    begin = tile * t.n_rows / t.n_tiles;
    end = (tile + 1) * t.n_rows / t.n_tiles;
  }
};

__global__ void __launch_bounds__(kThreads) check_long_rows_kernel(const Phases phases) {
  PYOPTIM_SHARED(double, shared, kCheckSums*(kLanes + 1));
  PYOPTIM_SHARED(int, is_over, 1);
  if (is_off(phases)) return;
  Tensor& t = phases.tensors[phases.tensor_of[blockIdx.x]];
  if (threadIdx.x == 0) *is_over = has_failed(t);
  __syncthreads();
  if (*is_over) return;
  const LongRows rows(t, static_cast<int32_t>(blockIdx.x) - t.first_tile);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    double sums[kCheckSums];
    fold(t.sums + row * rows.n_chunks * kCheckSums, rows.n_chunks, shared, sums);
    if (threadIdx.x == 0 && !is_orthogonal(t.test, sums, rows.row_size)) fail(t);
  }
}

__global__ void __launch_bounds__(kThreads) fold_long_rows_kernel(const Phases phases) {
  constexpr int kN = 2;  // w.w and w.u
  PYOPTIM_SHARED(double, shared, kN*(kLanes + 1));
  if (is_off(phases)) return;
  const Tensor& t = phases.tensors[phases.tensor_of[blockIdx.x]];
  if (t.has_failed) return;
  const LongRows rows(t, static_cast<int32_t>(blockIdx.x) - t.first_tile);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    double both[kN];
    fold(t.sums + row * rows.n_chunks * kN, rows.n_chunks, shared, both);
    double sums[kSums] = {};
    sums[kWeightWeight] = both[0];
    sums[kDirectionWeight] = both[1];
    if (threadIdx.x == 0) {
      t.sums[static_cast<int64_t>(t.n_tiles) * kItemSums + row] = radial_part(t.test, sums);
    }
  }
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads) decide_kernel(const Phases phases) {
  PYOPTIM_SHARED(double, shared, kSums*(kLanes + 1));
  if (is_off(phases)) return;
  Tensor& t = phases.tensors[blockIdx.x];
  if (t.n_rows == 0 || !t.has_failed) return;
  double sums[kSums];
  fold(t.sums, t.n_tiles, shared, sums);
  if (threadIdx.x > 0) return;
  for (int s = 0; s < kSums; ++s) t.layer[s] = sums[s];
  t.is_layer = is_orthogonal(t.test, sums, t.numel);
}

// -- host -----------------------------------------------------------------------------------------

// Where the parts of a workspace begin.
struct Layout {
  int64_t n_tensors = 0, n_tiles = 0;

  explicit Layout(const Update& update) {
    for (int64_t r = 0; r < update.n_rows; ++r) {
      n_tensors += update.rows[r]->numel > 0;
      n_tiles += n_tiles_of(*update.rows[r]);
    }
  }
  int64_t sums() const { return n_tensors * static_cast<int64_t>(sizeof(Tensor)); }
  int64_t tensor_of() const {
    return sums() + n_tiles * kTileSums * static_cast<int64_t>(sizeof(double));
  }
  int64_t end() const { return tensor_of() + n_tiles * static_cast<int64_t>(sizeof(int32_t)); }
};

Phases phases_of(const Update& update) {
  const Layout layout(update);
  char* const memory = static_cast<char*>(update.workspace);
  Phases phases = {};
  phases.tensors = reinterpret_cast<Tensor*>(memory);
  phases.sums = reinterpret_cast<double*>(memory + layout.sums());
  phases.tensor_of = reinterpret_cast<int32_t*>(memory + layout.tensor_of());
  phases.found_inf = update.factors.found_inf;
  phases.n_tensors = static_cast<int32_t>(layout.n_tensors);
  phases.n_tiles = static_cast<int32_t>(layout.n_tiles);
  for (int64_t r = 0; r < update.n_rows; ++r) {
    const TableRow& row = *update.rows[r];
    if (row.numel == 0 || row.n_rows == 0) continue;
    phases.has_rows = true;
    phases.has_more_rows |= row.n_rows > 1 && n_tiles_of(row) > 1;
    phases.has_long_rows |= row.n_rows > 1 && row.numel / row.n_rows > kChunk;
  }
  return phases;
}

// Fills tables row by row and launches the kernel whenever one is full.
class Dealer {
 public:
  using Kernel = void (*)(const DealTable __grid_constant__);

  Dealer(Kernel kernel,
         const Update& update,
         const Phases& phases,
         TestFields fields,
         cudaStream_t stream)
      : kernel_(kernel), update_(update), stream_(stream) {
    table_.live_hypers = update.live_hypers;
    table_.factors = update.factors;
    table_.phases = phases;
    table_.fields = fields;
    table_.first_tensor = 0;
    table_.n_rows = 0;
  }

  cudaError_t run() {
    cudaError_t status = cudaSuccess;
    for (int64_t r = 0; r < update_.n_rows && status == cudaSuccess; ++r) {
      if (update_.rows[r]->numel > 0) status = add(r);
    }
    return status == cudaSuccess ? flush() : status;
  }

 private:
  cudaError_t add(int64_t r) {
    int hyper = find_hyper(r);
    if (hyper < 0 || table_.n_rows == kCapacity) {
      if (const cudaError_t status = flush(); status != cudaSuccess) return status;
      hyper = find_hyper(r);
    }
    const TableRow& row = *update_.rows[r];
    table_.rows[table_.n_rows++] = {row.param,
                                    row.grad,
                                    {row.state[0], row.state[1]},
                                    row.source,
                                    row.numel,
                                    row.n_rows,
                                    row.inner,
                                    n_tiles_,
                                    hyper};
    n_tiles_ += static_cast<int32_t>(n_tiles_of(row));
    return cudaSuccess;
  }

  int find_hyper(int64_t r) {
    if (update_.live_hypers) return static_cast<int>(r);
    const int32_t index = update_.rows[r]->hyper;
    return slots_.find(index, [&](int slot) { table_.hypers[slot] = update_.hypers[index]; });
  }

  cudaError_t flush() {
    if (table_.n_rows == 0) return cudaSuccess;
    const cudaError_t status = launch(kernel_, table_.n_rows, stream_, table_);
    table_.first_tensor += table_.n_rows;
    table_.n_rows = 0;
    slots_.clear();
    return status;
  }

  const Kernel kernel_;
  const Update& update_;
  const cudaStream_t stream_;
  const int kCapacity = choose_rows(DealTable::kRows);
  int32_t n_tiles_ = 0;
  Slots<kHypers> slots_;
  DealTable table_;
};

template <class P>
cudaError_t deal_as(const Update& update,
                    TestFields fields,
                    const Phases& phases,
                    cudaStream_t stream) {
  cudaError_t status = Dealer(deal_kernel<P>, update, phases, fields, stream).run();
  if (status == cudaSuccess && phases.has_more_rows) {
    status = launch(check_kernel<P>, phases.n_tiles, stream, phases);
  }
  if (status == cudaSuccess && phases.has_long_rows) {
    status = launch(check_long_rows_kernel, phases.n_tiles, stream, phases);
  }
  return status;
}

}  // namespace

int64_t workspace_bytes(const Update& update) { return Layout(update).end(); }

cudaError_t deal(const Update& update, TestFields fields, Phases* phases, cudaStream_t stream) {
  *phases = phases_of(update);
  if (phases->n_tensors == 0) return cudaSuccess;
  switch (update.dtypes) {
    case DTypeSet::f64:
      return deal_as<double>(update, fields, *phases, stream);
    case DTypeSet::f32:
      return deal_as<float>(update, fields, *phases, stream);
    case DTypeSet::bf16:
    case DTypeSet::bf16_state32:
      return deal_as<Bf16>(update, fields, *phases, stream);
    case DTypeSet::f16:
    case DTypeSet::f16_state32:
      return deal_as<F16>(update, fields, *phases, stream);
    case DTypeSet::bf16_master:
    case DTypeSet::f16_master:
    case DTypeSet::bf16_master_state32:
    case DTypeSet::f16_master_state32:
    case DTypeSet::count:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t fold_long_rows(const Phases& phases, cudaStream_t stream) {
  return launch(fold_long_rows_kernel, phases.n_tiles, stream, phases);
}

cudaError_t decide(const Phases& phases, cudaStream_t stream) {
  return launch(decide_kernel, phases.n_tensors, stream, phases);
}

}  // namespace pyoptim::gpu
