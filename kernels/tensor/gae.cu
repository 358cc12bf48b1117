// One warp for each sample, 32 rows at a time from the last: what rows have to themselves is computed side by side, the
// recurrence row by row in registers. The order of operations is that of gae.cc, so the results are too, bit for bit.
#include "tensor/cuda_launch.h"
#include "tensor/gae_cuda.h"

namespace fuse::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

__device__ std::int64_t sample_of_warp() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}

__device__ int lane_of_thread() { return static_cast<int>(threadIdx.x % kWarp); }

// The recurrence over a tile of rows, of which lane i has row i; each lane gets its own row's advantage. `advantage` is
// that of the row after the tile, and becomes that of its first row. Lanes from `count` on have no row.
template <typename T>
__device__ T scan_tile(T delta, int count, const Discounts<T>& discounts, T* advantage) {
  T own = 0;
  for (int row = count - 1; row >= 0; --row) {
    *advantage = advantage_of(__shfl_sync(kAllLanes, delta, row), *advantage, discounts);
    if (row == lane_of_thread()) own = *advantage;
  }
  return own;
}

// The value of the row after this lane's, in a tile of `count` rows before one that starts with `after`.
template <typename T>
__device__ T value_after(T value, int count, T after) {
  const T neighbour = __shfl_down_sync(kAllLanes, value, 1);
  return lane_of_thread() == count - 1 ? after : neighbour;
}

__device__ double sum_over_lanes(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  return value;
}

__device__ int rows_of_tile(std::int64_t end) { return end < kWarp ? static_cast<int>(end) : kWarp; }

template <typename T>
__global__ void gae_kernel(Strided<const T> rewards, Strided<const T> values, const std::int64_t* offsets,
                           std::int64_t num_samples, Discounts<T> discounts, T* advantages, T* returns) {
  const std::int64_t sample = sample_of_warp();
  if (sample >= num_samples) return;
  const std::int64_t first = offsets[sample];
  T advantage = 0;
  T after = 0;
  std::int64_t end = offsets[sample + 1] - first;
  while (end > 0) {
    const int count = rows_of_tile(end);
    const std::int64_t row = first + end - count + lane_of_thread();
    const bool has_row = lane_of_thread() < count;
    const T value = has_row ? values[row] : T(0);
    const T next_value = value_after(value, count, after);
    const T delta = has_row ? temporal_difference(rewards[row], value, next_value, discounts) : T(0);
    const T own = scan_tile(delta, count, discounts, &advantage);
    if (has_row) {
      advantages[row] = own;
      returns[row] = own + value;
    }
    after = __shfl_sync(kAllLanes, value, 0);
    end -= count;
  }
}

template <typename T>
__device__ T kl_of_row(const Responses<T>& responses, std::int64_t token, bool is_token, const RewardRule& rule) {
  return is_token ? kl_of(responses.logprobs[token], responses.reference_logprobs[token], rule.is_k3) : T(0);
}

template <typename T>
__global__ void reward_sums_kernel(Responses<T> responses, RewardRule rule, double* sums) {
  const std::int64_t sample = sample_of_warp();
  if (sample >= responses.num_samples) return;
  const std::int64_t first_token = responses.token_offsets[sample];
  const std::int64_t num_tokens = responses.token_offsets[sample + 1] - first_token;
  const std::int64_t num_values = responses.value_offsets[sample + 1] - responses.value_offsets[sample];
  double sum = 0.0, square = 0.0;
  for (std::int64_t position = lane_of_thread(); position < num_values; position += kWarp) {
    const T kl = kl_of_row(responses, first_token + position, position < num_tokens, rule);
    const double reward = raw_reward(kl, responses.scores[sample], position, num_tokens, num_values, rule);
    sum += reward;
    square += reward * reward;
  }
  sum = sum_over_lanes(sum);
  square = sum_over_lanes(square);
  if (lane_of_thread() == 0) {
    sums[2 * sample] = sum;
    sums[2 * sample + 1] = square;
  }
}

template <typename T>
__global__ void shaped_gae_kernel(Responses<T> responses, RewardRule rule, Discounts<T> discounts, T* kl, T* advantages,
                                  T* returns, double* sums) {
  const std::int64_t sample = sample_of_warp();
  if (sample >= responses.num_samples) return;
  const std::int64_t first_token = responses.token_offsets[sample];
  const std::int64_t first_value = responses.value_offsets[sample];
  const std::int64_t num_tokens = responses.token_offsets[sample + 1] - first_token;
  const std::int64_t num_values = responses.value_offsets[sample + 1] - first_value;
  T advantage = 0;
  T after = 0;
  double sum = 0.0, square = 0.0;
  std::int64_t end = num_values;
  while (end > 0) {
    const int count = rows_of_tile(end);
    const std::int64_t position = end - count + lane_of_thread();
    const bool has_row = lane_of_thread() < count;
    const bool is_token = has_row && position < num_tokens;
    const T token_kl = kl_of_row(responses, first_token + position, is_token, rule);
    const T value = has_row ? responses.values[first_value + position] : T(0);
    const T next_value = value_after(value, count, after);
    const T reward =
        whitened(raw_reward(token_kl, responses.scores[sample], position, num_tokens, num_values, rule), rule);
    const T delta = has_row ? temporal_difference(reward, value, next_value, discounts) : T(0);
    const T own = scan_tile(delta, count, discounts, &advantage);
    if (has_row) returns[first_value + position] = own + value;
    if (is_token) {
      kl[first_token + position] = token_kl;
      advantages[first_token + position] = own;
      sum += own;
      square += static_cast<double>(own) * own;
    }
    after = __shfl_sync(kAllLanes, value, 0);
    end -= count;
  }
  sum = sum_over_lanes(sum);
  square = sum_over_lanes(square);
  if (lane_of_thread() == 0) {
    sums[2 * sample] = sum;
    sums[2 * sample + 1] = square;
  }
}

// One warp for each sample.
template <typename Kernel, typename... Arguments>
void launch_warps(Kernel kernel, std::int64_t num_samples, std::uintptr_t stream, Arguments... arguments) {
  const std::int64_t blocks = (num_samples + kWarpsPerBlock - 1) / kWarpsPerBlock;
  launch(kernel, blocks, kWarp * kWarpsPerBlock, stream, arguments...);
}

template <typename T>
Discounts<T> discounts_of(double gamma, double lambda) {
  return {static_cast<T>(gamma), static_cast<T>(gamma * lambda)};
}

}  // namespace

template <typename T>
void gae(Strided<const T> rewards, Strided<const T> values, const std::int64_t* offsets, std::int64_t num_samples,
         double gamma, double lambda, T* advantages, T* returns, std::uintptr_t stream) {
  launch_warps(gae_kernel<T>, num_samples, stream, rewards, values, offsets, num_samples,
               discounts_of<T>(gamma, lambda), advantages, returns);
}

template <typename T>
void reward_sums(const Responses<T>& responses, const RewardRule& rule, double* sums, std::uintptr_t stream) {
  launch_warps(reward_sums_kernel<T>, responses.num_samples, stream, responses, rule, sums);
}

template <typename T>
void shaped_gae(const Responses<T>& responses, const RewardRule& rule, double gamma, double lambda, T* kl,
                T* advantages, T* returns, double* sums, std::uintptr_t stream) {
  launch_warps(shaped_gae_kernel<T>, responses.num_samples, stream, responses, rule, discounts_of<T>(gamma, lambda), kl,
               advantages, returns, sums);
}

#define FUSE_INSTANTIATE(T)                                                                                           \
  template void gae<T>(Strided<const T>, Strided<const T>, const std::int64_t*, std::int64_t, double, double, T*, T*, \
                       std::uintptr_t);                                                                               \
  template void reward_sums<T>(const Responses<T>&, const RewardRule&, double*, std::uintptr_t);                      \
  template void shaped_gae<T>(const Responses<T>&, const RewardRule&, double, double, T*, T*, T*, double*,            \
                              std::uintptr_t);
FUSE_INSTANTIATE(float)
FUSE_INSTANTIATE(double)
#undef FUSE_INSTANTIATE

}  // namespace fuse::cuda
