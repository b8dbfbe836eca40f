// Words are cut as this expression cuts them (Radford et al. 2019), leftmost alternative first, classes from the caller's table:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// Each word is merged on its own: always the pair of lowest rank, of equal ones the leftmost. So a word's ids can be kept.

#include "bpe.h"

#include <cstring>
#include <queue>
#include <tuple>

namespace megatronish {
namespace {

constexpr int64_t kWordSlots = int64_t(1) << 16;
constexpr int64_t kShort = 48;  // bytes of a word up to which a scan for the lowest rank beats a heap

inline uint64_t mix(uint64_t x) {
  x *= 0x9E3779B97F4A7C15ull;
  return x ^ (x >> 32);
}

// Code point and bytes of the well-formed UTF-8 character at `p`.
inline uint32_t decode(const uint8_t* p, int& size) {
  const uint32_t c = p[0];
  if (c < 0x80) return size = 1, c;
  if (c < 0xE0) return size = 2, (c & 0x1F) << 6 | (p[1] & 0x3F);
  if (c < 0xF0) return size = 3, (c & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
  return size = 4, (c & 0x07) << 18 | (p[1] & 0x3F) << 12 | (p[2] & 0x3F) << 6 | (p[3] & 0x3F);
}

}  // namespace

BpeEncoder::BpeEncoder(const uint8_t* classes, const int32_t* byte_ids, const int32_t* merges, int64_t num_merges)
    : classes_(classes, classes + 0x110000), words_(kWordSlots) {
  std::memcpy(ascii_, classes, sizeof(ascii_));
  std::memcpy(byte_ids_, byte_ids, sizeof(byte_ids_));
  uint64_t slots = 16;
  while (slots < 2 * static_cast<uint64_t>(num_merges)) slots *= 2;
  mask_ = slots - 1;
  merges_.assign(slots, Merge{0, -1, 0});
  for (int64_t rank = 0; rank < num_merges; ++rank) {
    const uint64_t pair = static_cast<uint64_t>(static_cast<uint32_t>(merges[3 * rank])) << 32 | static_cast<uint32_t>(merges[3 * rank + 1]);
    uint64_t slot = mix(pair) & mask_;
    while (merges_[slot].rank >= 0 && merges_[slot].pair != pair) slot = (slot + 1) & mask_;
    merges_[slot] = Merge{pair, static_cast<int32_t>(rank), merges[3 * rank + 2]};
  }
  for (auto& word : words_) word.size = 0;
}

const BpeEncoder::Merge* BpeEncoder::find(int32_t left, int32_t right) const {
  const uint64_t pair = static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  for (uint64_t slot = mix(pair) & mask_; merges_[slot].rank >= 0; slot = (slot + 1) & mask_)
    if (merges_[slot].pair == pair) return &merges_[slot];
  return nullptr;
}

int64_t BpeEncoder::word_end(const uint8_t* text, int64_t begin, int64_t end) const {
  int size;
  const auto class_at = [&](int64_t at, int& width) {
    if (text[at] < 0x80) return width = 1, ascii_[text[at]];
    const uint32_t character = decode(text + at, width);
    return classes_[character];
  };
  const auto run_end = [&](int64_t at, uint8_t wanted) {
    while (at < end && class_at(at, size) == wanted) at += size;
    return at;
  };
  if (text[begin] == '\'' && begin + 1 < end) {
    const uint8_t a = text[begin + 1], b = begin + 2 < end ? text[begin + 2] : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return begin + 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return begin + 3;
  }
  const uint8_t first = class_at(begin, size);
  if (first != kSpace) return run_end(begin + size, first);
  if (text[begin] == ' ' && begin + 1 < end) {
    const uint8_t second = class_at(begin + 1, size);
    if (second != kSpace) return run_end(begin + 1 + size, second);
  }
  // White space: all of it at the end of the text, else all but its last character, which may belong to what follows.
  int64_t last = begin, at = begin;
  while (at < end && class_at(at, size) == kSpace) {
    last = at;
    at += size;
  }
  return at == end || last == begin ? at : last;
}

int64_t BpeEncoder::merge_short(const uint8_t* word, int64_t size, int32_t* out) const {
  struct Pair {
    int32_t rank, result;
  };
  constexpr int32_t kNone = INT32_MAX;
  Pair pairs[kShort];
  const auto pair_of = [&](int64_t i) {
    const Merge* merge = find(out[i], out[i + 1]);
    return merge ? Pair{merge->rank, merge->result} : Pair{kNone, 0};
  };
  for (int64_t i = 0; i < size; ++i) out[i] = byte_ids_[word[i]];
  for (int64_t i = 0; i + 1 < size; ++i) pairs[i] = pair_of(i);
  while (size > 1) {
    int64_t best = 0;
    for (int64_t i = 1; i + 1 < size; ++i)
      if (pairs[i].rank < pairs[best].rank) best = i;
    if (pairs[best].rank == kNone) break;
    out[best] = pairs[best].result;
    std::memmove(out + best + 1, out + best + 2, (size - best - 2) * sizeof(*out));
    if (best + 2 < size) std::memmove(pairs + best + 1, pairs + best + 2, (size - best - 3) * sizeof(*pairs));
    --size;
    if (best + 1 < size) pairs[best] = pair_of(best);
    if (best > 0) pairs[best - 1] = pair_of(best - 1);
  }
  return size;
}

int64_t BpeEncoder::merge_long(const uint8_t* word, int64_t size, int32_t* out) const {
  std::vector<Symbol> symbols(size);
  using Entry = std::tuple<int32_t, int32_t, int32_t, int32_t>;  // rank, position, left, right: the last two tell a stale entry
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> queue;
  const auto offer = [&](int32_t i) {
    if (i < 0 || symbols[i].next < 0) return;
    const int32_t left = symbols[i].id, right = symbols[symbols[i].next].id;
    if (const Merge* merge = find(left, right)) queue.emplace(merge->rank, i, left, right);
  };
  for (int64_t i = 0; i < size; ++i)
    symbols[i] = {byte_ids_[word[i]], static_cast<int32_t>(i) - 1, i + 1 < size ? static_cast<int32_t>(i) + 1 : -1};
  for (int64_t i = 0; i + 1 < size; ++i) offer(static_cast<int32_t>(i));
  while (!queue.empty()) {
    const auto [rank, i, left, right] = queue.top();
    queue.pop();
    const int32_t next = symbols[i].next;
    if (symbols[i].id != left || next < 0 || symbols[next].id != right) continue;
    symbols[i].id = find(left, right)->result;
    symbols[i].next = symbols[next].next;
    symbols[next].id = -1;
    if (symbols[i].next >= 0) symbols[symbols[i].next].previous = i;
    offer(symbols[i].previous);
    offer(i);
  }
  int64_t count = 0;
  for (int32_t i = 0; i >= 0; i = symbols[i].next) out[count++] = symbols[i].id;
  return count;
}

int64_t BpeEncoder::encode_word(const uint8_t* word, int64_t size, int64_t readable, int32_t* out) {
  if (size > kKeyBytes) return size <= kShort ? merge_short(word, size, out) : merge_long(word, size, out);
  uint64_t key[3] = {0, 0, 0};
  if (readable >= kKeyBytes) {
    std::memcpy(key, word, kKeyBytes);
    for (int64_t i = 0; i < 3; ++i) {  // bytes beyond the word do not count
      const int64_t valid = size - 8 * i;
      if (valid <= 0) key[i] = 0;
      else if (valid < 8) key[i] &= (uint64_t(1) << (8 * valid)) - 1;
    }
  } else {
    std::memcpy(key, word, size);
  }
  Slot& slot = words_[mix(mix(mix(key[0] + size) + key[1]) + key[2]) & (kWordSlots - 1)];
  if (slot.size == size && slot.key[0] == key[0] && slot.key[1] == key[1] && slot.key[2] == key[2]) {
    for (int i = 0; i < slot.count; ++i) out[i] = slot.ids[i];
    return slot.count;
  }
  const int64_t count = merge_short(word, size, out);
  if (count <= kSlotIds) {
    std::memcpy(slot.key, key, sizeof(key));
    slot.size = static_cast<uint8_t>(size);
    slot.count = static_cast<uint8_t>(count);
    std::memcpy(slot.ids, out, count * sizeof(*out));
  }
  return count;
}

int64_t BpeEncoder::encode(const uint8_t* text, const int64_t* ends, int64_t num_texts, int32_t* out, int64_t* counts) {
  int64_t total = 0, begin = 0;
  const int64_t all = num_texts ? ends[num_texts - 1] : 0;
  for (int64_t i = 0; i < num_texts; ++i) {
    const int64_t before = total;
    for (const int64_t end = ends[i]; begin < end;) {
      const int64_t stop = word_end(text, begin, end);
      total += encode_word(text + begin, stop - begin, all - begin, out + total);
      begin = stop;
    }
    counts[i] = total - before;
  }
  return total;
}

}  // namespace megatronish
