// Feature distillation over pairs of student and teacher tensors, with its gradient:
//
//   loss = mean (s - t)^2        gradient = coefficient * (s - t)
//
// One read of s and t serves both. Tensors are flat: the caller sees to it that both of a pair
// have their elements in the same order.
//
// Accuracy: sums of at most eight terms are float, everything above them double.
//
// Determinism: chunks have one size and their sums are added in order, so the bits do not depend
// on the number of threads. They do depend on the instruction set (isa.hpp).
#pragma once

#include <cstdint>
#include <vector>

namespace feature_kd {

struct Pair {
  const float* student;
  const float* teacher;
  float* gradient;
  std::int64_t count;  // positive
  float coefficient;
};

// Writes losses[pair] and every gradient.
void run(float* losses, const std::vector<Pair>& pairs, int threads);

}  // namespace feature_kd
