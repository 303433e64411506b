// simd.h for AVX2 with FMA and F16C.

#pragma once

#include "eight_loads.h"

namespace qlora {

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;

inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Ints broadcast(int32_t x) { return _mm256_set1_epi32(x); }

inline Ints bits_of(Floats x) { return _mm256_castps_si256(x); }
inline Floats float_of(Ints bits) { return _mm256_castsi256_ps(bits); }

// a * b + c with one rounding.
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

inline Ints shift_right(Ints x, int bits) { return _mm256_srli_epi32(x, bits); }

inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }

inline Ints smaller(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
inline Ints larger(Ints a, Ints b) { return _mm256_max_epi32(a, b); }

// b where either is NaN.
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }

inline Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }

// -1 where a > b, else 0.
inline Ints is_greater(Floats a, Floats b) {
  return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

// Numbers that are ordered as the floats are; -0 comes right before 0.
inline Ints ranks_of(Floats x) {
  const Ints bits = bits_of(x);
  const Ints is_negative = _mm256_srai_epi32(bits, 31);
  return _mm256_xor_si256(bits, _mm256_srli_epi32(is_negative, 1));
}

// Each lane holds two numbers of 16 bits.
inline Ints larger_words(Ints a, Ints b) { return _mm256_max_epi16(a, b); }

inline int32_t largest(Ints x) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0b1110));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0b01));
  return _mm_cvtsi128_si32(half);
}

// Lane i is the largest of x[i].
inline Ints largest_of_each(const Ints* x) {
  const auto merge = [](Ints a, Ints b) {  // pairs of lanes
    return larger(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  };
  const auto merge_pairs = [](Ints a, Ints b) {
    return larger(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  };
  const Ints first = merge_pairs(merge(x[0], x[1]), merge(x[2], x[3]));
  const Ints last = merge_pairs(merge(x[4], x[5]), merge(x[6], x[7]));
  return larger(_mm256_permute2x128_si256(first, last, 0x20),
                _mm256_permute2x128_si256(first, last, 0x31));
}

// The lanes of a vector in general registers, two in each.
class Indices {
 public:
  explicit Indices(Ints x) {
    const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    pairs_[0] = _mm_cvtsi128_si64(low);
    pairs_[1] = _mm_extract_epi64(low, 1);
    pairs_[2] = _mm_cvtsi128_si64(high);
    pairs_[3] = _mm_extract_epi64(high, 1);
  }
  uint32_t operator[](int i) const { return pairs_[i / 2] >> 32 * (i % 2); }

 private:
  uint64_t pairs_[4];
};

// Lane i is table[indices[i]].
inline Floats look_up(const float* table, Ints indices) {
  return look_up_eight(table, Indices(indices));
}
inline Floats look_up(const float* table, const uint8_t* indices) {
  return look_up_eight(table, EightBytes(indices));
}
inline Ints look_up(const int32_t* table, Ints indices) {
  return look_up_eight(table, Indices(indices));
}

// Lane i is x[lanes[i]].
inline Floats pick_lanes(Floats x, Ints lanes) { return _mm256_permutevar8x32_ps(x, lanes); }

// count + amount in the lanes in which x is above the threshold.
inline Ints add_where_above(Ints count, int32_t amount, Floats x, Floats threshold) {
  const Ints is_above = bits_of(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));
  return _mm256_add_epi32(count, _mm256_and_si256(is_above, broadcast(amount)));
}

inline float sum(Floats x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm256_storeu_ps(y, x); }

// Integers below 256 become bytes.
inline void store(uint8_t* y, Ints x) {
  const Ints pairs = _mm256_packus_epi32(x, x);
  const Ints bytes = _mm256_packus_epi16(pairs, pairs);  // four in the lowest bytes of each half
  const Ints joined = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(y), _mm256_castsi256_si128(joined));
}

// Writes a vector; past the caches when kStream: y is aligned to a vector then, and fence_streams
// follows.
template <bool kStream>
void put(void* y, Ints x) {
  if (kStream) {
    _mm256_stream_si256(static_cast<Ints*>(y), x);
  } else {
    _mm256_storeu_si256(static_cast<Ints*>(y), x);
  }
}

// Makes what was streamed visible to other threads before what is written later.
inline void fence_streams() { _mm_sfence(); }

inline Floats load(const Bfloat16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return float_of(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// The lower halves of the lanes, in order.
inline __m128i narrow(Ints x) {
  const Ints packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0b1000);
  return _mm256_castsi256_si128(packed);
}

// The rounding of from_float<Bfloat16>, in the upper halves of the lanes.
inline Ints round_in_place_to_bfloat16(Floats x) {
  const Ints bits = bits_of(x);
  const Ints is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), broadcast(1));
  const Ints rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, broadcast(0x7fff)));
  const Floats is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const Ints quiet = _mm256_or_si256(bits, broadcast(static_cast<int32_t>(kQuietBit)));
  return bits_of(_mm256_blendv_ps(float_of(rounded), float_of(quiet), is_nan));
}

inline __m128i round_to_bfloat16(Floats x) {
  return narrow(_mm256_srli_epi32(round_in_place_to_bfloat16(x), 16));
}

inline void store(Bfloat16* y, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), round_to_bfloat16(x));
}

inline Floats load(const Float16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

inline __m128i round_to_float16(Floats x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(Float16* y, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), round_to_float16(x));
}

}  // namespace qlora
