// Attention of one new token per row over keys and values of ragged length.
#pragma once

#include <cstdint>
#include <limits>

namespace fuse {

// A cache of keys or values: element (row, head, token, d) lies at data[row * row_stride + head * head_stride +
// token * head_dim + d].
struct CacheView {
  const float* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

// The tokens that a row attends to: its first `first`, a multiple of 8, and its last `last`; rows of no more than both
// attend to all.
struct Window {
  std::int64_t first;
  std::int64_t last;
};
constexpr Window kAllTokens{0, std::numeric_limits<std::int64_t>::max()};

// output[row, head] = softmax(scale * query[row, head] . keys[slot, head / group]) . values[slot, head / group], over
// the first lengths[row] tokens of the row's slot of the cache, as far as they are in the window: slots[row], or `row`
// itself where `slots` is null; group = heads / kv_heads. Reads exactly those tokens, each key once per row and group.
//
// query: [rows, kv_heads * group, head_dim], rows and heads `query_row_stride` and `query_head_stride` apart; output:
// the same shape, contiguous. Requires 1 <= lengths[row] <= the cache's capacity; head_dim of keys and values equal.
void decode_attention(const float* query, std::int64_t query_row_stride, std::int64_t query_head_stride, CacheView keys,
                      CacheView values, const std::int64_t* lengths, Window window, const std::int64_t* slots,
                      std::int64_t rows, std::int64_t kv_heads, std::int64_t group, std::int64_t head_dim, float scale,
                      float* output);

}  // namespace fuse
