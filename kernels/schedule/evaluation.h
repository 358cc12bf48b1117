// Times and memory of a complete schedule, from nothing: the reference that every incremental update is held to.
#pragma once

#include <optional>
#include <vector>

#include "schedule/graph.h"

namespace fuse::schedule {

struct Evaluation {
  Ticks makespan;
  std::vector<Ticks> start;       // per node
  std::vector<Bytes> peak_bytes;  // per rank
};

// Starts every operation as early as the orders allow. Empty when the ranks wait for one another in a circle.
// Requires each node once, on its rank. O(nodes).
std::optional<Evaluation> evaluate(const Graph& graph, const Orders& orders);

}  // namespace fuse::schedule
