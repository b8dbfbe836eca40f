// AdamW (Loshchilov and Hutter 2019) on a flat slice: one pass over memory instead of the dozen of a chain of tensor operations; and
// the sum of squares for a norm. Elementwise and without fused multiply-add, and with sums of a fixed order, so the bits depend on
// neither the number of threads nor the instruction set.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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


inline __attribute__((always_inline)) float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline __attribute__((always_inline)) uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline __attribute__((always_inline)) float widen(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// "lowbias32" of Chris Wellons' hash-prospector: every bit of the result depends on every bit of x.
inline __attribute__((always_inline)) uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

// Of a run of elements of one tensor that follow one another: the low half of the first one's index, and keys of the rest.
struct Draw {
  uint32_t index, key0, key1;

  Draw() : index(0), key0(0), key1(0) {}
  Draw(int64_t key, uint32_t step, int64_t first) : index(uint32_t(first)) {
    key0 = mix(uint32_t(key) ^ mix(uint32_t(uint64_t(key) >> 32) ^ mix(step)));
    key1 = mix(key0 ^ (0x9e3779b9u + uint32_t(uint64_t(first) >> 32)));
  }
};

// Up with probability (what nearest bfloat16 below leaves) / (distance of the two neighbours): 16 random bits are added and cut off.
inline __attribute__((always_inline)) uint16_t to_bfloat16_by(float x, uint32_t random) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + random) >> 16;
  return (bits & 0x7f800000u) == 0x7f800000u ? to_bfloat16(x) : uint16_t(rounded);
}

template <bool kStochastic>
inline __attribute__((always_inline)) uint16_t to_kept(float x, uint32_t random) {
  return kStochastic ? to_bfloat16_by(x, random) : to_bfloat16(x);
}

// P: float, a master weight; int16_t, what `low` leaves of it; uint16_t, a bfloat16 parameter without a master. M: of the moments,
// float or uint16_t for bfloat16. kLow: 0 for none.
template <typename P, typename M, int kLow, bool kStochastic>
inline __attribute__((always_inline)) void range(P* __restrict p, const float* __restrict g, M* __restrict m, M* __restrict v,
                                                 uint16_t* __restrict low, int64_t n, const Constants<float>& constants, const Draw& draw) {
  const Constants<float> c = constants;
  const Draw d = draw;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float first, second, old;
    if constexpr (std::is_same_v<M, float>) {
      first = m[i], second = v[i];
    } else {
      first = widen(m[i]), second = widen(v[i]);
    }
    if constexpr (std::is_same_v<P, float>) {
      old = p[i];
    } else if constexpr (std::is_same_v<P, int16_t>) {
      old = from_bits((uint32_t(low[i]) << 16) + uint32_t(int32_t(p[i])));
    } else {
      old = widen(p[i]);
    }
    const float updated = update(old, g[i], first, second, c);
    const uint32_t word = kStochastic ? mix(mix((d.index + uint32_t(i)) ^ d.key0) + d.key1) : 0;
    if constexpr (std::is_same_v<M, float>) {
      m[i] = first, v[i] = second;
    } else {
      m[i] = to_kept<kStochastic>(first, word >> 16);
      v[i] = to_kept<kStochastic>(second, word & 0xffffu);
    }
    if constexpr (std::is_same_v<P, float>) {
      p[i] = updated;
      if constexpr (kLow == kBfloat16) low[i] = to_bfloat16(updated);
      if constexpr (kLow == kFloat16) low[i] = to_float16(updated);
    } else if constexpr (std::is_same_v<P, int16_t>) {
      // Ties away from zero: to even, two masters would have the same two halves.
      const uint32_t bits = to_bits(updated);
      low[i] = uint16_t((bits + 0x8000u) >> 16);
      p[i] = int16_t(bits & 0xffffu);
    } else {
      p[i] = to_kept<kStochastic>(updated, kStochastic ? mix(word + 0x9e3779b9u) >> 16 : 0);
    }
  }
}

using Range = void (*)(void*, const float*, void*, void*, uint16_t*, int64_t, const Constants<float>&, const Draw&);

// Attributes of clones go to functions, not to templates.
#define MEGATRONISH_RANGE(NAME, P, M, LOW, STOCHASTIC)                                                                                 \
  MEGATRONISH_CLONES                                                                                                                   \
  void NAME(void* p, const float* g, void* m, void* v, uint16_t* low, int64_t n, const Constants<float>& c, const Draw& d) {           \
    range<P, M, LOW, STOCHASTIC>(static_cast<P*>(p), g, static_cast<M*>(m), static_cast<M*>(v), low, n, c, d);                         \
  }

MEGATRONISH_RANGE(full_wide, float, float, 0, false)
MEGATRONISH_RANGE(full_wide_bfloat16, float, float, kBfloat16, false)
MEGATRONISH_RANGE(full_wide_float16, float, float, kFloat16, false)
MEGATRONISH_RANGE(full_narrow, float, uint16_t, 0, false)
MEGATRONISH_RANGE(full_narrow_bfloat16, float, uint16_t, kBfloat16, false)
MEGATRONISH_RANGE(full_narrow_float16, float, uint16_t, kFloat16, false)
MEGATRONISH_RANGE(full_drawn, float, uint16_t, 0, true)
MEGATRONISH_RANGE(full_drawn_bfloat16, float, uint16_t, kBfloat16, true)
MEGATRONISH_RANGE(full_drawn_float16, float, uint16_t, kFloat16, true)
MEGATRONISH_RANGE(remainder_wide, int16_t, float, kBfloat16, false)
MEGATRONISH_RANGE(remainder_narrow, int16_t, uint16_t, kBfloat16, false)
MEGATRONISH_RANGE(remainder_drawn, int16_t, uint16_t, kBfloat16, true)
MEGATRONISH_RANGE(none_wide, uint16_t, float, 0, false)
MEGATRONISH_RANGE(none_wide_drawn, uint16_t, float, 0, true)
MEGATRONISH_RANGE(none_narrow, uint16_t, uint16_t, 0, false)
MEGATRONISH_RANGE(none_drawn, uint16_t, uint16_t, 0, true)

Range choose(const AdamWTensors& t) {
  const bool narrow = t.moments == kBfloat16, drawn = t.stochastic;
  if (t.master == kRemainder) return !narrow ? remainder_wide : drawn ? remainder_drawn : remainder_narrow;
  if (t.master == kBfloat16) return narrow ? (drawn ? none_drawn : none_narrow) : (drawn ? none_wide_drawn : none_wide);
  const int low = t.low_kind == kBfloat16 ? 1 : t.low_kind == kFloat16 ? 2 : 0;
  static const Range wide[] = {full_wide, full_wide_bfloat16, full_wide_float16};
  static const Range nearest[] = {full_narrow, full_narrow_bfloat16, full_narrow_float16};
  static const Range random[] = {full_drawn, full_drawn_bfloat16, full_drawn_float16};
  return (!narrow ? wide : drawn ? random : nearest)[low];
}

MEGATRONISH_CLONES
void range_float64(double* __restrict p, const double* __restrict g, double* __restrict m, double* __restrict v, int64_t n,
                   const Constants<double>& constants) {
  const Constants<double> c = constants;
  for (int64_t i = 0; i < n; ++i) p[i] = update(p[i], g[i], m[i], v[i], c);
}

constexpr int64_t kSmallestPart = 1 << 16;  // below this a thread costs more than it saves
constexpr int64_t kPiece = 1 << 10;         // elements at a time: what is done to them in turn finds them in the first cache

void stream(uint16_t* to, const uint16_t* from, int64_t n) {
#if defined(__SSE2__)
  int64_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % 64 != 0; ++i) to[i] = from[i];
  for (; i + 32 <= n; i += 32)
    for (int j = 0; j < 32; j += 8)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + j)));
  for (; i < n; ++i) to[i] = from[i];
#else
  std::memcpy(to, from, size_t(n) * sizeof *to);
#endif
}

// work(start, stop, decays, draw) on stretches of [start, stop) that decay alike, and where it is drawn, lie one after the other in
// one tensor.
template <typename Work>
void by_segment(const AdamWSegments& segments, int64_t start, int64_t stop, bool stochastic, uint32_t step, const Work& work) {
  if (segments.count == 0) return work(start, stop, true, Draw());
  const Segment* s = std::upper_bound(segments.rows, segments.rows + segments.count, start,
                                      [](int64_t at, const Segment& segment) { return at < segment.stop; });
  for (const Segment* end = segments.rows + segments.count; s != end && start < stop; ++s) {
    const int64_t last = std::min(stop, s->stop);
    while (start < last) {
      int64_t size = last - start, first = 0;
      if (stochastic) {
        const int64_t element = start + s->offset;
        first = element / s->inner * s->row + s->first + element % s->inner;
        size = std::min({size, s->inner - element % s->inner, (int64_t(1) << 32) - (first & 0xffffffff)});
      }
      work(start, start + size, s->decays != 0, Draw(s->key, step, first));
      start += size;
    }
  }
}

constexpr int kLanes = 32;
constexpr int64_t kSumBlock = 1 << 14;  // elements of one partial sum; a part of what a result is

// Squares of float32 are exact in double, so the error is that of some hundred additions a lane, and of as many of blocks. From cache this
// runs at three times the rate of memory; fetching ahead gives a tenth.
template <typename T>
inline __attribute__((always_inline)) double block_sum(const T* __restrict x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t ahead = 0; ahead < kLanes * sizeof(T); ahead += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 4096 + ahead);
    for (int j = 0; j < kLanes; ++j) lanes[j] += double(x[i + j]) * double(x[i + j]);
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += double(x[i]) * double(x[i]);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

MEGATRONISH_CLONES
double sum_float32(const float* x, int64_t n) { return block_sum(x, n); }

MEGATRONISH_CLONES
double sum_float64(const double* x, int64_t n) { return block_sum(x, n); }

template <typename T, typename Sum>
double square_sum(const std::vector<std::pair<const T*, int64_t>>& tensors, int threads, Sum sum) {
  std::vector<std::pair<const T*, int64_t>> blocks;
  for (auto [x, n] : tensors)
    for (int64_t at = 0; at < n; at += kSumBlock) blocks.emplace_back(x + at, std::min(kSumBlock, n - at));
  std::vector<double> sums(blocks.size());
  parallel_for(int64_t(blocks.size()), kSmallestPart / kSumBlock, threads, [&](int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; ++i) sums[i] = sum(blocks[i].first, blocks[i].second);
  });
  double total = 0;
  for (double one : sums) total += one;
  return total;
}

}  // namespace

void adamw_float32(const AdamWTensors& t, int64_t n, const float* scalars, const AdamWSegments& segments, const AdamW& options,
                   int threads) {
  float* gradient = t.gradient;
  if (!std::isfinite(scalars[0])) {
    if (t.zero_gradient) std::fill(gradient, gradient + n, 0.0f);
    return;
  }
  AdamW without = options;
  without.weight_decay = 0;
  const Constants<float> constants[2] = {Constants<float>(without, scalars), Constants<float>(options, scalars)};
  const Range run = choose(t);
  const int64_t p = t.master == kFloat32 ? 4 : 2, m = t.moments == kFloat32 ? 4 : 2;
  const uint32_t step = uint32_t(scalars[1]);
  // Streamed, since a plain store would read the line first; beside remainders it has been read anyway.
  const bool streams = t.low != nullptr && t.master == kFloat32;
  parallel_for(n, kSmallestPart, threads, [&](int64_t part, int64_t end) {
    alignas(64) uint16_t copy[kPiece];
    by_segment(segments, part, end, t.stochastic, step, [&](int64_t start, int64_t stop, bool decays, Draw draw) {
      for (int64_t i = start; i < stop;) {
        const int64_t size = streams || t.zero_gradient ? std::min(kPiece, stop - i) : stop - i;
        run(static_cast<char*>(t.master_data) + i * p, gradient + i, static_cast<char*>(t.exp_avg) + i * m,
            static_cast<char*>(t.exp_avg_sq) + i * m, streams ? copy : t.low + i, size, constants[decays], draw);
        if (streams) stream(t.low + i, copy, size);
        if (t.zero_gradient) std::memset(gradient + i, 0, size_t(size) * sizeof(float));
        i += size;
        draw.index += uint32_t(size);
      }
    });
#if defined(__SSE2__)
    _mm_sfence();  // the streamed copies are seen by whoever joins this thread
#endif
  });
}

void adamw_float64(const AdamWTensors& t, int64_t n, const double* scalars, const AdamWSegments& segments, const AdamW& options,
                   int threads) {
  double* gradient = static_cast<double*>(static_cast<void*>(t.gradient));
  if (!std::isfinite(scalars[0])) {
    if (t.zero_gradient) std::fill(gradient, gradient + n, 0.0);
    return;
  }
  AdamW without = options;
  without.weight_decay = 0;
  const Constants<double> constants[2] = {Constants<double>(without, scalars), Constants<double>(options, scalars)};
  double *parameter = static_cast<double*>(t.master_data), *m = static_cast<double*>(t.exp_avg), *v = static_cast<double*>(t.exp_avg_sq);
  parallel_for(n, kSmallestPart, threads, [&](int64_t part, int64_t end) {
    by_segment(segments, part, end, false, 0, [&](int64_t start, int64_t stop, bool decays, Draw) {
      range_float64(parameter + start, gradient + start, m + start, v + start, stop - start, constants[decays]);
    });
    if (t.zero_gradient) std::fill(gradient + part, gradient + end, 0.0);
  });
}

double square_sum_float32(const std::vector<std::pair<const float*, int64_t>>& tensors, int threads) {
  return square_sum(tensors, threads, sum_float32);
}

double square_sum_float64(const std::vector<std::pair<const double*, int64_t>>& tensors, int threads) {
  return square_sum(tensors, threads, sum_float64);
}

}  // namespace megatronish
