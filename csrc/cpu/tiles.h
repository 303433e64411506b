// The inner loop of a product: a tile of sums stays in registers while the depth runs.

#pragma once

#include <algorithm>

#include "simd.h"

namespace qlora {

// One float of depth at a time.
struct FloatArithmetic {
  using Element = float;
  static constexpr int kPair = 1;

  static Floats broadcast_element(const float* a) { return broadcast(*a); }
  static Floats load_lanes(const float* b) { return load(b); }
  static Floats multiply_add(Floats a, Floats b, Floats sum) {
    return fused_multiply_add(a, b, sum);
  }
};

// 32 vector registers hold 12 x 2 sums and what they are made of, 16 hold 6 x 2.
#if defined(__AVX512BW__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTilePanels = 2;

// c (kRows, kPanels kLanes) += a (kRows, depth) * b (kPanels, depth, kLanes), laid out as `Layout`
// says (weight.h), for the depth of a run.
template <typename Arithmetic, typename Layout, int kRows, int kPanels>
inline void multiply_run(const typename Arithmetic::Element* a,
                         const typename Arithmetic::Element* b, int depth, float* c,
                         int64_t c_stride) {
  Floats sums[kRows][kPanels];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) sums[row][panel] = broadcast(0.0f);
  }
  for (int k = 0; k < depth; k += Arithmetic::kPair) {
    decltype(Arithmetic::load_lanes(b)) lanes[kPanels];
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
      lanes[panel] = Arithmetic::load_lanes(b + panel * Layout::kPanelStride + k * kLanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const auto element = Arithmetic::broadcast_element(a + row * Layout::kRowStride + k);
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) {
        sums[row][panel] = Arithmetic::multiply_add(element, lanes[panel], sums[row][panel]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
      float* sum = c + row * c_stride + panel * kLanes;
      store(sum, load(sum) + sums[row][panel]);
    }
  }
}

// The same for any depth, in runs that are added to the sums so far: a short sum of short sums is
// more accurate than one long sum.
template <typename Arithmetic, typename Layout, int kRows, int kPanels>
void multiply_tile(const typename Arithmetic::Element* a, const typename Arithmetic::Element* b,
                   int depth, int run, float* c, int64_t c_stride) {
  for (int k = 0; k < depth; k += run) {
    multiply_run<Arithmetic, Layout, kRows, kPanels>(a + k, b + k * kLanes,
                                                     std::min(run, depth - k), c, c_stride);
  }
}

// As multiply_tile, for any number of rows: the largest tiles first, then smaller ones.
template <typename Arithmetic, typename Layout, int kPanels, int kRows = kTileRows>
void multiply_rows(const typename Arithmetic::Element* a, const typename Arithmetic::Element* b,
                   int64_t rows, int depth, int run, float* c, int64_t c_stride) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    multiply_tile<Arithmetic, Layout, kRows, kPanels>(a + row * Layout::kRowStride, b, depth, run,
                                                      c + row * c_stride, c_stride);
  }
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
    multiply_rows<Arithmetic, Layout, kPanels, kFewer>(a + row * Layout::kRowStride, b, rows - row,
                                                       depth, run, c + row * c_stride, c_stride);
  }
}

// As multiply_tile, for any number of rows and panels.
template <typename Arithmetic, typename Layout>
void multiply_by_panels(const typename Arithmetic::Element* a,
                        const typename Arithmetic::Element* b, int64_t rows, int64_t panels,
                        int depth, int run, float* c, int64_t c_stride) {
  int64_t panel = 0;
  for (; panel + kTilePanels <= panels; panel += kTilePanels) {
    multiply_rows<Arithmetic, Layout, kTilePanels>(a, b + panel * Layout::kPanelStride, rows, depth,
                                                   run, c + panel * kLanes, c_stride);
  }
  if (panel < panels) {
    multiply_rows<Arithmetic, Layout, 1>(a, b + panel * Layout::kPanelStride, rows, depth, run,
                                         c + panel * kLanes, c_stride);
  }
}

}  // namespace qlora
