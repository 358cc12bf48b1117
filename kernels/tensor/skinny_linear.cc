#include "tensor/skinny_linear.h"

#include "tensor/vector_math.h"

namespace fuse {
namespace {

constexpr std::int64_t kAhead = 8192;  // weights to fetch beforehand, in the order in which they lie
constexpr int kLine = 16;              // of them in a cache line
constexpr int kSecondLevel = 2;        // into the cache that has room for them beside inputs

// Products of `num_rows` inputs with `num_outs` rows of weights, into output[row * stride + out]. Products are fused
// with sums where there are such instructions (see CMakeLists.txt).
template <class Floats, int num_rows, int num_outs>
FUSE_INLINE void dots(const float* inputs, const float* weights, std::int64_t width, float* output,
                      std::int64_t stride) {
  constexpr int lanes = kLanes<Floats>;
  Floats sums[num_rows][num_outs] = {};
  const std::int64_t whole = width / lanes * lanes;
  for (std::int64_t i = 0; i < whole; i += lanes) {
    for (int line = 0; line < num_outs * lanes; line += kLine) {
      __builtin_prefetch(weights + num_outs * i + line + kAhead, 0, kSecondLevel);
    }
    Floats own[num_outs];
    for (int out = 0; out < num_outs; ++out) own[out] = load<Floats>(weights + out * width + i);
    for (int row = 0; row < num_rows; ++row) {
      const Floats input = load<Floats>(inputs + row * width + i);
      for (int out = 0; out < num_outs; ++out) sums[row][out] += own[out] * input;
    }
  }
  for (int row = 0; row < num_rows; ++row) {
    for (int out = 0; out < num_outs; ++out) {
      float total = sum_of(sums[row][out]);
      for (std::int64_t i = whole; i < width; ++i) total += inputs[row * width + i] * weights[out * width + i];
      output[row * stride + out] = total;
    }
  }
}

// The same of any number of rows, `most_rows` at once, a power of two.
template <class Floats, int most_rows, int num_outs>
FUSE_INLINE void dots_of_rows(const float* inputs, const float* weights, std::int64_t rows, std::int64_t width,
                              float* output, std::int64_t stride) {
  std::int64_t row = 0;
  for (; row + most_rows <= rows; row += most_rows) {
    dots<Floats, most_rows, num_outs>(inputs + row * width, weights, width, output + row * stride, stride);
  }
  if constexpr (most_rows > 1) {
    dots_of_rows<Floats, most_rows / 2, num_outs>(inputs + row * width, weights, rows - row, width,
                                                  output + row * stride, stride);
  }
}

}  // namespace

void skinny_linear(const float* inputs, const float* weights, std::int64_t rows, std::int64_t outs, std::int64_t width,
                   float* output, std::int64_t output_stride) {
  vectorized([=]<class Floats>(const Floats&) FUSE_INLINED {
    // As many sums at once as there are registers for, beside weights and an input.
    constexpr int most_rows = 4, most_outs = kLanes<Floats> == 16 ? 4 : 3;
    std::int64_t out = 0;
    for (; out + most_outs <= outs; out += most_outs) {
      dots_of_rows<Floats, most_rows, most_outs>(inputs, weights + out * width, rows, width, output + out,
                                                 output_stride);
    }
    for (; out < outs; ++out) {
      dots_of_rows<Floats, most_rows, 1>(inputs, weights + out * width, rows, width, output + out, output_stride);
    }
  });
}

}  // namespace fuse
