#include "tensor/gae.h"

namespace fuse {

template <typename T>
void gae(Strided<const T> rewards, Strided<const T> values, const std::int64_t* offsets, std::int64_t num_samples,
         double gamma, double lambda, T* advantages, T* returns) {
  const Discounts<T> discounts{static_cast<T>(gamma), static_cast<T>(gamma * lambda)};
  for (std::int64_t sample = 0; sample < num_samples; ++sample) {
    T next_value = 0;
    T advantage = 0;
    for (std::int64_t row = offsets[sample + 1] - 1; row >= offsets[sample]; --row) {
      const T value = values[row];
      advantage = advantage_of(temporal_difference(rewards[row], value, next_value, discounts), advantage, discounts);
      advantages[row] = advantage;
      returns[row] = advantage + value;
      next_value = value;
    }
  }
}

template <typename T>
void reward_sums(const Responses<T>& responses, const RewardRule& rule, double* sums) {
  for (std::int64_t sample = 0; sample < responses.num_samples; ++sample) {
    const std::int64_t first_token = responses.token_offsets[sample];
    const std::int64_t num_tokens = responses.token_offsets[sample + 1] - first_token;
    const std::int64_t num_values = responses.value_offsets[sample + 1] - responses.value_offsets[sample];
    double sum = 0.0, square = 0.0;
    for (std::int64_t position = 0; position < num_values; ++position) {
      const std::int64_t token = first_token + position;
      const T kl = position < num_tokens
                       ? kl_of(responses.logprobs[token], responses.reference_logprobs[token], rule.is_k3)
                       : T(0);
      const double reward = raw_reward(kl, responses.scores[sample], position, num_tokens, num_values, rule);
      sum += reward;
      square += reward * reward;
    }
    sums[2 * sample] = sum;
    sums[2 * sample + 1] = square;
  }
}

template <typename T>
void shaped_gae(const Responses<T>& responses, const RewardRule& rule, double gamma, double lambda, T* kl,
                T* advantages, T* returns, double* sums) {
  const Discounts<T> discounts{static_cast<T>(gamma), static_cast<T>(gamma * lambda)};
  for (std::int64_t sample = 0; sample < responses.num_samples; ++sample) {
    const std::int64_t first_token = responses.token_offsets[sample];
    const std::int64_t first_value = responses.value_offsets[sample];
    const std::int64_t num_tokens = responses.token_offsets[sample + 1] - first_token;
    const std::int64_t num_values = responses.value_offsets[sample + 1] - first_value;
    T next_value = 0;
    T advantage = 0;
    double sum = 0.0, square = 0.0;
    for (std::int64_t position = num_values - 1; position >= 0; --position) {
      const std::int64_t token = first_token + position;
      const bool is_token = position < num_tokens;
      const T token_kl =
          is_token ? kl_of(responses.logprobs[token], responses.reference_logprobs[token], rule.is_k3) : T(0);
      const T reward =
          whitened(raw_reward(token_kl, responses.scores[sample], position, num_tokens, num_values, rule), rule);
      const T value = responses.values[first_value + position];
      advantage = advantage_of(temporal_difference(reward, value, next_value, discounts), advantage, discounts);
      returns[first_value + position] = advantage + value;
      next_value = value;
      if (is_token) {
        kl[token] = token_kl;
        advantages[token] = advantage;
        sum += advantage;
        square += static_cast<double>(advantage) * advantage;
      }
    }
    sums[2 * sample] = sum;
    sums[2 * sample + 1] = square;
  }
}

template void gae<float>(Strided<const float>, Strided<const float>, const std::int64_t*, std::int64_t, double, double,
                         float*, float*);
template void gae<double>(Strided<const double>, Strided<const double>, const std::int64_t*, std::int64_t, double,
                          double, double*, double*);
template void reward_sums<float>(const Responses<float>&, const RewardRule&, double*);
template void reward_sums<double>(const Responses<double>&, const RewardRule&, double*);
template void shaped_gae<float>(const Responses<float>&, const RewardRule&, double, double, float*, float*, float*,
                                double*);
template void shaped_gae<double>(const Responses<double>&, const RewardRule&, double, double, double*, double*, double*,
                                 double*);

}  // namespace fuse
