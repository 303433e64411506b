// simd.h for AVX-512 (F, BW, DQ, VL).

#pragma once

#include "eight_loads.h"

namespace qlora {

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;

inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Ints broadcast(int32_t x) { return _mm512_set1_epi32(x); }

inline Ints bits_of(Floats x) { return _mm512_castps_si512(x); }
inline Floats float_of(Ints bits) { return _mm512_castsi512_ps(bits); }

// a * b + c with one rounding.
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

inline Ints shift_right(Ints x, int bits) { return _mm512_srli_epi32(x, bits); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }

inline Ints smaller(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline Ints larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }

// b where either is NaN.
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }

inline Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }

// -1 where a > b, else 0.
inline Ints is_greater(Floats a, Floats b) {
  return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ));
}

// Numbers that are ordered as the floats are; -0 comes right before 0.
inline Ints ranks_of(Floats x) {
  const Ints bits = bits_of(x);
  const Ints is_negative = _mm512_srai_epi32(bits, 31);
  const Ints magnitude = broadcast(static_cast<int32_t>(~kSignBit));
  // The truth table of bits ^ (is_negative & magnitude).
  return _mm512_ternarylogic_epi32(bits, is_negative, magnitude, 0xf0 ^ (0xcc & 0xaa));
}

// Each lane holds two numbers of 16 bits.
inline Ints larger_words(Ints a, Ints b) { return _mm512_max_epi16(a, b); }

inline int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x); }

// Lane i is the largest of x[i].
inline Ints largest_of_each(const Ints* x) {
  const auto merge = [](Ints a, Ints b) {  // pairs of lanes
    return larger(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const auto merge_pairs = [](Ints a, Ints b) {
    return larger(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  };
  const auto merge_quarters = [](Ints a, Ints b) {  // the even ones with the odd ones
    return larger(_mm512_shuffle_i32x4(a, b, 0b10'00'10'00),
                  _mm512_shuffle_i32x4(a, b, 0b11'01'11'01));
  };
  Ints fours[4];
  for (int i = 0; i < 4; ++i) {
    fours[i] = merge_pairs(merge(x[4 * i], x[4 * i + 1]), merge(x[4 * i + 2], x[4 * i + 3]));
  }
  return merge_quarters(merge_quarters(fours[0], fours[1]), merge_quarters(fours[2], fours[3]));
}

// Lane i is table[indices[i]].
inline Floats look_up(const float* table, Ints indices) {
  return _mm512_i32gather_ps(indices, table, sizeof(float));
}
inline Ints look_up(const int32_t* table, Ints indices) {
  return _mm512_i32gather_epi32(indices, table, sizeof(int32_t));
}
inline Floats look_up(const float* table, const uint8_t* indices) {
  const __m256 low = look_up_eight(table, EightBytes(indices));
  const __m256 high = look_up_eight(table, EightBytes(indices + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// Lane i is x[lanes[i]].
inline Floats pick_lanes(Floats x, Ints lanes) { return _mm512_permutexvar_ps(lanes, x); }

// count + amount in the lanes in which x is above the threshold.
inline Ints add_where_above(Ints count, int32_t amount, Floats x, Floats threshold) {
  const __mmask16 is_above = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(count, is_above, count, broadcast(amount));
}

inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }

inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm512_storeu_ps(y, x); }

// Integers below 256 become bytes.
inline void store(uint8_t* y, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtepi32_epi8(x));
}

// Writes a vector; past the caches when kStream: y is aligned to a vector then, and fence_streams
// follows.
template <bool kStream>
void put(void* y, Ints x) {
  if (kStream) {
    _mm512_stream_si512(static_cast<Ints*>(y), x);
  } else {
    _mm512_storeu_si512(y, x);
  }
}

// Makes what was streamed visible to other threads before what is written later.
inline void fence_streams() { _mm_sfence(); }

inline Floats load(const Bfloat16* x) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return float_of(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The rounding of from_float<Bfloat16>, in the upper halves of the lanes: the processor's own
// conversion flushes subnormals.
inline Ints round_in_place_to_bfloat16(Floats x) {
  const Ints bits = bits_of(x);
  const Ints is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), broadcast(1));
  const Ints rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, broadcast(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const Ints quiet = broadcast(static_cast<int32_t>(kQuietBit));
  return _mm512_mask_or_epi32(rounded, is_nan, bits, quiet);
}

inline __m256i round_to_bfloat16(Floats x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_in_place_to_bfloat16(x), 16));
}

inline void store(Bfloat16* y, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), round_to_bfloat16(x));
}

inline Floats load(const Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline __m256i round_to_float16(Floats x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(Float16* y, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), round_to_float16(x));
}

}  // namespace qlora
