// Generalized advantage estimation over ragged responses, alone and with the rewards that it starts from.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/gae_math.h"

namespace fuse {

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

// sums[2 i], sums[2 i + 1] = the sum of sample i's rewards before whitening, and of their squares.
template <typename T>
void reward_sums(const Responses<T>& responses, const RewardRule& rule, double* sums);

// Rewards and GAE in one pass. kl, advantages: a row for each token; returns: one for each value. sums: as above, of
// the advantages, for their whitening.
template <typename T>
void shaped_gae(const Responses<T>& responses, const RewardRule& rule, double gamma, double lambda, T* kl,
                T* advantages, T* returns, double* sums);

}  // namespace fuse
