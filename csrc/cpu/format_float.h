// Products in float: one weight, one activation, one fused multiply-add a lane.

#pragma once

#include "nibbles.h"
#include "stretch.h"
#include "tiles.h"

namespace qlora {

template <typename Value>
struct FloatFormat {
  using Element = float;
  static constexpr int kPlanes = 1;
  static constexpr int kPair = 1;
  static constexpr int kDepth = 256;
  static constexpr int kStep = 1;
  static constexpr int kRowStep = 1;
  static constexpr int kGroup = 2 * kTileRows;
  static constexpr int kRowStride = kDepth + kLineOf<float>;
  static constexpr int kPanelStride = kDepth * kLanes + kLineOf<float>;

  // In runs of r the roundings of the depth / r additions to the sums so far weigh as much as those
  // within the runs where r^3 = depth^2 / 2, and each addition costs as much as one or two
  // products.
  static int run_length(int64_t depth) { return depth <= 512 ? 32 : 128; }

  // What the codes of a block stand for, rounded to Value: see decode_row.
  class Table {
   public:
    static constexpr int kVector = FloatTables<Value>::kVector;

    Table() = default;
    Table(const float* codebook, float scale) {
      for (int i = 0; i < 16; i += kLanes) {
        store(levels_ + i, rounded<Value>(load(codebook + i) * broadcast(scale)));
      }
      tables_ = FloatTables<Value>(levels_);
    }

    // kVector values, each kLanes of them `stride` elements behind those before.
    void expand(const uint8_t* packed, float* out, int64_t, int64_t stride = kLanes) const {
      Floats values[kVector / kLanes];
      tables_.restore(packed, values);
      for (int i = 0; i < kVector / kLanes; ++i) store(out + i * stride, values[i]);
    }

    void expand_some(const uint8_t* packed, int64_t count, float* out, int64_t plane) const {
      for (int64_t i = 0; i < count; i += 2) {
        expand_one(packed[i / 2] >> 4, out + i, plane);
        expand_one(packed[i / 2] & 15, out + i + 1, plane);
      }
    }

    void expand_one(int code, float* out, int64_t) const { *out = levels_[code]; }

   private:
    float levels_[16];
    FloatTables<Value> tables_;
  };

#if defined(__AVX512BW__)
  static constexpr bool kHasStretches = true;
  using Stretch = FloatStretch<Value>;
#else
  static constexpr bool kHasStretches = false;
#endif

  // Widens `count` values.
  static void convert(const Value* x, int64_t count, float* out, int64_t) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
    for (; i < count; ++i) out[i] = to_float(x[i]);
  }

  // One row of kLanes elements: nothing to put side by side.
  static void interleave(const float* row, int64_t, float* out) { store(out, load(row)); }

  // As Table::expand, for kPair rows, straight into panels.
  static void expand_panels(const Table* tables, const uint8_t* const* packed, float* out,
                            int64_t) {
    tables[0].expand(packed[0], out, 0, kPanelStride);
  }

  // c (rows, panels kLanes) += a (rows, depth) * b (panels, depth, kLanes).
  static void multiply(const float* a, int64_t, const float* b, int64_t, int64_t rows,
                       int64_t panels, int depth, int run, float* c, int64_t c_stride) {
    multiply_by_panels<FloatArithmetic, FloatFormat>(a, b, rows, panels, depth, run, c, c_stride);
  }
};

}  // namespace qlora
