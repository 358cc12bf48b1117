// The function of kv_blocks.h on a GPU; blocks and their descriptions lie there, and the work is only queued on
// `stream`.
#pragma once

#include <cstdint>

#include "tensor/kv_blocks_layout.h"

namespace fuse::cuda {

// No block has 2^32 elements or more.
void copy_blocks(const Block* sources, const Block* targets, std::int64_t count, std::int64_t element_bytes,
                 std::uintptr_t stream);

}  // namespace fuse::cuda
