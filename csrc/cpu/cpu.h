// Native CPU operations. Raw pointers and sizes only; callers own all memory.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

// Run-time choice of instruction set by the loader. Without -ffp-contract every version gives the same bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MEGATRONISH_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define MEGATRONISH_CLONES
#endif

namespace megatronish {

// What AdamW needs beside its tensors, as torch.optim.AdamW names it.
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};

// What a tensor holds; remainder: the lower 16 bits of a float32, of which the upper ones, rounded, lie in a bfloat16 parameter.
enum Kind : int { kNone = 0, kFloat32 = 1, kFloat64 = 2, kBfloat16 = 3, kFloat16 = 4, kRemainder = 5 };

// A flat slice. `master`: float32 or float64 weights; remainders, with bfloat16 `low`; or bfloat16 parameters that have no master.
// `low`: where new weights are written, rounded to nearest even (beside remainders to nearest, ties away from zero).
// `stochastic`: of bfloat16 moments and of bfloat16 parameters without a master. `zero_gradient`: it is zeros afterwards, always.
struct AdamWTensors {
  void* master_data;
  int master;
  float* gradient;  // float64 beside a float64 master
  void *exp_avg, *exp_avg_sq;
  int moments;
  uint16_t* low;
  int low_kind;
  bool stochastic, zero_gradient;
};

// Elements of a slice up to `stop` that belong to one tensor. Element i of the slice is number e = i + offset of what this rank holds
// of it, and number e / inner * row + first + e % inner of the whole tensor.
struct Segment {
  int64_t stop, decays, key, offset, inner, row, first;
};

// In order; none: everything decays, and nothing is drawn.
struct AdamWSegments {
  const Segment* rows;
  int64_t count;
};

// AdamW on elements [0, n) of a flat slice, in place. `scalars` points to {factor of every gradient, number of this update, from 1}.
// A factor that is not finite refuses the update: nothing but the gradient is written. What is rounded by chance is a hash of (the
// segment's key, number of the update, index in the whole tensor).
void adamw_float32(const AdamWTensors& tensors, int64_t n, const float* scalars, const AdamWSegments& segments, const AdamW& options,
                   int threads);
void adamw_float64(const AdamWTensors& tensors, int64_t n, const double* scalars, const AdamWSegments& segments, const AdamW& options,
                   int threads);

// The sum of squares of all elements of all (address, size), in float64 and an order that depends on the sizes alone.
double square_sum_float32(const std::vector<std::pair<const float*, int64_t>>& tensors, int threads);
double square_sum_float64(const std::vector<std::pair<const double*, int64_t>>& tensors, int threads);

// out[r, :] = source[offsets[r] : offsets[r] + width], widened to int64; returns (smallest, largest) token copied.
// Throws std::out_of_range, naming the row, when a row does not lie within the `size` tokens of `source`.
std::pair<int64_t, int64_t> gather_uint16(const uint16_t* source, int64_t size, const int64_t* offsets, int64_t rows, int64_t width,
                                          int64_t* out, int threads);
std::pair<int64_t, int64_t> gather_int32(const int32_t* source, int64_t size, const int64_t* offsets, int64_t rows, int64_t width,
                                         int64_t* out, int threads);

// Where a keyed permutation of [0, size) takes each of n values, in place: megatronish/data/permutation.py, which names the method.
void permute(uint64_t* values, int64_t n, uint64_t size, uint64_t rows, uint64_t columns, const uint64_t* keys, int num_rounds);

// Rows [0, num_samples] of (position in `documents`, offset in that document) at which samples begin, int64 pairs.
// Throws std::out_of_range when the documents run out or one of them is not in [0, num_lengths).
void megatron_sample_index(const int32_t* lengths, int64_t num_lengths, const int32_t* documents, int64_t num_documents,
                           int64_t sequence_length, int64_t num_samples, int64_t* out);

// Source and number within it of each of `size` samples: always the source that is furthest behind its weight.
void megatron_blend_index(const double* weights, int64_t num_sources, int64_t size, int16_t* source, int64_t* number);

// out[b * count + i] = 1 where element start + i of sample samples[b] is kept: its Philox word under `key` is at least `threshold`
// (0 to 2^32). Element e is word e % 4 of the block at counter (e / 4, sample number).
void keep_bits(const int64_t* samples, int64_t num_samples, int64_t start, int64_t count, int64_t key, int64_t threshold, uint8_t* out,
               int threads);

// Calls work(start, stop) on parts of [0, n), each of at least `smallest` elements, on up to `threads` threads.
inline void parallel_for(int64_t n, int64_t smallest, int threads, const std::function<void(int64_t, int64_t)>& work) {
  int64_t parts = threads < 1 ? 1 : threads;
  if (parts > n / smallest) parts = n / smallest < 1 ? 1 : n / smallest;
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part)
    others.emplace_back([&work, n, part, parts] { work(n * part / parts, n * (part + 1) / parts); });
  work(0, n / parts);
  for (auto& thread : others) thread.join();
}

}  // namespace megatronish
