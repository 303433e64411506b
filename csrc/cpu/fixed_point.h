// The nearest of sixteen levels in integers of 16 bits or less, which have more lanes than floats:
// for AVX2 and AVX-512.
//
// A normalised value and the thresholds (blockwise.h) are rounded to multiples of 2^-15. Rounding
// keeps an order, so that a value that is above a threshold there is above it; one that falls on a
// threshold may be on either side, and is left to float arithmetic (about one of 3,000 values).

#pragma once

#include <array>
#include <cmath>

#include "blockwise.h"

namespace qlora {

#if defined(__AVX2__)

// A threshold as a multiple of 2^-15. No value is above the largest one, as none is above 1.
inline int round_to_word(float threshold) {
  return static_cast<int>(std::nearbyint(std::clamp(threshold * 0x1p15f, -0x1p15f, 32767.f)));
}

#endif

#if defined(__AVX512BW__)

// The highest 5 bits of a word name one of 32 cells, which hold one threshold each at most.
class FixedPoint {
 public:
  static constexpr int kStep = 64;        // values at a time
  static constexpr float kOne = 0x1p15f;  // what 1 becomes, but for saturation

  explicit FixedPoint(const Decisions<16>& decisions) {
    // What is added to a word, by its cell, so that the sum holds
    //
    //     the number of thresholds below it            in the upper 4 bits,
    //     how far it lies above its cell's threshold   in the lower 12, modulo 2^12.
    //
    // The distance is taken from one more count, so that it carries into the number where it is not
    // negative. It is 0 where the word falls on the threshold, and never in a cell without one.
    constexpr int kCell = 1 << 11, kOneMore = 1 << 12;
    int thresholds[32], below[32] = {};
    std::fill(thresholds, thresholds + 32, kNone);
    for (int i = 0; i < 15; ++i) {
      if (!(decisions.thresholds[i] < std::numeric_limits<float>::infinity())) continue;
      const int threshold = round_to_word(decisions.thresholds[i]);
      const int cell = threshold >> 11;
      for (int above = cell + 1; above < 16; ++above) ++below[above & 31];
      fits_ = fits_ && thresholds[cell & 31] == kNone;
      thresholds[cell & 31] = threshold;
    }
    uint16_t to_count[32];
    for (int cell = -16; cell < 16; ++cell) {
      const int i = cell & 31;
      const int distance = thresholds[i] == kNone ? 1 - cell * kCell : kOneMore - thresholds[i];
      to_count[i] = static_cast<uint16_t>(below[i] * kOneMore + distance);
    }
    std::memcpy(&to_count_, to_count, sizeof to_count_);
    codes_ = repeat(_mm_loadu_si128(reinterpret_cast<const __m128i*>(decisions.codes)));
  }

  // Whether `quantize` may be used.
  bool fits() const { return fits_; }

  // Packs the codes of kStep values, of which the first half, times `head / kOne`, and the second,
  // times `tail / kOne`, lie between -1 and 1. False where one of them falls on a threshold: what
  // was packed is then of no use.
  template <typename Value>
  bool quantize(const Value* x, Floats head, Floats tail, uint8_t* packed) const {
    const Ints first = count(round_to_words(x, head));
    const Ints last = count(round_to_words(x + kStep / 2, tail));

    const Ints below =
        _mm512_packus_epi16(_mm512_srli_epi16(first, 12), _mm512_srli_epi16(last, 12));
    const Ints codes = _mm512_shuffle_epi8(codes_, below);
    const Ints pairs = _mm512_maddubs_epi16(codes, places_);
    const Ints packed_pairs = _mm512_packus_epi16(pairs, pairs);
    const Ints in_order = _mm512_permutexvar_epi16(order(Value{}), packed_pairs);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_castsi512_si256(in_order));

    return (_mm512_testn_epi16_mask(first, lowest_12_bits_) |
            _mm512_testn_epi16_mask(last, lowest_12_bits_)) == 0;
  }

 private:
  static constexpr int kNone = 1 << 16;  // is no word

  static Ints repeat(__m128i quarter) { return _mm512_broadcast_i32x4(quarter); }

  Ints count(Ints words) const {
    const Ints cell = _mm512_srli_epi16(words, 11);
    return _mm512_add_epi16(words, _mm512_permutexvar_epi16(cell, to_count_));
  }

  static Ints round_to_words(Floats low, Floats high, Floats factor) {
    return _mm512_packs_epi32(_mm512_cvtps_epi32(low * factor), _mm512_cvtps_epi32(high * factor));
  }

  // Each quarter of a vector has 4 words of the first vector of floats and 4 of the second.
  template <typename Value>
  static Ints round_to_words(const Value* x, Floats factor) {
    return round_to_words(load(x), load(x + kLanes), factor);
  }
  template <typename Value>
  Ints order(Value) const {
    return order_of_quarters_;
  }

  // The words stay in order.
  static Ints round_to_words(const Bfloat16* x, Floats factor) {
    const Ints halves = _mm512_loadu_si512(x), zero = _mm512_setzero_si512();
    return round_to_words(float_of(_mm512_unpacklo_epi16(zero, halves)),
                          float_of(_mm512_unpackhi_epi16(zero, halves)), factor);
  }
  Ints order(Bfloat16) const { return order_of_halves_; }

  bool fits_ = true;
  Ints to_count_;  // by cell
  Ints codes_;
  const Ints places_ = _mm512_set1_epi16(0x0110);  // 16 times the even code and the odd one
  const Ints lowest_12_bits_ = _mm512_set1_epi16(0x0fff);
  const Ints order_of_quarters_ = _mm512_castsi256_si512(
      _mm256_setr_epi16(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27));
  const Ints order_of_halves_ = _mm512_castsi256_si512(
      _mm256_setr_epi16(0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27));
};

#elif defined(__AVX2__)

// The upper bytes of words decide alone unless they are equal, so that the search is among bytes:
// the highest 4 bits name one of 16 cells, which hold at most two thresholds each.
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
      const int threshold = round_to_word(decisions.thresholds[i]);
      upper[i] = static_cast<int8_t>(threshold >> 8);
      lower[i] = static_cast<int8_t>((threshold & 0xff) - 128);
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

  // Packs the codes of kStep values, of which the first half, times `head / kOne`, and the second,
  // times `tail / kOne`, lie between -1 and 1. False where one of them falls on a threshold: what
  // was packed is then of no use.
  template <typename Value>
  bool quantize(const Value* x, Floats head, Floats tail, uint8_t* packed) const {
    // In each half of a vector: the lower bytes of 8 words, then the upper ones.
    const Ints first = _mm256_shuffle_epi8(round_to_words(x, head), split_);
    const Ints last = _mm256_shuffle_epi8(round_to_words(x + kStep / 2, tail), split_);
    const Ints upper = _mm256_unpackhi_epi64(first, last);
    // Less 128, so that they are ordered as signed bytes.
    const Ints lower = _mm256_xor_si256(_mm256_unpacklo_epi64(first, last), sign_bits_);

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

// Elsewhere vectors have no such look-ups.
struct FixedPoint {
  static constexpr int kStep = 64;
  static constexpr float kOne = 1.0f;
  explicit FixedPoint(const Decisions<16>&) {}
  static constexpr bool fits() { return false; }
  template <typename Value>
  bool quantize(const Value*, Floats, Floats, uint8_t*) const {
    return false;
  }
};

#endif

}  // namespace qlora
