// Thin wrappers of the PTX that attention uses, sm_80 and up; on the CPU, their emulation. Matrix fragments are those of the PTX ISA,
// "Matrix fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
#pragma once

#include "device.h"

namespace megatronish {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }
#endif

// Four 8x8 matrices of 16 bits; lanes 8i..8i+7 give the addresses of the rows of matrix i. Lane l gets, in r[i], the elements 2(l % 4)
// and the next one of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulate::ldmatrix_x4(r, row, false);
#endif
}

// The same, of the transposed matrices: the elements of column l / 4, rows 2(l % 4) and the next one.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulate::ldmatrix_x4(r, row, true);
#endif
}

// d += a b, a [16, 16] by rows, b [16, 8] by columns, of T, d of float32.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#ifdef __CUDACC__
#define MEGATRONISH_MMA(TYPE, PTX)                                                                                           \
  template <>                                                                                                               \
  __device__ __forceinline__ void mma<TYPE>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {               \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                    \
  }
#else
#define MEGATRONISH_MMA(TYPE, PTX)                                                                                           \
  template <>                                                                                                               \
  inline void mma<TYPE>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                                   \
    const uint32_t b[2] = {b0, b1};                                                                                         \
    emulate::mma_m16n8k16(d, a, b, std::is_same<TYPE, __nv_bfloat16>::value);                                               \
  }
#endif
MEGATRONISH_MMA(__nv_bfloat16, "bf16")
MEGATRONISH_MMA(__half, "f16")
#undef MEGATRONISH_MMA

// Two floats rounded to T; the first in the low half, as fragments want it.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
#endif
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16;
#endif
}

// kBytes (4 or 16) from global to shared memory, past the registers; zeros where not `is_valid` (the address is not read then).
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_valid) {
#ifdef __CUDACC__
  const int given = is_valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(given) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(given) : "memory");
  }
#else
  emulate::copy_async(shared, global, kBytes, is_valid);
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulate::commit_copies();
#endif
}

// Until this thread's copies have landed, but for those of the last `kLeft` groups; other threads see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulate::wait_for_copies(kLeft);
#endif
}

// 2^x to within 2 units of the last place; results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

}  // namespace megatronish
