// What adamw_step is given, for every library that has it.

#pragma once

#include <cmath>
#include <cstdint>

namespace qlora {

// The factors of the formula in qlora_ref/ops.py: worked out in double and rounded once.
struct AdamwFactors {
  float keep_first, add_first, keep_second, add_second;
  float root_correction, eps, decay, step_size;

  AdamwFactors(double lr, double beta1, double beta2, double epsilon, double weight_decay,
               double step)
      : keep_first(static_cast<float>(beta1)),
        add_first(static_cast<float>(1 - beta1)),
        keep_second(static_cast<float>(beta2)),
        add_second(static_cast<float>(1 - beta2)),
        root_correction(static_cast<float>(std::pow(1 - std::pow(beta2, step), -0.5))),
        eps(static_cast<float>(epsilon)),
        decay(static_cast<float>(1 - lr * weight_decay)),
        step_size(static_cast<float>(lr / (1 - std::pow(beta1, step)))) {}
};

// The arguments that differ from tensor to tensor.
struct AdamwTensors {
  int64_t number;
  const int64_t* counts;
  void* const* params;
  const int* param_dtypes;
  const void* const* grads;
  const int* grad_dtypes;
  void* const* first_moments;
  void* const* second_moments;
  float* const* first_absmaxes;
  float* const* second_absmaxes;
};

}  // namespace qlora
