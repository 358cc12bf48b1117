#include "tensor/llama_decoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensor/decode_attention.h"
#include "tensor/layer_steps.h"
#include "tensor/quantized_linear.h"
#include "tensor/skinny_linear.h"

namespace fuse {
namespace {

template <class Weights>
void multiply(const float* inputs, const QuantizedMatrix<Weights>& matrix, std::int64_t rows, std::int64_t outs,
              std::int64_t width, float* output) {
  quantized_linear(inputs, matrix.weights, rows, outs, width, output);
  if (matrix.bias == nullptr) return;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t out = 0; out < outs; ++out) output[row * outs + out] += matrix.bias[out];
  }
}

template <int count>
void multiply(const float* inputs, const FloatMatrices<count>& matrices, std::int64_t rows, std::int64_t outs,
              std::int64_t width, float* output) {
  for (const auto& [weights, bias, own_outs] : matrices.parts) {
    skinny_linear(inputs, weights, rows, own_outs, width, output, outs);
    for (std::int64_t row = 0; bias != nullptr && row < rows; ++row) {
      for (std::int64_t out = 0; out < own_outs; ++out) output[row * outs + out] += bias[out];
    }
    output += own_outs;
  }
}

void add(const std::vector<float>& values, std::vector<float>& sums) {
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += values[i];
}

std::vector<float> room(std::int64_t rows, std::int64_t width) {
  return std::vector<float>(static_cast<std::size_t>(rows * width));
}

}  // namespace

template <class Layer, class Head>
void decode(const DecoderShape& shape, const Layer* layers, const DecoderEnds<Head>& ends, const DecoderRows& step,
            float* logits) {
  const auto [token_ids, slots, positions, cosines, sines, rows] = step;
  const auto [num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab_size, window, capacity] = shape;
  const std::int64_t projected = (heads + 2 * kv_heads) * head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  std::vector<float> states = room(rows, hidden), normed = states, added = states, factors = room(rows, 1);
  std::vector<float> projection = room(rows, projected), attended = room(rows, heads * head_dim);
  std::vector<float> gates = room(rows, 2 * intermediate), activations = room(rows, intermediate);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(rows));
  for (std::int64_t row = 0; row < rows; ++row) {
    lengths[row] = positions[row] + 1;
    std::copy_n(ends.embeddings + token_ids[row] * hidden, hidden, &states[row * hidden]);
  }
  const auto normalize = [&](float* values, const float* weight, std::int64_t count, std::int64_t width,
                             float* output) {
    rms_norm(values, weight, count, width, ends.epsilon, output, factors.data());
  };

  for (const Layer* layer = layers; layer < layers + num_layers; ++layer) {
    normalize(states.data(), layer->attention_norm, rows, hidden, normed.data());
    multiply(normed.data(), layer->query_key_value, rows, projected, hidden, projection.data());
    const CacheView keys{layer->keys, kv_heads * capacity * head_dim, capacity * head_dim};
    const CacheView values{layer->values, keys.row_stride, keys.head_stride};
    for (std::int64_t row = 0; row < rows; ++row) {
      float* own = &projection[row * projected];
      for (std::int64_t h = 0; h < heads + kv_heads; ++h) {
        const float* norm = h < heads ? layer->query_norm : layer->key_norm;
        if (norm != nullptr) normalize(own + h * head_dim, norm, 1, head_dim, own + h * head_dim);
      }
      rotary(own, cosines + row * head_dim, sines + row * head_dim, 1, heads + kv_heads, head_dim, 1, own);
      const std::int64_t place = slots[row] * keys.row_stride + positions[row] * head_dim;
      for (std::int64_t h = 0; h < kv_heads; ++h) {
        std::copy_n(own + (heads + h) * head_dim, head_dim, layer->keys + place + h * keys.head_stride);
        std::copy_n(own + (heads + kv_heads + h) * head_dim, head_dim, layer->values + place + h * keys.head_stride);
      }
    }
    decode_attention(projection.data(), projected, head_dim, keys, values, lengths.data(), window, slots, rows,
                     kv_heads, heads / kv_heads, head_dim, scale, attended.data());
    multiply(attended.data(), layer->attention_output, rows, hidden, heads * head_dim, added.data());
    add(added, states);

    normalize(states.data(), layer->mlp_norm, rows, hidden, normed.data());
    multiply(normed.data(), layer->gate_up, rows, 2 * intermediate, hidden, gates.data());
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* gate = &gates[row * 2 * intermediate];
      swiglu(gate, gate + intermediate, intermediate, &activations[row * intermediate]);
    }
    multiply(activations.data(), layer->down, rows, hidden, intermediate, added.data());
    add(added, states);
  }
  normalize(states.data(), ends.final_norm, rows, hidden, normed.data());
  multiply(normed.data(), ends.head, rows, vocab_size, hidden, logits);
}

template void decode(const DecoderShape&, const Int8Layer*, const DecoderEnds<Int8Matrix>&, const DecoderRows&, float*);
template void decode(const DecoderShape&, const Int4Layer*, const DecoderEnds<Int8Matrix>&, const DecoderRows&, float*);
template void decode(const DecoderShape&, const FloatLayer*, const DecoderEnds<FloatMatrices<1>>&, const DecoderRows&,
                     float*);

}  // namespace fuse
