#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/int8_decoder.h"

namespace nb = nanobind;

namespace fuse {

void bind_int8_decoder(nb::module_& module) {
  using Table = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  static_assert(sizeof(DecoderLayer) == 18 * sizeof(void*) && sizeof(DecoderShape) == 8 * sizeof(std::int64_t));
  module.def(
      "int8_decode",
      [](const Table& shape, const Table& layers, const Table& ends, const Matrix& embeddings, float epsilon,
         const Table& token_ids, const Table& slots, const Table& positions, const Matrix& cosines, const Matrix& sines,
         const Output& logits) {
        const auto& sizes = *reinterpret_cast<const DecoderShape*>(shape.data());
        const auto address = [&](int i) { return reinterpret_cast<const void*>(ends.data()[i]); };
        const Int8Matrix head{static_cast<const std::int8_t*>(address(1)), static_cast<const float*>(address(2)),
                              static_cast<const float*>(address(3))};
        nb::gil_scoped_release release;
        int8_decode(sizes, reinterpret_cast<const DecoderLayer*>(layers.data()), static_cast<const float*>(address(0)),
                    head, embeddings.data(), epsilon, token_ids.data(), slots.data(), positions.data(), cosines.data(),
                    sines.data(), static_cast<std::int64_t>(token_ids.shape(0)), logits.data());
      },
      nb::arg("shape"), nb::arg("layers"), nb::arg("ends"), nb::arg("embeddings").noconvert(), nb::arg("epsilon"),
      nb::arg("token_ids").noconvert(), nb::arg("slots").noconvert(), nb::arg("positions").noconvert(),
      nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(), nb::arg("logits").noconvert(),
      "shape, layers: as in int8_decoder.h, layers by their addresses; ends: addresses of the last norm and the head's "
      "weights, scales and bias. All addresses and shapes are the caller's to check.");
}

}  // namespace fuse
