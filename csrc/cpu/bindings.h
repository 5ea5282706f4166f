// One function per family that adds its kernels to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace genfast {

void register_token_sampling(pybind11::module_& module);
void register_token_masking(pybind11::module_& module);
void register_attention(pybind11::module_& module);
void register_attention_cached(pybind11::module_& module);
void register_gradient_bucket(pybind11::module_& module);
void register_token_head(pybind11::module_& module);
void register_code_update(pybind11::module_& module);
void register_scalar_quantize(pybind11::module_& module);
void register_vector_quantize(pybind11::module_& module);
void register_residual_quantize(pybind11::module_& module);

}  // namespace genfast
