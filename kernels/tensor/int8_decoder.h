// One token of each of several rows through a whole Llama whose matrices are int8: what a draft runs between two steps
// of its target, where calls of single operations from Python would take longer than the operations.
#pragma once

#include <cstdint>

namespace fuse {

// output = scales * (weights . input) + bias; `bias` may be null.
struct Int8Matrix {
  const std::int8_t* weights;
  const float* scales;
  const float* bias;
};

// Addresses in the order in which Python lists them, all contiguous. query_norm and key_norm, [head_dim], may be null.
struct DecoderLayer {
  const float* attention_norm;  // [hidden]
  Int8Matrix query_key_value;   // [(heads + 2 * kv_heads) * head_dim, hidden]
  const float* query_norm;
  const float* key_norm;
  Int8Matrix attention_output;  // [hidden, heads * head_dim]
  const float* mlp_norm;        // [hidden]
  Int8Matrix gate_up;           // [2 * intermediate, hidden]
  Int8Matrix down;              // [hidden, intermediate]
  float* keys;                  // [slots, kv_heads, capacity, head_dim]
  float* values;
};

struct DecoderShape {
  std::int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab_size, capacity;
};

// logits of the token after each row's, [rows, vocab_size]. Writes each row's keys and values at its position of its
// slot; a row attends to what its slot has up to there.
//
// embeddings: [any number, hidden]. token_ids, slots, positions: [rows]; rows of one slot do not see each other unless
// their positions are in order. cosines, sines: of the rotary embedding, [rows, head_dim], halves rotated.
// Source: the Llama, Qwen2 and Qwen3 models of transformers 5, in fp32.
void int8_decode(const DecoderShape& shape, const DecoderLayer* layers, const float* final_norm, const Int8Matrix& head,
                 const float* embeddings, float epsilon, const std::int64_t* token_ids, const std::int64_t* slots,
                 const std::int64_t* positions, const float* cosines, const float* sines, std::int64_t rows,
                 float* logits);

}  // namespace fuse
