// Vectors of floats under one set of names, for whatever instruction set this file is compiled for.
//
//   Floats, Ints       kLanes floats, or as many 32-bit integers; + - * / work on Floats
//   load, store        kLanes values of float, Bfloat16 or Float16, widened exactly, rounded once
//   load_first,        the first `count` of them (0 to kLanes); what lies behind is not touched,
//   store_first        and is read as 0
//
// All of these give the same bits as float_formats.h, on every instruction set.

#pragma once

#include "float_formats.h"

#if defined(__AVX512BW__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace qlora {

// Keeps x in a register, where a compiler would load it anew for each use: there are fewer loads a
// cycle than multiplications.
template <typename Vector>
inline Vector in_register(Vector x) {
#if defined(__AVX2__)
  asm("" : "+v"(x));
#endif
  return x;
}

template <typename Value>
Floats load_first(const Value* x, int count) {
  Value lanes[kLanes] = {};
  std::memcpy(lanes, x, count * sizeof(Value));
  return load(lanes);
}

template <typename Value>
void store_first(Value* y, Floats x, int count) {
  Value lanes[kLanes];
  store(lanes, x);
  std::memcpy(y, lanes, count * sizeof(Value));
}

}  // namespace qlora
