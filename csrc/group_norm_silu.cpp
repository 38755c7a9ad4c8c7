#include "group_norm_silu.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.hpp"
#include "vector.hpp"

namespace group_norm_silu {
namespace {

using vector::drain;
using vector::exponential;

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
  for_samples(shape, threads, [&](std::int64_t b, Scratch& scratch) {
    const std::int64_t group = b * shape.groups;
    const ForwardSample sample{out + b * elements,
                               {statistics.mean + group, statistics.rstd + group},
                               x + b * elements,
                               affine,
                               shape,
                               eps};
    if (silu) {
      isa::run([&]() INLINED { forward_sample<true>(sample, scratch); });
    } else {
      isa::run([&]() INLINED { forward_sample<false>(sample, scratch); });
    }
  });
}

void backward(float* dx, float* dweight, float* dbias, const float* dout, const float* x,
              Statistics<const float> statistics, Affine affine, const Shape& shape, bool silu,
              int threads) {
  const std::int64_t elements = shape.pixels * (shape.channels + shape.padding);
  std::vector<double> dweights(shape.samples * shape.channels), dbiases(dweights.size());
  for_samples(shape, threads, [&](std::int64_t b, Scratch& scratch) {
    const std::int64_t group = b * shape.groups;
    const BackwardSample sample{dx + b * elements,
                                dweights.data() + b * shape.channels,
                                dbiases.data() + b * shape.channels,
                                dout + b * elements,
                                x + b * elements,
                                {statistics.mean + group, statistics.rstd + group},
                                affine,
                                shape};
    if (silu) {
      isa::run([&]() INLINED { backward_sample<true>(sample, scratch); });
    } else {
      isa::run([&]() INLINED { backward_sample<false>(sample, scratch); });
    }
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
