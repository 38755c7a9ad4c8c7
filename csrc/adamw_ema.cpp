#include "adamw_ema.hpp"

#include <cmath>

#include "chunks.hpp"
#include "vector.hpp"

namespace adamw_ema {
namespace {

// A step in float, as the elements see it.
struct Factors {
  explicit Factors(const Step& s)
      : clip(static_cast<float>(s.clip)),
        decay(static_cast<float>(s.lr * s.weight_decay)),
        first(static_cast<float>(1.0 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        second(static_cast<float>(1.0 - s.beta2)),
        step_size(static_cast<float>(s.lr / (1.0 - std::pow(s.beta1, s.number)))),
        root(static_cast<float>(std::sqrt(1.0 - std::pow(s.beta2, s.number)))),
        eps(static_cast<float>(s.eps)),
        ema(static_cast<float>(1.0 - s.ema_decay)) {}

  float clip, decay, first, beta2, second, step_size, root, eps, ema;
};

template <bool kEma, bool kCopy>
INLINED inline void update(const Tensor& tensor, const chunks::Chunk& chunk, const Factors f) {
  float* const parameter = tensor.parameter + chunk.begin;
  const float* const gradient = tensor.gradient + chunk.begin;
  float* const exp_avg = tensor.exp_avg + chunk.begin;
  float* const exp_avg_sq = tensor.exp_avg_sq + chunk.begin;
  float* const ema = kEma ? tensor.ema + chunk.begin : nullptr;
  std::uint16_t* const copy = kCopy ? tensor.copy + chunk.begin : nullptr;
#pragma omp simd
  for (std::int64_t i = 0; i < chunk.count; ++i) {
    const float g = f.clip * gradient[i];
    const float m = exp_avg[i] + f.first * (g - exp_avg[i]);
    const float v = f.beta2 * exp_avg_sq[i] + f.second * g * g;
    const float decayed = parameter[i] - f.decay * parameter[i];
    const float p = decayed - f.step_size * (m / (std::sqrt(v) / f.root + f.eps));
    parameter[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (kEma) ema[i] += f.ema * (p - ema[i]);
    if (kCopy) copy[i] = vector::bfloat16(p);
  }
}

}  // namespace

void run(const std::vector<Tensor>& tensors, const Step& step, int threads) {
  const Factors factors(step);
  const std::vector<chunks::Chunk> found = chunks::cut(tensors);
  chunks::for_each(static_cast<std::int64_t>(found.size()), threads, [&](std::int64_t i) {
    const chunks::Chunk& chunk = found[i];
    const Tensor& tensor = tensors[chunk.tensor];
    if (tensor.ema && tensor.copy) {
      isa::run([&]() INLINED { update<true, true>(tensor, chunk, factors); });
    } else if (tensor.ema) {
      isa::run([&]() INLINED { update<true, false>(tensor, chunk, factors); });
    } else if (tensor.copy) {
      isa::run([&]() INLINED { update<false, true>(tensor, chunk, factors); });
    } else {
      isa::run([&]() INLINED { update<false, false>(tensor, chunk, factors); });
    }
  });
}

}  // namespace adamw_ema
