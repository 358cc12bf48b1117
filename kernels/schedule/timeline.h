// A schedule under local search: links, starts and memory that one adjacent swap updates in place and can take back.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "schedule/graph.h"

namespace fuse::schedule {

enum class SwapResult {
  kCycle,      // the ranks would wait in a circle; nothing has changed
  kDone,       // starts are exact
  kOverLimit,  // the makespan exceeds the limit; starts are stale: the swap must be undone
};

// Keeps, per node: its neighbours on the rank, its start, its memory level, and its place in a topological order of all
// dependencies. A swap costs what it moves: the stretch of the order between the two nodes, and every later node whose
// start changes.
//
// A *window* confines swaps and updates to a stretch of the topological order. Tails of the nodes behind it are fixed
// while it stands, so the makespan stays exact: it is the longest of the paths that leave the window.
class Timeline {
 public:
  explicit Timeline(const Graph& graph);

  // Adopts orders; false (and unusable) when the ranks wait for one another in a circle. Resets the window to all.
  bool load(const Orders& orders);
  Orders orders() const;

  // Re-sorts the topological order by start and confines work to positions [begin, end). O(nodes).
  void set_window(Node begin, Node end);

  // Longest path; with a window, of all paths through or around it. `*critical` becomes the last node in the window on
  // one of the longest paths, drawn with `choose(k)`, which returns 0 with probability 1 / k; "none" if all pass it by.
  Ticks makespan() const {
    return makespan(nullptr, [](int) { return 1; });
  }
  template <typename Choose>
  Ticks makespan(Node* critical, Choose choose) const;

  // Swaps u with its right neighbour. Requires graph.may_swap and both in the window.
  SwapResult swap(Node u, Ticks limit);
  // Takes the latest successful or over-limit swap back.
  void undo();

  Node previous(Node x) const { return previous_[x]; }
  Node next(Node x) const { return next_[x]; }
  Ticks start(Node x) const { return start_[x]; }
  Ticks end(Node x) const { return start_[x] + graph_.duration[x]; }
  Bytes level_before(Node x) const { return level_before_[x]; }
  bool in_window(Node x) const { return position_[x] >= window_begin_ && position_[x] < window_end_; }
  Node node_in_window(std::int32_t index) const { return order_[window_begin_ + index]; }
  Node window_size() const { return window_end_ - window_begin_; }
  Bytes peak_bytes(int rank) const;

 private:
  Ticks earliest_start(Node x) const;
  void sort_by_start();
  void relink(Node u, Node v);
  SwapResult propagate(Node from, Ticks limit);
  bool matches_full_evaluation() const;

  const Graph& graph_;
  std::vector<Node> first_, last_;     // per rank
  std::vector<Node> previous_, next_;  // neighbours on the rank
  std::vector<Ticks> start_;
  std::vector<Ticks> remaining_;        // rank's work after the node plus the rank's least tail
  std::vector<Bytes> level_before_;     // rank's memory when the node is about to start
  std::vector<Node> order_, position_;  // topological order and its inverse
  std::vector<char> dirty_, behind_;    // marks, all clear between calls

  // What undo needs: the pair, starts, and the stretch of the order.
  std::pair<Node, Node> swapped_;
  std::vector<std::pair<Node, Ticks>> old_starts_;
  std::vector<Node> old_stretch_, ahead_stretch_, behind_stretch_;
  Node stretch_begin_ = 0;

  // The window.
  Node window_begin_ = 0, window_end_ = 0;
  Ticks passing_by_ = 0;                           // longest path that has no node in the window
  std::vector<std::pair<Node, Ticks>> job_exits_;  // nodes whose data dependency leaves the window, and the path after
  std::vector<std::pair<Node, Ticks>>
      rank_exits_;  // per rank: first node behind the window ("none" if none), path from it
};

template <typename Choose>
Ticks Timeline::makespan(Node* critical, Choose choose) const {
  Ticks longest = passing_by_;
  int num_ties = 0;
  if (critical) *critical = graph_.none();
  auto consider = [&](Node x, Ticks after) {
    const Ticks length = end(x) + after;
    if (length < longest) return;
    if (length > longest) num_ties = 0;
    longest = length;
    if (critical && choose(++num_ties) == 0) *critical = x;
  };
  for (const auto& [node, after] : job_exits_) consider(node, after);
  for (int rank = 0; rank < graph_.num_ranks; ++rank) {
    const auto [behind, after] = rank_exits_[rank];
    const Node x = behind == graph_.none() ? last_[rank] : previous_[behind];
    if (x != graph_.none() && position_[x] >= window_begin_) consider(x, after);
  }
  return longest;
}

}  // namespace fuse::schedule
