// One block of threads for each row, which reads its logits once. Every thread has each kThreads-th pair of tokens: the
// two that share a word of noise. It keeps the best of them and, relative to the largest, the sum of their
// exponentials; what the threads have is put together in a fixed order. Scaled logits and noise are computed as in
// sampling.cc, so the tokens are the same wherever the logarithms are.
#include "tensor/cuda_launch.h"
#include "tensor/sampling_cuda.h"

namespace fuse::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kWarp = 32;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;

// The token drawn so far. value: scaled logit and noise. scaled: the logit alone.
struct Best {
  float value;
  float scaled;
  std::int64_t token;
};

// sum exp(scaled - maximum)
struct Exponentials {
  float maximum;
  float total;
};

// Of equal values the first token counts.
__device__ bool is_better(const Best& one, const Best& than) {
  return one.value > than.value || (one.value == than.value && one.token < than.token);
}

__device__ void add(float scaled, Exponentials* sums) {
  if (scaled > sums->maximum) {
    sums->total = sums->total * exp_nonpositive(sums->maximum - scaled) + 1.0f;
    sums->maximum = scaled;
  } else if (scaled != kLowest) {  // true of NaN, which is to show in the sum
    sums->total += exp_nonpositive(scaled - sums->maximum);
  }
}

// At least the noise of these bits. A float's bits, read as an integer, are a chord below its logarithm; 1e-3 covers
// the rounding.
__device__ float noise_bound(std::int32_t bits) {
  const float log2_below = static_cast<float>(bit_cast<std::int32_t>(uniform(bits))) * 0x1p-23f - 127.0f;
  return 1e-3f - 0.69314718f * log2_below;
}

__device__ void draw(float scaled, bool greedy, std::int32_t bits, std::int64_t token, Best* best) {
  if (!(scaled + (greedy ? 0.0f : noise_bound(bits)) > best->value)) return;
  const float value = greedy ? scaled : scaled + gumbel(bits);
  if (value > best->value) *best = {value, scaled, token};
}

__device__ Best best_of_warp(Best best) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Best other{__shfl_down_sync(kAllLanes, best.value, distance),
                     __shfl_down_sync(kAllLanes, best.scaled, distance),
                     __shfl_down_sync(kAllLanes, best.token, distance)};
    if (is_better(other, best)) best = other;
  }
  return best;
}

__device__ float maximum_of_warp(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float other = __shfl_down_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return __shfl_sync(kAllLanes, value, 0);
}

__device__ double sum_of_warp(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  return value;
}

// Sums relative to another maximum, not below their own. Where there is nothing, there is nothing.
__device__ double relative_to(float maximum, double total, float highest) {
  return maximum == highest ? total : total * std::exp(static_cast<double>(maximum) - highest);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void sample_kernel(const T* logits, std::int64_t row_stride,
                                                          std::int64_t vocab_size, const float* temperatures,
                                                          NoiseKeys keys, std::int64_t* tokens, float* logprobs) {
  __shared__ Best bests[kWarps];
  __shared__ float maxima[kWarps];
  __shared__ double totals[kWarps];
  const std::int64_t row = blockIdx.x;
  const T* row_logits = logits + row * row_stride;
  const bool greedy = temperatures[row] == 0.0f;
  const float temperature = greedy ? 1.0f : temperatures[row];
  const std::uint64_t key = key_of(keys, row);

  Best best{kLowest, kLowest, vocab_size};
  Exponentials sums{kLowest, 0.0f};
  for (std::int64_t pair = threadIdx.x; 2 * pair < vocab_size; pair += kThreads) {
    const std::uint64_t word = noise_word(key, pair);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t token = 2 * pair + half;
      if (token >= vocab_size) continue;
      const float scaled = to_float(row_logits[token]) / temperature;
      add(scaled, &sums);
      draw(scaled, greedy, static_cast<std::int32_t>(word >> (32 * half)), token, &best);
    }
  }

  best = best_of_warp(best);
  const float maximum = maximum_of_warp(sums.maximum);
  const double total = sum_of_warp(relative_to(sums.maximum, sums.total, maximum));
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
    bests[warp] = best;
    maxima[warp] = maximum;
    totals[warp] = total;
  }
  __syncthreads();

  if (threadIdx.x != 0) return;
  float highest = maximum;
  for (int other = 1; other < kWarps; ++other) {
    if (is_better(bests[other], best)) best = bests[other];
    if (maxima[other] > highest) highest = maxima[other];
  }
  double sum = 0.0;
  for (int any = 0; any < kWarps; ++any) sum += relative_to(maxima[any], totals[any], highest);
  tokens[row] = best.token < vocab_size ? best.token : 0;
  logprobs[row] = best.scaled - (highest + static_cast<float>(std::log(sum)));
}

}  // namespace

template <typename T>
void sample(const T* logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab_size,
            const float* temperatures, const NoiseKeys& keys, std::int64_t* tokens, float* logprobs,
            std::uintptr_t stream) {
  launch(sample_kernel<T>, rows, kThreads, stream, logits, row_stride, vocab_size, temperatures, keys, tokens,
         logprobs);
}

#define FUSE_INSTANTIATE(T)                                                                                   \
  template void sample<T>(const T*, std::int64_t, std::int64_t, std::int64_t, const float*, const NoiseKeys&, \
                          std::int64_t*, float*, std::uintptr_t);
FUSE_INSTANTIATE(float)
FUSE_INSTANTIATE(BFloat16)
#undef FUSE_INSTANTIATE

}  // namespace fuse::cuda
