// One token of each of several rows through a whole Llama, where calls of single operations from Python would take
// longer than the operations: a decode step of a small model or a few rows, and what a draft runs between two of them.
#pragma once

#include <cstdint>

#include "tensor/decode_attention.h"
#include "tensor/quantized_linear.h"

namespace fuse {

// output = weights . input + bias; `bias` may be null.
template <class Weights>
struct QuantizedMatrix {
  Weights weights;
  const float* bias;
};
using Int8Matrix = QuantizedMatrix<Int8Weights>;
using Int4Matrix = QuantizedMatrix<Int4Weights>;

// output = weights . input + bias, of `outs` elements; `bias` may be null.
struct FloatMatrix {
  const float* weights;
  const float* bias;
  std::int64_t outs;
};

// Matrices of one input, whose outputs lie side by side; each where its parameter is, for copies would double a model.
template <int count>
struct FloatMatrices {
  FloatMatrix parts[count];
};

// Addresses in the order in which Python lists them, all contiguous. query_norm and key_norm, [head_dim], may be null.
template <class QueryKeyValue, class GateUp, class Matrix>
struct DecoderLayer {
  const float* attention_norm;    // [hidden]
  QueryKeyValue query_key_value;  // [(heads + 2 * kv_heads) * head_dim, hidden]
  const float* query_norm;
  const float* key_norm;
  Matrix attention_output;  // [hidden, heads * head_dim]
  const float* mlp_norm;    // [hidden]
  GateUp gate_up;           // [2 * intermediate, hidden]
  Matrix down;              // [hidden, intermediate]
  float* keys;              // [slots, kv_heads, capacity, head_dim]
  float* values;
};
using Int8Layer = DecoderLayer<Int8Matrix, Int8Matrix, Int8Matrix>;
using Int4Layer = DecoderLayer<Int4Matrix, Int4Matrix, Int4Matrix>;
using FloatLayer = DecoderLayer<FloatMatrices<3>, FloatMatrices<2>, FloatMatrices<1>>;

struct DecoderShape {
  std::int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab_size;
  Window window;
  std::int64_t capacity;
};

// What lies before and behind the layers. embeddings: [any number, hidden].
template <class Head>
struct DecoderEnds {
  const float* final_norm;
  Head head;  // [vocab_size, hidden]
  const float* embeddings;
  float epsilon;
};

// The rows of a step. token_ids, slots, positions: [rows]; rows of one slot do not see each other unless their
// positions are in order. cosines, sines: of the rotary embedding, [rows, head_dim], halves rotated.
struct DecoderRows {
  const std::int64_t* token_ids;
  const std::int64_t* slots;
  const std::int64_t* positions;
  const float* cosines;
  const float* sines;
  std::int64_t count;
};

// logits of the token after each row's, [rows, vocab_size]. Writes each row's keys and values at its position of its
// slot; a row attends to what its slot has up to there, as far as it is in the window. In fp32 a row's result does not
// depend on the other rows.
//
// Layers and heads: Int8Layer or Int4Layer with Int8Matrix, FloatLayer with FloatMatrices<1>.
//
// Source: the Llama, Qwen2 and Qwen3 models of transformers 5, in fp32.
template <class Layer, class Head>
void decode(const DecoderShape& shape, const Layer* layers, const DecoderEnds<Head>& ends, const DecoderRows& rows,
            float* logits);

}  // namespace fuse
