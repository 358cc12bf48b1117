#include "schedule/annealing.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <utility>

namespace fuse::schedule {

namespace {

constexpr std::int64_t kStepsPerTemperature = 128;
constexpr std::int64_t kStepsPerWindowNode = 10;

}  // namespace

Annealing::Annealing(const Graph& graph, const Orders& start, std::vector<Bytes> caps, Ticks target,
                     std::int64_t num_steps, std::uint64_t seed, const AnnealingOptions& options)
    : graph_(graph),
      options_(options),
      caps_(std::move(caps)),
      target_(target),
      num_steps_(num_steps),
      random_(seed),
      timeline_(graph),
      weight_(options.excess_weight * graph.mean_forward_ticks / static_cast<double>(graph.largest_bytes_taken)),
      base_(options.excess_base * static_cast<double>(graph.largest_bytes_taken)) {
  [[maybe_unused]] const bool loaded = timeline_.load(start);
  assert(loaded);
  if (options_.window <= 0 || options_.window > graph.size()) options_.window = graph.size();
  makespan_ = timeline_.makespan();
  measure_excess();
  keep_if_best();
}

void Annealing::change_caps(std::vector<Bytes> caps) {
  caps_ = std::move(caps);
  found_ = false;
  measure_excess();
  keep_if_best();
}

bool Annealing::advance(std::int64_t num_steps) {
  const std::int64_t stop = std::min(num_steps_, step_ + num_steps);
  while (step_ < stop && !(found_ && best_makespan_ <= target_)) step();
  return step_ >= num_steps_ || (found_ && best_makespan_ <= target_);
}

double Annealing::cost(Ticks makespan, double excess) const { return std::max(makespan, target_) + weight_ * excess; }

double Annealing::excess_of(Node x, Bytes level_before) const {
  if (graph_.bytes_taken[x] <= 0) return 0;
  const Bytes over = level_before + graph_.bytes_taken[x] - caps_[graph_.rank_of[x]];
  return over > 0 ? static_cast<double>(over) + base_ : 0;
}

void Annealing::measure_excess() {
  excess_ = 0;
  for (Node x = 0; x < graph_.size(); ++x) excess_ += excess_of(x, timeline_.level_before(x));
}

void Annealing::step() {
  if (step_ % kStepsPerTemperature == 0) {
    const double done = static_cast<double>(step_) / static_cast<double>(num_steps_);
    const double ratio = options_.final_temperature / options_.initial_temperature;
    temperature_ = graph_.mean_forward_ticks * options_.initial_temperature * std::pow(ratio, done);
  }
  if (options_.window < graph_.size() && step_ % (kStepsPerWindowNode * options_.window) == 0) slide_window();
  ++step_;
  if (path_is_stale_) trace_critical_path();

  const Node u = draw_pair(), v = timeline_.next(u);
  if (v == graph_.none() || !timeline_.in_window(v) || !graph_.may_swap(u, v)) {
    path_is_stale_ |= pairs_.empty();
    return;
  }
  const Bytes level = timeline_.level_before(u);
  const double excess = excess_ - excess_of(u, level) - excess_of(v, timeline_.level_before(v)) + excess_of(v, level) +
                        excess_of(u, level + graph_.bytes_taken[v]);
  const double allowed = cost(makespan_, excess_) - temperature_ * std::log(random_.unit()) - weight_ * excess;
  if (allowed < target_) return;
  const Ticks limit = static_cast<Ticks>(std::min(allowed, 0.5 * std::numeric_limits<Ticks>::max()));
  if (timeline_.longest_path_if_swapped(u) > limit || !timeline_.swap(u)) return;
  const Ticks makespan = timeline_.makespan();
  if (makespan > limit) {
    timeline_.undo();
    return;
  }
  timeline_.keep();
  makespan_ = makespan;
  // A sum of differences drifts; no operation over its cap must read as exactly none.
  excess_ = excess < 0.5 * base_ ? 0 : excess;
  path_is_stale_ = true;
  keep_if_best();
}

// Walks back from the end along arcs without slack, choosing at random where both the rank and the data make it wait,
// and collects the pairs of rank neighbours that may change places. A block is a run of rank arcs.
void Annealing::trace_critical_path() {
  pairs_.clear();
  borders_.clear();
  path_is_stale_ = false;
  const Node none = graph_.none();
  Node x = none, last_in_block = none;
  timeline_.makespan(&x, [this](int k) { return random_.below(k); });
  bool in_block = false;
  auto leave_block = [&] {
    if (last_in_block != none && (borders_.empty() || borders_.back() != last_in_block))
      borders_.push_back(last_in_block);
    in_block = false;
    last_in_block = none;
  };
  while (x != none && timeline_.in_window(x)) {
    const Node left = timeline_.previous(x), source = graph_.predecessor[x];
    bool by_rank = left != none && timeline_.end(left) == timeline_.start(x);
    bool by_data = source != none && timeline_.end(source) + graph_.lag[x] == timeline_.start(x);
    if (by_rank && by_data && left != source) by_rank = random_.below(2) == 0;
    if (by_rank) {
      const bool possible = timeline_.in_window(left) && graph_.may_swap(left, x);
      if (possible) {
        pairs_.push_back(left);
        if (!in_block) borders_.push_back(left);
      }
      last_in_block = possible ? left : none;
      in_block = true;
      x = left;
    } else if (by_data) {
      leave_block();
      x = source;
    } else {
      break;
    }
  }
  leave_block();
}

Node Annealing::draw_pair() {
  if (pairs_.empty() || random_.unit() < options_.any_pair_probability) {
    return timeline_.node_in_window(random_.below(timeline_.window_size()));
  }
  const bool at_border = !borders_.empty() && random_.unit() < options_.border_probability;
  const std::vector<Node>& from = at_border ? borders_ : pairs_;
  return from[random_.below(static_cast<std::int32_t>(from.size()))];
}

void Annealing::keep_if_best() {
  if (excess_ > 0 || (found_ && makespan_ >= best_makespan_)) return;
  found_ = true;
  best_ = timeline_.orders();
  best_makespan_ = makespan_;
}

// Windows overlap by half and go round from the beginning to the end of the schedule.
void Annealing::slide_window() {
  const std::int64_t hidden = graph_.size() - options_.window;
  const std::int64_t num_positions = (2 * hidden + options_.window - 1) / options_.window + 1;
  const auto begin = static_cast<Node>(hidden * (window_number_++ % num_positions) / (num_positions - 1));
  timeline_.set_window(begin, begin + options_.window);
  assert(timeline_.makespan() == makespan_);
  path_is_stale_ = true;
}

}  // namespace fuse::schedule
