// Compares the functions of gae.cu, run by cuda_emulation.h, with those of gae.cc; prints every difference.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "differences.h"
#include "tensor/gae.h"
#include "tensor/gae_cuda.h"

namespace {

// Results are equal to the bit, sums to the order in which lanes add up.
template <typename T>
void compare(const std::vector<std::int64_t>& lengths, std::int64_t width, bool is_k3) {
  std::mt19937 generator(7);
  std::normal_distribution<double> normal;
  const auto draw = [&](std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    for (T& value : values) value = static_cast<T>(normal(generator));
    return values;
  };
  std::vector<std::int64_t> tokens{0}, values{0};
  for (const std::int64_t length : lengths) {
    tokens.push_back(tokens.back() + length);
    values.push_back(values.back() + std::min(length + 1, width));
  }
  const auto num_samples = static_cast<std::int64_t>(lengths.size());
  const auto logprobs = draw(tokens.back()), reference = draw(tokens.back()), scores = draw(num_samples);
  const auto value = draw(values.back()), rewards = draw(2 * values.back());
  const fuse::Responses<T> responses{logprobs.data(), reference.data(), scores.data(), value.data(),
                                     tokens.data(),   values.data(),    num_samples};
  const fuse::RewardRule rule{0.3, is_k3, 0.1, 1.7};
  constexpr double kGamma = 0.97, kLambda = 0.9;

  struct Results {
    std::vector<T> advantages, returns, kl;
    std::vector<double> sums;
  };
  const auto room = [&] {
    return Results{draw(values.back()), draw(values.back()), draw(tokens.back()),
                   std::vector<double>(2 * lengths.size())};
  };
  Results cpp = room(), cuda = room();

  fuse::gae<T>({rewards.data(), 2}, {value.data(), 1}, values.data(), num_samples, kGamma, kLambda,
               cpp.advantages.data(), cpp.returns.data());
  fuse::cuda::gae<T>({rewards.data(), 2}, {value.data(), 1}, values.data(), num_samples, kGamma, kLambda,
                     cuda.advantages.data(), cuda.returns.data(), 0);
  expect_equal("gae advantages", cpp.advantages, cuda.advantages, 0);
  expect_equal("gae returns", cpp.returns, cuda.returns, 0);

  fuse::reward_sums(responses, rule, cpp.sums.data());
  fuse::cuda::reward_sums(responses, rule, cuda.sums.data(), 0);
  expect_equal("sums of rewards", cpp.sums, cuda.sums, 1e-12);

  cpp.advantages.resize(logprobs.size());
  cuda.advantages.resize(logprobs.size());
  fuse::shaped_gae(responses, rule, kGamma, kLambda, cpp.kl.data(), cpp.advantages.data(), cpp.returns.data(),
                   cpp.sums.data());
  fuse::cuda::shaped_gae(responses, rule, kGamma, kLambda, cuda.kl.data(), cuda.advantages.data(), cuda.returns.data(),
                         cuda.sums.data(), 0);
  expect_equal("KL estimates", cpp.kl, cuda.kl, 0);
  expect_equal("advantages", cpp.advantages, cuda.advantages, 0);
  expect_equal("returns", cpp.returns, cuda.returns, 0);
  expect_equal("sums of advantages", cpp.sums, cuda.sums, 1e-12);
}

}  // namespace

int main() {
  const std::vector<std::vector<std::int64_t>> batches{{5}, {0, 4, 0, 2}, {0, 129, 64, 1, 32, 33}, {31, 32, 33, 63}};
  for (const auto& lengths : batches) {
    const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    for (const bool is_k3 : {false, true}) {
      compare<float>(lengths, longest, is_k3);
      compare<double>(lengths, longest + 1, is_k3);
    }
  }
  return num_differences > 0;
}
