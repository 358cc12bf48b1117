#include "schedule/evaluation.h"

#include <algorithm>

namespace fuse::schedule {

std::optional<Evaluation> evaluate(const Graph& graph, const Orders& orders) {
  const Node n = graph.size();
  Evaluation result{0, std::vector<Ticks>(n), graph.initial_bytes};
  // Ranks run their lists as far as they can; a rank that must wait is woken by the operation it waits for.
  std::vector<Ticks> end(n + 1, -1), free_at(graph.num_ranks, 0);
  std::vector<int> sleeper(n + 1, -1), awake;
  std::vector<std::size_t> next(graph.num_ranks, 0);
  std::vector<Bytes> level = graph.initial_bytes;
  Node num_done = 0;
  end[n] = 0;
  for (int rank = graph.num_ranks - 1; rank >= 0; --rank) awake.push_back(rank);
  while (!awake.empty()) {
    const int rank = awake.back();
    awake.pop_back();
    const std::vector<Node>& order = orders[rank];
    while (next[rank] < order.size()) {
      const Node x = order[next[rank]], p = graph.predecessor[x];
      if (end[p] < 0) {
        // One entry is enough: of a node's two successors one is on its own rank, which cannot wait for it and go on.
        sleeper[p] = rank;
        break;
      }
      const Ticks start = std::max(free_at[rank], end[p] + graph.lag[x]);
      result.start[x] = start;
      end[x] = free_at[rank] = start + graph.duration[x];
      level[rank] += graph.bytes_taken[x];
      result.peak_bytes[rank] = std::max(result.peak_bytes[rank], level[rank]);
      ++next[rank];
      ++num_done;
      if (sleeper[x] >= 0) {
        awake.push_back(sleeper[x]);
      }
    }
    result.makespan = std::max(result.makespan, free_at[rank]);
  }
  if (num_done < n) return std::nullopt;
  return result;
}

}  // namespace fuse::schedule
