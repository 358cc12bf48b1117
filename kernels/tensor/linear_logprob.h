// Log-probabilities and entropies from logits that come in chunks of the vocabulary and never lie side by side.
#pragma once

#include <cstdint>

#include "tensor/linear_logprob_math.h"

namespace fuse {

// Adds a chunk to the statistics, which start as (a number below every logit, 0, 0, 0). Chunks whose widths are
// multiples of kLogprobBlock give the same bits as one chunk of all their columns. Reads every logit from memory once.
// Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867), algorithm 3.
void accumulate_logprob(LogitChunk<const float> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics);
void accumulate_logprob(LogitChunk<const BFloat16> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics);
void accumulate_logprob(LogitChunk<const double> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics);

// Replaces logits by their gradient, given the statistics of the whole vocabulary and the gradients g of log p(target)
// and h of the entropy:
//
//   dx[v] = (g ([v = target] - p[v]) - h p[v] (log p[v] + entropy)) / T
void logprob_gradient(LogitChunk<float> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads);
void logprob_gradient(LogitChunk<BFloat16> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads);
void logprob_gradient(LogitChunk<double> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads);

}  // namespace fuse
