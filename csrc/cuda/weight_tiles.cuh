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
  static constexpr int kSharedBytes(int) { return 0; }

  // The output, of the warp's 32, that register pair `pair` of lane 4 g + t is for.
  static __device__ int output(int height, int pair, int g) { return 16 * height + 8 * pair + g; }

  __device__ RowSource(const Weight& weight, int block_shift, int64_t first_output, int warp, int,
                       int last, char*)
      : weight_(weight), block_shift_(block_shift - 5), last_(last), t_(threadIdx.x % 4) {
    const auto start_of = [&](int run) {
      const int64_t row = first_output + 32 * warp + threadIdx.x % 32 / 4 + 8 * run;
      // Outputs of rows beyond the last one are not stored.
      return static_cast<uint32_t>(min(row, weight.rows - 1) * (weight.columns / 32));
    };
#pragma unroll
    for (int run = 0; run < kRuns; ++run) rows_[run] = start_of(run);
    own_row_ = start_of(t_);  // not rows_[t_]: no array of registers can be indexed
  }

  __device__ void start_copy(int) {}

  // Loads a step into registers: after the last half of the one before was decoded. In a last step
  // of 32 the other inputs meet zeros of x: any weights of the row will do.
  __device__ void load(int input) {
    const int start = input + 16 * t_ < last_ ? input + 16 * t_ : input;
    const uint8_t* bytes = weight_.packed + start / 2;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      words_[run] = *reinterpret_cast<const uint2*>(bytes + int64_t{rows_[run]} * 16);
    }
    // Of the four threads with the same rows, thread t loads the scales of run t.
    const uint32_t vector = own_row_ + input / 32;
    const uint32_t next = input + 32 < last_ ? vector + 1 : vector;
    next_scales_[0] = weight_.scales.load(vector >> block_shift_);
    next_scales_[1] = weight_.scales.load(next >> block_shift_);
  }

  // Turns to the step that was loaded. unstretch: what scales are multiplied by.
  __device__ void begin(int, float unstretch) {
    const float scales[2] = {weight_.scales.restore(next_scales_[0]) * unstretch,
                             weight_.scales.restore(next_scales_[1]) * unstretch};
    const uint32_t own = Word<Narrow>::round(scales);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      // Of inputs 0 to 31, which threads 0 and 1 have, and of 32 to 63; in both halves.
      const uint32_t both = __shfl_sync(kAllLanes, own, run, 4);
      scales_[run] = __byte_perm(both, 0, t_ < 2 ? 0x1010 : 0x3232);
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

  const Weight& weight_;
  const int block_shift_;  // of vectors of 32 weights
  const int last_;
  const int t_;
  uint32_t rows_[kRuns];  // where they begin, in vectors of 32 weights
  uint2 words_[kRuns];
  uint32_t own_row_;
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

  static constexpr int kSharedBytes(int stages) { return stages * kStageBytes + kScaleBytes; }

  static __device__ int output(int height, int pair, int g) { return 4 * g + 2 * pair + height; }

  __device__ ColumnSource(const Weight& weight, int block_shift, int64_t first_output, int warp,
                          int first, int last, char* shared)
      : weight_(weight),
        block_shift_(block_shift),
        own_output_(first_output + 32 * warp),
        warp_(warp),
        last_(last),
        stages_(shared + kScaleBytes),
        scales_(reinterpret_cast<Narrow*>(shared) + warp * kStep) {
    const int64_t output = first_output + 32 * chunk();
    next_ = weight.packed + ((first + row()) * weight.columns + output) / 2;
    left_ = output < weight.columns ? last - first - row() : 0;
  }

  // Starts to copy the next step into shared memory. What is not there is zeros.
  __device__ void start_copy(int stage) {
    char* to = stages_ + stage * kStageBytes;
#pragma unroll
    for (int i = 0; i < kStep / kApart; ++i) {
      start_copy_16(to + place(row() + i * kApart, chunk()),
                    next_ + i * (kApart / 2) * weight_.columns, left_ > i * kApart);
    }
    next_ += kStep / 2 * weight_.columns;
    left_ -= kStep;
  }

  // Loads the scales of a step into registers: each lane those of two rows. Rows and outputs that
  // are not there have none: whatever the bytes, their weights are 0.
  __device__ void load(int input) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = input + threadIdx.x % 32 + 32 * i;
      has_scale_[i] = row < last_ && own_output_ < weight_.columns;
      if (has_scale_[i]) {
        const int64_t element = int64_t{row} * weight_.columns + own_output_;
        next_scales_[i] = weight_.scales.load(element >> block_shift_);
      }
    }
  }

  // Turns to the step in a stage, whose scales were loaded last; they are put into shared memory.
  __device__ void begin(int stage, float unstretch) {
    bytes_ = stages_ + stage * kStageBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale =
          has_scale_[i] ? weight_.scales.restore(next_scales_[i]) * unstretch : 0.0f;
      round_to(scale, scales_ + threadIdx.x % 32 + 32 * i);
    }
    __syncwarp();
  }

  __device__ void decode(const Decoder& decoder, int half, Operands& operands) const {
    const int first = 16 * (threadIdx.x % 4) + 8 * half;  // of eight rows
    const uint4 loaded = *reinterpret_cast<const uint4*>(scales_ + first);
    const uint32_t scales[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    // Two bytes, four outputs, of inputs 0 and 2 of product i in rows[2 i], of 1 and 3 in the next.
    // As matrices of pairs of bytes: lane 8 m + 2 t + j names row j of those that thread t has of
    // matrix m.
    const int lane = threadIdx.x % 32;
    const int row =
        16 * (lane % 8 / 2) + 8 * half + 4 * (lane / 16) + 2 * (lane % 2) + lane / 8 % 2;
    uint32_t rows[4];
    load_matrices_transposed(rows, bytes_ + place(row, warp_));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t one = rows[2 * i], other = rows[2 * i + 1];
      // Codes of two inputs side by side in a byte: of even outputs, and of odd ones.
      const uint32_t codes[2] = {(one & 0xf0f0f0f0) | (other >> 4 & 0x0f0f0f0f),
                                 (one << 4 & 0xf0f0f0f0) | (other & 0x0f0f0f0f)};
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

  static __device__ int row() { return threadIdx.x / kChunks; }
  static __device__ int chunk() { return threadIdx.x % kChunks; }

  // Where 16 bytes of a row lie in a stage. The eight rows of a matrix are 0, 2, 16, 18, 32 ...
  // from its first one on: each begins 16 bytes further round, in other banks.
  static __device__ int place(int row, int chunk) {
    return row * kRowBytes + (chunk + row / 16 * 2 + row / 2 % 2) % kChunks * 16;
  }

  const Weight& weight_;
  const int block_shift_;
  const int64_t own_output_;
  const int warp_;
  const int last_;
  char* stages_;
  const uint8_t* next_;  // what this thread copies next
  int left_;             // rows, from there on
  Narrow* scales_;       // (kStep) of this warp
  const char* bytes_;
  StoredScale next_scales_[2];
  bool has_scale_[2];
};

}  // namespace qlora
