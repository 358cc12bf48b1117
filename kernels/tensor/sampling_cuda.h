// The function of sampling.h on a GPU; arrays lie there, and the work is only queued on `stream`.
#pragma once

#include <cstdint>

#include "tensor/linear_logprob_math.h"
#include "tensor/sampling_math.h"

namespace fuse::cuda {

// T: float or BFloat16.
template <typename T>
void sample(const T* logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab_size,
            const float* temperatures, const NoiseKeys& keys, std::int64_t* tokens, float* logprobs,
            std::uintptr_t stream);

}  // namespace fuse::cuda
