// From bytes of two 4-bit codes to pairs of 16-bit levels, as tensor cores take them: two ways, of
// which the better one depends on the GPU. Both round the levels of the codebook once to the 16-bit
// type and are exact from there, whatever the codebook. What is rounded are the levels times a
// stretch that makes it cost little; scales are divided by it in turn.
//
// A decoder turns a word of four bytes into four pairs. The code in the high nibble is the earlier
// element, so its level is the lower half of the pair.

#pragma once

#include "launch.cuh"

namespace qlora {

__device__ inline uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ inline uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

// The bits of one number where a mask has ones, of another one elsewhere: one instruction.
__device__ inline uint32_t choose(uint32_t mask, uint32_t where_set, uint32_t elsewhere) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(result) : "r"(mask), "r"(where_set), "r"(elsewhere));
  return result;
}

// The sum of squared errors of levels that are multiplied by a stretch, rounded and divided by it.
template <typename Narrow>
__device__ float rounding_error(const float* codebook, float stretch) {
  float error = 0.0f;
#pragma unroll 4
  for (int code = 0; code < 16; ++code) {
    const float exact = codebook[code] * stretch;
    const float difference = static_cast<float>(static_cast<Narrow>(exact)) - exact;
    error = __fmaf_rn(difference, difference, error);
  }
  return error / (stretch * stretch);
}

// The stretch, of 64 from 1 to 2, with the least error. NF4 loses a third less by rounding with it.
// Called by whole warps; the same to all.
template <typename Narrow>
__device__ float best_stretch(const float* codebook) {
  const int lane = threadIdx.x % 32;
  float best = 1.0f + lane / 64.0f;
  float least = rounding_error<Narrow>(codebook, best);
  const float other = best + 0.5f;
  const float others = rounding_error<Narrow>(codebook, other);
  if (others < least) {
    least = others;
    best = other;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float error = __shfl_xor_sync(kAllLanes, least, distance);
    const float candidate = __shfl_xor_sync(kAllLanes, best, distance);
    if (error < least || (error == least && candidate < best)) {
      least = error;
      best = candidate;
    }
  }
  return best;
}

// The 16 bits of a stretched level.
template <typename Narrow>
__device__ uint32_t level_bits(const float* codebook, float stretch, int code) {
  return bits_of(static_cast<Narrow>(codebook[code] * stretch));
}

// Looks pairs up in shared memory: one byte permutation and one load for two weights.
//
// The table has an entry for each of the 256 bytes, and each entry 32 copies, one for each lane and
// so for each bank: no two lanes ever meet in one. Entries are 256 bytes apart, twice what they
// fill, so that the address of a pair is put together from whole bytes: the code is the second
// byte, the lane the first.
class TableDecoder {
 public:
  static constexpr int kSharedBytes = 256 * 256;

  // All threads of the block fill the table, which lies at a multiple of 4; it can be read after a
  // __syncthreads.
  template <typename Narrow>
  static __device__ void fill(char* table, const float* codebook, float stretch) {
    const int lane = threadIdx.x % 32;
    for (int pair = threadIdx.x / 32; pair < 256; pair += blockDim.x / 32) {
      const uint32_t first = level_bits<Narrow>(codebook, stretch, pair >> 4);
      const uint32_t second = level_bits<Narrow>(codebook, stretch, pair & 15);
      *reinterpret_cast<uint32_t*>(table + kStride * pair + 4 * lane) = second << 16 | first;
    }
  }

  // A lane reads its own copies.
  template <typename Narrow>
  static __device__ TableDecoder create(const char* table, const float*, float) {
    return TableDecoder(table, 4 * (threadIdx.x % 32));
  }

  // pairs[i] = the levels of byte i.
  __device__ void decode(uint32_t word, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // From the top: a zero, a zero (byte 5 is byte 1 of the lane's offset), byte i of the word,
      // byte 4, the lane's offset.
      const uint32_t offset = __byte_perm(word, lane_offset_, 0x5504 | i << 4);
      pairs[i] = *reinterpret_cast<const uint32_t*>(table_ + offset);
    }
  }

 private:
  static constexpr int kStride = 256;

  __device__ TableDecoder(const char* table, uint32_t lane_offset)
      : table_(table), lane_offset_(lane_offset) {}

  const char* table_;
  uint32_t lane_offset_;
};

// Looks levels up in eight registers, by byte permutations: 21 instructions for eight weights and
// no shared memory.
//
// A permutation takes four bytes out of eight by the low three bits of four nibbles, which are
// codes here. The 16 low bytes of the levels lie in low_, the high bytes in high_; codes up to 7
// and from 8 on are looked up separately, and their fourth bit tells which result counts.
class PermuteDecoder {
 public:
  static constexpr int kSharedBytes = 0;

  template <typename Narrow>
  static __device__ void fill(char*, const float*, float) {}

  template <typename Narrow>
  static __device__ PermuteDecoder create(const char*, const float* codebook, float stretch) {
    PermuteDecoder decoder;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = pair_of_levels<Narrow>(codebook, stretch, 4 * i);
      const uint32_t second = pair_of_levels<Narrow>(codebook, stretch, 4 * i + 2);
      decoder.low_[i] = __byte_perm(first, second, 0x6420);   // the even bytes
      decoder.high_[i] = __byte_perm(first, second, 0x7531);  // the odd bytes
    }
    return decoder;
  }

  __device__ void decode(uint32_t word, uint32_t (&pairs)[4]) const {
    const uint32_t codes = word & 0x77777777;
    const uint32_t shifted = word << 4;
    // A 9 or so in a selector, 8 + a byte's number, spreads that byte's highest bit over a byte: of
    // word, for codes in high nibbles, of shifted (bytes 4 to 7), for those in low ones.
    decode_four(codes, permute(word, shifted, 0x9d8c), pairs[0], pairs[1]);
    decode_four(codes >> 16, permute(word, shifted, 0xbfae), pairs[2], pairs[3]);
  }

 private:
  template <typename Narrow>
  static __device__ uint32_t pair_of_levels(const float* codebook, float stretch, int code) {
    return level_bits<Narrow>(codebook, stretch, code + 1) << 16 |
           level_bits<Narrow>(codebook, stretch, code);
  }

  // The levels of the four codes in the lower half of codes; byte i of is_upper is 0xff where code
  // i had its fourth bit.
  __device__ void decode_four(uint32_t codes, uint32_t is_upper, uint32_t& first,
                              uint32_t& second) const {
    const uint32_t low =
        choose(is_upper, permute(low_[2], low_[3], codes), permute(low_[0], low_[1], codes));
    const uint32_t high =
        choose(is_upper, permute(high_[2], high_[3], codes), permute(high_[0], high_[1], codes));
    // Code 1, the high nibble, comes first. Bytes 0 to 3 are of low, 4 to 7 of high.
    first = __byte_perm(low, high, 0x4051);
    second = __byte_perm(low, high, 0x6273);
  }

  // As __byte_perm, which knows nothing of the fourth bits of a selector.
  static __device__ uint32_t permute(uint32_t lower, uint32_t upper, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(lower), "r"(upper), "r"(selector));
    return result;
  }

  uint32_t low_[4];
  uint32_t high_[4];
};

}  // namespace qlora
