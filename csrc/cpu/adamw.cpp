// AdamW (Loshchilov and Hutter 2019) on a flat slice: one pass over memory instead of the dozen of a chain of tensor operations.
// Elementwise and without fused multiply-add, so the bits depend on neither the number of threads nor the instruction set.

#include <cmath>
#include <cstring>

#include "cpu.h"

namespace megatronish {
namespace {

// Constants of one step, computed in double and then rounded once, as torch.optim.AdamW does.
template <typename T>
struct Constants {
  T scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;

  Constants(const AdamW& o, const T* gradient_scale)
      : scale(gradient_scale ? *gradient_scale : T(1)),
        decay(T(1 - o.lr * o.weight_decay)),
        one_minus_beta1(T(1 - o.beta1)),
        beta2(T(o.beta2)),
        one_minus_beta2(T(1 - o.beta2)),
        step_size(T(o.lr / (1 - std::pow(o.beta1, double(o.step))))),
        root_correction(T(std::sqrt(1 - std::pow(o.beta2, double(o.step))))),
        eps(T(o.eps)) {}
};

template <typename T>
inline __attribute__((always_inline)) T update(T p, T g, T& m, T& v, const Constants<T>& c) {
  g *= c.scale;
  m += c.one_minus_beta1 * (g - m);
  v = v * c.beta2 + c.one_minus_beta2 * g * g;
  return p * c.decay - c.step_size * (m / (std::sqrt(v) / c.root_correction + c.eps));
}

inline __attribute__((always_inline)) uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding could carry a NaN's payload into infinity or zero.
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MEGATRONISH_CLONES
void range_float32(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
                   const Constants<float>& constants) {
  const Constants<float> c = constants;
  for (int64_t i = 0; i < n; ++i) p[i] = update(p[i], g[i], m[i], v[i], c);
}

MEGATRONISH_CLONES
void range_bfloat16(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                    uint16_t* __restrict copy, int64_t n, const Constants<float>& constants) {
  const Constants<float> c = constants;
  for (int64_t i = 0; i < n; ++i) {
    const float updated = update(p[i], g[i], m[i], v[i], c);
    p[i] = updated;
    copy[i] = to_bfloat16(updated);
  }
}

MEGATRONISH_CLONES
void range_float64(double* __restrict p, const double* __restrict g, double* __restrict m, double* __restrict v, int64_t n,
                   const Constants<double>& constants) {
  const Constants<double> c = constants;
  for (int64_t i = 0; i < n; ++i) p[i] = update(p[i], g[i], m[i], v[i], c);
}

constexpr int64_t kSmallestPart = 1 << 16;  // below this a thread costs more than it saves

}  // namespace

void adamw_float32(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, uint16_t* bfloat16_copy, int64_t n,
                   const float* gradient_scale, const AdamW& options, int threads) {
  const Constants<float> constants(options, gradient_scale);
  parallel_for(n, kSmallestPart, threads, [&](int64_t start, int64_t stop) {
    if (bfloat16_copy)
      range_bfloat16(parameter + start, gradient + start, exp_avg + start, exp_avg_sq + start, bfloat16_copy + start, stop - start,
                     constants);
    else
      range_float32(parameter + start, gradient + start, exp_avg + start, exp_avg_sq + start, stop - start, constants);
  });
}

void adamw_float64(double* parameter, const double* gradient, double* exp_avg, double* exp_avg_sq, int64_t n,
                   const double* gradient_scale, const AdamW& options, int threads) {
  const Constants<double> constants(options, gradient_scale);
  parallel_for(n, kSmallestPart, threads, [&](int64_t start, int64_t stop) {
    range_float64(parameter + start, gradient + start, exp_avg + start, exp_avg_sq + start, stop - start, constants);
  });
}

}  // namespace megatronish
