// Values to 4-bit codes: a block's absmax, the nearest of 16 levels, two codes a byte.

#include "fixed_point.h"
#include "large_output.h"
#include "levels_16.h"
#include "packing.h"
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

template <typename Value>
Ints larger_of(Ints a, Ints b) {
  return sizeof(Value) == 2 ? larger_words(a, b) : larger(a, b);
}

// The largest magnitude of kCount values, in as many parts as there are in a vector.
template <int kCount, typename Value>
inline Ints largest_in_places(const Value* x) {
  if constexpr (kCount * sizeof(Value) == sizeof(Ints)) {
    return magnitude_bits(x);
  } else {
    return larger_of<Value>(largest_in_places<kCount / 2>(x),
                            largest_in_places<kCount / 2>(x + kCount / 2));
  }
}

constexpr int kChunk = 64;  // values of which the largest is found at a time

// The largest magnitude in one of the lanes; none of the others exceeds it.
template <typename Value>
inline Ints largest_in_lanes(const Value* x, int64_t count) {
  constexpr int kWidth = sizeof(Ints) / sizeof(Value);
  Ints most = broadcast(0);
  for (; count >= kChunk; count -= kChunk, x += kChunk) {
    most = larger_of<Value>(most, largest_in_places<kChunk>(x));
  }
  for (; count >= kWidth; count -= kWidth, x += kWidth) {
    most = larger_of<Value>(most, magnitude_bits(x));
  }
  if (count > 0) {
    Value last[kWidth] = {};
    std::memcpy(last, x, count * sizeof(Value));
    most = larger_of<Value>(most, magnitude_bits(last));
  }
  if (sizeof(Value) == 4) return most;
  return larger(most & broadcast(0xffff), shift_right(most, 16));
}

inline float float_of_magnitude(uint32_t bits, float) { return float_of(bits); }
template <typename Value>
float float_of_magnitude(uint32_t bits, Value) {
  return to_float(Value{static_cast<uint16_t>(bits)});
}

// absmax[i] = the largest |x| of block i, of kLanes whole blocks.
template <typename Value>
void blocks_absmax(const Value* x, int64_t block_size, float* absmax) {
  Ints most[kLanes];
  for (int i = 0; i < kLanes; ++i) most[i] = largest_in_lanes(x + i * block_size, block_size);
  const Ints all = largest_of_each(most);
  uint32_t bits[kLanes];
  std::memcpy(bits, &all, sizeof bits);
  for (int i = 0; i < kLanes; ++i) absmax[i] = float_of_magnitude(bits[i], Value{});
}

// The same for one block that need not be whole.
template <typename Value>
float block_absmax(const Value* x, int64_t count) {
  return float_of_magnitude(static_cast<uint32_t>(largest(largest_in_lanes(x, count))), Value{});
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

// Values whose scales are found before they are quantised, 4 KiB of them: blocks then do not wait
// for their own scale, the values are still in the L1 cache, and memory is never left idle for long
// by the search for scales, which asks for nothing ahead.
template <typename Value>
constexpr int64_t kGroupValues = 4096 / sizeof(Value);

// How many values lie between those that are asked for and those that are quantised. Measured on
// Zen 4 (AVX-512) and on Zen 3.
#if defined(__AVX512BW__)
constexpr int64_t kValuesAhead = 1024;
#else
constexpr int64_t kValuesAhead = 4096;
#endif

template <typename Value>
void prefetch_values(const Value* x, int64_t count) {
  prefetch_bytes(x, count * sizeof(Value), kValuesAhead * sizeof(Value));
}

// How values of one dtype are quantised.
template <typename Value, typename Nearest>
class Quantizer {
 public:
  Quantizer(const FixedPoint& fixed_point, const Nearest& nearest)
      : fixed_point_(fixed_point), nearest_(nearest) {}

  // Blocks `first` to `last` of n values; packed and absmax are those of all.
  void quantize(const Value* x, int64_t n, int64_t block_size, int64_t first, int64_t last,
                uint8_t* packed, float* absmax) const {
    const int64_t group = std::max(kGroupValues<Value> / block_size, int64_t{1});
    const int64_t whole = std::min(last, n / block_size);
    for (int64_t begin = first; begin < whole; begin += group) {
      const int64_t start = begin * block_size, count = std::min(group, whole - begin);
      find_absmax(x + start, block_size, count, absmax + begin);
      quantize_blocks(x + start, block_size, count, absmax + begin, packed + start / 2);
    }
    if (whole < last) {
      const int64_t start = whole * block_size;
      absmax[whole] = block_absmax(x + start, n - start);
      quantize_blocks(x + start, n - start, 1, absmax + whole, packed + start / 2);
    }
  }

 private:
  static constexpr int kStep = FixedPoint::kStep, kHalf = kStep / 2;

  static void find_absmax(const Value* x, int64_t block_size, int64_t blocks, float* absmax) {
    for (; blocks >= kLanes; blocks -= kLanes, x += kLanes * block_size, absmax += kLanes) {
      blocks_absmax(x, block_size, absmax);
    }
    for (; blocks > 0; --blocks, x += block_size) *absmax++ = block_absmax(x, block_size);
  }

  // Blocks of one group, or one block that is larger.
  __attribute__((noinline)) void quantize_blocks(const Value* x, int64_t block_size, int64_t blocks,
                                                 const float* absmax, uint8_t* packed) const {
    if (fixed_point_.fits() && block_size >= kHalf) {
      const int64_t part = std::min(block_size, kGroupValues<Value>);
      for (int64_t i = 0; i < block_size; i += part) {
        const int64_t count = std::min(part, block_size - i);
        quantize_in_fixed_point(x + i, count, blocks, absmax, packed + i / 2);
      }
      return;
    }
    for (; blocks > 0; --blocks, x += block_size, packed += block_size / 2) {
      prefetch_values(x, block_size);
      quantize_block(x, block_size, *absmax++, packed);
    }
  }

  // Blocks of one group, of at least kHalf values, or a part of a larger block.
  void quantize_in_fixed_point(const Value* x, int64_t block_size, int64_t blocks,
                               const float* absmax, uint8_t* packed) const {
    // Several quotients in one instruction, and no block waits for its own. A power of two more
    // changes no rounding, unless it overflows.
    float factors[kGroupValues<Value> / kHalf];
    for_each_vector(blocks, [&](int64_t i, auto part) {
      store(factors + i, broadcast(1.0f) / load(absmax + i, part) * broadcast(FixedPoint::kOne),
            part);
    });
    // A copy, and no call in the loop, so that its tables stay in registers: the steps that are
    // left to float arithmetic are taken down.
    const FixedPoint fixed_point = fixed_point_;
    int64_t left[kGroupValues<Value> / kStep];
    int left_count = 0;
    const auto quantize_step = [&](int64_t start, float head, float tail) {
      prefetch_values(x + start, kStep);
      const bool is_done =
          fixed_point.quantize(x + start, broadcast(head), broadcast(tail), packed + start / 2);
      // A branch, as it is foretold rightly nearly always, takes less time than counting without.
      if (__builtin_expect(!(is_done & is_usual(head) & is_usual(tail)), false)) {
        left[left_count++] = start;
      }
    };
    int64_t done = 0;  // blocks, but for what a last step would not fill
    if (block_size == kHalf) {
      for (; done + 2 <= blocks; done += 2) {
        quantize_step(done * kHalf, factors[done], factors[done + 1]);
      }
    } else {
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t i = 0; i + kStep <= block_size; i += kStep) {
          quantize_step(block * block_size + i, factors[block], factors[block]);
        }
      }
    }
    for (int i = 0; i < left_count; ++i) {
      for (const int64_t start : {left[i], left[i] + kHalf}) {
        quantize_seldom(x + start, kHalf, absmax[start / block_size], packed + start / 2);
      }
    }
    const int64_t rest = block_size % kStep;
    for (; rest > 0 && done < blocks; ++done) {
      const int64_t start = (done + 1) * block_size - rest;
      quantize_seldom(x + start, rest, absmax[done], packed + start / 2);
    }
  }

  // Neither zero nor infinity nor NaN.
  static bool is_usual(float factor) { return bits_of(factor) - 1 < kInfinity - 1; }

  __attribute__((always_inline)) void quantize_block(const Value* x, int64_t count, float absmax,
                                                     uint8_t* packed) const {
    const float reciprocal = 1.0f / absmax;
    if (!is_usual(reciprocal)) return quantize_special_block(x, count, absmax, packed);
    const Floats factor = broadcast(reciprocal);
    quantize_vectors<4>(
        x, count, [&](Floats values) { return nearest_.code(values * factor); }, packed);
  }

  // Out of line, so that the loop around it keeps its registers.
  __attribute__((noinline)) void quantize_seldom(const Value* x, int64_t count, float absmax,
                                                 uint8_t* packed) const {
    quantize_block(x, count, absmax, packed);
  }

  // Where the reciprocal overflows a quotient keeps the block's shape; a block of zeros stays zero.
  // NaN and infinity come here too: no value but NaN and zero is left of them.
  __attribute__((noinline)) void quantize_special_block(const Value* x, int64_t count, float absmax,
                                                        uint8_t* packed) const {
    const Floats divisor = broadcast(absmax == 0.0f ? 1.0f : absmax);
    quantize_vectors<4>(
        x, count, [&](Floats values) { return nearest_.code(values / divisor); }, packed);
  }

  const FixedPoint& fixed_point_;
  const Nearest& nearest_;
};

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
  prepare_fresh(packed, n / 2);
  return with_dtype(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(x);
    with_nearest_level(decisions, [&](const auto& nearest) {
      const Quantizer<decltype(type), std::decay_t<decltype(nearest)>> quantizer(fixed_point,
                                                                                 nearest);
      for_each_part(n, block_size, threads, [&](int, int64_t first, int64_t last) {
        quantizer.quantize(values, n, block_size, first, last, packed, absmax);
      });
    });
    if (n % 2 != 0) packed[n / 2] = (packed[n / 2] & 0xf0) | code_of_zero(codebook);
    return kOk;
  });
}

}  // namespace qlora
