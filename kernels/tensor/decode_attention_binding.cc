#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "tensor/bindings.h"
#include "tensor/decode_attention.h"

namespace nb = nanobind;

namespace fuse {

void bind_decode_attention(nb::module_& module) {
  using Query = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
  using Cache = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
  using Lengths = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Output = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
  module.def(
      "decode_attention",
      [](const Query& query, const Cache& keys, const Cache& values, const Lengths& lengths,
         const std::optional<Lengths>& slots, float scale, const Output& output) {
        const auto rows = static_cast<std::int64_t>(query.shape(0));
        const auto kv_heads = static_cast<std::int64_t>(keys.shape(1));
        const auto group = static_cast<std::int64_t>(query.shape(1)) / kv_heads;
        const auto head_dim = static_cast<std::int64_t>(query.shape(2));
        nb::gil_scoped_release release;
        decode_attention(query.data(), query.stride(0), query.stride(1), {keys.data(), keys.stride(0), keys.stride(1)},
                         {values.data(), values.stride(0), values.stride(1)}, lengths.data(), kAllTokens,
                         slots ? slots->data() : nullptr, rows, kv_heads, group, head_dim, scale, output.data());
      },
      nb::arg("query").noconvert(), nb::arg("keys").noconvert(), nb::arg("values").noconvert(),
      nb::arg("lengths").noconvert(), nb::arg("slots").noconvert().none(), nb::arg("scale"),
      nb::arg("output").noconvert(),
      "Writes every row's attention; each token's head_dim elements are contiguous, tokens follow one another, shapes "
      "and lengths are the caller's to check.");
}

}  // namespace fuse
