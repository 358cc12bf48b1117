#include "tensor/int8_linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fuse {
namespace {

constexpr std::int64_t kBlock = 2048;  // products that 32 bits add up: 127 * 32767 * 2048 / 8 lanes < 2^31
constexpr std::int64_t kOuts = 4;      // weight rows side by side, for one load of an input
constexpr std::int64_t kAhead = 4096;  // bytes of weights to fetch beforehand, across the rows that end meanwhile

// Sums of `outs` weight rows with `rows` inputs, [rows, outs], over the first `count` of `width` elements.
using Dots = void (*)(const std::int16_t* inputs, const std::int8_t* weights, std::int64_t count, std::int64_t width,
                      float* sums);

template <int rows, int outs>
void dots(const std::int16_t* inputs, const std::int8_t* weights, std::int64_t count, std::int64_t width, float* sums) {
  for (int row = 0; row < rows; ++row) {
    for (int out = 0; out < outs; ++out) {
      std::int64_t sum = 0;
      for (std::int64_t i = 0; i < count; ++i) sum += inputs[row * width + i] * weights[out * width + i];
      sums[row * outs + out] = static_cast<float>(sum);
    }
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline float sum_of(__m256i lanes) {
  const __m256 values = _mm256_cvtepi32_ps(lanes);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <int rows, int outs>
__attribute__((target("avx2"))) void dots_avx2(const std::int16_t* inputs, const std::int8_t* weights,
                                               std::int64_t count, std::int64_t width, float* sums) {
  for (int i = 0; i < rows * outs; ++i) sums[i] = 0.0f;
  std::int64_t first = 0;
  while (first + 16 <= count) {
    const std::int64_t end = std::min(first + kBlock, count / 16 * 16);
    __m256i lanes[rows * outs];
    for (int i = 0; i < rows * outs; ++i) lanes[i] = _mm256_setzero_si256();
    for (std::int64_t i = first; i < end; i += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(weights + i * outs + kAhead), _MM_HINT_T0);
      for (int out = 0; out < outs; ++out) {
        const __m256i wide =
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + out * width + i)));
        for (int row = 0; row < rows; ++row) {
          const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inputs + row * width + i));
          lanes[row * outs + out] = _mm256_add_epi32(lanes[row * outs + out], _mm256_madd_epi16(wide, own));
        }
      }
    }
    for (int i = 0; i < rows * outs; ++i) sums[i] += sum_of(lanes[i]);
    first = end;
  }
  if (first == count) return;
  float rest[rows * outs];
  dots<rows, outs>(inputs + first, weights + first, count - first, width, rest);
  for (int i = 0; i < rows * outs; ++i) sums[i] += rest[i];
}
#endif

// For `rows` (1 or 2) and `outs` (1 or kOuts).
Dots choose(std::int64_t rows, std::int64_t outs) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    if (rows == 2) return outs == kOuts ? dots_avx2<2, kOuts> : dots_avx2<2, 1>;
    return outs == kOuts ? dots_avx2<1, kOuts> : dots_avx2<1, 1>;
  }
#endif
  if (rows == 2) return outs == kOuts ? dots<2, kOuts> : dots<2, 1>;
  return outs == kOuts ? dots<1, kOuts> : dots<1, 1>;
}

// Rounds a row to 16 bits; returns what one unit stands for.
float round_row(const float* inputs, std::int64_t width, std::int16_t* rounded) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(inputs[i]));
  const float units = largest > 0.0f ? 32767.0f / largest : 0.0f;
  for (std::int64_t i = 0; i < width; ++i) {
    const float value = inputs[i] * units;
    rounded[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(value + std::copysign(0.5f, value)));
  }
  return largest / 32767.0f;
}

}  // namespace

void int8_linear(const float* inputs, const std::int8_t* weights, const float* scales, std::int64_t rows,
                 std::int64_t outs, std::int64_t width, float* output) {
  std::vector<std::int16_t> rounded(static_cast<std::size_t>(rows * width));
  std::vector<float> units(static_cast<std::size_t>(rows));
  for (std::int64_t row = 0; row < rows; ++row) {
    units[row] = round_row(inputs + row * width, width, &rounded[row * width]);
  }
  float sums[2 * kOuts];
  for (std::int64_t out = 0; out < outs;) {
    const std::int64_t num_outs = out + kOuts <= outs ? kOuts : 1;
    for (std::int64_t row = 0; row < rows;) {
      const std::int64_t num_rows = row + 2 <= rows ? 2 : 1;
      choose(num_rows, num_outs)(&rounded[row * width], weights + out * width, width, width, sums);
      for (std::int64_t r = 0; r < num_rows; ++r) {
        for (std::int64_t o = 0; o < num_outs; ++o) {
          output[(row + r) * outs + out + o] = units[row + r] * scales[out + o] * sums[r * num_outs + o];
        }
      }
      row += num_rows;
    }
    out += num_outs;
  }
}

}  // namespace fuse
