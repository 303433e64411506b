// How FewTokens looks codes up and multiplies them, step by step: in float or, with AVX-512 BF16,
// in pairs of bfloat16; by levels as they are, or scaled ones.

#pragma once

#include "format_bfloat16.h"
#include "format_float.h"
#include "stretch.h"

namespace qlora {

// What is the same however floats are looked up.
struct InFloat {
  using Element = float;
  using Weights = Floats;
  static constexpr int kSteps = kStretchSteps<float>;

  // The code's place in the stretch.
  static int place(int step, int lane) { return place_in_stretch<float>(step, lane); }
  static Floats load_lanes(const float* x) { return load(x); }
  static Floats multiply_add(Floats weights, Floats x, Floats sum) {
    return fused_multiply_add(weights, x, sum);
  }
  template <typename Value>
  static float element(Value x) {
    return to_float(x);
  }
  static bool suits(const float*) { return true; }
};

// Levels that are looked up as they are: it is sums that are scaled.
struct UnscaledLevels {
  static constexpr bool kScalesLevels = false;
  struct Levels {};
};

// Whether levels may be rounded to bfloat16 before they are scaled, in place of weights after it:
// all weights of a level then have the same error. In units of 2^-8, the relative error of a number
// rounded to bfloat16 is 0.4 (root mean square), that of the result among them. With up to 0.6 for
// the levels, a sum of one sign, in which these errors add up, stays within twice the error it has
// with rounded weights, which average out: (0.6^2 + 0.4^2)^(1/2) < 2 * 0.4. That is for weights
// spread over the levels; with all of them at the worst one it is (1 + 0.4^2)^(1/2) / 0.4 < 3.
inline bool levels_suit_bfloat16(const float* codebook) {
  float squares = 0.0f, levels = 0.0f;
  for (int i = 0; i < 16; ++i) {
    if (codebook[i] == 0.0f) continue;
    const float rounded = to_float(from_float<Bfloat16>(codebook[i]));
    const float error = (rounded - codebook[i]) / codebook[i] * 0x1p8f;
    squares += error * error;
    levels += 1.0f;
  }
  return squares <= 0.36f * levels;
}

// In float. A 32-bit lane has 8 codes, of which a shift brings one to the lowest bits.
struct FloatSteps : InFloat, UnscaledLevels {
  static constexpr int kTogether = 1;  // steps that are looked up at once
  static constexpr int kLeastBlock = kSteps;
  // Tokens and rows that are worked on at a time: a register for each pair of them.
  static constexpr int kFew = kLanes == 16 ? 8 : 4;
  static constexpr int kRows = 2;

  Table16 levels;

  explicit FloatSteps(const float* codebook) : levels(codebook) {}
  void look_up(Ints codes, int step, Floats* weights) const {
    weights[0] = levels[shift_right(codes, 4 * step)];
  }
};

#if defined(__AVX512BF16__)
// In bfloat16: the halves of a lane are multiplied and added together.
struct InPairs {
  using Element = uint16_t;
  using Weights = __m512bh;
  static constexpr int kSteps = kStretchSteps<uint16_t>;

  static int place(int step, int half_lane) { return place_in_stretch<uint16_t>(step, half_lane); }
  static __m512bh load_lanes(const uint16_t* x) { return PairArithmetic::load_lanes(x); }
  static Floats multiply_add(__m512bh weights, __m512bh x, Floats sum) {
    return _mm512_dpbf16_ps(sum, weights, x);
  }
  static uint16_t element(Bfloat16 x) { return x.bits; }
  static bool suits(const float* codebook) { return levels_suit_bfloat16(codebook); }
};

struct PairSteps : InPairs, UnscaledLevels {
  static constexpr int kTogether = 1;
  static constexpr int kLeastBlock = kStretchSteps<float>;
  static constexpr int kFew = 8, kRows = 2;

  Ints levels;

  explicit PairSteps(const float* codebook)
      : levels(_mm512_broadcast_i64x4(narrow_to_bfloat16(load(codebook)))) {}
  void look_up(Ints codes, int step, __m512bh* weights) const {
    const Ints words = _mm512_srli_epi16(codes, 4 * step);
    weights[0] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(words, levels));
  }
};
#endif

#if defined(__AVX512BW__)
// Levels are scaled for each stretch, so that the sums of many tokens need not be.
template <typename Arithmetic, typename Stretch>
struct ScaledSteps : Arithmetic {
  using Levels = Stretch;
  static constexpr bool kScalesLevels = true;
  static constexpr int kTogether = 1;
  static constexpr int kLeastBlock = kStretch / 2;
  static constexpr int kFew = 8, kRows = 2;

  explicit ScaledSteps(const float*) {}
  static bool suits(const float*) { return true; }
};
#endif

#if defined(__AVX2__) && !defined(__AVX512BW__)
// In float, looked up by bytes: all even codes of the stretch, then the odd ones.
struct ByteSteps : InFloat, UnscaledLevels {
  static constexpr int kTogether = 4;
  static constexpr int kLeastBlock = 32;
  static constexpr int kFew = 8, kRows = 1;

  FloatTables<float> tables;

  explicit ByteSteps(const float* codebook) : tables(codebook) {}
  static int place(int step, int lane) {
    const int byte = lane / 4 * 16 + step % 4 * 4 + lane % 4;
    return 2 * byte + step / 4;
  }
  void look_up(Ints codes, int step, Floats* weights) const {
    const Ints shifted = step == 0 ? _mm256_srli_epi16(codes, 4) : codes;
    tables.look_up(_mm256_and_si256(shifted, _mm256_set1_epi8(15)), weights);
  }
};
#endif

}  // namespace qlora
