// What this processor can run. Of the libraries, only the one for the baseline is asked.

#include "../kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora {
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers features(unsigned leaf, unsigned subleaf) {
  Registers found;
  __get_cpuid_count(leaf, subleaf, &found.eax, &found.ebx, &found.ecx, &found.edx);
  return found;
}

bool has_bits(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

// Extended control register 0: the registers that the operating system saves for each thread.
uint64_t saved_registers() {
  uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

int best_isa() {
  // Bits as in Intel's manual, volume 2A, CPUID.
  const Registers one = features(1, 0), seven = features(7, 0), seven1 = features(7, 1);
  if (!has_bits(one.ecx, 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29)) {  // FMA OSXSAVE AVX F16C
    return kBaseline;
  }
  const uint64_t saved = saved_registers();
  if (!has_bits(saved, 0x6) || !has_bits(seven.ebx, 1u << 5)) return kBaseline;  // ymm; AVX2
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;             // F DQ BW VL
  if (!has_bits(saved, 0xe6) || !has_bits(seven.ebx, avx512)) return kAvx2;      // zmm and masks
  const bool has_vbmi = has_bits(seven.ecx, 1u << 1), has_bf16 = has_bits(seven1.eax, 1u << 5);
  if (!has_vbmi || !has_bf16) return kAvx512;
  const bool has_tiles = has_bits(seven.edx, 1u << 22 | 1u << 24);  // BF16 TILE
  if (!has_bits(saved, 0x600e6) || !has_tiles || !may_use_tiles()) return kAvx512Bf16;
  return kAmx;
}

}  // namespace qlora

#else

int qlora::best_isa() { return kBaseline; }

#endif
