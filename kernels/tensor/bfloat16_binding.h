// BFloat16 as an element of arrays that cross from Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "tensor/linear_logprob_math.h"

template <>
struct nanobind::detail::dtype_traits<fuse::BFloat16> {
  static constexpr dlpack::dtype value{static_cast<std::uint8_t>(dlpack::dtype_code::Bfloat), 16, 1};
  static constexpr auto name = const_name("generic");  // for type checkers: numpy has no such type
};
template <>
struct nanobind::detail::dtype_traits<const fuse::BFloat16> : dtype_traits<fuse::BFloat16> {};
