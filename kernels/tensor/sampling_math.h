// The noise of sampling, one token at a time: what the C++ and the CUDA code share, so that tests of the one cover the
// other. Its derivation is in fuse/ops/sampling.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "tensor/shared_math.h"

namespace fuse {

constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15;
constexpr float kUniformScale = 0x1p-31f * (1.0f - 0x1p-24f);

// What the noise of each row is a function of, [rows] each.
struct NoiseKeys {
  const std::int64_t* seeds;
  const std::int64_t* sample_ids;
  const std::int64_t* positions;
};

FUSE_HOST_DEVICE FUSE_INLINE std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

FUSE_HOST_DEVICE FUSE_INLINE std::uint64_t key_of(const NoiseKeys& keys, std::int64_t row) {
  std::uint64_t key = mix(static_cast<std::uint64_t>(keys.seeds[row]) + kGamma);
  key = mix((key ^ static_cast<std::uint64_t>(keys.sample_ids[row])) + kGamma);
  return mix((key ^ static_cast<std::uint64_t>(keys.positions[row])) + kGamma);
}

// The word whose halves are the random bits of tokens 2 `index` and 2 `index` + 1.
FUSE_HOST_DEVICE FUSE_INLINE std::uint64_t noise_word(std::uint64_t key, std::int64_t index) {
  return mix(key + static_cast<std::uint64_t>(index + 1) * kGamma);
}

FUSE_HOST_DEVICE FUSE_INLINE float uniform(std::int32_t bits) {
  return (static_cast<float>(bits & 0x7FFFFFFF) + 0.5f) * kUniformScale;
}

FUSE_HOST_DEVICE FUSE_INLINE float gumbel(std::int32_t bits) { return -std::log(-std::log1p(-uniform(bits))); }

}  // namespace fuse
