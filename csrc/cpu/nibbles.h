// Codes of 4 bits, two a byte, the even one high: restoring what they stand for.

#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace qlora {

#if defined(__AVX512BW__)

// Sixteen floats, looked up by the lowest 4 bits of each lane.
class Table16 {
 public:
  Table16() = default;
  explicit Table16(const float* entries) : entries_(load(entries)) {}
  Floats operator[](Ints index) const { return pick_lanes(entries_, index); }

 private:
  Floats entries_;
};

// A byte becomes two lanes or words, its even code first. What stands above the lowest 4 bits of a
// lane, or 5 of a word, is ignored when it is looked up.
inline Ints spread_to_lanes(const uint8_t* packed) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  const Ints wide = _mm512_cvtepu8_epi64(bytes);
  return _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
}

inline Ints spread_to_words(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const Ints wide = _mm512_cvtepu8_epi32(bytes);
  return _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
}

inline __m256i round_to(Floats x, Bfloat16) { return round_to_bfloat16(x); }
inline __m256i round_to(Floats x, Float16) { return round_to_float16(x); }

// What the sixteen codes of a block stand for: one product and one rounding each.
template <typename Value>
class ScaledLevels {
 public:
  static constexpr int kVector = 32;

  ScaledLevels(const float* codebook, float scale)
      : levels_(_mm512_broadcast_i64x4(round_to(load(codebook) * broadcast(scale), Value{}))) {}

  // y[i] = what the i-th of kVector codes stands for.
  template <bool kStream>
  void restore(const uint8_t* packed, Value* y) const {
    put<kStream>(y, _mm512_permutexvar_epi16(spread_to_words(packed), levels_));
  }

 private:
  Ints levels_;  // twice
};

template <>
class ScaledLevels<float> {
 public:
  static constexpr int kVector = 16;

  ScaledLevels(const float* codebook, float scale) : levels_(load(codebook) * broadcast(scale)) {}

  template <bool kStream>
  void restore(const uint8_t* packed, float* y) const {
    put<kStream>(y, bits_of(pick_lanes(levels_, spread_to_lanes(packed))));
  }

 private:
  Floats levels_;
};

#elif defined(__AVX2__)

// Sixteen floats, looked up by the lowest 4 bits of each lane.
class Table16 {
 public:
  Table16() = default;
  explicit Table16(const float* entries) : low_(load(entries)), high_(load(entries + kLanes)) {}

  // A permutation looks at 3 bits of a lane; the fourth, moved to the sign, chooses the half.
  Floats operator[](Ints index) const {
    const Floats is_high = float_of(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(pick_lanes(low_, index), pick_lanes(high_, index), is_high);
  }

 private:
  Floats low_, high_;
};

inline Ints spread_to_lanes(const uint8_t* packed) {
  int32_t bytes;
  std::memcpy(&bytes, packed, sizeof bytes);
  const Ints wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
  return _mm256_or_si256(_mm256_srli_epi64(wide, 4), _mm256_slli_epi64(wide, 32));
}

// Sixteen bytes for _mm256_shuffle_epi8 to look up: one byte of each of sixteen values of 32 bits.
class ByteTables {
 public:
  ByteTables(Ints first, Ints last) {
    // In each half: the first bytes of 4 values, the second ones, and so on.
    const Ints order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    first_ = _mm256_shuffle_epi8(first, order);
    last_ = _mm256_shuffle_epi8(last, order);
  }

  template <int kByte>
  Ints get() const {
    const Ints joined =
        kByte < 2 ? _mm256_unpacklo_epi32(first_, last_) : _mm256_unpackhi_epi32(first_, last_);
    constexpr int kAt = kByte % 2 * 2;
    return _mm256_permutevar8x32_epi32(
        joined, _mm256_setr_epi32(kAt, kAt + 4, kAt + 1, kAt + 5, kAt, kAt + 4, kAt + 1, kAt + 5));
  }

 private:
  Ints first_, last_;
};

// Thirty-two codes, one a byte: those of the bytes that `order` names, the even code first.
inline Ints spread_to_bytes(const uint8_t* packed, Ints order) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const Ints words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), order);
  return _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(words, 4), _mm256_slli_epi16(words, 8)),
                          _mm256_set1_epi8(15));
}

// Bits of which the upper halves are x, rounded to 16 bits.
inline Ints round_to_upper_half(Floats x, Bfloat16) { return round_in_place_to_bfloat16(x); }
inline Ints round_to_upper_half(Floats x, Float16) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(round_to_float16(x)), 16);
}

// What the sixteen codes of a block stand for: one product and one rounding each. A shuffle looks
// up bytes, so that the lower and the upper bytes of the levels are tables of their own.
template <typename Value>
class ScaledLevels {
 public:
  static constexpr int kVector = 32;

  ScaledLevels(const float* codebook, float scale) {
    const ByteTables tables(
        round_to_upper_half(load(codebook) * broadcast(scale), Value{}),
        round_to_upper_half(load(codebook + kLanes) * broadcast(scale), Value{}));
    low_ = tables.get<2>();
    high_ = tables.get<3>();
  }

  // y[i] = what the i-th of kVector codes stands for.
  template <bool kStream>
  void restore(const uint8_t* packed, Value* y) const {
    // The order that puts the values in order when bytes are interleaved below, which happens in
    // each half of a vector.
    const Ints order = _mm256_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1, 4,
                                        -1, 5, -1, 6, -1, 7, -1, 12, -1, 13, -1, 14, -1, 15, -1);
    const Ints codes = spread_to_bytes(packed, order);
    const Ints low = _mm256_shuffle_epi8(low_, codes), high = _mm256_shuffle_epi8(high_, codes);
    put<kStream>(y, _mm256_unpacklo_epi8(low, high));
    put<kStream>(y + 16, _mm256_unpackhi_epi8(low, high));
  }

 private:
  Ints low_, high_;
};

// Sixteen floats of a type, looked up by bytes: thirty-two codes at a time. The lower two bytes of
// a bfloat16, as a float, are zero.
template <typename Value>
class FloatTables {
 public:
  static constexpr int kVector = 32;

  FloatTables() = default;
  explicit FloatTables(const float* entries) {
    const ByteTables tables(bits_of(load(entries)), bits_of(load(entries + kLanes)));
    if constexpr (!kIsShort) {
      bytes_[0] = tables.get<0>();
      bytes_[1] = tables.get<1>();
    }
    bytes_[2] = tables.get<2>();
    bytes_[3] = tables.get<3>();
  }

  // values[i]: what the bytes 4 i to 4 i + 3 stand for in each half of `codes`.
  void look_up(Ints codes, Floats* values) const {
    Ints found[4] = {};
    for (int i = kIsShort ? 2 : 0; i < 4; ++i) found[i] = _mm256_shuffle_epi8(bytes_[i], codes);
    const Ints low_first = _mm256_unpacklo_epi8(found[0], found[1]);
    const Ints high_first = _mm256_unpacklo_epi8(found[2], found[3]);
    const Ints low_last = _mm256_unpackhi_epi8(found[0], found[1]);
    const Ints high_last = _mm256_unpackhi_epi8(found[2], found[3]);
    values[0] = float_of(_mm256_unpacklo_epi16(low_first, high_first));
    values[1] = float_of(_mm256_unpackhi_epi16(low_first, high_first));
    values[2] = float_of(_mm256_unpacklo_epi16(low_last, high_last));
    values[3] = float_of(_mm256_unpackhi_epi16(low_last, high_last));
  }

  // What kVector codes stand for, in order.
  void restore(const uint8_t* packed, Floats* values) const {
    const Ints order = _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1, 2,
                                        -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
    look_up(spread_to_bytes(packed, order), values);
  }

 private:
  static constexpr bool kIsShort = std::is_same_v<Value, Bfloat16>;

  Ints bytes_[4];
};

template <>
class ScaledLevels<float> {
 public:
  static constexpr int kVector = FloatTables<float>::kVector;

  ScaledLevels(const float* codebook, float scale) {
    float levels[16];
    store(levels, load(codebook) * broadcast(scale));
    store(levels + kLanes, load(codebook + kLanes) * broadcast(scale));
    tables_ = FloatTables<float>(levels);
  }

  template <bool kStream>
  void restore(const uint8_t* packed, float* y) const {
    Floats values[kVector / kLanes];
    tables_.restore(packed, values);
    for (int i = 0; i < kVector / kLanes; ++i) put<kStream>(y + i * kLanes, bits_of(values[i]));
  }

 private:
  FloatTables<float> tables_;
};

#else

// Sixteen floats, looked up by the lowest 4 bits of each lane.
class Table16 {
 public:
  Table16() = default;
  explicit Table16(const float* entries) { std::copy(entries, entries + 16, entries_); }
  Floats operator[](Ints index) const {
    return Floats{entries_[index[0] & 15], entries_[index[1] & 15], entries_[index[2] & 15],
                  entries_[index[3] & 15]};
  }

 private:
  float entries_[16];
};

// A byte becomes two lanes, its even code first.
inline Ints spread_to_lanes(const uint8_t* packed) {
  return Ints{packed[0] >> 4, packed[0], packed[1] >> 4, packed[1]};
}

#if defined(__ARM_NEON)

// What the sixteen codes of a block stand for: one product and one rounding each. The processor
// looks up bytes in tables of sixteen: the first bytes of the levels are one, and so on.
template <typename Value>
class ScaledLevels {
 public:
  static constexpr int kVector = 32;

  ScaledLevels(const float* codebook, float scale) {
    Value levels[16];
    for (int code = 0; code < 16; ++code) levels[code] = from_float<Value>(codebook[code] * scale);
    const auto* bytes = reinterpret_cast<const uint8_t*>(levels);
    if constexpr (sizeof(Value) == 4) {
      tables_ = vld4q_u8(bytes);
    } else {
      tables_ = vld2q_u8(bytes);
    }
  }

  // y[i] = what the i-th of kVector codes stands for.
  template <bool>
  void restore(const uint8_t* packed, Value* y) const {
    const uint8x16_t bytes = vld1q_u8(packed);
    const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
    look_up(vzip1q_u8(even, odd), y);
    look_up(vzip2q_u8(even, odd), y + 16);
  }

 private:
  void look_up(uint8x16_t codes, Value* y) const {
    Tables found;
    for (size_t i = 0; i < sizeof(Value); ++i) found.val[i] = vqtbl1q_u8(tables_.val[i], codes);
    if constexpr (sizeof(Value) == 4) {
      vst4q_u8(reinterpret_cast<uint8_t*>(y), found);
    } else {
      vst2q_u8(reinterpret_cast<uint8_t*>(y), found);
    }
  }

  using Tables = std::conditional_t<sizeof(Value) == 4, uint8x16x4_t, uint8x16x2_t>;
  Tables tables_;
};

#else

// What the sixteen codes of a block stand for: one product and one rounding each.
template <typename Value>
class ScaledLevels {
 public:
  static constexpr int kVector = 16;

  ScaledLevels(const float* codebook, float scale) {
    for (int code = 0; code < 16; ++code) levels_[code] = from_float<Value>(codebook[code] * scale);
  }

  // y[i] = what the i-th of kVector codes stands for.
  template <bool>
  void restore(const uint8_t* packed, Value* y) const {
    for (int i = 0; i < kVector / 2; ++i) {
      y[2 * i] = levels_[packed[i] >> 4];
      y[2 * i + 1] = levels_[packed[i] & 15];
    }
  }

 private:
  Value levels_[16];
};

#endif
#endif

#if defined(__AVX512BW__) || !defined(__AVX2__)

// Sixteen floats, looked up by the codes of a vector.
template <typename Value>
class FloatTables {
 public:
  static constexpr int kVector = kLanes;

  FloatTables() = default;
  explicit FloatTables(const float* entries) : table_(entries) {}
  void restore(const uint8_t* packed, Floats* values) const {
    values[0] = table_[spread_to_lanes(packed)];
  }

 private:
  Table16 table_;
};

#endif

// As restore_codes, for fewer than kVector: out of line, since few blocks end so.
template <typename Value>
__attribute__((noinline)) void restore_few_codes(const ScaledLevels<Value>& levels,
                                                 const uint8_t* packed, int64_t count, Value* y) {
  constexpr int kVector = ScaledLevels<Value>::kVector;
  uint8_t last[kVector / 2] = {};
  Value restored[kVector];
  std::memcpy(last, packed, (count + 1) / 2);
  levels.template restore<false>(last, restored);
  std::memcpy(y, restored, count * sizeof(Value));
}

// y[i] = what the i-th of `count` codes stands for; they begin with a whole byte.
template <bool kStream = false, typename Value>
inline void restore_codes(const ScaledLevels<Value>& levels, const uint8_t* packed, int64_t count,
                          Value* y) {
  constexpr int kVector = ScaledLevels<Value>::kVector;
  for (; count >= kVector; count -= kVector, packed += kVector / 2, y += kVector) {
    levels.template restore<kStream>(packed, y);
  }
  if (count > 0) restore_few_codes(levels, packed, count, y);
}

}  // namespace qlora
