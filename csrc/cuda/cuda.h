// Native CUDA operations. Pointers are device pointers, `stream` is a cudaStream_t; launches go to the current device and do not wait.
// A launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

namespace megatronish {

// As in cpu.h; `gradient_scale` is read on the device, so the clip factor never visits the host. T is float or double; only float has a copy.
void adamw_cuda_float32(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, void* bfloat16_copy, int64_t n,
                        const float* gradient_scale, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                        void* stream);
void adamw_cuda_float64(double* parameter, const double* gradient, double* exp_avg, double* exp_avg_sq, int64_t n,
                        const double* gradient_scale, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                        void* stream);

// Number of CUDA devices; 0 where there is no driver or no device.
int device_count();

}  // namespace megatronish
