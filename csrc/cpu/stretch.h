// Stretches of codes, restored in the order in which they are cheapest to look up.
//
// A stretch is a vector of codes. Each of its lanes, as wide as what is multiplied, has several of
// them, and each step shifts another one to the lowest bits of all lanes: no code is moved to a
// lane of its own. Codes then come out in an order that is not theirs. Activations are put into the
// same order beforehand, and the sums of their products do not depend on it.

#pragma once

#include "weight.h"

namespace qlora {

constexpr int kStretch = 8 * kLanes;

// Steps that look up a stretch, and lanes that each of them looks up.
template <typename Element>
constexpr int kStretchSteps = 2 * sizeof(Element);
template <typename Element>
constexpr int kStretchWidth = kStretch / kStretchSteps<Element>;

// Which code of a stretch a step finds in a lane: of two in a byte the odd one lies lower.
template <typename Element>
constexpr int place_in_stretch(int step, int lane) {
  return lane * kStretchSteps<Element> + (step ^ 1);
}

// Puts the elements of a stretch into the order in which its codes are looked up: where `place`
// says which of them a step finds in a lane.
template <typename Element, typename Place>
void order_stretch(const Element* x, Place place, Element* ordered) {
  constexpr int kWidth = kStretchWidth<Element>;
  for (int step = 0; step < kStretchSteps<Element>; ++step) {
    for (int lane = 0; lane < kWidth; ++lane) ordered[step * kWidth + lane] = x[place(step, lane)];
  }
}

// Whether rows are whole stretches, of which each half lies in one block.
inline bool has_whole_stretches(const Weight& weight) {
  const int64_t block = weight.block_size;
  return block >= kStretch / 2 && (block & (block - 1)) == 0 && weight.columns % kStretch == 0;
}

// As decode_row, for whole stretches.
template <typename Stretch, typename Element>
void decode_stretches(const Weight& weight, int64_t row, int64_t begin, int64_t count,
                      Element* out) {
  const int block_bits = __builtin_ctzll(static_cast<uint64_t>(weight.block_size));
  int64_t position = row * weight.columns + begin;
  for (const int64_t end = position + count; position < end; position += kStretch) {
    const float first = weight.scales[position >> block_bits];
    const float second = weight.scales[(position + kStretch / 2) >> block_bits];
    const Stretch stretch(weight.codebook, first, second);
    Ints codes;
    std::memcpy(&codes, weight.packed + position / 2, sizeof codes);
#pragma GCC unroll 8
    for (int step = 0; step < kStretchSteps<Element>; ++step) {
      const auto lanes = stretch.look_up(codes, step);
      std::memcpy(out, &lanes, sizeof lanes);
      out += kStretchWidth<Element>;
    }
  }
}

#if defined(__AVX512BW__)

// What a step looks up: the lowest 5 bits of a lane, as wide as Element, are its code, and above it
// 1 in the second half of the stretch.
template <typename Element>
Ints index_in_step(Ints codes, int step) {
  constexpr bool kIsWord = sizeof(Element) == 2;
  const Ints lowest_4_bits = kIsWord ? _mm512_set1_epi16(15) : broadcast(15);
  const __m256i sixteens = kIsWord ? _mm256_set1_epi16(16) : _mm256_set1_epi32(16);
  const Ints half = _mm512_inserti64x4(broadcast(0), sixteens, 1);
  const Ints shifted =
      kIsWord ? _mm512_srli_epi16(codes, 4 * step) : _mm512_srli_epi32(codes, 4 * step);
  // The truth table of shifted & lowest_4_bits | half.
  return _mm512_ternarylogic_epi32(shifted, lowest_4_bits, half, (0xf0 & 0xcc) | 0xaa);
}

// What the codes of a stretch stand for in float, as rounded to Value. Other elements:
// format_bfloat16.h.
template <typename Value>
class FloatStretch {
 public:
  FloatStretch() = default;
  FloatStretch(const float* codebook, float first, float second)
      : first_(rounded<Value>(load(codebook) * broadcast(first))),
        second_(rounded<Value>(load(codebook) * broadcast(second))) {}

  Floats look_up(Ints codes, int step) const {
    return _mm512_permutex2var_ps(first_, index_in_step<float>(codes, step), second_);
  }

 private:
  Floats first_, second_;  // levels scaled for either half
};

#endif

}  // namespace qlora
