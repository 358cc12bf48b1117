#include "schedule/graph.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace fuse::schedule {

namespace {

// Nodes in an order in which each comes after its data dependency and its predecessor in the chain.
std::vector<Node> topological_order(const Graph& graph, const std::vector<Node>& chain_predecessor) {
  const Node n = graph.size();
  std::vector<int> num_waiting(n);
  std::vector<Node> chain_successor(n + 1, graph.none()), order, ready;
  for (Node x = 0; x < n; ++x) {
    num_waiting[x] = (graph.predecessor[x] != graph.none()) + (chain_predecessor[x] != graph.none());
    chain_successor[chain_predecessor[x]] = x;
    if (num_waiting[x] == 0) ready.push_back(x);
  }
  while (!ready.empty()) {
    const Node x = ready.back();
    ready.pop_back();
    order.push_back(x);
    for (Node y : {graph.successors[x][0], graph.successors[x][1], chain_successor[x]}) {
      if (y != graph.none() && --num_waiting[y] == 0) ready.push_back(y);
    }
  }
  return order;
}

}  // namespace

Graph::Graph(int num_ranks, std::vector<Chain> chains, std::vector<Ticks> duration, std::vector<Node> predecessor,
             std::vector<Ticks> lag, std::vector<Bytes> bytes_taken, std::vector<Bytes> initial_bytes)
    : num_ranks(num_ranks),
      chains(std::move(chains)),
      duration(std::move(duration)),
      predecessor(std::move(predecessor)),
      lag(std::move(lag)),
      bytes_taken(std::move(bytes_taken)),
      initial_bytes(std::move(initial_bytes)) {
  const Node n = static_cast<Node>(this->duration.size());
  this->duration.push_back(0);
  this->predecessor.push_back(n);
  this->lag.push_back(0);
  this->bytes_taken.push_back(0);
  successors.assign(n + 1, {n, n});
  rank_of.assign(n + 1, -1);
  chain_of.assign(n + 1, -1);
  work.assign(num_ranks, 0);

  std::vector<Node> chain_predecessor(n + 1, n);
  double forward_ticks = 0;
  Node num_forwards = 0;
  for (std::size_t c = 0; c < this->chains.size(); ++c) {
    const Chain& chain = this->chains[c];
    channel_in.push_back(chain.channel_in);
    channel_out.push_back(chain.channel_out);
    for (Node x = chain.first; x < chain.first + chain.count; ++x) {
      rank_of[x] = chain.rank;
      chain_of[x] = static_cast<int>(c);
      work[chain.rank] += this->duration[x];
      if (x > chain.first) chain_predecessor[x] = x - 1;
      if (chain.kind == Kind::kForward) {
        forward_ticks += this->duration[x];
        ++num_forwards;
      }
    }
  }
  mean_forward_ticks = num_forwards ? forward_ticks / num_forwards : 1;
  largest_bytes_taken = std::max<Bytes>(1, *std::max_element(this->bytes_taken.begin(), this->bytes_taken.end()));

  for (Node x = 0; x < n; ++x) {
    const Node p = this->predecessor[x];
    if (p != n) successors[p][successors[p][0] != n] = x;
  }
  least_tail.assign(n + 1, 0);
  least_rank_tail.assign(num_ranks, std::numeric_limits<Ticks>::max());
  std::vector<Node> order = topological_order(*this, chain_predecessor);
  for (auto it = order.rbegin(); it != order.rend(); ++it) {
    const Node x = *it, p = this->predecessor[x], q = chain_predecessor[x];
    const Ticks from_start = this->duration[x] + least_tail[x];
    least_tail[p] = std::max(least_tail[p], p == n ? 0 : from_start + this->lag[x]);
    least_tail[q] = std::max(least_tail[q], q == n ? 0 : from_start);
    least_rank_tail[rank_of[x]] = std::min(least_rank_tail[rank_of[x]], least_tail[x]);
  }
}

}  // namespace fuse::schedule
