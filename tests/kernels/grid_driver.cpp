// Small kernels that show what the emulation of the CUDA grid does, and what it refuses.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../kernels/common/cuda_device.h"
#include "driver.h"

using efficient_detr::all_lanes;
using efficient_detr::dynamic_shared_memory;
using efficient_detr::launch;

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) driver::fail(cudaGetErrorString(error));
}

// Sum of each block's numbers, through a warp sum by shuffles and static shared memory.
__global__ void block_sums(const int* numbers, int count, int* sums) {
  __shared__ int warp_sums[32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int sum = i < count ? numbers[i] : 0;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(all_lanes, sum, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += warp_sums[warp];
    sums[blockIdx.x] = total;
  }
}

void sum_blocks(driver::Call& call) {
  const int count = static_cast<int>(call.count_of("numbers", 4));
  const int blocks = (count + 95) / 96;
  check(launch(block_sums, blocks, 96, 0, nullptr, call.tensor<int>("numbers"), count,
               call.output<int>("sums", blocks)));
}

// Every lane's view of shuffles, votes and reductions, lanes of a warp in two halves.
__global__ void warp_operations(int* results) {
  const int lane = threadIdx.x % 32;
  const unsigned half_mask = lane < 16 ? 0xffffu : 0xffff0000u;
  int* mine = results + 8 * threadIdx.x;
  mine[0] = __shfl_sync(half_mask, lane, 3, 8);
  mine[1] = __shfl_xor_sync(all_lanes, lane, 5);
  mine[2] = __shfl_up_sync(all_lanes, lane, 2, 4);
  mine[3] = static_cast<int>(__ballot_sync(half_mask, lane % 3 == 0));
  mine[4] = __any_sync(half_mask, lane == 20);
  mine[5] = __all_sync(half_mask, lane < 16);
  mine[6] = static_cast<int>(__match_any_sync(all_lanes, lane % 7));
  mine[7] = __reduce_add_sync(half_mask, lane);
}

void operate_warps(driver::Call& call) {
  check(launch(warp_operations, 1, 64, 0, nullptr, call.output<int>("results", 64 * 8)));
}

// Neighbours through dynamic shared memory, with or without the barrier that this needs.
__global__ void rotate(int* numbers, int barrier) {
  int* shared = reinterpret_cast<int*>(dynamic_shared_memory());
  shared[threadIdx.x] = numbers[threadIdx.x];
  if (barrier) __syncthreads();
  numbers[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void rotate_numbers(driver::Call& call) {
  const int count = static_cast<int>(call.count_of("numbers", 4));
  int* numbers = call.output<int>("numbers", count);
  std::memcpy(numbers, call.tensor<int>("numbers"), count * sizeof(int));
  check(launch(rotate, 1, count, call.integer("shared_bytes"), nullptr, numbers,
               static_cast<int>(call.integer("barrier"))));
}

// Who came first, and how many came: the first depends on the order, the second must not.
__global__ void count_arrivals(unsigned* first, unsigned* count, float* sum) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  atomicCAS(first, 0xffffffffu, thread);
  atomicAdd(count, 1u);
  atomicAdd(sum, 0.5f);
}

void arrive(driver::Call& call) {
  unsigned* first = call.output<unsigned>("first", 1);
  unsigned* count = call.output<unsigned>("count", 1);
  float* sum = call.output<float>("sum", 1);
  *count = 0, *sum = 0;
  check(launch(count_arrivals, 4, 64, 0, nullptr, first, count, sum));
}

__global__ void misuse_kernel(int kind, int* memory) {
  if (kind == 0 && threadIdx.x < 32) __syncwarp(), memory[threadIdx.x] = 1;
  if (kind == 1 && threadIdx.x == 5) __shfl_sync(all_lanes, 1, 0);
  if (kind == 2) __shfl_sync(0xfeu, 1, 0);
  if (kind == 3 && threadIdx.x % 32 < 16) __shfl_sync(0xffffu, 1, 20);
  if (kind == 4) memory[threadIdx.x + 1] = 1;
  if (kind == 5) *reinterpret_cast<int2*>(memory + 1) = make_int2(1, 2);
  if (kind == 6) threadIdx.x % 2 == 0 ? __syncwarp() : (void)__ballot_sync(all_lanes, 1);
  if (kind == 7 && threadIdx.x != 0) return;
  if (kind == 7) __syncwarp();
}

void misuse(driver::Call& call) {
  const int threads = static_cast<int>(call.integer("threads"));
  int* memory = call.output<int>("memory", threads);
  check(launch(misuse_kernel, 1, threads, 0, nullptr, static_cast<int>(call.integer("kind")),
               memory));
}

__global__ void round_kernel(const float* numbers, int count, __half* half, __nv_bfloat16* bfloat) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  half[i] = __float2half_rn(numbers[i]);
  bfloat[i] = __float2bfloat16_rn(numbers[i]);
}

__global__ void widen_kernel(const __half* half, int count, float* numbers) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) numbers[i] = __half2float(half[i]);
}

void round_numbers(driver::Call& call) {
  const int count = static_cast<int>(call.count_of("numbers", 4));
  __half* half = call.output<__half>("half", count);
  check(launch(round_kernel, (count + 255) / 256, 256, 0, nullptr, call.tensor<float>("numbers"),
               count, half, call.output<__nv_bfloat16>("bfloat16", count)));
  check(launch(widen_kernel, (count + 255) / 256, 256, 0, nullptr, half, count,
               call.output<float>("widened", count)));
}

}  // namespace

int main(int count, char** arguments) {
  return driver::run(count, arguments,
                     {{"sum_blocks", sum_blocks},
                      {"operate_warps", operate_warps},
                      {"rotate_numbers", rotate_numbers},
                      {"arrive", arrive},
                      {"misuse", misuse},
                      {"round_numbers", round_numbers}});
}
