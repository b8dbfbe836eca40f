// Samples out of a memory-mapped token file: rows of consecutive tokens, widened to int64, with their range as a by-product.

#include <algorithm>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu.h"

namespace megatronish {
namespace {

// The range is kept in the source's own width, so that the loop is one wide copy.
template <typename T>
inline __attribute__((always_inline)) void copy_row(const T* __restrict source, int64_t* __restrict out, int64_t width, T& low, T& high) {
  T smallest = low, largest = high;
  for (int64_t i = 0; i < width; ++i) {
    const T token = source[i];
    smallest = token < smallest ? token : smallest;
    largest = token > largest ? token : largest;
    out[i] = token;
  }
  low = smallest;
  high = largest;
}

MEGATRONISH_CLONES
void row_uint16(const uint16_t* source, int64_t* out, int64_t width, uint16_t& low, uint16_t& high) {
  copy_row(source, out, width, low, high);
}

MEGATRONISH_CLONES
void row_int32(const int32_t* source, int64_t* out, int64_t width, int32_t& low, int32_t& high) {
  copy_row(source, out, width, low, high);
}

template <typename T>
std::pair<int64_t, int64_t> gather(const T* source, int64_t size, const int64_t* offsets, int64_t rows, int64_t width, int64_t* out,
                                   int threads, void (*row)(const T*, int64_t*, int64_t, T&, T&)) {
  // Before any thread starts: an exception cannot leave one.
  for (int64_t r = 0; r < rows; ++r)
    if (width < 0 || offsets[r] < 0 || offsets[r] > size - width)
      throw std::out_of_range("row " + std::to_string(r) + " asks for tokens [" + std::to_string(offsets[r]) + ", " +
                              std::to_string(offsets[r] + width) + ") of " + std::to_string(size));
  T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::min();
  std::mutex mutex;
  // A part is at least a megabyte of output: pages of a map that is not in memory are then read side by side.
  const int64_t smallest = std::max<int64_t>(1, (int64_t(1) << 17) / std::max<int64_t>(1, width));
  parallel_for(rows, smallest, threads, [&](int64_t start, int64_t stop) {
    T part_low = std::numeric_limits<T>::max(), part_high = std::numeric_limits<T>::min();
    for (int64_t r = start; r < stop; ++r) row(source + offsets[r], out + r * width, width, part_low, part_high);
    const std::lock_guard<std::mutex> lock(mutex);
    low = std::min(low, part_low);
    high = std::max(high, part_high);
  });
  return {int64_t(low), int64_t(high)};
}

}  // namespace

std::pair<int64_t, int64_t> gather_uint16(const uint16_t* source, int64_t size, const int64_t* offsets, int64_t rows, int64_t width,
                                          int64_t* out, int threads) {
  return gather<uint16_t>(source, size, offsets, rows, width, out, threads, row_uint16);
}

std::pair<int64_t, int64_t> gather_int32(const int32_t* source, int64_t size, const int64_t* offsets, int64_t rows, int64_t width,
                                         int64_t* out, int threads) {
  return gather<int32_t>(source, size, offsets, rows, width, out, threads, row_int32);
}

}  // namespace megatronish
