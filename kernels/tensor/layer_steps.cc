#include "tensor/layer_steps.h"

#include <algorithm>
#include <cmath>

#include "tensor/vector_math.h"

namespace fuse {
namespace {

FUSE_INLINE Floats sigmoid(const Floats& x) {
  const Floats small = exp_nonpositive(x > 0.0f ? -x : x);
  return (x > 0.0f ? all(1.0f) : small) / (1.0f + small);
}

// Runs `body(load, store)` over whole vectors of `count` elements, and once more over what is left, padded by zeros.
template <typename Body>
FUSE_INLINE void over_vectors(std::int64_t count, const Body& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    body([i](const float* values) __attribute__((always_inline)) { return load(values + i); },
         [i](float* values, const Floats& from) __attribute__((always_inline)) { store(values + i, from); });
  }
  if (i == count) return;
  const std::int64_t left = count - i;
  body(
      [i, left](const float* values) __attribute__((always_inline)) {
        float padded[kLanes] = {};
        std::copy_n(values + i, left, padded);
        return load(padded);
      },
      [i, left](float* values, const Floats& from) __attribute__((always_inline)) {
        float padded[kLanes];
        store(padded, from);
        std::copy_n(padded, left, values + i);
      });
}

// Calls `turn(get, put, first, second, cosines, sines)` with the halves of every head's input.
template <typename Turn>
FUSE_INLINE void over_heads(const float* input, const float* cosines, const float* sines, std::int64_t tokens,
                            std::int64_t heads, std::int64_t head_dim, std::int64_t angles, float* output,
                            const Turn& turn) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t token = 0; token < tokens; ++token) {
    const float* cosine = cosines + token % angles * head_dim;
    const float* sine = sines + token % angles * head_dim;
    for (std::int64_t head = 0; head < heads; ++head, input += head_dim, output += head_dim) {
      over_vectors(half, [&](const auto& get, const auto& put) __attribute__((always_inline)) {
        const auto [first, second] =
            turn(get(input), get(input + half), get(cosine), get(cosine + half), get(sine), get(sine + half));
        put(output, first);
        put(output + half, second);
      });
    }
  }
}

struct Halves {
  Floats first, second;
};

}  // namespace

FUSE_VECTORIZED
void rms_norm(const float* input, const float* weight, std::int64_t rows, std::int64_t width, float epsilon,
              float* output, float* factors) {
  for (std::int64_t row = 0; row < rows; ++row, input += width, output += width) {
    Floats squares{};
    over_vectors(width, [&](const auto& get, const auto&) __attribute__((always_inline)) {
      const Floats x = get(input);
      squares += x * x;
    });
    const float factor = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + epsilon);
    over_vectors(width, [&](const auto& get, const auto& put)
                            __attribute__((always_inline)) { put(output, get(weight) * (get(input) * factor)); });
    factors[row] = factor;
  }
}

FUSE_VECTORIZED
void rms_norm_backward(const float* input, const float* weight, const float* factors, const float* output_grad,
                       std::int64_t rows, std::int64_t width, float* input_grad, float* weight_grad) {
  std::fill_n(weight_grad, width, 0.0f);
  for (std::int64_t row = 0; row < rows; ++row, input += width, output_grad += width, input_grad += width) {
    const float factor = factors[row];
    Floats along{};  // of the gradient along the input
    over_vectors(width, [&](const auto& get, const auto& put) __attribute__((always_inline)) {
      const Floats product = get(output_grad) * get(input);
      along += get(weight) * product;
      put(weight_grad, get(weight_grad) + product * factor);
    });
    const float shrink = sum_of(along) * factor * factor / static_cast<float>(width);
    over_vectors(width, [&](const auto& get, const auto& put) __attribute__((always_inline)) {
      put(input_grad, factor * (get(weight) * get(output_grad) - shrink * get(input)));
    });
  }
}

FUSE_VECTORIZED
void swiglu(const float* gate, const float* up, std::int64_t count, float* output) {
  over_vectors(count, [&](const auto& get, const auto& put) __attribute__((always_inline)) {
    const Floats x = get(gate);
    put(output, x * sigmoid(x) * get(up));
  });
}

FUSE_VECTORIZED
void swiglu_backward(const float* gate, const float* up, const float* output_grad, std::int64_t count, float* gate_grad,
                     float* up_grad) {
  over_vectors(count, [&](const auto& get, const auto& put) __attribute__((always_inline)) {
    const Floats x = get(gate), grad = get(output_grad), open = sigmoid(x);
    put(gate_grad, grad * get(up) * open * (1.0f + x * (1.0f - open)));
    put(up_grad, grad * x * open);
  });
}

FUSE_VECTORIZED
void rotary(const float* input, const float* cosines, const float* sines, std::int64_t tokens, std::int64_t heads,
            std::int64_t head_dim, std::int64_t angles, float* output) {
  over_heads(input, cosines, sines, tokens, heads, head_dim, angles, output,
             [](const Floats& a, const Floats& b, const Floats& cos_a, const Floats& cos_b, const Floats& sin_a,
                const Floats& sin_b)
                 __attribute__((always_inline)) { return Halves{a * cos_a - b * sin_a, b * cos_b + a * sin_b}; });
}

FUSE_VECTORIZED
void rotary_backward(const float* input, const float* cosines, const float* sines, std::int64_t tokens,
                     std::int64_t heads, std::int64_t head_dim, std::int64_t angles, float* output) {
  over_heads(input, cosines, sines, tokens, heads, head_dim, angles, output,
             [](const Floats& a, const Floats& b, const Floats& cos_a, const Floats& cos_b, const Floats& sin_a,
                const Floats& sin_b)
                 __attribute__((always_inline)) { return Halves{a * cos_a + b * sin_b, b * cos_b - a * sin_a}; });
}

}  // namespace fuse
