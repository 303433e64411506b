// Tries the quotient of csrc/cuda/rounded.cuh, the same float operations: are there a and b from 1
// to 2 whose quotient is not the nearest float, if the approximate reciprocal is off by up to one
// unit in the last place?
//
// Where the refined reciprocal is the nearest float, the quotient is (Markstein). So every b is
// tried with each reciprocal, and every a with those b where the refined one is not. Prints the
// bits of each a and b that go wrong, and by how much the reciprocal was off.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr uint32_t kOne = 0x3f800000, kTwo = 0x40000000;

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float refine(float b, float start) { return std::fma(start, std::fma(-b, start, 1.0f), start); }

float divide(float a, float b, float reciprocal) {
  const float near = a * reciprocal;
  return std::fma(std::fma(-b, near, a), reciprocal, near);
}

}  // namespace

int main() {
  for (int off = -1; off <= 1; ++off) {
    for (uint32_t b = kOne; b < kTwo; ++b) {
      const float divisor = float_of(b), exact = 1.0f / divisor;
      const float reciprocal = refine(divisor, float_of(bits_of(exact) + off));
      if (reciprocal == exact) continue;
      for (uint32_t a = kOne; a < kTwo; ++a) {
        const float value = float_of(a);
        if (divide(value, divisor, reciprocal) != value / divisor) {
          std::printf("%08x %08x %d\n", a, b, off);
        }
      }
    }
  }
}
