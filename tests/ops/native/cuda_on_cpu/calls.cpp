// What csrc/cuda_bindings.cpp binds, for ctypes.
#include <vector>

#include "cuda.hpp"

extern "C" {

std::int64_t feature_kd_workspace(const std::int64_t* counts, int size) {
  return feature_kd::workspace({counts, counts + size});
}

void feature_kd_run(float* losses, void** gradients, void** students, void** teachers,
                    const std::int64_t* counts, const float* coefficients, int size, int dtype,
                    void* workspace) {
  std::vector<feature_kd::CudaPair> pairs;
  for (int k = 0; k < size; ++k) {
    pairs.push_back({students[k], teachers[k], gradients[k], counts[k], coefficients[k]});
  }
  feature_kd::run_cuda(losses, workspace, pairs, static_cast<feature_kd::Dtype>(dtype), {});
}

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
                      {lr, number, clip, skip}, {});
}
}
