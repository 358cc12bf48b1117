// In place of the file of this name beside the kernels: runs a kernel on the CPU.
#pragma once

#include <cstdint>

namespace fuse::cuda {

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, std::int64_t blocks, int threads, std::uintptr_t, Arguments... arguments) {
  launch_on_cpu(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments...); });
}

}  // namespace fuse::cuda
