// As much of CUDA as csrc/*.cu use, on the CPU: blocks one after another, the threads of a block as
// threads that meet at barriers. For tests of what kernels compute where there is no GPU.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __restrict__
#define __shared__ static

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline int current_device = 0, launched_on = -1;
inline cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct Index {
  unsigned x;
};
inline thread_local Index blockIdx, threadIdx;
inline pthread_barrier_t block_barrier;

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }

// What `kernel<<<blocks, threads, ...>>>(...)` has become.
template <typename Kernel>
void launch(int blocks, int threads, const Kernel& kernel) {
  launched_on = current_device;
  pthread_barrier_init(&block_barrier, nullptr, threads);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([=, &kernel] {
      threadIdx.x = t;
      for (int b = 0; b < blocks; ++b) {
        blockIdx.x = b;
        kernel();
        __syncthreads();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  pthread_barrier_destroy(&block_barrier);
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    std::uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    bits = static_cast<std::uint16_t>(x == x ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fff);
  }
  std::uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
