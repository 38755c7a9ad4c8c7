// Flat tensors cut into chunks of one size, which threads share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace chunks {

constexpr std::int64_t kSize = 1 << 14;  // elements

struct Chunk {
  std::size_t tensor;
  std::int64_t begin, count;
};

// The chunks of every tensor, in order. `tensors` have a member `count`, which is positive.
template <typename Tensors>
std::vector<Chunk> cut(const Tensors& tensors) {
  std::vector<Chunk> found;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    for (std::int64_t begin = 0; begin < tensors[t].count; begin += kSize) {
      found.push_back({t, begin, std::min(kSize, tensors[t].count - begin)});
    }
  }
  return found;
}

// Calls work(i) for every i below `size`, a contiguous range of them on each thread.
template <typename Work>
void for_each(std::int64_t size, int threads, const Work& work) {
  const std::int64_t workers = std::clamp<std::int64_t>(threads, 1, size);
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (std::int64_t i = 0; i < size; ++i) work(i);
}

}  // namespace chunks
