// Native CUDA operations. Pointers are device pointers, `stream` is a cudaStream_t; launches go to the current device and do not wait.
// A launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace megatronish {

// What AdamW needs beside its tensors, as torch.optim.AdamW names it.
struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

// As in cpu.h, and so are the kinds of `master`, `moments` and `low_kind`, and the rows of `segments` (on the device, seven numbers
// each).
struct AdamWSlice {
  void* master_data;
  int master;
  void *gradient, *exp_avg, *exp_avg_sq;
  int moments;
  void* low;
  int low_kind;
  int64_t n;
  const void* scalars;
  const int64_t* segments;
  int64_t num_segments;
  bool stochastic, zero_gradient;
};

// As in cpu.h; `scalars` is read on the device, so neither the clip factor nor whether a step counts visits the host.
void adamw_cuda(const AdamWSlice& slice, const AdamWOptions& options, void* stream);

// Elements of one partial sum of `square_sum_cuda`.
constexpr int64_t kSumBlock = 1 << 14;

// *out = the sum of squares of all elements of all (address, size), float32 or float64, in float64 and an order that depends on the
// sizes alone. `partials`: room for a float64 a block of kSumBlock elements, or a part of one, of each tensor.
void square_sum_cuda(const std::vector<std::pair<const void*, int64_t>>& tensors, bool is_float64, double* partials, double* out,
                     void* stream);

// Number of CUDA devices; 0 where there is no driver or no device.
int device_count();

}  // namespace megatronish
