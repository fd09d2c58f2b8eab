// The CUDA engine's border: plain structs and one table of functions, in a library that is loaded
// at run time. No type of CUDA, torch or Python. The emulator builds the same table over the same
// kernels for memory of the CPU.
#pragma once

#include <cstdint>

#include "core/table.hpp"
#include "coreset/bound.hpp"
#include "reduce/order.hpp"
#include "rules/all.hpp"

namespace pyoptim::gpu {

constexpr int kApiVersion = 4;

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
// a parameter with a source elsewhere stays as it is. A rule that yields terms writes no states,
// cannot unscale gradients, and keeps what it reads of a parameter in the row's saved, unless that
// is null or there is a master.
struct Update {
  RuleId rule;
  int32_t variant;
  DTypeSet dtypes;
  const TableRow* const* rows;  // [n_rows]; of a row all but its kernels and master is read
  int64_t n_rows;
  const HyperBlock* hypers;       // host memory, indexed by row->hyper
  const HyperBlock* live_hypers;  // device memory, [n_rows] in the order of rows; or null
  GradFactors factors;
  void* workspace = nullptr;  // device memory, Api::workspace_bytes; its contents do not matter
  // Device memory, for every chunk of reduce::kChunk elements the sum of the rule's terms, from a
  // row's first_chunk on; or null. Norms of magnitudes add them up.
  double* sums = nullptr;
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
// found_inf. A rule that writes no states leaves the counter as it is.
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

// -- nearest rows and centres: docs/coreset-kernels.md tells how they work together ---------------

using coreset::Metric;

// Rows of a matrix in device memory: all of them, or those listed. Scores are those of
// coreset/kernels.hpp, bit for bit.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride;       // elements between rows; the elements of a row lie side by side
  const int64_t* rows;  // device memory, [n]; or null: 0, 1, ...
  int64_t n, d;
};

// squares[i] = row i . row i.
struct Squares {
  Matrix x;
  double* squares;  // device memory, [n]
};

// What all rows of y tell about a search. It stays on the device, because nobody waits for it.
struct About {
  double scale;        // a power of two
  double largest;      // norm of a packed row of y
  double center_norm;  // |center|
  double mode;         // 0: filter; 1: score every pair; 2: do nothing, there is a NaN
};

// Rows as the filter multiplies them: X = scale * x - center, of unit length where the metric is
// cosine, each element as the sum of two of bfloat16. Or, if they are not split, 16-bit rows as
// they are.
struct PackRows {
  Matrix x;
  Metric metric;
  bool splits;
  const About* about;    // device memory
  const double* center;  // device memory, [d]; or null: zeros
  int64_t width;         // elements of a packed row: d and then zeros, a multiple of 8
  uint16_t* high;        // device memory, [n][width]; or null: only norms are wanted
  uint16_t* low;         // the same, if the rows are split
  double* norms;         // device memory, [n]; infinite for a row that cannot be filtered
  float* half_norms;     // device memory, [n], |X|^2 / 2 for sqdist, else 0; or null
};

// Packed rows, or 16-bit rows that lie on 16 bytes.
struct Operand {
  const void* high;
  const void* low;  // null if they are not split
  int64_t stride, n;
};

// Of all columns j, values v_j = half_norms[j] - x . y_j. The columns are dealt to n_parts blocks.
struct Filter {
  Operand x, y;
  int64_t d;
  bool is_half;             // elements are float16, not bfloat16
  const float* half_norms;  // device memory, [y.n]
  int64_t n_parts;
  float* least;      // device memory, [n_parts][3][x.n]: the three smallest; or null
  int32_t* columns;  // device memory, [n_parts][2][x.n]: of the two smallest, -1 where none is
  float* values;     // device memory, [x.n][y.n], instead of the two; or null
};

// What a value of the filter may be above another's whose score is not better, for a row of norm a
// and columns of norms up to b: products a b + squares b^2 + whole (a + b + |center|)^2 + tiny (1 +
// a + b). Derived in pyoptim/coreset/certificate.py.
struct Slack {
  double products, squares, whole, tiny;
};

// The best column of every row: what the filter leaves over is scored.
struct Certify {
  Matrix x, y;
  Metric metric;
  Slack slack;
  const About* about;      // device memory
  const double* norms;     // device memory, [x.n], of packed rows
  int64_t n_parts;         // of the filter
  const float* least;      // of the filter
  const int32_t* columns;  // of the filter
  int64_t first_index;     // of row 0 of y's matrix
  double* scores;       // device memory, [rows of x's matrix], updated where a better one is found
  int64_t* indices;     // the same; -1 where there is none
  uint8_t* is_settled;  // device memory, [x.n]: whether every pair was scored; or null
};

// scores[i][c] = the score of row i of x and row columns[i][c] of y, or row c.
struct Scores {
  Matrix x, y;
  Metric metric;
  const int64_t* columns;  // device memory, [x.n][k]; or null
  int64_t k;
  double* scores;  // device memory, [x.n][k]
};

// A row, -1 where there is none.
struct Farthest {
  double sqdist;
  int64_t row;
  int64_t nan_row;  // the first whose distance is no number
};

// min_sqdist = min(min_sqdist, squared distance to the centre), and where that is largest.
struct CenterStep {
  Matrix x;
  const double* center;    // device memory, [d]; or null:
  const Farthest* former;  // device memory, [1]: a row that is the centre. None: nothing happens
  double* min_sqdist;      // device memory, [n]
  Farthest* partials;      // device memory, [kFarthestParts]
  Farthest* found;         // device memory, [1]; may be former
};
constexpr int64_t kFarthestParts = 2048;

// out[i] = squared distance of row i to centers[labels[i]].
struct CenterSqdist {
  Matrix x;
  const int64_t* labels;  // device memory, [n]
  const double* centers;  // device memory, [classes][d]
  double* out;            // device memory, [n]
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
  const char* (*squares)(const Queue&, const Squares&);
  const char* (*pack_rows)(const Queue&, const PackRows&);
  const char* (*filter)(const Queue&, const Filter&);
  const char* (*certify)(const Queue&, const Certify&);
  const char* (*scores)(const Queue&, const Scores&);
  const char* (*step_center)(const Queue&, const CenterStep&);
  const char* (*center_sqdist)(const Queue&, const CenterSqdist&);
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
