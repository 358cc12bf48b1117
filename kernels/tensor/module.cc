#include "tensor/bindings.h"

NB_MODULE(_native, module) {
  module.doc() = "Native kernels. Arrays cross as DLPack; every function releases the GIL.";
  fuse::bind_decode_attention(module);
  fuse::bind_gae(module);
  fuse::bind_kv_blocks(module);
  fuse::bind_layer_steps(module);
  fuse::bind_linear_logprob(module);
  fuse::bind_llama_decoder(module);
  fuse::bind_quantized_linear(module);
  fuse::bind_sampling(module);
  fuse::bind_skinny_linear(module);
  fuse::bind_suffix_index(module);
}
