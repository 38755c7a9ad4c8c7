// One AdamW step (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019) over
// many tensors in one pass, with an exponential moving average and a bfloat16 copy of what it
// leaves, if they are asked for:
//
//   g   = clip * gradient
//   p  -= lr * weight_decay * p
//   m  += (1 - beta1) (g - m)
//   v   = beta2 v + (1 - beta2) g^2
//   p  -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   ema += (1 - ema_decay) (p - ema)
//   copy = p, rounded to nearest, ties to even
//
// The tensors of an entry are flat: the caller sees to it that they have their elements in the same
// order. What depends on the step alone is computed in double and rounded to float once.
//
// Determinism: elements are independent, so the bits do not depend on the number of threads. They
// do depend on the instruction set (isa.hpp), which fuses multiplications with additions.
#pragma once

#include <cstdint>
#include <vector>

namespace adamw_ema {

struct Tensor {
  float* parameter;
  const float* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;           // or null
  std::uint16_t* copy;  // bfloat16, or null
  std::int64_t count;   // positive
};

struct Step {
  double lr, beta1, beta2, eps, weight_decay, clip, ema_decay;
  std::int64_t number;  // 1 at first
};

void run(const std::vector<Tensor>& tensors, const Step& step, int threads);

}  // namespace adamw_ema
