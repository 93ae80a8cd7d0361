// The threads of a block as fibers: see hip/hip_runtime.h.
#include <ucontext.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "hip/hip_runtime.h"

namespace hip_on_cpu {

dim3 thread, block;

namespace {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool done;
  uint64_t given;  // by exchange()
};

// Who arrives last lets all go on, and tells them whether any voted so.
struct Barrier {
  unsigned arrived = 0, round = 0;
  bool vote = false, result = false;
};

constexpr int kWave = 64;
std::vector<Fiber> fibers;
std::vector<Barrier> of_lanes;  // of the groups of a width, by their first lane
Barrier of_block;
ucontext_t scheduler;
unsigned running, alive;
const std::function<void()>* work;
std::mutex one_kernel;

void yield() {
  const unsigned own = running;
  swapcontext(&fibers[own].context, &scheduler);
}

void enter() {
  (*work)();
  fibers[running].done = true;
  --alive;
}

// Threads that have ended are not waited for at a block's barrier, as on a GPU.
void open_if_all_are_there(Barrier& barrier, unsigned count) {
  if (barrier.arrived == 0 || barrier.arrived < count) return;
  barrier.arrived = 0;
  barrier.result = barrier.vote;
  barrier.vote = false;
  ++barrier.round;
}

bool wait(Barrier& barrier, unsigned count, bool vote = false) {
  const unsigned round = barrier.round;
  ++barrier.arrived;
  barrier.vote |= vote;
  open_if_all_are_there(barrier, count);
  while (barrier.round == round) yield();
  return barrier.result;
}

void start(unsigned i) {
  Fiber& fiber = fibers[i];
  fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, enter, 0);
}

}  // namespace

void wait_for_block() { wait(of_block, alive); }

bool any_of_block(bool v) { return wait(of_block, alive, v); }

uint64_t exchange(uint64_t v, int from, int width) {
  static_assert(kWave == warpSize, "the widest group");
  const unsigned first = running - running % static_cast<unsigned>(width);
  fibers[running].given = v;
  wait(of_lanes[first], static_cast<unsigned>(width));
  const uint64_t taken = fibers[first + static_cast<unsigned>(from)].given;
  wait(of_lanes[first], static_cast<unsigned>(width));
  return taken;
}

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_kernel);
  if (std::getenv("HIP_ON_CPU_FAULT") != nullptr) return;  // for tests of what notices
  fibers.resize(threads);
  work = &kernel;
  for (block = dim3(0); block.x < blocks; ++block.x) {
    of_block = Barrier{};
    of_lanes.assign(threads, Barrier{});
    alive = threads;
    for (unsigned i = 0; i < threads; ++i) start(i);
    while (alive > 0) {
      for (unsigned i = 0; i < threads; ++i) {
        running = block.x % 2 == 0 ? i : threads - 1 - i;
        if (fibers[running].done) continue;
        thread.x = running;
        swapcontext(&scheduler, &fibers[running].context);
        open_if_all_are_there(of_block, alive);
      }
    }
  }
}

}  // namespace hip_on_cpu
