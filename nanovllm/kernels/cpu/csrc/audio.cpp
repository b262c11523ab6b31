// What audio codecs are made of: Snake activations and causal convolutions that remember the last
// frames of each sequence, by slot. Signals are [seqs, frames, channels], float.

#include <algorithm>
#include <cstring>

#include "pool.h"
#include "simd.h"

namespace nanovllm {
namespace {

constexpr int kTaps = 7;             // of a depthwise convolution
constexpr long kMaxDilation = 9;
constexpr long kMaxPad = (kTaps - 1) * kMaxDilation;
constexpr long kChunk = 256;         // frames at a time: with their history they fit half of an L1
constexpr long kFramesPerItem = 16;  // of windows

// sin(x)^2 to 3 units in the last place of 1, as far as float tells multiples of pi apart.
inline Floats sin_squared(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * 0.318309886f + kMagic) - kMagic;
  // Pi in three parts (Cody & Waite), so short that the products are exact even without fused ones.
  Floats r = ((x - n * 3.140625f) - n * 9.67502593994140625e-4f) - n * 1.50995799097837e-7f;
  const Floats top = splat(1.6f);  // far out `n` is wrong, and the polynomial must not explode
  r = r > top ? top : r;
  r = r < -top ? -top : r;
  const Floats q = r * r;
  Floats p = splat(2.6083159809786593e-6f);  // sin(r) on [-pi/2, pi/2], after SLEEF
  p = p * q - 1.9810690719168633e-4f;
  p = p * q + 8.3330785855650902e-3f;
  p = p * q - 1.6666659712791443e-1f;
  const Floats sine = r + r * q * p;
  return sine * sine;
}

// One vector of channels: y + sin(alpha y)^2 / alpha of y = scale x + shift.
struct Snake {
  Floats alpha, inverse, scale, shift;

  // `table` is [4, channels]; if it is null, there is nothing to call.
  Snake(const float* table, long channels, long first) {
    if (!table) {
      alpha = inverse = scale = shift = Floats{};
      return;
    }
    const long count = channels - first;
    alpha = load(table + first, count);
    inverse = load(table + channels + first, count);
    scale = load(table + 2 * channels + first, count);
    shift = load(table + 3 * channels + first, count);
  }

  Floats operator()(Floats x) const {
    const Floats y = x * scale + shift;
    return y + inverse * sin_squared(y * alpha);
  }
};

struct Depthwise {
  const float* before;  // Snake tables, or null
  const float* weight;  // [kTaps, channels]
  const float* bias;
  const float* after;
  long dilation, channels;

  long pad() const { return (kTaps - 1) * dilation; }
};

// One sequence and one vector of its channels, from `first` on.
void convolve(const Depthwise& conv, const float* x, long frames, long first, float* history,
              float* out) {
  const long pad = conv.pad(), channels = conv.channels, count = channels - first;
  const Snake before(conv.before, channels, first), after(conv.after, channels, first);
  const Floats bias = load(conv.bias + first, count);
  Floats weight[kTaps];
  for (int k = 0; k < kTaps; k++) weight[k] = load(conv.weight + k * channels + first, count);

  Floats seen[kMaxPad + kChunk];  // the frames before the chunk, and the chunk's
  for (long t = 0; t < pad; t++) seen[t] = load(history + t * channels + first, count);
  for (long start = 0; start < frames; start += kChunk) {
    const long length = std::min(kChunk, frames - start);
    const float* in = x + start * channels + first;
    float* target = out + start * channels + first;
    if (conv.before) {
      for (long t = 0; t < length; t++) seen[pad + t] = before(load(in + t * channels, count));
    } else {
      for (long t = 0; t < length; t++) seen[pad + t] = load(in + t * channels, count);
    }
    const auto sum = [&](long t) {
      Floats y = bias;
#pragma GCC unroll 7
      for (int k = 0; k < kTaps; k++) y += weight[k] * seen[t + k * conv.dilation];
      return y;
    };
    if (conv.after) {
      for (long t = 0; t < length; t++) store(target + t * channels, after(sum(t)), count);
    } else {
      for (long t = 0; t < length; t++) store(target + t * channels, sum(t), count);
    }
    std::memmove(seen, seen + length, pad * sizeof(Floats));
  }
  for (long t = 0; t < pad; t++) store(history + t * channels + first, seen[t], count);
}

struct Windows {
  const float* x;
  const float* snake;  // table, or null
  float* history;      // [slots, pad, channels]
  const int64_t* slots;
  long frames, channels, pad, width, stride;
  float* out;  // [seqs * frames / stride, width * channels]

  long per_sequence() const { return frames / stride; }
  float* history_of(long sequence) const { return history + slots[sequence] * pad * channels; }

  // Calls `body` with every place in the output where a frame stands, counted from the history on.
  template <class Body>
  void for_places(long sequence, long frame, Body&& body) const {
    const long first = std::max(0L, (frame - width) / stride + (frame >= width));
    const long last = std::min(frame / stride, per_sequence() - 1);
    for (long window = first; window <= last; window++) {
      body(out + ((sequence * per_sequence() + window) * width + frame - window * stride) * channels);
    }
  }

  // Moves what a sequence remembers into its windows, and up if it goes on remembering it.
  void place_history(long sequence) const {
    float* remembered = history_of(sequence);
    for (long frame = 0; frame < pad; frame++) {
      for_places(sequence, frame, [&](float* to) {
        std::memcpy(to, remembered + frame * channels, channels * sizeof(float));
      });
    }
    if (frames < pad) {
      std::memmove(remembered, remembered + frames * channels,
                   (pad - frames) * channels * sizeof(float));
    }
  }

  void place_frame(long sequence, long t) const {
    const float* row = x + (sequence * frames + t) * channels;
    float* to[kMaxPlaces];
    int places = 0;
    for_places(sequence, pad + t, [&](float* place) { to[places++] = place; });
    if (t >= frames - pad) to[places++] = history_of(sequence) + (pad - frames + t) * channels;
    for (long i = 0; i < channels; i += kWidth) {
      const long count = channels - i;
      Floats value = load(row + i, count);
      if (snake) value = Snake(snake, channels, i)(value);
      for (int place = 0; place < places; place++) store(to[place] + i, value, count);
    }
  }

  static constexpr int kMaxPlaces = 9;  // windows that a frame is in, and the history
};

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// out = after(weight * before(x) + bias), all [seqs, frames, channels]; `history` is
// [slots, 6 * dilation, channels]. Tables of Snakes may be null; dilation is at most 9.
NANOVLLM_API void nanovllm_depthwise_conv(const float* x, int64_t seqs, int64_t frames,
                                          int64_t channels, const float* before,
                                          const float* weight, const float* bias, int64_t dilation,
                                          const float* after, float* history, const int64_t* slots,
                                          float* out) {
  const Depthwise conv{before, weight, bias, after, dilation, channels};
  const long vectors = (channels + kWidth - 1) / kWidth;
  Session session;
  session.parallel(seqs * vectors, [&](long item) {
    const long sequence = item / vectors, first = item % vectors * kWidth;
    convolve(conv, x + sequence * frames * channels, frames, first,
             history + slots[sequence] * conv.pad() * channels,
             out + sequence * frames * channels);
  });
}

// The rows that a strided causal convolution multiplies; see `Kernels.causal_windows`. A frame is in
// at most 8 windows.
NANOVLLM_API void nanovllm_causal_windows(const float* x, int64_t seqs, int64_t frames,
                                          int64_t channels, const float* snake, float* history,
                                          int64_t pad, const int64_t* slots, int64_t width,
                                          int64_t stride, float* out) {
  const Windows windows{x, snake, history, slots, frames, channels, pad, width, stride, out};
  Session session;
  // All that reads a history comes before what writes it.
  if (pad) session.parallel(seqs, [&](long sequence) { windows.place_history(sequence); });
  const long items = (frames + kFramesPerItem - 1) / kFramesPerItem;
  session.parallel(seqs * items, [&](long item) {
    const long sequence = item / items, first = item % items * kFramesPerItem;
    const long end = std::min<long>(frames, first + kFramesPerItem);
    for (long t = first; t < end; t++) windows.place_frame(sequence, t);
  });
}
