#include "schedule/graph.h"

#include <algorithm>
#include <utility>

namespace fuse::schedule {

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

  first_chains.resize(this->chains.size());
  double forward_ticks = 0;
  Node num_forwards = 0;
  for (std::size_t c = 0; c < this->chains.size(); ++c) {
    const Chain& chain = this->chains[c];
    channel_in.push_back(chain.channel_in);
    channel_out.push_back(chain.channel_out);
    before.push_back(chain.before);
    if (chain.before >= 0) first_chains[chain.before].push_back(static_cast<int>(c));
    for (Node x = chain.first; x < chain.first + chain.count; ++x) {
      rank_of[x] = chain.rank;
      chain_of[x] = static_cast<int>(c);
      work[chain.rank] += this->duration[x];
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
}

}  // namespace fuse::schedule
