#include "tensor/linear_logprob.h"

#include <algorithm>
#include <cmath>

#include "tensor/vector_math.h"

namespace fuse {
namespace {

template <class Floats>
FUSE_INLINE Floats read(const float* values) {
  return load<Floats>(values);
}

template <class Floats>
using HalvesOf = typename VectorOf<std::uint16_t, kLanes<Floats>>::Type;

template <class Floats>
FUSE_INLINE Floats read(const BFloat16* values) {
  using Words = typename WordsOf<Floats>::Type;
  return bit_cast<Floats>(__builtin_convertvector(load<HalvesOf<Floats>>(values), Words) << 16);
}

template <class Floats>
FUSE_INLINE void write(float* values, const Floats& from) {
  store(values, from);
}

template <class Floats>
FUSE_INLINE void write(BFloat16* values, const Floats& from) {
  const auto halves = __builtin_convertvector(bfloat16_bits(from), HalvesOf<Floats>);
  std::memcpy(values, &halves, sizeof(halves));
}

// The first `count` values; the other lanes repeat the first.
template <class Floats, typename T>
FUSE_INLINE Floats read_some(const T* values, std::int64_t count) {
  T lanes[kLanes<Floats>];
  std::memcpy(lanes, values, static_cast<std::size_t>(count) * sizeof(T));
  std::fill(lanes + count, lanes + kLanes<Floats>, values[0]);
  return read<Floats>(lanes);
}

template <class Floats, typename T>
FUSE_INLINE void write_some(T* values, const Floats& from, std::int64_t count) {
  T lanes[kLanes<Floats>];
  write(lanes, from);
  std::memcpy(values, lanes, static_cast<std::size_t>(count) * sizeof(T));
}

struct Sums {
  double total;
  double moment;
};

template <class Floats, typename T>
FUSE_INLINE double block_maximum(const T* logits, std::int64_t count) {
  Floats highest = all<Floats>(kLowest);
  std::int64_t i = 0;
  for (; i + kLanes<Floats> <= count; i += kLanes<Floats>) {
    const Floats next = read<Floats>(logits + i);
    highest = next > highest ? next : highest;
  }
  if (i < count) {
    const Floats next = read_some<Floats>(logits + i, count - i);
    highest = next > highest ? next : highest;
  }
  return max_of(highest);
}

// Of kLogprobLanes lanes, in as many registers as they take: on every processor the same sums, and on a GPU.
template <class Floats, typename T>
FUSE_INLINE Sums block_sums(const T* logits, std::int64_t count, double maximum, double temperature) {
  constexpr int kRegisters = kLogprobLanes / kLanes<Floats>;
  const float scale = static_cast<float>(1.0 / temperature);
  Floats totals[kRegisters] = {}, moments[kRegisters] = {};
  const auto add = [&](int to, const Floats& own, std::int64_t num_own) FUSE_INLINED {
    const Floats shift = shifted(own, static_cast<float>(maximum), scale);
    Floats weights = exp_nonpositive(shift);
    for (std::int64_t lane = num_own; lane < kLanes<Floats>; ++lane) weights[lane] = 0.0f;
    totals[to] += weights;
    moments[to] += weights * shift;
  };
  std::int64_t i = 0;
  for (; i + kLogprobLanes <= count; i += kLogprobLanes) {
    for (int to = 0; to < kRegisters; ++to) add(to, read<Floats>(logits + i + to * kLanes<Floats>), kLanes<Floats>);
  }
  for (int to = 0; to < kRegisters && i < count; ++to, i += kLanes<Floats>) {
    const std::int64_t num_own = std::min<std::int64_t>(kLanes<Floats>, count - i);
    add(to, read_some<Floats>(logits + i, num_own), num_own);
  }
  return {sum_of(totals), sum_of(moments)};
}

// logits = exp(shift) (constant + slope shift)
template <class Floats, typename T>
FUSE_INLINE void block_gradient(T* logits, std::int64_t count, double maximum, double temperature, double constant,
                                double slope) {
  const float scale = static_cast<float>(1.0 / temperature);
  const float base = static_cast<float>(constant);
  const float rise = static_cast<float>(slope);
  std::int64_t i = 0;
  for (; i + kLanes<Floats> <= count; i += kLanes<Floats>) {
    const Floats shift = shifted(read<Floats>(logits + i), static_cast<float>(maximum), scale);
    write(logits + i, gradient_at(shift, base, rise));
  }
  if (i < count) {
    const Floats shift = shifted(read_some<Floats>(logits + i, count - i), static_cast<float>(maximum), scale);
    write_some(logits + i, gradient_at(shift, base, rise), count - i);
  }
}

FUSE_INLINE double to_double(float value) { return value; }
FUSE_INLINE double to_double(double value) { return value; }
FUSE_INLINE double to_double(BFloat16 value) { return to_float(value); }

FUSE_INLINE void from_double(double value, float* to) { *to = static_cast<float>(value); }
FUSE_INLINE void from_double(double value, double* to) { *to = value; }
FUSE_INLINE void from_double(double value, BFloat16* to) {
  to->bits = static_cast<std::uint16_t>(bfloat16_bits(static_cast<float>(value)));
}

// The same in double precision, for gradients checked by finite differences: `Float` is double.

FUSE_INLINE double shifted(double logit, double maximum, double temperature) {
  const double shift = (logit - maximum) / temperature;
  return shift < -700.0 ? -700.0 : shift;
}

template <class Float>
FUSE_INLINE double block_maximum(const double* logits, std::int64_t count) {
  return *std::max_element(logits, logits + count);
}

template <class Float>
FUSE_INLINE Sums block_sums(const double* logits, std::int64_t count, double maximum, double temperature) {
  Sums sums{};
  for (std::int64_t i = 0; i < count; ++i) {
    const double shift = shifted(logits[i], maximum, temperature);
    sums.total += std::exp(shift);
    sums.moment += std::exp(shift) * shift;
  }
  return sums;
}

template <class Float>
FUSE_INLINE void block_gradient(double* logits, std::int64_t count, double maximum, double temperature, double constant,
                                double slope) {
  for (std::int64_t i = 0; i < count; ++i) {
    const double shift = shifted(logits[i], maximum, temperature);
    logits[i] = std::exp(shift) * (constant + slope * shift);
  }
}

template <class Float, typename T>
FUSE_INLINE void accumulate(const LogitChunk<const T>& chunk, const std::int64_t* targets, double temperature,
                            const LogprobStatistics<double>& statistics) {
  for (std::int64_t row = 0; row < chunk.rows; ++row) {
    const T* logits = chunk.data + row * chunk.row_stride;
    LogprobSums sums{statistics.maximum(row), statistics.total(row), statistics.moment(row)};
    for (std::int64_t first = 0; first < chunk.columns; first += kLogprobBlock) {
      const std::int64_t count = std::min(kLogprobBlock, chunk.columns - first);
      raise_maximum(block_maximum<Float>(logits + first, count), temperature, &sums);
      const Sums more = block_sums<Float>(logits + first, count, sums.maximum, temperature);
      sums.total += more.total;
      sums.moment += more.moment;
    }
    statistics.maximum(row) = sums.maximum;
    statistics.total(row) = sums.total;
    statistics.moment(row) = sums.moment;
    const std::int64_t column = targets[row] - chunk.first_token;
    if (column >= 0 && column < chunk.columns) statistics.target(row) = to_double(logits[column]);
  }
}

template <class Float, typename T>
FUSE_INLINE void differentiate(const LogitChunk<T>& chunk, const std::int64_t* targets, double temperature,
                               const LogprobStatistics<const double>& statistics, const double* logprob_grads,
                               const double* entropy_grads) {
  for (std::int64_t row = 0; row < chunk.rows; ++row) {
    T* logits = chunk.data + row * chunk.row_stride;
    const LogprobSums sums{statistics.maximum(row), statistics.total(row), statistics.moment(row)};
    const LogitGradient gradient = logit_gradient(sums, temperature, logprob_grads[row], entropy_grads[row]);
    const std::int64_t column = targets[row] - chunk.first_token;
    const bool has_target = column >= 0 && column < chunk.columns;
    const double target_grad =
        has_target ? target_gradient(to_double(logits[column]), sums, temperature, gradient, logprob_grads[row]) : 0.0;
    for (std::int64_t first = 0; first < chunk.columns; first += kLogprobBlock) {
      const std::int64_t count = std::min(kLogprobBlock, chunk.columns - first);
      block_gradient<Float>(logits + first, count, sums.maximum, temperature, gradient.constant, gradient.slope);
    }
    if (has_target) from_double(target_grad, logits + column);
  }
}

}  // namespace

void accumulate_logprob(LogitChunk<const float> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics) {
  vectorized([&]<class Floats>(const Floats&)
                 FUSE_INLINED { accumulate<Floats>(chunk, targets, temperature, statistics); });
}

void accumulate_logprob(LogitChunk<const BFloat16> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics) {
  vectorized([&]<class Floats>(const Floats&)
                 FUSE_INLINED { accumulate<Floats>(chunk, targets, temperature, statistics); });
}

void accumulate_logprob(LogitChunk<const double> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics) {
  accumulate<double>(chunk, targets, temperature, statistics);
}

void logprob_gradient(LogitChunk<float> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    differentiate<Floats>(chunk, targets, temperature, statistics, logprob_grads, entropy_grads);
  });
}

void logprob_gradient(LogitChunk<BFloat16> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads) {
  vectorized([&]<class Floats>(const Floats&) FUSE_INLINED {
    differentiate<Floats>(chunk, targets, temperature, statistics, logprob_grads, entropy_grads);
  });
}

void logprob_gradient(LogitChunk<double> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads) {
  differentiate<double>(chunk, targets, temperature, statistics, logprob_grads, entropy_grads);
}

}  // namespace fuse
