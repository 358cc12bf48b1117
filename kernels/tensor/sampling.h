// Drawing tokens from a softmax with counter-based Gumbel noise.
#pragma once

#include <cstdint>

#include "tensor/sampling_math.h"

namespace fuse {

// Row r's token is argmax_t(logits[t] / temperature + gumbel(r, t)), the first of equals, and its log-probability
// log softmax(logits / temperature)[token]. Temperature 0: argmax(logits), the log-probability at temperature 1.
//
// The noise is that of fuse/ops/sampling.py: SplitMix64 from the key of the row's seed, sample and position, two tokens
// a word. Hardly any logarithm is taken: with w the token's uniform, -log(-log1p(-w)) <= -log(w), which the exponent
// bits of w bound from above; only tokens whose bound beats the best so far are looked at closely.
//
// logits: [rows, vocab_size], rows `row_stride` elements apart. O(rows * vocab_size), no allocation.
void sample(const float* logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab_size,
            const float* temperatures, const NoiseKeys& keys, std::int64_t* tokens, float* logprobs);

}  // namespace fuse
