// Kernels that can be called again by what was written down of a call: see replay.cpp.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace nanovllm {

constexpr int kMaxArguments = 11;

template <class T>
T from_word(int64_t word) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(word);
  else if constexpr (std::is_same_v<T, float>) return bit_cast<float>(int32_t(word));
  else return T(word);
}

template <class... Arguments, size_t... Index>
void call_again(void (*kernel)(Arguments...), const int64_t* words, std::index_sequence<Index...>) {
  static_assert(sizeof...(Arguments) <= kMaxArguments);
  kernel(from_word<Arguments>(words[Index])...);
}

template <class... Arguments>
void call_again(void (*kernel)(Arguments...), const int64_t* words) {
  call_again(kernel, words, std::index_sequence_for<Arguments...>{});
}

}  // namespace nanovllm

// After a kernel's definition: offers it under another name, with its arguments as words.
#define NANOVLLM_REPLAYABLE(kernel) \
  NANOVLLM_API void kernel##_again(const int64_t* words) { nanovllm::call_again(kernel, words); }
