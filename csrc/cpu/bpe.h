// Byte-level BPE with GPT-2's pre-tokenizer, id for id what the tokenizers library gives. Raw pointers; callers own the texts and outputs.
#pragma once

#include <cstdint>
#include <vector>

namespace megatronish {

// What the pre-tokenizer's regular expression asks of a character; values of the table that the constructor takes.
enum CharacterClass : uint8_t { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3 };

class BpeEncoder {
 public:
  // `classes`: one CharacterClass for each of 0x110000 code points. `byte_ids`: the token of each byte. `merges`: num_merges rows of
  // (left, right, result) by falling priority; of equal pairs the last row counts.
  BpeEncoder(const uint8_t* classes, const int32_t* byte_ids, const int32_t* merges, int64_t num_merges);

  // Encodes texts [0, ends[0]), [ends[0], ends[1]), ... of UTF-8, each on its own; writes the ids end to end and the number of each.
  // `out` must hold ends[num_texts - 1] ids: a token is a byte or more. Returns the number of ids. Not for several threads at once.
  int64_t encode(const uint8_t* text, const int64_t* ends, int64_t num_texts, int32_t* out, int64_t* counts);

 private:
  static constexpr int kKeyBytes = 24, kSlotIds = 8;
  struct alignas(64) Slot {  // a word lately seen and its ids; one cache line
    uint64_t key[3];
    uint8_t size, count;
    int32_t ids[kSlotIds];
  };
  struct Merge {
    uint64_t pair;
    int32_t rank, result;
  };
  struct Symbol {
    int32_t id;
    int32_t previous, next;
  };

  const Merge* find(int32_t left, int32_t right) const;
  int64_t word_end(const uint8_t* text, int64_t begin, int64_t end) const;
  int64_t encode_word(const uint8_t* word, int64_t size, int64_t readable, int32_t* out);
  int64_t merge_short(const uint8_t* word, int64_t size, int32_t* out) const;
  int64_t merge_long(const uint8_t* word, int64_t size, int32_t* out) const;

  std::vector<uint8_t> classes_;
  uint8_t ascii_[128];
  int32_t byte_ids_[256];
  std::vector<Merge> merges_;  // open addressing; rank -1: empty
  uint64_t mask_;
  std::vector<Slot> words_;
};

}  // namespace megatronish
