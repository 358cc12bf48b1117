// One bind_* function per kernel, each in its own file beside the kernel; module.cc calls them.
#pragma once

#include <nanobind/nanobind.h>

namespace fuse {

void bind_gae(nanobind::module_& module);

}  // namespace fuse
