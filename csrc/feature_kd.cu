#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda.hpp"
#include "multi_tensor.cuh"

namespace feature_kd {
namespace {

using multi_tensor::kThreads;

constexpr int kChunk = 8192;  // elements of a block: 32 of each thread

using Table = multi_tensor::Table<CudaPair>;
static_assert(sizeof(Table) + 2 * sizeof(void*) <= 4096, "kernel arguments");

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ void from_float(float x, float& to) { to = x; }
__device__ void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// Writes the gradient of a chunk, and its sum of squares to partials[block].
template <typename T>
__global__ __launch_bounds__(kThreads) void chunk_kernel(const __grid_constant__ Table table,
                                                         float* __restrict__ partials) {
  constexpr int kLanes = 16 / sizeof(T);
  const int block = static_cast<int>(blockIdx.x);
  const int index = multi_tensor::tensor_of(table, block);
  const CudaPair& entry = table.tensors[index];
  const std::int64_t begin = static_cast<std::int64_t>(block - table.first[index]) * kChunk;
  const std::int64_t left = entry.count - begin;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  const T* const student = static_cast<const T*>(entry.student) + begin;
  const T* const teacher = static_cast<const T*>(entry.teacher) + begin;
  T* const gradient = static_cast<T*>(entry.gradient) + begin;
  const float coefficient = entry.coefficient;
  const bool aligned = multi_tensor::aligned<kLanes>(student) &&
                       multi_tensor::aligned<kLanes>(teacher) &&
                       multi_tensor::aligned<kLanes>(gradient);
  float sum = 0.0f;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) * kLanes; i < count; i += kThreads * kLanes) {
    const int valid = count - i;
    const bool whole = aligned && valid >= kLanes;
    const auto s = multi_tensor::load<kLanes>(student + i, whole, valid);
    const auto t = multi_tensor::load<kLanes>(teacher + i, whole, valid);
    multi_tensor::Pack<T, kLanes> g;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float difference = to_float(s.lane[j]) - to_float(t.lane[j]);
      sum = __fmaf_rn(difference, difference, sum);
      from_float(__fmul_rn(coefficient, difference), g.lane[j]);
    }
    multi_tensor::store(gradient + i, g, whole, valid);
  }
  sum = multi_tensor::block_sum(sum);
  if (threadIdx.x == 0) partials[block] = sum;
}

// One block per pair: its loss from the sums of its chunks.
__global__ __launch_bounds__(kThreads) void loss_kernel(const __grid_constant__ Table table,
                                                        const float* __restrict__ partials,
                                                        float* __restrict__ losses) {
  const int pair = static_cast<int>(blockIdx.x);
  const int end = table.first[pair + 1];
  float sum = 0.0f;
  for (int i = table.first[pair] + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    sum += partials[i];
  }
  sum = multi_tensor::block_sum(sum);
  if (threadIdx.x == 0) {
    losses[pair] = __fdiv_rn(sum, static_cast<float>(table.tensors[pair].count));
  }
}

}  // namespace

// Launches follow each other and share the workspace: this is what one of all pairs would need.
std::int64_t workspace(const std::vector<std::int64_t>& counts) {
  std::int64_t total = 0;
  for (const std::int64_t count : counts) total += multi_tensor::chunks(count, kChunk);
  return total * static_cast<std::int64_t>(sizeof(float));
}

void run_cuda(float* losses, void* workspace, const std::vector<CudaPair>& pairs, Dtype dtype,
              cuda::Queue queue) {
  float* out = losses;
  float* const partials = static_cast<float*>(workspace);
  multi_tensor::for_tables(
      pairs, kChunk, queue, "feature_kd", [&](const Table& table, cudaStream_t stream) {
        const int blocks = table.first[table.size];
        switch (dtype) {
          case Dtype::float32:
            chunk_kernel<float><<<blocks, kThreads, 0, stream>>>(table, partials);
            break;
          case Dtype::float16:
            chunk_kernel<__half><<<blocks, kThreads, 0, stream>>>(table, partials);
            break;
          case Dtype::bfloat16:
            chunk_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(table, partials);
            break;
        }
        loss_kernel<<<table.size, kThreads, 0, stream>>>(table, partials, out);
        out += table.size;
      });
}

}  // namespace feature_kd
