#include "tensor/layer_steps.h"

#include <algorithm>
#include <cmath>

#include "tensor/vector_math.h"

namespace fuse {
namespace {

template <class Floats>
FUSE_INLINE Floats sigmoid(const Floats& x) {
  const Floats small = exp_nonpositive(x > 0.0f ? -x : x);
  return (x > 0.0f ? all<Floats>(1.0f) : small) / (1.0f + small);
}

// Runs `body(load, store)` over whole vectors of `count` elements, and once more over what is left, padded by zeros.
template <class Floats, typename Body>
FUSE_INLINE void over_vectors(std::int64_t count, const Body& body) {
  std::int64_t i = 0;
  for (; i + kLanes<Floats> <= count; i += kLanes<Floats>) {
    body([i](const float* values) FUSE_INLINED { return load<Floats>(values + i); },
         [i](float* values, const Floats& from) FUSE_INLINED { store(values + i, from); });
  }
  if (i == count) return;
  const std::int64_t left = count - i;
  body(
      [i, left](const float* values) FUSE_INLINED {
        float padded[kLanes<Floats>] = {};
        std::copy_n(values + i, left, padded);
        return load<Floats>(padded);
      },
      [i, left](float* values, const Floats& from) FUSE_INLINED {
        float padded[kLanes<Floats>];
        store(padded, from);
        std::copy_n(padded, left, values + i);
      });
}

// Calls `turn(get, put, first, second, cosines, sines)` with the halves of every head's input.
template <class Floats, typename Turn>
FUSE_INLINE void over_heads(const float* input, const float* cosines, const float* sines, std::int64_t tokens,
                            std::int64_t heads, std::int64_t head_dim, std::int64_t angles, float* output,
                            const Turn& turn) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t token = 0; token < tokens; ++token) {
    const float* cosine = cosines + token % angles * head_dim;
    const float* sine = sines + token % angles * head_dim;
    for (std::int64_t head = 0; head < heads; ++head, input += head_dim, output += head_dim) {
      over_vectors<Floats>(half, [&](const auto& get, const auto& put) FUSE_INLINED {
        const auto [first, second] =
            turn(get(input), get(input + half), get(cosine), get(cosine + half), get(sine), get(sine + half));
        put(output, first);
        put(output + half, second);
      });
    }
  }
}

template <class Floats>
struct Halves {
  Floats first, second;
};

}  // namespace

void rms_norm(const float* input, const float* weight, std::int64_t rows, std::int64_t width, float epsilon,
              float* output, float* factors) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    for (std::int64_t row = 0; row < rows; ++row, input += width, output += width) {
      Floats squares{};
      over_vectors<Floats>(width, [&](const auto& get, const auto&) FUSE_INLINED {
        const Floats x = get(input);
        squares += x * x;
      });
      const float factor = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + epsilon);
      over_vectors<Floats>(width, [&](const auto& get, const auto& put)
                                      FUSE_INLINED { put(output, get(weight) * (get(input) * factor)); });
      factors[row] = factor;
    }
  });
}

void rms_norm_backward(const float* input, const float* weight, const float* factors, const float* output_grad,
                       std::int64_t rows, std::int64_t width, float* input_grad, float* weight_grad) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    std::fill_n(weight_grad, width, 0.0f);
    for (std::int64_t row = 0; row < rows; ++row, input += width, output_grad += width, input_grad += width) {
      const float factor = factors[row];
      Floats along{};  // of the gradient along the input
      over_vectors<Floats>(width, [&](const auto& get, const auto& put) FUSE_INLINED {
        const Floats product = get(output_grad) * get(input);
        along += get(weight) * product;
        put(weight_grad, get(weight_grad) + product * factor);
      });
      const float shrink = sum_of(along) * factor * factor / static_cast<float>(width);
      over_vectors<Floats>(width, [&](const auto& get, const auto& put) FUSE_INLINED {
        put(input_grad, factor * (get(weight) * get(output_grad) - shrink * get(input)));
      });
    }
  });
}

void swiglu(const float* gate, const float* up, std::int64_t count, float* output) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    over_vectors<Floats>(count, [&](const auto& get, const auto& put) FUSE_INLINED {
      const Floats x = get(gate);
      put(output, x * sigmoid(x) * get(up));
    });
  });
}

void swiglu_backward(const float* gate, const float* up, const float* output_grad, std::int64_t count, float* gate_grad,
                     float* up_grad) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    over_vectors<Floats>(count, [&](const auto& get, const auto& put) FUSE_INLINED {
      const Floats x = get(gate), grad = get(output_grad), open = sigmoid(x);
      put(gate_grad, grad * get(up) * open * (1.0f + x * (1.0f - open)));
      put(up_grad, grad * x * open);
    });
  });
}

void rotary(const float* input, const float* cosines, const float* sines, std::int64_t tokens, std::int64_t heads,
            std::int64_t head_dim, std::int64_t angles, float* output) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    over_heads<Floats>(input, cosines, sines, tokens, heads, head_dim, angles, output,
                       [](const Floats& a, const Floats& b, const Floats& cos_a, const Floats& cos_b,
                          const Floats& sin_a, const Floats& sin_b)
                           FUSE_INLINED { return Halves<Floats>{a * cos_a - b * sin_a, b * cos_b + a * sin_b}; });
  });
}

void rotary_backward(const float* input, const float* cosines, const float* sines, std::int64_t tokens,
                     std::int64_t heads, std::int64_t head_dim, std::int64_t angles, float* output) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    over_heads<Floats>(input, cosines, sines, tokens, heads, head_dim, angles, output,
                       [](const Floats& a, const Floats& b, const Floats& cos_a, const Floats& cos_b,
                          const Floats& sin_a, const Floats& sin_b)
                           FUSE_INLINED { return Halves<Floats>{a * cos_a + b * sin_b, b * cos_b - a * sin_a}; });
  });
}

}  // namespace fuse
