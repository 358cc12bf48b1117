// Single-precision arithmetic on vectors of 16, in the compilers' own vector types: they become whatever registers the
// processor has, and fix the order of sums without -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>

// One binary for every x86-64: the loader picks the widest version of a function that the processor runs. By level, not
// by name: "arch=haswell" would ask for that very model.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSE_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FUSE_VECTORIZED
#endif
// Into its caller's version, whatever registers that has.
#define FUSE_INLINE inline __attribute__((always_inline))
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // on how such vectors are passed: never, everything here is inlined
#endif

namespace fuse {

constexpr std::int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));

template <typename To, typename From>
FUSE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

FUSE_INLINE Floats load(const float* values) {
  Floats result;
  std::memcpy(&result, values, sizeof(result));
  return result;
}

FUSE_INLINE Ints load(const std::int32_t* values) {
  Ints result;
  std::memcpy(&result, values, sizeof(result));
  return result;
}

FUSE_INLINE void store(float* values, const Floats& from) { std::memcpy(values, &from, sizeof(from)); }

FUSE_INLINE Floats all(float value) { return value - Floats{}; }

// e^x to 2 ulp for x <= 0; below -87 it stays at e^-87, about 1.6e-38. NaN stays NaN.
FUSE_INLINE Floats exp_nonpositive(const Floats& argument) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Floats x = argument < -87.0f ? all(-87.0f) : argument;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; |r| <= ln(2) / 2
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints exponent = bit_cast<Ints>(shifted) - bit_cast<std::int32_t>(kRound) + 127;
  return p * bit_cast<Floats>(exponent << 23);
}

FUSE_INLINE float max_of(const Floats& lanes) {
  float result = lanes[0];
  for (std::int64_t lane = 1; lane < kLanes; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  return result;
}

// Whether any lane of a comparison's result is true.
FUSE_INLINE bool any(const Ints& lanes) {
  typedef std::int64_t Longs __attribute__((vector_size(64)));
  const Longs pairs = bit_cast<Longs>(lanes);
  std::int64_t result = 0;
  for (std::int64_t pair = 0; pair < kLanes / 2; ++pair) result |= pairs[pair];
  return result != 0;
}

// A tree, not a chain: four dependent additions.
FUSE_INLINE float sum_of(const Floats& lanes) {
  float sums[kLanes];
  store(sums, lanes);
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

}  // namespace fuse
