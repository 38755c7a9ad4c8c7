// Channels_last activations seen as rows of whole vectors, and the loops of GroupNorm over them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "group_norm_silu.hpp"
#include "vector.hpp"

namespace group_norm_silu {

constexpr std::int64_t kVector = 16;  // floats, of the widest instruction set
constexpr std::int64_t kWide = 256;   // channels: from here on an incomplete vector costs little

// A sample seen as rows of `repeat` pixels, so that rows of any channel count fill whole vectors.
// What belongs to a channel is laid out once per pixel of a row. The last row may be shorter.
struct Rows {
  explicit Rows(const Shape& shape)
      : total(shape.channels + shape.padding),
        repeat(total >= kWide ? 1 : std::min(kVector / std::gcd(total, kVector), shape.pixels)),
        length(repeat * total),
        elements(shape.pixels * total) {}

  std::int64_t total, repeat, length, elements;
};

// A worker's memory: per element of a row. The values of the padding mean nothing but are finite.
struct Scratch {
  explicit Scratch(std::int64_t n)
      : mean(n), scale(n), shift(n), slope(n), partial(n), partial2(n), sum(n), sum2(n) {}

  std::vector<float> mean, scale, shift, slope, partial, partial2;
  std::vector<double> sum, sum2;
};

// Calls row(begin, n) for the rows of a sample, and flush() after every vector::kDepth of them.
template <typename Row, typename Flush>
INLINED inline void for_rows(const Rows& rows, Row row, Flush flush) {
  for (std::int64_t begin = 0; begin < rows.elements;) {
    for (std::int64_t r = 0; r < vector::kDepth && begin < rows.elements;
         ++r, begin += rows.length) {
      row(begin, std::min(rows.length, rows.elements - begin));
    }
    flush();
  }
}

// The sum of a channel: over the pixels of a row, first to last.
INLINED inline double folded(const double* sum, const Rows& rows, std::int64_t channel) {
  double total = 0.0;
  for (std::int64_t i = 0; i < rows.repeat; ++i) total += sum[i * rows.total + channel];
  return total;
}

// Writes value(channel) to every pixel of a row.
template <typename Value>
INLINED inline void spread(float* row, const Rows& rows, const Shape& shape, Value value) {
  for (std::int64_t c = 0; c < shape.channels; ++c) row[c] = value(c);
  for (std::int64_t i = 1; i < rows.repeat; ++i) {
    std::copy_n(row, shape.channels, row + i * rows.total);
  }
}

INLINED inline void zero_padding(float* sample, const Shape& shape) {
  if (shape.padding == 0) return;
  const std::int64_t total = shape.channels + shape.padding;
  for (std::int64_t p = 0; p < shape.pixels; ++p) {
    std::fill_n(sample + p * total + shape.channels, shape.padding, 0.0f);
  }
}

// Sums term(x, j) over the pixels into scratch.sum; j counts the elements of a row.
template <typename Term>
INLINED inline void accumulate(const float* x, const Rows& rows, Scratch& scratch, Term term) {
  float* const partial = scratch.partial.data();
  double* const sum = scratch.sum.data();
  std::fill_n(partial, rows.length, 0.0f);
  std::fill_n(sum, rows.length, 0.0);
  for_rows(
      rows,
      [=](std::int64_t begin, std::int64_t n) INLINED {
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) partial[j] += term(x[begin + j], j);
      },
      [=]() INLINED { vector::drain(partial, sum, rows.length); });
}

}  // namespace group_norm_silu
