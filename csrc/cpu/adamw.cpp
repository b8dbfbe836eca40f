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

  Constants(const AdamW& o, const T* scalars)
      : scale(scalars[0]),
        decay(T(1 - o.lr * o.weight_decay)),
        one_minus_beta1(T(1 - o.beta1)),
        beta2(T(o.beta2)),
        one_minus_beta2(T(1 - o.beta2)),
        step_size(T(o.lr / (1 - std::pow(o.beta1, double(scalars[1]))))),
        root_correction(T(std::sqrt(1 - std::pow(o.beta2, double(scalars[1]))))),
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

// Branches only choose between values, so that the loop over them becomes vector code.
inline __attribute__((always_inline)) uint16_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 half's spacing is 2^-24, that of floats in [0.5, 1): the addition rounds.
  float small;
  std::memcpy(&small, &magnitude, sizeof small);
  small += 0.5f;
  uint32_t subnormal;
  std::memcpy(&subnormal, &small, sizeof subnormal);
  subnormal -= 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t(sign | (magnitude >= 0x47800000u ? large : finite));
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
void range_float16(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                   uint16_t* __restrict copy, int64_t n, const Constants<float>& constants) {
  const Constants<float> c = constants;
  for (int64_t i = 0; i < n; ++i) {
    const float updated = update(p[i], g[i], m[i], v[i], c);
    p[i] = updated;
    copy[i] = to_float16(updated);
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

void adamw_float32(float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, LowCopy low, int64_t n,
                   const float* scalars, const AdamW& options, int threads) {
  if (!std::isfinite(scalars[0])) return;
  const Constants<float> constants(options, scalars);
  parallel_for(n, kSmallestPart, threads, [&](int64_t start, int64_t stop) {
    float *p = parameter + start, *m = exp_avg + start, *v = exp_avg_sq + start;
    const float* g = gradient + start;
    if (low.bfloat16)
      range_bfloat16(p, g, m, v, low.bfloat16 + start, stop - start, constants);
    else if (low.float16)
      range_float16(p, g, m, v, low.float16 + start, stop - start, constants);
    else
      range_float32(p, g, m, v, stop - start, constants);
  });
}

void adamw_float64(double* parameter, const double* gradient, double* exp_avg, double* exp_avg_sq, int64_t n, const double* scalars,
                   const AdamW& options, int threads) {
  if (!std::isfinite(scalars[0])) return;
  const Constants<double> constants(options, scalars);
  parallel_for(n, kSmallestPart, threads, [&](int64_t start, int64_t stop) {
    range_float64(parameter + start, gradient + start, exp_avg + start, exp_avg_sq + start, stop - start, constants);
  });
}

}  // namespace megatronish
