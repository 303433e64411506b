// What this processor can multiply and add at best: numbers that stay in registers. The roof over
// the products of this library; no operation uses it.

#include "tiles_amx.h"

namespace qlora {
namespace {

// Sums that do not wait for one another: two additions a cycle, each of 4 or 5 cycles.
constexpr int kSums = 12;

// Takes `step` for each sum in each round; returns how many lanes of sums it took.
template <typename Step>
int64_t repeat(int64_t rounds, Step step) {
  Floats sums[kSums];
  for (Floats& sum : sums) sum = broadcast(1.0f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (Floats& sum : sums) sum = in_register(step(sum));
  }
  float kept[kSums];
  for (int i = 0; i < kSums; ++i) kept[i] = sum(sums[i]);
  asm volatile("" : : "r"(kept) : "memory");  // as if they were read
  return rounds * kSums * kLanes;
}

int64_t multiply_floats(int64_t rounds) {
  const Floats factor = broadcast(0.5f), term = broadcast(0.25f);
  return 2 * repeat(rounds, [=](Floats sum) { return fused_multiply_add(sum, factor, term); });
}

#if defined(__AMX_BF16__)

int64_t multiply_bfloat16(int64_t rounds) {
  const TileShapes shapes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  return rounds * 4 * kTileSide * kTileSide * kTileDepth * 2;
}

#elif defined(__AVX512BF16__)

int64_t multiply_bfloat16(int64_t rounds) {
  const __m512bh half = _mm512_cvtne2ps_pbh(broadcast(0.5f), broadcast(0.5f));
  // A lane adds two products.
  return 4 * repeat(rounds, [=](Floats sum) { return _mm512_dpbf16_ps(sum, half, half); });
}

#else

int64_t multiply_bfloat16(int64_t rounds) { return multiply_floats(rounds); }

#endif

}  // namespace

int multiply_in_registers(int dtype, int64_t rounds, int64_t* operations, int threads) {
  if (rounds < 0 || threads < 1) return kBadSize;
  if (dtype < kFloat32 || dtype > kFloat16) return kUnknownDtype;
  int64_t total = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(+ : total)
  for (int thread = 0; thread < threads; ++thread) {
    total += dtype == kBfloat16 ? multiply_bfloat16(rounds) : multiply_floats(rounds);
  }
  *operations = total;
  return kOk;
}

}  // namespace qlora
