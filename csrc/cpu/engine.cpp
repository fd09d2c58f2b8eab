// Cuts a step into tasks and runs them on torch's threads with the best instruction set.
#include "cpu/engine.hpp"

#include <dlfcn.h>
#include <pthread.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "cpu/chunks.hpp"

namespace pyoptim::cpu {

const KernelTable& kernels_baseline();
#if defined(PYOPTIM_X86)
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const KernelTable& kernels_avx512_bf16();
#endif

namespace {

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

enum class Amd { none, older, zen4, zen5 };  // zen5: or what came after it

// gcc 12 does not know the newer ones by name. Zen 3 and Zen 4 are one family.
Amd generation() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Amd::none;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  if (family >= 0x1a) return Amd::zen5;
  return family == 0x19 && __builtin_cpu_supports("avx512f") ? Amd::zen4 : Amd::older;
#else
  return Amd::none;
#endif
}

int64_t prefetch_bytes() {
  if (is_intel()) return 1024;
  const Amd amd = generation();
  return amd == Amd::zen5 ? 2048 : amd == Amd::zen4 ? 0 : 512;
}

}  // namespace

const int64_t kPrefetchBytes = prefetch_bytes();
const bool kAddsManyRounds = generation() < Amd::zen4;

namespace {

// The functions that make the tables are themselves compiled for their instruction set, down to how
// they clear memory: none may be called before can_run has said so.
struct Isa {
  const char* name;
  const KernelTable& (*kernels)();
};

constexpr Isa kIsas[] = {
    {"baseline", kernels_baseline},
#if defined(PYOPTIM_X86)
    {"avx2", kernels_avx2},
    {"avx512", kernels_avx512},
    {"avx512_bf16", kernels_avx512_bf16},
#endif
};

bool can_run(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(PYOPTIM_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

const KernelTable* find_table(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && can_run(isa.name)) return &isa.kernels();
  }
  return nullptr;
}

std::atomic<const KernelTable*>& active_table() {
  static std::atomic<const KernelTable*> table{find_table(supported_isas().back())};
  return table;
}

// torch's stable C interface (torch >= 2.10), found at run time: linking to libgomp or libtorch
// would tie the build to one torch, and a second thread pool would fight with torch's spinning
// workers.
struct TorchThreads {
  int (*parallel_for)(
      int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);
  int (*get_num_threads)(uint32_t* count);
};

const TorchThreads& torch_threads() {
  static const TorchThreads threads = [] {
    TorchThreads found = {};
    if (void* lib = dlopen(kTorchLibrary, RTLD_NOLOAD | RTLD_LAZY)) {
      found.parallel_for =
          reinterpret_cast<decltype(found.parallel_for)>(dlsym(lib, "torch_parallel_for"));
      found.get_num_threads =
          reinterpret_cast<decltype(found.get_num_threads)>(dlsym(lib, "torch_get_num_threads"));
    }
    return found;
  }();
  return threads;
}

std::atomic<bool> forked{false};

struct Queue {
  std::atomic<int64_t> next{0};
  int64_t n_tasks;
  Task task;
  void* context;

  void drain() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) task(i, context);
  }
};

struct Segment {
  int64_t row;
  int64_t begin;  // first element within the row
};

// Task boundaries in the rows laid end to end: task i runs from cuts[i] to cuts[i + 1].
std::vector<Segment> cut_tasks(const std::vector<const TableRow*>& rows) {
  std::vector<Segment> cuts = {{0, 0}};
  int64_t room = kTaskElements;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (int64_t done = 0; done < rows[r]->numel;) {
      const int64_t taken = std::min(room, rows[r]->numel - done);
      done += taken;
      room -= taken;
      if (room == 0) {
        cuts.push_back({static_cast<int64_t>(r), done});
        room = kTaskElements;
      }
    }
  }
  cuts.push_back({static_cast<int64_t>(rows.size()), 0});
  return cuts;
}

struct Step {
  const std::vector<const TableRow*>& rows;
  const std::vector<HyperBlock>& hypers;
  double inv_scale;
  std::vector<Segment> cuts;

  void update(int64_t r, int64_t begin, int64_t end) const {
    const TableRow& row = *rows[r];
    const TableRow* const next = r + 1 < static_cast<int64_t>(rows.size()) ? rows[r + 1] : nullptr;
    const void* const hyper = &hypers[row.hyper];
    if (inv_scale == 1.0) return row.update(row, hyper, begin, end, next);
    // A block is still in the first-level cache when the rule reads what was unscaled.
    constexpr int64_t kBlock = 4096;
    for (; begin < end; begin += kBlock) {
      const int64_t stop = std::min(end, begin + kBlock);
      row.unscale(row.grad, inv_scale, begin, stop);
      row.update(row, hyper, begin, stop, next);
    }
  }

  void run(int64_t task) const {
    const Segment first = cuts[task], last = cuts[task + 1];
    const int64_t n_rows = static_cast<int64_t>(rows.size());
    for (int64_t r = first.row; r <= last.row && r < n_rows; ++r) {
      const int64_t begin = r == first.row ? first.begin : 0;
      const int64_t end = r == last.row ? last.begin : rows[r]->numel;
      if (begin < end) update(r, begin, end);
    }
  }
};

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (can_run(isa.name)) names.push_back(isa.name);
  }
  return names;
}

const KernelTable& active_kernels() { return *active_table().load(std::memory_order_relaxed); }

bool watch_for_fork() {
  return pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
}

bool set_isa(const std::string& name) {
  const KernelTable* const table = find_table(name);
  if (table) active_table() = table;
  return table != nullptr;
}

int num_threads() {
  uint32_t count = 1;
  const TorchThreads& threads = torch_threads();
  if (forked || !threads.parallel_for || !threads.get_num_threads ||
      threads.get_num_threads(&count) != 0)
    return 1;
  return static_cast<int>(count);
}

void run_tasks(int64_t n_tasks, bool serial, Task task, void* context) {
  Queue queue{{0}, n_tasks, task, context};
  const int64_t workers = serial ? 1 : std::min<int64_t>(num_threads(), n_tasks);
  if (workers > 1) {
    const auto drain = [](int64_t, int64_t, void* q) { static_cast<Queue*>(q)->drain(); };
    // A failure leaves tasks in the queue, and the line below runs them.
    (void)torch_threads().parallel_for(0, workers, 1, drain, &queue);
  }
  queue.drain();
}

void update_rows(const std::vector<const TableRow*>& rows,
                 const std::vector<HyperBlock>& hypers,
                 double inv_scale) {
  if (!rows.empty() && rows[0]->project) return project_rows(rows, hypers, inv_scale);
  int64_t total = 0;
  for (const TableRow* row : rows) total += row->numel;
  const Step step{rows, hypers, inv_scale, {}};
  if (total <= kSerialElements) {
    for (size_t r = 0; r < rows.size(); ++r)
      step.update(static_cast<int64_t>(r), 0, rows[r]->numel);
    return;
  }
  Step cut{rows, hypers, inv_scale, cut_tasks(rows)};
  const auto run = [](int64_t i, void* s) { static_cast<const Step*>(s)->run(i); };
  run_tasks(static_cast<int64_t>(cut.cuts.size()) - 1, false, run, &cut);
}

double update_and_sum_rows(const std::vector<const TableRow*>& rows,
                           const std::vector<HyperBlock>& hypers) {
  std::vector<int64_t> numels;
  int64_t n_chunks = 0;
  for (const TableRow* row : rows) {
    numels.push_back(row->numel);
    n_chunks += reduce::n_chunks(row->numel);
  }
  std::vector<double> sums(n_chunks);
  for_each_chunk(numels, [&](size_t r, int64_t begin, int64_t end, int64_t index) {
    const TableRow& row = *rows[r];
    const TableRow* const next = r + 1 < rows.size() ? rows[r + 1] : nullptr;
    sums[index] = row.sum(row, &hypers[row.hyper], begin, end, next);
  });
  const auto values = static_cast<int>(Fold::values), f64 = static_cast<int>(DType::f64);
  return active_kernels().fold[values][f64](sums.data(), nullptr, 0.0, n_chunks);
}

namespace {

struct Stream {
  int itemsize;
  const std::vector<void*>& read_only;
  const std::vector<void*>& read_write;
  int64_t numel;

  void run(int64_t task) const {
    const int64_t begin = task * kTaskElements;
    active_kernels().stream(itemsize,
                            read_only.data(),
                            static_cast<int>(read_only.size()),
                            read_write.data(),
                            static_cast<int>(read_write.size()),
                            begin,
                            std::min(numel, begin + kTaskElements));
  }
};

}  // namespace

void stream(int itemsize,
            const std::vector<void*>& read_only,
            const std::vector<void*>& read_write,
            int64_t numel,
            bool serial) {
  Stream loop{itemsize, read_only, read_write, numel};
  const auto run = [](int64_t i, void* s) { static_cast<const Stream*>(s)->run(i); };
  run_tasks((numel + kTaskElements - 1) / kTaskElements, serial, run, &loop);
}

}  // namespace pyoptim::cpu
