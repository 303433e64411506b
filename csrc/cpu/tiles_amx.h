// The inner loop of a product on AMX: eight tile registers of 16 rows of 64 bytes. One instruction
// adds a 16 x 32 tile of bfloat16 times a 32 x 16 one to 16 x 16 floats, in 16 cycles.

#pragma once

#include "simd.h"

namespace qlora {

constexpr int kTileDepth = 32;
constexpr int kTileSide = 16;

#if !defined(__AMX_BF16__)

constexpr bool kHasTiles = false;

struct TileShapes {};

template <int kPlanes, typename Layout>
void multiply_on_tiles(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, int64_t, int,
                       float*, int64_t);

#else

constexpr bool kHasTiles = true;

// Sets the shape of the tiles, and puts back what was there: others in this thread use them too.
class TileShapes {
 public:
  TileShapes() {
    _tile_storeconfig(&before_);
    Shapes full;
    full.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      full.row_bytes[tile] = 64;
      full.rows[tile] = kTileSide;
    }
    _tile_loadconfig(&full);
  }
  ~TileShapes() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  struct alignas(64) Shapes {  // the layout that the processor wants
    uint8_t palette = 0;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shapes before_;
};

// c += a b for 32 x 32 sums in bfloat16, in place.
template <typename Layout, int kRowTiles, int kColumnTiles>
void multiply_tiles(const uint16_t* a, const uint16_t* b, int depth, float* c, int64_t c_stride) {
  constexpr int kPanel = Layout::kPanelStride;
  const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
  constexpr int64_t a_bytes = Layout::kRowStride * sizeof(uint16_t);
  float* lower = c + kTileSide * c_stride;
  _tile_loadd(0, c, c_bytes);
  if (kColumnTiles == 2) _tile_loadd(1, c + kTileSide, c_bytes);
  if (kRowTiles == 2) _tile_loadd(2, lower, c_bytes);
  if (kRowTiles == 2 && kColumnTiles == 2) _tile_loadd(3, lower + kTileSide, c_bytes);
  for (int k = 0; k < depth; k += kTileDepth) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * kTileSide, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumnTiles == 2) {
      _tile_loadd(7, b + kPanel + k * kTileSide, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRowTiles == 2) {
      _tile_loadd(5, a + kTileSide * Layout::kRowStride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumnTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kColumnTiles == 2) _tile_stored(1, c + kTileSide, c_bytes);
  if (kRowTiles == 2) _tile_stored(2, lower, c_bytes);
  if (kRowTiles == 2 && kColumnTiles == 2) _tile_stored(3, lower + kTileSide, c_bytes);
}

// c (16, 16 kColumnTiles) += the sum over the planes i of a and j of b with i + j < kPlanes. The
// product of the leading planes has sums of its own: added to one another, the small products would
// each be rounded to the size of the large ones.
template <int kPlanes, typename Layout, int kColumnTiles>
void multiply_split_tiles(const uint16_t* a, int64_t a_plane, const uint16_t* b, int64_t b_plane,
                          int depth, float* c, int64_t c_stride) {
  constexpr int kPanel = Layout::kPanelStride;
  constexpr int64_t a_bytes = Layout::kRowStride * sizeof(uint16_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < depth; k += kTileDepth) {
    const uint16_t* a_k = a + k;
    const uint16_t* b_k = b + k * kTileSide;
    // Tiles 4, 5: planes of a. 6, 7: a plane of b, for each of the two columns.
    _tile_loadd(4, a_k, a_bytes);
    _tile_loadd(6, b_k, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumnTiles == 2) {
      _tile_loadd(7, b_k + kPanel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, a_k + a_plane, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if (kColumnTiles == 2) _tile_dpbf16ps(3, 5, 7);
    if (kPlanes == 3) {
      _tile_loadd(5, a_k + 2 * a_plane, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumnTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(6, b_k + b_plane, 64);
    _tile_dpbf16ps(2, 4, 6);
    if (kColumnTiles == 2) {
      _tile_loadd(7, b_k + b_plane + kPanel, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
    if (kPlanes == 3) {
      _tile_loadd(5, a_k + a_plane, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumnTiles == 2) _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(6, b_k + 2 * b_plane, 64);
      _tile_dpbf16ps(2, 4, 6);
      if (kColumnTiles == 2) {
        _tile_loadd(7, b_k + 2 * b_plane + kPanel, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
  alignas(64) float large[kTileSide * kTileSide], small[kTileSide * kTileSide];
  for (int column = 0; column < kColumnTiles; ++column) {
    if (column == 0) {
      _tile_stored(0, large, 64);
      _tile_stored(2, small, 64);
    } else {
      _tile_stored(1, large, 64);
      _tile_stored(3, small, 64);
    }
    for (int row = 0; row < kTileSide; ++row) {
      float* target = c + row * c_stride + column * kTileSide;
      const Floats added = load(large + row * kTileSide) + load(small + row * kTileSide);
      store(target, load(target) + added);
    }
  }
}

// c (rows, panels 16) += a (rows, depth) b (panels, depth, 16); rows in multiples of 16, depth
// of 32.
template <int kPlanes, typename Layout>
void multiply_on_tiles(const uint16_t* a, int64_t a_plane, const uint16_t* b, int64_t b_plane,
                       int64_t rows, int64_t panels, int depth, float* c, int64_t c_stride) {
  for (int64_t panel = 0; panel < panels; panel += 2) {
    const uint16_t* b_panel = b + panel * Layout::kPanelStride;
    const bool is_pair = panel + 1 < panels;
    for (int64_t row = 0; row < rows; row += kTileSide) {
      const uint16_t* a_row = a + row * Layout::kRowStride;
      float* target = c + row * c_stride + panel * kTileSide;
      if constexpr (kPlanes > 1) {
        if (is_pair) {
          multiply_split_tiles<kPlanes, Layout, 2>(a_row, a_plane, b_panel, b_plane, depth, target,
                                                   c_stride);
        } else {
          multiply_split_tiles<kPlanes, Layout, 1>(a_row, a_plane, b_panel, b_plane, depth, target,
                                                   c_stride);
        }
      } else if (row + 2 * kTileSide <= rows) {
        if (is_pair) {
          multiply_tiles<Layout, 2, 2>(a_row, b_panel, depth, target, c_stride);
        } else {
          multiply_tiles<Layout, 2, 1>(a_row, b_panel, depth, target, c_stride);
        }
        row += kTileSide;
      } else if (is_pair) {
        multiply_tiles<Layout, 1, 2>(a_row, b_panel, depth, target, c_stride);
      } else {
        multiply_tiles<Layout, 1, 1>(a_row, b_panel, depth, target, c_stride);
      }
    }
  }
}

#endif

}  // namespace qlora
