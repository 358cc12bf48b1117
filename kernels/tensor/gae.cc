#include "tensor/gae.h"

namespace fuse {

template <typename T>
void gae(Strided<const T> rewards, Strided<const T> values, const std::int64_t* offsets, std::int64_t num_samples,
         double gamma, double lambda, T* advantages, T* returns) {
  const T discount = static_cast<T>(gamma);
  const T decay = static_cast<T>(gamma * lambda);
  for (std::int64_t sample = 0; sample < num_samples; ++sample) {
    T next_value = 0;
    T advantage = 0;
    for (std::int64_t row = offsets[sample + 1] - 1; row >= offsets[sample]; --row) {
      const T value = values[row];
      const T delta = rewards[row] + discount * next_value - value;
      advantage = delta + decay * advantage;
      advantages[row] = advantage;
      returns[row] = advantage + value;
      next_value = value;
    }
  }
}

template void gae<float>(Strided<const float>, Strided<const float>, const std::int64_t*, std::int64_t, double, double,
                         float*, float*);
template void gae<double>(Strided<const double>, Strided<const double>, const std::int64_t*, std::int64_t, double,
                          double, double*, double*);

}  // namespace fuse
