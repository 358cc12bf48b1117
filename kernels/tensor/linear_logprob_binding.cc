#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bfloat16_binding.h"
#include "tensor/bindings.h"
#include "tensor/linear_logprob.h"
#ifdef FUSE_WITH_CUDA
#include "tensor/linear_logprob_cuda.h"
#endif

namespace nb = nanobind;

namespace fuse {
namespace {

template <typename T, typename Device>
using Logits = nb::ndarray<T, nb::ndim<2>, Device>;
template <typename Device>
using Targets = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, Device>;

template <typename T, typename Device>
LogitChunk<T> chunk_of(const Logits<T, Device>& logits, std::int64_t first_token) {
  return {logits.data(), logits.stride(0), static_cast<std::int64_t>(logits.shape(0)),
          static_cast<std::int64_t>(logits.shape(1)), first_token};
}

template <typename>
nb::arg stream_argument() {
  return nb::arg("stream");
}

// `queue` is nothing on a CPU, and the number of a CUDA stream on a GPU.
template <typename T, typename Device, typename... Queue>
void bind_linear_logprob_of(nb::module_& module) {
  using Statistics = nb::ndarray<double, nb::ndim<2>, Device>;
  using ConstStatistics = nb::ndarray<const double, nb::ndim<2>, Device>;
  module.def(
      "accumulate_logprob",
      [](const Logits<const T, Device>& logits, const Targets<Device>& targets, std::int64_t first_token,
         double temperature, const Statistics& statistics, Queue... queue) {
        const LogitChunk<const T> chunk = chunk_of<const T, Device>(logits, first_token);
        const LogprobStatistics<double> sums{statistics.data(), statistics.stride(0)};
        nb::gil_scoped_release release;
#ifdef FUSE_WITH_CUDA
        using cuda::accumulate_logprob;
#endif
        accumulate_logprob(chunk, targets.data(), temperature, sums, queue...);
      },
      nb::arg("logits").noconvert(), nb::arg("targets").noconvert(), nb::arg("first_token"), nb::arg("temperature"),
      nb::arg("statistics").noconvert(), stream_argument<Queue>()...,
      "Adds a chunk of logits to the statistics [4, rows]; rows of both are contiguous, shapes are the caller's to "
      "check.");
  module.def(
      "logprob_gradient",
      [](const Logits<T, Device>& logits, const Targets<Device>& targets, std::int64_t first_token, double temperature,
         const ConstStatistics& statistics, const ConstStatistics& grads, Queue... queue) {
        const LogitChunk<T> chunk = chunk_of<T, Device>(logits, first_token);
        const LogprobStatistics<const double> sums{statistics.data(), statistics.stride(0)};
        nb::gil_scoped_release release;
#ifdef FUSE_WITH_CUDA
        using cuda::logprob_gradient;
#endif
        logprob_gradient(chunk, targets.data(), temperature, sums, grads.data(), grads.data() + grads.stride(0),
                         queue...);
      },
      nb::arg("logits").noconvert(), nb::arg("targets").noconvert(), nb::arg("first_token"), nb::arg("temperature"),
      nb::arg("statistics").noconvert(), nb::arg("grads").noconvert(), stream_argument<Queue>()...,
      "Turns a chunk of logits into its gradient; grads [2, rows] are those of log-probabilities and entropies.");
}

}  // namespace

void bind_linear_logprob(nb::module_& module) {
  bind_linear_logprob_of<float, nb::device::cpu>(module);
  bind_linear_logprob_of<BFloat16, nb::device::cpu>(module);
  bind_linear_logprob_of<double, nb::device::cpu>(module);
#ifdef FUSE_WITH_CUDA
  bind_linear_logprob_of<float, nb::device::cuda, std::uintptr_t>(module);
  bind_linear_logprob_of<BFloat16, nb::device::cuda, std::uintptr_t>(module);
#endif
}

}  // namespace fuse
