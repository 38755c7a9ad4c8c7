// One launch for many tensors. Their addresses travel in the kernel's arguments, which are limited
// to 4 KiB; a block works on one chunk of one tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda.hpp"

namespace multi_tensor {

constexpr int kTensors = 64;  // of a launch
constexpr int kThreads = 256;

// Tensors of a launch, with the chunks before each. `Tensor` has a member `count`.
template <typename Tensor>
struct Table {
  Tensor tensors[kTensors];
  int first[kTensors + 1];
  int size;
};

inline std::int64_t chunks(std::int64_t count, std::int64_t chunk) {
  return (count + chunk - 1) / chunk;
}

// The calling thread's current device while this lives; the one that it was comes back afterwards.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error = cudaGetDevice(&before_);
    if (error != cudaSuccess) before_ = device;
    if (before_ != device) error = cudaSetDevice(device);
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
};

// Calls launch(table, stream) for up to kTensors tensors at a time.
template <typename Tensor, typename Launch>
void for_tables(const std::vector<Tensor>& tensors, std::int64_t chunk, cuda::Queue queue,
                const char* name, const Launch& launch) {
  const auto check = [name](cudaError_t error) {
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
    }
  };
  const CurrentDevice current(queue.device);
  check(current.error);
  for (std::size_t begin = 0; begin < tensors.size(); begin += kTensors) {
    Table<Tensor> table{};
    table.size = static_cast<int>(std::min<std::size_t>(kTensors, tensors.size() - begin));
    for (int i = 0; i < table.size; ++i) {
      table.tensors[i] = tensors[begin + i];
      const std::int64_t end = table.first[i] + chunks(tensors[begin + i].count, chunk);
      if (end > INT32_MAX) throw std::runtime_error(std::string(name) + ": more than 2^31 blocks");
      table.first[i + 1] = static_cast<int>(end);
    }
    launch(table, static_cast<cudaStream_t>(queue.stream));
    check(cudaGetLastError());
  }
}

// The tensor that a block works on: the last one whose first chunk is not after it.
template <typename Tensor>
__device__ int tensor_of(const Table<Tensor>& table, int block) {
  int low = 0, high = table.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Elements next to each other, in one access where they are aligned.
template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Pack {
  T lane[kLanes];
};

template <int kLanes, typename T>
__device__ bool aligned(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(Pack<T, kLanes>) == 0;
}

// kLanes elements, of which those from `valid` on are zero and not read.
template <int kLanes, typename T>
__device__ Pack<T, kLanes> load(const T* from, bool whole, int valid) {
  if (whole) return *reinterpret_cast<const Pack<T, kLanes>*>(from);
  Pack<T, kLanes> found;
#pragma unroll
  for (int j = 0; j < kLanes; ++j) found.lane[j] = j < valid ? from[j] : T(0.0f);
  return found;
}

template <int kLanes, typename T>
__device__ void store(T* to, const Pack<T, kLanes>& values, bool whole, int valid) {
  if (whole) {
    *reinterpret_cast<Pack<T, kLanes>*>(to) = values;
    return;
  }
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    if (j < valid) to[j] = values.lane[j];
  }
}

}  // namespace multi_tensor
