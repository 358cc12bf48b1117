#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/int8_linear.h"

namespace nb = nanobind;

namespace fuse {

void bind_int8_linear(nb::module_& module) {
  using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Weights = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Scales = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  module.def(
      "int8_linear",
      [](const Inputs& inputs, const Weights& weights, const Scales& scales, const Output& output) {
        const auto rows = static_cast<std::int64_t>(inputs.shape(0));
        const auto outs = static_cast<std::int64_t>(weights.shape(0));
        const auto width = static_cast<std::int64_t>(weights.shape(1));
        nb::gil_scoped_release release;
        int8_linear(inputs.data(), weights.data(), scales.data(), rows, outs, width, output.data());
      },
      nb::arg("inputs").noconvert(), nb::arg("weights").noconvert(), nb::arg("scales").noconvert(),
      nb::arg("output").noconvert(), "Writes the scaled products of each row; shapes are the caller's to check.");
}

}  // namespace fuse
