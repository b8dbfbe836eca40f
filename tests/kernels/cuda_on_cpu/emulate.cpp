// See emulate.h.

#include "emulate.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

__nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else {
    value = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
  }
  return x.bits & 0x8000 ? -value : value;
}

__half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7FFF};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
  // Units of the last place; nearbyint rounds to even. A carry runs over into the exponent, as it should.
  const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + units))};
}

namespace emulate {

Place place;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPage = 4096;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 163 * 1024;  // of a block on sm_80, the least of the architectures that kernels are built for

struct Options {
  int order = 0;           // 0: first to last, 1: last to first, more: random, another for each number
  bool late_copies = true;  // asynchronous copies land when they are waited for; else at once
} options;

struct Counters {
  int64_t ldmatrix = 0, ldmatrix_conflicts = 0;
} counters;

enum class State { kReady, kInWarp, kAtBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool is_valid;
};

struct Thread {
  State state;
  void* stack_pointer;
  dim3 index;
  int parity;
  std::vector<std::vector<Copy>> groups;  // the last one is open
};

struct Warp {
  const char* name[2];
  int arrived[2];
  Slot given[2][32], results[2][32];
  int lanes;
};

std::mutex only_one;
unsigned char* stacks = nullptr;
std::vector<Thread> threads(kMostThreads);
std::vector<Warp> warps(kMostThreads / 32);
int current = -1;
void* scheduler_stack;
const std::function<void()>* body;
std::exception_ptr failure;
unsigned char *shared_area = nullptr, *shared_begin = nullptr;
size_t shared_area_bytes = 0, shared_bytes = 0;
sigjmp_buf outside;
void* volatile bad_address;

[[noreturn]] void fail(const std::string& text) {
  const Place& p = place;
  throw std::runtime_error("block " + std::to_string(p.block.x) + "," + std::to_string(p.block.y) + "," + std::to_string(p.block.z) +
                           " thread " + std::to_string(p.thread.x) + "," + std::to_string(p.thread.y) + ": " + text);
}

void complete(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.is_valid) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  group.clear();
}

void fiber_main() {
  try {
    (*body)();
    for (auto& group : threads[current].groups) complete(group);
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  threads[current].state = State::kDone;
}

#ifdef __x86_64__
extern "C" void megatronish_switch_stack(void** save, void* load);
asm(R"(
.text
.type megatronish_switch_stack,@function
megatronish_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size megatronish_switch_stack,.-megatronish_switch_stack
)");

void to_scheduler() { megatronish_switch_stack(&threads[current].stack_pointer, scheduler_stack); }
void to_thread(int thread) { megatronish_switch_stack(&scheduler_stack, threads[thread].stack_pointer); }

void fiber_start() {
  fiber_main();
  to_scheduler();
}

void prepare(int thread) {
  void** top = reinterpret_cast<void**>(stacks + (thread + 1) * kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  threads[thread].stack_pointer = top;
}
#else
// Slower: swapcontext asks the system for the signal mask at every change.
ucontext_t scheduler_context;
std::vector<ucontext_t> contexts(kMostThreads);

void to_scheduler() { swapcontext(&contexts[current], &scheduler_context); }
void to_thread(int thread) { swapcontext(&scheduler_context, &contexts[thread]); }

void prepare(int thread) {
  getcontext(&contexts[thread]);
  contexts[thread].uc_stack.ss_sp = stacks + thread * kStackBytes;
  contexts[thread].uc_stack.ss_size = kStackBytes;
  contexts[thread].uc_link = &scheduler_context;
  makecontext(&contexts[thread], &fiber_main, 0);
}
#endif

void on_bad_access(int, siginfo_t* info, void*) {
  bad_address = info->si_addr;
  siglongjmp(outside, 1);
}

void wait_as(State state) {
  threads[current].state = state;
  to_scheduler();
}

std::vector<int> order_of(int count, std::mt19937& random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (options.order == 1) std::reverse(order.begin(), order.end());
  if (options.order > 1) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// One turn of a thread; false if it waits or has ended.
bool turn(int thread) {
  if (threads[thread].state != State::kReady) return false;
  current = thread;
  place.thread = threads[thread].index;
  to_thread(thread);
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  return true;
}

void run_block(dim3 block_dim, int count, std::mt19937& random) {
  const int num_warps = (count + 31) / 32;
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    thread.state = State::kReady;
    thread.index = dim3(t % block_dim.x, t / block_dim.x % block_dim.y, t / (block_dim.x * block_dim.y));
    thread.parity = 0;
    thread.groups.assign(1, {});
    prepare(t);
  }
  for (int w = 0; w < num_warps; ++w) {
    warps[w].arrived[0] = warps[w].arrived[1] = 0;
    warps[w].lanes = std::min(32, count - 32 * w);
  }
  std::memset(shared_begin, 0xFF, shared_bytes);
  for (;;) {
    bool any = false;
    for (int w : order_of(num_warps, random)) {
      for (bool again = true; again;) {
        again = false;
        for (int l : order_of(warps[w].lanes, random)) again |= turn(32 * w + l);
        any |= again;
      }
    }
    int waiting = 0, done = 0;
    for (int t = 0; t < count; ++t) waiting += threads[t].state == State::kAtBarrier, done += threads[t].state == State::kDone;
    if (done == count) return;
    if (waiting + done == count) {
      for (int t = 0; t < count; ++t) {
        if (threads[t].state == State::kAtBarrier) threads[t].state = State::kReady;
      }
    } else if (!any) {
      fail("threads wait for ever: " + std::to_string(waiting) + " at a barrier, " + std::to_string(done) + " ended, of " +
           std::to_string(count));
    }
  }
}

void make_room(size_t shared) {
  if (!stacks) {
    stacks = static_cast<unsigned char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  const size_t pages = (shared + kPage - 1) / kPage * kPage;
  if (shared_area) munmap(shared_area, shared_area_bytes);
  shared_area_bytes = pages + 2 * kPage;
  shared_area = static_cast<unsigned char*>(
      mmap(nullptr, shared_area_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(shared_area, kPage, PROT_NONE);
  mprotect(shared_area + kPage + pages, kPage, PROT_NONE);
  shared_begin = shared_area + kPage + pages - (shared + 15) / 16 * 16;
  shared_bytes = shared;
}

void run_grid(dim3 grid, dim3 block, int count) {
  std::mt19937 random(options.order);
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  place.block_dim = block;
  place.grid_dim = grid;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = options.order % 2 ? blocks - 1 - i : i;
    place.block = dim3(b % grid.x, b / grid.x % grid.y, b / (int64_t(grid.x) * grid.y));
    run_block(block, count, random);
  }
}

}  // namespace

int lane() { return current % 32; }

unsigned char* dynamic_shared() { return shared_begin; }

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
}

void check_shared(const void* address, size_t bytes) {
  check_aligned(address, bytes);
  const unsigned char* begin = static_cast<const unsigned char*>(address);
  if (begin < shared_begin || begin + bytes > shared_begin + shared_bytes) {
    fail("shared memory at byte " + std::to_string(begin - shared_begin) + " of " + std::to_string(shared_bytes));
  }
}

void wait_for_block() { wait_as(State::kAtBarrier); }

Slot collective(const char* name, const Slot& given, Together together) {
  Warp& warp = warps[current / 32];
  Thread& thread = threads[current];
  const int parity = thread.parity;
  thread.parity ^= 1;
  if (warp.arrived[parity] == 0) warp.name[parity] = name;
  if (std::strcmp(warp.name[parity], name) != 0) fail(std::string(name) + " while another lane is in " + warp.name[parity]);
  warp.given[parity][lane()] = given;
  if (++warp.arrived[parity] < warp.lanes) {
    wait_as(State::kInWarp);
  } else {
    if (warp.lanes != 32 && together) fail(std::string(name) + " in a warp of " + std::to_string(warp.lanes) + " lanes");
    if (together) together(warp.given[parity], warp.results[parity]);
    warp.arrived[parity] = 0;
    const int first = current / 32 * 32;
    for (int t = first; t < first + warp.lanes; ++t) threads[t].state = State::kReady;
  }
  return warp.results[parity][lane()];
}

uint32_t shuffle(const char* name, uint32_t value, int lane, int) {
  Slot given{{value, uint32_t(lane)}};
  return collective(name, given, [](const Slot* all, Slot* results) {
    for (int l = 0; l < 32; ++l) results[l].words[0] = all[all[l].words[1] & 31].words[0];
  }).words[0];
}

void copy_async(void* shared, const void* global, size_t bytes, bool is_valid) {
  check_shared(shared, bytes);
  check_aligned(global, bytes);
  std::vector<Copy> one{{shared, global, bytes, is_valid}};
  if (options.late_copies) {
    threads[current].groups.back().push_back(one[0]);
  } else {
    complete(one);
  }
}

void commit_copies() { threads[current].groups.emplace_back(); }

void wait_for_copies(int groups_left) {
  auto& groups = threads[current].groups;
  while (int(groups.size()) - 1 > groups_left) {  // the open group is not waited for
    complete(groups.front());
    groups.erase(groups.begin());
  }
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  check_shared(row, 16);
  Slot given{};
  std::memcpy(given.words, &row, sizeof row);
  const Together together = [](const Slot* all, Slot* results) {
    uint16_t matrices[4][8][8];
    for (int m = 0; m < 4; ++m) {
      int banks = 0;
      for (int i = 0; i < 8; ++i) {
        const unsigned char* address;
        std::memcpy(&address, all[8 * m + i].words, sizeof address);
        std::memcpy(matrices[m][i], address, 16);
        banks |= 1 << ((address - shared_begin) / 16 % 8);
      }
      counters.ldmatrix += 1;
      counters.ldmatrix_conflicts += 8 - __builtin_popcount(banks);
    }
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < 4; ++m) {
        const int i = l / 4, j = 2 * (l % 4);
        results[l].words[m] = matrices[m][i][j] | uint32_t(matrices[m][i][j + 1]) << 16;
        results[l].words[4 + m] = matrices[m][j][i] | uint32_t(matrices[m][j + 1][i]) << 16;
      }
    }
  };
  const Slot result = collective(transposed ? "ldmatrix.trans" : "ldmatrix", given, together);
  for (int m = 0; m < 4; ++m) r[m] = result.words[transposed ? 4 + m : m];
}

namespace {

float low_float(uint32_t pair, bool is_bfloat16) {
  static const std::vector<float> halves = [] {
    std::vector<float> values(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) values[bits] = __half2float({uint16_t(bits)});
    return values;
  }();
  return is_bfloat16 ? __bfloat162float({uint16_t(pair)}) : halves[uint16_t(pair)];
}

// PTX ISA, "Matrix fragments for mma.m16n8k16": with g = lane / 4 and t = lane % 4, a0..a3 hold rows g, g+8, g, g+8 and columns
// 2t, 2t, 2t+8, 2t+8 (and the next one) of A; b0, b1 hold rows 2t, 2t+8 (and the next one) and column g of B; c0..c3 hold rows g, g,
// g+8, g+8 and columns 2t, 2t+1, 2t, 2t+1 of C. Products are exact in float32; sums here run over k in order.
template <bool kIsBfloat16>
void multiply(const Slot* all, Slot* results) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + 8 * (i % 2)][t + 8 * (i / 2)];
      to[0] = low_float(all[l].words[i], kIsBfloat16);
      to[1] = low_float(all[l].words[i] >> 16, kIsBfloat16);
    }
    for (int i = 0; i < 2; ++i) {
      b[t + 8 * i][g] = low_float(all[l].words[4 + i], kIsBfloat16);
      b[t + 8 * i + 1][g] = low_float(all[l].words[4 + i] >> 16, kIsBfloat16);
    }
    for (int i = 0; i < 4; ++i) std::memcpy(&d[g + 8 * (i / 2)][t + i % 2], &all[l].words[6 + i], 4);
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < 4; ++i) std::memcpy(&results[l].words[i], &d[g + 8 * (i / 2)][t + i % 2], 4);
  }
}

}  // namespace

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bfloat16) {
  Slot given;
  std::memcpy(given.words, a, 16);
  std::memcpy(given.words + 4, b, 8);
  std::memcpy(given.words + 6, d, 16);
  const Slot result = is_bfloat16 ? collective("mma.bf16", given, &multiply<true>) : collective("mma.f16", given, &multiply<false>);
  std::memcpy(d, result.words, 16);
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(only_one);
  const int64_t count = int64_t(block.x) * block.y * block.z;
  if (count < 1 || count > kMostThreads) throw std::runtime_error("a block of " + std::to_string(count) + " threads");
  if (grid.y > 65535 || grid.z > 65535 || !grid.x || !grid.y || !grid.z) throw std::runtime_error("a grid of no or too many blocks");
  if (shared > kMostShared) throw std::runtime_error(std::to_string(shared) + " bytes of shared memory; sm_80 has " + std::to_string(kMostShared));
  make_room(shared);
  body = &kernel;
  failure = nullptr;
  struct sigaction action {}, before_segv, before_bus;
  action.sa_sigaction = &on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  std::string error;
  if (sigsetjmp(outside, 1) == 0) {
    try {
      run_grid(grid, block, int(count));
    } catch (const std::exception& e) {
      error = e.what();
    }
  } else {
    try {
      const auto address = static_cast<unsigned char*>(bad_address);
      const bool is_shared = address >= shared_area && address < shared_area + shared_area_bytes;
      fail(is_shared ? "an access outside of shared memory" : "an access outside of every tensor");
    } catch (const std::exception& e) {
      error = e.what();
    }
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace emulate

int __any_sync(unsigned, int predicate) {
  emulate::Slot given{{uint32_t(predicate != 0)}};
  return int(emulate::collective("__any_sync", given, [](const emulate::Slot* all, emulate::Slot* results) {
               uint32_t any = 0;
               for (int l = 0; l < 32; ++l) any |= all[l].words[0];
               for (int l = 0; l < 32; ++l) results[l].words[0] = any;
             }).words[0]);
}

#define EXPORTED __attribute__((visibility("default")))
extern "C" {
EXPORTED void emulate_configure(int order, int late_copies) { emulate::options = {order, late_copies != 0}; }
// Matrices that ldmatrix read since the last call, and their rows that had to wait for another row's banks.
EXPORTED void emulate_counters(int64_t* out) {
  out[0] = emulate::counters.ldmatrix;
  out[1] = emulate::counters.ldmatrix_conflicts;
  emulate::counters = {};
}
// n floats rounded to 16 bits, and back.
EXPORTED void emulate_round(int is_bfloat16, const float* x, int64_t n, uint16_t* out, float* back) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = is_bfloat16 ? __float2bfloat16_rn(x[i]).bits : __float2half_rn(x[i]).bits;
    back[i] = is_bfloat16 ? __bfloat162float({out[i]}) : __half2float({out[i]});
  }
}
}
