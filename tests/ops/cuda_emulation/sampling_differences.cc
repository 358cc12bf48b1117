// Compares sample of sampling.cu, run by cuda_emulation.h, with that of sampling.cc; prints every difference.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "differences.h"
#include "tensor/sampling.h"
#include "tensor/sampling_cuda.h"
#include "values.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::vector<float> kTemperatures{0.0f, 1.0f, 0.1f, 0.0f, 0.7f, 1.3f, 50.0f};

// Not a number is equal to itself here.
std::vector<float> shown(std::vector<float> values) {
  for (float& value : values) value = std::isnan(value) ? 12345.0f : value;
  return values;
}

// Rows of `width` tokens, of which the first has many equal logits, the second starts and the third ends with tokens
// that cannot be drawn, of the fourth none can, and the last has a logit that is not a number.
template <typename T>
void compare(std::int64_t width) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  const auto rows = static_cast<std::int64_t>(kTemperatures.size());
  const std::int64_t stride = width + 3;
  std::vector<T> logits;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t token = 0; token < stride; ++token) {
      float logit = 4 * normal(generator);
      if (row == 0) logit = token % 5 == 3 ? 1.0f : std::min(logit, 1.0f);
      if (row == 1 && token < width / 2) logit = -kInfinity;
      if (row == 2 && token > width / 2) logit = -kInfinity;
      if (row == 3) logit = -kInfinity;
      if (row == rows - 1 && token == width / 3) logit = std::nanf("");
      if (token >= width) logit = 1000.0f;  // of no token
      logits.push_back(of(logit, T{}));
    }
  }
  std::vector<float> floats;
  for (const T& logit : logits) floats.push_back(fuse::to_float(logit));

  for (std::int64_t position = 0; position < 2; ++position) {
    std::vector<std::int64_t> seeds, samples, positions, cpp(rows), cuda(rows, -1);
    for (std::int64_t row = 0; row < rows; ++row) {
      seeds.push_back(row - 3);
      samples.push_back(5 * row);
      positions.push_back(position);
    }
    const fuse::NoiseKeys keys{seeds.data(), samples.data(), positions.data()};
    std::vector<float> cpp_logprobs(rows), cuda_logprobs(rows);
    fuse::sample(floats.data(), stride, rows, width, kTemperatures.data(), keys, cpp.data(), cpp_logprobs.data());
    fuse::cuda::sample<T>(logits.data(), stride, rows, width, kTemperatures.data(), keys, cuda.data(),
                          cuda_logprobs.data(), 0);
    expect_equal("tokens", cpp, cuda, 0);
    expect_equal("log-probabilities", shown(cpp_logprobs), shown(cuda_logprobs), 2e-6);
  }
}

}  // namespace

int main() {
  for (const std::int64_t width : {1, 2, 63, 64, 1023, 1025, 4099, 32'000}) {
    compare<float>(width);
    compare<fuse::BFloat16>(width);
    if (num_differences > 0) break;  // the widest take longest
  }
  return num_differences > 0;
}
