// The nearest of sixteen levels in integers of 16 and 8 bits, which have more lanes than floats:
// for AVX2.
//
// A normalised value and the thresholds (blockwise.h) are rounded to multiples of 2^-14. Rounding
// keeps an order, so that a value that is above a threshold there is above it; one that falls on a
// threshold may be on either side, and is left to float arithmetic (about one of 1,500 values). The
// upper bytes alone decide unless they are equal, so that the search is among bytes.

#pragma once

#include <cmath>

#include "blockwise.h"

namespace qlora {

#if defined(__AVX2__) && !defined(__AVX512BW__)

class FixedPoint {
 public:
  static constexpr int kStep = 32;        // values at a time
  static constexpr float kOne = 0x1p14f;  // what 1 becomes

  explicit FixedPoint(const Decisions<16>& decisions) {
    int8_t upper[16], lower[16];
    for (int i = 0; i < 16; ++i) {
      const float threshold = i < 15 ? decisions.thresholds[i] * kOne : 0x7fff;
      const auto scaled =
          static_cast<int>(std::nearbyint(std::clamp(threshold, -0x1p15f, 32767.f)));
      upper[i] = static_cast<int8_t>(scaled >> 8);
      lower[i] = static_cast<int8_t>((scaled & 0xff) - 128);
      // Of several thresholds with one upper byte, which no value reaches but for the first ones,
      // only the first would be compared with.
      fits_ = fits_ && (i == 0 || upper[i] != upper[i - 1] || upper[i] > kOne / 256);
    }
    first_ = _mm256_set1_epi8(upper[7]);
    second_ = table([&](int i) { return upper[i / 8 * 8 + 3]; });
    third_ = table([&](int i) { return upper[i / 4 * 4 + 1]; });
    fourth_ = table([&](int i) { return upper[i / 2 * 2]; });
    upper_ = table([&](int i) { return upper[i]; });
    lower_ = table([&](int i) { return lower[i]; });
    codes_ = table([&](int i) { return decisions.codes[i]; });
  }

  // Whether `quantize` may be used.
  bool fits() const { return fits_; }

  // Packs the codes of the kStep values x * factor / kOne, which lie between -1 and 1. Where one of
  // them falls on a threshold: false, and nothing is packed.
  template <typename Value>
  bool quantize(const Value* x, Floats factor, uint8_t* packed) const {
    // In each half of a vector: the lower bytes of 8 words, then the upper ones.
    const Ints split = repeat(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const Ints first = _mm256_shuffle_epi8(round_to_words(x, factor), split);
    const Ints last = _mm256_shuffle_epi8(round_to_words(x + kStep / 2, factor), split);
    const Ints upper = _mm256_unpackhi_epi64(first, last);
    // Less 128, so that they are ordered as signed bytes.
    const Ints lower = _mm256_xor_si256(_mm256_unpacklo_epi64(first, last), bytes(-128));

    Ints below = count_below(upper);
    const Ints is_equal = _mm256_cmpeq_epi8(upper, _mm256_shuffle_epi8(upper_, below));
    const Ints rest = _mm256_shuffle_epi8(lower_, below);
    const Ints falls_on = _mm256_cmpeq_epi8(lower, rest);
    if (!_mm256_testz_si256(is_equal, falls_on)) return false;
    const Ints is_above = _mm256_and_si256(is_equal, _mm256_cmpgt_epi8(lower, rest));
    below = _mm256_sub_epi8(below, is_above);  // minus -1

    const Ints codes = _mm256_shuffle_epi8(codes_, below);
    // 16 times the even code and the odd one.
    const Ints pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
    const __m128i packed_pairs =
        _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    // Either half has two pairs of each vector of floats.
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi8(packed_pairs, order));
    return true;
  }

 private:
  static Ints bytes(int8_t value) { return _mm256_set1_epi8(value); }
  static Ints repeat(__m128i half) { return _mm256_broadcastsi128_si256(half); }

  // Sixteen bytes to look up.
  template <typename Function>
  static Ints table(Function entry) {
    uint8_t entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = static_cast<uint8_t>(entry(i));
    return repeat(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }

  template <typename Value>
  static Ints round_to_words(const Value* x, Floats factor) {
    return _mm256_packs_epi32(_mm256_cvtps_epi32(load(x) * factor),
                              _mm256_cvtps_epi32(load(x + kLanes) * factor));
  }

  // The number of thresholds whose upper byte is below: a binary search.
  Ints count_below(Ints upper) const {
    Ints below = _mm256_and_si256(_mm256_cmpgt_epi8(upper, first_), bytes(8));
    below = add_where_above(below, 4, upper, _mm256_shuffle_epi8(second_, below));
    below = add_where_above(below, 2, upper, _mm256_shuffle_epi8(third_, below));
    return _mm256_sub_epi8(
        below, _mm256_cmpgt_epi8(upper, _mm256_shuffle_epi8(fourth_, below)));  // minus -1
  }

  static Ints add_where_above(Ints below, int8_t amount, Ints upper, Ints threshold) {
    const Ints is_above = _mm256_cmpgt_epi8(upper, threshold);
    return _mm256_add_epi8(below, _mm256_and_si256(is_above, bytes(amount)));
  }

  bool fits_ = true;
  Ints first_, second_, third_, fourth_;  // the upper bytes of each step of the search
  Ints upper_, lower_;                    // the bytes of all thresholds; lower ones less 128
  Ints codes_;
};

#else

// Elsewhere float vectors are as fast, or have no such look-ups.
struct FixedPoint {
  static constexpr int kStep = 32;
  static constexpr float kOne = 1.0f;
  explicit FixedPoint(const Decisions<16>&) {}
  static constexpr bool fits() { return false; }
  template <typename Value>
  bool quantize(const Value*, Floats, uint8_t*) const {
    return false;
  }
};

#endif

}  // namespace qlora
