// What the tensor-core kernels ask of the hardware in words of its own: matrix products of a warp,
// loads of their operands, and copies into shared memory that run beside the computation.
//
// Lane 4 g + t of a warp holds, of the matrices of one product, as pairs of 16-bit numbers with the
// lower index in the lower half:
//   a (16, 16)  a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8)
//   b (16, 8)   b[0] (2t, g), b[1] (2t + 8, g): here the pair runs along the rows
//   d (16, 8)   float: d[0] and d[1] (g, 2t) and (g, 2t + 1), d[2] and d[3] (g + 8, ...)
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16".

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qlora {

// d += a b, summed in float.
template <typename Narrow>
__device__ inline void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]);

template <>
__device__ inline void multiply_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void multiply_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An address as the instructions for shared memory take it.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four matrices (8, 8) of 16-bit numbers from shared memory: lane 8 i + j names row j of matrix i,
// 16 bytes at a multiple of 16. Lane 4 g + t gets elements (g, 2t) and (g, 2t + 1) of matrix i in
// matrices[i].
__device__ inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed: lane 4 g + t gets elements (2t, g) and (2t + 1, g).
__device__ inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts to copy 16 bytes from global to shared memory, both at multiples of 16. Where valid is
// false nothing is read and zeros are written.
__device__ inline void start_copy_16(void* shared, const void* global, bool valid) {
  const int bytes_read = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes_read)
               : "memory");
}

// Makes one group of the copies that this thread has started since the last group.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than the newest kPending groups of this thread are under way. What other
// threads copied is there after a __syncthreads.
template <int kPending>
__device__ inline void wait_for_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace qlora
