// simd.h for any processor: vectors of 16 bytes as gcc and clang have them in the language, which
// become SSE2 on x86-64 and NEON on aarch64.

#pragma once

#include <algorithm>

namespace qlora {

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

inline Floats broadcast(float x) { return Floats{x, x, x, x}; }
inline Ints broadcast(int32_t x) { return Ints{x, x, x, x}; }

inline Ints bits_of(Floats x) { return reinterpret_cast<Ints>(x); }
inline Floats float_of(Ints bits) { return reinterpret_cast<Floats>(bits); }

// a * b + c, with two roundings: -ffp-contract=off.
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

inline Ints shift_right(Ints x, int bits) {
  typedef uint32_t Words __attribute__((vector_size(16)));
  return reinterpret_cast<Ints>(reinterpret_cast<Words>(x) >> bits);
}

inline Ints add(Ints a, Ints b) { return a + b; }
inline Ints subtract(Ints a, Ints b) { return a - b; }
inline Ints bit_and(Ints a, Ints b) { return a & b; }

inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// b where either is NaN.
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats square_root(Floats x) {
  return Floats{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
}

// -1 where a > b, else 0.
inline Ints is_greater(Floats a, Floats b) { return a > b; }

// Numbers that are ordered as the floats are; -0 comes right before 0.
inline Ints ranks_of(Floats x) {
  const Ints bits = bits_of(x);
  return bits ^ shift_right(bits >> 31, 1);
}

// Each lane holds two numbers of 16 bits.
inline Ints larger_words(Ints a, Ints b) {
  typedef int16_t Words __attribute__((vector_size(16)));
  const Words first = reinterpret_cast<Words>(a), second = reinterpret_cast<Words>(b);
  return reinterpret_cast<Ints>(first > second ? first : second);
}

inline int32_t largest(Ints x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }

// Lane i is table[indices[i]].
inline Floats look_up(const float* table, Ints indices) {
  return Floats{table[indices[0]], table[indices[1]], table[indices[2]], table[indices[3]]};
}
inline Floats look_up(const float* table, const uint8_t* indices) {
  return Floats{table[indices[0]], table[indices[1]], table[indices[2]], table[indices[3]]};
}
inline Ints look_up(const int32_t* table, Ints indices) {
  return Ints{table[indices[0]], table[indices[1]], table[indices[2]], table[indices[3]]};
}

// Lane i is x[lanes[i]].
inline Floats pick_lanes(Floats x, Ints lanes) {
  return Floats{x[lanes[0]], x[lanes[1]], x[lanes[2]], x[lanes[3]]};
}

inline float sum(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// Nothing is streamed here (ScaledLevels in nibbles.h).
inline void fence_streams() {}

template <typename Value>
Floats load(const Value* x) {
  return Floats{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}

template <>
inline Floats load(const float* x) {
  Floats lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

template <typename Value>
void store(Value* y, Floats x) {
  for (int i = 0; i < kLanes; ++i) y[i] = from_float<Value>(x[i]);
}

template <>
inline void store(float* y, Floats x) {
  std::memcpy(y, &x, sizeof x);
}

// Integers below 256 become bytes.
inline void store(uint8_t* y, Ints x) {
  for (int i = 0; i < kLanes; ++i) y[i] = static_cast<uint8_t>(x[i]);
}

}  // namespace qlora
