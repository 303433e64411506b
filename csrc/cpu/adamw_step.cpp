// One step of AdamW. The order of float operations is that of qlora_ref/reference/adamw_step.py;
// -ffp-contract=off keeps the compiler from fusing them.

#include "blockwise.h"

namespace qlora {
namespace {

constexpr int kBlock = 256;  // values that share a scale when the moments are 8-bit

// Worked out in double, rounded once.
struct Factors {
  float keep_first, add_first;    // beta1, 1 - beta1
  float keep_second, add_second;  // beta2, 1 - beta2
  float root_correction;          // (1 - beta2^step)^(-1/2)
  float eps;
  float decay;      // 1 - lr * weight_decay
  float step_size;  // lr / (1 - beta1^step)
};

Factors factors_of(double lr, double beta1, double beta2, double eps, double weight_decay,
                   int64_t step) {
  const double exponent = static_cast<double>(step);
  return {static_cast<float>(beta1),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(std::pow(1 - std::pow(beta2, exponent), -0.5)),
          static_cast<float>(eps),
          static_cast<float>(1 - lr * weight_decay),
          static_cast<float>(lr / (1 - std::pow(beta1, exponent)))};
}

void update(const Factors& factors, int count, const float* grad, float* __restrict m,
            float* __restrict v, float* __restrict param) {
  for (int i = 0; i < count; ++i) {
    const float g = grad[i];
    m[i] = m[i] * factors.keep_first + g * factors.add_first;
    v[i] = v[i] * factors.keep_second + g * g * factors.add_second;
    const float denominator = std::sqrt(v[i]) * factors.root_correction + factors.eps;
    param[i] = param[i] * factors.decay - m[i] / denominator * factors.step_size;
  }
}

// An array of one of the float formats.
struct Floats {
  void* values;
  int dtype;

  void read(int64_t start, int count, float* block) const {
    with_dtype(dtype, [&](auto type) {
      const auto* source = static_cast<const decltype(type)*>(values) + start;
      for (int i = 0; i < count; ++i) block[i] = to_float(source[i]);
      return kOk;
    });
  }

  void write(int64_t start, int count, const float* block) const {
    with_dtype(dtype, [&](auto type) {
      auto* target = static_cast<decltype(type)*>(values) + start;
      for (int i = 0; i < count; ++i) target[i] = from_float<decltype(type)>(block[i]);
      return kOk;
    });
  }

  bool has_known_dtype() const {
    return with_dtype(dtype, [](auto) { return kOk; }) == kOk;
  }
};

// Moments of 8 bits: their codes and scales, and the levels that the codes stand for.
struct CodedMoment {
  uint8_t* codes;
  float* absmax;
  const float* codebook;
  Decisions<256> decisions;

  CodedMoment(void* codes, float* absmax, const float* codebook)
      : codes(static_cast<uint8_t*>(codes)),
        absmax(absmax),
        codebook(codebook),
        decisions(codebook) {}

  void read(int64_t block, int count, float* moment) const {
    dequantize_block_8bit(codes + block * kBlock, count, absmax[block], codebook, moment);
  }

  void write(int64_t block, int count, const float* moment) const {
    absmax[block] = quantize_block_8bit(moment, count, decisions, codes + block * kBlock);
  }
};

}  // namespace

int adamw_step(void* param, int param_dtype, const void* grad, int grad_dtype, void* first_moment,
               void* second_moment, float* first_absmax, float* second_absmax,
               const float* first_codebook, const float* second_codebook, int64_t n, double lr,
               double beta1, double beta2, double eps, double weight_decay, int64_t step,
               int threads) {
  if (is_bad_size(n, kBlock, threads) || step < 1) return kBadSize;
  const Factors factors = factors_of(lr, beta1, beta2, eps, weight_decay, step);

  const Floats params{param, param_dtype}, grads{const_cast<void*>(grad), grad_dtype};
  if (!params.has_known_dtype() || !grads.has_known_dtype()) return kUnknownDtype;

  const auto update_block = [&](int64_t start, int count, float* m, float* v) {
    float grad32[kBlock], param32[kBlock];
    grads.read(start, count, grad32);
    params.read(start, count, param32);
    update(factors, count, grad32, m, v, param32);
    params.write(start, count, param32);
  };
  if (first_codebook == nullptr) {
    float* m = static_cast<float*>(first_moment);
    float* v = static_cast<float*>(second_moment);
    for_each_block(n, kBlock, threads, [&](int64_t, int64_t start, int64_t count) {
      update_block(start, static_cast<int>(count), m + start, v + start);
    });
    return kOk;
  }
  const CodedMoment first(first_moment, first_absmax, first_codebook);
  const CodedMoment second(second_moment, second_absmax, second_codebook);
  for_each_block(n, kBlock, threads, [&](int64_t block, int64_t start, int64_t count64) {
    const int count = static_cast<int>(count64);
    float m[kBlock], v[kBlock];
    first.read(block, count, m);
    second.read(block, count, v);
    update_block(start, count, m, v);  // with the moments as they are before rounding
    first.write(block, count, m);
    second.write(block, count, v);
  });
  return kOk;
}

}  // namespace qlora
