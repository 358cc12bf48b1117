// Single-precision arithmetic on registers of floats, in the compilers' own vector types, which fix the order of sums
// without -ffast-math: every lane adds up every so many-th element.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor/shared_math.h"

namespace fuse {

// `lanes` numbers. As many as a register of the processor has: compilers keep vectors that they must cut in memory, and
// read and write all of them at every operation.
template <typename Number, int lanes>
struct VectorOf {
  typedef Number Type __attribute__((vector_size(sizeof(Number) * lanes)));
};

template <class Floats>
constexpr int kLanes = sizeof(Floats) / sizeof(float);

template <class Floats>
using IntsOf = typename VectorOf<std::int32_t, kLanes<Floats>>::Type;

template <typename Floats>
struct WordsOf {
  using Type = typename VectorOf<std::uint32_t, kLanes<Floats>>::Type;
};

#if defined(__x86_64__)
#define FUSE_AVX2 __attribute__((target("avx2,fma")))
#define FUSE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

template <class Body>
FUSE_AVX2 void with_avx2(const Body& body) {
  body(VectorOf<float, 8>::Type{});
}

template <class Body>
FUSE_AVX512 void with_avx512(const Body& body) {
  body(VectorOf<float, 16>::Type{});
}

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// What `body` does with vectors of its argument's type, by the widest registers that the processor has: one binary for
// every x86-64. It and all that it calls are inlined, so that each version has its own instructions.
template <class Body>
void vectorized(const Body& body) {
#if defined(__x86_64__)
  if (has_avx512()) return with_avx512(body);
  if (has_avx2()) return with_avx2(body);
#endif
  body(VectorOf<float, 4>::Type{});
}

// Of a lambda for `vectorized`, and those in it.
#define FUSE_INLINED __attribute__((always_inline))

template <class Vector, class Number>
FUSE_INLINE Vector load(const Number* values) {
  Vector result;
  std::memcpy(&result, values, sizeof(result));
  return result;
}

template <class Floats>
FUSE_INLINE void store(float* values, const Floats& from) {
  std::memcpy(values, &from, sizeof(from));
}

template <class Floats>
FUSE_INLINE Floats all(float value) {
  return value - Floats{};
}

template <class Floats>
FUSE_INLINE float max_of(const Floats& lanes) {
  float result = lanes[0];
  for (int lane = 1; lane < kLanes<Floats>; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  return result;
}

// Whether any lane of a comparison's result is true.
template <class Ints>
FUSE_INLINE bool any(const Ints& lanes) {
  using Longs = typename VectorOf<std::int64_t, sizeof(Ints) / 8>::Type;
  const Longs pairs = bit_cast<Longs>(lanes);
  std::int64_t result = 0;
  for (std::size_t pair = 0; pair < sizeof(Ints) / 8; ++pair) result |= pairs[pair];
  return result != 0;
}

// A tree of additions, not a chain.
template <class Floats>
FUSE_INLINE float sum_of(const Floats& lanes) {
  if constexpr (kLanes<Floats> == 4) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else {
    typename VectorOf<float, kLanes<Floats> / 2>::Type halves[2];
    std::memcpy(halves, &lanes, sizeof(halves));
    return sum_of(halves[0] + halves[1]);
  }
}

// Of the lanes of several registers, as of one that had them all.
template <class Floats, std::size_t count>
FUSE_INLINE float sum_of(const Floats (&registers)[count]) {
  if constexpr (count == 1) {
    return sum_of(registers[0]);
  } else {
    Floats halves[count / 2];
    for (std::size_t i = 0; i < count / 2; ++i) halves[i] = registers[i] + registers[i + count / 2];
    return sum_of(halves);
  }
}

}  // namespace fuse
