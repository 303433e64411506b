// x W^T + bias, or x W, for a weight of 4-bit codes that is never restored as a whole.

#include "blockwise.h"
#include "few_tokens.h"
#include "multiplier.h"

namespace qlora {
namespace {

template <typename Value>
constexpr bool kIsBfloat16 = std::is_same_v<Value, Bfloat16>;

#if defined(__AMX_BF16__)
template <typename Value>
using BestFormat = Bfloat16Format<Value>;
template <typename Value>
using BestSteps = FloatSteps;
#elif defined(__AVX512BF16__)
template <typename Value>
using BestFormat =
    std::conditional_t<kIsBfloat16<Value>, Bfloat16Format<Value>, FloatFormat<Value>>;
template <typename Value>
using BestSteps = std::conditional_t<kIsBfloat16<Value>, PairSteps, FloatSteps>;
#else
template <typename Value>
using BestFormat = FloatFormat<Value>;
template <typename Value>
#if defined(__AVX2__) && !defined(__AVX512BW__)
using BestSteps = ByteSteps;
#else
using BestSteps = FloatSteps;
#endif
#endif

// Up to here products go through FewTokens. Its time grows by a quarter of a decoding with each
// token; a Multiplier's decoding, through memory, takes two to three times as long, and then a
// token costs little where tiles multiply bfloat16, and half to two thirds as much as here
// elsewhere, if it is one of a whole panel. So measured at 4096 x 4096: on AVX2 (Zen 3, float32) as
// fast at 15 tokens, 1.2 times at 12, 0.75 to 0.95 at 16; on AVX-512 (Zen 4) as fast at 14
// (bfloat16) and 15 (float32), 1.2 times at 12, 0.9 at 16; and on AMX.
template <typename Value>
constexpr int64_t kFewest = kHasTiles && kIsBfloat16<Value> ? 6 : BestSteps<Value>::kMost;

// Few tokens are multiplied by levels before these are scaled, and those sums must neither overflow
// nor lose bits below 2^-126. Tiles take numbers below that for zero, and the last plane of a float
// is 2^-18 of it or less.
template <typename Value>
bool has_extreme_token(const Product<Value>& product) {
  for (int64_t token = 0; token < product.tokens; ++token) {
    const float largest = largest_magnitude(product.x + token * product.depth, product.depth);
    if (largest > 0 && !(largest >= 0x1p-60f && largest <= 0x1p110f)) return true;
  }
  return false;
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
    using Format = BestFormat<Value>;
    using Steps = BestSteps<Value>;
    const bool is_few = !transposed && tokens <= kFewest<Value>;
    const bool is_extreme = (is_few || Format::kPlanes > 1) && has_extreme_token(product);
    if (is_few && !is_extreme) {
      if (Steps::suits(codebook) && FewTokens<Steps, Value>::fits(weight)) {
        return int{FewTokens<Steps, Value>(product, threads).run()};
      }
      if constexpr (!std::is_same_v<Steps, FloatSteps>) {
        if (FewTokens<FloatSteps, Value>::fits(weight)) {
          return int{FewTokens<FloatSteps, Value>(product, threads).run()};
        }
      }
    }
    if (Format::kPlanes > 1 && is_extreme) {
      return int{multiply<FloatFormat<Value>>(product, transposed, threads)};
    }
    return int{multiply<Format>(product, transposed, threads)};
  });
}

}  // namespace qlora
