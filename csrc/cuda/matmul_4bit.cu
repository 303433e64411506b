// Products with a 4-bit weight: which kernel makes them is chosen in qlora_ref/matmul_plan.py.

#include "split_sum.cuh"

namespace qlora {
namespace {

int multiply(const Matmul& matmul, int kernel) {
  switch (kernel) {
    case kGeneral:
      return matmul_general(matmul);
    case kFewTokensTable:
    case kFewTokensPermute:
      return matmul_few_tokens(matmul, kernel == kFewTokensTable);
    case kManyTokensTable:
    case kManyTokensPermute:
      return matmul_many_tokens(matmul, kernel == kManyTokensTable);
  }
  return kBadSize;
}

}  // namespace

int matmul_4bit(const void* x, int dtype, int64_t tokens, const uint8_t* packed, const void* absmax,
                const float* nested_absmax, const float* nested_codebook, const float* offset,
                const float* codebook, int64_t block_size, int64_t rows, int64_t columns,
                const void* bias, int transposed, void* y, int kernel, int splits, float* workspace,
                Execution how) {
  if (tokens < 0 || rows < 0 || columns < 0 || block_size < 2 || block_size % 2 != 0 ||
      splits < 1 || (splits > 1 && workspace == nullptr)) {
    return kBadSize;
  }
  if (!is_known(dtype)) return kUnknownDtype;
  const Scales scales(absmax, nested_absmax, nested_codebook, offset);
  const Weight weight{packed, scales, codebook, block_size, rows, columns};
  Matmul matmul{x,         dtype,
                tokens,    weight,
                bias,      transposed != 0,
                y,         splits,
                workspace, static_cast<cudaStream_t>(how)};
  if (tokens == 0 || matmul.outputs() == 0) return kOk;
  if (matmul.inputs() == 0) {  // a sum of no parts: the bias, or zeros
    matmul.splits = 0;
    return add_splits(matmul);
  }
  const int status = multiply(matmul, kernel);
  return status != kOk || splits == 1 ? status : add_splits(matmul);
}

}  // namespace qlora
