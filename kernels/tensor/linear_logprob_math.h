// The arithmetic of log-probabilities, of one logit or of a register full of them, and the layout of their statistics:
// what the C++ and the CUDA code share, so that tests of the one cover the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "tensor/shared_math.h"

namespace fuse {

// Columns that are summed in single precision, by as many lanes of which each has every 16th, before they are added to
// what came before in double precision. They stay in a processor's first-level cache between two looks at them.
constexpr std::int64_t kLogprobBlock = 1024;
constexpr std::int64_t kLogprobLanes = 16;

// The upper half of a float.
struct BFloat16 {
  std::uint16_t bits;
};

// Logits of `rows` tokens, row_stride elements apart, over `columns` neighbours in the vocabulary from first_token on.
template <typename T>
struct LogitChunk {
  T* data;
  std::int64_t row_stride;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t first_token;
};

// What the logits x of each token amount to so far, at temperature T; the four rows lie `stride` elements apart:
//
//   maximum = max x    total = sum exp((x - maximum) / T)    moment = sum exp((x - maximum) / T) (x - maximum) / T
//   target = x[target], untouched by chunks that do not hold it
//
// Of the whole vocabulary: log p(target) = (target - maximum) / T - log total, entropy = log total - moment / total.
template <typename T>
struct LogprobStatistics {
  T* data;
  std::int64_t stride;

  FUSE_HOST_DEVICE T& maximum(std::int64_t row) const { return data[row]; }
  FUSE_HOST_DEVICE T& total(std::int64_t row) const { return data[stride + row]; }
  FUSE_HOST_DEVICE T& moment(std::int64_t row) const { return data[2 * stride + row]; }
  FUSE_HOST_DEVICE T& target(std::int64_t row) const { return data[3 * stride + row]; }
};

FUSE_HOST_DEVICE FUSE_INLINE float to_float(float value) { return value; }
FUSE_HOST_DEVICE FUSE_INLINE float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

// The bits of a BFloat16, in the lower half of a word: to the nearest, ties to even.
template <typename Float>
FUSE_HOST_DEVICE FUSE_INLINE typename WordsOf<Float>::Type bfloat16_bits(const Float& from) {
  using Words = typename WordsOf<Float>::Type;
  const Words words = bit_cast<Words>(from);
  const Words rounded = (words + 0x7FFFu + ((words >> 16) & 1u)) >> 16;
  return from != from ? Words{} + 0x7FC0u : rounded;
}

FUSE_HOST_DEVICE FUSE_INLINE void write(float* to, float value) { *to = value; }
FUSE_HOST_DEVICE FUSE_INLINE void write(BFloat16* to, float value) {
  to->bits = static_cast<std::uint16_t>(bfloat16_bits(value));
}

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kSmallestShift = -87.0f;  // exp of it is about 1e-38: what lies below adds nothing, nor an inf * 0

// (logits - maximum) scale
template <typename Float>
FUSE_HOST_DEVICE FUSE_INLINE Float shifted(const Float& logits, float maximum, float scale) {
  const Float shift = (logits - maximum) * scale;
  return shift < kSmallestShift ? Float{} + kSmallestShift : shift;
}

// The statistics of one row, but for its target.
struct LogprobSums {
  double maximum;
  double total;
  double moment;
};

// Makes sums relative to `highest` if that is higher than their maximum.
FUSE_HOST_DEVICE FUSE_INLINE void raise_maximum(double highest, double temperature, LogprobSums* sums) {
  if (!(highest > sums->maximum)) return;
  const double shift = (sums->maximum - highest) / temperature;
  const double factor = std::exp(shift);
  sums->moment = factor * (sums->moment + shift * sums->total);
  sums->total *= factor;
  sums->maximum = highest;
}

// A logit's gradient, that of the target's log-probability aside: exp(shift) (constant + slope shift).
struct LogitGradient {
  double constant;
  double slope;
};

FUSE_HOST_DEVICE FUSE_INLINE LogitGradient logit_gradient(const LogprobSums& sums, double temperature,
                                                          double logprob_grad, double entropy_grad) {
  // log p + entropy = shift - moment / total
  const double per_weight = 1.0 / (temperature * sums.total);
  const double slope = -entropy_grad * per_weight;
  return {-logprob_grad * per_weight - slope * sums.moment / sums.total, slope};
}

template <typename Float>
FUSE_HOST_DEVICE FUSE_INLINE Float gradient_at(const Float& shift, float constant, float slope) {
  return exp_nonpositive(shift) * (constant + slope * shift);
}

FUSE_HOST_DEVICE FUSE_INLINE double target_gradient(double logit, const LogprobSums& sums, double temperature,
                                                    const LogitGradient& gradient, double logprob_grad) {
  const double shift = (logit - sums.maximum) / temperature;
  return std::exp(shift) * (gradient.constant + gradient.slope * shift) + logprob_grad / temperature;
}

}  // namespace fuse
