// simd.h for any processor: vectors of 16 bytes as gcc and clang have them in the language, which
// become SSE2 on x86-64 and NEON on aarch64.

#pragma once

namespace qlora {

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

inline Floats broadcast(float x) { return Floats{x, x, x, x}; }
inline Ints broadcast(int32_t x) { return Ints{x, x, x, x}; }

inline Ints bits_of(Floats x) { return reinterpret_cast<Ints>(x); }
inline Floats float_of(Ints bits) { return reinterpret_cast<Floats>(bits); }

// a * b + c; with one rounding only where the processor has an instruction for it.
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

inline Ints shift_right(Ints x, int bits) {
  typedef uint32_t Words __attribute__((vector_size(16)));
  return reinterpret_cast<Ints>(reinterpret_cast<Words>(x) >> bits);
}

// Lane i is x[lanes[i]].
inline Floats pick_lanes(Floats x, Ints lanes) {
  return Floats{x[lanes[0]], x[lanes[1]], x[lanes[2]], x[lanes[3]]};
}

inline float sum(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }

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

}  // namespace qlora
