// Vectors of the widest kind that the compiler flags allow, on the vector extensions of GCC and
// Clang: one source for AVX-512, AVX2, NEON and everything else. Intrinsics are used only where the
// extensions cannot name an instruction.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// What Python calls; everything else stays inside the library.
#define NANOVLLM_API extern "C" __attribute__((visibility("default")))

namespace nanovllm {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define NANOVLLM_AVX512 1
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kWidth = kVectorBytes / 4;  // 32-bit lanes of a vector

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef int16_t HalfInts __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t QuarterInts __attribute__((vector_size(kVectorBytes / 4)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// `v`, as it is. The empty instruction makes compilers compute it here; else they put such sums off
// behind many products, and have no registers for those.
template <class Vector>
inline Vector kept_in_register(Vector v) {
#if defined(NANOVLLM_AVX512)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#elif defined(__ARM_NEON)
  asm volatile("" : "+w"(v));
#endif
  return v;
}

inline Floats splat(float x) { return Floats{} + x; }
inline Words splat_word(uint32_t x) { return Words{} + x; }

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Vector>
inline Vector load_raw(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Floats load(const float* p) { return load_raw<Floats>(p); }

#if defined(__AVX2__) && !defined(NANOVLLM_AVX512)
struct Halves {
  __m128i low, high;
};
#endif

// GCC takes these conversions apart, often element by element, unless they are spelled out.
inline Words widen(const uint16_t* p) {
#if defined(NANOVLLM_AVX512)
  return bit_cast<Words>(_mm512_cvtepu16_epi32(load_raw<__m256i>(p)));
#elif defined(__AVX2__)
  return bit_cast<Words>(_mm256_cvtepu16_epi32(load_raw<__m128i>(p)));
#else
  return __builtin_convertvector(load_raw<HalfWords>(p), Words);
#endif
}
inline Ints widen(const int8_t* p) {
#if defined(NANOVLLM_AVX512)
  return bit_cast<Ints>(_mm512_cvtepi8_epi32(load_raw<__m128i>(p)));
#elif defined(__AVX2__)
  return bit_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_raw<QuarterInts>(p), Ints);
#endif
}

// Elements that fit the narrower type; of others anything may come.
inline void store_narrow(int16_t* p, Ints x) {
  const HalfInts narrow = __builtin_convertvector(x, HalfInts);
  std::memcpy(p, &narrow, sizeof(narrow));
}
inline void store_narrow(int8_t* p, Ints x) {
#if defined(NANOVLLM_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bit_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const auto [low, high] = bit_cast<Halves>(x);
  const __m128i shorts = _mm_packs_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(shorts, shorts));
#else
  const QuarterInts narrow = __builtin_convertvector(x, QuarterInts);
  std::memcpy(p, &narrow, sizeof(narrow));
#endif
}

inline Floats load(const Bf16* p) { return bit_cast<Floats>(widen(&p->bits) << 16); }
inline Floats load(const int8_t* p) { return __builtin_convertvector(widen(p), Floats); }

// Byte `index` of a table of 16, which every 16 bytes repeat.
inline Bytes look_up(Bytes table, Bytes index) {
#if defined(NANOVLLM_AVX512)
  return bit_cast<Bytes>(_mm512_shuffle_epi8(bit_cast<__m512i>(table), bit_cast<__m512i>(index)));
#elif defined(__AVX2__)
  return bit_cast<Bytes>(_mm256_shuffle_epi8(bit_cast<__m256i>(table), bit_cast<__m256i>(index)));
#elif defined(__aarch64__)
  return bit_cast<Bytes>(vqtbl1q_u8(bit_cast<uint8x16_t>(table), bit_cast<uint8x16_t>(index)));
#else
  Bytes found;
  for (int i = 0; i < kVectorBytes; i++) found[i] = table[index[i]];
  return found;
#endif
}

// Bytes of a and b in turns: of the first 8, or the second, of each 16.
inline Bytes interleave(Bytes a, Bytes b, bool second) {
#if defined(NANOVLLM_AVX512)
  const auto x = bit_cast<__m512i>(a), y = bit_cast<__m512i>(b);
  return bit_cast<Bytes>(second ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y));
#elif defined(__AVX2__)
  const auto x = bit_cast<__m256i>(a), y = bit_cast<__m256i>(b);
  return bit_cast<Bytes>(second ? _mm256_unpackhi_epi8(x, y) : _mm256_unpacklo_epi8(x, y));
#elif defined(__aarch64__)
  const auto x = bit_cast<uint8x16_t>(a), y = bit_cast<uint8x16_t>(b);
  return bit_cast<Bytes>(second ? vzip2q_u8(x, y) : vzip1q_u8(x, y));
#else
  Bytes mixed;
  for (int i = 0; i < 8; i++) mixed[2 * i] = a[8 * second + i], mixed[2 * i + 1] = b[8 * second + i];
  return mixed;
#endif
}

// In each 32 bits, the products of two pairs of signed 16 bits, added up.
inline Ints multiply_pairs(Words a, Words b) {
#if defined(NANOVLLM_AVX512)
  return bit_cast<Ints>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Ints>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  const Ints x = bit_cast<Ints>(a), y = bit_cast<Ints>(b);
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// In each 16 bits, the products of two unsigned bytes and two signed ones, added up; the sum must fit.
inline Shorts multiply_bytes(Words a, Words b) {
#if defined(NANOVLLM_AVX512)
  return bit_cast<Shorts>(_mm512_maddubs_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Shorts>(_mm256_maddubs_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  const Shorts y = bit_cast<Shorts>(b);
  return bit_cast<Shorts>(a & 0x00ff00ffu) * ((y << 8) >> 8) +
         bit_cast<Shorts>((a >> 8) & 0x00ff00ffu) * (y >> 8);
#endif
}

#if defined(__AVX2__)
// Magnitudes of signed bytes, 128 that of -128.
inline Words magnitudes(Words w) {
#if defined(NANOVLLM_AVX512)
  return bit_cast<Words>(_mm512_abs_epi8(bit_cast<__m512i>(w)));
#else
  return bit_cast<Words>(_mm256_abs_epi8(bit_cast<__m256i>(w)));
#endif
}

// Signed bytes, negated where those of `signs` are negative; anything where they are zero.
inline Words apply_signs(Words x, Words signs) {
#if defined(NANOVLLM_AVX512)
  const auto bytes = bit_cast<__m512i>(x);
  const __mmask64 negative = _mm512_movepi8_mask(bit_cast<__m512i>(signs));
  return bit_cast<Words>(_mm512_mask_sub_epi8(bytes, negative, __m512i{}, bytes));
#else
  return bit_cast<Words>(_mm256_sign_epi8(bit_cast<__m256i>(x), bit_cast<__m256i>(signs)));
#endif
}
#endif

// The nearest integers, for magnitudes below 2^22.
inline Ints round_to_ints(Floats x) { return bit_cast<Ints>(x + 12582912.0f) - 0x4b400000; }

// IEEE half precision, finite.
inline Floats load_half(const uint16_t* p) {
#if defined(NANOVLLM_AVX512)
  return bit_cast<Floats>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return bit_cast<Floats>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  const Words bits = widen(p);
  const Floats magnitude = bit_cast<Floats>((bits & 0x7fffu) << 13) * 0x1p112f;
  return bit_cast<Floats>(bit_cast<Words>(magnitude) | (bits & 0x8000u) << 16);
#endif
}

// Rounds to nearest even; NaN stays NaN.
inline HalfWords to_bf16(Floats x) {
#if defined(__AVX512BF16__) && defined(NANOVLLM_AVX512)
  return bit_cast<HalfWords>(_mm512_cvtneps_pbh(bit_cast<__m512>(x)));
#else
  const Words bits = bit_cast<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : splat_word(0x7fc0u), HalfWords);
#endif
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(Bf16* p, Floats x) {
  const HalfWords bits = to_bf16(x);
  std::memcpy(p, &bits, sizeof(bits));
}

// The first `count` elements, zero beyond.
template <class T>
inline Floats load(const T* p, long count) {
  if (count >= kWidth) return load(p);
  T padded[kWidth] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <class T>
inline void store(T* p, Floats x, long count) {
  if (count >= kWidth) return store(p, x);
  T padded[kWidth];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

// A head of `dim` elements times `scale`, rotated: its first half with the second (Su et al. 2021).
template <class T>
inline void rotate_halves(const T* head, const float* cos, const float* sin, long dim, float scale,
                          float* out) {
  const long half = dim / 2;
  for (long d = 0; d < half; d += kWidth) {
    const long count = half - d;
    const Floats c = load(cos + d, count) * scale, s = load(sin + d, count) * scale;
    const Floats first = load(head + d, count), second = load(head + half + d, count);
    store(out + d, first * c - second * s, count);
    store(out + half + d, second * c + first * s, count);
  }
}

// 0, 1, 2 and so on.
inline Ints lanes() {
  Ints numbers;
  for (int i = 0; i < kWidth; i++) numbers[i] = i;
  return numbers;
}

template <class Vector>
inline Vector vector_max(Vector a, Vector b) {
  return a > b ? a : b;
}

// The lanes of a vector, its upper half with its lower one until one is left.
template <class Vector, class Combine>
inline auto reduce(Vector x, Combine&& combine) {
#if defined(__AVX2__) && !defined(NANOVLLM_AVX512)
  typedef float FourFloats __attribute__((vector_size(16)));
  typedef int32_t FourInts __attribute__((vector_size(16)));
  using Four = std::conditional_t<std::is_same_v<Vector, Floats>, FourFloats, FourInts>;
  const auto [low, high] = bit_cast<std::array<Four, 2>>(x);
  const Four four = combine(high, low);
  const __m128 both = bit_cast<__m128>(four);
  const Four two = combine(bit_cast<Four>(_mm_movehl_ps(both, both)), four);
  return combine(bit_cast<Four>(_mm_movehdup_ps(bit_cast<__m128>(two))), two)[0];
#else
  for (int half = kWidth / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) x[i] = combine(x[i + half], x[i]);
  }
  return x[0];
#endif
}

inline float sum(Floats x) {
#if defined(NANOVLLM_AVX512)
  return _mm512_reduce_add_ps(bit_cast<__m512>(x));
#else
  return reduce(x, [](auto a, auto b) { return a + b; });
#endif
}
inline int32_t sum(Ints x) {
#if defined(NANOVLLM_AVX512)
  return _mm512_reduce_add_epi32(bit_cast<__m512i>(x));
#else
  return reduce(x, [](auto a, auto b) { return a + b; });
#endif
}

inline float max(Floats x) {
#if defined(NANOVLLM_AVX512)
  return _mm512_reduce_max_ps(bit_cast<__m512>(x));
#else
  return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
#endif
}
inline int32_t max(Ints x) {
#if defined(NANOVLLM_AVX512)
  return _mm512_reduce_max_epi32(bit_cast<__m512i>(x));
#else
  return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
#endif
}

// 2^x to 2 units in the last place; 0 below -126, NaN stays NaN. Not for x above 127.
inline Floats exp2(Floats x) {
  const Floats low = splat(-126.0f);
  const Floats clipped = x < low ? low : x;
  const Floats shifted = clipped + 12582912.0f;  // 1.5 * 2^23: its last bits hold the integer part
  const Floats r = clipped - (shifted - 12582912.0f);  // in [-0.5, 0.5]
  Floats p = splat(1.54353139e-4f);
  p = p * r + 1.33388970e-3f;
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  const Words power = bit_cast<Words>(shifted) << 23;  // the magic number's own bits shift out
  const Floats y = bit_cast<Floats>(bit_cast<Words>(p) + power);
  return x < low ? Floats{} : y;
}

constexpr float kLog2E = 1.44269504088896341f;

constexpr long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// What int8 codes of some elements are multiplied by, and its inverse.
struct Int8Scale {
  float scale, inverse;
};

// By the largest magnitude. A NaN or an infinity cannot be rounded: it makes the scale a NaN and so
// spoils them all, as in exact arithmetic. Magnitudes are compared as integers, where an infinity is
// larger than all numbers, and a NaN larger still.
template <class T>
inline Int8Scale int8_scale(const T* p, long count) {
  Ints top{};
  const auto take = [&](Floats v) { top = vector_max(top, bit_cast<Ints>(v) & 0x7fffffff); };
  long i = 0;
  for (; i + kWidth <= count; i += kWidth) take(load(p + i));
  if (i < count) take(load(p + i, count - i));
  const float largest = bit_cast<float>(max(top));
  return {largest / 127.0f + largest * 0.0f, largest > 0 ? 127.0f / largest : 0.0f};
}

}  // namespace nanovllm
