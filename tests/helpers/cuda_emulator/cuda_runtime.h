// Runs CUDA kernels on the CPU, so that their tests need no GPU: stands in for the header of that name, with as much
// of it as csrc/cuda uses. Blocks run one after another; the threads of a block are coroutines that switch at barriers
// and shuffles. It is stricter than a GPU:
//   a barrier must be reached by all threads of the block, a shuffle by all threads of the warp, at the same place;
//   shared memory starts as NaN in every block;
//   a warp runs as far as it can before the next one starts, and emulator::order says which goes first: what depends
//   on the order in which threads happen to run gives different bits for different orders.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
// Every kernel's shared memory is one section, whose start and end the linker knows.
#define __shared__ static __attribute__((section("emulated_shared")))
extern char __start_emulated_shared[];
extern char __stop_emulated_shared[];

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr int warp = 32;
constexpr size_t stack_bytes = 64 * 1024;

enum class Order { forward, backward };

inline Order order = Order::forward;

// Where a thread has stopped.
enum class Wait { none, shuffle, barrier, finished };

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  Wait wait = Wait::none;
  int line = 0;
  unsigned shuffles = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

inline std::vector<Thread> block;
inline ucontext_t scheduler;
inline unsigned current;
inline void (*body)(void*);
inline void* argument;
inline dim3 block_index;
// What each thread gave to its last two shuffles: a thread can be one shuffle ahead of another, not two.
inline std::vector<uint64_t> offered[2];

#if defined(__SANITIZE_ADDRESS__)
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
#endif

inline void stop(Wait wait, int line) {
  Thread& thread = block[current];
  thread.wait = wait;
  thread.line = line;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(wait == Wait::finished ? nullptr : &thread.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  swapcontext(&thread.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  body(argument);
  stop(Wait::finished, 0);
}

inline void resume(unsigned index) {
  current = index;
  Thread& thread = block[index];
  thread.wait = Wait::none;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack.data(), thread.stack.size());
#endif
  swapcontext(&scheduler, &thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// What all of these threads wait for; an error if they differ or wait at different lines.
inline Wait agreed(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) {
    if (block[i].wait != block[begin].wait || block[i].line != block[begin].line) {
      throw std::logic_error("threads " + std::to_string(begin) + " and " + std::to_string(i) +
                             " of a block do not meet: one stopped in line " + std::to_string(block[begin].line) +
                             ", the other in line " + std::to_string(block[i].line) + " (0: at the end)");
    }
  }
  return block[begin].wait;
}

inline unsigned at(unsigned i, unsigned count) { return order == Order::forward ? i : count - 1 - i; }

inline void run_block() {
  const unsigned threads = unsigned(block.size());
  std::memset(__start_emulated_shared, 0xff, size_t(__stop_emulated_shared - __start_emulated_shared));
  for (Thread& thread : block) {
    getcontext(&thread.context);
    thread.stack.resize(stack_bytes);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    thread.shuffles = 0;
#if defined(__SANITIZE_ADDRESS__)
    // The last thread on this stack was left in the middle of a call.
    ASAN_UNPOISON_MEMORY_REGION(thread.stack.data(), thread.stack.size());
#endif
    makecontext(&thread.context, run_thread, 0);
  }
  do {
    for (unsigned w = 0; w < threads / warp; ++w) {
      const unsigned begin = at(w, threads / warp) * warp;
      do {
        for (unsigned lane = 0; lane < warp; ++lane) resume(begin + at(lane, warp));
      } while (agreed(begin, begin + warp) == Wait::shuffle);
    }
  } while (agreed(0, threads) == Wait::barrier);
}

inline void launch(const dim3& grid, const dim3& size, void (*kernel)(void*), void* args) {
  if (size.x % warp != 0 || size.y != 1 || size.z != 1) throw std::logic_error("a block must be whole warps, in x");
  body = kernel;
  argument = args;
  block.resize(size.x);
  for (auto& values : offered) values.resize(size.x);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = dim3(at(x, grid.x), at(y, grid.y), 0);
      run_block();
    }
  }
}

template <class T>
T shuffle_xor(unsigned mask, T value, int offset, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  // Threads that a shuffle leaves out are not emulated: such a one meets no other.
  if (mask != 0xffffffffu) line = -int(current);
  auto& values = offered[block[current].shuffles++ % 2];
  std::memcpy(&values[current], &value, sizeof(T));
  stop(Wait::shuffle, line);
  std::memcpy(&value, &values[current ^ unsigned(offset)], sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx dim3(emulator::current, 0, 0)
#define blockIdx emulator::block_index
#define __syncthreads() emulator::stop(emulator::Wait::barrier, __LINE__)
#define __shfl_xor_sync(mask, value, offset) emulator::shuffle_xor(mask, value, offset, __LINE__)

template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  struct Call {
    void (*kernel)(Args);
    const Args& args;
  } call = {kernel, args};
  emulator::launch(config->gridDim, config->blockDim,
                   [](void* call) { static_cast<Call*>(call)->kernel(static_cast<Call*>(call)->args); }, &call);
  return cudaSuccess;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int64_t __double_as_longlong(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

inline double __longlong_as_double(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
