// Vectors of floats under one set of names, for whatever instruction set this file is compiled for.
//
//   Floats, Ints       kLanes floats, or as many 32-bit integers; + - * / work on Floats
//   load, store        kLanes values of float, Bfloat16 or Float16, widened exactly, rounded once;
//                      store also integers, as bytes
//   look_up            what a table has at kLanes indices
//   load_first,        the first `count` of them (0 to kLanes); what lies behind is not touched,
//   store_first        and is read as 0
//   for_each_vector    a loop over an array: load and store take All or First from it
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

// For how long something that is asked for ahead of its use may stay in the caches. In the
// second-level cache: the first one keeps track of fewer requests at a time than it takes to read
// at full speed. Once: it takes no other's place in the larger caches.
constexpr int kInSecondLevel = 2, kOnce = 0;

// Asks for a cache line, which need not exist.
template <int kStay = kInSecondLevel>
inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, kStay);
  asm volatile("");  // gcc drops calls of functions that do nothing but prefetch
}

// The same for `bytes` bytes, which begin `ahead` bytes behind an address.
template <int kStay = kInSecondLevel>
inline void prefetch_bytes(const void* address, int64_t bytes, uintptr_t ahead = 0) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) + ahead;
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    prefetch<kStay>(reinterpret_cast<const void*>(first + byte));
  }
}

// Keeps x in a register, where a compiler would load it anew for each use: there are fewer loads a
// cycle than multiplications.
template <typename Vector>
inline Vector in_register(Vector x) {
#if defined(__AVX2__)
  asm("" : "+v"(x));
#endif
  return x;
}

#if !defined(__AVX2__)

// Lane i is the largest of x[i].
inline Ints largest_of_each(const Ints* x) {
  int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = largest(x[i]);
  Ints each;
  std::memcpy(&each, lanes, sizeof each);
  return each;
}

#endif

template <typename Value>
auto load_first(const Value* x, int count) {
  Value lanes[kLanes] = {};
  std::memcpy(lanes, x, count * sizeof(Value));
  return load(lanes);
}

template <typename Value, typename Vector>
void store_first(Value* y, Vector x, int count) {
  Value lanes[kLanes];
  store(lanes, x);
  std::memcpy(y, lanes, count * sizeof(Value));
}

// Which lanes of a vector stand for elements of an array: all, or the first ones at its end.
struct All {};
struct First {
  int count;
};

template <typename Value>
auto load(const Value* x, All) {
  return load(x);
}
template <typename Value>
auto load(const Value* x, First part) {
  return load_first(x, part.count);
}

inline Floats look_up(const float* table, const uint8_t* indices, All) {
  return look_up(table, indices);
}
inline Floats look_up(const float* table, const uint8_t* indices, First part) {
  uint8_t lanes[kLanes] = {};
  std::memcpy(lanes, indices, part.count);
  return look_up(table, lanes);
}

template <typename Value, typename Vector>
void store(Value* y, Vector x, All) {
  store(y, x);
}
template <typename Value, typename Vector>
void store(Value* y, Vector x, First part) {
  store_first(y, x, part.count);
}

#if defined(__AVX2__)
constexpr bool kRoundsInPlace = true;

// Two numbers in bfloat16, in the lower and the upper half of each lane.
inline Floats pair_in_bfloat16(Floats lower, Floats upper) {
  const Ints shifted = shift_right(round_in_place_to_bfloat16(lower), 16);
  return float_of(add(shifted, bit_and(round_in_place_to_bfloat16(upper), broadcast(-65536))));
}
#else
constexpr bool kRoundsInPlace = false;
Floats pair_in_bfloat16(Floats lower, Floats upper);
#endif

// Calls function(i, part) for the elements i, i + 1, ... of each vector of an array.
template <typename Function>
void for_each_vector(int64_t count, Function function) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) function(i, All{});
  if (i < count) function(i, First{static_cast<int>(count - i)});
}

}  // namespace qlora
