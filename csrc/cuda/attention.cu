// Causal attention with grouped key/value heads, forward and backward, with no S x S tensor (Dao 2023), on the tensor cores' mma of
// sm_80 and up. float16 and bfloat16, head sizes 64 and 128, any S.
//
// Bound by the matrix products. Tiles come by cp.async into two buffers, so that one is filled while the other is used; 16-byte chunks
// of a row are swapped by the row's number (`place`), so that neither ldmatrix nor the copies meet in one bank. Scores stay in
// registers: an accumulator's layout is that of the left operand of the next product.
// Backward makes the scores again from the log-sum-exp, once for dK and dV (a block of keys, over all query heads of its group) and
// once for dQ (a block of queries): seven products in place of five, but no atomics and no sum over copies: the same bits every time.

#include <type_traits>

#include "cuda.h"
#include "mma.h"

namespace megatronish {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// Where the 8 elements `chunk` of a row of a tile lie.
template <int K>
__device__ __forceinline__ int place(int row, int chunk) {
  return row * K + ((chunk ^ (row & 7)) << 3);
}

// How many copies, and steps of 16 columns, have their addresses made together: by ptxas 13.0, forward at K = 128 spills 116 bytes on
// sm_100 with all of them and none with these; on sm_80 and sm_90a all of them spill the least (60 and 52 bytes).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kCopiesAtOnce = 2, kStepsAtOnce = 4;
#else
constexpr int kCopiesAtOnce = 16, kStepsAtOnce = 8;
#endif

// Rows first, first + 1, ... of a matrix in global memory into a tile; zeros past its end.
template <int kRows, int K, int kThreads, typename T>
__device__ __forceinline__ void load_rows(T* tile, const T* matrix, int64_t stride, int first, int num_rows) {
  constexpr int kChunks = K / 8, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "every thread copies as many chunks");
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const T* from = matrix + chunk * 8;
#pragma unroll kCopiesAtOnce
  for (int i = 0; i < kRows; i += kStep) {
    const int at = first + row + i;
    const bool is_inside = at < num_rows;
    copy_async<16>(tile + place<K>(row + i, chunk), is_inside ? from + at * stride : matrix, is_inside);
  }
}

// d += a b^T: a is 16 x kTiles rows of a tile from `row`, b the kRows rows of another tile; both run over K.
template <typename T, int K, int kTiles, int kRows>
__device__ __forceinline__ void rows_by_rows(float (&d)[kTiles][kRows / 8][4], const T* a, int row, const T* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll kStepsAtOnce
  for (int k = 0; k < K / 16; ++k) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) ldmatrix_x4(left[i], a + place<K>(row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j) {
      uint32_t right[4];
      ldmatrix_x4(right, b + place<K>(16 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma<T>(d[i][2 * j], left[i], right[0], right[1]);
        mma<T>(d[i][2 * j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

// d += w b: w in fragments over the kRows rows of the tile b.
template <typename T, int K, int kTiles, int kRows>
__device__ __forceinline__ void weights_by_rows(float (&d)[kTiles][K / 8][4], const uint32_t (&w)[kTiles][kRows / 16][4], const T* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
#pragma unroll
    for (int j = 0; j < K / 16; ++j) {
      uint32_t right[4];
      ldmatrix_x4_transposed(right, b + place<K>(16 * k + lane % 16, 2 * j + lane / 16));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma<T>(d[i][2 * j], w[i][k], right[0], right[1]);
        mma<T>(d[i][2 * j + 1], w[i][k], right[2], right[3]);
      }
    }
  }
}

// Accumulators rounded to T, as fragments of a left operand.
template <typename T, int kTiles, int kColumns>
__device__ __forceinline__ void as_weights(uint32_t (&w)[kTiles][kColumns / 16][4], const float (&d)[kTiles][kColumns / 8][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w[i][k][2 * half] = pack_pair<T>(d[i][2 * k + half][0], d[i][2 * k + half][1]);
        w[i][k][2 * half + 1] = pack_pair<T>(d[i][2 * k + half][2], d[i][2 * k + half][3]);
      }
    }
  }
}

// The rows of a warp, times `factor`, from accumulators through its own rows of a tile to global memory, 16 bytes a thread.
template <typename T, int K, int kTiles>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, int first, int num_rows, T* tile, int row,
                                           const float (&d)[kTiles][K / 8][4], const float (&factor)[kTiles][2]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < K / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float f = factor[i][half];
        const int at = place<K>(row + 16 * i + 8 * half + lane / 4, j) + 2 * (lane % 4);
        *reinterpret_cast<uint32_t*>(tile + at) = pack_pair<T>(d[i][j][2 * half] * f, d[i][j][2 * half + 1] * f);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = K / 8, kStep = 32 / kChunks;
#pragma unroll
  for (int i = 0; i < 16 * kTiles; i += kStep) {
    const int r = row + i + lane / kChunks, chunk = lane % kChunks;
    if (first + r < num_rows) Pack<T>::load(tile + place<K>(r, chunk)).store(out + (first + r) * stride + chunk * 8);
  }
}

template <int kTiles, int kColumns>
__device__ __forceinline__ void clear(float (&d)[kTiles][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) d[i][j][c] = 0;
    }
  }
}

// Forward: 4 warps of 32 queries. With 32 rows a warp each fragment of K and V serves two products; with 16 the reads of shared memory
// would bound it. 128 queries and two buffers of 64 keys and values: 96 KiB at K = 128, so two blocks a multiprocessor on sm_90.
template <int K>
struct Forward {
  static constexpr int kQueries = 128, kKeys = 64, kThreads = 128, kTiles = 2;
  static constexpr int kShared = (kQueries + 4 * kKeys) * K * 2;
};

template <typename T, int K>
__global__ void __launch_bounds__(Forward<K>::kThreads)
    attention_forward_kernel(AttentionShape s, AttentionInputs in, T* out, float* lse, float scale) {
  using F = Forward<K>;
  constexpr int kQueries = F::kQueries, kKeys = F::kKeys, kTiles = F::kTiles;
  T* q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* k_tiles = q_tile + kQueries * K;
  T* v_tiles = k_tiles + 2 * kKeys * K;
  // The last queries see the most keys, so they begin first.
  const int first = int(gridDim.x - 1 - blockIdx.x) * kQueries;
  const int head = blockIdx.y, sample = blockIdx.z, group = head / (s.H / s.G), S = int(s.S);
  const T* q = static_cast<const T*>(in.q) + sample * in.q_stride[1] + head * in.q_stride[2];
  const T* k = static_cast<const T*>(in.k) + sample * in.k_stride[1] + group * in.k_stride[2];
  const T* v = static_cast<const T*>(in.v) + sample * in.v_stride[1] + group * in.v_stride[2];
  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 16 * kTiles;
  const int num_tiles = (min(first + kQueries, S) + kKeys - 1) / kKeys;

  load_rows<kQueries, K, F::kThreads>(q_tile, q, in.q_stride[0], first, S);
  load_rows<kKeys, K, F::kThreads>(k_tiles, k, in.k_stride[0], 0, S);
  load_rows<kKeys, K, F::kThreads>(v_tiles, v, in.v_stride[0], 0, S);
  commit_copies();

  float o[kTiles][K / 8][4], highest[kTiles][2], sum[kTiles][2];
  clear(o);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) highest[i][0] = highest[i][1] = -INFINITY, sum[i][0] = sum[i][1] = 0;
  const float scale_log2 = scale * kLog2E;

  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is here for all, and all are done with the tile before
    if (tile + 1 < num_tiles) {
      const int other = (tile + 1) % 2 * kKeys * K;
      load_rows<kKeys, K, F::kThreads>(k_tiles + other, k, in.k_stride[0], (tile + 1) * kKeys, S);
      load_rows<kKeys, K, F::kThreads>(v_tiles + other, v, in.v_stride[0], (tile + 1) * kKeys, S);
      commit_copies();
    }
    const int first_key = tile * kKeys, last_query = first + row + 16 * kTiles - 1;
    if (first_key > last_query) continue;  // of a warp's queries none sees these keys
    const T* k_tile = k_tiles + tile % 2 * kKeys * K;
    const T* v_tile = v_tiles + tile % 2 * kKeys * K;

    float p[kTiles][kKeys / 8][4];
    clear(p);
    rows_by_rows<T, K, kTiles, kKeys>(p, q_tile, row, k_tile);
    if (first_key + kKeys - 1 > first + row) {  // keys past S are in the future of every query before S
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int query = first + row + 16 * i + 8 * (c / 2) + lane / 4, key = first_key + 8 * j + 2 * (lane % 4) + c % 2;
            if (key > query) p[i][j][c] = -INFINITY;
          }
        }
      }
    }
    // Key 0 is in the first tile and every query sees it, so `highest` is a score from there on. A row lies in four lanes.
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = highest[i][half];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) top = fmaxf(top, fmaxf(p[i][j][2 * half], p[i][j][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float top_log2 = top * scale_log2, shrink = exp2_fast(highest[i][half] * scale_log2 - top_log2);
        highest[i][half] = top;
        float part = 0;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            p[i][j][c] = exp2_fast(p[i][j][c] * scale_log2 - top_log2);
            part += p[i][j][c];
          }
        }
        sum[i][half] = sum[i][half] * shrink + part;
#pragma unroll
        for (int j = 0; j < K / 8; ++j) o[i][j][2 * half] *= shrink, o[i][j][2 * half + 1] *= shrink;
      }
    }
    uint32_t weights[kTiles][kKeys / 16][4];
    as_weights<T, kTiles, kKeys>(weights, p);
    weights_by_rows<T, K, kTiles, kKeys>(o, weights, v_tile);
  }

  float factor[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[i][half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      factor[i][half] = 1 / total;
      const int query = first + row + 16 * i + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < S) {
        lse[(int64_t(sample) * s.H + head) * s.S + query] = highest[i][half] * scale + logf(total);
      }
    }
  }
  // Only this warp reads these rows of the queries' tile.
  store_rows<T, K, kTiles>(out + (int64_t(sample) * s.H + head) * K, s.B * s.H * K, first, S, q_tile, row, o, factor);
}

// delta [B, H, S]: dout . out of each query and head, one warp each. Bound by memory.
template <typename T, int K>
__global__ void attention_delta_kernel(AttentionShape s, const T* dout, const T* out, float* delta) {
  constexpr int kLanes = K / 8, kRows = 256 / kLanes;
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kLanes;  // of [S, B, H]
  float total = 0;
  if (row < s.S * s.B * s.H) {
    float a[8], b[8];
    const int64_t at = row * K + threadIdx.x % kLanes * 8;
    Pack<T>::load(dout + at).unpack(a);
    Pack<T>::load(out + at).unpack(b);
#pragma unroll
    for (int i = 0; i < 8; ++i) total += a[i] * b[i];
  }
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
  if (row < s.S * s.B * s.H && threadIdx.x % kLanes == 0) delta[row % (s.B * s.H) * s.S + row / (s.B * s.H)] = total;
}

// Backward: 8 warps of 16 rows, since two sums of K columns (dK and dV) and two blocks of scores stay in registers. A block keeps 128 keys
// (or queries) and passes over tiles of 64 of the others: 128 KiB at K = 128, one block a multiprocessor.
template <int K>
struct Backward {
  static constexpr int kKept = 128, kPassing = 64, kThreads = 256;
  static constexpr int kShared = (2 * kKept + 4 * kPassing) * K * 2 + 4 * kPassing * 4;
};

// dK and dV of 128 keys of one group. Scores are [keys, queries] here, so that they are the left operand of both products.
template <typename T, int K>
__global__ void __launch_bounds__(Backward<K>::kThreads, 1)
    attention_keys_kernel(AttentionShape s, AttentionInputs in, const T* dout, const float* lse, const float* delta, T* dk, T* dv,
                          float scale) {
  using F = Backward<K>;
  constexpr int kKeys = F::kKept, kQueries = F::kPassing;
  T* k_tile = reinterpret_cast<T*>(dynamic_shared());
  T* v_tile = k_tile + kKeys * K;
  T* q_tiles = v_tile + kKeys * K;
  T* dout_tiles = q_tiles + 2 * kQueries * K;
  float* lse_tiles = reinterpret_cast<float*>(dout_tiles + 2 * kQueries * K);
  float* delta_tiles = lse_tiles + 2 * kQueries;
  // The first keys are seen by the most queries, so they begin first.
  const int first = int(blockIdx.x) * kKeys;
  const int group = blockIdx.y, sample = blockIdx.z, S = int(s.S), repeats = int(s.H / s.G);
  const T* k = static_cast<const T*>(in.k) + sample * in.k_stride[1] + group * in.k_stride[2];
  const T* v = static_cast<const T*>(in.v) + sample * in.v_stride[1] + group * in.v_stride[2];
  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 16;
  const int first_block = first / kQueries, num_blocks = (S + kQueries - 1) / kQueries - first_block;
  const int num_tiles = repeats * num_blocks;

  const auto load_queries = [&](int tile) {
    const int head = group * repeats + tile / num_blocks, query = (first_block + tile % num_blocks) * kQueries, buffer = tile % 2 * kQueries;
    const T* q = static_cast<const T*>(in.q) + sample * in.q_stride[1] + head * in.q_stride[2];
    const int64_t of_head = int64_t(sample) * s.H + head;
    load_rows<kQueries, K, F::kThreads>(q_tiles + buffer * K, q, in.q_stride[0], query, S);
    load_rows<kQueries, K, F::kThreads>(dout_tiles + buffer * K, dout + of_head * K, s.B * s.H * K, query, S);
    const int of = threadIdx.x % kQueries;
    const bool is_inside = query + of < S;
    const int64_t at = of_head * s.S + (is_inside ? query + of : 0);
    if (threadIdx.x < kQueries) {
      copy_async<4>(lse_tiles + buffer + of, lse + at, is_inside);
    } else if (threadIdx.x < 2 * kQueries) {
      copy_async<4>(delta_tiles + buffer + of, delta + at, is_inside);
    }
    commit_copies();
  };

  load_rows<kKeys, K, F::kThreads>(k_tile, k, in.k_stride[0], first, S);
  load_rows<kKeys, K, F::kThreads>(v_tile, v, in.v_stride[0], first, S);
  load_queries(0);
  float dk_sum[1][K / 8][4], dv_sum[1][K / 8][4];
  clear(dk_sum);
  clear(dv_sum);
  const float scale_log2 = scale * kLog2E;

  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 1 < num_tiles) load_queries(tile + 1);
    const int first_query = (first_block + tile % num_blocks) * kQueries;
    if (first_query + kQueries - 1 < first + row) continue;  // none of these queries sees the warp's keys
    const int buffer = tile % 2 * kQueries;
    const T* q_tile = q_tiles + buffer * K;
    const T* dout_tile = dout_tiles + buffer * K;

    float p[1][kQueries / 8][4], ds[1][kQueries / 8][4];
    clear(p);
    clear(ds);
    rows_by_rows<T, K, 1, kQueries>(p, k_tile, row, q_tile);
    rows_by_rows<T, K, 1, kQueries>(ds, v_tile, row, dout_tile);
    const bool is_masked = first_query < first + row + 15 || first_query + kQueries > S;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int of = 8 * j + 2 * (lane % 4) + c % 2, query = first_query + of, key = first + row + 8 * (c / 2) + lane / 4;
        float weight = exp2_fast(p[0][j][c] * scale_log2 - lse_tiles[buffer + of] * kLog2E);
        if (is_masked && (key > query || query >= S)) weight = 0;
        p[0][j][c] = weight;
        ds[0][j][c] = weight * (ds[0][j][c] - delta_tiles[buffer + of]);
      }
    }
    uint32_t weights[1][kQueries / 16][4], dscores[1][kQueries / 16][4];
    as_weights<T, 1, kQueries>(weights, p);
    as_weights<T, 1, kQueries>(dscores, ds);
    weights_by_rows<T, K, 1, kQueries>(dv_sum, weights, dout_tile);
    weights_by_rows<T, K, 1, kQueries>(dk_sum, dscores, q_tile);
  }

  const float scales[1][2] = {{scale, scale}}, ones[1][2] = {{1, 1}};
  const int64_t stride = s.B * s.G * K, of_group = (int64_t(sample) * s.G + group) * K;
  store_rows<T, K, 1>(dk + of_group, stride, first, S, k_tile, row, dk_sum, scales);
  store_rows<T, K, 1>(dv + of_group, stride, first, S, v_tile, row, dv_sum, ones);
}

// dQ of 128 queries of one head.
template <typename T, int K>
__global__ void __launch_bounds__(Backward<K>::kThreads, 1)
    attention_queries_kernel(AttentionShape s, AttentionInputs in, const T* dout, const float* lse, const float* delta, T* dq,
                             float scale) {
  using F = Backward<K>;
  constexpr int kQueries = F::kKept, kKeys = F::kPassing;
  T* q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* dout_tile = q_tile + kQueries * K;
  T* k_tiles = dout_tile + kQueries * K;
  T* v_tiles = k_tiles + 2 * kKeys * K;
  const int first = int(gridDim.x - 1 - blockIdx.x) * kQueries;
  const int head = blockIdx.y, sample = blockIdx.z, group = head / int(s.H / s.G), S = int(s.S);
  const int64_t of_head = int64_t(sample) * s.H + head;
  const T* q = static_cast<const T*>(in.q) + sample * in.q_stride[1] + head * in.q_stride[2];
  const T* k = static_cast<const T*>(in.k) + sample * in.k_stride[1] + group * in.k_stride[2];
  const T* v = static_cast<const T*>(in.v) + sample * in.v_stride[1] + group * in.v_stride[2];
  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 16;
  const int num_tiles = (min(first + kQueries, S) + kKeys - 1) / kKeys;

  load_rows<kQueries, K, F::kThreads>(q_tile, q, in.q_stride[0], first, S);
  load_rows<kQueries, K, F::kThreads>(dout_tile, dout + of_head * K, s.B * s.H * K, first, S);
  load_rows<kKeys, K, F::kThreads>(k_tiles, k, in.k_stride[0], 0, S);
  load_rows<kKeys, K, F::kThreads>(v_tiles, v, in.v_stride[0], 0, S);
  commit_copies();

  float lse_log2[2], delta_of[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + row + 8 * half + lane / 4;
    lse_log2[half] = query < S ? lse[of_head * s.S + query] * kLog2E : 0;
    delta_of[half] = query < S ? delta[of_head * s.S + query] : 0;
  }
  float dq_sum[1][K / 8][4];
  clear(dq_sum);
  const float scale_log2 = scale * kLog2E;

  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 1 < num_tiles) {
      const int other = (tile + 1) % 2 * kKeys * K;
      load_rows<kKeys, K, F::kThreads>(k_tiles + other, k, in.k_stride[0], (tile + 1) * kKeys, S);
      load_rows<kKeys, K, F::kThreads>(v_tiles + other, v, in.v_stride[0], (tile + 1) * kKeys, S);
      commit_copies();
    }
    const int first_key = tile * kKeys;
    if (first_key > first + row + 15) continue;
    const T* k_tile = k_tiles + tile % 2 * kKeys * K;
    const T* v_tile = v_tiles + tile % 2 * kKeys * K;

    float p[1][kKeys / 8][4], ds[1][kKeys / 8][4];
    clear(p);
    clear(ds);
    rows_by_rows<T, K, 1, kKeys>(p, q_tile, row, k_tile);
    rows_by_rows<T, K, 1, kKeys>(ds, dout_tile, row, v_tile);
    const bool is_masked = first_key + kKeys - 1 > first + row;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int query = first + row + 8 * (c / 2) + lane / 4, key = first_key + 8 * j + 2 * (lane % 4) + c % 2;
        float weight = exp2_fast(p[0][j][c] * scale_log2 - lse_log2[c / 2]);
        if (is_masked && key > query) weight = 0;
        ds[0][j][c] = weight * (ds[0][j][c] - delta_of[c / 2]);
      }
    }
    uint32_t dscores[1][kKeys / 16][4];
    as_weights<T, 1, kKeys>(dscores, ds);
    weights_by_rows<T, K, 1, kKeys>(dq_sum, dscores, k_tile);
  }
  const float scales[1][2] = {{scale, scale}};
  store_rows<T, K, 1>(dq + of_head * K, s.B * s.H * K, first, S, q_tile, row, dq_sum, scales);
}

template <typename Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "attention");
}

dim3 grid_of(const AttentionShape& s, int block, int64_t heads) {
  return dim3(unsigned((s.S + block - 1) / block), unsigned(heads), unsigned(s.B));
}

template <typename T, int K>
void forward(const AttentionShape& s, const AttentionInputs& in, void* out, float* lse, double scale, cudaStream_t stream) {
  using F = Forward<K>;
  allow_shared(attention_forward_kernel<T, K>, F::kShared);
  const dim3 grid = grid_of(s, F::kQueries, s.H);
  attention_forward_kernel<T, K><<<grid, F::kThreads, F::kShared, stream>>>(s, in, static_cast<T*>(out), lse, float(scale));
  check(cudaGetLastError(), "attention");
}

template <typename T, int K>
void backward(const AttentionShape& s, const AttentionInputs& in, const AttentionGradients& g, double scale, cudaStream_t stream) {
  using F = Backward<K>;
  const T* dout = static_cast<const T*>(g.dout);
  constexpr int kRows = 256 / (K / 8);
  const unsigned blocks = unsigned((s.S * s.B * s.H + kRows - 1) / kRows);
  attention_delta_kernel<T, K><<<blocks, 256, 0, stream>>>(s, dout, static_cast<const T*>(g.out), g.delta);
  check(cudaGetLastError(), "attention backward");
  allow_shared(attention_keys_kernel<T, K>, F::kShared);
  const dim3 keys = grid_of(s, F::kKept, s.G), queries = grid_of(s, F::kKept, s.H);
  T *dk = static_cast<T*>(g.dk), *dv = static_cast<T*>(g.dv);
  attention_keys_kernel<T, K><<<keys, F::kThreads, F::kShared, stream>>>(s, in, dout, g.lse, g.delta, dk, dv, float(scale));
  check(cudaGetLastError(), "attention backward");
  allow_shared(attention_queries_kernel<T, K>, F::kShared);
  T* dq = static_cast<T*>(g.dq);
  attention_queries_kernel<T, K><<<queries, F::kThreads, F::kShared, stream>>>(s, in, dout, g.lse, g.delta, dq, float(scale));
  check(cudaGetLastError(), "attention backward");
}

// Calls `run` with T and K as types: run(T{}, std::integral_constant<int, K>{}).
template <typename Run>
void with_types(const AttentionShape& s, Run run) {
  const bool is_bfloat16 = s.dtype == Dtype::kBFloat16;
  if ((!is_bfloat16 && s.dtype != Dtype::kFloat16) || (s.K != 64 && s.K != 128)) throw std::runtime_error("attention: dtype or head size");
  if (is_bfloat16 && s.K == 64) run(__nv_bfloat16{}, std::integral_constant<int, 64>{});
  if (is_bfloat16 && s.K == 128) run(__nv_bfloat16{}, std::integral_constant<int, 128>{});
  if (!is_bfloat16 && s.K == 64) run(__half{}, std::integral_constant<int, 64>{});
  if (!is_bfloat16 && s.K == 128) run(__half{}, std::integral_constant<int, 128>{});
}

}  // namespace

void attention_forward(const AttentionShape& s, const AttentionInputs& in, void* out, float* lse, double scale, void* stream) {
  with_types(s, [&](auto type, auto k) {
    forward<decltype(type), decltype(k)::value>(s, in, out, lse, scale, static_cast<cudaStream_t>(stream));
  });
}

void attention_backward(const AttentionShape& s, const AttentionInputs& in, const AttentionGradients& g, double scale, void* stream) {
  with_types(s, [&](auto type, auto k) {
    backward<decltype(type), decltype(k)::value>(s, in, g, scale, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace megatronish
