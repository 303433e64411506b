// The part of gcc's OpenMP runtime that the kernels call, on std::thread. The thread sanitizer sees
// how these threads start, wait for one another and end; into libgomp it does not see, and would
// take what libgomp keeps apart for races. Linked in its place, never beside it.
//
// Barriers order what lies before them before what lies behind, as OpenMP says. Taking the next
// part of a dynamic loop orders nothing, so that a race between two parts stays visible.

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int kMaxLoops = 64;  // dynamic ones, in one parallel region

struct Team {
  int size;
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0, barriers = 0;
  std::atomic<long> taken[kMaxLoops] = {};  // parts of each dynamic loop

  explicit Team(int size) : size(size) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const int barrier = barriers;
    if (++waiting == size) {
      waiting = 0;
      ++barriers;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return barriers != barrier; });
    }
  }
};

struct Loop {
  long start, end, step, part;
};

// Where a thread is.
struct Place {
  Team* team = nullptr;
  int number = 0;
  int loops = 0;  // dynamic ones that it has begun in this region
  Loop loop = {};
};

thread_local Place place;

}  // namespace

extern "C" {

int omp_get_thread_num() { return place.number; }

int omp_get_num_threads() { return place.team == nullptr ? 1 : place.team->size; }

void GOMP_barrier() { place.team->wait(); }

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  if (threads == 0) std::abort();  // the kernels always say how many
  Team team(static_cast<int>(threads));
  const auto run = [&](int number) {
    const Place before = place;
    place = Place{&team, number};
    function(data);
    place = before;
  };
  std::vector<std::thread> others;
  for (int number = 1; number < team.size; ++number) others.emplace_back(run, number);
  run(0);
  for (auto& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* start, long* end) {
  const Loop& loop = place.loop;
  const long part = place.team->taken[place.loops - 1].fetch_add(1, std::memory_order_relaxed);
  *start = loop.start + part * loop.part * loop.step;
  *end = *start + loop.part * loop.step;
  const bool is_upward = loop.step > 0;
  if (is_upward ? *start >= loop.end : *start <= loop.end) return false;
  if (is_upward ? *end > loop.end : *end < loop.end) *end = loop.end;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long part, long* start,
                                          long* end) {
  if (place.loops++ == kMaxLoops) std::abort();
  place.loop = {first, last, step, part};
  return GOMP_loop_nonmonotonic_dynamic_next(start, end);
}

void GOMP_loop_end() { place.team->wait(); }

void GOMP_loop_end_nowait() {}

}  // extern "C"
