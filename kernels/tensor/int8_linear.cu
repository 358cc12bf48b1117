// A warp for each few outputs of each few rows: its lanes have neighbouring units of the weights, which are read once
// for all of these rows, and add up products in single precision; what the lanes have is added up in a fixed order. A
// row's result does not depend on the other rows.
#include "tensor/cuda_launch.h"
#include "tensor/int8_linear_cuda.h"

namespace fuse::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kOuts = 2;      // of a warp, for one load of an input
constexpr int kMostRows = 8;  // of a warp; more take another one, which reads the weights again
constexpr int kUnit = 16;     // weights of one load

template <typename T, int count>
struct alignas(count == 1 ? sizeof(T) : 16) Unit {
  T values[count];
};

template <int unit, typename T>
__device__ const Unit<T, unit>& unit_at(const T* values) {
  return *reinterpret_cast<const Unit<T, unit>*>(values);
}

// Adds products of this lane's share of the width: every 32nd unit.
template <int unit, int rows, typename T>
__device__ void add_products(const T* inputs, const std::int8_t* const (&weights)[kOuts], std::int64_t num_rows,
                             std::int64_t width, float (&sums)[rows][kOuts]) {
  for (std::int64_t i = threadIdx.x % kWarp * unit; i < width; i += kWarp * unit) {
    Unit<std::int8_t, unit> own[kOuts];
#pragma unroll
    for (int out = 0; out < kOuts; ++out) own[out] = unit_at<unit>(weights[out] + i);
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

__device__ float sum_of_warp(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  return value;
}

template <int rows, typename T>
__global__ __launch_bounds__(kThreads) void int8_linear_kernel(const T* inputs, const std::int8_t* weights,
                                                               const float* scales, std::int64_t all_rows,
                                                               std::int64_t outs, std::int64_t width, T* output) {
  const std::int64_t blocks_per_rows = (outs + kWarps * kOuts - 1) / (kWarps * kOuts);
  const std::int64_t first_row = blockIdx.x / blocks_per_rows * rows;
  const std::int64_t first_out = (blockIdx.x % blocks_per_rows * kWarps + threadIdx.x / kWarp) * kOuts;
  const std::int64_t num_rows = all_rows - first_row;
  const T* own_inputs = inputs + first_row * width;
  const std::int8_t* own_weights[kOuts];
  for (int out = 0; out < kOuts; ++out) {
    const std::int64_t last = outs - 1;  // in place of those that there are not, for whole warps add up
    own_weights[out] = weights + (first_out + out < last ? first_out + out : last) * width;
  }
  float sums[rows][kOuts] = {};
  if (width % kUnit == 0) {
    add_products<kUnit, rows>(own_inputs, own_weights, num_rows, width, sums);
  } else {
    add_products<1, rows>(own_inputs, own_weights, num_rows, width, sums);
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int out = 0; out < kOuts; ++out) {
      const float sum = sum_of_warp(sums[row][out]);
      if (threadIdx.x % kWarp != 0 || row >= num_rows || first_out + out >= outs) continue;
      write(output + (first_row + row) * outs + first_out + out, scales[first_out + out] * sum);
    }
  }
}

template <int rows, typename T>
void launch_for(const T* inputs, const std::int8_t* weights, const float* scales, std::int64_t all_rows,
                std::int64_t outs, std::int64_t width, T* output, std::uintptr_t stream) {
  const std::int64_t blocks_per_rows = (outs + kWarps * kOuts - 1) / (kWarps * kOuts);
  launch(int8_linear_kernel<rows, T>, (all_rows + rows - 1) / rows * blocks_per_rows, kThreads, stream, inputs, weights,
         scales, all_rows, outs, width, output);
}

}  // namespace

template <typename T>
void int8_linear(const T* inputs, const std::int8_t* weights, const float* scales, std::int64_t rows, std::int64_t outs,
                 std::int64_t width, T* output, std::uintptr_t stream) {
  const auto launch_rows = rows == 1   ? launch_for<1, T>
                           : rows == 2 ? launch_for<2, T>
                           : rows <= 4 ? launch_for<4, T>
                                       : launch_for<kMostRows, T>;
  launch_rows(inputs, weights, scales, rows, outs, width, output, stream);
}

#define FUSE_INSTANTIATE(T)                                                                                          \
  template void int8_linear<T>(const T*, const std::int8_t*, const float*, std::int64_t, std::int64_t, std::int64_t, \
                               T*, std::uintptr_t);
FUSE_INSTANTIATE(float)
FUSE_INSTANTIATE(BFloat16)
#undef FUSE_INSTANTIATE

}  // namespace fuse::cuda
