// Lets Paddle's CPU build infer the shapes of operators that have kernels on GPUs only. Its operator functions ask the
// list of kernels for the dtypes that are allowed before they infer shapes; here a name and its dtypes are put into that
// list without any code: nothing can be run with them.
#include "paddle/phi/core/kernel_factory.h"

extern "C" void allow_kernel(const char* name, int float32) {
  auto& kernels = phi::KernelFactory::Instance().kernels()[name];
  for (auto dtype : {phi::DataType::FLOAT16, phi::DataType::BFLOAT16, phi::DataType::FLOAT32}) {
    phi::KernelKey key(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, dtype);
    if ((float32 || dtype != phi::DataType::FLOAT32) && !kernels.count(key)) kernels[key] = phi::Kernel();
  }
}
