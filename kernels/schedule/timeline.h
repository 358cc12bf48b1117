// A schedule under local search: links, starts and memory that one adjacent swap updates in place and can take back.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "schedule/graph.h"

namespace fuse::schedule {

// Keeps, per node: its neighbours on the rank, its start, its tail (the longest path from its end to the schedule's
// end), its memory level, and its place in a topological order of all dependencies. Starts and tails tell in constant
// time how long the paths through a pair would become by a swap (Taillard 1994), which refuses most swaps. A swap that
// is made costs what it moves: the stretch of the order between the two nodes, every later node whose start changes,
// and, once it is kept, every earlier node whose tail changes.
//
// A *window* confines swaps and updates to a stretch of the topological order. Starts before it and tails behind it are
// fixed while it stands, so the makespan stays exact: it is the longest of the paths that leave the window.
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

  // The longest path through u or its right neighbour after they have changed places: no more than the makespan will
  // be. Means nothing if the swap would close a circle. Requires graph.may_swap and both in the window.
  Ticks longest_path_if_swapped(Node u) const;
  // Swaps u with its right neighbour; false, and nothing has changed, if the ranks would then wait in a circle. Starts
  // are exact afterwards; one of undo and keep must follow. Requires the same.
  bool swap(Node u);
  // Takes the swap back.
  void undo();
  // Brings tails up to date with it.
  void keep();

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
  Ticks longest_tail(Node x) const;
  Ticks path_from(Node x) const { return graph_.duration[x] + tail_[x]; }
  void sort_by_start();
  void relink(Node u, Node v);
  void propagate_starts();
  bool starts_match_full_evaluation() const;
  bool tails_are_exact() const;

  const Graph& graph_;
  std::vector<Node> first_, last_;     // per rank
  std::vector<Node> previous_, next_;  // neighbours on the rank
  std::vector<Ticks> start_, tail_;
  std::vector<Bytes> level_before_;     // rank's memory when the node is about to start
  std::vector<Node> order_, position_;  // topological order and its inverse
  std::vector<char> dirty_;             // marks by position, all clear between calls
  std::vector<char> behind_;            // marks by node, likewise

  // What undo and keep need: the pair, starts, and the stretch of the order.
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
