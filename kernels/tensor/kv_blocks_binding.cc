#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/kv_blocks.h"
#ifdef FUSE_WITH_CUDA
#include "tensor/kv_blocks_cuda.h"
#endif

namespace nb = nanobind;

namespace fuse {
namespace {

template <typename>
nb::arg stream_argument() {
  return nb::arg("stream");
}

// `queue` is nothing on a CPU, and the number of a CUDA stream on a GPU.
template <typename Device, typename... Queue>
void bind_kv_blocks_of(nb::module_& module) {
  // Addresses, not arrays: an exchange through DLPack for each layer would take longer than the copies.
  using Blocks = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, Device>;
  constexpr std::size_t kFields = sizeof(Block) / sizeof(std::int64_t);
  module.def(
      "copy_blocks",
      [](const Blocks& sources, const Blocks& targets, std::int64_t element_bytes, Queue... queue) {
        const auto* from = reinterpret_cast<const Block*>(sources.data());
        const auto* to = reinterpret_cast<const Block*>(targets.data());
        nb::gil_scoped_release release;
#ifdef FUSE_WITH_CUDA
        using cuda::copy_blocks;
#endif
        copy_blocks(from, to, static_cast<std::int64_t>(sources.shape(0) / kFields), element_bytes, queue...);
      },
      nb::arg("sources"), nb::arg("targets"), nb::arg("element_bytes"), stream_argument<Queue>()...,
      "Copies each source to its target. A block is seven numbers: address, shape of three dimensions, strides in "
      "bytes. Addresses and shapes are the caller's to check, and to keep alive.");
}

}  // namespace

void bind_kv_blocks(nb::module_& module) {
  bind_kv_blocks_of<nb::device::cpu>(module);
#ifdef FUSE_WITH_CUDA
  bind_kv_blocks_of<nb::device::cuda, std::uintptr_t>(module);
#endif
}

}  // namespace fuse
