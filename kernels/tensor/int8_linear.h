// Products of a few activations with a matrix of 8-bit weights.
#pragma once

#include <cstdint>

namespace fuse {

// output[row, out] = scales[out] * sum over i of inputs[row, i] * weights[out, i], all contiguous.
//
// inputs: [rows, width], rounded to 16 bits of their row's largest; weights: [outs, width], -127 to 127; output: [rows,
// outs]. A row's result does not depend on the other rows. What takes time is reading the weights, once for all rows.
void int8_linear(const float* inputs, const std::int8_t* weights, const float* scales, std::int64_t rows,
                 std::int64_t outs, std::int64_t width, float* output);

}  // namespace fuse
