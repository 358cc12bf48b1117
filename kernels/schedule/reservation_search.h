// A search over the parameters of reservation list scheduling: random samples, then coordinate hill-climbing.
#pragma once

#include <array>
#include <cstdint>
#include <set>
#include <vector>

#include "schedule/random.h"
#include "schedule/reservation.h"

namespace fuse::schedule {

// Deterministic for its arguments and the number of trials, however `advance` is called.
class ReservationSearch {
 public:
  ReservationSearch(const Graph& graph, std::vector<int> group_of_pipeline, std::vector<Bytes> caps, Ticks target,
                    std::uint64_t seed);

  // Tries that many more parameter settings; true once a schedule meets the target.
  bool advance(std::int64_t num_trials);

  bool found() const { return found_; }
  const Orders& best() const { return best_; }
  Ticks best_makespan() const { return best_makespan_; }

 private:
  // Indices into the tables of values: lead group, period, tolerance, lead slack, follower slack, who goes first.
  using Setting = std::array<int, 6>;

  Setting draw();
  Setting neighbour(const Setting& setting);
  ReservationParameters parameters(const Setting& setting) const;
  void trial();

  const Graph& graph_;
  std::vector<int> group_of_pipeline_;
  std::vector<Bytes> caps_;
  Ticks target_;
  Random random_;
  Setting num_values_;
  Ticks limit_;  // schedules longer than this are given up

  bool climbing_ = false;
  Setting here_{};
  Ticks here_makespan_ = 0;
  int num_failures_ = 0;
  std::set<Setting> seen_;

  bool found_ = false;
  Orders best_;
  Ticks best_makespan_ = 0;
};

}  // namespace fuse::schedule
