// The function of int8_linear.h on a GPU; arrays lie there, and the work is only queued on `stream`.
#pragma once

#include <cstdint>

#include "tensor/linear_logprob_math.h"

namespace fuse::cuda {

// T: float or BFloat16. Inputs are taken as they are, without rounding. Arrays start at multiples of 16 bytes.
template <typename T>
void int8_linear(const T* inputs, const std::int8_t* weights, const float* scales, std::int64_t rows, std::int64_t outs,
                 std::int64_t width, T* output, std::uintptr_t stream);

}  // namespace fuse::cuda
