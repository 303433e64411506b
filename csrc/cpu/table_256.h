// Codes of 8 bits: looking up what they stand for.

#pragma once

#include <algorithm>

#include "simd.h"

namespace qlora {

#if defined(__AVX512VBMI__)

// 256 floats, looked up by bytes. An instruction looks up bytes in a table of 128: the first bytes
// of all floats are two tables, their second bytes are two, and so on.
class Table256 {
 public:
  explicit Table256(const float* entries) {
    for (int i = 0; i < 256; ++i) {
      for (int byte = 0; byte < 4; ++byte) {
        bytes_[byte][i] = static_cast<uint8_t>(bits_of(entries[i]) >> 8 * byte);
      }
    }
  }

  // Calls function(i, the entries of codes[i], codes[i + 1], ..., part) for each vector of them.
  template <typename Function>
  void for_each(const uint8_t* codes, int64_t count, Function function) const {
    float found[kAtATime];
    for (int64_t start = 0; start < count; start += kAtATime) {
      const int64_t here = std::min(count - start, kAtATime);
      if (here == kAtATime) {
        look_up(codes + start, found);
      } else {
        uint8_t last[kAtATime] = {};
        std::memcpy(last, codes + start, here);
        look_up(last, found);
      }
      for_each_vector(here,
                      [&](int64_t i, auto part) { function(start + i, load(found + i), part); });
    }
  }

 private:
  static constexpr int64_t kAtATime = 64;

  void look_up(const uint8_t* codes, float* found) const {
    // Interleaving works within quarters of vectors: in this order, each quarter gets the codes
    // that it will hold in the four results.
    const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const Ints at = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
    const Ints first = find<0>(at), second = find<1>(at), third = find<2>(at), last = find<3>(at);
    const Ints low[2] = {_mm512_unpacklo_epi8(first, second), _mm512_unpackhi_epi8(first, second)};
    const Ints high[2] = {_mm512_unpacklo_epi8(third, last), _mm512_unpackhi_epi8(third, last)};
    for (int i = 0; i < 2; ++i, found += 2 * kLanes) {
      store(found, float_of(_mm512_unpacklo_epi16(low[i], high[i])));
      store(found + kLanes, float_of(_mm512_unpackhi_epi16(low[i], high[i])));
    }
  }

  // One byte of each entry.
  template <int kByte>
  Ints find(Ints at) const {
    const uint8_t* bytes = bytes_[kByte];
    const auto find_in_half = [at](const uint8_t* half) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(half), at, _mm512_load_si512(half + 64));
    };
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), find_in_half(bytes),
                                  find_in_half(bytes + 128));
  }

  alignas(64) uint8_t bytes_[4][256];
};

#else

// 256 floats, looked up by bytes.
class Table256 {
 public:
  explicit Table256(const float* entries) : entries_(entries) {}

  // Calls function(i, the entries of codes[i], codes[i + 1], ..., part) for each vector of them.
  template <typename Function>
  void for_each(const uint8_t* codes, int64_t count, Function function) const {
    for_each_vector(count, [=](int64_t i, auto part) {
      function(i, look_up(entries_, codes + i, part), part);
    });
  }

 private:
  const float* entries_;
};

#endif

}  // namespace qlora
