#include "feature_kd.hpp"

#include "chunks.hpp"
#include "vector.hpp"

namespace feature_kd {
namespace {

constexpr std::int64_t kLanes = 64;  // sums side by side: four vectors of the widest level

// Writes the gradient of a chunk and returns its sum of squares.
INLINED inline double chunk_sum(const Pair& pair, const chunks::Chunk& chunk) {
  const float* const student = pair.student + chunk.begin;
  const float* const teacher = pair.teacher + chunk.begin;
  float* const gradient = pair.gradient + chunk.begin;
  const float coefficient = pair.coefficient;
  float partial[kLanes] = {};
  double sum[kLanes] = {};
  const auto lanes = [&](std::int64_t begin, std::int64_t n) INLINED {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) {
      const float difference = student[begin + j] - teacher[begin + j];
      gradient[begin + j] = coefficient * difference;
      partial[j] += difference * difference;
    }
  };
  std::int64_t begin = 0;
  while (chunk.count - begin >= kLanes * vector::kDepth) {
    for (int row = 0; row < vector::kDepth; ++row, begin += kLanes) lanes(begin, kLanes);
    vector::drain(partial, sum, kLanes);
  }
  for (; chunk.count - begin >= kLanes; begin += kLanes) lanes(begin, kLanes);
  vector::drain(partial, sum, kLanes);
  lanes(begin, chunk.count - begin);
  vector::drain(partial, sum, kLanes);
  double total = 0.0;
  for (const double lane : sum) total += lane;
  return total;
}

}  // namespace

void run(float* losses, const std::vector<Pair>& pairs, int threads) {
  const std::vector<chunks::Chunk> found = chunks::cut(pairs);
  std::vector<double> sums(found.size());
  chunks::for_each(static_cast<std::int64_t>(found.size()), threads, [&](std::int64_t i) {
    isa::run([&]() INLINED { sums[i] = chunk_sum(pairs[found[i].tensor], found[i]); });
  });
  std::vector<double> totals(pairs.size());
  for (std::size_t i = 0; i < found.size(); ++i) totals[found[i].tensor] += sums[i];
  for (std::size_t k = 0; k < pairs.size(); ++k) {
    losses[k] = static_cast<float>(totals[k] / static_cast<double>(pairs[k].count));
  }
}

}  // namespace feature_kd
