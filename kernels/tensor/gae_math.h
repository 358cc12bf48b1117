// The arithmetic of rewards and advantages, one row at a time: what the C++ and the CUDA code share, so that tests of
// the one cover the other.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "tensor/shared_math.h"

namespace fuse {

// A one-dimensional array whose neighbours lie `stride` elements apart.
template <typename T>
struct Strided {
  T* data;
  std::ptrdiff_t stride;

  FUSE_HOST_DEVICE T& operator[](std::ptrdiff_t index) const { return data[index * stride]; }
};

// Discounts of generalized advantage estimation.
template <typename T>
struct Discounts {
  T gamma;
  T decay;  // gamma * lambda
};

template <typename T>
FUSE_HOST_DEVICE inline T temporal_difference(T reward, T value, T next_value, const Discounts<T>& discounts) {
  return reward + discounts.gamma * next_value - value;
}

template <typename T>
FUSE_HOST_DEVICE inline T advantage_of(T delta, T next_advantage, const Discounts<T>& discounts) {
  return delta + discounts.decay * next_advantage;
}

// Responses that lie end to end: sample i has tokens token_offsets[i] to token_offsets[i + 1], and the values
// value_offsets[i] to value_offsets[i + 1]: one for each token, and at most one more.
template <typename T>
struct Responses {
  const T* logprobs;
  const T* reference_logprobs;
  const T* scores;  // [num_samples]
  const T* values;
  const std::int64_t* token_offsets;
  const std::int64_t* value_offsets;
  std::int64_t num_samples;
};

// A token's reward is -kl_coef times its estimate of the KL divergence, and the score comes on a sample's last value.
// Then the rewards r become (r - mean) * scale + mean.
// Source of the estimators: Schulman, Approximating KL divergence (2020).
struct RewardRule {
  double kl_coef;
  bool is_k3;  // else k1
  double mean;
  double scale;
};

template <typename T>
FUSE_HOST_DEVICE inline T kl_of(T logprob, T reference_logprob, bool is_k3) {
  const T log_ratio = reference_logprob - logprob;
  return is_k3 ? std::expm1(log_ratio) - log_ratio : -log_ratio;
}

// Row `position` of sample `sample`, of num_tokens tokens and num_values values, before whitening.
template <typename T>
FUSE_HOST_DEVICE inline T raw_reward(T kl, T score, std::int64_t position, std::int64_t num_tokens,
                                     std::int64_t num_values, const RewardRule& rule) {
  const T penalty = position < num_tokens ? -static_cast<T>(rule.kl_coef) * kl : T(0);
  return position == num_values - 1 ? penalty + score : penalty;
}

template <typename T>
FUSE_HOST_DEVICE inline T whitened(T reward, const RewardRule& rule) {
  if (rule.scale == 1.0) return reward;
  return (reward - static_cast<T>(rule.mean)) * static_cast<T>(rule.scale) + static_cast<T>(rule.mean);
}

}  // namespace fuse
