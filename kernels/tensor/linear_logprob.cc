#include "tensor/linear_logprob.h"

#include <algorithm>
#include <cmath>

#include "tensor/vector_math.h"

namespace fuse {
namespace {

static_assert(kLanes == kLogprobLanes);

FUSE_INLINE Floats read(const float* values) { return load(values); }

FUSE_INLINE Floats read(const BFloat16* values) {
  typedef std::uint16_t Halves __attribute__((vector_size(32)));
  Halves halves;
  std::memcpy(&halves, values, sizeof(halves));
  return bit_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

FUSE_INLINE void write(float* values, const Floats& from) { store(values, from); }

FUSE_INLINE void write(BFloat16* values, const Floats& from) {
  typedef std::uint16_t Halves __attribute__((vector_size(32)));
  const Halves halves = __builtin_convertvector(bfloat16_bits(from), Halves);
  std::memcpy(values, &halves, sizeof(halves));
}

// The first `count` values; the other lanes repeat the first.
template <typename T>
FUSE_INLINE Floats read_some(const T* values, std::int64_t count) {
  T lanes[kLanes];
  std::memcpy(lanes, values, static_cast<std::size_t>(count) * sizeof(T));
  std::fill(lanes + count, lanes + kLanes, values[0]);
  return read(lanes);
}

template <typename T>
FUSE_INLINE void write_some(T* values, const Floats& from, std::int64_t count) {
  T lanes[kLanes];
  write(lanes, from);
  std::memcpy(values, lanes, static_cast<std::size_t>(count) * sizeof(T));
}

struct Sums {
  double total;
  double moment;
};

template <typename T>
FUSE_INLINE double block_maximum(const T* logits, std::int64_t count) {
  Floats highest = all(kLowest);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats next = read(logits + i);
    highest = next > highest ? next : highest;
  }
  if (i < count) {
    const Floats next = read_some(logits + i, count - i);
    highest = next > highest ? next : highest;
  }
  return max_of(highest);
}

template <typename T>
FUSE_INLINE Sums block_sums(const T* logits, std::int64_t count, double maximum, double temperature) {
  const float scale = static_cast<float>(1.0 / temperature);
  Floats totals{}, moments{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats shift = shifted(read(logits + i), static_cast<float>(maximum), scale);
    const Floats weights = exp_nonpositive(shift);
    totals += weights;
    moments += weights * shift;
  }
  if (i < count) {
    const Floats shift = shifted(read_some(logits + i, count - i), static_cast<float>(maximum), scale);
    Floats weights = exp_nonpositive(shift);
    for (std::int64_t lane = count - i; lane < kLanes; ++lane) weights[lane] = 0.0f;
    totals += weights;
    moments += weights * shift;
  }
  return {sum_of(totals), sum_of(moments)};
}

// logits = exp(shift) (constant + slope shift)
template <typename T>
FUSE_INLINE void block_gradient(T* logits, std::int64_t count, double maximum, double temperature, double constant,
                                double slope) {
  const float scale = static_cast<float>(1.0 / temperature);
  const float base = static_cast<float>(constant);
  const float rise = static_cast<float>(slope);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats shift = shifted(read(logits + i), static_cast<float>(maximum), scale);
    write(logits + i, gradient_at(shift, base, rise));
  }
  if (i < count) {
    const Floats shift = shifted(read_some(logits + i, count - i), static_cast<float>(maximum), scale);
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

// The same in double precision, for gradients checked by finite differences.

FUSE_INLINE double shifted(double logit, double maximum, double temperature) {
  const double shift = (logit - maximum) / temperature;
  return shift < -700.0 ? -700.0 : shift;
}

FUSE_INLINE double block_maximum(const double* logits, std::int64_t count) {
  return *std::max_element(logits, logits + count);
}

FUSE_INLINE Sums block_sums(const double* logits, std::int64_t count, double maximum, double temperature) {
  Sums sums{};
  for (std::int64_t i = 0; i < count; ++i) {
    const double shift = shifted(logits[i], maximum, temperature);
    sums.total += std::exp(shift);
    sums.moment += std::exp(shift) * shift;
  }
  return sums;
}

FUSE_INLINE void block_gradient(double* logits, std::int64_t count, double maximum, double temperature, double constant,
                                double slope) {
  for (std::int64_t i = 0; i < count; ++i) {
    const double shift = shifted(logits[i], maximum, temperature);
    logits[i] = std::exp(shift) * (constant + slope * shift);
  }
}

template <typename T>
FUSE_INLINE void accumulate(const LogitChunk<const T>& chunk, const std::int64_t* targets, double temperature,
                            const LogprobStatistics<double>& statistics) {
  for (std::int64_t row = 0; row < chunk.rows; ++row) {
    const T* logits = chunk.data + row * chunk.row_stride;
    LogprobSums sums{statistics.maximum(row), statistics.total(row), statistics.moment(row)};
    for (std::int64_t first = 0; first < chunk.columns; first += kLogprobBlock) {
      const std::int64_t count = std::min(kLogprobBlock, chunk.columns - first);
      raise_maximum(block_maximum(logits + first, count), temperature, &sums);
      const Sums more = block_sums(logits + first, count, sums.maximum, temperature);
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

template <typename T>
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
      block_gradient(logits + first, count, sums.maximum, temperature, gradient.constant, gradient.slope);
    }
    if (has_target) from_double(target_grad, logits + column);
  }
}

}  // namespace

FUSE_VECTORIZED
void accumulate_logprob(LogitChunk<const float> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics) {
  accumulate(chunk, targets, temperature, statistics);
}

FUSE_VECTORIZED
void accumulate_logprob(LogitChunk<const BFloat16> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics) {
  accumulate(chunk, targets, temperature, statistics);
}

void accumulate_logprob(LogitChunk<const double> chunk, const std::int64_t* targets, double temperature,
                        LogprobStatistics<double> statistics) {
  accumulate(chunk, targets, temperature, statistics);
}

FUSE_VECTORIZED
void logprob_gradient(LogitChunk<float> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads) {
  differentiate(chunk, targets, temperature, statistics, logprob_grads, entropy_grads);
}

FUSE_VECTORIZED
void logprob_gradient(LogitChunk<BFloat16> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads) {
  differentiate(chunk, targets, temperature, statistics, logprob_grads, entropy_grads);
}

void logprob_gradient(LogitChunk<double> chunk, const std::int64_t* targets, double temperature,
                      LogprobStatistics<const double> statistics, const double* logprob_grads,
                      const double* entropy_grads) {
  differentiate(chunk, targets, temperature, statistics, logprob_grads, entropy_grads);
}

}  // namespace fuse
