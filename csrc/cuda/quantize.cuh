// Quantising to 4 or 8 bits: a block's absmax, the nearest level of each value.
//
// Blocks of a power of two go through quantize_whole_blocks; any others, and a short last one,
// through quantize_any_blocks, which is the rule written plainly.

#pragma once

#include "launch.cuh"
#include "nearest.cuh"

namespace qlora {

template <int kLevels>
constexpr int kValuesPerByte = kLevels == 16 ? 2 : 1;

// Values in a row that a thread quantises at a time: their codes are one vector, or two.
constexpr int kPart = 32;

// The longest block of quantize_whole_blocks.
constexpr int64_t kLongestWholeBlock = 4096;

// The largest of 2^shift threads in a row, to each of them. kMost: the most there may be, 2 to 32.
template <int kMost>
__device__ float largest_of_neighbours(float most, int shift) {
#pragma unroll
  for (int step = 1; step < kMost; step *= 2) {
    const int distance = step >> shift == 0 ? step : 0;
    most = larger(most, __shfl_xor_sync(kAllLanes, most, distance));
  }
  return most;
}

__device__ inline float largest_of_warp(float most) { return largest_of_neighbours<32>(most, 5); }

// The largest of 2^shift threads in a row, whole warps. Called by all threads of a thread block.
__device__ inline float largest_of_warps(float most, int shift) {
  __shared__ float maxima[kThreads / 32];
  const int warps_shift = shift - 5;
  const int first = threadIdx.x >> shift << warps_shift;
  const int other = threadIdx.x & ((1 << warps_shift) - 1);
  most = largest_of_warp(most);
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = most;
  __syncthreads();
  most = maxima[first + other];
  __syncthreads();
  return largest_of_neighbours<kThreads / 32>(most, warps_shift);
}

template <typename Value, int kWords>
__device__ float largest_magnitude(const uint32_t (&words)[kWords]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) most = Word<Value>::larger_magnitude(most, words[i]);
  const float first = Word<Value>::value(most, 0);
  return larger(first, Word<Value>::value(most, Word<Value>::kValues - 1));
}

// 32 bits of codes; code(i) has that of value i in its uppermost bits. Of the two codes in a byte
// the even one is the upper.
template <int kLevels, typename Code>
__device__ uint32_t pack_word(Code code) {
  if constexpr (kLevels == 256) {
    const uint32_t first = __byte_perm(code(0), code(1), 0x73);  // the uppermost bytes
    const uint32_t second = __byte_perm(code(2), code(3), 0x73);
    return __byte_perm(first, second, 0x5410);
  }
  uint32_t packed = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) packed = __funnelshift_l(code(i ^ 1), packed, 4);  // the last first
  return packed;
}

// The codes of values[i] and, of two codes in a byte, values[i + 1], by the plain rule. What is
// missing behind an odd number of values counts as the level 0.
template <int kLevels, typename Value>
__device__ uint8_t quantize_byte(const Value* values, int64_t i, int64_t n, float absmax,
                                 const Decisions<kLevels>& decisions, const float* codebook) {
  uint32_t byte = 0;
#pragma unroll 1
  for (int64_t end = i + kValuesPerByte<kLevels>; i < end; ++i) {
    const uint32_t code =
        i < n ? decisions.code(normalise(to_float(values[i]), absmax)) : code_of_zero(codebook);
    byte = byte << 4 | code;
  }
  return static_cast<uint8_t>(byte);
}

// Blocks of kPart values times a power of two, up to kLongestWholeBlock. A thread quantises a part
// at a time; the threads of a block are neighbours, in several warps where they are more than 32.
// Threads: kThreads. Aligned to 16 bytes: x, packed.
template <int kLevels, bool kAcrossWarps, typename Value>
__global__ void __launch_bounds__(kThreads)
    quantize_whole_blocks(const Value* x,         // (parts * kPart)
                          int64_t parts,          // of all blocks
                          int block_shift,        // a block has 2^block_shift parts
                          const float* codebook,  // (kLevels)
                          uint8_t* packed,        // (parts * kPart / kValuesPerByte)
                          float* absmax) {        // (parts >> block_shift)
  constexpr int kWords = kPart / Word<Value>::kValues;
  constexpr int kBytes = kPart / kValuesPerByte<kLevels>;
  __shared__ Decisions<kLevels> decisions;
  __shared__ NearestTable<kLevels> table;
  decisions.fill(codebook);
  const bool has_table = table.fill(decisions);
  const bool is_first = (threadIdx.x & ((1 << block_shift) - 1)) == 0;  // of its block
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < parts;
       first += stride) {
    const int64_t part = first + threadIdx.x;
    uint32_t words[kWords] = {};
    if (part < parts) load_words(x + part * kPart, words);
    float most = largest_magnitude<Value>(words);
    most = kAcrossWarps ? largest_of_warps(most, block_shift)
                        : largest_of_neighbours<32>(most, block_shift);
    if (part >= parts) continue;
    if (is_first) absmax[part >> block_shift] = most;
    const float factor = NearestTable<kLevels>::factor(most);
    if (!has_table || factor == 0.0f) {  // the plain rule
#pragma unroll 1
      for (int64_t byte = part * kBytes; byte < (part + 1) * kBytes; ++byte) {
        packed[byte] = quantize_byte(x, byte * kValuesPerByte<kLevels>, parts * kPart, most,
                                     decisions, codebook);
      }
      continue;
    }
    uint32_t codes[kBytes / 4];
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      constexpr int kPerWord = Word<Value>::kValues;
      constexpr int kPerCodes = 4 * kValuesPerByte<kLevels>;
      codes[i] = pack_word<kLevels>([&](int j) {
        const int value = i * kPerCodes + j;
        return table.code(Word<Value>::value(words[value / kPerWord], value % kPerWord) * factor);
      });
    }
    store_words(codes, packed + part * kBytes);
  }
}

// Blocks of any even size; a warp takes one block at a time. Threads: kThreads. No alignment.
template <int kLevels, typename Value>
__global__ void __launch_bounds__(kThreads)
    quantize_any_blocks(const Value* x,         // (n)
                        int64_t n,              // > 0
                        int64_t block_size,     //
                        int64_t first_block,    // blocks before it are left alone
                        const float* codebook,  // (kLevels)
                        uint8_t* packed,        // (ceil(n / kValuesPerByte))
                        float* absmax) {        // (ceil(n / block_size))
  constexpr int kPerByte = kValuesPerByte<kLevels>;
  __shared__ Decisions<kLevels> decisions;
  decisions.fill(codebook);
  const int lane = threadIdx.x % 32;
  const int warp = warp_of_block();
  const int64_t warps = gridDim.x * int64_t{kThreads / 32};
  const int64_t blocks = (n - 1) / block_size + 1;
  for (int64_t block = first_block + blockIdx.x * int64_t{kThreads / 32} + warp; block < blocks;
       block += warps) {
    const int64_t start = block * block_size;
    const int64_t end = n - start < block_size ? n : start + block_size;
    float most = 0.0f;
    for (int64_t i = start + lane; i < end; i += 32) most = larger(most, fabsf(to_float(x[i])));
    most = largest_of_warp(most);
    if (lane == 0) absmax[block] = most;
    for (int64_t i = start + lane * kPerByte; i < end; i += 32 * kPerByte) {
      packed[i / kPerByte] = quantize_byte(x, i, n, most, decisions, codebook);
    }
  }
}

// Whether quantize_whole_blocks can do it.
inline bool has_whole_blocks(const void* x, int64_t block_size, const uint8_t* packed) {
  return block_size >= kPart && block_size <= kLongestWholeBlock &&
         (block_size & (block_size - 1)) == 0 && is_aligned(x, kVectorBytes) &&
         is_aligned(packed, kVectorBytes);
}

template <int kLevels, typename Value>
int quantize_values(const Value* x, int64_t n, const float* codebook, int64_t block_size,
                    uint8_t* packed, float* absmax, cudaStream_t stream) {
  if (n == 0) return kOk;
  int64_t whole = 0;
  if (has_whole_blocks(x, block_size, packed)) whole = n / block_size;
  if (whole > 0) {
    int block_shift = 0;
    while ((int64_t{kPart} << block_shift) < block_size) ++block_shift;
    const int64_t parts = whole << block_shift;
    const auto kernel = block_shift > 5 ? quantize_whole_blocks<kLevels, true, Value>
                                        : quantize_whole_blocks<kLevels, false, Value>;
    kernel<<<thread_blocks(parts), kThreads, 0, stream>>>(x, parts, block_shift, codebook, packed,
                                                          absmax);
    if (const int status = launched(); status != kOk) return status;
  }
  const int64_t blocks = (n - 1) / block_size + 1;
  if (whole == blocks) return kOk;
  // A warp each, but no product beyond 64 bits.
  const int64_t warps =
      blocks - whole < kMostThreadBlocks * kThreads ? blocks - whole : kMostThreadBlocks * kThreads;
  quantize_any_blocks<kLevels><<<thread_blocks(32 * warps), kThreads, 0, stream>>>(
      x, n, block_size, whole, codebook, packed, absmax);
  return launched();
}

// What both entry points do.
template <int kLevels>
int quantize(const void* x, int dtype, int64_t n, const float* codebook, int64_t block_size,
             uint8_t* packed, float* absmax, Execution how) {
  if (n < 0 || block_size < 2 || block_size % 2 != 0) return kBadSize;
  return with_dtype(dtype, [&](auto type) {
    return quantize_values<kLevels>(static_cast<const decltype(type)*>(x), n, codebook, block_size,
                                    packed, absmax, static_cast<cudaStream_t>(how));
  });
}

}  // namespace qlora
