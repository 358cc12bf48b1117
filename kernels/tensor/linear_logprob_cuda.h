// The functions of linear_logprob.h on a GPU; arrays lie there, and the work is only queued on `stream`.
#pragma once

#include <cstdint>

#include "tensor/linear_logprob_math.h"

namespace fuse::cuda {

template <typename T>
void accumulate_logprob(LogitChunk<const T> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics, std::uintptr_t stream);

template <typename T>
void logprob_gradient(LogitChunk<T> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads, std::uintptr_t stream);

}  // namespace fuse::cuda
