// Reads pointer, shape, strides, dtype and device of a torch tensor in tens of nanoseconds, without
// libtorch's headers.
//
// Two ways, both resolved at run time:
//  - dlpack: the C function table that torch >= 2.10 publishes as
//    torch.Tensor.__dlpack_c_exchange_api__, a stable ABI.
//  - symbols: functions of libtorch found by dlsym. Most are torch's stable C shim; four are
//    mangled C++ names (kGrad, kBumpVersion, kIsNeg, kIsConj), so this way is used only after
//    pyoptim.backend has checked them against torch's own answers in this process.
#pragma once

#include <Python.h>
#include <dlfcn.h>

#include <cstdint>

#include "core/dtype.hpp"
#include "cpu/engine.hpp"

namespace pyoptim {

struct TensorView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t numel;
  int32_t ndim;
  DType dtype;  // of the real and imaginary parts when is_complex
  bool is_complex;
  bool is_cpu;
  int32_t cuda;  // index of the CUDA device, or -1
};

inline bool same_device(const TensorView& a, const TensorView& b) {
  return a.is_cpu == b.is_cpu && a.cuda == b.cuda;
}

namespace dlpack {

// The part of dlpack.h (DLPack 1.x, a frozen C layout) that is needed here.
struct Device {
  int32_t type;
  int32_t id;
};
struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  void* current_work_stream;
};
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kFloat = 2, kBfloat = 4, kComplex = 5;

inline const ExchangeApi*& api() {
  static const ExchangeApi* table = nullptr;
  return table;
}

// torch.Tensor, alive as long as torch is.
inline PyTypeObject*& tensor_type() {
  static PyTypeObject* type = nullptr;
  return type;
}

// Returns whether the table was found. Leaves no Python error behind.
inline bool find_api(PyObject* type) {
  tensor_type() = reinterpret_cast<PyTypeObject*>(type);
  // The attribute was renamed late in 2025; torch 2.10 has the older name.
  for (const char* name : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
    PyObject* const capsule = PyObject_GetAttrString(type, name);
    if (capsule == nullptr) {
      PyErr_Clear();
      continue;
    }
    void* const table = PyCapsule_CheckExact(capsule)
                            ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
                            : nullptr;
    PyErr_Clear();
    Py_DECREF(capsule);  // the table is static in torch
    api() = static_cast<const ExchangeApi*>(table);
    if (api() && api()->major == kMajor && api()->tensor_from_py_object_no_sync) return true;
    api() = nullptr;
  }
  return false;
}

inline DType dtype_of(const DataType& type) {
  const int bits = type.code == kComplex ? type.bits / 2 : type.bits;
  if (type.lanes != 1) return DType::unsupported;
  if (type.code == kBfloat && bits == 16) return DType::bf16;
  if (type.code != kFloat && type.code != kComplex) return DType::unsupported;
  return bits == 64   ? DType::f64
         : bits == 32 ? DType::f32
         : bits == 16 ? DType::f16
                      : DType::unsupported;
}

// False for what has no strided memory (sparse, meta, wrapper subclasses). Leaves no Python error
// behind.
inline bool view(PyObject* tensor, TensorView* out) {
  Tensor t;
  if (api()->tensor_from_py_object_no_sync(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<char*>(t.data) + t.byte_offset;
  out->sizes = t.shape;
  out->strides = t.strides;
  out->ndim = t.ndim;
  out->dtype = dtype_of(t.dtype);
  out->is_complex = t.dtype.code == kComplex;
  out->is_cpu = t.device.type == kCpu;
  out->cuda = t.device.type == kCuda ? t.device.id : -1;
  out->numel = 1;
  for (int32_t d = 0; d < t.ndim; ++d) out->numel *= t.shape[d];
  return true;
}

}  // namespace dlpack

namespace symbols {

using Tensor = void*;  // at::Tensor*, as torch's C shim passes it

struct Table {
  int (*get_data_ptr)(Tensor, void**);
  int (*get_sizes)(Tensor, int64_t**);
  int (*get_strides)(Tensor, int64_t**);
  int (*get_dim)(Tensor, int64_t*);
  int (*get_storage_size)(Tensor, int64_t*);  // in bytes
  int (*get_dtype)(Tensor, int32_t*);
  int (*get_layout)(Tensor, int32_t*);
  int (*get_device_type)(Tensor, int32_t*);
  int (*get_device_index)(Tensor, int32_t*);
  int (*is_defined)(Tensor, bool*);
  int (*new_handle)(Tensor, Tensor*);
  int (*delete_handle)(Tensor);
  const void* (*grad)(const void* tensor_impl);  // returns a reference: at::Tensor*
  void (*bump_version)(const void* tensor);
  bool (*is_neg)(const void* tensor);
  bool (*is_conj)(const void* tensor);
  int32_t strided, cpu, cuda;
  int32_t dtypes[4], complex_dtypes[4];
  bool complete;
};

constexpr const char* kGrad = "_ZNK3c1010TensorImpl4gradEv";
constexpr const char* kBumpVersion = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE";
constexpr const char* kIsNeg = "_ZN2at6native6is_negERKNS_6TensorE";
constexpr const char* kIsConj = "_ZN2at6native7is_conjERKNS_6TensorE";

class Loader {
 public:
  Loader() : library_(dlopen(cpu::kTorchLibrary, RTLD_NOLOAD | RTLD_LAZY)) {}

  template <class F>
  void find(const char* name, F* function) {
    *function = library_ ? reinterpret_cast<F>(dlsym(library_, name)) : nullptr;
    complete_ = complete_ && *function;
  }

  // torch's C shim publishes its enumerations as functions.
  int32_t constant(const char* name) {
    int32_t (*value)() = nullptr;
    find(name, &value);
    return value ? value() : -1;
  }

  bool complete() const { return complete_; }

 private:
  void* library_;
  bool complete_ = true;
};

inline Table load() {
  Table t = {};
  Loader loader;
  loader.find("aoti_torch_get_data_ptr", &t.get_data_ptr);
  loader.find("aoti_torch_get_sizes", &t.get_sizes);
  loader.find("aoti_torch_get_strides", &t.get_strides);
  loader.find("aoti_torch_get_dim", &t.get_dim);
  loader.find("aoti_torch_get_storage_size", &t.get_storage_size);
  loader.find("aoti_torch_get_dtype", &t.get_dtype);
  loader.find("aoti_torch_get_layout", &t.get_layout);
  loader.find("aoti_torch_get_device_type", &t.get_device_type);
  loader.find("aoti_torch_get_device_index", &t.get_device_index);
  loader.find("aoti_torch_is_defined", &t.is_defined);
  loader.find("aoti_torch_new_tensor_handle", &t.new_handle);
  loader.find("aoti_torch_delete_tensor_object", &t.delete_handle);
  loader.find(kGrad, &t.grad);
  loader.find(kBumpVersion, &t.bump_version);
  loader.find(kIsNeg, &t.is_neg);
  loader.find(kIsConj, &t.is_conj);
  t.strided = loader.constant("aoti_torch_layout_strided");
  t.cpu = loader.constant("aoti_torch_device_type_cpu");
  t.cuda = loader.constant("aoti_torch_device_type_cuda");
  constexpr const char* kReal[] = {"aoti_torch_dtype_float64",
                                   "aoti_torch_dtype_float32",
                                   "aoti_torch_dtype_bfloat16",
                                   "aoti_torch_dtype_float16"};
  constexpr const char* kComplex[] = {"aoti_torch_dtype_complex128",
                                      "aoti_torch_dtype_complex64",
                                      nullptr,
                                      "aoti_torch_dtype_complex32"};
  for (int i = 0; i < 4; ++i) {
    t.dtypes[i] = loader.constant(kReal[i]);
    t.complex_dtypes[i] = kComplex[i] ? loader.constant(kComplex[i]) : -1;
  }
  t.complete = loader.complete();
  return t;
}

// Filled when the module loads, after torch; a plain global, because a function's static costs a
// check at every use.
inline Table loaded = {};

inline const Table& table() { return loaded; }

// Where a torch.Tensor object keeps its at::Tensor, in bytes from its start; 0 while the symbols
// are not in use. pyoptim.backend finds it out and sets it once the self-test has passed. Reading
// it anew at every step, rather than holding a reference, keeps torch.utils.swap_tensors and the
// garbage collector working.
inline size_t& offset() {
  static size_t bytes = 0;
  return bytes;
}

inline bool enabled() { return offset() != 0; }

inline Tensor tensor_of(PyObject* tensor) { return reinterpret_cast<char*>(tensor) + offset(); }

inline void set_dtype(int32_t code, TensorView* out) {
  out->dtype = DType::unsupported;
  for (int i = 0; i < 4; ++i) {
    const bool is_complex = code == table().complex_dtypes[i];
    if (code != table().dtypes[i] && !is_complex) continue;
    out->dtype = static_cast<DType>(i);
    out->is_complex = is_complex;
    return;
  }
}

// Where the tensor's strided memory is; false for what has none that kernels can reach.
inline bool find_device(Tensor tensor, TensorView* out) {
  const Table& t = table();
  int32_t layout = 0, device = 0;
  if (t.get_layout(tensor, &layout) != 0 || layout != t.strided) return false;
  if (t.get_device_type(tensor, &device) != 0) return false;
  out->is_cpu = device == t.cpu;
  out->cuda = -1;
  return out->is_cpu || (device == t.cuda && t.get_device_index(tensor, &out->cuda) == 0);
}

// All but the device, for a tensor that has strided memory.
inline bool view_memory(Tensor tensor, TensorView* out) {
  const Table& t = table();
  int32_t dtype = 0;
  int64_t ndim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (t.get_data_ptr(tensor, &out->data) != 0 || t.get_dtype(tensor, &dtype) != 0) return false;
  if (t.get_sizes(tensor, &sizes) != 0 || t.get_strides(tensor, &strides) != 0) return false;
  if (t.get_dim(tensor, &ndim) != 0) return false;
  out->sizes = sizes;
  out->strides = strides;
  out->ndim = static_cast<int32_t>(ndim);
  out->numel = 1;
  for (int32_t d = 0; d < out->ndim; ++d) out->numel *= sizes[d];
  out->is_complex = false;
  set_dtype(dtype, out);
  return true;
}

// False for what is not in strided memory that kernels can reach.
inline bool view(Tensor tensor, TensorView* out) {
  return find_device(tensor, out) && view_memory(tensor, out);
}

// TensorImpl and StorageImpl both keep a pointer behind their table of virtual functions and
// reference counts: to the storage, and to its memory. The self-test checks it. One cache line
// each, where the C shim touches three: a walk over more parameters than the cache holds takes as
// long as the lines it touches.
constexpr size_t kPointer = 16 / sizeof(void*);

inline void* const* storage_of(void* const* impl) {
  return static_cast<void* const*>(impl[kPointer]);
}
inline void* storage_memory(void* const* impl) { return storage_of(impl)[kPointer]; }

// A TensorImpl of at most kInlineDims dimensions holds its number of dimensions, shape and strides
// side by side, the shape at metadata(). The self-test checks it.
constexpr int kInlineDims = 5;

inline size_t& metadata() {
  static size_t bytes = 0;
  return bytes;
}

inline TensorView inline_layout(void* const* impl) {
  const char* const at = reinterpret_cast<const char*>(impl) + metadata();
  TensorView view = {};
  view.sizes = reinterpret_cast<const int64_t*>(at);
  view.strides = view.sizes + kInlineDims;
  view.ndim = static_cast<int32_t>(view.sizes[-1]);
  return view;
}

// Where the shape of a tensor of few dimensions lies, or 0 when its TensorImpl looks otherwise.
inline size_t find_metadata(Tensor tensor) {
  const Table& t = table();
  int64_t *sizes = nullptr, *strides = nullptr, ndim = 0;
  if (t.get_sizes(tensor, &sizes) != 0 || t.get_strides(tensor, &strides) != 0) return 0;
  if (t.get_dim(tensor, &ndim) != 0) return 0;
  const uintptr_t at = reinterpret_cast<uintptr_t>(sizes) - *static_cast<const uintptr_t*>(tensor);
  return at < 128 && strides == sizes + kInlineDims && sizes[-1] == ndim ? at : 0;
}

// Whether the storage still reaches to the end of a dense tensor; someone may have shrunk it.
inline bool holds_all(Tensor tensor, const TensorView& view) {
  int64_t size = 0;
  if (table().get_storage_size(tensor, &size) != 0) return false;
  const char* const start =
      static_cast<const char*>(storage_memory(*static_cast<void* const* const*>(tensor)));
  const int64_t width = item_size(view.dtype) * (view.is_complex ? 2 : 1);
  return static_cast<const char*>(view.data) - start + view.numel * width <= size;
}

// The gradient of a parameter, or null when it has none. Borrowed from the parameter.
inline Tensor grad_of(Tensor param) {
  const void* const impl =
      *static_cast<void* const*>(param);  // at::Tensor is one intrusive pointer
  const Tensor grad = const_cast<void*>(table().grad(impl));
  bool defined = false;
  return grad && table().is_defined(grad, &defined) == 0 && defined ? grad : nullptr;
}

}  // namespace symbols

inline bool is_tensor(PyObject* object) {
  return dlpack::tensor_type() && PyObject_TypeCheck(object, dlpack::tensor_type());
}

inline bool view_of(PyObject* tensor, TensorView* out) {
  return symbols::enabled() ? symbols::view(symbols::tensor_of(tensor), out)
                            : dlpack::view(tensor, out);
}

// Whether the memory is not the values: a lazily conjugated or negated tensor.
inline bool is_lazy(symbols::Tensor tensor) {
  return symbols::table().is_neg(tensor) || symbols::table().is_conj(tensor);
}

// Strides along dimensions of size 1 carry no meaning.
inline bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t d = 0; d < a.ndim; ++d) {
    if (a.sizes[d] != b.sizes[d] || (a.sizes[d] > 1 && a.strides[d] != b.strides[d])) return false;
  }
  return true;
}

inline bool is_aligned(const TensorView& t) {
  return (reinterpret_cast<uintptr_t>(t.data) & static_cast<uintptr_t>(item_size(t.dtype) - 1)) ==
         0;
}

// No gaps and no overlaps: the elements fill one block of memory in some order of the dimensions.
inline bool is_dense(const TensorView& t) {
  if (t.numel <= 1) return true;
  int64_t filled = 1;
  uint64_t used = 0;
  for (int32_t round = 0; round < t.ndim; ++round) {
    bool grown = false;
    for (int32_t d = 0; d < t.ndim && d < 64; ++d) {
      if ((used >> d) & 1u || t.sizes[d] == 1 || t.strides[d] != filled) continue;
      used |= uint64_t{1} << d;
      filled *= t.sizes[d];
      grown = true;
    }
    if (!grown) break;
  }
  return filled == t.numel;
}

}  // namespace pyoptim
