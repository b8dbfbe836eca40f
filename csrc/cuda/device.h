// What the kernels share: 16-bit types to float and back, 16-byte accesses, sums over a warp and a block, launches.
// The same text compiles for the CPU, where tests run it: there tests/kernels/cuda_on_cpu stands in for CUDA's headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace megatronish {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// 16 bytes: the widest access of one thread.
template <typename T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 bits;

  __device__ __forceinline__ static Pack load(const T* from) {
#ifndef __CUDACC__
    emulate::check_aligned(from, 16);
#endif
    return {*reinterpret_cast<const uint4*>(from)};
  }
  __device__ __forceinline__ void store(T* to) const {
#ifndef __CUDACC__
    emulate::check_aligned(to, 16);
#endif
    *reinterpret_cast<uint4*>(to) = bits;
  }
  __device__ __forceinline__ void unpack(float (&x)[kSize]) const {
    T values[kSize];
    memcpy(values, &bits, 16);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = to_float(values[i]);
  }
  __device__ __forceinline__ static Pack pack(const float (&x)[kSize]) {
    T values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = from_float<T>(x[i]);
    Pack packed;
    memcpy(&packed.bits, values, 16);
    return packed;
  }
};

// The block's dynamic shared memory; its size is the launch's.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
#else
  return emulate::dynamic_shared();
#endif
}

// The sum over the warp, in every lane; always added in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Throws what a launch, or a call before it, ended with.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int num_multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

}  // namespace megatronish
