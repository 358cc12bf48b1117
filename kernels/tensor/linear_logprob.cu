// One block of threads for each row. The order of operations is that of linear_logprob.cc, so the results are too, bit
// for bit where exp in double precision is: a group of 16 lanes has kLogprobBlock columns, of which each lane keeps
// every 16th in registers between the maximum and the sums, and one thread adds up what the groups have.
#include "tensor/cuda_launch.h"
#include "tensor/linear_logprob_cuda.h"

namespace fuse::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kGroupLanes = static_cast<int>(kLogprobLanes);
constexpr int kGroups = 16;
constexpr int kThreads = kGroups * kGroupLanes;
constexpr int kColumnsPerLane = static_cast<int>(kLogprobBlock / kLogprobLanes);

__device__ float larger(float one, float other) { return other > one ? other : one; }

// Over the lanes of a group; its first lane gets it.

__device__ float maximum_of_group(float value) {
  for (int distance = kGroupLanes / 2; distance > 0; distance /= 2) {
    value = larger(value, __shfl_down_sync(kAllLanes, value, distance, kGroupLanes));
  }
  return value;
}

__device__ float sum_of_group(float value) {
  for (int distance = kGroupLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kAllLanes, value, distance, kGroupLanes);
  }
  return value;
}

template <typename T>
__global__ __launch_bounds__(kThreads, 2) void accumulate_kernel(LogitChunk<const T> chunk, const std::int64_t* targets,
                                                                 double temperature,
                                                                 LogprobStatistics<double> statistics) {
  __shared__ float maxima[kGroups], totals[kGroups], moments[kGroups];
  const std::int64_t row = blockIdx.x;
  const int group = static_cast<int>(threadIdx.x) / kGroupLanes;
  const int lane = static_cast<int>(threadIdx.x) % kGroupLanes;
  const T* logits = chunk.data + row * chunk.row_stride;
  const float scale = static_cast<float>(1.0 / temperature);
  LogprobSums sums{statistics.maximum(row), statistics.total(row), statistics.moment(row)};  // the first thread's
  float reached = static_cast<float>(sums.maximum);
  for (std::int64_t first = 0; first < chunk.columns; first += kGroups * kLogprobBlock) {
    const std::int64_t own = first + group * kLogprobBlock + lane;
    float held[kColumnsPerLane];
    float highest = kLowest;
#pragma unroll
    for (int i = 0; i < kColumnsPerLane; ++i) {
      if (own + i * kGroupLanes >= chunk.columns) continue;
      held[i] = to_float(logits[own + i * kGroupLanes]);
      highest = larger(highest, held[i]);
    }
    highest = maximum_of_group(highest);
    if (lane == 0) maxima[group] = highest;
    __syncthreads();

    float maximum = reached;
    for (int before = 0; before <= group; ++before) maximum = larger(maximum, maxima[before]);
    float total = 0.0f, moment = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumnsPerLane; ++i) {
      if (own + i * kGroupLanes >= chunk.columns) continue;
      const float shift = shifted(held[i], maximum, scale);
      const float weight = exp_nonpositive(shift);
      total += weight;
      moment += weight * shift;
    }
    total = sum_of_group(total);
    moment = sum_of_group(moment);
    if (lane == 0) {
      totals[group] = total;
      moments[group] = moment;
    }
    __syncthreads();

    for (int any = 0; any < kGroups; ++any) reached = larger(reached, maxima[any]);
    if (threadIdx.x == 0) {
      for (int next = 0; next < kGroups; ++next) {
        raise_maximum(maxima[next], temperature, &sums);
        sums.total += totals[next];
        sums.moment += moments[next];
      }
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  statistics.maximum(row) = sums.maximum;
  statistics.total(row) = sums.total;
  statistics.moment(row) = sums.moment;
  const std::int64_t column = targets[row] - chunk.first_token;
  if (column >= 0 && column < chunk.columns) statistics.target(row) = to_float(logits[column]);
}

template <typename T>
__global__ void gradient_kernel(LogitChunk<T> chunk, const std::int64_t* targets, double temperature,
                                LogprobStatistics<const double> statistics, const double* logprob_grads,
                                const double* entropy_grads) {
  const std::int64_t row = blockIdx.x;
  T* logits = chunk.data + row * chunk.row_stride;
  const LogprobSums sums{statistics.maximum(row), statistics.total(row), statistics.moment(row)};
  const LogitGradient gradient = logit_gradient(sums, temperature, logprob_grads[row], entropy_grads[row]);
  const float maximum = static_cast<float>(sums.maximum);
  const float scale = static_cast<float>(1.0 / temperature);
  const float constant = static_cast<float>(gradient.constant);
  const float slope = static_cast<float>(gradient.slope);
  const std::int64_t target = targets[row] - chunk.first_token;
  for (std::int64_t column = threadIdx.x; column < chunk.columns; column += kThreads) {
    const float logit = to_float(logits[column]);
    if (column == target) {
      const double of_target = target_gradient(logit, sums, temperature, gradient, logprob_grads[row]);
      write(logits + column, static_cast<float>(of_target));
    } else {
      write(logits + column, gradient_at(shifted(logit, maximum, scale), constant, slope));
    }
  }
}

}  // namespace

template <typename T>
void accumulate_logprob(LogitChunk<const T> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics, std::uintptr_t stream) {
  launch(accumulate_kernel<T>, chunk.rows, kThreads, stream, chunk, targets, temperature, statistics);
}

template <typename T>
void logprob_gradient(LogitChunk<T> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads, std::uintptr_t stream) {
  launch(gradient_kernel<T>, chunk.rows, kThreads, stream, chunk, targets, temperature, statistics, logprob_grads,
         entropy_grads);
}

#define FUSE_INSTANTIATE(T)                                                                                        \
  template void accumulate_logprob<T>(LogitChunk<const T>, const std::int64_t*, double, LogprobStatistics<double>, \
                                      std::uintptr_t);                                                             \
  template void logprob_gradient<T>(LogitChunk<T>, const std::int64_t*, double, LogprobStatistics<const double>,   \
                                    const double*, const double*, std::uintptr_t);
FUSE_INSTANTIATE(float)
FUSE_INSTANTIATE(BFloat16)
#undef FUSE_INSTANTIATE

}  // namespace fuse::cuda
