// One step of AdamW on many tensors per launch.
//
// A kernel's parameters carry the list of tensors: nothing is allocated or copied for it. Tensors
// of one launch have the same dtypes. Where a tensor's arrays begin at multiples of 16 bytes,
// threads take several values in a row by whole vectors; what is left over, and all of other
// tensors, is taken value by value.

#include "adamw_8bit.cuh"

namespace qlora {
namespace {

constexpr int kValues = 8;  // in a row, of a thread
constexpr int kRows = 4;    // such rows of a thread in a unit
constexpr int kApart = kThreads * kValues;
constexpr int64_t kMostValues = int64_t{1} << 34;  // of a tensor: rows are counted in 32 bits

// A value's parameter, with the moments after this step, by the plain rule.
template <typename Param>
__device__ void step_param(const Piece& piece, const Rule& rule, int64_t i) {
  Param* param = static_cast<Param*>(piece.params) + i;
  const float m = static_cast<const float*>(piece.first_moments)[i];
  const float v = static_cast<const float*>(piece.second_moments)[i];
  round_to(rule.param(to_float(*param), m, v), param);
}

// So many rows of values, the first of which is number `first` of the piece. The parameters are
// stored when all are known to be right.
template <typename Param, typename Grad, int kNumber>
__device__ void step_rows(const Piece& piece, const Rule& rule, Range range, uint32_t first) {
  const int64_t i = int64_t{first} * kValues;
  Param* params = static_cast<Param*>(piece.params) + i;
  float new_params[kNumber][kValues];
#pragma unroll
  for (int row = 0; row < kNumber; ++row) {
    float* first_moments = static_cast<float*>(piece.first_moments) + i + row * kApart;
    float* second_moments = static_cast<float*>(piece.second_moments) + i + row * kApart;
    float grad[kValues], m[kValues], v[kValues], param[kValues];
    load_values(static_cast<const Grad*>(piece.grads) + i + row * kApart, grad);
    load_values(first_moments, m);
    load_values(second_moments, v);
    load_values(params + row * kApart, param);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      m[j] = rule.first_moment(m[j], grad[j]);
      v[j] = rule.second_moment(v[j], grad[j]);
      new_params[row][j] = rule.param_in_range(param[j], m[j], v[j], range);
    }
    store_values(m, first_moments);
    store_values(v, second_moments);
  }
  if (range.has_all()) {
#pragma unroll
    for (int row = 0; row < kNumber; ++row) store_values(new_params[row], params + row * kApart);
    return;
  }
#pragma unroll 1
  for (int j = 0; j < kNumber * kValues; ++j) {
    step_param<Param>(piece, rule, i + j / kValues * kApart + j % kValues);
  }
}

// Threads: kThreads. Aligned to 16 bytes: all arrays of the pieces; their counts are multiples of
// kValues.
template <typename Param, typename Grad>
__global__ void __launch_bounds__(kThreads) step_vectors(Pieces pieces, Rule rule) {
  const Range range(rule.has_range());
  for_each_unit(pieces, kRows * kApart, [&](const Piece& piece, int64_t first) {
    const uint32_t row = static_cast<uint32_t>(first / kValues) + threadIdx.x;
    if (first + kRows * kApart <= piece.count) {
      step_rows<Param, Grad, kRows>(piece, rule, range, row);
      return;
    }
    const uint32_t rows = static_cast<uint32_t>(piece.count / kValues);
#pragma unroll 1
    for (uint32_t i = row; i < rows; i += kThreads) {
      step_rows<Param, Grad, 1>(piece, rule, range, i);
    }
  });
}

// Threads: kThreads. No alignment.
template <typename Param, typename Grad>
__global__ void __launch_bounds__(kThreads) step_each(Pieces pieces, Rule rule) {
  for_each_unit(pieces, kThreads, [&](const Piece& piece, int64_t first) {
    const int64_t i = first + threadIdx.x;
    if (i >= piece.count) return;
    float* m = static_cast<float*>(piece.first_moments) + i;
    float* v = static_cast<float*>(piece.second_moments) + i;
    const float grad = to_float(static_cast<const Grad*>(piece.grads)[i]);
    *m = rule.first_moment(*m, grad);
    *v = rule.second_moment(*v, grad);
    step_param<Param>(piece, rule, i);
  });
}

struct Tensors : AdamwTensors {
  bool are_coded() const { return first_absmaxes != nullptr; }

  // The whole tensor.
  Piece piece(int64_t i) const {
    return {params[i],
            grads[i],
            first_moments[i],
            second_moments[i],
            are_coded() ? first_absmaxes[i] : nullptr,
            are_coded() ? second_absmaxes[i] : nullptr,
            counts[i]};
  }
};

bool is_aligned_piece(const Piece& piece) {
  return is_aligned(piece.params, kVectorBytes) && is_aligned(piece.grads, kVectorBytes) &&
         is_aligned(piece.first_moments, kVectorBytes) &&
         is_aligned(piece.second_moments, kVectorBytes);
}

// The values of a piece from the first one on, a multiple of kCodedBlock where moments are coded.
template <typename Param, typename Grad>
Piece rest_of(const Piece& piece, int64_t first) {
  const bool coded = piece.first_absmaxes != nullptr;
  const int64_t moment_bytes = coded ? 1 : sizeof(float);
  const int64_t block = first / kCodedBlock;
  return {static_cast<Param*>(piece.params) + first,
          static_cast<const Grad*>(piece.grads) + first,
          static_cast<char*>(piece.first_moments) + first * moment_bytes,
          static_cast<char*>(piece.second_moments) + first * moment_bytes,
          coded ? piece.first_absmaxes + block : nullptr,
          coded ? piece.second_absmaxes + block : nullptr,
          piece.count - first};
}

// Collects pieces and launches a kernel for as many as its parameters have room for.
template <typename Launch>
class Collector {
 public:
  explicit Collector(Launch launch) : launch_(launch) {}

  int add(Piece piece) {
    if (piece.count == 0) return kOk;
    pieces_.items[pieces_.number++] = piece;
    return pieces_.number == kMostPieces ? finish() : kOk;
  }

  int finish() {
    const int status = pieces_.number == 0 ? kOk : launch_(pieces_);
    pieces_.number = 0;
    return status;
  }

 private:
  Launch launch_;
  Pieces pieces_ = {};
};

// Steps all tensors of these dtypes: what is aligned in whole units of `unit` values by one
// launcher, the rest by the other.
template <typename Param, typename Grad, typename Vectors, typename Each>
int step_tensors(const Tensors& tensors, int param_dtype, int grad_dtype, int unit, Vectors vectors,
                 Each each) {
  Collector<Vectors> aligned(vectors);
  Collector<Each> others(each);
  for (int64_t i = 0; i < tensors.number; ++i) {
    if (tensors.param_dtypes[i] != param_dtype || tensors.grad_dtypes[i] != grad_dtype) continue;
    Piece whole = tensors.piece(i);
    const int64_t first = is_aligned_piece(whole) ? whole.count / unit * unit : 0;
    const Piece rest = rest_of<Param, Grad>(whole, first);
    whole.count = first;
    if (const int status = aligned.add(whole); status != kOk) return status;
    if (const int status = others.add(rest); status != kOk) return status;
  }
  if (const int status = aligned.finish(); status != kOk) return status;
  return others.finish();
}

template <typename Param, typename Grad>
int step_with_float_moments(const Tensors& tensors, int param_dtype, int grad_dtype,
                            const Rule& rule, cudaStream_t stream) {
  const auto vectors = [&](const Pieces& pieces) {
    const int blocks = unit_blocks(pieces, kRows * kApart);
    step_vectors<Param, Grad><<<blocks, kThreads, 0, stream>>>(pieces, rule);
    return launched();
  };
  const auto each = [&](const Pieces& pieces) {
    step_each<Param, Grad><<<unit_blocks(pieces, kThreads), kThreads, 0, stream>>>(pieces, rule);
    return launched();
  };
  return step_tensors<Param, Grad>(tensors, param_dtype, grad_dtype, kValues, vectors, each);
}

template <typename Param, typename Grad>
int step_with_coded_moments(const Tensors& tensors, int param_dtype, int grad_dtype,
                            const Rule& rule, const Codebooks& codebooks, cudaStream_t stream) {
  const auto vectors = [&](const Pieces& pieces) {
    return launch_coded_vectors<Param, Grad>(pieces, rule, codebooks, stream);
  };
  const auto each = [&](const Pieces& pieces) {
    return launch_coded_each<Param, Grad>(pieces, rule, codebooks, stream);
  };
  return step_tensors<Param, Grad>(tensors, param_dtype, grad_dtype, kCodedUnit, vectors, each);
}

int find_error(const Tensors& tensors) {
  for (int64_t i = 0; i < tensors.number; ++i) {
    if (tensors.counts[i] < 0 || tensors.counts[i] > kMostValues) return kBadSize;
    if (!is_known(tensors.param_dtypes[i]) || !is_known(tensors.grad_dtypes[i])) {
      return kUnknownDtype;
    }
  }
  return kOk;
}

}  // namespace

int adamw_step(int64_t number, const int64_t* counts, void* const* params, const int* param_dtypes,
               const void* const* grads, const int* grad_dtypes, void* const* first_moments,
               void* const* second_moments, float* const* first_absmaxes,
               float* const* second_absmaxes, const float* first_codebook,
               const float* second_codebook, double lr, double beta1, double beta2, double eps,
               double weight_decay, int64_t step, Execution how) {
  if (number < 0 || step < 1) return kBadSize;
  const Tensors tensors{{number, counts, params, param_dtypes, grads, grad_dtypes, first_moments,
                         second_moments, first_absmaxes, second_absmaxes}};
  if (const int status = find_error(tensors); status != kOk) return status;
  const Rule rule{{lr, beta1, beta2, eps, weight_decay, static_cast<double>(step)}};
  const Codebooks codebooks{first_codebook, second_codebook};
  const cudaStream_t stream = static_cast<cudaStream_t>(how);
  for (const int param_dtype : {kFloat32, kBfloat16, kFloat16}) {
    for (const int grad_dtype : {kFloat32, kBfloat16, kFloat16}) {
      const int status = with_dtype(param_dtype, [&](auto param) {
        return with_dtype(grad_dtype, [&](auto grad) {
          using Param = decltype(param);
          using Grad = decltype(grad);
          if (!tensors.are_coded()) {
            return step_with_float_moments<Param, Grad>(tensors, param_dtype, grad_dtype, rule,
                                                        stream);
          }
          return step_with_coded_moments<Param, Grad>(tensors, param_dtype, grad_dtype, rule,
                                                      codebooks, stream);
        });
      });
      if (status != kOk) return status;
    }
  }
  return kOk;
}

}  // namespace qlora
