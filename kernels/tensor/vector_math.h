// Single-precision arithmetic on vectors of 16, in the compilers' own vector types: they become whatever registers the
// processor has, and fix the order of sums without -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor/shared_math.h"

// One binary for every x86-64: the loader picks the widest version of a function that the processor runs. By level, not
// by name: "arch=haswell" would ask for that very model.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSE_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FUSE_VECTORIZED
#endif

namespace fuse {

constexpr std::int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));

template <>
struct WordsOf<Floats> {
  using Type = Words;
};

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
