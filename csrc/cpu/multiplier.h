// Products with many tokens: parts of the weight that fit the cache are restored and multiplied.
//
// Forward and transposed products are both sums of rows times lanes (tiles.h). Forward, rows are
// the weight's own and lanes are tokens; transposed, rows are tokens and lanes are the weight's
// columns. Either way a part of the weight is restored row by row, which is how it is stored.

#pragma once

#include <algorithm>
#include <new>

#include "format_bfloat16.h"
#include "format_float.h"
#include "outputs_left.h"
#include "product.h"
#include "scratch.h"
#include "transpose.h"

namespace qlora {

// Tokens that are worked on at a time: as many as fit into 4 MiB for each thread, in the order of
// the inner loop, and no more than kMostTokens, so that their sums with a block of outputs are
// about as large as the L2 cache, but at least a panel. With the weights and the sums that a thread
// needs besides, that stays below 8 MiB for each thread, unless sums have more terms than 32,768.
//
// Where each thread gets kTokensAlone of them, it begins with these alone, and all outputs: the
// whole weight is restored for them. That takes as long as multiplying 10 to 25 tokens, and spares
// a thread the activations that others have put in order, in caches that may be far away. Tiles
// multiply 16 times as fast, and restoring is what they wait for.
constexpr int64_t kActivationBytes = int64_t{4} << 20;
constexpr int64_t kMostTokens = kHasTiles ? 1024 : 512;
constexpr int64_t kTokensAlone = kHasTiles ? kMostTokens : 128;

// Rows of the weight, transposed, between where codes are asked for and where they are used.
constexpr int kAhead = 16;

// `rows` rows of `depth` values; zeros fill rows up to `padded_rows` and the depth up to a multiple
// of kStep.
template <typename Format, typename Value>
void pack_rows(const Value* x, int64_t x_stride, int64_t rows, int64_t padded_rows, int depth,
               typename Format::Element* out, int64_t plane) {
  const int64_t padded = round_up(depth, Format::kStep);
  for (int64_t row = 0; row < padded_rows; ++row, out += Format::kRowStride) {
    const int64_t used = row < rows ? depth : 0;
    if (used > 0) Format::convert(x + row * x_stride, used, out, plane);
    for (int p = 0; p < Format::kPlanes; ++p) {
      std::fill(out + p * plane + used, out + p * plane + padded, 0);
    }
  }
}

// Turns kLanes rows into a panel. A pair of bfloat16 is moved as one float.
template <typename Format>
void rows_to_panel(const typename Format::Element* rows, int depth,
                   typename Format::Element* panel) {
  for (int k = 0; k < depth; k += kLanes * Format::kPair) {
    Floats square[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(&square[lane], rows + lane * Format::kRowStride + k, sizeof(Floats));
    }
    transpose(square);
    std::memcpy(panel + k * kLanes, square, sizeof square);
  }
}

template <typename Format, typename Value, bool kTransposed>
class Multiplier {
  using Element = typename Format::Element;
  using Table = typename Format::Table;
  static constexpr int kDepth = Format::kDepth;
  static constexpr int kPlanes = Format::kPlanes;
  static constexpr int kPair = Format::kPair;
  static constexpr bool kHasOrder = Format::kHasStretches && !kTransposed;
  static constexpr bool kWritesPairs =
      kRoundsInPlace && std::is_same_v<Value, Bfloat16> && !kTransposed;

  // Outputs that are worked on at a time: multiples of kUnit, at most kBlock. Weights that are
  // restored at a time: kGroup rows of a chunk, or a chunk of kBlock columns.
  static constexpr int64_t kUnit =
      kTransposed ? std::max(kTilePanels * kLanes, Table::kVector) : Format::kGroup;
  static constexpr int64_t kBlock = kTransposed ? 512 : 256 / kUnit * kUnit;
  static constexpr int64_t kWeights =
      kTransposed ? kBlock / kLanes * Format::kPanelStride : Format::kGroup * Format::kRowStride;

 public:
  Multiplier(const Product<Value>& product, int threads)
      : product_(product), threads_(threads), run_(Format::run_length(product.depth)) {
    if constexpr (kHasOrder) is_ordered_ = has_whole_stretches(product.weight);
    chunks_ = (product.depth + kDepth - 1) / kDepth;
    const int64_t fitting = kActivationBytes * threads / (bytes_of(chunks_ * kDepth) + 1);
    int64_t step = even_step(product.tokens, fitting, kMostTokens * threads);
    if (step / threads >= kTokensAlone) {
      shares_ = threads;
    } else {
      step = even_step(product.tokens, fitting, kMostTokens);
    }
    share_tokens_ = round_up((step + shares_ - 1) / shares_, kLanes);
    chunk_elements_ = kTransposed ? share_tokens_ * Format::kRowStride
                                  : share_tokens_ / kLanes * Format::kPanelStride;
    activation_plane_ = shares_ * chunks_ * chunk_elements_;
    const int64_t most_outputs = std::min(round_up(product.outputs, kUnit), kBlock);
    sum_rows_ = kTransposed ? share_tokens_ : most_outputs;
    sum_stride_ = kLineOf<float> + (kTransposed ? most_outputs : share_tokens_);
  }

  Status run() {
    static thread_local Scratch memory;
    const int64_t common = shares_ * sizeof(OutputsLeft) + bytes_of(activation_plane_);
    const int64_t apart = bytes_between(threads_);
    const int64_t shared = round_up(common, kCacheLine) + apart;
    const int64_t own = bytes_of(kWeights) + sum_rows_ * sum_stride_ * 4 + apart;  // of each thread
    char* start = memory.reserve(shared + threads_ * own);
    if (start == nullptr) return kNoMemory;
    auto* left = reinterpret_cast<OutputsLeft*>(start);  // for each share
    auto* activations = reinterpret_cast<Element*>(left + shares_);
    const int parts = threads_ == 1 ? 1 : 2 * threads_ / shares_;
    for (int64_t token = 0; token < product_.tokens; token += shares_ * share_tokens_) {
      for (int share = 0; share < shares_; ++share) {
        new (left + share) OutputsLeft(product_.outputs, kUnit, kBlock, parts);
      }
#pragma omp parallel num_threads(threads_)
      {
        [[maybe_unused]] const TileShapes shapes;
        pack_activations(token, activations);
        char* weights = start + shared + thread_number() * own;
        for (int i = 0; i < shares_; ++i) {
          const int share = (thread_number() + i) % shares_;  // its own first, then the others'
          multiply_share(token + share * share_tokens_, left[share],
                         activations + share * chunks_ * chunk_elements_,
                         reinterpret_cast<Element*>(weights),
                         reinterpret_cast<float*>(weights + bytes_of(kWeights)));
        }
      }
    }
    return kOk;
  }

 private:
  // How many tokens are worked on at a time where neither limit may be passed: as many each time.
  static int64_t even_step(int64_t tokens, int64_t fitting, int64_t most) {
    most = std::clamp<int64_t>(fitting, 1, most);
    const int64_t steps = (tokens + most - 1) / most;
    return (tokens + steps - 1) / steps;
  }

  static int64_t bytes_of(int64_t plane) {
    return plane * kPlanes * static_cast<int64_t>(sizeof(Element));
  }

  int depth_of(int64_t chunk) const {
    return static_cast<int>(std::min<int64_t>(kDepth, product_.depth - chunk * kDepth));
  }

  // Share after share, chunk after chunk: rows of tokens, or panels of kLanes tokens.
  void pack_activations(int64_t token, Element* activations) const {
    const int64_t groups = share_tokens_ / kLanes;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < shares_ * chunks_ * groups; ++item) {
      const int64_t block = item / groups, chunk = block % chunks_, group = item % groups;
      const int64_t first = token + block / chunks_ * share_tokens_ + group * kLanes;
      const int64_t rows = std::min<int64_t>(kLanes, product_.tokens - first);
      if (rows <= 0) continue;
      const int depth = depth_of(chunk);
      const Value* x = product_.x + first * product_.depth + chunk * kDepth;
      Element* out = activations + block * chunk_elements_;
      if constexpr (kTransposed) {
        pack_rows<Format>(x, product_.depth, rows, kLanes, depth,
                          out + group * kLanes * Format::kRowStride, activation_plane_);
      } else {
        Element staged[kPlanes][kLanes * Format::kRowStride];
        pack_rows<Format>(x, product_.depth, rows, kLanes, depth, staged[0],
                          kLanes * Format::kRowStride);
        if (is_ordered_) order_rows(rows, depth, staged[0]);
        for (int p = 0; p < kPlanes; ++p) {
          rows_to_panel<Format>(staged[p], depth,
                                out + p * activation_plane_ + group * Format::kPanelStride);
        }
      }
    }
  }

  // Puts activations into the order in which weights are restored.
  static void order_rows(int64_t rows, int depth, Element* x) {
    for (int64_t row = 0; row < rows; ++row, x += Format::kRowStride) {
      for (int k = 0; k < depth; k += kStretch) {
        Element ordered[kStretch];
        order_stretch(x + k, place_in_stretch<Element>, ordered);
        std::memcpy(x + k, ordered, sizeof ordered);
      }
    }
  }

  // The tokens of a share with all outputs that are left for it.
  void multiply_share(int64_t token, OutputsLeft& left, const Element* activations,
                      Element* weights, float* sums) const {
    const int64_t tokens = std::min(share_tokens_, product_.tokens - token);
    if (tokens <= 0) return;
    int64_t first, outputs;
    while ((outputs = left.take(&first)) > 0) {
      clear_sums(tokens, outputs, sums);
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const Element* x = activations + chunk * chunk_elements_;
        if constexpr (kTransposed) {
          add_columns(first, outputs, chunk, x, tokens, weights, sums);
        } else {
          add_rows(first, outputs, chunk, x, tokens, weights, sums);
        }
      }
      write(token, tokens, first, outputs, sums);
    }
  }

  void clear_sums(int64_t tokens, int64_t outputs, float* sums) const {
    const int64_t rows = round_up(kTransposed ? tokens : outputs, Format::kRowStep);
    const int64_t lanes = round_up(kTransposed ? outputs : tokens, kLanes);
    for (int64_t row = 0; row < rows; ++row, sums += sum_stride_) {
      std::fill(sums, sums + lanes, 0.0f);
    }
  }

  // sums (outputs, tokens) += the weight's rows * panels of tokens, over a chunk of columns.
  void add_rows(int64_t first, int64_t outputs, int64_t chunk, const Element* panels,
                int64_t tokens, Element* weights, float* sums) const {
    const int depth = depth_of(chunk);
    const int padded = static_cast<int>(round_up(depth, Format::kStep));
    for (int64_t group = 0; group < outputs; group += Format::kGroup) {
      const int64_t rows = std::min<int64_t>(Format::kGroup, outputs - group);
      for (int64_t row = 0; row < rows; ++row) {
        Element* out = weights + row * Format::kRowStride;
        prefetch_after(first, outputs, group, row, chunk);
        restore_row(first + group + row, chunk * kDepth, depth, out);
        clear(out, depth, padded, kWeights);
      }
      Format::multiply(weights, kWeights, panels, activation_plane_,
                       round_up(rows, Format::kRowStep), (tokens + kLanes - 1) / kLanes, padded,
                       run_, sums + group * sum_stride_, sum_stride_);
    }
  }

  void restore_row(int64_t row, int64_t begin, int depth, Element* out) const {
    if constexpr (kHasOrder) {
      if (is_ordered_) {
        decode_stretches<typename Format::Stretch>(product_.weight, row, begin, depth, out);
        return;
      }
    }
    decode_row<Table>(product_.weight, row, begin, depth, out, kWeights);
  }

  // Asks for what add_rows will want a group later: the same row of the next group, or of the first
  // group in the next chunk.
  void prefetch_after(int64_t first, int64_t outputs, int64_t group, int64_t row,
                      int64_t chunk) const {
    const bool is_last = group + Format::kGroup >= outputs;
    const int64_t next = is_last ? first + row : first + group + Format::kGroup + row;
    const int64_t begin = (is_last ? chunk + 1 : chunk) * kDepth;
    prefetch_row(product_.weight, next, begin, kDepth);
  }

  // sums (tokens, outputs) += rows of tokens * panels of the weight's columns, over a chunk of
  // rows.
  void add_columns(int64_t first, int64_t outputs, int64_t chunk, const Element* rows,
                   int64_t tokens, Element* weights, float* sums) const {
    const int depth = depth_of(chunk);
    const int padded = static_cast<int>(round_up(depth, Format::kStep));
    const int64_t panels = (outputs + kLanes - 1) / kLanes;
    const Weight& weight = product_.weight;
    const bool is_aligned = weight.columns % Table::kVector == 0 &&
                            weight.block_size % Table::kVector == 0 &&
                            outputs % Table::kVector == 0;
    for (int k = 0; k < padded; k += kPair) {
      Element* out = weights + k * kLanes;
      for (int i = 0; i < kPair; ++i) {
        prefetch_row(weight, chunk * kDepth + k + i + kAhead, first, outputs);
      }
      if (is_aligned && k + kPair <= depth) {
        restore_aligned(chunk * kDepth + k, first, outputs, out);
      } else {
        restore_any(chunk * kDepth + k, std::min(kPair, depth - k), first, outputs, out);
      }
    }
    Format::multiply(rows, activation_plane_, weights, kWeights, round_up(tokens, Format::kRowStep),
                     panels, padded, run_, sums, sum_stride_);
  }

  // kPair rows of the weight into panels of its columns, where no vector crosses a block's end.
  void restore_aligned(int64_t row, int64_t first, int64_t columns, Element* out) const {
    const Weight& weight = product_.weight;
    Table tables[kPair];
    int64_t position[kPair], left[kPair] = {};
    for (int i = 0; i < kPair; ++i) position[i] = (row + i) * weight.columns + first;
    for (int64_t column = 0; column < columns; column += Table::kVector) {
      const uint8_t* packed[kPair];
      for (int i = 0; i < kPair; ++i) {
        if (left[i] == 0) {
          const int64_t block = weight.block_of(position[i] + column);
          tables[i] = Table(weight.codebook, weight.scales[block]);
          left[i] = (block + 1) * weight.block_size - (position[i] + column);
        }
        left[i] -= Table::kVector;
        packed[i] = weight.packed + (position[i] + column) / 2;
      }
      Format::expand_panels(tables, packed, out, kWeights);
      out += Table::kVector / kLanes * Format::kPanelStride;
    }
  }

  // The same anywhere: `rows` of kPair rows are there, the others are zeros.
  void restore_any(int64_t row, int rows, int64_t first, int64_t columns, Element* out) const {
    Element staged[kPlanes][kPair * kBlock] = {};
    for (int i = 0; i < rows; ++i) {
      decode_row<Table>(product_.weight, row + i, first, columns, staged[0] + i * kBlock,
                        kPair * kBlock);
    }
    for (int p = 0; p < kPlanes; ++p) {
      for (int64_t column = 0; column < columns; column += kLanes) {
        Format::interleave(staged[p] + column, kBlock,
                           out + p * kWeights + column / kLanes * Format::kPanelStride);
      }
    }
  }

  static void clear(Element* row, int begin, int end, int64_t plane) {
    if (begin == end) return;
    for (int p = 0; p < kPlanes; ++p) std::fill(row + p * plane + begin, row + p * plane + end, 0);
  }

  // Adds the bias and rounds.
  void write(int64_t token, int64_t tokens, int64_t first, int64_t outputs,
             const float* sums) const {
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, tokens - t);
      Value* y = product_.y + (token + t) * product_.outputs + first;
      const Value* bias = product_.bias == nullptr ? nullptr : product_.bias + first;
      int64_t o = 0;
      if constexpr (kWritesPairs) {
        for (; o + 2 * kLanes <= outputs; o += 2 * kLanes) {
          write_pairs(sums + o * sum_stride_ + t, count, bias ? bias + o : nullptr, y + o);
        }
      }
      for (; o < outputs; o += kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(kLanes, outputs - o));
        Floats square[kLanes];
        const float* corner = sums + (kTransposed ? t * sum_stride_ + o : o * sum_stride_ + t);
        const int64_t lines = kTransposed ? count : width;
        for (int64_t line = 0; line < lines; ++line)
          square[line] = load(corner + line * sum_stride_);
        if constexpr (!kTransposed) transpose(square);
        write_square(square, count, width, bias ? bias + o : nullptr, y + o);
      }
    }
  }

  // The sums of 2 kLanes outputs, two of them in a lane, so that one square is transposed.
  void write_pairs(const float* sums, int64_t tokens, const Value* bias, Value* y) const {
    Floats square[kLanes];
#pragma GCC unroll 16
    for (int line = 0; line < kLanes; ++line) {
      Floats pair[2];
      for (int i = 0; i < 2; ++i) {
        pair[i] = load(sums + (2 * line + i) * sum_stride_);
        if (bias != nullptr) pair[i] = pair[i] + broadcast(to_float(bias[2 * line + i]));
      }
      square[line] = pair_in_bfloat16(pair[0], pair[1]);
    }
    transpose(square);
    for (int64_t row = 0; row < tokens; ++row) {
      std::memcpy(y + row * product_.outputs, &square[row], sizeof(Floats));
    }
  }

  void write_square(const Floats* square, int64_t rows, int width, const Value* bias,
                    Value* y) const {
    Floats added = broadcast(0.0f);
    if (bias != nullptr) added = width == kLanes ? load(bias) : load_first(bias, width);
    for (int64_t row = 0; row < rows; ++row, y += product_.outputs) {
      const Floats sum = bias == nullptr ? square[row] : square[row] + added;
      if (width == kLanes) {
        store(y, sum);
      } else {
        store_first(y, sum, width);
      }
    }
  }

  Product<Value> product_;
  int threads_, run_;
  bool is_ordered_ = false;  // whether weights are restored in the order of stretches
  int shares_ = 1;  // of the tokens that are worked on at a time: one for each thread, or one
  int64_t chunks_, share_tokens_, chunk_elements_, activation_plane_, sum_rows_, sum_stride_;
};

}  // namespace qlora
