// Memory that a thread keeps from one call to the next: fresh memory costs a page fault every 4
// KiB.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace qlora {

constexpr int64_t kCacheLine = 64;

// How far the memory that a thread writes lies from what others write. A processor that sees
// regular steps through memory asks for what the next ones would touch: behind the end of one
// thread's memory that takes lines out of the cache of the thread that works on them. On AMD EPYC
// with caches far from each other (different core complexes) products took up to 1.4 times as long
// without a gap, and 1.2 times with 64 KiB. The memory between is never used.
inline int64_t bytes_between(int threads) { return threads == 1 ? 0 : int64_t{512} << 10; }

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A buffer that grows and is freed with its thread. What it held is lost when it grows.
class Scratch {
 public:
  // At least `bytes`, aligned to a cache line; null if there is no memory.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      const int64_t rounded = round_up(bytes, kCacheLine);
      memory_.reset(static_cast<char*>(std::aligned_alloc(kCacheLine, rounded)));
      size_ = memory_ == nullptr ? 0 : rounded;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace qlora
