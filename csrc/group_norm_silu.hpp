// GroupNorm and, optionally, SiLU after it, forward and backward, on channels_last activations:
//
//   y = gamma * (x - mean) * rstd + beta        out = y, or y * sigmoid(y)
//
// mean and rstd = 1 / sqrt(var + eps) are taken over the pixels and the channels of a group, per
// sample (Wu and He, "Group Normalization", ECCV 2018). Memory order is (B, H*W, C + padding): the
// `padding` channels at the end are not read, and come out as zeros.
//
// Accuracy: two passes, the mean before the squared deviations. Sums of at most eight terms are
// float, everything above them double. The exponential is within 1.1 ulp on the [-87, 87] that its
// argument is clamped to.
//
// Determinism: a sample is one thread's work and what samples share is added in their order, so the
// bits do not depend on the number of threads. They do depend on the instruction set (isa.hpp),
// which fuses multiplications with additions.
#pragma once

#include <cstdint>

namespace group_norm_silu {

// Sizes, all positive; `groups` divides `channels`, padding may be zero.
struct Shape {
  std::int64_t samples, pixels, channels, padding, groups;
};

struct Affine {
  const float* weight;  // (channels)
  const float* bias;    // (channels)
};

// Per sample and group, (samples, groups).
template <typename T>
struct Statistics {
  T* mean;
  T* rstd;
};

// Writes out[samples][pixels][channels + padding] and the statistics.
void forward(float* out, Statistics<float> statistics, const float* x, Affine affine,
             const Shape& shape, double eps, bool silu, int threads);

// Writes dx, shaped like x, and dweight and dbias (channels), from dout, shaped like out.
void backward(float* dx, float* dweight, float* dbias, const float* dout, const float* x,
              Statistics<const float> statistics, Affine affine, const Shape& shape, bool silu,
              int threads);

}  // namespace group_norm_silu
