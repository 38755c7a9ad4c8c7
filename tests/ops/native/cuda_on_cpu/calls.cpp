// What csrc/cuda_bindings.cpp binds, for ctypes.
#include <vector>

#include "cuda.hpp"
#include "cuda_on_cpu.hpp"

constexpr int kDevice = 1;  // not the current one

extern "C" {

void adamw_ema_run(float** parameters, float** gradients, float** exp_avgs, float** exp_avg_sqs,
                   float** emas, std::uint16_t** copies, const std::int64_t* counts, int size,
                   const double* settings, const float* lr, const float* number, const float* clip,
                   const float* skip) {
  std::vector<adamw_ema::Tensor> tensors;
  for (int i = 0; i < size; ++i) {
    tensors.push_back({parameters[i], gradients[i], exp_avgs[i], exp_avg_sqs[i],
                       emas ? emas[i] : nullptr, copies ? copies[i] : nullptr, counts[i]});
  }
  adamw_ema::run_cuda(tensors, {settings[0], settings[1], settings[2], settings[3], settings[4]},
                      {lr, number, clip, skip}, {kDevice, nullptr});
}

int device_of_launches() { return launched_on; }
int device_of_thread() { return current_device; }
}
