#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/int8_linear.h"
#ifdef FUSE_WITH_CUDA
#include "tensor/bfloat16_binding.h"
#include "tensor/int8_linear_cuda.h"
#endif

namespace nb = nanobind;

namespace fuse {
namespace {

template <typename>
nb::arg stream_argument() {
  return nb::arg("stream");
}

// `queue` is nothing on a CPU, and the number of a CUDA stream on a GPU.
template <typename T, typename Device, typename... Queue>
void bind_int8_linear_of(nb::module_& module) {
  using Inputs = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, Device>;
  using Weights = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, Device>;
  using Scales = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, Device>;
  using Output = nb::ndarray<T, nb::ndim<2>, nb::c_contig, Device>;
  module.def(
      "int8_linear",
      [](const Inputs& inputs, const Weights& weights, const Scales& scales, const Output& output, Queue... queue) {
        const auto rows = static_cast<std::int64_t>(inputs.shape(0));
        const auto outs = static_cast<std::int64_t>(weights.shape(0));
        const auto width = static_cast<std::int64_t>(weights.shape(1));
        nb::gil_scoped_release release;
        using fuse::int8_linear;
#ifdef FUSE_WITH_CUDA
        using cuda::int8_linear;
#endif
        int8_linear(inputs.data(), weights.data(), scales.data(), rows, outs, width, output.data(), queue...);
      },
      nb::arg("inputs").noconvert(), nb::arg("weights").noconvert(), nb::arg("scales").noconvert(),
      nb::arg("output").noconvert(), stream_argument<Queue>()...,
      "Writes the scaled products of each row; shapes are the caller's to check.");
}

}  // namespace

void bind_int8_linear(nb::module_& module) {
  bind_int8_linear_of<float, nb::device::cpu>(module);
#ifdef FUSE_WITH_CUDA
  bind_int8_linear_of<float, nb::device::cuda, std::uintptr_t>(module);
  bind_int8_linear_of<BFloat16, nb::device::cuda, std::uintptr_t>(module);
#endif
}

}  // namespace fuse
