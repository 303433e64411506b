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
  static constexpr int kRuns = 2 * kHeights;          // rows of a thread
  static constexpr int kScales = kRuns * kGroup / 4;  // of a group, for each of four threads
  static constexpr int kTokens = 8 * kTiles;
  static constexpr int kParts = kWarps * 16 * kHeights / kRows;  // of the inputs, among the warps
  static constexpr int kStride = kParts * kGroupStep;            // from group to group of a warp

  using Words = uint32_t[kRuns][kWords];
  using Totals = float[kHeights][kTiles][4];
};

// The place of a thread in its warp. Lane 4 g + t decodes rows g, g + 8, ... of the warp's, and of
// each step its run t; it reads x for tokens g, g + 8, ...
struct Lane {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
};

__device__ inline void load_run(const uint8_t* address, uint32_t (&words)[1]) {
  words[0] = *reinterpret_cast<const uint32_t*>(address);
}

__device__ inline void load_run(const uint8_t* address, uint32_t (&words)[2]) {
  const uint2 both = *reinterpret_cast<const uint2*>(address);
  words[0] = both.x;
  words[1] = both.y;
}

// Adds up a warp's share of the inputs: groups of steps from `input` on. All that the main loop
// keeps of where things lie are pointers that move along.
template <typename Shape, typename Narrow, typename Decoder>
class Summation {
 public:
  // first_row: of the warp's.
  __device__ Summation(const Matmul& matmul, int block_shift, int64_t first_row, int64_t input,
                       int64_t last)
      : all_scales_(matmul.weight.scales),
        offset_(all_scales_.load_offset()),
        block_shift_(block_shift - 5),
        left_(static_cast<int>(last - input)) {
    const Weight& weight = matmul.weight;
    // The rest lies a stride behind the last group; where there is none, as if there were one.
    const int64_t loaded = has_group() ? input : input - Shape::kStride;
    // Rows beyond the last one are taken for it; so are tokens. What comes of them is not stored.
    const auto start_of = [&](int run) {
      return min(first_row + lane_.g + 8 * run, weight.rows - 1) * weight.columns + loaded;
    };
#pragma unroll
    for (int run = 0; run < Shape::kRuns; ++run) {
      bytes_[run] = weight.packed + start_of(run) / 2 + 4 * Shape::kWords * lane_.t;
    }
#pragma unroll
    for (int i = 0; i < Shape::kScales; ++i) {
      const int scale = 4 * i + lane_.t;
      vectors_[i] = (start_of(scale / Shape::kGroup) + own_step() * Shape::kStep) / 32;
    }
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      const int64_t token = min(int64_t{8 * tile + lane_.g}, matmul.tokens - 1);
      x_[tile] = static_cast<const uint4*>(matmul.x) + (token * weight.columns + input) / 8 +
                 Shape::kWords * lane_.t;
    }
    if (!has_group()) return;
    load_scales(Shape::kGroup);
#pragma unroll
    for (int step = 0; step < Shape::kGroup; ++step) load_step(step, words_[step]);
  }

  // unstretch: what scales are multiplied by.
  __device__ void add(const Decoder& decoder, float unstretch, typename Shape::Totals& totals) {
    unstretch_ = unstretch;
    while (has_group()) {
      float scales[Shape::kScales];
      restore_scales(scales);
      left_ -= Shape::kStride;
      // What the next group needs is loaded as soon as there is room; the last one loads its own
      // again, which is cheaper than a question with each load.
      move(has_group() ? Shape::kStride : 0);
      load_scales(Shape::kGroup);
#pragma unroll
      for (int step = 0; step < Shape::kGroup; ++step) {
        add_step(words_[step], scales, step, decoder, totals);
        load_step(step, words_[step]);
      }
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) x_[tile] += Shape::kStride / 8;
    }
    add_rest(decoder, totals);
  }

 private:
  __device__ bool has_group() const { return left_ >= Shape::kGroupStep; }

  // Of the kRuns * kGroup scales of a group, that four threads share, thread t has number t and
  // each fourth one from there; steps go fastest.
  __device__ int own_step() const { return lane_.t % Shape::kGroup; }

  __device__ void move(uint32_t inputs) {
#pragma unroll
    for (int run = 0; run < Shape::kRuns; ++run) bytes_[run] += inputs / 2;
#pragma unroll
    for (int i = 0; i < Shape::kScales; ++i) vectors_[i] += inputs / 32;
  }

  __device__ void load_step(int step, typename Shape::Words& words) const {
#pragma unroll
    for (int run = 0; run < Shape::kRuns; ++run) {
      load_run(bytes_[run] + step * Shape::kStep / 2, words[run]);
    }
  }

  __device__ void load_scales(int steps) {
    if (own_step() >= steps) return;
#pragma unroll
    for (int i = 0; i < Shape::kScales; ++i) {
      scales_[i] = all_scales_.load(vectors_[i] >> block_shift_);
    }
  }

  __device__ void restore_scales(float (&scales)[Shape::kScales]) const {
#pragma unroll
    for (int i = 0; i < Shape::kScales; ++i) {
      scales[i] = all_scales_.restore(scales_[i], offset_) * unstretch_;
    }
  }

  // totals += the products of a step of a group, times the scales of its rows.
  __device__ void add_step(const typename Shape::Words& words, const float (&own)[Shape::kScales],
                           int step, const Decoder& decoder, typename Shape::Totals& totals) {
    typename Shape::Totals sums = {};
#pragma unroll
    for (int word = 0; word < Shape::kWords; ++word) {
      add_word(words, word, 4 * Shape::kWords * step + word, decoder, sums);
    }
    float scales[Shape::kRuns];
#pragma unroll
    for (int run = 0; run < Shape::kRuns; ++run) {
      constexpr int kGroup = Shape::kGroup;
      scales[run] = __shfl_sync(kAllLanes, own[run * kGroup / 4], run * kGroup % 4 + step, 4);
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

  // sums += the products of word `word` of a step, which meets vector `vector` of x.
  __device__ void add_word(const typename Shape::Words& words, int word, int vector,
                           const Decoder& decoder, typename Shape::Totals& sums) {
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
      const uint4 x = x_[tile][vector];
#pragma unroll
      for (int height = 0; height < Shape::kHeights; ++height) {
        multiply_16x8x16<Narrow>(sums[height][tile], first[height], {x.x, x.y});
        multiply_16x8x16<Narrow>(sums[height][tile], second[height], {x.z, x.w});
      }
    }
  }

  // The steps behind the last whole group, if they are this warp's.
  __device__ void add_rest(const Decoder& decoder, typename Shape::Totals& totals) {
    const int steps = left_ / Shape::kStep;
    if (steps <= 0) return;
    move(Shape::kStride);
    load_scales(steps);
    float scales[Shape::kScales];
    restore_scales(scales);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      load_step(step, words_[0]);
      add_step(words_[0], scales, step, decoder, totals);
    }
  }

  const Scales all_scales_;
  const float offset_;
  const int block_shift_;  // of vectors of 32 weights
  const Lane lane_;
  int left_;                            // inputs, from the group on that is added next
  const uint8_t* bytes_[Shape::kRuns];  // of the group that is loaded
  uint32_t vectors_[Shape::kScales];
  const uint4* x_[Shape::kTiles];  // of the group that is added
  typename Shape::Words words_[Shape::kGroup];
  StoredScale scales_[Shape::kScales] = {};
  float unstretch_;
};

// Where a warp works, of which no register need keep anything through the main loop.
template <typename Shape>
struct Place {
  int64_t first_row;  // of the thread block's
  int split;
  int part, row;  // of the inputs of the split, of the rows of the thread block

  __device__ explicit Place(int64_t rows) {
    const uint32_t block = block_read_anew();
    const uint32_t tiles = static_cast<uint32_t>((rows - 1) / kRows + 1);
    first_row = int64_t{block % tiles} * kRows;
    split = block / tiles;
    const int warp = __shfl_sync(kAllLanes, thread_read_anew() / 32, 0);
    part = warp % Shape::kParts;
    row = warp / Shape::kParts * 16 * Shape::kHeights;
  }
};

// Adds up the totals of the warps that share rows, and stores them.
// partial: (kParts, kRows, kTokens) in shared memory, which nobody reads any more.
template <typename Shape, typename Narrow>
__device__ void store_totals(const Matmul& matmul, const typename Shape::Totals& totals,
                             float* partial) {
  const Place<Shape> place(matmul.weight.rows);
  const Lane lane;
  float* own = partial + (place.part * kRows + place.row) * Shape::kTokens;
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
    const int64_t row = place.first_row + i % kRows, token = i / kRows;
    if (row >= matmul.weight.rows || token >= matmul.tokens) continue;
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < Shape::kParts; ++other) {
      sum += partial[(other * kRows + i % kRows) * Shape::kTokens + token];
    }
    store_sum<Narrow>(matmul, place.split, token, row, matmul.weight.rows, sum);
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
  const Place<Shape> place(weight.rows);
  const Part part(weight.columns, matmul.splits, place.split, Shape::kStep);
  // The first weights are on their way while the decoder is made.
  Summation<Shape, Narrow, Decoder> summation(matmul, block_shift, place.first_row + place.row,
                                              part.first + place.part * Shape::kGroupStep,
                                              part.last);
  const float stretch = best_stretch<Narrow>(weight.codebook);
  Decoder::template fill<Narrow>(table, weight.codebook, stretch);
  __syncthreads();
  const Decoder decoder = Decoder::template create<Narrow>(table, weight.codebook, stretch);
  typename Shape::Totals totals = {};
  summation.add(decoder, 1.0f / stretch, totals);
  __syncthreads();
  store_totals<Shape, Narrow>(matmul, totals, reinterpret_cast<float*>(shared));
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
