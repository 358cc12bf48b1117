#include "tensor/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "tensor/sampling_math.h"
#include "tensor/vector_math.h"

namespace fuse {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kBlock = 256;  // tokens; their words and bounds stay in the first-level cache

// At least -log(uniform): a float's bits, read as an integer, are a chord below log2. 1e-3 covers the rounding.
template <class Floats>
FUSE_INLINE Floats noise_bound(const IntsOf<Floats>& bits) {
  const Floats w = (__builtin_convertvector(bits & 0x7FFFFFFF, Floats) + 0.5f) * kUniformScale;
  const Floats log2_below = __builtin_convertvector(bit_cast<IntsOf<Floats>>(w), Floats) * 0x1p-23f - 127.0f;
  return 1e-3f - 0.69314718f * log2_below;
}

template <class Floats>
FUSE_INLINE float largest(const float* values, std::int64_t count) {
  Floats lanes = all<Floats>(-kInfinity);
  std::int64_t i = 0;
  for (; i + kLanes<Floats> <= count; i += kLanes<Floats>) {
    const Floats next = load<Floats>(values + i);
    lanes = next > lanes ? next : lanes;
  }
  float result = max_of(lanes);
  for (; i < count; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// The random bits of tokens first to first + kBlock - 1.
FUSE_INLINE void fill_bits(std::uint64_t key, std::int64_t first, std::int32_t* bits) {
  alignas(64) std::uint64_t words[kBlock / 2];
  for (std::int64_t i = 0; i < kBlock / 2; ++i) words[i] = noise_word(key, first / 2 + i);
  for (std::int64_t i = 0; i < kBlock / 2; ++i) {
    bits[2 * i] = static_cast<std::int32_t>(words[i]);
    bits[2 * i + 1] = static_cast<std::int32_t>(words[i] >> 32);
  }
}

}  // namespace

void sample(const float* logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab_size,
            const float* temperatures, const NoiseKeys& keys, std::int64_t* tokens, float* logprobs) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    alignas(64) std::int32_t bits[kBlock];
    alignas(64) float scaled[kBlock];
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* row_logits = logits + row * row_stride;
      const bool greedy = temperatures[row] == 0.0f;
      const float temperature = greedy ? 1.0f : temperatures[row];
      const std::uint64_t key = key_of(keys, row);
      const float highest = largest<Floats>(row_logits, vocab_size) / temperature;

      double total = 0.0;  // of exp(scaled - highest)
      float best = -kInfinity;
      float chosen = -kInfinity;  // the best token's scaled logit
      std::int64_t token = 0;
      for (std::int64_t first = 0; first < vocab_size; first += kBlock) {
        const std::int64_t count = std::min(kBlock, vocab_size - first);
        std::fill(scaled + count, scaled + kBlock, -kInfinity);
        for (std::int64_t i = 0; i < count; ++i) scaled[i] = row_logits[first + i] / temperature;
        if (!greedy) fill_bits(key, first, bits);
        Floats totals{};
        for (std::int64_t i = 0; i < count; i += kLanes<Floats>) {
          const Floats lanes = load<Floats>(scaled + i);
          totals += exp_nonpositive(lanes - highest);
          const Floats bounds = greedy ? lanes : lanes + noise_bound<Floats>(load<IntsOf<Floats>>(bits + i));
          const IntsOf<Floats> promising = bounds > best;
          if (!any(promising)) continue;
          for (std::int64_t lane = 0; lane < kLanes<Floats>; ++lane) {
            if (!promising[lane]) continue;
            const float value = greedy ? lanes[lane] : lanes[lane] + gumbel(bits[i + lane]);
            if (value > best) {
              best = value;
              chosen = lanes[lane];
              token = first + i + lane;
            }
          }
        }
        total += sum_of(totals);
      }
      tokens[row] = token;
      logprobs[row] = chosen - (highest + static_cast<float>(std::log(total)));
    }
  });
}

}  // namespace fuse
