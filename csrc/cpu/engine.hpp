// The CPU engine's border: raw tables in, updated memory out. Python-free and torch-free.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/table.hpp"
#include "cpu/project.hpp"
#include "rules/all.hpp"

namespace pyoptim::cpu {

// What a FoldKernel makes of a chunk; the first three are numbered as in reduce::Kind.
enum class Fold : int { squares = 0, magnitudes, maximum, products, values, weighted, count };

// Folds the elements of one chunk in the order of reduce/order.hpp. b is read by products and, as
// the weights of a, by weighted; eta by the latter only.
using FoldKernel = double (*)(const void* a, const void* b, double eta, int64_t numel);

// One instruction set's kernels.
struct KernelTable {
  const char* isa;
  UpdateKernel update[static_cast<int>(RuleId::count)][kMaxVariants]
                     [static_cast<int>(DTypeSet::count)];
  ProjectKernels project[static_cast<int>(RuleId::count)][kMaxVariants]
                        [static_cast<int>(DTypeSet::count)];
  SumKernel sum[static_cast<int>(RuleId::count)][kMaxVariants][static_cast<int>(DTypeSet::count)];
  UnscaleKernel unscale[4];  // by DType of the gradient
  void (*stream)(int itemsize,
                 void* const* read_only,
                 int n_read_only,
                 void* const* read_write,
                 int n_read_write,
                 int64_t begin,
                 int64_t end);
  FoldKernel fold[static_cast<int>(Fold::count)][4];  // by DType; values of float64 only
  // Over the float32 bit patterns [first, last]: how many vector roots differ from the scalar one.
  int64_t (*count_wrong_roots)(uint32_t first, uint32_t last);
};

// Instruction sets that were built, worst first; those that this processor can run; the one in use.
std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();
const KernelTable& active_kernels();
bool set_isa(const std::string& name);

// Runs task(i) for i in [0, n_tasks) on torch's own threads, or serially when asked to, when
// torch's threads are out of reach, and always in a forked child (libgomp's pool does not survive
// fork: a parallel region there hangs).
using Task = void (*)(int64_t index, void* context);
void run_tasks(int64_t n_tasks, bool serial, Task task, void* context);

int num_threads();

// To be called once when the module loads, before any fork; false when the handler could not be
// set.
bool watch_for_fork();

#if defined(__APPLE__)
constexpr const char* kTorchLibrary = "libtorch_cpu.dylib";
#else
constexpr const char* kTorchLibrary = "libtorch_cpu.so";
#endif

// Elements below which a step runs on the calling thread: waking torch's workers costs about as
// much as the work.
constexpr int64_t kSerialElements = 32 * 1024;
constexpr int64_t kTaskElements = 64 * 1024;

// How far ahead memory is asked for. On Sapphire Rapids, whose out-of-order window is too short for
// this much arithmetic between the loads, 1024 raised a 20 M element AdamW step from 84 % to 96 %
// of the same-mix loop (512: 92 %, 2048: 86 %). Zen 4 asks best by itself: 0 took 16.4 ms for SGD
// on 50 M elements, 512 took 20.8, 2048 19.4; with momentum 25, 29 and 27; AdamW 33, 34 and 37. On
// Zen 5 50 M elements of AdamP's update took 0.47 to 0.57 ns each with 512, 0.45 with 1024, 0.41 to
// 0.43 with 2048 and 0.44 to 0.47 with 4096; 25 M of line_step 0.61 with 512 and 0.52 with 2048.
// Not set in the kernels' files: code that runs at load must be baseline code.
extern const int64_t kPrefetchBytes;

// Whether a norm adds four rounds of lanes per visit, or one. On Zen 5, which reads several streams
// of one array badly, 30 M float32 took 0.165 to 0.25 ns each in fours and 0.093 to 0.127 in order;
// in the second-level cache 0.049 to 0.052 either way. Zen 4: 0.25 in fours, 0.23 in order.
extern const bool kAddsManyRounds;

// Rows from here on are larger than the second-level cache with their gradient: what they write but
// do not read goes past the caches, or it would be fetched first. On Sapphire Rapids SAM's ascent
// over 50 M float32 took 31 ms in place of 40, an SGD step from saved weights 43 in place of 52; at
// 1 M elements 0.57 and 0.67 in place of 0.57 and 0.72.
constexpr int64_t kStreamElements = 256 * 1024;

// Updates every row. With inv_scale != 1 gradients are multiplied by it and written back first.
// No two rows may share memory.
void update_rows(const std::vector<const TableRow*>& rows,
                 const std::vector<HyperBlock>& hypers,
                 double inv_scale);

// As update_rows, for rows that all have a sum's kernel: returns the sum of their terms in the
// order of reduce/order.hpp, as a norm over the rows in turn adds up its own.
double update_and_sum_rows(const std::vector<const TableRow*>& rows,
                           const std::vector<HyperBlock>& hypers);

// x[i] += sum of the read-only arrays, in the optimizers' own driver: the bandwidth a step could
// reach.
void stream(int itemsize,
            const std::vector<void*>& read_only,
            const std::vector<void*>& read_write,
            int64_t numel,
            bool serial);

}  // namespace pyoptim::cpu
