// A host emulation of the CUDA thread grid, for running device code in tests without a GPU.
//
// Headers of the same names as CUDA's (folder `emulation`) include this one, so that device code
// and launchers compile unchanged with g++ -std=c++20. What it is for: finding wrong indices, wrong
// masks, missing barriers and results that depend on the order of threads. What it is not: fast, or
// a model of the memory of a GPU.
//
// Blocks run one after another. The threads of a block are fibers; each runs until it waits for
// others (__syncthreads, __syncwarp, shuffles, votes), then the next one gets its turn. The order
// of blocks and threads is ascending, or, after `cuda_emulation::shuffle(seed)` with a seed other
// than 0, random but reproducible, and then threads may also be suspended at each atomic operation.
// Code in which one block waits for another would hang on a GPU sooner or later and hangs here.
//
// A misuse ends the process with a sentence: a barrier that some threads do not reach, a shuffle
// with a wrong mask or from a lane that takes no part, a launch that no GPU would accept. Device
// memory is host memory, so that -fsanitize=address,undefined sees every access out of bounds and
// every misaligned vector. Dynamic shared memory is exactly as large as asked for, and filled with
// 0xff (NaN, -1) before each block; static shared memory keeps what the block before left there.
//
// Kernels start by cudaLaunchKernelEx (the <<< >>> notation needs nvcc). Dynamic shared memory is
// `cuda_emulation::dynamic_shared`; device code gets it, and CUDA's, by one function in
// kernels/common/cuda_device.h. Streams and events are accepted and ignored.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define ED_CUDA_EMULATION 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline  // compiles in half the time, and nothing here is fast
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// ---- vector types -------------------------------------------------------------------------------

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 u) : x(u.x), y(u.y), z(u.z) {}
};
#define ED_VECTOR_TYPES(scalar, name)                                                         \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                                \
  struct name##3 { scalar x, y, z; };                                                         \
  struct alignas(sizeof(scalar) == 8 ? 16 : 4 * sizeof(scalar)) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                        \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }           \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
#define uint3 ed_uint3  // declared above, because dim3 needs it
ED_VECTOR_TYPES(int, int)
ED_VECTOR_TYPES(unsigned, uint)
ED_VECTOR_TYPES(float, float)
ED_VECTOR_TYPES(double, double)
ED_VECTOR_TYPES(short, short)
ED_VECTOR_TYPES(unsigned short, ushort)
ED_VECTOR_TYPES(long long, longlong)
ED_VECTOR_TYPES(unsigned long long, ulonglong)
#undef uint3
#undef ED_VECTOR_TYPES

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- the grid -----------------------------------------------------------------------------------

namespace cuda_emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u %u %u, thread %u %u %u)\n", what, blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  std::fflush(stderr);
  std::_Exit(3);
}

enum class Wait { Nothing, Block, Warp };

// What a thread brings to a warp operation, and what it takes home.
struct Exchange {
  int operation = 0;        // all lanes of a mask must be in the same operation
  unsigned mask = 0;        // lanes that take part
  int source = 0;           // shuffles: lane (within the warp) to read from
  bool predicate = false;   // votes
  uint64_t value[2] = {};   // what this lane offers
  uint64_t result[2] = {};  // what it gets
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
  Wait wait = Wait::Nothing;
  int predicate = 0;  // of __syncthreads_count and its kin
  Exchange exchange;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

inline constexpr size_t stack_bytes = 128 * 1024;

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::array<unsigned, 32> waiting = {};  // a bit for each lane of a warp that waits for others
  unsigned threads = 0;  // of a block
  unsigned current = 0;
  int block_count = 0;  // result of __syncthreads_count
  uint64_t seed = 0;
  std::mt19937_64 random;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
};
inline Machine machine;

inline std::unique_ptr<unsigned char[]> dynamic_shared_storage;
inline unsigned char* dynamic_shared = nullptr;

// 0 restores the ascending order.
inline void shuffle(uint64_t seed) {
  machine.seed = seed;
  machine.random.seed(seed);
}

inline Fiber& me() { return *machine.fibers[machine.current]; }

inline void yield() {
  Fiber& fiber = me();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void perhaps_yield() {
  if (machine.seed != 0 && machine.random() % 4 == 0) yield();
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  (*machine.body)();
  me().finished = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, machine.scheduler_stack, machine.scheduler_stack_bytes);
#endif
  setcontext(&machine.scheduler);
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
  fiber.finished = false;
  fiber.wait = Wait::Nothing;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
#if defined(__SANITIZE_ADDRESS__)
  fiber.fake_stack = nullptr;
#endif
}

inline void resume(unsigned thread) {
  machine.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
               thread / (blockDim.x * blockDim.y)};
  Fiber& fiber = me();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack.get(), stack_bytes);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Lets all threads pass that wait for the block, if none of those still running does not.
inline bool release_block() {
  int waiting = 0, count = 0;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.finished) continue;
    if (fiber.wait != Wait::Block) return false;
    ++waiting;
    count += fiber.predicate != 0;
  }
  if (waiting == 0) return false;
  machine.block_count = count;
  for (unsigned i = 0; i < machine.threads; ++i) machine.fibers[i]->wait = Wait::Nothing;
  return true;
}

// Order of `count` things: ascending, or random with a seed.
inline std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.seed != 0) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

inline void run_block() {
  for (unsigned i = 0; i < machine.threads; ++i) prepare(*machine.fibers[i]);
  machine.waiting = {};
  std::vector<unsigned> order = order_of(machine.threads);
  while (true) {
    bool progress = false;
    if (machine.seed != 0) std::shuffle(order.begin(), order.end(), machine.random);
    for (const unsigned i : order) {
      const Fiber& fiber = *machine.fibers[i];
      if (fiber.finished || fiber.wait != Wait::Nothing) continue;
      resume(i);
      progress = true;
    }
    if (release_block() || progress) continue;
    for (unsigned i = 0; i < machine.threads; ++i)
      if (!machine.fibers[i]->finished)
        fail("deadlock: some threads wait at a barrier, or with a mask, that others never reach");
    return;
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  if (machine.body != nullptr) fail("a kernel cannot launch a kernel");
  machine.body = &body;
  machine.threads = block.x * block.y * block.z;
  while (machine.fibers.size() < machine.threads)
    machine.fibers.push_back(std::make_unique<Fiber>());
  gridDim = grid;
  blockDim = block;
  dynamic_shared_storage.reset(shared == 0 ? nullptr : new unsigned char[shared]);
  dynamic_shared = dynamic_shared_storage.get();
  for (const unsigned i : order_of(grid.x * grid.y * grid.z)) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    if (shared != 0) std::memset(dynamic_shared, 0xff, shared);
    run_block();
  }
  dynamic_shared_storage.reset();
  dynamic_shared = nullptr;
  machine.body = nullptr;
}

// ---- operations of a warp -----------------------------------------------------------------------

inline unsigned warp_begin() { return machine.current / 32 * 32; }
inline unsigned lane() { return machine.current % 32; }

enum Operation { Barrier = 1, Shuffle, Vote, Match, Reduce };

// Lanes of the caller's warp that exist: the last warp of a block may be smaller.
inline unsigned existing_lanes() {
  const unsigned count = machine.threads - warp_begin();
  return count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

// The lanes of a mask, if all of them wait in this operation with this mask. Others may still come
// here after they have met those of another mask.
inline bool gathered(unsigned present, unsigned mask, Operation operation, Exchange** lanes) {
  for (unsigned i = 0; i < 32; ++i) {
    if ((present >> i & 1) == 0) continue;
    Exchange& exchange = machine.fibers[warp_begin() + i]->exchange;
    if (exchange.mask != mask) return false;
    if (exchange.operation != operation)
      fail("lanes of one mask meet in different warp operations");
    lanes[i] = &exchange;
  }
  return true;
}

// Waits until all lanes of the mask are in the same operation; the last one to come then calls
// `finish(lanes)`, with null for lanes outside, and wakes the others.
template <class Finish>
Exchange& meet(unsigned mask, Operation operation, Finish finish) {
  Fiber& fiber = me();
  if ((mask >> lane() & 1) == 0) fail("the mask of a warp operation does not name its caller");
  fiber.exchange.mask = mask;
  fiber.exchange.operation = operation;
  fiber.wait = Wait::Warp;
  unsigned& waiting = machine.waiting[machine.current / 32];
  waiting |= 1u << lane();
  const unsigned present = mask & existing_lanes();
  std::array<Exchange*, 32> lanes{};
  if ((waiting & present) != present || !gathered(present, mask, operation, lanes.data())) {
    yield();
    return fiber.exchange;
  }
  finish(lanes);
  waiting &= ~present;
  for (unsigned i = 0; i < 32; ++i)
    if (lanes[i] != nullptr) machine.fibers[warp_begin() + i]->wait = Wait::Nothing;
  perhaps_yield();
  return fiber.exchange;
}

template <class T>
T shuffle_from(unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::memcpy(me().exchange.value, &value, sizeof(T));
  me().exchange.source = source;
  const Exchange& exchange = meet(mask, Shuffle, [](const std::array<Exchange*, 32>& lanes) {
    for (Exchange* lane : lanes) {
      if (lane == nullptr) continue;
      const Exchange* from = lanes[lane->source];
      if (from == nullptr) fail("a shuffle reads from a lane that takes no part in it");
      lane->result[0] = from->value[0];
    }
  });
  T result;
  std::memcpy(&result, exchange.result, sizeof(T));
  return result;
}

inline void check_width(int width) {
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
    fail("the width of a shuffle is not a power of two up to 32");
}

inline unsigned vote(unsigned mask, bool predicate) {
  me().exchange.predicate = predicate;
  return static_cast<unsigned>(
      meet(mask, Vote, [](const std::array<Exchange*, 32>& lanes) {
        uint64_t ballot = 0;
        for (int i = 0; i < 32; ++i)
          if (lanes[i] != nullptr && lanes[i]->predicate) ballot |= uint64_t{1} << i;
        for (Exchange* lane : lanes)
          if (lane != nullptr) lane->result[0] = ballot;
      }).result[0]);
}

// Combines the 32-bit values of the lanes of a mask by an associative function.
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine) {
  me().exchange.value[0] = static_cast<uint32_t>(value);
  const Exchange& exchange = meet(mask, Reduce, [&](const std::array<Exchange*, 32>& lanes) {
    bool first = true;
    T sum{};
    for (Exchange* lane : lanes) {
      if (lane == nullptr) continue;
      const T next = static_cast<T>(lane->value[0]);
      sum = first ? next : combine(sum, next);
      first = false;
    }
    for (Exchange* lane : lanes)
      if (lane != nullptr) lane->result[0] = static_cast<uint32_t>(sum);
  });
  return static_cast<T>(exchange.result[0]);
}

}  // namespace cuda_emulation

inline int ed_wait_for_block(int predicate) {
  cuda_emulation::me().wait = cuda_emulation::Wait::Block;
  cuda_emulation::me().predicate = predicate;
  cuda_emulation::yield();
  return cuda_emulation::machine.block_count;
}
inline void __syncthreads() { ed_wait_for_block(0); }
inline int __syncthreads_count(int predicate) { return ed_wait_for_block(predicate); }
inline int __syncthreads_or(int predicate) { return ed_wait_for_block(predicate) != 0; }
inline int __syncthreads_and(int predicate) {
  const int failing = ed_wait_for_block(predicate == 0);
  return failing == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulation::meet(mask, cuda_emulation::Barrier, [](const auto&) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  cuda_emulation::check_width(width);
  const int first = static_cast<int>(cuda_emulation::lane()) / width * width;
  return cuda_emulation::shuffle_from(mask, value, first + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  cuda_emulation::check_width(width);
  const int lane = static_cast<int>(cuda_emulation::lane());
  const int source = lane ^ lanes;
  return cuda_emulation::shuffle_from(mask, value, source / width <= lane / width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_emulation::check_width(width);
  const unsigned lane = cuda_emulation::lane();
  const bool inside = lane % width + delta < static_cast<unsigned>(width);
  return cuda_emulation::shuffle_from(mask, value, static_cast<int>(inside ? lane + delta : lane));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_emulation::check_width(width);
  const unsigned lane = cuda_emulation::lane();
  const bool inside = lane % width >= delta;
  return cuda_emulation::shuffle_from(mask, value, static_cast<int>(inside ? lane - delta : lane));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_emulation::vote(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  cuda_emulation::me().exchange.value[0] = 0;
  std::memcpy(cuda_emulation::me().exchange.value, &value, sizeof(T));
  return static_cast<unsigned>(
      cuda_emulation::meet(mask, cuda_emulation::Match, [](const auto& lanes) {
        for (auto* lane : lanes) {
          if (lane == nullptr) continue;
          lane->result[0] = 0;
          for (int i = 0; i < 32; ++i)
            if (lanes[i] != nullptr && lanes[i]->value[0] == lane->value[0])
              lane->result[0] |= uint64_t{1} << i;
        }
      }).result[0]);
}
#define ED_REDUCE(name, type, expression)                                            \
  inline type __reduce_##name##_sync(unsigned mask, type value) {                    \
    return cuda_emulation::reduce(mask, value, [](type a, type b) -> type { return expression; }); \
  }
ED_REDUCE(add, unsigned, a + b)
ED_REDUCE(add, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
ED_REDUCE(min, unsigned, std::min(a, b))
ED_REDUCE(min, int, std::min(a, b))
ED_REDUCE(max, unsigned, std::max(a, b))
ED_REDUCE(max, int, std::max(a, b))
ED_REDUCE(and, unsigned, a & b)
ED_REDUCE(or, unsigned, a | b)
ED_REDUCE(xor, unsigned, a ^ b)
#undef ED_REDUCE

// ---- atomic operations, fences, loads -----------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_emulation {
template <class T, class Change>
T atomically(T* address, Change change) {
  perhaps_yield();
  const T old = *address;
  *address = change(old);
  return old;
}
}  // namespace cuda_emulation

#define ED_ATOMIC(name, type, expression)                                                 \
  inline type atomic##name(type* address, type value) {                                   \
    return cuda_emulation::atomically(address, [=](type old) -> type { return expression; }); \
  }
#define ED_ATOMICS(type, wide)                                                            \
  ED_ATOMIC(Add, type, static_cast<type>(static_cast<wide>(old) + static_cast<wide>(value))) \
  ED_ATOMIC(Min, type, std::min(old, value))                                              \
  ED_ATOMIC(Max, type, std::max(old, value))                                              \
  ED_ATOMIC(And, type, old & value)                                                       \
  ED_ATOMIC(Or, type, old | value)                                                        \
  ED_ATOMIC(Xor, type, old ^ value)                                                       \
  ED_ATOMIC(Exch, type, ((void)old, value))
// CUDA adds in unsigned long long only, and so does this: int64 needs a cast.
ED_ATOMICS(int, unsigned)
ED_ATOMICS(unsigned, unsigned)
ED_ATOMICS(unsigned long long, unsigned long long)
ED_ATOMIC(Min, long long, std::min(old, value))
ED_ATOMIC(Max, long long, std::max(old, value))
ED_ATOMIC(Sub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
ED_ATOMIC(Sub, unsigned, old - value)
ED_ATOMIC(Add, float, old + value)
ED_ATOMIC(Add, double, old + value)
ED_ATOMIC(Exch, float, ((void)old, value))
#if __CUDA_ARCH__ >= 900
// Each component by itself is atomic, the vector is not.
inline float2 atomicAdd(float2* address, float2 value) {
  return {atomicAdd(&address->x, value.x), atomicAdd(&address->y, value.y)};
}
inline float4 atomicAdd(float4* address, float4 value) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    cuda_emulation::fail("atomicAdd of a float4 whose address is no multiple of 16");
  return {atomicAdd(&address->x, value.x), atomicAdd(&address->y, value.y),
          atomicAdd(&address->z, value.z), atomicAdd(&address->w, value.w)};
}
#endif
#undef ED_ATOMICS
#undef ED_ATOMIC
template <class T>
T atomicCAS(T* address, T expected, T desired) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                std::is_same_v<T, unsigned long long> || std::is_same_v<T, unsigned short>);
  return cuda_emulation::atomically(address,
                                    [=](T old) { return old == expected ? desired : old; });
}

template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> T __ldca(const T* address) { return *address; }
template <class T> void __stcs(T* address, T value) { *address = value; }
template <class T> void __stcg(T* address, T value) { *address = value; }

// ---- arithmetic ---------------------------------------------------------------------------------

template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// ---- runtime ------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = struct CUstream_st*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_emulation {
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, int> shared_limits;  // by kernel, where it was raised
inline int multiprocessors = 2;                   // few, so that loops over a grid go round
inline int largest_shared = 227 * 1024;

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline bool acceptable(const cudaLaunchConfig_t& launch, const void* kernel) {
  const dim3 grid = launch.gridDim, block = launch.blockDim;
  const auto limit = shared_limits.find(kernel);
  const size_t shared = limit == shared_limits.end() ? 48 * 1024 : limit->second;
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x < 1u << 31 && grid.y < 1u << 16 &&
         grid.z < 1u << 16 && block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= 1024 &&
         block.y <= 1024 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= 1024 &&
         launch.dynamicSmemBytes <= shared;
}
}  // namespace cuda_emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "parameters of a kernel: 4 KB at most");
  if (!cuda_emulation::acceptable(*launch, reinterpret_cast<const void*>(kernel)))
    return cuda_emulation::report(cudaErrorInvalidConfiguration);
  cuda_emulation::run_grid(launch->gridDim, launch->blockDim, launch->dynamicSmemBytes,
                           [&] { kernel(arguments...); });
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value > cuda_emulation::largest_shared) return cuda_emulation::report(cudaErrorInvalidValue);
  cuda_emulation::shared_limits[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t = nullptr) {
  // CUDA does not promise what it makes of no address, even for no bytes.
  if (address == nullptr) return cuda_emulation::report(cudaErrorInvalidValue);
  std::memset(address, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_emulation::multiprocessors
                                                       : cuda_emulation::largest_shared;
  return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() { return cuda_emulation::last_error; }
inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_emulation::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument or launch configuration";
}
