// Values to 4-bit codes: a block's absmax, the nearest of 16 levels, two codes a byte.

#include "fixed_point.h"
#include "large_output.h"
#include "levels_16.h"
#include "parts.h"

namespace qlora {
namespace {

// The values' bits without their signs, which are ordered as the magnitudes are; NaN lies above
// infinity and is let through.
template <typename Value>
Ints magnitude_bits(const Value* x) {
  Ints bits;
  std::memcpy(&bits, x, sizeof bits);
  return bits & broadcast(sizeof(Value) == 2 ? 0x7fff7fff : 0x7fffffff);
}

// As largest_magnitude, in vectors of 16-bit values that need not be widened.
template <typename Value>
float block_absmax(const Value* x, int64_t count) {
  constexpr int kWidth = sizeof(Ints) / sizeof(Value);
  constexpr bool kIsNarrow = sizeof(Value) == 2;
  const auto larger_of = [](Ints a, Ints b) {
    return kIsNarrow ? larger_words(a, b) : larger(a, b);
  };
  Ints most = broadcast(0);
  for (; count >= 4 * kWidth; count -= 4 * kWidth, x += 4 * kWidth) {
    const Ints first = larger_of(magnitude_bits(x), magnitude_bits(x + kWidth));
    const Ints last = larger_of(magnitude_bits(x + 2 * kWidth), magnitude_bits(x + 3 * kWidth));
    most = larger_of(most, larger_of(first, last));
  }
  for (; count >= kWidth; count -= kWidth, x += kWidth) {
    most = larger_of(most, magnitude_bits(x));
  }
  if (count > 0) {
    Value last[kWidth] = {};
    std::memcpy(last, x, count * sizeof(Value));
    most = larger_of(most, magnitude_bits(last));
  }
  if constexpr (kIsNarrow) {
    const int32_t bits = largest(larger(most & broadcast(0xffff), shift_right(most, 16)));
    return to_float(Value{static_cast<uint16_t>(bits)});
  } else {
    return float_of(static_cast<uint32_t>(largest(most)));
  }
}

// kVectors vectors at a time, then half as many.
template <int kVectors, typename Value, typename Code>
inline void quantize_vectors(const Value* x, int64_t count, Code code, uint8_t* packed) {
  constexpr int kStep = kVectors * kLanes;
  for (; count >= kStep; count -= kStep, x += kStep, packed += kStep / 2) {
    Ints codes[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) codes[i] = code(load(x + i * kLanes));
    pack_codes(codes, packed);
  }
  if constexpr (kVectors > 1) {
    quantize_vectors<kVectors / 2>(x, count, code, packed);
  } else if (count > 0) {
    const Ints codes[1] = {code(load_first(x, static_cast<int>(count)))};
    uint8_t last[kLanes / 2];
    pack_codes(codes, last);
    std::memcpy(packed, last, (count + 1) / 2);
  }
}

// Where the reciprocal overflows a quotient keeps the block's shape; a block of zeros stays zero.
// NaN and infinity come here too: no value but NaN and zero is left of them.
template <typename Value>
__attribute__((noinline)) void quantize_special_block(const Value* x, int64_t count, float absmax,
                                                      const AnyLevel& any, uint8_t* packed) {
  const Floats divisor = broadcast(absmax == 0.0f ? 1.0f : absmax);
  quantize_vectors<4>(x, count, [&](Floats values) { return any.code(values / divisor); }, packed);
}

template <typename Value, typename Nearest>
void quantize_block(const Value* x, int64_t count, float absmax, const FixedPoint& fixed_point,
                    const Nearest& nearest, const AnyLevel& any, uint8_t* packed) {
  const float reciprocal = 1.0f / absmax;
  if (!(reciprocal > 0.0f) || std::isinf(reciprocal)) {
    return quantize_special_block(x, count, absmax, any, packed);
  }
  const Floats factor = broadcast(reciprocal);
  const auto code = [&](Floats values) { return nearest.code(values * factor); };
  // A power of two more changes no rounding, unless it overflows.
  const float larger = reciprocal * FixedPoint::kOne;
  if (fixed_point.fits() && !std::isinf(larger)) {
    constexpr int kStep = FixedPoint::kStep;
    for (; count >= kStep; count -= kStep, x += kStep, packed += kStep / 2) {
      const bool is_done = fixed_point.quantize(x, broadcast(larger), packed);
      if (!is_done) quantize_vectors<4>(x, kStep, code, packed);
    }
  }
  quantize_vectors<4>(x, count, code, packed);
}

// Asks for values ahead of their use: while others are quantised.
template <typename Value>
void prefetch_values(const Value* x, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Value);
  for (int64_t i = 0; i < count; i += kLine) prefetch(x + i);
}

// Values whose scales are found before they are quantised: blocks then do not wait for their own
// scale, and the values are still in the L1 cache.
constexpr int64_t kGroupValues = 4096;

// Between the values that are asked for and those that are quantised.
constexpr int kGroupsAhead = 3;

template <typename Value, typename Nearest>
void quantize(const Value* x, int64_t n, const FixedPoint& fixed_point, const Nearest& nearest,
              const AnyLevel& any, int64_t block_size, uint8_t* packed, float* absmax,
              int threads) {
  const int64_t group = std::max(kGroupValues / block_size, int64_t{1});
  // A block may be larger than all there is, up to what an int64_t holds.
  const int64_t distance = block_size < n ? kGroupsAhead * group * block_size : n;
  for_each_part(n, block_size, threads, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += group) {
      const int64_t end = std::min(begin + group, last);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * block_size;
        absmax[block] = block_absmax(x + start, std::min(block_size, n - start));
      }
      for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * block_size, count = std::min(block_size, n - start);
        const int64_t ahead = start + distance;
        if (ahead < n) prefetch_values(x + ahead, std::min(block_size, n - ahead));
        quantize_block(x + start, count, absmax[block], fixed_point, nearest, any,
                       packed + start / 2);
      }
    }
  });
}

// The lowest code of the level 0 fills up the last byte after an odd number of values.
uint8_t code_of_zero(const float* codebook) {
  const float* zero = std::find(codebook, codebook + 16, 0.0f);
  return zero == codebook + 16 ? 0 : static_cast<uint8_t>(zero - codebook);
}

}  // namespace

int quantize_4bit(const void* x, int dtype, int64_t n, const float* codebook, int64_t block_size,
                  uint8_t* packed, float* absmax, int threads) {
  if (is_bad_size(n, block_size, threads)) return kBadSize;
  const Decisions<16> decisions(codebook);
  const FixedPoint fixed_point(decisions);
  const AnyLevel any(Thresholds(decisions.thresholds), decisions.codes);
  prepare_fresh(packed, n / 2);
  return with_dtype(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(x);
    with_nearest_level(decisions, [&](const auto& nearest) {
      quantize(values, n, fixed_point, nearest, any, block_size, packed, absmax, threads);
    });
    if (n % 2 != 0) packed[n / 2] = (packed[n / 2] & 0xf0) | code_of_zero(codebook);
    return kOk;
  });
}

}  // namespace qlora
