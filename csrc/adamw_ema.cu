#include <cuda_bf16.h>

#include <cmath>

#include "cuda.hpp"
#include "multi_tensor.cuh"

namespace adamw_ema {
namespace {

using multi_tensor::kThreads;

constexpr int kLanes = 4;
constexpr int kChunk = 4096;  // elements of a block: four vectors of each thread

using Table = multi_tensor::Table<Tensor>;

struct Constants {
  float first, beta2, second, log_beta1, log_beta2, eps, weight_decay, ema;
};

static_assert(sizeof(Table) + sizeof(Constants) + sizeof(CudaScalars) <= 4096, "kernel arguments");

// What every element of a step shares.
struct Factors {
  float clip, decay, step_size, root;
};

// 1 - beta^number without the digits that this subtraction loses in float.
__device__ Factors factors(const Constants& c, const CudaScalars& s) {
  const float lr = *s.lr, number = *s.number;
  return {s.clip == nullptr ? 1.0f : *s.clip, __fmul_rn(lr, c.weight_decay),
          __fdiv_rn(lr, -expm1f(__fmul_rn(number, c.log_beta1))),
          __fsqrt_rn(-expm1f(__fmul_rn(number, c.log_beta2)))};
}

// Rounds where it says so, and nowhere else: the same bits whichever way elements are loaded.
__device__ void update(float& p, float& m, float& v, float gradient, const Constants& c,
                       const Factors& f) {
  const float g = __fmul_rn(f.clip, gradient);
  m = __fmaf_rn(c.first, __fsub_rn(g, m), m);
  v = __fmaf_rn(c.beta2, v, __fmul_rn(__fmul_rn(c.second, g), g));
  const float decayed = __fmaf_rn(-f.decay, p, p);
  const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), f.root), c.eps);
  p = __fmaf_rn(-f.step_size, __fdiv_rn(m, denominator), decayed);
}

template <bool kEma, bool kCopy>
__global__ __launch_bounds__(kThreads) void step_kernel(
    const __grid_constant__ Table table, const __grid_constant__ Constants c,
    const __grid_constant__ CudaScalars scalars) {
  if (scalars.skip != nullptr && *scalars.skip != 0.0f) return;
  __shared__ Factors shared;
  if (threadIdx.x == 0) shared = factors(c, scalars);
  __syncthreads();
  const Factors f = shared;

  const int block = static_cast<int>(blockIdx.x);
  const int index = multi_tensor::tensor_of(table, block);
  const Tensor& tensor = table.tensors[index];
  const std::int64_t begin = static_cast<std::int64_t>(block - table.first[index]) * kChunk;
  const std::int64_t left = tensor.count - begin;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  float* const parameter = tensor.parameter + begin;
  const float* const gradient = tensor.gradient + begin;
  float* const exp_avg = tensor.exp_avg + begin;
  float* const exp_avg_sq = tensor.exp_avg_sq + begin;
  float* const ema = kEma ? tensor.ema + begin : nullptr;
  auto* const copy = kCopy ? reinterpret_cast<__nv_bfloat16*>(tensor.copy) + begin : nullptr;
  const bool aligned =
      multi_tensor::aligned<kLanes>(parameter) && multi_tensor::aligned<kLanes>(gradient) &&
      multi_tensor::aligned<kLanes>(exp_avg) && multi_tensor::aligned<kLanes>(exp_avg_sq) &&
      multi_tensor::aligned<kLanes>(ema) && multi_tensor::aligned<kLanes>(copy);

  for (int i = static_cast<int>(threadIdx.x) * kLanes; i < count; i += kThreads * kLanes) {
    const int valid = count - i;
    const bool whole = aligned && valid >= kLanes;
    auto p = multi_tensor::load<kLanes>(parameter + i, whole, valid);
    const auto g = multi_tensor::load<kLanes>(gradient + i, whole, valid);
    auto m = multi_tensor::load<kLanes>(exp_avg + i, whole, valid);
    auto v = multi_tensor::load<kLanes>(exp_avg_sq + i, whole, valid);
    multi_tensor::Pack<float, kLanes> average;
    multi_tensor::Pack<__nv_bfloat16, kLanes> rounded;
    if (kEma) average = multi_tensor::load<kLanes>(ema + i, whole, valid);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      update(p.lane[j], m.lane[j], v.lane[j], g.lane[j], c, f);
      if (kEma) {
        average.lane[j] = __fmaf_rn(c.ema, __fsub_rn(p.lane[j], average.lane[j]), average.lane[j]);
      }
      if (kCopy) rounded.lane[j] = __float2bfloat16_rn(p.lane[j]);
    }
    multi_tensor::store(parameter + i, p, whole, valid);
    multi_tensor::store(exp_avg + i, m, whole, valid);
    multi_tensor::store(exp_avg_sq + i, v, whole, valid);
    if (kEma) multi_tensor::store(ema + i, average, whole, valid);
    if (kCopy) multi_tensor::store(copy + i, rounded, whole, valid);
  }
}

}  // namespace

void run_cuda(const std::vector<Tensor>& tensors, const CudaSettings& s, const CudaScalars& scalars,
              cuda::Queue queue) {
  const Constants constants{
      static_cast<float>(1.0 - s.beta1),     static_cast<float>(s.beta2),
      static_cast<float>(1.0 - s.beta2),     static_cast<float>(std::log(s.beta1)),
      static_cast<float>(std::log(s.beta2)), static_cast<float>(s.eps),
      static_cast<float>(s.weight_decay),    static_cast<float>(1.0 - s.ema_decay)};
  const bool ema = tensors.front().ema != nullptr, copy = tensors.front().copy != nullptr;
  const auto kernel = ema ? (copy ? step_kernel<true, true> : step_kernel<true, false>)
                          : (copy ? step_kernel<false, true> : step_kernel<false, false>);
  multi_tensor::for_tables(
      tensors, kChunk, queue, "adamw_ema", [&](const Table& table, cudaStream_t stream) {
        kernel<<<table.first[table.size], kThreads, 0, stream>>>(table, constants, scalars);
      });
}

}  // namespace adamw_ema
