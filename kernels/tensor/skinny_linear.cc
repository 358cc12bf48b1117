#include "tensor/skinny_linear.h"

#include <cstring>

namespace fuse {
namespace {

constexpr int kLanes = 16;
constexpr std::int64_t kAhead = 1024;  // weights to fetch beforehand, across the rows that end meanwhile
// As the compiler cuts it for the processor. Sums have the same order on all of them; products are fused with them
// where there are such instructions (see CMakeLists.txt).
using Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = float;

#define FUSE_INLINE inline __attribute__((always_inline))

// A tree of additions, not a chain: narrow matrices have as many of these as of anything else.
FUSE_INLINE float total_of(const Lanes& sums) {
  using Eight __attribute__((vector_size(32))) = float;
  using Four __attribute__((vector_size(16))) = float;
  Eight halves[2];
  std::memcpy(halves, &sums, sizeof(halves));
  const Eight eight = halves[0] + halves[1];
  Four quarters[2];
  std::memcpy(quarters, &eight, sizeof(quarters));
  const Four four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Products of `num_rows` inputs with `num_outs` rows of weights, into output[row * stride + out].
template <int num_rows, int num_outs>
FUSE_INLINE void dots(const float* inputs, const float* weights, std::int64_t width, float* output,
                      std::int64_t stride) {
  Lanes sums[num_rows][num_outs] = {};
  const std::int64_t whole = width / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    for (int out = 0; out < num_outs; ++out) {
      __builtin_prefetch(weights + out * width + i + kAhead);
      const Lanes own = *reinterpret_cast<const Lanes*>(weights + out * width + i);
      for (int row = 0; row < num_rows; ++row) {
        sums[row][out] += own * *reinterpret_cast<const Lanes*>(inputs + row * width + i);
      }
    }
  }
  for (int row = 0; row < num_rows; ++row) {
    for (int out = 0; out < num_outs; ++out) {
      float total = total_of(sums[row][out]);
      for (std::int64_t i = whole; i < width; ++i) total += inputs[row * width + i] * weights[out * width + i];
      output[row * stride + out] = total;
    }
  }
}

// The same of any number of rows, `most_rows` at once, a power of two.
template <int most_rows, int num_outs>
FUSE_INLINE void dots_of_rows(const float* inputs, const float* weights, std::int64_t rows, std::int64_t width,
                              float* output, std::int64_t stride) {
  std::int64_t row = 0;
  for (; row + most_rows <= rows; row += most_rows) {
    dots<most_rows, num_outs>(inputs + row * width, weights, width, output + row * stride, stride);
  }
  if constexpr (most_rows > 1) {
    dots_of_rows<most_rows / 2, num_outs>(inputs + row * width, weights, rows - row, width, output + row * stride,
                                          stride);
  }
}

template <int most_rows, int most_outs>
FUSE_INLINE void multiply(const float* inputs, const float* weights, std::int64_t rows, std::int64_t outs,
                          std::int64_t width, float* output, std::int64_t stride) {
  std::int64_t out = 0;
  for (; out + most_outs <= outs; out += most_outs) {
    dots_of_rows<most_rows, most_outs>(inputs, weights + out * width, rows, width, output + out, stride);
  }
  for (; out < outs; ++out) {
    dots_of_rows<most_rows, 1>(inputs, weights + out * width, rows, width, output + out, stride);
  }
}

// As many sums at once as there are registers for.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) void multiply_avx512(const float* inputs, const float* weights, std::int64_t rows,
                                                        std::int64_t outs, std::int64_t width, float* output,
                                                        std::int64_t stride) {
  multiply<4, 4>(inputs, weights, rows, outs, width, output, stride);
}

__attribute__((target("avx2,fma"))) void multiply_avx2(const float* inputs, const float* weights, std::int64_t rows,
                                                       std::int64_t outs, std::int64_t width, float* output,
                                                       std::int64_t stride) {
  multiply<2, 2>(inputs, weights, rows, outs, width, output, stride);
}
#endif

}  // namespace

void skinny_linear(const float* inputs, const float* weights, std::int64_t rows, std::int64_t outs, std::int64_t width,
                   float* output, std::int64_t output_stride) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    return multiply_avx512(inputs, weights, rows, outs, width, output, output_stride);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return multiply_avx2(inputs, weights, rows, outs, width, output, output_stride);
  }
#endif
  multiply<2, 1>(inputs, weights, rows, outs, width, output, output_stride);
}

}  // namespace fuse
