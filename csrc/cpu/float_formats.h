// bfloat16 and float16 in software: widened exactly, rounded to nearest even. Subnormals are kept,
// too large numbers become infinity, NaN stays NaN.
//
// There are no branches, so that compilers turn loops over these functions into vector code.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

namespace qlora {

struct Bfloat16 {
  uint16_t bits;  // the upper half of a float: sign, 8 bits of exponent, 7 of mantissa
};

struct Float16 {
  uint16_t bits;  // sign, 5 bits of exponent (bias 15), 10 of mantissa
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t kSignBit = 0x80000000;
constexpr uint32_t kInfinity = 0x7f800000;  // larger magnitudes are NaN
constexpr uint32_t kQuietBit = 0x00400000;  // the highest bit of a mantissa, set in a quiet NaN

inline float to_float(float x) { return x; }

inline float to_float(Bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);  // the other bias
  const uint32_t special = (magnitude << 13) | kInfinity;
  // A subnormal is magnitude * 2^-24, which is the last bit of 1/2: put it there, take 1/2 off.
  const uint32_t subnormal = bits_of(float_of(0x3f000000 | magnitude) - 0.5f);
  const uint32_t finite = magnitude < 0x0400 ? subnormal : normal;
  return float_of(sign | (magnitude >= 0x7c00 ? special : finite));
}

template <typename Value>
Value from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = bits_of(x);
  // Half of the last bit kept, or a hair less when that bit is 0, so that ties go to even.
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const bool is_nan = (bits & ~kSignBit) > kInfinity;
  return {uint16_t((is_nan ? bits | kQuietBit : rounded) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t sign = (bits_of(x) & kSignBit) >> 16;
  const uint32_t magnitude = bits_of(x) & ~kSignBit;
  const uint32_t rounded = magnitude + 0x0fff + ((magnitude >> 13) & 1);  // as above
  const uint32_t normal = (rounded - ((127 - 15) << 23)) >> 13;
  // Below 2^-14 the last bit is 2^-24, which is that of 1/2: adding 1/2 rounds there.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t nan = 0x7e00 | ((magnitude >> 13) & 0x03ff);
  uint32_t narrow = magnitude < 0x38800000 ? subnormal : normal;  // 2^-14
  narrow = magnitude >= 0x47800000 ? 0x7c00 : narrow;  // 2^16; from 65520 rounding does it
  narrow = magnitude > kInfinity ? nan : narrow;
  return {uint16_t(sign | narrow)};
}

// Calls function with a value of the C++ type that a Dtype stands for, and returns its Status.
template <typename Function>
int with_dtype(int dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(float{});
    case kBfloat16:
      return function(Bfloat16{});
    case kFloat16:
      return function(Float16{});
    default:
      return kUnknownDtype;
  }
}

}  // namespace qlora
