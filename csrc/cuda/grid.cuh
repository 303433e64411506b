// How many threads work on values that stand in a row: each goes on until none is left.

#pragma once

#include <cstdint>

namespace qlora {

// The threads of a thread block.
constexpr int kThreads = 256;

// Thread blocks of a launch: enough to fill any GPU of today. Each prepares its tables once.
constexpr int64_t kMostThreadBlocks = 1024;

// Thread blocks for so many threads, more than none.
inline int thread_blocks(int64_t threads) {
  const int64_t needed = (threads - 1) / kThreads + 1;
  return static_cast<int>(needed < kMostThreadBlocks ? needed : kMostThreadBlocks);
}

}  // namespace qlora
