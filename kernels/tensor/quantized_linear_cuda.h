// The functions of quantized_linear.h on a GPU; arrays lie there, and the work is only queued on `stream`.
#pragma once

#include <cstdint>

#include "tensor/quantized_linear.h"

namespace fuse::cuda {

// T: float or BFloat16. Inputs are taken as they are, without rounding. Arrays start at multiples of 16 bytes.
// Weights: Int8Weights or Int4Weights.
template <typename T, class Weights>
void quantized_linear(const T* inputs, const Weights& weights, std::int64_t rows, std::int64_t outs, std::int64_t width,
                      T* output, std::uintptr_t stream);

}  // namespace fuse::cuda
