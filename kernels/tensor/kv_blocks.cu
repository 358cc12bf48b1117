// Several blocks of threads for each pair of blocks of memory, all in one launch. Neighbouring threads copy
// neighbouring units, the widest that everything is aligned to.
#include "tensor/cuda_launch.h"
#include "tensor/kv_blocks_cuda.h"

namespace fuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kShares = 16;  // thread blocks for each pair

struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

// The largest power of two, 16 at most, that divides addresses, strides and the length of runs.
__device__ std::int64_t alignment_of(const Block& source, const Block& target, const Runs& runs) {
  std::int64_t bits = 16 | source.address | target.address | runs.bytes;
  for (int dimension = 0; dimension < 3; ++dimension) {
    if (runs.counts[dimension] > 1) bits |= source.strides[dimension] | target.strides[dimension];
  }
  return bits & -bits;
}

template <typename Unit>
__device__ void copy_share(const Block& source, const Block& target, const Runs& runs, std::uint32_t share) {
  // A 64-bit division would take longer than the copy of a unit.
  const auto units_per_run = static_cast<std::uint32_t>(runs.bytes / static_cast<std::int64_t>(sizeof(Unit)));
  const auto rows = static_cast<std::uint32_t>(runs.counts[1]);
  const auto columns = static_cast<std::uint32_t>(runs.counts[2]);
  const std::int64_t num_units = runs.counts[0] * runs.counts[1] * runs.counts[2] * units_per_run;
  for (std::int64_t index = share * kThreads + threadIdx.x; index < num_units; index += kShares * kThreads) {
    const auto unit = static_cast<std::uint32_t>(index);
    const std::uint32_t run = unit / units_per_run;
    const std::uint32_t i = run / columns / rows, j = run / columns % rows, k = run % columns;
    const std::int64_t within = static_cast<std::int64_t>(unit % units_per_run) * sizeof(Unit);
    *reinterpret_cast<Unit*>(target.address_of(i, j, k) + within) =
        *reinterpret_cast<const Unit*>(source.address_of(i, j, k) + within);
  }
}

__global__ void copy_kernel(const Block* sources, const Block* targets, std::int64_t element_bytes) {
  const Block source = sources[blockIdx.x / kShares];
  const Block target = targets[blockIdx.x / kShares];
  const std::uint32_t share = blockIdx.x % kShares;
  const Runs runs = runs_of(source, target, element_bytes);
  switch (alignment_of(source, target, runs)) {
    case 16:
      return copy_share<Bytes16>(source, target, runs, share);
    case 8:
      return copy_share<std::uint64_t>(source, target, runs, share);
    case 4:
      return copy_share<std::uint32_t>(source, target, runs, share);
    case 2:
      return copy_share<std::uint16_t>(source, target, runs, share);
    default:
      return copy_share<std::uint8_t>(source, target, runs, share);
  }
}

}  // namespace

void copy_blocks(const Block* sources, const Block* targets, std::int64_t count, std::int64_t element_bytes,
                 std::uintptr_t stream) {
  launch(copy_kernel, count * kShares, kThreads, stream, sources, targets, element_bytes);
}

}  // namespace fuse::cuda
