// Products in float: one weight, one activation, one fused multiply-add a lane.

#pragma once

#include "tiles.h"
#include "weight.h"

namespace qlora {

// Sixteen floats to look up, and codes spread out to one a lane.
#if defined(__AVX512BW__)

struct Levels {
  Floats all;

  // The table is indexed by the lowest 4 bits of each lane.
  Floats operator[](Ints codes) const { return _mm512_permutexvar_ps(codes, all); }

  template <typename Value>
  void round_to() {
    all = rounded<Value>(all);
  }
};

inline Levels scaled_levels(const float* codebook, float scale) {
  return {load(codebook) * broadcast(scale)};
}

// A byte holds the code of an even element above that of an odd one: each byte goes to two lanes.
inline Ints spread_codes(const uint8_t* packed) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  const Ints wide = _mm512_cvtepu8_epi64(bytes);
  return _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
}

#elif defined(__AVX2__)

struct Levels {
  Floats low, high;

  // Each permutation looks at 3 bits; the fourth, moved to the sign, chooses between them.
  Floats operator[](Ints codes) const {
    const Floats choice = float_of(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes),
                            _mm256_permutevar8x32_ps(high, codes), choice);
  }

  template <typename Value>
  void round_to() {
    low = rounded<Value>(low);
    high = rounded<Value>(high);
  }
};

inline Levels scaled_levels(const float* codebook, float scale) {
  return {load(codebook) * broadcast(scale), load(codebook + kLanes) * broadcast(scale)};
}

inline Ints spread_codes(const uint8_t* packed) {
  int32_t bytes;
  std::memcpy(&bytes, packed, sizeof bytes);
  const Ints wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
  return _mm256_or_si256(_mm256_srli_epi64(wide, 4), _mm256_slli_epi64(wide, 32));
}

#else

struct Levels {
  float all[16];

  Floats operator[](Ints codes) const {
    return Floats{all[codes[0] & 15], all[codes[1] & 15], all[codes[2] & 15], all[codes[3] & 15]};
  }

  template <typename Value>
  void round_to() {
    for (float& level : all) level = to_float(from_float<Value>(level));
  }
};

inline Levels scaled_levels(const float* codebook, float scale) {
  Levels levels;
  for (int code = 0; code < 16; ++code) levels.all[code] = codebook[code] * scale;
  return levels;
}

inline Ints spread_codes(const uint8_t* packed) {
  return Ints{packed[0] >> 4, packed[0] & 15, packed[1] >> 4, packed[1] & 15};
}

#endif

template <typename Value>
struct FloatFormat {
  using Element = float;
  static constexpr int kPlanes = 1;
  static constexpr int kPair = 1;
  static constexpr int kDepth = 256;
  static constexpr int kStep = 1;
  static constexpr int kRowStep = 1;
  static constexpr int kGroup = 4 * kTileRows;
  static constexpr int kRowStride = kDepth + kLineOf<float>;
  static constexpr int kPanelStride = kDepth * kLanes + kLineOf<float>;

  // What the codes of a block stand for, rounded to Value: see decode_row.
  class Table {
   public:
    Table() = default;
    Table(const float* codebook, float scale) : levels_(scaled_levels(codebook, scale)) {
      levels_.template round_to<Value>();
    }

    static constexpr int kVector = kLanes;

    void expand(const uint8_t* packed, float* out, int64_t) const {
      store(out, levels_[spread_codes(packed)]);
    }

    void expand_some(const uint8_t* packed, int64_t count, float* out, int64_t plane) const {
      for (int64_t i = 0; i < count; i += 2) {
        expand_one(packed[i / 2] >> 4, out + i, plane);
        expand_one(packed[i / 2] & 15, out + i + 1, plane);
      }
    }

    void expand_one(int code, float* out, int64_t) const {
      store_first(out, levels_[broadcast(int32_t{code})], 1);
    }

   private:
    Levels levels_;
  };

  // Widens `count` values.
  static void convert(const Value* x, int64_t count, float* out, int64_t) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
    for (; i < count; ++i) out[i] = to_float(x[i]);
  }

  // One row of kLanes elements: nothing to put side by side.
  static void interleave(const float* row, int64_t, float* out) { store(out, load(row)); }

  // As Table::expand, for kPair rows, straight into panels.
  static void expand_panels(const Table* tables, const uint8_t* const* packed, float* out,
                            int64_t) {
    tables[0].expand(packed[0], out, 0);
  }

  // c (rows, panels kLanes) += a (rows, depth) * b (panels, depth, kLanes).
  static void multiply(const float* a, int64_t, const float* b, int64_t, int64_t rows,
                       int64_t panels, int depth, float* c, int64_t c_stride) {
    multiply_by_panels<FloatArithmetic, FloatFormat>(a, b, rows, panels, depth, c, c_stride);
  }
};

}  // namespace qlora
