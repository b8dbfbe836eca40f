// Kernels with one fault each, which the emulated device has to find; `none` has no fault.

#include "device.h"
#include "mma.h"

namespace megatronish {
namespace {

enum Fault { kNone, kNoBarrier, kNoWait, kPastTensor, kPastShared, kMisaligned, kDiverged, kWaitsForEver, kTooMuchShared, kNumFaults };
const char* const names[] = {"none",        "no barrier", "no wait",         "past a tensor",   "past shared memory",
                             "misaligned", "diverged",   "waits for ever", "too much shared memory"};

// out[i] = x[n - 1 - i], through shared memory, by cp.async; n is the number of threads.
__global__ void reverse_kernel(Fault fault, const float* x, int n, float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int i = threadIdx.x;
  if (fault == kWaitsForEver && i == 1) return;
  if (fault == kDiverged && i == 3) __shfl_xor_sync(~0u, 0.0f, 1);
  if (fault == kMisaligned) Pack<float>::load(x + 1);
  copy_async<4>(shared + i, x + i + (fault == kPastTensor ? 4 : 0), true);
  commit_copies();
  if (fault != kNoWait) wait_for_copies<0>();
  __syncwarp();
  if (fault != kNoBarrier) __syncthreads();
  out[i] = shared[n - 1 - i + (fault == kPastShared ? 4 : 0)];
}

}  // namespace
}  // namespace megatronish

// What went wrong, or an empty text.
extern "C" __attribute__((visibility("default"))) const char* run_faulty(const char* name, const float* x, int n, float* out) {
  using namespace megatronish;
  static std::string error;
  int fault = kNone;
  while (fault < kNumFaults && std::string(names[fault]) != name) ++fault;
  if (fault == kNumFaults) return "no such fault";
  try {
    const size_t shared = fault == kTooMuchShared ? 200 * 1024 : n * sizeof(float);
    reverse_kernel<<<1, n, shared>>>(Fault(fault), x, n, out);
    error.clear();
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}
