#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "schedule/annealing.h"
#include "schedule/evaluation.h"
#include "schedule/list_schedule.h"
#include "schedule/reservation_search.h"

namespace nb = nanobind;

namespace fuse::schedule {
namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ChainTable = nb::ndarray<const std::int32_t, nb::shape<-1, 10>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Output = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::vector<T> copy(const Input<T>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

Graph make_graph(int num_ranks, const ChainTable& chains, const Input<Ticks>& duration, const Input<Node>& predecessor,
                 const Input<Ticks>& lag, const Input<Bytes>& bytes_taken, const Input<Bytes>& initial_bytes) {
  std::vector<Chain> table;
  for (std::size_t c = 0; c < chains.shape(0); ++c) {
    const std::int32_t* row = chains.data() + 10 * c;
    table.push_back({.first = row[0],
                     .count = row[1],
                     .rank = row[2],
                     .pipeline = row[3],
                     .stage = row[4],
                     .num_stages = row[5],
                     .kind = static_cast<Kind>(row[6]),
                     .channel_in = row[7],
                     .channel_out = row[8],
                     .before = row[9]});
  }
  return Graph(num_ranks, std::move(table), copy(duration), copy(predecessor), copy(lag), copy(bytes_taken),
               copy(initial_bytes));
}

// Orders cross as one array of nodes, rank after rank, and the offset of each rank's first.
Orders split(const Input<Node>& nodes, const Input<std::int32_t>& offsets) {
  Orders orders;
  for (std::size_t rank = 0; rank + 1 < offsets.size(); ++rank) {
    orders.emplace_back(nodes.data() + offsets.data()[rank], nodes.data() + offsets.data()[rank + 1]);
  }
  return orders;
}

Ticks evaluate_into(const Graph& graph, const Input<Node>& nodes, const Input<std::int32_t>& offsets,
                    const Output<Ticks>& start, const Output<Bytes>& peak_bytes) {
  std::optional<Evaluation> evaluation;
  {
    nb::gil_scoped_release release;
    evaluation = evaluate(graph, split(nodes, offsets));
  }
  if (!evaluation) throw std::invalid_argument("schedule deadlocks; schedules.evaluate names the ranks");
  std::copy(evaluation->start.begin(), evaluation->start.end(), start.data());
  std::copy(evaluation->peak_bytes.begin(), evaluation->peak_bytes.end(), peak_bytes.data());
  return evaluation->makespan;
}

std::optional<Orders> list_schedule_of(const Graph& graph, const Input<std::int64_t>& priority,
                                       const Input<Bytes>& caps, bool patient) {
  nb::gil_scoped_release release;
  return list_schedule(graph, copy(priority), copy(caps), patient);
}

}  // namespace
}  // namespace fuse::schedule

NB_MODULE(_native, module) {
  using namespace fuse::schedule;
  module.doc() =
      "Native schedule evaluation and search. Shapes and values are the caller's to check (schedules.fused).";

  nb::class_<Graph>(module, "Graph", "Operations, chains and dependencies; see kernels/schedule/graph.h.")
      .def(
          "__init__",
          [](Graph* self, int num_ranks, const ChainTable& chains, const Input<Ticks>& duration,
             const Input<Node>& predecessor, const Input<Ticks>& lag, const Input<Bytes>& bytes_taken,
             const Input<Bytes>& initial_bytes) {
            new (self) Graph(make_graph(num_ranks, chains, duration, predecessor, lag, bytes_taken, initial_bytes));
          },
          nb::arg("num_ranks"), nb::arg("chains"), nb::arg("duration"), nb::arg("predecessor"), nb::arg("lag"),
          nb::arg("bytes_taken"), nb::arg("initial_bytes"))
      .def_prop_ro("size", &Graph::size);

  module.def("evaluate", &evaluate_into, nb::arg("graph"), nb::arg("nodes"), nb::arg("offsets"), nb::arg("start"),
             nb::arg("peak_bytes"), "Writes each node's start and each rank's peak; returns the makespan.");

  module.def("list_schedule", &list_schedule_of, nb::arg("graph"), nb::arg("priority"), nb::arg("caps"),
             nb::arg("patient"), "See kernels/schedule/list_schedule.h; None when the ranks block one another.");

  nb::class_<AnnealingOptions>(module, "AnnealingOptions", "See kernels/schedule/annealing.h.")
      .def(nb::init<>())
      .def_rw("initial_temperature", &AnnealingOptions::initial_temperature)
      .def_rw("final_temperature", &AnnealingOptions::final_temperature)
      .def_rw("excess_weight", &AnnealingOptions::excess_weight)
      .def_rw("excess_base", &AnnealingOptions::excess_base)
      .def_rw("any_pair_probability", &AnnealingOptions::any_pair_probability)
      .def_rw("border_probability", &AnnealingOptions::border_probability)
      .def_rw("window", &AnnealingOptions::window);

  nb::class_<Annealing>(module, "Annealing", "See kernels/schedule/annealing.h.")
      .def(
          "__init__",
          [](Annealing* self, const Graph& graph, const Input<Node>& nodes, const Input<std::int32_t>& offsets,
             const Input<Bytes>& caps, Ticks target, std::int64_t num_steps, std::uint64_t seed,
             const AnnealingOptions& options) {
            new (self) Annealing(graph, split(nodes, offsets), copy(caps), target, num_steps, seed, options);
          },
          nb::arg("graph"), nb::arg("nodes"), nb::arg("offsets"), nb::arg("caps"), nb::arg("target"),
          nb::arg("num_steps"), nb::arg("seed"), nb::arg("options"), nb::keep_alive<1, 2>())
      .def("advance", &Annealing::advance, nb::arg("num_steps"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "change_caps", [](Annealing& self, const Input<Bytes>& caps) { self.change_caps(copy(caps)); },
          nb::arg("caps"))
      .def("best", &Annealing::best)
      .def_prop_ro("found", &Annealing::found)
      .def_prop_ro("best_makespan", &Annealing::best_makespan)
      .def_prop_ro("makespan", &Annealing::makespan)
      .def_prop_ro("within_caps", &Annealing::within_caps)
      .def_prop_ro("num_steps_done", &Annealing::num_steps_done);

  nb::class_<ReservationSearch>(module, "ReservationSearch", "See kernels/schedule/reservation_search.h.")
      .def(
          "__init__",
          [](ReservationSearch* self, const Graph& graph, std::vector<int> group_of_pipeline, const Input<Bytes>& caps,
             Ticks target, std::uint64_t seed) {
            new (self) ReservationSearch(graph, std::move(group_of_pipeline), copy(caps), target, seed);
          },
          nb::arg("graph"), nb::arg("group_of_pipeline"), nb::arg("caps"), nb::arg("target"), nb::arg("seed"),
          nb::keep_alive<1, 2>())
      .def("advance", &ReservationSearch::advance, nb::arg("num_trials"), nb::call_guard<nb::gil_scoped_release>())
      .def("best", &ReservationSearch::best)
      .def_prop_ro("found", &ReservationSearch::found)
      .def_prop_ro("best_makespan", &ReservationSearch::best_makespan);
}
