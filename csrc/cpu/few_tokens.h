// Products with few tokens, where reading the weight is most of the work: codes become levels in
// registers, and are multiplied there. Either each block's sum is scaled, once, or its levels are.
//
// A stretch (stretch.h) is read at a time, and looked up in kSteps steps. Which code a step has in
// which lane is for look-ups to say; the activations are put into the same order beforehand. All
// codes that a lane has in these steps lie in one block.

#pragma once

#include "product.h"
#include "scratch.h"
#include "steps.h"

namespace qlora {

template <typename Steps, typename Value>
class FewTokens {
  using Element = typename Steps::Element;
  static constexpr int kFew = Steps::kFew;

  static constexpr int kWidth = kStretch / Steps::kSteps;
  static constexpr int kStretchBytes = kStretch / 2;

  static constexpr int kStrip = 16;  // rows that a thread works on at a time

  // Between the row whose codes are asked for and the one whose codes are used.
  static constexpr int kRowsAhead = 16;

  // What is read again for each row stays in the L1 cache.
  static constexpr int64_t kActivationBytes = 24 * 1024;

 public:
  // Where every lane of every stretch lies in one block.
  static bool fits(const Weight& weight) {
    const int64_t block = weight.block_size;
    return block >= Steps::kLeastBlock && (block & (block - 1)) == 0 && weight.columns % block == 0;
  }

  FewTokens(const Product<Value>& product, int threads)
      : product_(product), threads_(threads), steps_(product.weight.codebook) {
    stretches_ = (product.depth + kStretch - 1) / kStretch;
    blocks_ = product.depth / product.weight.block_size;
    block_bits_ = __builtin_ctzll(static_cast<uint64_t>(product.weight.block_size));
    int32_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int place = Steps::place(0, lane * kWidth / kLanes);
      lanes[lane] = static_cast<int32_t>(place / product.weight.block_size);
    }
    std::memcpy(&block_of_lane_, lanes, sizeof lanes);
  }

  // Each thread orders activations of its own: that takes less time than to get them from another
  // one's cache, and no thread waits for another.
  Status run() {
    static thread_local Scratch memory;
    const int64_t elements = stretches_ * kStretch * kFew;
    const int64_t ordered = elements * static_cast<int64_t>(sizeof(Element));
    const int64_t used = round_up(ordered + kStrip * scale_stride() * 4, kCacheLine);
    const int64_t own = used + bytes_between(threads_);
    char* start = memory.reserve(threads_ * own);
    if (start == nullptr) return kNoMemory;
#pragma omp parallel num_threads(threads_)
    {
      char* mine = start + thread_number() * own;
      auto* activations = reinterpret_cast<Element*>(mine);
      auto* scales = reinterpret_cast<float*>(mine + ordered);
      for (int64_t token = 0; token < product_.tokens; token += kFew) {
        const int tokens = static_cast<int>(std::min<int64_t>(kFew, product_.tokens - token));
        order_activations(token, tokens, activations);
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < product_.outputs; row += kStrip) {
          multiply_strip(row, token, tokens, activations, scales, std::make_index_sequence<kFew>());
        }
      }
    }
    return kOk;
  }

 private:
  // A vector of scales may be read from any of them on.
  int64_t scale_stride() const { return blocks_ + kLanes; }

  // Stretch after stretch, token after token; behind the end of a row there are zeros.
  void order_activations(int64_t token, int tokens, Element* out) const {
    for (int64_t s = 0; s < stretches_; ++s) {
      const int64_t begin = s * kStretch;
      const int count = static_cast<int>(std::min<int64_t>(kStretch, product_.depth - begin));
      for (int t = 0; t < tokens; ++t, out += kStretch) {
        const Value* x = product_.x + (token + t) * product_.depth + begin;
        Element stretch[kStretch] = {};
        for (int i = 0; i < count; ++i) stretch[i] = Steps::element(x[i]);
        order_stretch(stretch, Steps::place, out);
      }
    }
  }

  // Chooses the loop for the number of tokens.
  template <size_t... kLess>
  void multiply_strip(int64_t row, int64_t token, int tokens, const Element* activations,
                      float* scales, std::index_sequence<kLess...>) const {
    ((tokens == kLess + 1 ? multiply_strip<kLess + 1>(row, token, activations, scales) : void()),
     ...);
  }

  template <int kTokens>
  void multiply_strip(int64_t first, int64_t token, const Element* activations,
                      float* scales) const {
    const int64_t rows = std::min<int64_t>(kStrip, product_.outputs - first);
    restore_scales(first, rows, scales);
    product_.weight.scales.prefetch_blocks((first + kStrip) * blocks_, kStrip * blocks_);
    Floats totals[kStrip][kTokens];
    std::fill(totals[0], totals[0] + kStrip * kTokens, broadcast(0.0f));
    constexpr int64_t kBytes = kTokens * kStretch * sizeof(Element);
    constexpr int64_t kChunk = std::max<int64_t>(kActivationBytes / kBytes, 1);
    for (int64_t begin = 0; begin < stretches_; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, stretches_);
      int64_t row = 0;
      for (; row + Steps::kRows <= rows; row += Steps::kRows) {
        add_stretches<Steps::kRows, kTokens>(first + row, begin, end, activations,
                                             scales + row * scale_stride(), totals[row]);
      }
      if (row < rows) {
        add_stretches<1, kTokens>(first + row, begin, end, activations,
                                  scales + row * scale_stride(), totals[row]);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int t = 0; t < kTokens; ++t) write(first + row, token + t, sum(totals[row][t]));
    }
  }

  void restore_scales(int64_t first, int64_t rows, float* scales) const {
    for (int64_t row = first; row < first + rows; ++row, scales += scale_stride()) {
      product_.weight.scales.restore(row * blocks_, blocks_, scales);
      std::fill(scales + blocks_, scales + scale_stride(), 0.0f);
    }
  }

  // The levels of each row of a stretch, scaled for its halves.
  template <int kRows, typename Levels>
  void scale_levels(int64_t stretch, const float* scales, Levels* levels) const {
    if constexpr (Steps::kScalesLevels) {
      const int64_t first = stretch * kStretch >> block_bits_;
      const int64_t second = (stretch * kStretch + kStretch / 2) >> block_bits_;
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row, scales += scale_stride()) {
        levels[row] = Levels(product_.weight.codebook, scales[first], scales[second]);
      }
    }
  }

  // totals (kRows, kTokens) += rows * tokens, over some stretches, which have a sum of their own: a
  // short sum of short sums is the most accurate. Each activation that is loaded serves all rows.
  template <int kRows, int kTokens>
  void add_stretches(int64_t first, int64_t begin, int64_t end, const Element* activations,
                     const float* scales, Floats* totals) const {
    const int64_t row_bytes = product_.depth / 2, whole = std::min(end, product_.depth / kStretch);
    const uint8_t* packed = product_.weight.packed + first * row_bytes;
    Floats sums[kRows * kTokens];
#pragma GCC unroll 16
    for (Floats& sum : sums) sum = broadcast(0.0f);
    typename Steps::Levels levels[kRows], next[kRows];
    scale_levels<kRows>(begin, scales, next);
    for (int64_t stretch = begin; stretch < whole; ++stretch) {
      const uint8_t* codes = packed + stretch * kStretchBytes;
      for (int row = 0; row < kRows; ++row) prefetch(codes + (row + kRowsAhead) * row_bytes);
      std::copy(next, next + kRows, levels);
      scale_levels<kRows>(stretch + 1, scales, next);  // ahead, so that no look-up waits for it
      add_stretch<kRows, kTokens>(codes, row_bytes, stretch, activations, levels, scales, sums);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kTokens; ++i) totals[i] = totals[i] + sums[i];
    if (whole < end) add_end<kRows, kTokens>(packed, row_bytes, activations, scales, totals);
  }

  // The stretch in which rows end. Out of line, so that sums stay in registers elsewhere.
  template <int kRows, int kTokens>
  __attribute__((noinline)) void add_end(const uint8_t* packed, int64_t row_bytes,
                                         const Element* activations, const float* scales,
                                         Floats* totals) const {
    const int64_t stretch = product_.depth / kStretch, begin = stretch * kStretchBytes;
    // What lies behind the rows' ends is multiplied by 0, and must not be infinite.
    const float* codebook = product_.weight.codebook;
    const float* level =
        std::find_if(codebook, codebook + 16, [](float x) { return std::isfinite(x); });
    uint8_t codes[kRows][kStretchBytes];
    std::memset(codes, 0x11 * static_cast<int>((level - codebook) % 16), sizeof codes);
    for (int row = 0; row < kRows; ++row) {
      std::memcpy(codes[row], packed + row * row_bytes + begin, row_bytes - begin);
    }
    typename Steps::Levels levels[kRows];
    scale_levels<kRows>(stretch, scales, levels);
    add_stretch<kRows, kTokens>(codes[0], kStretchBytes, stretch, activations, levels, scales,
                                totals);
  }

  template <int kRows, int kTokens>
  __attribute__((always_inline)) void add_stretch(const uint8_t* packed, int64_t row_bytes,
                                                  int64_t stretch, const Element* activations,
                                                  const typename Steps::Levels* levels,
                                                  [[maybe_unused]] const float* scales,
                                                  Floats* totals) const {
    Ints codes[kRows];
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      std::memcpy(&codes[row], packed + row * row_bytes, sizeof(Ints));
      codes[row] = in_register(codes[row]);
    }
    const Element* x = activations + stretch * kTokens * kStretch;
    if constexpr (Steps::kScalesLevels) {
      add_products<kRows, kTokens, 1>(codes, x, levels, totals);
    } else {
      // A single sum would wait for itself in each step.
      constexpr int kPairs = kRows * kTokens, kChains = kPairs == 1 ? 2 : 1;
      Floats sums[kChains * kPairs];
      std::fill(sums, sums + kChains * kPairs, broadcast(0.0f));
      add_products<kRows, kTokens, kChains>(codes, x, levels, sums);
      const int64_t block = stretch * kStretch >> block_bits_;
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        const Floats scale =
            pick_lanes(load(scales + row * scale_stride() + block), block_of_lane_);
#pragma GCC unroll 8
        for (int i = row * kTokens; i < (row + 1) * kTokens; ++i) {
          const Floats sum = kChains == 2 ? sums[i] + sums[kPairs + i] : sums[i];
          totals[i] = fused_multiply_add(sum, scale, totals[i]);
        }
      }
    }
  }

  // sums (kChains, kRows, kTokens) += a stretch of rows * tokens.
  template <int kRows, int kTokens, int kChains>
  __attribute__((always_inline)) void add_products(
      const Ints* codes, const Element* x, [[maybe_unused]] const typename Steps::Levels* levels,
      Floats* sums) const {
#pragma GCC unroll 8
    for (int step = 0; step < Steps::kSteps; step += Steps::kTogether) {
      typename Steps::Weights weights[kRows][Steps::kTogether];
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        if constexpr (Steps::kScalesLevels) {
          weights[row][0] = levels[row].look_up(codes[row], step);
        } else {
          steps_.look_up(codes[row], step, weights[row]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < Steps::kTogether; ++i, x += kWidth) {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          auto lanes = Steps::load_lanes(x + t * kStretch);
          if (kRows > 1) lanes = in_register(lanes);
#pragma GCC unroll 2
          for (int row = 0; row < kRows; ++row) {
            Floats& sum = sums[(i % kChains * kRows + row) * kTokens + t];
            sum = Steps::multiply_add(weights[row][i], lanes, sum);
          }
        }
      }
    }
  }

  void write(int64_t row, int64_t token, float sum) const {
    if (product_.bias != nullptr) sum += to_float(product_.bias[row]);
    product_.y[token * product_.outputs + row] = from_float<Value>(sum);
  }

  Product<Value> product_;
  int threads_;
  Steps steps_;
  int block_bits_;  // log2 of the block size
  Ints block_of_lane_;
  int64_t stretches_, blocks_;
};

}  // namespace qlora
