// Floats as numbers of the types that kernels read, and back.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor/linear_logprob_math.h"

inline float of(float value, float) { return value; }
inline fuse::BFloat16 of(float value, fuse::BFloat16) {
  return {static_cast<std::uint16_t>(fuse::bfloat16_bits(value))};
}

template <typename T>
std::vector<float> floats(const std::vector<T>& values) {
  std::vector<float> result;
  for (const T& value : values) result.push_back(fuse::to_float(value));
  return result;
}
