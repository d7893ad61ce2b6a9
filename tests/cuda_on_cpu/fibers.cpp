// The scheduler of cuda_runtime.h: runs one CTA after the other, its threads as fibers of one host thread.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

// The linker's names for the ends of all __shared__ variables.
extern char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_on_cpu {

Options options;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kDefaultShared =
    48 * 1024;  // bytes of dynamic shared memory that a CTA may have without cudaFuncSetAttribute

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  State state = State::kDone;
  Site site{};
  unsigned mask = 0;
  uint64_t value = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::array<uint64_t, 32>> exchanged;  // by warp
std::map<const void*, int> shared_allowed;
std::vector<char> shared_bytes;
ucontext_t scheduler;
const std::function<void()>* body;
size_t current;
std::string failure, last_failure;

void enter() {
  (*body)();
  fibers[current]->state = State::kDone;
  swapcontext(&fibers[current]->context, &scheduler);
}

void wait(State state, Site site) {
  Fiber& me = *fibers[current];
  me.state = state;
  me.site = site;
  swapcontext(&me.context, &scheduler);
}

std::vector<size_t> ordered(size_t count, std::mt19937& random) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  if (options.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (options.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

bool same_site(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string described(size_t thread) {
  const Fiber& f = *fibers[thread];
  const std::string who = "thread " + std::to_string(thread);
  if (f.state == State::kDone) return who + " has returned";
  const char* name = std::strrchr(f.site.file, '/');
  return who + " waits at " + (name ? name + 1 : f.site.file) + ":" + std::to_string(f.site.line) +
         (f.state == State::kAtBlock ? " (block)" : " (warp)");
}

// The first thread in begin : end, among those selected by `asked`, that does not wait at the same place as thread
// `first`; `first` if there is none.
template <class Asked>
size_t odd_one(size_t first, size_t begin, size_t end, const Asked& asked) {
  for (size_t t = begin; t < end; ++t)
    if (asked(t - begin) &&
        (fibers[t]->state != fibers[first]->state || !same_site(fibers[t]->site, fibers[first]->site)))
      return t;
  return first;
}

bool ready(size_t thread) { return fibers[thread]->state == State::kReady; }

// Releases the lanes of a warp whose whole mask has reached the same place. Returns whether there were any.
bool release_warp(size_t begin, size_t end) {
  bool released = false;
  for (size_t t = begin; t < end; ++t) {
    if (fibers[t]->state != State::kAtWarp) continue;
    const unsigned mask = fibers[t]->mask;
    const auto asked = [&](size_t lane) { return mask >> lane & 1u; };
    if (end - begin < 32 && mask >> (end - begin)) fail("a warp mask names lanes that do not exist");
    if (odd_one(t, begin, end, asked) != t) continue;
    for (size_t lane = 0; lane < end - begin; ++lane) {
      if (!asked(lane)) continue;
      exchanged[begin / 32][lane] = fibers[begin + lane]->value;
      fibers[begin + lane]->state = State::kReady;
    }
    released = true;
  }
  return released;
}

// Releases a block if all its threads wait at the same barrier. Returns false if all have returned, and after a
// failure.
bool release_block(size_t threads) {
  size_t first = 0;
  while (first < threads && fibers[first]->state == State::kDone) ++first;
  if (first == threads) return false;
  const size_t odd = odd_one(first, 0, threads, [](size_t) { return true; });
  if (odd != first || fibers[first]->state != State::kAtBlock) {
    fail("divergent barrier: " + described(first) + ", " + described(odd));
    return false;
  }
  for (size_t t = 0; t < threads; ++t) fibers[t]->state = State::kReady;
  return true;
}

// Runs every ready thread of begin : end until it waits or returns. Returns whether there were any.
bool turn(size_t begin, size_t end, std::mt19937& random) {
  bool any = false;
  for (const size_t i : ordered(end - begin, random)) {
    if (!ready(begin + i) || !failure.empty()) continue;
    any = true;
    current = begin + i;
    threadIdx.x = unsigned(current);
    swapcontext(&scheduler, &fibers[current]->context);
  }
  return any;
}

// Runs all threads until they have returned or wait at a block barrier.
void run_warps(size_t threads, std::mt19937& random) {
  const size_t warps = (threads + 31) / 32;
  const auto end_of = [&](size_t warp) { return std::min(32 * warp + 32, threads); };
  if (options.order != Order::kShuffled) {
    for (const size_t warp : ordered(warps, random))
      while (turn(32 * warp, end_of(warp), random) || release_warp(32 * warp, end_of(warp))) {
      }
    return;
  }
  for (bool any = true; any;) {
    any = turn(0, threads, random);
    for (size_t warp = 0; warp < warps; ++warp) any |= release_warp(32 * warp, end_of(warp));
  }
}

void run_block(size_t threads, std::mt19937& random) {
  std::fill(__start_cuda_shared, __stop_cuda_shared, char(0xff));
  std::fill(shared_bytes.begin(), shared_bytes.end(), char(0xff));
  for (size_t t = 0; t < threads; ++t) {
    Fiber& f = *fibers[t];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    f.state = State::kReady;
  }
  do run_warps(threads, random);
  while (failure.empty() && release_block(threads));
}

}  // namespace

void* dynamic_shared() { return shared_bytes.data(); }

void wait_for_block(Site site) { wait(State::kAtBlock, site); }

const uint64_t* exchange(unsigned mask, uint64_t value, Site site) {
  fibers[current]->mask = mask;
  fibers[current]->value = value;
  const size_t warp = current / 32;
  if (!(mask >> current % 32 & 1u)) fail("a lane outside the mask takes part in a warp operation");
  wait(State::kAtWarp, site);
  return exchanged[warp].data();
}

void fail(const std::string& text) {
  if (failure.empty()) failure = text;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > options.max_shared) return cudaErrorInvalidValue;
  shared_allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const size_t threads = config.blockDim.x, blocks = config.gridDim.x;
  const auto allowed = shared_allowed.find(kernel);
  const int most = std::max(kDefaultShared, allowed == shared_allowed.end() ? 0 : allowed->second);
  if (threads == 0 || threads > 1024 || blocks == 0 || blocks > 0x7fffffffu || config.dynamicSmemBytes > size_t(most))
    return cudaErrorInvalidValue;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  exchanged.resize((threads + 31) / 32);
  std::vector<char>(config.dynamicSmemBytes).swap(shared_bytes);
  failure.clear();
  body = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::mt19937 random(1);
  for (const size_t block : ordered(blocks, random)) {
    blockIdx.x = unsigned(block);
    run_block(threads, random);
    if (failure.empty()) continue;
    last_failure = failure + " in block " + std::to_string(block);
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorLaunchFailure ? cuda_on_cpu::last_failure.c_str() : "invalid launch";
}
