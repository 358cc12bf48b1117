// Reservation list scheduling: one model keeps the times it would have alone, the others fill what is left.
#pragma once

#include <optional>
#include <vector>

#include "schedule/graph.h"

namespace fuse::schedule {

struct ReservationParameters {
  int lead_group = 0;         // the pipelines whose group this is lead
  double period_ticks = 0;    // between two injections of a lead pipeline
  Ticks tolerance_ticks = 0;  // how far a follower may run into a reservation
  // Micro-batches in flight at stage s of P: at most P - s + slack, at least one.
  int lead_slack = 0;
  int follower_slack = 0;
  bool lead_first = true;  // when both are ready
};

// Schedules the lead alone with the injection period: its starts are the reservations. Then schedules everything event
// by event: an idle rank runs a ready lead operation (backward before forward, forwards within the in-flight limit and
// the memory cap), or a ready follower operation unless a lead operation is predicted to arrive before it would end.
// Weight gradients run where nothing else does. When all wait for reservations only, the next ready operation goes
// first.
//
// Empty when the models block one another under the caps, or the makespan would exceed `limit`.
// O(nodes * chains per rank + events * log events).
std::optional<Orders> reservation_schedule(const Graph& graph, const std::vector<int>& group_of_pipeline,
                                           const std::vector<Bytes>& caps, const ReservationParameters& parameters,
                                           Ticks limit);

}  // namespace fuse::schedule
