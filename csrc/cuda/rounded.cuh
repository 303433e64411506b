// Square roots and quotients as IEEE 754 rounds them, without a branch for each. The compiler's own
// ones look at every argument; these are right within a range, which is looked at once for many.

#pragma once

#include "memory.cuh"

namespace qlora {

// 1 / x, to one unit in the last place (PTX ISA); 0 where that is less than 2^-126.
__device__ inline float reciprocal_nearly(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The square root of x from 2^-101 on. By the instructions that sqrtf is compiled to for such x
// (tests/test_static_gpu.py): so it has the bits that NVIDIA vouches for. Of 0, infinity and NaN it
// is NaN.
__device__ inline float root_in_range(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float near = __fmul_rn(x, inverse);
  const float rest = __fmaf_rn(-near, near, x);
  return __fmaf_rn(rest, __fmul_rn(inverse, 0.5f), near);
}

// a / b, where b, 1 / b and the quotient have the full precision of a float, and a / 2^48 too. Of
// a zero b, and of infinities and NaN, it is NaN.
//
// The remainder of a quotient that is off by less than 1.5 units is exact. Corrected by it, the
// quotient is the nearest one if the reciprocal was (Markstein, "Computation of elementary
// functions on the IBM RISC System/6000 processor", 1990). For all b but a few the reciprocal is,
// after one step from any that is off by one unit; of those few only two have an a whose quotient
// goes wrong: divides_exactly knows them. tests/test_rounded.py tries all b.
__device__ inline float quotient_in_range(float a, float b) {
  const float start = reciprocal_nearly(b);
  const float reciprocal = __fmaf_rn(start, __fmaf_rn(-b, start, 1.0f), start);
  const float near = __fmul_rn(a, reciprocal);
  return __fmaf_rn(__fmaf_rn(-b, near, a), reciprocal, near);
}

// Whether this GPU's approximate reciprocals serve quotient_in_range.
__device__ inline bool divides_exactly() {
  return reciprocal_nearly(0x1.fffffep0f) == 0x1.000002p-1f &&
         reciprocal_nearly(0x1.fffffap0f) <= 0x1.000004p-1f;
}

}  // namespace qlora
