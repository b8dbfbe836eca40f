// Native CUDA operations. Pointers are device pointers, `stream` is a cudaStream_t; launches go to the current device and do not wait.
// A launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

namespace megatronish {

// What AdamW needs beside its tensors, as torch.optim.AdamW names it.
struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

// As in cpu.h; `scalars` is read on the device, so neither the clip factor nor whether a step counts visits the host.
void adamw_cuda_float32(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, void* bfloat16_copy,
                        void* float16_copy, int64_t n, const float* scalars, const AdamWOptions& options, void* stream);
void adamw_cuda_float64(double* parameter, const double* gradient, double* exp_avg, double* exp_avg_sq, int64_t n,
                        const double* scalars, const AdamWOptions& options, void* stream);

// Number of CUDA devices; 0 where there is no driver or no device.
int device_count();

}  // namespace megatronish
