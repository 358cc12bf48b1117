#include "schedule/list_schedule.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>

namespace fuse::schedule {

namespace {

constexpr Ticks kUnknown = -1;

class ListScheduler {
 public:
  ListScheduler(const Graph& graph, const std::vector<std::int64_t>& priority, const std::vector<Bytes>& caps,
                bool patient)
      : graph_(graph),
        priority_(priority),
        caps_(caps),
        patient_(patient),
        chains_of_rank_(graph.num_ranks),
        next_(graph.chains.size(), 0),
        arrival_(graph.size() + 1, kUnknown),
        free_at_(graph.num_ranks, 0),
        level_(graph.initial_bytes),
        orders_(graph.num_ranks) {
    int num_channels = 0;
    for (std::size_t c = 0; c < graph.chains.size(); ++c) {
      chains_of_rank_[graph.chains[c].rank].push_back(static_cast<int>(c));
      num_channels = std::max(num_channels, graph.chains[c].channel_in + 1);
    }
    messages_.resize(num_channels);
    for (Node x = 0; x < graph.size(); ++x) {
      if (graph.predecessor[x] == graph.none()) arrival_[x] = 0;
    }
  }

  std::optional<Orders> run() {
    for (int rank = 0; rank < graph_.num_ranks; ++rank) events_.push({0, rank});
    Node num_run = 0;
    while (!events_.empty()) {
      const auto [now, rank] = events_.top();
      events_.pop();
      if (free_at_[rank] > now) continue;
      const Node x = choose(rank, now);
      if (x == graph_.none()) continue;
      start(x, rank, now);
      ++num_run;
    }
    if (num_run < graph_.size()) return std::nullopt;
    return std::move(orders_);
  }

 private:
  bool comes_before(Node x, Node y) const {
    return y == graph_.none() || std::pair(priority_[x], x) < std::pair(priority_[y], y);
  }

  // The chain's next operation, if its input is there or on its way and its memory is free; else none.
  Node candidate(int c) const {
    const Chain& chain = graph_.chains[c];
    if (next_[c] == chain.count) return graph_.none();
    const Node x = chain.first + next_[c];
    if (arrival_[x] == kUnknown) return graph_.none();
    if (graph_.bytes_taken[x] > 0 && level_[chain.rank] + graph_.bytes_taken[x] > caps_[chain.rank]) {
      return graph_.none();
    }
    for (int d : graph_.first_chains[c]) {
      if (next_[d] <= next_[c]) return graph_.none();
    }
    const bool is_next_message = chain.channel_in < 0 || messages_[chain.channel_in].front() == x;
    return is_next_message ? x : graph_.none();
  }

  Node choose(int rank, Ticks now) const {
    Node ready = graph_.none();
    for (int c : chains_of_rank_[rank]) {
      const Node x = candidate(c);
      if (x != graph_.none() && arrival_[x] <= now && comes_before(x, ready)) ready = x;
    }
    if (ready == graph_.none() || !patient_) return ready;
    const Ticks end = now + graph_.duration[ready];
    for (int c : chains_of_rank_[rank]) {
      const Node x = candidate(c);
      if (x != graph_.none() && arrival_[x] < end && comes_before(x, ready)) return graph_.none();
    }
    return ready;
  }

  void start(Node x, int rank, Ticks now) {
    const Ticks end = now + graph_.duration[x];
    const int c = graph_.chain_of[x];
    orders_[rank].push_back(x);
    free_at_[rank] = end;
    level_[rank] += graph_.bytes_taken[x];
    ++next_[c];
    events_.push({end, rank});
    if (graph_.channel_in[c] >= 0) messages_[graph_.channel_in[c]].pop();
    for (Node y : graph_.successors[x]) {
      if (y == graph_.none()) continue;
      const int channel = graph_.channel_in[graph_.chain_of[y]];
      if (channel >= 0) messages_[channel].push(y);
      arrival_[y] = end + graph_.lag[y];
      events_.push({arrival_[y], graph_.rank_of[y]});
    }
  }

  const Graph& graph_;
  const std::vector<std::int64_t>& priority_;
  const std::vector<Bytes>& caps_;
  const bool patient_;
  std::vector<std::vector<int>> chains_of_rank_;
  std::vector<Node> next_;                  // per chain: operations run
  std::vector<Ticks> arrival_;              // per node: when its input is there, once that is known
  std::vector<Ticks> free_at_;              // per rank
  std::vector<Bytes> level_;                // per rank
  std::vector<std::queue<Node>> messages_;  // per channel: who reads what is under way, in order
  Orders orders_;
  using Event = std::pair<Ticks, int>;  // when, rank
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
};

}  // namespace

std::optional<Orders> list_schedule(const Graph& graph, const std::vector<std::int64_t>& priority,
                                    const std::vector<Bytes>& caps, bool patient) {
  return ListScheduler(graph, priority, caps, patient).run();
}

}  // namespace fuse::schedule
