// Generalized advantage estimation over ragged responses.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuse {

// A one-dimensional array whose neighbours lie `stride` elements apart.
template <typename T>
struct Strided {
  T* data;
  std::ptrdiff_t stride;

  T& operator[](std::ptrdiff_t index) const { return data[index * stride]; }
};

// Sample i is rows offsets[i] to offsets[i + 1]; the value after its last row is 0.
//
//   delta_t = reward_t + gamma * value_{t+1} - value_t
//   advantage_t = delta_t + gamma * lambda * advantage_{t+1}
//   return_t = advantage_t + value_t
//
// Requires offsets[0] = 0, offsets non-decreasing, and outputs that overlap no input. O(rows), no allocation.
// Source: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, eq. 16.
template <typename T>
void gae(Strided<const T> rewards, Strided<const T> values, const std::int64_t* offsets, std::int64_t num_samples,
         double gamma, double lambda, T* advantages, T* returns);

}  // namespace fuse
