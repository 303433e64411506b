// How the weight comes from its bytes to the tensor cores, for matmul_many_tokens.cu: as rows for
// the product, as columns for its gradient.
//
// A warp multiplies 32 outputs (two heights of 16) by steps of 64 inputs. Lane 4 g + t of it has,
// of each step, the inputs from 16 t on; the first half of them in half 0. Of these eight the two
// tensor-core products of a half take four each, of which the first two count as inputs 2t and
// 2t + 1 and the others as 2t + 8 and 2t + 9 (mma.cuh): x is read accordingly. See
// docs/fragments.md.

#pragma once

#include "decode.cuh"
#include "matmul.cuh"
#include "mma.cuh"
#include "split_sum.cuh"

namespace qlora {

constexpr int kWarps = 8;
constexpr int kOutputs = 32 * kWarps;  // of a thread block
constexpr int kStep = 64;              // inputs

// Of the two heights, the weights for the two products of a half.
using Operands = uint32_t[2][2][4];

__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b, __nv_bfloat16) {
  return same_bits<uint32_t>(__hmul2(same_bits<__nv_bfloat162>(a), same_bits<__nv_bfloat162>(b)));
}

__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b, __half) {
  return same_bits<uint32_t>(__hmul2(same_bits<__half2>(a), same_bits<__half2>(b)));
}

// W (outputs, inputs): a thread's inputs lie in a row, its rows are g, g + 8, g + 16 and g + 24.
template <typename Narrow, typename Decoder>
class RowSource {
 public:
  static constexpr int kStageBytes = 0;  // that it copies of each step to shared memory
  static constexpr int kScaleBytes = 0;

  // The output, of the warp's 32, that register pair `pair` of lane 4 g + t is for.
  static __device__ int output(int height, int pair, int g) { return 16 * height + 8 * pair + g; }

  __device__ RowSource(const Weight& weight, int block_shift, int64_t first_output, int warp,
                       int first, int last, char*)
      : all_scales_(weight.scales),
        offset_(all_scales_.load_offset()),
        block_shift_(block_shift - 5),
        left_(last - first - 16 * t()) {
    // Where a row begins; outputs of rows beyond the last one are not stored.
    const auto start_of = [&](int run) {
      const int64_t row = first_output + 32 * warp + threadIdx.x % 32 / 4 + 8 * run;
      return min(row, weight.rows - 1) * weight.columns + first;
    };
    const int own = left_ > 0 ? t() : 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      bytes_[run] = weight.packed + start_of(run) / 2 + 8 * own;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) vectors_[i] = start_of(t() % 2 * 2 + i) / 32 + own / 2;
  }

  __device__ void start_copy(char*) {}

  // Loads a step into registers: after the last half of the one before was decoded. Where a thread
  // has no inputs left, in a last step of 32, they meet zeros of x: any weights of the row will do.
  __device__ void load() {
    left_ -= kStep;
    const uint32_t moved = left_ > 0 ? kStep : 0;
    // Of the two threads with inputs of the same 32 of the same rows, each loads two scales.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next_scales_[i] = all_scales_.load(vectors_[i] >> block_shift_);
      vectors_[i] += moved / 32;
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      words_[run] = *reinterpret_cast<const uint2*>(bytes_[run]);
      bytes_[run] += moved / 2;
    }
  }

  // Turns to the step that was loaded. unstretch: what scales are multiplied by.
  __device__ void begin(const char*, float unstretch) {
    const float scales[2] = {all_scales_.restore(next_scales_[0], offset_) * unstretch,
                             all_scales_.restore(next_scales_[1], offset_) * unstretch};
    const uint32_t own = Word<Narrow>::round(scales);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint32_t both = __shfl_sync(kAllLanes, own, run / 2, 2);
      scales_[run] = __byte_perm(both, 0, run % 2 == 0 ? 0x1010 : 0x3232);
    }
  }

  __device__ void decode(const Decoder& decoder, int half, Operands& operands) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      uint32_t pairs[4];
      decoder.decode(half == 0 ? words_[run].x : words_[run].y, pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        operands[run / 2][i / 2][i % 2 * 2 + run % 2] =
            multiply_pairs(pairs[i], scales_[run], Narrow{});
      }
    }
  }

 private:
  static constexpr int kRuns = 4;

  static __device__ int t() { return threadIdx.x % 4; }

  const Scales all_scales_;
  const float offset_;
  const int block_shift_;        // of vectors of 32 weights
  int left_;                     // inputs, from this thread's of the step on that is loaded next
  const uint8_t* bytes_[kRuns];  // of that step
  uint32_t vectors_[2];
  uint2 words_[kRuns];
  StoredScale next_scales_[2];
  uint32_t scales_[kRuns];
};

// W (inputs, outputs): a thread's inputs are rows, of which it has four outputs, two bytes. Codes
// of two outputs of a row, which share a byte, become those of two rows of an output before they
// are looked up.
template <typename Narrow, typename Decoder>
class ColumnSource {
 public:
  static constexpr int kRowBytes = kOutputs / 2;
  static constexpr int kStageBytes = kStep * kRowBytes;
  static constexpr int kScaleBytes = kWarps * kStep * sizeof(Narrow);

  static __device__ int output(int height, int pair, int g) { return 4 * g + 2 * pair + height; }

  __device__ ColumnSource(const Weight& weight, int block_shift, int64_t first_output, int warp,
                          int first, int last, char* shared)
      : all_scales_(weight.scales),
        offset_(all_scales_.load_offset()),
        block_shift_(block_shift - 5),
        row_vectors_(static_cast<uint32_t>(weight.columns / 32)),
        apart_(kApart / 2 * weight.columns),
        row_end_(first + 2 * lane() + 1),
        last_(last),
        scales_(reinterpret_cast<Narrow*>(shared) + warp * kStep) {
    const int64_t output = first_output + 32 * chunk();
    next_ = weight.packed + ((first + row()) * weight.columns + output) / 2;
    left_ = output < weight.columns ? last - first - row() : 0;
    // Outputs beyond the last one are not stored.
    vector_ = min(static_cast<uint32_t>(first_output / 32 + warp), row_vectors_ - 1) - row_vectors_;
    place_ = place(row(), chunk());
    // As matrices of pairs of bytes: lane 8 m + 2 t + j names row j of those that thread t has of
    // matrix m.
    matrix_ =
        place(16 * (lane() % 8 / 2) + 4 * (lane() / 16) + 2 * (lane() % 2) + lane() / 8 % 2, warp);
  }

  // Starts to copy the next step into shared memory. What is not there is zeros.
  __device__ void start_copy(char* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      // place(row() + i * kApart, chunk()): half round again, where one bit differs.
      static_assert(kCopies == 2 && kApart / 16 * 2 == kChunks / 2, "it is half round");
      const int to = (place_ ^ i * (kRowBytes / 2)) + i * kApart * kRowBytes;
      start_copy_16(stage + to, next_, left_ > i * kApart);
      next_ += apart_;
    }
    left_ -= kStep;
  }

  // Loads the scales of the next step into registers: each lane those of two rows. Rows that are
  // not there meet zeros of x: any scale will do.
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t vector = min(row_end_ + i, last_) * row_vectors_ + vector_;
      next_scales_[i] = all_scales_.load(vector >> block_shift_);
    }
    row_end_ += kStep;
  }

  // Turns to the step in a stage, whose scales were loaded last; they are put into shared memory.
  __device__ void begin(const char* stage, float unstretch) {
    stage_ = stage;
    const float scales[2] = {all_scales_.restore(next_scales_[0], offset_) * unstretch,
                             all_scales_.restore(next_scales_[1], offset_) * unstretch};
    reinterpret_cast<uint32_t*>(scales_)[lane()] = Word<Narrow>::round(scales);
    __syncwarp();
  }

  __device__ void decode(const Decoder& decoder, int half, Operands& operands) const {
    const uint4 loaded = *reinterpret_cast<const uint4*>(scales_ + 16 * (lane() % 4) + 8 * half);
    const uint32_t scales[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    // Two bytes, four outputs, of inputs 0 and 2 of product i in rows[2 i], of 1 and 3 in the next.
    uint32_t rows[4];
    load_matrices_transposed(rows, stage_ + matrix_ + 8 * half * kRowBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t one = rows[2 * i], other = rows[2 * i + 1];
      // Codes of two inputs side by side in a byte: of even outputs, and of odd ones.
      const uint32_t codes[2] = {choose(0xf0f0f0f0, one, other >> 4),
                                 choose(0xf0f0f0f0, one << 4, other)};
#pragma unroll
      for (int height = 0; height < 2; ++height) {
        uint32_t pairs[4];
        decoder.decode(codes[height], pairs);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          operands[height][i][j] = multiply_pairs(pairs[j], scales[2 * i + j / 2], Narrow{});
        }
      }
    }
  }

 private:
  static constexpr int kChunks = kRowBytes / 16;        // of 32 outputs
  static constexpr int kApart = 32 * kWarps / kChunks;  // between the rows of a thread
  static constexpr int kCopies = kStep / kApart;

  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int row() { return threadIdx.x / kChunks; }
  static __device__ int chunk() { return threadIdx.x % kChunks; }

  // Where 16 bytes of a row lie in a stage. The eight rows of a matrix are 0, 2, 16, 18, 32 ...
  // from its first one on: each begins 16 bytes further round, in other banks. Rows of the other
  // half, 8 further, lie as many rows further.
  static __device__ int place(int row, int chunk) {
    return row * kRowBytes + (chunk + row / 16 * 2 + row / 2 % 2) % kChunks * 16;
  }

  const Scales all_scales_;
  const float offset_;
  const int block_shift_;       // of vectors of 32 weights
  const uint32_t row_vectors_;  // in a row
  const int64_t apart_;         // in bytes
  int row_end_;                 // one more than the row whose scale is loaded next
  const int last_;              // one more than the last row
  Narrow* scales_;              // (kStep) of this warp
  const uint8_t* next_;         // what this thread copies next
  int left_;                    // rows, from there on
  uint32_t vector_;             // the warp's in a row, before the first one
  int place_;                   // in a stage, of what this thread copies first
  int matrix_;                  // and of the row of the matrices that it names
  const char* stage_;
  StoredScale next_scales_[2];
};

}  // namespace qlora
