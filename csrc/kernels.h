// Every function that the compiled libraries export, with its contract. What is computed, to the
// bit, stands in qlora_ref/ops.py; qlora_ref/native.py calls these through ctypes.
//
// Plain C ABI: pointers to contiguous arrays, element counts, a dtype, how to run; nothing of
// Python or torch. Pointers may be null where their array is empty. block_size is even and at least
// 2; blocks = ceil(n / block_size).
//
// libqlora_cpu_<isa> and libqlora_cuda export the same functions. In the CUDA library pointers are
// addresses on the current device, but for the lists of adamw_step, which the host reads; the work
// is put on a stream and the functions return at once.

#pragma once

#include <cstdint>

namespace qlora {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// What each function returns; in the CUDA library also kCudaError + a cudaError_t.
enum Status : int { kOk = 0, kUnknownDtype = 1, kBadSize = 2, kNoMemory = 3, kCudaError = 1000 };

// What the sources in cpu/ are compiled for; each set includes those before it.
enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// Raised whenever a signature below changes, so that Python refuses a library built before that.
constexpr int kInterfaceVersion = 5;

// The kernels behind matmul_4bit in the CUDA library. All but the first multiply bfloat16 or
// float16 on tensor cores, with levels rounded to that type (for many tokens also scales, and their
// products). They need a block_size that is a power of two from 32 on, K a multiple of 32 (N of 8
// when transposed); a level is looked up in a table in shared memory, or by byte permutations.
enum MatmulKernel : int {
  kGeneral = 0,  // any shape and dtype, float arithmetic
  kFewTokensTable = 1,
  kFewTokensPermute = 2,  // at most 32 tokens, not transposed
  kManyTokensTable = 3,
  kManyTokensPermute = 4,
};

// How a function is run: a number of threads (results do not depend on it), or a cudaStream_t.
#ifdef QLORA_CUDA
using Execution = void*;
#else
using Execution = int;
#endif

extern "C" {

// kInterfaceVersion, as the library was compiled with it.
int interface_version();

#ifdef QLORA_CUDA
// The text for a code of kCudaError and above.
const char* error_text(int status);
#else
// The last Isa that this processor and its operating system run. On Linux it asks for the right to
// use AMX's tiles, which a process needs once.
int best_isa();

// Multiplies and adds numbers of a dtype in registers, on each of `threads` threads: what products
// could reach if nothing had to be moved. *operations = how many it took, which rounds and threads
// multiply.
int multiply_in_registers(int dtype, int64_t rounds, int64_t* operations, int threads);
#endif

// code[i] = the code nearest to x[i] / absmax[i / block_size], packed with the even one high;
// absmax[b] = the largest |x| of block b. x: dtype (n); codebook (16); packed (ceil(n / 2)).
int quantize_4bit(const void* x, int dtype, int64_t n, const float* codebook, int64_t block_size,
                  uint8_t* packed, float* absmax, Execution how);

// y[i] = codebook[code i] * scale of block i / block_size, rounded once to dtype. Scales: absmax
// float (blocks), the next three null; or their codes uint8_t (blocks), restored as
// nested_codebook[absmax[b]] * nested_absmax[b / 256] + *offset, each step rounded to float.
// packed (ceil(n / 2)); codebook (16); y: dtype (n).
int dequantize_4bit(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                    const float* nested_codebook, const float* offset, const float* codebook,
                    int64_t block_size, int64_t n, void* y, int dtype, Execution how);

// codes[i] = the code nearest to x[i] / absmax[i / block_size]; absmax as in quantize_4bit.
// x: dtype (n); codebook (256); codes (n); absmax (blocks).
int quantize_8bit(const void* x, int dtype, int64_t n, const float* codebook, int64_t block_size,
                  uint8_t* codes, float* absmax, Execution how);

// y[i] = codebook[codes[i]] * absmax[i / block_size], rounded once to dtype.
// codes (n); absmax (blocks); codebook (256); y: dtype (n).
int dequantize_8bit(const uint8_t* codes, const float* absmax, const float* codebook,
                    int64_t block_size, int64_t n, void* y, int dtype, Execution how);

// y = x W^T + bias for the weight W (rows, columns), or y = x W when transposed (bias null); sums
// in float, one rounding to dtype. Scales as in dequantize_4bit. x: dtype (tokens, columns), y:
// dtype (tokens, rows), or the other way round when transposed.
int matmul_4bit(const void* x, int dtype, int64_t tokens, const uint8_t* packed, const void* absmax,
                const float* nested_absmax, const float* nested_codebook, const float* offset,
                const float* codebook, int64_t block_size, int64_t rows, int64_t columns,
                const void* bias, int transposed, void* y,
#ifdef QLORA_CUDA
                // The kernel to run (enum MatmulKernel); the sum over K (over N when transposed) is
                // cut into this many parts, added up in order; float (splits, tokens, outputs), or
                // null for one part. qlora_ref/matmul_plan.py chooses.
                int kernel, int splits, float* workspace,
#endif
                Execution how);

// One step of AdamW on a list of tensors, in place; each array has an entry for each of them. A
// tensor has counts[t] values, a moment as many: float, and then the absmaxes and codebooks are
// null; or uint8_t codes, with scales float (ceil(counts[t] / 256)) and codebooks (256). step >= 1.
int adamw_step(int64_t number, const int64_t* counts, void* const* params, const int* param_dtypes,
               const void* const* grads, const int* grad_dtypes, void* const* first_moments,
               void* const* second_moments, float* const* first_absmaxes,
               float* const* second_absmaxes, const float* first_codebook,
               const float* second_codebook, double lr, double beta1, double beta2, double eps,
               double weight_decay, int64_t step, Execution how);

}  // extern "C"

}  // namespace qlora
