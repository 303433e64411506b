// Products in bfloat16, two of them and their sum in float at a time; and products in float that
// are made of such ones, where a processor multiplies bfloat16 many times faster (AMX).

#pragma once

#include "tiles_amx.h"

#if defined(__AVX512BF16__)

#include <type_traits>

#include "format_float.h"

namespace qlora {

// Two bfloat16 of depth at a time.
struct PairArithmetic {
  using Element = uint16_t;
  static constexpr int kPair = 2;

  static __m512bh broadcast_element(const uint16_t* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return reinterpret_cast<__m512bh>(broadcast(pair));
  }
  static __m512bh load_lanes(const uint16_t* b) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
  }
  static Floats multiply_add(__m512bh a, __m512bh b, Floats sum) {
    return _mm512_dpbf16_ps(sum, a, b);
  }
};

// first[begin], second[begin], first[begin + 1], ...: kLanes pairs of words.
inline Ints interleave_words(Ints first, Ints second, int begin) {
  alignas(64) static constexpr auto kOrder = [] {
    struct {
      uint16_t words[2][32];
    } order{};
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 32; ++i) {
        order.words[half][i] = static_cast<uint16_t>(i % 2 * 32 + half * 16 + i / 2);
      }
    }
    return order;
  }();
  const Ints words = _mm512_load_si512(kOrder.words[begin / kLanes]);
  return _mm512_permutex2var_epi16(first, words, second);
}

inline __m256i narrow_to_bfloat16(Floats x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}

inline Floats widen_bfloat16(__m256i x) {
  return float_of(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Splits x into kPlanes bfloat16 whose sum is x to 8 kPlanes bits: the nearest one, the nearest one
// to what is left of it, and so on. What lies below 2^-126 is taken for zero by the product and
// gets lost; above the largest bfloat16 no plane but the last overflows, so that infinity stays.
template <int kPlanes>
struct Split {
  __m256i planes[kPlanes];

  explicit Split(Floats x) {
    const Floats largest = broadcast(0x1.fep127f);
    for (int p = 0; p < kPlanes - 1; ++p) {
      // Of two operands of which one is NaN the second is returned.
      planes[p] = narrow_to_bfloat16(_mm512_max_ps(-largest, _mm512_min_ps(largest, x)));
      x = x - widen_bfloat16(planes[p]);
    }
    planes[kPlanes - 1] = narrow_to_bfloat16(x);
  }
};

// What the codes of a stretch stand for in bfloat16.
class PairStretch {
 public:
  PairStretch() = default;
  PairStretch(const float* codebook, float first, float second)
      : levels_(reinterpret_cast<Ints>(_mm512_cvtne2ps_pbh(load(codebook) * broadcast(second),
                                                           load(codebook) * broadcast(first)))) {}

  __m512bh look_up(Ints codes, int step) const {
    const Ints index = index_in_step<uint16_t>(codes, step);
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, levels_));
  }

 private:
  Ints levels_;  // scaled for the first half, then for the second
};

template <typename Value>
constexpr int kPlanesOf = std::is_same_v<Value, Bfloat16>  ? 1
                          : std::is_same_v<Value, Float16> ? 2
                                                           : 3;

template <typename Value>
struct Bfloat16Format {
  using Element = uint16_t;
  static constexpr int kPlanes = kPlanesOf<Value>;
  static constexpr int kPair = 2;
  static constexpr int kDepth = 256;
  static constexpr int kStep = kHasTiles ? kTileDepth : kPair;
  static constexpr int kRowStep = kHasTiles ? kTileSide : 1;
  static constexpr int kGroup = kHasTiles ? 2 * kTileSide : 2 * kTileRows;
  static constexpr int kRowStride = kDepth + kLineOf<uint16_t>;
  static constexpr int kPanelStride = kDepth * kLanes + kLineOf<uint16_t>;

  // Roundings of sums in float are small beside those of what is multiplied.
  static int run_length(int64_t) { return kDepth; }

  class Table {
   public:
    static constexpr int kVector = 32;

    Table() = default;
    Table(const float* codebook, float scale) {
      Floats levels = load(codebook) * broadcast(scale);
      if (kPlanes > 1) levels = rounded<Value>(levels);  // else the only plane is the rounding
      const Split<kPlanes> split(levels);
      for (int p = 0; p < kPlanes; ++p) levels_[p] = _mm512_broadcast_i64x4(split.planes[p]);
    }

    void expand(const uint8_t* packed, uint16_t* out, int64_t plane) const {
      const Ints codes = spread_to_words(packed);
      for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(out + p * plane, look_up(codes, p));
    }

    // The tables are indexed by the lowest 5 bits of each word; their upper half is as the lower.
    Ints look_up(Ints codes, int plane) const {
      return _mm512_permutexvar_epi16(codes, levels_[plane]);
    }

    void expand_some(const uint8_t* packed, int64_t count, uint16_t* out, int64_t plane) const {
      for (int64_t i = 0; i < count; i += 2) {
        expand_one(packed[i / 2] >> 4, out + i, plane);
        expand_one(packed[i / 2] & 15, out + i + 1, plane);
      }
    }

    void expand_one(int code, uint16_t* out, int64_t plane) const {
      const Ints codes = _mm512_set1_epi16(static_cast<int16_t>(code));
      for (int p = 0; p < kPlanes; ++p) {
        const Ints found = look_up(codes, p);
        std::memcpy(out + p * plane, &found, sizeof(uint16_t));
      }
    }

   private:
    Ints levels_[kPlanes];
  };

  static constexpr bool kHasStretches = kPlanes == 1 && !kHasTiles;
  using Stretch = PairStretch;

  static void convert(const Value* x, int64_t count, uint16_t* out, int64_t plane) {
    if constexpr (kPlanes == 1) {
      std::memcpy(out, x, count * sizeof(uint16_t));
      return;
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
      const Split<kPlanes> split(lanes == kLanes ? load(x + i) : load_first(x + i, lanes));
      for (int p = 0; p < kPlanes; ++p) {
        std::memcpy(out + p * plane + i, &split.planes[p], lanes * sizeof(uint16_t));
      }
    }
  }

  // Two rows of kLanes elements, `stride` apart, into pairs.
  static void interleave(const uint16_t* rows, int64_t stride, uint16_t* out) {
    const auto* upper = reinterpret_cast<const __m256i*>(rows);
    const auto* lower = reinterpret_cast<const __m256i*>(rows + stride);
    const Ints first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(upper));
    const Ints second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(lower));
    _mm512_storeu_si512(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }

  // As Table::expand, for kPair rows, straight into two panels.
  static void expand_panels(const Table* tables, const uint8_t* const* packed, uint16_t* out,
                            int64_t plane) {
    const Ints upper = spread_to_words(packed[0]), lower = spread_to_words(packed[1]);
    for (int p = 0; p < kPlanes; ++p, out += plane) {
      const Ints first = tables[0].look_up(upper, p), second = tables[1].look_up(lower, p);
      _mm512_storeu_si512(out, interleave_words(first, second, 0));
      _mm512_storeu_si512(out + kPanelStride, interleave_words(first, second, kLanes));
    }
  }

  static void multiply(const uint16_t* a, [[maybe_unused]] int64_t a_plane, const uint16_t* b,
                       [[maybe_unused]] int64_t b_plane, int64_t rows, int64_t panels, int depth,
                       [[maybe_unused]] int run, float* c, int64_t c_stride) {
    if constexpr (kHasTiles) {
      multiply_on_tiles<kPlanes, Bfloat16Format>(a, a_plane, b, b_plane, rows, panels, depth, c,
                                                 c_stride);
    } else {
      static_assert(kPlanes == 1);
      multiply_by_panels<PairArithmetic, Bfloat16Format>(a, b, rows, panels, depth, run, c,
                                                         c_stride);
    }
  }
};

}  // namespace qlora

#endif
