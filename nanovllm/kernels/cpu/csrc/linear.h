// The product that all linear layers are made of; see linear.cpp.
#pragma once

#include "simd.h"
#include "weights.h"

NANOVLLM_API void nanovllm_linear(const nanovllm::Weights* w, const void* x, int64_t rows,
                                  void* out, int32_t float_out, int32_t one_path, int32_t add);
