// AdamW on a flat slice, one pass over memory. Compiled without fused multiply-add: the arithmetic of csrc/cpu/adamw.cpp, operation by
// operation, so also its bits, but that bias corrections come from another power function.
//
// Bound by memory: 20 to 32 bytes an element. A thread has four elements of each tensor in flight, in accesses of 16 bytes (8 of what is
// stored in 16 bits), 64 KiB and more a multiprocessor.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda.h"

namespace megatronish {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;                    // elements of a thread at a time
constexpr int64_t kMostBlocks = 132 * 16;   // the loop strides over what is left; each block computes two powers
enum Kind : int { kNone = 0, kFloat32 = 1, kFloat64 = 2, kBfloat16 = 3, kFloat16 = 4, kRemainder = 5 };

template <typename W>
struct Constants {
  W decay, one_minus_beta1, beta2, one_minus_beta2, eps;
};

struct Segment {
  int64_t stop, decays, key, offset, inner, row, first;
};

template <typename T>
struct alignas(sizeof(T) * kEach) Four {
  T at[kEach];
};

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

__device__ __forceinline__ uint32_t word_of(const Segment& s, int64_t i, uint32_t step) {
  const int64_t element = i + s.offset;
  const int64_t index = element / s.inner * s.row + s.first + element % s.inner;
  const uint32_t key0 = mix(uint32_t(s.key) ^ mix(uint32_t(uint64_t(s.key) >> 32) ^ mix(step)));
  const uint32_t key1 = mix(key0 ^ (0x9e3779b9u + uint32_t(uint64_t(index) >> 32)));
  return mix(mix(uint32_t(index) ^ key0) + key1);
}

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, bool kStochastic, typename W>
__device__ __forceinline__ T kept(W x, uint32_t random) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t bits = __float_as_uint(x);
    if (kStochastic && (bits & 0x7f800000u) != 0x7f800000u) return __ushort_as_bfloat16(uint16_t((bits + random) >> 16));
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename T>
__device__ __forceinline__ Four<T> load(const T* from, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + kEach <= n) return *reinterpret_cast<const Four<T>*>(from + i);
  Four<T> values;
  for (int j = 0; j < kEach; ++j) values.at[j] = i + j < n ? from[i + j] : T();
  return values;
}

template <typename T>
__device__ __forceinline__ void store(T* to, const Four<T>& values, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + kEach <= n) {
    *reinterpret_cast<Four<T>*>(to + i) = values;
  } else {
    for (int j = 0; j < kEach; ++j)
      if (i + j < n) to[i + j] = values.at[j];
  }
}

// W: what is computed in, and the gradient. P: the master, W; int16_t, remainders beside `low`; or bfloat16 without a master. M: of the
// moments. L: of `low`, void for none.
template <typename W, typename P, typename M, typename L, bool kStochastic>
__global__ void __launch_bounds__(kThreads) adamw_kernel(P* __restrict__ p, W* __restrict__ g, M* __restrict__ m, M* __restrict__ v,
                                                         L* __restrict__ low, int64_t n, const W* __restrict__ scalars,
                                                         const Segment* __restrict__ segments, int num_segments, bool aligned,
                                                         bool zero_gradient, Constants<W> c, AdamWOptions o) {
  constexpr bool kHalves = std::is_same_v<P, int16_t>;
  const W scale = scalars[0];
  const bool applied = isfinite(scale);  // of the whole grid
  if (!applied && !zero_gradient) return;
  __shared__ W corrections[2];
  if (threadIdx.x == 0) {
    const double step = double(scalars[1]);
    corrections[0] = W(o.lr / (1 - pow(o.beta1, step)));
    corrections[1] = W(sqrt(1 - pow(o.beta2, step)));
  }
  __syncthreads();
  const W step_size = corrections[0], root_correction = corrections[1];
  const uint32_t step = uint32_t(scalars[1]);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * kEach;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kEach; i < n; i += stride) {
    if (applied) {
      const Four<W> gradient = load(g, i, n, aligned);
      Four<P> parameter = load(p, i, n, aligned);
      Four<M> first = load(m, i, n, aligned), second = load(v, i, n, aligned);
      using Low = std::conditional_t<std::is_void_v<L>, uint16_t, L>;
      Four<Low> copy;
      if constexpr (kHalves) copy = load(low, i, n, aligned);
      int segment = 0;
      if (num_segments > 0)
        for (int size = num_segments; size > 0;) {  // the first that stops beyond i
          const int half = size / 2;
          if (segments[segment + half].stop <= i) {
            segment += half + 1;
            size -= half + 1;
          } else {
            size = half;
          }
        }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        W decay = c.decay;
        uint32_t word = 0;
        if (num_segments > 0) {
          while (segment + 1 < num_segments && segments[segment].stop <= i + j) ++segment;
          if (!segments[segment].decays) decay = 1;
          if constexpr (kStochastic) word = word_of(segments[segment], i + j, step);
        }
        W old;
        if constexpr (kHalves)
          old = __uint_as_float((uint32_t(__bfloat16_as_ushort(copy.at[j])) << 16) + uint32_t(int32_t(parameter.at[j])));
        else
          old = wide(parameter.at[j]);
        const W scaled = gradient.at[j] * scale;
        W average = wide(first.at[j]), square = wide(second.at[j]);
        average += c.one_minus_beta1 * (scaled - average);
        square = square * c.beta2 + c.one_minus_beta2 * scaled * scaled;
        const W updated = old * decay - step_size * (average / (sqrt(square) / root_correction + c.eps));
        first.at[j] = kept<M, kStochastic>(average, word >> 16);
        second.at[j] = kept<M, kStochastic>(square, word & 0xffffu);
        if constexpr (kHalves) {
          const uint32_t bits = __float_as_uint(updated);
          copy.at[j] = __ushort_as_bfloat16(uint16_t((bits + 0x8000u) >> 16));
          parameter.at[j] = int16_t(bits & 0xffffu);
        } else {
          parameter.at[j] = kept<P, kStochastic>(updated, kStochastic ? mix(word + 0x9e3779b9u) >> 16 : 0);
          if constexpr (std::is_same_v<L, __nv_bfloat16>) copy.at[j] = __float2bfloat16_rn(updated);
          if constexpr (std::is_same_v<L, __half>) copy.at[j] = __float2half_rn(updated);
        }
      }
      store(p, parameter, i, n, aligned);
      store(m, first, i, n, aligned);
      store(v, second, i, n, aligned);
      if constexpr (!std::is_void_v<L>) store(low, copy, i, n, aligned);
    }
    if (zero_gradient) store(g, Four<W>{}, i, n, aligned);
  }
}

void check(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <typename W, typename P, typename M, typename L, bool kStochastic>
void launch(const AdamWSlice& s, const AdamWOptions& o, void* stream) {
  if (s.n == 0) return;
  const Constants<W> constants{W(1 - o.lr * o.weight_decay), W(1 - o.beta1), W(o.beta2), W(1 - o.beta2), W(o.eps)};
  const auto begins = [](const void* address, size_t size) { return reinterpret_cast<uintptr_t>(address) % (size * kEach) == 0; };
  const bool aligned = begins(s.master_data, sizeof(P)) && begins(s.gradient, sizeof(W)) && begins(s.exp_avg, sizeof(M)) &&
                       begins(s.exp_avg_sq, sizeof(M)) && begins(s.low, sizeof(uint16_t));
  const int64_t each = int64_t(kThreads) * kEach;
  const int blocks = int(std::min<int64_t>((s.n + each - 1) / each, kMostBlocks));
  adamw_kernel<W, P, M, L, kStochastic><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<P*>(s.master_data), static_cast<W*>(s.gradient), static_cast<M*>(s.exp_avg), static_cast<M*>(s.exp_avg_sq),
      static_cast<L*>(s.low), s.n, static_cast<const W*>(s.scalars), reinterpret_cast<const Segment*>(s.segments), int(s.num_segments),
      aligned, s.zero_gradient, constants, o);
  check("adamw");
}

using Bfloat16 = __nv_bfloat16;

template <typename P, typename L>
void launch_float32(const AdamWSlice& s, const AdamWOptions& o, void* stream) {
  constexpr bool kDraws = std::is_same_v<P, Bfloat16>;  // beside float32 moments
  if (s.moments == kBfloat16)
    s.stochastic ? launch<float, P, Bfloat16, L, true>(s, o, stream) : launch<float, P, Bfloat16, L, false>(s, o, stream);
  else
    kDraws && s.stochastic ? launch<float, P, float, L, kDraws>(s, o, stream) : launch<float, P, float, L, false>(s, o, stream);
}

constexpr int kMostTensors = 64;

struct Tensors {
  const void* data[kMostTensors];
  int64_t size[kMostTensors];
  int first_block[kMostTensors + 1];
  int count;
};

// A fixed tree, the same for any device. Complete in thread 0.
__device__ __forceinline__ double sum_of_block(double mine) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = mine;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (int(threadIdx.x) < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  return sums[0];
}

// Bound by memory: 4 bytes an element. Squares of float32 are exact in double.
template <typename T>
__global__ void __launch_bounds__(kThreads) square_sum_kernel(Tensors tensors, double* partials) {
  int tensor = 0;
  while (int(blockIdx.x) >= tensors.first_block[tensor + 1]) ++tensor;
  const T* x = static_cast<const T*>(tensors.data[tensor]);
  const int64_t start = int64_t(blockIdx.x - tensors.first_block[tensor]) * kSumBlock;
  const int64_t stop = min(start + kSumBlock, tensors.size[tensor]);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % sizeof(Four<T>) == 0;
  double lanes[kEach] = {};
#pragma unroll 4
  for (int64_t i = start + int64_t(threadIdx.x) * kEach; i < stop; i += kThreads * kEach) {
    const Four<T> values = load(x, i, stop, aligned);
    for (int j = 0; j < kEach; ++j) lanes[j] += double(values.at[j]) * double(values.at[j]);
  }
  const double total = sum_of_block((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) total_kernel(const double* partials, int64_t count, double* out) {
  double mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) mine += partials[i];
  const double total = sum_of_block(mine);
  if (threadIdx.x == 0) *out = total;
}

}  // namespace

void adamw_cuda(const AdamWSlice& s, const AdamWOptions& o, void* stream) {
  if (s.master == kFloat64) return launch<double, double, double, void, false>(s, o, stream);
  if (s.master == kRemainder) return launch_float32<int16_t, Bfloat16>(s, o, stream);
  if (s.master == kBfloat16) return launch_float32<Bfloat16, void>(s, o, stream);
  if (s.low_kind == kBfloat16) return launch_float32<float, Bfloat16>(s, o, stream);
  if (s.low_kind == kFloat16) return launch_float32<float, __half>(s, o, stream);
  launch_float32<float, void>(s, o, stream);
}

void square_sum_cuda(const std::vector<std::pair<const void*, int64_t>>& given, bool is_float64, double* partials, double* out,
                     void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  int64_t done = 0;
  for (size_t at = 0; at < given.size();) {
    Tensors tensors{};
    for (; at < given.size() && tensors.count < kMostTensors; ++at, ++tensors.count) {
      tensors.data[tensors.count] = given[at].first;
      tensors.size[tensors.count] = given[at].second;
      const int64_t blocks = (given[at].second + kSumBlock - 1) / kSumBlock;
      tensors.first_block[tensors.count + 1] = int(tensors.first_block[tensors.count] + blocks);
    }
    const int blocks = tensors.first_block[tensors.count];
    if (blocks == 0) continue;
    if (is_float64)
      square_sum_kernel<double><<<blocks, kThreads, 0, on>>>(tensors, partials + done);
    else
      square_sum_kernel<float><<<blocks, kThreads, 0, on>>>(tensors, partials + done);
    check("square_sum");
    done += blocks;
  }
  total_kernel<<<1, kThreads, 0, on>>>(partials, done, out);
  check("square_sum");
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace megatronish
