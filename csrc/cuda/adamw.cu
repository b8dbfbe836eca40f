// AdamW on a flat slice, one pass over memory. Compiled without fused multiply-add: the arithmetic of csrc/cpu/adamw.cpp, operation by operation.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda.h"

namespace megatronish {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // the loop strides over what is left; each block computes two powers

template <typename T>
struct Constants {
  T decay, one_minus_beta1, beta2, one_minus_beta2, eps;
};

struct LowCopy {
  __nv_bfloat16* bfloat16;
  __half* float16;
};

// The bias corrections depend on the number of updates, which only the device knows: one thread a block computes them in double.
template <typename T>
__global__ void adamw_kernel(T* __restrict__ p, const T* __restrict__ g, T* __restrict__ m, T* __restrict__ v, LowCopy low, int64_t n,
                             const T* __restrict__ scalars, Constants<T> c, AdamWOptions o) {
  const T scale = scalars[0];
  if (!isfinite(scale)) return;  // the whole grid
  __shared__ T corrections[2];
  if (threadIdx.x == 0) {
    const double step = double(scalars[1]);
    corrections[0] = T(o.lr / (1 - pow(o.beta1, step)));
    corrections[1] = T(sqrt(1 - pow(o.beta2, step)));
  }
  __syncthreads();
  const T step_size = corrections[0], root_correction = corrections[1];
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const T gradient = g[i] * scale;
    const T first = m[i] + c.one_minus_beta1 * (gradient - m[i]);
    const T second = v[i] * c.beta2 + c.one_minus_beta2 * gradient * gradient;
    const T updated = p[i] * c.decay - step_size * (first / (sqrt(second) / root_correction + c.eps));
    m[i] = first;
    v[i] = second;
    p[i] = updated;
    if (low.bfloat16) low.bfloat16[i] = __float2bfloat16_rn(float(updated));
    if (low.float16) low.float16[i] = __float2half_rn(float(updated));
  }
}

template <typename T>
void launch(T* parameter, const T* gradient, T* exp_avg, T* exp_avg_sq, LowCopy low, int64_t n, const T* scalars,
            const AdamWOptions& o, void* stream) {
  if (n == 0) return;
  const Constants<T> constants{T(1 - o.lr * o.weight_decay), T(1 - o.beta1), T(o.beta2), T(1 - o.beta2), T(o.eps)};
  const int blocks = int(std::min<int64_t>((n + kThreads - 1) / kThreads, kMostBlocks));
  adamw_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(parameter, gradient, exp_avg, exp_avg_sq, low, n, scalars,
                                                                              constants, o);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("adamw: ") + cudaGetErrorString(error));
}

}  // namespace

void adamw_cuda_float32(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, void* bfloat16_copy,
                        void* float16_copy, int64_t n, const float* scalars, const AdamWOptions& options, void* stream) {
  const LowCopy low{static_cast<__nv_bfloat16*>(bfloat16_copy), static_cast<__half*>(float16_copy)};
  launch<float>(parameter, gradient, exp_avg, exp_avg_sq, low, n, scalars, options, stream);
}

void adamw_cuda_float64(double* parameter, const double* gradient, double* exp_avg, double* exp_avg_sq, int64_t n,
                        const double* scalars, const AdamWOptions& options, void* stream) {
  launch<double>(parameter, gradient, exp_avg, exp_avg_sq, {}, n, scalars, options, stream);
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace megatronish
