// The library's table of functions: the device, the errors and what is tuned.
#include <exception>
#include <string>
#include <utility>

#include "cuda/launchers.hpp"

#if !defined(PYOPTIM_EMULATOR)
#include <cuda.h>
#endif

namespace pyoptim::gpu {
namespace {

std::atomic<int64_t> asked_chunk{0}, asked_rows{0};

using Launcher = cudaError_t (*)(const Update&, cudaStream_t);
using Preparer = cudaError_t (*)(const Prepare&, cudaStream_t);

struct RuleEntry {
  const char* name;
  Launcher update;
  Preparer prepare;
  bool projects;
};

constexpr RuleEntry kRules[] = {
#define PYOPTIM_ENTRY(Rule) \
  {Rule<float>::kName, update_##Rule, prepare_##Rule, kProjects<Rule<float>>},
    PYOPTIM_FOR_EACH_RULE(PYOPTIM_ENTRY)
#undef PYOPTIM_ENTRY
};

bool is_known(RuleId rule) { return rule >= RuleId{0} && rule < RuleId::count; }

// A message stays valid until the thread's next call.
const char* keep(std::string text) {
  static thread_local std::string message;
  message = std::move(text);
  return message.c_str();
}

std::string describe(cudaError_t status) {
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

const char* failure(const char* what, const char* rule, const Queue& queue, std::string why) {
  std::string text = std::string("pyoptim cuda: ") + what;
  if (rule) text += std::string(" of rule ") + rule;
  return keep(text + " on device " + std::to_string(queue.device) + " failed: " + why);
}

#if defined(PYOPTIM_EMULATOR)

using Place = int;

cudaError_t find_place(Place* place) { return cudaGetDevice(place); }
cudaError_t return_to(Place place) { return cudaSetDevice(place); }

#else

// The driver's context of this thread. torch has a CUDA runtime of its own, and both find the
// device in it: to put back what our runtime believes to be the device might move torch to another
// one.
using Place = CUcontext;

template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return status == cudaSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

cudaError_t find_place(Place* place) {
  static const auto get = driver_function<CUresult (*)(CUcontext*)>("cuCtxGetCurrent");
  return get && get(place) == CUDA_SUCCESS ? cudaSuccess : cudaErrorInitializationError;
}

cudaError_t return_to(Place place) {
  static const auto set = driver_function<CUresult (*)(CUcontext)>("cuCtxSetCurrent");
  return set && set(place) == CUDA_SUCCESS ? cudaSuccess : cudaErrorInitializationError;
}

#endif

template <class Body>
cudaError_t run_on(const Queue& queue, const Body& body) {
  Place former = {};
  cudaError_t status = find_place(&former);
  if (status != cudaSuccess) return status;
  status = cudaSetDevice(queue.device);
  if (status == cudaSuccess) status = body(reinterpret_cast<cudaStream_t>(queue.stream));
  const cudaError_t returned = return_to(former);
  return status != cudaSuccess ? status : returned;
}

// Runs body(stream) on the queue's device.
template <class Body>
const char* guarded(const char* what, const char* rule, const Queue& queue, const Body& body) {
  try {
    const cudaError_t status = run_on(queue, body);
    if (status == cudaSuccess) return nullptr;
    std::string why = describe(status);
    // The next to ask for the last error is not to be told of this one.
    (void)cudaGetLastError();
    return failure(what, rule, queue, std::move(why));
  } catch (const std::exception& error) {
    return failure(what, rule, queue, error.what());
  }
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

const char* probe(int32_t* n_devices) {
  int count = 0, driver = 0, runtime = 0;
  *n_devices = 0;
  cudaError_t status = cudaDriverGetVersion(&driver);
  if (status == cudaSuccess) status = cudaRuntimeGetVersion(&runtime);
  if (status == cudaSuccess) status = cudaGetDeviceCount(&count);
  const std::string versions = driver == 0 ? "; there is no driver"
                                           : "; the driver is for CUDA " + version_text(driver) +
                                                 ", this library for CUDA " + version_text(runtime);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    return keep("no usable CUDA device: " + describe(status) + versions);
  }
  if (kParameterBytes > 4096 && driver < 12010) {
    return keep(
        "no usable CUDA device: kernels take 32 KB of parameters, which needs a driver for "
        "CUDA 12.1 or newer" +
        versions);
  }
  *n_devices = count;
  return nullptr;
}

int64_t run_workspace_bytes(const Update& update) {
  const bool projects = is_known(update.rule) && kRules[static_cast<int>(update.rule)].projects;
  return projects ? workspace_bytes(update) : 0;
}

const char* run_update(const Queue& queue, const Update& update) {
  if (!is_known(update.rule)) return failure("update", nullptr, queue, "unknown rule");
  const RuleEntry& rule = kRules[static_cast<int>(update.rule)];
  return guarded(
      "update", rule.name, queue, [&](cudaStream_t s) { return rule.update(update, s); });
}

const char* run_prepare(const Queue& queue, const Prepare& prepare) {
  if (!is_known(prepare.rule)) return failure("prepare", nullptr, queue, "unknown rule");
  const RuleEntry& rule = kRules[static_cast<int>(prepare.rule)];
  return guarded(
      "prepare", rule.name, queue, [&](cudaStream_t s) { return rule.prepare(prepare, s); });
}

const char* run_partials(const Queue& queue, const Partials& work) {
  return guarded("partials", nullptr, queue, [&](cudaStream_t s) { return partials(work, s); });
}

const char* run_norms(const Queue& queue, const Norms& work) {
  return guarded("norms", nullptr, queue, [&](cudaStream_t s) { return norms(work, s); });
}

const char* run_clip(const Queue& queue, const Clip& work) {
  return guarded("clip", nullptr, queue, [&](cudaStream_t s) { return clip(work, s); });
}

const char* run_scale(const Queue& queue, const Scale& work) {
  return guarded("scale", nullptr, queue, [&](cudaStream_t s) { return scale(work, s); });
}

const char* run_row_sums(const Queue& queue, const RowSums& work) {
  return guarded("row_sums", nullptr, queue, [&](cudaStream_t s) { return row_sums(work, s); });
}

// The functions of what knows neither rules nor tables.
template <class Work, cudaError_t (*kFunction)(const Work&, cudaStream_t)>
const char* run(const Queue& queue, const Work& work) {
  constexpr const char* kWhat = "a search for neighbours or centres";
  return guarded(kWhat, nullptr, queue, [&](cudaStream_t s) { return kFunction(work, s); });
}

void tune(int64_t chunk, int64_t rows_per_launch) {
  asked_chunk = std::max<int64_t>(chunk, 0);
  asked_rows = std::max<int64_t>(rows_per_launch, 0);
}

#if defined(PYOPTIM_EMULATOR)
constexpr bool kIsEmulated = true;
#else
constexpr bool kIsEmulated = false;
#endif

constexpr Api kApi = {kApiVersion,
                      kIsEmulated,
                      probe,
                      run_workspace_bytes,
                      run_update,
                      run_prepare,
                      run_partials,
                      run_norms,
                      run_clip,
                      run_scale,
                      run_row_sums,
                      run<Squares, squares>,
                      run<PackRows, pack_rows>,
                      run<Filter, filter>,
                      run<Certify, certify>,
                      run<Scores, scores>,
                      run<CenterStep, step_center>,
                      run<CenterSqdist, center_sqdist>,
                      tune,
                      [] { return n_launches.load(); }};

}  // namespace

Settings settings() { return {asked_chunk, asked_rows}; }

}  // namespace pyoptim::gpu

extern "C" __attribute__((visibility("default"))) const pyoptim::gpu::Api* pyoptim_cuda_api() {
  return &pyoptim::gpu::kApi;
}
