// As much of CUDA as the kernels need, on a CPU: blocks run one after the other, and the threads of one in turns.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index blockIdx, threadIdx;

// Each thread runs until it waits for others, then the next one does.
struct Block {
  static constexpr unsigned kWarp = 32;
  static constexpr std::size_t kStackBytes = 1 << 16;

  struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    double shuffled;
    bool is_done;
  };
  std::function<void()> call;
  std::vector<Thread> threads;
  ucontext_t scheduler;
  unsigned num_at_barrier, num_barriers;

  void wait() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

  void run(unsigned num_threads);
};
inline Block block;

inline void run_thread() {
  block.call();
  block.threads[threadIdx.x].is_done = true;
}

inline void Block::run(unsigned num_threads) {
  threads.resize(num_threads);
  num_at_barrier = num_barriers = 0;
  for (Thread& thread : threads) {
    thread.stack.resize(kStackBytes);
    thread.is_done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  for (unsigned num_done = 0; num_done < num_threads;) {
    for (unsigned i = 0; i < num_threads; ++i) {
      if (threads[i].is_done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i].context);
      num_done += threads[i].is_done;
    }
  }
}

// Nobody goes on before the turn after the one in which the last thread arrives, so warps stay in step.
inline void __syncthreads() {
  const unsigned barrier = block.num_barriers;
  if (++block.num_at_barrier == block.threads.size()) {
    block.num_at_barrier = 0;
    ++block.num_barriers;
  }
  do block.wait();
  while (block.num_barriers == barrier);
}

// What lane `lane` of this warp has.
template <typename T>
T value_of_lane(T value, unsigned lane) {
  std::memcpy(&block.threads[threadIdx.x].shuffled, &value, sizeof(T));
  block.wait();
  T result;
  std::memcpy(&result, &block.threads[threadIdx.x / Block::kWarp * Block::kWarp + lane].shuffled, sizeof(T));
  block.wait();
  return result;
}

template <typename T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return value_of_lane(value, lane);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance, unsigned width = Block::kWarp) {
  const unsigned lane = threadIdx.x % Block::kWarp;
  return value_of_lane(value, lane % width + distance < width ? lane + distance : lane);
}

// Stands for kernel<<<blocks, threads, shared bytes, stream>>>(...).
template <typename Call>
void launch_on_cpu(unsigned blocks, unsigned threads, Call call) {
  block.call = call;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) block.run(threads);
}
