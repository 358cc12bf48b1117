#include "tensor/kv_blocks.h"

#include <cstddef>
#include <cstring>

namespace fuse {
namespace {

void copy_block(const Block& source, const Block& target, std::int64_t element_bytes) {
  const Runs runs = runs_of(source, target, element_bytes);
  if (runs.bytes == 0) return;
  for (std::int64_t i = 0; i < runs.counts[0]; ++i) {
    for (std::int64_t j = 0; j < runs.counts[1]; ++j) {
      for (std::int64_t k = 0; k < runs.counts[2]; ++k) {
        std::memcpy(reinterpret_cast<std::byte*>(target.address_of(i, j, k)),
                    reinterpret_cast<const std::byte*>(source.address_of(i, j, k)),
                    static_cast<std::size_t>(runs.bytes));
      }
    }
  }
}

}  // namespace

void copy_blocks(const Block* sources, const Block* targets, std::int64_t count, std::int64_t element_bytes) {
  for (std::int64_t i = 0; i < count; ++i) copy_block(sources[i], targets[i], element_bytes);
}

}  // namespace fuse
