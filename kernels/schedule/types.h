// Units and names shared by all of the schedule search.
#pragma once

#include <cstdint>
#include <vector>

namespace fuse::schedule {

// An operation, as its index in the graph. The number of operations itself stands for "none".
using Node = std::int32_t;
using Ticks = std::int32_t;
using Bytes = std::int64_t;

// Each rank's operations in order: a schedule.
using Orders = std::vector<std::vector<Node>>;

enum class Kind : std::int32_t { kForward = 0, kBackward = 1, kWeight = 2 };

}  // namespace fuse::schedule
