// x W^T + bias, or x W, for a weight of 4-bit codes that is never restored as a whole.

#include "blockwise.h"
#include "few_tokens.h"
#include "multiplier.h"

namespace qlora {
namespace {

template <typename Value>
constexpr bool kIsBfloat16 = std::is_same_v<Value, Bfloat16>;

// What multiplies: many tokens in a Format (weight.h), few of them in Ways, the best one first.
//
// FewTokens' time grows by a quarter of a decoding with each token; a Multiplier's decoding,
// through memory, takes two to three times as long, and then a token costs little where tiles
// multiply bfloat16, and half to two thirds as much as here elsewhere, if it is one of a whole
// panel. Scaled levels take longer than scaled sums for one token, and less time with each more. So
// measured at 4096 x 4096, with blocks of 64, on AMX, AVX-512 (Zen 4) and AVX2 (Zen 3: a Multiplier
// is as fast at 15 tokens, at 12 1.2 times slower, at 16 faster).
template <typename ItsSteps, int kLeastTokens, int kMostTokens>
struct Way {
  using Steps = ItsSteps;
  static constexpr int kLeast = kLeastTokens, kMost = kMostTokens;
};
template <typename... Each>
struct WaysOf {};

#if defined(__AMX_BF16__)
template <typename Value>
using Format = Bfloat16Format<Value>;
template <typename Value>
using Ways = WaysOf<Way<FloatSteps, 1, kIsBfloat16<Value> ? 6 : 16>>;
#elif defined(__AVX512BW__)
using FloatWays =
    WaysOf<Way<ScaledSteps<InFloat, FloatStretch<float>>, 6, 16>, Way<FloatSteps, 1, 16>>;
#if defined(__AVX512BF16__)
template <typename Value>
using Format = std::conditional_t<kIsBfloat16<Value>, Bfloat16Format<Value>, FloatFormat<Value>>;
using PairWays = WaysOf<Way<ScaledSteps<InPairs, PairStretch>, 5, 16>, Way<PairSteps, 1, 16>,
                        Way<FloatSteps, 1, 16>>;
template <typename Value>
using Ways = std::conditional_t<kIsBfloat16<Value>, PairWays, FloatWays>;
#else
template <typename Value>
using Format = FloatFormat<Value>;
template <typename Value>
using Ways = FloatWays;
#endif
#else
template <typename Value>
using Format = FloatFormat<Value>;
#if defined(__AVX2__)
template <typename Value>
using Ways = WaysOf<Way<ByteSteps, 1, 15>, Way<FloatSteps, 1, 15>>;
#else
template <typename Value>
using Ways = WaysOf<Way<FloatSteps, 1, 8>>;
#endif
#endif

// Where levels are multiplied before they are scaled, their sums must neither overflow nor lose
// bits below 2^-126 where weights would not. Tiles take numbers below that for zero, and the last
// plane of a float is 2^-18 of it or less.
template <typename Value>
bool has_extreme_token(const Product<Value>& product) {
  for (int64_t token = 0; token < product.tokens; ++token) {
    const float largest = largest_magnitude(product.x + token * product.depth, product.depth);
    if (largest > 0 && !(largest >= 0x1p-60f && largest <= 0x1p100f)) return true;
  }
  return false;
}

// What is infinite stays so in any order.
bool has_extreme_levels(const float* codebook) {
  float largest = 0;
  for (int i = 0; i < 16; ++i) {
    if (std::isfinite(codebook[i])) largest = std::max(largest, std::abs(codebook[i]));
  }
  return largest > 0 && !(largest >= 0x1p-20f && largest <= 0x1p10f);
}

// Takes this way, if it suits the product.
template <typename Chosen, typename Value>
bool multiply_few(const Product<Value>& product, int threads, Status* status) {
  using Few = FewTokens<typename Chosen::Steps, Value>;
  const Weight& weight = product.weight;
  const bool suits = Chosen::kLeast <= product.tokens && product.tokens <= Chosen::kMost &&
                     Few::fits(weight) && Chosen::Steps::suits(weight.codebook) &&
                     (Chosen::Steps::kScalesLevels ||
                      !(has_extreme_levels(weight.codebook) || has_extreme_token(product)));
  if (suits) *status = Few(product, threads).run();
  return suits;
}

template <typename Value, typename... Each>
bool multiply_few(const Product<Value>& product, int threads, Status* status, WaysOf<Each...>) {
  return (multiply_few<Each>(product, threads, status) || ...);
}

template <typename Format, typename Value>
Status multiply(const Product<Value>& product, bool transposed, int threads) {
  if (transposed) return Multiplier<Format, Value, true>(product, threads).run();
  return Multiplier<Format, Value, false>(product, threads).run();
}

}  // namespace

int matmul_4bit(const void* x, int dtype, int64_t tokens, const uint8_t* packed, const void* absmax,
                const float* nested_absmax, const float* nested_codebook, const float* offset,
                const float* codebook, int64_t block_size, int64_t rows, int64_t columns,
                const void* bias, int transposed, void* y, int threads) {
  if (rows < 0 || columns < 0 || is_bad_size(tokens, block_size, threads)) return kBadSize;
  if (rows * columns < kParallelMinimum) threads = 1;
  const Weight weight{packed,   {absmax, nested_absmax, nested_codebook, offset},
                      codebook, block_size,
                      rows,     columns};
  return with_dtype(dtype, [&](auto type) {
    using Value = decltype(type);
    Product<Value> product{static_cast<const Value*>(x),
                           static_cast<const Value*>(bias),
                           static_cast<Value*>(y),
                           tokens,
                           columns,
                           rows,
                           weight};
    if (transposed) std::swap(product.depth, product.outputs);
    if (tokens == 0 || product.outputs == 0) return int{kOk};
    Status status = kOk;
    if (!transposed && multiply_few(product, threads, &status, Ways<Value>())) return int{status};
    if (Format<Value>::kPlanes > 1 && has_extreme_token(product)) {
      return int{multiply<FloatFormat<Value>>(product, transposed, threads)};
    }
    return int{multiply<Format<Value>>(product, transposed, threads)};
  });
}

}  // namespace qlora
