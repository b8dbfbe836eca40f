// Dropout bits by Philox4x32-10 (Salmon et al. 2011), many blocks of four words at a time.

#include <algorithm>
#include <cstring>

#include "cpu.h"

namespace megatronish {
namespace {

// Few enough to stay in cache, too many for g++ 12 to unroll the loops over them, which it then does not vectorize (9 ns a bit
// with 16, 0.8 with 64).
constexpr int kLanes = 64;
constexpr int kWords = 4 * kLanes;

// keep[4 * lane + word] = word of block `first + lane` at counter (block, sample) >= threshold.
inline __attribute__((always_inline)) void philox_lanes(uint64_t first, uint64_t sample, uint64_t key, uint64_t threshold, uint8_t* keep) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = uint32_t(first + i);
    c1[i] = uint32_t((first + i) >> 32);
    c2[i] = uint32_t(sample);
    c3[i] = uint32_t(sample >> 32);
  }
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * c0[i], product1 = uint64_t(0xCD9E8D57u) * c2[i];
      c0[i] = uint32_t(product1 >> 32) ^ c1[i] ^ key0;
      c1[i] = uint32_t(product1);
      c2[i] = uint32_t(product0 >> 32) ^ c3[i] ^ key1;
      c3[i] = uint32_t(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kLanes; ++i) {
    keep[4 * i] = c0[i] >= threshold;
    keep[4 * i + 1] = c1[i] >= threshold;
    keep[4 * i + 2] = c2[i] >= threshold;
    keep[4 * i + 3] = c3[i] >= threshold;
  }
}

MEGATRONISH_CLONES
void keep_run(uint64_t sample, uint64_t start, int64_t count, uint64_t key, uint64_t threshold, uint8_t* out) {
  uint8_t keep[kWords];
  int64_t skip = int64_t(start % 4);  // words of the first block that come before `start`
  uint64_t block = start / 4;
  for (int64_t done = 0; done < count; block += kLanes) {
    const int64_t size = std::min<int64_t>(kWords - skip, count - done);
    philox_lanes(block, sample, key, threshold, keep);
    std::memcpy(out + done, keep + skip, size_t(size));
    done += size;
    skip = 0;
  }
}

}  // namespace

void keep_bits(const int64_t* samples, int64_t num_samples, int64_t start, int64_t count, int64_t key, int64_t threshold, uint8_t* out,
               int threads) {
  constexpr int64_t kPiece = int64_t(1) << 16;  // bits, a multiple of four
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  parallel_for(num_samples * pieces, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / pieces, begin = i % pieces * kPiece;
      keep_run(uint64_t(samples[row]), uint64_t(start + begin), std::min(kPiece, count - begin), uint64_t(key), uint64_t(threshold),
               out + row * count + begin);
    }
  });
}

}  // namespace megatronish
