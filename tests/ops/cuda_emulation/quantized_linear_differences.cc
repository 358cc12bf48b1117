// Compares quantized_linear.cu, run by cuda_emulation.h, with quantized_linear.cc, which rounds inputs to 16 bits, as
// this processor and as any other runs it; prints every difference.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "differences.h"
#include "tensor/quantized_linear.h"
#include "tensor/quantized_linear_cuda.h"
#include "values.h"

// Once more, for processors of which nothing is known.
#undef __x86_64__
#define quantized_linear portable_quantized_linear
#include "tensor/quantized_linear.cc"
#undef quantized_linear

namespace {

// weights: [outs, width], such that outputs are about 1.
template <typename T, class Weights>
void compare(const char* what, const std::vector<float>& inputs, const Weights& weights, std::int64_t rows,
             std::int64_t outs, std::int64_t width, double tolerance) {
  std::vector<T> own;
  for (const float input : inputs) own.push_back(of(input, T{}));
  std::vector<float> cpp(static_cast<std::size_t>(rows * outs)), portable = cpp;
  std::vector<T> cuda(cpp.size() + 8 * outs, of(12345.0f, T{}));  // nothing may be written behind the last
  fuse::quantized_linear(floats(own).data(), weights, rows, outs, width, cpp.data());
  fuse::portable_quantized_linear(floats(own).data(), weights, rows, outs, width, portable.data());
  expect_equal("portable products", cpp, portable, 1e-4);
  fuse::cuda::quantized_linear<T, Weights>(own.data(), weights, rows, outs, width, cuda.data(), 0);
  cpp.resize(cuda.size(), fuse::to_float(of(12345.0f, T{})));
  expect_equal(what, cpp, floats(cuda), tolerance);
}

void compare_all(std::int64_t rows, std::int64_t outs, std::int64_t width) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<float> inputs(static_cast<std::size_t>(rows * width));
  for (float& input : inputs) input = normal(generator);
  const float unit = 0.01f / std::sqrt(static_cast<float>(width));

  std::vector<std::int8_t> values(static_cast<std::size_t>(outs * width));
  for (auto& value : values) value = static_cast<std::int8_t>(static_cast<int>(generator() % 255) - 127);
  std::vector<float> scales;
  for (std::int64_t out = 0; out < outs; ++out) scales.push_back(unit * static_cast<float>(out % 3 + 1));
  const fuse::Int8Weights int8{values.data(), scales.data()};
  compare<float>("int8 products", inputs, int8, rows, outs, width, 1e-3);
  compare<fuse::BFloat16>("int8 products", inputs, int8, rows, outs, width, 1e-2);

  const std::int64_t groups = outs * ((width + fuse::kInt4Group - 1) / fuse::kInt4Group);
  struct alignas(16) Group {
    std::uint8_t values[fuse::kInt4Group / 2];
  };
  std::vector<Group> packed(static_cast<std::size_t>(groups));
  for (auto& group : packed) {
    for (auto& value : group.values) value = static_cast<std::uint8_t>(generator());
  }
  std::vector<fuse::Int4Range> ranges;
  for (std::int64_t group = 0; group < groups; ++group) {
    const float scale = 10.0f * unit * static_cast<float>(group % 3 + 1);
    ranges.push_back({of(scale * static_cast<float>(group % 5 - 10), fuse::BFloat16{}), of(scale, fuse::BFloat16{})});
  }
  const fuse::Int4Weights int4{packed.data()->values, ranges.data()};
  compare<float>("int4 products", inputs, int4, rows, outs, width, 1e-3);
  compare<fuse::BFloat16>("int4 products", inputs, int4, rows, outs, width, 1e-2);
}

}  // namespace

int main() {
  for (const std::int64_t rows : {0, 1, 2, 3, 8, 17}) {
    for (const std::int64_t outs : {1, 13}) {
      for (const std::int64_t width : {1, 31, 576, 1040}) compare_all(rows, outs, width);
    }
  }
  return num_differences > 0;
}
