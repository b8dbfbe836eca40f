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

enum class Dtype { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Queries [S, B, H, K], keys and values [S, B, G, K]; H is a multiple of G. S and S * B * H below 2^31, B, G and H below 2^16.
struct AttentionShape {
  int64_t S, B, H, G, K;
  Dtype dtype;
};

// Strides in elements of S, B and heads; multiples of 8, the addresses multiples of 16 bytes. Along K elements lie side by side.
struct AttentionInputs {
  const void *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];
};

// dout and out [S, B, H, K], dq, dk and dv in the inputs' shapes: contiguous. lse and delta, which is scratch: float32 [B, H, S].
struct AttentionGradients {
  const void *dout, *out;
  const float* lse;
  float* delta;
  void *dq, *dk, *dv;
};

// Causal attention, float16 or bfloat16, K 64 or 128: out [S, B, H, K] contiguous, lse [B, H, S] of the scaled scores.
void attention_forward(const AttentionShape& shape, const AttentionInputs& inputs, void* out, float* lse, double scale, void* stream);
void attention_backward(const AttentionShape& shape, const AttentionInputs& inputs, const AttentionGradients& gradients, double scale,
                        void* stream);

// Rows [rows, D] of one dtype, contiguous, 16-byte addresses, D a multiple of 16 bytes. LayerNorm where there is a bias, else RMSNorm.
// Where there is a residual, `sum` gets x + residual and the norm is of that. Statistics: one float32 a row; `mean` of LayerNorm only.
struct NormForward {
  Dtype dtype;
  int64_t rows, D;
  const void *x, *residual, *weight, *bias;
  void *y, *sum;
  float *mean, *rstd;
  double eps;
};

// x is what was normalised (the sum, where there was a residual), dsum the gradient that it has besides, or null. LayerNorm where there
// is a mean. dweight_parts, and dbias_parts of LayerNorm: scratch, float32 [parts, D] with parts = norm_parts(...).
struct NormBackward {
  Dtype dtype;
  int64_t rows, D, parts;
  const void *dy, *dsum, *x, *weight;
  const float *mean, *rstd;
  void *dx, *dweight, *dbias;
  float *dweight_parts, *dbias_parts;
};

void norm_forward(const NormForward& n, void* stream);
void norm_backward(const NormBackward& n, void* stream);
int64_t norm_parts(int64_t rows, int64_t D, Dtype dtype, bool center);

// Number of CUDA devices; 0 where there is no driver or no device.
int device_count();

}  // namespace megatronish
