#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/bindings.h"
#include "tensor/llama_decoder.h"

namespace nb = nanobind;

namespace fuse {
namespace {

using Table = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The C++ structures as Python lists them: of nothing but addresses and 64-bit numbers.
template <class Structure>
const Structure* read(const Table& table) {
  static_assert(sizeof(Structure) % sizeof(std::int64_t) == 0 && sizeof(void*) == sizeof(std::int64_t));
  return reinterpret_cast<const Structure*>(table.data());
}

template <class Head>
struct Outer {
  const float* final_norm;
  Head head;
};

template <class Layer, class Head>
void bind(nb::module_& module, const char* name) {
  module.def(
      name,
      [](const Table& shape, const Table& layers, const Table& ends, const Matrix& embeddings, float epsilon,
         const Table& token_ids, const Table& slots, const Table& positions, const Matrix& cosines, const Matrix& sines,
         const Output& logits) {
        const auto& [final_norm, head] = *read<Outer<Head>>(ends);
        const DecoderRows rows{token_ids.data(), slots.data(), positions.data(),
                               cosines.data(),   sines.data(), static_cast<std::int64_t>(token_ids.shape(0))};
        nb::gil_scoped_release release;
        decode(*read<DecoderShape>(shape), read<Layer>(layers),
               DecoderEnds<Head>{final_norm, head, embeddings.data(), epsilon}, rows, logits.data());
      },
      nb::arg("shape"), nb::arg("layers"), nb::arg("ends"), nb::arg("embeddings").noconvert(), nb::arg("epsilon"),
      nb::arg("token_ids").noconvert(), nb::arg("slots").noconvert(), nb::arg("positions").noconvert(),
      nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(), nb::arg("logits").noconvert(),
      "shape, layers: as in llama_decoder.h, layers by their addresses; ends: of the last norm and the head. All "
      "addresses and shapes are the caller's to check.");
}

}  // namespace

void bind_llama_decoder(nb::module_& module) {
  bind<Int8Layer, Int8Matrix>(module, "int8_decode");
  bind<Int4Layer, Int8Matrix>(module, "int4_decode");
  bind<FloatLayer, FloatMatrices<1>>(module, "float_decode");
}

}  // namespace fuse
