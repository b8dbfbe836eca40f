// AdamW on a flat slice, one pass over memory. Compiled without fused multiply-add: the arithmetic of csrc/cpu/adamw.cpp, operation by operation.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda.h"

namespace megatronish {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 16384;  // the loop strides over what is left

template <typename T>
struct Constants {
  T decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;
};

template <typename T>
__global__ void adamw_kernel(T* __restrict__ p, const T* __restrict__ g, T* __restrict__ m, T* __restrict__ v,
                             __nv_bfloat16* __restrict__ copy, int64_t n, const T* __restrict__ gradient_scale, Constants<T> c) {
  const T scale = gradient_scale ? *gradient_scale : T(1);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const T gradient = g[i] * scale;
    const T first = m[i] + c.one_minus_beta1 * (gradient - m[i]);
    const T second = v[i] * c.beta2 + c.one_minus_beta2 * gradient * gradient;
    const T updated = p[i] * c.decay - c.step_size * (first / (sqrt(second) / c.root_correction + c.eps));
    m[i] = first;
    v[i] = second;
    p[i] = updated;
    if (copy) copy[i] = __float2bfloat16_rn(float(updated));
  }
}

template <typename T>
void launch(T* parameter, const T* gradient, T* exp_avg, T* exp_avg_sq, void* copy, int64_t n, const T* gradient_scale, double lr,
            double beta1, double beta2, double eps, double weight_decay, int64_t step, void* stream) {
  if (n == 0) return;
  const Constants<T> constants{T(1 - lr * weight_decay),
                               T(1 - beta1),
                               T(beta2),
                               T(1 - beta2),
                               T(lr / (1 - std::pow(beta1, double(step)))),
                               T(std::sqrt(1 - std::pow(beta2, double(step)))),
                               T(eps)};
  const int blocks = int(std::min<int64_t>((n + kThreads - 1) / kThreads, kMostBlocks));
  adamw_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      parameter, gradient, exp_avg, exp_avg_sq, static_cast<__nv_bfloat16*>(copy), n, gradient_scale, constants);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("adamw: ") + cudaGetErrorString(error));
}

}  // namespace

void adamw_cuda_float32(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, void* bfloat16_copy, int64_t n,
                        const float* gradient_scale, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                        void* stream) {
  launch<float>(parameter, gradient, exp_avg, exp_avg_sq, bfloat16_copy, n, gradient_scale, lr, beta1, beta2, eps, weight_decay, step,
                stream);
}

void adamw_cuda_float64(double* parameter, const double* gradient, double* exp_avg, double* exp_avg_sq, int64_t n,
                        const double* gradient_scale, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                        void* stream) {
  launch<double>(parameter, gradient, exp_avg, exp_avg_sq, nullptr, n, gradient_scale, lr, beta1, beta2, eps, weight_decay, step, stream);
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace megatronish
