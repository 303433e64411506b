// Large results are bound by memory, not by arithmetic: how their pages come into being, and how
// they are written.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace qlora {

// Results of fewer bytes are left to the caches and to the allocator, which hands out used pages.
constexpr int64_t kLargeOutput = int64_t{4} << 20;

// How many bytes of a large result are written into the caches; the others are streamed past them,
// and leave them there: a processor writes faster into its caches than to memory. One thread alone
// waits for each line that a cache reads before it is written, and streams faster; several fill
// what many processors have as their last cache. What a processor reports of its caches does not
// help: some virtual machines make ten times as much of it.
constexpr int64_t cached_output(int threads) { return int64_t{threads == 1 ? 8 : 32} << 20; }

// Whether a large result lies in memory that was never touched: each of its pages is then made by
// a page fault, which costs more than what is computed. Asks for huge pages there: 512 times
// fewer faults.
inline bool prepare_fresh([[maybe_unused]] void* y, int64_t bytes) {
  if (bytes < kLargeOutput) return false;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(y) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(y) + static_cast<uintptr_t>(bytes)) / page * page;
  const auto middle = begin + (end - begin) / page / 2 * page;
  unsigned char is_resident = 1;
  if (mincore(reinterpret_cast<void*>(middle), page, &is_resident) != 0) return false;
  if (is_resident & 1) return false;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: it may fail
  return true;
#else
  return false;
#endif
}

}  // namespace qlora
