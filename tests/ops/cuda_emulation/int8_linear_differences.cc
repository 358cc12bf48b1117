// Compares int8_linear of int8_linear.cu, run by cuda_emulation.h, with that of int8_linear.cc, which rounds inputs to
// 16 bits; prints every difference.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "differences.h"
#include "tensor/int8_linear.h"
#include "tensor/int8_linear_cuda.h"
#include "values.h"

namespace {

// Outputs of about 1.
template <typename T>
void compare(std::int64_t rows, std::int64_t outs, std::int64_t width, double tolerance) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<T> inputs;
  std::vector<std::int8_t> weights;
  std::vector<float> scales;
  for (std::int64_t i = 0; i < rows * width; ++i) inputs.push_back(of(normal(generator), T{}));
  for (std::int64_t i = 0; i < outs * width; ++i) {
    weights.push_back(static_cast<std::int8_t>(static_cast<int>(generator() % 255) - 127));
  }
  for (std::int64_t out = 0; out < outs; ++out) {
    scales.push_back(0.01f * static_cast<float>(out % 3 + 1) / std::sqrt(static_cast<float>(width)));
  }
  std::vector<float> cpp(static_cast<std::size_t>(rows * outs));
  std::vector<T> cuda(cpp.size() + 8 * outs, of(12345.0f, T{}));  // nothing may be written behind the last
  fuse::int8_linear(floats(inputs).data(), weights.data(), scales.data(), rows, outs, width, cpp.data());
  fuse::cuda::int8_linear<T>(inputs.data(), weights.data(), scales.data(), rows, outs, width, cuda.data(), 0);
  cpp.resize(cuda.size(), fuse::to_float(of(12345.0f, T{})));
  expect_equal("products", cpp, floats(cuda), tolerance);
}

}  // namespace

int main() {
  for (const std::int64_t rows : {0, 1, 2, 3, 8, 17}) {
    for (const std::int64_t outs : {1, 13}) {
      for (const std::int64_t width : {1, 31, 576, 1040}) {
        compare<float>(rows, outs, width, 1e-3);
        compare<fuse::BFloat16>(rows, outs, width, 1e-2);
      }
    }
  }
  return num_differences > 0;
}
