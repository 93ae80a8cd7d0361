#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, gridDim;

namespace gpu_on_cpu {

uint64_t block_run;
alignas(256) char shared_memory[kMostDynamic + kMostStatic + 4096];

namespace {

constexpr unsigned kMostThreads = 1024, kWarp = 32;
constexpr size_t kStack = 256 << 10, kGuard = 16;
constexpr char kUnwritten = '\xff';  // bytes of NaNs

struct Group;

struct Fiber {
  ucontext_t first;  // where it begins
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(kStack);
  bool begun = false, ended = true;
  const Group* waits_in = nullptr;
  uint64_t given, taken;
  int from;
};

// Threads of which all that have not ended must come before any goes on.
struct Group {
  unsigned first, count, arrived = 0;
  Together what = Together::kSync;
};

std::vector<Fiber> fibers(kMostThreads);
std::map<int, std::vector<Group>> lanes;  // by their width
Group whole_block;
jmp_buf scheduler;
unsigned running, alive;
const std::function<void()>* work;
std::mutex one_kernel;
const char* kernel_name = "?";
std::map<std::string, int64_t> launches;
uint64_t random_state;
std::vector<char*> guards;  // of the block's shared variables
size_t shared_used;

void open(Group& group) {
  const auto begin = fibers.begin() + group.first, end = begin + group.count;
  uint64_t all = group.what == Together::kLeast ? ~uint64_t{0} : 0;
  for (auto fiber = begin; fiber != end; ++fiber) {
    if (fiber->ended) continue;
    if (group.what == Together::kLeast) all = std::min(all, fiber->given);
    if (group.what == Together::kBallot) all |= uint64_t{fiber->given != 0} << (fiber - begin);
  }
  for (auto fiber = begin; fiber != end; ++fiber) {
    fiber->taken = all;
    if (group.what == Together::kExchange && !fiber->ended) {
      const Fiber& giver = begin[fiber->from];
      if (giver.ended) fail("a lane takes what one gives that has ended");
      fiber->taken = giver.given;
    }
    fiber->waits_in = nullptr;
  }
  group.arrived = 0;
}

void open_if_all_are_there(Group& group) {
  const auto begin = fibers.begin() + group.first, end = begin + group.count;
  const auto there = std::count_if(begin, end, [](const Fiber& fiber) { return !fiber.ended; });
  if (group.arrived > 0 && group.arrived == there) open(group);
}

uint64_t wait(Group& group, Together what, uint64_t v, int from) {
  Fiber& own = fibers[running];
  if (group.arrived > 0 && group.what != what) fail("lanes that meet want different things");
  group.what = what;
  ++group.arrived;
  own.given = v;
  own.from = from;
  own.waits_in = &group;
  open_if_all_are_there(group);
  if (own.waits_in != nullptr && _setjmp(own.place) == 0) _longjmp(scheduler, 1);
  return own.taken;
}

void end_thread() {
  fibers[running].ended = true;
  --alive;
  open_if_all_are_there(whole_block);
  for (auto& [width, groups] : lanes) open_if_all_are_there(groups[running / width]);
}

void live() {  // each fiber for ever, a thread of one block after another
  for (;;) {
    (*work)();
    end_thread();
    if (_setjmp(fibers[running].place) == 0) _longjmp(scheduler, 1);
  }
}

void go_on(unsigned i) {
  Fiber& fiber = fibers[i];
  running = i;
  threadIdx = dim3(i);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack.data();
  fiber.first.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.first, live, 0);
  setcontext(&fiber.first);
}

template <typename T>
void shuffle(std::vector<T>& v) {
  for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[draw() % i]);
}

// The threads of a block in the order of their turns: whole warps.
std::vector<unsigned> draw_order(unsigned threads) {
  std::vector<unsigned> warps((threads + kWarp - 1) / kWarp), of_lanes(kWarp), order;
  std::iota(warps.begin(), warps.end(), 0u);
  std::iota(of_lanes.begin(), of_lanes.end(), 0u);
  shuffle(warps);
  switch (draw() % 3) {
    case 0: break;
    case 1: std::reverse(of_lanes.begin(), of_lanes.end()); break;
    default: shuffle(of_lanes);
  }
  for (const unsigned warp : warps) {
    for (const unsigned lane : of_lanes) {
      if (warp * kWarp + lane < threads) order.push_back(warp * kWarp + lane);
    }
  }
  return order;
}

bool can_go_on(unsigned i) { return !fibers[i].ended && fibers[i].waits_in == nullptr; }

void begin_block(unsigned threads, size_t dynamic_bytes) {
  ++block_run;
  std::memset(shared_memory, kUnwritten, std::max(shared_used, dynamic_bytes) + kGuard);
  guards.assign(1, dynamic_memory() + dynamic_bytes);
  shared_used = dynamic_bytes + kGuard;
  alive = threads;
  whole_block = Group{0, threads};
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].ended = false;
    fibers[i].waits_in = nullptr;
  }
  for (auto& [width, groups] : lanes) {
    groups.clear();
    const auto count = static_cast<unsigned>(width);
    for (unsigned i = 0; i < threads; i += count) groups.push_back(Group{i, count});
  }
}

void check_guards() {
  for (const char* guard : guards) {
    if (std::count(guard, guard + kGuard, kUnwritten) != kGuard) {
      fail("a thread wrote behind a variable in shared memory");
    }
  }
}

void run_block(unsigned threads, size_t dynamic_bytes) {
  begin_block(threads, dynamic_bytes);
  const std::vector<unsigned> order = draw_order(threads);
  const bool alone = draw() % 2 == 0;  // each warp as far as it can
  const size_t turn = alone ? kWarp : order.size();
  while (alive > 0) {
    bool some = false;
    for (size_t begin = 0; begin < order.size(); begin += turn) {
      for (bool again = true; again;) {
        again = false;
        for (size_t i = begin; i < std::min(begin + turn, order.size()); ++i) {
          if (!can_go_on(order[i])) continue;
          go_on(order[i]);
          again = alone;
          some = true;
        }
      }
    }
    if (!some) fail("threads wait for others that do not come");
  }
  check_guards();
}

}  // namespace

uint32_t draw() {
  if (random_state == 0) {
    const char* seed = std::getenv("GPU_ON_CPU_SEED");
    random_state = seed == nullptr ? 1 : 1 + std::strtoull(seed, nullptr, 10);
  }
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(random_state >> 33);
}

void fail(const char* problem) {
  std::fprintf(stderr, "gpu_on_cpu: %s, in thread %u of block %u of %s\n", problem, threadIdx.x,
               blockIdx.x, kernel_name);
  std::abort();
}

void entered(const char* kernel) {
  kernel_name = kernel;
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) ++launches[kernel];
}

void wait_for_block() { wait(whole_block, Together::kSync, 0, 0); }

bool any_of_block(bool v) { return wait(whole_block, Together::kLeast, v ? 0 : 1, 0) == 0; }

uint64_t together(Together what, uint64_t v, int from, int width) {
  return wait(lanes.at(width)[running / static_cast<unsigned>(width)], what, v, from);
}

char* dynamic_memory() { return shared_memory; }

void* allocate_shared(size_t size, size_t alignment) {
  size_t at = (shared_used + alignment - 1) / alignment * alignment;
  if (alignment < 16 && at / alignment % 2 == 0) at += alignment;
  shared_used = at + size + kGuard;
  if (shared_used > sizeof shared_memory || at + size > kMostStatic + kMostDynamic) {
    fail("too much shared memory");
  }
  std::memset(shared_memory + at, kUnwritten, size + kGuard);
  guards.push_back(shared_memory + at + size);
  return shared_memory + at;
}

void run(dim3 blocks, unsigned threads, size_t dynamic_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_kernel);
  if (std::getenv("GPU_ON_CPU_FAULT") != nullptr) return;  // for tests of what notices
  if (threads > kMostThreads || dynamic_bytes > kMostDynamic) fail("no such launch");
  for (const int width : {1, 2, 4, 8, 16, 32, 64}) lanes[width];
  work = &kernel;
  gridDim = blocks;
  const uint64_t count = uint64_t{blocks.x} * blocks.y;
  const bool downwards = draw() % 2 != 0;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = downwards ? count - 1 - i : i;
    blockIdx = dim3(static_cast<unsigned>(at % blocks.x), static_cast<unsigned>(at / blocks.x));
    run_block(threads, dynamic_bytes);
  }
}

}  // namespace gpu_on_cpu

// The kernels that ran, a line each, with how often.
extern "C" __attribute__((visibility("default"))) const char* causal_conv1d_launched() {
  static std::string text;
  text.clear();
  for (const auto& [name, count] : gpu_on_cpu::launches) {
    text += std::to_string(count) + " " + name + "\n";
  }
  return text.c_str();
}
