// Calls one function of a compiled library without Python or torch:
//
//   call_kernels LIBRARY FUNCTION ARGUMENTS RESULTS CALLERS own|shared
//
// ARGUMENTS is a file of the function's arguments in its order: integers as int64_t, numbers as
// double, an array as its number of bytes (int64_t, -1 for null) and the bytes, an array of
// pointers as their number (int64_t, -1 for null) and that many arrays. RESULTS becomes the
// returned status (int64_t) and all arrays as they are afterwards. tests/native_program.py writes
// the one and reads the other. So the kernels run where Python cannot: emulated, counted by
// valgrind, under the thread sanitizer.
//
// Any access outside an array ends the program, whatever instruction makes it: each array of the
// first caller ends at a page that may not be touched, each array of the second begins behind one,
// and so on in turn. Arrays that a function promises to read only lie in read-only pages.
//
// The CALLERS call at the same time, each with arrays of its own, and must get the same results.
// `shared` gives them one set of arrays: a race, to see whether the thread sanitizer reports it.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../csrc/kernels.h"

namespace qlora {
namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "call_kernels: %s\n", what.c_str());
  std::exit(2);
}

// Bytes in pages of their own, between two pages that may not be touched.
class GuardedArray {
 public:
  GuardedArray(const char* bytes, int64_t size, bool is_read_only, bool is_at_end) : size_(size) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inside = (size + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    memory_ = static_cast<char*>(memory);
    char* first = memory_ + page;
    data_ = is_at_end ? first + inside - size : first;
    if (size == 0) return;  // its address is that of a guard
    allow(first, inside, PROT_READ | PROT_WRITE);
    std::memcpy(data_, bytes, size);
    if (is_read_only) allow(first, inside, PROT_READ);
  }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;
  ~GuardedArray() { munmap(memory_, mapped_); }

  char* data() const { return data_; }
  std::string bytes() const { return std::string(data_, size_); }

 private:
  static void allow(char* pages, int64_t size, int access) {
    if (mprotect(pages, size, access) != 0) fail("mprotect failed");
  }

  int64_t size_, mapped_;
  char *memory_, *data_;
};

// Takes one argument after the other from a file's text and keeps the arrays among them.
class Arguments {
 public:
  Arguments(const std::string& text, bool is_at_end)
      : next_(text.data()), end_(next_ + text.size()), is_at_end_(is_at_end) {}

  template <typename Parameter>
  Parameter take() {
    using Target = std::remove_pointer_t<Parameter>;
    if constexpr (std::is_pointer_v<Target>) {
      constexpr bool is_read_only = std::is_const_v<std::remove_pointer_t<Target>>;
      return static_cast<Parameter>(take_pointers(is_read_only));
    } else if constexpr (std::is_pointer_v<Parameter>) {
      return static_cast<Parameter>(take_array(std::is_const_v<Target>));
    } else if constexpr (std::is_floating_point_v<Parameter>) {
      return take_number<double>();
    } else {
      return static_cast<Parameter>(take_number<int64_t>());
    }
  }

  std::string arrays() const {
    std::string all;
    for (const auto& array : arrays_) all += array->bytes();
    return all;
  }

 private:
  template <typename Number>
  Number take_number() {
    Number number;
    std::memcpy(&number, skip(sizeof number), sizeof number);
    return number;
  }

  void* take_array(bool is_read_only) {
    const int64_t size = take_number<int64_t>();
    if (size < 0) return nullptr;
    const char* bytes = skip(size);
    arrays_.push_back(std::make_unique<GuardedArray>(bytes, size, is_read_only, is_at_end_));
    return arrays_.back()->data();
  }

  void* take_pointers(bool is_read_only) {
    const int64_t count = take_number<int64_t>();
    if (count < 0) return nullptr;
    std::vector<void*> pointers;
    for (int64_t i = 0; i < count; ++i) pointers.push_back(take_array(is_read_only));
    const auto* bytes = reinterpret_cast<const char*>(pointers.data());
    const auto size = static_cast<int64_t>(count * sizeof(void*));
    pointers_.push_back(std::make_unique<GuardedArray>(bytes, size, true, is_at_end_));
    return pointers_.back()->data();
  }

  const char* skip(int64_t size) {
    if (end_ - next_ < size) fail("the file of arguments is too short");
    const char* start = next_;
    next_ += size;
    return start;
  }

  const char *next_, *end_;
  bool is_at_end_;
  std::vector<std::unique_ptr<GuardedArray>> arrays_, pointers_;
};

struct Request {
  std::string arguments;  // the text of the file
  int callers;
  bool is_shared;
};

// The text of the file of results.
template <typename... Parameters>
std::string call(int (*function)(Parameters...), const Request& request) {
  using Values = std::tuple<Parameters...>;
  std::vector<std::unique_ptr<Arguments>> arguments;
  std::vector<Values> values;
  for (int i = 0; i < request.callers; ++i) {
    if (i > 0 && request.is_shared) {
      values.push_back(values[0]);
      continue;
    }
    arguments.push_back(std::make_unique<Arguments>(request.arguments, i % 2 == 0));
    values.push_back(Values{arguments[i]->template take<Parameters>()...});  // left to right
  }
  std::vector<int64_t> statuses(request.callers);
  std::vector<std::thread> threads;
  for (int i = 0; i < request.callers; ++i) {
    threads.emplace_back([&, i] { statuses[i] = std::apply(function, values[i]); });
  }
  for (auto& thread : threads) thread.join();

  const std::string results = arguments[0]->arrays();
  for (size_t i = 1; i < arguments.size(); ++i) {
    if (statuses[i] != statuses[0] || arguments[i]->arrays() != results) fail("the callers differ");
  }
  return std::string(reinterpret_cast<const char*>(statuses.data()), sizeof(int64_t)) + results;
}

class Library {
 public:
  explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW)) {
    if (handle_ == nullptr) fail(dlerror());
  }

  // `Function` is the pointer's type, as kernels.h declares it.
  template <typename Function>
  Function find(const std::string& name) const {
    void* function = dlsym(handle_, name.c_str());
    if (function == nullptr) fail(dlerror());
    return reinterpret_cast<Function>(function);
  }

 private:
  void* handle_;
};

std::string call(const Library& library, const std::string& name, const Request& request) {
  if (name == "quantize_4bit") return call(library.find<decltype(&quantize_4bit)>(name), request);
  if (name == "dequantize_4bit") {
    return call(library.find<decltype(&dequantize_4bit)>(name), request);
  }
  if (name == "quantize_8bit") return call(library.find<decltype(&quantize_8bit)>(name), request);
  if (name == "dequantize_8bit") {
    return call(library.find<decltype(&dequantize_8bit)>(name), request);
  }
  if (name == "matmul_4bit") return call(library.find<decltype(&matmul_4bit)>(name), request);
  if (name == "adamw_step") return call(library.find<decltype(&adamw_step)>(name), request);
  fail("no such function");
}

}  // namespace
}  // namespace qlora

int main(int count, char** words) {
  using namespace qlora;
  if (count != 7) fail("expected LIBRARY FUNCTION ARGUMENTS RESULTS CALLERS own|shared");
  const Library library(words[1]);
  library.find<decltype(&best_isa)>("best_isa")();  // asks for the right to use AMX's tiles
  std::ifstream in(words[3], std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const bool is_shared = std::strcmp(words[6], "shared") == 0;
  const std::string results = call(library, words[2], {text, std::atoi(words[5]), is_shared});
  std::ofstream(words[4], std::ios::binary) << results;
  return 0;
}
