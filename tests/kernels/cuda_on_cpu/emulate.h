// Runs CUDA device code on the CPU, for tests: what .cu files use of CUDA, for g++. Blocks run one after the other, the threads of a
// block as fibers of one system thread that change places where a thread waits for others. The order of threads and of blocks, and
// whether asynchronous copies land at once or as late as they may, are chosen (configure): code without races gives the same bits.
// Found and thrown as std::runtime_error: memory outside of shared memory or of guarded tensors (by guard pages), misaligned 16-byte
// accesses, lanes of a warp in different collective operations, threads that wait for ever. Shared memory starts as NaN.
// Not found: a barrier that is missing but never matters in the orders tried; static __shared__ variables are not guarded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __launch_bounds__(...)

using std::isfinite;
using std::isnan;
using std::max;
using std::min;
using std::sqrt;  // of a float: a float

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
float __bfloat162float(__nv_bfloat16 x);
float __half2float(__half x);
__nv_bfloat16 __float2bfloat16_rn(float x);
__half __float2half_rn(float x);
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The runtime: one device of two multiprocessors, on which any launch succeeds.
using cudaStream_t = struct StreamOfNoDevice*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}

namespace emulate {

// Where the thread that runs now stands.
struct Place {
  dim3 thread, block, block_dim, grid_dim;
};
extern Place place;

// What a lane gives to, or gets from, its warp.
struct Slot {
  alignas(16) uint32_t words[16];
};
using Together = void (*)(const Slot* given, Slot* results);

// A collective operation of all 32 lanes: the last to come computes every lane's result. `name` must be the same in all lanes.
Slot collective(const char* name, const Slot& given, Together together);
void wait_for_block();

unsigned char* dynamic_shared();
// Throws unless `bytes` at the address are whole, aligned to their number and inside of the block's dynamic shared memory.
void check_shared(const void* address, size_t bytes);
void check_aligned(const void* address, size_t bytes);

void copy_async(void* shared, const void* global, size_t bytes, bool is_valid);
void commit_copies();
void wait_for_copies(int groups_left);

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bfloat16);
uint32_t shuffle(const char* name, uint32_t value, int lane, int width);

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

// What `kernel<<<grid, block, shared, stream>>>(arguments...)` is turned into.
struct Launch {
  dim3 grid, block;
  size_t shared;
  Launch(dim3 grid_, dim3 block_, size_t shared_ = 0, cudaStream_t = nullptr) : grid(grid_), block(block_), shared(shared_) {}
  template <typename... P, typename... A>
  void run(void (*kernel)(P...), A... arguments) {
    emulate::run(grid, block, shared, [=] { kernel(arguments...); });
  }
};

int lane();

}  // namespace emulate

#define threadIdx (emulate::place.thread)
#define blockIdx (emulate::place.block)
#define blockDim (emulate::place.block_dim)
#define gridDim (emulate::place.grid_dim)

inline void __syncthreads() { emulate::wait_for_block(); }
inline void __syncwarp() { emulate::collective("__syncwarp", {}, nullptr); }

template <typename T>
T emulate_shuffle(const char* name, T value, int lane, int width) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulate::shuffle(name, bits, lane, width);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  return emulate_shuffle("__shfl_xor_sync", value, emulate::lane() ^ mask, width);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int distance, int width = 32) {
  const int lane = emulate::lane(), last = (lane / width + 1) * width;
  return emulate_shuffle("__shfl_down_sync", value, lane + distance < last ? lane + distance : lane, width);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return emulate_shuffle("__shfl_sync", value, emulate::lane() / width * width + lane % width, width);
}
int __any_sync(unsigned, int predicate);
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
