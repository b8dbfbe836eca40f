// RMSNorm and LayerNorm, forward and backward, each with an optional residual that is added first: the sums of
// megatronish/kernels/rms_norm.py and layer_norm.py, in float32.
//
// Bound by memory: forward reads x (and residual) and writes y (and the sum) once, backward reads dy and x and writes dx once. A row is
// in the registers of a team, a warp where it is short and a block where it is not; teams go over the rows, and one keeps its weights.
// All of a thread's 16-byte loads are issued before the first is used; with at most 64 registers 1,024 threads run on a multiprocessor:
// 32 KiB in flight forward, twice that with a residual and backward.
// What of a row does not fit the registers is read again (from L2).
// dweight and dbias: each block sums its rows into one row of partial sums, a second kernel adds those in a fixed order. No atomics: the
// same bits every time on devices of as many multiprocessors.

#include <algorithm>

#include "cuda.h"
#include "device.h"

namespace megatronish {
namespace {

constexpr int kWarp = 32;

// The sums of kCount numbers over the team, in every thread of it; always added in the same order. `shared` has a place for each warp
// and number, twice: two calls in a row use different halves, so one barrier each is enough.
template <int kCount, bool kIsWarp>
__device__ __forceinline__ void team_sum(float (&x)[kCount], float* shared, int& turn) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = warp_sum(x[i]);
  if (kIsWarp) return;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* half = shared + (turn ^= 1) * kWarp * kCount;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) half[warp * kCount + i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = warp_sum(lane < warps ? half[lane * kCount + i] : 0.0f);
}

// y, and the sum x + residual where there is one: 16 bytes of a row at a time, `kHeld` times kept, the rest read again.
template <typename T, int kHeld, bool kIsWarp, bool kCenter>
__global__ void __launch_bounds__(kIsWarp ? 128 : 1024) norm_forward_kernel(NormForward n) {
  constexpr int V = Pack<T>::kSize;
  __shared__ float shared[2 * kWarp];
  int turn = 0;
  const int D = int(n.D), team = kIsWarp ? kWarp : blockDim.x, rank = threadIdx.x % team;
  const int64_t teams = int64_t(gridDim.x) * (blockDim.x / team), stride = int64_t(team) * V;
  const T *weight = static_cast<const T*>(n.weight), *bias = static_cast<const T*>(n.bias);
  const float inverse = 1.0f / float(D);
  // A warp's lanes run through the rows together, a block's threads too: barriers and shuffles are met by all of the team.
  for (int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / team; row < n.rows; row += teams) {
    const T* x = static_cast<const T*>(n.x) + row * D;
    const T* residual = n.residual ? static_cast<const T*>(n.residual) + row * D : nullptr;
    T* sum = residual ? static_cast<T*>(n.sum) + row * D : nullptr;
    Pack<T> held[kHeld], added[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = rank * V + i * int(stride);
      if (at < D) held[i] = Pack<T>::load(x + at);
      if (at < D && residual) added[i] = Pack<T>::load(residual + at);
    }
    // The value at `at`: x, or the rounded sum, which later layers see; written by the thread that reads it again.
    const auto add = [&](Pack<T> value, Pack<T> other, int at) {
      float a[V], b[V];
      value.unpack(a);
      other.unpack(b);
#pragma unroll
      for (int j = 0; j < V; ++j) a[j] += b[j];
      const Pack<T> total = Pack<T>::pack(a);
      total.store(sum + at);
      return total;
    };
    float total[1] = {0}, squares[1] = {0};
    const auto count = [&](const Pack<T>& value, float mean) {
      float a[V];
      value.unpack(a);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        total[0] += a[j];
        squares[0] += (a[j] - mean) * (a[j] - mean);
      }
    };
    const T* source = residual ? sum : x;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = rank * V + i * int(stride);
      if (at < D && residual) held[i] = add(held[i], added[i], at);
      if (at < D) count(held[i], 0.0f);
    }
    for (int at = rank * V + kHeld * int(stride); at < D; at += int(stride)) {
      Pack<T> value = Pack<T>::load(x + at);
      if (residual) value = add(value, Pack<T>::load(residual + at), at);
      count(value, 0.0f);
    }
    float mean = 0;
    if (kCenter) {
      team_sum<1, kIsWarp>(total, shared, turn);
      mean = total[0] * inverse;
      // The squares again, of what is left without the mean: the difference of two sums would cancel.
      squares[0] = 0;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (rank * V + i * int(stride) < D) count(held[i], mean);
      }
      for (int at = rank * V + kHeld * int(stride); at < D; at += int(stride)) count(Pack<T>::load(source + at), mean);
    }
    team_sum<1, kIsWarp>(squares, shared, turn);
    const float rstd = 1.0f / sqrtf(squares[0] * inverse + float(n.eps));
    if (rank == 0) {
      n.rstd[row] = rstd;
      if (kCenter) n.mean[row] = mean;
    }
    T* y = static_cast<T*>(n.y) + row * D;
    const auto finish = [&](const Pack<T>& value, int at) {
      float a[V], w[V], b[V];
      value.unpack(a);
      Pack<T>::load(weight + at).unpack(w);
      if (kCenter) Pack<T>::load(bias + at).unpack(b);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        // RMSNorm rounds before the weight, as the reference does.
        a[j] = kCenter ? (a[j] - mean) * rstd * w[j] + b[j] : to_float(from_float<T>(a[j] * rstd)) * w[j];
      }
      Pack<T>::pack(a).store(y + at);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = rank * V + i * int(stride);
      if (at < D) finish(held[i], at);
    }
    for (int at = rank * V + kHeld * int(stride); at < D; at += int(stride)) finish(Pack<T>::load(source + at), at);
  }
}

// dx of the rows of a block, and its partial sums of dweight and dbias [blocks, D]. kHeld packs a thread hold a row: kHeld = 0 is for
// longer ones, which are read twice and leave the weights to norm_columns_kernel.
template <typename T, int kHeld, bool kCenter>
__global__ void __launch_bounds__(1024) norm_backward_kernel(NormBackward n) {
  constexpr int V = Pack<T>::kSize, kKept = kHeld ? kHeld : 1;
  __shared__ float shared[4 * kWarp];
  int turn = 0;
  const int D = int(n.D), stride = int(blockDim.x) * V, first = int(threadIdx.x) * V;
  const float inverse = 1.0f / float(D);
  const T* weight = static_cast<const T*>(n.weight);
  float dweight[kKept][V], dbias[kCenter ? kKept : 1][V];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) dweight[i][j] = 0, dbias[kCenter ? i : 0][j] = 0;
  }
  for (int64_t row = blockIdx.x; row < n.rows; row += gridDim.x) {
    const T *dy = static_cast<const T*>(n.dy) + row * D, *x = static_cast<const T*>(n.x) + row * D;
    const float rstd = n.rstd[row], mean = kCenter ? n.mean[row] : 0.0f;
    Pack<T> dys[kKept], xs[kKept];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * stride < D) dys[i] = Pack<T>::load(dy + first + i * stride), xs[i] = Pack<T>::load(x + first + i * stride);
    }
    float sums[2] = {0, 0};  // of dnormed times normed, of dnormed
    const auto count = [&](const Pack<T>& dy_pack, const Pack<T>& x_pack, int at, int i) {
      float dys_[V], xs_[V], w[V];
      dy_pack.unpack(dys_);
      x_pack.unpack(xs_);
      Pack<T>::load(weight + at).unpack(w);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float normed = (xs_[j] - mean) * rstd;
        sums[0] += dys_[j] * w[j] * normed;
        sums[1] += dys_[j] * w[j];
        if (kHeld) {
          dweight[i][j] += dys_[j] * normed;
          if (kCenter) dbias[i][j] += dys_[j];
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * stride < D) count(dys[i], xs[i], first + i * stride, i);
    }
    if (!kHeld) {
      for (int at = first; at < D; at += stride) count(Pack<T>::load(dy + at), Pack<T>::load(x + at), at, 0);
    }
    team_sum<2, false>(sums, shared, turn);
    const float product = sums[0] * inverse, total = kCenter ? sums[1] * inverse : 0.0f;
    const T* dsum = n.dsum ? static_cast<const T*>(n.dsum) + row * D : nullptr;
    T* dx = static_cast<T*>(n.dx) + row * D;
    const auto finish = [&](const Pack<T>& dy_pack, const Pack<T>& x_pack, int at) {
      float dys_[V], xs_[V], w[V], d[V];
      dy_pack.unpack(dys_);
      x_pack.unpack(xs_);
      Pack<T>::load(weight + at).unpack(w);
      if (dsum) Pack<T>::load(dsum + at).unpack(d);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float value = (dys_[j] * w[j] - (xs_[j] - mean) * rstd * product - total) * rstd;
        xs_[j] = dsum ? value + d[j] : value;
      }
      Pack<T>::pack(xs_).store(dx + at);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * stride < D) finish(dys[i], xs[i], first + i * stride);
    }
    if (!kHeld) {
      for (int at = first; at < D; at += stride) finish(Pack<T>::load(dy + at), Pack<T>::load(x + at), at);
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = first + i * stride;
    if (at >= D) continue;
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      const int64_t to = int64_t(blockIdx.x) * D + at + j;
      *reinterpret_cast<float4*>(n.dweight_parts + to) = make_float4(dweight[i][j], dweight[i][j + 1], dweight[i][j + 2], dweight[i][j + 3]);
      if (kCenter) *reinterpret_cast<float4*>(n.dbias_parts + to) = make_float4(dbias[i][j], dbias[i][j + 1], dbias[i][j + 2], dbias[i][j + 3]);
    }
  }
}

// Partial sums of dweight and dbias of 32 packs of columns over the rows part, part + parts, ...: 8 rows at a time, added at the end.
template <typename T, bool kCenter>
__global__ void __launch_bounds__(256) norm_columns_kernel(NormBackward n) {
  constexpr int V = Pack<T>::kSize, kRows = 8;
  __shared__ float shared[2][kRows][kWarp * V];
  const int D = int(n.D), column = threadIdx.x % kWarp, slot = threadIdx.x / kWarp, at = (int(blockIdx.x) * kWarp + column) * V;
  float dweight[V], dbias[V];
#pragma unroll
  for (int j = 0; j < V; ++j) dweight[j] = dbias[j] = 0;
  if (at < D) {
    for (int64_t row = int64_t(blockIdx.y) * kRows + slot; row < n.rows; row += int64_t(gridDim.y) * kRows) {
      float dy[V], x[V];
      Pack<T>::load(static_cast<const T*>(n.dy) + row * D + at).unpack(dy);
      Pack<T>::load(static_cast<const T*>(n.x) + row * D + at).unpack(x);
      const float rstd = n.rstd[row], mean = kCenter ? n.mean[row] : 0.0f;
#pragma unroll
      for (int j = 0; j < V; ++j) dweight[j] += dy[j] * ((x[j] - mean) * rstd), dbias[j] += dy[j];
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) shared[0][slot][column * V + j] = dweight[j], shared[1][slot][column * V + j] = dbias[j];
  __syncthreads();
  if (slot == 0 && at < D) {
    for (int j = 0; j < V; ++j) {
      float a = 0, b = 0;
      for (int r = 0; r < kRows; ++r) a += shared[0][r][column * V + j], b += shared[1][r][column * V + j];
      n.dweight_parts[int64_t(blockIdx.y) * D + at + j] = a;
      if (kCenter) n.dbias_parts[int64_t(blockIdx.y) * D + at + j] = b;
    }
  }
}

// The partial sums [parts, D] of a column, added: 32 columns a block, 8 parts at a time.
template <typename T>
__global__ void __launch_bounds__(256) norm_parts_kernel(const float* parts, int num_parts, int D, T* out) {
  __shared__ float shared[8][kWarp];
  const int lane = threadIdx.x % kWarp, slot = threadIdx.x / kWarp, column = int(blockIdx.x) * kWarp + lane;
  float total = 0;
  if (column < D) {
    for (int part = slot; part < num_parts; part += 8) total += parts[int64_t(part) * D + column];
  }
  shared[slot][lane] = total;
  __syncthreads();
  if (slot == 0 && column < D) {
    for (int r = 1; r < 8; ++r) total += shared[r][lane];
    out[column] = from_float<T>(total);
  }
}

// `waves` times as many blocks as run at once, 1,024 threads a multiprocessor, or fewer; each goes on to further rows.
int blocks_for(int64_t rows, int rows_per_block, int threads, int waves) {
  const int64_t most = int64_t(num_multiprocessors()) * std::max(1, 1024 / threads) * waves;
  return int(std::max<int64_t>(1, std::min((rows + rows_per_block - 1) / rows_per_block, most)));
}

template <typename T, int kHeld, bool kIsWarp, bool kCenter>
void launch_forward(const NormForward& n, int threads, cudaStream_t stream) {
  const int blocks = blocks_for(n.rows, kIsWarp ? threads / kWarp : 1, threads, 16);
  norm_forward_kernel<T, kHeld, kIsWarp, kCenter><<<blocks, threads, 0, stream>>>(n);
  check(cudaGetLastError(), "norm");
}

int threads_for(int64_t packs, int held) {
  const int64_t threads = (packs + held - 1) / held;
  return int(std::min<int64_t>(1024, (threads + kWarp - 1) / kWarp * kWarp));
}

template <typename T, bool kCenter>
void forward(const NormForward& n, cudaStream_t stream) {
  const int64_t packs = n.D / Pack<T>::kSize;  // of a row
  if (packs <= 2 * kWarp) {
    launch_forward<T, 2, true, kCenter>(n, 128, stream);
  } else if (packs <= 4 * kWarp) {
    launch_forward<T, 4, true, kCenter>(n, 128, stream);
  } else if (packs <= 2 * 1024) {
    launch_forward<T, 2, false, kCenter>(n, threads_for(packs, 2), stream);
  } else {
    launch_forward<T, 4, false, kCenter>(n, 1024, stream);
  }
}

template <typename T, int kHeld, bool kCenter>
void backward(const NormBackward& n, int threads, cudaStream_t stream) {
  const int blocks = kHeld ? int(n.parts) : blocks_for(n.rows, 1, threads, 16);
  norm_backward_kernel<T, kHeld, kCenter><<<blocks, threads, 0, stream>>>(n);
  check(cudaGetLastError(), "norm backward");
}

template <typename T>
void add_parts(const float* parts, const NormBackward& n, void* out, cudaStream_t stream) {
  norm_parts_kernel<T><<<unsigned((n.D + kWarp - 1) / kWarp), 256, 0, stream>>>(parts, int(n.parts), int(n.D), static_cast<T*>(out));
  check(cudaGetLastError(), "norm backward");
}

// How many packs a thread holds of a row in backward; 0: rows too long for the registers. LayerNorm's two packs of 16 bits would spill.
int held_in_backward(int64_t D, Dtype dtype, bool center) {
  const int64_t packs = D / (dtype == Dtype::kFloat32 ? 4 : 8);
  const bool two_fit = !center || dtype == Dtype::kFloat32;
  return packs <= 1024 ? 1 : packs <= 2 * 1024 && two_fit ? 2 : 0;
}

template <typename T, bool kCenter>
void backward(const NormBackward& n, cudaStream_t stream) {
  const int64_t packs = n.D / Pack<T>::kSize;
  const int held = held_in_backward(n.D, n.dtype, kCenter);
  if (held == 1) {
    backward<T, 1, kCenter>(n, threads_for(packs, 1), stream);
  } else if (held == 2) {
    if constexpr (!kCenter || sizeof(T) == 4) backward<T, 2, kCenter>(n, threads_for(packs, 2), stream);
  } else {
    backward<T, 0, kCenter>(n, 1024, stream);
    const dim3 grid(unsigned((packs + kWarp - 1) / kWarp), unsigned(n.parts));
    norm_columns_kernel<T, kCenter><<<grid, 256, 0, stream>>>(n);
    check(cudaGetLastError(), "norm backward");
  }
  add_parts<T>(n.dweight_parts, n, n.dweight, stream);
  if (kCenter) add_parts<T>(n.dbias_parts, n, n.dbias, stream);
}

// Calls `run` with the type of the dtype's elements.
template <typename Run>
void with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::kFloat32: return run(float{});
    case Dtype::kFloat16: return run(__half{});
    case Dtype::kBFloat16: return run(__nv_bfloat16{});
  }
  throw std::runtime_error("norm: dtype");
}

}  // namespace

void norm_forward(const NormForward& n, void* stream) {
  with_type(n.dtype, [&](auto type) {
    using T = decltype(type);
    n.bias ? forward<T, true>(n, static_cast<cudaStream_t>(stream)) : forward<T, false>(n, static_cast<cudaStream_t>(stream));
  });
}

int64_t norm_parts(int64_t rows, int64_t D, Dtype dtype, bool center) {
  const int held = held_in_backward(D, dtype, center);
  if (held) return blocks_for(rows, 1, threads_for(D / (dtype == Dtype::kFloat32 ? 4 : 8), held), 1);
  return std::max<int64_t>(1, std::min<int64_t>(rows / 64, 32));
}

void norm_backward(const NormBackward& n, void* stream) {
  with_type(n.dtype, [&](auto type) {
    using T = decltype(type);
    n.mean ? backward<T, true>(n, static_cast<cudaStream_t>(stream)) : backward<T, false>(n, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace megatronish
