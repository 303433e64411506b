// Which interface the library has, and what its error codes mean.

#include "launch.cuh"

int qlora::interface_version() { return kInterfaceVersion; }

const char* qlora::error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status - kCudaError));
}
