#pragma once

namespace nanovllm {

constexpr long kTileQueries = 96;  // rows of queries that a task handles together
constexpr long kChunk = 128;       // positions whose scores are held at a time

}  // namespace nanovllm
