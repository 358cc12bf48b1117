// Compares copy_blocks of kv_blocks.cu, run by cuda_emulation.h, with that of kv_blocks.cc; prints every byte that
// differs, in the targets and around them.
#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "differences.h"
#include "tensor/kv_blocks.h"
#include "tensor/kv_blocks_cuda.h"

namespace {

using Memory = std::vector<std::uint8_t>;
using Shape = std::array<std::int64_t, 3>;  // heads, tokens, width
using Blocks = std::vector<fuse::Block>;

static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= 16, "memory starts where the widest units may");

Memory noise(std::int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  Memory bytes(static_cast<std::size_t>(size));
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(generator());
  return bytes;
}

// In elements.
struct Layout {
  std::int64_t first;
  Shape strides;
};

fuse::Block block_of(Memory& memory, const Layout& layout, const Shape& shape, std::int64_t element_bytes) {
  fuse::Block block{reinterpret_cast<std::int64_t>(memory.data()) + layout.first * element_bytes, {}, {}};
  for (std::size_t i = 0; i < 3; ++i) {
    block.shape[i] = shape[i];
    block.strides[i] = layout.strides[i] * element_bytes;
  }
  return block;
}

// Blocks of every layout to a message, one after the other, and back.
void compare(const Shape& shape, std::int64_t element_bytes) {
  const auto [heads, tokens, width] = shape;
  const std::int64_t capacity = tokens + 3;
  const std::vector<Layout> layouts{
      {0, {capacity * width, width, 1}},            // slots of one row
      {1, {capacity * width, width, 1}},            // the same, one element on
      {0, {width, heads * width, 1}},               // tokens first
      {3, {2 * capacity * width, 2 * width, 2}},    // every other element
      {0, {capacity * (width + 1), width + 1, 1}},  // padded
  };
  const auto num_blocks = static_cast<std::int64_t>(layouts.size());
  const std::int64_t part = heads * tokens * width;
  const std::int64_t buffer_bytes = (2 * heads * capacity * (width + 1) + 8) * element_bytes;
  const auto parts_of = [&](Memory& message) {
    Blocks blocks;
    for (std::int64_t i = 0; i < num_blocks; ++i) {
      blocks.push_back(block_of(message, {i * part, {tokens * width, width, 1}}, shape, element_bytes));
    }
    return blocks;
  };
  const auto rows_of = [&](std::vector<Memory>& buffers) {
    Blocks blocks;
    for (std::size_t i = 0; i < layouts.size(); ++i) {
      blocks.push_back(block_of(buffers[i], layouts[i], shape, element_bytes));
    }
    return blocks;
  };

  std::vector<Memory> buffers(layouts.size(), noise(buffer_bytes, 1));
  Memory cpp = noise((num_blocks * part + 4) * element_bytes, 2), cuda = cpp;
  fuse::copy_blocks(rows_of(buffers).data(), parts_of(cpp).data(), num_blocks, element_bytes);
  fuse::cuda::copy_blocks(rows_of(buffers).data(), parts_of(cuda).data(), num_blocks, element_bytes, 0);
  expect_equal("gathered", cpp, cuda, 0);

  std::vector<Memory> cpp_buffers(layouts.size(), noise(buffer_bytes, 3)), cuda_buffers = cpp_buffers;
  fuse::copy_blocks(parts_of(cpp).data(), rows_of(cpp_buffers).data(), num_blocks, element_bytes);
  fuse::cuda::copy_blocks(parts_of(cpp).data(), rows_of(cuda_buffers).data(), num_blocks, element_bytes, 0);
  for (std::size_t i = 0; i < layouts.size(); ++i) expect_equal("scattered", cpp_buffers[i], cuda_buffers[i], 0);
}

}  // namespace

int main() {
  for (const std::int64_t element_bytes : {1, 2, 4, 8, 16}) {
    for (const Shape& shape : {Shape{2, 6, 8}, {3, 1, 7}, {1, 6, 1}, {2, 0, 4}, {0, 3, 4}, {4, 33, 64}}) {
      compare(shape, element_bytes);
    }
  }
  return num_differences > 0;
}
