#include "schedule/reservation_search.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "schedule/evaluation.h"

namespace fuse::schedule {

namespace {

constexpr int kMaxFailures = 60;
// Share of the way from the lead's own work per micro-batch to the busiest rank's.
constexpr std::array kPeriods = {0.0, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0};
// In quarters of a mean forward.
constexpr std::array kTolerances = {0, 1, 2, 3, 4, 6, 1000};
constexpr std::array kSlacks = {-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 1000};

}  // namespace

ReservationSearch::ReservationSearch(const Graph& graph, std::vector<int> group_of_pipeline, std::vector<Bytes> caps,
                                     Ticks target, std::uint64_t seed)
    : graph_(graph),
      group_of_pipeline_(std::move(group_of_pipeline)),
      caps_(std::move(caps)),
      target_(target),
      random_(seed) {
  const int num_groups = *std::max_element(group_of_pipeline_.begin(), group_of_pipeline_.end()) + 1;
  num_values_ = {num_groups,
                 static_cast<int>(kPeriods.size()),
                 static_cast<int>(kTolerances.size()),
                 static_cast<int>(kSlacks.size()),
                 static_cast<int>(kSlacks.size()),
                 2};
  limit_ = 2 * std::max(target, *std::max_element(graph.work.begin(), graph.work.end()));
}

bool ReservationSearch::advance(std::int64_t num_trials) {
  for (std::int64_t i = 0; i < num_trials && !(found_ && best_makespan_ <= target_); ++i) trial();
  return found_ && best_makespan_ <= target_;
}

void ReservationSearch::trial() {
  if (num_failures_ > kMaxFailures) climbing_ = false;
  const Setting setting = climbing_ ? neighbour(here_) : draw();
  ++num_failures_;
  if (!seen_.insert(setting).second) return;
  const auto orders = reservation_schedule(graph_, group_of_pipeline_, caps_, parameters(setting), limit_);
  if (!orders) return;
  const auto evaluation = evaluate(graph_, *orders);
  if (!evaluation) return;
  const Ticks makespan = evaluation->makespan;
  if (!climbing_ || makespan <= here_makespan_) {
    if (!climbing_ || makespan < here_makespan_) num_failures_ = 0;
    climbing_ = true;
    here_ = setting;
    here_makespan_ = makespan;
  }
  if (!found_ || makespan < best_makespan_) {
    found_ = true;
    best_ = *orders;
    best_makespan_ = makespan;
  }
}

ReservationSearch::Setting ReservationSearch::draw() {
  Setting setting;
  for (std::size_t i = 0; i < setting.size(); ++i) setting[i] = random_.below(num_values_[i]);
  // The first group, by convention the largest model, leads best most of the time.
  if (random_.below(4) > 0) setting[0] = 0;
  return setting;
}

ReservationSearch::Setting ReservationSearch::neighbour(const Setting& setting) {
  Setting changed = setting;
  const int i = random_.below(static_cast<int>(setting.size()));
  if (i == 0 || i == 5) {
    changed[i] = random_.below(num_values_[i]);
  } else {
    const int distance = 1 + random_.below(2);
    changed[i] = std::clamp(setting[i] + (random_.below(2) ? distance : -distance), 0, num_values_[i] - 1);
  }
  if (random_.below(3) == 0) {
    const int j = 1 + random_.below(4);
    changed[j] = random_.below(num_values_[j]);
  }
  return changed;
}

ReservationParameters ReservationSearch::parameters(const Setting& setting) const {
  // A lead pipeline alone can inject every `own` ticks, where a stage takes that long for a micro-batch; when it shares
  // its ranks evenly, every `shared`.
  double own = 0, shared = 0;
  std::vector<double> stage_ticks(graph_.num_ranks, 0);
  int num_micro_batches = 1;
  for (const Chain& chain : graph_.chains) {
    if (group_of_pipeline_[chain.pipeline] != setting[0]) continue;
    double ticks = 0;
    for (Node x = chain.first; x < chain.first + chain.count; ++x) ticks += graph_.duration[x];
    stage_ticks[chain.rank] += ticks;
    if (chain.kind == Kind::kForward) num_micro_batches = std::max(num_micro_batches, static_cast<int>(chain.count));
  }
  own = *std::max_element(stage_ticks.begin(), stage_ticks.end()) / num_micro_batches;
  shared = static_cast<double>(*std::max_element(graph_.work.begin(), graph_.work.end())) / num_micro_batches;
  const double quarter = std::max(1.0, graph_.mean_forward_ticks / 4);
  return {.lead_group = setting[0],
          .period_ticks = own + (shared - own) * kPeriods[setting[1]],
          .tolerance_ticks = static_cast<Ticks>(kTolerances[setting[2]] * quarter),
          .lead_slack = kSlacks[setting[3]],
          .follower_slack = kSlacks[setting[4]],
          .lead_first = setting[5] == 1};
}

}  // namespace fuse::schedule
