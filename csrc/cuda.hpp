// A kernel for NVIDIA GPUs: the arithmetic of adamw_ema.hpp on tensors of the device, for many
// tensors per launch. Nothing here allocates or waits for the device, and what changes from step to
// step is read from device memory: calls can be captured into CUDA graphs. A launch that fails
// throws std::runtime_error.
//
// Accesses are 16 bytes wide where all tensors of an entry are aligned to that.
//
// Determinism: there are no atomics and no sums over elements; the bits do not depend on alignment,
// nor on the GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "adamw_ema.hpp"

namespace cuda {

// Where to launch. `stream` is a cudaStream_t.
struct Queue {
  int device;
  void* stream;
};

}  // namespace cuda

namespace adamw_ema {

// What a step has on the device. `clip` and `skip` may be null: 1 and 0.
struct CudaScalars {
  const float* lr;
  const float* number;  // of the step, 1 at first
  const float* clip;
  const float* skip;  // not 0: write nothing at all
};

struct CudaSettings {
  double beta1, beta2, eps, weight_decay, ema_decay;
};

void run_cuda(const std::vector<Tensor>& tensors, const CudaSettings& settings,
              const CudaScalars& scalars, cuda::Queue queue);

}  // namespace adamw_ema
