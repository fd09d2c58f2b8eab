// The CUDA engine's library, loaded at run time: pyoptim works, and its module loads, without it.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/api.hpp"

namespace pyoptim::gpu {

inline const Api*& loaded_api() {
  static const Api* api = nullptr;
  return api;
}

// The engine in use. Raises RuntimeError while there is none.
inline const Api& api() {
  if (loaded_api() == nullptr) throw std::runtime_error("pyoptim: no CUDA engine is loaded");
  return *loaded_api();
}

// Raises RuntimeError with what the engine says went wrong.
inline void check(const char* message) {
  if (message != nullptr) throw std::runtime_error(message);
}

// Loads the library at `path`, or puts an earlier one out of use when it is empty; returns
// nothing or why it cannot be used. A library that was loaded stays loaded.
inline std::string load(const std::string& path) {
  loaded_api() = nullptr;
  if (path.empty()) return "";
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  const auto get = reinterpret_cast<GetApi>(dlsym(library, kGetApi));
  const Api* const api = get ? get() : nullptr;
  if (api == nullptr || api->version != kApiVersion) {
    return path + " belongs to another version of pyoptim; build it again";
  }
  int32_t n_devices = 0;
  if (const char* const message = api->probe(&n_devices)) return message;
  if (n_devices == 0) return "there is no CUDA device";
  loaded_api() = api;
  return "";
}

}  // namespace pyoptim::gpu
