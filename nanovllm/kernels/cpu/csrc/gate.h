// The gate of an MLP.
#pragma once

#include "simd.h"

namespace nanovllm {

// Its activation.
enum Gate : int32_t { kNoGate = 0, kSilu = 1, kGeluTanh = 2 };

// activation(x) * up; both activations are x times a sigmoid.
inline Floats gated(int32_t gate, Floats x, Floats up) {
  // x / 2 (1 + tanh(t / 2)) is x sigmoid(t), with t = sqrt(8 / pi) (x + 0.044715 x^3).
  const Floats t = gate == kSilu ? x : 1.59576912f * x * (1.0f + 0.044715f * x * x);
  // 2^126 is the largest power that exp2 is good for; beyond it the result is next to nothing.
  const Floats power = t * -kLog2E, top = splat(126.0f);
  return x / (1.0f + exp2(power > top ? top : power)) * up;
}

}  // namespace nanovllm
