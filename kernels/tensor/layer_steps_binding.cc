#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <utility>

#include "tensor/bindings.h"
#include "tensor/layer_steps.h"

namespace nb = nanobind;

namespace fuse {

void bind_layer_steps(nb::module_& module) {
  using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Heads = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
  using HeadsOut = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
  using RowOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using RowsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  const auto size = [](const auto& array, int axis) { return static_cast<std::int64_t>(array.shape(axis)); };
  module.def(
      "rms_norm",
      [size](const Rows& input, const Row& weight, float epsilon, const RowsOut& output, const RowOut& factors) {
        nb::gil_scoped_release release;
        rms_norm(input.data(), weight.data(), size(input, 0), size(input, 1), epsilon, output.data(), factors.data());
      },
      nb::arg("input").noconvert(), nb::arg("weight").noconvert(), nb::arg("epsilon"), nb::arg("output").noconvert(),
      nb::arg("factors").noconvert(), "Writes output and factors; shapes are the caller's to check.");
  module.def(
      "rms_norm_backward",
      [size](const Rows& input, const Row& weight, const Row& factors, const Rows& output_grad,
             const RowsOut& input_grad, const RowOut& weight_grad) {
        nb::gil_scoped_release release;
        rms_norm_backward(input.data(), weight.data(), factors.data(), output_grad.data(), size(input, 0),
                          size(input, 1), input_grad.data(), weight_grad.data());
      },
      nb::arg("input").noconvert(), nb::arg("weight").noconvert(), nb::arg("factors").noconvert(),
      nb::arg("output_grad").noconvert(), nb::arg("input_grad").noconvert(), nb::arg("weight_grad").noconvert(),
      "Writes the gradients; shapes are the caller's to check.");
  module.def(
      "swiglu",
      [size](const Row& gate, const Row& up, const RowOut& output) {
        nb::gil_scoped_release release;
        swiglu(gate.data(), up.data(), size(gate, 0), output.data());
      },
      nb::arg("gate").noconvert(), nb::arg("up").noconvert(), nb::arg("output").noconvert(),
      "Writes the output; shapes are the caller's to check.");
  module.def(
      "swiglu_backward",
      [size](const Row& gate, const Row& up, const Row& output_grad, const RowOut& gate_grad, const RowOut& up_grad) {
        nb::gil_scoped_release release;
        swiglu_backward(gate.data(), up.data(), output_grad.data(), size(gate, 0), gate_grad.data(), up_grad.data());
      },
      nb::arg("gate").noconvert(), nb::arg("up").noconvert(), nb::arg("output_grad").noconvert(),
      nb::arg("gate_grad").noconvert(), nb::arg("up_grad").noconvert(),
      "Writes the gradients; shapes are the caller's to check.");
  for (const auto& [name, turn] : {std::pair{"rotary", &rotary}, std::pair{"rotary_backward", &rotary_backward}}) {
    module.def(
        name,
        [size, turn = turn](const Heads& input, const Rows& cosines, const Rows& sines, const HeadsOut& output) {
          nb::gil_scoped_release release;
          turn(input.data(), cosines.data(), sines.data(), size(input, 0), size(input, 1), size(input, 2),
               size(cosines, 0), output.data());
        },
        nb::arg("input").noconvert(), nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(),
        nb::arg("output").noconvert(), "Writes the output; shapes are the caller's to check.");
  }
}

}  // namespace fuse
