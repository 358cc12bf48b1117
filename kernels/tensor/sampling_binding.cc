#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/sampling.h"

namespace nb = nanobind;

namespace fuse {

void bind_sampling(nb::module_& module) {
  using Logits = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
  using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Keys = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Tokens = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Logprobs = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  module.def(
      "sample",
      [](const Logits& logits, const Floats& temperatures, const Keys& keys, const Tokens& tokens,
         const Logprobs& logprobs) {
        nb::gil_scoped_release release;
        sample(logits.data(), logits.stride(0), static_cast<std::int64_t>(logits.shape(0)),
               static_cast<std::int64_t>(logits.shape(1)), temperatures.data(), keys.data(), tokens.data(),
               logprobs.data());
      },
      nb::arg("logits").noconvert(), nb::arg("temperatures").noconvert(), nb::arg("keys").noconvert(),
      nb::arg("tokens").noconvert(), nb::arg("logprobs").noconvert(),
      "Writes every row's token and log-probability; the last dimension of logits is contiguous, shapes are the "
      "caller's to check.");
}

}  // namespace fuse
