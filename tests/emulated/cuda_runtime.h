// What the kernels of csrc need of CUDA, on a CPU: `g++ -x c++ -I tests/emulated` compiles the very same files.
//
// Every thread of a block has a stack of its own and runs until it meets the others, in __syncthreads or in a shuffle
// of its warp; then the next one runs, in an order that can be chosen: kernels that are right do not depend on it.
// Blocks run one after the other. A meeting that some thread never comes to is an error of the launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

// Threads that wait for each other.
struct Meeting {
  int expected = 0, arrived = 0;
  long rounds = 0;
};

struct Fiber {
  std::vector<char> stack = std::vector<char>(kStack);
  ucontext_t first;
  jmp_buf state;
  bool started, done;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<float> exchanged;
  Meeting all;
  std::function<void()> kernel;
  jmp_buf scheduler;
  int running = 0;
  bool progress = false;
};

inline Block block;
inline int order = 1;  // or -1, the last thread first

}  // namespace emulated

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

inline void begin() {
  block.kernel();
  block.fibers[block.running].done = block.progress = true;
  longjmp(block.scheduler, 1);
}

// (swapcontext alone would do, but asks the operating system each time)
inline void resume(int i) {
  block.running = i;
  threadIdx = dim3(i);
  Fiber& fiber = block.fibers[i];
  if (setjmp(block.scheduler)) return;
  if (fiber.started) longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

inline void meet(Meeting& meeting) {
  const int mine = block.running;
  const long round = meeting.rounds;
  block.progress = true;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.rounds;
    return;
  }
  while (meeting.rounds == round)
    if (!setjmp(block.fibers[mine].state)) longjmp(block.scheduler, 1);
}

inline void prepare(int threads) {
  block.fibers.resize(threads);
  block.exchanged.resize(threads);
  block.all = {threads};
  block.warps.assign((threads + kWarp - 1) / kWarp, {kWarp});
  for (Fiber& fiber : block.fibers) {
    fiber.started = fiber.done = false;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.data();
    fiber.first.uc_stack.ss_size = kStack;
    makecontext(&fiber.first, begin, 0);
  }
}

// Whether all threads of a block came to their ends.
inline bool run_block(int threads) {
  prepare(threads);
  do {
    block.progress = false;
    for (int n = 0; n < threads; ++n) {
      const int i = order > 0 ? n : threads - 1 - n;
      if (!block.fibers[i].done) resume(i);
    }
  } while (block.progress);
  for (const Fiber& fiber : block.fibers)
    if (!fiber.done) return false;
  return true;
}

// As far from the exact result as CUDA's guide allows expf and logf: one unit in the last place, up or down.
inline float inexact(double exact) {
  const float x = float(exact);
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return x == 1.0f || x == 0.0f ? x : std::nextafterf(x, (bits * 2654435761u) >> 31 ? INFINITY : -INFINITY);
}

}  // namespace emulated

#ifdef EMULATED_WITHOUT_BARRIERS
inline void __syncthreads() {}
#else
inline void __syncthreads() { emulated::meet(emulated::block.all); }
#endif

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  using namespace emulated;
  const int i = block.running;
  Meeting& warp = block.warps[i / kWarp];
  block.exchanged[i] = x;
  meet(warp);
  const float other = block.exchanged[i ^ mask];
  meet(warp);
  return other;
}

#define expf(x) emulated::inexact(std::exp(double(x)))
#define logf(x) emulated::inexact(std::log(double(x)))

using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <typename... Given>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Given...), Given... given) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulated::block.kernel = [=] { kernel(given...); };
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y);
      if (!emulated::run_block(blockDim.x)) return 719;  // cudaErrorLaunchFailure
    }
  return 0;
}

extern "C" __attribute__((used)) inline void emulated_order(int order) { emulated::order = order; }
