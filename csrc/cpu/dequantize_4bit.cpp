// 4-bit codes to values: scale the 16 levels once a block, then look up two values a byte.

#include <type_traits>

#include "large_output.h"
#include "nibbles.h"
#include "parts.h"
#include "scales.h"

namespace qlora {
namespace {

constexpr int64_t kStreamAlignment = 64;

// Whether every vector that is written starts at a multiple of its size.
template <typename Value>
bool can_stream(const Value* y, int64_t block_size) {
  return reinterpret_cast<uintptr_t>(y) % kStreamAlignment == 0 &&
         block_size * sizeof(Value) % kStreamAlignment == 0;
}

// Bytes of codes between those that are asked for and those that are used; and how many are asked
// for at a time at most, so that they are still in the first-level cache when they are used.
constexpr uintptr_t kCodesAhead = 512;
constexpr int64_t kMostCodes = 4096;

// The blocks from `first` to before `last`.
template <bool kStream, typename Value>
void dequantize(const uint8_t* packed, const Scales& scales, const float* codebook,
                int64_t block_size, int64_t n, bool exceeds_caches, Value* y, int64_t first,
                int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    // Blocks are even, so each starts with a byte of its own.
    const int64_t start = block * block_size, count = std::min(block_size, n - start);
    // The codes leave the caches to the values, which are more.
    if (exceeds_caches) {
      prefetch_bytes<kOnce>(packed + start / 2, std::min(count / 2, kMostCodes), kCodesAhead);
    }
    const ScaledLevels<Value> levels(codebook, scales[block]);
    restore_codes<kStream>(levels, packed + start / 2, count, y + start);
  }
  if (kStream && first < last) fence_streams();
}

}  // namespace

int dequantize_4bit(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                    const float* nested_codebook, const float* offset, const float* codebook,
                    int64_t block_size, int64_t n, void* y, int dtype, int threads) {
  if (is_bad_size(n, block_size, threads)) return kBadSize;
  const Scales scales{absmax, nested_absmax, nested_codebook, offset};
  return with_dtype(dtype, [&](auto type) {
    using Value = decltype(type);
    auto* values = static_cast<Value*>(y);
    const int64_t value_bytes = sizeof(Value);
    // The kernel has just zeroed a fresh page: it is in the caches, and stays there until it is
    // written. Other pages would only pass through them, and be read first.
    const bool is_fresh = prepare_fresh(y, n * value_bytes);
    const int64_t most_cached = cached_output(threads);
    const bool exceeds = n * value_bytes >= most_cached;
    const bool streams = exceeds && !is_fresh && can_stream(values, block_size);
    const int64_t cached = streams ? most_cached / value_bytes / block_size / threads : n;
    const auto write = [&](auto is_stream, int64_t first, int64_t last) {
      dequantize<is_stream()>(packed, scales, codebook, block_size, n, exceeds, values, first,
                              last);
    };
    for_each_part(n, block_size, threads, [&](int part, int64_t first, int64_t last) {
      // Half of the threads write into the caches while the others write to memory.
      if (part % 2 == 0) {
        const int64_t middle = std::min(first + cached, last);
        write(std::false_type(), first, middle);
        write(std::true_type(), middle, last);
      } else {
        const int64_t middle = std::max(last - cached, first);
        write(std::true_type(), first, middle);
        write(std::false_type(), middle, last);
      }
    });
    return kOk;
  });
}

}  // namespace qlora
