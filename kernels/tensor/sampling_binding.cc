#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/sampling.h"
#ifdef FUSE_WITH_CUDA
#include "tensor/bfloat16_binding.h"
#include "tensor/sampling_cuda.h"
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
void bind_sampling_of(nb::module_& module) {
  using Logits = nb::ndarray<const T, nb::ndim<2>, Device>;
  using Temperatures = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, Device>;
  using Integers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, Device>;
  using Tokens = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, Device>;
  using Logprobs = nb::ndarray<float, nb::ndim<1>, nb::c_contig, Device>;
  module.def(
      "sample",
      [](const Logits& logits, const Temperatures& temperatures, const Integers& seeds, const Integers& sample_ids,
         const Integers& positions, const Tokens& tokens, const Logprobs& logprobs, Queue... queue) {
        const NoiseKeys keys{seeds.data(), sample_ids.data(), positions.data()};
        nb::gil_scoped_release release;
#ifdef FUSE_WITH_CUDA
        using cuda::sample;
#endif
        sample(logits.data(), logits.stride(0), static_cast<std::int64_t>(logits.shape(0)),
               static_cast<std::int64_t>(logits.shape(1)), temperatures.data(), keys, tokens.data(), logprobs.data(),
               queue...);
      },
      nb::arg("logits").noconvert(), nb::arg("temperatures").noconvert(), nb::arg("seeds").noconvert(),
      nb::arg("sample_ids").noconvert(), nb::arg("positions").noconvert(), nb::arg("tokens").noconvert(),
      nb::arg("logprobs").noconvert(), stream_argument<Queue>()...,
      "Writes every row's token and log-probability; the last dimension of logits is contiguous, shapes are the "
      "caller's to check.");
}

}  // namespace

void bind_sampling(nb::module_& module) {
  bind_sampling_of<float, nb::device::cpu>(module);
#ifdef FUSE_WITH_CUDA
  bind_sampling_of<float, nb::device::cuda, std::uintptr_t>(module);
  bind_sampling_of<BFloat16, nb::device::cuda, std::uintptr_t>(module);
#endif
}

}  // namespace fuse
