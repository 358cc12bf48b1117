// One bind_* function per kernel, each in its own file beside the kernel; module.cc calls them.
#pragma once

#include <nanobind/nanobind.h>

namespace fuse {

void bind_decode_attention(nanobind::module_& module);
void bind_gae(nanobind::module_& module);
void bind_kv_blocks(nanobind::module_& module);
void bind_layer_steps(nanobind::module_& module);
void bind_linear_logprob(nanobind::module_& module);
void bind_llama_decoder(nanobind::module_& module);
void bind_quantized_linear(nanobind::module_& module);
void bind_sampling(nanobind::module_& module);
void bind_skinny_linear(nanobind::module_& module);
void bind_suffix_index(nanobind::module_& module);

}  // namespace fuse
