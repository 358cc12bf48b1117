// The functions of gae.h on a GPU; arrays lie there, offsets included, and the work is only queued on `stream`.
#pragma once

#include <cstdint>

#include "tensor/gae_math.h"

namespace fuse::cuda {

template <typename T>
void gae(Strided<const T> rewards, Strided<const T> values, const std::int64_t* offsets, std::int64_t num_samples,
         double gamma, double lambda, T* advantages, T* returns, std::uintptr_t stream);

template <typename T>
void reward_sums(const Responses<T>& responses, const RewardRule& rule, double* sums, std::uintptr_t stream);

template <typename T>
void shaped_gae(const Responses<T>& responses, const RewardRule& rule, double gamma, double lambda, T* kl,
                T* advantages, T* returns, double* sums, std::uintptr_t stream);

}  // namespace fuse::cuda
