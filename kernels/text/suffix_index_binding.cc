#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "tensor/bindings.h"
#include "text/suffix_index.h"

namespace nb = nanobind;

namespace fuse {

void bind_suffix_index(nb::module_& module) {
  using Tokens = SuffixIndex::Tokens;
  using Guard = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<SuffixIndex>(module, "SuffixIndex")
      .def(nb::init<std::int64_t>(), nb::arg("most_tokens"))
      .def("open", &SuffixIndex::open, nb::arg("prompt"), Guard(), "Begins a response; returns its number.")
      .def(
          "extend",
          [](SuffixIndex& index, const std::vector<std::int64_t>& responses, const std::vector<Tokens>& added,
             const std::vector<std::int64_t>& counts) {
            for (std::size_t i = 0; i < responses.size(); ++i) index.extend(responses[i], added[i]);
            std::vector<Tokens> drafts;
            for (std::size_t i = 0; i < responses.size(); ++i) {
              drafts.push_back(index.continuation(responses[i], counts[i]));
            }
            return drafts;
          },
          nb::arg("responses"), nb::arg("added"), nb::arg("counts"), Guard(),
          "Takes what was added to responses; returns at most so many tokens to follow each.")
      .def("close", &SuffixIndex::close, nb::arg("response"), Guard(), "No more tokens come.");
}

}  // namespace fuse
