// The CUDA engine's border: plain structs and one table of functions, in a library that is loaded
// at run time. No type of CUDA, torch or Python. The emulator builds the same table over the same
// kernels for memory of the CPU.
#pragma once

#include <cstdint>

#include "core/table.hpp"
#include "reduce/order.hpp"
#include "rules/all.hpp"

namespace pyoptim::gpu {

constexpr int kApiVersion = 3;

// Where work goes. Every call is asynchronous, allocates nothing and can be captured in a graph.
struct Queue {
  int32_t device;
  uint64_t stream;  // cudaStream_t; 0 is the default stream
};

// What multiplies gradients as they are read, in this order. Pointers are to device memory, null
// where the number beside them holds.
struct GradFactors {
  double inv_scale = 1.0;             // 1/loss scale
  const float* grad_scale = nullptr;  // [1], the loss scale: inv_scale is 1 / *grad_scale
  double clip = 1.0;
  const double* clip_at = nullptr;   // [1]
  const float* found_inf = nullptr;  // [1]: when it is not 0, nothing at all is written

  // Unscaled gradients are written back, rounded to their dtype, before the rule reads them.
  bool unscales() const { return grad_scale != nullptr || inv_scale != 1.0; }
};

// One update of rows that share a rule, a variant and a set of dtypes. No two rows share memory. Of
// a rule that projects, n_rows and inner of a row are read too. With found_inf nothing is written:
// a parameter with a source elsewhere stays as it is.
struct Update {
  RuleId rule;
  int32_t variant;
  DTypeSet dtypes;
  const TableRow* const* rows;  // [n_rows]; of a row all but update, sum, unscale, saved and master is read
  int64_t n_rows;
  const HyperBlock* hypers;       // host memory, indexed by row->hyper
  const HyperBlock* live_hypers;  // device memory, [n_rows] in the order of rows; or null
  GradFactors factors;
  void* workspace = nullptr;  // device memory, Api::workspace_bytes; its contents do not matter
};

// Where the hyper-parameters of one group are when a kernel has to read them.
struct LiveGroup {
  double raw[kMaxHypers];          // by the rule's kHyperNames
  const void* source[kMaxHypers];  // device memory, [1], in place of raw; or null
  bool is_double[kMaxHypers];      // source is float64, else float32
};

struct LiveRow {
  void* counter;  // device memory, [1]: steps made, float32 or float64; null for rules without
  int32_t group;
  bool is_double;  // counter is float64
};

// counter += 1 and hypers[i] = Rule::prepare(the group's values, counter, counter == 1), unless
// found_inf.
struct Prepare {
  RuleId rule;
  bool is_double;           // arithmetic in float64
  const LiveGroup* groups;  // host memory
  int64_t n_groups;
  const LiveRow* rows;  // host memory
  int64_t n_rows;
  const float* found_inf;  // device memory, or null
  HyperBlock* hypers;      // device memory, [n_rows]
};

// One tensor that is reduced or scaled, dense in memory.
struct Span {
  void* data;
  int64_t numel;
  DType dtype;
  const void* weight = nullptr;  // [numel]: squares are those of reduce::weigh, unless null
  double eta = 0.0;              // added to the size of a weight
};

// Stage 1: one partial result per chunk of reduce::kChunk elements, chunks in order of the spans.
struct Partials {
  reduce::Kind kind;
  const Span* spans;  // host memory
  int64_t n_spans;
  double* out;  // device memory, [sum of reduce::n_chunks(numel)]
};

// Stage 2: results[s] = the norm over partials[ends[s - 1] .. ends[s]), ends[-1] being 0.
struct Norms {
  reduce::Kind kind;
  const double* partials;  // device memory
  const int64_t* ends;     // host memory, [n]
  int64_t n;
  double* results;  // device memory, [n]
};

// *clip = reduce::clip_factor(max_norm, *norm / loss scale).
struct Clip {
  const double* norm;  // device memory, [1]
  double max_norm;
  double inv_scale;
  const float* grad_scale;  // device memory, [1], or null
  double* clip;             // device memory, [1]
};

// x *= factor for every element, in the arithmetic of its dtype.
struct Scale {
  const Span* spans;  // host memory
  int64_t n_spans;
  double factor;
  const double* factor_at;  // device memory, [1], in place of factor; or null
};

// Per row r of dimension 0 of two dense tensors of one layout: sums[r] = (a.b, a.a, b.b). Element i
// of row r lies at (i / inner * n_rows + r) * inner + i % inner.
struct RowSums {
  const void* a;
  const void* b;
  DType dtype;
  int64_t n_rows, row_size, inner;
  double* sums;  // device memory, [n_rows][3]
};

// Functions return null, or a message that stays valid until the thread's next call.
struct Api {
  int32_t version;
  // Whether the memory is the CPU's: the kernels run in the emulator.
  bool is_emulated;
  const char* (*probe)(int32_t* n_devices);
  // What an update needs; its workspace is not read. 0 for most rules.
  int64_t (*workspace_bytes)(const Update&);
  const char* (*update)(const Queue&, const Update&);
  const char* (*prepare)(const Queue&, const Prepare&);
  const char* (*partials)(const Queue&, const Partials&);
  const char* (*norms)(const Queue&, const Norms&);
  const char* (*clip)(const Queue&, const Clip&);
  const char* (*scale)(const Queue&, const Scale&);
  const char* (*row_sums)(const Queue&, const RowSums&);
  // Sets what the engine chooses by default, for measurements: elements per block of an update (0:
  // by the size of the step), tensors per launch (0: as many as the table holds).
  void (*tune)(int64_t chunk, int64_t rows_per_launch);
  // Launches since the library was loaded.
  int64_t (*launches)();
};

// The library's one symbol.
extern "C" using GetApi = const Api * (*)();
constexpr const char* kGetApi = "pyoptim_cuda_api";

}  // namespace pyoptim::gpu
