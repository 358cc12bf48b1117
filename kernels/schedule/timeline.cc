#include "schedule/timeline.h"

#include <algorithm>
#include <cassert>
#include <functional>
#include <queue>

#include "schedule/evaluation.h"

namespace fuse::schedule {

Timeline::Timeline(const Graph& graph) : graph_(graph) {
  const std::size_t n = graph.size() + 1;
  first_.resize(graph.num_ranks);
  last_.resize(graph.num_ranks);
  for (auto* links : {&previous_, &next_, &position_}) links->assign(n, graph.none());
  start_.assign(n, 0);
  tail_.assign(n, 0);
  level_before_.assign(n, 0);
  dirty_.assign(n, 0);
  behind_.assign(n, 0);
}

bool Timeline::load(const Orders& orders) {
  const Node none = graph_.none();
  for (int rank = 0; rank < graph_.num_ranks; ++rank) {
    Node before = none;
    Bytes level = graph_.initial_bytes[rank];
    first_[rank] = orders[rank].empty() ? none : orders[rank].front();
    for (Node x : orders[rank]) {
      previous_[x] = before;
      if (before != none) next_[before] = x;
      level_before_[x] = level;
      level += graph_.bytes_taken[x];
      before = x;
    }
    last_[rank] = before;
    if (before != none) next_[before] = none;
  }
  sort_by_start();
  if (static_cast<Node>(order_.size()) < graph_.size()) return false;
  set_window(0, graph_.size());
  return true;
}

Orders Timeline::orders() const {
  Orders result(graph_.num_ranks);
  for (int rank = 0; rank < graph_.num_ranks; ++rank) {
    for (Node x = first_[rank]; x != graph_.none(); x = next_[x]) result[rank].push_back(x);
  }
  return result;
}

Bytes Timeline::peak_bytes(int rank) const {
  Bytes peak = graph_.initial_bytes[rank];
  for (Node x = first_[rank]; x != graph_.none(); x = next_[x]) {
    peak = std::max(peak, level_before_[x] + graph_.bytes_taken[x]);
  }
  return peak;
}

Ticks Timeline::earliest_start(Node x) const {
  const Node p = graph_.predecessor[x], q = previous_[x];
  return std::max(end(p) + graph_.lag[x], end(q));
}

Ticks Timeline::longest_tail(Node x) const {
  Ticks tail = path_from(next_[x]);
  for (Node y : graph_.successors[x]) tail = std::max(tail, graph_.lag[y] + path_from(y));
  return tail;
}

// Sorting by start keeps the two nodes of a critical pair close together, which is what a swap pays for.
void Timeline::sort_by_start() {
  const Node n = graph_.size();
  using Entry = std::pair<Ticks, Node>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> ready;
  std::vector<char> num_waiting(n);
  order_.clear();
  for (Node x = 0; x < n; ++x) {
    num_waiting[x] = static_cast<char>((graph_.predecessor[x] != n) + (previous_[x] != n));
    if (num_waiting[x] == 0) ready.push({0, x});
  }
  while (!ready.empty()) {
    const Node x = ready.top().second;
    ready.pop();
    start_[x] = earliest_start(x);
    position_[x] = static_cast<Node>(order_.size());
    order_.push_back(x);
    for (Node y : {graph_.successors[x][0], graph_.successors[x][1], next_[x]}) {
      if (y != n && --num_waiting[y] == 0) ready.push({earliest_start(y), y});
    }
  }
}

void Timeline::set_window(Node begin, Node end) {
  const Node none = graph_.none();
  // Starts behind the old window and tails before it are stale; a fresh sort computes all of them.
  sort_by_start();
  window_begin_ = begin;
  window_end_ = end;
  passing_by_ = 0;
  job_exits_.clear();
  rank_exits_.assign(graph_.num_ranks, {none, 0});
  for (auto it = order_.rbegin(); it != order_.rend(); ++it) {
    const Node x = *it;
    tail_[x] = longest_tail(x);
    const bool leaves = position_[x] < end;
    for (Node y : graph_.successors[x]) {
      if (leaves && y != none && position_[y] >= end) {
        const Ticks path = graph_.lag[y] + path_from(y);
        if (position_[x] >= begin) {
          job_exits_.push_back({x, path});
        } else {
          passing_by_ = std::max(passing_by_, this->end(x) + path);
        }
      }
    }
  }
  for (int rank = 0; rank < graph_.num_ranks; ++rank) {
    Node behind = none, before = last_[rank];
    while (before != none && position_[before] >= end) {
      behind = before;
      before = previous_[before];
    }
    rank_exits_[rank] = {behind, path_from(behind)};
    if (before != none && position_[before] < begin) {
      passing_by_ = std::max(passing_by_, this->end(before) + path_from(behind));
    }
  }
}

// Makes v, the right neighbour of u, its left neighbour. Its own inverse with the arguments exchanged.
void Timeline::relink(Node u, Node v) {
  const Node none = graph_.none(), before = previous_[u], after = next_[v];
  const int rank = graph_.rank_of[u];
  next_[u] = after;
  previous_[u] = v;
  next_[v] = u;
  previous_[v] = before;
  (before != none ? next_[before] : first_[rank]) = v;
  (after != none ? previous_[after] : last_[rank]) = u;
  const Bytes level = level_before_[u];
  level_before_[v] = level;
  level_before_[u] = level + graph_.bytes_taken[v];
}

Ticks Timeline::longest_path_if_swapped(Node u) const {
  const Node v = next_[u], p = graph_.predecessor[u], q = graph_.predecessor[v];
  assert(graph_.may_swap(u, v) && in_window(u) && in_window(v));
  const Ticks start_v = std::max(end(q) + graph_.lag[v], end(previous_[u]));
  const Ticks start_u = std::max(end(p) + graph_.lag[u], start_v + graph_.duration[v]);
  Ticks tail_u = path_from(next_[v]);
  for (Node y : graph_.successors[u]) tail_u = std::max(tail_u, graph_.lag[y] + path_from(y));
  Ticks tail_v = graph_.duration[u] + tail_u;
  for (Node y : graph_.successors[v]) tail_v = std::max(tail_v, graph_.lag[y] + path_from(y));
  return std::max(start_v + graph_.duration[v] + tail_v, start_u + graph_.duration[u] + tail_u);
}

bool Timeline::swap(Node u) {
  const Node v = next_[u];
  assert(graph_.may_swap(u, v) && in_window(u) && in_window(v));
  const Node from = position_[u], to = position_[v];
  // Everything between them that depends on u must follow v; if v depends on it, the swap would close a circle.
  ahead_stretch_.clear();
  behind_stretch_.assign(1, u);
  behind_[u] = 1;
  for (Node i = from + 1; i < to; ++i) {
    const Node x = order_[i];
    if (behind_[graph_.predecessor[x]] || behind_[previous_[x]]) {
      behind_[x] = 1;
      behind_stretch_.push_back(x);
    } else {
      ahead_stretch_.push_back(x);
    }
  }
  const bool circle = behind_[graph_.predecessor[v]];
  for (Node x : behind_stretch_) behind_[x] = 0;
  if (circle) return false;

  ahead_stretch_.push_back(v);
  stretch_begin_ = from;
  old_stretch_.assign(order_.begin() + from, order_.begin() + to + 1);
  Node position = from;
  for (const auto* stretch : {&ahead_stretch_, &behind_stretch_}) {
    for (Node x : *stretch) {
      order_[position] = x;
      position_[x] = position++;
    }
  }
  relink(u, v);
  swapped_ = {u, v};
  propagate_starts();
  assert(starts_match_full_evaluation());
  return true;
}

// Recomputes starts in topological order from the first one that can change.
void Timeline::propagate_starts() {
  old_starts_.clear();
  int num_dirty = 0;
  auto mark = [&](Node x) {
    const Node position = position_[x];
    if (position < window_end_ && !dirty_[position]) {
      dirty_[position] = 1;
      ++num_dirty;
    }
  };
  const auto [u, v] = swapped_;
  for (Node x : {v, u, next_[u]}) mark(x);
  for (Node i = position_[v]; num_dirty > 0; ++i) {
    if (!dirty_[i]) continue;
    dirty_[i] = 0;
    --num_dirty;
    const Node x = order_[i];
    const Ticks start = earliest_start(x);
    if (start == start_[x]) continue;
    old_starts_.push_back({x, start_[x]});
    start_[x] = start;
    for (Node y : {graph_.successors[x][0], graph_.successors[x][1], next_[x]}) mark(y);
  }
}

// Recomputes tails against the topological order from the last one that can change.
void Timeline::keep() {
  int num_dirty = 0;
  auto mark = [&](Node x) {
    const Node position = position_[x];
    if (position >= window_begin_ && !dirty_[position] && x != graph_.none()) {
      dirty_[position] = 1;
      ++num_dirty;
    }
  };
  const auto [u, v] = swapped_;
  for (Node x : {u, v, previous_[v]}) mark(x);
  for (Node i = position_[u]; num_dirty > 0; --i) {
    if (!dirty_[i]) continue;
    dirty_[i] = 0;
    --num_dirty;
    const Node x = order_[i];
    const Ticks tail = longest_tail(x);
    if (tail == tail_[x]) continue;
    tail_[x] = tail;
    mark(graph_.predecessor[x]);
    mark(previous_[x]);
  }
  assert(tails_are_exact());
}

void Timeline::undo() {
  const auto [u, v] = swapped_;
  for (const auto& [x, start] : old_starts_) start_[x] = start;
  relink(v, u);
  for (std::size_t i = 0; i < old_stretch_.size(); ++i) {
    order_[stretch_begin_ + i] = old_stretch_[i];
    position_[old_stretch_[i]] = stretch_begin_ + static_cast<Node>(i);
  }
}

bool Timeline::starts_match_full_evaluation() const {
  const auto full = evaluate(graph_, orders());
  if (!full || full->makespan != makespan()) return false;
  for (Node i = 0; i < window_end_; ++i) {
    if (start_[order_[i]] != full->start[order_[i]]) return false;
  }
  for (int rank = 0; rank < graph_.num_ranks; ++rank) {
    if (full->peak_bytes[rank] != peak_bytes(rank)) return false;
  }
  return true;
}

bool Timeline::tails_are_exact() const {
  for (Node i = window_begin_; i < graph_.size(); ++i) {
    if (tail_[order_[i]] != longest_tail(order_[i])) return false;
  }
  return true;
}

}  // namespace fuse::schedule
