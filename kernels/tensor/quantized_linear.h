// Products of a few activations with a matrix of weights of 8 or 4 bits: what takes time is reading the weights.
#pragma once

#include <cstdint>

#include "tensor/linear_logprob_math.h"

namespace fuse {

// A weight is its output's scale times a value of -127 to 127.
struct Int8Weights {
  const std::int8_t* values;  // [outs, width]
  const float* scales;        // [outs]
};

constexpr std::int64_t kInt4Group = 32;  // neighbours of one minimum and scale

struct Int4Range {
  BFloat16 minimum, scale;
};

// A weight is its group's minimum and scale times a value of 0 to 15. Byte j of a group holds the values of its
// elements j, in the lower half, and j + 16; what a row's last group has beyond the width does not count.
struct Int4Weights {
  const std::uint8_t* values;  // [outs, groups, kInt4Group / 2]
  const Int4Range* ranges;     // [outs, groups]
};

// output[row, out] = sum over i of inputs[row, i] * weights[out, i], all contiguous.
//
// inputs: [rows, width], rounded to 16 bits of their row's largest; output: [rows, outs]. A row's result does not
// depend on the other rows. Weights are read once for all rows.
void quantized_linear(const float* inputs, const Int8Weights& weights, std::int64_t rows, std::int64_t outs,
                      std::int64_t width, float* output);
void quantized_linear(const float* inputs, const Int4Weights& weights, std::int64_t rows, std::int64_t outs,
                      std::int64_t width, float* output);

}  // namespace fuse
