// Products of a few activations with a matrix, in fp32.
#pragma once

#include <cstdint>

namespace fuse {

// output[row, out] = sum over i of inputs[row, i] * weights[out, i].
//
// inputs: [rows, width] and weights: [outs, width], contiguous; output: [rows, outs], rows `output_stride` apart. A
// row's result does not depend on the other rows, to the bit. What takes time is reading the weights, once for all
// rows; meant for so few that this is so.
void skinny_linear(const float* inputs, const float* weights, std::int64_t rows, std::int64_t outs, std::int64_t width,
                   float* output, std::int64_t output_stride);

}  // namespace fuse
