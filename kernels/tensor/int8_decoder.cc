#include "tensor/int8_decoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensor/decode_attention.h"
#include "tensor/int8_linear.h"

namespace fuse {
namespace {

// output = weight * input / root mean square, of `width` elements; may be in place.
void normalize(const float* input, const float* weight, std::int64_t width, float epsilon, float* output) {
  float sums[8] = {};  // side by side
  for (std::int64_t i = 0; i < width; ++i) sums[i % 8] += input[i] * input[i];
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + epsilon);
  for (std::int64_t i = 0; i < width; ++i) output[i] = weight[i] * (input[i] * factor);
}

void multiply(const float* inputs, const Int8Matrix& matrix, std::int64_t rows, std::int64_t outs, std::int64_t width,
              float* output) {
  int8_linear(inputs, matrix.weights, matrix.scales, rows, outs, width, output);
  if (matrix.bias == nullptr) return;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t out = 0; out < outs; ++out) output[row * outs + out] += matrix.bias[out];
  }
}

void rotate(float* head, const float* cosines, const float* sines, std::int64_t head_dim) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float first = head[i];
    const float second = head[half + i];
    head[i] = first * cosines[i] - second * sines[i];
    head[half + i] = second * cosines[half + i] + first * sines[half + i];
  }
}

void add(const std::vector<float>& values, std::vector<float>& sums) {
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += values[i];
}

std::vector<float> room(std::int64_t rows, std::int64_t width) {
  return std::vector<float>(static_cast<std::size_t>(rows * width));
}

}  // namespace

void int8_decode(const DecoderShape& shape, const DecoderLayer* layers, const float* final_norm, const Int8Matrix& head,
                 const float* embeddings, float epsilon, const std::int64_t* token_ids, const std::int64_t* slots,
                 const std::int64_t* positions, const float* cosines, const float* sines, std::int64_t rows,
                 float* logits) {
  const auto [num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab_size, capacity] = shape;
  const std::int64_t projected = (heads + 2 * kv_heads) * head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  std::vector<float> states = room(rows, hidden), normed = states, added = states;
  std::vector<float> projection = room(rows, projected), attended = room(rows, heads * head_dim);
  std::vector<float> gates = room(rows, 2 * intermediate), activations = room(rows, intermediate);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(rows));
  for (std::int64_t row = 0; row < rows; ++row) {
    lengths[row] = positions[row] + 1;
    std::copy_n(embeddings + token_ids[row] * hidden, hidden, &states[row * hidden]);
  }
  const auto normalize_states = [&](const float* weight) {
    for (std::int64_t row = 0; row < rows; ++row) {
      normalize(&states[row * hidden], weight, hidden, epsilon, &normed[row * hidden]);
    }
  };

  for (const DecoderLayer* layer = layers; layer < layers + num_layers; ++layer) {
    normalize_states(layer->attention_norm);
    multiply(normed.data(), layer->query_key_value, rows, projected, hidden, projection.data());
    const CacheView keys{layer->keys, kv_heads * capacity * head_dim, capacity * head_dim};
    const CacheView values{layer->values, keys.row_stride, keys.head_stride};
    for (std::int64_t row = 0; row < rows; ++row) {
      float* own = &projection[row * projected];
      for (std::int64_t h = 0; h < heads + kv_heads; ++h) {
        const float* norm = h < heads ? layer->query_norm : layer->key_norm;
        if (norm != nullptr) normalize(own + h * head_dim, norm, head_dim, epsilon, own + h * head_dim);
        rotate(own + h * head_dim, cosines + row * head_dim, sines + row * head_dim, head_dim);
      }
      const std::int64_t place = slots[row] * keys.row_stride + positions[row] * head_dim;
      for (std::int64_t h = 0; h < kv_heads; ++h) {
        std::copy_n(own + (heads + h) * head_dim, head_dim, layer->keys + place + h * keys.head_stride);
        std::copy_n(own + (heads + kv_heads + h) * head_dim, head_dim, layer->values + place + h * keys.head_stride);
      }
    }
    decode_attention(projection.data(), projected, head_dim, keys, values, lengths.data(), slots, rows, kv_heads,
                     heads / kv_heads, head_dim, scale, attended.data());
    multiply(attended.data(), layer->attention_output, rows, hidden, heads * head_dim, added.data());
    add(added, states);

    normalize_states(layer->mlp_norm);
    multiply(normed.data(), layer->gate_up, rows, 2 * intermediate, hidden, gates.data());
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* gate = &gates[row * 2 * intermediate];
      for (std::int64_t i = 0; i < intermediate; ++i) {
        activations[row * intermediate + i] = gate[i] / (1.0f + std::exp(-gate[i])) * gate[intermediate + i];
      }
    }
    multiply(activations.data(), layer->down, rows, hidden, intermediate, added.data());
    add(added, states);
  }
  normalize_states(final_norm);
  multiply(normed.data(), head, rows, vocab_size, hidden, logits);
}

}  // namespace fuse
