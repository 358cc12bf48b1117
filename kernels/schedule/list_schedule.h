// List scheduling by priorities: an idle rank runs the ready operation that comes first.
#pragma once

#include <optional>
#include <vector>

#include "schedule/graph.h"

namespace fuse::schedule {

// Runs everything event by event. An idle rank runs, of its chains' next operations that are ready and fit into its
// cap, the one with the smallest priority (of equals the smaller node). If `patient`, it waits instead when one that
// comes before that is on its way and arrives before that would end.
//
// Empty when the ranks block one another under the caps. `priority` is per node, `caps` per rank.
// O(nodes * (chains per rank + log nodes)).
std::optional<Orders> list_schedule(const Graph& graph, const std::vector<std::int64_t>& priority,
                                    const std::vector<Bytes>& caps, bool patient);

}  // namespace fuse::schedule
