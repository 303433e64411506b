// The product for many tokens, and the input gradient: y^T = W x^T, or W^T x^T, on tensor cores.
// The weight is decoded in registers, straight from its bytes; its levels and scales are rounded to
// the 16-bit type, so is their product.
//
// A thread block makes a tile of 256 outputs and 128 tokens, each warp 32 of the outputs. It goes
// along the inputs in steps of 64, which x reaches shared memory for several steps ahead. How the
// weight comes from its bytes to the tensor cores is in weight_tiles.cuh.

#include "weight_tiles.cuh"

namespace qlora {
namespace {

constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = 128;  // of a tile
constexpr int kTiles = kTokens / 8;
constexpr int kStages = 3;                        // steps of x in shared memory
constexpr int kRowBytes = 2 * kStep + 16;         // of a token in a stage: 4 rows on, other banks
constexpr int kInputBytes = kTokens * kRowBytes;  // of a stage, before what the weight needs there

// Of a stage, of a source of weights.
template <typename Source>
constexpr int kStageBytes = kInputBytes + Source::kStageBytes;

// Copies x to shared memory, a step at a time. Tokens beyond the last one are taken for it: what
// comes of them is not stored. Inputs beyond the last one are zeros.
template <typename Narrow>
class InputCopies {
 public:
  __device__ InputCopies(const Matmul& matmul, int64_t inputs, int64_t first_token, int first,
                         int last)
      : left_(last - first - 8 * chunk()) {
    const Narrow* x = static_cast<const Narrow*>(matmul.x);
    next_ = reinterpret_cast<const uint4*>(x + first_token * inputs + first) + chunk();
    const int64_t last_token = matmul.tokens - 1 - first_token;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t token = min(int64_t{row() + i * kApart}, last_token);
      rows_[i] = static_cast<uint32_t>(token * (inputs / 8));
    }
  }

  __device__ void start(char* stage) {
    char* to = stage + row() * kRowBytes + 16 * chunk();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      start_copy_16(to + i * kApart * kRowBytes, next_ + rows_[i], left_ > 0);
    }
    next_ += kChunks;
    left_ -= kStep;
  }

 private:
  static constexpr int kChunks = kStep / 8;          // of 8 inputs, 16 bytes
  static constexpr int kApart = kThreads / kChunks;  // between the tokens of a thread
  static constexpr int kRows = kTokens / kApart;

  static __device__ int row() { return threadIdx.x / kChunks; }
  static __device__ int chunk() { return threadIdx.x % kChunks; }

  int left_;  // inputs, from this thread's chunk on
  const uint4* next_;
  uint32_t rows_[kRows];  // where tokens begin, in vectors of 8
};

// sums[height][tile] += the products of a step whose x lies in a stage. The weights of the next
// step, or of the last one again, are loaded while the tensor cores are busy with the second half.
template <typename Narrow, typename Source, typename Decoder>
__device__ void add_step(Source& source, const Decoder& decoder, const char* stage,
                         float (&sums)[2][kTiles][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Operands operands;
    source.decode(decoder, half, operands);
    if (half == 1) source.load();
    const char* own = stage + g * kRowBytes + 32 * t + 16 * half;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 x = *reinterpret_cast<const uint4*>(own + tile * 8 * kRowBytes);
#pragma unroll
      for (int height = 0; height < 2; ++height) {
        multiply_16x8x16<Narrow>(sums[height][tile], operands[height][0], {x.x, x.y});
        multiply_16x8x16<Narrow>(sums[height][tile], operands[height][1], {x.z, x.w});
      }
    }
  }
}

// Where a thread block works; read anew as well.
struct Tile {
  int64_t first_output, first_token;
  int split;

  __device__ Tile(int64_t tokens, int64_t outputs) {
    const uint32_t block = block_read_anew();
    const uint32_t output_tiles = static_cast<uint32_t>((outputs - 1) / kOutputs + 1);
    const uint32_t token_tiles = static_cast<uint32_t>((tokens - 1) / kTokens + 1);
    first_output = int64_t{block % output_tiles} * kOutputs;
    first_token = int64_t{block / output_tiles % token_tiles} * kTokens;
    split = block / output_tiles / token_tiles;
  }
};

// Stores the tile, 32 tokens at a time: put together in shared memory, where nothing else is read
// any more, so that threads next to each other store outputs next to each other.
template <typename Narrow, typename Source>
__device__ void store_sums(const Matmul& matmul, int64_t outputs, const float (&sums)[2][kTiles][4],
                           float* partial) {
  constexpr int kChunk = 4;             // tiles of 8 tokens
  constexpr int kWidth = kOutputs + 4;  // of a token's sums: 2 tokens on, other banks
  static_assert(8 * kChunk * kWidth * sizeof(float) <= kStages * kInputBytes, "it fits there");
  const int thread = thread_read_anew();
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int chunk = 0; chunk < kTiles / kChunk; ++chunk) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * 4 * kChunk; ++i) {
      const int height = i / (4 * kChunk), tile = i / 4 % kChunk;
      const int output = 32 * warp + Source::output(height, i % 4 / 2, g);
      const int token = 8 * tile + 2 * t + i % 2;
      partial[token * kWidth + output] = sums[height][chunk * kChunk + tile][i % 4];
    }
    __syncthreads();
    const Tile tile(matmul.tokens, outputs);
    const int64_t output = tile.first_output + thread;
    if (output >= outputs) continue;
#pragma unroll 1
    for (int row = 0; row < 8 * kChunk; ++row) {
      const int64_t token = tile.first_token + 8 * kChunk * chunk + row;
      if (token >= matmul.tokens) break;
      store_sum<Narrow>(matmul, tile.split, token, output, outputs, partial[row * kWidth + thread]);
    }
  }
}

// Threads: kThreads. Thread blocks: tiles of kOutputs outputs, of kTokens tokens, splits; all in x,
// outputs fastest. Aligned to 16 bytes: x, packed. Block size 2^block_shift, 32 at least.
// Dynamic shared memory: the decoder's table, the stages of x, what the source of weights needs.
template <typename Narrow, typename Decoder, template <typename, typename> class WeightSource>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_many(Matmul matmul, int64_t inputs, int64_t outputs, int block_shift) {
  using Source = WeightSource<Narrow, Decoder>;
  extern __shared__ uint4 shared[];
  char* table = reinterpret_cast<char*>(shared);
  char* stages = table + Decoder::kSharedBytes;
  const Tile tile(matmul.tokens, outputs);
  const Part part(inputs, matmul.splits, tile.split, kStep);
  const int first = static_cast<int>(part.first), last = static_cast<int>(part.last);
  const int warp = warp_of_block();

  constexpr int kBytes = kStageBytes<Source>;
  Source source(matmul.weight, block_shift, tile.first_output, warp, first, last,
                stages + kStages * kBytes);
  InputCopies<Narrow> copies(matmul, inputs, tile.first_token, first, last);
  const auto start_copies = [&](char* stage) {
    copies.start(stage);
    source.start_copy(stage + kInputBytes);
    end_copy_group();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) start_copies(stages + stage * kBytes);
  const float* codebook = matmul.weight.codebook;
  const float stretch = best_stretch<Narrow>(codebook);
  // It is read behind the barrier of the first step.
  Decoder::template fill<Narrow>(table, codebook, stretch);
  const Decoder decoder = Decoder::template create<Narrow>(table, codebook, stretch);
  const float unstretch = 1.0f / stretch;
  source.load();  // no part is empty: matmul_many_tokens sees to it

  float sums[2][kTiles][4] = {};
  int stage = 0, other = (kStages - 1) * kBytes;  // of this step, and of the one before
  for (int input = first; input < last; input += kStep) {
    wait_for_copy_groups<kStages - 2>();
    __syncthreads();
    start_copies(stages + other);  // all threads are done with it
    source.begin(stages + stage + kInputBytes, unstretch);
    add_step<Narrow>(source, decoder, stages + stage, sums);
    other = stage;
    stage = stage == (kStages - 1) * kBytes ? 0 : stage + kBytes;
  }

  store_sums<Narrow, Source>(matmul, outputs, sums, reinterpret_cast<float*>(stages));
}

template <typename Narrow, typename Decoder, template <typename, typename> class WeightSource>
int launch(const Matmul& matmul, int block_shift) {
  using Source = WeightSource<Narrow, Decoder>;
  constexpr int kBytes =
      Decoder::kSharedBytes + kStages * kStageBytes<Source> + Source::kScaleBytes;
  const auto kernel = multiply_many<Narrow, Decoder, WeightSource>;
  const int64_t outputs = matmul.outputs();
  const int64_t blocks =
      ((outputs - 1) / kOutputs + 1) * ((matmul.tokens - 1) / kTokens + 1) * matmul.splits;
  return launch_with_shared(kernel, blocks, kThreads, kBytes, matmul.stream, matmul,
                            matmul.inputs(), outputs, block_shift);
}

template <typename Narrow, typename Decoder>
int launch_with(const Matmul& matmul, int block_shift) {
  return matmul.transposed ? launch<Narrow, Decoder, ColumnSource>(matmul, block_shift)
                           : launch<Narrow, Decoder, RowSource>(matmul, block_shift);
}

template <typename Narrow>
int launch_for(const Matmul& matmul, int block_shift, bool by_table) {
  return by_table ? launch_with<Narrow, TableDecoder>(matmul, block_shift)
                  : launch_with<Narrow, PermuteDecoder>(matmul, block_shift);
}

}  // namespace

int matmul_many_tokens(const Matmul& matmul, bool by_table) {
  const int block_shift = tensor_core_block_shift(matmul);
  if (block_shift < 0 || matmul.inputs() % 8 != 0) return kBadSize;
  const int64_t length = part_length(matmul.inputs(), matmul.splits, kStep);
  if (length * (matmul.splits - 1) >= matmul.inputs()) return kBadSize;  // a part would be empty
  return matmul.dtype == kBfloat16 ? launch_for<__nv_bfloat16>(matmul, block_shift, by_table)
                                   : launch_for<__half>(matmul, block_shift, by_table);
}

}  // namespace qlora
