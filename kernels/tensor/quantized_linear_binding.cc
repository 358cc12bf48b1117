#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bfloat16_binding.h"
#include "tensor/bindings.h"
#include "tensor/quantized_linear.h"
#ifdef FUSE_WITH_CUDA
#include "tensor/quantized_linear_cuda.h"
#endif

namespace nb = nanobind;

namespace fuse {
namespace {

template <typename T, int dimensions, typename Device>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, Device>;

template <typename>
nb::arg stream_argument() {
  return nb::arg("stream");
}

// Values and Scales: arrays that `make_weights` makes weights of. `queue` is nothing on a CPU, and the number of a CUDA
// stream on a GPU.
template <typename T, typename Device, class Values, class Scales, typename... Queue, class MakeWeights>
void bind_product(nb::module_& module, const char* name, MakeWeights make_weights) {
  module.def(
      name,
      [make_weights](const Array<const T, 2, Device>& inputs, const Values& values, const Scales& scales,
                     const Array<T, 2, Device>& output, Queue... queue) {
        const auto rows = static_cast<std::int64_t>(inputs.shape(0));
        const auto width = static_cast<std::int64_t>(inputs.shape(1));
        const auto outs = static_cast<std::int64_t>(values.shape(0));
        const auto weights = make_weights(values, scales);
        nb::gil_scoped_release release;
        using fuse::quantized_linear;
#ifdef FUSE_WITH_CUDA
        using cuda::quantized_linear;
#endif
        quantized_linear(inputs.data(), weights, rows, outs, width, output.data(), queue...);
      },
      nb::arg("inputs").noconvert(), nb::arg("values").noconvert(), nb::arg("scales").noconvert(),
      nb::arg("output").noconvert(), stream_argument<Queue>()...,
      "Writes the products of each row; shapes are the caller's to check.");
}

template <typename T, typename Device, typename... Queue>
void bind_products(nb::module_& module) {
  using Int8Values = Array<const std::int8_t, 2, Device>;
  using Int8Scales = Array<const float, 1, Device>;
  bind_product<T, Device, Int8Values, Int8Scales, Queue...>(
      module, "int8_linear",
      [](const Int8Values& values, const Int8Scales& scales) { return Int8Weights{values.data(), scales.data()}; });
  using Int4Values = Array<const std::uint8_t, 3, Device>;
  using Int4Ranges = Array<const BFloat16, 3, Device>;
  bind_product<T, Device, Int4Values, Int4Ranges, Queue...>(
      module, "int4_linear", [](const Int4Values& values, const Int4Ranges& ranges) {
        return Int4Weights{values.data(), reinterpret_cast<const Int4Range*>(ranges.data())};
      });
}

}  // namespace

void bind_quantized_linear(nb::module_& module) {
  bind_products<float, nb::device::cpu>(module);
#ifdef FUSE_WITH_CUDA
  bind_products<float, nb::device::cuda, std::uintptr_t>(module);
  bind_products<BFloat16, nb::device::cuda, std::uintptr_t>(module);
#endif
}

}  // namespace fuse
