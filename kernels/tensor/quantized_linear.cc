#include "tensor/quantized_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tensor/vector_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fuse {
namespace {

constexpr std::int64_t kBlock = 2048;   // products that 32 bits add up: 127 * 32767 * 2048 / 8 lanes < 2^31
constexpr std::int64_t kOuts = 3;       // weight rows side by side, for one load of an input; sums stay in registers
constexpr std::int64_t kAhead = 16384;  // bytes of weights to fetch beforehand, across the rows that end meanwhile
constexpr std::int64_t kHalf = kInt4Group / 2;

// Of one row and those behind it, `width` apart.
struct Inputs {
  const std::int16_t* values;
  const float* group_sums;  // of each kInt4Group values
  std::int64_t width;

  Inputs from(std::int64_t row) const { return {values + row * width, group_sums + row * (width / kInt4Group), width}; }
};

// `width` elements of each row, rounded to 16 bits of its largest, and zeros up to whole groups.
class RoundedRows {
 public:
  RoundedRows(const float* inputs, std::int64_t rows, std::int64_t width)
      : width_((width + kInt4Group - 1) / kInt4Group * kInt4Group),
        values_(static_cast<std::size_t>(rows * width_)),
        group_sums_(static_cast<std::size_t>(rows * width_ / kInt4Group)),
        units_(static_cast<std::size_t>(rows)) {
    for (std::int64_t row = 0; row < rows; ++row) {
      units_[row] = round(inputs + row * width, width, &values_[row * width_]);
    }
    for (std::size_t group = 0; group < group_sums_.size(); ++group) {
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < kInt4Group; ++i) sum += values_[group * kInt4Group + i];
      group_sums_[group] = static_cast<float>(sum);
    }
  }

  Inputs inputs() const { return {values_.data(), group_sums_.data(), width_}; }

  // What one unit of a row's values stands for.
  float unit(std::int64_t row) const { return units_[row]; }

 private:
  static float round(const float* inputs, std::int64_t width, std::int16_t* rounded) {
    float largest = 0.0f;
    for (std::int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(inputs[i]));
    const float units = largest > 0.0f ? 32767.0f / largest : 0.0f;
    for (std::int64_t i = 0; i < width; ++i) {
      const float value = inputs[i] * units;
      rounded[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(value + std::copysign(0.5f, value)));
    }
    return largest / 32767.0f;
  }

  std::int64_t width_;
  std::vector<std::int16_t> values_;
  std::vector<float> group_sums_, units_;
};

Int8Weights from(const Int8Weights& weights, std::int64_t out, std::int64_t width) {
  return {weights.values + out * width, weights.scales + out};
}

Int4Weights from(const Int4Weights& weights, std::int64_t out, std::int64_t width) {
  const std::int64_t groups = (width + kInt4Group - 1) / kInt4Group;
  return {weights.values + out * groups * kHalf, weights.ranges + out * groups};
}

// Sums of the first `outs` weight rows with the first `rows` inputs, [rows, outs].
template <class Weights>
using Dots = void (*)(const Inputs& inputs, const Weights& weights, std::int64_t width, float* sums);

// Of the elements from `first` on, without scales.
template <int rows, int outs>
void unscaled_dots(const Inputs& inputs, const std::int8_t* weights, std::int64_t first, std::int64_t width,
                   float* sums) {
  for (int row = 0; row < rows; ++row) {
    for (int out = 0; out < outs; ++out) {
      std::int64_t sum = 0;
      for (std::int64_t i = first; i < width; ++i) {
        sum += inputs.values[row * inputs.width + i] * weights[out * width + i];
      }
      sums[row * outs + out] = static_cast<float>(sum);
    }
  }
}

template <int rows, int outs>
void scale(const float* scales, float* sums) {
  for (int i = 0; i < rows * outs; ++i) sums[i] *= scales[i % outs];
}

template <int rows, int outs>
void dots(const Inputs& inputs, const Int8Weights& weights, std::int64_t width, float* sums) {
  unscaled_dots<rows, outs>(inputs, weights.values, 0, width, sums);
  scale<rows, outs>(weights.scales, sums);
}

template <int rows, int outs>
void dots(const Inputs& inputs, const Int4Weights& weights, std::int64_t, float* sums) {
  const std::int64_t groups = inputs.width / kInt4Group;
  for (int row = 0; row < rows; ++row) {
    for (int out = 0; out < outs; ++out) {
      float sum = 0.0f;
      for (std::int64_t group = 0; group < groups; ++group) {
        const std::int16_t* own = inputs.values + row * inputs.width + group * kInt4Group;
        const std::uint8_t* values = weights.values + (out * groups + group) * kHalf;
        const auto& [minimum, unit] = weights.ranges[out * groups + group];
        std::int32_t dot = 0;
        for (std::int64_t i = 0; i < kHalf; ++i) dot += own[i] * (values[i] & 15) + own[i + kHalf] * (values[i] >> 4);
        sum += to_float(unit) * static_cast<float>(dot) + to_float(minimum) * inputs.group_sums[row * groups + group];
      }
      sums[row * outs + out] = sum;
    }
  }
}

#if defined(__x86_64__)
FUSE_AVX2 inline __m256i load(const void* values) { return _mm256_loadu_si256(static_cast<const __m256i*>(values)); }

FUSE_AVX2 inline __m128i load_half(const void* values) { return _mm_loadu_si128(static_cast<const __m128i*>(values)); }

// Into the second level's cache: the first has no room for them beside inputs.
FUSE_AVX2 inline void fetch(const void* weights) {
  _mm_prefetch(static_cast<const char*>(weights) + kAhead, _MM_HINT_T1);
}

template <int rows, int outs>
FUSE_AVX2 void dots_avx2(const Inputs& inputs, const Int8Weights& weights, std::int64_t width, float* sums) {
  for (int i = 0; i < rows * outs; ++i) sums[i] = 0.0f;
  std::int64_t first = 0;
  while (first + 16 <= width) {
    const std::int64_t end = std::min(first + kBlock, width / 16 * 16);
    __m256i lanes[rows * outs];
    for (int i = 0; i < rows * outs; ++i) lanes[i] = _mm256_setzero_si256();
    for (std::int64_t i = first; i < end; i += 16) {
      fetch(weights.values + i * outs);
      for (int out = 0; out < outs; ++out) {
        const __m256i wide = _mm256_cvtepi8_epi16(load_half(weights.values + out * width + i));
        for (int row = 0; row < rows; ++row) {
          const __m256i products = _mm256_madd_epi16(wide, load(inputs.values + row * inputs.width + i));
          lanes[row * outs + out] = _mm256_add_epi32(lanes[row * outs + out], products);
        }
      }
    }
    for (int i = 0; i < rows * outs; ++i) sums[i] += sum_of(_mm256_cvtepi32_ps(lanes[i]));
    first = end;
  }
  if (first < width) {
    float rest[rows * outs];
    unscaled_dots<rows, outs>(inputs, weights.values, first, width, rest);
    for (int i = 0; i < rows * outs; ++i) sums[i] += rest[i];
  }
  scale<rows, outs>(weights.scales, sums);
}

// What groups' minima add to a sum, in lanes, for one row of inputs and one of weights.
FUSE_AVX2 inline __m256 products_of_minima(const float* group_sums, const Int4Range* ranges, std::int64_t groups) {
  __m256 lanes = _mm256_setzero_ps();
  for (std::int64_t group = 0; group < groups; group += 8) {
    const __m256i left = _mm256_set1_epi32(static_cast<int>(groups - group));
    const __m256i is_own = _mm256_cmpgt_epi32(left, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i own = _mm256_maskload_epi32(reinterpret_cast<const int*>(ranges + group), is_own);
    const __m256 minima = _mm256_castsi256_ps(_mm256_slli_epi32(own, 16));  // the lower halves
    lanes = _mm256_fmadd_ps(minima, _mm256_maskload_ps(group_sums + group, is_own), lanes);
  }
  return lanes;
}

template <int rows, int outs>
FUSE_AVX2 void dots_avx2(const Inputs& inputs, const Int4Weights& weights, std::int64_t, float* sums) {
  const std::int64_t groups = inputs.width / kInt4Group;
  __m256 lanes[rows * outs];
  for (int i = 0; i < rows * outs; ++i) {
    const float* group_sums = inputs.group_sums + i / outs * groups;
    lanes[i] = products_of_minima(group_sums, weights.ranges + i % outs * groups, groups);
  }
  const __m256 upper_halves = _mm256_castsi256_ps(_mm256_set1_epi32(-65536));
  for (std::int64_t group = 0; group < groups; ++group) {
    fetch(weights.values + group * kHalf * outs);
    for (int out = 0; out < outs; ++out) {
      const __m256i both = _mm256_cvtepu8_epi16(load_half(weights.values + (out * groups + group) * kHalf));
      const __m256i low = _mm256_and_si256(both, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(both, 4);
      float range;  // of which the lower half is the minimum
      std::memcpy(&range, weights.ranges + out * groups + group, sizeof(range));
      const __m256 unit = _mm256_and_ps(_mm256_set1_ps(range), upper_halves);
      for (int row = 0; row < rows; ++row) {
        const std::int16_t* own = inputs.values + row * inputs.width + group * kInt4Group;
        const __m256i products =
            _mm256_add_epi32(_mm256_madd_epi16(low, load(own)), _mm256_madd_epi16(high, load(own + kHalf)));
        __m256& sum = lanes[row * outs + out];
        sum = _mm256_fmadd_ps(unit, _mm256_cvtepi32_ps(products), sum);
      }
    }
  }
  for (int i = 0; i < rows * outs; ++i) sums[i] = sum_of(lanes[i]);
}
#endif

// For `rows` (1 or 2) and `outs` (1 or kOuts).
template <class Weights>
Dots<Weights> choose(std::int64_t rows, std::int64_t outs) {
#if defined(__x86_64__)
  constexpr Dots<Weights> avx2[2][2] = {{dots_avx2<1, 1>, dots_avx2<1, kOuts>}, {dots_avx2<2, 1>, dots_avx2<2, kOuts>}};
  if (has_avx2()) return avx2[rows - 1][outs == kOuts];
#endif
  constexpr Dots<Weights> portable[2][2] = {{dots<1, 1>, dots<1, kOuts>}, {dots<2, 1>, dots<2, kOuts>}};
  return portable[rows - 1][outs == kOuts];
}

template <class Weights>
void multiply(const float* inputs, const Weights& weights, std::int64_t rows, std::int64_t outs, std::int64_t width,
              float* output) {
  const RoundedRows rounded(inputs, rows, width);
  float sums[2 * kOuts];
  for (std::int64_t out = 0; out < outs;) {
    const std::int64_t num_outs = out + kOuts <= outs ? kOuts : 1;
    const Weights own = from(weights, out, width);
    for (std::int64_t row = 0; row < rows;) {
      const std::int64_t num_rows = row + 2 <= rows ? 2 : 1;
      choose<Weights>(num_rows, num_outs)(rounded.inputs().from(row), own, width, sums);
      for (std::int64_t r = 0; r < num_rows; ++r) {
        for (std::int64_t o = 0; o < num_outs; ++o) {
          output[(row + r) * outs + out + o] = rounded.unit(row + r) * sums[r * num_outs + o];
        }
      }
      row += num_rows;
    }
    out += num_outs;
  }
}

}  // namespace

void quantized_linear(const float* inputs, const Int8Weights& weights, std::int64_t rows, std::int64_t outs,
                      std::int64_t width, float* output) {
  multiply(inputs, weights, rows, outs, width, output);
}

void quantized_linear(const float* inputs, const Int4Weights& weights, std::int64_t rows, std::int64_t outs,
                      std::int64_t width, float* output) {
  multiply(inputs, weights, rows, outs, width, output);
}

}  // namespace fuse
