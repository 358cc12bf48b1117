// What a layer of a Llama computes between its matrix products, each in one pass over its rows, and its gradients in
// another. All arrays are contiguous.
#pragma once

#include <cstdint>

namespace fuse {

// output[row] = weight * input[row] * factors[row], where factors[row] = 1 / sqrt(mean of input[row]^2 + epsilon).
//
// input, output: [rows, width], which may be one; weight: [width]; factors: [rows], written.
// Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4, with the epsilon of transformers' Llama.
void rms_norm(const float* input, const float* weight, std::int64_t rows, std::int64_t width, float epsilon,
              float* output, float* factors);

// The gradients of its input, and that of its weight, summed over the rows. output_grad: [rows, width].
void rms_norm_backward(const float* input, const float* weight, const float* factors, const float* output_grad,
                       std::int64_t rows, std::int64_t width, float* input_grad, float* weight_grad);

// output = gate / (1 + e^-gate) * up, of `count` elements each.
// Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
void swiglu(const float* gate, const float* up, std::int64_t count, float* output);

// Its gradients.
void swiglu_backward(const float* gate, const float* up, const float* output_grad, std::int64_t count, float* gate_grad,
                     float* up_grad);

// Turns the halves of every head by its token's angles: first * cosine - second * sine and second * cosine + first *
// sine.
//
// input, output: [tokens, heads, head_dim], which may be one; cosines, sines: [angles, head_dim], of which token t has
// row t % angles. Source: Su et al. 2021 (arXiv 2104.09864), with halves in place of pairs, as transformers' Llama has
// it.
void rotary(const float* input, const float* cosines, const float* sines, std::int64_t tokens, std::int64_t heads,
            std::int64_t head_dim, std::int64_t angles, float* output);

// Its gradient: input is that of the output, and output that of the input.
void rotary_backward(const float* input, const float* cosines, const float* sines, std::int64_t tokens,
                     std::int64_t heads, std::int64_t head_dim, std::int64_t angles, float* output);

}  // namespace fuse
