// Arithmetic of one float or of a register full of them: what the C++ and the CUDA code share, so that tests of the one
// cover the other.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSE_HOST_DEVICE __host__ __device__
#else
#define FUSE_HOST_DEVICE
#endif
// Into its caller's version, whatever registers that has.
#define FUSE_INLINE inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // on how registers of floats are passed: never, everything here is inlined
#endif

namespace fuse {

// The bits of floats, as numbers.
template <typename Float>
struct WordsOf;
template <>
struct WordsOf<float> {
  using Type = std::uint32_t;
};

template <typename To, typename From>
FUSE_HOST_DEVICE FUSE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// e^x to 2 ulp for x <= 0; below -87 it stays at e^-87, about 1.6e-38. NaN stays NaN.
template <typename Float>
FUSE_HOST_DEVICE FUSE_INLINE Float exp_nonpositive(const Float& argument) {
  using Words = typename WordsOf<Float>::Type;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Float x = argument < -87.0f ? Float{} - 87.0f : argument;
  const Float shifted = x * 1.44269504f + kRound;
  const Float n = shifted - kRound;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; |r| <= ln(2) / 2
  Float p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words exponent = bit_cast<Words>(shifted) - bit_cast<std::uint32_t>(kRound) + 127u;
  return p * bit_cast<Float>(exponent << 23);
}

}  // namespace fuse
