#include "group_norm_silu.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace py = pybind11;

// Run-time dispatch needs ifunc (glibc) and GCC 12's names of the x86-64 levels. A clone's loops
// are compiled for its level only if everything in them is inlined into it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif
#define INLINED __attribute__((always_inline))

namespace group_norm_silu {
namespace {

constexpr std::int64_t kDepth = 8;    // rows added up in float
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

// Calls row(begin, n) for the rows of a sample, and flush() after every kDepth of them.
template <typename Row, typename Flush>
INLINED inline void for_rows(const Rows& rows, Row row, Flush flush) {
  for (std::int64_t begin = 0; begin < rows.elements;) {
    for (std::int64_t r = 0; r < kDepth && begin < rows.elements; ++r, begin += rows.length) {
      row(begin, std::min(rows.length, rows.elements - begin));
    }
    flush();
  }
}

// Moves partial sums to where they are safe from rounding.
INLINED inline void drain(float* partial, double* sum, std::int64_t n) {
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    sum[j] += partial[j];
    partial[j] = 0.0f;
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
      [=]() INLINED { drain(partial, sum, rows.length); });
}

struct ForwardSample {
  float* out;
  Statistics<float> statistics;
  const float* x;
  Affine affine;
  const Shape& shape;
  double eps;
};

template <bool kSilu>
INLINED inline void forward_sample(const ForwardSample& s, Scratch& scratch) {
  const Shape& shape = s.shape;
  const Rows rows(shape);
  const std::int64_t width = shape.channels / shape.groups;
  const auto count = static_cast<double>(width * shape.pixels);
  const auto group_average = [&](std::int64_t g) INLINED {
    double total = 0.0;
    for (std::int64_t c = g * width; c < (g + 1) * width; ++c) {
      total += folded(scratch.sum.data(), rows, c);
    }
    return total / count;
  };

  const float* const x = s.x;
  float* const mean = scratch.mean.data();
  accumulate(x, rows, scratch, [](float value, std::int64_t) INLINED { return value; });
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    s.statistics.mean[g] = static_cast<float>(group_average(g));
  }
  spread(mean, rows, shape, [&](std::int64_t c) INLINED { return s.statistics.mean[c / width]; });

  accumulate(x, rows, scratch, [=](float value, std::int64_t j) INLINED {
    return (value - mean[j]) * (value - mean[j]);
  });
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    s.statistics.rstd[g] = static_cast<float>(1.0 / std::sqrt(group_average(g) + s.eps));
  }

  float* const scale = scratch.scale.data();
  float* const shift = scratch.shift.data();
  spread(scale, rows, shape,
         [&](std::int64_t c) INLINED { return s.affine.weight[c] * s.statistics.rstd[c / width]; });
  spread(shift, rows, shape, [&](std::int64_t c) INLINED { return s.affine.bias[c]; });
  float* const out = s.out;
  for_rows(
      rows,
      [=](std::int64_t begin, std::int64_t n) INLINED {
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) {
          const float y = (x[begin + j] - mean[j]) * scale[j] + shift[j];
          out[begin + j] = kSilu ? y / (1.0f + exponential(-y)) : y;
        }
      },
      []() {});
  zero_padding(out, shape);
}

struct BackwardSample {
  float* dx;
  double* dweight;  // of this sample
  double* dbias;
  const float* dout;
  const float* x;
  Statistics<const float> statistics;
  Affine affine;
  const Shape& shape;
};

// With dy the gradient of y and n the elements of a group,
//
//   dx = rstd * (gamma dy - sum(gamma dy) / n - (x - mean) rstd^2 sum(gamma dy (x - mean)) / n)
template <bool kSilu>
INLINED inline void backward_sample(const BackwardSample& s, Scratch& scratch) {
  const Shape& shape = s.shape;
  const Rows rows(shape);
  const std::int64_t width = shape.channels / shape.groups;
  const auto count = static_cast<double>(width * shape.pixels);
  float* const mean = scratch.mean.data();
  float* const scale = scratch.scale.data();
  float* const shift = scratch.shift.data();
  spread(mean, rows, shape, [&](std::int64_t c) INLINED { return s.statistics.mean[c / width]; });
  spread(scale, rows, shape,
         [&](std::int64_t c) INLINED { return s.affine.weight[c] * s.statistics.rstd[c / width]; });
  spread(shift, rows, shape, [&](std::int64_t c) INLINED { return s.affine.bias[c]; });

  // dy goes to dx for now: one exponential per element is enough.
  const float* const x = s.x;
  const float* const dout = s.dout;
  float* const dx = s.dx;
  float* const partial = scratch.partial.data();
  float* const partial2 = scratch.partial2.data();
  double* const sum = scratch.sum.data();
  double* const sum2 = scratch.sum2.data();
  std::fill_n(partial, rows.length, 0.0f);
  std::fill_n(partial2, rows.length, 0.0f);
  std::fill_n(sum, rows.length, 0.0);
  std::fill_n(sum2, rows.length, 0.0);
  for_rows(
      rows,
      [=](std::int64_t begin, std::int64_t n) INLINED {
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) {
          const float centred = x[begin + j] - mean[j];
          float dy = dout[begin + j];
          if (kSilu) {
            const float y = centred * scale[j] + shift[j];
            const float e = exponential(-y);
            const float sigmoid = 1.0f / (1.0f + e);
            dy *= sigmoid * (1.0f + y * (e * sigmoid));
          }
          dx[begin + j] = dy;
          partial[j] += dy;
          partial2[j] += dy * centred;
        }
      },
      [=]() INLINED {
        drain(partial, sum, rows.length);
        drain(partial2, sum2, rows.length);
      });

  float* const slope = scratch.slope.data();
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    const double rstd = s.statistics.rstd[g];
    double constant = 0.0, linear = 0.0;
    for (std::int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double dy = folded(sum, rows, c), dy_centred = folded(sum2, rows, c);
      s.dbias[c] = dy;
      s.dweight[c] = dy_centred * rstd;
      constant += s.affine.weight[c] * dy;
      linear += s.affine.weight[c] * dy_centred;
    }
    std::fill_n(shift + g * width, width, static_cast<float>(rstd * constant / count));
    std::fill_n(slope + g * width, width, static_cast<float>(rstd * rstd * rstd * linear / count));
  }
  spread(shift, rows, shape, [=](std::int64_t c) INLINED { return shift[c]; });
  spread(slope, rows, shape, [=](std::int64_t c) INLINED { return slope[c]; });
  for_rows(
      rows,
      [=](std::int64_t begin, std::int64_t n) INLINED {
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) {
          const float centred = x[begin + j] - mean[j];
          dx[begin + j] = dx[begin + j] * scale[j] - shift[j] - centred * slope[j];
        }
      },
      []() {});
  zero_padding(dx, shape);
}

CLONED void forward_plain(const ForwardSample& s, Scratch& scratch) {
  forward_sample<false>(s, scratch);
}
CLONED void forward_silu(const ForwardSample& s, Scratch& scratch) {
  forward_sample<true>(s, scratch);
}
CLONED void backward_plain(const BackwardSample& s, Scratch& scratch) {
  backward_sample<false>(s, scratch);
}
CLONED void backward_silu(const BackwardSample& s, Scratch& scratch) {
  backward_sample<true>(s, scratch);
}

// Calls work(sample, scratch) for every sample, contiguous ranges of them on each thread.
template <typename Work>
void for_samples(const Shape& shape, int threads, Work work) {
  const std::int64_t workers = std::clamp<std::int64_t>(threads, 1, shape.samples);
  std::vector<Scratch> scratch(workers, Scratch(Rows(shape).length));
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (std::int64_t w = 0; w < workers; ++w) {
    const std::int64_t end = shape.samples * (w + 1) / workers;
    for (std::int64_t b = shape.samples * w / workers; b < end; ++b) work(b, scratch[w]);
  }
}

}  // namespace

void forward(float* out, Statistics<float> statistics, const float* x, Affine affine,
             const Shape& shape, double eps, bool silu, int threads) {
  const std::int64_t elements = shape.pixels * (shape.channels + shape.padding);
  const auto sample = silu ? forward_silu : forward_plain;
  for_samples(shape, threads, [&](std::int64_t b, Scratch& scratch) {
    const std::int64_t group = b * shape.groups;
    sample({out + b * elements,
            {statistics.mean + group, statistics.rstd + group},
            x + b * elements,
            affine,
            shape,
            eps},
           scratch);
  });
}

void backward(float* dx, float* dweight, float* dbias, const float* dout, const float* x,
              Statistics<const float> statistics, Affine affine, const Shape& shape, bool silu,
              int threads) {
  const std::int64_t elements = shape.pixels * (shape.channels + shape.padding);
  std::vector<double> dweights(shape.samples * shape.channels), dbiases(dweights.size());
  const auto sample = silu ? backward_silu : backward_plain;
  for_samples(shape, threads, [&](std::int64_t b, Scratch& scratch) {
    const std::int64_t group = b * shape.groups;
    sample({dx + b * elements,
            dweights.data() + b * shape.channels,
            dbiases.data() + b * shape.channels,
            dout + b * elements,
            x + b * elements,
            {statistics.mean + group, statistics.rstd + group},
            affine,
            shape},
           scratch);
  });
  const auto over_samples = [&](const std::vector<double>& partials, float* out) {
    std::vector<double> total(shape.channels);
    for (std::size_t i = 0; i < partials.size(); ++i) total[i % shape.channels] += partials[i];
    std::copy(total.begin(), total.end(), out);
  };
  over_samples(dweights, dweight);
  over_samples(dbiases, dbias);
}

}  // namespace group_norm_silu

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Sizes = std::array<std::int64_t, 5>;

group_norm_silu::Shape named(const Sizes& s) { return {s[0], s[1], s[2], s[3], s[4]}; }

}  // namespace

void register_group_norm_silu(py::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "group_norm_forward",
      [](Address out, Address mean, Address rstd, Address x, Address weight, Address bias,
         const Sizes& shape, double eps, bool silu, int threads) {
        group_norm_silu::forward(pointer<float>(out), {pointer<float>(mean), pointer<float>(rstd)},
                                 pointer<const float>(x),
                                 {pointer<const float>(weight), pointer<const float>(bias)},
                                 named(shape), eps, silu, threads);
      },
      py::arg("out"), py::arg("mean"), py::arg("rstd"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("shape"), py::arg("eps"), py::arg("silu"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "group_norm_backward",
      [](Address dx, Address dweight, Address dbias, Address dout, Address x, Address mean,
         Address rstd, Address weight, Address bias, const Sizes& shape, bool silu, int threads) {
        group_norm_silu::backward(pointer<float>(dx), pointer<float>(dweight),
                                  pointer<float>(dbias), pointer<const float>(dout),
                                  pointer<const float>(x),
                                  {pointer<const float>(mean), pointer<const float>(rstd)},
                                  {pointer<const float>(weight), pointer<const float>(bias)},
                                  named(shape), silu, threads);
      },
      py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dout"), py::arg("x"),
      py::arg("mean"), py::arg("rstd"), py::arg("weight"), py::arg("bias"), py::arg("shape"),
      py::arg("silu"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
