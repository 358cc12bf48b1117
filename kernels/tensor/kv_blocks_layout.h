// Where the bytes of strided blocks lie: what the C++ and the CUDA code share, so that tests of the one cover the
// other.
#pragma once

#include <cstdint>

#include "tensor/shared_math.h"

namespace fuse {

// An array of three dimensions; strides are in bytes, elements of one size that the caller knows.
struct Block {
  std::int64_t address;
  std::int64_t shape[3];
  std::int64_t strides[3];

  FUSE_HOST_DEVICE std::int64_t address_of(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return address + i * strides[0] + j * strides[1] + k * strides[2];
  }
};

// A block as runs of bytes that lie side by side in both source and target: how many runs in each dimension.
struct Runs {
  std::int64_t bytes;
  std::int64_t counts[3];
};

FUSE_HOST_DEVICE inline Runs runs_of(const Block& source, const Block& target, std::int64_t element_bytes) {
  Runs runs{element_bytes, {1, 1, 1}};
  bool is_whole = true;
  for (int dimension = 2; dimension >= 0; --dimension) {
    const std::int64_t count = source.shape[dimension];
    is_whole = is_whole &&
               (count == 1 || (source.strides[dimension] == runs.bytes && target.strides[dimension] == runs.bytes));
    (is_whole ? runs.bytes : runs.counts[dimension]) *= count;
  }
  return runs;
}

}  // namespace fuse
