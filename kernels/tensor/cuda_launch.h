// The start of a kernel; tests replace this file by one that runs the kernel on a CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fuse::cuda {

// Queues `blocks` blocks of `threads` threads on a stream. Throws std::runtime_error where CUDA refuses.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, std::int64_t blocks, int threads, std::uintptr_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  kernel<<<static_cast<unsigned>(blocks), threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA kernel: ") + cudaGetErrorString(error));
}

}  // namespace fuse::cuda
