// Lets Paddle's CPU build infer the shapes of operators that have kernels on GPUs only. Its operator functions ask the
// list of kernels for the dtypes that are allowed before they infer shapes; here the names and dtypes of the GPU's
// kernels are put into that list, without any code: nothing can be run with them.
#include <string>
#include <vector>

#include "paddle/phi/core/kernel_factory.h"

namespace {

void AllowDtypes(const std::string& name, const std::vector<phi::DataType>& dtypes) {
  auto& kernels = phi::KernelFactory::Instance().kernels()[name];
  for (auto dtype : dtypes) {
    phi::KernelKey key(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, dtype);
    if (!kernels.count(key)) kernels[key] = phi::Kernel();
  }
}

}  // namespace

extern "C" void allow_gpu_kernels() {
  const std::vector<phi::DataType> halves = {phi::DataType::FLOAT16, phi::DataType::BFLOAT16};
  auto all = halves;
  all.push_back(phi::DataType::FLOAT32);
  // As the GPU build registers them.
  AllowDtypes("block_multihead_attention", halves);
  AllowDtypes("flash_attn_unpadded", halves);
  AllowDtypes("fused_rotary_position_embedding", all);
  AllowDtypes("fused_rms_norm_quant", all);
  AllowDtypes("swiglu", all);
  // The GPU has 16-bit kernels of what surrounds them, the CPU has few.
  for (const char* name : {"matmul", "matmul_with_flatten", "addmm", "add", "multiply", "concat", "gather", "scatter",
                           "softmax", "where", "transpose", "reshape", "split", "slice", "strided_slice", "cast", "full",
                           "full_like", "rsqrt", "square", "mean", "scale", "silu", "gelu", "subtract", "squeeze",
                           "unsqueeze", "assign", "stack", "split_with_num", "fused_gemm_epilogue", "linear_v2"}) {
    AllowDtypes(name, halves);
  }
}
