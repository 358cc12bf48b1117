// The operations of a problem and what does not depend on their order: durations, memory, data dependencies.
#pragma once

#include <array>
#include <vector>

#include "schedule/types.h"

namespace fuse::schedule {

// The forwards, the backwards or the weight gradients of one stage: nodes first .. first + count - 1, which every
// schedule of the search keeps in this order. `channel_in` and `channel_out` number the rank-to-rank message streams
// the operations read and feed (-1: none); operations of one stream keep their relative order too, because messages
// are matched by order. `before` is the chain that uses what this one makes on the same rank (-1: none): its operation
// j comes after this one's j.
struct Chain {
  Node first;
  Node count;
  int rank;
  int pipeline;
  int stage;
  int num_stages;
  Kind kind;
  int channel_in;
  int channel_out;
  int before;
};

// Immutable. One data dependency per node is enough: a backward's own forward always lies before the forward of the
// last stage, and so before the gradient it needs; and `before` needs no arc, as both ends are on one rank, whose order
// keeps it. Only an input gradient has two successors (the gradient of the stage before, and its weight gradient).
class Graph {
 public:
  // `predecessor[x]` is the node whose result x needs (size() when none), available `lag[x]` ticks after its end.
  // `bytes_taken[x]` is the change of its rank's memory when x starts. Requires an acyclic graph.
  Graph(int num_ranks, std::vector<Chain> chains, std::vector<Ticks> duration, std::vector<Node> predecessor,
        std::vector<Ticks> lag, std::vector<Bytes> bytes_taken, std::vector<Bytes> initial_bytes);

  Node size() const { return static_cast<Node>(duration.size()) - 1; }
  Node none() const { return size(); }

  // Whether u may change places with its neighbour v right after it on their rank.
  bool may_swap(Node u, Node v) const {
    const int c = chain_of[u], d = chain_of[v];
    return c != d && predecessor[v] != u && (before[c] != d || u - chains[c].first != v - chains[d].first) &&
           (channel_in[c] < 0 || channel_in[c] != channel_in[d]) &&
           (channel_out[c] < 0 || channel_out[c] != channel_out[d]);
  }

  int num_ranks;
  std::vector<Chain> chains;
  // Per node, with one more entry for "none": duration 0, rank -1, no memory.
  std::vector<Ticks> duration;
  std::vector<Node> predecessor;
  std::vector<Ticks> lag;
  std::vector<Bytes> bytes_taken;
  std::vector<std::array<Node, 2>> successors;
  std::vector<int> rank_of;
  std::vector<int> chain_of;
  // Per rank.
  std::vector<Bytes> initial_bytes;
  std::vector<Ticks> work;
  // Per chain; copies, side by side for speed.
  std::vector<int> channel_in;
  std::vector<int> channel_out;
  std::vector<int> before;
  // Per chain: those that have it in `before`.
  std::vector<std::vector<int>> first_chains;

  // Over all nodes: mean duration of a forward, and the largest memory one operation takes.
  double mean_forward_ticks;
  Bytes largest_bytes_taken;
};

}  // namespace fuse::schedule
