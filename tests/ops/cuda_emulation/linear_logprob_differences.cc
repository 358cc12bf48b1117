// Compares the functions of linear_logprob.cu, run by cuda_emulation.h, with those of linear_logprob.cc, bit for bit;
// prints every difference.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "differences.h"
#include "tensor/linear_logprob.h"
#include "tensor/linear_logprob_cuda.h"
#include "values.h"

namespace {

// Rows in chunks of so many columns each, whose largest logits grow from chunk to chunk in every other row.
template <typename T>
void compare(std::int64_t rows, const std::vector<std::int64_t>& widths, double temperature) {
  std::mt19937 generator(7);
  std::normal_distribution<double> normal;
  constexpr std::int64_t kGap = 3;
  std::int64_t vocab_size = 0;
  for (const std::int64_t width : widths) vocab_size += width;
  std::vector<std::int64_t> targets;
  for (std::int64_t row = 0; row < rows; ++row) targets.push_back((row * 977 + vocab_size - 1) % vocab_size);

  std::vector<double> cpp(static_cast<std::size_t>(4 * rows)), logprob_grads, entropy_grads;
  for (std::int64_t row = 0; row < rows; ++row) {
    cpp[static_cast<std::size_t>(row)] = std::numeric_limits<float>::lowest();
    logprob_grads.push_back(normal(generator));
    entropy_grads.push_back(normal(generator));
  }
  std::vector<double> cuda = cpp;
  std::vector<std::vector<T>> chunks;
  std::int64_t first_token = 0;
  for (const std::int64_t width : widths) {
    std::vector<T> logits(static_cast<std::size_t>(rows * (width + kGap)));
    for (std::int64_t i = 0; i < rows * (width + kGap); ++i) {
      const std::int64_t row = i / (width + kGap), column = i % (width + kGap);
      double logit = 5 * normal(generator) + (row % 2 ? 1e-3 : -1e-3) * static_cast<double>(first_token + column);
      if (column % 97 == 96) logit = -std::numeric_limits<double>::infinity();
      if (column % 89 == 88) logit *= 100;
      logits[static_cast<std::size_t>(i)] = of(static_cast<float>(logit), T{});
    }
    const fuse::LogitChunk<const T> chunk{logits.data(), width + kGap, rows, width, first_token};
    fuse::accumulate_logprob(chunk, targets.data(), temperature, {cpp.data(), rows});
    fuse::cuda::accumulate_logprob(chunk, targets.data(), temperature, {cuda.data(), rows}, 0);
    chunks.push_back(logits);
    first_token += width;
  }
  expect_equal("statistics", cpp, cuda, 0);

  first_token = 0;
  for (std::size_t i = 0; i < widths.size(); ++i) {
    std::vector<T> ours = chunks[i], theirs = chunks[i];
    fuse::logprob_gradient({ours.data(), widths[i] + kGap, rows, widths[i], first_token}, targets.data(), temperature,
                           {cpp.data(), rows}, logprob_grads.data(), entropy_grads.data());
    fuse::cuda::logprob_gradient<T>({theirs.data(), widths[i] + kGap, rows, widths[i], first_token}, targets.data(),
                                    temperature, {cpp.data(), rows}, logprob_grads.data(), entropy_grads.data(), 0);
    expect_equal("gradients", floats(ours), floats(theirs), 0);
    first_token += widths[i];
  }
}

template <typename T>
void compare_all() {
  compare<T>(2, {1}, 1.0);
  compare<T>(3, {5, 17, 1}, 0.7);
  compare<T>(2, {1024, 2048, 1031}, 1.0);
  compare<T>(2, {16 * 1024 + 1, 1000}, 1.3);
  compare<T>(2, {35 * 1024 + 33}, 0.7);
}

}  // namespace

int main() {
  compare_all<float>();
  compare_all<fuse::BFloat16>();
  return num_differences > 0;
}
