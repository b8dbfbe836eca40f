// Orders of samples: our keyed permutation, and indices of megatron-core's (megatron/core/datasets/helpers.cpp), entry for entry.

#include <algorithm>
#include <stdexcept>

#include "cpu.h"

namespace megatronish {
namespace {

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace

void permute(uint64_t* values, int64_t n, uint64_t size, uint64_t rows, uint64_t columns, const uint64_t* keys, int num_rounds) {
  for (int64_t i = 0; i < n; ++i) {
    uint64_t value = values[i];
    do {
      uint64_t left = value / columns, right = value % columns;
      for (int round = 0; round < num_rounds; ++round) {
        if (round % 2 == 0) left = (left + mix(right ^ keys[round]) % rows) % rows;
        else right = (right + mix(left ^ keys[round]) % columns) % columns;
      }
      value = left * columns + right;
    } while (value >= size);
    values[i] = value;
  }
}

void megatron_sample_index(const int32_t* lengths, int64_t num_lengths, const int32_t* documents, int64_t num_documents,
                           int64_t sequence_length, int64_t num_samples, int64_t* out) {
  // Sample i begins at token i * sequence_length of the documents laid end to end. Row i: position in `documents`, offset in that one.
  int64_t position = 0, begin = 0, next = 0;  // `begin`: first token of the document at `position`
  out[0] = out[1] = 0;
  for (int64_t i = 1; i <= num_samples; ++i) {
    next += sequence_length;
    while (true) {
      if (position >= num_documents) throw std::out_of_range("the documents have too few tokens for the samples");
      const int32_t document = documents[position];
      if (document < 0 || document >= num_lengths) throw std::out_of_range("a document is out of range");
      if (next < begin + lengths[document]) break;
      begin += lengths[document];
      ++position;
    }
    out[2 * i] = position;
    out[2 * i + 1] = next - begin;
  }
}

void megatron_blend_index(const double* weights, int64_t num_sources, int64_t size, int16_t* source, int64_t* number) {
  std::vector<int64_t> taken(num_sources, 0);
  for (int64_t i = 0; i < size; ++i) {
    const double count = std::max(static_cast<double>(i), 1.0);
    int64_t best = 0;
    double largest = weights[0] * count - static_cast<double>(taken[0]);
    for (int64_t k = 1; k < num_sources; ++k) {
      const double error = weights[k] * count - static_cast<double>(taken[k]);
      if (error > largest) {
        largest = error;
        best = k;
      }
    }
    source[i] = static_cast<int16_t>(best);
    number[i] = taken[best]++;
  }
}

}  // namespace megatronish
