#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/skinny_linear.h"

namespace nb = nanobind;

namespace fuse {

void bind_skinny_linear(nb::module_& module) {
  using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Weights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  module.def(
      "skinny_linear",
      [](const Inputs& inputs, const Weights& weights, const Output& output) {
        const auto rows = static_cast<std::int64_t>(inputs.shape(0));
        const auto outs = static_cast<std::int64_t>(weights.shape(0));
        const auto width = static_cast<std::int64_t>(weights.shape(1));
        nb::gil_scoped_release release;
        skinny_linear(inputs.data(), weights.data(), rows, outs, width, output.data(), outs);
      },
      nb::arg("inputs").noconvert(), nb::arg("weights").noconvert(), nb::arg("output").noconvert(),
      "Writes the products of each row; shapes are the caller's to check.");
}

}  // namespace fuse
