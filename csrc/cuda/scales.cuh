// The scale of each block of a 4-bit tensor: a float, or a code of 8 bits (double quantisation).

#pragma once

#include <cstdint>

namespace qlora {

// What is loaded of a scale: its code, if it has one, and the float, or the scale of the code.
struct StoredScale {
  uint32_t code;
  float value;
};

struct Scales {
  const uint8_t* codes;   // (blocks) or null
  const float* values;    // (blocks), or (ceil(blocks / 256)) where there are codes
  int values_shift;       // a block's value is number block >> values_shift
  const float* codebook;  // (256), if there are codes
  const float* offset;    // (1), if there are codes

  static constexpr int kNestedShift = 8;

  // absmax: (blocks) float, or uint8_t where nested_absmax is not null.
  Scales(const void* absmax, const float* nested_absmax, const float* nested_codebook,
         const float* all_offset)
      : codes(nested_absmax == nullptr ? nullptr : static_cast<const uint8_t*>(absmax)),
        values(nested_absmax == nullptr ? static_cast<const float*>(absmax) : nested_absmax),
        values_shift(nested_absmax == nullptr ? 0 : kNestedShift),
        codebook(nested_codebook),
        offset(all_offset) {}

  // Each step rounded by itself: the same bits as on the CPU.
  template <bool kNested>
  __device__ float at(int64_t block) const {
    if (!kNested) return values[block];
    return restore(codes[block], values[block >> kNestedShift], *offset);
  }

  // The same in two parts, so that nothing waits for the first one where many are loaded ahead; of
  // as many blocks as 32 bits can count.
  __device__ StoredScale load(uint32_t block) const {
    StoredScale stored;
    if (codes != nullptr) stored.code = codes[block];
    stored.value = values[block >> values_shift];
    return stored;
  }

  __device__ float load_offset() const { return codes == nullptr ? 0.0f : *offset; }

  __device__ float restore(StoredScale stored, float loaded_offset) const {
    if (codes == nullptr) return stored.value;
    // Else the compiler makes 64 bits of it where it is loaded, long before, and twice the work.
    asm("" : "+r"(stored.code));
    return restore(stored.code, stored.value, loaded_offset);
  }

 private:
  __device__ float restore(uint32_t code, float value, float loaded_offset) const {
    return __fadd_rn(__fmul_rn(codebook[code], value), loaded_offset);
  }
};

}  // namespace qlora
