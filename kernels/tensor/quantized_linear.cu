// A warp for each few outputs of each few rows: its lanes have neighbouring units of the weights, which are read once
// for all of these rows, and add up products in single precision; what the lanes have is added up in a fixed order. A
// row's result does not depend on the other rows.
#include "tensor/cuda_launch.h"
#include "tensor/quantized_linear_cuda.h"

namespace fuse::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kOuts = 2;      // of a warp, for one load of an input
constexpr int kMostRows = 8;  // of a warp; more take another one, which reads the weights again
constexpr int kUnit = 16;     // bytes of weights of one load

template <typename T, int count>
struct alignas(count == 1 ? sizeof(T) : 16) Unit {
  T values[count];
};

template <int unit, typename T>
__device__ const Unit<T, unit>& unit_at(const T* values) {
  return *reinterpret_cast<const Unit<T, unit>*>(values);
}

__device__ Int8Weights from(const Int8Weights& weights, std::int64_t out, std::int64_t width) {
  return {weights.values + out * width, weights.scales + out};
}

__device__ Int4Weights from(const Int4Weights& weights, std::int64_t out, std::int64_t width) {
  const std::int64_t groups = (width + kInt4Group - 1) / kInt4Group;
  return {weights.values + out * groups * kUnit, weights.ranges + out * groups};
}

// Adds products of this lane's share of the width: every 32nd unit. is_whole: the width is a multiple of units.
template <bool is_whole, int rows, typename T>
__device__ void add_products(const T* inputs, const Int8Weights (&weights)[kOuts], std::int64_t num_rows,
                             std::int64_t width, float (&sums)[rows][kOuts]) {
  constexpr int unit = is_whole ? kUnit : 1;
  for (std::int64_t i = threadIdx.x % kWarp * unit; i < width; i += kWarp * unit) {
    Unit<std::int8_t, unit> own[kOuts];
#pragma unroll
    for (int out = 0; out < kOuts; ++out) own[out] = unit_at<unit>(weights[out].values + i);
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (row >= num_rows) continue;
      const Unit<T, unit> input = unit_at<unit>(inputs + row * width + i);
#pragma unroll
      for (int k = 0; k < unit; ++k) {
#pragma unroll
        for (int out = 0; out < kOuts; ++out) {
          sums[row][out] = std::fmaf(to_float(input.values[k]), static_cast<float>(own[out].values[k]), sums[row][out]);
        }
      }
    }
  }
}

// A unit is a group.
template <bool is_whole, int rows, typename T>
__device__ void add_products(const T* inputs, const Int4Weights (&weights)[kOuts], std::int64_t num_rows,
                             std::int64_t width, float (&sums)[rows][kOuts]) {
  for (std::int64_t i = threadIdx.x % kWarp * kInt4Group; i < width; i += kWarp * kInt4Group) {
    Unit<std::uint8_t, kUnit> own[kOuts];
    Int4Range ranges[kOuts];
#pragma unroll
    for (int out = 0; out < kOuts; ++out) {
      own[out] = unit_at<kUnit>(weights[out].values + i / 2);
      ranges[out] = weights[out].ranges[i / kInt4Group];
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (row >= num_rows) continue;
      const T* start = inputs + row * width + i;
      Unit<T, kInt4Group> input = {};
      if (is_whole) {
        input = unit_at<kInt4Group>(start);
      } else {
        for (int k = 0; k < kInt4Group && k < width - i; ++k) input.values[k] = start[k];
      }
      float total = 0.0f, products[kOuts] = {};
#pragma unroll
      for (int k = 0; k < kInt4Group; ++k) {
        const float value = to_float(input.values[k]);
        total += value;
#pragma unroll
        for (int out = 0; out < kOuts; ++out) {
          const int both = own[out].values[k % kUnit];
          products[out] = std::fmaf(value, static_cast<float>(k < kUnit ? both & 15 : both >> 4), products[out]);
        }
      }
#pragma unroll
      for (int out = 0; out < kOuts; ++out) {
        sums[row][out] = std::fmaf(to_float(ranges[out].scale), products[out], sums[row][out]);
        sums[row][out] = std::fmaf(to_float(ranges[out].minimum), total, sums[row][out]);
      }
    }
  }
}

__device__ float scaled(const Int8Weights& weights, float sum) { return *weights.scales * sum; }
__device__ float scaled(const Int4Weights&, float sum) { return sum; }

__device__ float sum_of_warp(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  return value;
}

template <int rows, typename T, class Weights>
__global__ __launch_bounds__(kThreads) void quantized_linear_kernel(const T* inputs, Weights weights,
                                                                    std::int64_t all_rows, std::int64_t outs,
                                                                    std::int64_t width, T* output) {
  const std::int64_t blocks_per_rows = (outs + kWarps * kOuts - 1) / (kWarps * kOuts);
  const std::int64_t first_row = blockIdx.x / blocks_per_rows * rows;
  const std::int64_t first_out = (blockIdx.x % blocks_per_rows * kWarps + threadIdx.x / kWarp) * kOuts;
  const std::int64_t num_rows = all_rows - first_row;
  const T* own_inputs = inputs + first_row * width;
  Weights own_weights[kOuts];
  for (int out = 0; out < kOuts; ++out) {
    const std::int64_t last = outs - 1;  // in place of those that there are not, for whole warps add up
    own_weights[out] = from(weights, first_out + out < last ? first_out + out : last, width);
  }
  float sums[rows][kOuts] = {};
  if (width % kInt4Group == 0) {
    add_products<true, rows>(own_inputs, own_weights, num_rows, width, sums);
  } else {
    add_products<false, rows>(own_inputs, own_weights, num_rows, width, sums);
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int out = 0; out < kOuts; ++out) {
      const float sum = sum_of_warp(sums[row][out]);
      if (threadIdx.x % kWarp != 0 || row >= num_rows || first_out + out >= outs) continue;
      write(output + (first_row + row) * outs + first_out + out, scaled(own_weights[out], sum));
    }
  }
}

template <int rows, typename T, class Weights>
void launch_for(const T* inputs, const Weights& weights, std::int64_t all_rows, std::int64_t outs, std::int64_t width,
                T* output, std::uintptr_t stream) {
  const std::int64_t blocks_per_rows = (outs + kWarps * kOuts - 1) / (kWarps * kOuts);
  launch(quantized_linear_kernel<rows, T, Weights>, (all_rows + rows - 1) / rows * blocks_per_rows, kThreads, stream,
         inputs, weights, all_rows, outs, width, output);
}

}  // namespace

template <typename T, class Weights>
void quantized_linear(const T* inputs, const Weights& weights, std::int64_t rows, std::int64_t outs, std::int64_t width,
                      T* output, std::uintptr_t stream) {
  const auto launch_rows = rows == 1   ? launch_for<1, T, Weights>
                           : rows == 2 ? launch_for<2, T, Weights>
                           : rows <= 4 ? launch_for<4, T, Weights>
                                       : launch_for<kMostRows, T, Weights>;
  launch_rows(inputs, weights, rows, outs, width, output, stream);
}

#define FUSE_INSTANTIATE(T, Weights)                                                                                 \
  template void quantized_linear<T, Weights>(const T*, const Weights&, std::int64_t, std::int64_t, std::int64_t, T*, \
                                             std::uintptr_t);
FUSE_INSTANTIATE(float, Int8Weights)
FUSE_INSTANTIATE(float, Int4Weights)
FUSE_INSTANTIATE(BFloat16, Int8Weights)
FUSE_INSTANTIATE(BFloat16, Int4Weights)
#undef FUSE_INSTANTIATE

}  // namespace fuse::cuda
