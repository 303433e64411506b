// A stand-in for the CUDA runtime: it remembers which kernels a library built by nvcc has, and hands
// each launch to a function in Python. What it does not have, a library that asks for it can not be
// loaded with.
//
// The functions whose names begin with __cuda are what nvcc's host code calls for <<<...>>>; their
// signatures are those in the toolkit's crt/host_runtime.h and crt/host_defines.h.

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace {

enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kInvalidDeviceFunction = 98,
};

struct Dim3 {
  unsigned x, y, z;
};

struct Kernel {
  std::string name;
  int module;
  size_t most_dynamic_shared;
};

struct FatBinary {
  int magic, version;
  const void* data;
  void* file;
};

struct Configuration {
  Dim3 grid, block;
  size_t dynamic_shared;
  void* stream;
};

using Launch = int (*)(const char* kernel, int module, const unsigned* grid, const unsigned* block,
                       void** arguments, size_t dynamic_shared, void* stream);

// What a kernel may use of shared memory by itself, and on an A100 when it has asked for more.
constexpr size_t kDynamicShared = 48 * 1024;
constexpr size_t kMostDynamicShared = 163 * 1024;
constexpr int kMaxDynamicSharedSize = 8;  // of enum cudaFuncAttribute

Launch launch;
std::vector<const void*> modules;
std::map<const void*, Kernel> kernels;  // by the address of their host function
thread_local Configuration configuration;
thread_local int last_error = kSuccess;

int failed(int error) {
  if (error != kSuccess) last_error = error;
  return error;
}

bool is_possible(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  const bool has_blocks = grid.x > 0 && grid.x < (1u << 31) && grid.y > 0 && grid.y < 65536 &&
                          grid.z > 0 && grid.z < 65536;
  return has_blocks && threads > 0 && threads <= 1024 && block.z <= 64 &&
         dynamic_shared <= kernel.most_dynamic_shared;
}

}  // namespace

extern "C" {

// For Python.

void sim_on_launch(Launch function) { launch = function; }

const void* sim_module(int index) { return modules[index]; }

// For host code.

void** __cudaRegisterFatBinary(FatBinary* binary) {
  modules.push_back(binary->data);
  return reinterpret_cast<void**>(new int(static_cast<int>(modules.size()) - 1));
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void** handle) { delete reinterpret_cast<int*>(handle); }

char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  kernels[host] = {name, *reinterpret_cast<int*>(handle), kDynamicShared};
}

int __cudaGetKernel(const Kernel** kernel, const void* host) {
  const auto found = kernels.find(host);
  if (found == kernels.end()) return failed(kInvalidDeviceFunction);
  *kernel = &found->second;
  return kSuccess;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t dynamic_shared, void* stream) {
  configuration = {grid, block, dynamic_shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* dynamic_shared, void** stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *dynamic_shared = configuration.dynamic_shared;
  *stream = configuration.stream;
  return kSuccess;
}

int __cudaLaunchKernel(const Kernel* kernel, Dim3 grid, Dim3 block, void** arguments,
                       size_t dynamic_shared, void* stream) {
  if (!is_possible(*kernel, grid, block, dynamic_shared)) return failed(kInvalidConfiguration);
  return failed(launch(kernel->name.c_str(), kernel->module, &grid.x, &block.x, arguments,
                       dynamic_shared, stream));
}

// For the library itself.

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  const auto found = kernels.find(host);
  if (found == kernels.end()) return failed(kInvalidDeviceFunction);
  const bool is_right = attribute == kMaxDynamicSharedSize && value >= 0 &&
                        static_cast<size_t>(value) <= kMostDynamicShared;
  if (!is_right) return failed(kInvalidValue);
  found->second.most_dynamic_shared = value;
  return kSuccess;
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}

const char* cudaGetErrorString(int error) {
  switch (error) {
    case kSuccess:
      return "no error";
    case kInvalidValue:
      return "invalid argument";
    case kInvalidConfiguration:
      return "invalid configuration argument";
    case kInvalidDeviceFunction:
      return "invalid device function";
  }
  return "unspecified launch failure";
}

}  // extern "C"
