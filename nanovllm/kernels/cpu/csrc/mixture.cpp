// Mixtures of experts: each row goes through those few of many MLPs that score best for it.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "linear.h"
#include "pool.h"
#include "replay.h"

namespace nanovllm {
namespace {

// A row that goes through an expert, and the share of what becomes of it there.
struct Visit {
  int32_t expert;
  float share;
  long row;
};

// The visits of one row: to the experts of the best scores, the first ones among equals. Scores
// that are no numbers make shares that are none.
void route(const float* scores, long num_experts, long top_k, bool normalized, Visit* visits) {
  long count = 0;
  bool are_numbers = true;
  for (long e = 0; e < num_experts; e++) {
    are_numbers &= scores[e] == scores[e];
    if (count == top_k && !(scores[e] > scores[visits[count - 1].expert])) continue;
    long place = count < top_k ? count++ : count - 1;
    for (; place > 0 && scores[e] > scores[visits[place - 1].expert]; place--) {
      visits[place].expert = visits[place - 1].expert;
    }
    visits[place].expert = int32_t(e);
  }
  const float best = are_numbers ? scores[visits[0].expert] : NAN;
  float total = 0;
  for (long i = 0; i < top_k; i++) {
    visits[i].share = std::exp(scores[visits[i].expert] - best);
    total += visits[i].share;
  }
  if (!normalized) {
    total = 0;
    for (long e = 0; e < num_experts; e++) total += std::exp(scores[e] - best);
  }
  for (long i = 0; i < top_k; i++) visits[i].share /= total;
}

// The visits of all rows, by expert; `first[e]` is where those of expert e begin.
std::vector<Visit> by_expert(const std::vector<Visit>& visits, std::vector<long>& first) {
  for (const Visit& visit : visits) first[visit.expert + 1]++;
  for (size_t e = 1; e < first.size(); e++) first[e] += first[e - 1];
  std::vector<Visit> sorted(visits.size());
  std::vector<long> next(first);
  for (const Visit& visit : visits) sorted[next[visit.expert]++] = visit;
  return sorted;
}

template <class T>
void mix(const Weights* const* gate_up, const Weights* const* down, long num_experts, const T* x,
         const float* scores, long rows, long top_k, bool normalized, bool one_path, T* out) {
  const long depth = gate_up[0]->depth, inner = down[0]->depth, width = down[0]->columns;
  std::vector<Visit> visits(rows * top_k);
  for_each_row(rows, [&](long r) {
    Visit* mine = &visits[r * top_k];
    route(scores + r * num_experts, num_experts, top_k, normalized, mine);
    for (long i = 0; i < top_k; i++) mine[i].row = r;
  });
  std::vector<long> first(num_experts + 1);
  visits = by_expert(visits, first);
  long most = 0;
  for (long e = 0; e < num_experts; e++) most = std::max(most, first[e + 1] - first[e]);
  const std::unique_ptr<T[]> gathered(new T[most * depth]), hidden(new T[most * inner]);
  const std::unique_ptr<float[]> made(new float[most * width]);
  std::vector<float> sums(rows * width);
  // Experts take turns, always in the same order, which a row's sum then has, too.
  for (long e = 0; e < num_experts; e++) {
    const Visit* here = visits.data() + first[e];
    const long count = first[e + 1] - first[e];
    if (!count) continue;
    const T* input = x;
    if (count < rows) {
      for_each_row(count, [&](long i) {
        std::memcpy(&gathered[i * depth], x + here[i].row * depth, depth * sizeof(T));
      });
      input = gathered.get();
    }
    nanovllm_linear(gate_up[e], input, count, hidden.get(), false, one_path, false);
    nanovllm_linear(down[e], hidden.get(), count, made.get(), true, one_path, false);
    for_each_row(count, [&](long i) {
      float* target = &sums[here[i].row * width];
      const float* source = &made[i * width];
      for (long j = 0; j < width; j++) target[j] += here[i].share * source[j];
    });
  }
  for_each_row(rows, [&](long r) {
    for (long j = 0; j < width; j += kWidth) {
      store(out + r * width + j, load(&sums[r * width + j], width - j), width - j);
    }
  });
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// out[rows, width] = the sum over the `top_k` experts of each row that score best, of
// down(activation(gate x) * up x) by their shares, the softmax of scores[rows, num_experts]; if
// `normalized`, the shares of these few sum to one.
//
// x and out are of the weights' activation type, as for `nanovllm_linear`. gate_up and down hold
// num_experts weights each, of equal shapes.
NANOVLLM_API void nanovllm_mixture(const Weights* const* gate_up, const Weights* const* down,
                                   int64_t num_experts, const void* x, const float* scores,
                                   int64_t rows, int64_t top_k, int32_t normalized,
                                   int32_t one_path, void* out) {
  const auto call = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    mix(gate_up, down, num_experts, static_cast<const T*>(x), scores, rows, top_k,
        normalized != 0, one_path != 0, typed);
  };
  if (gate_up[0]->activation == kFloat32) call(static_cast<float*>(out));
  else call(static_cast<Bf16*>(out));
}
NANOVLLM_REPLAYABLE(nanovllm_mixture)
