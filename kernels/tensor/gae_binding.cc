#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/gae.h"

namespace nb = nanobind;

namespace fuse {
namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::device::cpu>;
template <typename T>
using Output = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
void bind_gae_of(nb::module_& module) {
  module.def(
      "gae",
      [](const Input<T>& rewards, const Input<T>& values, const Offsets& offsets, double gamma, double lambda,
         const Output<T>& advantages, const Output<T>& returns) {
        const Strided<const T> reward_rows{rewards.data(), rewards.stride(0)};
        const Strided<const T> value_rows{values.data(), values.stride(0)};
        const auto num_samples = static_cast<std::int64_t>(offsets.shape(0)) - 1;
        nb::gil_scoped_release release;
        gae<T>(reward_rows, value_rows, offsets.data(), num_samples, gamma, lambda, advantages.data(), returns.data());
      },
      nb::arg("rewards").noconvert(), nb::arg("values").noconvert(), nb::arg("offsets").noconvert(), nb::arg("gamma"),
      nb::arg("lam"), nb::arg("advantages").noconvert(), nb::arg("returns").noconvert(),
      "Writes the advantages and returns of every sample; shapes and offsets are the caller's to check.");
}

}  // namespace

void bind_gae(nb::module_& module) {
  bind_gae_of<float>(module);
  bind_gae_of<double>(module);
}

}  // namespace fuse
