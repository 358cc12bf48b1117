// Copies of many strided blocks of memory, such as a sample's keys and values in every layer, in one call.
#pragma once

#include <cstdint>

#include "tensor/kv_blocks_layout.h"

namespace fuse {

// targets[i] = sources[i], whose shapes are equal, for each of `count` pairs. No two of the blocks overlap.
void copy_blocks(const Block* sources, const Block* targets, std::int64_t count, std::int64_t element_bytes);

}  // namespace fuse
