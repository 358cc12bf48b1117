#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/gae.h"
#ifdef FUSE_WITH_CUDA
#include "tensor/gae_cuda.h"
#endif

namespace nb = nanobind;

namespace fuse {
namespace {

template <typename T, typename Device>
using Strides = nb::ndarray<const T, nb::ndim<1>, Device>;
template <typename T, typename Device>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, Device>;
template <typename T, typename Device>
using Output = nb::ndarray<T, nb::ndim<1>, nb::c_contig, Device>;
template <typename Device>
using Sums = nb::ndarray<double, nb::ndim<2>, nb::c_contig, Device>;

template <typename T, typename Device>
Strided<const T> strided(const Strides<T, Device>& rows) {
  return {rows.data(), static_cast<std::ptrdiff_t>(rows.stride(0))};
}

template <typename T, typename Device>
Responses<T> responses_of(const Input<T, Device>& logprobs, const Input<T, Device>& reference_logprobs,
                          const Input<T, Device>& scores, const Input<T, Device>& values,
                          const Input<std::int64_t, Device>& token_offsets,
                          const Input<std::int64_t, Device>& value_offsets) {
  return {logprobs.data(),
          reference_logprobs.data(),
          scores.data(),
          values.data(),
          token_offsets.data(),
          value_offsets.data(),
          static_cast<std::int64_t>(scores.shape(0))};
}

template <typename>
nb::arg stream_argument() {
  return nb::arg("stream");
}

// `queue` is nothing on a CPU, and the number of a CUDA stream on a GPU.
template <typename T, typename Device, typename... Queue>
void bind_gae_of(nb::module_& module) {
  using Rows = Input<T, Device>;
  using Offsets = Input<std::int64_t, Device>;
  module.def(
      "gae",
      [](const Strides<T, Device>& rewards, const Strides<T, Device>& values, const Offsets& offsets, double gamma,
         double lambda, const Output<T, Device>& advantages, const Output<T, Device>& returns, Queue... queue) {
        const auto num_samples = static_cast<std::int64_t>(offsets.shape(0)) - 1;
        nb::gil_scoped_release release;
#ifdef FUSE_WITH_CUDA
        using cuda::gae;
#endif
        gae(strided<T, Device>(rewards), strided<T, Device>(values), offsets.data(), num_samples, gamma, lambda,
            advantages.data(), returns.data(), queue...);
      },
      nb::arg("rewards").noconvert(), nb::arg("values").noconvert(), nb::arg("offsets").noconvert(), nb::arg("gamma"),
      nb::arg("lam"), nb::arg("advantages").noconvert(), nb::arg("returns").noconvert(), stream_argument<Queue>()...,
      "Writes the advantages and returns of every sample; shapes and offsets are the caller's to check.");
  module.def(
      "reward_sums",
      [](const Rows& logprobs, const Rows& reference_logprobs, const Rows& scores, const Rows& values,
         const Offsets& token_offsets, const Offsets& value_offsets, double kl_coef, bool is_k3,
         const Sums<Device>& sums, Queue... queue) {
        const Responses<T> responses =
            responses_of<T, Device>(logprobs, reference_logprobs, scores, values, token_offsets, value_offsets);
        nb::gil_scoped_release release;
#ifdef FUSE_WITH_CUDA
        using cuda::reward_sums;
#endif
        reward_sums(responses, {kl_coef, is_k3, 0.0, 1.0}, sums.data(), queue...);
      },
      nb::arg("logprobs").noconvert(), nb::arg("reference_logprobs").noconvert(), nb::arg("scores").noconvert(),
      nb::arg("values").noconvert(), nb::arg("token_offsets").noconvert(), nb::arg("value_offsets").noconvert(),
      nb::arg("kl_coef"), nb::arg("is_k3"), nb::arg("sums").noconvert(), stream_argument<Queue>()...,
      "Writes each sample's sum of rewards and of their squares, [num_samples, 2].");
  module.def(
      "shaped_gae",
      [](const Rows& logprobs, const Rows& reference_logprobs, const Rows& scores, const Rows& values,
         const Offsets& token_offsets, const Offsets& value_offsets, double kl_coef, bool is_k3, double reward_mean,
         double reward_scale, double gamma, double lambda, const Output<T, Device>& kl,
         const Output<T, Device>& advantages, const Output<T, Device>& returns, const Sums<Device>& sums,
         Queue... queue) {
        const Responses<T> responses =
            responses_of<T, Device>(logprobs, reference_logprobs, scores, values, token_offsets, value_offsets);
        nb::gil_scoped_release release;
#ifdef FUSE_WITH_CUDA
        using cuda::shaped_gae;
#endif
        shaped_gae(responses, {kl_coef, is_k3, reward_mean, reward_scale}, gamma, lambda, kl.data(), advantages.data(),
                   returns.data(), sums.data(), queue...);
      },
      nb::arg("logprobs").noconvert(), nb::arg("reference_logprobs").noconvert(), nb::arg("scores").noconvert(),
      nb::arg("values").noconvert(), nb::arg("token_offsets").noconvert(), nb::arg("value_offsets").noconvert(),
      nb::arg("kl_coef"), nb::arg("is_k3"), nb::arg("reward_mean"), nb::arg("reward_scale"), nb::arg("gamma"),
      nb::arg("lam"), nb::arg("kl").noconvert(), nb::arg("advantages").noconvert(), nb::arg("returns").noconvert(),
      nb::arg("sums").noconvert(), stream_argument<Queue>()...,
      "Writes KL estimates, advantages and returns, and each sample's sum of advantages and of their squares; shapes "
      "and offsets are the caller's to check.");
}

}  // namespace

void bind_gae(nb::module_& module) {
  bind_gae_of<float, nb::device::cpu>(module);
  bind_gae_of<double, nb::device::cpu>(module);
#ifdef FUSE_WITH_CUDA
  bind_gae_of<float, nb::device::cuda, std::uintptr_t>(module);
  bind_gae_of<double, nb::device::cuda, std::uintptr_t>(module);
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
}

}  // namespace fuse
