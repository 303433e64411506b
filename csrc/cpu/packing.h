// Packing codes of 4 bits, two a byte, the even one high.

#pragma once

#include "simd.h"

namespace qlora {

// Each 64-bit lane holds 4 bytes: the first ones of all lanes, then the second ones, and so on.
#if defined(__AVX512BW__)

inline __m256i gather_bytes(Ints x) {
  const Ints in_quarters = _mm512_shuffle_epi8(
      x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0)));
  const Ints order = _mm512_castsi256_si512(
      _mm256_setr_epi16(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27));
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(order, in_quarters));
}

#elif defined(__AVX2__)

inline __m128i gather_bytes(Ints x) {
  const Ints in_halves = _mm256_shuffle_epi8(
      x,
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0)));
  return _mm_unpacklo_epi16(_mm256_castsi256_si128(in_halves),
                            _mm256_extracti128_si256(in_halves, 1));
}

#else

inline uint64_t gather_bytes(Ints x) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const Bytes bytes = reinterpret_cast<Bytes>(x);
  const auto in_order = __builtin_shufflevector(bytes, bytes, 0, 8, 1, 9, 2, 10, 3, 11);
  uint64_t gathered;
  static_assert(sizeof in_order == sizeof gathered);
  std::memcpy(&gathered, &in_order, sizeof gathered);
  return gathered;
}

#endif

// Packs kVectors vectors of codes, one a lane.
template <int kVectors>
void pack_codes(const Ints (&codes)[kVectors], uint8_t* packed) {
  static_assert(kVectors <= 4, "four bytes fit below 32 bits");
  typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));
  // The codes of all vectors into the bytes of a lane.
  Pairs bytes = reinterpret_cast<Pairs>(codes[0]);
#pragma GCC unroll 4
  for (int i = 1; i < kVectors; ++i) bytes |= reinterpret_cast<Pairs>(codes[i]) << 8 * i;
  // The even lane is the lower half of a pair: its codes go above those of the odd one.
  const Pairs merged = bytes << 4 | bytes >> 32;
  const auto gathered = gather_bytes(reinterpret_cast<Ints>(merged));
  std::memcpy(packed, &gathered, kVectors * kLanes / 2);
}

}  // namespace qlora
