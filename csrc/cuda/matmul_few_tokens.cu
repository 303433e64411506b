// The product for up to 32 tokens, bound by how fast the weight is read and decoded: y^T = W x^T on
// tensor cores, W as the operand with 16 rows, straight from its bytes as they are stored.
//
// The 16 weights of a row in one tensor-core product need not be neighbours, as long as the same
// inputs of x meet them. So a thread decodes weights that lie in a row (16 of a step of 64), and
// the four threads that share a row of the product have four such runs: nothing is exchanged. See
// docs/fragments.md.
//
// Sums of a step, within one block of the weight, are multiplied by the block's scale and added to
// the total, both in float. The warps of a thread block share the inputs among them; their totals
// are added up in shared memory, in the order of the warps.

#include "decode.cuh"
#include "matmul.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "split_sum.cuh"

namespace qlora {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 32;  // of a thread block

// How a warp works, for so many tokens as its registers have room.
template <int kWords_, int kTiles_, int kHeights_, int kGroup_>
struct Shape {
  static constexpr int kWords = kWords_;      // of a row for each of four threads, in a step
  static constexpr int kTiles = kTiles_;      // of 8 tokens
  static constexpr int kHeights = kHeights_;  // of 16 rows
  static constexpr int kGroup = kGroup_;      // steps that are loaded ahead

  static constexpr int kStep = 32 * kWords;  // inputs: a word has 8 weights
  static constexpr int kGroupStep = kGroup * kStep;
  static constexpr int kRuns = 2 * kHeights;  // rows of a thread
  static constexpr int kTokens = 8 * kTiles;
  static constexpr int kParts = kWarps * 16 * kHeights / kRows;  // of the inputs, among the warps

  using Words = uint32_t[kRuns][kWords];
  using Totals = float[kHeights][kTiles][4];
};

// Where a thread works. Lane 4 g + t of a warp decodes rows g, g + 8, ... of the warp's, and of
// each step its run t; it reads x for tokens g, g + 8, ...
template <typename Shape>
struct Lane {
  int g, t;
  int64_t rows[Shape::kRuns];  // their first elements; for rows beyond the weight those of its last
  // x in vectors of eight: run t of the first step, and where the tokens begin from there.
  const uint4* x;
  uint32_t tokens[Shape::kTiles];
};

__device__ inline void load_run(const uint8_t* address, uint32_t (&words)[1]) {
  words[0] = *reinterpret_cast<const uint32_t*>(address);
}

__device__ inline void load_run(const uint8_t* address, uint32_t (&words)[2]) {
  const uint2 both = *reinterpret_cast<const uint2*>(address);
  words[0] = both.x;
  words[1] = both.y;
}

template <typename Shape>
__device__ void load_step(const Weight& weight, const Lane<Shape>& lane, int64_t input,
                          typename Shape::Words& words) {
#pragma unroll
  for (int run = 0; run < Shape::kRuns; ++run) {
    const int64_t start = (lane.rows[run] + input) / 2 + 4 * Shape::kWords * lane.t;
    load_run(weight.packed + start, words[run]);
  }
}

// The scales of a thread's rows at an input.
template <typename Shape>
__device__ void load_scales(const Weight& weight, const Lane<Shape>& lane, int64_t input,
                            int block_shift, StoredScale (&scales)[Shape::kRuns]) {
#pragma unroll
  for (int run = 0; run < Shape::kRuns; ++run) {
    scales[run] = weight.scales.load((lane.rows[run] + input) >> block_shift);
  }
}

// sums += the products of word `word` of a step, where x begins at `vector`.
template <typename Shape, typename Narrow, typename Decoder>
__device__ void add_word(const typename Shape::Words& words, int word, const Decoder& decoder,
                         const Lane<Shape>& lane, int64_t vector, typename Shape::Totals& sums) {
  uint32_t first[Shape::kHeights][4], second[Shape::kHeights][4];
#pragma unroll
  for (int height = 0; height < Shape::kHeights; ++height) {
    uint32_t upper[4], lower[4];  // rows g and g + 8
    decoder.decode(words[2 * height][word], upper);
    decoder.decode(words[2 * height + 1][word], lower);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[height][2 * i] = upper[i];
      first[height][2 * i + 1] = lower[i];
      second[height][2 * i] = upper[2 + i];
      second[height][2 * i + 1] = lower[2 + i];
    }
  }
#pragma unroll
  for (int tile = 0; tile < Shape::kTiles; ++tile) {
    const uint4 x = (lane.x + lane.tokens[tile] + vector)[word];
#pragma unroll
    for (int height = 0; height < Shape::kHeights; ++height) {
      multiply_16x8x16<Narrow>(sums[height][tile], first[height], {x.x, x.y});
      multiply_16x8x16<Narrow>(sums[height][tile], second[height], {x.z, x.w});
    }
  }
}

// totals += the products of a step at an input, times the scales of its rows.
template <typename Shape, typename Narrow, typename Decoder>
__device__ void add_step(const typename Shape::Words& words, const float (&scales)[Shape::kRuns],
                         const Decoder& decoder, const Lane<Shape>& lane, int64_t input,
                         typename Shape::Totals& totals) {
  typename Shape::Totals sums = {};
#pragma unroll
  for (int word = 0; word < Shape::kWords; ++word) {
    add_word<Shape, Narrow>(words, word, decoder, lane, input / 8, sums);
  }
#pragma unroll
  for (int height = 0; height < Shape::kHeights; ++height) {
#pragma unroll
    for (int i = 0; i < 4 * Shape::kTiles; ++i) {
      float& total = totals[height][i / 4][i % 4];
      total = __fmaf_rn(sums[height][i / 4][i % 4], scales[2 * height + i % 4 / 2], total);
    }
  }
}

// Adds up a warp's share of the inputs: groups of steps from `input` on. What comes next is loaded
// as soon as there is room for it in the registers.
template <typename Shape, typename Narrow, typename Decoder>
class Summation {
 public:
  __device__ Summation(const Weight& weight, const Lane<Shape>& lane, int block_shift,
                       int64_t input, int64_t last)
      : weight_(weight), lane_(lane), block_shift_(block_shift), input_(input), last_(last) {
    if (input_ + Shape::kGroupStep > last_) return;
    load_scales(weight_, lane_, scaled(input_), block_shift_, scales_);
#pragma unroll
    for (int step = 0; step < Shape::kGroup; ++step) {
      load_step(weight_, lane_, input_ + step * Shape::kStep, words_[step]);
    }
  }

  // unstretch: what scales are multiplied by.
  __device__ void add(const Decoder& decoder, float unstretch, typename Shape::Totals& totals) {
    unstretch_ = unstretch;
    for (; input_ + Shape::kGroupStep <= last_; input_ += kStride) {
      add_group(decoder, input_ + kStride + Shape::kGroupStep <= last_, totals);
    }
    const int64_t end = min(input_ + Shape::kGroupStep, last_);
    for (; input_ < end; input_ += Shape::kStep) {
      load_scales(weight_, lane_, input_, block_shift_, scales_);
      load_step(weight_, lane_, input_, words_[0]);
      float scales[Shape::kRuns];
      restore_scales(scales);
      add_step<Shape, Narrow>(words_[0], scales, decoder, lane_, input_, totals);
    }
  }

 private:
  static constexpr int64_t kStride = Shape::kParts * Shape::kGroupStep;

  // Of the four threads that share a row, thread t has the scale of step t of a group.
  __device__ int64_t scaled(int64_t input) const {
    return input + lane_.t % Shape::kGroup * Shape::kStep;
  }

  __device__ void restore_scales(float (&scales)[Shape::kRuns]) const {
#pragma unroll
    for (int run = 0; run < Shape::kRuns; ++run) {
      scales[run] = weight_.scales.restore(scales_[run]) * unstretch_;
    }
  }

  __device__ void add_group(const Decoder& decoder, bool has_next, typename Shape::Totals& totals) {
    float own[Shape::kRuns];
    restore_scales(own);
    const int64_t next = input_ + kStride;
    if (has_next) load_scales(weight_, lane_, scaled(next), block_shift_, scales_);
#pragma unroll
    for (int step = 0; step < Shape::kGroup; ++step) {
      typename Shape::Words words;
      memcpy(words, words_[step], sizeof(words));
      if (has_next) load_step(weight_, lane_, next + step * Shape::kStep, words_[step]);
      float scales[Shape::kRuns];
#pragma unroll
      for (int run = 0; run < Shape::kRuns; ++run) {
        scales[run] = __shfl_sync(kAllLanes, own[run], step, 4);
      }
      add_step<Shape, Narrow>(words, scales, decoder, lane_, input_ + step * Shape::kStep, totals);
    }
  }

  const Weight& weight_;
  const Lane<Shape>& lane_;
  const int block_shift_;
  int64_t input_;
  const int64_t last_;
  typename Shape::Words words_[Shape::kGroup];
  StoredScale scales_[Shape::kRuns];
  float unstretch_;
};

// Adds up the totals of the warps that share rows, and stores them.
// partial: (kParts, kRows, kTokens) in shared memory, which nobody reads any more.
template <typename Shape, typename Narrow>
__device__ void store_totals(const Matmul& matmul, const Lane<Shape>& lane, int part, int own_row,
                             int64_t first_row, int split, const typename Shape::Totals& totals,
                             float* partial) {
  float* own = partial + (part * kRows + own_row) * Shape::kTokens;
#pragma unroll
  for (int height = 0; height < Shape::kHeights; ++height) {
#pragma unroll
    for (int i = 0; i < 4 * Shape::kTiles; ++i) {
      const int row = 16 * height + lane.g + i % 4 / 2 * 8;
      const int token = i / 4 * 8 + 2 * lane.t + i % 2;
      own[row * Shape::kTokens + token] = totals[height][i / 4][i % 4];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * Shape::kTokens; i += kThreads) {
    const int64_t row = first_row + i % kRows, token = i / kRows;
    if (row >= matmul.weight.rows || token >= matmul.tokens) continue;
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < Shape::kParts; ++other) {
      sum += partial[(other * kRows + i % kRows) * Shape::kTokens + token];
    }
    store_sum<Narrow>(matmul, split, token, row, matmul.weight.rows, sum);
  }
}

// Threads: kThreads. Thread blocks: tiles of kRows rows, splits; all in x, rows fastest.
// Aligned to 16 bytes: x, packed. Block size 2^block_shift, a multiple of kStep, as K is.
// Dynamic shared memory: for the decoder, or for the totals of the warps.
template <typename Shape, typename Narrow, typename Decoder>
__global__ void __launch_bounds__(kThreads, Shape::kHeights == 1 ? 2 : 1)
    multiply_few(Matmul matmul, int block_shift) {
  extern __shared__ uint4 shared[];
  char* table = reinterpret_cast<char*>(shared);
  const Weight& weight = matmul.weight;
  const int64_t row_tiles = (weight.rows - 1) / kRows + 1;
  const int64_t first_row = blockIdx.x % row_tiles * kRows;
  const int split = blockIdx.x / row_tiles;
  const int warp = warp_of_block();
  const int warp_part = warp % Shape::kParts;
  const int warp_row = warp / Shape::kParts * 16 * Shape::kHeights;
  Lane<Shape> lane;
  lane.g = threadIdx.x % 32 / 4;
  lane.t = threadIdx.x % 4;
  lane.x = static_cast<const uint4*>(matmul.x) + Shape::kWords * lane.t;
#pragma unroll
  for (int run = 0; run < Shape::kRuns; ++run) {
    const int64_t row = first_row + warp_row + lane.g + 8 * run;
    lane.rows[run] = min(row, weight.rows - 1) * weight.columns;
  }
#pragma unroll
  for (int tile = 0; tile < Shape::kTiles; ++tile) {
    const int64_t token = min(int64_t{8 * tile + lane.g}, matmul.tokens - 1);
    lane.tokens[tile] = static_cast<uint32_t>(token * (weight.columns / 8));
  }

  const Part part(weight.columns, matmul.splits, split, Shape::kStep);
  // The first weights are on their way while the decoder is made.
  Summation<Shape, Narrow, Decoder> summation(
      weight, lane, block_shift, part.first + warp_part * Shape::kGroupStep, part.last);
  const float stretch = best_stretch<Narrow>(weight.codebook);
  Decoder::template fill<Narrow>(table, weight.codebook, stretch);
  __syncthreads();
  const Decoder decoder = Decoder::template create<Narrow>(table, weight.codebook, stretch);
  typename Shape::Totals totals = {};
  summation.add(decoder, 1.0f / stretch, totals);
  __syncthreads();
  store_totals<Shape, Narrow>(matmul, lane, warp_part, warp_row, first_row, split, totals,
                              reinterpret_cast<float*>(shared));
}

template <typename Shape, typename Narrow, typename Decoder>
int launch(const Matmul& matmul, int block_shift) {
  constexpr int kTotalsBytes = Shape::kParts * kRows * Shape::kTokens * sizeof(float);
  constexpr int kBytes =
      Decoder::kSharedBytes > kTotalsBytes ? Decoder::kSharedBytes : kTotalsBytes;
  const auto kernel = multiply_few<Shape, Narrow, Decoder>;
  const int64_t blocks = ((matmul.weight.rows - 1) / kRows + 1) * matmul.splits;
  return launch_with_shared(kernel, blocks, kThreads, kBytes, matmul.stream, matmul, block_shift);
}

template <typename Narrow, typename Decoder>
int launch_for(const Matmul& matmul, int block_shift) {
  if (block_shift < 6 || matmul.weight.columns % 64 != 0) {
    return launch<Shape<1, 4, 2, 2>, Narrow, Decoder>(matmul, block_shift);
  }
  if (matmul.tokens <= 8) return launch<Shape<2, 1, 1, 4>, Narrow, Decoder>(matmul, block_shift);
  if (matmul.tokens <= 16) return launch<Shape<2, 2, 1, 2>, Narrow, Decoder>(matmul, block_shift);
  return launch<Shape<2, 4, 2, 2>, Narrow, Decoder>(matmul, block_shift);
}

template <typename Narrow>
int launch_with(const Matmul& matmul, int block_shift, bool by_table) {
  return by_table ? launch_for<Narrow, TableDecoder>(matmul, block_shift)
                  : launch_for<Narrow, PermuteDecoder>(matmul, block_shift);
}

}  // namespace

int matmul_few_tokens(const Matmul& matmul, bool by_table) {
  const int block_shift = tensor_core_block_shift(matmul);
  if (block_shift < 0 || matmul.transposed || matmul.tokens > 32) return kBadSize;
  return matmul.dtype == kBfloat16 ? launch_with<__nv_bfloat16>(matmul, block_shift, by_table)
                                   : launch_with<__half>(matmul, block_shift, by_table);
}

}  // namespace qlora
