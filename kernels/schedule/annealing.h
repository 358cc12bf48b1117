// Simulated annealing of a schedule by adjacent swaps on critical paths, under a memory cap per rank.
#pragma once

#include <cstdint>
#include <vector>

#include "schedule/graph.h"
#include "schedule/random.h"
#include "schedule/timeline.h"

namespace fuse::schedule {

// Temperatures are in mean forward durations, memory in largest activations.
struct AnnealingOptions {
  double initial_temperature = 0.4;
  double final_temperature = 0.1;
  double excess_weight = 3.0;  // ticks (in mean forwards) per largest activation over the cap
  double excess_base = 0.3;    // added to every excess, so that small ones do not linger
  double any_pair_probability = 0.03;
  double border_probability = 0.3;  // first or last pair of a critical block
  Node window = 0;                  // nodes; 0: all
};

// Minimises max(makespan, target) + weight * sum over the operations above their rank's cap of (excess + base).
//
// One step: trace one random critical path; pick one of its adjacent pairs that share a rank and no chain (a border of
// a block of such pairs more often, any pair now and then); draw the acceptance first, so that the update can give up
// as soon as the makespan must exceed it. The temperature falls geometrically with the share of steps done. A run is a
// function of its arguments: the same seed and number of steps give the same schedule, however `advance` is called.
class Annealing {
 public:
  Annealing(const Graph& graph, const Orders& start, std::vector<Bytes> caps, Ticks target, std::int64_t num_steps,
            std::uint64_t seed, const AnnealingOptions& options);

  // Runs up to `num_steps` more steps; true when all are done, or a schedule within the caps and the target is found.
  bool advance(std::int64_t num_steps);

  // Goes on from the current state, and as hot as it is, under other caps: what was found before does not count.
  void change_caps(std::vector<Bytes> caps);

  bool found() const { return found_; }
  // The shortest schedule within the caps, if found.
  const Orders& best() const { return best_; }
  Ticks best_makespan() const { return best_makespan_; }
  std::int64_t num_steps_done() const { return step_; }
  // The current state, within the caps or not.
  Ticks makespan() const { return makespan_; }
  bool within_caps() const { return excess_ == 0; }

 private:
  double cost(Ticks makespan, double excess) const;
  double excess_of(Node x, Bytes level_before) const;
  void trace_critical_path();
  Node draw_pair();
  void step();
  void measure_excess();
  void keep_if_best();
  void slide_window();

  const Graph& graph_;
  AnnealingOptions options_;
  std::vector<Bytes> caps_;
  Ticks target_;
  std::int64_t num_steps_;
  Random random_;
  Timeline timeline_;
  double weight_, base_;

  std::int64_t step_ = 0;
  std::int64_t window_number_ = 0;
  double temperature_ = 0;
  Ticks makespan_ = 0;
  double excess_ = 0;
  bool path_is_stale_ = true;
  std::vector<Node> pairs_, borders_;  // left nodes of critical pairs

  bool found_ = false;
  Orders best_;
  Ticks best_makespan_ = 0;
};

}  // namespace fuse::schedule
