// Functions of one element that loops over many are made of, and of the sums they keep.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.hpp"

namespace vector {

constexpr std::int64_t kDepth = 8;  // terms added up in float; everything above is double

// e^x for x clamped to [-87, 87], where neither it nor its reciprocal leaves the normal floats. NaN
// stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2; the polynomial is the minimax one of its degree
// for the relative error (Remez), 3.1e-9.
INLINED inline float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float biased = x * kLog2E + kRound;
  const float n = biased - kRound;
  const float r = x - n * kLn2High - n * kLn2Low;
  float p = 0x1.6a23d0p-10f;
  p = p * r + 0x1.123a20p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r * r + r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits = (bits + 127) << 23;  // 2^n: the shift drops all of kRound
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// The bits of x as a bfloat16, rounded to nearest, ties to even; NaN is a quiet NaN.
INLINED inline std::uint16_t bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0);
}

// Moves partial sums to where they are safe from rounding.
INLINED inline void drain(float* partial, double* sum, std::int64_t n) {
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    sum[j] += partial[j];
    partial[j] = 0.0f;
  }
}

}  // namespace vector
