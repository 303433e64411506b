// AdamW with moments in 8 bits: restored, updated, used, then quantised anew, in one pass.

#pragma once

#include "adamw.cuh"
#include "quantize.cuh"

namespace qlora {

constexpr int kCodedBlock = 256;               // values that share a scale
constexpr int kCodedValues = 16;               // in a row, of a thread
constexpr int kCodedShift = 4;                 // 2^4 threads have a block
constexpr int kCodedUnit = 32 * kCodedValues;  // of a warp: two blocks

struct Codebooks {
  const float* first;   // (256)
  const float* second;  // (256)
};

// Levels, and how to find the nearest one. Lies in shared memory.
template <bool kHasSign>
struct Coder {
  Decisions<256> decisions;
  NearestTable<256, kHasSign> table;

  // Whether the table serves. Called by all threads of a thread block.
  __device__ bool fill(const float* codebook) {
    decisions.fill(codebook);
    return table.fill(decisions);
  }

  // Of code i of four.
  __device__ float level(uint32_t codes, int i) const {
    return at_byte_of(decisions.levels, codes, i);
  }
};

// First moments have signs, second moments none.
struct Coders {
  Coder<true> first;
  Coder<false> second;
};

// The new codes of a thread's part of a block with this absmax: by the table where it serves, else
// by the plain rule.
template <int kNumber, bool kHasSign>
__device__ void code_values(const Coder<kHasSign>& coder, bool has_table, float absmax,
                            const float (&values)[kNumber], uint32_t (&codes)[kNumber / 4]) {
  // Not where absmax is 0, infinite or NaN, or so small or large that its reciprocal is not right.
  if (!has_table || !(absmax > 0x1p-100f && absmax < 0x1p100f)) {
#pragma unroll
    for (int i = 0; i < kNumber / 4; ++i) {
      codes[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        codes[i] |= coder.decisions.code(normalise(values[4 * i + j], absmax)) << 8 * j;
      }
    }
    return;
  }
  const float factor = quotient_in_range(Buckets<256>::kScale, absmax);
#pragma unroll
  for (int i = 0; i < kNumber / 4; ++i) {
    codes[i] = pack_word<256>([&](int j) { return coder.table.code(values[4 * i + j] * factor); });
  }
}

// The largest magnitude of a block, to each of its threads.
template <int kNumber>
__device__ float largest_of_block(const float (&values)[kNumber]) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kNumber; ++i) most = larger(most, fabsf(values[i]));
  return largest_of_neighbours<1 << kCodedShift>(most, kCodedShift);
}

// The parameters of a thread's values, value by value by the plain rule. What is of the piece
// begins at the first of them.
template <typename Param, typename Grad>
__device__ void step_coded_params(Param* params, const Grad* grads, const uint8_t* first_codes,
                                  const uint8_t* second_codes, float first_absmax,
                                  float second_absmax, const Coders& coders, const Rule& rule) {
#pragma unroll 1
  for (int j = 0; j < kCodedValues; ++j) {
    const float grad = to_float(grads[j]);
    const float old_m = coders.first.decisions.levels[first_codes[j]] * first_absmax;
    const float old_v = coders.second.decisions.levels[second_codes[j]] * second_absmax;
    const float m = rule.first_moment(old_m, grad), v = rule.second_moment(old_v, grad);
    round_to(rule.param(to_float(params[j]), m, v), params + j);
  }
}

// Threads: kThreads. Aligned to 16 bytes: all arrays of the pieces but the absmaxes; their counts
// are multiples of kCodedUnit. Dynamic shared memory: Coders.
template <typename Param, typename Grad>
__global__ void __launch_bounds__(kThreads)
    step_coded_vectors(Pieces pieces, Rule rule, Codebooks codebooks) {
  extern __shared__ uint4 shared[];
  Coders& coders = *reinterpret_cast<Coders*>(shared);
  const bool has_first = coders.first.fill(codebooks.first) && divides_exactly();
  const bool has_second = coders.second.fill(codebooks.second) && divides_exactly();
  const Range empty(rule.has_range());
  const int warp = warp_of_block();
  for_each_unit(pieces, kThreads * kCodedValues, [&](const Piece& piece, int64_t start) {
    const int64_t of_warp = start + warp * kCodedUnit;
    if (of_warp >= piece.count) return;
    const int lane = threadIdx.x % 32;
    const int64_t i = of_warp + lane * kCodedValues;
    const int64_t block = of_warp / kCodedBlock + (lane >> kCodedShift);
    uint8_t* first_codes = static_cast<uint8_t*>(piece.first_moments) + i;
    uint8_t* second_codes = static_cast<uint8_t*>(piece.second_moments) + i;
    Param* params = static_cast<Param*>(piece.params) + i;
    const Grad* grads = static_cast<const Grad*>(piece.grads) + i;
    float grad[kCodedValues], param[kCodedValues], m[kCodedValues], v[kCodedValues];
    uint32_t first[kCodedValues / 4], second[kCodedValues / 4];
    load_values(grads, grad);
    load_words(first_codes, first);
    load_words(second_codes, second);
    load_values(params, param);
    const float old_first = piece.first_absmaxes[block];
    const float old_second = piece.second_absmaxes[block];
    Range range = empty;
#pragma unroll
    for (int j = 0; j < kCodedValues; ++j) {
      const float old_m = coders.first.level(first[j / 4], j % 4) * old_first;
      const float old_v = coders.second.level(second[j / 4], j % 4) * old_second;
      m[j] = rule.first_moment(old_m, grad[j]);
      v[j] = rule.second_moment(old_v, grad[j]);
      param[j] = rule.param_in_range(param[j], m[j], v[j], range);
    }
    if (range.has_all()) {
      store_values(param, params);
    } else {
      step_coded_params(params, grads, first_codes, second_codes, old_first, old_second, coders,
                        rule);
    }
    const float first_absmax = largest_of_block(m);
    const float second_absmax = largest_of_block(v);
    __syncwarp();  // all threads of a block have read its absmaxes
    if (lane % (1 << kCodedShift) == 0) {
      piece.first_absmaxes[block] = first_absmax;
      piece.second_absmaxes[block] = second_absmax;
    }
    uint32_t codes[kCodedValues / 4];
    code_values(coders.first, has_first, first_absmax, m, codes);
    store_words(codes, first_codes);
    code_values(coders.second, has_second, second_absmax, v, codes);
    store_words(codes, second_codes);
  });
}

// A block by a warp, value by value, by the plain rule. Threads: kThreads. No alignment.
template <typename Param, typename Grad>
__global__ void __launch_bounds__(kThreads)
    step_coded_each(Pieces pieces, Rule rule, Codebooks codebooks) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kEach = kCodedBlock / 32;
  __shared__ Decisions<256> first, second;
  first.fill(codebooks.first);
  second.fill(codebooks.second);
  const int lane = threadIdx.x % 32;
  const int warp = warp_of_block();
  for_each_unit(pieces, kWarps * kCodedBlock, [&](const Piece& piece, int64_t start) {
    const int64_t block = start / kCodedBlock + warp;
    if (block * kCodedBlock >= piece.count) return;
    uint8_t* first_codes = static_cast<uint8_t*>(piece.first_moments);
    uint8_t* second_codes = static_cast<uint8_t*>(piece.second_moments);
    Param* params = static_cast<Param*>(piece.params);
    const float old_first = piece.first_absmaxes[block], old_second = piece.second_absmaxes[block];
    float m[kEach] = {}, v[kEach] = {};
    float most_m = 0.0f, most_v = 0.0f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t i = block * kCodedBlock + 32 * j + lane;
      if (i >= piece.count) continue;
      const float grad = to_float(static_cast<const Grad*>(piece.grads)[i]);
      m[j] = rule.first_moment(first.levels[first_codes[i]] * old_first, grad);
      v[j] = rule.second_moment(second.levels[second_codes[i]] * old_second, grad);
      most_m = larger(most_m, fabsf(m[j]));
      most_v = larger(most_v, fabsf(v[j]));
      round_to(rule.param(to_float(params[i]), m[j], v[j]), params + i);
    }
    most_m = largest_of_warp(most_m);
    most_v = largest_of_warp(most_v);
    __syncwarp();  // all lanes have read the absmaxes
    if (lane == 0) {
      piece.first_absmaxes[block] = most_m;
      piece.second_absmaxes[block] = most_v;
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t i = block * kCodedBlock + 32 * j + lane;
      if (i >= piece.count) continue;
      first_codes[i] = static_cast<uint8_t>(first.code(normalise(m[j], most_m)));
      second_codes[i] = static_cast<uint8_t>(second.code(normalise(v[j], most_v)));
    }
  });
}

template <typename Param, typename Grad>
int launch_coded_vectors(const Pieces& pieces, const Rule& rule, const Codebooks& codebooks,
                         cudaStream_t stream) {
  const auto kernel = step_coded_vectors<Param, Grad>;
  const int blocks = unit_blocks(pieces, kThreads * kCodedValues);
  return launch_with_shared(kernel, blocks, kThreads, sizeof(Coders), stream, pieces, rule,
                            codebooks);
}

template <typename Param, typename Grad>
int launch_coded_each(const Pieces& pieces, const Rule& rule, const Codebooks& codebooks,
                      cudaStream_t stream) {
  const int blocks = unit_blocks(pieces, kThreads / 32 * kCodedBlock);
  step_coded_each<Param, Grad><<<blocks, kThreads, 0, stream>>>(pieces, rule, codebooks);
  return launched();
}

}  // namespace qlora
