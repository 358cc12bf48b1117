#include "schedule/reservation.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>

namespace fuse::schedule {

namespace {

constexpr Ticks kNotRun = -1;

// One event-driven pass over the lead alone, or over all pipelines beside the lead's reservations.
class Pass {
 public:
  Pass(const Graph& graph, const std::vector<int>& group_of_pipeline, const std::vector<Bytes>& caps,
       const ReservationParameters& parameters)
      : graph_(graph), caps_(caps), parameters_(parameters), chains_of_rank_(graph.num_ranks) {
    for (const Chain& chain : graph.chains) {
      const bool lead = group_of_pipeline[chain.pipeline] == parameters.lead_group;
      is_lead_.push_back(lead);
    }
    // Backwards, forwards, weight gradients: the order in which a rank looks for work.
    for (Kind kind : {Kind::kBackward, Kind::kForward, Kind::kWeight}) {
      for (std::size_t c = 0; c < graph.chains.size(); ++c) {
        if (graph.chains[c].kind == kind) chains_of_rank_[graph.chains[c].rank].push_back(static_cast<int>(c));
      }
    }
    backward_of_.assign(graph.chains.size(), -1);
    for (std::size_t f = 0; f < graph.chains.size(); ++f) {
      for (std::size_t b = 0; b < graph.chains.size(); ++b) {
        const Chain &forward = graph.chains[f], &backward = graph.chains[b];
        if (forward.kind == Kind::kForward && backward.kind == Kind::kBackward &&
            forward.pipeline == backward.pipeline && forward.stage == backward.stage) {
          backward_of_[f] = static_cast<int>(b);
        }
      }
    }
    int num_channels = 0;
    for (const Chain& chain : graph.chains) num_channels = std::max(num_channels, chain.channel_in + 1);
    messages_.resize(num_channels);
  }

  // `reserved` is empty in the lead's pass and its result in the second.
  std::optional<Orders> run(const std::vector<Ticks>& reserved, Ticks limit, std::vector<Ticks>* starts) {
    const bool lead_alone = reserved.empty();
    Node num_left = 0;
    next_.assign(graph_.chains.size(), 0);
    for (std::size_t c = 0; c < graph_.chains.size(); ++c) {
      if (is_lead_[c] || !lead_alone) num_left += graph_.chains[c].count;
    }
    end_.assign(graph_.size() + 1, kNotRun);
    end_[graph_.none()] = 0;
    free_at_.assign(graph_.num_ranks, 0);
    level_ = graph_.initial_bytes;
    for (auto& queue : messages_) queue = {};
    events_ = {};
    events_.push(0);
    Orders orders(graph_.num_ranks);
    Ticks now = 0;
    bool forced = false;
    while (num_left > 0) {
      if (events_.empty()) {
        if (forced) return std::nullopt;
        forced = true;
      } else {
        forced = false;
        now = events_.top();
        while (!events_.empty() && events_.top() == now) events_.pop();
        if (now > limit) return std::nullopt;
      }
      for (int rank = 0; rank < graph_.num_ranks; ++rank) {
        if (free_at_[rank] > now) continue;
        const int c = choose(rank, now, reserved, forced);
        if (c < 0) continue;
        const Node x = graph_.chains[c].first + next_[c]++;
        start(x, c, now);
        orders[rank].push_back(x);
        if (starts) (*starts)[x] = now;
        --num_left;
        if (forced) break;
      }
    }
    return orders;
  }

 private:
  Node next_node(int c) const {
    const Chain& chain = graph_.chains[c];
    return next_[c] < chain.count ? chain.first + next_[c] : graph_.none();
  }

  // Whether an operation that the chain's next must come after has yet to run.
  bool is_behind(int c, bool lead_alone) const {
    for (int d : graph_.first_chains[c]) {
      if (next_[d] <= next_[c] && (is_lead_[d] || !lead_alone)) return true;
    }
    return false;
  }

  bool is_ready(int c, Node x, Ticks now, bool lead_alone) const {
    const Node p = graph_.predecessor[x];
    if (end_[p] == kNotRun || end_[p] + graph_.lag[x] > now) return false;
    if (is_behind(c, lead_alone)) return false;
    const int channel = graph_.chains[c].channel_in;
    return channel < 0 || messages_[channel].front() == x;
  }

  bool has_room(int c, Node x, bool lead_alone) const {
    const Chain& chain = graph_.chains[c];
    if (!lead_alone && graph_.bytes_taken[x] > 0 && level_[chain.rank] + graph_.bytes_taken[x] > caps_[chain.rank]) {
      return false;
    }
    if (chain.kind != Kind::kForward || backward_of_[c] < 0) return true;
    const int slack = is_lead_[c] ? parameters_.lead_slack : parameters_.follower_slack;
    return next_[c] - next_[backward_of_[c]] < std::max(1, chain.num_stages - chain.stage + slack);
  }

  // Whether a lead operation is predicted to arrive on the rank before `until`.
  bool is_reserved(int rank, Ticks now, Ticks until, const std::vector<Ticks>& reserved) const {
    for (int c : chains_of_rank_[rank]) {
      const Node x = next_node(c);
      if (!is_lead_[c] || x == graph_.none() || graph_.chains[c].kind == Kind::kWeight) continue;
      if (is_behind(c, false)) continue;
      if (graph_.chains[c].kind == Kind::kForward && !has_room(c, x, false)) continue;
      const Node p = graph_.predecessor[x];
      const Ticks possible = end_[p] == kNotRun ? now + 1 : std::max(now, end_[p] + graph_.lag[x]);
      if (std::max(possible, reserved[x]) < until) return true;
    }
    return false;
  }

  // The chain whose next operation the rank runs now, or -1.
  int choose(int rank, Ticks now, const std::vector<Ticks>& reserved, bool forced) {
    const bool lead_alone = reserved.empty();
    int lead = -1, follower = -1, weight = -1;
    for (int c : chains_of_rank_[rank]) {
      const Node x = next_node(c);
      if (x == graph_.none() || (lead_alone && !is_lead_[c]) || !is_ready(c, x, now, lead_alone) ||
          !has_room(c, x, lead_alone)) {
        continue;
      }
      const Chain& chain = graph_.chains[c];
      if (is_lead_[c] && chain.kind == Kind::kForward && chain.stage == 0 && !forced) {
        const auto injection = static_cast<Ticks>(std::ceil(next_[c] * parameters_.period_ticks));
        if (now < injection) {
          events_.push(injection);
          continue;
        }
      }
      int& slot = chain.kind == Kind::kWeight ? weight : is_lead_[c] ? lead : follower;
      if (slot >= 0) continue;
      if (&slot != &lead && !lead_alone && !forced &&
          is_reserved(rank, now, now + graph_.duration[x] - parameters_.tolerance_ticks, reserved)) {
        continue;
      }
      slot = c;
    }
    if (lead >= 0 && (parameters_.lead_first || follower < 0)) return lead;
    return follower >= 0 ? follower : weight;
  }

  void start(Node x, int c, Ticks now) {
    const Chain& chain = graph_.chains[c];
    end_[x] = free_at_[chain.rank] = now + graph_.duration[x];
    level_[chain.rank] += graph_.bytes_taken[x];
    events_.push(end_[x]);
    if (chain.channel_in >= 0) messages_[chain.channel_in].pop();
    for (Node y : graph_.successors[x]) {
      if (y == graph_.none()) continue;
      if (graph_.lag[y] > 0) events_.push(end_[x] + graph_.lag[y]);
      const int channel = graph_.chains[graph_.chain_of[y]].channel_in;
      if (channel >= 0) messages_[channel].push(y);
    }
  }

  const Graph& graph_;
  const std::vector<Bytes>& caps_;
  const ReservationParameters& parameters_;
  std::vector<std::vector<int>> chains_of_rank_;
  std::vector<char> is_lead_;               // per chain
  std::vector<int> backward_of_;            // per forward chain; -1 in a forward-only pipeline
  std::vector<Node> next_;                  // per chain: operations run
  std::vector<Ticks> end_;                  // per node
  std::vector<Ticks> free_at_;              // per rank
  std::vector<Bytes> level_;                // per rank
  std::vector<std::queue<Node>> messages_;  // per channel: who reads what is under way, in order
  std::priority_queue<Ticks, std::vector<Ticks>, std::greater<>> events_;
};

}  // namespace

std::optional<Orders> reservation_schedule(const Graph& graph, const std::vector<int>& group_of_pipeline,
                                           const std::vector<Bytes>& caps, const ReservationParameters& parameters,
                                           Ticks limit) {
  Pass pass(graph, group_of_pipeline, caps, parameters);
  std::vector<Ticks> reserved(graph.size() + 1, 0);
  if (!pass.run({}, limit, &reserved)) return std::nullopt;
  return pass.run(reserved, limit, nullptr);
}

}  // namespace fuse::schedule
