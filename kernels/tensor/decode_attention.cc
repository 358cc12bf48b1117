#include "tensor/decode_attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "tensor/vector_math.h"

namespace fuse {
namespace {

// In whole vectors.
template <class Floats>
constexpr std::int64_t padded(std::int64_t count) {
  return (count + kLanes<Floats> - 1) / kLanes<Floats> * kLanes<Floats>;
}

// Scores of `count` (at most four) keys, `head_dim` elements apart: their sums run side by side.
template <class Floats, int count>
FUSE_INLINE void score(const float* query, const float* keys, std::int64_t head_dim, float scale, float* scores) {
  Floats lanes[count] = {};
  std::int64_t d = 0;
  for (; d + kLanes<Floats> <= head_dim; d += kLanes<Floats>) {
    const Floats q = load<Floats>(query + d);
    for (int k = 0; k < count; ++k) lanes[k] += q * load<Floats>(keys + k * head_dim + d);
  }
  for (int k = 0; k < count; ++k) {
    float sum = sum_of(lanes[k]);
    for (std::int64_t tail = d; tail < head_dim; ++tail) sum += query[tail] * keys[k * head_dim + tail];
    scores[k] = scale * sum;
  }
}

// Adds `count` values, weighted, to the output.
template <class Floats, int count>
FUSE_INLINE void accumulate(const float* weights, const float* values, std::int64_t head_dim, float* output) {
  std::int64_t d = 0;
  for (; d + kLanes<Floats> <= head_dim; d += kLanes<Floats>) {
    Floats sum = load<Floats>(output + d);
    for (int k = 0; k < count; ++k) sum += weights[k] * load<Floats>(values + k * head_dim + d);
    store(output + d, sum);
  }
  for (; d < head_dim; ++d) {
    for (int k = 0; k < count; ++k) output[d] += weights[k] * values[k * head_dim + d];
  }
}

// Turns scores into unnormalised probabilities; returns their sum. Room for a whole last vector is the caller's.
template <class Floats>
FUSE_INLINE float exponentiate(float* scores, std::int64_t count) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  std::fill(scores + count, scores + padded<Floats>(count), kLowest);
  Floats highest = all<Floats>(kLowest);
  for (std::int64_t j = 0; j < count; j += kLanes<Floats>) {
    const Floats next = load<Floats>(scores + j);
    highest = next > highest ? next : highest;
  }
  const float shift = max_of(highest);
  Floats total{};
  for (std::int64_t j = 0; j < count; j += kLanes<Floats>) {
    const Floats next = exp_nonpositive(load<Floats>(scores + j) - shift);
    store(scores + j, next);
    total += next;
  }
  return sum_of(total);
}

}  // namespace

void decode_attention(const float* query, std::int64_t query_row_stride, std::int64_t query_head_stride, CacheView keys,
                      CacheView values, const std::int64_t* lengths, Window window, const std::int64_t* slots,
                      std::int64_t rows, std::int64_t kv_heads, std::int64_t group, std::int64_t head_dim, float scale,
                      float* output) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    const auto left_out = [&](std::int64_t length) {
      return std::max<std::int64_t>(0, length - window.first - window.last);
    };
    std::int64_t width = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      width = std::max(width, padded<Floats>(lengths[row] - left_out(lengths[row])));
    }
    std::vector<float> scores(static_cast<std::size_t>(group * width));
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t gap = left_out(lengths[row]);
      const std::int64_t length = lengths[row] - gap;
      // Where the j-th token that is read lies; no few that are read at once lie on both sides of the gap.
      const auto offset = [&](std::int64_t j) { return (j < window.first ? j : j + gap) * head_dim; };
      const std::int64_t slot = slots == nullptr ? row : slots[row];
      for (std::int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
        const float* head_keys = keys.data + slot * keys.row_stride + kv_head * keys.head_stride;
        const float* head_values = values.data + slot * values.row_stride + kv_head * values.head_stride;
        const float* head_query = query + row * query_row_stride + kv_head * group * query_head_stride;
        float* head_output = output + (row * kv_heads + kv_head) * group * head_dim;

        std::int64_t j = 0;
        for (; j + 4 <= length; j += 4) {
          for (std::int64_t g = 0; g < group; ++g) {
            score<Floats, 4>(head_query + g * query_head_stride, head_keys + offset(j), head_dim, scale,
                             &scores[g * width + j]);
          }
        }
        for (; j < length; ++j) {
          for (std::int64_t g = 0; g < group; ++g) {
            score<Floats, 1>(head_query + g * query_head_stride, head_keys + offset(j), head_dim, scale,
                             &scores[g * width + j]);
          }
        }

        std::fill(head_output, head_output + group * head_dim, 0.0f);
        for (std::int64_t g = 0; g < group; ++g) {
          const float total = exponentiate<Floats>(&scores[g * width], length);
          for (j = 0; j < length; ++j) scores[g * width + j] /= total;
        }
        for (j = 0; j + 8 <= length; j += 8) {
          for (std::int64_t g = 0; g < group; ++g) {
            accumulate<Floats, 8>(&scores[g * width + j], head_values + offset(j), head_dim,
                                  head_output + g * head_dim);
          }
        }
        for (; j < length; ++j) {
          for (std::int64_t g = 0; g < group; ++g) {
            accumulate<Floats, 1>(&scores[g * width + j], head_values + offset(j), head_dim,
                                  head_output + g * head_dim);
          }
        }
      }
    }
  });
}

}  // namespace fuse
