// What lies between the products: norms on the residual stream, and the gate of an MLP.

#include <cmath>

#include "gate.h"
#include "pool.h"
#include "replay.h"
#include "weights.h"

namespace nanovllm {
namespace {

template <class T>
void add_rms_norm(const T* x, T* residual, const float* weight, float eps, long rows, long width,
                  T* out) {
  for_each_row(rows, [&](long r) {
    const T* row = x + r * width;
    T* stream = residual ? residual + r * width : nullptr;
    T* target = out + r * width;
    Floats squares{};
    for (long i = 0; i < width; i += kWidth) {
      const long count = width - i;
      Floats v = load(row + i, count);
      if (stream) {
        v += load(stream + i, count);
        store(stream + i, v, count);
        v = load(stream + i, count);  // what later layers see is the rounded sum
      }
      squares += v * v;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / width + eps);
    const T* source = stream ? stream : row;
    for (long i = 0; i < width; i += kWidth) {
      const long count = width - i;
      store(target + i, load(source + i, count) * factor * load(weight + i, count), count);
    }
  });
}

template <class T>
void act_and_mul(int32_t gate, const T* gate_up, long rows, long width, T* out) {
  for_each_row(rows, [&](long r) {
    const T* row = gate_up + r * 2 * width;
    for (long i = 0; i < width; i += kWidth) {
      const long count = width - i;
      const Floats y = gated(gate, load(row + i, count), load(row + width + i, count));
      store(out + r * width + i, y, count);
    }
  });
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// residual += x (unless it is null), then out = RMSNorm(residual, or x) * weight[width]; the others
// are [rows, width].
NANOVLLM_API void nanovllm_add_rms_norm(int32_t type, const void* x, void* residual,
                                        const float* weight, float eps, int64_t rows, int64_t width,
                                        void* out) {
  const auto call = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    add_rms_norm(static_cast<const T*>(x), static_cast<T*>(residual), weight, eps, rows, width,
                 typed);
  };
  if (type == kFloat32) call(static_cast<float*>(out));
  else call(static_cast<Bf16*>(out));
}
NANOVLLM_REPLAYABLE(nanovllm_add_rms_norm)

// out[rows, width] = activation(gate) * up of gate_up[rows, 2 width].
NANOVLLM_API void nanovllm_act_and_mul(int32_t type, int32_t gate, const void* gate_up,
                                       int64_t rows, int64_t width, void* out) {
  if (type == kFloat32) {
    act_and_mul(gate, static_cast<const float*>(gate_up), rows, width, static_cast<float*>(out));
  } else {
    act_and_mul(gate, static_cast<const Bf16*>(gate_up), rows, width, static_cast<Bf16*>(out));
  }
}
NANOVLLM_REPLAYABLE(nanovllm_act_and_mul)
