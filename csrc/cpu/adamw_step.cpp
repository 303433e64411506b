// One step of AdamW. The order of float operations is that of qlora_ref/reference/adamw_step.py;
// -ffp-contract=off keeps the compiler from fusing them.

#include "../adamw.h"
#include "levels_256.h"

namespace qlora {
namespace {

constexpr int kBlock = 256;  // values that share a scale when the moments are 8-bit

// How far ahead a loop over four arrays asks for them, in bytes.
constexpr uintptr_t kAhead = 384;

// The formula, a vector at a time.
class Rule {
 public:
  explicit Rule(const AdamwFactors& factors)
      : keep_first_(broadcast(factors.keep_first)),
        add_first_(broadcast(factors.add_first)),
        keep_second_(broadcast(factors.keep_second)),
        add_second_(broadcast(factors.add_second)),
        root_correction_(broadcast(factors.root_correction)),
        eps_(broadcast(factors.eps)),
        decay_(broadcast(factors.decay)),
        step_size_(broadcast(factors.step_size)) {}

  Floats first_moment(Floats m, Floats grad) const { return m * keep_first_ + grad * add_first_; }

  Floats second_moment(Floats v, Floats grad) const {
    return v * keep_second_ + grad * grad * add_second_;
  }

  // With the moments after this step.
  Floats param(Floats param, Floats m, Floats v) const {
    const Floats denominator = square_root(v) * root_correction_ + eps_;
    return param * decay_ - m / denominator * step_size_;
  }

 private:
  Floats keep_first_, add_first_, keep_second_, add_second_;
  Floats root_correction_, eps_, decay_, step_size_;
};

struct Tensors : AdamwTensors {
  int64_t blocks(int64_t tensor) const {
    return counts[tensor] / kBlock + (counts[tensor] % kBlock != 0);
  }

  // Calls function(grad, param) with the typed pointers of a tensor; returns its Status.
  template <typename Function>
  int with_dtypes(int64_t tensor, Function function) const {
    return with_dtype(grad_dtypes[tensor], [&](auto grad_type) {
      return with_dtype(param_dtypes[tensor], [&](auto param_type) {
        return function(static_cast<const decltype(grad_type)*>(grads[tensor]),
                        static_cast<decltype(param_type)*>(params[tensor]));
      });
    });
  }
};

int find_error(const Tensors& tensors) {
  for (int64_t tensor = 0; tensor < tensors.number; ++tensor) {
    if (tensors.counts[tensor] < 0) return kBadSize;
    const int status = tensors.with_dtypes(tensor, [](auto*, auto*) { return kOk; });
    if (status != kOk) return status;
  }
  return kOk;
}

// Calls function(tensor, first, last) for runs of whole blocks that together are all of them. The
// blocks of all tensors are shared out evenly: many small tensors keep every thread as busy as a
// large one.
template <typename Function>
void for_each_run(const Tensors& tensors, [[maybe_unused]] int threads, Function function) {
  int64_t blocks = 0;
  for (int64_t tensor = 0; tensor < tensors.number; ++tensor) blocks += tensors.blocks(tensor);
#pragma omp parallel for num_threads(threads) if (blocks * kBlock >= kParallelMinimum)
  for (int share = 0; share < threads; ++share) {
    // This share of the blocks, counted from the first block of each tensor in turn.
    int64_t first = blocks * share / threads, last = blocks * (share + 1) / threads;
    for (int64_t tensor = 0; tensor < tensors.number && last > 0; ++tensor) {
      const int64_t here = tensors.blocks(tensor);
      if (first < here) function(tensor, std::max<int64_t>(first, 0), std::min(last, here));
      first -= here;
      last -= here;
    }
  }
}

void step_with_float_moments(const Tensors& tensors, const Rule& rule, int threads) {
  for_each_run(tensors, threads, [&](int64_t tensor, int64_t first, int64_t last) {
    const int64_t start = first * kBlock;
    const int64_t count = std::min(last * kBlock, tensors.counts[tensor]) - start;
    float* m = static_cast<float*>(tensors.first_moments[tensor]) + start;
    float* v = static_cast<float*>(tensors.second_moments[tensor]) + start;
    tensors.with_dtypes(tensor, [&](auto* grads, auto* params) {
      auto* grad = grads + start;
      auto* param = params + start;
      for_each_vector(count, [=](int64_t i, auto part) {
        read_ahead<kAhead>(grad + i);
        read_ahead<kAhead>(m + i);
        read_ahead<kAhead>(v + i);
        read_ahead<kAhead>(param + i);
        const Floats g = load(grad + i, part);
        const Floats new_m = rule.first_moment(load(m + i, part), g);
        const Floats new_v = rule.second_moment(load(v + i, part), g);
        store(m + i, new_m, part);
        store(v + i, new_v, part);
        store(param + i, rule.param(load(param + i, part), new_m, new_v), part);
      });
      return kOk;
    });
  });
}

// A moment in 8 bits: what codes stand for and how they are found, those of one tensor, its scales.
struct CodedMoment {
  const Table256& levels;
  const NearestOf256& nearest;
  uint8_t* codes;
  float* absmax;
};

// One block. Its new moments are in the first-level cache before the last loop, since codes need
// the absmax of all of them. That loop has both what is slow, the root and the quotient, and the
// look-ups for the new codes: they are different units of a processor, and work side by side.
template <typename Grad, typename Param>
void step_block(const Rule& rule, int64_t block, int64_t count, const Grad* grad,
                const CodedMoment& first, const CodedMoment& second, Param* param) {
  float m[kBlock], v[kBlock];
  uint8_t* first_codes = first.codes + block * kBlock;
  uint8_t* second_codes = second.codes + block * kBlock;
  const Floats first_scale = broadcast(first.absmax[block]);
  const Floats second_scale = broadcast(second.absmax[block]);
  first.levels.for_each(first_codes, count, [=, &m](int64_t i, Floats level, auto part) {
    store(m + i, level * first_scale, part);
  });
  LargestMagnitude first_absmax, second_absmax;
  second.levels.for_each(second_codes, count, [&](int64_t i, Floats level, auto part) {
    read_ahead(grad + i);
    read_ahead(param + i);
    const Floats g = load(grad + i, part);
    const Floats new_m = rule.first_moment(load(m + i, part), g);
    const Floats new_v = rule.second_moment(level * second_scale, g);
    first_absmax.add(new_m, part);
    second_absmax.add(new_v, part);
    store(m + i, new_m, part);
    store(v + i, new_v, part);
  });

  first.absmax[block] = first_absmax.get();
  second.absmax[block] = second_absmax.get();
  const BlockQuantizer first_code(first.nearest, first.absmax[block]);
  const BlockQuantizer second_code(second.nearest, second.absmax[block]);
  for_each_vector(count, [=, &m, &v](int64_t i, auto part) {
    const Floats new_m = load(m + i, part), new_v = load(v + i, part);
    store(param + i, rule.param(load(param + i, part), new_m, new_v), part);
    store(first_codes + i, first_code(new_m), part);
    store(second_codes + i, second_code(new_v), part);
  });
}

void step_with_coded_moments(const Tensors& tensors, const Rule& rule, const float* first_codebook,
                             const float* second_codebook, int threads) {
  const Table256 first_levels(first_codebook), second_levels(second_codebook);
  const NearestOf256 first_nearest(first_codebook), second_nearest(second_codebook);
  for_each_run(tensors, threads, [&](int64_t tensor, int64_t first_block, int64_t last_block) {
    const CodedMoment first{first_levels, first_nearest,
                            static_cast<uint8_t*>(tensors.first_moments[tensor]),
                            tensors.first_absmaxes[tensor]};
    const CodedMoment second{second_levels, second_nearest,
                             static_cast<uint8_t*>(tensors.second_moments[tensor]),
                             tensors.second_absmaxes[tensor]};
    tensors.with_dtypes(tensor, [&](auto* grads, auto* params) {
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t start = block * kBlock;
        const int64_t count = std::min<int64_t>(kBlock, tensors.counts[tensor] - start);
        step_block(rule, block, count, grads + start, first, second, params + start);
      }
      return kOk;
    });
  });
}

}  // namespace

int adamw_step(int64_t number, const int64_t* counts, void* const* params, const int* param_dtypes,
               const void* const* grads, const int* grad_dtypes, void* const* first_moments,
               void* const* second_moments, float* const* first_absmaxes,
               float* const* second_absmaxes, const float* first_codebook,
               const float* second_codebook, double lr, double beta1, double beta2, double eps,
               double weight_decay, int64_t step, int threads) {
  if (number < 0 || step < 1 || threads < 1) return kBadSize;
  const Tensors tensors{{number, counts, params, param_dtypes, grads, grad_dtypes, first_moments,
                         second_moments, first_absmaxes, second_absmaxes}};
  const int status = find_error(tensors);
  if (status != kOk) return status;
  const Rule rule(AdamwFactors(lr, beta1, beta2, eps, weight_decay, static_cast<double>(step)));
  if (first_codebook == nullptr) {
    step_with_float_moments(tensors, rule, threads);
  } else {
    step_with_coded_moments(tensors, rule, first_codebook, second_codebook, threads);
  }
  return kOk;
}

}  // namespace qlora
