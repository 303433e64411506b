// The nearest of sixteen levels in integers of 16 and 8 bits, which have more lanes than floats:
// for AVX2.
//
// A normalised value and the thresholds (blockwise.h) are rounded to multiples of 2^-15. Rounding
// keeps an order, so that a value that is above a threshold there is above it; one that falls on a
// threshold may be on either side, and is left to float arithmetic (about one of 3,000 values). The
// upper bytes alone decide unless they are equal, so that the search is among bytes: the highest 4
// bits name one of 16 cells, which hold at most two thresholds each.

#pragma once

#include <array>
#include <cmath>

#include "blockwise.h"

namespace qlora {

#if defined(__AVX2__) && !defined(__AVX512BW__)

class FixedPoint {
 public:
  static constexpr int kStep = 32;        // values at a time
  static constexpr float kOne = 0x1p15f;  // what 1 becomes, but for saturation

  explicit FixedPoint(const Decisions<16>& decisions) {
    Bytes below{}, first{}, second{}, upper{}, lower{};
    first.fill(127);  // nothing is above
    second.fill(127);
    upper.fill(-128);  // with these as well
    lower.fill(127);
    for (int i = 0; i < 15; ++i) {
      if (!(decisions.thresholds[i] < std::numeric_limits<float>::infinity())) continue;
      const float threshold = std::clamp(decisions.thresholds[i] * kOne, -0x1p15f, 32767.f);
      const int scaled = static_cast<int>(std::nearbyint(threshold));
      upper[i] = static_cast<int8_t>(scaled >> 8);
      lower[i] = static_cast<int8_t>((scaled & 0xff) - 128);
      const int cell = upper[i] >> 4;
      for (int above = cell + 1; above < 8; ++above) ++below[above & 15];
      int8_t& place = first[cell & 15] == 127 ? first[cell & 15] : second[cell & 15];
      // Of two thresholds with one upper byte only the first would be compared with.
      fits_ = fits_ && place == 127 && (i == 0 || upper[i] != upper[i - 1]);
      place = upper[i];
    }
    below_ = table(below);
    first_ = table(first);
    second_ = table(second);
    upper_ = table(upper);
    lower_ = table(lower);
    codes_ = repeat(_mm_loadu_si128(reinterpret_cast<const __m128i*>(decisions.codes)));
  }

  // Whether `quantize` may be used.
  bool fits() const { return fits_; }

  // Packs the codes of the kStep values x * factor / kOne, which lie between -1 and 1. False where
  // one of them falls on a threshold: what was packed is then of no use.
  template <typename Value>
  bool quantize(const Value* x, Floats factor, uint8_t* packed) const {
    // In each half of a vector: the lower bytes of 8 words, then the upper ones.
    const Ints head = _mm256_shuffle_epi8(round_to_words(x, factor), split_);
    const Ints tail = _mm256_shuffle_epi8(round_to_words(x + kStep / 2, factor), split_);
    const Ints upper = _mm256_unpackhi_epi64(head, tail);
    // Less 128, so that they are ordered as signed bytes.
    const Ints lower = _mm256_xor_si256(_mm256_unpacklo_epi64(head, tail), sign_bits_);

    const Ints cell = _mm256_and_si256(_mm256_srli_epi16(upper, 4), lowest_4_bits_);
    Ints below = _mm256_shuffle_epi8(below_, cell);
    below = add_where_above(below, upper, _mm256_shuffle_epi8(first_, cell));
    below = add_where_above(below, upper, _mm256_shuffle_epi8(second_, cell));

    const Ints is_equal = _mm256_cmpeq_epi8(upper, _mm256_shuffle_epi8(upper_, below));
    const Ints rest = _mm256_shuffle_epi8(lower_, below);
    const Ints falls_on = _mm256_cmpeq_epi8(lower, rest);
    const Ints is_above = _mm256_and_si256(is_equal, _mm256_cmpgt_epi8(lower, rest));
    below = _mm256_sub_epi8(below, is_above);  // minus -1

    const Ints codes = _mm256_shuffle_epi8(codes_, below);
    const Ints pairs = _mm256_maddubs_epi16(codes, places_);
    const __m128i packed_pairs =
        _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi8(packed_pairs, order_));
    return _mm256_testz_si256(is_equal, falls_on);
  }

 private:
  using Bytes = std::array<int8_t, 16>;

  static Ints repeat(__m128i half) { return _mm256_broadcastsi128_si256(half); }

  // Sixteen bytes to look up.
  static Ints table(const Bytes& bytes) {
    return repeat(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes.data())));
  }

  template <typename Value>
  static Ints round_to_words(const Value* x, Floats factor) {
    return _mm256_packs_epi32(_mm256_cvtps_epi32(load(x) * factor),
                              _mm256_cvtps_epi32(load(x + kLanes) * factor));
  }

  static Ints add_where_above(Ints below, Ints upper, Ints threshold) {
    return _mm256_sub_epi8(below, _mm256_cmpgt_epi8(upper, threshold));  // minus -1
  }

  bool fits_ = true;
  // By cell: the number of thresholds in the cells before, and the upper bytes of its own.
  Ints below_, first_, second_;
  Ints upper_, lower_;  // the bytes of all thresholds; lower ones less 128
  Ints codes_;
  // Constants are read from here: a compiler would make them anew for each block.
  const Ints split_ = repeat(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const Ints sign_bits_ = _mm256_set1_epi8(-128);
  const Ints lowest_4_bits_ = _mm256_set1_epi8(15);
  const Ints places_ = _mm256_set1_epi16(0x0110);  // 16 times the even code and the odd one
  // Either half has two pairs of each vector of floats.
  const __m128i order_ = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
};

#else

// Elsewhere float vectors are as fast, or have no such look-ups.
struct FixedPoint {
  static constexpr int kStep = 64;
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
